"""Class balance: back to the source when predictions collapse (paper, Section 5.1; Volpi 2022)."""

from __future__ import annotations

from typing import Any

import torch

from ..tasks.outputs import predicted_classes
from .base import Adapter
from .gradient import GradientAdapter
from .window import SlidingWindow


class ClassBalance(Adapter):
    """Resets a method when it and the source weights predict too different numbers of classes.

    Both predict the current frame after each update (:func:`predicted_classes` says which of a
    model's outputs counts); frames without an update (``TTT.UPDATE_EVERY``) are not compared. A
    frame at which the method is reset gets the source's prediction; with ``TTT.PREDICT before``,
    where its own is out by then, the next frame does.
    """

    def __init__(self, inner: GradientAdapter, *, threshold: int) -> None:
        """
        Args:
            inner: the method.
            threshold: largest difference in the number of predicted classes that is let pass.
        """
        super().__init__(inner.model)
        self.inner = inner
        self.threshold = threshold
        self._prediction: tuple[Any, dict[str, Any]] | None = None

    def adapt(self, window: SlidingWindow, generator: torch.Generator) -> dict[str, float]:
        """The method's update; its record, both numbers of classes, and whether it was reset."""
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
        """The method's prediction; that of the current frame was made in :meth:`adapt`."""
        known, self._prediction = self._prediction, None
        if known is not None and known[0] is frame:
            return known[1]
        return self.inner.predict(frame)

    def reset(self) -> None:
        """The method's reset."""
        self._prediction = None
        self.inner.reset()

    def state_dict(self) -> dict[str, Any]:
        """The method's state; nothing of its own outlives a frame."""
        return {"inner": self.inner.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See :meth:`Adapter.load_state_dict`."""
        self._prediction = None
        self.inner.load_state_dict(state["inner"])
