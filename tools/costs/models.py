"""Measures a prediction, a test-time step and a training step, each by itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from detectron2.config import CfgNode
from torch import Tensor, nn

from costs.clock import Stages
from costs.comparison import HUGGING_FACE, OURS, Options, compare, difference
from costs.flops import count_flops, parameter_bytes, saved_bytes
from costs.inputs import frames, labelled_images, model_of, peer_of
from ttt_video.adaptation import SlidingWindow, build_adapter, build_window
from ttt_video.adaptation.base import module_mode
from ttt_video.adaptation.gradient import GradientAdapter
from ttt_video.adaptation.precision import in_precision
from ttt_video.errors import UserError
from ttt_video.modeling.meta_arch import MaskFormerTTT
from ttt_video.modeling.optimizer import build_optimizer
from ttt_video.training.joint_training import TrainStep, amp_dtype


def predictions(cfg: CfgNode, options: Options) -> dict[str, Any]:
    """Measures the frozen model's forward pass, from uint8 images to detectron2's outputs."""
    model = model_of(cfg).requires_grad_(False)  # torch's counter stumbles over views otherwise
    device = torch.device(cfg.MODEL.DEVICE)
    models = {OURS: model, **({HUGGING_FACE: peer_of(cfg, model)} if options.peers else {})}
    cases = []
    for case in options.cases():
        video = frames(case["batch"], *case["size"])
        inputs = [video(i) for i in range(case["batch"])]
        works = {
            name: _prediction(one, inputs, device, case["precision"])
            for name, one in models.items()
        }
        if options.peers:
            case["difference"] = _same_predictions(models, inputs)
        case.update(compare(works, device, options, case["precision"]))
        if isinstance(model, MaskFormerTTT):
            stages = Stages(device)
            with stages.watch(model, "sem_seg_head"):
                works[OURS]()
            case["stages"] = stages.shares()
        cases.append(case)
    return {"parameter_bytes": parameter_bytes(model), "cases": cases}


def _prediction(
    model: Any, inputs: list[dict[str, Any]], device: torch.device, precision: str
) -> Callable[[], object]:
    def run() -> object:
        with torch.no_grad(), in_precision(device, precision, keep_casts=False):
            return model(inputs)

    return run


@torch.no_grad()
def _same_predictions(models: dict[str, Any], inputs: list[dict[str, Any]]) -> dict[str, float]:
    outputs = [m.sem_seg_head(m.encode(m.normalize(inputs).tensor))[-1] for m in models.values()]
    ours, theirs = outputs
    return {key: difference(ours[key], theirs[key], key) for key in ("pred_logits", "pred_masks")}


def steps(cfg: CfgNode, options: Options) -> dict[str, Any]:
    """Measures one test-time step: masks, forward, backward, clipping and optimizer of ``TTT.*``.

    The batch comes from a full window of frames of the given sizes; it is ``TTT.BATCH_SIZE`` unless
    another is asked for, in micro-batches of ``TTT.MICRO_BATCH_SIZE``.
    """
    device = torch.device(cfg.MODEL.DEVICE)
    cases = []
    for case in options.cases(cfg.TTT.BATCH_SIZE):
        model = model_of(cfg)
        models = {OURS: model, **({HUGGING_FACE: peer_of(cfg, model)} if options.peers else {})}
        own = cfg.clone()
        own.defrost()
        own.TTT.PRECISION = case["precision"]
        own.TTT.STEPS_PER_FRAME = 1
        own.TTT.BATCH_SIZE = case["batch"]
        window = build_window(own, device)
        count = min(window.size or 16, 16)
        video = frames(count, *case["size"])
        for index in range(count):
            window.push(video(index))
        if options.peers:
            case["difference"] = _same_gradients(models, [window.current])
        adapters: dict[str, Any] = {name: build_adapter(own, one) for name, one in models.items()}

        if not isinstance(adapters[OURS], GradientAdapter):
            raise UserError(f"--method {own.TTT.METHOD} takes no gradient steps to measure")
        works = {name: _step(adapter, window) for name, adapter in adapters.items()}
        case["checkpoint"] = cfg.TTT.CHECKPOINT
        case.update(compare(works, device, options, case["precision"]))
        if isinstance(model, MaskFormerTTT):
            adapters[OURS].replay_graphs(None)  # a replay calls no module
            stages = Stages(device)
            with stages.watch(model, "recon_head", adapters[OURS].optimizer):
                works[OURS]()
            case["stages"] = stages.shares()
        size = adapters[OURS].micro_batches.size([window.current] * case["batch"])
        case["micro_batch"] = min(size, case["batch"])
        case["saved_activation_bytes"] = _activations(own, model, window, case["micro_batch"])
        cases.append(case)
    settings = {key: cfg.TTT[key] for key in ("METHOD", "STEP_MODE", "MASK_RATIO")}
    settings.update(optimizer=cfg.TTT.OPTIMIZER.NAME, crop=list(cfg.TTT.CROP.SIZE))
    return {"parameter_bytes": parameter_bytes(model), "settings": settings, "cases": cases}


def _step(adapter: Any, window: SlidingWindow) -> Callable[[], object]:
    generator = torch.Generator().manual_seed(0)
    return lambda: adapter.adapt(window, generator)


def _activations(cfg: CfgNode, model: nn.Module, window: SlidingWindow, size: int) -> int:
    """Returns the bytes that a micro-batch of ``size`` keeps for its backward pass."""
    adapter: Any = build_adapter(cfg, model)
    generator = torch.Generator().manual_seed(0)
    batch = window.sample(size, sampling="with_replacement", generator=generator)

    def forward() -> object:
        with in_precision(adapter.device, cfg.TTT.PRECISION):
            return adapter.losses(batch, generator)

    with module_mode(model, adapter.training_step):
        return saved_bytes(forward, model)


def _same_gradients(models: dict[str, Any], inputs: list[dict[str, Any]]) -> dict[str, float]:
    """Compares the loss and the gradient of the first convolution, which embeds the patches."""
    losses, gradients = [], []
    for model in models.values():
        model.requires_grad_(True)
        generator = torch.Generator().manual_seed(0)
        loss = model.reconstruction_losses(inputs, generator)["loss_recon"]
        loss.backward()
        losses.append(loss)
        first = next(p for p in model.backbone.parameters() if p.dim() == 4)
        gradients.append(first.grad.clone())
        model.zero_grad()
    return {
        "loss_recon": difference(losses[0], losses[1], "loss_recon"),
        "gradient": difference(gradients[0], gradients[1], "the first convolution's gradient"),
    }


def training(cfg: CfgNode, options: Options) -> dict[str, Any]:
    """Measures whole optimizer steps of joint training, as tools/train_net.py takes them."""
    device = torch.device(cfg.MODEL.DEVICE)
    model = model_of(cfg)
    model.train()
    num_classes = cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES
    dtype = amp_dtype(device, cfg.SOLVER.AMP.PRECISION) if cfg.SOLVER.AMP.ENABLED else None
    step = TrainStep(
        model,
        [],  # data loading is not measured
        build_optimizer(cfg, model),
        micro_batch_size=cfg.SOLVER.MICRO_BATCH_SIZE,
        dtype=dtype,
    )
    step.iter = 0
    cases = []
    for case in replace(options, precisions=(_name(dtype),)).cases():
        batch = labelled_images(case["batch"], case["size"], num_classes)

        def run(batch: list[dict[str, Any]] = batch) -> None:
            step.optimizer.zero_grad()
            step.accumulate_gradients(batch)
            step.scaler.unscale_(step.optimizer)
            step.scaler.step(step.optimizer)
            step.scaler.update()

        case.update(compare({OURS: run}, device, options, case["precision"]))
        if options.flops:
            case["flop"] = _training_flops(model, batch)
        cases.append(case)
    return {"parameter_bytes": parameter_bytes(model), "cases": cases}


def _name(dtype: torch.dtype | None) -> str:
    return {None: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]


def _training_flops(model: Any, batch: list[dict[str, Any]]) -> dict[str, int]:
    """Returns the operations of the two losses and their gradients, for the whole batch.

    They are counted on one image, since all cost the same, with gradients of all parameters.
    """

    def count(losses: Callable[[list[dict[str, Any]]], dict[str, Tensor]]) -> int:
        flop = count_flops(lambda: torch.stack([*losses(batch[:1]).values()]).sum().backward())
        model.zero_grad()
        return flop * len(batch)

    return {
        "main_task": count(model.main_losses),
        "reconstruction": count(model.reconstruction_losses),
    }
