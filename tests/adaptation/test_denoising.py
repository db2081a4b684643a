"""Non-local means against their definition in float64, and the noise against what was put in."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch

from ttt_video.adaptation import denoising
from ttt_video.adaptation.denoising import averaged, denoised, neighbours, noise_levels
from ttt_video.adaptation.denoising_cpu import averaged_on_cpu


def scene(height: int = 48, width: int = 64) -> np.ndarray:
    """(3, H, W) squares of one colour each, of which every second row is dark."""
    draw = np.random.default_rng(0)
    rows, columns = -(-height // 16), -(-width // 16)
    tiles = draw.integers(120, 200, (3, rows, columns))
    tiles[:, 1::2] = draw.integers(30, 60, tiles[:, 1::2].shape)
    return np.kron(tiles, np.ones((1, 16, 16), int))[:, :height, :width]


def noisy(clean: np.ndarray, deviation: np.ndarray | float, seed: int = 1) -> torch.Tensor:
    draw = np.random.default_rng(seed).normal(0, 1, clean.shape)
    return torch.from_numpy(np.clip(clean + deviation * draw, 0, 255).round().astype(np.uint8))


def planes(image: torch.Tensor) -> torch.Tensor:
    """Brightness, and red less blue where there are colours."""
    pixels = image.float()
    return torch.stack([pixels.sum(0), pixels[0] - pixels[-1]][: min(2, len(pixels))])


def by_definition(image: torch.Tensor, noise: np.ndarray) -> np.ndarray:
    """Non-local means pixel by pixel, with the deviations of the noise at each brightness."""
    pixels = image.numpy().astype(float)
    brightness = pixels.sum(0).astype(int)
    even = [np.cumsum(1 / noise[0])[brightness]]
    if len(pixels) > 1:
        even.append((pixels[0] - pixels[2]) / noise[1][brightness])
    even = np.pad(np.stack(even), [(0, 0), (1, 1), (1, 1)], mode="reflect")
    _, height, width = pixels.shape
    out = np.empty_like(pixels)
    for y in range(height):
        for x in range(width):
            total, weights = pixels[:, y, x].copy(), 1.0
            for v in range(max(0, y - 12), min(height, y + 13)):
                for u in range(max(0, x - 12), min(width, x + 13)):
                    far = (v - y) ** 2 + (u - x) ** 2
                    on_lattice = (v - y) % 3 == 0 and (u - x) % 3 == 0
                    if not 0 < far <= 144 or not (far <= 2 or on_lattice):
                        continue
                    difference = even[:, y : y + 3, x : x + 3] - even[:, v : v + 3, u : u + 3]
                    weight = np.clip(2 - (difference**2).mean() / 2, 0, 1) ** 2
                    total += weight * pixels[:, v, u]
                    weights += weight
            out[:, y, x] = total / weights
    return out


@pytest.mark.parametrize("shape", [(3, 24, 31), (1, 24, 31), (3, 5, 40), (3, 3, 3)])
@pytest.mark.parametrize("strength", [1.0, 1.7])
def test_is_what_the_definition_gives(shape, strength):
    channels, height, width = shape
    image = noisy(scene(height, width), 15.0)[:channels]
    before = image.clone()
    noise = noise_levels(planes(image), channels).double().numpy() * strength
    out = denoised(image, strength)
    assert out.dtype == torch.uint8
    assert torch.equal(image, before)
    np.testing.assert_allclose(out.numpy(), by_definition(image, noise), atol=0.51)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("shape", [(40, 33), (2, 50), (30, 8)])
@pytest.mark.parametrize("at_once", [1, 5, 28])
def test_rows_on_a_cpu_are_those_of_whole_pictures(threads, shape, at_once, monkeypatch):
    monkeypatch.setattr(denoising, "GROUP", at_once * shape[0] * shape[1])
    draw = torch.Generator().manual_seed(0)
    height, width = shape
    even = torch.randn(2, height + 2, width + 2, generator=draw)
    pixels = 255 * torch.rand(3, height, width, generator=draw)
    expected = averaged(even.double(), pixels.double(), neighbours())
    found = []
    for number in (1, 3):
        threads(number)
        found.append(averaged_on_cpu(even, pixels, neighbours()))
    assert torch.equal(*found)
    torch.testing.assert_close(found[0].double(), expected, rtol=1e-5, atol=1e-4)


def test_pictures_whose_channels_come_last_in_memory_are_the_same_pictures():
    image = noisy(scene(), 15.0)
    other = image.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    assert not other.is_contiguous()
    assert torch.equal(denoised(other), denoised(image))


def test_grey_pictures_of_three_channels_are_those_of_one():
    grey = noisy(scene(), 15.0)[:1]
    three = denoised(grey.expand(3, -1, -1))
    assert (three[0].int() - denoised(grey)[0].int()).abs().max() <= 1
    assert torch.equal(three[0], three[2])


def test_between_the_middles_of_two_bins_the_noise_is_between_theirs():
    """Bins have 48 values of brightness, 15 * 48 and more in the last one."""
    dark, light = np.full((3, 64, 64), 104), np.full((3, 64, 64), 120)
    clean = np.concatenate([dark, light], 2)
    image = noisy(clean, np.where(clean == 104, 3.0, 30.0))
    levels = noise_levels(planes(image), 3)[0]
    # 104 * 3 is the middle of one, 120 * 3 that of the next.
    quarter = levels[312] + 0.25 * (levels[360] - levels[312])
    torch.testing.assert_close(levels[324], quarter)
    assert torch.equal(levels[744], levels[767])


def test_rounding_is_the_least_noise():
    flat = torch.full((3, 20, 20), 90, dtype=torch.uint8)
    # Neither plane has noise, which counts as that of one of two.
    least = (3 / 12 / 2) ** 0.5
    torch.testing.assert_close(noise_levels(planes(flat), 3), torch.full((2, 768), least))
    torch.testing.assert_close(noise_levels(planes(flat[:1]), 1), torch.full((1, 256), 12**-0.5))


def test_the_noise_is_that_of_the_picture_by_its_brightness():
    clean = scene(256, 512)
    dark = clean.sum(0) < 3 * 80
    image = noisy(clean, np.where(dark, 4.0, 20.0))
    levels = noise_levels(planes(image), 3)[:, clean.sum(0)].numpy()
    # Independent noises of three channels add up to sqrt(3) of one, of two to sqrt(2).
    for plane, independent in zip(levels, (3, 2), strict=True):
        for where, deviation in ((dark, 4), (~dark, 20)):
            found = np.median(plane[where]) / independent**0.5
            assert found == pytest.approx(deviation, rel=0.15)


def error(image: torch.Tensor, clean: np.ndarray) -> float:
    return float(((image.numpy() - clean.astype(float)) ** 2).mean())


@pytest.mark.parametrize("proportional", [False, True])
def test_noise_goes_and_edges_stay(proportional):
    """It leaves half of what the best Gaussian does, whether noise grows with brightness or not."""
    clean = scene(128, 256)
    image = noisy(clean, clean * 0.12 if proportional else 15.0)
    rows = image.permute(1, 2, 0).numpy()
    blurred = [cv2.GaussianBlur(rows, (0, 0), s) for s in (0.5, 0.8, 1.1, 1.5)]
    best = min(error(torch.from_numpy(x).permute(2, 0, 1), clean) for x in blurred)
    assert error(denoised(image), clean) < 0.5 * best < 0.5 * error(image, clean)


def test_a_picture_without_noise_stays_what_it_is():
    clean = torch.from_numpy(scene().astype(np.uint8))
    assert torch.equal(denoised(clean), clean)


def test_turning_a_picture_turns_what_is_left_of_it():
    image = noisy(scene(), 15.0)
    turned = denoised(image.flip(1, 2)).flip(1, 2)
    assert (turned.int() - denoised(image).int()).abs().max() <= 1


@pytest.mark.parametrize("shape", [(3, 2, 40), (3, 40, 1), (1, 9, 9)])
def test_small_pictures_and_grey_ones_stay_pictures(shape):
    image = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator())
    out = denoised(image)
    assert (out.shape, out.dtype) == (image.shape, torch.uint8)
    assert (out is image) == (min(shape[1:]) < 3)
    flat = torch.full(shape, 7, dtype=torch.uint8)
    assert torch.equal(denoised(flat), flat)
