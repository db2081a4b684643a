"""Adapters that take gradient steps: optimizer, micro-batches, precision, once for all methods."""

from __future__ import annotations

import logging
import math
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from statistics import median
from typing import Any, ClassVar

import torch
from detectron2.config import CfgNode
from torch import Tensor, nn
from torch.func import functional_call

from ..engine.optimizer import NORM_LAYERS, make_optimizer, parameter_groups
from ..errors import UserError
from ..modeling.weights import read_checkpoint
from .base import Adapter, module_mode
from .window import Sample, SlidingWindow

logger = logging.getLogger(__name__)

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}

_CHOICES: dict[str, Callable[[nn.Module, str, nn.Parameter], bool]] = {
    "all": lambda layer, name, parameter: True,
    "norm": lambda layer, name, parameter: isinstance(layer, NORM_LAYERS),
    # "in_proj_weight" of attention, too; queries, levels and tables are looked up or added.
    "matrices": lambda layer, name, parameter: (
        name.endswith("weight") and parameter.ndim > 1 and not isinstance(layer, nn.Embedding)
    ),
}
"""Of which layer and by which name a parameter moves (``TTT.PARAMETERS``)."""

HALVINGS = 16
"""Times that a step of fp16 is tried again with half the loss scale: from 2**16 down to 1."""


class GradientAdapter(Adapter):
    """Takes gradient steps on a loss. A method of this kind defines :meth:`losses`.

    Nothing is built per frame: the optimizer and the copy of the source weights are made once.

    Attributes:
        parts: submodules of the model that the loss depends on; only they can move. Empty: any.
    """

    parts: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self,
        model: nn.Module,
        *,
        modules: Sequence[str],
        parameters: str = "all",
        optimizer: str = "SGD",
        lr: float,
        momentum: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
        backbone_multiplier: float = 1.0,
        clip_norm: float = 0.0,
        restart_optimizer: bool = False,
        source_pull: float = 0.0,
        source_gradients: Mapping[str, Tensor] | None = None,
        steps_per_frame: int = 1,
        batch_size: int = 32,
        micro_batch_size: int = 8,
        sampling: str = "with_replacement",
        step_mode: str = "eval",
        precision: str = "fp32",
    ) -> None:
        """Freezes all of ``model`` but the named parts.

        Args:
            model: with its source weights; it must have a ``device``.
            modules: names of the submodules that move, those within others included.
            parameters: which of their parameters: "all"; "norm", those of normalisation layers; or
                "matrices", those that multiply: of linear layers and convolutions, without biases.
            optimizer: "SGD" or "ADAMW".
            lr: learning rate; that of ``backbone`` is multiplied by ``backbone_multiplier``.
            momentum: of SGD.
            betas: of AdamW.
            weight_decay: not applied to norms, embeddings and position tables.
            backbone_multiplier: see ``lr``.
            clip_norm: largest L2 norm of the whole gradient; 0 does not clip.
            restart_optimizer: forget the optimizer's state after every frame.
            source_pull: share of the way back to the source weights that the weights move after
                every step.
            source_gradients: of :func:`measure_gradients`. The gradient of each tensor is divided
                by its own number before it is clipped, so that tensors move alike.
            steps_per_frame: gradient steps per frame.
            batch_size: samples per step.
            micro_batch_size: samples per forward and backward; the gradient is that of the batch.
            sampling: see :meth:`SlidingWindow.sample`.
            step_mode: "train" or "eval" mode of the model in the step.
            precision: "fp32", "bf16" or "fp16" (with loss scaling) of the step.
        """
        super().__init__(model)
        if self.parts and not hasattr(model, "reconstruction_losses"):
            raise UserError(
                f"this method trains parts of a MaskFormerTTT, and the model is a "
                f"{type(model).__name__}, which runs frozen: use --method none"
            )
        if step_mode not in ("train", "eval"):
            raise ValueError(f"no step mode {step_mode!r}; train or eval")
        model.requires_grad_(False)
        for name in modules:
            self._unfreeze(model, name, parameters)
        groups = parameter_groups(
            model, lr=lr, weight_decay=weight_decay, backbone_multiplier=backbone_multiplier
        )
        if not groups:
            raise UserError(
                f"nothing to adapt: no parameter under {list(modules)} is of the kind "
                f"TTT.PARAMETERS {parameters}"
            )
        self.parameters = [p for group in groups for p in group["params"]]
        self.optimizer = make_optimizer(optimizer, groups, momentum=momentum, betas=betas)
        self.clip_norm = clip_norm
        self.restart_optimizer = restart_optimizer
        self.source_pull = source_pull
        self.steps_per_frame = steps_per_frame
        self.batch_size = batch_size
        self.micro_batch_size = micro_batch_size
        self.sampling = sampling
        self.training_step = step_mode == "train"
        self.dtype = PRECISIONS[precision]
        self.device: torch.device = model.device  # type: ignore[assignment]
        self.scaler = self._new_scaler()
        # Buffers too: batch norm's statistics move in train mode.
        self._moving = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._state: dict[str, Tensor] = {**self._moving, **dict(model.named_buffers())}
        self._source = {name: t.detach().clone() for name, t in self._state.items()}
        self._scales = self._gradient_scales(source_gradients) if source_gradients else {}

    def _gradient_scales(self, source: Mapping[str, Tensor]) -> dict[nn.Parameter, Tensor | float]:
        """Factor on each moving parameter's gradient.

        A tensor with hardly a gradient on the source's images, such as the bias of attention's
        keys, of which the output does not depend, counts as having a fifth of the median.
        """
        missing = self._moving.keys() - source.keys()
        if missing:
            raise UserError(
                f"TTT.OPTIMIZER.SOURCE_GRADIENTS has nothing for {min(missing)}: measure it with "
                "this model and method by tools/measure_gradients.py"
            )
        foreign = {name.split(".")[0] for name in source} - {*self.parts}
        if self.parts and foreign:
            raise UserError(
                f"TTT.OPTIMIZER.SOURCE_GRADIENTS has gradients of {min(foreign)}, of which the "
                "loss of this method does not depend: they are another method's. Measure its own "
                "by tools/measure_gradients.py, or choose a config without, such as "
                "quick/stream_world.yaml"
            )
        sizes = {name: float(source[name]) for name in self._moving}
        least = median(sizes.values()) / 5
        scales = {p: 1.0 / max(sizes[name], least) for name, p in self._moving.items()}
        # A GPU takes a list of numbers in one kernel; a CPU makes tensors of them in every step.
        on_cpu = self.device.type == "cpu"
        return {p: torch.tensor(scale) if on_cpu else scale for p, scale in scales.items()}

    def _unfreeze(self, model: nn.Module, name: str, parameters: str) -> None:
        part = name.split(".")[0]
        if self.parts and part not in self.parts:
            raise UserError(
                f"TTT.MODULES names {name!r}, which the loss of this method does not depend on; "
                f"choose within {', '.join(self.parts)}"
            )
        try:
            module = model.get_submodule(name)
        except AttributeError as error:
            if part == "recon_head" and getattr(model, part, None) is None:
                raise UserError(
                    "the weights have no decoder g (recon_head), which this method trains: give "
                    "jointly trained ones, or choose a method without reconstruction"
                ) from error
            raise UserError(
                f"TTT.MODULES names {name!r}, but {error}; the model's parts are "
                + ", ".join(child for child, _ in model.named_children())
            ) from error
        for layer in module.modules():
            for own, parameter in layer.named_parameters(recurse=False):
                if _CHOICES[parameters](layer, own, parameter):
                    parameter.requires_grad_(True)

    @staticmethod
    def config_arguments(cfg: CfgNode) -> dict[str, Any]:
        """The keyword arguments that ``TTT.*`` decides for every gradient method.

        ``modules`` is among them only where ``TTT.MODULES`` overrides the method's own.
        """
        ttt, file = cfg.TTT, cfg.TTT.OPTIMIZER.SOURCE_GRADIENTS
        if ttt.PRESET == "realtime" and not file:
            logger.warning(
                "--preset realtime steps by %g in units of the gradients on training images, and "
                "TTT.OPTIMIZER.SOURCE_GRADIENTS names none: measure them by "
                "tools/measure_gradients.py, or choose TTT.OPTIMIZER.BASE_LR and CLIP_NORM anew",
                ttt.OPTIMIZER.BASE_LR,
            )
        return {
            **({"modules": tuple(ttt.MODULES)} if ttt.MODULES else {}),
            "parameters": ttt.PARAMETERS,
            "optimizer": ttt.OPTIMIZER.NAME,
            "lr": ttt.OPTIMIZER.BASE_LR,
            "momentum": ttt.OPTIMIZER.MOMENTUM,
            "betas": tuple(ttt.OPTIMIZER.BETAS),
            "weight_decay": ttt.OPTIMIZER.WEIGHT_DECAY,
            "backbone_multiplier": ttt.OPTIMIZER.BACKBONE_MULTIPLIER,
            "clip_norm": ttt.OPTIMIZER.CLIP_NORM,
            "restart_optimizer": ttt.OPTIMIZER.RESTART,
            "source_pull": ttt.OPTIMIZER.SOURCE_PULL,
            "source_gradients": read_checkpoint(file) if file else None,
            "steps_per_frame": ttt.STEPS_PER_FRAME,
            "batch_size": ttt.BATCH_SIZE,
            "micro_batch_size": ttt.MICRO_BATCH_SIZE,
            "sampling": ttt.SAMPLING,
            "step_mode": ttt.STEP_MODE,
            "precision": ttt.PRECISION,
        }

    @abstractmethod
    def losses(self, batch: list[Sample], generator: torch.Generator) -> dict[str, Tensor]:
        """Scalars of a micro-batch, each the mean over its samples.

        The sum of those whose names begin with ``loss_`` is minimised; a sum without a gradient
        says that there is nothing to learn here. The others are only recorded.

        Args:
            batch: samples of the window.
            generator: the video's random state, on the CPU.
        """

    def adapt(self, window: SlidingWindow, generator: torch.Generator) -> dict[str, float]:
        """``steps_per_frame`` gradient steps, each on a fresh batch from the window.

        Returns:
            The mean of each scalar over the steps, ``grad_norm`` (before clipping, of the last
            step; 0 where there was nothing to learn, and so no step) and ``skipped_steps``: steps
            whose loss or gradient was not finite, which left weights, buffers and optimizer
            untouched; in fp16, at no loss scale.
        """
        record = self.take_steps(self.steps_per_frame, window, generator)
        if self.restart_optimizer:
            self.optimizer.state.clear()
        return record

    def take_steps(
        self, count: int, window: SlidingWindow, generator: torch.Generator
    ) -> dict[str, float]:
        """``count`` gradient steps on the window; the record of :meth:`adapt`."""
        record: dict[str, float] = {}
        skipped = 0
        for _ in range(count):
            batch = window.sample(self.batch_size, sampling=self.sampling, generator=generator)
            losses, grad_norm, moved = self._step(batch, generator)
            skipped += not moved
            for name, value in losses.items():
                record[name] = record.get(name, 0.0) + value / count
            record["grad_norm"] = grad_norm
        record["skipped_steps"] = skipped
        return record

    def _step(
        self, batch: list[Sample], generator: torch.Generator
    ) -> tuple[dict[str, float], float, bool]:
        """One step: its scalars, the norm of its gradient, and whether it was taken."""
        if not self.scaler.is_enabled():
            return self._try_step(batch, generator)
        # A loss that is scaled too far says nothing of the step. Were it skipped, a method that
        # forgets its scale at every frame would skip it at every frame.
        before = generator.get_state()
        scale: dict[str, Any] = {}
        losses, norm, moved = self._try_step(batch, generator)
        for _ in range(HALVINGS):
            if moved or not all(map(math.isfinite, losses.values())):
                break
            scale = scale or self.scaler.state_dict()
            generator.set_state(before)  # the same masks
            losses, norm, moved = self._try_step(batch, generator)
        if not moved and scale:
            self.scaler.load_state_dict(scale)  # it was not to blame
        return losses, norm, moved

    def _try_step(
        self, batch: list[Sample], generator: torch.Generator
    ) -> tuple[dict[str, float], float, bool]:
        """As :meth:`_step`, with the loss scale as it is; a failure halves it."""
        sums: dict[str, Tensor] = {}
        buffers = [(b, b.clone()) for b in self.model.buffers()] if self.training_step else []
        with module_mode(self.model, self.training_step), self._random_layers(generator):
            for start in range(0, len(batch), self.micro_batch_size):
                micro_batch = batch[start : start + self.micro_batch_size]
                with torch.autocast(self.device.type, self.dtype) if self.dtype else nullcontext():
                    losses = self.losses(micro_batch, generator)
                share = len(micro_batch) / len(batch)
                total = torch.stack([v for k, v in losses.items() if k.startswith("loss_")]).sum()
                if total.requires_grad:
                    self.scaler.scale(total * share).backward()
                for name, loss in losses.items():
                    value = loss.detach().float() * share
                    sums[name] = sums[name] + value if name in sums else value
        if all(parameter.grad is None for parameter in self.parameters):
            self._restore(buffers)
            return dict(zip(sums, torch.stack([*sums.values()]).tolist(), strict=True)), 0.0, True
        self.scaler.unscale_(self.optimizer)
        self._scale_gradients()
        grads = [p.grad for p in self.parameters if p.grad is not None]
        grad_norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))
        # One transfer per step: every read of a GPU scalar waits for all work before it.
        *values, norm = torch.stack([*sums.values(), grad_norm]).tolist()
        moved = all(map(math.isfinite, [*values, norm]))
        if moved:
            if 0 < self.clip_norm < norm + 1e-6:  # as nn.utils.clip_grad_norm_, but never by 1
                torch._foreach_mul_(grads, self.clip_norm / (grad_norm + 1e-6))
            self.scaler.step(self.optimizer)
            self._pull_to_source()
        else:
            self._restore(buffers)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return dict(zip(sums, values, strict=True)), norm, moved

    def _scale_gradients(self) -> None:
        own = [(p.grad, scale) for p, scale in self._scales.items() if p.grad is not None]
        scales: list[Any] = [scale for _, scale in own]
        if own:
            torch._foreach_mul_([grad for grad, _ in own], scales)

    @torch.no_grad()
    def _pull_to_source(self) -> None:
        if self.source_pull:
            source = [self._source[name] for name in self._moving]
            torch._foreach_lerp_([*self._moving.values()], source, self.source_pull)

    @staticmethod
    def _restore(buffers: list[tuple[Tensor, Tensor]]) -> None:
        """What batch norm saw in a step that was not taken is forgotten."""
        for buffer, before in buffers:
            buffer.copy_(before)

    @contextmanager
    def _random_layers(self, generator: torch.Generator) -> Iterator[None]:
        """Stochastic depth and dropout follow the video's random state, not the process's."""
        if not self.training_step:
            yield
            return
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(int(torch.randint(2**62, (), generator=generator)))
            yield

    @torch.no_grad()
    def reset(self) -> None:
        """Back to the source weights and buffers, bit for bit, with a fresh optimizer."""
        for name, tensor in self._state.items():
            tensor.copy_(self._source[name])
        self.optimizer.state.clear()
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler = self._new_scaler()

    def predict_source(self, frame: Any) -> dict[str, Any]:
        """:meth:`predict` with the source weights: no second model, and nothing moves."""
        with module_mode(self.model, training=False), torch.no_grad():
            return functional_call(self.model, self._source, ([frame],))[0]

    def state_dict(self) -> dict[str, Any]:
        """``tensors`` (by name, those that moved), ``optimizer`` and ``scaler``."""
        state = self._state.items()
        moved = {name: t.detach() for name, t in state if not torch.equal(t, self._source[name])}
        return {
            "tensors": moved,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See :meth:`Adapter.load_state_dict`."""
        self.reset()
        for name, tensor in state["tensors"].items():
            self._state[name].copy_(tensor)
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])

    def _new_scaler(self) -> torch.amp.GradScaler:
        return torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)


def measure_gradients(
    adapter: GradientAdapter, batches: Iterable[list[Sample]], generator: torch.Generator
) -> dict[str, Tensor]:
    """How large the gradient of the adapter's loss is on a training set, tensor by tensor.

    It is what AdamW estimates on the stream itself, where what the stream does to the gradient goes
    into the estimate, too.

    Args:
        adapter: with its source weights, which stay as they are.
        batches: of samples, at least one, as large as those of a stream.
        generator: for the masks.

    Returns:
        The root mean square over the elements and batches of each moving parameter's gradient by
        the parameter's name, () float32 on the CPU.
    """
    names = {name: p for name, p in adapter.model.named_parameters() if p.requires_grad}
    squares = {name: torch.zeros((), device=p.device) for name, p in names.items()}
    count = 0
    for batch in batches:
        with module_mode(adapter.model, adapter.training_step):
            losses = adapter.losses(batch, generator)
            torch.stack([v for k, v in losses.items() if k.startswith("loss_")]).sum().backward()
        count += 1
        for name, parameter in names.items():
            if parameter.grad is not None:
                squares[name] += parameter.grad.float().square().mean()
                parameter.grad = None
    return {name: (total / count).sqrt().cpu() for name, total in squares.items()}
