"""The player's frames are the stream's, and each command does what it says."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch
from PIL import Image

from ttt_video.data.sources import FrameTransform
from ttt_video.errors import UserError
from ttt_video.live import WorldCamera
from ttt_video.live.player import MOMENTS
from ttt_video.stream import Stream


def expected(studio, count: int, make_video) -> list[float]:
    """Losses of the stream alone."""
    stream = Stream.from_config(studio.cfg, copy.deepcopy(studio.model))
    return [r.loss for r in stream.run(make_video("a", 60, 64, 64)[:count])]


def test_numbers_are_those_of_the_stream(studio, make_video):
    studio.player.start()
    numbers = [studio.next() for _ in range(4)]
    assert [n["loss"] for n in numbers] == expected(studio, 4, make_video)
    assert [n["frame"] for n in numbers] == [0, 1, 2, 3]
    assert numbers[-1]["apart_is"] == "other_class"
    assert 0 <= numbers[-1]["apart"] <= 100
    assert numbers[-1]["fps"] > 0
    assert numbers[-1]["shift"] is None  # this method has none
    assert numbers == [*studio.player.history]


def test_how_far_frozen_and_adapted_are_apart_is_what_their_saved_maps_say(studio):
    studio.player.start()
    studio.player.do("learn", False)
    assert studio.next()["apart"] == 0
    studio.player.do("save", True)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in studio.player.stream.adapter.model.parameters():
            parameter.normal_()
    apart = studio.next()["apart"]
    studio.player.do("save", False)
    maps = [
        np.asarray(Image.open(studio.folder / "saved_1" / model / "a" / "000001.png"))
        for model in ("masks", "masks_frozen")
    ]
    assert apart == pytest.approx(100 * np.mean(maps[0] != maps[1]))
    assert apart > 0


def test_without_learning_no_weight_moves(studio):
    studio.player.do("learn", False)
    studio.player.start()
    assert studio.next(2)["loss"] is None
    assert (studio.moved(), studio.player.state()["learning"]) == ([], False)
    studio.player.do("learn", True)
    assert studio.next()["loss"] > 0
    assert studio.moved()


def test_reset_goes_back_to_the_source_weights_and_an_empty_window(studio):
    studio.player.start()
    studio.next(2)
    assert studio.moved()
    assert len(studio.player.stream.window) == 2
    studio.player.do("reset")
    assert (studio.moved(), len(studio.player.stream.window)) == ([], 0)


def test_a_kept_moment_gives_the_same_again_also_twice(studio, make_video):
    studio.player.start()
    studio.next(2)
    studio.player.do("keep")
    frame = make_video("a", 3, 64, 64)[2]
    first = studio.next(frame=frame)["loss"]
    assert studio.next(frame=frame)["loss"] != first
    for _ in range(2):
        studio.player.do("back", 1)
        assert studio.next(frame=frame)["loss"] == first
    (moment,) = studio.player.state()["moments"]
    assert moment == {"number": 1, "label": "1: frame 1, online_ttt_mae"}


def test_a_moment_brings_its_method_and_step_size_back(studio, make_video):
    studio.player.start()
    studio.player.do("step_size", 0.003)
    studio.next(2)
    studio.player.do("keep")
    frame = make_video("a", 3, 64, 64)[2]
    first = studio.next(frame=frame)["loss"]
    studio.player.do("method", "none")
    assert studio.next()["loss"] is None
    assert studio.player.state()["step_size"] is None
    studio.player.do("back", 1)
    state = studio.player.state()
    assert (state["method"], state["step_size"]) == ("online_ttt_mae", 0.003)
    assert studio.next(frame=frame)["loss"] == first


def test_only_the_last_moments_are_kept(studio):
    for _ in range(MOMENTS + 2):
        studio.player.do("keep")
    numbers = [m["number"] for m in studio.player.state()["moments"]]
    assert numbers == [*range(3, MOMENTS + 3)]
    with pytest.raises(UserError, match="no moment 1 is kept"):
        studio.player.do("back", 1)


def test_nothing_runs_while_it_is_paused(studio):
    studio.player.start()
    studio.next()
    studio.player.do("pause", True)
    studio.tap.next()
    studio.player.do("reset")  # commands are done meanwhile
    studio.player._thread.join(0.2)
    assert (len(studio.shown), studio.player.state()["paused"]) == (1, True)
    studio.player.do("pause", False)
    assert studio.next()["frame"] in (1, 2)  # the one that waited is the first
    assert [shown.numbers["frame"] for shown in studio.shown[:2]] == [0, 1]


def test_another_method_starts_from_the_source_weights(studio):
    source = copy.deepcopy(studio.model.state_dict())
    studio.player.start()
    studio.next(2)
    studio.player.do("method", "tent")
    assert studio.player.state()["method"] == "tent"
    assert studio.moved() == []
    numbers = studio.next()
    assert numbers["loss"] is None
    message = studio.shown[-1].message
    head = json.loads(message[4 : 4 + int.from_bytes(message[:4], "little")])
    assert [title for title, _ in head["pictures"]] == ["original", "frozen", "tent"]
    assert head["numbers"]["frame"] == numbers["frame"]
    for name, tensor in studio.model.state_dict().items():
        assert torch.equal(tensor, source[name])


@pytest.mark.parametrize(
    ("method", "match"),
    [("offline_ttt_mae", "needs the whole video"), ("no_such", "no method 'no_such'")],
)
def test_a_method_that_cannot_be_leaves_everything_as_it_was(studio, method, match):
    studio.player.start()
    studio.next(2)
    moved = studio.moved()
    with pytest.raises(UserError, match=match):
        studio.player.do("method", method)
    assert studio.player.state()["method"] == "online_ttt_mae"
    assert studio.moved() == moved


def test_the_step_size_is_the_optimizers(studio):
    groups = studio.player.stream.adapter.optimizer.param_groups
    before = [group["lr"] for group in groups]
    base = studio.player.state()["step_size"]
    assert base == studio.cfg.TTT.OPTIMIZER.BASE_LR
    studio.player.do("step_size", 3 * base)
    assert [group["lr"] for group in groups] == pytest.approx([3 * lr for lr in before])
    assert studio.player.state()["step_size"] == 3 * base
    with pytest.raises(UserError, match="give more"):
        studio.player.do("step_size", 0.0)
    studio.player.do("method", "none")
    with pytest.raises(UserError, match="none has no step size"):
        studio.player.do("step_size", 0.1)


def test_predictions_are_saved_from_one_moment_to_another(studio):
    studio.player.start()
    studio.next()
    studio.player.do("save", True)
    assert studio.player.state()["saving"] == str(studio.folder / "saved_1")
    studio.next(2)
    studio.player.do("save", False)
    studio.next()
    for model in ("masks", "masks_frozen"):
        files = sorted(f.name for f in (studio.folder / "saved_1" / model / "a").glob("*.png"))
        assert files == ["000001.png", "000002.png"]
    image = Image.open(studio.folder / "saved_1" / "masks" / "a" / "000002.png")
    assert np.asarray(image).shape == (64, 64)
    assert not (studio.folder / "saved_1" / "unfinished").exists()
    studio.player.do("save", True)  # nothing is overwritten
    assert studio.player.state()["saving"] == str(studio.folder / "saved_2")


def test_the_end_of_the_video_completes_what_is_saved(studio):
    studio.player.start()
    studio.player.do("save", True)
    studio.next(2)
    studio.tap.let(None)
    assert studio.player.ended.wait(30)
    assert studio.player.failure is None
    assert len([*(studio.folder / "saved_1" / "masks" / "a").glob("*.png")]) == 2
    with pytest.raises(UserError, match="the stream has ended"):
        studio.player.do("save", True)


def test_a_full_disk_ends_saving_and_not_the_stream(studio, monkeypatch):
    studio.player.start()
    studio.player.do("save", True)

    def full(*_: object, **__: object) -> None:
        raise UserError("the disk is full")

    monkeypatch.setattr("ttt_video.stream.saving.masks.write_png", full)
    studio.next(4)
    assert studio.player.state()["saving"] is None
    assert studio.player.state()["error"] == "no more is saved: the disk is full"
    assert studio.next()["loss"] > 0


def test_a_folder_that_cannot_be_made_is_told_to_who_asked(studio):
    studio.folder.write_text("a file")
    studio.player.start()
    studio.next()
    with pytest.raises(UserError, match="out"):
        studio.player.do("save", True)
    assert studio.player.state()["saving"] is None
    studio.next()


def test_what_ends_the_stream_is_kept(studio):
    studio.player.start()
    studio.next()
    studio.tap.let(UserError("the camera is gone"))
    assert studio.player.ended.wait(30)
    assert str(studio.player.failure) == studio.player.state()["error"] == "the camera is gone"


def test_the_world_is_a_camera_that_drops_what_nobody_could_see():
    now = [0.0]
    slept = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        now[0] += seconds

    frames = iter(WorldCamera(FrameTransform(), clock=lambda: now[0], sleep=sleep))
    first, second = next(frames), next(frames)
    assert (first["frame_index"], second["frame_index"]) == (0, 1)
    assert slept == pytest.approx([0.1])  # ten pictures a second
    now[0] = 0.75
    third = next(frames)
    assert (third["frame_index"], third["dropped"]) == (7, 5)
    assert third["picture"].shape == (128, 256, 3)
    on = next(WorldCamera(FrameTransform(), clock=lambda: now[0], sleep=sleep).frames_after(7))
    assert (on["frame_index"], on["dropped"]) == (8, 0)
