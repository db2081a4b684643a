"""Loops on a CPU: the threads that share them out, and machine code without a folder."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable

import numpy as np

from ttt_video.modeling.cpu_loops import compiled, share_out


def _marked(heads: int) -> list[int]:
    """How often each head was gone through."""
    counts = np.zeros(heads, int)

    def loops(counts, start: int, stop: int) -> None:
        counts[start:stop] += 1

    share_out(loops, heads, counts)
    return counts.tolist()


def test_every_head_is_one_threads_also_in_a_fork(three_threads):
    """The parent's threads are not there, and waiting for one of them would never end."""
    for heads in (1, 2, 3, 8):
        assert _marked(heads) == [1] * heads
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.apply_async(_marked, (8,)).get(timeout=60) == [1] * 8


def test_without_a_folder_to_write_to_the_loops_are_compiled_all_the_same():
    """Numba cannot keep its code of a function that it finds in no file."""
    source = "def twice(x):\n    return 2 * x\n"
    names: dict[str, Callable[[int], int]] = {}
    exec(compile(source, "<nowhere>", "exec"), names)
    assert compiled(names["twice"])(21) == 42
