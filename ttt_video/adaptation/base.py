"""The interface of adapters, which change a model while it watches a video.

A method is a function ``name(cfg, model) -> Adapter`` in :data:`ADAPTER_REGISTRY`, one file each.
``configs/methods.yaml`` adds names for a method with other settings, or within wrappers.
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

from ..config.methods import ENSEMBLE, NamedMethod, named_method, shipped_methods
from ..errors import UserError, suggestion
from ..modeling.cast_weights import CastWeights
from ..modeling.graphs import (
    Capture,
    GraphRunner,
    autocast_in_graphs,
    capture_for,
    defines_together,
    surroundings,
)
from ..modeling.interface import parts_of
from .precision import in_precision
from .window import SlidingWindow

CPU = torch.device("cpu")
WITHOUT_GRAPHS = "without_graphs"
"""Key of a summary: what ran without CUDA graphs though it was to be replayed, and why."""
ADAPTER_REGISTRY = Registry("TTT_ADAPTER")
ADAPTER_REGISTRY.__doc__ = """
Code of adaptation methods by name: functions ``method(cfg, model) -> Adapter``.
"""
WRAPPER_REGISTRY = Registry("TTT_WRAPPER")
WRAPPER_REGISTRY.__doc__ = """
Adapters around an adapter by name: classes with ``from_config(cfg, inner)``.
"""


def method_names() -> list[str]:
    """Returns every name that ``--method`` and ``TTT.METHOD`` take, sorted."""
    return sorted({*shipped_methods(), *(name for name, _ in ADAPTER_REGISTRY)})


def find_method(name: str) -> NamedMethod:
    """Returns what a method's name stands for.

    Raises:
        UserError: there is no such method; the message lists those there are.
    """
    method = named_method(name)
    if method.runs not in ADAPTER_REGISTRY and not method.is_ensemble:
        raise UserError(
            f"no method {name!r}; {suggestion(name, method_names())} (a file that registers one "
            "goes to --register)"
        )
    return method


def timed_as(cfg: CfgNode, name: str) -> str:
    """Returns the method whose measured seconds a simulated clock takes for a method.

    What is registered says so by ``timed_as``, a name or a function of the config; an ensemble asks
    the method that it combines. Other methods are measured themselves.
    """
    method = find_method(name)
    runs = find_method(cfg.TTT.ENSEMBLE.METHOD).runs if method.is_ensemble else method.runs
    own = getattr(ADAPTER_REGISTRY.get(runs), "timed_as", "")
    return (own(cfg) if callable(own) else own) or name


def build_adapter(cfg: CfgNode, model: nn.Module, name: str | None = None) -> Adapter:
    """Builds a method's adapter around a model with its source weights.

    Args:
        cfg: with the keys of the method.
        model: to adapt.
        name: of the method; by default ``TTT.METHOD``.

    Raises:
        UserError: there is no such method, or the config or the weights do not fit it.
    """
    method = find_method(name or cfg.TTT.METHOD)
    _check_fixed_keys(cfg, method)
    if method.decoder and "g" not in parts_of(model):
        raise UserError(
            "the weights have no decoder g, so they were not trained jointly: give "
            "others, or call them --method main_task_only"
        )
    if method.is_ensemble:
        under = find_method(cfg.TTT.ENSEMBLE.METHOD)
        if under.is_ensemble:
            raise UserError(
                f"{ENSEMBLE} is {under.name!r}, itself an ensemble; name the method under it, "
                "such as none or online_ttt_mae"
            )
        adapter = build_adapter(cfg, model, under.name)
    else:
        adapter = ADAPTER_REGISTRY.get(method.runs)(cfg, model)
        adapter.predict_precision = cfg.TTT.PREDICT_PRECISION
        if cfg.TTT.CUDA_GRAPHS == "auto" and hasattr(model, "device"):
            device: Any = model.device
            adapter.replay_graphs(capture_for(torch.device(device)))
    for wrapper in method.wrappers:
        adapter = WRAPPER_REGISTRY.get(wrapper).from_config(cfg, adapter)
    return adapter


def require_classes(model: nn.Module, method: str) -> None:
    """Refuses a model of colours for a method that needs classes.

    Raises:
        UserError: the model colours frames.
    """
    if "color" in getattr(model, "outputs", ()):
        raise UserError(
            f"{method} needs classes, which colorization does not have: choose another --method"
        )


def _check_fixed_keys(cfg: CfgNode, method: NamedMethod) -> None:
    """Raises UserError if a key has another value than the one that the method's name means."""
    name = method.name
    own = name == cfg.TTT.METHOD
    flag = f"--method {name}" if own else f"{ENSEMBLE} {name} on the command line"
    for key, value in method.fixed.items():
        if cfg.TTT[key] != value:
            raise UserError(
                f"{name} has TTT.{key} {value!r}, not {cfg.TTT[key]!r}: "
                f"select it with {flag}, which sets its keys"
            )


@contextmanager
def module_mode(model: nn.Module, training: bool) -> Iterator[None]:
    """Puts a model in train or eval mode; afterwards every module has its own flag again."""
    flags = [(module, module.training) for module in model.modules()]
    if any(flag != training for _, flag in flags):
        model.train(training)
    else:
        flags = []  # there are hundreds, and this runs twice a frame
    try:
        yield
    finally:
        for module, flag in flags:
            module.training = flag


@contextmanager
def seeded_layers(device: torch.device, generator: torch.Generator) -> Iterator[None]:
    """Makes layers that draw at random follow a generator, not the process's random state."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(int(torch.randint(2**62, (), generator=generator)))
        yield


StepObserver = Callable[["Adapter", dict[str, float]], None]
"""Is told after each gradient step: the adapter that took it, and the step's scalars."""


class Adapter(ABC):
    """Owns a model during a stream: changes its weights, predicts with them, restores them.

    Attributes:
        offline: whether :meth:`watch` must see a whole video before its first prediction.
        updates: whether :meth:`adapt` does anything.
        timed_as: name of the method whose measured seconds a simulated clock takes, those of steps
            for updates that draw samples, and those of predictions for each that is made, in an
            update, too; "" for a method that is measured itself.
        predict_precision: of predictions, in :data:`PRECISIONS`; :func:`build_adapter` sets it.
    """

    offline: bool = False
    updates: bool = True
    timed_as: str = ""
    predict_precision: str = "fp32"
    _observer: StepObserver | None = None
    _replayed_prediction: GraphRunner[Any] | None = None

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

    def observe_steps(self, observer: StepObserver | None) -> None:
        """Has an observer told after each gradient step; None ends that.

        The observer may predict. It must change nothing, and draw no random numbers.
        """
        self._observer = observer

    def watch(self, video: Iterable[Any], generator: torch.Generator) -> None:
        """Sees a whole video before its first frame is adapted on, if ``offline`` is set.

        Args:
            video: its frames with their labels; it can be iterated several times.
            generator: the video's random state, on the CPU.
        """
        raise NotImplementedError(f"{type(self).__name__} learns while the video goes on")

    def predict(self, frame: Any) -> dict[str, Any]:
        """Returns detectron2's outputs for one frame, with the current weights in eval mode."""
        with self.predicting():
            if self._replayed_prediction is None:
                return self.model([frame])[0]
            try:
                return self._predict_by_graphs(self._replayed_prediction, frame)
            except torch.cuda.OutOfMemoryError:
                if not self.drop_graphs():
                    raise
            return self._predict_by_graphs(self._replayed_prediction, frame)

    def _predict_by_graphs(self, run: GraphRunner[Any], frame: Any) -> dict[str, Any]:
        model: Any = self.model
        kind = torch.device(model.device).type
        with autocast_in_graphs(kind):
            scores = run(frame["image"][None], key=surroundings(kind))
            return model.finished([frame], scores)[0]

    def replay_graphs(self, capture: Capture | None) -> None:
        """Has predictions, and steps where the method can, replayed as graphs; None ends that.

        A model whose prediction can be replayed has the methods ``replayed(images)``, from which
        its tensors come, and ``finished(inputs, tensors)``, its outputs of them
        (:class:`~ttt_video.modeling.MaskFormerTTT`). All others predict as they do without.
        """
        self._replayed_prediction = None
        model: Any = self.model
        if capture is not None and defines_together(model, "replayed", "predict"):
            weights = [*model.parameters(), *model.buffers()]
            parts = parts_of(model)
            cast = CastWeights(model, [name for role in "fh" for name in parts.get(role, ())])
            self._replayed_prediction = GraphRunner(
                cast.replayed, capture, name="prediction", weights=weights
            )

    @contextmanager
    def predicting(self) -> Iterator[None]:
        """Puts the model in eval mode and in the precision of predictions, without gradients."""
        precision = self.predict_precision
        device = torch.device(getattr(self.model, "device", CPU))
        with (
            module_mode(self.model, training=False),
            torch.no_grad(),
            in_precision(device, precision, keep_casts=False),
        ):
            yield

    def facts(self) -> dict[str, Any]:
        """Returns what a summary says of how the adapter ran, beside its settings.

        :data:`WITHOUT_GRAPHS` is there if something could not be replayed, and says why, by name.
        """
        failures = {run.name: run.failure for run in self._runners() if run.failure}
        return {WITHOUT_GRAPHS: failures} if failures else {}

    def _runners(self) -> list[GraphRunner[Any]]:
        """Returns what replays graphs."""
        return [] if self._replayed_prediction is None else [self._replayed_prediction]

    def drop_graphs(self) -> bool:
        """Frees the memory of recorded graphs, where other work needs it; they are recorded anew.

        Returns:
            Whether there were any.
        """
        dropped = self._replayed_prediction is not None and self._replayed_prediction.clear()
        torch.cuda.empty_cache()  # does nothing without a GPU
        return dropped

    @abstractmethod
    def reset(self) -> None:
        """Returns to the source weights, with nothing remembered."""

    def reset_weights(self) -> None:
        """Returns to the source weights between two frames of a video (``TTT.RESET frame``).

        Unlike :meth:`reset` it keeps what a method remembers of the video besides weights.
        """
        self.reset()

    def state_dict(self) -> dict[str, Any]:
        """Returns all that has changed since :meth:`reset`.

        It holds dicts, lists, tuples, tensors, numbers and strings only, so that ``torch.load``
        reads it with ``weights_only=True``. As in PyTorch the tensors are not copies: save them
        before going on.
        """
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Becomes the adapter that ``state`` was taken from, bit for bit.

        The model must have the same source weights.
        """
        self.reset()
