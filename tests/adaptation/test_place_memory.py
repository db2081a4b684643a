"""A memory keeps places, and forgets them in an order."""

from __future__ import annotations

import io

import torch

from ttt_video.adaptation.place_memory import Place, PlaceMemory


def place(score: float) -> Place:
    norms = {"layer": [(torch.full((2,), score), torch.ones(2))]}
    return Place("both", score, {"weight": torch.full((3,), score)}, norms)


def scores(memory: PlaceMemory) -> list[float]:
    return [kept.score for kept in memory]


def test_is_bounded_and_forgets_the_oldest():
    memory = PlaceMemory(2)
    for score in (1.0, 2.0, 3.0):
        memory.keep(place(score))
    assert scores(memory) == [2.0, 3.0]
    memory.take(next(iter(memory)))
    assert scores(memory) == [3.0]
    memory.keep(place(2.0))
    memory.keep(place(4.0))
    assert scores(memory) == [2.0, 4.0]
    memory.clear()
    assert len(memory) == 0


def test_without_room_nothing_is_kept():
    memory = PlaceMemory(0)
    memory.keep(place(1.0))
    assert len(memory) == 0


def test_comes_back_from_a_file():
    memory, other, file = PlaceMemory(2), PlaceMemory(2), io.BytesIO()
    memory.keep(place(1.0))
    memory.keep(place(2.0))
    torch.save(memory.state_dict(), file)
    file.seek(0)
    other.keep(place(9.0))
    other.load_state_dict(torch.load(file, weights_only=True))
    assert scores(other) == [1.0, 2.0]
    for ours, theirs in zip(memory, other, strict=True):
        assert torch.equal(ours.weights["weight"], theirs.weights["weight"])
        assert torch.equal(ours.norms["layer"][0][0], theirs.norms["layer"][0][0])
