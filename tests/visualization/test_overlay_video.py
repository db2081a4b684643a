"""Overlay videos are drawn beside the loop, with the pictures and the errors of drawing in it."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import MetadataCatalog

from ttt_video.data import BaseSource
from ttt_video.errors import UserError
from ttt_video.stream import FrameResult, OverlayVideos, Results, VideoRun
from ttt_video.stream import overlay as overlay_video
from ttt_video.stream.saving import Predicted
from ttt_video.tasks import overlay_painter
from ttt_video.visualization.overlay import side_by_side
from ttt_video.visualization.video import VideoWriter


@pytest.fixture
def results(make_video) -> list[Results]:
    generator = torch.Generator().manual_seed(0)
    made = [
        FrameResult(frame, {"sem_seg": torch.rand(19, 64, 96, generator=generator)})
        for frame in make_video("a", 6)
    ]
    return [Results(result, result, {}) for result in made]


class Source(BaseSource):
    video_id = "a"

    def __iter__(self):
        return iter(())


@pytest.fixture
def overlay(tiny_cfg, tmp_path) -> OverlayVideos:
    videos = OverlayVideos(tiny_cfg, tmp_path, fps=10, single=True)
    videos.start(VideoRun(Source(), tmp_path / "parts"))
    return videos


def test_frames_are_drawn_in_the_encoders_thread_and_in_order(
    overlay, results, tmp_path, monkeypatch
):
    threads, original = [], overlay_video.side_by_side

    def seen(*args, **more):
        threads.append(threading.current_thread())
        return original(*args, **more)

    monkeypatch.setattr(overlay_video, "side_by_side", seen)
    with VideoWriter(tmp_path / "expected.mp4", 10) as expected:
        for index, result in enumerate(results):
            panels = overlay.panels(result)
            assert list(panels) == ["original", "frozen", "online_ttt_mae"]
            note = f"frame {index}   {index / 10:.2f} s"
            pictures = list(panels.values())
            expected.write(side_by_side(pictures, list(panels), note=note, sides=(480, 3840)))
    for result in results:
        overlay.write(result)
        result.adapted.output["sem_seg"].zero_()  # the loop may do with a prediction what it likes
    overlay.end(VideoRun(Source(), tmp_path / "parts", done=6, complete=True))
    assert len(threads) == len(results)
    assert threading.main_thread() not in threads
    assert (tmp_path / "overlay.mp4").read_bytes() == (tmp_path / "expected.mp4").read_bytes()


def test_colours_are_those_of_the_data_set(tiny_cfg, results, tmp_path):
    MetadataCatalog.get("overlay_set").set(stuff_colors=[[200, 0, 0]] * 19)
    MetadataCatalog.get("overlay_test").set(stuff_colors=[[0, 0, 200]] * 19)
    tiny_cfg.DATASETS.TEST = ("overlay_test",)
    results[0].adapted.frame["image"].zero_()
    for name, color in (("overlay_set", (100, 0, 0)), ("", (0, 0, 100))):
        videos = OverlayVideos(tiny_cfg, tmp_path, fps=10, single=True, dataset_name=name)
        assert (videos.panels(results[0])["online_ttt_mae"] == color).all()
    for name in ("overlay_set", "overlay_test"):
        MetadataCatalog.remove(name)


@pytest.mark.parametrize("outputs", [{"sem_seg"}, {"panoptic_seg"}, {"sem_seg", "panoptic_seg"}])
def test_saved_predictions_have_the_colours_and_names_of_the_overlay(tiny_cfg, tmp_path, outputs):
    """Also where the first data set has other classes than the model."""
    names, colors = [f"class {k}" for k in range(19)], [[k, 2 * k, 200] for k in range(19)]
    MetadataCatalog.get("palette_few").set(stuff_classes=["a"], stuff_colors=[[1, 2, 3]] * 30)
    MetadataCatalog.get("palette_own").set(
        stuff_classes=names, stuff_colors=colors, thing_colors=[[9, 9, 9]] * 19
    )
    tiny_cfg.DATASETS.TEST, tiny_cfg.DATASETS.TRAIN = (), ("palette_own",)
    try:
        overlay = OverlayVideos(tiny_cfg, tmp_path, single=True, dataset_name="palette_few")
        saved = Predicted.of(tiny_cfg, frozenset(outputs), "palette_few", 10.0)
        segments = [{"id": 1, "category_id": 4, "isthing": False}]
        output = {
            "sem_seg": torch.zeros(19, 2, 2),
            "panoptic_seg": (torch.ones(2, 2, dtype=torch.int32), segments),
        }
        painter = overlay_painter({key: output[key] for key in outputs}, overlay.metadata)
        legend = {entry.name: entry.color for entry in painter.legend()}
    finally:
        for name in ("palette_few", "palette_own"):
            MetadataCatalog.remove(name)
    assert saved.names == tuple(names) == tuple(legend)
    assert saved.colors.tolist() == colors == [list(color) for color in legend.values()]


@pytest.mark.parametrize("labelled", [True, False])
def test_colours_stand_between_the_grey_frame_and_the_original(tiny_cfg, tmp_path, labelled):
    """At the frame's own size, of which the network's input is a part."""
    rng = np.random.default_rng(0)
    grey, original = rng.integers(0, 256, (40, 60), np.uint8), rng.integers(0, 256, (40, 60, 3))
    frame = {
        "image": torch.zeros(3, 20, 30, dtype=torch.uint8),
        "grey": torch.from_numpy(grey)[None],
        **{"video_id": "a", "frame_index": 3, "height": 40, "width": 60},
        **({"original": original.astype(np.uint8)} if labelled else {}),
    }
    coloured = [torch.full((3, 40, 60), value, dtype=torch.uint8) for value in (50, 90)]
    adapted, frozen = (FrameResult(frame, {"color": color}) for color in coloured)
    overlay = OverlayVideos(tiny_cfg, tmp_path, single=True)
    panels = overlay.panels(Results(adapted, frozen, {}))
    titles = ["grey", "frozen", "online_ttt_mae", "original"]
    assert list(panels) == titles[: 3 + labelled]
    assert (panels["grey"] == grey[:, :, None]).all()
    assert (panels["frozen"] == 90).all()
    assert (panels["online_ttt_mae"] == 50).all()
    if labelled:
        assert (panels["original"] == original).all()


def test_the_frame_is_seen_at_its_own_size(overlay, results):
    frame = results[0].adapted.frame
    frame["height"], frame["width"] = 640, 960
    picture = np.random.default_rng(0).integers(0, 256, (640, 960, 3), np.uint8)
    frame["picture"] = picture[:, ::-1]  # as a decoder gives mirrored ones
    assert (overlay.panels(results[0])["original"] == picture[:, ::-1]).all()


def test_a_frame_has_its_number_and_time(tiny_cfg, results, tmp_path, monkeypatch):
    notes = []

    def noted(*args, note, **more):
        notes.append(note)

    monkeypatch.setattr(overlay_video, "side_by_side", noted)
    for own, asked in ((25.0, None), (25.0, 5.0), (None, 5.0), (None, None)):
        source = Source()
        source.fps = own
        videos = OverlayVideos(tiny_cfg, tmp_path, fps=asked, single=True)
        videos.start(VideoRun(source, tmp_path))
        assert videos.video.fps == (asked or own or 10)
        overlay_video._draw(*videos.pictures(results[5]), videos._note(results[5]), None)
    # A folder does not tell its rate, so the time of its frames is unknown unless one is asked for.
    assert notes == ["frame 5   0.20 s", "frame 5   0.20 s", "frame 5   1.00 s", "frame 5"]
    # Nor is it known where pictures were dropped before it, whatever rate is asked for.
    results[5].adapted.frame["dropped"] = 3
    videos.asked_fps = 5.0
    videos.start(VideoRun(source, tmp_path))
    overlay_video._draw(*videos.pictures(results[5]), videos._note(results[5]), None)
    assert notes[-1] == "frame 5"


@pytest.mark.parametrize("spoil", [Path.unlink, lambda file: file.write_bytes(b"")])
def test_a_missing_part_is_told_before_the_video_goes_on(tiny_cfg, results, tmp_path, spoil):
    parts = tmp_path / "parts"
    first = OverlayVideos(tiny_cfg, tmp_path, fps=10, single=True)
    first.start(VideoRun(Source(), parts))
    for result in results[:2]:
        first.write(result)
        state = first.save()
    names = state["parts"]
    assert len(names) == 2
    spoil(parts / names[1])
    again = OverlayVideos(tiny_cfg, tmp_path, fps=10, single=True)
    words = f"{names[1]}, a part of .*: put it back, or remove {parts} to start"
    again.load(state)
    with pytest.raises(UserError, match=words):
        again.start(VideoRun(Source(), parts, done=2))
    with pytest.raises(UserError, match=rf"{names[1]}, a part of an overlay video"):
        first.end(VideoRun(Source(), parts, done=2))
    assert not (tmp_path / "overlay.mp4").exists()


@pytest.mark.parametrize("fps", [0.0, -5.0, float("nan"), float("inf"), 1e-9])
def test_impossible_frame_rates_are_told_before_the_first_frame(tiny_cfg, tmp_path, fps):
    with pytest.raises(UserError, match="frame rate must be between"):
        OverlayVideos(tiny_cfg, tmp_path, fps=fps, single=True)


def test_what_goes_wrong_in_drawing_is_raised_in_the_loop(overlay, results, monkeypatch):
    def fails(*args, **more):
        raise UserError("no room for a picture")

    monkeypatch.setattr(overlay_video, "side_by_side", fails)
    more_than_may_wait = (overlay.write(result) for result in results * 3)
    with pytest.raises(UserError, match="no room"):
        list(more_than_may_wait)
    overlay.write(results[0])
    with pytest.raises(UserError, match="no room"):
        overlay.save()


def test_what_cannot_be_drawn_is_told_at_once(overlay, results):
    with pytest.raises(ValueError, match="to draw in an output with keys"):
        overlay.write(Results(FrameResult(results[0].adapted.frame, {}), None, {}))


def test_a_drawn_frame_is_checked_like_any_other(tmp_path):
    writer = VideoWriter(tmp_path / "v.mp4", 10)
    writer.write(lambda: np.zeros((2, 2), np.uint8))
    with pytest.raises(ValueError, match=r"\(2, 2\) uint8"):
        writer.close()


def test_a_bar_moves_between_frozen_and_adapted(tiny_cfg, make_video, tmp_path):
    def labelled(k: int, frame) -> FrameResult:
        scores = torch.zeros(19, 64, 96)
        scores[k] = 1
        return FrameResult(frame, {"sem_seg": scores})

    split = OverlayVideos(tiny_cfg, tmp_path, fps=10, single=True, split=True)
    plain = OverlayVideos(tiny_cfg, tmp_path, fps=10, single=True)
    assert split.flags == {"--view": "split", "--fps": 10}
    assert plain.flags == {"--fps": 10}
    assert OverlayVideos(tiny_cfg, tmp_path, single=True).flags == {}
    for index, place in ((0, 0.05), (20, 0.5), (40, 0.95), (80, 0.05)):
        frame = {**make_video("a", 1)[0], "frame_index": index}
        results = Results(labelled(0, frame), labelled(10, frame), {})
        ((title, picture),) = split.panels(results).items()
        assert title == "frozen | online_ttt_mae"
        panels = plain.panels(results)
        edge = round(96 * place)
        assert (picture[:, : edge - 1] == panels["frozen"][:, : edge - 1]).all()
        assert (picture[:, edge + 1 :] == panels["online_ttt_mae"][:, edge + 1 :]).all()
        assert (picture[:, edge - 1 : edge + 1] == 255).all()
    alone = Results(labelled(0, frame), None, {})
    assert split.panels(alone).keys() == {"original", "online_ttt_mae"}
