"""What a summary says of the run, beside its numbers."""

from __future__ import annotations

import pytest

from ttt_video.config import load_config
from ttt_video.stream.directory import RunDirectory
from ttt_video.stream.summary import write_summary


@pytest.mark.parametrize(
    ("config", "opts", "expected"),
    [
        ("baselines/segformer_b4.yaml", [], ("SegFormer", [3, 8, 27, 3])),
        ("baselines/deeplab_v3_plus.yaml", ["MODEL.RESNETS.DEPTH", "50"], ("DeepLabV3Plus", [50])),
        ("quick/stream_world.yaml", [], ("MaskFormerTTT", [2, 2, 2, 2])),
        ("quick/stream_world.yaml", ["MODEL.META_ARCHITECTURE", "Other"], ("Other", None)),
    ],
)
def test_architecture_and_its_size(config, opts, expected, tmp_path):
    cfg = load_config(config, opts=opts)
    run = RunDirectory(tmp_path)
    summary = write_summary(run, cfg, [], dataset_name="", complete=True)
    assert (summary["architecture"], summary["depths"]) == expected
