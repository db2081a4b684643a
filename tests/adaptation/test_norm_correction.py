"""Corrections within a prediction, against passes of their own."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from ttt_video.adaptation import SlidingWindow
from ttt_video.adaptation.ln_adapt import NormAdapter
from ttt_video.adaptation.norm_correction import NormCorrection
from ttt_video.adaptation.norm_statistics import Statistics, fit_statistics, norm_layers


def correction(model: nn.Module, source: dict[str, Tensor]) -> NormCorrection:
    layers = norm_layers(model, ("f",))
    return NormCorrection(layers, fit_statistics(layers, source))


def corrected(model: nn.Module, norms: NormCorrection, frame: dict, share: float) -> Tensor:
    with torch.no_grad(), norms.correcting(share):
        return model([frame])[0]["sem_seg"]


def test_corrects_as_ln_adapt_does_with_a_pass_of_its_own(tiny_model, make_video, source):
    """A prior of three frames leaves a quarter to a single frame."""
    (frame,) = make_video(num_frames=1)
    adapter = NormAdapter(copy.deepcopy(tiny_model), source=source, prior=3.0)
    adapter.adapt(window_with(SlidingWindow(1), frame), torch.Generator())
    expected = adapter.predict(frame)["sem_seg"]
    ours = corrected(tiny_model, correction(tiny_model, source), frame, 0.25)
    with torch.no_grad():
        frozen = tiny_model([frame])[0]["sem_seg"]
    torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-4)
    assert (ours - frozen).abs().max() > 100 * (ours - expected).abs().max()


def window_with(window: SlidingWindow, frame: dict) -> SlidingWindow:
    window.push(frame)
    return window


@pytest.mark.parametrize("kind", ["layer", "group", "batch"])
def test_each_kind_of_layer_by_hand(kind):
    """Without a prior the channels get the source's mean and deviation."""
    layer: nn.Module = {"layer": nn.LayerNorm, "batch": nn.BatchNorm2d}.get(
        kind, lambda channels: nn.GroupNorm(1, channels)
    )(3)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([1.0, 2.0, -0.5]))
        layer.bias.copy_(torch.tensor([0.3, 0.0, -1.0]))
    x = torch.randn(2, 3, 5, 7, generator=torch.Generator().manual_seed(0)) + 2
    x = x.movedim(1, -1) if kind == "layer" else x
    mean, variance = torch.tensor([0.1, -0.2, 0.3]), torch.tensor([1.0, 4.0, 0.25])
    norms = NormCorrection({"0": layer}, {"0": Statistics(mean, variance)})
    model = nn.Sequential(layer).eval()
    with torch.no_grad(), norms.correcting(1.0):
        out = model(x)
    out = out.movedim(-1, 1) if kind == "layer" else out
    got = out.mean((0, 2, 3)), out.std((0, 2, 3), correction=0)
    weight, bias = layer.weight.detach(), layer.bias.detach()
    # Batch normalisation standardises with the stream's statistics; others give the source's back.
    expected = (bias, weight.abs())
    if kind != "batch":
        expected = (bias + weight * mean, weight.abs() * variance.sqrt())
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)


def test_a_share_of_nothing_changes_no_bit_and_more_change_more(tiny_model, make_video, source):
    (frame,) = make_video(num_frames=1)
    with torch.no_grad():
        frozen = tiny_model([frame])[0]["sem_seg"]
    norms = correction(tiny_model, source)
    assert torch.equal(corrected(tiny_model, norms, frame, 0.0), frozen)
    shares = (0.1, 0.5, 1.0)
    distances = [(corrected(tiny_model, norms, frame, s) - frozen).abs().mean() for s in shares]
    assert 0 < distances[0] < distances[1] < distances[2]
    assert not any(layer._forward_hooks for layer in norms.layers.values())


def test_a_channel_without_a_scale_stays():
    layer = nn.LayerNorm(3)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([1.0, 0.0, 2.0]))
        layer.bias.copy_(torch.tensor([0.0, 0.7, 0.0]))
        x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
        norms = NormCorrection({"0": layer}, {"0": Statistics(torch.ones(3), torch.ones(3))})
        plain = layer(x)
        with norms.correcting(1.0):
            out = layer(x)
    torch.testing.assert_close(out[:, 1], torch.full((4,), 0.7))
    assert not torch.allclose(out[:, 0], plain[:, 0])
