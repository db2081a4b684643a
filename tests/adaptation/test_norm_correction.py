"""Signals and corrections within a prediction, against passes of their own."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from ttt_video.adaptation import SlidingWindow
from ttt_video.adaptation.head_signal import HeadSignal
from ttt_video.adaptation.ln_adapt import NormAdapter
from ttt_video.adaptation.norm_correction import NormCorrection
from ttt_video.adaptation.norm_statistics import (
    Statistics,
    fit_statistics,
    measuring,
    norm_layers,
)


def correction(model: nn.Module, source: dict[str, Tensor], **settings: float) -> NormCorrection:
    layers = norm_layers(model, ("f",))
    return NormCorrection(layers, fit_statistics(layers, source), **settings)


@torch.no_grad()
def predictions(model: nn.Module, norms: NormCorrection, video: list, size: int | None) -> list:
    outputs = []
    for frame in video:
        with norms.correcting(size) as measured:
            outputs.append(model([frame])[0]["sem_seg"])
        norms.take(measured, size)
    return outputs


@pytest.mark.parametrize("size", [2, None])
def test_corrects_as_ln_adapt_does_with_a_pass_of_its_own(tiny_model, make_video, source, size):
    video = make_video(num_frames=4)
    adapter = NormAdapter(copy.deepcopy(tiny_model), source=source, prior=3.0)
    window = SlidingWindow(size)
    expected = []
    for frame in video:
        adapter.adapt(window_with(window, frame), torch.Generator())
        expected.append(adapter.predict(frame)["sem_seg"])
    norms = correction(tiny_model, source, prior=3.0, limit=1.0)
    ours = predictions(tiny_model, norms, video, size)
    with torch.no_grad():
        frozen = tiny_model([video[-1]])[0]["sem_seg"]
    for one, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
    assert (ours[-1] - frozen).abs().max() > 100 * (ours[-1] - expected[-1]).abs().max()


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
    norms = NormCorrection({"0": layer}, {"0": Statistics(mean, variance)}, prior=0.0, limit=1.0)
    model = nn.Sequential(layer).eval()
    with norms.correcting(1):
        out = model(x)
    out = out.movedim(-1, 1) if kind == "layer" else out
    got = out.mean((0, 2, 3)), out.std((0, 2, 3), correction=0)
    weight, bias = layer.weight.detach(), layer.bias.detach()
    # Batch normalisation standardises with the stream's statistics; others give the source's back.
    expected = (bias, weight.abs())
    if kind != "batch":
        expected = (bias + weight * mean, weight.abs() * variance.sqrt())
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)


def test_the_share_of_the_stream_is_limited(tiny_model, make_video, source):
    video = make_video(num_frames=3)
    with torch.no_grad():
        frozen = tiny_model([video[-1]])[0]["sem_seg"]
    off = predictions(tiny_model, correction(tiny_model, source, prior=1.0, limit=0.0), video, None)
    assert torch.equal(off[-1], frozen)
    distances = []
    for limit in (0.1, 0.5, 1.0):
        norms = correction(tiny_model, source, prior=1.0, limit=limit)
        distances.append((predictions(tiny_model, norms, video, None)[-1] - frozen).abs().mean())
    assert 0 < distances[0] < distances[1] < distances[2]


def test_a_prediction_takes_nothing(tiny_model, make_video, source):
    norms = correction(tiny_model, source, prior=1.0, limit=0.5)
    (frame,) = make_video(num_frames=1)
    outputs = []
    for _ in range(2):
        with torch.no_grad(), norms.correcting(4):
            outputs.append(tiny_model([frame])[0]["sem_seg"])
    assert torch.equal(*outputs)
    assert not any(norms.state_dict().values())


def test_the_signal_is_that_of_a_pass_of_its_own_and_changes_no_bit(tiny_model, make_video, source):
    layers = norm_layers(tiny_model, ("h",))
    statistics = fit_statistics(layers, source)
    signal = HeadSignal(layers, statistics)
    (frame,) = make_video("other", num_frames=1)
    with torch.no_grad():
        plain = tiny_model([frame])[0]["sem_seg"]
        with signal.reading() as reading:
            read = tiny_model([frame])[0]["sem_seg"]
        with measuring(layers) as seen:
            tiny_model([frame])
    assert torch.equal(plain, read)
    pooled = {name: Statistics.pooled(parts) for name, parts in seen.items() if parts}
    shifts = torch.cat([one.shift_from(statistics[name]) for name, one in pooled.items()])
    vector = reading.vector()
    torch.testing.assert_close(vector.abs(), shifts, rtol=1e-2, atol=1e-3)
    assert vector.abs().mean() > 0.01
    assert not any(layer._forward_hooks for layer in layers.values())


def test_no_layer_no_signal(tiny_model, source):
    layers = norm_layers(tiny_model, ("h",))
    with HeadSignal(layers, fit_statistics(layers, source)).reading() as reading:
        pass
    assert reading.vector() is None


def test_channels_without_a_scale_say_nothing():
    layer = nn.LayerNorm(3)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([1.0, 0.0, 2.0]))
    signal = HeadSignal({"0": layer}, {"0": Statistics(torch.zeros(3), torch.ones(3))})
    with torch.no_grad(), signal.reading() as reading:
        layer(torch.tensor([[1.0, 2.0, 6.0]]))
    vector = reading.vector()
    assert vector[1] == 0
    assert vector.isfinite().all()
    # (1 - 3) and (6 - 3) over the deviation of 1, 2 and 6.
    expected = torch.tensor([-2.0, 3.0]) / (14 / 3) ** 0.5
    torch.testing.assert_close(vector[[0, 2]], expected, rtol=1e-3, atol=1e-3)
