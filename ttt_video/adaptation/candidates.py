"""Chooses how a frame is predicted, by a score that needs no labels."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple


class Candidate(NamedTuple):
    """How a frame is predicted; the default is the frozen model.

    Attributes:
        colours: share of the way from the picture's colours to those of training images.
        blur: deviation of a Gaussian over the picture, in pixels.
        norms: share of the frame's statistics in those of f's normalisation layers.
        steps: 1.0 with the weights after the gradient steps, 0.0 with the source's.
    """

    colours: float = 0.0
    blur: float = 0.0
    norms: float = 0.0
    steps: float = 0.0


FROZEN = Candidate()


class Choice:
    """Keeps the candidate that is chosen, and moves on to better ones.

    A score is a distance, so that small ones are good, and leads are shares of the frozen model's.

    Attributes:
        chosen: the best candidate so far.
        trusted: the same if it was better than the frozen model by the margin in the last
            comparison, else the frozen model. It predicts.
    """

    def __init__(self, *, margin: float, step: float) -> None:
        """
        Args:
            margin: the lead over the frozen model that another candidate needs to predict.
            step: the lead over the chosen one that another needs to take its place.
        """
        self.margin, self.step = margin, step
        self.reset()

    def reset(self) -> None:
        """Chooses the frozen model."""
        self.chosen = self.trusted = FROZEN

    def compare(self, scores: Mapping[Candidate, float]) -> None:
        """Moves on to the best candidate if it leads by enough.

        Args:
            scores: of candidates on one frame, the frozen model and the chosen one among them. One
                that is not finite never wins; if that is the frozen model's, nothing does.
        """
        found = {one: s if math.isfinite(s) else math.inf for one, s in scores.items()}
        best, frozen = min(found, key=found.__getitem__), found[FROZEN]
        if frozen < math.inf and found[best] < found[self.chosen] - self.step * frozen:
            self.chosen = best
        leads = frozen < math.inf and found[self.chosen] < frozen - self.margin * frozen
        self.trusted = self.chosen if leads else FROZEN

    def settle(self) -> bool:
        """Ends the search with what is trusted; returns whether that is the frozen model."""
        self.chosen = self.trusted
        return self.chosen == FROZEN

    def still_leads(self, scores: Mapping[Candidate, float]) -> bool:
        """Returns whether what is kept leads the frozen model by half of the margin."""
        return scores[self.chosen] < (1 - self.margin / 2) * scores[FROZEN]

    def state_dict(self) -> dict[str, Any]:
        """Returns plain values."""
        return {"chosen": [*self.chosen], "trusted": [*self.trusted]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from values of :meth:`state_dict`."""
        self.chosen, self.trusted = Candidate(*state["chosen"]), Candidate(*state["trusted"])


class Search:
    """Varies one property of a candidate after another, each in a turn of its own."""

    def __init__(self, values: Mapping[str, Sequence[float]]) -> None:
        """``values`` are those of each property, beside 0, in the order of the turns."""
        self._turns = [(name, (0.0, *own)) for name, own in values.items() if own]

    def __len__(self) -> int:
        """Returns the number of turns."""
        return len(self._turns)

    def at(self, turn: int, chosen: Candidate) -> list[Candidate]:
        """Returns a turn's candidates: the frozen model, the chosen one, and its variations."""
        name, values = self._turns[turn]
        variations = [chosen._replace(**{name: value}) for value in values]
        return [*dict.fromkeys([FROZEN, chosen, *variations])]
