"""How steady predictions are from one frame to the next: pure functions of label maps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

ChangeCounts = Mapping[str, int]
"""Pixels of one pair of frames, as JSON has it: ``changed`` of ``pixels``, and where both frames
are labelled ``flickered`` of ``steady``."""


def change_counts(
    previous: np.ndarray,
    current: np.ndarray,
    previous_labels: np.ndarray | None = None,
    current_labels: np.ndarray | None = None,
    ignore_label: int = 255,
) -> dict[str, int]:
    """Pixels whose predicted class differs between two adjacent frames.

    Args:
        previous, current: (H, W) predicted classes.
        previous_labels, current_labels: (H, W), ``ignore_label`` where unlabelled; None: none.

    Returns:
        ``changed`` and ``pixels``; with labels of both frames also ``flickered`` and ``steady``,
        the same of the pixels whose label is one class in both.
    """
    changed = previous != current
    counts = {"changed": int(np.count_nonzero(changed)), "pixels": changed.size}
    if previous_labels is not None and current_labels is not None:
        steady = (previous_labels == current_labels) & (current_labels != ignore_label)
        counts["flickered"] = int(np.count_nonzero(changed & steady))
        counts["steady"] = int(np.count_nonzero(steady))
    return counts


def add_changes(many: Iterable[ChangeCounts]) -> dict[str, int]:
    """Counts of several pairs of frames pooled."""
    total: dict[str, int] = {}
    for counts in many:
        for name, pixels in counts.items():
            total[name] = total.get(name, 0) + pixels
    return total


def change_shares(counts: ChangeCounts) -> dict[str, float | None]:
    """``change`` and, where frames are labelled, ``flicker``, in percent; None: of no pixel."""
    shares = {"change": _percent(counts["changed"], counts["pixels"])}
    if "steady" in counts:
        shares["flicker"] = _percent(counts["flickered"], counts["steady"])
    return shares


def _percent(part: int, whole: int) -> float | None:
    return 100 * part / whole if whole else None
