"""Intervals and tests against scipy, hand arithmetic and their own symmetries."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
from hypothesis import example, given
from hypothesis import strategies as st

from ttt_video.report.statistics import (
    Interval,
    bootstrap_interval,
    compare,
    estimate,
    mean_by_key,
    over_seeds,
    permutation_p,
    wilcoxon_p,
)

numbers = st.floats(-100, 100, allow_nan=False).map(lambda x: round(x, 3))
samples = st.lists(numbers, min_size=1, max_size=8)


@pytest.mark.parametrize("n", [2, 9, 12, 40])
def test_interval_is_scipys_percentile_bootstrap(n):
    values = np.random.default_rng(n).normal(50, 10, n)
    theirs = scipy.stats.bootstrap(
        (values,),
        np.mean,
        method="percentile",
        n_resamples=10_000,
        random_state=np.random.default_rng(0),
    ).confidence_interval
    np.testing.assert_allclose(bootstrap_interval(values), theirs, rtol=0, atol=0.3)


def test_interval_of_two_values_spans_them():
    # The mean of a resample is 0, 5 or 10 with probability 1/4, 1/2, 1/4: both ends exceed 2.5 %.
    assert bootstrap_interval([0.0, 10.0]) == (0.0, 10.0)
    assert bootstrap_interval([0.0, 10.0], confidence=0.4) == (5.0, 5.0)


def test_one_video_has_no_interval():
    assert bootstrap_interval([3.0]) is None
    assert bootstrap_interval([]) is None
    assert estimate([3.0]) == (1, 3.0, None)


def test_interval_covers_as_often_as_it_says():
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(300):
        low, high = bootstrap_interval(rng.normal(size=30), confidence=0.8)
        covered += low <= 0 <= high
    assert 0.7 < covered / 300 < 0.88  # the percentile interval is a little too short


def test_interval_is_seeded():
    values = np.random.default_rng(0).normal(size=12)
    assert bootstrap_interval(values, seed=1) == bootstrap_interval(values, seed=1)
    assert bootstrap_interval(values, seed=1) != bootstrap_interval(values, seed=2)


@given(samples, st.integers(0, 5))
def test_interval_moves_and_scales_with_the_values(values, seed):
    interval = bootstrap_interval(values, seed=seed)
    if interval is None:
        return
    low, high = interval
    assert min(values) - 1e-9 <= low <= high <= max(values) + 1e-9
    moved = bootstrap_interval([3 * v + 7 for v in values], seed=seed)
    np.testing.assert_allclose(moved, (3 * low + 7, 3 * high + 7), atol=1e-8)


@pytest.mark.parametrize("confidence", [0.0, 1.0, 95])
def test_impossible_confidence(confidence):
    with pytest.raises(ValueError, match="confidence"):
        bootstrap_interval([1.0, 2.0], confidence=confidence)


@pytest.mark.parametrize(
    ("differences", "p"),
    [
        ([5.0], 1.0),  # +5 and -5 are equally far from 0
        ([5.0, 3.0], 0.5),  # 2 of 4 choices of signs reach |8|
        ([5.0, -3.0], 1.0),  # all of them reach |2|
        ([1.0, 2.0, 4.0], 0.25),
        ([1.0, 2.0, -4.0], 1.0),  # |-1| is the smallest of the sums +-7, +-5, +-3, +-1
        ([0.1, 0.2, 0.3], 0.25),  # sums that differ in the last bit are the same
        ([0.0, 0.0], 1.0),
        ([1.0] * 6, 2 / 64),
    ],
)
def test_permutation_by_hand(differences, p):
    assert permutation_p(differences) == p


@given(st.lists(numbers, min_size=2, max_size=8))
@example([0.0, 0.0, 0.0, 0.0, 28.0, 100.0, -28.562, -100.0])
def test_permutation_is_scipys(differences):
    # In whole thousandths: their sums are exact, and scipy misses ties that rounding parts.
    theirs = scipy.stats.permutation_test(
        (np.rint(1000 * np.array(differences)),),
        np.sum,
        permutation_type="samples",
        n_resamples=2 ** len(differences),
    )
    assert permutation_p(differences) == pytest.approx(theirs.pvalue)


def test_permutation_of_many_videos_is_random_but_seeded():
    differences = np.random.default_rng(3).normal(0.4, 1, 25)
    exact = scipy.stats.ttest_1samp(differences, 0).pvalue  # close to it for normal values
    assert permutation_p(differences) == pytest.approx(exact, abs=0.02)
    assert permutation_p(differences) == permutation_p(differences)
    assert permutation_p(differences) != permutation_p(differences, seed=1)
    assert permutation_p([1.0] * 40) == 1 / 10_000  # the observed signs count: never 0


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=10, unique=True), st.data())
def test_wilcoxon_without_ties_is_scipys(sizes, data):
    signs = data.draw(st.lists(st.sampled_from((-1, 1)), min_size=len(sizes), max_size=len(sizes)))
    differences = [a * s for a, s in zip(sizes, signs, strict=True)]
    assert wilcoxon_p(differences) == pytest.approx(
        scipy.stats.wilcoxon(differences, method="exact").pvalue
    )


def test_wilcoxon_with_ties_and_zeros_by_hand():
    # Ranks of 2, 2, 3 are 1.5, 1.5, 3: sums +-6 (2 of 8 choices), the zero does not count.
    assert wilcoxon_p([0.0, 2.0, 2.0, 3.0]) == 0.25
    assert wilcoxon_p([-2.0, 2.0, 3.0]) == 6 / 8  # only 3 - 1.5 - 1.5 falls short of 3
    # Ranks 1 to 4: 5 of 16 choices flip ranks of at most 3 in sum, as here, and 5 the others. Were
    # the zero ranked too, it would be 8 of 16.
    assert wilcoxon_p([0.0, 1.0, 2.0, -3.0, 4.0]) == 10 / 16
    assert wilcoxon_p([0.0, 0.0]) == 1.0


@given(samples)
def test_p_ignores_sign_scale_and_order(differences):
    for test in (permutation_p, wilcoxon_p):
        p = test(differences)
        assert 2 / 2 ** len(differences) <= p <= 1
        assert test([-2 * d for d in reversed(differences)]) == p


def test_comparison_pairs_by_video():
    ours = {"a": 10.0, "b": 20.0, "c": 34.0}
    frozen = {"c": 30.0, "b": 18.0, "a": 9.0}
    result = compare(ours, frozen)
    assert result.difference.videos == 3
    assert result.difference.mean == pytest.approx(7 / 3)
    assert isinstance(result.difference.interval, Interval)
    assert result.p_permutation == result.p_wilcoxon == 0.25
    assert compare(ours, ours) == ((3, 0.0, (0.0, 0.0)), 1.0, 1.0)


def test_comparison_of_other_videos_is_an_error():
    with pytest.raises(ValueError, match=r"one side only: \['a', 'b'\]"):
        compare({"a": 1.0}, {"b": 1.0})
    with pytest.raises(ValueError, match="no video"):
        compare({}, {})


def test_seeds_are_averaged_video_by_video():
    assert over_seeds([4.0, 6.0]) == (5.0, pytest.approx(2**0.5))
    assert over_seeds([4.0]) == (4.0, None)
    # "b" is undefined for the second seed and does not pull the mean of the others.
    assert mean_by_key([{"a": 1.0, "b": 9.0}, {"a": 3.0}]) == {"a": 2.0, "b": 9.0}
    assert mean_by_key([]) == {}
