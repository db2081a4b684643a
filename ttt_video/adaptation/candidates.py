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
        steps: 1.0 with the weights after the gradient steps, 0.0 with the source's.
        denoise: what is taken out of the picture as noise, as a multiple of what is found in it.
    """

    colours: float = 0.0
    blur: float = 0.0
    steps: float = 0.0
    denoise: float = 0.0


FROZEN = Candidate()


class Choice:
    """Keeps the candidate that is chosen, and moves on to better ones.

    A score is a distance, so that small ones are good; a usual training image has 1. Leads are
    shares of the frozen model's distance. Other colours also have to make the model surer: a
    distance may fall because they take away what tells things apart, and then it doubts more.

    Attributes:
        chosen: the best candidate so far.
        trusted: the same if it was better than the frozen model by the margin in the last
            comparison, else the frozen model. It predicts.
    """

    def __init__(
        self, *, margin: float, step: float, approach: float = 0.0, entropy: float = 0.0
    ) -> None:
        """
        Args:
            margin: the lead over the frozen model that another candidate needs to predict.
            step: the lead over the chosen one that another needs to take its place.
            approach: the share of the way from the frozen model's distance to 1, on a logarithmic
                scale, that a candidate with other colours needs beside: a place may have colours
                of its own, which a correction takes away.
            entropy: the share of the frozen model's entropy, and of that of the candidate without
                other colours where it is compared, below which that of a candidate with other
                colours has to be; 0 does not ask for entropies.
        """
        self.margin, self.step, self.approach = margin, step, approach
        self.entropy = entropy
        self.reset()

    def reset(self) -> None:
        """Chooses the frozen model."""
        self.chosen = self.trusted = FROZEN

    def compare(
        self, scores: Mapping[Candidate, float], entropies: Mapping[Candidate, float] | None = None
    ) -> None:
        """Moves on to the best candidate if it leads by enough.

        Args:
            scores: of candidates on one frame, the frozen model and the chosen one among them. One
                that is not finite never wins; if that is the frozen model's, nothing does.
            entropies: of the same predictions, where they are asked for. With one that is not
                finite, other colours never win.
        """
        scores = self._surer(scores, entropies)
        frozen = scores[FROZEN]
        if not math.isfinite(frozen):
            self.trusted = FROZEN
            return
        found = {one: s for one, s in scores.items() if self._comes_near(one, s, frozen)}
        best = min(found, key=found.__getitem__)
        if found[best] < found.get(self.chosen, math.inf) - self.step * frozen:
            self.chosen = best
        leads = found.get(self.chosen, math.inf) < (1 - self.margin) * frozen
        self.trusted = self.chosen if leads else FROZEN

    def _surer(
        self, scores: Mapping[Candidate, float], entropies: Mapping[Candidate, float] | None
    ) -> dict[Candidate, float]:
        """Returns the scores, infinite where other colours do not make the model surer."""
        if not self.entropy or entropies is None:
            return dict(scores)
        return {
            one: score if not one.colours or self._is_surer(one, entropies) else math.inf
            for one, score in scores.items()
        }

    def _is_surer(self, one: Candidate, entropies: Mapping[Candidate, float]) -> bool:
        """Returns whether colours make the model surer than it is frozen, and without them."""
        without = (FROZEN, one._replace(colours=0.0))  # the second where it is compared
        return all(
            entropies[one] < self.entropy * entropies[other]
            for other in without
            if other in entropies
        )

    def _comes_near(self, one: Candidate, score: float, frozen: float, part: float = 1.0) -> bool:
        """Returns whether a score is finite, and near enough to training images for its colours."""
        if not one.colours:
            return math.isfinite(score)
        return score < frozen ** (1 - part * self.approach)

    def settle(self) -> bool:
        """Ends the search with what is trusted; returns whether that is the frozen model."""
        self.chosen = self.trusted
        return self.chosen == FROZEN

    def still_leads(
        self, scores: Mapping[Candidate, float], entropies: Mapping[Candidate, float] | None = None
    ) -> bool:
        """Returns whether what is kept has half of the leads, and the sureness, that it needed.

        ``scores`` and ``entropies`` are :meth:`compare`'s.
        """
        scores = self._surer(scores, entropies)
        ours, frozen = scores[self.chosen], scores[FROZEN]
        leads = ours < (1 - self.margin / 2) * frozen
        return leads and self._comes_near(self.chosen, ours, frozen, part=0.5)

    def state_dict(self) -> dict[str, Any]:
        """Returns plain values."""
        return {"chosen": [*self.chosen], "trusted": [*self.trusted]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from values of :meth:`state_dict`."""
        self.chosen, self.trusted = Candidate(*state["chosen"]), Candidate(*state["trusted"])


class Search:
    """Varies the properties of a candidate, turn after turn.

    Properties of one turn are ways to the same end, of which a candidate has one at most.
    """

    def __init__(self, turns: Sequence[Mapping[str, Sequence[float]]]) -> None:
        """``turns`` are the values of their properties, beside 0; one without values is none."""
        self._turns = []
        for turn in turns:
            without = dict.fromkeys(turn, 0.0)
            variations = [{**without, name: v} for name, own in turn.items() for v in own]
            if variations:
                self._turns.append([without, *variations])

    def __len__(self) -> int:
        """Returns the number of turns."""
        return len(self._turns)

    def at(self, turn: int, chosen: Candidate) -> list[Candidate]:
        """Returns a turn's candidates: the frozen model, the chosen one, and its variations."""
        variations = [chosen._replace(**values) for values in self._turns[turn]]
        return [*dict.fromkeys([FROZEN, chosen, *variations])]
