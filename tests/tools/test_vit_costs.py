"""tools/measure_costs.py on a ViTMAE: its operations are those that sizes give by hand."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
from tiny import TINY_VIT, VIT_SIDE

ROOT = Path(__file__).resolve().parents[2]
COPIES = 3

# The sizes of TINY_VIT: 16 patches of 8 px, of which a step shows 4.
PATCHES, SHOWN, VALUES = 16, 4, 3 * 8**2
ENCODER, DECODER, HEAD = (24, 2), (16, 1), (12, 1)


def linear(tokens: int, width: int, depth: int) -> int:
    """Operations of the layers of blocks, with weights of 12 width**2: 2 for a multiply-add."""
    return depth * tokens * 2 * 12 * width**2


def attention(tokens: int, width: int, depth: int) -> int:
    """Operations of the two products of attention: scores, and means of the values."""
    return depth * 2 * 2 * tokens**2 * width


EMBEDDING = 2 * PATCHES * VALUES * ENCODER[0]
PREDICTION = (
    EMBEDDING
    + linear(1 + PATCHES, *ENCODER)
    + attention(1 + PATCHES, *ENCODER)
    + 2 * (1 + PATCHES) * ENCODER[0] * HEAD[0]
    + linear(1 + PATCHES, *HEAD)
    + attention(1 + PATCHES, *HEAD)
    + 2 * HEAD[0] * 5
)
# A moving layer costs three times its forward pass; one that holds still has no gradient of its
# weights, and the image none of its pixels. Both factors of a product of attention have one.
STEP = COPIES * (
    2 * EMBEDDING
    + 3 * linear(1 + SHOWN, *ENCODER)
    + 3 * attention(1 + SHOWN, *ENCODER)
    + 2 * 2 * (1 + SHOWN) * ENCODER[0] * DECODER[0]
    + 2 * linear(1 + PATCHES, *DECODER)
    + 3 * attention(1 + PATCHES, *DECODER)
    + 2 * 2 * (1 + PATCHES) * DECODER[0] * VALUES
)


@pytest.mark.parametrize(
    ("command", "batch", "flop"), [("predict", 1, PREDICTION), ("step", COPIES, STEP)]
)
def test_operations_by_hand(command, batch, flop, tmp_path, capsys):
    place = ROOT / "tools/measure_costs.py"
    spec = importlib.util.spec_from_file_location("measure_costs", place)
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    file = tmp_path / "cost.json"
    flags = ["--config", "Base-ViTMAE.yaml", "--size", str(VIT_SIDE), str(VIT_SIDE), "--no-peers"]
    flags += ["--batch", str(batch), "--steps", "1", "--warmup", "0", "--output", str(file)]
    tool.main([command, *flags, *TINY_VIT])
    (case,) = json.loads(file.read_text())["results"][command]["cases"]
    assert case["runs"]["ttt_video"]["flop"] == flop
    assert f"{flop / 1e12:.4f} TFLOP" in capsys.readouterr().out
