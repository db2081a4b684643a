"""Choosing a candidate by scores, worked out by hand."""

from __future__ import annotations

import itertools
import math

import pytest

from ttt_video.adaptation.candidates import FROZEN, Candidate, Choice, Search

BLURRED, COLOURED = Candidate(blur=1.5), Candidate(colours=1.0)
BOTH = Candidate(blur=1.5, colours=1.0)


def choice(**changes: float) -> Choice:
    return Choice(**{"margin": 0.3, "step": 0.1, **changes})


def test_moves_on_by_steps_and_trusts_by_the_margin():
    """Both are shares of the frozen model's score."""
    ours = choice()
    assert (ours.chosen, ours.trusted) == (FROZEN, FROZEN)
    ours.compare({FROZEN: 2.0, BLURRED: 1.81})
    assert (ours.chosen, ours.trusted) == (FROZEN, FROZEN)
    ours.compare({FROZEN: 2.0, BLURRED: 1.79})
    assert (ours.chosen, ours.trusted) == (BLURRED, FROZEN)
    ours.compare({FROZEN: 2.0, BLURRED: 1.5, BOTH: 1.39})
    assert (ours.chosen, ours.trusted) == (BLURRED, FROZEN)
    ours.compare({FROZEN: 2.0, BLURRED: 1.5, BOTH: 1.29})
    assert (ours.chosen, ours.trusted) == (BOTH, BOTH)
    assert not ours.settle()
    assert ours.still_leads({FROZEN: 2.0, BOTH: 1.69})  # by half of the margin
    assert not ours.still_leads({FROZEN: 2.0, BOTH: 1.71})


def test_ends_with_the_frozen_model_where_nothing_is_trusted():
    ours = choice()
    ours.compare({FROZEN: 2.0, BLURRED: 1.5})
    assert ours.chosen == BLURRED
    assert ours.settle()
    assert (ours.chosen, ours.trusted) == (FROZEN, FROZEN)


def test_nothing_is_trusted_that_is_worse_than_the_margin_allows():
    """Whatever the scores are, and whatever was chosen before."""
    values = [0.0, 0.5, 1.0, 1.4, 2.0, math.nan, math.inf]
    for frozen, blurred, coloured in itertools.product(values, repeat=3):
        for before in (FROZEN, BLURRED, COLOURED):
            ours = choice()
            ours.chosen = before
            scores = {FROZEN: frozen, BLURRED: blurred, COLOURED: coloured}
            ours.compare(scores)
            if ours.trusted != FROZEN:
                assert scores[ours.trusted] < 0.7 * frozen < math.inf


def test_other_colours_come_half_of_the_way_to_training_images():
    """On a logarithmic scale from the frozen model's distance to 1: from 9 below 3."""
    for colours, distance, trusted in ((0.0, 3.1, True), (1.0, 2.9, True), (1.0, 3.1, False)):
        ours, one = choice(approach=0.5), Candidate(blur=0.8, colours=colours)
        ours.compare({FROZEN: 9.0, one: distance})
        assert (ours.trusted == one) == trusted
        ours.compare({FROZEN: 9.0, one: 2.0})
        # Half of that is enough to go on with: below 9 ** 0.75.
        assert ours.still_leads({FROZEN: 9.0, one: 5.1})
        assert ours.still_leads({FROZEN: 9.0, one: 5.3}) == (not colours)


def test_other_colours_make_the_model_surer():
    """By a share of the frozen model's entropy, at searches and checks alike."""
    for one in (COLOURED, BOTH, BLURRED):
        for entropy in (0.79, 0.81, math.inf, math.nan):
            ours, entropies = choice(entropy=0.4), {FROZEN: 2.0, one: entropy}
            ours.compare({FROZEN: 2.0, one: 1.0}, entropies)
            sure = entropy == 0.79 or one == BLURRED
            assert (ours.chosen == ours.trusted == one) == sure
            ours.compare({FROZEN: 2.0, one: 1.0}, {FROZEN: 2.0, one: 0.5})
            assert ours.trusted == one
            assert ours.still_leads({FROZEN: 2.0, one: 1.0}, entropies) == sure


def test_what_is_less_sure_stands_in_nobodys_way():
    ours = choice(entropy=0.4)
    entropies = {FROZEN: 2.0, COLOURED: 1.9, BLURRED: 1.9}
    ours.compare({FROZEN: 2.0, COLOURED: 0.5, BLURRED: 1.0}, entropies)
    assert ours.trusted == BLURRED


def test_entropies_that_are_not_asked_for_say_nothing():
    ours = choice()
    ours.compare({FROZEN: 2.0, COLOURED: 1.0}, {FROZEN: math.nan, COLOURED: math.nan})
    assert ours.trusted == COLOURED


def test_other_colours_make_the_model_surer_than_it_is_without_them():
    """A model is surer without the noise already, and colours get no credit for that."""
    for entropy in (0.59, 0.61):
        ours, entropies = choice(entropy=0.4), {FROZEN: 2.0, BLURRED: 1.5, BOTH: entropy}
        ours.compare({FROZEN: 2.0, BLURRED: 1.0, BOTH: 0.5}, entropies)
        assert ours.trusted == (BOTH if entropy < 0.6 else BLURRED)


def test_a_search_varies_one_property_after_another():
    search = Search([{"blur": [0.8, 1.5]}, {"steps": []}, {"colours": [0.5]}])
    assert len(search) == 2
    assert search.at(0, FROZEN) == [FROZEN, Candidate(blur=0.8), BLURRED]
    expected = [FROZEN, BLURRED, Candidate(blur=1.5, colours=0.5)]
    assert search.at(1, BLURRED) == expected
    assert search.at(0, COLOURED)[2:] == [Candidate(1.0, 0.8), Candidate(1.0, 1.5)]


def test_a_candidate_has_one_property_of_a_turn():
    search = Search([{"blur": [0.8], "denoise": [1.0, 2.0]}, {}])
    assert len(search) == 1
    cleared, coloured = Candidate(denoise=1.0), Candidate(colours=1.0, denoise=2.0)
    expected = [FROZEN, Candidate(blur=0.8), cleared, Candidate(denoise=2.0)]
    assert search.at(0, FROZEN) == expected
    assert search.at(0, coloured)[2:] == [
        COLOURED,
        Candidate(colours=1.0, blur=0.8),
        COLOURED._replace(denoise=1.0),
    ]


@pytest.mark.parametrize("best", [1.5, 1.0])
def test_goes_on_from_saved_values(best):
    ours, other = choice(), choice()
    ours.compare({FROZEN: 2.0, BLURRED: best})
    other.load_state_dict(ours.state_dict())
    assert (other.chosen, other.trusted) == (ours.chosen, ours.trusted)
    assert (other.trusted == BLURRED) == (best == 1.0)
    ours.reset()
    assert (ours.chosen, ours.trusted) == (FROZEN, FROZEN)


def test_goes_on_from_values_without_denoise():
    """Older versions saved three values, and the fourth is 0 then."""
    ours = choice()
    ours.load_state_dict({"chosen": [0.5, 0.8, 0.0], "trusted": [0.0, 0.0, 0.0]})
    assert (ours.chosen, ours.trusted) == (Candidate(colours=0.5, blur=0.8), FROZEN)
