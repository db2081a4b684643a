"""Attention within (shifted) windows of a feature map, forward and backward, in Triton.

Tokens are read where the projection to queries, keys and values wrote them, and results are written
where the output projection reads them. Nothing is gathered, rolled or padded in memory, and biases
and masks of all windows never exist: a program keeps the bias of its head in registers and walks
over several windows.
"""

# mypy: disable-error-code="no-untyped-def"
# Triton gives the arguments of kernels their types.
from __future__ import annotations

import os
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

MOST_TOKENS = 64
"""Tokens of a window, N, up to which the kernels run: one tile of logits stays in registers."""

WIDEST_HEAD = 32
"""Channels of a head up to which the kernels run: those of every published Swin."""

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_ENTRIES = 16  # of the table, that one program writes
# Triton's interpreter multiplies the bit patterns of bfloat16 as if they were integers.
_INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
_LOG2_E = tl.constexpr(1.4426950408889634)
_APART = tl.constexpr(-100.0)  # Swin's mask: what is added to logits of tokens of two regions


class Launch(NamedTuple):
    """How a kernel is started."""

    programs: int
    """At most, over all heads. More read biases more often, and each writes a sum of their
    gradients; fewer leave multiprocessors idle."""
    warps: int
    stages: int  # windows whose loads overlap


FORWARD = Launch(programs=2048, warps=4, stages=2)
BACKWARD = Launch(programs=1024, warps=4, stages=1)
# Without tensor cores, a tile takes so many registers that 4 warps, or a second stage, spill.
FORWARD_FP32 = Launch(programs=2048, warps=8, stages=1)
BACKWARD_FP32 = Launch(programs=1024, warps=8, stages=1)


class _Grid(NamedTuple):
    """The sizes of one call; see :func:`window_attention`."""

    height: int
    width: int
    side: int
    shift: int
    heads: int
    scale: float

    def arguments(self, qkv: Tensor, launch: Launch) -> dict[str, Any]:
        """Returns the arguments that both kernels share."""
        # Products of float32 keep their bits unless PyTorch's own products may lose some.
        exact = qkv.dtype != torch.float32 or not _allows_tf32()
        head_dim = qkv.shape[-1] // (3 * self.heads)
        sizes = self._asdict()
        return {
            "SIDE": sizes.pop("side"),
            **sizes,
            "batch": len(qkv),
            "programs": self.programs(qkv, launch),
            "HEAD_DIM": head_dim,
            "BLOCK_N": max(16, triton.next_power_of_2(self.side**2)),
            "BLOCK_D": max(16, triton.next_power_of_2(head_dim)),
            "PRECISION": "ieee" if exact else "tf32",
            "num_warps": launch.warps,
            "num_stages": launch.stages,
        }

    def programs(self, qkv: Tensor, launch: Launch) -> int:
        """Returns the number of programs of each head."""
        rows, columns = triton.cdiv(self.height, self.side), triton.cdiv(self.width, self.side)
        return max(1, min(len(qkv) * rows * columns, launch.programs // self.heads))


def _allows_tf32() -> bool:
    """Returns whether PyTorch's own products of float32 may use TF32."""
    matmul = torch.backends.cuda.matmul
    try:
        return matmul.allow_tf32
    except RuntimeError:  # somebody set the newer name, after which the old one cannot be read
        return matmul.fp32_precision == "tf32"


# Sizes change with the video: a kernel that is specialised for them would be compiled again.
_SIZES = ["batch", "height", "width", "shift", "heads", "programs"]


@triton.jit
def _places(window, height, width, shift, SIDE: tl.constexpr, BLOCK_N: tl.constexpr):
    """Returns the token at each place of a window and whether there is one; and of the window, over
    which edges of the map tokens were rolled into it (1 right, 2 bottom, 3 both; 0 none) and
    whether it may have padding.

    Places are those of the map that was padded to whole windows, then rolled up and left.
    """
    bottom = tl.cdiv(height, SIDE) * SIDE
    right = tl.cdiv(width, SIDE) * SIDE
    top = (window // tl.cdiv(width, SIDE)) * SIDE
    left = (window % tl.cdiv(width, SIDE)) * SIDE
    edges = (left + SIDE + shift > right).to(tl.int32)
    edges += (top + SIDE + shift > bottom).to(tl.int32) * 2
    may_pad = (top + SIDE + shift > height) | (left + SIDE + shift > width)
    place = tl.arange(0, BLOCK_N)
    row = top + shift + place // SIDE
    row = tl.where(row >= bottom, row - bottom, row)
    column = left + shift + place % SIDE
    column = tl.where(column >= right, column - right, column)
    exists = (place < SIDE * SIDE) & (row < height) & (column < width)
    return row * width + column, exists, edges, may_pad


@triton.jit
def _regions(shift, SIDE: tl.constexpr, BLOCK_N: tl.constexpr):
    """Returns, at each place of a window, which edges the roll brought its token over (1, 2, 3)."""
    place = tl.arange(0, BLOCK_N)
    right = (place % SIDE >= SIDE - shift).to(tl.int32)
    return right + (place // SIDE >= SIDE - shift).to(tl.int32) * 2


@triton.jit
def _relative_bias(table, head, heads, SIDE: tl.constexpr, BLOCK_N: tl.constexpr):
    """Returns a head's biases of all pairs (query, key), in units of log2; other keys get -inf."""
    query = tl.arange(0, BLOCK_N)[:, None]
    key = tl.arange(0, BLOCK_N)[None, :]
    rows = query // SIDE - key // SIDE + SIDE - 1
    columns = query % SIDE - key % SIDE + SIDE - 1
    valid = (query < SIDE * SIDE) & (key < SIDE * SIDE)
    bias = tl.load(table + (rows * (2 * SIDE - 1) + columns) * heads + head, valid, other=0.0)
    dtype: tl.constexpr = tl.float64 if bias.dtype == tl.float64 else tl.float32
    return tl.where(key < SIDE * SIDE, bias.to(dtype) * _LOG2_E, float("-inf"))


@triton.jit
def _dot(a, b, PRECISION: tl.constexpr):
    """Returns a matrix product, summed in float32 (float64 of float64)."""
    dtype: tl.constexpr = tl.float64 if a.dtype == tl.float64 else tl.float32
    if _INTERPRETED:
        a = a.to(dtype)
        b = b.to(dtype)
    return tl.dot(a, b, input_precision=PRECISION, out_dtype=dtype)


@triton.jit
def _probabilities(query, key, bias, regions, edges, scale, PRECISION: tl.constexpr):
    """Returns exp(logits - the row's largest) and the sum of each row."""
    logits = _dot(query, tl.trans(key), PRECISION) * (scale * _LOG2_E) + bias
    if edges > 0:
        region = regions & edges
        logits += tl.where(region[:, None] != region[None, :], _APART * _LOG2_E, 0.0)
    weights = tl.exp2(logits - tl.max(logits, 1)[:, None])
    return weights, tl.sum(weights, 1)


@triton.jit
def _load(
    x, fill, head, heads, token, exists, column: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Returns a head's queries (column 0), keys (1) or values (2) of one window.

    ``x`` points to (tokens, 3, heads, HEAD_DIM) of the window's sample.
    """
    d = tl.arange(0, BLOCK_D)
    channel = (column * heads + head) * HEAD_DIM + d
    mask = exists[:, None] & (d < HEAD_DIM)[None, :]
    out = tl.load(x + token[:, None] * (3 * heads * HEAD_DIM) + channel[None, :], mask, other=0.0)
    if column > 0:  # results of queries at padding are dropped
        filled = tl.load(fill + channel, d < HEAD_DIM, other=0.0).to(out.dtype)
        out = tl.where(exists[:, None], out, filled[None, :])
    return out


@triton.jit(do_not_specialize=_SIZES)
def _forward_kernel(
    qkv, table, fill, out, batch, height, width, shift, heads, programs, scale,
    SIDE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Writes one head's attention of every ``programs``-th window.

    qkv (B, tokens, 3, heads, HEAD_DIM), table ((2 SIDE - 1)^2, heads), fill (3, heads, HEAD_DIM),
    out (B, tokens, heads, HEAD_DIM). Heads are the fast axis of the grid, because they share the
    cache lines of a token.
    """
    head = tl.program_id(0)
    bias = _relative_bias(table, head, heads, SIDE, BLOCK_N)
    regions = _regions(shift, SIDE, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    windows = tl.cdiv(height, SIDE) * tl.cdiv(width, SIDE)
    for index in range(tl.program_id(1), batch * windows, programs):
        sample = (index // windows).to(tl.int64) * height * width
        token, exists, edges, _ = _places(index % windows, height, width, shift, SIDE, BLOCK_N)
        x = qkv + sample * (3 * heads * HEAD_DIM)
        query = _load(x, fill, head, heads, token, exists, 0, HEAD_DIM, BLOCK_D)
        key = _load(x, fill, head, heads, token, exists, 1, HEAD_DIM, BLOCK_D)
        value = _load(x, fill, head, heads, token, exists, 2, HEAD_DIM, BLOCK_D)
        weights, total = _probabilities(query, key, bias, regions, edges, scale, PRECISION)
        result = _dot(weights.to(value.dtype), value, PRECISION) / total[:, None]
        place = out + sample * (heads * HEAD_DIM) + head * HEAD_DIM
        place = place + token[:, None] * (heads * HEAD_DIM) + d[None, :]
        mask = exists[:, None] & (d < HEAD_DIM)[None, :]
        tl.store(place, result.to(out.dtype.element_ty), mask)


@triton.jit(do_not_specialize=_SIZES)
def _backward_kernel(
    qkv, table, fill, grad_out, grad_qkv, sums,
    batch, height, width, shift, heads, programs, scale,
    SIDE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
    BIAS_GRAD: tl.constexpr, FILL_GRAD: tl.constexpr,
):  # fmt: skip
    """Writes one head's gradients of every ``programs``-th window.

    Each token is in one window, so the gradient of ``qkv`` is written once. Those of the biases,
    (heads, N, N), and of ``fill``, (3, heads, HEAD_DIM), are summed over the program's windows;
    ``sums`` has both in a row per program. Queries at padding places have no gradient.
    """
    head = tl.program_id(0)
    bias = _relative_bias(table, head, heads, SIDE, BLOCK_N)
    regions = _regions(shift, SIDE, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    dtype: tl.constexpr = bias.dtype
    bias_sum = tl.zeros((BLOCK_N, BLOCK_N), dtype)
    key_sum = tl.zeros((BLOCK_D,), dtype)
    value_sum = tl.zeros((BLOCK_D,), dtype)
    windows = tl.cdiv(height, SIDE) * tl.cdiv(width, SIDE)
    for index in range(tl.program_id(1), batch * windows, programs):
        sample = (index // windows).to(tl.int64) * height * width
        window = index % windows
        token, exists, edges, may_pad = _places(window, height, width, shift, SIDE, BLOCK_N)
        x = qkv + sample * (3 * heads * HEAD_DIM)
        query = _load(x, fill, head, heads, token, exists, 0, HEAD_DIM, BLOCK_D)
        key = _load(x, fill, head, heads, token, exists, 1, HEAD_DIM, BLOCK_D)
        value = _load(x, fill, head, heads, token, exists, 2, HEAD_DIM, BLOCK_D)
        place = sample * (heads * HEAD_DIM) + head * HEAD_DIM
        mask = exists[:, None] & (d < HEAD_DIM)[None, :]
        place = place + token[:, None] * (heads * HEAD_DIM) + d[None, :]
        grad = tl.load(grad_out + place, mask, other=0.0)

        weights, total = _probabilities(query, key, bias, regions, edges, scale, PRECISION)
        weights = weights / total[:, None]
        grad_value = _dot(tl.trans(weights.to(grad.dtype)), grad, PRECISION)
        grad_logits = _dot(grad, tl.trans(value), PRECISION)
        grad_logits = weights * (grad_logits - tl.sum(weights * grad_logits, 1)[:, None])
        if BIAS_GRAD:
            bias_sum += grad_logits
        grad_logits = grad_logits.to(query.dtype)
        grad_query = _dot(grad_logits, key, PRECISION) * scale
        grad_key = _dot(tl.trans(grad_logits), query, PRECISION) * scale
        if may_pad:
            padding = ((tl.arange(0, BLOCK_N) < SIDE * SIDE) & (exists == 0))[:, None]
            key_sum += tl.sum(tl.where(padding, grad_key, 0.0), 0)
            value_sum += tl.sum(tl.where(padding, grad_value, 0.0), 0)

        place = grad_qkv + sample * (3 * heads * HEAD_DIM) + head * HEAD_DIM
        place = place + token[:, None] * (3 * heads * HEAD_DIM) + d[None, :]
        tl.store(place, grad_query.to(qkv.dtype.element_ty), mask)
        tl.store(place + heads * HEAD_DIM, grad_key.to(qkv.dtype.element_ty), mask)
        tl.store(place + 2 * heads * HEAD_DIM, grad_value.to(qkv.dtype.element_ty), mask)

    pairs: tl.constexpr = SIDE * SIDE * SIDE * SIDE
    sums += tl.program_id(1) * heads * (pairs + 3 * HEAD_DIM)
    if BIAS_GRAD:
        row = tl.arange(0, BLOCK_N)[:, None]
        column = tl.arange(0, BLOCK_N)[None, :]
        valid = (row < SIDE * SIDE) & (column < SIDE * SIDE)
        tl.store(sums + head * pairs + row * (SIDE * SIDE) + column, bias_sum, valid)
    if FILL_GRAD:
        channel = sums + heads * pairs + head * HEAD_DIM + d
        tl.store(channel, tl.zeros((BLOCK_D,), dtype), d < HEAD_DIM)
        tl.store(channel + heads * HEAD_DIM, key_sum, d < HEAD_DIM)
        tl.store(channel + 2 * heads * HEAD_DIM, value_sum, d < HEAD_DIM)


@triton.jit(do_not_specialize=["heads"])
def _table_kernel(
    grad_bias, grad_table, heads,
    SIDE: tl.constexpr, BLOCK_N: tl.constexpr, ENTRIES: tl.constexpr,
):  # fmt: skip
    """Writes the sum of a head's bias gradients over all pairs with one distance, per distance.

    grad_bias (heads, N, N), grad_table ((2 SIDE - 1)^2, heads). The order of a sum is fixed;
    PyTorch's gradient of an index would have to sort all pairs for that.
    """
    head = tl.program_id(0)
    entry = tl.program_id(1) * ENTRIES + tl.arange(0, ENTRIES)
    query = tl.arange(0, BLOCK_N)[None, :]
    row = query // SIDE - (entry // (2 * SIDE - 1))[:, None] + SIDE - 1
    column = query % SIDE - (entry % (2 * SIDE - 1))[:, None] + SIDE - 1
    valid = (query < SIDE * SIDE) & (row >= 0) & (row < SIDE) & (column >= 0) & (column < SIDE)
    pair = (head * SIDE * SIDE + query) * (SIDE * SIDE) + row * SIDE + column
    total = tl.sum(tl.load(grad_bias + pair, valid, other=0.0), 1)
    kept = entry < (2 * SIDE - 1) * (2 * SIDE - 1)
    tl.store(grad_table + entry * heads + head, total.to(grad_table.dtype.element_ty), kept)


class _WindowAttention(torch.autograd.Function):
    """Keeps the inputs only; the backward pass computes the probabilities again."""

    @staticmethod
    def forward(
        ctx: Any,
        qkv: Tensor,
        table: Tensor,
        fill: Tensor | None,
        grid: _Grid,
        forward: Launch,
        backward: Launch,
    ) -> Tensor:
        qkv, table = qkv.contiguous(), table.contiguous()
        fill = qkv.new_zeros(qkv.shape[-1]) if fill is None else fill
        ctx.save_for_backward(qkv, table, fill)
        ctx.grid, ctx.launch = grid, backward
        out = qkv.new_empty((*qkv.shape[:2], qkv.shape[2] // 3))
        _forward_kernel[(grid.heads, grid.programs(qkv, forward))](
            qkv, table, fill, out, **grid.arguments(qkv, forward)
        )
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grid: _Grid = ctx.grid
        launch: Launch = ctx.launch
        qkv, table, fill = ctx.saved_tensors
        programs = grid.programs(qkv, launch)
        _, learns_table, learns_fill, *_ = ctx.needs_input_grad
        learns = {"BIAS_GRAD": learns_table, "FILL_GRAD": learns_fill}
        biases = grid.heads * grid.side**4
        # float32, or float64 where a test's inputs are
        dtype = torch.promote_types(table.dtype, torch.float32)
        sums = table.new_empty((programs, biases + qkv.shape[-1]), dtype=dtype)
        grad, grad_qkv = grad.contiguous(), torch.empty_like(qkv)
        _backward_kernel[(grid.heads, programs)](
            qkv, table, fill, grad, grad_qkv, sums, **learns, **grid.arguments(qkv, launch)
        )
        total = sums.sum(0)
        grad_table = grad_fill = None
        if learns_table:
            grad_table = torch.empty_like(table)
            programs = triton.cdiv(len(table), _ENTRIES)
            block = max(16, triton.next_power_of_2(grid.side**2))
            _table_kernel[(grid.heads, programs)](
                total, grad_table, grid.heads, SIDE=grid.side, BLOCK_N=block, ENTRIES=_ENTRIES
            )
        if learns_fill:
            grad_fill = total[biases:].to(fill.dtype)
        return grad_qkv, grad_table, grad_fill, None, None, None


def can_attend(qkv: Tensor, side: int, heads: int) -> bool:
    """Returns whether :func:`window_attention` takes these inputs."""
    head_dim = qkv.shape[-1] // (3 * heads)
    return qkv.dtype in _DTYPES and side**2 <= MOST_TOKENS and head_dim <= WIDEST_HEAD


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
    forward: Launch | None = None,
    backward: Launch | None = None,
) -> Tensor:
    """Returns the attention of a map's tokens to the tokens of their window: (B, H W, C).

    The map is padded to whole windows and rolled up and left; tokens that only the roll made
    neighbours get -100 added to their logits. Equals Swin's window attention (Liu et al. 2021,
    detectron2's ``WindowAttention``) between its two projections, with float32 logits, biases and
    softmax. Gradients are deterministic.

    Per token, C values are written and 3 C read forward; 4 C read and 3 C written backward.

    Args:
        qkv: (B, H W, 3 C) queries, keys and values of each token, as its projection gives them.
        table: ((2 side - 1)^2, heads) relative position biases.
        fill: (3 C,) what padding places hold, the bias of the projection; zero if None.
        height, width: H and W, in tokens.
        side: of a window, in tokens; its square is at most :data:`MOST_TOKENS`.
        shift: tokens that the map is rolled by, in [0, side).
        heads: number of heads; divides C.
        scale: factor of the products of queries and keys.
        forward, backward: how the kernels are started; by the type of ``qkv`` if None.
    """
    exact = qkv.dtype == torch.float32
    forward = forward or (FORWARD_FP32 if exact else FORWARD)
    backward = backward or (BACKWARD_FP32 if exact else BACKWARD)
    grid = _Grid(height, width, side, shift, heads, scale)
    with torch.cuda.device_of(qkv):
        return _WindowAttention.apply(qkv, table, fill, grid, forward, backward)
