"""Measures what the theory of locality is about: how gradients differ and drift along a video.

:mod:`.gradients` computes both losses' gradients of every frame, :mod:`.estimates` the numbers of
docs/theory.md from them; :mod:`.one_frame` follows both losses through steps on one frame.
"""

from __future__ import annotations

from .estimates import Locality, estimate_locality
from .gradients import Gradients, labelled_samples, measure_gradients
from .one_frame import FrameSteps, follow_steps

__all__ = [
    "FrameSteps",
    "Gradients",
    "Locality",
    "estimate_locality",
    "follow_steps",
    "labelled_samples",
    "measure_gradients",
]
