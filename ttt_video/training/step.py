"""The optimizer step of joint training: micro-batches, mixed precision, reproducible draws."""

from __future__ import annotations

import time
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from detectron2.engine import SimpleTrainer
from detectron2.utils import comm
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..errors import UserError


def amp_dtype(device: torch.device, precision: str = "auto") -> torch.dtype:
    """Returns the type of ``SOLVER.AMP.PRECISION``: "auto" is bfloat16 if the device has it."""
    if precision == "auto":
        old = device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0)
        precision = "fp16" if old else "bf16"
    return {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]


class TrainStep(SimpleTrainer):
    """Takes an optimizer step on a batch, on any device, in micro-batches, with mixed precision.

    The gradient is that of the whole batch's loss, whatever number of micro-batches and processes
    compute it, for images of one size (others are padded to the largest of their micro-batch).
    Random numbers depend on the seed, the step and the place of the micro-batch in the batch. So
    processes change nothing but the order of summation: two that share a batch compute what one
    does in micro-batches of the same size. A resumed run needs no generator's state.

    detectron2's ``AMPTrainer`` is not used because it refuses to run without CUDA.

    Args:
        model: returns a dict of losses; if it has ``loss_normalizers``, they are passed to it.
        data_loader: yields batches.
        optimizer: over the model's parameters.
        micro_batch_size: images per forward and backward, which divides a batch; 0 = all.
        seed: of everything drawn in a step.
        dtype: autocast precision, or None for full precision; float16 scales the loss.
    """

    def __init__(
        self,
        model: nn.Module,
        data_loader: Iterable[list[dict[str, Any]]],
        optimizer: torch.optim.Optimizer,
        *,
        micro_batch_size: int = 0,
        seed: int = 0,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(model, data_loader, optimizer)
        self.micro_batch_size = micro_batch_size
        self.seed = seed
        self.device_type = next(model.parameters()).device.type
        self.dtype = dtype
        self.scaler = torch.amp.GradScaler(self.device_type, enabled=dtype == torch.float16)

    def run_step(self) -> None:
        """Loads a batch, takes a step, and records the losses.

        Raises:
            UserError: a loss is not finite; the weights are still those before the step.
        """
        start = time.perf_counter()
        batch = next(self._data_loader_iter)
        data_time = time.perf_counter() - start

        self.optimizer.zero_grad()
        losses = self.accumulate_gradients(batch)
        self.after_backward()
        # One transfer for all losses: reading thirty scalars one by one would sync thirty times.
        values = torch.stack(list(losses.values())).cpu()
        if not values.isfinite().all():
            raise _not_finite(self.iter, dict(zip(losses, values.tolist(), strict=True)))
        self._write_metrics(dict(zip(losses, values, strict=True)), data_time)
        self.scaler.unscale_(self.optimizer)  # before the optimizer clips
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def accumulate_gradients(self, batch: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Adds the (scaled) gradient of a batch's loss to the parameters; returns the losses."""
        size = self.micro_batch_size or len(batch)
        parts = [batch[i : i + size] for i in range(0, len(batch), size)]
        bare = bare_model(self.model)
        extra = {}
        if hasattr(bare, "loss_normalizers"):
            extra["normalizers"] = bare.loss_normalizers(batch, len(parts))
        sums: dict[str, torch.Tensor] = {}
        for i, part in enumerate(parts):
            place = comm.get_rank() * len(parts) + i
            entropy = np.random.SeedSequence([self.seed, self.iter, place])
            torch.manual_seed(int(entropy.generate_state(1, np.uint64)[0]))
            with self._gradients_shared(after=i == len(parts) - 1):
                with torch.autocast(self.device_type, self.dtype) if self.dtype else nullcontext():
                    losses = self.model(part, **extra)
                self.scaler.scale(sum(losses.values()) / len(parts)).backward()
            for name, loss in losses.items():
                sums[name] = sums.get(name, 0.0) + loss.detach().float() / len(parts)
        return sums

    def _gradients_shared(self, after: bool) -> AbstractContextManager[None]:
        """Shares gradients among processes after this backward pass, or after a later one."""
        if after or not isinstance(self.model, DistributedDataParallel):
            return nullcontext()
        return self.model.no_sync()

    def state_dict(self) -> dict[str, Any]:
        """Returns the state of the optimizer and the loss scale."""
        return {**super().state_dict(), "scaler": self.scaler.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores :meth:`state_dict`."""
        super().load_state_dict(state_dict)
        self.scaler.load_state_dict(state_dict["scaler"])


def _not_finite(step: int, losses: dict[str, float]) -> UserError:
    said = ", ".join(f"{name} {value:.3g}" for name, value in losses.items())
    return UserError(
        f"the loss of iteration {step} is not finite ({said}), and no checkpoint is from after it; "
        "try a smaller SOLVER.BASE_LR or SOLVER.CLIP_GRADIENTS.CLIP_VALUE, more "
        "SOLVER.WARMUP_ITERS, or SOLVER.AMP.ENABLED False, in another OUTPUT_DIR"
    )


def bare_model(model: nn.Module) -> Any:
    """Returns the model without its wrapper for data parallelism."""
    return model.module if isinstance(model, DistributedDataParallel) else model
