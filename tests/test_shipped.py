"""``ttt_video://`` in detectron2's path manager."""

from __future__ import annotations

import pytest
import torch
from detectron2.utils.file_io import PathManager
from iopath.common.file_io import PathManager as NewPathManager

from ttt_video import shipped
from ttt_video.errors import UserError
from ttt_video.modeling.weights import read_checkpoint, save_safetensors


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(shipped, "WEIGHTS_DIR", tmp_path)
    return tmp_path


def test_paths_lead_into_the_package(folder):
    (folder / "a.bin").write_bytes(b"abc")
    assert PathManager.get_local_path("ttt_video://a.bin") == str(folder / "a.bin")
    with PathManager.open("ttt_video://a.bin", "rb") as file:
        assert file.read() == b"abc"
    assert PathManager.exists("ttt_video://a.bin")
    assert PathManager.isfile("ttt_video://a.bin")
    assert not PathManager.exists("ttt_video://b.bin")
    assert not PathManager.isfile("ttt_video://b.bin")


def test_weights_can_be_named_wherever_a_path_can(folder):
    save_safetensors({"w": torch.arange(3.0)}, str(folder / "model.safetensors"))
    weights = read_checkpoint("ttt_video://model.safetensors")
    assert torch.equal(weights["w"], torch.arange(3.0))


def test_weights_that_do_not_ship_are_told_in_a_line(folder):
    with pytest.raises(UserError, match=r"ttt_video://nothing\.safetensors") as error:
        read_checkpoint("ttt_video://nothing.safetensors")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("mode", ["w", "wb", "a", "x", "r+"])
def test_nothing_can_be_written_there(folder, mode):
    (folder / "a.bin").write_bytes(b"abc")
    with pytest.raises(OSError, match="read-only"):
        PathManager.open("ttt_video://a.bin", mode)
    assert (folder / "a.bin").read_bytes() == b"abc"


def test_registering_again_is_fine():
    manager = NewPathManager()
    shipped.register(manager)
    shipped.register(manager)
    assert manager.get_local_path("ttt_video://x") == str(shipped.WEIGHTS_DIR / "x")
