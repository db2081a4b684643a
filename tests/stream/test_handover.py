"""Sinks that work in a thread behind the loop: the same folders, and the same guarantees."""

from __future__ import annotations

import copy
import json
import os
import signal
import threading
import time
from contextlib import closing
from functools import partial
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch
from PIL import Image
from run_folders import content, copy_running

from ttt_video.adaptation import Adapter
from ttt_video.data import BaseSource
from ttt_video.errors import UserError, ending_with
from ttt_video.processes import Interrupted, signals_interrupt
from ttt_video.stream import OverlayVideos, RunDirectory, Settings, Sink, StreamEvaluation, handover
from ttt_video.stream.clock import Clock
from ttt_video.stream.handover import DEPTH, HandoverBehind
from ttt_video.stream.saving import SavedPredictions
from ttt_video.stream.sinks import Rows, VideoRun

PATIENCE = 20.0  # seconds after which a test that would wait for ever fails


class ListSource(BaseSource):
    """A video in memory; ``before`` is called before each frame is handed over."""

    def __init__(self, frames, before=lambda index: None):
        self.frames, self.before = frames, before
        self.video_id, self.num_frames = frames[0]["video_id"], len(frames)

    def __iter__(self):
        for frame in self.frames:
            self.before(frame["frame_index"])
            yield frame


class Calls(Sink):
    """Calls a function with the index of each frame; notes the calls."""

    behind = True

    def __init__(self, call=lambda index: None):
        self.call = call
        self.written: list[int] = []
        self.threads: set[threading.Thread] = set()
        self.ended: list[tuple[int, bool]] = []

    def write(self, results):
        index = results.row["frame_index"]
        self.threads.add(threading.current_thread())
        self.call(index)
        self.written.append(index)

    def end(self, video):
        self.ended.append((video.done, video.complete))


def wait_for(condition):
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.001)


@pytest.fixture
def evaluate(tiny_cfg, tiny_model, tmp_path):
    """``evaluate(sources, name, KEY VALUE..., sinks=...)`` runs them, with the thread."""

    def run(sources, name="run", *opts, behind=True, resume=False, sinks=(), **options):
        cfg = tiny_cfg.clone()
        cfg.merge_from_list(["TTT.BATCH_SIZE", 2, *opts])
        directory = RunDirectory(tmp_path / name, resume=resume)
        sinks = sinks(cfg, directory.path) if callable(sinks) else sinks
        settings = Settings(cfg, directory, sinks=sinks, behind=behind, **options)
        try:
            return StreamEvaluation(settings, copy.deepcopy(tiny_model)).evaluate(sources)
        finally:
            directory.close()

    return run


@pytest.fixture
def rows_of(tmp_path):
    """``rows_of(name)`` reads the indices of the frames whose rows are on disk."""

    def read(name="run"):
        file = tmp_path / name / "frames.jsonl"
        text = file.read_text() if file.exists() else ""
        return [json.loads(line)["frame_index"] for line in text.splitlines(keepends=True)]

    return read


@pytest.fixture
def videos(make_video, tmp_path):
    """Two labelled videos of five frames and one."""
    made = [make_video("a", 5), make_video("b", 1)]
    for frame in (frame for video in made for frame in video):
        rng = np.random.default_rng(frame["frame_index"])
        file = tmp_path / f"{frame['video_id']}{frame['frame_index']}.png"
        Image.fromarray(rng.choice(np.array([0, 1, 10, 255], np.uint8), (64, 96))).save(file)
        frame["sem_seg_file_name"] = str(file)
    return made


def all_sinks(cfg, folder):
    formats = ("masks", "confidence")
    return [
        OverlayVideos(cfg, folder, fps=10, single=False),
        SavedPredictions(cfg, folder, formats, fps=10, compare=True),
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    "opts",
    [
        (),
        ("TTT.RESET", "never", "TTT.RECORD_STEPS", True, "TTT.STEPS_PER_FRAME", 2),
        ("TTT.METHOD", "offline_ttt_mae", "TTT.OFFLINE.STEPS", 1, "TTT.PREDICT", "before"),
    ],
)
def test_a_run_with_the_thread_has_the_folder_of_one_without(evaluate, videos, tmp_path, opts):
    """Byte for byte, seconds aside: rows, scores, summary, videos and pictures of both models."""
    for name, behind in (("in loop", False), ("behind", True)):
        sources = [ListSource(video) for video in videos]
        options = {"compare": True, "save_every": 2, "sinks": all_sinks}
        evaluate(sources, name, *opts, behind=behind, **options)
    assert content(tmp_path / "behind") == content(tmp_path / "in loop")


@pytest.mark.slow
def test_a_killed_run_with_the_thread_goes_on_to_the_same_folder(evaluate, videos, tmp_path):
    """A state has all that sinks wrote of the frames before it; the thread may be anywhere."""
    options = {"compare": True, "save_every": 2}
    evaluate([ListSource(videos[0])], "whole", behind=False, sinks=all_sinks, **options)
    killed = tmp_path / "killed"

    def kill(cfg, folder):
        def copy_at(index):
            if index == 3:
                copy_running(folder, killed)

        return [*all_sinks(cfg, folder), Calls(copy_at)]

    evaluate([ListSource(videos[0])], "run", sinks=kill, **options)
    again = Calls()
    sinks = {"sinks": lambda *args: [*all_sinks(*args), again]}
    evaluate([ListSource(videos[0])], "killed", resume=True, **sinks, **options)
    assert again.written == [2, 3, 4]
    assert content(killed) == content(tmp_path / "whole")


def test_the_loop_goes_on_while_sinks_work(evaluate, make_video, monkeypatch):
    """Only so far that no more than DEPTH frames are unwritten, in the order of frames."""
    predicted, unwritten = [], []
    predict = Adapter.predict

    def watched(adapter, frame):
        unwritten.append(len(predicted) - len(sink.written))
        predicted.append(frame["frame_index"])
        return predict(adapter, frame)

    monkeypatch.setattr(Adapter, "predict", watched)
    sink = Calls(lambda index: index or wait_for(lambda: len(predicted) > DEPTH))
    evaluate([ListSource(make_video("a", 6))], sinks=[sink])
    assert unwritten[DEPTH] == DEPTH  # the first frame's results were in the sink by then
    assert max(unwritten) <= DEPTH
    assert sink.written == list(range(6))
    assert sink.ended == [(6, True)]


def test_a_row_does_not_wait_for_the_next_frame(evaluate, make_video, rows_of):
    """A camera may not give one for long."""

    def before(index):
        if index:
            wait_for(lambda: len(rows_of()) == index)

    source = ListSource(make_video("a", 3), before)
    source.live = True
    evaluate([source])
    assert rows_of() == [0, 1, 2]


@pytest.mark.parametrize("error", [UserError("the disk is full"), ValueError("no such pixel")])
def test_an_error_of_a_sink_ends_the_run_as_in_the_loop(
    evaluate, make_video, tmp_path, rows_of, caplog, error
):
    """It is told as it is, once; the frames after it are not written."""

    def fail(index):
        if index == 1:
            raise error

    for name, behind in (("in loop", False), ("behind", True)):
        sink = Calls(fail)
        with pytest.raises(type(error)) as raised:
            evaluate([ListSource(make_video("a", 5))], name, sinks=[sink], behind=behind)
        assert raised.value is error
        assert str(error) in ("the disk is full", "no such pixel")
        assert sink.written == [0]
        assert sink.ended == [(2, False)]
        assert rows_of(name) == [0, 1]
        assert (tmp_path / name / "summary.json").exists()
    assert not caplog.messages
    assert content(tmp_path / "behind") == content(tmp_path / "in loop")


def test_frames_before_an_interrupt_are_written(evaluate, make_video, rows_of, monkeypatch):
    """Those whose predictions were made before Ctrl-C, also where their sinks are slow."""
    reached = threading.Event()
    predict = Adapter.predict

    def interrupted(adapter, frame):
        if frame["frame_index"] == 2:
            reached.set()
            raise KeyboardInterrupt
        return predict(adapter, frame)

    monkeypatch.setattr(Adapter, "predict", interrupted)
    sink = Calls(lambda index: index or reached.wait(PATIENCE))
    with pytest.raises(KeyboardInterrupt):
        evaluate([ListSource(make_video("a", 4))], sinks=[sink])
    assert reached.is_set()
    assert rows_of() == sink.written == [0, 1]
    assert sink.ended == [(2, False)]


def test_a_signal_while_a_frame_is_written_comes_after_it(
    evaluate, make_video, rows_of, monkeypatch
):
    """Without the thread: between two of the sinks, or before the first."""
    write = Rows.write

    def interrupted(rows, results):
        if results.row["frame_index"] == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        write(rows, results)

    monkeypatch.setattr(Rows, "write", interrupted)
    sink = Calls()
    with signals_interrupt(), pytest.raises(Interrupted):
        evaluate([ListSource(make_video("a", 4))], behind=False, sinks=[sink])
    assert rows_of() == sink.written == [0, 1]
    assert sink.ended == [(2, False)]


def test_a_second_interrupt_leaves_whole_files(evaluate, videos, tmp_path, monkeypatch):
    """It comes while the loop waits for the sinks: they end all the same, and so does the run."""
    closing_now = threading.Event()
    predict, close = Adapter.predict, HandoverBehind.close

    def interrupted(adapter, frame):
        if frame["frame_index"] == 2:
            raise KeyboardInterrupt
        return predict(adapter, frame)

    def watched(self):
        closing_now.set()
        close(self)

    def interrupt_again(index):
        if index == 1 and closing_now.wait(PATIENCE):
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Adapter, "predict", interrupted)
    monkeypatch.setattr(HandoverBehind, "close", watched)
    last = Calls(interrupt_again)
    with pytest.raises(KeyboardInterrupt):
        evaluate(
            [ListSource(videos[0])],
            compare=True,
            sinks=lambda cfg, folder: [*all_sinks(cfg, folder), last],
        )
    assert closing_now.is_set()
    assert last.ended == [(2, False)]
    run = tmp_path / "run"
    assert json.loads((run / "summary.json").read_text())["frames"] == 2
    assert len(list((run / "masks" / "a").glob("*.png"))) == 2
    with av.open(str(run / "overlay-a.mp4")) as overlay:
        assert sum(1 for _ in overlay.decode(video=0)) == 2


@pytest.mark.parametrize("first", [None, KeyboardInterrupt("1"), UserError("full")])
def test_an_interrupt_stops_one_ending_and_no_other(first, caplog):
    called = []

    def interrupted():
        called.append("interrupted")
        raise KeyboardInterrupt("2")

    def fails():
        called.append("fails")
        raise ValueError("late")

    def run():
        with ending_with(interrupted, fails, lambda: called.append("last")):
            if first is not None:
                raise first

    with pytest.raises(KeyboardInterrupt, match="1" if "1" in str(first) else "2"):
        run()
    assert called == ["interrupted", "fails", "last"]
    told = ["UserError: full"] if isinstance(first, UserError) else []
    assert caplog.messages == [*told, "ValueError: late"]


def test_a_frame_that_cannot_be_read_leaves_those_before_it(evaluate, make_video, rows_of):
    def before(index):
        if index == 2:
            raise UserError("frame 2 cannot be read")

    with pytest.raises(UserError, match=r"^frame 2 cannot be read$"):
        evaluate([ListSource(make_video("a", 4), before)])
    assert rows_of() == [0, 1]


@pytest.mark.parametrize(
    ("opts", "behind", "others"),
    [((), None, []), (("TTT.FRAME_BUDGET_MS", 60_000), True, []), ((), True, [Sink()])],
    ids=["cpu", "budget", "sink"],
)
def test_sinks_work_in_the_loop_where_they_should(evaluate, make_video, opts, behind, others):
    """On a CPU, whose cores the model needs; within a budget, which pays for them; and beside a
    sink that may look at the model."""
    sink = Calls()
    evaluate([ListSource(make_video("a", 2))], "run", *opts, sinks=[sink, *others], behind=behind)
    assert sink.threads == {threading.current_thread()}


def test_networks_score_colors_in_the_loop(tiny_cfg, tiny_model, tmp_path, monkeypatch):
    """Their products would follow what the loop says of TF32 at the time."""
    monkeypatch.setattr(type(tiny_model), "outputs", frozenset({"color"}))
    with closing(RunDirectory(tmp_path / "run")) as directory:
        settings = Settings(tiny_cfg, directory, behind=True)
        assert not StreamEvaluation(settings, tiny_model).behind


@pytest.mark.parametrize("behind", [False, True])
def test_only_the_row_waits_for_the_device(evaluate, make_video, monkeypatch, behind):
    """Three parts of each frame are timed, of both models; the thread reads their seconds."""
    waits = []
    follow = Clock.follow

    def watched(clock, call, *arguments):
        result, seconds = follow(clock, call, *arguments)

        def read():
            waits.append(threading.current_thread() is threading.main_thread())
            return seconds()

        return result, read

    monkeypatch.setattr(Clock, "follow", watched)
    evaluate([ListSource(make_video("a", 3))], behind=behind, compare=True)
    assert waits == [not behind] * 18


def test_on_a_gpu_a_frame_is_kept_until_the_device_has_read_it(monkeypatch):
    """The thread's stream starts after the loop's work and is waited for, also after an error."""
    events: list[object] = []

    class Stream:
        def __init__(self, device):
            events.append(("stream", str(device)))

        def wait_event(self, event):
            events.append(("wait", event))

        def synchronize(self):
            events.append("end")

        def __enter__(self):
            events.append("enter")

        def __exit__(self, *error):
            events.append("leave")

    current = SimpleNamespace(record_event=lambda: "ready")
    monkeypatch.setattr(handover.torch.cuda, "Stream", Stream)
    monkeypatch.setattr(handover.torch.cuda, "current_stream", lambda device: current)
    monkeypatch.setattr(handover.torch.cuda, "stream", lambda stream: stream)

    def write(index):
        events.append(index)
        if index == 1:
            raise UserError("full")

    video = VideoRun(ListSource([{"video_id": "a"}]), None)
    thread = HandoverBehind([Calls(write)], video, Clock("cuda:1"))
    for index in range(2):
        thread.write(partial(SimpleNamespace, row={"frame_index": index}))
    with pytest.raises(UserError, match="full"):
        thread.close()
    written = [["enter", ("wait", "ready"), index, "end", "leave"] for index in range(2)]
    assert events == [("stream", "cuda:1"), *written[0], *written[1]]
    assert video.done == 2


def test_a_clock_follows_a_gpu_without_waiting(monkeypatch):
    """Seconds are between events on the device, without those for which the clock stood."""
    waits: list[float] = []
    now = 0.0

    class Event:
        def __init__(self, **_):
            pass

        def record(self, stream):
            self.at = now

        def synchronize(self):
            waits.append(self.at)

        def elapsed_time(self, other):
            return 1000 * (other.at - self.at)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    stream = SimpleNamespace(synchronize=lambda: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    clock = Clock("cuda", read=lambda: now)

    def work(seconds, paused):
        nonlocal now
        now += seconds
        with clock.paused():
            now += paused
        return seconds

    parts = [clock.follow(work, seconds, paused) for seconds, paused in ((1.0, 0.5), (2.0, 0.0))]
    assert waits == []
    assert [(result, seconds()) for result, seconds in parts] == [(1.0, 1.0), (2.0, 2.0)]
    assert waits == [1.5, 3.5]
