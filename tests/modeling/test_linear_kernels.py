"""Linear layers whose backward pass sums columns in Triton, against PyTorch in float64."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from detectron2.modeling.backbone.swin import PatchMerging, SwinTransformerBlock
from torch import Tensor, nn

from ttt_video.modeling import deformable_attention, kernels
from ttt_video.modeling.backbone import FastPatchMerging, FastSwinBlock
from ttt_video.modeling.deformable_attention import MSDeformAttn, sampled_attention
from ttt_video.modeling.pixel_decoder import EncoderLayer, EncoderSizes, reference_points
from ttt_video.modeling.transformer_decoder import MLP, Attention, FFNLayer
from ttt_video.modeling.windows import shift_mask

kernel = pytest.importorskip("ttt_video.modeling.kernels.linear")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # the interpreter's
ROUNDING = {torch.float64: 1e-13, torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}
"""Largest error in units of the largest value."""

ROUNDED = [torch.float64, torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True)
def _kernels_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(kernels.VARIABLE, "on")


def noise(*size: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*size, generator=generator, dtype=torch.float64).to(DEVICE)


def assert_near(found: Tensor, expected: Tensor, error: float) -> None:
    largest = max(float(expected.abs().max()), 1e-6)
    assert float((found.double() - expected.double()).abs().max()) <= error * largest


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize(
    ("size", "programs"),
    [((1, 1), 1), ((700, 96), 16), ((129, 5), 16), ((33, 192), 1024), ((40, 384), 1)],
    ids=["one element", "four rows at once", "odd", "more programs than rows", "one program"],
)
def test_sums_columns(dtype: torch.dtype, size: tuple[int, int], programs: int) -> None:
    x = noise(*size).to(dtype)
    found = kernel.column_sum(x, programs=programs, rows=8)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    error = 1e-14 if dtype == torch.float64 else 1e-6
    assert float((found - x.double().sum(0)).abs().max()) <= error * float(x.double().abs().sum())


def test_sums_no_rows_and_strided_ones() -> None:
    assert kernel.column_sum(noise(0, 3)).tolist() == [0, 0, 0]
    x = noise(6, 10).t()[:, ::2]
    assert_near(kernel.column_sum(x), x.sum(0), 1e-14)


def test_does_not_round_its_sums() -> None:
    ones = torch.ones(3000, 4, dtype=torch.bfloat16, device=DEVICE)
    assert kernel.column_sum(ones).tolist() == [3000] * 4  # bfloat16 has 2992 and 3008


@pytest.mark.parametrize("dtype", ROUNDED)
def test_gelu_is_the_exact_one(dtype: torch.dtype) -> None:
    x = torch.linspace(-9, 9, 1501, dtype=torch.float64, device=DEVICE).to(dtype)
    found = kernel.gelu(x, elements=1024)
    # Small values count as much as large ones. The interpreter cuts bits off, a GPU rounds.
    error = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 1e-6}[dtype]
    expected = F.gelu(x.double())
    bits = 2.0**-7 if dtype == torch.bfloat16 else 0.0
    assert bool(((found - expected).abs() <= error + bits * expected.abs()).all())


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("dtype", ROUNDED)
def test_activation_gradient(dtype: torch.dtype, relu: bool) -> None:
    x = noise(45, 96).mul(2).to(dtype)
    grad = noise(45, 96, seed=1).to(dtype)
    leaf = x.double().requires_grad_()
    out = F.relu(leaf) if relu else F.gelu(leaf)
    (expected,) = torch.autograd.grad(out, leaf, grad.double())
    found = grad.clone()
    kept = x.relu() if relu else x
    sums = kernel.activation_gradient(found, kept, relu=relu, programs=3)
    assert_near(found, expected, 2.0**-7 if dtype == torch.bfloat16 else ROUNDING[dtype])
    assert_near(sums, expected.sum(0), ROUNDING[dtype] if dtype == torch.float64 else 2e-6)
    untouched = grad.clone()
    assert kernel.activation_gradient(untouched, kept, relu=relu, sums=False) is None
    assert torch.equal(untouched, found)


def parameters(*sizes: tuple[int, ...]) -> list[Tensor]:
    return [noise(*size, seed=i + 5).requires_grad_() for i, size in enumerate(sizes)]


@pytest.mark.parametrize("size", [(5,), (7, 5), (2, 3, 5)], ids=["1-D", "2-D", "3-D"])
@pytest.mark.parametrize("bias", [True, False])
def test_gradients_of_a_linear_layer(size: tuple[int, ...], bias: bool) -> None:
    x, weight, shift = parameters(size, (6, 5), (6,))
    shift = shift if bias else None
    torch.testing.assert_close(kernel.linear(x, weight, shift), F.linear(x, weight, shift))
    assert torch.autograd.gradcheck(kernel.linear, (x, weight, shift), fast_mode=True)


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_gradients_of_an_mlp(relu: bool, bias: bool) -> None:
    x, w1, b1, w2, b2 = parameters((2, 3, 5), (7, 5), (7,), (4, 7), (4,))
    b1, b2 = (b1, b2) if bias else (None, None)

    def run(*inputs: Tensor | None) -> Tensor:
        return kernel.mlp(*inputs, relu=relu)

    hidden = F.linear(x, w1, b1)
    expected = F.linear(F.relu(hidden) if relu else F.gelu(hidden), w2, b2)
    torch.testing.assert_close(run(x, w1, b1, w2, b2), expected)
    assert torch.autograd.gradcheck(run, (x, w1, b1, w2, b2), fast_mode=True)


LEARNING = [
    (True, False, False, False, False),
    (False, True, False, True, False),
    (False, False, True, False, False),
    (False, False, False, True, True),
    (False, False, False, False, True),
]


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("learning", LEARNING)
def test_frozen_parts_of_an_mlp_take_no_work(
    relu: bool, learning: tuple[bool, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = parameters((6, 5), (7, 5), (7,), (4, 7), (4,))
    for x, learns in zip(inputs, learning, strict=True):
        x.requires_grad_(learns)
    learners = [x for x in inputs if x.requires_grad]
    products, sums = [], []
    multiply, column_sum = torch.mm, kernel.column_sum
    monkeypatch.setattr(kernel.torch, "mm", lambda *a: products.append(1) or multiply(*a))
    monkeypatch.setattr(kernel, "column_sum", lambda x: sums.append(1) or column_sum(x))
    out = kernel.mlp(*inputs, relu=relu)
    found = torch.autograd.grad(out.sin().sum(), learners)
    x, w1, b1, w2, b2 = inputs
    hidden = F.linear(x, w1, b1)
    out = F.linear(F.relu(hidden) if relu else F.gelu(hidden), w2, b2)
    for grad, expected in zip(found, torch.autograd.grad(out.sin().sum(), learners), strict=True):
        torch.testing.assert_close(grad, expected)
    learns_x, learns_1, learns_b1, learns_2, learns_b2 = learning
    assert len(products) == learns_x + learns_1 + learns_2 + (learns_x or learns_1 or learns_b1)
    assert len(sums) == learns_b2


@pytest.mark.parametrize("learner", [0, 1, 2])
def test_frozen_parts_of_a_linear_layer_take_no_work_and_no_memory(learner: int) -> None:
    inputs = parameters((6, 5), (4, 5), (4,))
    for i, x in enumerate(inputs):
        x.requires_grad_(i == learner)
    out = kernel.linear(*inputs)
    x, weight = out.grad_fn.next_functions[0][0].saved_tensors
    assert (x is None, weight is None) == (learner != 1, learner != 0)
    out.sum().backward()
    assert [x.grad is not None for x in inputs] == [i == learner for i in range(3)]


def test_gradients_are_float32_under_autocast() -> None:
    x = noise(2, 50, 24).float().requires_grad_()
    weight, bias = (p.detach().float().requires_grad_() for p in parameters((40, 24), (40,)))
    with torch.autocast(DEVICE, torch.bfloat16):
        out = kernel.linear(x, weight, bias)
    assert out.dtype == torch.bfloat16
    grad = noise(2, 50, 40, seed=3).bfloat16()
    out.backward(grad)
    assert weight.grad.dtype == bias.grad.dtype == x.grad.dtype == torch.float32
    rows, grad = x.detach().bfloat16().double().flatten(0, 1), grad.double().flatten(0, 1)
    assert_near(weight.grad, grad.t() @ rows, 4e-3)
    assert_near(bias.grad, grad.sum(0), 1e-6)
    assert_near(x.grad.flatten(0, 1), grad @ weight.detach().bfloat16().double(), 4e-3)


def of_module(run, module: nn.Module, dtype: torch.dtype, *inputs: Tensor) -> dict[str, Tensor]:
    """The output and all gradients of a module, by the precision that a step runs in."""
    module.zero_grad()
    kind = torch.float64 if dtype == torch.float64 else torch.float32
    inputs = tuple(x.to(kind).requires_grad_() for x in inputs)
    with torch.autocast(DEVICE, dtype, enabled=dtype == torch.bfloat16):
        out = run(module.to(kind), *inputs)
    out.backward(noise(*out.shape, seed=9).to(out.dtype))
    grads = {f"input {i}": x.grad for i, x in enumerate(inputs)}
    grads |= {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    assert all(grad.dtype == kind for grad in grads.values())
    return {"output": out.detach(), **grads}


def assert_module_agrees(
    run,
    module: nn.Module,
    dtype: torch.dtype,
    *inputs: Tensor,
    weights: int,
    monkeypatch: pytest.MonkeyPatch,
    reference: torch.dtype = torch.float64,
) -> None:
    """All its ``weights`` must run by the kernels, and agree with the plain modules."""
    calls = []
    apply = kernel._Linear.apply, kernel._Mlp.apply
    monkeypatch.setattr(kernel._Linear, "apply", lambda *a: calls.append(a) or apply[0](*a))
    monkeypatch.setattr(kernel._Mlp, "apply", lambda *a: calls.append(a) or apply[1](*a))
    found = of_module(run, copy.deepcopy(module), dtype, *inputs)
    assert weights == sum(2 if len(call) == 6 else 1 for call in calls)
    monkeypatch.setenv(kernels.VARIABLE, "off")
    expected = of_module(run, module, reference, *inputs)
    assert found.keys() == expected.keys()
    error = {torch.bfloat16: 4e-2, torch.float32: 1e-5}[dtype]
    for name, value in found.items():
        assert_near(value, expected[name], error)


PRECISIONS = [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", PRECISIONS)
def test_swin_block(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    block = SwinTransformerBlock(16, 2, window_size=3, shift_size=1).to(DEVICE)
    block.__class__ = FastSwinBlock
    block.H, block.W = 5, 7
    mask = shift_mask(5, 7, 3, 1, torch.device(DEVICE))

    def run(block: nn.Module, x: Tensor) -> Tensor:
        return block(x, mask.to(x.dtype))

    assert_module_agrees(run, block, dtype, noise(2, 35, 16), weights=4, monkeypatch=monkeypatch)


@pytest.mark.parametrize("dtype", PRECISIONS)
def test_patch_merging(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    merging = PatchMerging(8).to(DEVICE)
    merging.__class__ = FastPatchMerging
    assert_module_agrees(
        lambda module, x: module(x, 5, 7),
        merging,
        dtype,
        noise(2, 35, 8),
        weights=1,
        monkeypatch=monkeypatch,
    )


@pytest.mark.parametrize("dtype", PRECISIONS)
def test_attention_of_the_query_decoder(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    layer = nn.ModuleList([Attention(16, 2), FFNLayer(16, 24, False), MLP([16, 16, 8])]).to(DEVICE)

    def run(layer: nn.ModuleList, queries: Tensor, memory: Tensor) -> Tensor:
        attention, feedforward, last = layer
        return last(feedforward.update(attention(queries, memory, memory)))

    inputs = noise(2, 5, 16), noise(2, 12, 16, seed=1)
    assert_module_agrees(run, layer, dtype, *inputs, weights=8, monkeypatch=monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", PRECISIONS)
def test_layer_of_the_pixel_decoder(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    from ttt_video.modeling.kernels.norms import Normed, product_dtype

    torch.manual_seed(0)
    shapes = ((2, 3), (4, 5))
    sizes = EncoderSizes(layers=1, heads=2, points=2, feedforward=24, dropout=0.0)
    layer = EncoderLayer(16, 2, sizes).to(DEVICE)
    reference = reference_points(shapes, torch.device(DEVICE))

    def run(layer: nn.Module, tokens: Tensor, position: Tensor) -> Tensor:
        place = reference.to(tokens.dtype)
        if not kernels.use_kernels(tokens):
            return layer(tokens, position, place, shapes)
        low = product_dtype(tokens)
        stream = Normed(tokens, tokens.to(low), (tokens + position).to(low))
        return layer.fused(stream, place, shapes, None).full

    monkeypatch.setattr(
        deformable_attention, "attention_function", lambda device: sampled_attention
    )
    # Rounded places may be on another side of a pixel, where gradients jump.
    nn.init.uniform_(layer.self_attn.sampling_offsets.bias, -2, 2)
    inputs = noise(2, 26, 16), noise(2, 26, 16, seed=1)
    assert_module_agrees(
        run, layer, dtype, *inputs, weights=6, monkeypatch=monkeypatch, reference=dtype
    )


def test_a_layer_with_a_hook_or_of_another_class_is_called() -> None:
    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    x = noise(3, 4)
    doubled = Doubled(4, 2, dtype=torch.float64, device=DEVICE)
    assert torch.equal(kernels.run_linear(doubled, x), doubled(x))
    plain = nn.Linear(4, 4, dtype=torch.float64, device=DEVICE)
    assert "_Linear" in kernels.run_linear(plain, x).grad_fn.next_functions[0][0].name()
    seen = []
    plain.register_forward_hook(lambda module, inputs, out: seen.append(inputs[0]))
    kernels.run_linear(plain, x)
    kernels.run_mlp(plain, plain, x, relu=True)
    assert len(seen) == 3
    assert seen[0] is x


def test_predictions_are_the_plain_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "linear", None)
    attention = MSDeformAttn(8, 1, 2, 2).to(DEVICE)
    with torch.no_grad():
        x = noise(1, 6, 8).float()
        out = kernels.run_linear(attention.value_proj, x)
    assert torch.equal(out, attention.value_proj(x))


@pytest.mark.parametrize("relu", [True, False])
def test_mlp_of_a_prediction(relu: bool) -> None:
    first, second = nn.Linear(8, 24).to(DEVICE), nn.Linear(24, 8).to(DEVICE)
    x = noise(1, 6, 8).float()
    with torch.no_grad():
        out = kernels.run_mlp(first, second, x, relu=relu)
        hidden = first(x)
        expected = second(F.relu(hidden) if relu else F.gelu(hidden))
    assert not out.requires_grad
    torch.testing.assert_close(out, expected)
