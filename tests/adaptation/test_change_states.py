"""The states of learn_on_change, with signals made by hand."""

from __future__ import annotations

import json
import math

import pytest

from ttt_video.adaptation.change_states import ChangeStates, State, StateSettings

REST, LEARN, KEEP, RETURN = State.REST, State.LEARN, State.KEEP, State.RETURN


def machine(**changes) -> ChangeStates:
    settings = {"enter": 0.2, "moved": 0.1, "patience": 2}
    more = {"wait": (3, 10), "check": (2, 8), **changes}
    return ChangeStates(StateSettings(**{**settings, **more}))


def states(of: ChangeStates, shifts: list, moved: float | None = None) -> list[State]:
    found = []
    for shift in shifts:
        of.next_frame(shift, moved)
        found.append(of.state)
    return found


def learning() -> ChangeStates:
    ours = machine()
    states(ours, [0.3, 0.3])
    assert (ours.state, ours.age) == (LEARN, 0)
    return ours


def test_rests_while_frames_are_like_the_source():
    assert states(machine(), [None, 0.1, 0.2, 0.19, 0.0] * 20) == [REST] * 100


def test_one_odd_frame_is_no_change_two_in_a_row_are():
    assert states(machine(), [0.3, 0.1, 0.3, 0.1, 0.3, 0.3]) == [REST] * 5 + [LEARN]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_no_alarm(value):
    assert states(machine(), [value] * 10) == [REST] * 10


def test_a_place_where_the_frozen_model_was_best_is_no_change():
    assert states(machine(), [0.9] * 10, moved=0.1) == [REST] * 10
    assert states(machine(), [0.9] * 2, moved=0.11) == [REST, LEARN]


@pytest.mark.parametrize(("frozen_won", "then"), [(True, RETURN), (False, KEEP)])
def test_learn_ends_as_it_is_told(frozen_won, then):
    ours = learning()
    assert states(ours, [0.9] * 3) == [LEARN] * 3
    ours.end_of_learning(frozen_won=frozen_won, as_before=False)
    assert (ours.state, ours.age) == (then, 0)


def test_a_return_is_over_after_its_frames():
    """Whatever the signal is."""
    ours = learning()
    ours.end_of_learning(frozen_won=True, as_before=True)
    assert states(ours, [0.9] * 3) == [RETURN, RETURN, REST]


def test_what_is_kept_is_left_at_another_place():
    ours = learning()
    ours.end_of_learning(frozen_won=False, as_before=False)
    assert states(ours, [0.9] * 50, moved=0.1) == [KEEP] * 50
    assert states(ours, [0.0] * 5) == [KEEP] * 5  # nothing is known of the place
    assert states(ours, [0.0] * 2, moved=0.11) == [KEEP, LEARN]


def checks(of: ChangeStates, frames: int) -> list[int]:
    """Numbers of the frames, from 1, at which what is kept was checked; it leads in each."""
    found = []
    for frame in range(1, frames + 1):
        of.next_frame(0.9, 0.1)
        if of.check_is_due():
            of.checked(leads=True)
            found.append(frame)
    return found


def test_checks_come_less_often_while_what_is_kept_leads():
    ours = learning()
    assert not ours.check_is_due()
    ours.end_of_learning(frozen_won=False, as_before=False)
    # The frame that ends the search is the first of keep: the second, 4 later, then 8 each time.
    assert checks(ours, 30) == [1, 5, 13, 21, 29]


def test_a_failed_check_returns_to_the_frozen_model_and_checks_begin_anew():
    ours = learning()
    ours.end_of_learning(frozen_won=False, as_before=True)  # whose wait would be longer
    checks(ours, 10)
    ours.checked(leads=False)
    assert (ours.state, ours.age, ours.check_is_due()) == (RETURN, 0, False)
    assert states(ours, [0.9] * 5) == [RETURN, RETURN, REST, REST, LEARN]
    ours.end_of_learning(frozen_won=False, as_before=False)
    assert checks(ours, 6) == [1, 5]


@pytest.mark.parametrize("cut", range(12))
def test_goes_on_between_checks(cut):
    whole = learning()
    whole.end_of_learning(frozen_won=False, as_before=False)
    other, before = machine(), checks(whole, cut)
    other.load_state_dict(json.loads(json.dumps(whole.state_dict())))
    assert before + [cut + frame for frame in checks(other, 22 - cut)] == [1, 5, 13, 21]


@pytest.mark.parametrize("frozen_won", [True, False])
def test_searches_that_change_nothing_wait_longer_each_time(frozen_won):
    ours, waits = machine(patience=1), []
    states(ours, [0.9])
    for as_before in (False, True, True, True, True, False):
        assert ours.state is LEARN
        ours.end_of_learning(frozen_won=frozen_won, as_before=as_before)
        before = 0
        while ours.state is not LEARN:
            ours.next_frame(0.9, 0.15)  # another place, but not suddenly
            before += 1
        # After return there is a frame of rest.
        waits.append(before - frozen_won)
    assert waits == [3, 6, 10, 10, 10, 3]


@pytest.mark.parametrize("frozen_won", [True, False])
def test_a_sudden_change_ends_a_wait(frozen_won):
    ours = learning()
    ours.end_of_learning(frozen_won=frozen_won, as_before=True)
    assert states(ours, [0.9] * 2, moved=0.21)[-1] is LEARN
    ours.end_of_learning(frozen_won=frozen_won, as_before=True)
    assert LEARN not in states(ours, [0.9] * 2, moved=0.19)
    if frozen_won:  # of frames like the training images none is a change
        assert LEARN not in states(ours, [0.1] * 2, moved=9.0)


def test_goes_on_from_saved_numbers():
    signal = [0.3, 0.1, 0.3, 0.3, 0.3, 0.1, 0.1]
    whole = states(machine(), signal)
    for cut in range(len(signal)):
        ours, other = machine(), machine()
        before = states(ours, signal[:cut])
        states(other, [0.9] * 3)
        other.load_state_dict(json.loads(json.dumps(ours.state_dict())))
        assert before + states(other, signal[cut:]) == whole
    ours.reset()
    assert ours.state_dict() == machine().state_dict()


@pytest.mark.parametrize("frozen_won", [True, False])
def test_goes_on_in_the_middle_of_a_wait(frozen_won):
    ours, other = machine(patience=1), machine(patience=1)
    states(ours, [0.9])
    for as_before in (False, True):
        ours.end_of_learning(frozen_won=frozen_won, as_before=as_before)
    states(ours, [0.9] * 2, moved=0.15)
    other.load_state_dict(json.loads(json.dumps(ours.state_dict())))
    found = [states(each, [0.9] * 6, moved=0.15) for each in (ours, other)]
    waiting = [RETURN] * 3 + [REST] if frozen_won else [KEEP] * 3  # of six frames two are over
    expected = [*waiting, *[LEARN] * 6][:6]
    assert found == [expected, expected]
    ours.reset()
    assert ours.state_dict() == machine().state_dict()
