"""tools/measure_gradients.py on a data set of four pictures."""

from __future__ import annotations

from functools import partial

import pytest

from ttt_video.adaptation import build_adapter
from ttt_video.config import load_config
from ttt_video.errors import UserError
from ttt_video.modeling.weights import read_checkpoint
from ttt_video.stream import load_source_model
from ttt_video_cli import call

measure = partial(call, "weights gradients")
CONFIG = "quick/stream_world.yaml"


def test_the_preset_in_these_units_says_that_they_are_missing(pictures, tmp_path, caplog):
    cfg = load_config(CONFIG, "realtime", ["TTT.OPTIMIZER.SOURCE_GRADIENTS", ""])
    build_adapter(cfg, load_source_model(cfg))
    assert "SOURCE_GRADIENTS names none: measure them by" in caplog.text
    caplog.clear()
    file = tmp_path / "gradients.safetensors"
    argv = ["--config", CONFIG, "--dataset", pictures, "--output", str(file), "--batches", "1"]
    measure([*argv, "--preset", "realtime"])
    cfg = load_config(CONFIG, "realtime", ["TTT.OPTIMIZER.SOURCE_GRADIENTS", str(file)])
    build_adapter(cfg, load_source_model(cfg))
    assert "SOURCE_GRADIENTS" not in caplog.text


def test_writes_what_a_stream_reads(pictures, tmp_path, capsys):
    file = tmp_path / "gradients.safetensors"
    argv = ["--config", CONFIG, "--dataset", pictures, "--output", str(file), "--batches", "2"]
    measure([*argv, "TTT.BATCH_SIZE", "2"])
    assert "tensors, written to" in capsys.readouterr().out
    sizes = read_checkpoint(str(file))
    assert all(size.shape == () and size >= 0 for size in sizes.values())
    opts = ["TTT.OPTIMIZER.NAME", "SGD", "TTT.OPTIMIZER.SOURCE_GRADIENTS", str(file)]
    cfg = load_config(CONFIG, opts=opts)
    adapter = build_adapter(cfg, load_source_model(cfg))
    moving = {name for name, p in adapter.model.named_parameters() if p.requires_grad}
    assert sizes.keys() == moving
    assert any(name.startswith("recon_head.") for name in moving)
    # Another loss has gradients of another size, and none of g.
    cfg = load_config(CONFIG, opts=opts, method="tent")
    with pytest.raises(UserError, match=r"gradients of recon_head.*another method's"):
        build_adapter(cfg, load_source_model(cfg))


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--batches", "0"], "at least 1"),
        (["--dataset", "nowhere"], "unknown data set"),
        (["--method", "none"], "takes no gradient step"),
    ],
)
def test_mistakes_are_told_in_a_line(tmp_path, flags, reason):
    argv = ["--config", CONFIG, "--output", str(tmp_path / "x.safetensors")]
    with pytest.raises(UserError, match=reason):
        measure([*argv, *flags])
