"""Weights that are cast at once give the numbers of those that autocast casts one by one."""

from __future__ import annotations

import pytest
import torch

from ttt_video.modeling.cast_weights import CastWeights
from ttt_video.modeling.interface import parts_of


@pytest.fixture
def pair(tiny_model):
    parts = parts_of(tiny_model)
    names = [name for role in "fh" for name in parts[role]]
    return tiny_model.eval(), CastWeights(tiny_model, names)


@pytest.fixture
def images():
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, (1, 3, 64, 96), generator=generator, dtype=torch.uint8)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_predictions_are_the_same_bit_for_bit_also_after_a_step(pair, images, dtype):
    model, cast = pair
    found = []
    for _ in range(2):
        with torch.autocast("cpu", dtype, enabled=dtype is not None, cache_enabled=False):
            expected, given = model.replayed(images), cast.replayed(images)
        assert all(torch.equal(a, b) for a, b in zip(given, expected, strict=True))
        found.append(given[1].clone())
        for parameter in model.parameters():
            parameter.mul_(1.1)
    assert not torch.equal(*found)  # the weights of today, not those that were cast first


@torch.no_grad()
def test_matrices_and_their_biases_are_cast_and_nothing_else_is(pair, images):
    model, cast = pair
    with torch.autocast("cpu", torch.bfloat16):
        cast.replayed(images)
    (weights,) = cast._cast.values()
    names = {name.removeprefix("model.") for name in weights}
    assert {"backbone.layers.0.blocks.0.attn.qkv.weight"} <= names
    assert {"sem_seg_head.predictor.class_embed.bias"} <= names
    assert not [name for name in names if "norm" in name or "table" in name or "query" in name]
    assert not [name for name in names if name.startswith("recon_head.")]
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


def test_a_first_call_in_inference_mode_is_not_the_last_one(pair, images):
    _, cast = pair
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        with torch.inference_mode():
            expected = cast.replayed(images)
        with torch.no_grad():
            given = cast.replayed(images)
    assert all(torch.equal(a, b) for a, b in zip(given, expected, strict=True))
