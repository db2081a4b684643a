"""Random crops against slices of an image that says where each of its pixels comes from."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import chisquare

from ttt_video.adaptation import RandomCrop


def coordinates(height: int, width: int) -> torch.Tensor:
    """(3, H, W) uint8: row, column, noise."""
    rows = torch.arange(height, dtype=torch.uint8)[:, None].expand(height, width)
    columns = torch.arange(width, dtype=torch.uint8)[None].expand(height, width)
    noise = torch.randint(
        256, (height, width), generator=torch.Generator().manual_seed(0), dtype=torch.uint8
    )
    return torch.stack([rows, columns, noise])


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_whole_frame_is_passed_on_without_a_copy():
    image = coordinates(6, 9)
    assert RandomCrop()(image, generator()) is image


def test_crop_is_a_slice_anywhere_in_the_image():
    image = coordinates(7, 9)
    random = generator()
    crop = RandomCrop(size=(4, 6))
    places = []
    for _ in range(3200):
        out = crop(image, random)
        top, left = int(out[0, 0, 0]), int(out[1, 0, 0])
        assert torch.equal(out, image[:, top : top + 4, left : left + 6])
        places.append(top * 4 + left)
    counts = np.bincount(places, minlength=16)
    assert len(counts) == 16  # 4 x 4 places, each as likely
    assert chisquare(counts).pvalue > 1e-4


def test_crop_is_a_view():
    image = coordinates(7, 9)
    storage = image.untyped_storage().data_ptr()
    assert RandomCrop(size=(4, 6))(image, generator()).untyped_storage().data_ptr() == storage


@pytest.mark.parametrize(
    ("size", "expected"),
    [((7, 9), (7, 9)), ((20, 6), (7, 6)), ((4, 20), (4, 9)), ((8, 10), (7, 9))],
)
def test_sides_shorter_than_the_crop_are_kept_whole(size, expected):
    out = RandomCrop(size=size)(coordinates(7, 9), generator())
    assert out.shape == (3, *expected)


def test_flip_mirrors_left_and_right_half_of_the_time():
    image = coordinates(5, 8)
    random = generator()
    flipped = 0
    for _ in range(1000):
        out = RandomCrop(flip=True)(image, random)
        if torch.equal(out, image.flip(2)):
            flipped += 1
        else:
            assert torch.equal(out, image)
    assert 420 < flipped < 580


def test_flip_and_crop_together():
    image = coordinates(7, 9)
    random = generator()
    directions = set()
    for _ in range(50):
        out = RandomCrop(size=(4, 6), flip=True)(image, random)
        top, columns = int(out[0, 0, 0]), out[1, 0].tolist()
        assert columns in (
            [*range(columns[0], columns[0] + 6)],
            [*range(columns[0], columns[0] - 6, -1)],
        )
        assert torch.equal(out, image[:, top : top + 4][:, :, columns])
        directions.add(columns[1] - columns[0])
    assert directions == {1, -1}


@pytest.mark.parametrize(
    ("factor", "resized"),
    [
        (0.5, (16, 20)),  # 32 x 40 into half of 32 x 48: the height decides
        (0.1, (3, 4)),
        (1.0, (32, 40)),
        (2.0, (64, 80)),
    ],
)
def test_scale_jitter_resizes_as_pillow_does_and_pads_with_128(factor, resized):
    image = torch.from_numpy(
        np.asarray(
            Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 10, 3), np.uint8)).resize(
                (40, 32), Image.Resampling.BICUBIC
            )
        ).copy()
    ).permute(2, 0, 1)
    out = RandomCrop(size=(32, 48), scale_range=(factor, factor))(image, generator())
    assert out.shape == (3, 32, 48)
    assert out.dtype == torch.uint8
    height, width = min(resized[0], 32), min(resized[1], 48)
    assert (out[:, height:] == 128).all()
    assert (out[:, :, width:] == 128).all()
    pillow = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()).resize(
        (resized[1], resized[0]), Image.Resampling.BILINEAR
    )
    expected = torch.from_numpy(np.asarray(pillow).copy()).permute(2, 0, 1).int()
    differences = [
        (expected[:, top : top + height, left : left + width] - out[:, :height, :width].int())
        .abs()
        .max()
        for top in range(resized[0] - height + 1)
        for left in range(resized[1] - width + 1)
    ]
    assert min(differences) <= 1


def test_scale_is_drawn_from_the_whole_range():
    image = torch.zeros(3, 32, 32, dtype=torch.uint8)
    random = generator()
    crop = RandomCrop(size=(32, 32), scale_range=(0.25, 0.75))
    heights = [int((crop(image, random)[0, :, 0] == 0).sum()) for _ in range(300)]
    assert min(heights) == 8
    assert max(heights) == 24
    assert set(heights) == set(range(8, 25))


def test_a_tiny_scale_leaves_at_least_one_pixel():
    image = torch.zeros(3, 4, 64, dtype=torch.uint8)
    out = RandomCrop(size=(8, 8), scale_range=(0.01, 0.01))(image, generator())
    assert out.shape == (3, 8, 8)
    assert int((out == 0).sum()) == 3


def test_draws_follow_the_generator_alone():
    image = coordinates(40, 60)
    crop = RandomCrop(size=(16, 16), flip=True, scale_range=(0.5, 2.0))
    before = torch.get_rng_state()
    assert torch.equal(crop(image, generator(1)), crop(image, generator(1)))
    assert not torch.equal(crop(image, generator(1)), crop(image, generator(2)))
    assert torch.equal(torch.get_rng_state(), before)


def test_from_config(tiny_cfg):
    assert RandomCrop.from_config(tiny_cfg) == RandomCrop()
    tiny_cfg.TTT.CROP.SIZE = [16, 32]
    tiny_cfg.TTT.CROP.FLIP = True
    tiny_cfg.TTT.CROP.SCALE_RANGE = [0.1, 2.0]
    tiny_cfg.TTT.CROP.RESIZE = 0.5
    assert RandomCrop.from_config(tiny_cfg) == RandomCrop((16, 32), True, (0.1, 2.0), 0.5)


def test_resizing_comes_before_the_crop():
    image = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 16, 24), np.uint8))
    half = RandomCrop(resize=0.5)(image, generator())
    assert half.shape == (3, 8, 12)
    same = RandomCrop(size=(8, 12), scale_range=(1.0, 1.0))(image, generator())
    assert torch.equal(half, same)
    crop = RandomCrop(size=(4, 4), resize=0.5)(image, generator())
    windows = half.unfold(1, 4, 1).unfold(2, 4, 1).permute(1, 2, 0, 3, 4).flatten(0, 1)
    assert any(torch.equal(crop, window) for window in windows)
