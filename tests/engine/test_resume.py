"""Runs that are killed go on at the last saved state and end as if they never stopped."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ttt_video.data.sources import FolderSource, FrameTransform
from ttt_video.engine.run_directory import RunDirectory
from ttt_video.engine.stream import StreamRunner
from ttt_video.engine.stream_evaluation import StreamEvaluation
from ttt_video.errors import UserError
from ttt_video.visualization.overlay_video import OverlayVideos

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

        def observer(result, frozen):
            steps.append((result.frame["video_id"], result.frame["frame_index"]))
            if len(steps) in (snapshots or {}):
                shutil.copytree(directory.path, tmp_path / snapshots[len(steps)])

        overlay = OverlayVideos(cfg, directory.path, fps=10, single=False) if video else None
        evaluation = StreamEvaluation(
            cfg,
            copy.deepcopy(tiny_model),
            directory,
            observers=[observer],
            **{"overlay": overlay, "save_every": SAVE_EVERY, "compare": True, **options},
        )
        summary = evaluation.evaluate(sources)
        return summary, steps

    return run


def timeless(value):
    """JSON without what a clock or the memory of the process decides."""
    if isinstance(value, dict):
        measured = ("seconds", "peak_memory_mib")
        return {
            k: timeless(v) for k, v in value.items()
            if k not in measured and not k.endswith("_seconds")
        }  # fmt: skip
    return value


def content(folder: Path) -> dict[str, object]:
    """Every file of a finished run, times aside."""
    found: dict[str, object] = {}
    for file in sorted(folder.rglob("*")):
        if file.name == "frames.jsonl":
            found[file.name] = [timeless(json.loads(line)) for line in file.open()]
        elif file.suffix == ".json":
            found[file.name] = timeless(json.loads(file.read_text()))
        else:
            found[str(file.relative_to(folder))] = file.read_bytes() if file.is_file() else None
    return found


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
    original = StreamRunner.step

    def step(self, frame):
        if frame["frame_index"] == 5:
            raise KeyboardInterrupt
        return original(self, frame)

    with monkeypatch.context() as patch:
        patch.setattr(StreamRunner, "step", step)
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
    overlay = OverlayVideos(tiny_cfg, run.path, fps=10, single=False)
    shorter = StreamEvaluation(
        tiny_cfg, copy.deepcopy(tiny_model), run, compare=True, overlay=overlay, save_every=3
    )
    shorter.evaluate([FolderSource(video[0], KEEP)], max_frames=2)
    assert next((tmp_path / "cut").rglob("state.pth")).read_bytes() == state
