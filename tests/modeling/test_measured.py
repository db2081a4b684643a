"""Files of measurements remember the weights they were measured with."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ttt_video.config import load_config
from ttt_video.errors import UserError
from ttt_video.modeling.measured import read_measured, save_measured, weights_mark
from ttt_video.modeling.weights import half_precision, save_safetensors
from ttt_video.stream import load_source_model

STREAMS = ["stream_world", "stream_world_panoptic", "stream_world_color", "stream_districts"]


class Parts(nn.Module):
    """A model whose decoder g is named."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.encoder, self.head, self.decoder = (nn.Linear(3, 3) for _ in range(3))
        self.parts = {"f": "encoder", "h": "head", "g": "decoder"}


def test_the_mark_is_that_of_rounded_weights_without_g() -> None:
    model = Parts()
    mark = weights_mark(model)
    with torch.no_grad():
        model.decoder.weight += 1
    assert weights_mark(model) == mark
    rounded = half_precision(model.state_dict())
    model.load_state_dict({name: tensor.float() for name, tensor in rounded.items()})
    assert weights_mark(model) == mark
    del model.decoder
    model.parts = {"f": "encoder", "h": "head"}
    assert weights_mark(model) == mark
    with torch.no_grad():
        model.head.bias += 1
    assert weights_mark(model) != mark


def test_a_model_of_other_weights_is_warned_of(tmp_path, caplog) -> None:
    file = str(tmp_path / "norms.safetensors")
    model = Parts()
    save_measured({"mean": torch.ones(2)}, file, model, {"weights": "a.pth"})
    assert torch.equal(read_measured(file).checked(model)["mean"], torch.ones(2))
    assert not caplog.records
    read_measured(file).checked(Parts(seed=1))
    assert "norms.safetensors was measured with other weights (a.pth)" in caplog.text


def test_a_file_without_a_mark_is_taken_as_it_is(tmp_path, caplog) -> None:
    file = str(tmp_path / "old.safetensors")
    save_safetensors({"mean": torch.ones(2)}, file)
    assert read_measured(file).checked(Parts()).mark is None
    assert not caplog.records


def test_a_damaged_file_is_told_in_a_line(tmp_path) -> None:
    file = tmp_path / "norms.safetensors"
    save_measured({"mean": torch.ones(2)}, str(file), Parts(), {})
    file.write_bytes(file.read_bytes()[:40])
    with pytest.raises(UserError, match=r"norms\.safetensors"):
        read_measured(str(file))


def test_a_file_with_nan_is_told_in_a_line(tmp_path) -> None:
    file = str(tmp_path / "norms.safetensors")
    save_measured({"mean": torch.tensor([0.0, float("nan")])}, file, Parts(), {})
    with pytest.raises(UserError, match=r"norms\.safetensors .*NaN.* 1 of 1 tensors, such as mean"):
        read_measured(file)


@pytest.mark.parametrize("config", STREAMS)
def test_what_ships_was_measured_with_the_weights_that_ship(config: str) -> None:
    cfg = load_config(f"quick/{config}.yaml")
    ttt = cfg.TTT
    files = [ttt.LN_ADAPT.SOURCE_STATISTICS, ttt.LEARN_ON_CHANGE.SOURCE_HEAD]
    mark = weights_mark(load_source_model(cfg))
    named = [file for file in (*files, ttt.OPTIMIZER.SOURCE_GRADIENTS) if file]
    assert named
    assert {read_measured(file).mark for file in named} == {mark}
