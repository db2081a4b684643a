"""Attention within windows on a CPU, as loops that Numba compiles at their first run.

A window's head is small enough for the caches: its queries, keys and values are read from where the
projection wrote them, and neither windows nor logits are written to memory. Backward computes the
weights again from the logits' log-sums. Rows of padding alone are skipped.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .cpu_loops import arrays_of, compiled, share_out
from .tables import shared_table
from .windows import shift_mask, window_places

HEAD_DIM = 32
"""Channels of a head in every published Swin."""

_ROWS, _TERMS = 7, 4  # of a product at a time: their 28 factors fit into registers
_SIDE = 28  # rows of buffers are multiples of it, so of both
_LANES = 16  # their columns are multiples of it
_UNITS = 24  # pieces of work for threads, at least
_NONE = np.float32(-1e30)  # bias of columns that are no token's
_LOG2E, _LN2 = np.float32(math.log2(math.e)), np.float32(math.log(2))
_ZERO, _HALF, _ONE = np.float32(0), np.float32(0.5), np.float32(1)
# 2^x for -1/2 <= x <= 1/2 by its Taylor series, which is exact to 5e-9.
_C1, _C2, _C3, _C4, _C5, _C6, _C7 = (
    np.float32(math.log(2) ** i / math.factorial(i)) for i in range(1, 8)
)
_LEAST = np.float32(-126)  # exponent of the least normal number


@partial(compiled, inline=True)
def _add_product(a: Any, b: Any, out: Any, live: Any, depth: Any, columns: Any) -> None:
    """Adds a @ b to the columns of ``out``, in the blocks of seven rows that are ``live``.

    A last block may reach into rows of the buffers that are no token's, which nobody reads.
    """
    for block in range(len(live)):
        if not live[block]:
            continue
        i = _ROWS * block
        for d in range(0, depth, _TERMS):
            k0, k1, k2, k3 = a[i, d], a[i, d + 1], a[i, d + 2], a[i, d + 3]
            l0, l1, l2, l3 = a[i + 1, d], a[i + 1, d + 1], a[i + 1, d + 2], a[i + 1, d + 3]
            m0, m1, m2, m3 = a[i + 2, d], a[i + 2, d + 1], a[i + 2, d + 2], a[i + 2, d + 3]
            n0, n1, n2, n3 = a[i + 3, d], a[i + 3, d + 1], a[i + 3, d + 2], a[i + 3, d + 3]
            o0, o1, o2, o3 = a[i + 4, d], a[i + 4, d + 1], a[i + 4, d + 2], a[i + 4, d + 3]
            p0, p1, p2, p3 = a[i + 5, d], a[i + 5, d + 1], a[i + 5, d + 2], a[i + 5, d + 3]
            q0, q1, q2, q3 = a[i + 6, d], a[i + 6, d + 1], a[i + 6, d + 2], a[i + 6, d + 3]
            for j in range(columns):
                b0, b1, b2, b3 = b[d, j], b[d + 1, j], b[d + 2, j], b[d + 3, j]
                out[i, j] += (k0 * b0 + k1 * b1) + (k2 * b2 + k3 * b3)
                out[i + 1, j] += (l0 * b0 + l1 * b1) + (l2 * b2 + l3 * b3)
                out[i + 2, j] += (m0 * b0 + m1 * b1) + (m2 * b2 + m3 * b3)
                out[i + 3, j] += (n0 * b0 + n1 * b1) + (n2 * b2 + n3 * b3)
                out[i + 4, j] += (o0 * b0 + o1 * b1) + (o2 * b2 + o3 * b3)
                out[i + 5, j] += (p0 * b0 + p1 * b1) + (p2 * b2 + p3 * b3)
                out[i + 6, j] += (q0 * b0 + q1 * b1) + (q2 * b2 + q3 * b3)


@partial(compiled, inline=True)
def _exponentials(row: Any, powers: Any, shift: Any, count: Any) -> Any:
    """Puts exp(row - shift) into a row and returns its sum; ``powers`` is room for int32."""
    floats = powers.view(np.float32)
    for j in range(count):
        x = (row[j] - shift) * _LOG2E
        x = _LEAST if x < _LEAST else x  # keeps NaN
        whole = np.floor(x + _HALF)
        x -= whole
        powers[j] = (np.int32(whole) + np.int32(127)) << np.int32(23)
        row[j] = _ONE + x * (
            _C1 + x * (_C2 + x * (_C3 + x * (_C4 + x * (_C5 + x * (_C6 + x * _C7)))))
        )
    total = _ZERO
    for j in range(count):
        row[j] *= floats[j]
        total += row[j]
    return total


@partial(compiled, inline=True)
def _largest(row: Any, most: Any, count: Any) -> Any:
    """Returns the largest number of a row; ``most`` has room for 16 numbers."""
    for lane in range(16):
        most[lane] = row[lane]
    for j in range(16, count, 16):
        for lane in range(16):
            most[lane] = row[j + lane] if row[j + lane] > most[lane] else most[lane]
    found = most[0]
    for lane in range(1, 16):
        found = most[lane] if most[lane] > found else found
    return found


@compiled
def _read(
    numbers: Any, first: Any, apart: Any, fill: Any, tokens: Any, factor: Any, rows: Any
) -> None:
    """Puts the vectors of a window's tokens, times a factor, into rows.

    That of token t begins at first + t * apart; token -1 is padding, of which ``fill`` is.
    """
    for i in range(len(tokens)):
        if tokens[i] < 0:
            for d in range(HEAD_DIM):
                rows[i, d] = fill[d] * factor
        else:
            at = np.uint64(first + tokens[i] * apart)
            for d in range(HEAD_DIM):
                rows[i, d] = numbers[at + np.uint64(d)] * factor


@compiled
def _read_all(
    numbers: Any, first: Any, fill: Any, head: Any, tokens: Any, scale: Any, query: Any, key: Any,
    value: Any,
) -> None:  # fmt: skip
    """Reads a window's queries, times their scale, its keys and its values."""
    part = fill.shape[1] * HEAD_DIM
    _read(numbers, first, 3 * part, fill[0, head], tokens, scale, query)
    _read(numbers, first + part, 3 * part, fill[1, head], tokens, _ONE, key)
    _read(numbers, first + 2 * part, 3 * part, fill[2, head], tokens, _ONE, value)


@compiled
def _write(
    numbers: Any, first: Any, part: Any, fill: Any, tokens: Any, scale: Any, query: Any, key: Any,
    value: Any,
) -> None:  # fmt: skip
    """Does the reverse of :func:`_read` for gradients of a window's queries, keys and values.

    Their vectors are ``part`` numbers apart; what is padding's is added to ``fill``.
    """
    for i in range(len(tokens)):
        if tokens[i] < 0:
            for d in range(HEAD_DIM):
                fill[0, d] += query[i, d] * scale
                fill[1, d] += key[i, d]
                fill[2, d] += value[i, d]
        else:
            at = np.uint64(first + tokens[i] * 3 * part)
            for d in range(HEAD_DIM):
                place = at + np.uint64(d)
                numbers[place] = query[i, d] * scale
                numbers[place + np.uint64(part)] = key[i, d]
                numbers[place + np.uint64(2 * part)] = value[i, d]


@compiled
def _mark(tokens: Any, live: Any) -> None:
    """Marks the blocks of rows in which there is a token."""
    live[:] = False
    for i in range(len(tokens)):
        if tokens[i] >= 0:
            live[i // _ROWS] = True


@compiled
def _transpose(rows: Any, columns: Any, count: Any) -> None:
    for i in range(count):
        for d in range(HEAD_DIM):
            columns[d, i] = rows[i, d]


@compiled
def _logits(query: Any, keys: Any, bias: Any, mask: Any, live: Any, logits: Any) -> None:
    """Fills live rows of logits with bias, mask and products."""
    count, width = bias.shape
    for block in range(len(live)):
        if live[block]:
            for i in range(_ROWS * block, _ROWS * (block + 1)):
                for j in range(width):
                    logits[i, j] = bias[i, j] + mask[i, j] if i < count else _ZERO
    _add_product(query, keys, logits, live, HEAD_DIM, width)


@partial(compiled, inline=True)
def _softmax(logits: Any, live: Any, sums: Any, powers: Any, most: Any, result: Any) -> None:
    """Turns live rows of logits into weights, not yet divided by their sums.

    ``result`` gets these sums, and ``sums`` the logits' log-sums.
    """
    width = logits.shape[1]
    for i in range(len(sums)):
        if live[i // _ROWS]:
            shift = _largest(logits[i], most, width)
            result[i] = _exponentials(logits[i], powers, shift, width)
            sums[i] = shift + np.log(result[i])


@partial(compiled, inline=True)
def _slopes(weights: Any, live: Any, sums: Any, powers: Any, slopes: Any, of_bias: Any) -> None:
    """Turns logits into weights, and the weights' gradients into the logits'; adds those to biases.

    Rows that are not live become 0.
    """
    width = weights.shape[1]
    for i in range(len(sums)):
        row, slope = weights[i], slopes[i]
        if not live[i // _ROWS]:
            row[:] = _ZERO
            continue
        _exponentials(row, powers, sums[i], width)
        dot = _ZERO
        for j in range(width):
            dot += row[j] * slope[j]
        for j in range(width):
            slope[j] = row[j] * (slope[j] - dot)
            of_bias[i, j] += slope[j]


@compiled
def _fill_bias(table: Any, positions: Any, head: Any, bias: Any) -> None:
    """Puts a head's relative position biases into rows; columns that are no token's get less."""
    count, width = bias.shape
    for i in range(count):
        for j in range(count):
            bias[i, j] = table[positions[i, j], head]
        for j in range(count, width):
            bias[i, j] = _NONE


@compiled
def _add_bias(bias: Any, positions: Any, head: Any, table: Any) -> None:
    """Adds gradients of biases to those of the table that they are from."""
    for i in range(len(bias)):
        for j in range(len(bias)):
            table[positions[i, j], head] += bias[i, j]


@partial(compiled, inline=True)
def _vectors(count: Any) -> Any:
    """Returns zeros for a window's vectors, as rows."""
    return np.zeros((-(-count // _SIDE) * _SIDE, HEAD_DIM), np.float32)


@compiled
def _forward(
    qkv: Any, fill: Any, table: Any, positions: Any, mask: Any, tokens: Any, scale: Any,
    shares: Any, out: Any, sums: Any, start: Any, stop: Any,
) -> None:  # fmt: skip
    """Fills ``out`` (B, L, heads, D) and ``sums`` (B, nW, heads, N) for some shares of heads."""
    batch, length, _, heads, _ = qkv.shape
    windows, count = tokens.shape
    width, depth = mask.shape[2], -(-count // _TERMS) * _TERMS
    numbers, results = qkv.reshape(-1), out.reshape(-1)
    part, apart = heads * HEAD_DIM, 3 * heads * HEAD_DIM
    query, key, value, result = _vectors(count), _vectors(count), _vectors(count), _vectors(count)
    keys = np.zeros((HEAD_DIM, width), np.float32)
    logits, bias = np.zeros((len(query), width), np.float32), np.zeros((count, width), np.float32)
    powers, live = np.zeros(width, np.int32), np.zeros(-(-count // _ROWS), np.bool_)
    most, totals = np.zeros(_LANES, np.float32), np.zeros(count, np.float32)
    for unit in range(start, stop):
        m, share = unit // shares, unit % shares
        _fill_bias(table, positions, m, bias)
        for b in range(batch):
            first, at = b * length * apart + m * HEAD_DIM, b * length * part + m * HEAD_DIM
            for w in range(windows * share // shares, windows * (share + 1) // shares):
                own = tokens[w]
                _mark(own, live)
                _read_all(numbers, first, fill, m, own, scale, query, key, value)
                _transpose(key, keys, count)
                _logits(query, keys, bias, mask[w % len(mask)], live, logits)
                _softmax(logits, live, sums[b, w, m], powers, most, totals)
                result[:] = _ZERO
                _add_product(logits, value, result, live, depth, HEAD_DIM)
                for i in range(count):
                    if own[i] >= 0:
                        place, factor = np.uint64(at + own[i] * part), _ONE / totals[i]
                        for d in range(HEAD_DIM):
                            results[place + np.uint64(d)] = result[i, d] * factor


@compiled
def _backward(
    qkv: Any, fill: Any, table: Any, positions: Any, mask: Any, tokens: Any, scale: Any, sums: Any,
    grad: Any, of_qkv: Any, of_fill: Any, of_table: Any, start: Any, stop: Any,
) -> None:  # fmt: skip
    """Fills ``of_qkv`` and adds to the zeros of the other two, for some shares of heads.

    Each share has its own ``of_fill`` and ``of_table``.
    """
    batch, length, _, heads, _ = qkv.shape
    windows, count = tokens.shape
    width, depth = mask.shape[2], -(-count // _TERMS) * _TERMS
    numbers, of_numbers, of_results = qkv.reshape(-1), of_qkv.reshape(-1), grad.reshape(-1)
    part, apart = heads * HEAD_DIM, 3 * heads * HEAD_DIM
    query, key, value, given = _vectors(count), _vectors(count), _vectors(count), _vectors(count)
    of_query, of_key, of_value = _vectors(count), _vectors(count), _vectors(count)
    keys, values = np.zeros((HEAD_DIM, width), np.float32), np.zeros((HEAD_DIM, width), np.float32)
    weights = np.zeros((len(query), width), np.float32)
    slopes = np.zeros((len(query), width), np.float32)
    bias, of_bias = np.zeros((count, width), np.float32), np.zeros((count, width), np.float32)
    powers, nothing = np.zeros(width, np.int32), np.zeros(HEAD_DIM, np.float32)
    live = np.zeros(-(-count // _ROWS), np.bool_)
    every = np.ones(len(live), np.bool_)
    shares = len(of_table)
    for unit in range(start, stop):
        m, share = unit // shares, unit % shares
        _fill_bias(table, positions, m, bias)
        of_bias[:] = _ZERO
        for b in range(batch):
            first, at = b * length * apart + m * HEAD_DIM, b * length * part + m * HEAD_DIM
            for w in range(windows * share // shares, windows * (share + 1) // shares):
                own = tokens[w]
                _mark(own, live)
                _read_all(numbers, first, fill, m, own, scale, query, key, value)
                _read(of_results, at, part, nothing, own, _ONE, given)
                _transpose(key, keys, count)
                _transpose(value, values, count)
                _logits(query, keys, bias, mask[w % len(mask)], live, weights)
                slopes[:] = _ZERO
                _add_product(given, values, slopes, live, HEAD_DIM, width)
                _slopes(weights, live, sums[b, w, m], powers, slopes, of_bias)
                of_query[:], of_key[:], of_value[:] = _ZERO, _ZERO, _ZERO
                _add_product(slopes, key, of_query, live, depth, HEAD_DIM)
                _add_product(slopes.T, query, of_key, every, depth, HEAD_DIM)
                _add_product(weights.T, given, of_value, every, depth, HEAD_DIM)
                _write(
                    of_numbers,
                    first,
                    part,
                    of_fill[share, :, m],
                    own,
                    scale,
                    of_query,
                    of_key,
                    of_value,
                )
        _add_bias(of_bias, positions, m, of_table[share])


@shared_table(64)
def _window_tokens(height: int, width: int, side: int, shift: int) -> Tensor:
    """Returns the token at each place of the windows, (nW, N) int64; -1 at padding."""
    places = window_places(height, width, side, shift, torch.device("cpu"))
    tokens = places.tokens.clone()
    tokens[places.padding] = -1
    return tokens.view(-1, side**2)


class _WindowAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, fill: Tensor, table: Tensor, places: tuple[Tensor, ...], scale: float
    ) -> Tensor:
        batch, length, _, heads, dim = qkv.shape
        *_, tokens = places
        out = qkv.new_empty(batch, length, heads, dim)
        sums = qkv.new_empty(batch, len(tokens), heads, tokens.shape[1])
        read = (*arrays_of(qkv, fill, table, *places), np.float32(scale))
        shares = _shares(heads)
        share_out(_forward, heads * shares, *read, shares, *arrays_of(out, sums))
        ctx.save_for_backward(qkv, fill, table, sums)
        ctx.places, ctx.scale = places, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        qkv, fill, table, sums = ctx.saved_tensors
        heads = qkv.shape[3]
        shares = _shares(heads)
        of_qkv = torch.empty_like(qkv, memory_format=torch.contiguous_format)
        of_fill, of_table = (x.new_zeros(shares, *x.shape) for x in (fill, table))
        read = (*arrays_of(qkv, fill, table, *ctx.places), np.float32(ctx.scale))
        written = arrays_of(of_qkv, of_fill, of_table)
        share_out(_backward, heads * shares, *read, *arrays_of(sums, grad), *written)
        return of_qkv, of_fill.sum(0), of_table.sum(0), None, None


def _shares(heads: int) -> int:
    """Returns how many shares of its windows a head is done in, so that many threads have work.

    It does not depend on the threads, so that sums do not.
    """
    return -(-_UNITS // heads)


def can_attend(heads: int, qkv: Tensor, *others: Tensor | None) -> bool:
    """Returns whether :func:`window_attention` takes these inputs."""
    tensors = [tensor for tensor in (qkv, *others) if tensor is not None]
    kinds = {(tensor.dtype, tensor.device.type) for tensor in tensors}
    return kinds == {(torch.float32, "cpu")} and qkv.shape[-1] == 3 * heads * HEAD_DIM


def window_attention(
    qkv: Tensor,
    table: Tensor,
    fill: Tensor | None,
    *,
    height: int,
    width: int,
    side: int,
    shift: int,
    heads: int,
    scale: float,
) -> Tensor:
    """Returns :func:`.kernels.window_attention.window_attention`, with the same arguments.

    Windows may have any number of tokens, heads have :data:`HEAD_DIM` channels, and numbers are
    float32.
    """
    dim = heads * HEAD_DIM
    qkv = qkv.reshape(len(qkv), -1, 3, heads, HEAD_DIM)
    fill = qkv.new_zeros(3, heads, HEAD_DIM) if fill is None else fill.view(3, heads, HEAD_DIM)
    mask = _mask(height, width, side, shift)
    places = _relative_positions(side), mask, _window_tokens(height, width, side, shift)
    out: Tensor = _WindowAttention.apply(qkv, fill, table, places, scale)
    return out.view(len(out), -1, dim)


@shared_table(16)
def _mask(height: int, width: int, side: int, shift: int) -> Tensor:
    """Returns :func:`.windows.shift_mask`, or that of one window without a shift, in wide rows."""
    if shift:
        mask = shift_mask(height, width, side, shift, torch.device("cpu"))
    else:
        mask = torch.zeros(1, side**2, side**2)
    return F.pad(mask, (0, -mask.shape[2] % _LANES))


@shared_table(16)
def _relative_positions(side: int) -> Tensor:
    """Returns the row of a table of biases for each pair of a window's tokens: (N, N)."""
    place = torch.arange(side)
    apart = place[:, None] - place + side - 1  # (side, side), of rows and of columns
    rows, columns = apart[:, None, :, None], apart[None, :, None, :]
    return (rows * (2 * side - 1) + columns).reshape(side**2, side**2)
