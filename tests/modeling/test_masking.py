"""Patch masks and patches: counts, polarity, structure, randomness, kinds, inverses."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ttt_video.errors import UserError
from ttt_video.modeling.masking import (
    MASK_KINDS,
    PatchMasks,
    num_visible_patches,
    patchify,
    unpatchify,
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(
    ("height", "width", "ratio", "visible"),
    [
        (512, 1024, 0.80, 409),  # 2048 patches: int(2048 * 0.2), int(2048 * 0.15)
        (512, 1024, 0.85, 307),
        (1024, 1024, 0.80, 819),
        (1024, 1024, 0.85, 614),
        (384, 1248, 0.80, 374),  # 24 x 78 = 1872
        (64, 80, 0.80, 4),  # 20 patches, of which a fifth is 3.999... in floating point
        (64, 80, 0.85, 3),
        (64, 96, 0.75, 6),
        (64, 64, 0.0, 16),
        (16, 16, 0.8, 0),
    ],
)
def test_exact_number_of_visible_patches(height, width, ratio, visible):
    mask = PatchMasks(16, ratio).draw(height, width, generator())
    assert mask.sum() == visible * 16 * 16


@given(count=st.integers(0, 20_000), percent=st.integers(0, 99))
def test_number_of_visible_patches_is_the_floor_of_exact_arithmetic(count, percent):
    assert num_visible_patches(count, percent / 100) == math.floor(
        count * (1 - Fraction(percent, 100))
    )


@settings(max_examples=50, deadline=None)
@given(
    height=st.integers(1, 70),
    width=st.integers(1, 70),
    patch=st.sampled_from([4, 8, 16]),
    ratio=st.sampled_from([0.0, 0.5, 0.8, 0.85]),
    seed=st.integers(0, 2**31),
    kind=st.sampled_from(sorted(MASK_KINDS)),
)
def test_whole_patches_are_visible_or_masked(height, width, patch, ratio, seed, kind):
    mask = PatchMasks(patch, ratio, kind).draw(height, width, generator(seed))
    assert mask.shape == (1, height, width)
    assert mask.dtype == torch.float32
    assert mask.is_contiguous()
    visible = 0
    for top in range(0, height, patch):
        for left in range(0, width, patch):
            values = mask[0, top : top + patch, left : left + patch].unique()
            assert values.tolist() in ([0.0], [1.0])
            visible += int(values)
    count = math.ceil(height / patch) * math.ceil(width / patch)
    assert visible == num_visible_patches(count, ratio)


def test_polarity():
    """1 = visible: little is hidden at a small ratio, little is shown at a large one."""
    nearly_all = PatchMasks(16, 0.1).draw(64, 64)
    hardly_any = PatchMasks(16, 0.9).draw(64, 64)
    assert nearly_all.mean() == 14 / 16
    assert hardly_any.mean() == 1 / 16


def test_every_patch_is_equally_likely():
    """2,000 draws of 5 of 25: each count is within five standard deviations of 400."""
    source = generator()
    total = sum(PatchMasks(4, 0.8).draw(20, 20, source)[0, ::4, ::4] for _ in range(2000))
    assert total.sum() == 2000 * 5
    assert (total - 400).abs().max() < 5 * math.sqrt(2000 * 0.2 * 0.8)


def test_pairs_of_patches_are_independent():
    """A draw without replacement shows two given patches of 16 with (4/16)(3/15)."""
    source = generator()
    masks = torch.stack(
        [PatchMasks(4, 0.75).draw(16, 16, source)[0, ::4, ::4] for _ in range(3000)]
    ).flatten(1)
    together = masks.T @ masks / 3000
    expected = (4 / 16) * (3 / 15)
    off_diagonal = together[~torch.eye(16, dtype=torch.bool)]
    assert (off_diagonal - expected).abs().max() < 5 * math.sqrt(expected * (1 - expected) / 3000)


@pytest.mark.parametrize("kind", sorted(MASK_KINDS))
def test_a_generator_alone_decides(kind):
    def draw(seed):
        return PatchMasks(8, 0.8, kind).draw(64, 96, generator(seed))

    torch.manual_seed(1)
    first, state = draw(7), torch.get_rng_state()
    torch.manual_seed(2)
    assert torch.equal(draw(7), first)
    assert not torch.equal(draw(8), first)
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state)  # the global one was not touched


@pytest.mark.parametrize("kind", sorted(MASK_KINDS))
def test_without_a_generator_the_global_one_decides(kind):
    torch.manual_seed(3)
    first = PatchMasks(8, 0.8, kind).draw(64, 64)
    second = PatchMasks(8, 0.8, kind).draw(64, 64)
    torch.manual_seed(3)
    assert torch.equal(PatchMasks(8, 0.8, kind).draw(64, 64), first)
    assert not torch.equal(first, second)


def test_random_is_maes_shuffle():
    """The patches that come first in a permutation are visible."""
    mask = PatchMasks(16, 0.8).draw(64, 96, generator(5))[0, ::16, ::16]
    visible = torch.randperm(24, generator=generator(5))[:4]
    assert sorted(visible.tolist()) == mask.flatten().nonzero().flatten().tolist()


# ---- blocks


def corners(hidden: torch.Tensor) -> int:
    """Convex corners of a region: its cells with no neighbour in it on two sides that meet."""
    padded = torch.nn.functional.pad(hidden.bool(), (1, 1, 1, 1))
    inner = padded[1:-1, 1:-1]
    above, below = ~padded[:-2, 1:-1], ~padded[2:, 1:-1]
    left, right = ~padded[1:-1, :-2], ~padded[1:-1, 2:]
    pairs = [(above, left), (above, right), (below, left), (below, right)]
    return sum(int((inner & a & b).sum()) for a, b in pairs)


@settings(max_examples=50, deadline=None)
@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 80),
    ratio=st.sampled_from([0.0, 0.1, 0.5, 0.8, 0.99]),
    seed=st.integers(0, 2**31),
)
def test_blocks_are_rectangles(rows, columns, ratio, seed):
    """A convex corner of a union of rectangles is a corner of one of them.

    So the union of n has at most 4 n, and n is the number of times that random numbers are drawn.
    """
    with pytest.MonkeyPatch.context() as patch:
        draws, rand = [], torch.rand
        patch.setattr(
            torch, "rand", lambda *size, **more: draws.append(size) or rand(*size, **more)
        )
        hidden = 1 - PatchMasks(4, ratio, "block").draw(4 * rows, 4 * columns, generator(seed))
    hidden = hidden[0, ::4, ::4]
    assert hidden.sum() == rows * columns - num_visible_patches(rows * columns, ratio)
    assert corners(hidden) <= 4 * len(draws)


def test_blocks_are_few_where_random_patches_are_many():
    for seed in range(20):
        block, scattered = (
            1 - PatchMasks(16, 0.5, kind).draw(512, 1024, generator(seed))[0, ::16, ::16]
            for kind in ("block", "random")
        )
        assert block.sum() == scattered.sum() == 1024
        assert corners(block) < 0.25 * corners(scattered)


def test_blocks_prefer_no_direction():
    """600 masks: the share of hidden patches is the same in both halves, either way."""
    source = generator()
    masks = [1 - PatchMasks(4, 0.5, "block").draw(48, 48, source)[0, ::4, ::4] for _ in range(600)]
    mean = torch.stack(masks).mean(0)
    assert mean.min() > 0.1
    top, left = mean[:6].mean(), mean[:, :6].mean()
    # A half's share has a standard deviation of at most 1/2 in one mask.
    assert abs(top - 0.5) < 5 * 0.5 / math.sqrt(600)
    assert abs(left - 0.5) < 5 * 0.5 / math.sqrt(600)
    assert abs(top - left) < 5 * 0.5 / math.sqrt(600)


def test_kinds_have_names_and_can_be_added(monkeypatch):
    with pytest.raises(UserError, match=r"^TTT.MASK_KIND is 'stripes'; choose one of: block, rand"):
        PatchMasks(16, 0.5, "stripes")

    def stripes(rows, columns, num_visible, source):
        return (torch.arange(rows * columns) < num_visible).float().view(rows, columns)

    monkeypatch.setitem(MASK_KINDS, "stripes", stripes)
    mask = PatchMasks(16, 0.5, "stripes").draw(64, 64)
    assert mask[:, :32].all()
    assert not mask[:, 32:].any()


def test_patchify_by_hand():
    """Channel-last inside a patch, rows before columns, as in MAE."""
    image = torch.arange(2 * 4 * 6.0).view(1, 2, 4, 6)
    patches = patchify(image, 2)
    assert patches.shape == (1, 6, 8)
    for row in range(2):
        for column in range(3):
            expected = [
                image[0, c, 2 * row + y, 2 * column + x].item()
                for y in range(2)
                for x in range(2)
                for c in range(2)
            ]
            assert patches[0, 3 * row + column].tolist() == expected


@settings(max_examples=50, deadline=None)
@given(
    batch=st.integers(1, 3),
    channels=st.integers(1, 4),
    rows=st.integers(1, 5),
    columns=st.integers(1, 5),
    patch=st.sampled_from([1, 2, 4, 16]),
)
def test_unpatchify_is_the_inverse(batch, channels, rows, columns, patch):
    images = torch.randn(batch, channels, rows * patch, columns * patch)
    patches = patchify(images, patch)
    assert patches.shape == (batch, rows * columns, patch * patch * channels)
    assert torch.equal(unpatchify(patches, patch, rows * patch, columns * patch), images)


def test_patchify_needs_whole_patches():
    with pytest.raises(ValueError, match="30x32 is not a multiple of the patch size 16"):
        patchify(torch.zeros(1, 3, 30, 32), 16)
