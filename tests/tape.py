"""A stand-in for CUDA graphs on a CPU: a tape of operations on fixed memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

WAITS = {
    torch.ops.aten._local_scalar_dense.default: "a number is read",
    torch.ops.aten.equal.default: "tensors are compared",
    torch.ops.aten.nonzero.default: "a shape depends on numbers",
    torch.ops.aten.lift_fresh.default: "a tensor is made of Python's numbers",
}
"""Operations that no CUDA graph can record, because the host waits or copies."""

COPIED = {torch.ops.aten.index_put_, torch.ops.aten.index_put}
"""Operations that a GPU gets numbers for by a copy, as tensors of shape ()."""


class Tape(TorchDispatchMode):
    """Keeps operations with the tensors that they read and write.

    It undoes what they did to other memory than their own, because recording runs nothing.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, list[Tensor]]] = []
        self.own: set[int] = set()
        self.before: list[tuple[Tensor, Tensor]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in WAITS:
            raise RuntimeError(f"{func} cannot be recorded: {WAITS[func]}")
        if func.overloadpacket in COPIED and any(x.dim() == 0 for x in tensors((args, kwargs))):
            raise RuntimeError(f"{func} cannot be recorded: a number is copied to the device")
        if func._schema.is_mutable:
            for x in tensors((args, kwargs)):
                if place(x) not in self.own:
                    self.before.append((x, x.detach().clone()))
        known = {place(x) for x in tensors((args, kwargs))}
        result = func(*args, **kwargs)
        made = tensors(result)
        self.own |= {place(x) for x in made} - known
        self.calls.append((func, args, kwargs, made))
        return result


class TapeCapture:
    """Replays a tape. What it recorded is full of NaN until then, as a graph's memory would be.

    Attributes:
        recorded, replayed: how often.
        fail: an error that recording raises, if any.
    """

    def __init__(self) -> None:
        self.recorded = self.replayed = 0
        self.fail: Exception | None = None

    def warm_up(self, work):
        return work()

    def record(self, work):
        random, tape = torch.get_rng_state(), Tape()
        try:
            with tape:
                result = work()
                if self.fail is not None:
                    raise self.fail
        finally:
            with torch.no_grad():
                for x, value in reversed(tape.before):
                    x.copy_(value)
            torch.set_rng_state(random)
        self.recorded += 1
        poison(result, tape)

        @torch.no_grad()
        def replay() -> None:
            self.replayed += 1
            for func, args, kwargs, made in tape.calls:
                for old, new in zip(made, tensors(func(*args, **kwargs)), strict=True):
                    if old.data_ptr() != new.data_ptr():
                        old.copy_(new)

        return result, replay


@torch.no_grad()
def poison(result: Any, tape: Tape) -> None:
    for x in tensors(result):
        assert place(x) in tape.own, "a result is not made in the graph"
        if x.is_floating_point():
            x.fill_(float("nan"))


def tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def place(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()
