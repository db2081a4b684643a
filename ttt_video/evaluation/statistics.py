"""How sure a mean over videos is: bootstrap intervals and paired tests, with videos as the unit.

Frames of one video resemble each other, so they are no independent samples; videos are. With few
videos little can be said, and these functions say no more: one video has no interval and p = 1; two
videos cannot give a p below 0.5, n videos none below 2 / 2^n (six are needed for p < 0.05).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

_EXACT_UP_TO = 16  # pairs: 65,536 ways to choose their signs
_RESAMPLES = 10_000  # of a bootstrap, and of the signs of more pairs


class Interval(NamedTuple):
    """A confidence interval."""

    low: float
    high: float


class Estimate(NamedTuple):
    """A mean over videos, each counting once; ``interval`` is None for a single video."""

    videos: int
    mean: float
    interval: Interval | None


class Comparison(NamedTuple):
    """The mean over videos of the difference to a reference, and two-sided tests that it is 0."""

    difference: Estimate
    p_permutation: float
    p_wilcoxon: float


def bootstrap_interval(
    values: Sequence[float], *, confidence: float = 0.95, seed: int = 0
) -> Interval | None:
    """Percentile bootstrap interval of the mean (Efron and Tibshirani 1993, section 13.3).

    Args:
        values: one number per video.
        confidence: coverage aimed at, in (0, 1).
        seed: of the 10,000 resamples; the same values and seed give the same interval.

    Returns:
        None for fewer than two values, whose spread is unknown.
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is {confidence}; it must lie in (0, 1)")
    sample = np.asarray(values, dtype=np.float64)
    n = len(sample)
    if n < 2:
        return None
    chosen = np.random.default_rng(seed).integers(0, n, (_RESAMPLES, n))
    tail = 50 * (1 - confidence)
    low, high = np.percentile(sample[chosen].mean(axis=1), [tail, 100 - tail])
    return Interval(float(low), float(high))


def permutation_p(differences: Sequence[float], *, seed: int = 0) -> float:
    """Two-sided paired permutation test that the mean difference is 0.

    Were there no effect, every difference could as well have the other sign. All 2^n choices of
    signs are tried for up to 16 pairs; beyond, 10,000 random ones, with the observed one among them
    (Phipson and Smyth 2010), so that p is never 0.

    Args:
        differences: one number per video.
        seed: of the random signs.

    Returns:
        p in (0, 1]; 1 where there is no difference at all.
    """
    sample = np.asarray(differences, dtype=np.float64)
    n = len(sample)
    if n <= _EXACT_UP_TO:
        signs = (np.arange(2**n)[:, None] >> np.arange(n) & 1) * 2 - 1
    else:
        signs = np.random.default_rng(seed).choice((-1, 1), (_RESAMPLES, n))
        signs[0] = 1
    # Sums that are equal on paper differ in their last bits; the tolerance keeps them equal.
    tolerance = 1e-12 * np.abs(sample).sum()
    extreme = np.abs(signs @ sample) >= abs(sample.sum()) - tolerance
    return float(extreme.mean())


def wilcoxon_p(differences: Sequence[float], *, seed: int = 0) -> float:
    """Two-sided Wilcoxon signed-rank test: :func:`permutation_p` of the ranks of the sizes.

    Differences of 0 are left out and ties share their mean rank. Unlike the usual tables and
    ``scipy.stats.wilcoxon`` it is exact for up to 16 pairs also where there are ties.
    """
    from scipy.stats import rankdata

    sample = np.asarray(differences, dtype=np.float64)
    sample = sample[sample != 0]
    return permutation_p(np.sign(sample) * rankdata(np.abs(sample)), seed=seed)


def estimate(values: Sequence[float], *, seed: int = 0) -> Estimate:
    """Mean over videos with its 95 % interval; ``values`` must not be empty."""
    if not len(values):
        raise ValueError("no video to take a mean of")
    return Estimate(len(values), float(np.mean(values)), bootstrap_interval(values, seed=seed))


def compare(
    ours: Mapping[str, float], reference: Mapping[str, float], *, seed: int = 0
) -> Comparison:
    """Paired comparison of two methods on the same videos.

    Args:
        ours: metric by video.
        reference: of the same videos.
        seed: of everything random.

    Raises:
        ValueError: the videos differ, or there are none.
    """
    if ours.keys() != reference.keys():
        raise ValueError(f"videos of one side only: {sorted(ours.keys() ^ reference.keys())}")
    differences = [ours[video] - reference[video] for video in sorted(ours)]
    return Comparison(
        estimate(differences, seed=seed),
        permutation_p(differences, seed=seed),
        wilcoxon_p(differences, seed=seed),
    )
