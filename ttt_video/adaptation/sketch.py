"""Compresses gradients so that inner products of many of them can be kept and compared."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor


class Sketch:
    """Compresses vectors linearly so that inner products stay what they are, nearly.

    Every entry is added, with a random sign, to one of ``size`` sums: a count sketch (Charikar,
    Chen, Farach-Colton, 2002) whose entries go to the sums in turn, from one part to the next,
    which needs no table and adds in the same order on every device. An inner product <u, v> of
    sketches is unbiased, and where entries of one sum are unrelated its variance is about
    (|u|^2 |v|^2 + <u, v>^2) / size. Choose a prime ``size``: then the rows of no matrix fall on the
    same sums. Vectors that fit stay as they are.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        size: int,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        """
        Args:
            lengths: of the parts of the vectors.
            size: of their sketches, at most.
            seed: draws the signs, one byte for each entry.
            device: of the vectors and of their sketches.
        """
        self._lengths = [*lengths]
        total = sum(self._lengths)
        self.size = min(total, size)
        self._signs: list[Tensor] | None = None
        if total > size:
            generator = torch.Generator().manual_seed(seed)
            drawn = torch.randint(2, (total,), generator=generator, dtype=torch.int8) * 2 - 1
            self._signs = [*drawn.to(device).split(self._lengths)]
        self._device = device

    def __call__(self, parts: Sequence[Tensor | None]) -> Tensor:
        """Returns the sketch, (size,) float32, of a vector in parts; None stands for zeros."""
        if self._signs is None:
            whole = [
                torch.zeros(length, device=self._device) if part is None else part
                for part, length in zip(parts, self._lengths, strict=True)
            ]
            return torch.cat([part.detach().reshape(-1).float() for part in whole])
        sums = torch.zeros(self.size, device=self._device)
        starts = accumulate(self._lengths, initial=0)
        for part, signs, start in zip(parts, self._signs, starts, strict=False):
            if part is not None:
                signed = part.detach().reshape(-1).float() * signs
                # Large gradients are often in small parts, which must not share the first sums.
                place = start % self.size
                first, rest = signed[: self.size - place], signed[self.size - place :]
                sums[place : place + len(first)] += first
                rows, left = divmod(len(rest), self.size)
                sums += rest[: rows * self.size].view(rows, self.size).sum(0)
                sums[:left] += rest[rows * self.size :]
        return sums
