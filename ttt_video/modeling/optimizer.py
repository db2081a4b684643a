"""Optimizer, gradient clipping and learning-rate policy of joint training.

Mask2Former's rules, which the video TTT release also uses for its test-time steps: AdamW, a
smaller learning rate for the backbone, no weight decay for what is not a weight matrix, and the
gradient of the whole model clipped to one norm.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.solver import build_lr_scheduler as build_detectron2_lr_scheduler
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from ..errors import UserError

NORM_LAYERS = (
    nn.modules.batchnorm._NormBase,  # batch norms, synchronised and instance norms
    nn.GroupNorm,
    nn.LayerNorm,
    nn.LocalResponseNorm,
)
_POSITION_PARAMETERS = ("relative_position_bias_table", "absolute_pos_embed")


def parameter_groups(
    model: nn.Module,
    *,
    lr: float,
    weight_decay: float,
    encoder: str = "backbone",
    encoder_multiplier: float = 1.0,
    weight_decay_norm: float = 0.0,
    weight_decay_embed: float = 0.0,
) -> list[dict[str, Any]]:
    """Trainable parameters of ``model`` in as few optimizer groups as their settings allow.

    Parameters under a module whose name holds ``encoder`` get ``lr * encoder_multiplier``.
    Normalisation layers are decayed by ``weight_decay_norm``, ``nn.Embedding`` tables (queries,
    query positions, levels) by ``weight_decay_embed``, Swin's position tables not at all, and
    everything else, biases included, by ``weight_decay`` (Mask2Former, train_net.py).

    At most four groups come back instead of one per parameter, so that multi-tensor and fused
    optimizers launch few kernels. Parameters that do not require a gradient are left out; a
    shared parameter is listed once.
    """
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    seen: set[nn.Parameter] = set()
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad or parameter in seen:
                continue
            seen.add(parameter)
            decay = weight_decay
            if name in _POSITION_PARAMETERS:
                decay = 0.0
            elif isinstance(module, NORM_LAYERS):
                decay = weight_decay_norm
            elif isinstance(module, nn.Embedding):
                decay = weight_decay_embed
            rate = lr * encoder_multiplier if encoder in module_name else lr
            group = groups.setdefault(
                (rate, decay), {"params": [], "lr": rate, "weight_decay": decay}
            )
            group["params"].append(parameter)
    return list(groups.values())


def make_optimizer(
    name: str,
    groups: list[dict[str, Any]],
    *,
    momentum: float = 0.0,
    nesterov: bool = False,
    betas: tuple[float, float] = (0.9, 0.999),
) -> torch.optim.Optimizer:
    """``ADAMW`` or ``SGD`` over groups that carry their own ``lr`` and ``weight_decay``.

    One fused kernel per group where torch has one for the device, else torch's own choice.

    Args:
        name: "ADAMW" or "SGD".
        groups: of :func:`parameter_groups`, at least one.
        momentum: of SGD.
        nesterov: of SGD.
        betas: of AdamW.
    """
    device = groups[0]["params"][0].device.type
    fused = True if device in ("cuda", "cpu") else None
    if name == "ADAMW":
        return torch.optim.AdamW(groups, betas=betas, fused=fused)
    # lr is required, but every group has its own.
    return torch.optim.SGD(groups, lr=0.0, momentum=momentum, nesterov=nesterov, fused=fused)


def clip_gradients_before_step(
    optimizer: torch.optim.Optimizer, clip_type: str, clip_value: float, norm_type: float = 2.0
) -> None:
    """Make ``optimizer.step()`` clip the gradients first.

    ``full_model`` scales all gradients together so that their joint ``norm_type`` norm is at most
    ``clip_value`` (Mask2Former); ``norm`` does the same to each parameter, ``value`` clamps every
    element (detectron2's two types). Under a gradient scaler, call ``scaler.unscale_`` before
    ``scaler.step``.

    Raises:
        UserError: for an unknown ``clip_type``.
    """
    clippers: dict[str, Callable[[list[nn.Parameter]], object]] = {
        "full_model": lambda ps: nn.utils.clip_grad_norm_(ps, clip_value, norm_type),
        "norm": lambda ps: [nn.utils.clip_grad_norm_(p, clip_value, norm_type) for p in ps],
        "value": lambda ps: nn.utils.clip_grad_value_(ps, clip_value),
    }
    if clip_type not in clippers:
        raise UserError(
            f"SOLVER.CLIP_GRADIENTS.CLIP_TYPE is {clip_type!r}; choose one of {sorted(clippers)}"
        )
    clip = clippers[clip_type]

    def hook(optimizer: torch.optim.Optimizer, args: object, kwargs: object) -> None:
        clip([p for group in optimizer.param_groups for p in group["params"]])

    optimizer.register_step_pre_hook(hook)


def build_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """``SOLVER.OPTIMIZER`` (``ADAMW`` or ``SGD``) over :func:`parameter_groups`, with clipping.

    Raises:
        UserError: for an unknown optimizer or clipping type, or when nothing is trainable.
    """
    solver = cfg.SOLVER
    groups = parameter_groups(
        model,
        lr=solver.BASE_LR,
        weight_decay=solver.WEIGHT_DECAY,
        encoder_multiplier=solver.BACKBONE_MULTIPLIER,
        weight_decay_norm=solver.WEIGHT_DECAY_NORM,
        weight_decay_embed=solver.WEIGHT_DECAY_EMBED,
    )
    if not groups:
        raise UserError("no parameter of the model requires a gradient: nothing to train")
    if solver.OPTIMIZER not in ("ADAMW", "SGD"):
        raise UserError(f"SOLVER.OPTIMIZER is {solver.OPTIMIZER!r}; choose ADAMW or SGD")
    optimizer = make_optimizer(
        solver.OPTIMIZER, groups, momentum=solver.MOMENTUM, nesterov=solver.NESTEROV
    )
    clip = solver.CLIP_GRADIENTS
    if clip.ENABLED:
        clip_gradients_before_step(optimizer, clip.CLIP_TYPE, clip.CLIP_VALUE, clip.NORM_TYPE)
    return optimizer


def poly_multiplier(
    step: int,
    *,
    max_iter: int,
    warmup_iters: int = 0,
    warmup_factor: float = 1.0,
    warmup_method: str = "linear",
    power: float = 0.9,
    constant_ending: float = 0.0,
) -> float:
    """Factor on the base learning rate at ``step``: DeepLab's warm-up times polynomial decay.

    ``(1 - step / max_iter) ** power``, times a factor that during the first ``warmup_iters``
    steps rises linearly from ``warmup_factor`` to 1 (or, with ``constant``, stays there). After
    them it never falls below ``constant_ending``.
    """
    decay = (1.0 - min(step, max_iter) / max_iter) ** power
    if step >= warmup_iters:
        return max(decay, constant_ending)
    progress = step / warmup_iters if warmup_method == "linear" else 0.0
    return decay * (warmup_factor * (1.0 - progress) + progress)


def build_lr_scheduler(cfg: CfgNode, optimizer: torch.optim.Optimizer) -> LRScheduler:
    """``WarmupPolyLR`` (Mask2Former's policy on Cityscapes), or any policy of detectron2's.

    Raises:
        UserError: for an unknown warm-up method of ``WarmupPolyLR``.
    """
    solver = cfg.SOLVER
    if solver.LR_SCHEDULER_NAME != "WarmupPolyLR":
        return build_detectron2_lr_scheduler(cfg, optimizer)
    if solver.WARMUP_METHOD not in ("linear", "constant"):
        raise UserError(
            f"SOLVER.WARMUP_METHOD is {solver.WARMUP_METHOD!r}; choose linear or constant"
        )
    multiplier = functools.partial(
        poly_multiplier,
        max_iter=solver.MAX_ITER,
        warmup_iters=solver.WARMUP_ITERS,
        warmup_factor=solver.WARMUP_FACTOR,
        warmup_method=solver.WARMUP_METHOD,
        power=solver.POLY_LR_POWER,
        constant_ending=solver.POLY_LR_CONSTANT_ENDING,
    )
    return LambdaLR(optimizer, lambda step: multiplier(step))
