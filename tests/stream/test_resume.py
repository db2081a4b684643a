"""Runs that are killed go on at the last saved state and end as if they never stopped."""

from __future__ import annotations

import copy
import errno
import io
import json
import os
import shutil
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image
from run_folders import content, copy_running

from ttt_video.data.sources import FolderSource, FrameTransform
from ttt_video.errors import UserError
from ttt_video.files import save_torch
from ttt_video.stream import (
    OverlayVideos,
    RunDirectory,
    Settings,
    Sink,
    Stream,
    StreamEvaluation,
)
from ttt_video.stream.saved_state import STATE_KEYS, UnusableState, read_state

SAVE_EVERY = 3
KEEP = FrameTransform(min_size=0)


def write_video(folder: Path, num_frames: int, *, bad: tuple[int, ...] = ()) -> Path:
    folder.mkdir(parents=True)
    for index in range(num_frames):
        pixels = np.random.default_rng(index).integers(0, 256, (64, 96, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
        if index in bad:
            (folder / f"{index}.png").write_bytes(b"no image")
    return folder


@pytest.fixture
def evaluate(tiny_cfg, tiny_model, tmp_path):
    """``evaluate(folder, videos, KEY VALUE...)``; gives the summary.

    ``snapshots`` {n: copy} copies the folder to ``copy`` once the n-th frame has been run: that is
    what a kill at this moment leaves behind.
    """

    def run(name, videos, *opts, snapshots=None, resume=False, video=True, **options):
        cfg = tiny_cfg.clone()
        cfg.merge_from_list(["TTT.BATCH_SIZE", 2, "TTT.OPTIMIZER.NAME", "ADAMW", *opts])
        sources = [FolderSource(v, KEEP, on_bad_frame="skip") for v in videos]
        directory = RunDirectory(tmp_path / name, resume=resume)
        steps: list[tuple[str, int]] = []

        class Kill(Sink):
            def write(self, results):
                frame = results.adapted.frame
                steps.append((frame["video_id"], frame["frame_index"]))
                if len(steps) in (snapshots or {}):
                    copy_running(directory.path, tmp_path / snapshots[len(steps)])

        overlay = [OverlayVideos(cfg, directory.path, fps=10, single=False)] if video else []
        options = {"save_every": SAVE_EVERY, "compare": True, **options}
        settings = Settings(cfg, directory, sinks=[*overlay, Kill()], **options)
        summary = StreamEvaluation(settings, copy.deepcopy(tiny_model)).evaluate(sources)
        return summary, steps

    return run


@pytest.mark.slow
def test_a_killed_run_ends_as_if_it_had_not_been(evaluate, tmp_path):
    videos = [write_video(tmp_path / "v" / "a", 8, bad=(0, 5)), write_video(tmp_path / "v/b", 4)]
    kills = {3: "before a state", 5: "late", 7: "second"}
    _, steps = evaluate("whole", videos, snapshots=kills)
    assert len(steps) == 10
    whole = content(tmp_path / "whole")
    assert whole.keys() == {
        "config.yaml", "frames.jsonl", "overlay-a.mp4", "overlay-b.mp4", "run.json",
        "sources.json", "summary.json", "videos.jsonl",
    }  # fmt: skip
    # Right after the state was saved, which is after the observer saw the third frame:
    shutil.copytree(tmp_path / "late", tmp_path / "at a state")
    rows = (tmp_path / "late" / "frames.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "at a state" / "frames.jsonl").write_text("".join(rows[:3]))
    first = {"before a state": 1, "at a state": 4, "late": 4, "second": None}
    for name, frame_index in first.items():
        # A kill may also cut a row, a state and a part of the video that is being written.
        with (tmp_path / name / "frames.jsonl").open("a") as file:
            file.write('{"video_id": "a", "fra')
        summary, again = evaluate(name, videos, resume=True)
        assert summary["complete"]
        if frame_index is not None:
            assert again[0] == ("a", frame_index)
            assert again[-1] == ("b", 3)
        else:
            assert again == [("b", i) for i in range(4)]
        assert content(tmp_path / name) == whole
    assert whole["summary.json"]["skipped_frames"] == [
        str(tmp_path / "v" / "a" / f"{i}.png") for i in (0, 5)
    ]
    flicker = [r["metrics"].get("change") for r in whole["frames.jsonl"]]
    assert flicker[0] is None
    assert None not in flicker[1:4]  # the evaluators' state is kept, too


def test_killed_again_and_again(evaluate, tmp_path):
    video = [write_video(tmp_path / "v", 8)]
    evaluate("whole", video, snapshots={4: "0"})
    for attempt in range(3):  # each gets a frame or two further than a state
        _, steps = evaluate(str(attempt), video, resume=True, snapshots={4: str(attempt + 1)})
        if len(steps) < 4:
            break
    assert content(tmp_path / str(attempt)) == content(tmp_path / "whole")
    assert [index for _, index in steps] == [6, 7]


@pytest.mark.slow
def test_videos_that_build_on_one_another_go_on_too(evaluate, tmp_path):
    videos = [write_video(tmp_path / "v" / name, 4) for name in "abc"]
    kills = {4: "at the end", 9: "third"}
    evaluate("whole", videos, "TTT.RESET", "never", snapshots=kills)
    whole = content(tmp_path / "whole")
    first = {4: ("a", 3), 9: ("c", 0)}
    for count, name in kills.items():
        assert len(list((tmp_path / name / "unfinished").iterdir())) == 1
        _, again = evaluate(name, videos, "TTT.RESET", "never", resume=True)
        assert again[0] == first[count]
        assert again[-1] == ("c", 3)
        resumed = content(tmp_path / name)
        assert resumed.pop("videos.jsonl") != b""
        assert resumed == {k: v for k, v in whole.items() if k != "videos.jsonl"}
    _, again = evaluate("whole", videos, "TTT.RESET", "never", resume=True)
    assert again == []


@pytest.mark.slow
@pytest.mark.parametrize("order", ["time", "shuffled"])
def test_settings_of_the_loop_are_kept(evaluate, tmp_path, order):
    opts = ("TTT.FRAME_ORDER", order, "TTT.UPDATE_EVERY", 2, "TTT.STEP_MODE", "train")
    video = [write_video(tmp_path / "v", 6)]
    evaluate("whole", video, *opts, snapshots={5: "cut"}, video=False)
    _, again = evaluate("cut", video, *opts, resume=True, video=False)
    assert len(again) == 3
    assert content(tmp_path / "cut") == content(tmp_path / "whole")


def test_an_interrupt_leaves_the_video_so_far_and_can_be_resumed(evaluate, tmp_path, monkeypatch):
    video = [write_video(tmp_path / "v", 8)]
    evaluate("whole", video)
    original = Stream.step

    def step(self, frame):
        if frame["frame_index"] == 5:
            raise KeyboardInterrupt
        return original(self, frame)

    with monkeypatch.context() as patch:
        patch.setattr(Stream, "step", step)
        with pytest.raises(KeyboardInterrupt):
            evaluate("cut", video)
    cut = content(tmp_path / "cut")
    assert len(cut["frames.jsonl"]) == 5
    assert cut["summary.json"]["complete"] is False
    assert cut["summary.json"]["frames"] == 5
    assert cut["overlay-v.mp4"]
    evaluate("cut", video, resume=True)
    resumed, whole = content(tmp_path / "cut"), content(tmp_path / "whole")
    assert [json.loads(row)["frames"] for row in resumed.pop("videos.jsonl").splitlines()] == [5, 8]
    whole.pop("videos.jsonl")
    assert resumed == whole


@pytest.mark.slow
def test_a_state_without_its_rows_is_not_used(evaluate, tmp_path, caplog):
    video = [write_video(tmp_path / "v", 6)]
    evaluate("whole", video, snapshots={5: "cut"})
    rows = (tmp_path / "cut" / "frames.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "cut" / "frames.jsonl").write_text(rows[0] + rows[2])
    _, again = evaluate("cut", video, resume=True)
    assert len(again) == 6
    assert "starts anew" in caplog.text
    expected = content(tmp_path / "whole")
    resumed = content(tmp_path / "cut")
    resumed["frames.jsonl"].sort(key=lambda row: row["frame_index"])
    assert resumed == expected


def test_other_weights_are_noticed(evaluate, tiny_model, tmp_path):
    video = [write_video(tmp_path / "v", 4)]
    evaluate("run", video, snapshots={3: "cut"})
    with torch.no_grad():
        next(tiny_model.parameters()).mul_(1.0001)
    for name in ("run", "cut"):
        with pytest.raises(UserError, match="another setting \\(weights_sha256"):
            evaluate(name, video, resume=True)
    with pytest.raises(UserError, match="--no-video: False, now True"):
        evaluate("cut", video, resume=True, video=False)


def test_another_content_of_a_named_file_is_noticed(evaluate, tmp_path):
    video, file = [write_video(tmp_path / "v", 2)], tmp_path / "prior.safetensors"
    setting = ("TTT.METHOD", "none", "TTT.COLOR.PRIOR", str(file))
    file.write_bytes(b"one")
    evaluate("run", video, *setting, video=False)
    assert len(evaluate("run", video, *setting, video=False, resume=True)[1]) == 0
    file.write_bytes(b"two")
    with pytest.raises(UserError, match=r"another setting \(TTT.COLOR.PRIOR: .*, now "):
        evaluate("run", video, *setting, video=False, resume=True)


def test_saving_nothing_starts_videos_anew(evaluate, tmp_path):
    video = [write_video(tmp_path / "v", 4)]
    evaluate("whole", video, save_every=0, snapshots={3: "cut"})
    assert not list((tmp_path / "cut").rglob("state*"))
    _, again = evaluate("cut", video, save_every=0, resume=True)
    assert len(again) == 4
    assert content(tmp_path / "cut") == content(tmp_path / "whole")


def test_a_shorter_run_leaves_the_state_of_a_longer_one(evaluate, tmp_path, tiny_cfg, tiny_model):
    video = [write_video(tmp_path / "v", 6)]
    evaluate("whole", video, snapshots={5: "cut"})
    state = next((tmp_path / "cut").rglob("state.pth")).read_bytes()
    tiny_cfg.merge_from_list(["TTT.BATCH_SIZE", 2, "TTT.OPTIMIZER.NAME", "ADAMW"])
    run = RunDirectory(tmp_path / "cut", resume=True)
    sinks = [OverlayVideos(tiny_cfg, run.path, fps=10, single=False), Sink()]
    shorter = Settings(tiny_cfg, run, compare=True, sinks=sinks, save_every=3, max_frames=2)
    evaluation = StreamEvaluation(shorter, copy.deepcopy(tiny_model))
    evaluation.evaluate([FolderSource(video[0], KEEP)])
    assert next((tmp_path / "cut").rglob("state.pth")).read_bytes() == state


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1000])


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1  # a weight or a pixel
    file.write_bytes(content)


def lack(*keys: str | int):
    def spoil(file: Path) -> None:
        state = torch.load(file, weights_only=True)
        part = state
        for key in keys[:-1]:
            part = part[key]
        del part[keys[-1]]
        torch.save(state, file)

    return spoil


SPOILERS = {
    "empty": lambda file: file.write_bytes(b""),
    "cut": cut,
    "garbage": lambda file: file.write_bytes(b"garbage"),
    "flipped": flip,
    "code": lambda file: torch.save({"frames": Path("x")}, file),
    "another": lambda file: torch.save({"model": {}}, file),
    "a list": lambda file: torch.save([1], file),
    "no stream": lack("stream"),
    "no rows": lack("sinks", 1, "rows"),
    "no generator": lack("stream", "generator"),
    "no window": lack("stream", "window"),
    "no scores": lack("sinks", 0, "frozen"),
    "no sink": lack("sinks", 2),
}


@pytest.fixture(scope="module")
def cut_run():
    """Whole and cut run, once for all ways to spoil the state."""
    return {}


@pytest.mark.slow
@pytest.mark.parametrize("kind", SPOILERS)
def test_a_damaged_state_is_named_and_its_video_starts_anew(
    evaluate, tmp_path, tmp_path_factory, caplog, cut_run, kind
):
    if not cut_run:
        video = [write_video(tmp_path_factory.mktemp("v") / "a", 5)]
        evaluate("whole", video, snapshots={4: "cut"}, video=False)
        folder = tmp_path_factory.mktemp("runs")
        shutil.move(tmp_path / "cut", folder / "cut")
        cut_run.update(video=video, whole=content(tmp_path / "whole"), cut=folder / "cut")
    shutil.copytree(cut_run["cut"], tmp_path / kind)
    state = tmp_path / kind / "unfinished" / "a" / "state.pth"
    SPOILERS[kind](state)
    _, again = evaluate(kind, cut_run["video"], resume=True, video=False)
    assert [index for _, index in again] == [0, 1, 2, 3, 4]
    (record,) = [r for r in caplog.records if "starts anew" in r.getMessage()]
    said = record.getMessage()
    assert said.startswith(str(state))
    assert said.endswith("video a starts anew without it")
    assert "\n" not in said
    assert "weights_only" not in caplog.text
    assert content(tmp_path / kind) == cut_run["whole"]


def test_a_flipped_bit_is_noticed_wherever_it_matters(tmp_path):
    file = tmp_path / "state.pth"
    state = {key: key for key in STATE_KEYS} | {"rows": torch.arange(40).view(-1, 2)}
    save_torch(file, state)
    whole = file.read_bytes()
    noticed = 0
    for place in range(0, len(whole), 5):
        changed = bytearray(whole)
        changed[place] ^= 1 << place % 8
        file.write_bytes(changed)
        try:
            read = read_state(file)
        except UnusableState:
            noticed += 1
        else:  # a time or a filler
            assert torch.equal(read.pop("rows"), state["rows"])
            assert read == {key: key for key in STATE_KEYS - {"rows"}}
    assert noticed > 60


@pytest.mark.slow
@pytest.mark.parametrize("spoil", [flip, lack("stream", "window")])
def test_videos_that_build_on_one_another_start_anew_together(evaluate, tmp_path, caplog, spoil):
    """Without its state the second video cannot go on from the first."""
    opts = ("TTT.RESET", "never")
    videos = [write_video(tmp_path / "v" / name, 4) for name in "ab"]
    evaluate("whole", videos, *opts, snapshots={6: "cut"}, video=False)
    spoil(tmp_path / "cut" / "unfinished" / "b" / "state.pth")
    _, again = evaluate("cut", videos, *opts, resume=True, video=False)
    assert again == [(name, index) for name in "ab" for index in range(4)]
    assert "the run starts anew without it" in caplog.text
    resumed, whole = content(tmp_path / "cut"), content(tmp_path / "whole")
    assert resumed.pop("videos.jsonl") != whole.pop("videos.jsonl")
    assert resumed == whole


def test_videos_that_build_on_one_another_keep_their_order(evaluate, tmp_path):
    opts = ("TTT.RESET", "never", "TTT.METHOD", "none")
    a, b = (write_video(tmp_path / "v" / name, 2) for name in "ab")
    evaluate("run", [b], *opts, video=False)
    for videos in ([a, b], [b, a]):
        with pytest.raises(UserError, match=r"another setting \(videos: \['b'\], now"):
            evaluate("run", videos, *opts, resume=True, video=False)


def test_another_video_of_the_same_name_is_refused(evaluate, tmp_path):
    opts = ("TTT.METHOD", "none")
    video = write_video(tmp_path / "v", 6)
    evaluate("whole", [video], *opts, snapshots={4: "cut"}, video=False)
    rows = (tmp_path / "cut" / "frames.jsonl").read_bytes()

    def refused(folder: Path, words: str) -> None:
        with pytest.raises(UserError, match=rf"is of another video 'v' \({words}") as error:
            evaluate("cut", [folder], *opts, resume=True, video=False)
        assert "\n" not in str(error.value)
        assert (tmp_path / "cut" / "frames.jsonl").read_bytes() == rows

    other = write_video(tmp_path / "other" / "v", 6)
    for index in range(6):
        shutil.copyfile(video / f"{5 - index}.png", other / f"{index}.png")
    refused(other, "0.png has ")
    longer = shutil.copytree(video, tmp_path / "longer" / "v")
    shutil.copyfile(video / "0.png", longer / "6.png")
    refused(longer, "6.png is new; 6 files, now 7")
    (longer / "6.png").unlink()
    (longer / "2.png").unlink()
    refused(longer, "2.png is gone; 6 files, now 5")
    renamed = shutil.copytree(video, tmp_path / "w")
    with pytest.raises(UserError, match="has frames of video 'v', which is not among"):
        evaluate("cut", [renamed], *opts, resume=True, video=False)
    copy = shutil.copytree(video, tmp_path / "copy" / "v")
    evaluate("cut", [copy], *opts, resume=True, video=False)
    indices = [json.loads(line)["frame_index"] for line in (tmp_path / "cut/frames.jsonl").open()]
    assert indices == [0, 1, 2, 3, 4, 5]


FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture
def fill(monkeypatch):
    """``fill(names...)``: from now on there is no room for files with such names."""

    def start(*names: str) -> None:
        def full(path) -> bool:
            return any(name in str(path) for name in names)

        for module, function in ((os, "open"), (io, "open"), (av, "open")):
            original = getattr(module, function)

            def opened(path, *args, original=original, **kwargs):
                mode = args[0] if args else kwargs.get("mode", "r")
                writes = (
                    mode & (os.O_WRONLY | os.O_RDWR) if isinstance(mode, int) else "r" not in mode
                )
                if writes and full(path):
                    raise FULL
                return original(path, *args, **kwargs)

            monkeypatch.setattr(module, function, opened)

    return start


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "num_rows"),
    [("frames.jsonl", 1), ("videos.jsonl", 6), ("state.pth", 3), ("summary.json", 6),
     ("overlay-0", 3), ("overlay-v.mp4", 6)],
)  # fmt: skip
def test_a_full_disk_is_one_line_and_what_is_there_is_summed_up(
    evaluate, tmp_path, fill, monkeypatch, name, num_rows
):
    video = [write_video(tmp_path / "v", 6)]
    original = Stream.step

    def step(self, frame):
        # The overlay is opened in a thread, at some time after its first frame.
        if frame["frame_index"] == (0 if name == "overlay-0" else 1):
            fill(name)
        return original(self, frame)

    monkeypatch.setattr(Stream, "step", step)
    with pytest.raises(UserError, match=r"^cannot write .*: No space left on device$") as error:
        evaluate("run", video, "TTT.METHOD", "none")
    assert name in str(error.value)
    assert "\n" not in str(error.value)
    run = tmp_path / "run"
    assert len((run / "frames.jsonl").read_text().splitlines()) == num_rows
    if name == "summary.json":
        assert not (run / name).exists()
    else:
        summary = json.loads((run / "summary.json").read_text())
        assert (summary["complete"], summary["frames"]) == (False, num_rows)
    assert not list(run.rglob("*.part"))
    monkeypatch.undo()
    evaluate("run", video, "TTT.METHOD", "none", resume=True)
    rows = [json.loads(line)["frame_index"] for line in (run / "frames.jsonl").open()]
    assert rows == [0, 1, 2, 3, 4, 5]


def test_the_first_error_is_the_one_that_is_told(evaluate, tmp_path, fill, monkeypatch):
    video = [write_video(tmp_path / "v", 3)]
    raised: Exception

    def step(self, frame):
        fill("run/")
        raise raised

    raised = ZeroDivisionError()  # a defect stays one
    with monkeypatch.context() as patch:
        patch.setattr(Stream, "step", step)
        with pytest.raises(ZeroDivisionError):
            evaluate("1/run", video, "TTT.METHOD", "none")
    monkeypatch.undo()
    raised = UserError("the first")
    monkeypatch.setattr(Stream, "step", step)
    with pytest.raises(UserError) as error:
        evaluate("2/run", video, "TTT.METHOD", "none")
    first, *later = str(error.value).split("; then: ")
    assert first == "the first"
    assert [Path(line.split(": ")[0]).name for line in later] == ["videos.jsonl", "summary.json"]


def test_a_row_that_lacks_its_numbers_is_one_line(evaluate, tmp_path):
    video = [write_video(tmp_path / "v", 2)]
    evaluate("run", video, "TTT.METHOD", "none", video=False)
    with (tmp_path / "run" / "frames.jsonl").open("a") as file:
        file.write('{"video_id": "v", "frame_index": 7, "file_name": "", "records": {}}\n')
    words = r"a row without adapt_seconds, predict_seconds, metrics \(video v, frame 7\)"
    with pytest.raises(UserError, match=words):
        evaluate("run", video, "TTT.METHOD", "none", video=False, resume=True)


@pytest.mark.parametrize("name", ["config.yaml", "run.json", "sources.json"])
def test_a_disk_that_is_full_from_the_start_is_one_line(evaluate, tmp_path, fill, name):
    fill(name)
    with pytest.raises(UserError, match=rf"^cannot write .*{name}: No space left on device$"):
        evaluate("run", [write_video(tmp_path / "v", 1)], "TTT.METHOD", "none")


def test_a_folder_that_is_removed_under_a_run_is_one_line(evaluate, tmp_path, monkeypatch):
    original = Stream.step

    def step(self, frame):
        if frame["frame_index"] == 4:  # both streams get there
            shutil.rmtree(tmp_path / "run", ignore_errors=True)
        return original(self, frame)

    monkeypatch.setattr(Stream, "step", step)
    with pytest.raises(UserError, match=r"run was removed or replaced") as error:
        evaluate("run", [write_video(tmp_path / "v", 6)], "TTT.METHOD", "none")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()
