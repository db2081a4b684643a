"""Pixel distributions of mask classification by hand, and by enumerating what queries may do."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from ttt_video.modeling.pixel_classes import MainTask, pixel_classes, pixel_entropy
from ttt_video.modeling.postprocess import semantic_inference


def logit(*probs: float) -> Tensor:
    p = torch.tensor(probs, dtype=torch.float32)
    return (p / (1 - p)).log()


def one_pixel(class_probs: list[list[float]], masks: list[float]):
    """Queries with class probabilities ("no object" last) at one pixel."""
    return pixel_classes(torch.tensor([class_probs]).log(), logit(*masks)[None, :, None, None])


def entropy(*probs: float) -> float:
    return -sum(p * math.log(p) for p in probs if p > 0)


def test_one_query_by_hand():
    # s = (0.6, 0.2) * 0.5; an object with 0.8, there with 0.5: something with 0.4.
    pixels = one_pixel([[0.6, 0.2, 0.2]], [0.5])
    assert pixels.classes.exp().flatten().tolist() == pytest.approx([0.75, 0.25])
    assert pixels.something.exp().item() == pytest.approx(0.4)
    assert pixels.nothing.exp().item() == pytest.approx(0.6)
    semantic = pixel_entropy(pixels, background=False).item()
    assert semantic == pytest.approx(entropy(0.75, 0.25), rel=1e-5)
    panoptic = pixel_entropy(pixels, background=True).item()
    assert panoptic == pytest.approx(entropy(0.3, 0.1, 0.6), rel=1e-5)


def test_two_queries_by_hand():
    # s_0 = 0.5 * 0.9 + 0.1 * 0.2 = 0.47, s_1 = 0.2 * 0.9 + 0.7 * 0.2 = 0.32.
    pixels = one_pixel([[0.5, 0.2, 0.3], [0.1, 0.7, 0.2]], [0.9, 0.2])
    assert pixels.classes.exp().flatten().tolist() == pytest.approx([0.47 / 0.79, 0.32 / 0.79])
    assert pixels.nothing.exp().item() == pytest.approx((1 - 0.7 * 0.9) * (1 - 0.8 * 0.2))


def test_nothing_is_that_no_query_is_an_object_and_there():
    """Every combination of queries being objects and covering the pixel, with its probability."""
    objects, masks = [0.7, 0.4, 0.9], [0.3, 0.8, 0.5]
    nothing = 0.0
    for outcome in itertools.product((0, 1), repeat=6):
        is_object, covers = outcome[:3], outcome[3:]
        if any(a and b for a, b in zip(is_object, covers, strict=True)):
            continue
        chances = [*zip(is_object, objects, strict=True), *zip(covers, masks, strict=True)]
        nothing += math.prod(p if yes else 1 - p for yes, p in chances)
    pixels = one_pixel([[o / 2, o / 2, 1 - o] for o in objects], masks)
    assert pixels.nothing.exp().item() == pytest.approx(nothing, rel=1e-5)


def test_a_query_that_is_no_object_has_no_say():
    alone = one_pixel([[0.5, 0.3, 0.2]], [0.6])
    beside = one_pixel([[0.5, 0.3, 0.2], [1e-9, 1e-9, 1.0]], [0.6, 0.99])
    for a, b in zip(alone, beside, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


def random_logits(seed: int = 0, scale: float = 3.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    classes = scale * torch.randn(2, 5, 4, generator=generator)
    return classes, scale * torch.randn(2, 5, 3, 6, generator=generator)


def test_the_likeliest_class_is_the_semantic_prediction():
    classes, masks = random_logits()
    pixels = pixel_classes(classes, masks)
    scores = torch.stack([semantic_inference(c, m) for c, m in zip(classes, masks, strict=True)])
    assert torch.equal(pixels.classes.argmax(1), scores.argmax(1))
    torch.testing.assert_close(pixels.classes.exp(), scores / scores.sum(1, keepdim=True))
    torch.testing.assert_close(pixels.something.exp() + pixels.nothing.exp(), torch.ones(2, 3, 6))


def test_entropy_is_between_0_and_that_of_equal_chances():
    for seed in range(5):
        pixels = pixel_classes(*random_logits(seed))
        for background, outcomes in ((False, 3), (True, 4)):
            values = pixel_entropy(pixels, background=background)
            assert (values >= -1e-6).all()
            assert (values <= math.log(outcomes) + 1e-6).all()
    equal = one_pixel([[0.25, 0.25, 0.25, 0.25]], [0.5])
    assert pixel_entropy(equal, background=False).item() == pytest.approx(math.log(3), rel=1e-5)


@pytest.mark.parametrize("scale", [30.0, 1000.0])
def test_extreme_logits_stay_finite_and_so_do_gradients(scale):
    classes, masks = random_logits(scale=scale)
    classes.requires_grad_(True)
    masks.requires_grad_(True)
    pixels = pixel_classes(classes, masks)
    for background in (False, True):
        pixel_entropy(pixels, background=background).sum().backward(retain_graph=True)
    (-pixels.classes - pixels.something[:, None]).sum().backward()
    assert all(torch.isfinite(t).all() for t in (*pixels, classes.grad, masks.grad))


@pytest.mark.parametrize("background", [False, True])
def test_gradcheck(background):
    """float64 in, float32 inside: against differences with a step that float32 resolves."""
    classes, masks = random_logits(scale=1.0)
    masks.requires_grad_(True)
    value = pixel_entropy(pixel_classes(classes, masks), background=background).sum()
    (analytic,) = torch.autograd.grad(value, masks)
    for place in [(0, 0, 0, 0), (1, 3, 2, 5)]:
        ends = []
        for step in (1e-2, -1e-2):
            moved = masks.detach().clone()
            moved[place] += step
            ends.append(pixel_entropy(pixel_classes(classes, moved), background=background).sum())
        assert analytic[place].item() == pytest.approx(
            ((ends[0] - ends[1]) / 2e-2).item(), abs=2e-3
        )


def test_autocast_does_not_reach_it():
    classes, masks = random_logits()
    expected = pixel_classes(classes, masks)
    with torch.autocast("cpu", torch.bfloat16):
        low = pixel_classes(classes, masks)
    assert all(torch.equal(a, b) for a, b in zip(low, expected, strict=True))


def test_mean_is_over_the_image_and_then_over_images():
    inside = torch.tensor([[[1.0, 1.0], [0.0, 0.0]], [[1.0, 1.0], [1.0, 1.0]]])
    values = torch.tensor([[[2.0, 4.0], [9.0, 9.0]], [[1.0, 1.0], [1.0, 5.0]]])
    task = MainTask(None, inside)
    assert task.mean(values).item() == (3.0 + 2.0) / 2
    where = torch.tensor([[[True, False], [True, True]], [[False, False], [False, False]]])
    assert task.mean(values, where).item() == (2.0 + 0.0) / 2


def test_main_task_of_a_model(tiny_model, make_video):
    """Padding is left out; nothing hidden, the scores are those of the prediction."""
    (frame,) = make_video(num_frames=1, height=50, width=70)
    with torch.no_grad():
        task = tiny_model.main_task([frame])
        expected = tiny_model([frame])[0]["sem_seg"].argmax(0)
    assert task.inside.shape == (1, 16, 24)  # 64 x 96 px padded, stride 4
    assert task.inside.sum() == 13 * 18
    assert task.inside[0, :13, :18].all()
    # Upsampled scores have their extremes in the same places, nearly everywhere.
    likeliest = task.pixels.classes[0].argmax(0).repeat_interleave(4, 0).repeat_interleave(4, 1)
    assert (likeliest[:50, :70] == expected).float().mean() > 0.9


def test_hidden_patches_follow_the_generator(tiny_model, make_video):
    seen = []
    tiny_model.backbone.register_forward_pre_hook(lambda m, x: seen.append(x[0][:, 3].clone()))
    video = make_video(num_frames=2)
    for seed in (1, 1, 2):
        with torch.no_grad():
            tiny_model.main_task(video, mask_with=torch.Generator().manual_seed(seed))
    assert torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[0], seen[2])
    patches = seen[0].view(2, 4, 16, 6, 16).amax((2, 4))
    assert (patches.sum((1, 2)) == 4).all()  # int(24 * 0.2) visible in each
    assert not torch.equal(patches[0], patches[1])
