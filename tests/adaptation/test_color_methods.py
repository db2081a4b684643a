"""Methods on a model of colours: those that run keep the contract, the others refuse in a line."""

from __future__ import annotations

import copy
import math
from functools import cache

import numpy as np
import pytest
import test_methods
import torch
from detectron2.modeling import build_model
from tiny import TINY

from ttt_video.adaptation import NoAdaptation, TemporalSmoothing
from ttt_video.adaptation.base import Adapter, build_adapter
from ttt_video.color.lab import lightness, rgb_to_lab
from ttt_video.config import load_config, merge_method
from ttt_video.errors import UserError
from ttt_video.stream import Stream

source_statistics = test_methods.source_statistics  # the fixture that tests there are run with


def config(target: str):
    return load_config("joint_imagenet_color.yaml", opts=[*TINY, "TTT.COLOR.TARGET", target])


@cache
def built(target: str) -> torch.nn.Module:
    """Builds a model of random weights, whose head gives each pixel another colour."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build_model(config(target)).eval()
    model.sem_seg_head.predictor.mask_embed.layers[-1].weight.data.mul_(10)
    return model


class OfColours:
    """A tiny model of colours; its frames are coloured, which must not matter."""

    outputs = frozenset({"color"})
    target = "classification"

    @pytest.fixture
    def tiny_cfg(self):
        return config(self.target)

    @pytest.fixture
    def tiny_model(self):
        return copy.deepcopy(built(self.target))


class OfRegression(OfColours):
    target = "regression"


class TestOnlineTTTMAE(OfColours, test_methods.TestOnlineTTTMAE):
    pass


class TestOnlineTTTMAEOfRegression(OfRegression, test_methods.TestOnlineTTTMAE):
    pass


class TestSelfTrain(OfColours, test_methods.TestSelfTrain):
    pass


class TestTemporalSmoothing(OfColours, test_methods.TestTemporalSmoothingOverOnlineTTTMAE):
    pass


@pytest.mark.slow
class TestOnlineTTTMAEWithEverySourceOfRandomness(
    OfColours, test_methods.TestOnlineTTTMAEWithEverySourceOfRandomness
):
    pass


@pytest.mark.slow
class TestOnlineTTTMAELineSearch(OfColours, test_methods.TestOnlineTTTMAELineSearch):
    pass


@pytest.mark.slow
class TestTTTMAENoMemory(OfColours, test_methods.TestTTTMAENoMemory):
    pass


@pytest.mark.slow
class TestLNAdapt(OfColours, test_methods.TestLNAdapt):
    pass


@pytest.mark.slow
class TestOfflineTTTMAE(OfRegression, test_methods.TestOfflineTTTMAE):
    pass


@pytest.fixture(params=["classification", "regression"])
def target(request) -> str:
    return request.param


def adapter_of(target: str, method: str, *opts) -> Adapter:
    cfg = config(target)
    merge_method(cfg, method)
    cfg.merge_from_list(list(opts))
    return build_adapter(cfg, copy.deepcopy(built(target)))


@pytest.mark.parametrize(
    ("method", "opts"),
    [
        ("tent", ()),
        ("tent_class_balance", ()),
        ("self_train_class_balance", ()),
        ("majority_vote", ("TTT.ENSEMBLE.METHOD", "online_ttt_mae")),
    ],
)
def test_methods_of_classes_refuse(method, opts):
    with pytest.raises(UserError, match="needs classes, which colorization does not have") as error:
        adapter_of("classification", method, *opts)
    assert "\n" not in str(error.value)


def test_self_training_needs_a_distribution():
    with pytest.raises(UserError, match=r"a model with TTT\.COLOR\.TARGET regression has none"):
        adapter_of("regression", "self_train")


def nearest_bins(ab: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices and Gaussian weights of the ten bins nearest to (N, 2) colours, by all distances."""
    squares = torch.cdist(ab.double(), built("classification").bins.centres.double()) ** 2
    nearest, indices = squares.topk(10, largest=False)
    return indices, (-nearest / 50).softmax(1)


def test_self_training_takes_predicted_colours_as_labels_of_training(make_video):
    """By hand: the label is the annealed mean, encoded; its confidence the probability around."""
    (frame,) = make_video(num_frames=1)
    model = copy.deepcopy(built("classification"))
    with torch.no_grad():
        logits = model.sem_seg_head(model.encode(model.normalize([frame]).tensor))
        logits = logits[0].flatten(1).T.double()  # (N, 313)
        ab = (logits / 0.38).softmax(1) @ model.bins.centres.double()
        indices, weights = nearest_bins(ab)
        confidence = logits.softmax(1).gather(1, indices).sum(1)
        threshold = confidence.median().item()
        task = model.main_task([frame], mask_with=torch.Generator().manual_seed(0))
        student = task.pixels.classes[0].flatten(1).T.double()
        error = -(weights * student.gather(1, indices)).sum(1)[confidence > threshold].mean()
    adapter = adapter_of("classification", "self_train", "TTT.SELF_TRAIN.THRESHOLD", threshold)
    losses = adapter.losses([frame], torch.Generator().manual_seed(0))
    expected = (confidence > threshold).float().mean().item()
    assert losses["confident"].item() == pytest.approx(expected, abs=5e-3)
    assert losses["loss_self_train"].item() == pytest.approx(error.item(), rel=2e-2)
    assert 0.4 < expected < 0.6


def test_a_certain_colour_is_labelled_at_the_default_lambda_wherever_it_lies(make_video):
    """Soft labels share a colour among bins: the likeliest of a certain prediction has 0.62."""
    model = copy.deepcopy(built("classification"))
    (frame,) = make_video(num_frames=1)
    threshold = config("classification").TTT.SELF_TRAIN.THRESHOLD
    assert threshold == 0.9
    task = model.main_task([frame])
    for colours in ([[40.0, 30.0]], [[35.0, 25.0]], [[31.0, 28.0]]):
        indices, weights = nearest_bins(torch.tensor(colours))
        learned = torch.full((1, 313), 1e-9, dtype=torch.float64).scatter(1, indices, weights)
        assert learned.max() < 0.63
        pixels = task.pixels._replace(classes=learned.log().float()[..., None, None])
        labels = task.labels(pixels)
        assert labels.confidence.item() > 0.99
        found = model.bins.centres[labels.classes[0, :, 0, 0]].T @ labels.weights[0, :, 0, 0]
        assert (found - torch.tensor(colours[0])).norm() < 3
    # All probability on ten bins, whose sum rounds to above 1 for about one colour in seven.
    generator = torch.Generator().manual_seed(0)
    indices, _ = nearest_bins(torch.rand(500, 2, generator=generator) * 100 - 50)
    logits = torch.full((500, 313), -50.0)
    logits.scatter_(1, indices, torch.randn(indices.shape, generator=generator))
    sure = task.labels(task.pixels._replace(classes=logits.log_softmax(1)[..., None, None]))
    assert not (sure.confidence > 1).any()  # a threshold of 1 takes none
    # Two separate colours, whose mean is neither.
    apart = torch.full((1, 313), 1e-9).scatter(1, torch.tensor([[20, 290]]), 0.5).log()
    assert task.labels(task.pixels._replace(classes=apart[..., None, None])).confidence < 0.01


@pytest.mark.slow
def test_the_oracle_scores_by_psnr(make_video, target):
    rng = np.random.default_rng(0)
    video = [
        {**frame, "original": rng.integers(0, 256, (64, 96, 3), np.uint8)} for frame in make_video()
    ]
    cfg = config(target)
    merge_method(cfg, "offline_ttt_mae_oracle")
    keys = ["TTT.BATCH_SIZE", 2, "TTT.OFFLINE.STEPS", 3, "TTT.OFFLINE.EVAL_EVERY", 1]
    cfg.merge_from_list([*keys, "TTT.OPTIMIZER.BASE_LR", 0.05])
    errors, scores = [], set()
    for result in Stream.from_config(cfg, copy.deepcopy(built(target))).run(video):
        colored = result.output["color"].permute(1, 2, 0).numpy().astype(float)
        errors.append(((colored - result.frame["original"]) ** 2).mean())
        scores.add(result.record["offline_score"])
    (score,) = scores
    assert score == pytest.approx(np.mean([10 * math.log10(255**2 / error) for error in errors]))
    unlabelled = Stream.from_config(cfg, copy.deepcopy(built(target)))
    with pytest.raises(UserError, match="has no labels that the model's predictions can be scored"):
        list(unlabelled.run(make_video()))


class Scripted(Adapter):
    """Predicts the colours it is told, one after the other."""

    def __init__(self, *colors: torch.Tensor) -> None:
        super().__init__(torch.nn.Identity())
        self.colors = list(colors)

    def adapt(self, window, generator) -> dict[str, float]:
        return {}

    def predict(self, frame):
        return {"color": self.colors.pop(0)}

    def reset(self) -> None:
        pass


def pictures(count: int) -> list[torch.Tensor]:
    """Soft colours, so that the mean of two of them is one that sRGB has."""
    generator = torch.Generator().manual_seed(0)
    grey = torch.randint(80, 170, (count, 1, 20, 30), generator=generator)
    return [*(grey + torch.randint(-9, 10, (count, 3, 20, 30), generator=generator)).byte()]


def test_smoothing_of_colours_is_the_mean_of_ab_at_the_lightness_of_now():
    colors = pictures(3)
    smoothing = TemporalSmoothing(Scripted(*colors), size=2)
    frames = [{"video_id": "a", "frame_index": i} for i in range(3)]
    (first, _, last) = (smoothing.predict(frame)["color"] for frame in frames)
    assert torch.equal(first, colors[0])
    before, now = rgb_to_lab(colors[1])[1:], rgb_to_lab(colors[2])[1:]
    smoothed = rgb_to_lab(last)
    assert last.dtype == torch.uint8
    torch.testing.assert_close(smoothed[:1], lightness(colors[2]), atol=0.4, rtol=0)
    torch.testing.assert_close(smoothed[1:], (before + now) / 2, atol=0.8, rtol=0)
    assert (smoothed[1:] - now).abs().mean() > 1


def test_a_window_of_one_changes_no_colour():
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(256, (3, 200, 300), generator=generator, dtype=torch.uint8)
    output = TemporalSmoothing(Scripted(noise), size=1).predict({"frame_index": 0})
    assert torch.equal(output["color"], noise)


def test_crops_and_mirrors_leave_no_frame_of_another_size_behind(make_video, target):
    """A frame's own grey is not what a crop of its image shows."""
    opts = ("TTT.CROP.SIZE", [32, 64], "TTT.CROP.FLIP", True)
    (frame,) = make_video(num_frames=1)
    large = torch.zeros(1, 640, 960, dtype=torch.uint8)
    losses = [
        adapter_of(target, "online_ttt_mae", *opts).losses(
            [{**frame, **more}], torch.Generator().manual_seed(0)
        )["loss_recon"]
        for more in ({}, {"grey": large, "height": 640, "width": 960})
    ]
    assert torch.equal(*losses)


def test_frozen_is_the_model_itself(make_video, target):
    model = built(target)
    for frame in make_video():
        with torch.no_grad():
            expected = model([frame])[0]["color"]
        assert torch.equal(NoAdaptation(model).predict(frame)["color"], expected)
