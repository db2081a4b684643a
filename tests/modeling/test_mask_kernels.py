"""Masks in Triton, against PyTorch's."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from ttt_video.modeling.kernels import VARIABLE
from ttt_video.modeling.postprocess import enlarged_semantic_inference

pytest.importorskip("triton")
kernel_masks = pytest.importorskip("ttt_video.modeling.kernels.masks")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def logits(queries: int, classes: int, height: int, width: int):
    generator = torch.Generator().manual_seed(0)
    class_logits = 2 * torch.randn(queries, classes + 1, generator=generator)
    mask_logits = 5 * torch.randn(queries, height, width, generator=generator)
    return class_logits.to(DEVICE), mask_logits.to(DEVICE)


@pytest.mark.parametrize("columns", [1, 16, 37])
def test_bias_masks_what_is_outside(monkeypatch, columns):
    """Rows of several blocks, of no mask at all, of zeros and of a mask in the last place alone."""
    monkeypatch.setattr(kernel_masks, "BLOCK", 16)
    _, rows = logits(6, 1, 1, columns)
    rows = rows.view(2, 3, columns)
    rows[0, 0] = -1.0
    rows[0, 1] = 0.0
    rows[0, 2, :] = -1.0
    rows[0, 2, -1] = 1.0
    inside = rows >= 0
    allowed = inside | ~inside.any(-1, keepdim=True)
    bias = kernel_masks.attention_bias(rows, torch.bfloat16)
    assert (bias.dtype, bias.shape) == (torch.bfloat16, rows.shape)
    assert [stride % 16 for stride in bias.stride()] == [0, 0, 1]
    assert torch.equal(bias == 0, allowed)
    assert torch.equal(bias == -torch.inf, ~allowed)


@pytest.mark.parametrize("size", [(20, 36), (9, 21), (5, 9), (3, 4)], ids=str)
def test_probabilities_are_those_of_enlarged_logits(size):
    """Sizes that are multiples of the masks', that are none, the same, and smaller ones."""
    _, masks = logits(3, 1, 5, 9)
    found = kernel_masks.mask_probabilities(masks, size, torch.float32, rows=4, columns=16)
    larger = F.interpolate(masks[None].double(), size=size, mode="bilinear", align_corners=False)[0]
    torch.testing.assert_close(found.double(), larger.sigmoid(), rtol=0, atol=2e-6)


def test_probabilities_in_half_precision_are_rounded_once():
    _, masks = logits(2, 1, 4, 8)
    masks = masks.bfloat16()
    full = kernel_masks.mask_probabilities(masks, (16, 32), torch.float32)
    half = kernel_masks.mask_probabilities(masks, (16, 32), torch.bfloat16)
    torch.testing.assert_close(half, full.bfloat16(), rtol=8e-3, atol=0)


@pytest.mark.parametrize("classes", [8, 19])
def test_scores_are_those_of_the_reference(monkeypatch, classes):
    """The classes of a product are filled up, and taken away again."""
    class_logits, masks = logits(7, classes, 4, 8)
    expected = enlarged_semantic_inference(class_logits, masks, (16, 32))
    monkeypatch.setenv(VARIABLE, "on")
    with torch.no_grad():
        found = enlarged_semantic_inference(class_logits, masks, (16, 32))
    assert found.shape == (classes, 16, 32)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
