"""Overlay videos are drawn beside the loop, with the pictures and the errors of drawing in it."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch

from ttt_video.engine.stream import FrameResult
from ttt_video.errors import UserError
from ttt_video.visualization import overlay_video
from ttt_video.visualization.overlay import side_by_side
from ttt_video.visualization.overlay_video import OverlayVideos
from ttt_video.visualization.video import VideoWriter


@pytest.fixture
def results(make_video) -> list[FrameResult]:
    generator = torch.Generator().manual_seed(0)
    return [
        FrameResult(frame, {"sem_seg": torch.rand(19, 64, 96, generator=generator)})
        for frame in make_video("a", 6)
    ]


@pytest.fixture
def overlay(tiny_cfg, tmp_path) -> OverlayVideos:
    videos = OverlayVideos(tiny_cfg, tmp_path, fps=10, single=True)
    videos.start("a", tmp_path / "parts")
    return videos


def test_frames_are_drawn_in_the_encoders_thread_and_in_order(
    overlay, results, tmp_path, monkeypatch
):
    threads, original = [], overlay_video.side_by_side

    def seen(*args):
        threads.append(threading.current_thread())
        return original(*args)

    monkeypatch.setattr(overlay_video, "side_by_side", seen)
    with VideoWriter(tmp_path / "expected.mp4", 10) as expected:
        for result in results:
            panels = overlay.panels(result, result)
            assert list(panels) == ["original", "frozen", "online_ttt_mae"]
            expected.write(side_by_side(list(panels.values()), list(panels)))
    for result in results:
        overlay.write(result, result)
        result.output["sem_seg"].zero_()  # the loop may do with a prediction what it likes
    overlay.finish()
    assert len(threads) == len(results)
    assert threading.main_thread() not in threads
    assert (tmp_path / "overlay.mp4").read_bytes() == (tmp_path / "expected.mp4").read_bytes()


def test_what_goes_wrong_in_drawing_is_raised_in_the_loop(overlay, results, monkeypatch):
    def fails(*args):
        raise UserError("no room for a picture")

    monkeypatch.setattr(overlay_video, "side_by_side", fails)
    more_than_may_wait = (overlay.write(result, None) for result in results * 3)
    with pytest.raises(UserError, match="no room"):
        list(more_than_may_wait)
    overlay.write(results[0], None)
    with pytest.raises(UserError, match="no room"):
        overlay.cut()


def test_what_cannot_be_drawn_is_told_at_once(overlay, results):
    with pytest.raises(ValueError, match="to draw in an output with keys"):
        overlay.write(FrameResult(results[0].frame, {}), None)


def test_a_drawn_frame_is_checked_like_any_other(tmp_path):
    writer = VideoWriter(tmp_path / "v.mp4", 10)
    writer.write(lambda: np.zeros((2, 2), np.uint8))
    with pytest.raises(ValueError, match=r"\(2, 2\) uint8"):
        writer.close()
