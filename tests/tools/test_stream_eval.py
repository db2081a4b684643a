"""tools/stream_eval.py as a user runs it: every source, what it leaves on disk, every mistake."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from kitti_layout import write_video
from PIL import Image
from processes import python_path

from ttt_video.adaptation import method_names
from ttt_video.cli import run_tool
from ttt_video.config import load_config
from ttt_video.data import register_custom_video
from ttt_video.data.kitti_step import register_video_sem_seg
from ttt_video.modeling.weights import save_safetensors, weights_hash
from ttt_video.stream import Stream
from ttt_video.stream.directory import RunDirectory
from ttt_video.stream.stage_times import cost_settings
from ttt_video.stream.video_parts import video_fps

ROOT = Path(__file__).resolve().parents[2]
HEIGHT, WIDTH = 48, 80


def picture(seed: int, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    coarse = np.random.default_rng(seed).integers(0, 256, (3, 5, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def write_frames(folder: Path, count: int, first: int = 8) -> Path:
    """frame8.png, frame9.png, frame10.png, ...: their natural order is not that of text."""
    folder.mkdir(parents=True)
    for index in range(count):
        Image.fromarray(picture(index)).save(folder / f"frame{first + index}.png")
    return folder


def write_mp4(path: Path, count: int, rate: int = 25) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(rate))
        stream.height, stream.width, stream.pix_fmt = HEIGHT, WIDTH, "yuv420p"
        for index in range(count):
            frame = av.VideoFrame.from_ndarray(picture(index), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def rows_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "frames.jsonl").read_text().splitlines()]


def summary_of(folder: Path) -> dict:
    return json.loads((folder / "summary.json").read_text())


def without_times(rows: list[dict]) -> list[dict]:
    return [
        {k: without_times([v])[0] if k == "frozen" else v for k, v in row.items()
         if not k.endswith("_seconds")}
        for row in rows
    ]  # fmt: skip


def probe(path: Path) -> tuple[str, str, tuple[int, int], int]:
    """Codec, pixel format, (height, width) and number of frames that decode."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
        return stream.codec_context.name, stream.pix_fmt, frames[0].shape[:2], len(frames)


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("stream_eval", ROOT / "tools/stream_eval.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def model_files(tiny_cfg, tiny_model, tmp_path) -> tuple[str, ...]:
    """--config and --weights of the tiny model."""
    tiny_cfg.merge_from_list(["TTT.BATCH_SIZE", 2, "TTT.MICRO_BATCH_SIZE", 2])
    config, weights = tmp_path / "tiny.yaml", tmp_path / "tiny.safetensors"
    config.write_text(tiny_cfg.dump())
    save_safetensors(tiny_model.state_dict(), str(weights))
    return ("--config", str(config), "--weights", str(weights))


@pytest.fixture
def stream(tool, model_files, tmp_path):
    """``stream(flags...)`` runs the tool and gives the folder of the run, ``out`` by default."""

    def run(*args, output="out") -> Path:
        # KEY VALUE overrides come last.
        flags = [*model_files, "--output", str(tmp_path / output), *map(str, args)]
        run_tool(lambda: tool.main(flags))
        return tmp_path / output

    return run


@pytest.fixture
def refused(stream, capsys):
    """``refused(flags...)``: the one line that the tool ends with; its exit code is 2."""

    def run(*args, **kwargs) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            stream(*args, **kwargs)
        assert stop.value.code == 2
        err = capsys.readouterr().err
        assert "Traceback" not in err
        assert err.count("error: ") == 1
        message = err[err.index("error: ") :]
        return message.rstrip("\n")

    return run


def test_folder_of_frames_with_the_frozen_model_beside(stream, tmp_path, capsys, tiny_model):
    folder = write_frames(tmp_path / "my video", 4)
    out = stream("--video-dir", folder, "--compare")

    rows = rows_of(out)
    assert [Path(row["file_name"]).name for row in rows] == [
        "frame8.png", "frame9.png", "frame10.png", "frame11.png",
    ]  # fmt: skip
    assert [row["frame_index"] for row in rows] == [0, 1, 2, 3]
    for row in rows:
        assert row["video_id"] == "my video"
        assert row["loss_recon"] > 0
        assert row["grad_norm"] > 0
        assert row["skipped_steps"] == 0
        assert row["adapt_seconds"] > 0
        assert row["predict_seconds"] > 0
        assert row["frozen"]["predict_seconds"] > 0

    summary = summary_of(out)
    assert summary["complete"] is True
    assert summary["frames"] == 4
    assert summary["videos"] == {"my video": 4}
    assert summary["method"] == "online_ttt_mae"
    assert summary["preset"] == ""
    assert summary["seed"] == 0
    assert summary["weights_sha256"] == weights_hash(tiny_model)
    assert summary["weights"].endswith("tiny.safetensors")
    losses = [row["loss_recon"] for row in rows]
    assert summary["loss_recon"] == pytest.approx(np.mean(losses))
    assert summary["seconds"].keys() == {"adapt", "predict", "frame", "frozen_predict"}
    assert summary["seconds"]["adapt"].keys() == {"mean", "p50", "p90", "p99"}
    assert summary["versions"]["torch"] == torch.__version__

    codec, pixels, (height, width), count = probe(out / "overlay.mp4")
    assert (codec, pixels, count) == ("h264", "yuv420p", 4)
    assert width >= 3 * WIDTH  # original, frozen, adapted
    assert height >= HEIGHT
    assert sorted(p.name for p in out.iterdir()) == [
        "config.yaml", "frames.jsonl", "overlay.mp4", "run.json", "sources.json", "summary.json",
        "videos.jsonl",
    ]  # fmt: skip
    captured = capsys.readouterr()
    assert "4 frames" in captured.out
    assert "reconstruction loss" in captured.out
    assert str(out) in captured.out
    assert "my video" in captured.err  # the progress bar
    assert "loss_recon=" in captured.err
    assert re.search(r"(frame/s|s/frame)", captured.err)


def test_config_on_disk_is_the_resolved_one(stream, model_files, tmp_path):
    folder = write_frames(tmp_path / "v", 1)
    out = stream("--video-dir", folder, "--no-video", "SEED", 3, "TTT.WINDOW_SIZE", 5)
    again = load_config(str(out / "config.yaml"))
    assert again.SEED == 3
    assert again.TTT.WINDOW_SIZE == 5
    assert again.TTT.BATCH_SIZE == 2
    assert model_files[3] == again.MODEL.WEIGHTS
    # The file alone repeats the run.
    repeated = tmp_path / "repeated"
    stream("--video-dir", folder, "--no-video", "--config", out / "config.yaml", output="repeated")
    assert without_times(rows_of(repeated)) == without_times(rows_of(out))
    assert summary_of(out)["seed"] == 3


def test_folder_of_folders(stream, tmp_path):
    for name, count in (("v10", 1), ("v2", 2)):
        write_frames(tmp_path / "videos" / name, count)
    out = stream("--video-dir", tmp_path / "videos")
    assert [(r["video_id"], r["frame_index"]) for r in rows_of(out)] == [
        ("v2", 0), ("v2", 1), ("v10", 0),
    ]  # fmt: skip
    assert probe(out / "overlay-v2.mp4")[3] == 2
    assert probe(out / "overlay-v10.mp4")[3] == 1
    assert not (out / "overlay.mp4").exists()


def test_video_file(stream, tmp_path):
    video = write_mp4(tmp_path / "clip.mp4", 5)
    out = stream("--video", video)
    assert [r["file_name"] for r in rows_of(out)] == [f"{video}#{i}" for i in range(5)]
    assert {r["video_id"] for r in rows_of(out)} == {"clip"}
    codec, _, (_, width), count = probe(out / "overlay.mp4")
    assert (codec, count) == ("h264", 5)
    enlarged = -(-480 // WIDTH) * WIDTH
    assert width == 2 * enlarged  # original, adapted
    with av.open(str(out / "overlay.mp4")) as container:
        assert container.streams.video[0].average_rate == 25  # the video's own


@pytest.fixture
def labelled_dataset(tmp_path):
    name = "test_stream_eval_videos"
    images, labels = tmp_path / "images", tmp_path / "panoptic_maps"
    for sequence, count in (("0001", 2), ("0002", 1)):

        def frame(i: int, sequence: str = sequence):
            rng = np.random.default_rng([i, int(sequence)])
            classes = np.array([0, 2, 10, 255], np.uint8)
            return picture(i), rng.choice(classes, (HEIGHT, WIDTH))

        write_video(images, labels, sequence, map(frame, range(count)))
    register_video_sem_seg(name, images, labels)
    yield name
    DatasetCatalog.remove(name)
    MetadataCatalog.remove(name)


def test_a_data_set_of_other_classes_is_refused_before_anything_is_written(refused, tmp_path):
    name = "test_stream_eval_two_classes"
    write_frames(tmp_path / "in", 2)
    (tmp_path / "gt").mkdir()
    Image.fromarray(np.full((HEIGHT, WIDTH), 7, np.uint8)).save(tmp_path / "gt" / "frame8.png")
    register_custom_video(name, tmp_path / "in", tmp_path / "gt", ["road", "sky"])
    try:
        line = refused("--dataset", name)
    finally:
        DatasetCatalog.pop(name)
        MetadataCatalog.pop(name)
    assert f"data set {name} has 2 classes, but the model 19 classes" in line
    assert not (tmp_path / "out").exists()


def test_a_folder_with_label_maps_is_refused(refused, tmp_path):
    folder = write_frames(tmp_path / "video", 2)
    Image.fromarray(np.zeros((HEIGHT, WIDTH), np.uint8)).save(folder / "frame8_sem.png")
    line = refused("--video-dir", folder)
    assert "frame8.png and frame8_sem.png are two pictures of one frame" in line
    assert not (tmp_path / "out").exists()


def test_registered_data_set_is_scored(stream, labelled_dataset, capsys):
    out = stream("--dataset", labelled_dataset, "--compare", "--no-video")
    rows = rows_of(out)
    assert [(r["video_id"], r["frame_index"]) for r in rows] == [
        ("0001", 0), ("0001", 1), ("0002", 0),
    ]  # fmt: skip
    pooled: dict = {"adapted": np.zeros((19, 3)), "frozen": np.zeros((19, 3))}
    for row in rows:
        for who, part in (("adapted", row), ("frozen", row["frozen"])):
            assert 0 <= part["metrics"]["mIoU"] <= 100
            for k, counts in part["records"]["sem_seg"].items():
                pooled[who][int(k)] += counts
    printed = capsys.readouterr().out
    metrics = summary_of(out)["metrics"]
    for who, table in pooled.items():
        true_positive = table[[0, 2, 10], 0]
        expected = (100 * true_positive / table[[0, 2, 10]].sum(1)).mean()
        assert metrics[who]["mIoU"] == pytest.approx(expected)
        assert metrics[who]["videos"].keys() == {"0001", "0002"}
        assert f"{who}: mIoU {expected:.2f}" in printed
    assert "pool" in summary_of(out)["protocols"]["mIoU"]
    assert summary_of(out)["dataset"] == labelled_dataset
    assert summary_of(out)["settings"]["METHOD"] == "online_ttt_mae"


def test_data_set_without_a_labelled_pixel(stream, tmp_path, capsys):
    name = "test_stream_eval_unlabelled"
    images, labels = tmp_path / "i", tmp_path / "p"
    ignore = np.full((HEIGHT, WIDTH), 255, np.uint8)
    write_video(images, labels, "0001", [(picture(0), ignore)])
    register_video_sem_seg(name, images, labels)
    try:
        out = stream("--dataset", name, "--no-video")
    finally:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    assert rows_of(out)[0]["metrics"]["mIoU"] is None
    assert "mIoU undefined" in capsys.readouterr().out


def test_method_and_max_frames(stream, tmp_path):
    folder = write_frames(tmp_path / "v", 3)
    out = stream("--video-dir", folder, "--method", "none", "--max-frames", 2, "--no-video")
    rows = rows_of(out)
    assert len(rows) == 2
    assert all("loss_recon" not in row for row in rows)
    assert summary_of(out)["method"] == "none"
    assert summary_of(out)["loss_recon"] is None
    assert not (out / "overlay.mp4").exists()


@pytest.mark.slow
def test_frame_budget_is_reported_in_a_line(stream, refused, tmp_path, capsys):
    folder = write_frames(tmp_path / "v", 4)
    budget = ("TTT.FRAME_BUDGET_MS", 3_600_000)
    out = stream("--video-dir", folder, "--no-video", *budget)
    assert [row["step_samples"] for row in rows_of(out)] == [0, 1, 2, 2]
    line = "frame budget 3600000 ms: 0 % used; skipped updates 1, shorter steps 1, late frames 0"
    assert line in capsys.readouterr().out.splitlines()
    assert "use one worker" in refused("--video-dir", folder, "--workers", 2, *budget, output="2")
    assert "offline" in refused(
        "--video-dir", folder, "--method", "offline_ttt_mae", *budget, output="3"
    )
    resumed = refused("--video-dir", folder, "--no-video", "--resume", *budget)
    assert "choose another --output" in resumed


@pytest.mark.slow
def test_frames_that_do_not_wait_are_reported_in_a_line(stream, refused, tmp_path, capsys):
    folder = write_frames(tmp_path / "v", 5)
    plain = stream("--video-dir", folder, "--no-video", output="0")
    cfg = load_config(str(plain / "config.yaml"))
    seconds = {"decode": [0], "push": [0], "predict": [0.15], "others": [0], "step": {"2": [0]}}
    names = ("none", "online_ttt_mae")
    cases = [{"method": name, "settings": cost_settings(cfg, name)} for name in names]
    cases = [{**case, "size": [HEIGHT, WIDTH], "seconds": seconds} for case in cases]
    profile = tmp_path / "slow.json"
    profile.write_text(json.dumps({"machine": "a slow one", "cases": cases}))
    flags = ("--video-dir", folder, "--no-video", "--compare", "--stream-fps", 10)
    capsys.readouterr()
    out = stream(*flags, "--clock", profile)
    printed = capsys.readouterr().out.splitlines()
    # Frames 0, 1, 3 and 4 are taken at 0, 0.15, 0.3 and 0.45 s. Frame 2 has frame 0's prediction,
    # frames 3 and 4 have frame 1's: ages of 2, 2 and 3.
    numbers = "2.33 frames late, 175 ms from a frame to its prediction, 1 frames dropped, 2 without"
    for who in ("adapted", "frozen"):
        assert f"{who} at 10 fps: {numbers} any prediction" in printed
    dropped = [row["frame_index"] for row in rows_of(out) if row["streaming"]["dropped"]]
    assert dropped == [2]
    assert summary_of(out)["device"] == "simulated: a slow one"
    shutil.rmtree(tmp_path / "out")
    assert "no profile 'fast'" in refused(*flags, "--clock", "fast", output="1")
    without = refused("--video-dir", folder, "--no-video", "--clock", profile, output="2")
    assert "TTT.CLOCK.FPS is 0" in without


def test_preset_merges_on_top_and_overrides_on_top_of_that(stream, tmp_path):
    folder = write_frames(tmp_path / "v", 1)
    small = ("TTT.PRECISION", "fp32", "TTT.BATCH_SIZE", 3, "TTT.CROP.SIZE", "[32, 64]")
    out = stream("--video-dir", folder, "--no-video", "--preset", "release", *small)
    config = load_config(str(out / "config.yaml"))
    assert config.TTT.PRESET == "release"
    assert (config.TTT.MASK_RATIO, config.TTT.OPTIMIZER.NAME) == (0.85, "ADAMW")
    assert (config.TTT.PRECISION, config.TTT.BATCH_SIZE) == ("fp32", 3)
    assert summary_of(out)["preset"] == "release"
    assert rows_of(out)[0]["skipped_steps"] == 0


def test_default_output_is_new_for_every_run(tool, model_files, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folder = write_frames(tmp_path / "v", 1)
    tool.main([*model_files, "--video-dir", str(folder), "--no-video"])
    (out,) = (tmp_path / "output" / "stream_eval").iterdir()
    assert len(rows_of(out)) == 1
    assert str(out.relative_to(tmp_path)) in capsys.readouterr().out


def kill_at(command: list[str], out: Path, count: int) -> None:
    """Runs the tool in a process of its own and kills it once ``count`` rows are there."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    environment["PYTHONPATH"] = python_path()
    log = out.with_suffix(".log")
    with log.open("w") as file:
        process = subprocess.Popen(command, env=environment, stderr=file)
    wait_for_rows(process, out, count, log)
    process.send_signal(signal.SIGKILL)
    process.wait()


def wait_for_rows(
    process: subprocess.Popen[bytes], out: Path, count: int, log: Path | None = None
) -> None:
    deadline = time.monotonic() + 240
    frames = out / "frames.jsonl"
    while not (frames.exists() and frames.read_bytes().count(b"\n") >= count):
        assert process.poll() is None, log.read_text() if log else "it ended too early"
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.slow
def test_killed_run_is_resumed_to_the_same_files(stream, model_files, tmp_path):
    videos = tmp_path / "videos"
    for name, count in (("a", 2), ("b", 24)):
        write_frames(videos / name, count)
    cut = tmp_path / "cut"
    flags = ("--video-dir", videos, "--compare", "--save-every", 4)
    tool = [sys.executable, str(ROOT / "tools/stream_eval.py"), *model_files, *map(str, flags)]
    for count in (3, 8):
        kill_at([*tool, "--output", str(cut), "--resume"], cut, count)
        assert probe(cut / "overlay-a.mp4")[3] == 2
    assert not (cut / "summary.json").exists()
    stream(*flags, "--resume", output="cut")
    stream(*flags, output="whole")
    whole = tmp_path / "whole"
    assert without_times(rows_of(cut)) == without_times(rows_of(whole))
    assert summary_of(cut)["metrics"] == summary_of(whole)["metrics"]
    names = sorted(p.name for p in whole.iterdir())
    assert sorted(p.name for p in cut.iterdir()) == names
    for name in ("overlay-a.mp4", "overlay-b.mp4", "config.yaml", "run.json", "videos.jsonl"):
        assert (cut / name).read_bytes() == (whole / name).read_bytes()


@pytest.mark.slow
def test_several_workers_give_the_numbers_of_one(stream, refused, model_files, tmp_path, capsys):
    videos = tmp_path / "videos"
    endless = tmp_path / "endless"
    for name in "ab":
        write_frames(endless / name, 300)
    for name, count in (("a", 2), ("a b", 3), ("a_b", 4)):
        write_frames(videos / name, count)
    flags = ("--video-dir", videos, "--compare", "--save-every", 2)
    one, two = stream(*flags, output="one"), stream(*flags, "--workers", 2, output="two")
    assert "3 of 3 videos done" in capsys.readouterr().err

    def key(row):
        return row["video_id"], row["frame_index"]

    ours, theirs = (sorted(without_times(rows_of(out)), key=key) for out in (two, one))
    assert ours == theirs
    summary, expected = summary_of(two), summary_of(one)
    for name in ("metrics", "videos", "frames", "loss_recon", "weights_sha256", "complete"):
        assert summary[name] == expected[name]
    assert summary["workers"] == 2
    assert summary["peak_memory_mib"] > 10
    for out in (one, two):
        overlays = sorted(path.name for path in out.glob("*.mp4"))
        assert [probe(out / name)[3] for name in overlays] == [2, 3, 4]
        assert overlays[::2] == ["overlay-a.mp4", "overlay-a_b.mp4"]
        assert overlays[1].startswith("overlay-a_b-")
        assert not (out / "unfinished").exists()
    assert (two / "overlay-a.mp4").read_bytes() == (one / "overlay-a.mp4").read_bytes()

    # A signal stops the workers, too: their videos so far are there.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, str(ROOT / "tools/stream_eval.py"), *model_files]
    for number in (signal.SIGTERM, signal.SIGKILL):
        out = tmp_path / number.name
        more = ["--video-dir", str(endless), "--workers", "2", "--output", str(out)]
        process = subprocess.Popen([*command, *more], env=environment, stderr=subprocess.PIPE)
        wait_for_rows(process, out, 3)
        process.send_signal(number)
        _, err = process.communicate()  # until the workers are gone, which have its stderr, too
        assert process.returncode == (143 if number == signal.SIGTERM else -number)
        assert b"Traceback" not in err
        if number == signal.SIGTERM:
            assert err.endswith(b"interrupted by SIGTERM\n")
            summary = summary_of(out)
            assert summary["complete"] is False
            assert summary["frames"] == len(rows_of(out))
            assert sum(probe(path)[3] for path in out.glob("*.mp4")) == len(rows_of(out))
        RunDirectory(out, resume=True).close()  # nobody has it any more

    # One failing worker stops the run; one line names the video; rows are kept, resuming goes on.
    good = (videos / "a_b" / "frame11.png").read_bytes()
    truncate(videos / "a_b" / "frame11.png")
    message = refused(*flags, "--workers", 2, output="cut")
    assert "error: video a_b: " in message
    assert "frame11.png" in message
    assert "\n" not in message
    assert summary_of(tmp_path / "cut")["complete"] is False
    (videos / "a_b" / "frame11.png").write_bytes(good)
    cut = stream(*flags, "--workers", 2, "--resume", output="cut")
    assert sorted(without_times(rows_of(cut)), key=key) == theirs
    assert summary_of(cut)["metrics"] == expected["metrics"]


def test_videos_that_build_on_one_another_take_one_worker(refused, tmp_path):
    folder = write_frames(tmp_path / "v", 1)
    assert "TTT.RESET" in refused("--video-dir", folder, "--workers", 2, "TTT.RESET", "never")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_keeps_everything_so_far(stream, tmp_path, monkeypatch, capsys, number):
    folder = write_frames(tmp_path / "v", 4)
    original = Stream.step

    def step(self, frame):
        if frame["frame_index"] == 2:
            signal.raise_signal(number)
        return original(self, frame)

    monkeypatch.setattr(Stream, "step", step)
    with pytest.raises(SystemExit) as stop:
        stream("--video-dir", folder)
    assert stop.value.code == 128 + number
    out = tmp_path / "out"
    assert len(rows_of(out)) == 2
    assert summary_of(out)["complete"] is False
    assert probe(out / "overlay.mp4")[3] == 2
    assert "Traceback" not in capsys.readouterr().err


class Gone(io.StringIO):
    """A pipe whose reader goes after the first words."""

    def write(self, text: str) -> int:
        if self.tell() > 10:
            raise BrokenPipeError
        return super().write(text)


def test_a_progress_that_nobody_reads_is_no_traceback(stream, tmp_path, monkeypatch):
    """``stream_eval.py 2>&1 | head -1``: it ends as after a signal."""
    folder = write_frames(tmp_path / "v", 4)
    monkeypatch.setattr(sys, "stderr", Gone())
    with pytest.raises(SystemExit) as stop:
        stream("--video-dir", folder, "--method", "none", "--no-video")
    assert stop.value.code == 128 + signal.SIGPIPE
    out = tmp_path / "out"
    assert summary_of(out)["frames"] == len(rows_of(out))


def test_offline_runs_of_other_lengths_are_not_mixed(stream, refused, tmp_path):
    flags = ("--video-dir", write_frames(tmp_path / "v", 3), "--method", "offline_ttt_mae")
    opts = ("TTT.OFFLINE.STEPS", 1)
    stream(*flags, "--no-video", "--max-frames", 2, *opts)
    for workers in (1, 2):
        more = ("--no-video", "--resume", "--workers", workers, *opts)
        assert "--max-frames: 2, now None" in refused(*flags, *more)


@pytest.mark.parametrize("more", [(), ("--no-video", "--save", "masks")])
def test_a_run_goes_on_with_its_frame_rate_alone(stream, refused, tmp_path, caplog, more):
    """Its files would have two. Frames beyond a smaller --max-frames stay, and a line says so."""
    flags = ("--video-dir", write_frames(tmp_path / "v", 3), "--method", "none", *more)
    stream(*flags, "--max-frames", 2, "--fps", 5)
    assert "--fps: 5.0, now 7.0" in refused(*flags, "--resume", "--fps", 7)
    before = rows_of(stream(*flags, "--max-frames", 1, "--fps", 5, "--resume"))
    assert len(before) == 2
    assert "video v has 2 frames already, more than --max-frames 1: they stay" in caplog.messages


def test_predictions_that_are_not_finite_are_told(stream, tmp_path, monkeypatch, capsys):
    original = Stream.step
    streams = []

    def step(self, frame):
        streams.append(self)
        result = original(self, frame)
        if frame["frame_index"] > 0 and self is streams[0]:  # the other is the frozen one
            result.output["sem_seg"][3, 5, 6] = np.nan
        return result

    monkeypatch.setattr(Stream, "step", step)
    flags = ("--video-dir", write_frames(tmp_path / "v", 3), "--compare", "--method", "none")
    metrics = summary_of(stream(*flags, "--no-video"))["metrics"]
    assert [metrics[who]["nonfinite_frames"] for who in ("adapted", "frozen")] == [2, 0]
    said = capsys.readouterr().out
    assert "adapted: 2 frames with scores not finite" in said
    assert "frozen: " not in said


# --- mistakes: one clear line and exit code 2 ---


@pytest.mark.parametrize("fps", ["0", "-5", "nan", "inf"])
def test_frame_rates_that_cannot_be(refused, tmp_path, fps):
    folder = write_frames(tmp_path / "video", 1)
    said = refused("--video-dir", folder, f"--fps={fps}")
    assert "a video's frame rate must be between" in said
    assert f"not {fps}" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("asked", "own", "expected"),
    [(25.0, 1e-9, 25.0), (None, 30.0, 30.0), (None, None, 10.0), (None, 1e-9, 10.0)],
)
def test_frame_rate_of_the_overlay(caplog, asked, own, expected):
    assert video_fps(asked, SimpleNamespace(fps=own, video_id="slow")) == expected
    said = any(line.startswith("video slow has 1e-09 frames") for line in caplog.messages)
    assert said == (asked is None and own == 1e-9)


@pytest.mark.slow
def test_names_of_any_bytes_are_streamed_and_resumed(stream, refused, tmp_path, capsys):
    name = os.fsdecode(b"n:caf\xe9")
    folder = write_frames(tmp_path / name, 3)
    (folder / "frame10.png").rename(folder / os.fsdecode(b"frame10:\xff.png"))
    video = write_mp4(tmp_path / "plain.mp4", 3).rename(tmp_path / f"{name}.mp4")
    output = f"out{name}"
    stream("--video-dir", folder, "--save-every", 2, "--max-frames", 2, output=output)
    for out in (
        stream("--video-dir", folder, "--save-every", 2, "--resume", output=output),
        stream("--video", video, output=f"{output}2"),
    ):
        rows = rows_of(out)
        assert [row["frame_index"] for row in rows] == [0, 1, 2]
        assert {row["video_id"] for row in rows} == {"n:caf\\xe9"}
        for row in rows:
            row["file_name"].encode("utf-8")  # other readers of JSON refuse lone surrogates
        assert summary_of(out)["complete"]
        assert probe(out / "overlay.mp4")[3] == 3
    assert "written to" in capsys.readouterr().out


def test_overlay_has_the_colours_of_the_data_set(stream, tmp_path):
    frames = write_frames(tmp_path / "video", 2)
    register_custom_video(
        "stream_eval_colours", frames, None, [f"c{i}" for i in range(19)], colors=[[0, 0, 0]] * 19
    )
    try:
        out = stream("--dataset", "stream_eval_colours", "DATASETS.TEST", "('cityscapes_x',)")
    finally:
        DatasetCatalog.remove("stream_eval_colours")
        MetadataCatalog.remove("stream_eval_colours")
    with av.open(str(out / "overlay.mp4")) as container:
        shown = next(container.decode(video=0)).to_ndarray(format="rgb24").astype(float)
    original, adapted = np.array_split(shown, 2, axis=0 if shown.shape[0] > shown.shape[1] else 1)
    # Black at half weight leaves half of the picture, which lies between caption and legend.
    top, bottom = 30, 200
    ratio = adapted[top:bottom].mean(axis=(0, 1)) / original[top:bottom].mean(axis=(0, 1))
    assert ratio == pytest.approx([0.5] * 3, abs=0.08)
    summary = summary_of(out)
    videos = summary["metrics"]["adapted"]["videos"]
    assert videos["video"]["frames"] == 2
    assert videos["video"]["labelled_frames"] == 0


def test_no_such_folder(refused, tmp_path):
    assert f"no such folder: {tmp_path}/nowhere" in refused("--video-dir", tmp_path / "nowhere")
    assert not (tmp_path / "out").exists()


def test_empty_folder(refused, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "empty holds no frames" in refused("--video-dir", tmp_path / "empty")


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:120])


def no_image(path: Path) -> None:
    path.write_text("not an image")


@pytest.mark.parametrize("spoil", [truncate, no_image])
def test_bad_frame_stops_with_what_was_done_kept(refused, tmp_path, spoil):
    folder = write_frames(tmp_path / "v", 4)
    spoil(folder / "frame10.png")
    message = refused("--video-dir", folder)
    assert "frame10.png" in message
    assert "--on-bad-frame skip" in message
    assert "\n" not in message
    out = tmp_path / "out"
    assert [row["frame_index"] for row in rows_of(out)] == [0, 1]
    assert summary_of(out)["complete"] is False
    assert probe(out / "overlay.mp4")[3] == 2


@pytest.mark.parametrize("spoil", [truncate, no_image])
def test_bad_frame_is_skipped_when_asked(stream, tmp_path, capsys, spoil):
    folder = write_frames(tmp_path / "v", 4)
    spoil(folder / "frame10.png")
    out = stream("--video-dir", folder, "--on-bad-frame", "skip")
    assert [row["frame_index"] for row in rows_of(out)] == [0, 1, 3]
    summary = summary_of(out)
    assert summary["complete"] is True
    assert summary["skipped_frames"] == [str(folder / "frame10.png")]
    assert probe(out / "overlay.mp4")[3] == 3
    assert "1 unreadable frames skipped" in capsys.readouterr().out


@pytest.mark.slow
def test_after_a_bad_frame_is_mended_the_run_goes_on(refused, stream, tmp_path):
    folder = write_frames(tmp_path / "v", 4)
    good = (folder / "frame10.png").read_bytes()
    truncate(folder / "frame10.png")
    refused("--video-dir", folder)
    (folder / "frame10.png").write_bytes(good)
    stream("--video-dir", folder, "--resume")
    stream("--video-dir", folder, output="whole")
    assert without_times(rows_of(tmp_path / "out")) == without_times(rows_of(tmp_path / "whole"))


def test_frames_of_changing_size(refused, tmp_path):
    folder = write_frames(tmp_path / "v", 3)
    Image.fromarray(picture(1, 40, 80)).save(folder / "frame10.png")
    message = refused("--video-dir", folder, "--no-video")
    assert "frame10.png is 40x80" in message
    assert "48x80" in message
    assert len(rows_of(tmp_path / "out")) == 2


def test_video_without_frames(refused, tmp_path):
    sound = tmp_path / "sound.mp4"
    with av.open(str(sound), "w") as container:
        track = container.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((2, 1024), np.float32), format="fltp")
        frame.sample_rate = 8000
        container.mux(track.encode(frame))
        container.mux(track.encode(None))
    assert "sound.mp4 has no video in it" in refused("--video", sound)
    text = tmp_path / "text.mp4"
    text.write_text("no video")
    assert "text.mp4" in refused("--video", text)
    (tmp_path / "empty.mp4").write_bytes(b"")
    assert "empty.mp4" in refused("--video", tmp_path / "empty.mp4")
    assert "no such video file" in refused("--video", tmp_path / "nowhere.mp4")
    assert "--video-dir" in refused("--video", tmp_path)


def test_weights_that_do_not_fit(refused, tmp_path):
    folder = write_frames(tmp_path / "v", 1)
    message = refused("--video-dir", folder, "MODEL.SEM_SEG_HEAD.NUM_CLASSES", 7)
    assert "tiny.safetensors are of 19 classes, the model of 7" in message
    assert "MODEL.SEM_SEG_HEAD.NUM_CLASSES 19" in message
    assert not (tmp_path / "out").exists()  # nothing was run, so nothing is in the way
    assert "do not fit" in refused("--video-dir", folder, "MODEL.SWIN.EMBED_DIM", 32)


def test_weights_that_cannot_be_read(refused, tmp_path):
    folder = write_frames(tmp_path / "v", 1)
    missing = refused("--video-dir", folder, "--weights", tmp_path / "nowhere.pth")
    assert "nowhere.pth" in missing
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"123")
    assert "broken.safetensors" in refused("--video-dir", folder, "--weights", broken)
    assert "--weights" in refused("--video-dir", folder, "--weights", "")


def test_unknown_method_names_the_closest_or_lists_all(refused, tmp_path):
    folder = write_frames(tmp_path / "v", 1)
    message = refused("--video-dir", folder, "--method", "online_ttt_mea")
    assert "'online_ttt_mea'; did you mean online_ttt_mae?" in message
    message = refused("--video-dir", folder, "--method", "xyz")
    assert all(name in message for name in method_names())
    # Also where the weights would not fit it, as the mistake comes first.
    assert "no method" in refused("--video-dir", folder, "--method", "x", "--weights", "nowhere")


def test_unknown_config_names_the_closest(refused, tmp_path):
    folder = write_frames(tmp_path / "v", 1)
    message = refused("--video-dir", folder, "--config", "joint_cityscape.yaml")
    assert "did you mean joint_cityscapes.yaml" in message


def test_unknown_data_set(refused):
    message = refused("--dataset", "kitti_step_video_sem_seg_vall")
    assert "kitti_step_video_sem_seg_val" in message


def test_data_set_that_is_not_on_disk(refused, tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "nowhere"))
    message = refused("--dataset", "kitti_step_video_sem_seg_val")
    assert "nowhere" in message
    assert "DETECTRON2_DATASETS" in message


def test_output_that_holds_a_run(refused, stream, tmp_path):
    folder = write_frames(tmp_path / "v", 1)
    out = stream("--video-dir", folder, "--no-video")
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    message = refused("--video-dir", folder, "--no-video")
    assert "already holds a run" in message
    assert "--resume" in message
    assert "replace" in message
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before


def test_output_that_is_a_file(refused, tmp_path):
    (tmp_path / "out").write_text("")
    folder = write_frames(tmp_path / "v", 1)
    assert "is a file" in refused("--video-dir", folder)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--max-frames", 0], "--max-frames is 0"),
        (["--workers", 0], "--workers is 0"),
        (["--save-every", -1], "--save-every is -1"),
        (["TTT.WINDOW_SIZE"], "stands alone"),
        (["TTT.WINDOW", 3], "TTT.WINDOW"),
        (["TTT.MASK_RATIO", 1.5], "TTT.MASK_RATIO is 1.5"),
    ],
)
def test_values_that_cannot_work(refused, tmp_path, flags, words):
    folder = write_frames(tmp_path / "v", 1)
    message = refused("--video-dir", folder, *flags)
    assert words in message
    assert "\n" not in message


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--video-dir", "a", "--video", "b"],
        ["--video", "a", "--on-bad-frame", "hope"],
        ["--video", "a", "--view", "split"],  # of which two models?
        ["--video", "a", "--view", "split", "--compare", "--no-video"],
    ],
)
def test_flags_that_argparse_refuses(tool, flags, capsys):
    with pytest.raises(SystemExit) as stop:
        tool.main(flags)
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_help_names_the_methods(tool, capsys):
    with pytest.raises(SystemExit) as stop:
        tool.main(["--help"])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert all(name in text for name in method_names())
    assert "--config-file" in text
