"""The kernels of deformable attention, in Triton's interpreter, against ``grid_sample``."""

from __future__ import annotations

import copy

import pytest
import torch
from detectron2.layers import ShapeSpec
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ttt_video.modeling import deformable_attention
from ttt_video.modeling.deformable_attention import MSDeformAttn
from ttt_video.modeling.deformable_attention import sampled_attention as by_grid_sample
from ttt_video.modeling.kernels import VARIABLE
from ttt_video.modeling.pixel_decoder import EncoderSizes, MSDeformAttnPixelDecoder

pytest.importorskip("triton")
kernel = pytest.importorskip("ttt_video.modeling.kernels.deformable")

Inputs = tuple[Tensor, Tensor, Tensor, Tensor]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ODD = ((5, 3), (2, 4), (1, 1))


def random_inputs(
    shapes, heads: int, dim: int, points: int, dtype=torch.float64, queries: int = 7
) -> Inputs:
    """Values, reference, offsets of several pixels and logits: B=2."""
    torch.manual_seed(0)
    samples = heads * len(shapes) * points
    inputs = (
        torch.randn(2, sum(h * w for h, w in shapes), heads, dim, dtype=torch.float64),
        torch.rand(queries, 2, dtype=torch.float64),
        2 * torch.randn(2, queries, 2 * samples, dtype=torch.float64),
        2 * torch.randn(2, queries, samples, dtype=torch.float64),
    )
    reference = torch.float64 if dtype == torch.float64 else torch.float32
    kinds = (dtype, reference, dtype, dtype)
    return tuple(x.to(DEVICE, kind) for x, kind in zip(inputs, kinds, strict=True))


def expected(values: Tensor, shapes, reference: Tensor, offsets: Tensor, logits: Tensor) -> Tensor:
    """The same in float64, by ``grid_sample``."""
    batch, _, heads, _ = values.shape
    size = (batch, len(reference), heads, len(shapes), -1)
    offsets, logits = offsets.double().unflatten(2, (*size[2:4], -1, 2)), logits.double()
    sizes = torch.tensor([(w, h) for h, w in shapes], device=values.device)[:, None]
    locations = reference.double()[:, None, None, None] + offsets / sizes
    weights = logits.view(*size[:3], -1).softmax(-1).view(size)
    return by_grid_sample(values.double(), shapes, locations, weights)


def both_ways(function, inputs: Inputs, shapes) -> list[Tensor]:
    """The result and the gradients of values, offsets and logits."""
    values, reference, offsets, logits = inputs
    leaves = [x.detach().requires_grad_() for x in (values, offsets, logits)]
    out = function(leaves[0], shapes, reference, *leaves[1:])
    generator = torch.Generator().manual_seed(1)
    direction = torch.randn(out.shape, generator=generator, dtype=torch.float64)
    return [out, *torch.autograd.grad(out, leaves, direction.to(out.device, out.dtype))]


def assert_close(inputs: Inputs, shapes, rtol: float, atol: float) -> None:
    ours, theirs = both_ways(kernel.attend, inputs, shapes), both_ways(expected, inputs, shapes)
    for one, two, kind in zip(ours, theirs, (0, 0, 2, 3), strict=True):
        assert one.dtype == inputs[kind].dtype
        torch.testing.assert_close(one.double(), two.double(), rtol=rtol, atol=atol)


CASES = [  # levels, heads, channels, points, queries
    pytest.param(ODD, 2, 3, 2, 5, id="odd-sizes"),
    pytest.param(((4, 7),), 3, 8, 4, 3, id="three-heads"),
    pytest.param(((3, 1), (1, 4)), 1, 1, 5, 7, id="lines-and-one-channel"),
    pytest.param(((2, 3),), 8, 32, 4, 1, id="as-in-the-full-model", marks=pytest.mark.slow),
]


@pytest.mark.slow
@pytest.mark.parametrize(("shapes", "heads", "dim", "points", "queries"), CASES)
@pytest.mark.parametrize(
    ("dtype", "rtol", "atol"),
    [
        (torch.float64, 0, 1e-12),
        (torch.float32, 1e-5, 1e-5),
        (torch.bfloat16, 1.6e-2, 4e-2),
    ],
    ids=str,
)
def test_equals_grid_sample(shapes, heads, dim, points, queries, dtype, rtol, atol):
    """Results and gradients, in the dtypes of the inputs."""
    inputs = random_inputs(shapes, heads, dim, points, dtype, queries)
    assert_close(inputs, shapes, rtol, atol)


def test_gradients_by_differences():
    """One query on two levels; between pixel centres, at which there is no derivative."""
    shapes = ((3, 4), (1, 2))
    values, _, _, logits = (x[:1] for x in random_inputs(shapes, 1, 2, 1, queries=1))
    reference = torch.full((1, 2), 0.5, dtype=torch.float64, device=DEVICE)
    offsets = torch.tensor([[[0.3, 1.2, -0.7, 0.2]]], dtype=torch.float64, device=DEVICE)
    leaves = tuple(x.requires_grad_() for x in (values, offsets, logits))
    assert torch.autograd.gradcheck(
        lambda v, o, w: kernel.attend(v, shapes, reference, o, w),
        leaves,
        fast_mode=True,
        nondet_tol=1e-12,
    )


@pytest.mark.slow
@pytest.mark.parametrize(("warps", "width", "heads"), [(4, 1, 1), (4, 8, 4)], ids=str)
def test_blocks_of_any_size_give_the_same(warps, width, heads):
    """Three heads fill no power of two, and five queries no block."""
    values, reference, offsets, logits = random_inputs(ODD, 3, 6, 1, queries=5)
    levels = kernel._levels(ODD, values.device)
    inputs = kernel.Inputs(values, levels, reference, offsets, logits)
    out = kernel.run_forward(inputs)
    options = {"warps": warps, "width": width, "heads": heads}
    torch.testing.assert_close(kernel.run_forward(inputs, **options), out, rtol=0, atol=1e-13)
    grads = kernel.run_backward(out, out, inputs)
    for one, two in zip(kernel.run_backward(out, out, inputs, **options), grads, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-12)


def test_places_on_pixels_on_edges_and_far_outside():
    """Results everywhere, and gradients of the values, which have no corners."""
    inputs = random_inputs(ODD, 2, 2, 2)
    offsets = inputs[2].round()
    offsets[:, 1] = 1e6
    offsets[:, 2] = -3e38
    offsets[:, 3, ::2] = float("inf")
    offsets[:, 4, 1::2] = -float("inf")
    reference = (10 * inputs[1]).round() / 10
    inputs = (inputs[0], reference, offsets, inputs[3])
    ours = both_ways(kernel.attend, inputs, ODD)
    assert not ours[0][:, 1:5].any()
    finite = (inputs[0], reference, offsets.nan_to_num(posinf=1e6, neginf=-1e6), inputs[3])
    theirs = both_ways(expected, finite, ODD)
    for index in (0, 1):
        torch.testing.assert_close(ours[index], theirs[index], rtol=0, atol=1e-12)
    for gradient in ours[2:]:
        assert gradient.isfinite().all()
        assert not gradient[:, 1:5].any()


def test_a_place_that_is_not_a_number_gives_none_for_its_query_only():
    values, reference, offsets, logits = random_inputs(ODD, 1, 2, 2)
    offsets[:, 1, 3] = float("nan")
    logits[:, 2, 0] = float("nan")
    out, grad_values, grad_offsets, _ = both_ways(
        kernel.attend, (values, reference, offsets, logits), ODD
    )
    others = [0, 3, 4, 5, 6]
    assert out[:, 1:3].isnan().all()
    assert out[:, others].isfinite().all()
    assert grad_offsets[:, others].isfinite().all()
    assert grad_values.shape == values.shape


def test_nothing_is_read_beyond_the_values():
    """The memory around the values holds NaN, which no result shows."""
    values, reference, offsets, logits = random_inputs(ODD, 2, 3, 2)
    memory = torch.full((values.numel() + 400,), float("nan"), dtype=values.dtype, device=DEVICE)
    memory[200:-200] = values.flatten()
    inside = memory[200:-200].view_as(values)
    out = kernel.attend(inside, ODD, reference, 3 * offsets, logits)
    torch.testing.assert_close(out, expected(values, ODD, reference, 3 * offsets, logits))


def test_positions_keep_their_precision_in_bfloat16():
    """64 pixels side by side, each read by the query at its centre."""
    pixels = torch.arange(64.0, device=DEVICE)
    reference = torch.stack([(pixels + 0.5) / 64, torch.full_like(pixels, 0.5)], 1)
    zeros = torch.zeros(1, 64, 2, device=DEVICE, dtype=torch.bfloat16)
    values = pixels.bfloat16().view(1, 64, 1, 1)
    out = kernel.attend(values, ((1, 64),), reference, zeros, zeros[..., :1])
    assert out.dtype == torch.bfloat16
    assert out.flatten().tolist() == pixels.tolist()


def test_nothing_to_attend_from():
    values, reference, offsets, logits = random_inputs(ODD, 2, 3, 2)
    out = kernel.attend(values, ODD, reference[:0], offsets[:, :0], logits[:, :0])
    assert out.shape == (2, 0, 6)


def test_tensors_that_do_not_fit_are_refused():
    values, reference, offsets, logits = random_inputs(ODD, 2, 3, 2)
    for wrong in (
        (values[:, 1:], reference, offsets, logits),
        (values, reference[1:], offsets, logits),
        (values, reference, offsets[..., 1:], logits),
        (values, reference, offsets, logits[..., 1:]),
        (values, reference, offsets, logits.float()),
    ):
        with pytest.raises(ValueError, match="do not fit together"):
            kernel.attend(wrong[0], ODD, *wrong[1:])


class _Operators(TorchDispatchMode):
    """Writes down the names of operators."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **kwargs or {})

    def work(self) -> list[str]:
        """The names in order of the alphabet, without those of views."""
        return sorted(name for name in self.names if name not in ("view", "detach"))


class _Launches:
    """Stands for a kernel and counts its launches."""

    count = 0

    def __getitem__(self, grid: tuple[int, int]):
        return self.launch

    def launch(self, *args, **kwargs) -> None:
        self.count += 1


def test_nothing_works_beside_the_kernels_and_nothing_comes_from_the_cpu(monkeypatch):
    """Results are made, zeros to add to, and their sum is cast."""
    values, reference, offsets, logits = random_inputs(ODD, 2, 3, 2, torch.bfloat16)
    kernel.attend(values, ODD, reference, offsets, logits)
    launches = _Launches()
    monkeypatch.setattr(kernel, "forward_kernel", launches)
    monkeypatch.setattr(kernel, "backward_kernel", launches)
    levels = kernel._levels(ODD, values.device)
    with _Operators() as forward:
        out = kernel.attend(values, ODD, reference, offsets, logits)
    with _Operators() as backward:
        kernel.run_backward(out, out, kernel.Inputs(values, levels, reference, offsets, logits))
    assert launches.count == 2
    assert forward.work() == ["new_empty"]
    assert backward.work() == ["_to_copy", "empty_like", "empty_like", "zeros_like"]


# ---- where it is used


def make_module(dtype=torch.float32) -> tuple[MSDeformAttn, Inputs]:
    """A module of random weights, and query, reference and value on three levels."""
    torch.manual_seed(0)
    attention = MSDeformAttn(12, num_levels=3, num_heads=2, num_points=2)
    for parameter in attention.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    query, value = torch.randn(2, 5, 12, dtype=dtype), torch.randn(2, 24, 12, dtype=dtype)
    reference = torch.rand(5, 2, dtype=dtype)
    return attention.to(DEVICE, dtype), tuple(x.to(DEVICE) for x in (query, reference, value))


def module_results(attention: MSDeformAttn, query, reference, value) -> list[Tensor]:
    """The result and the gradients of both inputs and all parameters."""
    leaves = [query.detach().requires_grad_(), value.detach().requires_grad_()]
    out = attention(leaves[0], reference, leaves[1], ODD)
    return [out, *torch.autograd.grad(out.square().sum(), [*leaves, *attention.parameters()])]


def test_module(monkeypatch):
    attention, inputs = make_module(torch.float64)
    monkeypatch.setenv(VARIABLE, "off")
    theirs = module_results(attention, *inputs)
    monkeypatch.setenv(VARIABLE, "on")
    monkeypatch.setattr(
        deformable_attention, "attention_function", lambda _: pytest.fail("kernels come first")
    )
    for one, two in zip(module_results(attention, *inputs), theirs, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-11)


def test_module_under_autocast_casts_nothing_before_the_kernel(monkeypatch):
    attention, inputs = make_module()
    exact = module_results(copy.deepcopy(attention).double(), *(x.double() for x in inputs))
    monkeypatch.setenv(VARIABLE, "on")
    seen: list[tuple[Tensor, ...]] = []
    attend = kernel.attend
    with monkeypatch.context() as patch:
        patch.setattr(kernel, "attend", lambda *args: seen.append(args) or attend(*args))
        with torch.autocast(DEVICE, torch.bfloat16):
            ours = module_results(attention, *inputs)
    ((values, _, reference, offsets, logits),) = seen
    assert reference.dtype == torch.float32
    assert {x.dtype for x in (values, offsets, logits, ours[0])} == {torch.bfloat16}
    for one, two in zip(ours, exact, strict=True):
        scale = two.abs().max().item()
        torch.testing.assert_close(one.double(), two, rtol=0, atol=0.05 * scale)


@pytest.mark.slow
def test_pixel_decoder(monkeypatch):
    torch.manual_seed(0)
    channels = {"res2": 5, "res3": 6, "res4": 7, "res5": 8}
    decoder = MSDeformAttnPixelDecoder(
        {
            name: ShapeSpec(channels=number, stride=4 << i)
            for i, (name, number) in enumerate(channels.items())
        },
        in_features=[*channels],
        transformer_in_features=[*channels][1:],
        dim=32,
        mask_dim=4,
        norm="",
        common_stride=4,
        encoder=EncoderSizes(layers=1, heads=4, points=2, feedforward=8, dropout=0.0),
    ).to(DEVICE)
    for layer in decoder.transformer.encoder.layers:  # offsets that depend on the query
        torch.nn.init.normal_(layer.self_attn.sampling_offsets.weight, std=0.3)
        torch.nn.init.normal_(layer.self_attn.attention_weights.weight, std=0.3)
    features = {
        name: torch.randn(1, number, 8 >> i, 16 >> i, device=DEVICE)
        for i, (name, number) in enumerate(channels.items())
    }
    results = []
    for choice in ("off", "on"):
        monkeypatch.setenv(VARIABLE, choice)
        mask_features, maps = decoder(features)
        loss = mask_features.square().sum() + sum(m.square().sum() for m in maps)
        results.append([loss, *torch.autograd.grad(loss, [*decoder.parameters()])])
    for one, two in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-3)
