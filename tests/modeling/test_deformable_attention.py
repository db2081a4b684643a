"""Deformable attention against plain loops, and the choice of its implementation."""

from __future__ import annotations

import importlib.machinery
import itertools
import math
import sys
from types import ModuleType

import pytest
import torch
from torch import Tensor

from ttt_video.modeling import deformable_attention as module
from ttt_video.modeling.deformable_attention import (
    MSDeformAttn,
    attention_function,
    deformable_attention,
    sampled_attention,
)
from ttt_video.modeling.deformable_cpu import attend


def bilinear(level: Tensor, x: float, y: float) -> Tensor:
    """(D,) at a point in px, whose integers are pixel centres, of (h, w, D); outside is zero."""
    height, width, dim = level.shape
    total = torch.zeros(dim, dtype=level.dtype)
    left, top = math.floor(x), math.floor(y)
    for column, row in itertools.product((left, left + 1), (top, top + 1)):
        if 0 <= column < width and 0 <= row < height:
            total += level[row, column] * (1 - abs(x - column)) * (1 - abs(y - row))
    return total


def by_loops(value: Tensor, shapes, locations: Tensor, weights: Tensor) -> Tensor:
    batch, _, heads, dim = value.shape
    _, queries, _, levels, points, _ = locations.shape
    out = torch.zeros(batch, queries, heads, dim, dtype=value.dtype)
    starts = [sum(h * w for h, w in shapes[:i]) for i in range(levels)]
    ranges = map(range, (batch, queries, heads, levels, points))
    for b, q, m, i, p in itertools.product(*ranges):
        height, width = shapes[i]
        level = value[b, starts[i] : starts[i] + height * width, m].view(height, width, dim)
        x, y = locations[b, q, m, i, p].tolist()
        out[b, q, m] += weights[b, q, m, i, p] * bilinear(level, x * width - 0.5, y * height - 0.5)
    return out.view(batch, queries, heads * dim)


def random_inputs(shapes, dtype=torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Values, locations from -0.25 to 1.25 and weights: B=2, Q=3, M=2, D=3, P=4."""
    torch.manual_seed(0)
    levels = len(shapes)
    value = torch.randn(2, sum(h * w for h, w in shapes), 2, 3, dtype=dtype)
    locations = 1.5 * torch.rand(2, 3, 2, levels, 4, 2, dtype=dtype) - 0.25
    return value, locations, torch.rand(2, 3, 2, levels, 4, dtype=dtype)


@pytest.mark.parametrize("shapes", [((3, 4),), ((5, 3), (2, 4), (1, 1))], ids=str)
def test_equals_plain_loops(shapes):
    value, locations, weights = random_inputs(shapes)
    assert (locations < 0).any()
    assert (locations > 1).any()
    expected = by_loops(value, shapes, locations, weights)
    for attention in (deformable_attention, sampled_attention):
        out = attention(value, shapes, locations, weights)
        assert out.shape == (2, 3, 6)
        torch.testing.assert_close(out, expected)


def test_a_pixel_centre_reads_that_pixel_and_outside_reads_zero():
    value = torch.arange(12.0).view(1, 12, 1, 1)  # one 3x4 map
    points = [((2 + 0.5) / 4, (1 + 0.5) / 3), (1.2, 0.5), (0.5, -0.2)]
    locations = torch.tensor(points).view(1, 3, 1, 1, 1, 2)
    out = deformable_attention(value, ((3, 4),), locations, torch.ones(1, 3, 1, 1, 1))
    torch.testing.assert_close(out.flatten(), torch.tensor([4.0 + 2.0, 0.0, 0.0]))


# ---- the loops for CPUs


def gradients(value: Tensor, shapes, locations: Tensor, weights: Tensor) -> list[Tensor]:
    inputs = [t.detach().requires_grad_() for t in (value, locations, weights)]
    out = deformable_attention(inputs[0], shapes, *inputs[1:])
    return [out, *torch.autograd.grad(out.square().sum(), inputs)]


@pytest.mark.parametrize("dim", [1, 8, 19])
def test_threads_share_the_work_and_change_no_bit(dim, three_threads):
    """Five heads by one, two and seven threads."""
    torch.manual_seed(0)
    shapes = ((7, 5), (3, 3))
    value = torch.randn(2, 44, 5, dim)
    locations, weights = torch.rand(2, 30, 5, 2, 4, 2), torch.rand(2, 30, 5, 2, 4)
    results = []
    for threads in (1, 2, 7):
        torch.set_num_threads(threads)
        results.append(gradients(value, shapes, locations, weights))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_tensors_may_lie_in_memory_in_any_order():
    shapes = ((3, 4),)
    inputs = random_inputs(shapes)
    strided = [t.transpose(0, 1).contiguous().transpose(0, 1) for t in inputs]
    assert not any(t.is_contiguous() for t in strided)
    for a, b in zip(
        gradients(inputs[0], shapes, *inputs[1:]),
        gradients(strided[0], shapes, *strided[1:]),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_the_operator_keeps_torchs_rules():
    """Its schema, its gradients' registration and the shapes that it promises torch.compile."""
    value, locations, weights = random_inputs(((3, 4), (2, 1)))
    inputs = tuple(t.requires_grad_() for t in (value, locations, weights))
    torch.library.opcheck(attend, (inputs[0], [3, 4, 2, 1], *inputs[1:]))


# ---- the module


def make_module() -> MSDeformAttn:
    torch.manual_seed(0)
    attention = MSDeformAttn(8, num_levels=2, num_heads=2, num_points=3)
    for parameter in attention.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return attention.double()


SHAPES = ((4, 6), (2, 3))
TOKENS = 4 * 6 + 2 * 3


def module_inputs() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(1)
    return (
        torch.randn(1, 5, 8, dtype=torch.float64, requires_grad=True),
        torch.rand(5, 2, dtype=torch.float64),
        torch.randn(1, TOKENS, 8, dtype=torch.float64, requires_grad=True),
    )


def test_module_moves_by_offsets_in_pixels_of_each_level():
    attention = make_module()
    query, reference, value = module_inputs()
    values = attention.value_proj(value).view(1, TOKENS, 2, 4)
    offsets = attention.sampling_offsets(query).view(1, 5, 2, 2, 3, 2)
    weights = attention.attention_weights(query).view(1, 5, 2, 6).softmax(-1).view(1, 5, 2, 2, 3)
    locations = torch.empty_like(offsets)
    for i, (height, width) in enumerate(SHAPES):
        for q, (x, y) in enumerate(reference):
            locations[:, q, :, i, :, 0] = x + offsets[:, q, :, i, :, 0] / width
            locations[:, q, :, i, :, 1] = y + offsets[:, q, :, i, :, 1] / height
    expected = attention.output_proj(by_loops(values, SHAPES, locations, weights))
    torch.testing.assert_close(attention(query, reference, value, SHAPES), expected)


def test_module_gradcheck():
    attention = make_module()
    query, reference, value = module_inputs()
    assert torch.autograd.gradcheck(lambda q, v: attention(q, reference, v, SHAPES), (query, value))


def test_gradients_reach_every_parameter():
    attention = make_module()
    query, reference, value = module_inputs()
    attention(query, reference, value, SHAPES).square().sum().backward()
    for name, parameter in attention.named_parameters():
        assert parameter.grad.abs().max() > 0, name


def test_heads_start_out_in_their_own_direction():
    attention = MSDeformAttn(16, num_levels=2, num_heads=8, num_points=3)
    bias = attention.sampling_offsets.bias.view(8, 2, 3, 2)
    compass = [(1, 0), (1, 1), (0, 1), (-1, 1), (-1, 0), (-1, -1), (0, -1), (1, -1)]
    for m, direction in enumerate(compass):
        for i, p in itertools.product(range(2), range(3)):
            expected = (p + 1) * torch.tensor(direction, dtype=torch.float32)
            torch.testing.assert_close(bias[m, i, p], expected, rtol=0, atol=1e-5)
    assert not attention.sampling_offsets.weight.any()
    assert not attention.attention_weights.weight.any()


def test_width_must_split_into_heads():
    with pytest.raises(ValueError, match="10 is not a multiple of num_heads 4"):
        MSDeformAttn(10, num_levels=1, num_heads=4, num_points=1)


def test_positions_keep_their_precision_under_autocast():
    """In bfloat16, 0.998 and 1.002 are both 1: sampling points would jump by pixels."""
    attention = make_module().float()
    query, _, value = (x.float() for x in module_inputs())
    reference = torch.linspace(0.99, 1.0, 10).view(5, 2)
    seen = []

    def spy(value, shapes, locations, weights):
        seen.append((locations, weights.dtype))
        return deformable_attention(value, shapes, locations, weights)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "attention_function", lambda device_type: spy)
        torch.nn.init.zeros_(attention.sampling_offsets.weight)
        torch.nn.init.zeros_(attention.sampling_offsets.bias)
        with torch.autocast("cpu", torch.bfloat16):
            attention(query, reference, value, SHAPES)
    ((locations, dtype),) = seen
    assert dtype == torch.float32
    torch.testing.assert_close(locations[0, :, 0, 0, 0], reference, rtol=0, atol=1e-7)


# ---- the compiled package, played by a stub; tensors of "meta" stand for those of a GPU


@pytest.fixture
def install(monkeypatch):
    """``install(function)`` makes a ``torch_ms_deform_attn`` importable for one test."""

    def put(function) -> None:
        stub = ModuleType("torch_ms_deform_attn")
        stub.__spec__ = importlib.machinery.ModuleSpec("torch_ms_deform_attn", None)
        stub.ms_deform_attn = function
        monkeypatch.setitem(sys.modules, "torch_ms_deform_attn", stub)
        attention_function.cache_clear()

    attention_function.cache_clear()
    yield put
    attention_function.cache_clear()


def test_without_the_package_grid_sample_is_used(monkeypatch, install):
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    assert attention_function("meta") is deformable_attention


def test_a_cpu_has_no_use_for_the_package(install):
    install(lambda *args: pytest.fail("our own loops are faster"))
    assert attention_function("cpu") is deformable_attention


def test_the_package_is_called_by_its_own_conventions(install):
    """Sizes and first tokens of the levels as int64 tensors; everything contiguous."""
    calls = []

    def compiled(value, sizes, starts, locations, weights):
        calls.append((sizes, starts))
        assert sizes.dtype == starts.dtype == torch.int64
        assert all(x.is_contiguous() for x in (value, locations, weights))
        if value.is_meta:  # the trial
            return value
        return by_loops(value, [tuple(s) for s in sizes.tolist()], locations, weights)

    attention = make_module()
    inputs = module_inputs()
    expected = attention(*inputs, SHAPES)
    install(compiled)
    chosen = attention_function("meta")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "attention_function", lambda device_type: chosen)
        torch.testing.assert_close(attention(*inputs, SHAPES), expected)
    assert len(calls) == 2  # the trial and the call
    sizes, starts = calls[-1]
    assert sizes.tolist() == [[4, 6], [2, 3]]
    assert starts.tolist() == [0, 24]


@pytest.mark.parametrize("error", [RuntimeError, NotImplementedError])
def test_a_build_without_kernels_for_the_device_is_tried_once_and_left(install, error):
    calls = []

    def compiled(*args):
        calls.append(args)
        raise error("Not compiled with GPU support")

    install(compiled)
    for _ in range(2):
        assert attention_function("meta") is deformable_attention
    assert len(calls) == 1


def test_a_build_for_another_torch_is_left_with_a_warning(install):
    def compiled(*args):
        raise ImportError("undefined symbol: _ZN3c105ErrorC2E")

    install(compiled)  # the real package fails as early as on import; the same call meets it
    with pytest.warns(UserWarning, match="does not import.*undefined symbol.*Build it again"):
        assert attention_function("meta") is deformable_attention
