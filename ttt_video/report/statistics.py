"""Computes means over seeds, and how sure a mean over videos is: intervals and paired tests.

The unit is the video. Frames of one video resemble each other, and so do two runs on it, so neither
are independent samples; the seeds of a video are averaged first. Few videos say little: one has no
interval and p = 1, and n cannot give a p below 2 / 2^n (p < 0.05 takes six).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from statistics import fmean, stdev
from typing import NamedTuple, TypeVar

import numpy as np

Key = TypeVar("Key", bound=Hashable)

_EXACT_UP_TO = 16  # pairs: 65,536 ways to choose their signs
_RESAMPLES = 10_000  # of a bootstrap, and of the signs of more pairs


class OverSeeds(NamedTuple):
    """A mean over seeds; their standard deviation is None for a single one."""

    mean: float
    deviation: float | None


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
    """The mean difference to a reference over videos, and two-sided tests that it is 0."""

    difference: Estimate
    p_permutation: float
    p_wilcoxon: float


def over_seeds(values: Sequence[float]) -> OverSeeds:
    """Returns the mean of a number over the seeds of a method, at least one."""
    return OverSeeds(fmean(values), stdev(values) if len(values) > 1 else None)


def mean_by_key(many: Iterable[Mapping[Key, float]]) -> dict[Key, float]:
    """Returns the mean of each key's numbers over the mappings that have the key."""
    found: defaultdict[Key, list[float]] = defaultdict(list)
    for numbers in many:
        for key, number in numbers.items():
            found[key].append(number)
    return {key: fmean(values) for key, values in found.items()}


def bootstrap_interval(
    values: Sequence[float], *, confidence: float = 0.95, seed: int = 0
) -> Interval | None:
    """Returns the percentile bootstrap interval of the mean (Efron and Tibshirani 1993, 13.3).

    Args:
        values: one number per video.
        confidence: probability, in (0, 1), with which the interval is to hold the mean.
        seed: for the 10,000 resamples.

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
    """Returns p, in (0, 1], of the two-sided paired permutation test of a mean difference of 0.

    Without an effect, every difference could as well have the other sign. For up to 16 pairs all
    2^n choices of signs are tried; for more, 10,000 random ones with the observed one among them
    (Phipson and Smyth 2010), so that p is never 0. It is 1 if all differences are 0.

    Args:
        differences: one number per video.
        seed: for the random signs.
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
    """Returns p of the two-sided Wilcoxon signed-rank test.

    It is :func:`permutation_p` of the ranks of the differences' sizes. Differences of 0 are left
    out and ties share their mean rank; unlike ``scipy.stats.wilcoxon`` it is exact for up to 16
    pairs even with ties.
    """
    from scipy.stats import rankdata

    sample = np.asarray(differences, dtype=np.float64)
    sample = sample[sample != 0]
    return permutation_p(np.sign(sample) * rankdata(np.abs(sample)), seed=seed)


def estimate(values: Sequence[float], *, seed: int = 0) -> Estimate:
    """Returns the mean over videos (at least one) with its 95 % interval."""
    if not len(values):
        raise ValueError("no video to take a mean of")
    return Estimate(len(values), float(np.mean(values)), bootstrap_interval(values, seed=seed))


def compare(
    ours: Mapping[str, float], reference: Mapping[str, float], *, seed: int = 0
) -> Comparison:
    """Compares two methods by their metric on each video; ``seed`` is for resamples and signs.

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
