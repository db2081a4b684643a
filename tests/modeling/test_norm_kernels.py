"""Layer and group norms in Triton, against PyTorch's in float64 and whole parts of the model."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from test_backbone import SWIN
from test_pixel_decoder import features, make
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

from ttt_video.modeling.backbone import FastPatchMerging, SwinTransformerTTT
from ttt_video.modeling.kernels import VARIABLE, fuses_norms
from ttt_video.modeling.transformer_decoder import MultiScaleMaskedTransformerDecoder

pytest.importorskip("triton")
channels_last = pytest.importorskip("ttt_video.modeling.kernels.channels_last")
group_norms = pytest.importorskip("ttt_video.modeling.kernels.group_norms")
norms = pytest.importorskip("ttt_video.modeling.kernels.norms")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALF = torch.bfloat16


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """Switches the kernels on or off."""
    return lambda on: monkeypatch.setenv(VARIABLE, "on" if on else "off")


def noise(*size: int, seed: int = 1) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def leaf(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype).detach().requires_grad_()


def noisy(module: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    return module.to(DEVICE)


def assert_near(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """Compares by the root mean square of the difference, relative to that of the expected."""
    assert actual.shape == expected.shape
    actual, expected = actual.double(), expected.double()
    assert (actual - expected).norm() <= tolerance * expected.norm()


@pytest.mark.parametrize("dim", [1, 5, 96])
def test_layer_norm_equals_float64s(dim):
    """Rows that fill no block, and a dimension that is no power of two."""
    norm, x, grad = noisy(nn.LayerNorm(dim)), noise(3, 47, dim), noise(3, 47, dim, seed=2)
    x, plain, exact = leaf(x, torch.float32), copy.deepcopy(norm).double(), leaf(x, torch.float64)
    out, expected = norms.layer_norm(x, norm), plain(exact)
    (out * grad).sum().backward()
    (expected * grad).sum().backward()
    assert_near(out, expected, 1e-6)
    if dim > 1:  # the gradient of one value's norm is zero
        assert_near(x.grad, exact.grad, 1e-5)
    else:
        assert x.grad.abs().max() < 1e-5
    assert_near(norm.weight.grad, plain.weight.grad, 1e-5) if dim > 1 else None
    assert_near(norm.bias.grad, plain.bias.grad, 1e-5)


def test_large_mean_costs_no_digits():
    """The mean of squares minus the square of the mean would have no correct digit."""
    x = noise(4, 33, 64) + 1e3
    out = norms.layer_norm(x, nn.LayerNorm(64).to(DEVICE))
    assert_near(out, F.layer_norm(x.double(), (64,)), 1e-3)
    norm = nn.GroupNorm(2, 8).to(DEVICE)
    x = noise(2, 150, 8) + 1e3
    out = channels_last.group_norm(x, norm, (10, 15), dtype=torch.float32)
    expected = F.group_norm(x.double().transpose(1, 2), 2).transpose(1, 2)
    assert_near(out, expected, 1e-3)


@pytest.mark.parametrize("with_gain", [True, False])
def test_gradients_of_sum_and_norm_equal_differences(with_gain):
    norm = noisy(nn.LayerNorm(3)).double()
    x, delta = (leaf(noise(2, 3, 3, seed=seed), torch.float64) for seed in (1, 2))
    gain = torch.tensor([0.0, 1.5], dtype=torch.float64, device=DEVICE) if with_gain else None

    def both(x: Tensor, delta: Tensor, *_: Tensor) -> tuple[Tensor, Tensor]:
        return norms.add_layer_norm(x, delta, norm, gain=gain)

    assert torch.autograd.gradcheck(both, (x, delta, *norm.parameters()), fast_mode=True)


def test_gradients_of_norm_and_query_equal_differences():
    norm = noisy(nn.LayerNorm(5)).double()
    x, delta = (leaf(noise(2, 3, 5, seed=seed), torch.float64) for seed in (1, 2))
    position = leaf(noise(3, 5), torch.float64)

    def outputs(x: Tensor, delta: Tensor, position: Tensor, *_: Tensor) -> tuple[Tensor, ...]:
        out = norms.norm_of_sum(x, delta, norm, position)
        assert out.low is out.full
        return out.full * out.full, out.query

    inputs = (x, delta, position, *norm.parameters())
    assert torch.autograd.gradcheck(outputs, inputs, fast_mode=True)


def test_sum_alone_may_be_used():
    x, delta = leaf(noise(2, 3, 5), torch.float32), leaf(noise(2, 3, 5, seed=2), HALF)
    total, _ = norms.add_layer_norm(x, delta, nn.LayerNorm(5).to(DEVICE))
    assert torch.equal(total, x + delta)
    (total * 3).sum().backward()
    assert torch.equal(x.grad, torch.full_like(x, 3.0))
    assert torch.equal(delta.grad, torch.full_like(delta, 3.0))


def test_outputs_have_the_dtypes_of_autocast():
    """The stream stays float32, and what products read is what autocast would cast it to."""
    norm = noisy(nn.LayerNorm(8))
    x, delta, position = (
        leaf(noise(2, 9, 8), torch.float32),
        leaf(noise(2, 9, 8), HALF),
        noise(9, 8),
    )
    with torch.autocast(DEVICE, HALF):
        total, hidden = norms.add_layer_norm(x, delta, norm)
        out = norms.norm_of_sum(x, delta, norm, position)
        alone = norms.layer_norm(total, norm, for_products=False)
    assert (total.dtype, hidden.dtype) == (torch.float32, HALF)
    assert [y.dtype for y in out] == [torch.float32, HALF, HALF]
    assert torch.equal(out.full, alone)
    torch.testing.assert_close(out.low, out.full.to(HALF), rtol=2**-7, atol=0)
    torch.testing.assert_close(out.query, (out.full + position).to(HALF), rtol=2**-7, atol=1e-6)
    assert torch.equal(hidden, out.low)
    (out.full.sum() + out.low.float().square().sum() + out.query.float().sum()).backward()
    assert (x.grad.dtype, delta.grad.dtype) == (torch.float32, HALF)
    torch.testing.assert_close(delta.grad, x.grad.to(HALF), rtol=2**-7, atol=0)


def test_nothing_is_kept_without_gradients():
    """A prediction writes no sum that nobody reads, and no statistics."""
    norm = nn.LayerNorm(8).to(DEVICE)
    with torch.no_grad():
        out = norms.norm_of_sum(noise(2, 9, 8), noise(2, 9, 8), norm)
    assert out.full.grad_fn is None
    assert out.query is None


def test_group_norm_of_no_images():
    x = torch.zeros(0, 6, 4, requires_grad=True)
    norm = nn.GroupNorm(2, 4)
    out = channels_last.group_norm(x, norm, (2, 3), dtype=torch.float32, relu=True)
    assert out.shape == (0, 6, 4)
    out.sum().backward()
    assert x.grad.shape == (0, 6, 4)
    assert norm.weight.grad.tolist() == norm.bias.grad.tolist() == [0.0] * 4


def plain_group_norm(x, norm, size, relu, coarse, coarse_size):
    y = norm(x.transpose(1, 2).unflatten(2, size))
    if coarse is not None:
        coarse = coarse.transpose(1, 2).unflatten(2, coarse_size)
        y = y + F.interpolate(coarse, size=size, mode="bilinear", align_corners=False)
    y = y.relu() if relu else y
    return y.flatten(2).transpose(1, 2)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float64, HALF])
@pytest.mark.parametrize(
    ("dim", "groups", "size", "coarse_size"),
    [
        (6, 2, (3, 5), None),
        (12, 3, (7, 9), (4, 5)),
        (8, 8, (6, 8), (3, 4)),
        (8, 2, (11, 1), (2, 1)),
        (8, 4, (5, 4), (7, 9)),
    ],
    ids=str,
)
def test_group_norm_equals_float64s(monkeypatch, dtype, dim, groups, size, coarse_size):
    """ReLUs and coarser maps, in blocks smaller than a map and parts of several blocks."""
    monkeypatch.setattr(group_norms, "ELEMENTS", 256)
    monkeypatch.setattr(group_norms, "PARTS", 4)
    exact_norm = noisy(nn.GroupNorm(groups, dim)).double()
    norm = copy.deepcopy(exact_norm).to(torch.promote_types(dtype, torch.float32))
    x = leaf(noise(2, size[0] * size[1], dim) + 1, dtype)
    exact, coarse, exact_coarse, given = leaf(x, torch.float64), None, None, None
    if coarse_size is not None:
        coarse = leaf(noise(2, coarse_size[0] * coarse_size[1], dim, seed=3), dtype)
        exact_coarse, given = leaf(coarse, torch.float64), (coarse, coarse_size)
    relu = coarse_size is None
    out = channels_last.group_norm(x, norm, size, dtype=dtype, relu=relu, coarse=given)
    expected = plain_group_norm(exact, exact_norm, size, relu, exact_coarse, coarse_size)
    grad = noise(*out.shape, seed=4).to(dtype)
    out.backward(grad)
    expected.backward(grad.double())
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, HALF: 6e-3}[dtype]
    assert out.dtype == x.grad.dtype == dtype
    assert_near(out, expected, tolerance)
    assert_near(x.grad, exact.grad, tolerance)
    assert_near(norm.weight.grad, exact_norm.weight.grad, tolerance)
    assert_near(norm.bias.grad, exact_norm.bias.grad, tolerance)
    if coarse is not None:
        assert_near(coarse.grad, exact_coarse.grad, tolerance)


def outputs_and_gradients(
    module: nn.Module, run: Callable[[], list[Tensor]]
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Runs a module and weights what it gives with noise for a loss."""
    module.zero_grad()
    outputs = run()
    sum((out.float() * noise(*out.shape)).sum() for out in outputs).backward()
    found = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
    return [out.detach() for out in outputs], found


def compare(kernels, module: nn.Module, run: Callable[[], list[Tensor]]) -> None:
    """Kernels against the reference in float32, and both in bfloat16 against that."""
    kernels(False)
    expected, gradients = outputs_and_gradients(module, run)
    kernels(True)
    found, found_gradients = outputs_and_gradients(module, run)
    scale = max(grad.norm() for grad in gradients.values())
    for out, exact in zip(found, expected, strict=True):
        assert_near(out, exact, 1e-5)
    assert found_gradients.keys() == gradients.keys()
    for name, grad in gradients.items():  # some are zero but for rounding
        assert (found_gradients[name] - grad).norm() <= 1e-4 * grad.norm() + 1e-6 * scale, name

    def distance(on: bool) -> float:
        kernels(on)
        with torch.autocast(DEVICE, HALF):
            half, half_gradients = outputs_and_gradients(module, run)
        pairs = [*zip(half, expected, strict=True)]
        pairs += [(half_gradients[n], g) for n, g in gradients.items() if g.norm() > 1e-3 * scale]
        errors = [(a.float() - b).norm() / b.norm() for a, b in pairs]
        return torch.stack(errors).mean().item()

    # The interpreter cuts what a GPU rounds, which doubles the error of each cast.
    assert distance(True) < 1.5 * distance(False)


@pytest.mark.slow
@pytest.mark.parametrize("recomputed", [False, True], ids=["kept", "recomputed"])
def test_swin_equals_the_reference(kernels, recomputed):
    """Padded windows and odd maps, stochastic depth of the same draws, and checkpoints."""
    torch.manual_seed(0)
    names = ["res2", "res3", "res4", "res5"]
    swin = SWIN | {"depths": [2, 1, 1, 1], "use_checkpoint": recomputed}
    model = SwinTransformerTTT(out_features=names, drop_path_rate=0.5, **swin).to(DEVICE)
    assert any(isinstance(m, StochasticDepth) for m in model.modules())
    x = noise(3, 4, 30, 43)

    def run() -> list[Tensor]:
        torch.manual_seed(1)
        # detectron2's Swin has a mode for training only in its frozen stages
        return [*model.train()(x).values()]

    compare(kernels, model, run)


@pytest.mark.slow
def test_pixel_decoder_equals_the_reference(kernels):
    decoder = make().to(DEVICE)
    maps = {name: x.to(DEVICE) for name, x in features(24, 40, batch=1).items()}

    def run() -> list[Tensor]:
        mask_features, levels = decoder(maps)
        return [mask_features, *levels]

    compare(kernels, decoder, run)
    kernels(True)
    mask_features, _ = decoder(maps)
    assert mask_features.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.slow
@pytest.mark.parametrize("every_layer", [False, True])
def test_query_decoder_equals_the_reference(kernels, every_layer):
    """All but the flips of attention masks, which rounding decides: levels are almost constant."""
    torch.manual_seed(0)
    decoder = MultiScaleMaskedTransformerDecoder(
        16,
        num_queries=5,
        num_classes=3,
        hidden_dim=16,
        mask_dim=8,
        num_layers=2,
        num_heads=2,
        feedforward=24,
        pre_norm=False,
        enforce_input_project=False,
    ).to(DEVICE)
    levels = [noise(2, 16, *size) for size in ((2, 3), (3, 5), (6, 9))]
    mask_features = noise(2, 8, 12, 18) + 3 * noise(2, 8, 1, 1, seed=2)

    def run() -> list[Tensor]:
        predictions = decoder(levels, mask_features, every_layer=every_layer)
        return [out for prediction in predictions for out in prediction.values()]

    compare(kernels, decoder, run)


def test_hooked_norms_are_called(kernels):
    """ln_adapt measures and replaces what norms give, through hooks."""
    kernels(True)
    merging = FastPatchMerging(4).to(DEVICE)
    x, seen = noise(1, 6, 4), []
    assert fuses_norms(x, merging.norm)
    fused = merging(x, 2, 3)
    with torch.no_grad():
        handle = merging.norm.register_forward_hook(lambda *args: seen.append(args[1][0]))
    hooked = merging(x, 2, 3)
    handle.remove()
    assert [tuple(y.shape) for y in seen] == [(1, 2, 16)]
    torch.testing.assert_close(fused, hooked)
