"""Optimizer, gradient clipping and learning-rate policy of joint training.

The rules are Mask2Former's, which the release also uses for its test-time steps: AdamW, a smaller
learning rate for the backbone, no weight decay of norms and embeddings, and one norm to which the
gradient of the whole model is clipped.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.solver import build_lr_scheduler as build_detectron2_lr_scheduler
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from ..errors import UserError
from .interface import is_within, parts_of

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
    encoder: Collection[str] = ("backbone",),
    encoder_multiplier: float = 1.0,
    weight_decay_norm: float = 0.0,
    weight_decay_embed: float = 0.0,
    weight_decay_bias: float | None = None,
) -> list[dict[str, Any]]:
    """Returns the trainable parameters in as few optimizer groups as their settings allow.

    Parameters of the ``encoder``, which is named by its parts, get ``lr * encoder_multiplier``.
    Normalisation layers decay by ``weight_decay_norm``, ``nn.Embedding`` tables (queries, query
    positions, levels) by ``weight_decay_embed``, Swin's position tables not at all, and the rest by
    ``weight_decay`` (Mask2Former, train_net.py), biases by ``weight_decay_bias`` if it is given.
    Few groups let multi-tensor and fused optimizers launch few kernels. A shared parameter is
    listed once.
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
            elif name == "bias" and weight_decay_bias is not None:
                decay = weight_decay_bias
            full = f"{module_name}.{name}" if module_name else name
            rate = lr * encoder_multiplier if is_within(full, encoder) else lr
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
    """Returns ``ADAMW`` (with ``betas``) or ``SGD`` over groups of :func:`parameter_groups`.

    Each group is one fused kernel where torch has one for the device.
    """
    device = groups[0]["params"][0].device.type
    fused = True if device in ("cuda", "cpu") else None
    if name == "ADAMW":
        return torch.optim.AdamW(groups, betas=betas, fused=fused)
    # lr is required, but every group has its own.
    return torch.optim.SGD(groups, lr=0.0, momentum=momentum, nesterov=nesterov, fused=fused)


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Loads ``state``, but keeps how the optimizer computes, which an older file or one of another
    device may say otherwise: none of it changes a number.
    """
    kept = ("fused", "foreach", "capturable")
    own = [{key: group[key] for key in kept if key in group} for group in optimizer.param_groups]
    # First in the saved groups, because they decide where the numbers of steps are kept.
    groups = [{**old, **new} for old, new in zip(state["param_groups"], own, strict=True)]
    optimizer.load_state_dict({**state, "param_groups": groups})


def clip_gradients_before_step(
    optimizer: torch.optim.Optimizer, clip_type: str, clip_value: float, norm_type: float = 2.0
) -> None:
    """Makes ``optimizer.step()`` clip the gradients first.

    ``full_model`` scales all gradients together so that their joint ``norm_type`` norm is at most
    ``clip_value`` (Mask2Former); ``norm`` does so for each parameter, and ``value`` clamps every
    element (detectron2's two types). Under a gradient scaler, call ``scaler.unscale_`` before
    ``scaler.step``.

    Raises:
        UserError: the ``clip_type`` is unknown.
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


def learning_rate(cfg: CfgNode) -> float:
    """Returns the rate at the schedule's peak: ``SOLVER.BASE_LR``, or of ``SOLVER.BLR``."""
    return cfg.SOLVER.BASE_LR or cfg.SOLVER.BLR * cfg.SOLVER.IMS_PER_BATCH / 256


def build_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """Returns the optimizer of ``SOLVER.*`` over all trainable parameters, with clipping.

    Raises:
        UserError: the optimizer or clipping type is unknown, or nothing is trainable.
    """
    solver = cfg.SOLVER
    groups = parameter_groups(
        model,
        lr=learning_rate(cfg),
        weight_decay=solver.WEIGHT_DECAY,
        encoder=parts_of(model)["f"],
        encoder_multiplier=solver.BACKBONE_MULTIPLIER,
        weight_decay_norm=solver.WEIGHT_DECAY_NORM,
        weight_decay_embed=solver.WEIGHT_DECAY_EMBED,
        weight_decay_bias=solver.WEIGHT_DECAY_BIAS,
    )
    if not groups:
        raise UserError("no parameter of the model requires a gradient: nothing to train")
    if solver.OPTIMIZER not in ("ADAMW", "SGD"):
        raise UserError(f"SOLVER.OPTIMIZER is {solver.OPTIMIZER!r}; choose ADAMW or SGD")
    optimizer = make_optimizer(
        solver.OPTIMIZER,
        groups,
        momentum=solver.MOMENTUM,
        nesterov=solver.NESTEROV,
        betas=(float(solver.BETAS[0]), float(solver.BETAS[1])),
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
    """Returns DeepLab's factor on the base learning rate: warm-up times polynomial decay.

    The decay is ``(1 - step / max_iter) ** power``. During the first ``warmup_iters`` steps a
    factor on it rises linearly from ``warmup_factor`` to 1 (or, with ``constant``, stays there).
    After them the product never falls below ``constant_ending``.
    """
    decay = (1.0 - min(step, max_iter) / max_iter) ** power
    if step >= warmup_iters:
        return max(decay, constant_ending)
    progress = step / warmup_iters if warmup_method == "linear" else 0.0
    return decay * (warmup_factor * (1.0 - progress) + progress)


def build_lr_scheduler(cfg: CfgNode, optimizer: torch.optim.Optimizer) -> LRScheduler:
    """Returns ``WarmupPolyLR`` (Mask2Former's policy on Cityscapes), or a policy of detectron2's.

    Raises:
        UserError: the warm-up method of ``WarmupPolyLR`` is unknown, or another policy's warm-up is
            as long as the training.
    """
    solver = cfg.SOLVER
    if solver.LR_SCHEDULER_NAME != "WarmupPolyLR":
        if solver.WARMUP_ITERS >= solver.MAX_ITER:  # detectron2 divides by what is left
            raise UserError(
                f"SOLVER.WARMUP_ITERS is {solver.WARMUP_ITERS}; it must be less than "
                f"SOLVER.MAX_ITER {solver.MAX_ITER}"
            )
        cfg = cfg.clone()
        cfg.defrost()
        cfg.SOLVER.BASE_LR = learning_rate(cfg)  # the cosine's end is a share of it
        return build_detectron2_lr_scheduler(cfg, optimizer)
    if solver.WARMUP_METHOD not in ("linear", "constant"):
        raise UserError(
            f"SOLVER.WARMUP_METHOD is {solver.WARMUP_METHOD!r}; choose linear or constant"
        )
    return LambdaLR(
        optimizer,
        lambda step: poly_multiplier(
            step,
            max_iter=solver.MAX_ITER,
            warmup_iters=solver.WARMUP_ITERS,
            warmup_factor=solver.WARMUP_FACTOR,
            warmup_method=solver.WARMUP_METHOD,
            power=solver.POLY_LR_POWER,
            constant_ending=solver.POLY_LR_CONSTANT_ENDING,
        ),
    )
