"""Layers that run again for their gradients: nothing but memory and time may differ."""

from __future__ import annotations

import copy

import pytest
import torch
from costs.flops import saved_bytes
from detectron2.modeling import build_model
from tiny import TINY_VIT, VIT_SIDE

from ttt_video.adaptation import SlidingWindow, build_adapter
from ttt_video.config import load_config
from ttt_video.errors import UserError
from ttt_video.modeling.recomputing import recompute_layers


def step_of(cfg, model, video) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    adapter = build_adapter(cfg, model)
    window, generator = SlidingWindow(None), torch.Generator().manual_seed(0)
    for frame in video:
        window.push(frame)
    record = adapter.adapt(window, generator)
    return record, model.state_dict()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_a_step_is_the_same_bit_for_bit(tiny_cfg, tiny_model, make_video, mode, precision):
    """In train mode with stochastic depth, which draws the same again."""
    tiny_cfg.merge_from_list(["TTT.STEP_MODE", mode, "TTT.PRECISION", precision])
    plain = step_of(tiny_cfg, copy.deepcopy(tiny_model), make_video())
    tiny_cfg.TTT.CHECKPOINT = True
    again = step_of(tiny_cfg, tiny_model, make_video())
    assert plain[0] == again[0]
    before = plain[1]
    for name, value in again[1].items():
        assert torch.equal(value, before[name]), name
    frame = make_video()[0]
    with torch.no_grad():
        tiny_model([frame])  # a prediction recomputes nothing


def test_less_is_kept(tiny_cfg, tiny_model, make_video):
    inputs, generator = make_video()[:1], torch.Generator()
    whole = saved_bytes(lambda: tiny_model.reconstruction_losses(inputs, generator), tiny_model)
    recompute_layers(tiny_model)
    part = saved_bytes(lambda: tiny_model.reconstruction_losses(inputs, generator), tiny_model)
    assert part < 0.6 * whole


def test_vit_mae_recomputes_its_blocks(make_video):
    cfg = load_config("Base-ViTMAE.yaml", opts=TINY_VIT)
    torch.manual_seed(0)
    model = build_model(cfg).eval()
    video = make_video(height=VIT_SIDE, width=VIT_SIDE)
    plain = step_of(cfg, copy.deepcopy(model), video)
    cfg.TTT.CHECKPOINT = True
    again = step_of(cfg, model, video)
    assert plain[0] == again[0]
    for name, value in again[1].items():
        assert torch.equal(value, plain[1][name]), name


def test_a_model_without_such_layers_is_refused():
    with pytest.raises(UserError, match="Linear has no layers that can run again"):
        recompute_layers(torch.nn.Linear(2, 2))
