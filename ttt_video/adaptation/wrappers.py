"""Wraps adapters in others, which change what an adapter predicts or when it is reset.

``configs/methods.yaml`` names the methods that are built from them. Wrappers can be nested.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any, TypeVar

import torch
from detectron2.config import CfgNode
from torch import Tensor

from ..color.lab import compose, lightness, rgb_to_lab
from ..errors import UserError
from ..modeling.graphs import Capture
from ..tasks.outputs import predicted_classes
from .augmentation import VoteAugmentation
from .base import WRAPPER_REGISTRY, Adapter, StepObserver, require_classes
from .gradient import GradientAdapter
from .ln_adapt import NormAdapter, norm_adapter
from .window import SlidingWindow

Own = TypeVar("Own", bound="Wrapper")


class Wrapper(Adapter):
    """Forwards everything to the wrapped adapter; a subclass changes some of it."""

    def __init__(self, inner: Adapter) -> None:
        """Wraps ``inner``, which owns the model and all that moves."""
        super().__init__(inner.model)
        self.inner = inner
        self.offline = inner.offline
        self.updates = inner.updates
        self.timed_as = inner.timed_as

    @classmethod
    def from_config(cls: type[Own], cfg: CfgNode, inner: Adapter) -> Own:
        """Builds the wrapper; one with settings reads them from ``TTT.*``."""
        return cls(inner)

    def adapt(self, window: SlidingWindow, generator: torch.Generator) -> dict[str, float]:
        """Runs the wrapped adapter's update and returns its record."""
        return self.inner.adapt(window, generator)

    def observe_steps(self, observer: StepObserver | None) -> None:
        """Has the observer told of the wrapped adapter's steps, and predict as the wrapper does."""
        if observer is None:
            self.inner.observe_steps(None)
        else:
            self.inner.observe_steps(lambda inner, record: observer(self, record))

    def replay_graphs(self, capture: Capture | None) -> None:
        """Has the wrapped adapter replay graphs."""
        self.inner.replay_graphs(capture)

    def drop_graphs(self) -> bool:
        """Drops the graphs of the wrapped adapter."""
        return self.inner.drop_graphs()

    def watch(self, video: Iterable[Any], generator: torch.Generator) -> None:
        """Shows the wrapped adapter the whole video."""
        self.inner.watch(video, generator)

    def predict(self, frame: Any) -> dict[str, Any]:
        """Returns the wrapped adapter's prediction."""
        return self.inner.predict(frame)

    def facts(self) -> dict[str, Any]:
        """Returns the wrapped adapter's facts."""
        return self.inner.facts()

    def reset(self) -> None:
        """Resets the wrapped adapter."""
        self.inner.reset()

    def reset_weights(self) -> None:
        """Resets the wrapped adapter's weights and keeps remembered predictions."""
        self.inner.reset_weights()

    def state_dict(self) -> dict[str, Any]:
        """Returns the wrapped adapter's state under ``inner``."""
        return {"inner": self.inner.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See :meth:`Adapter.load_state_dict`."""
        self.inner.load_state_dict(state["inner"])


def _require_frames(cfg: CfgNode, inner: Adapter) -> None:
    """Raises UserError for a model of whole images, whose prediction is one class."""
    if "image_class" in getattr(inner.model, "outputs", ()):
        raise UserError(
            f"{cfg.TTT.METHOD} needs predictions of pixels or objects, and the model classifies "
            "whole images: choose another --method"
        )


def _require_pixels(cfg: CfgNode, inner: Adapter) -> None:
    """Raises UserError for a model of objects, which have no common names between predictions."""
    _require_frames(cfg, inner)
    for output, task in (("instances", "instance"), ("panoptic_seg", "panoptic")):
        if output in getattr(inner.model, "outputs", ()):
            raise UserError(
                f"{cfg.TTT.METHOD} combines class scores of pixels, which {task} segmentation "
                f"does not have; it needs a model with MODEL.MASK_FORMER.TEST.{task.upper()}_ON "
                "False"
            )


@WRAPPER_REGISTRY.register()
class ClassBalance(Wrapper):
    """Resets a method when its predictions collapse (paper, Section 5.1; Volpi et al., 2022).

    They have collapsed if the method and the source weights predict too different numbers of
    classes on the current frame. Both predict it after each update (:func:`predicted_classes` says
    which of a model's outputs counts); frames without an update (``TTT.UPDATE_EVERY``) are not
    compared. The frame of a reset gets the source's prediction; with ``TTT.PREDICT before``, which
    has predicted it by then, the next frame does.
    """

    inner: GradientAdapter

    def __init__(self, inner: GradientAdapter, *, threshold: int) -> None:
        """Keeps ``threshold``: the largest difference in the number of classes without a reset."""
        super().__init__(inner)
        self.threshold = threshold
        self._prediction: tuple[Any, dict[str, Any]] | None = None

    @classmethod
    def from_config(cls, cfg: CfgNode, inner: Adapter) -> ClassBalance:
        """Builds it with ``TTT.CLASS_BALANCE.THRESHOLD``."""
        assert isinstance(inner, GradientAdapter), "only these predict with the source weights, too"
        _require_frames(cfg, inner)
        require_classes(inner.model, cfg.TTT.METHOD)
        return cls(inner, threshold=cfg.TTT.CLASS_BALANCE.THRESHOLD)

    def adapt(self, window: SlidingWindow, generator: torch.Generator) -> dict[str, float]:
        """Returns the method's record, both numbers of classes, and whether it was reset."""
        record = self.inner.adapt(window, generator)
        frame = window.current
        output, source = self.inner.predict(frame), self.inner.predict_source(frame)
        own, expected = len(predicted_classes(output)), len(predicted_classes(source))
        collapsed = abs(own - expected) > self.threshold
        if collapsed:
            self.inner.reset()
            output = source
        self._prediction = (frame, output)
        return {
            **record,
            "predicted_classes": own,
            "source_classes": expected,
            "class_balance_resets": int(collapsed),
        }

    def predict(self, frame: Any) -> dict[str, Any]:
        """Returns the method's prediction; that of the current frame was made by :meth:`adapt`."""
        known, self._prediction = self._prediction, None
        if known is not None and known[0] is frame:
            return known[1]
        return self.inner.predict(frame)

    def reset(self) -> None:
        """Resets the method and forgets a prediction that was not fetched."""
        self._prediction = None
        super().reset()

    reset_weights = reset

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See :meth:`Adapter.load_state_dict`; a prediction belongs to one frame alone."""
        self._prediction = None
        super().load_state_dict(state)


@WRAPPER_REGISTRY.register()
class NormStatistics(Wrapper):
    """Estimates the statistics of normalisation layers anew before each update (Appendix A.2).

    The update then moves the layers' scales and shifts as they are with these statistics.
    """

    def __init__(self, inner: GradientAdapter, norms: NormAdapter) -> None:
        """Takes ``norms``, which shares the model of ``inner``."""
        super().__init__(inner)
        self.norms = norms

    @classmethod
    def from_config(cls, cfg: CfgNode, inner: Adapter) -> NormStatistics:
        """Builds it with the keys of ``ln_adapt``, for layers within ``TTT.MODULES``."""
        assert isinstance(inner, GradientAdapter), "others have no weights to share"
        return cls(inner, norm_adapter(cfg, inner.model, shared=True))

    def adapt(self, window: SlidingWindow, generator: torch.Generator) -> dict[str, float]:
        """Returns the method's record, and ``norm_shift``."""
        shift = self.norms.adapt(window, generator)
        return {**self.inner.adapt(window, generator), **shift}

    def reset(self) -> None:
        """Forgets the statistics and resets the method."""
        self.norms.reset()
        super().reset()

    reset_weights = reset

    def state_dict(self) -> dict[str, Any]:
        """Returns the method's state and the statistics."""
        return {**super().state_dict(), "norms": self.norms.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See :meth:`Adapter.load_state_dict`; weights that have moved replace those it folds."""
        self.norms.load_state_dict(state["norms"])
        super().load_state_dict(state)


@WRAPPER_REGISTRY.register()
class MajorityVote(Wrapper):
    """Gives each pixel the class of most of ``predictions`` predictions (paper, Section 5.1).

    The first prediction is of the frame as it is and decides ties, so that a single prediction is
    the wrapped method's. Draws depend on the seed and on the frame alone: they change neither the
    wrapped method's random numbers nor those of other frames.
    """

    def __init__(
        self, inner: Adapter, *, predictions: int, augment: VoteAugmentation, seed: int = 0
    ) -> None:
        """Takes ``predictions``, at least 1; ``augment`` alters all but the first, by ``seed``."""
        super().__init__(inner)
        if predictions < 1:
            raise ValueError(f"a vote needs at least one prediction, not {predictions}")
        self.predictions = predictions
        self.augment = augment
        self.seed = seed

    @classmethod
    def from_config(cls, cfg: CfgNode, inner: Adapter) -> MajorityVote:
        """Builds it with ``TTT.ENSEMBLE.PREDICTIONS`` votes and the augmentation of its keys."""
        _require_pixels(cfg, inner)
        require_classes(inner.model, cfg.TTT.METHOD)
        keys = cfg.TTT.ENSEMBLE
        augment = VoteAugmentation(tuple(keys.SCALE_RANGE), flip=keys.FLIP, color=keys.COLOR)
        return cls(inner, predictions=keys.PREDICTIONS, augment=augment, seed=max(cfg.SEED, 0))

    def predict(self, frame: Any) -> dict[str, Any]:
        """Returns ``sem_seg``: (K, H, W) shares of the votes, which sum to 1 in each pixel."""
        name = f"{self.seed}/{frame.get('video_id')}/{frame.get('frame_index')}/vote"
        seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big")
        generator = torch.Generator().manual_seed(seed)
        height, width = frame["image"].shape[-2:]
        frame = {"height": height, "width": width, **frame}
        output = self.inner.predict(frame)
        plain = output["sem_seg"].argmax(0, keepdim=True)
        votes = torch.zeros_like(output["sem_seg"], dtype=torch.float32)
        votes.scatter_(0, plain, 1.5)  # half a vote decides ties, and nothing else
        one = votes.new_ones(()).expand(plain.shape)
        for _ in range(self.predictions - 1):
            image, mirrored = self.augment(frame["image"], generator)
            labels = self.inner.predict({**frame, "image": image})["sem_seg"].argmax(0, True)
            votes.scatter_add_(0, labels.flip(-1) if mirrored else labels, one)
        return {**output, "sem_seg": votes / (self.predictions + 0.5)}


@WRAPPER_REGISTRY.register()
class TemporalSmoothing(Wrapper):
    """Predicts the mean class scores of the last ``size`` frames (paper, Section 5.1).

    A model of colours has the mean of a and b of CIE Lab, with the lightness of the current frame.

    The current frame is one of them. A frame keeps the scores of the weights of its time, unless it
    is predicted again. Frames count in the order of their predictions. Another video starts anew,
    even if the weights go on (``TTT.RESET never``).
    """

    def __init__(self, inner: Adapter, *, size: int) -> None:
        """Takes ``size``: frames to average, at least 1; 1 changes nothing."""

        super().__init__(inner)
        if size < 1:
            raise ValueError(f"smoothing needs at least the current frame, not {size}")
        self.size = size
        self._recent: dict[tuple[Any, Any], Tensor] = {}  # oldest first

    @classmethod
    def from_config(cls, cfg: CfgNode, inner: Adapter) -> TemporalSmoothing:
        """Builds it for the mean over ``TTT.ENSEMBLE.WINDOW_SIZE`` frames."""
        _require_pixels(cfg, inner)
        return cls(inner, size=cfg.TTT.ENSEMBLE.WINDOW_SIZE)

    def predict(self, frame: Any) -> dict[str, Any]:
        """Returns ``sem_seg``: (K, H, W) mean scores, or ``color``: (3, H, W) uint8 RGB.

        A video's frames must have one size.
        """
        output = self.inner.predict(frame)
        color = output.get("color")
        key = (frame.get("video_id"), frame.get("frame_index"))
        if any(video_id != key[0] for video_id, _ in self._recent):
            self._recent.clear()
        self._recent.pop(key, None)
        self._recent[key] = output["sem_seg"] if color is None else rgb_to_lab(color)[1:]
        if len(self._recent) > self.size:
            del self._recent[next(iter(self._recent))]
        # Summed from the oldest, so that the result depends on nothing but these frames.
        mean: Any = sum(self._recent.values()) / len(self._recent)
        if color is None:
            return {**output, "sem_seg": mean}
        return {**output, "color": compose(lightness(color), mean)}

    def observe_steps(self, observer: StepObserver | None) -> None:
        """Has the observer predict as the next :meth:`predict` would, and nothing remembered."""
        if observer is None:
            super().observe_steps(None)
            return

        def observe(adapter: Adapter, record: dict[str, float]) -> None:
            recent = dict(self._recent)
            observer(adapter, record)
            self._recent = recent

        super().observe_steps(observe)

    def reset(self) -> None:
        """Resets the wrapped adapter and forgets the predictions."""
        super().reset()
        self._recent.clear()

    def state_dict(self) -> dict[str, Any]:
        """Returns the wrapped adapter's state and the remembered predictions."""
        recent = [(*key, scores.cpu()) for key, scores in self._recent.items()]
        return {**super().state_dict(), "recent": recent}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See :meth:`Adapter.load_state_dict`."""
        super().load_state_dict(state)
        device: torch.device = self.model.device  # type: ignore[assignment]
        self._recent = {(v, i): scores.to(device) for v, i, scores in state["recent"]}
