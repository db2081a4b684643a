"""Finds how many samples of a gradient step fit a GPU's memory at once."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import torch

from ..errors import UserError
from .window import Sample

logger = logging.getLogger(__name__)

T = TypeVar("T")

ON_CPU = 8
"""The choice where memory is not counted, so that a run's numbers do not depend on the machine."""

SHARE = 0.85
"""Part of the free memory that a micro-batch may be expected to take; the rest is for the
optimizer's state, which the first step makes, for predictions and for fragments."""


MOST = 4096
"""Bound where a sample takes no memory that could be measured."""


class Memory(Protocol):
    """Tells a device's memory, in bytes."""

    def free(self) -> int:
        """Returns what could still be allocated."""

    def allocated(self) -> int:
        """Returns what tensors hold."""

    def peak(self) -> int:
        """Returns the most that they held since :meth:`forget_peak`."""

    def forget_peak(self) -> None:
        """Lets the peak be what is held now."""

    def release(self) -> None:
        """Gives cached blocks back, so that larger ones can be made of them."""


class GpuMemory:
    """The memory of a CUDA device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def free(self) -> int:
        """Returns the free bytes, within this process' share, and those that are cached."""
        free, total = torch.cuda.mem_get_info(self.device)
        reserved = torch.cuda.memory_reserved(self.device)
        share = getattr(torch.cuda, "get_per_process_memory_fraction", None)  # PyTorch 2.8 or newer
        if share is not None:
            free = min(free, int(share(self.device) * total) - reserved)
        return free + reserved - self.allocated()

    def allocated(self) -> int:
        """Returns the bytes of all tensors."""
        return torch.cuda.memory_allocated(self.device)

    def peak(self) -> int:
        """Returns the most bytes of tensors since :meth:`forget_peak`."""
        return torch.cuda.max_memory_allocated(self.device)

    def forget_peak(self) -> None:
        """Resets the peak of PyTorch's statistics."""
        torch.cuda.reset_peak_memory_stats(self.device)

    def release(self) -> None:
        """Empties PyTorch's cache."""
        torch.cuda.empty_cache()


class MicroBatches:
    """Says how many samples go through the model at once: ``TTT.MICRO_BATCH_SIZE``.

    A given number is kept. 0 is the largest power of two that fits, or the whole batch: the first
    step on frames of a size is tried with two samples and with three, which tell what one takes.
    A step that fails all the same is taken again in halves. The choice is kept; frames that are
    larger than all before are tried anew, smaller ones take the choice of larger ones. Without a
    memory to count, 0 is :data:`ON_CPU`.
    """

    def __init__(self, given: int, memory: Memory | None) -> None:
        """Takes ``TTT.MICRO_BATCH_SIZE`` and the memory to count; None on a CPU."""
        self.given = given or (0 if memory else ON_CPU)
        self.memory = memory
        self.found: dict[int, int] = {}
        """Micro-batches by the pixels of a frame, where they were chosen."""

    @classmethod
    def on(cls, device: torch.device, given: int) -> MicroBatches:
        """Returns those of a device."""
        return cls(given, GpuMemory(device) if device.type == "cuda" else None)

    def size(self, batch: list[Sample]) -> int:
        """Returns the samples per forward and backward of a batch; all while nothing is known."""
        if self.given:
            return self.given
        pixels = _pixels(batch)
        larger = [own for own in self.found if own >= pixels]
        return self.found[min(larger)] if larger else len(batch)

    def run(
        self, batch: list[Sample], work: Callable[[list[Sample]], T], undo: Callable[[], None]
    ) -> T:
        """Runs a step's forward and backward passes such that they fit.

        Args:
            batch: of the step.
            work: runs some of its samples, in micro-batches of :meth:`size`.
            undo: makes everything as it was before ``work``, after it ended or failed.

        Raises:
            UserError: the given number does not fit, or not even one sample does.
        """
        known = self.given or _pixels(batch) <= max(self.found, default=0)
        if self.memory is not None and not known and len(batch) > 2:
            self._keep(batch, self._estimate(self.memory, batch, work, undo))
        while True:
            try:
                return work(batch)
            except torch.cuda.OutOfMemoryError as error:
                size = min(self.size(batch), len(batch))
                if self.given or size == 1:
                    raise UserError(_does_not_fit(batch, size)) from error
            # Out of the handler, whose error holds on to the tensors of the pass that failed.
            undo()
            if self.memory is not None:
                self.memory.release()
            self._keep(batch, _fewer(size))

    def _estimate(
        self,
        memory: Memory,
        batch: list[Sample],
        work: Callable[[list[Sample]], Any],
        undo: Callable[[], None],
    ) -> int:
        """Returns the size that should fit, by what two and three samples take.

        A single one is not tried, because it has no variance for batch norm in train mode.
        """
        taken: list[int] = []
        for count in (2, 3):
            memory.forget_peak()
            fits = True
            try:
                work(batch[:count])
            except torch.cuda.OutOfMemoryError:
                fits = False
            peak = memory.peak()
            undo()
            if not fits:
                memory.release()
                return count - 1
            # The first trial makes what stays, such as gradients that graphs write to.
            taken.append(peak - memory.allocated())
        each = max(taken[1] - taken[0], 1)
        room = int(SHARE * memory.free()) - (taken[1] - 3 * each)
        # A batch may be cut short by a frame budget, and be whole later.
        return _power_within(min(max(room // each, 1), MOST))

    def _keep(self, batch: list[Sample], size: int) -> None:
        pixels = _pixels(batch)
        # A size that no longer fits these frames fits no larger ones, either.
        self.found = {own: n if own < pixels else min(n, size) for own, n in self.found.items()}
        self.found[pixels] = size
        logger.info(
            "Steps on frames of %s go through the model %d samples at a time (TTT.MICRO_BATCH_SIZE "
            "0: as many as fit the memory)",
            _largest(batch),
            min(size, len(batch)),
        )


def _pixels(batch: list[Sample]) -> int:
    return max(height * width for height, width in map(_size, batch))


def _size(sample: Sample) -> tuple[int, int]:
    height, width = sample["image"].shape[-2:]
    return height, width


def _largest(batch: list[Sample]) -> str:
    height, width = max(map(_size, batch), key=lambda size: size[0] * size[1])
    return f"{height}x{width}"


def _power_within(number: int) -> int:
    """Returns the largest power of two that is at most ``number``, which is positive."""
    return 1 << (number.bit_length() - 1)


def _fewer(size: int) -> int:
    """Returns the largest power of two below ``size``, which is at least 2."""
    return _power_within(size - 1)


def _does_not_fit(batch: list[Sample], size: int) -> str:
    if size == 1:
        return (
            f"not even one sample of a step on frames of {_largest(batch)} fits the GPU's memory: "
            "set TTT.CHECKPOINT True, a smaller TTT.CROP.SIZE, or TTT.PRECISION bf16"
        )
    return (
        f"{size} samples of a step on frames of {_largest(batch)} do not fit the GPU's memory at "
        f"once: set TTT.MICRO_BATCH_SIZE to {_fewer(size)}, or to 0, which finds as many as fit; "
        "TTT.CHECKPOINT True needs less, too"
    )
