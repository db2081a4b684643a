"""Loads training data as one numbered, reproducible sequence of samples."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from ..errors import UserError, error_of_process


@contextmanager
def seeded(*entropy: int) -> Iterator[None]:
    """Seeds Python's and numpy's global generators, which detectron2's augmentations draw from.

    Both have their former state after the block.
    """
    python_state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002
    words = np.random.SeedSequence(entropy).generate_state(4)
    random.seed(int(words[0]))
    np.random.seed(words)  # noqa: NPY002
    try:
        yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)  # noqa: NPY002


class TrainingStream(Dataset):
    """The samples of an endless training run; each is a pure function of seed and position.

    Position p is sample ``p % N`` of the p // N-th shuffle of the N records, and its augmentation
    is seeded by ``(seed, p)``. So a run can start at any position, and workers, processes and
    interruptions do not change what position p holds.

    Args:
        records: detectron2 dataset dicts, which are not modified.
        mapper: turns a record into a model input.
        seed: non-negative.
    """

    def __init__(
        self,
        records: Sequence[dict[str, Any]],
        mapper: Callable[[dict[str, Any]], dict[str, Any]],
        *,
        seed: int,
    ):
        if not records:
            raise ValueError("records must not be empty")
        self.records = records
        self.mapper = mapper
        self.seed = seed
        self._epoch = -1
        self._order: list[int] = []

    def __getitem__(self, position: int) -> dict[str, Any]:
        epoch, offset = divmod(position, len(self.records))
        if epoch != self._epoch:
            rng = np.random.default_rng([self.seed, epoch])
            self._epoch, self._order = epoch, rng.permutation(len(self.records)).tolist()
        with seeded(self.seed, position):
            return self.mapper(self.records[self._order[offset]])


class TrainingLoader:
    """Yields the batches (lists of model inputs) of one process, starting at any training step.

    Args:
        stream: the run's samples.
        batch_size: images per step of this process. The batches of all processes together cover
            consecutive positions, so two processes of 8 see what one process of 16 sees.
        num_workers: loading processes; 0 loads in this one.
    """

    def __init__(
        self,
        stream: TrainingStream,
        *,
        batch_size: int,
        num_workers: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ):
        self.stream = stream
        self.batch_size, self.num_workers = batch_size, num_workers
        self.rank, self.world_size = rank, world_size
        self._first_step = 0

    def start_at(self, step: int) -> None:
        """Makes the next iterator begin with the batch of training step ``step`` (0-based)."""
        self._first_step = step

    def _batches(self) -> Iterator[list[int]]:
        """Yields the positions of this process' share of each global batch, without end."""
        for step in count(self._first_step):
            first = (step * self.world_size + self.rank) * self.batch_size
            yield list(range(first, first + self.batch_size))

    def __iter__(self) -> Iterator[list[dict[str, Any]]]:
        loader = DataLoader(
            self.stream,
            batch_sampler=self._batches(),
            num_workers=self.num_workers,
            collate_fn=list,
            # An iterator draws from this generator when it is made. With the global one the first
            # step after a resume would see other random numbers.
            generator=torch.Generator(),
        )
        try:
            yield from loader
        except UserError as error:
            known = error_of_process(str(error))  # the message is a worker's whole traceback
            if known is None:
                raise
            raise known from None
