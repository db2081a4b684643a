"""``ttt-video stream`` on live sources: what it leaves on disk, how it ends, what it refuses."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import av
import pytest
from live_servers import sending, transport_stream
from processes import python_path

from ttt_video.cli import run_tool
from ttt_video.data import captures, live_sources
from ttt_video.files import file_stem
from ttt_video.modeling.weights import save_safetensors
from ttt_video.stream import parallel
from ttt_video_cli import call


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(live_sources, "PAUSES", (0.01, 0.03))


@pytest.fixture
def flags(tiny_cfg, tiny_model, tmp_path) -> list[str]:
    """--config, --weights and --output of the tiny model."""
    tiny_cfg.merge_from_list(["TTT.BATCH_SIZE", 1, "TTT.MICRO_BATCH_SIZE", 1])
    config, weights = tmp_path / "tiny.yaml", tmp_path / "tiny.safetensors"
    config.write_text(tiny_cfg.dump())
    save_safetensors(tiny_model.state_dict(), str(weights))
    files = {"--config": config, "--weights": weights, "--output": tmp_path / "out"}
    return [word for flag, path in files.items() for word in (flag, str(path))]


def rows_of(folder: Path, name: str = "frames.jsonl") -> list[dict]:
    file = folder / name
    text = file.read_text() if file.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def overlay(path: Path) -> tuple[int, float]:
    """Number of frames that decode, and frames per second."""
    with av.open(str(path)) as container:
        rate = container.streams.video[0].average_rate
        return sum(1 for _ in container.decode(video=0)), float(rate)


def test_as_many_frames_as_asked_for_over_a_break(flags, tmp_path):
    with sending(transport_stream(0, 12), transport_stream(12, 20)) as url:
        call("stream", [*flags, "--source", url, "--max-frames", "15"])
    out = tmp_path / "out"
    assert [row["frame_index"] for row in rows_of(out)] == [*range(15)]
    assert {row["video_id"] for row in rows_of(out)} == {url}
    assert rows_of(out, "videos.jsonl") == [
        {"video_id": url, "complete": True, "frames": 15, "total": 15, "skipped_frames": []}
    ]
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["complete"], summary["videos"]) == (True, {url: 15})
    assert overlay(out / "overlay.mp4") == (15, 25)
    assert not (out / "unfinished").exists()
    assert json.loads((out / "sources.json").read_text()) == {url: None}


@pytest.mark.slow
def test_a_duration_ends_a_stream_that_has_gone_silent(flags, tmp_path):
    with sending(transport_stream(0, 30), hold=True) as url:
        call("stream", [*flags, "--source", url, "--latest", "--duration", "1.5"])
    (video,) = rows_of(tmp_path / "out", "videos.jsonl")
    assert (video["complete"], video["total"]) == (True, None)
    assert video["frames"] == len(rows_of(tmp_path / "out")) > 0
    # Dropped pictures are missing, so the camera's 25 per second would be too fast.
    assert overlay(tmp_path / "out" / "overlay.mp4") == (video["frames"], 10)


def test_a_stream_that_sends_no_picture_in_time_is_told(
    flags, tmp_path, capsys, caplog, monkeypatch
):
    monkeypatch.setattr(captures.NetworkStream, "__iter__", lambda self: iter(()))
    with sending(transport_stream(0, 30)) as url:
        call("stream", [*flags, "--source", url, "--duration", "0.5"])
    assert f"{url}: no picture came in 0.5 s" in caplog.text
    assert "0 frames" in capsys.readouterr().out.splitlines()
    (video,) = rows_of(tmp_path / "out", "videos.jsonl")
    assert (video["complete"], video["frames"]) == (True, 0)


def check_stopped(out: Path) -> None:
    """All files are whole, and say that the run was stopped."""
    rows = rows_of(out)
    assert len(rows) == (out / "frames.jsonl").read_text().count("\n") >= 3
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["complete"], summary["frames"]) == (False, len(rows))
    (video,) = rows_of(out, "videos.jsonl")
    assert (video["complete"], video["frames"]) == (False, len(rows))
    assert overlay(out / "overlay.mp4") == (len(rows), 25)


@pytest.mark.slow
def test_a_signal_ends_the_wait_for_a_silent_stream(flags, tmp_path, capsys):
    out = tmp_path / "out"

    def stop() -> None:
        while len(rows_of(out)) < 26:
            time.sleep(0.02)
        time.sleep(0.3)  # the few pictures that were sent are used up
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop, daemon=True).start()
    with sending(transport_stream(0, 30), hold=True) as url, pytest.raises(SystemExit) as end:
        run_tool(lambda: call("stream", [*flags, "--source", url]))
    assert end.value.code == 143
    assert "Traceback" not in capsys.readouterr().err
    check_stopped(out)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_whole_files(flags, tmp_path, number):
    def listen_to_signals() -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a background job

    out = tmp_path / "out"
    environment = {**os.environ, "PYTHONPATH": python_path(), "OMP_NUM_THREADS": "1"}
    with sending(transport_stream(0, 60)) as url:
        process = subprocess.Popen(
            [sys.executable, "-m", "ttt_video", "stream", *flags, "--source", url],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=listen_to_signals,
        )
        deadline = time.monotonic() + 240
        while len(rows_of(out)) < 3 and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.05)
        process.send_signal(number)
        _, said = process.communicate(timeout=120)
    assert process.returncode == 128 + number, said
    assert "Traceback" not in said
    check_stopped(out)


@pytest.mark.slow
def test_the_streams_of_a_list_run_at_once(flags, tmp_path):
    listed = tmp_path / "list.txt"
    with sending(transport_stream(0, 30)) as one, sending(transport_stream(0, 30)) as two:
        listed.write_text(f"{one}\n# the other\n{two}\n")
        call("stream", [*flags, "--source", str(listed), "--max-frames", "3"])
    out = tmp_path / "out"
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["workers"], summary["videos"]) == (2, {one: 3, two: 3})
    assert len(list(out.glob("overlay-*.mp4"))) == 2


@pytest.mark.slow
def test_one_silent_stream_of_a_list_does_not_end_the_others(flags, tmp_path):
    listed, pictures = tmp_path / "list.txt", transport_stream(0, 30)
    # The silent one is read once, when the list is opened, and again by its worker.
    with sending(pictures) as one, sending(pictures, b"", hold=True) as two:
        listed.write_text(f"{one}\n{two}\n")
        call("stream", [*flags, "--source", str(listed), "--duration", "3"])
    out = tmp_path / "out"
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["complete"], [*summary["videos"]]) == (True, [one])
    ends = {video["video_id"]: video for video in rows_of(out, "videos.jsonl")}
    assert ends[one]["frames"] == summary["frames"] > 0
    assert (ends[two]["complete"], ends[two]["frames"]) == (True, 0)


@pytest.mark.slow
@pytest.mark.parametrize("cause", ["signal", "killed worker"])
def test_silent_streams_of_a_list_end_whole(flags, tmp_path, capsys, cause, monkeypatch):
    """A worker is told to stop while it waits for a picture that never comes."""
    monkeypatch.setattr(parallel, "_PATIENCE", 60.0)  # then it is killed
    out, listed, pictures = tmp_path / "out", tmp_path / "list.txt", transport_stream(0, 30)

    def stop() -> None:
        seen = 0
        while min(map([row["video_id"] for row in rows_of(out)].count, urls)) < 26 or (
            seen < len(rows_of(out))
        ):
            seen = len(rows_of(out))
            time.sleep(12)  # longer than SILENCE, after which FFmpeg gives the last picture
        if cause == "signal":
            os.kill(os.getpid(), signal.SIGTERM)
        else:
            multiprocessing.active_children()[0].kill()

    silent = (pictures, pictures, b"")  # when the list is opened, for the worker, and from then on
    with sending(*silent, hold=True) as one, sending(*silent, hold=True) as two:
        urls = (one, two)
        listed.write_text(f"{one}\n{two}\n")
        threading.Thread(target=stop, daemon=True).start()
        with pytest.raises(SystemExit) as end:
            run_tool(lambda: call("stream", [*flags, "--source", str(listed)]))
    error = capsys.readouterr().err
    assert "Traceback" not in error
    assert end.value.code == (143 if cause == "signal" else 2)
    if cause != "signal":
        assert "was there enough memory?); all rows are kept, --resume goes on\n" in error
    ends = {video["video_id"]: video for video in rows_of(out, "videos.jsonl")}
    assert len(ends) == (2 if cause == "signal" else 1)
    counts = [row["video_id"] for row in rows_of(out)].count
    for url, video in ends.items():
        assert (video["complete"], video["frames"]) == (False, counts(url))
        assert overlay(out / f"overlay-{file_stem(url)}.mp4") == (counts(url), 25)


@pytest.mark.parametrize(
    ("words", "streams", "message"),
    [
        (["TTT.RESET", "never"], 2, "builds on the one before: give one --source, not a list"),
        (["TTT.FRAME_BUDGET_MS", "50"], 2, "each other's time: give one --source, not a list"),
        (["--workers", "2", "TTT.RESET", "never"], 1, "builds on the one before: use one worker"),
    ],
)
def test_streams_that_cannot_run_at_once_leave_no_folder(
    flags, tmp_path, capsys, words, streams, message
):
    listed, pictures = tmp_path / "list.txt", transport_stream(0, 30)
    with sending(pictures) as one, sending(pictures) as two:
        listed.write_text("\n".join([one, two][:streams]))
        with pytest.raises(SystemExit) as end:
            run_tool(lambda: call("stream", [*flags, "--source", str(listed), *words]))
    assert end.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--video", "0"], "no such video file: 0; use --camera for a camera"),
        (["--video", "rtsp://a/1"], "no such video file: rtsp://a/1; use --source for a URL"),
        (["--source", "nosuch://x"], "nosuch://x cannot be read (Protocol not found)"),
        (["--source", "street"], "'street' is neither a URL, such as rtsp://host/path, nor a cam"),
        (["--source", "none.txt"], "the list of sources none.txt cannot be read: No such file"),
    ],
)
def test_what_is_no_source_is_one_line(flags, tmp_path, capsys, words, message):
    with pytest.raises(SystemExit) as end:
        run_tool(lambda: call("stream", [*flags, *words]))
    assert end.value.code == 2
    err = capsys.readouterr().err
    assert f"error: {message}" in err
    assert err.count("error: ") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--method", "offline_ttt_mae"], "an offline method needs the whole video before its"),
        (["TTT.FRAME_ORDER", "shuffled"], "gives its frames as they come: set TTT.FRAME_ORDER"),
    ],
)
def test_a_live_stream_is_not_known_before_it_is_over(flags, words, capsys, message):
    with sending(transport_stream(0, 30)) as url, pytest.raises(SystemExit) as end:
        run_tool(lambda: call("stream", [*flags, "--source", url, *words]))
    assert end.value.code == 2
    assert message in capsys.readouterr().err
