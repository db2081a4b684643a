"""Semantic scores of small masks, and attention masks, in Triton, against PyTorch's."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from ttt_video.modeling.kernels import VARIABLE
from ttt_video.modeling.postprocess import Postprocessing, semantic_inference

pytest.importorskip("triton")
kernel_masks = pytest.importorskip("ttt_video.modeling.kernels.masks")
semantic = pytest.importorskip("ttt_video.modeling.kernels.semantic")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def logits(queries: int, classes: int, height: int, width: int):
    generator = torch.Generator().manual_seed(0)
    class_logits = 2 * torch.randn(queries, classes + 1, generator=generator)
    mask_logits = 5 * torch.randn(queries, height, width, generator=generator)
    return class_logits.to(DEVICE), mask_logits.to(DEVICE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("queries", "classes", "small", "padded", "size"),
    [
        (5, 3, (4, 6), (16, 24), (16, 24)),
        (17, 19, (3, 5), (12, 20), (11, 17)),
        (1, 1, (1, 1), (4, 4), (3, 4)),
        (20, 2, (3, 5), (7, 9), (7, 8)),
    ],
    ids=str,
)
def test_scores_equal_float64s(monkeypatch, dtype, queries, classes, small, padded, size):
    """Queries that fill no block, images smaller than their padding, and any scale."""
    monkeypatch.setattr(semantic, "PIXELS", 16)
    class_logits, mask_logits = logits(queries, classes, *small)
    mask_logits = mask_logits.to(dtype)
    scores = semantic.semantic_scores(class_logits, mask_logits, padded, size)
    masks = F.interpolate(mask_logits[None].double(), size=padded, mode="bilinear")[0]
    expected = semantic_inference(class_logits.double(), masks)[:, : size[0], : size[1]]
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("output", [(11, 17), (15, 30)], ids=["kept", "resized"])
def test_outputs_are_those_without_kernels(monkeypatch, output):
    class_logits, mask_logits = logits(4, 3, 3, 5)
    found = []
    for choice in ("off", "on"):
        monkeypatch.setenv(VARIABLE, choice)
        result = Postprocessing().of_small_masks(
            class_logits, mask_logits, (12, 20), (11, 17), *output
        )
        found.append(result["sem_seg"])
    assert found[0].shape == (3, *output)
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-6)


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
