"""The base of methods that take gradient steps: optimizer, micro-batches and precision."""

from __future__ import annotations

import logging
import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import torch
from detectron2.config import CfgNode
from torch import Tensor, nn
from torch.func import functional_call

from ..errors import UserError
from ..modeling.graphs import Capture, GraphRunner, defines_together
from ..modeling.interface import adaptable
from ..modeling.measured import Measured
from ..modeling.recomputing import recompute_layers
from .base import Adapter, module_mode, seeded_layers
from .micro_batches import MicroBatches
from .mover import Mover
from .moving_parameters import part_names, unfreeze
from .precision import PRECISIONS, tf32
from .replay import ReplayedSteps, total_of
from .settings import OptimizerSettings, StepSettings
from .snapshot import Snapshot
from .source_gradients import gradient_scales
from .window import Sample, SlidingWindow

logger = logging.getLogger(__name__)

HALVINGS = 16
"""Retries of a step of fp16, each with half the loss scale: from 2**16 down to 1."""

LARGE = 0.5
"""Share of the loss that a step may promise to remove before its gradient says little about what it
does (docs/methods/online_ttt_mae.md tells what was seen)."""


class GradientAdapter(Adapter):
    """Takes gradient steps on a loss. A method of this kind defines :meth:`losses`.

    Nothing is built per frame: the optimizer and the copy of the source weights are made once.

    Attributes:
        parts: roles of the model's parts that the loss depends on ("f", "g", "h"); only they can
            move. Empty: any.
    """

    parts: ClassVar[tuple[str, ...]] = ()
    _replayed: ReplayedSteps | None = None

    def __init__(
        self,
        model: nn.Module,
        *,
        modules: Sequence[str],
        parameters: str = "all",
        optimizer: OptimizerSettings,
        step: StepSettings,
    ) -> None:
        """Freezes all of ``model`` but the named submodules.

        Args:
            model: with its source weights; it must have a ``device``.
            modules: submodules that move, by their names or with a role ("f", "f.layers.3").
            parameters: which of their parameters: "all"; "norm", those of normalisation layers; or
                "matrices", those that multiply: of linear layers and convolutions, without biases.
            optimizer: how their gradients move them.
            step: what a step is made of.
        """
        super().__init__(model)
        if self.parts:
            adaptable(model)
        parts = part_names(model, self.parts)
        model.requires_grad_(False)
        for name in modules:
            unfreeze(model, name, parameters, parts)
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise UserError(
                f"nothing to adapt: no parameter under {list(modules)} is of the kind "
                f"TTT.PARAMETERS {parameters}"
            )
        built = optimizer.build(model)
        self.update = optimizer
        self.step = step
        self.training_step = step.mode == "train"
        self.dtype = PRECISIONS[step.precision]
        self.device: torch.device = model.device  # type: ignore[assignment]
        self.scaler = self._new_scaler()
        self.micro_batches = MicroBatches.on(self.device, step.micro_batch_size)
        if step.checkpoint:
            recompute_layers(model)
        # Buffers too: batch norm's statistics move in train mode.
        self._moving = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._state: dict[str, Tensor] = {**self._moving, **dict(model.named_buffers())}
        self._source = {name: t.detach().clone() for name, t in self._state.items()}
        wanted = optimizer.source_gradients
        if isinstance(wanted, Measured):
            wanted.checked(model)
        scales = gradient_scales(self._moving, wanted, parts) if wanted else {}
        source = [self._source[name] for name in self._moving]
        self._mover = Mover(built, optimizer, self._moving, source, scales)
        self.parameters = self._mover.parameters

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The optimizer of all parameters that move; another one may take its place."""
        return self._mover.optimizer

    @optimizer.setter
    def optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        self._mover.optimizer, self._mover.forgotten = optimizer, True

    @staticmethod
    def config_arguments(cfg: CfgNode) -> dict[str, Any]:
        """The keyword arguments that ``TTT.*`` decides for every gradient method.

        ``modules`` is among them only where ``TTT.MODULES`` overrides the method's own.
        """
        return {
            **({"modules": tuple(cfg.TTT.MODULES)} if cfg.TTT.MODULES else {}),
            "parameters": cfg.TTT.PARAMETERS,
            "optimizer": OptimizerSettings.from_config(cfg),
            "step": StepSettings.from_config(cfg),
        }

    @abstractmethod
    def losses(self, batch: list[Sample], generator: torch.Generator) -> dict[str, Tensor]:
        """Returns scalars of a micro-batch, each the mean over its samples.

        The sum of those whose names begin with ``loss_`` is minimised; if it has no gradient, there
        is nothing to learn here. The others are only recorded.

        Args:
            batch: samples of the window.
            generator: the video's random state, on the CPU.
        """

    def inputs(self, batch: list[Sample], generator: torch.Generator) -> Sequence[Tensor] | None:
        """Draws all that is random in :meth:`losses`; :meth:`losses_of` does the rest.

        A method that defines both has its steps replayed as graphs. Draws are those of ``losses``,
        in its order.

        Returns:
            Tensors, on the device or in pinned memory; None if this batch has no fixed shape, and
            ``losses`` is then called with the generator as it was.
        """
        return None

    def losses_of(self, *inputs: Tensor) -> dict[str, Tensor]:
        """Returns :meth:`losses` of :meth:`inputs`; draws nothing and never waits for a GPU."""
        raise NotImplementedError(f"{type(self).__name__} has no inputs to replay")

    def replay_graphs(self, capture: Capture | None) -> None:
        """See :meth:`Adapter.replay_graphs`."""
        super().replay_graphs(capture)
        self._replayed = None
        if capture is None:
            return
        if defines_together(self, "losses_of", "losses"):
            self._replayed = ReplayedSteps(self, capture)
        else:
            logger.info("%s takes its steps without CUDA graphs", type(self).__name__)

    def drop_graphs(self) -> bool:
        """See :meth:`Adapter.drop_graphs`."""
        dropped = self._replayed is not None and self._replayed.drop_graphs()
        return super().drop_graphs() or dropped

    def adapt(self, window: SlidingWindow, generator: torch.Generator) -> dict[str, float]:
        """Takes ``step.per_frame`` gradient steps, each on a fresh batch from the window.

        Returns:
            The mean of each scalar over the steps, ``grad_norm`` (of the last step, before
            clipping; 0 if there was nothing to learn, and so no step) and ``skipped_steps``: steps
            whose loss or gradient was not finite (in fp16, at any loss scale), or that were undone
            because the loss exploded. They leave weights, buffers and optimizer untouched.
        """
        record = self.take_steps(self.step.per_frame, window, generator)
        if self.update.restart:
            self._mover.forget()
        return record

    def take_steps(
        self, count: int, window: SlidingWindow, generator: torch.Generator
    ) -> dict[str, float]:
        """Takes ``count`` gradient steps on the window; returns the record of :meth:`adapt`."""
        record: dict[str, float] = {}
        skipped = 0
        for _ in range(count):
            batch = window.sample(
                self.step.batch_size, sampling=self.step.sampling, generator=generator
            )
            losses, grad_norm, moved = self._step(batch, generator, window)
            skipped += not moved
            for name, value in losses.items():
                record[name] = record.get(name, 0.0) + value / count
            record["grad_norm"] = grad_norm
            if self._observer is not None:
                scalars = {**losses, "grad_norm": grad_norm, "skipped_steps": int(not moved)}
                self._observer(self, scalars)
        record["skipped_steps"] = skipped
        return {**record, **window.record()}

    def _step(
        self, batch: list[Sample], generator: torch.Generator, window: SlidingWindow | None = None
    ) -> tuple[dict[str, float], float, bool]:
        """Takes a step; returns its scalars, the norm of its gradient, and whether it was taken."""
        if not self.scaler.is_enabled():
            return self._try_step(batch, generator, window)
        # An overflow of the scaled loss says nothing about the step. If it were skipped, a method
        # that forgets its scale at every frame would skip the step of every frame.
        before = generator.get_state()
        losses, norm, moved = self._try_step(batch, generator, window)
        if moved:
            return losses, norm, moved
        scale = self.scaler.state_dict()
        self.scaler.update()  # halves it where a gradient is not finite
        for _ in range(HALVINGS):
            if math.isfinite(norm) or not all(map(math.isfinite, losses.values())):
                break
            generator.set_state(before)  # the same masks
            losses, norm, moved = self._try_step(batch, generator, window)
            if not moved:
                self.scaler.update()
        if not all(map(math.isfinite, [*losses.values(), norm])):
            self.scaler.load_state_dict(scale)  # it was not to blame
        return losses, norm, moved

    def _try_step(
        self, batch: list[Sample], generator: torch.Generator, window: SlidingWindow | None
    ) -> tuple[dict[str, float], float, bool]:
        """Does the same with the loss scale as it is; a step that was taken updates it."""
        random = generator.get_state()
        buffers = self._buffers()
        sums = self._fitting_losses(batch, generator, buffers)
        if all(parameter.grad is None for parameter in self.parameters):
            buffers.restore()
            return dict(zip(sums, torch.stack([*sums.values()]).tolist(), strict=True)), 0.0, True
        mover = self._mover
        self.scaler.unscale_(self.optimizer)
        mover.scale_gradients()
        measured = window.measure(self.parameters) if window is not None else None
        grads = [p.grad for p in self.parameters if p.grad is not None]
        norms = [*torch._foreach_norm(grads)]
        grad_norm = torch.linalg.vector_norm(torch.stack(norms))
        scalars = torch.stack([*sums.values(), grad_norm])
        before, forgotten = mover.snapshot(), mover.forgotten
        if ahead := self._updates_ahead():
            mover.move_if_finite(grads, scalars)
        promised = (
            mover.promised(norms, before) if ahead and before else torch.zeros_like(grad_norm)
        )
        # All scalars in one transfer, because every read from a GPU waits for all work before it.
        *values, norm, change = torch.cat([scalars, promised[None]]).tolist()
        losses = dict(zip(sums, values, strict=True))
        moved = all(map(math.isfinite, [*values, norm]))
        if moved and window is not None and measured is not None:
            window.learn(measured)
        if moved and not ahead:
            mover.move(grads, grad_norm, norm, self.scaler)
            change = float(mover.promised(norms, before)) if before else 0.0
        if moved and before and self._exploded(total_loss(losses), change, batch, random):
            moved = False
        mover.forgotten = forgotten and not moved
        if not moved:
            buffers.restore()
            if before:
                before.restore()
            elif ahead and forgotten:  # momentum that the fused SGD has made, but not filled
                mover.forget()
        if moved:
            self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return losses, norm, moved

    def _fitting_losses(
        self, batch: list[Sample], generator: torch.Generator, buffers: Snapshot
    ) -> dict[str, Tensor]:
        """Returns the scalars of a batch and makes its gradients, in micro-batches that fit."""
        random = generator.get_state()

        def undo() -> None:
            generator.set_state(random)
            buffers.restore()
            self.optimizer.zero_grad(set_to_none=True)

        def work(samples: list[Sample]) -> dict[str, Tensor]:
            try:
                return self._batch_losses(samples, generator, backward=True)
            except torch.cuda.OutOfMemoryError:
                if not self.drop_graphs():  # they give way before the micro-batch does
                    raise
            undo()
            return self._batch_losses(samples, generator, backward=True)

        return self.micro_batches.run(batch, work, undo)

    def _batch_losses(
        self, batch: list[Sample], generator: torch.Generator, *, backward: bool
    ) -> dict[str, Tensor]:
        """Returns the scalars of a batch; the gradients of its micro-batches add up."""
        sums: dict[str, Tensor] = {}
        if backward and self._replayed is not None:
            self._replayed.start()
        random = seeded_layers(self.device, generator) if self.training_step else nullcontext()
        size, products = self.micro_batches.size(batch), tf32(self.device, self.step.allows_tf32)
        with module_mode(self.model, self.training_step), random, products:
            for start in range(0, len(batch), size):
                micro_batch = batch[start : start + size]
                share = len(micro_batch) / len(batch)
                values = None
                if backward and self._replayed is not None:
                    values = self._replayed(micro_batch, generator, share)
                if values is None:
                    with self.autocast():
                        losses = self.losses(micro_batch, generator)
                    values = self._learn(losses, share, backward=backward)
                for name, value in values.items():
                    sums[name] = sums[name] + value if name in sums else value
        return sums

    def autocast(self, *, cache: bool = True) -> AbstractContextManager[Any]:
        """Returns the context of the step's precision; ``cache`` is autocast's, of casts."""
        if self.dtype is None:
            return nullcontext()
        return torch.autocast(self.device.type, self.dtype, cache_enabled=cache)

    def _learn(
        self, losses: dict[str, Tensor], share: float, *, backward: bool
    ) -> dict[str, Tensor]:
        """Adds a micro-batch's share of the gradient; returns its shares of the scalars."""
        total = total_of(losses)
        if backward and total.requires_grad:
            self.scaler.scale(total * share).backward()
        return {name: loss.detach().float() * share for name, loss in losses.items()}

    def _updates_ahead(self) -> bool:
        """Returns whether the update is issued before the host knows that the step is sound.

        A GPU has then work while the host waits.
        """
        return self.device.type == "cuda" and self._mover.can_go_ahead(self.scaler)

    @torch.no_grad()
    def _exploded(self, loss: float, change: float, batch: list[Sample], random: Tensor) -> bool:
        """Returns whether the step that was just taken has made its own loss far too large.

        The loss is computed again only after a large step: one that, along the gradient, may remove
        more than :data:`LARGE` of the loss.

        Args:
            loss: of the step.
            change: see :meth:`Mover.promised`.
            batch: of the step.
            random: state of the generator that drew the step's masks.
        """
        if loss <= 0:  # it cannot grow by a factor
            return False
        if change <= LARGE * loss:
            return False
        buffers = self._buffers()
        generator = torch.Generator()
        generator.set_state(random)
        sums = self._batch_losses(batch, generator, backward=False)
        buffers.restore()
        after = total_loss({name: float(value) for name, value in sums.items()})
        return not after <= self.update.max_loss_growth * loss  # NaN, too

    def _buffers(self) -> Snapshot:
        """Copies the buffers that a forward pass changes, such as batch norm's in train mode."""
        return Snapshot(self.model.buffers() if self.training_step else ())

    @torch.no_grad()
    def reset(self) -> None:
        """Returns to the source weights and buffers, bit for bit, with a fresh optimizer."""
        for name, tensor in self._state.items():
            tensor.copy_(self._source[name])
        self._mover.forget()
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler = self._new_scaler()

    def predict_source(self, frame: Any) -> dict[str, Any]:
        """Predicts with the source weights, without a second model; nothing changes."""
        with self.predicting():
            return functional_call(self.model, self._source, ([frame],))[0]

    def facts(self) -> dict[str, Any]:
        """Returns also ``micro_batch_size``, the least that was chosen, if one was."""
        chosen = self.micro_batches.found.values()
        return {**super().facts(), **({"micro_batch_size": min(chosen)} if chosen else {})}

    def _runners(self) -> list[GraphRunner[Any]]:
        return [*super()._runners(), *([self._replayed.runner] if self._replayed else [])]

    def state_dict(self) -> dict[str, Any]:
        """Returns ``tensors`` (those that moved, by name), ``optimizer`` and ``scaler``.

        ``micro_batches`` is there if they were chosen, so that a resumed run sums in the same
        order.
        """
        state = self._state.items()
        moved = {name: t.detach() for name, t in state if not torch.equal(t, self._source[name])}
        found = self.micro_batches.found
        return {
            "tensors": moved,
            "optimizer": self._mover.state_dict(),
            "scaler": self.scaler.state_dict(),
            **({"micro_batches": dict(found)} if found else {}),
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See :meth:`Adapter.load_state_dict`."""
        self.reset()
        for name, tensor in state["tensors"].items():
            self._state[name].copy_(tensor)
        self._mover.load_state_dict(state["optimizer"])
        self.micro_batches.found.update(state.get("micro_batches", {}))
        self.scaler.load_state_dict(state["scaler"])

    def _new_scaler(self) -> torch.amp.GradScaler:
        return torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)


def total_loss(record: Mapping[str, float]) -> float:
    """Returns what a step minimises: the sum of the scalars whose names begin with ``loss_``."""
    return sum(value for name, value in record.items() if name.startswith("loss_"))
