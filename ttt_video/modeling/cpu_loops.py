"""Loops that Numba compiles for a CPU at their first run, and the threads that share them out.

Machine code is kept on disk, beside the file of the loops or in Numba's cache folder.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

_OPTIONS: dict[str, Any] = {
    "nogil": True,  # work is shared out among threads
    "error_model": "numpy",
    # Sums may be reordered, which vectorises them; infinities and NaNs stay.
    "fastmath": {"reassoc", "contract", "arcp", "nsz"},
}


def compiled(function: Callable[..., Any], *, inline: bool = False) -> Callable[..., Any]:
    """Compiles a function of arrays and numbers, which holds no lock while it runs.

    ``inline`` puts it into each of its callers, where constant arguments become constants.
    """
    options = {**_OPTIONS, "inline": "always" if inline else "never"}
    try:
        return numba.njit(function, cache=True, **options)
    except RuntimeError:  # no folder to write to, so every process compiles
        return numba.njit(function, **options)


@cache
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    """Returns the threads of one process, because threads do not outlive a fork."""
    return ThreadPoolExecutor(threads)


def share_out(loops: Callable[..., None], units: int, *arrays: Any) -> None:
    """Runs the loops over all units in as many threads as torch has, each with its own units.

    Args:
        loops: is called with ``arrays``, and the first unit and the one after the last.
        units: number of pieces that can be done at once, such as heads.
        arrays: what the loops read and write.
    """
    threads = min(torch.get_num_threads(), units)
    ends = [units * i // threads for i in range(threads + 1)]
    *others, own = pairwise(ends)
    shares = [_pool(os.getpid(), threads - 1).submit(loops, *arrays, *pair) for pair in others]
    loops(*arrays, *own)
    for share in shares:
        share.result()


def arrays_of(*tensors: Tensor) -> list[np.ndarray]:
    """Returns tensors as contiguous arrays, which share their memory where they are contiguous."""
    return [tensor.detach().contiguous().numpy() for tensor in tensors]
