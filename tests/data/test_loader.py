"""Training samples as a function of seed and position."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest

from ttt_video.data.loader import TrainingLoader, TrainingStream, seeded
from ttt_video.errors import UserError

# detectron2's augmentations draw from numpy's global generator.
# ruff: noqa: NPY002


def draw(record):
    """A mapper whose augmentation is both global generators."""
    return {"id": record["id"], "noise": (random.random(), np.random.rand())}


def stream(n=5, seed=3):
    return TrainingStream([{"id": i} for i in range(n)], draw, seed=seed)


def batches(loader, n):
    return list(itertools.islice(iter(loader), n))


def test_every_epoch_is_a_different_permutation():
    ids = [stream()[p]["id"] for p in range(50)]
    epochs = [tuple(ids[i : i + 5]) for i in range(0, 50, 5)]
    assert all(sorted(epoch) == [0, 1, 2, 3, 4] for epoch in epochs)
    assert len(set(epochs)) > 5


def test_a_position_is_a_pure_function_of_the_seed():
    forward = [stream()[p] for p in range(12)]
    one = stream()
    backward = [one[p] for p in reversed(range(12))]
    assert forward == backward[::-1]
    assert forward != [stream(seed=4)[p] for p in range(12)]
    assert len({sample["noise"] for sample in forward}) == 12


def test_global_generators_are_left_alone():
    random.seed(1)
    np.random.seed(1)
    expected = random.random(), np.random.rand()
    random.seed(1)
    np.random.seed(1)
    stream()[0]
    with pytest.raises(RuntimeError), seeded(9):
        raise RuntimeError
    assert (random.random(), np.random.rand()) == expected


@pytest.mark.parametrize("num_workers", [0, 2])
def test_starting_late_gives_the_same_batches(num_workers):
    full = batches(TrainingLoader(stream(), batch_size=3), 6)
    late = TrainingLoader(stream(), batch_size=3, num_workers=num_workers)
    late.start_at(2)
    assert batches(late, 4) == full[2:]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_mistake_in_the_data_is_one_line_from_any_process(num_workers):
    def mapper(record):
        raise UserError("no labels: make some")

    loader = TrainingLoader(
        TrainingStream([{}], mapper, seed=0), batch_size=1, num_workers=num_workers
    )
    with pytest.raises(UserError, match=r"^no labels: make some$"):
        next(iter(loader))


@pytest.mark.slow
def test_processes_share_each_batch():
    whole = batches(TrainingLoader(stream(), batch_size=4), 3)
    shares = [
        batches(TrainingLoader(stream(), batch_size=2, rank=rank, world_size=2), 3)
        for rank in range(2)
    ]
    assert [first + second for first, second in zip(*shares, strict=True)] == whole


def test_no_records():
    with pytest.raises(ValueError, match="empty"):
        stream(n=0)
