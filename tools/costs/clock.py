"""Measures seconds, memory and stages of pieces of work that run in turn."""

from __future__ import annotations

import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

Work = Callable[[], object]

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


def synchronize(device: torch.device) -> None:
    """Waits for the work of a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Returns median, quartiles and extremes, and all values in their order."""
    ordered = sorted(values)
    lower, median, upper = (
        statistics.quantiles(ordered, n=4, method="inclusive") if len(ordered) > 1 else ordered * 3
    )
    return {
        "median": median,
        "lower_quartile": lower,
        "upper_quartile": upper,
        "min": ordered[0],
        "max": ordered[-1],
        "all": list(values),
    }


def measure(
    works: Mapping[str, Work], device: torch.device, *, steps: int, warmup: int
) -> dict[str, dict[str, Any]]:
    """Measures several pieces of work in turn, so that what disturbs one disturbs all.

    Args:
        works: by name; each is called ``warmup`` + ``steps`` times.
        device: that they run on.
        steps: calls that count.
        warmup: calls before them.

    Returns:
        By name: ``seconds`` (:func:`spread`), ``cpu_seconds`` of all cores together, call by call,
        and ``cpu_seconds_median`` (to believe on a machine that does other things, too),
        ``peak_memory_bytes`` (of the
        process, or of the GPU's allocator) and ``working_memory_bytes`` (how much the work added).
    """
    seconds: dict[str, list[float]] = {name: [] for name in works}
    cpu_seconds: dict[str, list[float]] = {name: [] for name in works}
    peaks = dict.fromkeys(works, 0)
    added = dict.fromkeys(works, 0)
    for round_ in range(warmup + steps):
        for name, work in works.items():
            before = reset_peak_memory(device)
            start, cpu_start = time.perf_counter(), time.process_time()
            work()
            synchronize(device)
            elapsed, cpu = time.perf_counter() - start, time.process_time() - cpu_start
            peak = peak_memory(device)
            peaks[name] = max(peaks[name], peak)
            added[name] = max(added[name], peak - before)
            if round_ >= warmup:
                seconds[name].append(elapsed)
                cpu_seconds[name].append(cpu)
    return {
        name: {
            "seconds": spread(seconds[name]),
            "cpu_seconds": cpu_seconds[name],
            "cpu_seconds_median": statistics.median(cpu_seconds[name]),
            "peak_memory_bytes": peaks[name],
            "working_memory_bytes": added[name],
        }
        for name in works
    }


def resident_memory() -> int:
    """Returns the bytes of this process in memory now (Linux), else its largest size so far."""
    return _status_bytes("VmRSS") or _largest_ever()


def reset_peak_memory(device: torch.device) -> int:
    """Starts a new peak; returns the bytes in use now."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    with suppress(OSError):  # elsewhere than on Linux the peak is that of the whole process
        _CLEAR.write_text("5")
    return resident_memory()


def peak_memory(device: torch.device) -> int:
    """Returns the peak since :func:`reset_peak_memory`, resident or of the GPU's allocator."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return _status_bytes("VmHWM") or _largest_ever()


def _status_bytes(key: str) -> int:
    with suppress(OSError):
        for line in _STATUS.read_text().splitlines():
            if line.startswith(f"{key}:"):
                return int(line.split()[1]) * 1024
    return 0


def _largest_ever() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class Stages:
    """Measures the stages of a step or a prediction by hooks on the model's parts.

    A stage ends where the next part begins; in the backward pass, when the gradient of a part's
    output is known. On a GPU each end waits for the device, so the sum is a little more than the
    time of the work without hooks.

    Attributes:
        seconds: by stage, summed over all calls.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = {}
        self._last = 0.0

    def mark(self, stage: str) -> None:
        """Adds the time since the last mark to a stage."""
        synchronize(self.device)
        now = time.perf_counter()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + now - self._last
        self._last = now

    @contextmanager
    def watch(
        self, model: nn.Module, head: str, optimizer: torch.optim.Optimizer | None = None
    ) -> Iterator[None]:
        """Records the work inside the context, by "backbone" and the parts of a head.

        Args:
            model: with a ``backbone`` and a head of ``pixel_decoder`` and ``predictor``.
            head: the name of the head that runs.
            optimizer: if one steps.
        """
        backbone = model.get_submodule("backbone")
        pixel_decoder = model.get_submodule(f"{head}.pixel_decoder")
        # A part's name, the part, and the stage that ends when autograd reaches its outputs.
        chain = [
            ("backbone", backbone, "pixel decoder, backward"),
            ("pixel decoder", pixel_decoder, "query decoder, backward"),
            ("query decoder", model.get_submodule(f"{head}.predictor"), "loss"),
        ]
        handles: list[Any] = []
        for name, module, behind in chain:

            def begin(module: nn.Module, args: Any) -> None:
                self.mark("other")

            def end(
                module: nn.Module, args: Any, out: Any, name: str = name, behind: str = behind
            ) -> None:
                self.mark(f"{name}, forward")
                # Autograd goes back in the order of operations: when it reaches the first of a
                # part's outputs, everything that used any of them is done.
                waiting = [behind]

                def arrive(grad: Tensor) -> None:
                    if waiting:
                        self.mark(waiting.pop())

                for tensor in _tensors(out):
                    if tensor.requires_grad:
                        tensor.register_hook(arrive)

            handles.append(module.register_forward_pre_hook(begin))
            handles.append(module.register_forward_hook(end))
        # The gradient of the first parameter is the last one.
        first = next(backbone.parameters())
        if first.requires_grad:
            handles.append(
                first.register_post_accumulate_grad_hook(lambda p: self.mark("backbone, backward"))
            )
        if optimizer is not None:
            pre = optimizer.register_step_pre_hook(lambda *_: self.mark("other"))
            post = optimizer.register_step_post_hook(lambda *_: self.mark("optimizer"))
            handles += [pre, post]
        synchronize(self.device)
        self._last = time.perf_counter()
        try:
            yield
            self.mark("other")
        finally:
            for handle in handles:
                handle.remove()

    def shares(self) -> dict[str, float]:
        """Returns each stage's share of the whole, largest first."""
        total = sum(self.seconds.values())
        ordered = sorted(self.seconds.items(), key=lambda item: -item[1])
        return {stage: seconds / total for stage, seconds in ordered}


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(item)
