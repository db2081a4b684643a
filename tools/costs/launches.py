"""Counts the operations that a host issues for a step and a prediction, on any device.

On a GPU most of them launch a kernel, which takes the host some microseconds. A replayed graph is
one launch, so what is left are the operations outside of it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from detectron2.config import CfgNode
from torch.utils._python_dispatch import TorchDispatchMode

from costs.inputs import frames, model_of
from ttt_video.adaptation import build_adapter, build_window

CHANGES_VIEW_ALONE = frozenset(
    {
        "_reshape_alias", "_unsafe_view", "alias", "as_strided", "detach", "diagonal", "expand",
        "lift_fresh", "permute", "select", "slice", "split", "split_with_sizes", "squeeze", "t",
        "transpose", "unbind", "unfold", "unsqueeze", "view", "empty", "empty_like",
        "empty_strided", "new_empty", "new_empty_strided",
    }
)  # fmt: skip
"""Operations of ATen that run no kernel: they make views or memory without values."""


class LaunchCounter(TorchDispatchMode):
    """Counts operations of ATen that run a kernel, forward and backward.

    Attributes:
        operations: how often each was called, by name.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func._schema.name.removeprefix("aten::")
        if name not in CHANGES_VIEW_ALONE:
            self.operations[name] += 1
        return func(*args, **(kwargs or {}))


def count_launches(work: Callable[[], object]) -> Counter[str]:
    """Runs work once and returns how often it called each operation."""
    with LaunchCounter() as counter:
        work()
    return counter.operations


class Replayed:
    """Stands for a graph in a count: recorded work is issued by one launch.

    It is a :class:`~ttt_video.modeling.graphs.Capture` that does the work as it is, uncounted.

    Attributes:
        launches: replays so far.
    """

    def __init__(self) -> None:
        self.launches = 0

    def warm_up(self, work: Callable[[], Any]) -> Any:
        """Runs work, counted."""
        return work()

    def record(self, work: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        """Returns a result to be read, without its numbers' changes from call to call."""
        with torch.utils._python_dispatch._disable_current_modes():
            result = work()
        return result, self._replay

    def _replay(self) -> None:
        self.launches += 1


def launches(cfg: CfgNode, size: tuple[int, int]) -> dict[str, dict[str, int]]:
    """Counts a step and a prediction of ``cfg`` on frames of (height, width).

    Returns:
        For "step" and "prediction" the number of operations ``eager``, those ``outside`` of graphs,
        and the number of ``graphs`` that are launched.
    """
    counts: dict[str, dict[str, int]] = {"step": {}, "prediction": {}}
    for replayed in (None, Replayed()):
        adapter = build_adapter(cfg, model_of(cfg))
        adapter.replay_graphs(replayed)
        window = build_window(cfg, cfg.MODEL.DEVICE)
        frame, generator = frames(1, *size)(0), torch.Generator().manual_seed(0)
        window.push(frame)
        works: dict[str, Callable[[], object]] = {
            "step": partial(adapter.adapt, window, generator),
            "prediction": partial(adapter.predict, window.current),
        }
        for name, work in works.items():
            for _ in range(2):  # the second call of a shape is recorded
                work()
            before = replayed.launches if replayed else 0
            total = sum(count_launches(work).values())
            if replayed is None:
                counts[name]["eager"] = total
            else:
                counts[name]["outside"] = total
                counts[name]["graphs"] = replayed.launches - before
    return counts
