"""Counter-based random numbers: every draw is a hash of integers, so no draw depends on another.

numpy may change the streams of its distributions between releases; these functions use only
integer arithmetic and IEEE operations, so a world looks the same under every numpy.
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
    """A short stream of random numbers that belongs to one object, named by integer keys.

    Args:
        *keys: what is drawn, for example ``(seed, kind, index)``; negative integers are fine.
    """

    def __init__(self, *keys: int) -> None:
        state = 0
        for key in keys:
            state = mix((state + _GAMMA + key) & _MASK)
        self._state = state

    def random(self) -> float:
        """A float in [0, 1)."""
        self._state = (self._state + _GAMMA) & _MASK
        return (mix(self._state) >> 11) * 2.0**-53

    def uniform(self, low: float, high: float) -> float:
        """A float in [low, high)."""
        return low + (high - low) * self.random()

    def integer(self, count: int) -> int:
        """An integer in [0, count)."""
        return int(self.random() * count)

    def chance(self, probability: float) -> bool:
        """True with this probability."""
        return self.random() < probability

    def choice(self, items: Sequence[T]) -> T:
        """One of the items, each equally likely."""
        return items[self.integer(len(items))]

    def jitter(self, color: Sequence[float], amount: float) -> tuple[float, float, float]:
        """A colour near the given one: a common change of brightness and a smaller one of hue."""
        gain = 1.0 + self.uniform(-amount, amount)
        r, g, b = (gain * c + self.uniform(-amount, amount) * 0.25 for c in color)
        return (min(max(r, 0.0), 1.0), min(max(g, 0.0), 1.0), min(max(b, 0.0), 1.0))


def cell_hash(i: np.ndarray, j: np.ndarray, salt: int) -> np.ndarray:
    """Hash integer lattice cells to floats.

    Args:
        i, j: arrays of cell coordinates, any integer-valued dtype, shapes that broadcast.
        salt: makes one pattern differ from another.

    Returns:
        float32 array in [0, 1).
    """
    h = i.astype(np.int32).astype(np.uint32) * np.uint32(0x8DA6B343)
    h = h ^ (j.astype(np.int32).astype(np.uint32) * np.uint32(0xD8163841))
    h = h ^ np.uint32(salt & 0xFFFFFFFF)
    h = (h ^ (h >> np.uint32(15))) * np.uint32(0x2C1B3C6D)
    h = (h ^ (h >> np.uint32(12))) * np.uint32(0x297A2D39)
    h = h ^ (h >> np.uint32(15))
    return (h >> np.uint32(8)).astype(np.float32) * np.float32(2.0**-24)


def wave(cycles: float) -> float:
    """A sine of period 1 made of parabolas: range [-1, 1], bit-exact everywhere, unlike libm's."""
    x = 2.0 * (cycles % 1.0) - 1.0
    return -4.0 * x * (1.0 - abs(x))


def wave_array(cycles: np.ndarray) -> np.ndarray:
    """``wave`` of a float32 array."""
    x = 2.0 * (cycles - np.floor(cycles)) - 1.0
    return -4.0 * x * (1.0 - np.abs(x))


@functools.lru_cache(maxsize=4)
def noise_tile(octaves: int = 5, base: int = 8) -> np.ndarray:
    """A tileable fractal value-noise texture, (NOISE_SIZE, NOISE_SIZE) float32, range [0, 1]."""
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
    """Sample the noise tile.

    Args:
        x, y: float32 arrays of coordinates in metres.
        scale: tile pixels per metre; the coarsest lumps are 32 tile pixels wide.
        salt: shifts the tile, so that two surfaces do not show the same pattern.

    Returns:
        float32 array in [0, 1].
    """
    i = np.floor(x * scale).astype(np.int32) + (salt & 0xFF)
    j = np.floor(y * scale).astype(np.int32) + ((salt >> 8) & 0xFF)
    return noise_tile()[j & (NOISE_SIZE - 1), i & (NOISE_SIZE - 1)]
