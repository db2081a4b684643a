"""Triton's window attention against the reference of the Swin block, in float64."""

from __future__ import annotations

import copy

import pytest
import torch
import window_blocks
from torch import Tensor
from window_blocks import CASES, check_against_float64, gradients, reference

from ttt_video.modeling.backbone import FastSwinBlock, SwinTransformerTTT
from ttt_video.modeling.kernels import VARIABLE
from ttt_video.modeling.windows import shift_mask

kernel = pytest.importorskip("ttt_video.modeling.kernels.window_attention")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # the interpreter's
FEW = kernel.Launch(programs=4, warps=4, stages=1)  # each walks over several windows


def noise(*size: int, seed: int = 1) -> Tensor:
    return window_blocks.noise(*size, seed=seed).to(DEVICE)


def make_block(*settings: int):
    return window_blocks.make_block(*settings).to(DEVICE)


def attention(block: FastSwinBlock, qkv: Tensor, size: tuple[int, int], **options) -> Tensor:
    return window_blocks.attention(kernel.window_attention, block, qkv, size, **options)


@pytest.mark.slow
@pytest.mark.parametrize("head_dim", [4, pytest.param(24, marks=pytest.mark.slow), 32])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_equals_the_reference_in_float64(case, head_dim):
    options = {"forward": FEW, "backward": FEW}
    check_against_float64(kernel.window_attention, case, head_dim, DEVICE, **options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_errs_as_little_as_the_reference(dtype):
    """Both against float64; table and fill stay float32, as under autocast.

    Triton's interpreter truncates to bfloat16, which errs twice as much as rounding.
    """
    factor = 2.2 if dtype == torch.bfloat16 and DEVICE == "cpu" else 1.3
    size, side = (5, 7), 3
    block = make_block(1, 8, side, 1)
    exact = copy.deepcopy(block).double()
    qkv = noise(1, 35, 24).to(dtype).requires_grad_()
    qkv64 = qkv.detach().double().requires_grad_()
    expected = reference(exact, qkv64, size)
    expected_grads = gradients(exact, qkv64, expected)

    errors = []
    for run in (attention, reference):
        out = run(block, qkv, size)
        assert out.dtype == dtype
        results = {"out": out, **gradients(block, qkv, out)}
        truth = {"out": expected, **expected_grads}
        errors.append(
            {
                name: ((result.double() - truth[name]).norm() / truth[name].norm()).item()
                for name, result in results.items()
            }
        )
    ours, plain = errors
    for name, error in ours.items():
        assert 0 < error < factor * plain[name], name


@pytest.mark.skipif(DEVICE != "cpu", reason="the kernels take no float64 on a GPU")
def test_gradcheck():
    """Padded and shifted: every gradient against differences."""
    block = make_block(1, 2, 2, 1).double()

    def run(qkv, table, fill):
        options = {"height": 3, "width": 2, "side": 2, "shift": 1, "heads": 1, "scale": 0.7}
        return kernel.window_attention(qkv, table, fill, **options, forward=FEW, backward=FEW)

    inputs = (
        noise(1, 6, 6).double().requires_grad_(),
        block.attn.relative_position_bias_table,
        block.attn.qkv.bias,
    )
    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)


@pytest.mark.slow
def test_sums_repeat_whatever_the_number_of_programs():
    """More programs than windows are not started, and one program takes all windows."""
    block = make_block(1, 8, 3, 1)
    qkv = noise(1, 35, 24).requires_grad_()
    results = []
    for programs in (1, 4, 1000):
        launch = kernel.Launch(programs, warps=4, stages=1)
        out = attention(block, qkv, (5, 7), forward=launch, backward=launch)
        results.append((out, gradients(block, qkv, out)))
    for out, grads in results[1:]:
        assert torch.equal(out, results[0][0])
        assert torch.equal(grads["qkv"], results[0][1]["qkv"])
        for name in ("table", "fill"):
            torch.testing.assert_close(grads[name], results[0][1][name], rtol=1e-5, atol=1e-4)


def count_calls(monkeypatch) -> list[tuple[int, ...]]:
    """The shapes that the kernel is called with from now on."""
    shapes = []
    plain = kernel.window_attention

    def counting(qkv, *args, **options):
        shapes.append(tuple(qkv.shape))
        return plain(qkv, *args, **options)

    monkeypatch.setattr(kernel, "window_attention", counting)
    return shapes


@pytest.mark.slow
@pytest.mark.parametrize("shift", [0, 2])
def test_block_runs_the_kernel_where_kernels_are_on(monkeypatch, shift):
    shapes = count_calls(monkeypatch)
    block = make_block(2, 8, 4, shift)
    block.H, block.W = 6, 5
    x = noise(2, 30, 16)
    mask = shift_mask(6, 5, 4, shift, x.device)
    results = []
    for choice in ("off", "on"):
        monkeypatch.setenv(VARIABLE, choice)
        block.zero_grad()
        out = block(x, mask)
        out.square().sum().backward()
        results.append((out, {n: p.grad.clone() for n, p in block.named_parameters()}))
        assert len(shapes) == (choice == "on")
    (expected, expected_grads), (out, grads) = results
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-3)
    for name, grad in grads.items():
        error = (grad - expected_grads[name]).abs().max() / expected_grads[name].abs().max()
        assert error < 1e-5, name


@pytest.mark.parametrize(
    ("side", "width", "dtype", "drop"),
    [
        (9, 4, torch.float32, 0.0),
        (3, 33, torch.float32, 0.0),
        (3, 4, torch.float64, 0.0),
        (3, 4, torch.float32, 0.5),
    ],
    ids=["large windows", "wide heads", "float64", "dropout"],
)
def test_block_falls_back_to_the_reference(monkeypatch, side, width, dtype, drop):
    shapes = count_calls(monkeypatch)
    monkeypatch.setenv(VARIABLE, "on")
    block = make_block(1, width, side, 1).to(dtype).train()
    block.attn.attn_drop.p = drop
    block.H, block.W = 4, 5
    mask = shift_mask(4, 5, side, 1, torch.device(DEVICE))
    assert block(noise(1, 20, width).to(dtype), mask.to(dtype)).isfinite().all()
    assert not shapes
    block.eval()
    block(noise(1, 20, width).to(dtype), mask.to(dtype))
    assert len(shapes) == (drop > 0)  # in eval mode nothing is dropped


@pytest.mark.slow
def test_swin_has_the_features_and_gradients_of_the_reference(monkeypatch):
    """Under checkpointing too, which runs the forward pass twice."""
    shapes = count_calls(monkeypatch)
    torch.manual_seed(0)
    swin = SwinTransformerTTT(
        out_features=["res2", "res3", "res4", "res5"],
        in_chans=4,
        embed_dim=4,
        depths=[2, 1, 1, 1],
        num_heads=[1, 1, 1, 2],
        window_size=4,
        drop_path_rate=0.0,
        use_checkpoint=True,
    ).to(DEVICE)
    swin.train()
    x = noise(1, 4, 20, 24)
    results = []
    for choice in ("off", "on"):
        monkeypatch.setenv(VARIABLE, choice)
        swin.zero_grad()
        features = swin(x)
        sum((f * noise(*f.shape)).sum() for f in features.values()).backward()
        results.append((features, {n: p.grad.clone() for n, p in swin.named_parameters()}))
    assert len(shapes) == 10
    (expected, expected_grads), (features, grads) = results
    torch.testing.assert_close(features, expected, rtol=0, atol=1e-5)
    for name, grad in grads.items():
        scale = expected_grads[name].abs().max().clamp(min=1e-3)
        torch.testing.assert_close(
            grad / scale, expected_grads[name] / scale, rtol=0, atol=1e-4, msg=name
        )
