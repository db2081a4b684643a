"""How processes end: signals, parents that are killed, streams that nobody reads."""

from __future__ import annotations

import multiprocessing
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from processes import stand_in

from ttt_video import processes
from ttt_video.cli import run_tool
from ttt_video.errors import UserError
from ttt_video.processes import Interrupted, end_with, signals_interrupt, whole
from ttt_video.sweeps.cells import Cell
from ttt_video.sweeps.workers import run_local

PROCESSES = Path(__file__).parents[1] / "ttt_video/processes.py"
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Forked:
    """A tool in a process of its own, which a fork has at once: imports take seconds."""

    def __init__(self, main: Callable[[], None], prepare: Callable[[], None] = lambda: None):
        (self.out, out), (self.err, err) = os.pipe(), os.pipe()
        self.process = os.fork()
        if self.process:
            os.close(out)
            os.close(err)
            return
        code = 70
        try:
            for number in ENDING:
                signal.signal(number, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            for mine, theirs, number in ((self.out, out, 1), (self.err, err, 2)):
                os.close(mine)
                os.dup2(theirs, number)
                os.close(theirs)
            sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w", buffering=1)
            prepare()
            run_tool(main)
            code = 0
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else 71
        finally:
            os._exit(code)

    def expect(self, word: bytes) -> None:
        """Waits until it has printed a word."""
        seen = b""
        while word not in seen:
            more = os.read(self.out, 1)
            assert more, seen
            seen += more

    def end(self) -> tuple[int, str, str]:
        """Waits for its end: exit code, and what it printed from here on."""
        texts = []
        for descriptor in (self.out, self.err):
            with suppress(OSError), os.fdopen(descriptor) as file:
                texts.append(file.read())
        code = os.waitstatus_to_exitcode(os.waitpid(self.process, 0)[1])
        return code, *texts

    def kill(self, number: int) -> None:
        os.kill(self.process, number)


def say(word: str) -> None:
    print(word, flush=True)


def work_and_keep() -> None:
    try:
        say("works")
        time.sleep(60)
    finally:
        say("keeps")
        time.sleep(0.2)
        say("kept")


@pytest.mark.parametrize(
    ("number", "line"),
    [(signal.SIGINT, "interrupted\n"), (signal.SIGTERM, "interrupted by SIGTERM\n"),
     (signal.SIGHUP, "interrupted by SIGHUP\n")],
)  # fmt: skip
def test_a_signal_ends_a_tool_like_ctrl_c(number, line):
    tool = Forked(work_and_keep)
    tool.expect(b"works\n")
    tool.kill(number)
    tool.expect(b"keeps\n")
    tool.kill(signal.SIGTERM)  # once more, while it keeps what there is
    tool.kill(signal.SIGHUP)
    assert tool.end() == (128 + number, "kept\n", line)


def test_a_signal_that_is_ignored_stays_so():
    """As nohup's SIGHUP."""

    def main() -> None:
        os.kill(os.getpid(), signal.SIGHUP)
        say("goes on")

    tool = Forked(main, prepare=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN) and None)
    assert tool.end() == (0, "goes on\n", "")


def test_handlers_are_as_before_afterwards_and_in_forked_helpers():
    before = [signal.getsignal(number) for number in ENDING]
    with signals_interrupt():
        assert all(signal.getsignal(n) != b for n, b in zip(ENDING, before, strict=True))
        process = os.fork()
        if not process:
            signal.raise_signal(signal.SIGTERM)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == -signal.SIGTERM
    assert [signal.getsignal(number) for number in ENDING] == before


def test_a_signal_counts_again_after_a_while(monkeypatch):
    """The first may have been raised where Python drops exceptions."""
    monkeypatch.setattr("ttt_video.processes._GRACE", 0.0)
    with signals_interrupt():
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGHUP):
            with pytest.raises(Interrupted, match=number.name):
                signal.raise_signal(number)


def test_helpers_do_not_keep_an_interrupted_tool():
    def main() -> None:
        context = multiprocessing.get_context("fork")
        context.Process(target=time.sleep, args=(600,)).start()
        say("works")
        time.sleep(60)

    tool = Forked(main)
    tool.expect(b"works\n")
    tool.kill(signal.SIGTERM)
    assert tool.end() == (143, "", "interrupted by SIGTERM\n")  # the helper held both pipes


@pytest.mark.parametrize("raised", [None, UserError("no"), SystemExit(0)])
def test_output_that_nobody_reads_is_no_traceback(raised, tmp_path):
    """``tool | head -1``."""

    def main() -> None:
        say("first")
        while not (tmp_path / "closed").exists():
            time.sleep(0.01)
        try:
            print("x" * 100_000)
        finally:
            (tmp_path / "kept").touch()
            if raised is not None:
                raise raised

    tool = Forked(main)
    tool.expect(b"first\n")
    os.close(tool.out)
    (tmp_path / "closed").touch()
    code, err = tool.end()
    assert err == ("error: no\n" if isinstance(raised, UserError) else "")
    assert code == {type(None): 141, UserError: 2, SystemExit: 0}[type(raised)]
    assert (tmp_path / "kept").exists()


def test_errors_that_nobody_reads_are_no_traceback(tmp_path):
    def main() -> None:
        say("first")
        while not (tmp_path / "closed").exists():
            time.sleep(0.01)
        raise UserError("no")

    tool = Forked(main)
    tool.expect(b"first\n")
    os.close(tool.err)
    (tmp_path / "closed").touch()
    code, out = tool.end()
    assert (code, out) == (2, "")


def test_closed_streams_are_not_taken_for_files(tmp_path):
    """``tool >&- 2>&-``: what is printed must not go into the next file that is opened."""

    def prepare() -> None:
        os.close(1)
        os.close(2)
        sys.stdout = sys.stderr = None

    def main() -> None:
        with (tmp_path / "rows").open("wb", buffering=0) as file:
            file.write(b"row\n")
            print("printed", flush=True)
            print("printed", file=sys.stderr, flush=True)
            os.write(1, b"written")
            os.write(2, b"written")
            raise UserError("no")

    assert Forked(main, prepare).end() == (2, "", "")
    assert (tmp_path / "rows").read_bytes() == b"row\n"


def test_a_process_ends_with_its_parent():
    def main() -> None:
        parent = os.getpid()
        if not os.fork():
            end_with(parent)
            say("child")
            time.sleep(600)
        time.sleep(600)

    tool = Forked(main)
    tool.expect(b"child\n")
    tool.kill(signal.SIGKILL)
    assert tool.end() == (-signal.SIGKILL, "", "")  # the pipes are closed, so the child is gone


def test_a_process_whose_parent_is_gone_ends_at_once():
    def main() -> None:
        end_with(os.getpid())  # no process is its own parent
        say("goes on")

    assert Forked(main).end() == (-signal.SIGKILL, "", "")


TOOL = f"""
import os, pathlib, runpy, signal, sys, time
processes = runpy.run_path({str(PROCESSES)!r})
processes["end_with_parent"]()
assert "TTT_VIDEO_PARENT" not in os.environ
folder = pathlib.Path(sys.argv[sys.argv.index("--output") + 1])
pipe = os.open(os.environ["PIPE"], os.O_WRONLY)
try:
    with processes["signals_interrupt"]():
        os.write(pipe, b"cell\\n")
        time.sleep(600)
except KeyboardInterrupt:
    (folder / "kept").touch()
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_no_cell_of_a_sweep_outlives_it(tmp_path, number, monkeypatch):
    stand_in(TOOL, tmp_path, monkeypatch)
    os.mkfifo(tmp_path / "pipe")
    monkeypatch.setenv("PIPE", str(tmp_path / "pipe"))
    cells = [
        Cell("r", "r", "none", {}, "s", seed, ("--video", "v"), {}, {}, tmp_path / str(seed))
        for seed in range(3)
    ]

    def main() -> None:
        say("works")
        for _ in run_local(cells, workers=2, threads=1):
            raise AssertionError("no cell ends by itself")

    tool = Forked(main)
    tool.expect(b"works\n")
    pipe = os.open(tmp_path / "pipe", os.O_RDONLY)
    assert [os.read(pipe, 5), os.read(pipe, 5)] == [b"cell\n", b"cell\n"]
    tool.kill(number)
    assert tool.end()[0] == (143 if number == signal.SIGTERM else -number)
    assert os.read(pipe, 1) == b""  # whoever had the other end is gone, and no third was started
    os.close(pipe)
    kept = number == signal.SIGTERM
    assert [(cell.folder / "kept").exists() for cell in cells] == [kept, kept, False]


def test_a_forked_child_has_the_handlers_from_before_at_once():
    """A handler of Python's would not run in a child that waits for a lock."""
    with signals_interrupt():
        assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
        child = os.fork()
        if child == 0:
            os._exit(0 if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL else 1)
        assert os.waitpid(child, 0)[1] == 0
        assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL


def test_the_first_signal_waits_for_a_step_that_is_to_be_whole():
    done = []

    def work() -> None:
        with whole():
            os.kill(os.getpid(), signal.SIGTERM)
            done.append("step")
            with whole():
                done.append("its part")
            done.append("end")
        done.append("next")

    with signals_interrupt(), pytest.raises(Interrupted, match="SIGTERM"):
        work()
    assert done == ["step", "its part", "end"]


def test_a_second_ctrl_c_does_not_wait():
    done = []

    def work(presses: int) -> None:
        with whole():
            for _ in range(presses):
                os.kill(os.getpid(), signal.SIGINT)
                done.append("step")

    with signals_interrupt():
        with pytest.raises(Interrupted, match="SIGINT"):
            work(presses=2)
        assert done == ["step"]
        work(presses=0)  # nothing is left of the first


def test_a_signal_after_a_minute_does_not_wait_for_a_step_that_hangs(monkeypatch):
    monkeypatch.setattr(processes, "_GRACE", 0.0)
    done = []

    def work() -> None:
        with whole():
            for _ in range(3):
                os.kill(os.getpid(), signal.SIGTERM)
                done.append("step")

    with signals_interrupt(), pytest.raises(Interrupted):
        work()
    assert done == ["step"]


def test_a_child_of_a_step_is_not_in_it():
    with signals_interrupt(), whole():
        child = os.fork()
        if child == 0:
            code = 1
            try:
                with signals_interrupt(), whole():
                    os.kill(os.getpid(), signal.SIGTERM)
            except Interrupted:
                code = 0
            finally:
                os._exit(code)
        assert os.waitpid(child, 0)[1] == 0


def test_an_error_in_a_step_is_raised_and_not_the_signal():
    def work(error: bool) -> None:
        with whole():
            if error:
                os.kill(os.getpid(), signal.SIGHUP)
                raise UserError("the disk is full")

    with signals_interrupt():
        with pytest.raises(UserError):
            work(error=True)
        work(error=False)


FAULTS = """
import sys
from resource import RUSAGE_SELF, getrusage
import numpy as np
from ttt_video.processes import keep_freed_memory

print(keep_freed_memory() if "keep" in sys.argv else None)
for _ in range(3):
    before = getrusage(RUSAGE_SELF).ru_minflt
    blocks = [np.ones(20 << 20, np.uint8) for _ in range(10)]
    del blocks
    print(getrusage(RUSAGE_SELF).ru_minflt - before)
"""
"""Takes and frees 200 MiB three times; prints the pages that the kernel had to give."""


def faults(*arguments: str, **variables: str) -> tuple[str, list[int]]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC", "GLIBC"))}
    said, *numbers = subprocess.run(
        [sys.executable, "-c", FAULTS, *arguments],
        env={**environment, **variables}, check=True, capture_output=True, text=True,
    ).stdout.split()  # fmt: skip
    return said, list(map(int, numbers))


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_freed_memory_stays_for_the_next_frame():
    said, kept = faults("keep")
    assert said == "True"
    assert kept[0] > 100  # pages of 4 KiB to 2 MiB
    assert max(kept[1:]) < kept[0] / 100
    _, given_back = faults()
    assert min(given_back) > kept[0] / 2


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("MALLOC_TOP_PAD_", "131072", "False"),
        ("GLIBC_TUNABLES", "glibc.malloc.check=0", "False"),
        ("MALLOC_ARENA_MAX", "2", "True"),
    ],
)
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_settings_of_the_environment_stay(name, value, said):
    assert faults("keep", **{name: value})[0] == said
