"""Corrected pictures against numpy and OpenCV."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch

from ttt_video.adaptation.image_correction import ImageCorrection, effect, effect_moved

MEAN, DEVIATION = torch.tensor([110.0, 100.0, 90.0]), torch.tensor([40.0, 50.0, 60.0])


@pytest.fixture
def picture() -> torch.Tensor:
    draw = np.random.default_rng(0)
    return torch.from_numpy(draw.integers(20, 120, (3, 24, 40), dtype=np.uint8))


def test_nothing_to_correct_is_the_same_picture(picture):
    assert ImageCorrection(MEAN, DEVIATION)(picture) is picture


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_colours_come_nearer_to_those_of_training_images(picture, share):
    before = picture.clone()
    out = ImageCorrection(MEAN, DEVIATION)(picture, colours=share)
    assert torch.equal(before, picture)
    assert out.dtype == torch.uint8
    pixels = picture.numpy().astype(float)
    mean, deviation = pixels.mean((1, 2)), pixels.std((1, 2))
    wanted = mean + share * (MEAN.numpy() - mean)
    spread = deviation * (DEVIATION.numpy() / deviation) ** share
    expected = (pixels - mean[:, None, None]) / deviation[:, None, None] * spread[:, None, None]
    expected = np.clip(expected + wanted[:, None, None], 0, 255)
    np.testing.assert_allclose(out.numpy(), expected, atol=0.51)


@pytest.mark.parametrize("blur", [0.8, 1.5])
def test_blurs_as_opencv_does(picture, blur):
    out = ImageCorrection(MEAN, DEVIATION)(picture, blur=blur)
    size = 2 * int(np.ceil(3 * blur)) + 1
    image = picture.permute(1, 2, 0).numpy()
    expected = cv2.GaussianBlur(image, (size, size), blur, borderType=cv2.BORDER_REFLECT_101)
    np.testing.assert_allclose(out.permute(1, 2, 0).numpy().astype(int), expected, atol=1)


def test_a_picture_of_one_colour_and_a_tiny_one_stay_finite():
    flat = torch.full((3, 2, 3), 7, dtype=torch.uint8)
    out = ImageCorrection(MEAN, DEVIATION)(flat, colours=1.0, blur=1.5, denoise=1.0)
    assert torch.equal(out, MEAN.round().to(torch.uint8).view(3, 1, 1).expand(3, 2, 3))


def test_noise_goes_before_colours_are_corrected(picture):
    correct = ImageCorrection(MEAN, DEVIATION)
    without = correct(picture, denoise=2.0)
    assert not torch.equal(without, picture)
    out = correct(picture, colours=0.5, denoise=2.0)
    assert torch.equal(out, correct(without, colours=0.5))


def test_an_effect_is_the_mean_and_the_deviation_of_the_change(picture):
    corrected = ImageCorrection(MEAN, DEVIATION)(picture, colours=1.0, blur=0.8)
    change = corrected.numpy().astype(float) - picture.numpy()
    expected = [change.mean((1, 2)), change.std((1, 2))]
    np.testing.assert_allclose(effect(picture, corrected), expected, rtol=1e-4, atol=1e-3)
    assert not effect(picture, picture).any()


def test_how_far_an_effect_moved_is_a_share_of_the_larger_one():
    noise = torch.tensor([[0.0, 0.0, 0.0], [30.0, 30.0, 30.0]])
    assert effect_moved(noise, noise) == 0
    assert effect_moved(noise, noise / 3) == effect_moved(noise / 3, noise) == pytest.approx(2 / 3)
    assert effect_moved(noise, -noise) == pytest.approx(2)
    # Half a value here or there is no effect at all.
    assert effect_moved(noise * 0, noise / 100) == pytest.approx(0.3 * 3**0.5 / 2)


def test_a_blur_does_less_when_the_noise_has_gone():
    draw = np.random.default_rng(0)
    scene = np.repeat(np.repeat(draw.integers(60, 180, (3, 8, 16)), 8, axis=1), 8, axis=2)
    noisy = np.clip(scene + draw.normal(0, 25, scene.shape), 0, 255)
    correct = ImageCorrection(MEAN, DEVIATION)
    pictures = [
        torch.from_numpy(x.astype(np.uint8)) for x in (noisy, noisy[..., ::-1].copy(), scene)
    ]
    first, mirrored, clean = (effect(x, correct(x, blur=1.5)) for x in pictures)
    assert effect_moved(first, mirrored) < 0.01
    assert effect_moved(first, clean) > 0.2
