"""Mask features before their projection say the same as after it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ttt_video.modeling import deformable_attention, pixel_decoder
from ttt_video.modeling.mask_features import Unprojected, mask_logits
from ttt_video.modeling.transformer_decoder import shrunk_features


@pytest.mark.parametrize("bias", [True, False])
def test_queries_go_through_the_projection_instead(bias: bool) -> None:
    torch.manual_seed(0)
    projection = nn.Conv2d(5, 7, 1, bias=bias).double()
    maps = torch.randn(2, 5, 8, 12, dtype=torch.float64, requires_grad=True)
    queries = torch.randn(2, 3, 7, dtype=torch.float64, requires_grad=True)
    lazy = Unprojected(maps, projection)
    inputs = [queries, maps, *projection.parameters()]
    for found, expected in (
        (lazy, projection(maps)),
        (shrunk_features(lazy, (4, 6)), shrunk_features(projection(maps), (4, 6))),
    ):
        ours, true = mask_logits(queries, found), mask_logits(queries, expected)
        torch.testing.assert_close(ours, true)
    ours, true = mask_logits(queries, lazy), mask_logits(queries, projection(maps))
    pairs = (torch.autograd.grad(out.square().sum(), inputs) for out in (ours, true))
    for found, expected in zip(*pairs, strict=True):
        torch.testing.assert_close(found, expected)


def test_a_model_with_large_layers_predicts_the_same(tiny_model, make_video, monkeypatch):
    """The ways of large layers on a CPU, taken by a small model; a hook keeps the projection."""
    (frame,) = make_video(num_frames=1, height=64, width=96)
    image = frame["image"][None]
    calls: list[object] = []
    with torch.no_grad():
        expected = tiny_model.prediction_tensors(image)
        for module in (pixel_decoder, deformable_attention):
            monkeypatch.setattr(module, "is_large_on_cpu", lambda *layer: True)
        found = tiny_model.prediction_tensors(image)
        tiny_model.sem_seg_head.pixel_decoder.mask_features.register_forward_hook(
            lambda *call: calls.append(call)
        )
        hooked = tiny_model.prediction_tensors(image)
    assert len(calls) == 1
    for result in (found, hooked):
        torch.testing.assert_close(result["scores"], expected["scores"], rtol=0, atol=1e-5)
