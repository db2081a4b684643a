"""Both losses of one frame through gradient steps on it, and the command that shows them."""

from __future__ import annotations

import json
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from ttt_video.adaptation import build_adapter
from ttt_video.config import load_config
from ttt_video.errors import UserError
from ttt_video.locality import follow_steps
from ttt_video.stream import load_source_model
from ttt_video_cli import call

steps = partial(call, "steps")
SMALL = ["TTT.BATCH_SIZE", "2", "INPUT.MIN_SIZE_TEST", "0"]
# On noise, units of the training images' gradients make a step that goes somewhere.
STEP = ["TTT.CROP.RESIZE", "1.0"]


def test_losses_are_those_of_a_frame_and_the_weights_come_back():
    cfg = load_config("quick/stream_world.yaml", opts=[*SMALL, *STEP])
    adapter = build_adapter(cfg, load_source_model(cfg))
    rng = torch.Generator().manual_seed(0)
    image = torch.randint(256, (3, 64, 96), generator=rng, dtype=torch.uint8)
    frame = {"image": image, "video_id": "a", "frame_index": 3}
    labels = (torch.arange(64)[:, None] // 32).expand(64, 96).clone()
    before = {name: p.detach().clone() for name, p in adapter.model.named_parameters()}
    found = follow_steps(cfg, adapter, {**frame, "sem_seg": labels}, frame, [4, 0, 1])
    assert all(torch.equal(before[name], p) for name, p in adapter.model.named_parameters())
    assert (found.video_id, found.frame_index) == ("a", 3)
    assert [*found.recon_loss] == [*found.main_loss] == [*found.reconstructions] == [0, 1, 4]
    assert found.recon_loss[4] < found.recon_loss[1] < found.recon_loss[0]
    assert len(set(found.main_loss.values())) == 3
    # RGB, masked patches black, as many as the mask ratio says.
    np.testing.assert_array_equal(found.image, image.permute(1, 2, 0).numpy())
    shown = (found.masked != 0).any(-1)
    np.testing.assert_array_equal(found.masked[shown], found.image[shown])
    assert np.mean(~shown) == pytest.approx(cfg.TTT.MASK_RATIO, abs=0.05)
    again = follow_steps(cfg, adapter, {**frame, "sem_seg": labels}, frame, [0])
    assert again.recon_loss[0] == found.recon_loss[0]
    assert again.main_loss[0] == found.main_loss[0]


@pytest.fixture
def dataset(tmp_path, monkeypatch):
    words = ["--layout", "kitti_step", "--seed", "1700", "--frames", "2", "--names", "0002"]
    size = ["--height", "64", "--width", "96", "--output", str(tmp_path / "kitti_step")]
    call("world", [*words, *size])
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    return "kitti_step_video_sem_seg_val"


def test_the_command_writes_a_picture_and_numbers(dataset, tmp_path, capsys):
    words = ["--steps", "0", "1", "--dataset", dataset, "--frame", "1"]
    words += ["--output", str(tmp_path / "out")]
    steps([*words, *SMALL])
    found = json.loads((tmp_path / "out/steps.json").read_text())
    assert (found["video_id"], found["frame_index"], [*found["steps"]]) == ("0002", 1, ["0", "1"])
    with Image.open(tmp_path / "out/steps.png") as picture:
        assert picture.width == 4 * 304 + 4  # the frame, its masked input, two reconstructions
    assert f"{found['steps']['1']['main_loss']:.4f}" in capsys.readouterr().out
    for flags, reason in (
        ([], "is not empty"),
        (["--frame", "9"], "video 0002 has no frame of that number"),
        (["--video", "x"], "--video 'x' is not in"),
        (["--frame", "-1"], "count from 0, and -1"),
        (["TTT.METHOD", "tent"], "has no reconstruction"),
    ):
        with pytest.raises(UserError, match=reason):
            steps([*words, *flags, *SMALL])
