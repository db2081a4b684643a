"""tools/measure_norm_statistics.py on a data set of four pictures."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
from torch import nn

from ttt_video.adaptation import head_signal
from ttt_video.errors import UserError
from ttt_video.modeling.weights import read_checkpoint
from ttt_video_cli import call

measure = partial(call, "weights norms")


def test_writes_what_ln_adapt_reads(pictures, tmp_path, capsys):
    file = tmp_path / "norms.safetensors"
    argv = ["--config", "quick/stream_world.yaml", "--dataset", pictures, "--output", str(file)]
    measure([*argv, "--max-images", "2"])
    assert "layers, written to" in capsys.readouterr().out
    two = read_checkpoint(str(file))
    assert {name.rpartition(".")[2] for name in two} == {"mean", "variance"}
    measure(argv)
    all_four = read_checkpoint(str(file))
    assert two.keys() == all_four.keys()
    assert any(not np.array_equal(two[name], all_four[name]) for name in two)


def test_writes_what_learn_on_change_reads(pictures, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(head_signal, "FEWEST", 4)
    norms, head = tmp_path / "norms.safetensors", tmp_path / "head.safetensors"
    config = "quick/stream_world.yaml"
    files = ["--output", str(norms), "--head", str(head)]
    measure(["--config", config, "--dataset", pictures, *files])
    assert "1344 channels of the head, written to" in capsys.readouterr().out
    # The file fits the model, as the one that ships does.
    shipped = read_checkpoint("ttt_video://quick_joint_world_head.safetensors")
    ours = head_signal.read_head(str(head), nn.Module(), 1344).tensors
    assert ours.keys() == shipped.keys()
    assert all(ours[n].shape == t.shape for n, t in shipped.items() if n != "directions")


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--max-images", "0"], "at least 1"),
        (["--dataset", "nowhere"], "unknown data set"),
        (["--dataset", "cityscapes_fine_sem_seg_val"], "cannot be loaded .*DETECTRON2_DATASETS"),
        (["--register", "gone.py"], "--register gone.py: no such file"),
    ],
)
def test_mistakes_are_told_in_a_line(tmp_path, flags, reason):
    argv = ["--config", "quick/stream_world.yaml", "--output", str(tmp_path / "x.safetensors")]
    with pytest.raises(UserError, match=reason):
        measure([*argv, *flags])
