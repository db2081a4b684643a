"""Winograd's convolutions against PyTorch's in float64, and where they are used."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ttt_video.modeling import large_layers, winograd
from ttt_video.modeling.kernels import run_convolution, run_linear


def tensors(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)
        for shape in shapes
    ]


class Large(nn.Module):
    """Layers that are large from 51x51 px on."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(100, 128, 3, padding=1)
        self.product = nn.Linear(128, 100)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = run_convolution(self.convolution, x)
        return run_linear(self.product, x.flatten(2).transpose(1, 2))


def test_a_program_for_any_size_depends_on_none() -> None:
    """One that was written with either kind of layers runs with the other kind's sizes."""
    model = Large().eval()
    sides = {2: torch.export.Dim("height", max=512), 3: torch.export.Dim("width", max=512)}
    for traced, other in ((40, 64), (64, 40)):
        x = torch.randn(1, 100, traced, traced)
        program = torch.export.export(model, (x,), dynamic_shapes={"x": sides}, strict=False)
        x = torch.randn(1, 100, other, other)
        torch.testing.assert_close(program.module()(x), model(x), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("shape", [(2, 3, 7, 9), (1, 4, 8, 12), (1, 2, 1, 1), (3, 1, 5, 2)])
def test_maps_and_gradients_are_those_of_a_sum(shape: tuple[int, ...], with_bias: bool) -> None:
    """Sides that are no multiple of a tile's, too."""
    inputs = tensors(shape, (5, shape[1], 3, 3), *([(5,)] if with_bias else []))
    x, weight, bias = (*inputs, None)[:3]
    assert x is not None
    assert weight is not None
    found = winograd.convolve(x, weight, bias)
    expected = F.conv2d(x, weight, bias, padding=1)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)
    (grad,) = tensors(tuple(expected.shape))
    pairs = zip(
        torch.autograd.grad(found, inputs, grad),
        torch.autograd.grad(expected, inputs, grad),
        strict=True,
    )
    for ours, true in pairs:
        torch.testing.assert_close(ours, true, rtol=0, atol=1e-11)


def test_threads_share_channels_and_change_no_bit() -> None:
    x, weight = (tensor.float() for tensor in tensors((2, 5, 7, 9), (3, 5, 3, 3)))
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 4):
            torch.set_num_threads(threads)
            found.append(winograd.convolve(x, weight, None))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)


def test_a_frozen_weight_or_input_gets_no_gradient() -> None:
    x, weight = tensors((1, 2, 5, 6), (3, 2, 3, 3))
    for fixed, moving in ((x, weight), (weight, x)):
        pair = {id(fixed): fixed.detach(), id(moving): moving}
        out = winograd.convolve(pair[id(x)], pair[id(weight)], None)
        expected = F.conv2d(pair[id(x)], pair[id(weight)], padding=1)
        ours = torch.autograd.grad(out.square().sum(), moving)
        true = torch.autograd.grad(expected.square().sum(), moving)
        torch.testing.assert_close(ours, true, rtol=0, atol=1e-10)


def test_float32_is_exact_to_some_millionths() -> None:
    x, weight = tensors((1, 96, 16, 16), (96, 96, 3, 3))
    expected = F.conv2d(x, weight, padding=1)
    found = winograd.convolve(x.float(), weight.float(), None)
    assert found.dtype == torch.float32
    assert (found - expected).norm() < 1e-5 * expected.norm()


def test_only_large_convolutions_of_3x3_are_winograds(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[object] = []
    real = winograd.convolve
    monkeypatch.setattr(winograd, "convolve", lambda *a: calls.append(a) or real(*a))
    monkeypatch.setattr(large_layers, "LEAST_SIDE", 4)
    monkeypatch.setattr(large_layers, "LEAST", 4 * 4 * 100)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 4, 10, 10, generator=generator)

    def used(layer: nn.Conv2d, x: torch.Tensor = x) -> bool:
        calls.clear()
        with torch.no_grad():
            torch.testing.assert_close(run_convolution(layer, x), layer(x), rtol=1e-4, atol=1e-5)
        return bool(calls)

    assert used(nn.Conv2d(4, 4, 3, padding=1))
    assert not used(nn.Conv2d(4, 4, 3, padding=1), x[:, :, 1:])  # too small
    assert not used(nn.Conv2d(4, 4, 3))
    assert not used(nn.Conv2d(4, 4, 3, padding=1, stride=2))
    assert not used(nn.Conv2d(4, 4, 3, padding=1, groups=2))
    assert not used(nn.Conv2d(4, 4, 3, padding=2, dilation=2))
    assert not used(nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"))
    assert not used(nn.Conv2d(4, 4, 1))
    assert not used(nn.Conv2d(4, 2, 3, padding=1))
    monkeypatch.setenv("TTT_VIDEO_KERNELS", "off")
    assert not used(nn.Conv2d(4, 4, 3, padding=1))
