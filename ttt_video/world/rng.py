"""Counter-based random numbers: every draw is a hash of integers and independent of others.

numpy may change its distributions between releases. These functions use only integer arithmetic and
IEEE operations, so that a world looks the same with every numpy.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TypeVar

import numpy as np

T = TypeVar("T")

_MASK = (1 << 64) - 1
_GAMMA = 0x9E3779B97F4A7C15
NOISE_SIZE = 256  # side of the noise tile, a power of two


def mix(value: int) -> int:
    """The finaliser of splitmix64: a bijection of 64-bit integers (Steele et al., 2014)."""
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


class Draw:
    """A stream of random numbers for one object, named by integers such as (seed, kind, index)."""

    def __init__(self, *keys: int) -> None:
        state = 0
        for key in keys:
            state = mix((state + _GAMMA + key) & _MASK)
        self._state = state

    def random(self) -> float:
        """Returns a float in [0, 1)."""
        self._state = (self._state + _GAMMA) & _MASK
        return (mix(self._state) >> 11) * 2.0**-53

    def uniform(self, low: float, high: float) -> float:
        """Returns a float in [low, high)."""
        return low + (high - low) * self.random()

    def integer(self, count: int) -> int:
        """Returns an integer in [0, count)."""
        return int(self.random() * count)

    def chance(self, probability: float) -> bool:
        """Returns True with this probability."""
        return self.random() < probability

    def choice(self, items: Sequence[T]) -> T:
        """Returns one of the items, each equally likely."""
        return items[self.integer(len(items))]

    def jitter(self, color: Sequence[float], amount: float) -> tuple[float, float, float]:
        """Varies a colour: all channels together, and each channel a little."""
        gain = 1.0 + self.uniform(-amount, amount)
        r, g, b = (gain * c + self.uniform(-amount, amount) * 0.25 for c in color)
        return (min(max(r, 0.0), 1.0), min(max(g, 0.0), 1.0), min(max(b, 0.0), 1.0))


def cell_hash(i: np.ndarray, j: np.ndarray, salt: int) -> np.ndarray:
    """Hashes lattice cells (i, j), integers of any dtype that broadcast, to float32 in [0, 1).

    Patterns with different ``salt`` differ.
    """
    h = i.astype(np.int32).astype(np.uint32) * np.uint32(0x8DA6B343)
    h = h ^ (j.astype(np.int32).astype(np.uint32) * np.uint32(0xD8163841))
    h = h ^ np.uint32(salt & 0xFFFFFFFF)
    h = (h ^ (h >> np.uint32(15))) * np.uint32(0x2C1B3C6D)
    h = (h ^ (h >> np.uint32(12))) * np.uint32(0x297A2D39)
    h = h ^ (h >> np.uint32(15))
    return (h >> np.uint32(8)).astype(np.float32) * np.float32(2.0**-24)


def wave(cycles: float) -> float:
    """Returns a sine of period 1 made of parabolas: bit-exact everywhere, unlike libm's."""
    x = 2.0 * (cycles % 1.0) - 1.0
    return -4.0 * x * (1.0 - abs(x))


def wave_array(cycles: np.ndarray) -> np.ndarray:
    """Applies ``wave`` to a float32 array."""
    x = 2.0 * (cycles - np.floor(cycles)) - 1.0
    return -4.0 * x * (1.0 - np.abs(x))


@functools.lru_cache(maxsize=4)
def noise_tile(octaves: int = 5, base: int = 8) -> np.ndarray:
    """Returns a tileable fractal value noise, (NOISE_SIZE, NOISE_SIZE) float32, range [0, 1]."""
    axis = np.arange(NOISE_SIZE)
    total = np.zeros((NOISE_SIZE, NOISE_SIZE), dtype=np.float32)
    weight = 1.0
    for octave in range(octaves):
        cells = base << octave
        position = axis.astype(np.float32) * (cells / NOISE_SIZE)
        low = position.astype(np.int64)
        part = position - low.astype(np.float32)
        part = part * part * (3.0 - 2.0 * part)
        high = (low + 1) % cells
        lattice = cell_hash(
            np.arange(cells)[:, None], np.arange(cells)[None, :], 7919 * (octave + 1) + base
        )
        rows = lattice[low] + (lattice[high] - lattice[low]) * part[:, None]
        total += weight * (rows[:, low] + (rows[:, high] - rows[:, low]) * part[None, :])
        weight *= 0.6
    total -= total.min()
    total /= total.max()
    total.setflags(write=False)
    return total


def noise(x: np.ndarray, y: np.ndarray, scale: float, salt: int = 0) -> np.ndarray:
    """Samples the noise tile at float32 coordinates in metres; returns float32 in [0, 1].

    Args:
        x, y: coordinates.
        scale: tile pixels per metre; the coarsest lumps are 32 tile pixels wide.
        salt: shifts the tile, so that two surfaces do not show the same pattern.
    """
    i = np.floor(x * scale).astype(np.int32) + (salt & 0xFF)
    j = np.floor(y * scale).astype(np.int32) + ((salt >> 8) & 0xFF)
    return noise_tile()[j & (NOISE_SIZE - 1), i & (NOISE_SIZE - 1)]
