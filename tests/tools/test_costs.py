"""Clocks and counters of the benchmark, against hand arithmetic."""

from __future__ import annotations

import math
import mmap
import statistics
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from costs.clock import Stages, measure, peak_memory, reset_peak_memory, spread
from costs.comparison import OURS, Options, compare, difference
from costs.environment import matmul_peak
from costs.flops import GridSampleFlops, count_flops, parameter_bytes, saved_bytes
from torch import nn

from ttt_video.adaptation import SlidingWindow, build_adapter
from ttt_video.modeling.deformable_attention import deformable_attention, sampled_attention

CPU = torch.device("cpu")


# ---- operations and bytes


def test_sampling_is_counted_forward_and_backward():
    """(2, 3, 8, 9) at 5 x 7 points: 4 multiply-adds per value, and twice that for gradients."""
    image = torch.randn(2, 3, 8, 9, requires_grad=True)
    grid = (2 * torch.rand(2, 5, 7, 2) - 1).requires_grad_()
    with GridSampleFlops() as counter:
        sampled = F.grid_sample(image, grid, align_corners=False)
    assert counter.get_total_flops() == 2 * 4 * 2 * 3 * 5 * 7
    with GridSampleFlops() as counter:
        sampled.sum().backward()
    assert counter.get_total_flops() == 2 * (2 * 4 * 2 * 3 * 5 * 7)


def test_deformable_attention_is_counted_the_same_by_loops_and_by_grid_sample():
    """2 images, 5 queries, 3 heads, 2 levels, 4 points, 6 channels: 4 multiply-adds each."""
    shapes = ((2, 3), (1, 2))
    value, weights = torch.randn(2, 8, 3, 6), torch.rand(2, 5, 3, 2, 4)
    locations = torch.rand(2, 5, 3, 2, 4, 2)
    expected = 2 * 4 * 2 * 5 * 3 * 2 * 4 * 6
    assert count_flops(lambda: deformable_attention(value, shapes, locations, weights)) == expected
    plain = count_flops(lambda: sampled_attention(value, shapes, locations, weights))
    assert plain == expected
    for tensor in (value, locations, weights):
        tensor.requires_grad_()
    for attention in (deformable_attention, sampled_attention):
        out = attention(value, shapes, locations, weights)
        assert count_flops(lambda out=out: out.sum().backward()) == 2 * expected


def test_attention_is_counted_as_its_two_matrix_products():
    q, k, v = (torch.randn(1, 2, n, 4, requires_grad=True) for n in (6, 5, 5))
    flops = count_flops(lambda: F.scaled_dot_product_attention(q, k, v))
    assert flops == 2 * (2 * 2 * 6 * 5 * 4)


def test_a_linear_layer_is_counted_forward_and_backward():
    """(6, 3) by (3, 5): the product, and one for each of its two gradients."""
    layer, x = nn.Linear(3, 5), torch.randn(6, 3, requires_grad=True)
    assert count_flops(lambda: layer(x).sum().backward()) == 3 * (2 * 6 * 3 * 5)


def test_bytes_kept_for_the_backward_pass():
    """sigmoid keeps its 7 outputs, the layer its 4 inputs; the weights are the model's own."""
    layer, x = nn.Linear(4, 7), torch.randn(1, 4)
    assert saved_bytes(lambda: layer(x).sigmoid(), layer) == 4 * (4 + 7)


def test_bytes_of_parameters_by_part():
    model = nn.ModuleDict({"a": nn.Linear(3, 5), "b": nn.ReLU(), "c": nn.Linear(2, 1).half()})
    assert parameter_bytes(model) == {"a": 4 * (3 * 5 + 5), "c": 2 * (2 + 1)}


# ---- clocks


def test_spread_of_four_values():
    found = spread([4.0, 1.0, 2.0, 3.0])
    assert found["all"] == [4.0, 1.0, 2.0, 3.0]
    assert (found["min"], found["median"], found["max"]) == (1.0, 2.5, 4.0)
    assert (found["lower_quartile"], found["upper_quartile"]) == (1.75, 3.25)
    assert spread([2.0])["upper_quartile"] == 2.0


def test_works_are_called_in_turn():
    calls = []
    works = {name: lambda name=name: calls.append(name) for name in "ab"}
    runs = measure(works, CPU, steps=2, warmup=1)
    assert calls == ["a", "b"] * 3
    assert all(len(run["seconds"]["all"]) == 2 for run in runs.values())


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a peak cannot be reset")
def test_peak_memory_is_that_of_the_work():
    """256 MiB that come and go count for this work, and not for the next."""
    before = reset_peak_memory(CPU)
    with mmap.mmap(-1, 2**28) as work:  # a tensor might get pages that the process has already
        np.frombuffer(work, np.uint8)[:] = 1
        assert peak_memory(CPU) - before > 128 * 2**20  # the system may take others meanwhile
    before = reset_peak_memory(CPU)
    assert peak_memory(CPU) - before < 128 * 2**20


def test_stages_of_a_step_are_all_there_in_their_order(tiny_cfg, tiny_model, make_video):
    adapter = build_adapter(tiny_cfg, tiny_model)
    window = SlidingWindow(3)
    window.push(make_video()[0])
    stages = Stages(CPU)
    with stages.watch(tiny_model, "recon_head", adapter.optimizer):
        adapter.adapt(window, torch.Generator().manual_seed(0))
    assert list(stages.seconds) == [
        "other",
        "backbone, forward",
        "pixel decoder, forward",
        "query decoder, forward",
        "loss",
        "query decoder, backward",
        "pixel decoder, backward",
        "backbone, backward",
        "optimizer",
    ]
    assert all(seconds > 0 for seconds in stages.seconds.values())
    assert math.isclose(sum(stages.shares().values()), 1.0)
    counted = dict(stages.seconds)
    adapter.adapt(window, torch.Generator().manual_seed(0))  # nobody watches any more
    assert stages.seconds == counted


def test_backward_stages_end_where_their_part_ends():
    """A part that sleeps on its way back is the one that gets the time."""

    class Slow(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            torch.ones(400, 400).matrix_power(200)
            return grad

    class Backbone(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1))

        def forward(self, x):
            early = Slow.apply(x * self.scale)
            return {"early": early, "late": Slow.apply(early)}

    class Sum(nn.Module):
        def forward(self, features):
            return [features["late"] + features["early"]]

    class Take(nn.Module):
        def forward(self, levels):
            return {"pred_masks": 2 * levels[0]}

    model = nn.ModuleDict(
        {"backbone": Backbone(), "g": nn.ModuleDict({"pixel_decoder": Sum(), "predictor": Take()})}
    )
    stages = Stages(CPU)
    with stages.watch(model, "g"):
        out = model["backbone"](torch.ones(1))
        model["g"]["predictor"](model["g"]["pixel_decoder"](out))["pred_masks"].sum().backward()
    backward = {name: s for name, s in stages.seconds.items() if name.endswith("backward")}
    assert backward["backbone, backward"] > 10 * backward["pixel decoder, backward"]


# ---- comparisons


def test_what_differs_is_not_compared():
    x = torch.randn(100)
    assert difference(x, x + 1e-7, "x") < 1e-5
    with pytest.raises(RuntimeError, match="the masks differs"):
        difference(x, x.roll(1), "the masks")


def test_what_is_not_finite_is_not_compared():
    x = torch.randn(100)
    with pytest.raises(RuntimeError, match="differs"):
        difference(x, x / 0, "x")


def test_speed_is_operations_over_seconds():
    a, b = torch.randn(30, 40), torch.randn(40, 50)
    result = compare(
        {OURS: lambda: a @ b, "twice": lambda: (a @ b, a @ b)}, CPU, Options(((1, 1),))
    )
    runs = result["runs"]
    assert runs[OURS]["flop"] == 2 * 30 * 40 * 50
    assert runs["twice"]["flop"] == 2 * runs[OURS]["flop"]
    for run in runs.values():
        assert math.isclose(run["flop_per_second"], run["flop"] / run["seconds"]["median"])
        share = run["flop_per_second"] / result["matmul_flop_per_second"]
        assert math.isclose(run["share_of_peak"], share)
    ratios = result["speedup"]["twice"]["all"]
    assert ratios == [
        b / a for a, b in zip(*(run["seconds"]["all"] for run in runs.values()), strict=True)
    ]
    rounds = zip(*(run["cpu_seconds"] for run in runs.values()), strict=True)
    found = result["cpu_speedup"]["twice"]
    assert math.isclose(found["mean"], statistics.fmean(b / a for a, b in rounds))
    assert found["interval"][0] <= found["mean"] <= found["interval"][1]


def test_cases_are_every_size_batch_and_precision():
    options = Options(((1, 2), (3, 4)), precisions=("fp32", "bf16"))
    found = [(*c["size"], c["batch"], c["precision"]) for c in options.cases(batch=5)]
    assert found == [
        (1, 2, 5, "fp32"), (1, 2, 5, "bf16"), (3, 4, 5, "fp32"), (3, 4, 5, "bf16")
    ]  # fmt: skip
    assert {c["batch"] for c in Options(((1, 2),), batches=(7,)).cases(batch=5)} == {7}


def test_matrix_products_have_a_speed():
    assert 1e6 < matmul_peak(CPU, "fp32", 64) < 1e15
