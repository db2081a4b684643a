"""Convolutions of 3x3 pixels by a quarter of the multiplications (Winograd; Lavin and Gray,
arXiv:1509.09308): F(4x4, 3x3), on a CPU.

Tiles of 6x6 pixels overlap by two and give 4x4 pixels each. Tiles and weights are transformed,
multiplied number by number, summed over channels and transformed back. Numba compiles what
transforms tiles at its first run: it reads a map once and writes nothing but the transformed tiles.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .cpu_loops import arrays_of, compiled, share_out
from .tables import shared_table

TILE, STEP = 6, 4
"""Sides in px of the square that a tile reads, and of the one that it gives."""

# Lavin and Gray's matrices are B^T, G and A^T, of the points 0, 1, -1, 2, -2 and infinity.
_WEIGHTS = (  # G
    (1 / 4, 0, 0),
    (-1 / 6, -1 / 6, -1 / 6),
    (-1 / 6, 1 / 6, -1 / 6),
    (1 / 24, 1 / 12, 1 / 6),
    (1 / 24, -1 / 12, 1 / 6),
    (0, 0, 1),
)
_TWO, _FOUR, _FIVE, _EIGHT = (np.float32(x) for x in (2, 4, 5, 8))


# Each of these four maps lines of numbers, which lie side by side in rows: six or four rows to four
# or six. A map is transformed along its columns and then along its rows.


@compiled
def _by_pixels(given: Any, found: Any) -> None:
    """Puts B^T times six rows of pixels into six rows."""
    for q in range(given.shape[1]):
        inner, outer = given[4, q] - _FOUR * given[2, q], given[3, q] - _FOUR * given[1, q]
        far, near = given[4, q] - given[2, q], _TWO * (given[3, q] - given[1, q])
        found[0, q] = _FOUR * given[0, q] - _FIVE * given[2, q] + given[4, q]
        found[1, q], found[2, q] = inner + outer, inner - outer
        found[3, q], found[4, q] = far + near, far - near
        found[5, q] = _FOUR * given[1, q] - _FIVE * given[3, q] + given[5, q]


@compiled
def _to_pixels(given: Any, found: Any) -> None:
    """Puts B times six rows, the gradient of :func:`_by_pixels`, into six rows."""
    for q in range(given.shape[1]):
        near, far = given[1, q] - given[2, q], given[3, q] - given[4, q]
        all_near, all_far = given[1, q] + given[2, q], given[3, q] + given[4, q]
        found[0, q] = _FOUR * given[0, q]
        found[1, q] = _FOUR * (given[5, q] - near) - _TWO * far
        found[2, q] = -_FIVE * given[0, q] - _FOUR * all_near - all_far
        found[3, q] = near + _TWO * far - _FIVE * given[5, q]
        found[4, q] = given[0, q] + all_near + all_far
        found[5, q] = given[5, q]


@compiled
def _by_points(given: Any, found: Any) -> None:
    """Puts A^T times six rows, four rows of the result, into four rows."""
    for q in range(given.shape[1]):
        even, odd = given[1, q] + given[2, q], given[1, q] - given[2, q]
        near, far = given[3, q] + given[4, q], given[3, q] - given[4, q]
        found[0, q] = given[0, q] + even + near
        found[1, q], found[2, q] = odd + _TWO * far, even + _FOUR * near
        found[3, q] = odd + _EIGHT * far + given[5, q]


@compiled
def _to_points(given: Any, found: Any) -> None:
    """Puts A times four rows, the gradient of :func:`_by_points`, into six rows."""
    for q in range(given.shape[1]):
        even, odd = given[0, q] + given[2, q], given[1, q] + given[3, q]
        near = given[0, q] + _FOUR * given[2, q]
        far = _TWO * given[1, q] + _EIGHT * given[3, q]
        found[0, q], found[5, q] = given[0, q], given[3, q]
        found[1, q], found[2, q] = even + odd, even - odd
        found[3, q], found[4, q] = near + far, near - far


@compiled
def _split(line: Any, columns: Any, before: Any) -> None:
    """Puts a line's pixels into columns: pixel 4 q + k - before into row k and column q.

    Beyond the line's ends there are zeros.
    """
    columns[:] = 0
    for k in range(len(columns)):
        first = 1 if k < before else 0
        stop = min(columns.shape[1], (len(line) + before - k + STEP - 1) // STEP)
        for q in range(first, stop):
            columns[k, q] = line[np.uint64(STEP * q + k - before)]


@compiled
def _add_joined(columns: Any, line: Any, before: Any) -> None:
    """Adds columns to a line's pixels, the reverse of :func:`_split`."""
    for k in range(len(columns)):
        first = 1 if k < before else 0
        stop = min(columns.shape[1], (len(line) + before - k + STEP - 1) // STEP)
        for q in range(first, stop):
            line[np.uint64(STEP * q + k - before)] += columns[k, q]


@compiled
def _tiles_of_pixels(maps: Any, tiles: Any, start: Any, stop: Any) -> None:
    """Fills ``tiles`` (36, C, tiles of all maps) for channels of ``maps`` (B, C, H, W)."""
    batch, _, height, width = maps.shape
    rows, columns = (height + STEP - 1) // STEP, (width + STEP - 1) // STEP
    pixels = np.empty((TILE, TILE, columns), maps.dtype)
    lines, found = np.empty_like(pixels), np.empty_like(pixels)
    for c in range(start, stop):
        for b in range(batch):
            for r in range(rows):
                for i in range(TILE):
                    y = STEP * r + i - 1
                    if 0 <= y < height:
                        _split(maps[b, c, y], pixels[i], 1)
                    else:
                        pixels[i] = 0
                    _by_pixels(pixels[i], lines[i])
                _by_pixels(lines.reshape(TILE, -1), found.reshape(TILE, -1))
                _copy_to(tiles, c, (b * rows + r) * columns, found)


@compiled
def _pixels_of_tiles(tiles: Any, maps: Any, start: Any, stop: Any) -> None:
    """Adds to the zeros of ``maps`` the gradient of :func:`_tiles_of_pixels`."""
    batch, _, height, width = maps.shape
    rows, columns = (height + STEP - 1) // STEP, (width + STEP - 1) // STEP
    given = np.empty((TILE, TILE, columns), maps.dtype)
    lines, pixels = np.empty_like(given), np.empty_like(given[0])
    for c in range(start, stop):
        for b in range(batch):
            for r in range(rows):
                _copy_from(tiles, c, (b * rows + r) * columns, given)
                _to_pixels(given.reshape(TILE, -1), lines.reshape(TILE, -1))
                for i in range(TILE):
                    y = STEP * r + i - 1
                    if 0 <= y < height:
                        _to_pixels(lines[i], pixels)
                        _add_joined(pixels, maps[b, c, y], 1)


@compiled
def _pixels_of_points(points: Any, biases: Any, maps: Any, start: Any, stop: Any) -> None:
    """Fills channels of ``maps`` (B, D, H, W) from ``points`` (36, D, tiles of all maps)."""
    batch, _, height, width = maps.shape
    rows, columns = (height + STEP - 1) // STEP, (width + STEP - 1) // STEP
    given = np.empty((TILE, TILE, columns), maps.dtype)
    lines = np.empty((STEP, TILE, columns), maps.dtype)
    pixels = np.empty((STEP, columns), maps.dtype)
    for d in range(start, stop):
        for b in range(batch):
            for r in range(rows):
                _copy_from(points, d, (b * rows + r) * columns, given)
                _by_points(given.reshape(TILE, -1), lines.reshape(STEP, -1))
                for i in range(min(STEP, height - STEP * r)):
                    _by_points(lines[i], pixels)
                    line = maps[b, d, STEP * r + i]
                    line[:] = biases[d]
                    _add_joined(pixels, line, 0)


@compiled
def _points_of_pixels(maps: Any, points: Any, start: Any, stop: Any) -> None:
    """Fills ``points`` with the gradient of :func:`_pixels_of_points`."""
    batch, _, height, width = maps.shape
    rows, columns = (height + STEP - 1) // STEP, (width + STEP - 1) // STEP
    pixels = np.empty((STEP, columns), maps.dtype)
    lines = np.empty((STEP, TILE, columns), maps.dtype)
    found = np.empty((TILE, TILE, columns), maps.dtype)
    for d in range(start, stop):
        for b in range(batch):
            for r in range(rows):
                for i in range(STEP):
                    y = STEP * r + i
                    if y < height:
                        _split(maps[b, d, y], pixels, 0)
                        _to_points(pixels, lines[i])
                    else:
                        lines[i] = 0
                _to_points(lines.reshape(STEP, -1), found.reshape(TILE, -1))
                _copy_to(points, d, (b * rows + r) * columns, found)


@compiled
def _copy_to(tiles: Any, channel: Any, first: Any, squares: Any) -> None:
    """Puts (6, 6, columns) numbers of a row of tiles where they belong in (36, C, tiles)."""
    for i in range(TILE):
        for j in range(TILE):
            for q in range(squares.shape[2]):
                tiles[TILE * i + j, channel, np.uint64(first + q)] = squares[i, j, q]


@compiled
def _copy_from(tiles: Any, channel: Any, first: Any, squares: Any) -> None:
    """Does the reverse of :func:`_copy_to`."""
    for i in range(TILE):
        for j in range(TILE):
            for q in range(squares.shape[2]):
                squares[i, j, q] = tiles[TILE * i + j, channel, np.uint64(first + q)]


@shared_table(4)
def _of_weights(dtype: torch.dtype) -> Tensor:
    """Returns G for squares instead of lines: (36, 9)."""
    line = torch.tensor(_WEIGHTS, dtype=torch.float64)
    return torch.kron(line, line).to(dtype)


class _Convolution(torch.autograd.Function):
    """The convolution of :func:`convolve`, which keeps transformed tiles and weights."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        batch, channels, height, width = x.shape
        count = batch * -(-height // STEP) * -(-width // STEP)
        tiles = x.new_empty(TILE**2, channels, count)
        share_out(_tiles_of_pixels, channels, *arrays_of(x, tiles))
        flat = weight.flatten(2).flatten(0, 1).t()
        points = (_of_weights(x.dtype) @ flat).view(TILE**2, -1, channels)
        out = x.new_empty(batch, len(weight), height, width)
        biases = x.new_zeros(len(weight)) if bias is None else bias
        share_out(_pixels_of_points, len(weight), *arrays_of(torch.bmm(points, tiles), biases, out))
        ctx.save_for_backward(tiles, points)
        ctx.size = x.shape
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        tiles, points = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad
        _, depth, channels = points.shape
        given = tiles.new_empty(TILE**2, depth, tiles.shape[2])
        share_out(_points_of_pixels, depth, *arrays_of(grad, given))
        x = weight = None
        if of_weight:
            flat = torch.bmm(given, tiles.transpose(1, 2)).flatten(1)
            flat = _of_weights(grad.dtype).t() @ flat
            weight = flat.t().reshape(depth, channels, 3, 3)
        if of_x:
            x = grad.new_zeros(ctx.size)
            of_tiles = torch.bmm(points.transpose(1, 2), given)
            share_out(_pixels_of_tiles, channels, *arrays_of(of_tiles, x))
        return x, weight, grad.sum((0, 2, 3)) if of_bias else None


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Returns ``F.conv2d(x, weight, bias, padding=1)`` of 3x3 pixels.

    In float32 it is exact to some 1e-6 (relative, L2), where a sum of products is to some 1e-7.

    Args:
        x: (B, C, H, W), float32 or float64, on a CPU.
        weight: (D, C, 3, 3); bias: (D,).

    Returns:
        (B, D, H, W).
    """
    return _Convolution.apply(x, weight, bias)
