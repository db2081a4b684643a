"""Measured gradients are autograd's, and the command writes what they say."""

from __future__ import annotations

import json
from functools import partial

import numpy as np
import pytest
import torch

from ttt_video.adaptation import build_adapter
from ttt_video.config import load_config
from ttt_video.errors import UserError
from ttt_video.locality import measure_gradients
from ttt_video.stream import load_source_model
from ttt_video.structures import video_seed
from ttt_video_cli import call

locality = partial(call, "locality")
SMALL = ["TTT.BATCH_SIZE", "2", "INPUT.MIN_SIZE_TEST", "0"]
FLAGS = ["--windows", "1", "2", "--lags", "1", "2", "--masks", "2"]


@pytest.fixture
def adapter():
    cfg = load_config("quick/stream_world.yaml", opts=SMALL)
    return build_adapter(cfg, load_source_model(cfg))


@pytest.fixture
def dataset(tmp_path, monkeypatch):
    words = ["--layout", "kitti_step", "--seed", "1700", "--frames", "4", "--names", "0002"]
    call(
        "world",
        [*words, "--height", "64", "--width", "96", "--output", str(tmp_path / "kitti_step")],
    )
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    return "kitti_step_video_sem_seg_val"


def sample() -> dict:
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(256, (3, 64, 96), generator=generator, dtype=torch.uint8)
    return {"image": image, "sem_seg": (torch.arange(64)[:, None] // 32).expand(64, 96).clone()}


def gradient_of(parameters: list[torch.Tensor]) -> np.ndarray:
    parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    return torch.cat([part.flatten() for part in parts]).numpy()


def test_gradients_are_those_of_the_losses_and_nothing_changes(adapter):
    model = adapter.model
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    learns = {name: p.requires_grad for name, p in model.named_parameters()}
    found = measure_gradients(adapter, "a", [sample(), sample()], masks=2, size=10**9)
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    assert learns == {name: p.requires_grad for name, p in model.named_parameters()}
    encoder = [p for name, p in model.named_parameters() if name.startswith("backbone.")]
    assert found.main.shape == found.recon.shape == (2, 2, sum(p.numel() for p in encoder))

    model.zero_grad()
    generator = torch.Generator().manual_seed(video_seed(0, "a/1/1"))
    loss = adapter.losses([{"image": sample()["image"]}] * 2, generator)["loss_recon"]
    loss.backward()
    wanted = torch.cat(
        [torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in encoder]
    )
    np.testing.assert_allclose(found.recon[1, 1], wanted.numpy(), rtol=1e-4, atol=1e-7)
    assert not np.array_equal(found.recon[1, 0], found.recon[1, 1])  # masks of their own

    model.zero_grad()
    for p in encoder:
        p.requires_grad_(True)
    torch.manual_seed(video_seed(0, "a/0/0"))
    loss = sum(model.main_losses([sample()]).values())
    loss.backward()
    wanted = torch.cat(
        [torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in encoder]
    )
    np.testing.assert_allclose(found.main[0, 0], wanted.numpy(), rtol=1e-4, atol=1e-5)
    assert found.main_loss[0] == pytest.approx(loss.item(), rel=0.2)  # other points in the draws


@pytest.mark.slow
def test_the_command_writes_numbers_tables_and_pictures(dataset, tmp_path, capsys):
    out = tmp_path / "out"
    words = ["--dataset", dataset, "--output", str(out), *FLAGS, *SMALL]
    locality(words)  # the config has a default
    (video,) = json.loads((out / "locality.json").read_text())
    assert (video["video_id"], video["frames"]) == ("0002", 4)
    assert video["main_norm"] > 0
    assert video["windows"].keys() == {"1", "2"}
    assert "0002" in (out / "locality.md").read_text()
    assert "k, measured" in capsys.readouterr().out
    assert {file.name for file in out.glob("*.png")} == {"windows_0002.png", "drift_0002.png"}
    with pytest.raises(UserError, match="is not empty"):
        locality(words)


@pytest.mark.slow
def test_a_model_of_colours_has_its_labels(dataset, tmp_path):
    """Its frames are grey, but the colours that l_m compares are not."""
    out = tmp_path / "out"
    words = ["--dataset", dataset, "--output", str(out), *FLAGS]
    locality([*words, "--config", "quick/stream_world_color.yaml", *SMALL])
    (video,) = json.loads((out / "locality.json").read_text())
    assert video["main_norm"] > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--windows", "0"], "--windows is 0"),
        (["--lags", "3"], "at least two lags"),
        (["--masks", "-1"], "--masks is -1"),
        (["--every", "0"], "--every is 0"),
        (["--every", "2", *FLAGS], "0002 has 2 frames; windows and lags of up to"),
        (["--max-frames", "3", "--windows", "8"], "0002 has 3 frames; windows and lags of up to"),
        (["TTT.METHOD", "tent"], "not masked reconstruction"),
    ],
)
def test_mistakes_are_told_in_a_line(dataset, tmp_path, flags, reason):
    config = ["--config", "quick/stream_world.yaml"]
    words = [*flags, *config] if flags[0].startswith("--") else [*config, *flags]
    with pytest.raises(UserError, match=reason):
        locality(["--dataset", dataset, "--output", str(tmp_path / "out"), *words])
