"""The conversion tool, from the command line inwards."""

from __future__ import annotations

import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from ttt_video.errors import UserError
from ttt_video.modeling.weights import (
    load_weights,
    read_checkpoint,
    weights_hash,
    write_checkpoint,
)
from ttt_video_cli import call

TOOL = Path(__file__).parents[2] / "tools" / "convert_weights.py"
convert = partial(call, "weights convert")

WEIGHTS = {
    "backbone.patch_embed.proj.weight": torch.randn(8, 4, 4, 4),
    "backbone.patch_embed.proj.bias": torch.randn(8),
    "sem_seg_head.predictor.class_embed.weight": torch.randn(20, 8),
    "recon_head.predictor.query_feat.weight": torch.randn(48, 8).half(),
    "criterion.empty_weight": torch.ones(20),
}


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "in.pth"
    write_checkpoint(WEIGHTS, path)
    return path


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".pkl"])
def test_converts_to_every_format(source, tmp_path, capsys, suffix):
    out = tmp_path / f"out{suffix}"
    convert([str(source), str(out)])
    assert weights_hash(read_checkpoint(out)) == weights_hash(WEIGHTS)
    assert weights_hash(WEIGHTS) in capsys.readouterr().out


def test_converts_channels(source, tmp_path):
    out = tmp_path / "out.safetensors"
    convert([str(source), str(out), "--channels", "3"])
    assert read_checkpoint(out)["backbone.patch_embed.proj.weight"].shape == (8, 3, 4, 4)


def test_half_precision_is_half_the_file_and_loads_as_the_rounded_values(tmp_path, capsys):
    source, out = tmp_path / "in.pth", tmp_path / "out.safetensors"
    weights = {"weight": torch.tensor([[1.0, 1 / 3], [-2049.0, 1e-3]]), "bias": torch.ones(2)}
    write_checkpoint({**weights, "count": torch.tensor([70_000])}, source)
    convert([str(source), str(out), "--half"])
    assert "(float16, int64)" in capsys.readouterr().out
    written = read_checkpoint(out)
    assert written.pop("count").item() == 70_000
    model = torch.nn.Linear(2, 2)
    load_weights(model, written)
    assert model.weight.dtype == torch.float32
    expected = [[1.0, 1365 / 4096], [-2048.0, 1049 / 2**20]]  # 11 bits, ties to even
    assert model.weight.tolist() == expected


def test_values_beyond_half_precision_are_one_line(tmp_path):
    source, out = tmp_path / "in.pth", tmp_path / "out.safetensors"
    write_checkpoint({"w": torch.tensor([1.0, -7e4])}, source)
    with pytest.raises(UserError, match="w has values up to 7e\\+04, beyond fp16"):
        convert([str(source), str(out), "--half"])
    assert not out.exists()


def test_inspect_describes(source, capsys):
    convert(["--inspect", str(source)])
    said = dict(
        (part.strip() for part in (line[:13], line[13:]))
        for line in capsys.readouterr().out.splitlines()
    )
    assert said["tensors"] == "5 (float16, float32)"
    assert said["encoder f"] == "0.00 M in 2 tensors"
    assert said["decoder g"] == "0.00 M in 1 tensor"
    assert said["channels"] == "4"
    assert said["classes"] == "19"
    assert said["sha256"] == weights_hash(WEIGHTS)
    assert "not finite" not in said


def test_inspect_knows_the_parts_of_a_vision_transformer(tmp_path, capsys):
    path = tmp_path / "vit.safetensors"
    weights = {
        "cls_token": torch.zeros(1, 1, 8), "blocks.0.norm1.weight": torch.zeros(8),
        "mask_token": torch.zeros(1, 1, 4), "decoder_pred.bias": torch.zeros(12),
        "classifier_pred.weight": torch.zeros(10, 8), "stray": torch.zeros(1),
    }  # fmt: skip
    write_checkpoint(weights, path)
    convert(["--inspect", str(path)])
    said = capsys.readouterr().out
    assert [line.split(" in ")[1] for line in said.splitlines() if " in " in line] == [
        "2 tensors", "1 tensor", "2 tensors", "1 tensor",
    ]  # fmt: skip
    assert [line.split("  ")[1] for line in said.splitlines() if line.startswith("  ")] == [
        "encoder f", "head h", "decoder g", "other",
    ]  # fmt: skip
    assert "classes      10" in said


def test_inspect_finds_values_that_are_not_finite(tmp_path, capsys):
    path = tmp_path / "bad.safetensors"
    write_checkpoint({"w": torch.tensor([1.0, float("nan")])}, path)
    convert(["--inspect", str(path)])
    assert "1 tensor, such as w" in capsys.readouterr().out


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(TOOL), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_bad_input_is_one_line_and_exit_code_2(source, tmp_path):
    kept = source.read_bytes()
    result = run(source, source)
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1] == (
        f"error: {source} exists; give another name or --overwrite"
    )
    assert source.read_bytes() == kept

    with pytest.raises(SystemExit, match="2"):
        convert([str(source)])  # no OUT
    with pytest.raises(SystemExit, match="2"):
        convert(["--inspect", str(source), "--channels", "3"])
    with pytest.raises(SystemExit, match="2"):
        convert(["--inspect", str(source), "--half"])


def test_overwrites_when_asked(source):
    convert([str(source), str(source), "--channels", "3", "--overwrite"])
    assert read_checkpoint(source)["backbone.patch_embed.proj.weight"].shape[1] == 3
