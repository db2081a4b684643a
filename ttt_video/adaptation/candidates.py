"""Chooses one of a few changes of the weights by a score that needs no labels."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple


class Candidate(NamedTuple):
    """A change of the weights that a prediction may use.

    Attributes:
        steps: whether the gradient steps are in it.
        norms: whether the statistics of f's normalisation layers are corrected.
    """

    steps: bool
    norms: bool


CANDIDATES = {
    "frozen": Candidate(steps=False, norms=False),
    "norms": Candidate(steps=False, norms=True),
    "steps": Candidate(steps=True, norms=False),
    "both": Candidate(steps=True, norms=True),
}
"""By the names that ``TTT.LEARN_ON_CHANGE.CANDIDATES`` takes; rows have the place in this order."""

FROZEN, BOTH = "frozen", "both"


class Choice:
    """Keeps averaged scores and the candidate that is chosen by them.

    A score is a distance, so that small ones are good. Leads are shares of the frozen model's.
    Another candidate than the frozen model is chosen only if it leads by more than ``margin``, and
    the choice changes only if the new one leads the old one by more than ``hysteresis``. Corrected
    statistics must lead by the margin alone, too, before they are chosen together with steps:
    both lower the score where either may harm.

    Attributes:
        chosen: name of the candidate.
        scores: averages by name; empty before the first comparison.
    """

    def __init__(self, *, margin: float, hysteresis: float, decay: float) -> None:
        """``decay`` is the weight, in [0, 1), of the scores before in the average."""
        self.margin, self.hysteresis, self.decay = margin, hysteresis, decay
        self.reset()

    def reset(self) -> None:
        """Forgets scores and chooses the frozen model."""
        self.chosen = FROZEN
        self.scores: dict[str, float] = {}

    def compare(self, found: Mapping[str, float]) -> str:
        """Takes the scores of a frame, ``frozen`` among them, and returns the chosen candidate.

        A score that is not finite never wins and is not averaged into later ones.
        """
        for name, score in found.items():
            new = score if math.isfinite(score) else math.inf
            old = self.scores.get(name, math.inf)
            self.scores[name] = (
                self.decay * old + (1 - self.decay) * new if math.isfinite(old) else new
            )
        best = min(filter(self._gains, found), key=self.scores.__getitem__, default=FROZEN)
        # The frozen model needs no lead: what no longer gains enough is given up at once.
        stays = self._gains(self.chosen)
        if not stays or best == FROZEN or self.lead(best, self.chosen) > self.hysteresis:
            self.chosen = best
        return self.chosen

    def _gains(self, name: str) -> bool:
        """Returns whether a candidate leads the frozen model by enough."""
        alone = name != BOTH or "norms" not in self.scores or self.gain("norms") > self.margin
        return alone and self.gain(name) > self.margin

    def lead(self, name: str, other: str) -> float:
        """Returns by how much a candidate's averaged score is better than another's, as a share of
        the frozen model's.
        """
        ours, theirs = self.scores.get(name, math.inf), self.scores.get(other, math.inf)
        if not math.isfinite(ours):
            return -math.inf
        frozen = self.scores.get(FROZEN, math.inf)
        return (theirs - ours) / frozen if 0 < frozen < math.inf else theirs - ours

    def gain(self, name: str) -> float:
        """Returns the lead over the frozen model, 0 of itself."""
        return 0.0 if name == FROZEN else self.lead(name, FROZEN)

    def state_dict(self) -> dict[str, Any]:
        """Returns plain values."""
        return {"chosen": self.chosen, "scores": dict(self.scores)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from values of :meth:`state_dict`."""
        self.chosen, self.scores = state["chosen"], dict(state["scores"])
