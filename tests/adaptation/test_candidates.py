"""Choosing a candidate by scores, worked out by hand."""

from __future__ import annotations

import math

import pytest

from ttt_video.adaptation.candidates import CANDIDATES, Choice


def choice(**changes: float) -> Choice:
    return Choice(**{"margin": 0.1, "hysteresis": 0.05, "decay": 0.0, **changes})


def test_names_say_what_moves():
    assert {name: tuple(c) for name, c in CANDIDATES.items()} == {
        "frozen": (False, False),
        "norms": (False, True),
        "steps": (True, False),
        "both": (True, True),
    }


def test_frozen_until_something_is_better_by_the_margin():
    """Which is a share of the frozen model's score."""
    ours = choice()
    assert ours.chosen == "frozen"
    assert ours.compare({"frozen": 0.5, "norms": 0.46}) == "frozen"
    assert ours.compare({"frozen": 0.5, "norms": 0.44}) == "norms"
    assert ours.gain("norms") == pytest.approx(0.12)
    assert ours.compare({"frozen": 0.5, "norms": 0.46}) == "frozen"  # at once


def test_another_one_needs_a_lead():
    ours = choice()
    ours.compare({"frozen": 0.8, "norms": 0.5, "steps": 0.6})
    assert ours.compare({"frozen": 0.8, "norms": 0.5, "steps": 0.47}) == "norms"
    assert ours.compare({"frozen": 0.8, "norms": 0.5, "steps": 0.45}) == "steps"
    # The chosen one no longer gains enough, so that no lead over it is needed.
    assert ours.compare({"frozen": 0.8, "norms": 0.7, "steps": 0.73}) == "norms"


def test_never_further_from_the_source_than_the_score_allows():
    """Whatever the scores are, what is not frozen leads by the margin."""
    values = [0.0, 0.1, 0.25, 0.3, 0.5, math.nan, math.inf]
    ours = choice()
    for frozen in values:
        for norms in values:
            for steps in values:
                scores = {"frozen": frozen, "norms": norms, "steps": steps}
                if (name := ours.compare(scores)) != "frozen":
                    assert scores[name] < math.inf
                    assert not scores[name] >= 0.9 * scores["frozen"] + 1e-12


def test_both_need_statistics_that_gain_alone():
    ours = choice()
    assert ours.compare({"frozen": 1.0, "norms": 0.91, "steps": 1.0, "both": 0.5}) == "frozen"
    assert ours.compare({"frozen": 1.0, "norms": 0.91, "steps": 0.7, "both": 0.5}) == "steps"
    assert ours.compare({"frozen": 1.0, "norms": 0.89, "steps": 1.0, "both": 0.5}) == "both"
    assert ours.compare({"frozen": 1.0, "norms": 0.91, "steps": 1.0, "both": 0.5}) == "frozen"
    assert choice().compare({"frozen": 1.0, "steps": 1.0, "both": 0.5}) == "both"


def test_scores_are_averaged():
    ours = choice(decay=0.75)
    ours.compare({"frozen": 0.8, "norms": 0.4})
    ours.compare({"frozen": 0.4, "norms": 0.4, "steps": 0.1})
    assert ours.scores == pytest.approx({"frozen": 0.7, "norms": 0.4, "steps": 0.1})
    ours.compare({"frozen": math.nan, "norms": 0.4})
    assert ours.scores["frozen"] == math.inf
    ours.compare({"frozen": 0.6, "norms": 0.4})
    assert ours.scores["frozen"] == 0.6


def test_saved_and_forgotten():
    ours, other = choice(decay=0.5), choice(decay=0.5)
    ours.compare({"frozen": 0.9, "norms": 0.5})
    other.load_state_dict(ours.state_dict())
    for scores in ({"frozen": 0.5, "norms": 0.4}, {"frozen": 0.5, "norms": 0.6}):
        assert ours.compare(scores) == other.compare(scores)
    ours.compare({"frozen": 0.9, "norms": 0.1})
    ours.reset()
    assert (ours.chosen, ours.scores) == ("frozen", {})
