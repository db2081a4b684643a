"""The CPU's window attention against the reference of the Swin block, and where it runs."""

from __future__ import annotations

import pytest
import torch
from window_blocks import (
    CASES,
    attention,
    check_against_float64,
    gradients,
    make_block,
    noise,
    reference,
)

from ttt_video.modeling import large_layers, window_attention_cpu
from ttt_video.modeling.kernels import VARIABLE
from ttt_video.modeling.window_attention_cpu import HEAD_DIM, window_attention
from ttt_video.modeling.windows import shift_mask

OTHERS = {
    "wide rows": (1, (13, 14), 2, 12, 6, True),  # of a whole number of vectors
    "rows of padding alone": (1, (8, 15), 2, 7, 0, True),
}


@pytest.mark.parametrize("case", [*CASES.values(), *OTHERS.values()], ids=[*CASES, *OTHERS])
def test_equals_the_reference_in_float64(case):
    check_against_float64(window_attention, case, HEAD_DIM)


@pytest.mark.parametrize("scale", [0.0, 1e-3, 30.0, 1e4])
def test_logits_of_any_size(scale):
    """Small logits have equal weights, and of huge ones the largest alone has any."""
    block, size = make_block(1, HEAD_DIM, 3, 1), (5, 7)
    qkv = scale * noise(1, 35, 3 * HEAD_DIM)
    found, expected = attention(window_attention, block, qkv, size), reference(block, qkv, size)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * max(scale, 1.0))


@pytest.mark.parametrize("part", [0, 1, 2], ids=["query", "key", "value"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_window_that_is_not_finite_stays_so_and_alone(bad, part):
    block, size = make_block(2, HEAD_DIM, 3, 0), (6, 6)
    qkv = noise(1, 36, 6 * HEAD_DIM)
    qkv[0, 0, part * 2 * HEAD_DIM] = bad  # in the first head, of the first of four windows
    qkv.requires_grad_()
    out = attention(window_attention, block, qkv, size)
    of_qkv = gradients(block, qkv, out)["qkv"]
    expected = reference(block, qkv, size)
    of_expected = gradients(block, qkv, expected)["qkv"]
    assert torch.equal(out.isfinite(), expected.isfinite())
    assert not out.isfinite().all()
    window = torch.zeros(6, 6, dtype=torch.bool)
    window[:3, :3] = True
    assert of_qkv[0, ~window.flatten()].isfinite().all()
    assert of_expected[0, ~window.flatten()].isfinite().all()
    assert not of_qkv[0, window.flatten()].isfinite().all()


def test_maps_that_are_not_contiguous_and_tables_that_do_not_learn():
    block, size = make_block(2, HEAD_DIM, 3, 1), (5, 4)
    block.attn.relative_position_bias_table.requires_grad_(False)
    block.attn.qkv.bias.requires_grad_(False)
    results = []
    for run in (lambda *a: attention(window_attention, *a), reference):
        wide = noise(2, 6 * HEAD_DIM, 20).requires_grad_()
        out = run(block, wide.transpose(1, 2), size)
        grad = noise(2, 2 * HEAD_DIM, 20, seed=2).transpose(1, 2)
        results.append((out, *torch.autograd.grad(out, wide, grad)))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


def test_threads_change_no_number(monkeypatch):
    block, size = make_block(3, HEAD_DIM, 3, 1), (5, 4)
    qkv = noise(2, 20, 9 * HEAD_DIM).requires_grad_()
    results = []
    for threads in (1, 2, 8):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        out = attention(window_attention, block, qkv, size)
        results.append([out, *gradients(block, qkv, out).values()])
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


def test_blocks_run_it_where_they_are_large(monkeypatch):
    calls: list[object] = []
    real = window_attention

    def counted(*arguments, **sizes):
        calls.append(arguments)
        return real(*arguments, **sizes)

    monkeypatch.setattr(window_attention_cpu, "window_attention", counted)
    monkeypatch.setattr(large_layers, "LEAST", 30 * 96 * 32)
    monkeypatch.setattr(large_layers, "LEAST_SIDE", 32)
    block = make_block(1, HEAD_DIM, 4, 2)

    def used(block, height: int = 6) -> bool:
        calls.clear()
        block.H, block.W = height, 5
        dim = block.attn.dim
        x = noise(1, height * 5, dim)
        with torch.no_grad():
            found = block(x, shift_mask(height, 5, 4, 2, x.device))
            monkeypatch.setenv(VARIABLE, "off")
            expected = block(x, shift_mask(height, 5, 4, 2, x.device))
            monkeypatch.delenv(VARIABLE)
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
        return bool(calls)

    assert used(block)
    assert not used(block, 5)  # too small
    assert not used(make_block(2, HEAD_DIM // 2, 4, 2))  # other heads
    block.train().attn.attn_drop.p = 0.5
    block.H, block.W = 6, 5
    calls.clear()
    block(noise(1, 30, HEAD_DIM), shift_mask(6, 5, 4, 2, torch.device("cpu")))
    assert not calls
    with torch.autocast("cpu", torch.bfloat16):
        block.eval()(noise(1, 30, HEAD_DIM), shift_mask(6, 5, 4, 2, torch.device("cpu")))
    assert not calls
