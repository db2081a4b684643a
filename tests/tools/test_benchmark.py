"""tools/benchmark.py: what it counts, and what it writes."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from ttt_video.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("benchmark", ROOT / "tools/benchmark.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_sampling_is_counted_forward_and_backward(tool):
    """(2, 3, 8, 9) at 5 x 7 points: 4 multiply-adds per value, and twice that for gradients."""
    image = torch.randn(2, 3, 8, 9, requires_grad=True)
    grid = (2 * torch.rand(2, 5, 7, 2) - 1).requires_grad_()
    with tool.GridSampleFlops() as counter:
        sampled = F.grid_sample(image, grid, align_corners=False)
    assert counter.get_total_flops() == 2 * 4 * 2 * 3 * 5 * 7
    with tool.GridSampleFlops() as counter:
        sampled.sum().backward()
    assert counter.get_total_flops() == 2 * (2 * 4 * 2 * 3 * 5 * 7)


def test_attention_is_counted_as_its_two_matrix_products(tool):
    q, k, v = (torch.randn(1, 2, n, 4, requires_grad=True) for n in (6, 5, 5))
    with tool.sdpa_kernel(tool.SDPBackend.MATH), tool.GridSampleFlops() as counter:
        F.scaled_dot_product_attention(q, k, v)
    assert counter.get_total_flops() == 2 * (2 * 2 * 6 * 5 * 4)


def test_training_is_measured_and_written(tool, tmp_path, capsys):
    output = tmp_path / "benchmark.json"
    tool.main(
        ["train", "--config", "quick/joint_cityscapes.yaml", "--size", "32", "64", "--batch", "2",
         "--steps", "2", "--warmup", "0", "--output", str(output),
         "MODEL.DEVICE", "cpu", "DATASETS.TRAIN", "()", "MODEL.SWIN.EMBED_DIM", "8",
         "MODEL.SWIN.NUM_HEADS", "[1, 2, 2, 2]", "SOLVER.MICRO_BATCH_SIZE", "1"]
    )  # fmt: skip
    result = json.loads(output.read_text())
    seconds = result["seconds"]
    assert len(seconds["all"]) == 2
    assert 0 < seconds["min"] <= seconds["median"] <= seconds["max"]
    assert result["peak_memory_bytes"] > 2**20
    assert result["flop"]["reconstruction"] > 1e7
    assert result["flop"]["main_task"] > 1e7
    assert result["environment"]["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert "TFLOP" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--steps", "0"], "--steps is 0"),
        (["--warmup", "-1"], "--warmup is -1"),
        (["--config", "x"], "no config"),
    ],
)
def test_mistakes_are_one_line(tool, args, words):
    config = [] if "--config" in args else ["--config", "quick/joint_cityscapes.yaml"]
    with pytest.raises(UserError, match=words) as error:
        tool.main(["train", *config, *args])
    assert "\n" not in str(error.value)
