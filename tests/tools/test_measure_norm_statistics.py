"""tools/measure_norm_statistics.py on a data set of four pictures."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest

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
