"""A run on a camera that is killed goes on with what was saved; its frames do not come again."""

from __future__ import annotations

import copy
import json
import shutil

import av
import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO
from run_folders import copy_running

from ttt_video.data import BaseSource
from ttt_video.errors import UserError
from ttt_video.files import file_stem
from ttt_video.stream import OverlayVideos, RunDirectory, Settings, Sink, Stream, StreamEvaluation
from ttt_video.stream.saving import SavedPredictions
from ttt_video.stream.video_parts import VideoParts

SAVE_EVERY = 3


class Camera(BaseSource):
    """Gives pictures once, numbered from 0."""

    live = True
    video_id = "camera 0"

    def __init__(self, frames: list) -> None:
        self.frames = frames

    def __iter__(self):
        for number, frame in enumerate(self.frames):
            yield {**frame, "video_id": self.video_id, "frame_index": number}


@pytest.fixture
def evaluate(tiny_cfg, tiny_model, tmp_path):
    """``evaluate(folder, camera, KEY VALUE...)``; gives the summary.

    ``kill`` (n, copy) copies the folder to ``copy`` when the n-th frame of this call was written,
    which is what a kill leaves behind.
    """

    def run(name, camera, *opts, kill=(0, ""), resume=False, **options):
        cfg = tiny_cfg.clone()
        cfg.merge_from_list(["TTT.BATCH_SIZE", 2, "TTT.OPTIMIZER.NAME", "ADAMW", *opts])
        directory = RunDirectory(tmp_path / name, resume=resume)
        saved = SavedPredictions(cfg, directory.path, ["masks", "coco"])

        class Kill(Sink):
            seen = 0

            def write(self, results):
                self.seen += 1
                if self.seen == kill[0]:
                    saved._thread.flush()
                    copy_running(directory.path, tmp_path / kill[1])

        sinks = [saved, OverlayVideos(cfg, directory.path, fps=10, single=True), Kill()]
        settings = Settings(cfg, directory, sinks=sinks, **{"save_every": SAVE_EVERY, **options})
        return StreamEvaluation(settings, copy.deepcopy(tiny_model)).evaluate([camera])

    return run


def rows_of(folder):
    return [json.loads(line) for line in (folder / "frames.jsonl").read_text().splitlines()]


def content(folder):
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def brightness(video):
    with av.open(str(video)) as container:
        return [float(f.to_ndarray(format="rgb24").mean()) for f in container.decode(video=0)]


@pytest.mark.parametrize("kept", [2, *(pytest.param(n, marks=pytest.mark.slow) for n in (5, 6))])
def test_a_killed_run_goes_on_with_the_saved_weights_and_loses_no_row(
    evaluate, tiny_cfg, tiny_model, make_video, tmp_path, caplog, kept
):
    """Later frames have the numbers of a stream that never saw those after the saved state."""
    before, after, at_last = (make_video(name, 8) for name in "abc")
    evaluate("run", Camera(before), kill=(kept, "cut"))
    cut = tmp_path / "cut"
    text, masks = (cut / "frames.jsonl").read_text(), content(cut / "masks")
    evaluate("cut", Camera(after), resume=True, kill=(4, "cut again"))
    folder = tmp_path / "cut again"
    summary = evaluate("cut again", Camera(at_last), resume=True, max_frames=kept + 4 + 2)
    # The kill comes before the state of its own frame is saved.
    state_of = [(count - 1) // SAVE_EVERY * SAVE_EVERY for count in (kept, kept + 4)]
    assert (summary["complete"], summary["videos"]) == (True, {"camera 0": kept + 6})
    assert summary["gaps"] == [
        {"video_id": "camera 0", "after_frame": count - 1, "weights_of_frame": state - 1}
        for count, state in zip((kept, kept + 4), state_of, strict=True)
    ]
    assert f"camera 0 goes on with frame {kept + 4} and the weights of frame" in caplog.text

    assert (folder / "frames.jsonl").read_text().startswith(text)
    rows = rows_of(folder)
    assert [row["frame_index"] for row in rows] == [*range(kept + 6)]
    tiny_cfg.merge_from_list(["TTT.BATCH_SIZE", 2, "TTT.OPTIMIZER.NAME", "ADAMW"])
    stream = Stream.from_config(tiny_cfg, tiny_model)
    taught = before[: state_of[0]] + after[: state_of[1] - kept] + at_last[:2]
    frames = [{**frame, "video_id": "camera 0"} for frame in taught]
    losses = [result.loss for result in stream.run(frames)]
    shown = [*range(state_of[0]), *range(kept, state_of[1]), kept + 4, kept + 5]
    assert [rows[index]["loss_recon"] for index in shown] == losses

    for file, own in masks.items():
        assert (folder / file.relative_to(cut)).read_bytes() == own
    name = file_stem("camera 0")
    for index in range(kept + 6):
        picture = np.asarray(Image.open(folder / "masks" / name / f"{index:06d}.png"))
        assert picture.shape == (64, 96)
    coco = COCO(str(folder / "coco" / name / "semantic.json"))
    assert sorted(coco.imgs) == [*range(1, kept + 7)]
    assert {coco.anns[key]["image_id"] for key in coco.anns} == set(coco.imgs)
    assert not (folder / "unfinished").exists()
    # Frames of a fragment that a kill left in the encoder are not in the overlay.
    assert len(brightness(folder / "overlay.mp4")) == len(shown)


def test_a_complete_run_is_left_as_it_is(evaluate, make_video, tmp_path):
    evaluate("run", Camera(make_video("a", 4)))
    rows = rows_of(tmp_path / "run")
    assert evaluate("run", Camera(make_video("b", 4)), resume=True)["complete"]
    assert rows_of(tmp_path / "run") == rows


def test_a_complete_run_is_not_made_longer_and_loses_nothing(evaluate, make_video, tmp_path):
    evaluate("run", Camera(make_video("a", 6)), max_frames=4)
    kept = content(tmp_path / "run")
    with pytest.raises(UserError, match=r"no state of camera 0 is there .*or had it ended\?"):
        evaluate("run", Camera(make_video("b", 6)), resume=True, max_frames=6)
    assert {file: content(tmp_path / "run")[file] for file in kept} == kept
    assert evaluate("run", Camera(make_video("b", 6)), resume=True, max_frames=4)["complete"]


def test_nothing_is_compared_across_the_gap(evaluate, make_video, tmp_path):
    """The kill comes just after a state, so that no frame is missing in the rows."""
    evaluate("run", Camera(make_video("a", 8)), kill=(SAVE_EVERY + 1, "cut"))
    folder = tmp_path / "cut"
    rows = rows_of(folder)[:SAVE_EVERY]
    (folder / "frames.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    evaluate("cut", Camera(make_video("b", 3)), resume=True)
    temporal = ["temporal" in row["records"] for row in rows_of(folder)]
    assert temporal == [i not in (0, SAVE_EVERY) for i in range(SAVE_EVERY + 3)]


def without_states(folder):
    next(folder.rglob("state.pth")).unlink()


def with_a_torn_state(folder):
    state = next(folder.rglob("state.pth"))
    state.write_bytes(state.read_bytes()[:-100])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("damage", "size", "message"),
    [
        (without_states, (64, 96), "cannot go on: no state of camera 0 is there"),
        (with_a_torn_state, (64, 96), "is damaged: camera 0 cannot go on without it; choose"),
        (lambda _: None, (32, 96), r"gives frames of 32x96 pixels \(32x96 .*before had 64x96 pix"),
    ],
)
def test_what_cannot_go_on_is_refused_and_nothing_is_lost(
    evaluate, make_video, tmp_path, damage, size, message
):
    evaluate("run", Camera(make_video("a", 5)), kill=(4, "cut"))
    damage(tmp_path / "cut")
    rows, masks = rows_of(tmp_path / "cut"), content(tmp_path / "cut" / "masks")
    with pytest.raises(UserError, match=message):
        evaluate("cut", Camera(make_video("b", 3, *size)), resume=True)
    assert rows_of(tmp_path / "cut") == rows
    assert content(tmp_path / "cut" / "masks") == masks


@pytest.mark.slow
def test_predictions_that_a_kill_kept_from_the_disk_are_counted(
    evaluate, make_video, tmp_path, caplog
):
    """A row is written before the predictions, which wait for a thread."""
    evaluate("run", Camera(make_video("a", 6)), kill=(6, "cut"))
    cut, again = tmp_path / "cut", make_video("b", 1)
    (lines,) = (cut / "unfinished").rglob("coco.jsonl")
    lines.write_bytes(b"".join(lines.read_bytes().splitlines(keepends=True)[:-1])[:-1])  # 1 is torn
    shutil.copytree(cut, tmp_path / "both")
    (tmp_path / "both" / "masks" / file_stem("camera 0") / "000005.png").unlink()
    for name, missing in (("cut", "2 in coco"), ("both", "1 in masks, 2 in coco")):
        caplog.clear()
        evaluate(name, Camera(again), resume=True)
        (line,) = [text for text in caplog.messages if "predictions are missing" in text]
        assert line.startswith(
            f"camera 0: of 6 frames that have a row, predictions are missing ({missing})"
        )
    coco = COCO(str(cut / "coco" / file_stem("camera 0") / "semantic.json"))
    assert sorted(coco.imgs) == [1, 2, 3, 4, 7]
    caplog.clear()
    evaluate("other", Camera(make_video("a", 6)), kill=(5, "whole"))
    evaluate("whole", Camera(again), resume=True)
    assert "predictions are missing" not in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize("kept", [2, SAVE_EVERY + 1], ids=["before its first update", "later"])
def test_pictures_of_another_size_are_refused_though_the_network_sees_one(
    evaluate, make_video, tmp_path, kept
):
    """Or the files of one video would have masks of two sizes."""
    evaluate("run", Camera(make_video("a", 5)), kill=(kept, "cut"))
    files = content(tmp_path / "cut")
    larger = [{**frame, "height": 128, "width": 192} for frame in make_video("b", 3)]
    message = r"camera 0 gives frames of 128x192 pixels \(64x96 for the network\), and those before"
    with pytest.raises(UserError, match=message):
        evaluate("cut", Camera(larger), resume=True)
    now = content(tmp_path / "cut")
    changed = {file.name for file in now if files.get(file) != now[file]}
    assert changed <= {"summary.json", "videos.jsonl", "overlay.mp4", "semantic.json"}
    evaluate("cut", Camera(make_video("b", 3)), resume=True)
    assert len(rows_of(tmp_path / "cut")) == kept + 3


def test_a_run_that_saved_no_states_is_refused(evaluate, make_video, tmp_path):
    with_states, without = {"kill": (4, "cut")}, {"kill": (4, "bare"), "save_every": 0}
    evaluate("run", Camera(make_video("a", 5)), **with_states)
    evaluate("other", Camera(make_video("a", 5)), **without)
    assert not list((tmp_path / "bare").rglob("state.pth"))
    with pytest.raises(UserError, match=r"no state of camera 0 is there \(was it --save-every 0"):
        evaluate("bare", Camera(make_video("b", 3)), resume=True)


def test_with_a_frame_budget_states_are_saved_of_live_sources_alone(evaluate, make_video, tmp_path):
    budget = ("TTT.FRAME_BUDGET_MS", 10000)
    evaluate("run", Camera(make_video("a", 5)), *budget, kill=(5, "cut"))
    (file,) = (tmp_path / "cut").rglob("state.pth")
    saved = torch.load(file, weights_only=True)["stream"]
    summary = evaluate("cut", Camera(make_video("b", 3)), *budget, resume=True)
    assert summary["videos"] == {"camera 0": 8}
    assert saved["position"] == SAVE_EVERY
    recorded = Camera(make_video("a", 5))
    recorded.live = False
    evaluate("file", recorded, *budget, kill=(5, "cut file"))
    assert not list((tmp_path / "cut file").rglob("state.pth"))
    with pytest.raises(UserError, match="run again would get other updates"):
        evaluate("cut file", recorded, *budget, resume=True)


def test_a_part_that_a_kill_tore_is_kept_as_far_as_it_plays(tmp_path):
    def pictures(count):
        return [np.full((32, 48, 3), 4 * value, np.uint8) for value in range(count)]

    parts = VideoParts(tmp_path / "a.mp4", 10, tmp_path, "overlay")
    for picture in pictures(5):
        parts.write(picture)
    names = parts.save()
    for picture in pictures(45):
        parts.write(picture)
    parts.save()  # the process is killed before the state is: nobody knows of this part
    torn = tmp_path / "overlay-00000005.mp4"
    content = torn.read_bytes()
    torn.write_bytes(content[: content.rfind(b"moof") + 4])  # without the last fragment
    (tmp_path / "overlay-00000050.mp4").write_bytes(b"")
    again = VideoParts(
        tmp_path / "b.mp4", 10, tmp_path, "overlay", done=52, parts=names, unsaved=47
    )
    for picture in pictures(3):
        again.write(picture)
    assert again.save() == [*names, torn.name, "overlay-00000052.mp4"]
    again.end()
    shown = [round(grey / 4) for grey in brightness(tmp_path / "b.mp4")]
    plays = len(shown) - 5 - 3
    assert 20 <= plays < 45
    assert np.abs(np.array(shown) - [*range(5), *range(plays), *range(3)]).max() <= 1
