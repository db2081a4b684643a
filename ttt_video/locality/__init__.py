"""Measures what the theory of locality is about: how gradients differ and drift along a video.

:mod:`.gradients` computes both losses' gradients of every frame, :mod:`.estimates` the numbers of
docs/theory.md from them.
"""

from __future__ import annotations

from .estimates import Locality, estimate_locality
from .gradients import Gradients, labelled_samples, measure_gradients

__all__ = [
    "Gradients",
    "Locality",
    "estimate_locality",
    "labelled_samples",
    "measure_gradients",
]
