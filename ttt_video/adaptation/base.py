"""Adapters: how a model changes while it watches a video. One file per method.

A method is a function ``name(cfg, model) -> Adapter`` in :data:`ADAPTER_REGISTRY`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.utils.registry import Registry
from torch import nn

from ..errors import UserError
from .window import SlidingWindow

ADAPTER_REGISTRY = Registry("TTT_ADAPTER")
ADAPTER_REGISTRY.__doc__ = """
Adaptation methods by the name that ``--method`` and ``TTT.METHOD`` take: functions
``method(cfg, model) -> Adapter``.
"""


def find_method(name: str) -> Callable[[CfgNode, nn.Module], Adapter]:
    """The function that builds a method's adapter.

    Raises:
        UserError: there is no such method; the message lists those there are.
    """
    if name not in ADAPTER_REGISTRY:
        known = ", ".join(sorted(known for known, _ in ADAPTER_REGISTRY))
        raise UserError(f"no method {name!r}; choose one of: {known}")
    return ADAPTER_REGISTRY.get(name)


def build_adapter(cfg: CfgNode, model: nn.Module) -> Adapter:
    """The adapter that ``TTT.METHOD`` names, around a model with its source weights loaded."""
    return find_method(cfg.TTT.METHOD)(cfg, model)


def require_keys(cfg: CfgNode, method: str, **values: Any) -> None:
    """Checks that ``TTT.*`` keys have the values that make a method what its name says.

    Raises:
        UserError: one has another value; ``--method`` sets them all.
    """
    under = method != cfg.TTT.METHOD and method == cfg.TTT.ENSEMBLE.METHOD
    flag = f"TTT.ENSEMBLE.METHOD {method} on the command line" if under else f"--method {method}"
    for key, value in values.items():
        if cfg.TTT[key] != value:
            raise UserError(
                f"{method} has TTT.{key} {value!r}, not {cfg.TTT[key]!r}: "
                f"select it with {flag}, which sets its keys"
            )


@contextmanager
def module_mode(model: nn.Module, training: bool) -> Iterator[None]:
    """Train or eval mode for a while; afterwards every module has its own flag back."""
    flags = [(module, module.training) for module in model.modules()]
    if any(flag != training for _, flag in flags):
        model.train(training)
    else:  # hundreds of modules, twice a frame
        flags = []
    try:
        yield
    finally:
        for module, flag in flags:
            module.training = flag


@contextmanager
def seeded_layers(device: torch.device, generator: torch.Generator) -> Iterator[None]:
    """Layers that draw at random follow a generator for a while, not the process's state."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(int(torch.randint(2**62, (), generator=generator)))
        yield


class Adapter(ABC):
    """Owns a model during a stream: changes its weights, predicts with them, restores them.

    Attributes:
        offline: whether :meth:`watch` must have seen a whole video before its first prediction.
        updates: whether :meth:`adapt` does anything.
    """

    offline: bool = False
    updates: bool = True

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    @abstractmethod
    def adapt(self, window: SlidingWindow, generator: torch.Generator) -> dict[str, float]:
        """Updates the weights on the window, whose last frame is the current one.

        Args:
            window: the recent frames, without labels.
            generator: the video's random state, on the CPU.

        Returns:
            Scalars for this frame's record, such as losses.
        """

    def watch(self, video: Iterable[Any], generator: torch.Generator) -> None:
        """Sees a whole video before its first frame is adapted on; only where ``offline`` is set.

        Args:
            video: its frames, labels included, to be iterated as often as needed.
            generator: the video's random state, on the CPU.
        """
        raise NotImplementedError(f"{type(self).__name__} learns while the video goes on")

    def predict(self, frame: Any) -> dict[str, Any]:
        """detectron2's outputs for one frame, with the current weights in eval mode."""
        with module_mode(self.model, training=False), torch.no_grad():
            return self.model([frame])[0]

    @abstractmethod
    def reset(self) -> None:
        """Returns to the source weights, with nothing remembered."""

    def reset_weights(self) -> None:
        """Returns to the source weights between two frames of a video (``TTT.RESET frame``).

        As :meth:`reset`, but for what a method remembers of the video besides weights.
        """
        self.reset()

    def state_dict(self) -> dict[str, Any]:
        """All that differs from the adapter right after :meth:`reset`.

        Dicts, lists, tuples, tensors and plain numbers and strings only, so that ``torch.load``
        reads it with ``weights_only=True``. As in PyTorch the tensors are not copies: save them
        before going on.
        """
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Becomes the adapter that ``state`` was taken of, bit for bit, whatever came before.

        The model must hold the source weights that it held there.
        """
        self.reset()
