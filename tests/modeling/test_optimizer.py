"""Groups, clipping and schedule against Mask2Former's rules written out by hand."""

from __future__ import annotations

import pytest
import torch
from detectron2.modeling.backbone.swin import SwinTransformer
from torch import nn

from ttt_video.config import get_cfg
from ttt_video.errors import UserError
from ttt_video.modeling.optimizer import (
    build_lr_scheduler,
    build_optimizer,
    clip_gradients_before_step,
    parameter_groups,
    poly_multiplier,
)


class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = SwinTransformer(
            pretrain_img_size=32,
            embed_dim=8,
            depths=[1],
            num_heads=[2],
            window_size=4,
            ape=True,
            out_indices=(0,),
        )
        self.head = nn.Sequential(nn.Conv2d(8, 8, 1), nn.GroupNorm(2, 8), nn.LayerNorm(8))
        self.query = nn.Embedding(5, 8)
        self.frozen = nn.Linear(2, 2).requires_grad_(False)
        self.tied = self.query


def groups_by_setting(model, **kwargs):
    groups = parameter_groups(model, lr=1.0, weight_decay=0.05, **kwargs)
    names = {id(p): n for n, p in model.named_parameters()}
    return {(g["lr"], g["weight_decay"]): {names[id(p)] for p in g["params"]} for g in groups}


def test_groups_follow_mask2formers_rules():
    model = Toy()
    groups = groups_by_setting(model, encoder_multiplier=0.1)
    assert set(groups) == {(1.0, 0.05), (1.0, 0.0), (0.1, 0.05), (0.1, 0.0)}
    assert groups[1.0, 0.05] == {"head.0.weight", "head.0.bias"}
    assert groups[1.0, 0.0] == {
        "head.1.weight",
        "head.1.bias",
        "head.2.weight",
        "head.2.bias",
        "query.weight",
    }
    decayed, free = groups[0.1, 0.05], groups[0.1, 0.0]
    assert "backbone.layers.0.blocks.0.attn.relative_position_bias_table" in free
    assert "backbone.absolute_pos_embed" in free
    assert all("norm" in n or "pos" in n for n in free)
    assert not any("norm" in n or "position" in n for n in decayed)
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert set().union(*groups.values()) == trainable
    assert sum(map(len, groups.values())) == len(trainable)  # each once, tied ones too


def test_norms_and_embeddings_can_be_decayed():
    groups = groups_by_setting(Toy(), weight_decay_norm=0.3, weight_decay_embed=0.4)
    assert groups[1.0, 0.4] == {"query.weight"}
    assert "head.1.weight" in groups[1.0, 0.3]


def step_of(clip_type, clip_value, gradients):
    parameters = [nn.Parameter(torch.zeros(len(g))) for g in gradients]
    optimizer = torch.optim.SGD([{"params": [p]} for p in parameters], lr=1.0)
    clip_gradients_before_step(optimizer, clip_type, clip_value)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = torch.tensor(gradient)
    optimizer.step()
    return [-p.detach() for p in parameters]


def test_full_model_clipping_scales_all_gradients_together():
    moved = step_of("full_model", 1.3, [[3.0, 4.0], [12.0]])  # joint norm 13
    torch.testing.assert_close(moved[0], torch.tensor([0.3, 0.4]))
    torch.testing.assert_close(moved[1], torch.tensor([1.2]))
    small = step_of("full_model", 100.0, [[3.0, 4.0], [12.0]])
    torch.testing.assert_close(small[1], torch.tensor([12.0]))


def test_clipping_by_parameter_and_by_value():
    moved = step_of("norm", 1.0, [[3.0, 4.0], [0.5]])
    torch.testing.assert_close(moved[0], torch.tensor([0.6, 0.8]))
    torch.testing.assert_close(moved[1], torch.tensor([0.5]))
    torch.testing.assert_close(step_of("value", 1.0, [[3.0, -0.5]])[0], torch.tensor([1.0, -0.5]))
    with pytest.raises(UserError, match="whole_model"):
        step_of("whole_model", 1.0, [[1.0]])


def test_optimizer_from_config():
    cfg = get_cfg()
    cfg.SOLVER.BASE_LR, cfg.SOLVER.WEIGHT_DECAY, cfg.SOLVER.BACKBONE_MULTIPLIER = 1e-3, 0.05, 0.1
    optimizer = build_optimizer(cfg, Toy())
    assert type(optimizer) is torch.optim.AdamW
    assert sorted((g["lr"], g["weight_decay"]) for g in optimizer.param_groups) == [
        (1e-4, 0.0),
        (1e-4, 0.05),
        (1e-3, 0.0),
        (1e-3, 0.05),
    ]
    cfg.SOLVER.OPTIMIZER = "SGD"
    assert type(build_optimizer(cfg, Toy())) is torch.optim.SGD
    cfg.SOLVER.OPTIMIZER = "adam"
    with pytest.raises(UserError, match="adam"):
        build_optimizer(cfg, Toy())
    with pytest.raises(UserError, match="nothing to train"):
        build_optimizer(cfg, Toy().requires_grad_(False))


def test_poly_policy_equals_deeplabs():
    from detectron2.projects.deeplab import build_lr_scheduler as build_deeplabs

    for iters, factor, method in [(0, 1.0, "linear"), (4, 0.01, "linear"), (4, 0.1, "constant")]:
        cfg = get_cfg()
        cfg.SOLVER.POLY_LR_POWER, cfg.SOLVER.POLY_LR_CONSTANT_ENDING = 0.9, 0.0
        cfg.SOLVER.LR_SCHEDULER_NAME, cfg.SOLVER.MAX_ITER = "WarmupPolyLR", 20
        cfg.SOLVER.WARMUP_ITERS, cfg.SOLVER.WARMUP_FACTOR = iters, factor
        cfg.SOLVER.WARMUP_METHOD = method
        rates = []
        for build in (build_lr_scheduler, build_deeplabs):
            optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.7)
            scheduler = build(cfg, optimizer)
            rates.append([])
            for _ in range(20):
                rates[-1].append(optimizer.param_groups[0]["lr"])
                optimizer.step()
                scheduler.step()
        assert rates[0] == pytest.approx(rates[1])
    assert poly_multiplier(20, max_iter=20) == 0.0
    assert poly_multiplier(5, max_iter=20, power=1.0) == 0.75


def test_other_policies_are_detectron2s():
    cfg = get_cfg()
    cfg.SOLVER.STEPS, cfg.SOLVER.MAX_ITER, cfg.SOLVER.WARMUP_ITERS = (2,), 4, 0
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = build_lr_scheduler(cfg, optimizer)
    for _ in range(2):
        optimizer.step()
        scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(cfg.SOLVER.GAMMA)
    cfg.SOLVER.LR_SCHEDULER_NAME, cfg.SOLVER.WARMUP_METHOD = "WarmupPolyLR", "cubic"
    with pytest.raises(UserError, match="cubic"):
        build_lr_scheduler(cfg, optimizer)
