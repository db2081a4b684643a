"""Keeps what was learnt at the last few places of a stream, for when it comes back to one."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from torch import Tensor


class Place(NamedTuple):
    """What a place was predicted with.

    Attributes:
        candidate: name in :data:`~.candidates.CANDIDATES`.
        score: of the candidate there, with which a later one is compared.
        weights: the tensors that differ from the source's, by name; empty where steps were not in
            the candidate.
        norms: of :meth:`NormCorrection.state_dict`; empty where statistics were not.
    """

    candidate: str
    score: float
    weights: Mapping[str, Tensor]
    norms: Mapping[str, Any]


class PlaceMemory:
    """The last ``size`` places; the one that was used or made longest ago is forgotten first."""

    def __init__(self, size: int) -> None:
        """With ``size`` 0 nothing is kept."""
        self.size = size
        self._places: deque[Place] = deque(maxlen=size)

    def __iter__(self) -> Iterator[Place]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def keep(self, place: Place) -> None:
        """Adds a place, whose tensors must be copies."""
        self._places.append(place)

    def take(self, place: Place) -> None:
        """Removes a place, which is about to change; it is kept anew when it is left."""
        self._places = deque((p for p in self._places if p is not place), self._places.maxlen)

    def clear(self) -> None:
        """Forgets all places."""
        self._places.clear()

    def state_dict(self) -> list[dict[str, Any]]:
        """Returns the places as plain values and tensors."""
        return [{**p._asdict(), "weights": dict(p.weights)} for p in self._places]

    def load_state_dict(self, state: list[dict[str, Any]]) -> None:
        """Holds the places of a state of :meth:`state_dict`, and no others."""
        self.clear()
        self._places.extend(Place(**place) for place in state)
