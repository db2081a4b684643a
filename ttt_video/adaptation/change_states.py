"""Says when to learn: the states of :mod:`.learn_on_change`, which read numbers and no weights.

    rest --(far from the source for some frames)--> learn --(another candidate won)--> keep
      ^                                              |  ^                               |
      |                                              |  +--(another place, or no gain)--+
      +--(some frames later)-- return <--(the frozen model won)

The frozen model predicts in rest and return.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum


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
        patience: frames in a row that must be so before rest or keep ends.
        return_frames: the length of return.
    """

    enter: float
    moved: float
    patience: int = 2
    return_frames: int = 5


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
        self._enter(State.REST)

    def _enter(self, state: State) -> None:
        self.state, self.age, self._changed = state, 0, 0

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
        own = self.settings
        if self.state is State.RETURN and self.age >= own.return_frames:
            self._enter(State.REST)
        elif self.state is State.REST:
            far = shift is not None and own.enter < shift < float("inf")
            return self._alarm(far and (moved is None or moved > own.moved))
        elif self.state is State.KEEP:
            return self._alarm(moved is not None and own.moved < moved < float("inf"))
        return False

    def _alarm(self, changed: bool) -> bool:
        self._changed = self._changed + 1 if changed else 0
        if self._changed < self.settings.patience:
            return False
        self._enter(State.LEARN)
        return True

    def end_of_learning(self, frozen_won: bool) -> None:
        """Ends learn: the next frame is one of return or of keep."""
        self._enter(State.RETURN if frozen_won else State.KEEP)

    def learn_again(self) -> None:
        """Begins learn: what is kept is no longer good."""
        self._enter(State.LEARN)

    def state_dict(self) -> dict[str, int]:
        """Returns plain numbers."""
        return {"state": int(self.state), "age": self.age, "changed": self._changed}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Goes on from numbers of :meth:`state_dict`."""
        self.state, self.age = State(state["state"]), state["age"]
        self._changed = state["changed"]
