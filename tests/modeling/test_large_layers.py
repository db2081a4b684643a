"""Large products, oneDNN's and MKL's, against float64, and where they are used."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ttt_video.modeling import large_layers
from ttt_video.modeling.kernels import run_linear, run_mlp


@pytest.fixture(autouse=True, params=[True, False], ids=["onednn", "mkl"])
def _small_products_too(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param and not large_layers._has_onednn():
        pytest.skip("PyTorch has no oneDNN")
    monkeypatch.setattr(large_layers, "_runs_onednn", lambda: request.param)
    monkeypatch.setattr(large_layers, "LEAST", 1)
    monkeypatch.setattr(large_layers, "LEAST_SIDE", 1)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The inputs of all large products."""
    seen: list[Tensor] = []
    product = large_layers._product

    def spy(x: Tensor, *others: Any) -> Tensor:
        seen.append(x)
        return product(x, *others)

    monkeypatch.setattr(large_layers, "_product", spy)
    return seen


def tensors(*shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, requires_grad=True) for shape in shapes]


def test_a_bias_with_gaps_is_read_as_it_is() -> None:
    x, weight, bias = tensors((5, 7), (6, 7), (12,))
    torch.testing.assert_close(
        large_layers.linear(x, weight, bias[::2]),
        F.linear(x, weight, bias[::2]),
        rtol=1e-5,
        atol=1e-5,
    )
    one = torch.ones(1).expand(6)
    torch.testing.assert_close(
        large_layers.linear(x, weight, one), F.linear(x, weight, one), rtol=1e-5, atol=1e-5
    )
    assert not large_layers.is_large(x[0], weight)  # whose backward pass wants rows


@pytest.mark.parametrize("shape", [(5, 7), (2, 9, 7), (1, 33, 7), (2, 3, 4, 7)])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("transposed", [True, False])
def test_product_and_gradients_are_those_of_float64(
    shape: tuple[int, ...], with_bias: bool, transposed: bool
) -> None:
    x, weight, bias = tensors(shape, (6, 7), (6,))
    (grad,) = tensors((*shape[:-1], 6))
    given, grad = x, grad.detach()
    if transposed:  # as tokens of a feature map are
        given = x.transpose(-1, -2).contiguous().transpose(-1, -2)
        grad = grad.transpose(-1, -2).contiguous().transpose(-1, -2)
    inputs = (x, weight, bias) if with_bias else (x, weight)
    out = large_layers.linear(given, weight, bias if with_bias else None)
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    expected = F.linear(*exact)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    grads = torch.autograd.grad(out, inputs, grad)
    for found, true in zip(grads, torch.autograd.grad(expected, exact, grad.double()), strict=True):
        torch.testing.assert_close(found.double(), true, rtol=1e-5, atol=1e-5)


def test_only_the_gradients_that_are_asked_for_are_computed(calls: list[Tensor]) -> None:
    x, weight, bias = tensors((4, 8), (3, 8), (3,))
    out = large_layers.linear(x.detach(), weight.detach(), bias)
    out.sum().backward()
    assert len(calls) == 1  # no gradient of the input
    assert bias.grad is not None
    torch.testing.assert_close(bias.grad, torch.full((3,), 4.0))


def test_layers_use_it_except_where_something_else_is_asked_for(
    calls: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, (x,) = nn.Linear(8, 4), tensors((5, 8))

    def used() -> bool:
        calls.clear()
        run_linear(layer, x)
        return bool(calls)

    assert used()
    monkeypatch.setenv("TTT_VIDEO_KERNELS", "off")
    assert not used()
    monkeypatch.delenv("TTT_VIDEO_KERNELS")
    with torch.autocast("cpu", torch.bfloat16):
        assert not used()
    monkeypatch.setattr(large_layers, "LEAST_SIDE", 5)
    assert not used()
    monkeypatch.setattr(large_layers, "LEAST_SIDE", 4)
    monkeypatch.setattr(large_layers, "LEAST", 8 * 4 * 5 + 1)
    assert not used()
    monkeypatch.setattr(large_layers, "LEAST", 8 * 4 * 5)
    assert used()
    x = x.double()
    layer.double()
    assert not used()


@pytest.mark.parametrize("shape", [(5, 8), (2, 9, 8)])
@pytest.mark.parametrize("relu", [True, False])
def test_an_mlp_and_its_gradients_are_those_of_float64(relu: bool, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    first, second, (x,) = nn.Linear(8, 16), nn.Linear(16, 4), tensors(shape)
    inputs = [x, *first.parameters(), *second.parameters()]
    out = run_mlp(first, second, x, relu=relu)
    with torch.no_grad():
        torch.testing.assert_close(run_mlp(first, second, x, relu=relu), out, rtol=0, atol=0)
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    hidden = F.linear(*exact[:3])
    expected = F.linear(F.relu(hidden) if relu else F.gelu(hidden), *exact[3:])
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    given = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    grads = torch.autograd.grad(out, inputs, given)
    for found, true in zip(
        grads, torch.autograd.grad(expected, exact, given.double()), strict=True
    ):
        torch.testing.assert_close(found.double(), true, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("moving", "products"),
    [
        ("second.weight second.bias", 2),
        ("first.weight", 3),
        ("x", 4),
        ("x first.bias second.weight", 4),
    ],
)
def test_an_mlp_computes_only_the_gradients_that_are_asked_for(
    moving: str, products: int, calls: list[Tensor]
) -> None:
    """Forward has two products; a third one gives the hidden layer's gradient, a fourth x's."""
    torch.manual_seed(0)
    layers = nn.ModuleDict({"first": nn.Linear(8, 16), "second": nn.Linear(16, 4)})
    (x,) = tensors((5, 8))
    named = {"x": x, **dict(layers.named_parameters())}
    for name, tensor in named.items():
        tensor.requires_grad_(name in moving.split())
    inputs = [named[name] for name in moving.split()]
    first, second = layers["first"], layers["second"]
    grads = torch.autograd.grad(run_mlp(first, second, x, relu=False).square().sum(), inputs)
    assert len(calls) == products
    plain = second(F.gelu(first(x)))
    for found, true in zip(grads, torch.autograd.grad(plain.square().sum(), inputs), strict=True):
        torch.testing.assert_close(found, true, rtol=1e-5, atol=1e-5)


def test_an_mlp_can_be_differentiated_twice_over_the_same_graph() -> None:
    """Backward writes over a tensor of its own, not over one that a second pass reads."""
    torch.manual_seed(0)
    first, second, (x,) = nn.Linear(8, 16), nn.Linear(16, 4), tensors((5, 8))
    loss = run_mlp(first, second, x, relu=False).square().sum()
    (once,) = torch.autograd.grad(loss, x, retain_graph=True)
    (again,) = torch.autograd.grad(loss, x)
    assert torch.equal(once, again)


def test_a_hook_sees_the_hidden_layer_before_the_activation() -> None:
    torch.manual_seed(0)
    first, second, (x,) = nn.Linear(8, 16), nn.Linear(16, 4), tensors((5, 8))
    seen: list[Tensor] = []
    first.register_forward_hook(lambda module, args, out: seen.append(out))
    run_mlp(first, second, x, relu=True)
    assert (seen[0] < 0).any()
