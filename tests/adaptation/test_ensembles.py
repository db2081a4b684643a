"""Votes and means of predictions: by hand, by another library, and on top of other methods."""

from __future__ import annotations

import colorsys
import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

from ttt_video.adaptation import (
    ClassBalance,
    MajorityVote,
    NoAdaptation,
    SlidingWindow,
    TemporalSmoothing,
)
from ttt_video.adaptation.augmentation import VoteAugmentation, jitter_color, shift_hsv
from ttt_video.adaptation.base import Adapter, build_adapter
from ttt_video.config import merge_method
from ttt_video.errors import UserError
from ttt_video.stream import Stream


class Scripted(Adapter):
    """Predicts the scores it is told, one after the other."""

    def __init__(self, *scores: torch.Tensor) -> None:
        super().__init__(torch.nn.Identity())
        self.scores = list(scores)
        self.frames: list[dict] = []

    def adapt(self, window: SlidingWindow, generator: torch.Generator) -> dict[str, float]:
        return {}

    def predict(self, frame):
        self.frames.append(frame)
        return {"sem_seg": self.scores.pop(0), "other": "kept"}

    def reset(self) -> None:
        pass


def frame(index: int = 0, video: str = "a", height: int = 2, width: int = 4) -> dict:
    image = torch.arange(3 * height * width, dtype=torch.uint8).reshape(3, height, width)
    return {"image": image, "video_id": video, "frame_index": index}


def one_hot(labels: list[list[int]], classes: int = 3) -> torch.Tensor:
    hot = torch.nn.functional.one_hot(torch.tensor(labels), classes)
    return hot.permute(2, 0, 1).float()


NO_AUGMENTATION = VoteAugmentation(scale_range=(1, 1), flip=False, color=False)


def test_votes_by_hand():
    inner = Scripted(
        one_hot([[0, 0, 0, 2]]),  # as it is: decides ties
        one_hot([[1, 0, 1, 2]]),
        one_hot([[1, 0, 2, 2]]),
        one_hot([[1, 1, 1, 1]]),
    )
    vote = MajorityVote(inner, predictions=4, augment=NO_AUGMENTATION)
    output = vote.predict(frame())
    assert output["other"] == "kept"
    assert output["sem_seg"].argmax(0).tolist() == [[1, 0, 1, 2]]
    expected = torch.tensor([[1.5, 3.5, 1.5, 0], [3, 1, 2, 1], [0, 0, 1, 3.5]]) / 4.5
    torch.testing.assert_close(output["sem_seg"][:, 0], expected)


def test_the_frame_as_it_is_decides_ties():
    for plain, other in ((0, 2), (2, 0)):
        vote = MajorityVote(
            Scripted(one_hot([[plain]]), one_hot([[other]])), predictions=2, augment=NO_AUGMENTATION
        )
        assert vote.predict(frame(width=1))["sem_seg"].argmax(0).item() == plain


def test_mirrored_predictions_are_mirrored_back(monkeypatch):
    monkeypatch.setattr("ttt_video.adaptation.augmentation.coin", lambda generator: True)
    inner = Scripted(one_hot([[0, 1, 2, 2]]), one_hot([[2, 2, 1, 0]]))
    augment = VoteAugmentation(scale_range=(1, 1), flip=True, color=False)
    output = MajorityVote(inner, predictions=2, augment=augment).predict(frame(height=1))
    assert torch.equal(output["sem_seg"], one_hot([[0, 1, 2, 2]]))
    assert torch.equal(inner.frames[1]["image"], inner.frames[0]["image"].flip(-1))


def test_scaled_copies_ask_for_the_size_of_the_frame():
    inner = Scripted(*[one_hot([[0, 1, 2, 2]] * 2)] * 4)
    augment = VoteAugmentation(scale_range=(2, 2), flip=False, color=False)
    MajorityVote(inner, predictions=4, augment=augment).predict(frame())
    assert [tuple(f["image"].shape) for f in inner.frames] == [(3, 2, 4)] + 3 * [(3, 4, 8)]
    assert all((f["height"], f["width"]) == (2, 4) for f in inner.frames)


def test_one_vote_is_the_method_itself(tiny_cfg, tiny_model, make_video):
    vote = MajorityVote(NoAdaptation(tiny_model), predictions=1, augment=VoteAugmentation())
    for x in make_video():
        expected = NoAdaptation(tiny_model).predict(x)["sem_seg"].argmax(0)
        assert torch.equal(vote.predict(x)["sem_seg"].argmax(0), expected)


def test_draws_depend_on_seed_and_frame_alone(tiny_model, make_video):
    video = make_video(num_frames=2)

    def run(seed: int, *frames: dict) -> torch.Tensor:
        vote = MajorityVote(
            NoAdaptation(tiny_model), predictions=3, augment=VoteAugmentation((0.5, 1)), seed=seed
        )
        return [vote.predict(f)["sem_seg"] for f in frames][-1]

    assert torch.equal(run(0, *video), run(0, video[1]))
    assert not torch.equal(run(0, video[1]), run(1, video[1]))


@pytest.mark.parametrize(("hue", "saturation"), [(0, 1), (0.1, 1), (-0.3, 1), (0, 0.5), (0, 1.5)])
def test_hue_and_saturation_are_those_of_the_standard_library(hue, saturation):
    pixels = torch.randint(0, 256, (3, 5, 7), generator=torch.Generator().manual_seed(0)).float()
    pixels[:, 0, 0] = 77  # gray
    pixels[:, 0, 1] = 0
    altered = shift_hsv(pixels, hue=hue, saturation=saturation)
    for y, x in np.ndindex(5, 7):
        h, s, v = colorsys.rgb_to_hsv(*(pixels[:, y, x] / 255).tolist())
        expected = colorsys.hsv_to_rgb((h + hue) % 1, min(s * saturation, 1), v)
        np.testing.assert_allclose(altered[:, y, x] / 255, expected, atol=1e-5)


def test_colour_jitter_stays_in_range_and_follows_the_generator():
    image = torch.randint(0, 256, (3, 6, 6), dtype=torch.uint8)
    jittered = [jitter_color(image, torch.Generator().manual_seed(s)) for s in (0, 0, 1, 2, 3)]
    assert all(j.dtype == torch.uint8 and j.shape == image.shape for j in jittered)
    assert torch.equal(jittered[0], jittered[1])
    assert any(not torch.equal(jittered[0], j) for j in jittered[2:])


def test_smoothing_by_hand():
    scores = [torch.full((1, 1, 1), float(v)) for v in (1, 2, 6, 10)]
    smooth = TemporalSmoothing(Scripted(*scores), size=3)
    means = [smooth.predict(frame(i))["sem_seg"].item() for i in range(4)]
    assert means == [1, 1.5, 3, 6]


def test_predicting_a_frame_again_replaces_its_scores():
    scores = [torch.full((1, 1, 1), float(v)) for v in (1, 2, 6)]
    smooth = TemporalSmoothing(Scripted(*scores), size=3)
    means = [smooth.predict(frame(i))["sem_seg"].item() for i in (0, 1, 1)]
    assert means == [1, 1.5, 3.5]


def test_smoothing_does_not_blend_videos():
    """Also where nothing is reset between them, and where their sizes differ."""
    scores = [
        torch.full((1, *size), v) for size, v in (((2, 2), 1.0), ((3, 3), 4.0), ((3, 3), 2.0))
    ]
    smooth = TemporalSmoothing(Scripted(*scores), size=3)
    frames = (frame(5, "a"), frame(0, "b"), frame(1, "b"))
    means = [smooth.predict(x)["sem_seg"].unique().tolist() for x in frames]
    assert means == [[1], [4], [3]]


def test_smoothing_over_one_frame_is_the_method_itself(tiny_model, make_video):
    smooth = TemporalSmoothing(NoAdaptation(tiny_model), size=1)
    for x in make_video():
        expected = NoAdaptation(tiny_model).predict(x)["sem_seg"]
        assert torch.equal(smooth.predict(x)["sem_seg"], expected)


def test_weights_that_are_reset_at_every_frame_leave_the_predictions(
    tiny_cfg, tiny_model, make_video
):
    tiny_cfg.TTT.METHOD = "temporal_smoothing"
    video = make_video()
    outputs = {}
    for tiny_cfg.TTT.RESET in ("video", "frame"):
        runner = Stream.from_config(tiny_cfg, tiny_model)
        outputs[tiny_cfg.TTT.RESET] = [r.output["sem_seg"] for r in runner.run(video)]
    # The wrapped method is frozen: when its weights are reset makes no difference.
    for left, right in zip(outputs["video"], outputs["frame"], strict=True):
        assert torch.equal(left, right)


@pytest.mark.parametrize("method", ["majority_vote", "temporal_smoothing"])
@pytest.mark.parametrize("task", ["instance", "panoptic"])
def test_tasks_without_class_scores_are_refused(tiny_cfg, tiny_model, method, task):
    tiny_model.postprocess = replace(tiny_model.postprocess, **{task: True})
    tiny_cfg.TTT.METHOD = method
    with pytest.raises(UserError, match=f"{method} .* {task} segmentation"):
        build_adapter(tiny_cfg, tiny_model)


def test_an_ensemble_of_an_ensemble_is_refused(tiny_cfg, tiny_model):
    tiny_cfg.TTT.METHOD = "majority_vote"
    for inner in ("majority_vote", "temporal_smoothing"):
        tiny_cfg.TTT.ENSEMBLE.METHOD = inner
        with pytest.raises(UserError, match=f"'{inner}', itself an ensemble"):
            build_adapter(tiny_cfg, tiny_model)


def test_wrappers_stand_in_each_other(tiny_cfg, tiny_model, make_video):
    """A vote of one and a mean over one frame around class balance change nothing."""
    tiny_cfg.merge_from_list(["TTT.ENSEMBLE.PREDICTIONS", 1, "TTT.ENSEMBLE.WINDOW_SIZE", 1])
    outputs = []
    for wrappers in ((), (TemporalSmoothing, MajorityVote)):
        merge_method(tiny_cfg, "tent_class_balance")
        model = copy.deepcopy(tiny_model)
        adapter = build_adapter(tiny_cfg, model)
        assert type(adapter) is ClassBalance
        for wrapper in wrappers:
            adapter = wrapper.from_config(tiny_cfg, adapter)
        results = Stream(adapter, SlidingWindow(2)).run(make_video(num_frames=2))
        outputs.append([(r.record, r.output["sem_seg"].argmax(0)) for r in results])
    for (record, classes), (wrapped, voted) in zip(*outputs, strict=True):
        assert record == wrapped
        assert torch.equal(classes, voted)


def test_numbers_that_cannot_work():
    with pytest.raises(ValueError, match="at least one"):
        MajorityVote(Scripted(), predictions=0, augment=NO_AUGMENTATION)
    with pytest.raises(ValueError, match="current frame"):
        TemporalSmoothing(Scripted(), size=0)


@pytest.mark.parametrize("predict", ["after", "before"])
@pytest.mark.parametrize("method", ["majority_vote", "temporal_smoothing"])
def test_recorded_steps_are_predicted_as_frames_are(
    tiny_cfg, tiny_model, make_video, method, predict
):
    """The last step's prediction is the frame's own, and looking on changes no other frame."""
    merge_method(tiny_cfg, "online_ttt_mae")
    merge_method(tiny_cfg, method)
    tiny_cfg.merge_from_list(
        [
            "TTT.ENSEMBLE.METHOD", "online_ttt_mae", "TTT.ENSEMBLE.PREDICTIONS", 3,
            "TTT.ENSEMBLE.WINDOW_SIZE", 2, "TTT.STEPS_PER_FRAME", 2, "TTT.BATCH_SIZE", 1,
            "TTT.PREDICT", predict,
        ]
    )  # fmt: skip

    def run(record: bool) -> list:
        cfg = tiny_cfg.clone()
        cfg.TTT.RECORD_STEPS = record
        stream = Stream.from_config(cfg, copy.deepcopy(tiny_model))
        return list(stream.run(make_video(num_frames=3)))

    seen, plain = run(True), run(False)
    for one, other in zip(seen, plain, strict=True):
        assert torch.equal(one.output["sem_seg"], other.output["sem_seg"])
        first, last = (step.output["sem_seg"] for step in one.steps)
        assert not torch.equal(first, last)
        assert torch.equal(last, one.output["sem_seg"]) == (predict == "after")
