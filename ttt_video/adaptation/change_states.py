"""Says when to learn: the states of :mod:`.learn_on_change`, which read numbers and no weights.

    rest --(far from the source for some frames)--> learn --(another candidate won)--> keep
      ^                                              |  ^                         |  |
      |                                              |  +-----(another place)-----+  |
      +--(some frames later)-- return <--(the frozen model won, or leads again)------+

The frozen model predicts in rest and return. A search that ends as the one before it has found
nothing new, so the next one has to wait twice as long, unless the change is sudden. What is kept is
checked against the frozen model: soon after the search, and then after twice as many frames each
time, because what is good for long changes slowly.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum

SUDDEN = 2.0
"""A change that is so many times as far as another place ends a wait."""


class State(IntEnum):
    """What a method does at a frame; rows of a run have the number."""

    REST = 0
    """The frozen model predicts. Nothing is learnt."""
    LEARN = 1
    """Candidates are compared, and weights may move."""
    KEEP = 2
    """The change that won predicts. Nothing is learnt."""
    RETURN = 3
    """The frozen model predicts again, and the place is remembered as one where it is best."""


@dataclass(frozen=True)
class StateSettings:
    """When states end.

    Attributes:
        enter: distance from the source above which a frame is not like the training images.
        moved: distance from a place's signal above which a frame is of another place.
        patience: frames in a row that must be so before a state ends.
        wait: frames from a search that found something new to the next one, and the most that
            there may be. Return lasts so long.
        check: frames of keep, the search's last included, to the first check, and the most from one
            check to the next.
    """

    enter: float
    moved: float
    patience: int
    wait: tuple[int, int]
    check: tuple[int, int]


class ChangeStates:
    """The state of a video's current frame; it is told of signals, and who won.

    Attributes:
        state: at the current frame.
        age: frames since the state began; 0 at its first frame.
    """

    def __init__(self, settings: StateSettings) -> None:
        self.settings = settings
        self.reset()

    def reset(self) -> None:
        """Begins a video, in rest."""
        self._wait = 0
        self._enter(State.REST)

    def _enter(self, state: State) -> None:
        self.state, self.age, self._changed = state, 0, 0
        self._gap = self._next_check = self.settings.check[0]

    def next_frame(self, shift: float | None, moved: float | None) -> bool:
        """Goes on to the next frame.

        Args:
            shift: distance of the last frame's signal from the source; None if there is none yet.
                A number that is not finite is no alarm.
            moved: its distance from the signal of the place that the state is about: the one that
                is kept, or where the frozen model was found best; None where there is none.

        Returns:
            Whether learn begins.
        """
        self.age += 1
        own, waits = self.settings, self.state is not State.REST and self.age < self._wait
        if self.state is State.LEARN:
            return False
        if self.state is State.RETURN and not waits:
            self._enter(State.REST)
            return False
        far = self.state is State.KEEP or (shift is not None and own.enter < shift < math.inf)
        if moved is None:
            return self._alarm(far and self.state is State.REST)
        limit = own.moved * (SUDDEN if waits else 1)
        return self._alarm(far and limit < moved < math.inf)

    def _alarm(self, changed: bool) -> bool:
        self._changed = self._changed + 1 if changed else 0
        if self._changed < self.settings.patience:
            return False
        self._enter(State.LEARN)
        return True

    def end_of_learning(self, *, frozen_won: bool, as_before: bool) -> None:
        """Ends learn: the next frame is one of return or of keep.

        Args:
            frozen_won: whether the frozen model predicts.
            as_before: whether what predicts is what predicted before the search.
        """
        first, longest = self.settings.wait
        self._wait = min(max(2 * self._wait, first), longest) if as_before else first
        self._enter(State.RETURN if frozen_won else State.KEEP)

    def check_is_due(self) -> bool:
        """Returns whether what is kept must be compared with the frozen model at this frame."""
        return self.state is State.KEEP and self.age + 1 >= self._next_check

    def checked(self, *, leads: bool) -> None:
        """Ends a check, due or before that: what leads is kept for longer, else return begins.

        Args:
            leads: whether what is kept still leads the frozen model by enough.
        """
        if leads:
            self._gap = min(2 * self._gap, self.settings.check[1])
            self._next_check = self.age + 1 + self._gap
        else:
            self.end_of_learning(frozen_won=True, as_before=False)

    def state_dict(self) -> dict[str, int]:
        """Returns plain numbers."""
        numbers = {"age": self.age, "changed": self._changed, "wait": self._wait}
        checks = {"gap": self._gap, "next_check": self._next_check}
        return {"state": int(self.state), **numbers, **checks}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Goes on from numbers of :meth:`state_dict`."""
        self.state, self.age = State(state["state"]), state["age"]
        self._changed, self._wait = state["changed"], state["wait"]
        self._gap, self._next_check = state["gap"], state["next_check"]
