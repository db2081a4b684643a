"""Windows of a feature map: which token goes where, and which of them may see each other."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .tables import shared_table


class Places(NamedTuple):
    """Maps tokens of a feature map to places in its windows, and back."""

    tokens: Tensor  # (nW * N,): the token at each place of the windows; at padding any token
    windows: Tensor  # (H * W,): the place of each token
    padding: Tensor  # (nW * N - H * W,): the places without a token


@shared_table(64)
def window_places(height: int, width: int, side: int, shift: int, device: torch.device) -> Places:
    """Returns the places of a map that is padded to whole windows, then rolled up and left.

    ``shift`` is the number of tokens it is rolled by. The result is made once per size and shared;
    callers must not write to it.
    """
    tokens = height * width
    token = torch.arange(tokens, device=device).view(height, width)
    token = F.pad(token, (0, -width % side, 0, -height % side), value=tokens)
    token = token.roll((-shift, -shift), (0, 1)) if shift else token
    rows, columns = token.shape[0] // side, token.shape[1] // side
    token = token.view(rows, side, columns, side).transpose(1, 2).flatten()
    place = token.argsort()
    return Places(token.clamp(max=tokens - 1), place[:tokens], place[tokens:])


def window_tokens(
    height: int, width: int, side: int, shift: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Returns ``tokens`` of :class:`Places`, and 1.0 at each place with a token, else 0.

    It is arithmetic alone, so that a program of any size can do it.
    """

    def along(length: int) -> tuple[Tensor, Tensor]:
        windows = (length + side - 1) // side
        place = torch.arange(windows * side, device=device) + shift
        place = torch.where(place < windows * side, place, place - windows * side)
        return place.clamp(max=length - 1).view(windows, side), (place < length).view(windows, side)

    (row, row_shown), (column, column_shown) = along(height), along(width)
    tokens = row[:, None, :, None] * width + column[None, :, None, :]
    shown = row_shown[:, None, :, None] & column_shown[None, :, None, :]
    return tokens.flatten(), shown.flatten().float()


def token_windows(height: int, width: int, side: int, shift: int, device: torch.device) -> Tensor:
    """Returns :class:`Places`' ``windows``, by arithmetic as :func:`window_tokens`."""

    def along(length: int) -> tuple[Tensor, int]:
        windows = (length + side - 1) // side
        place = torch.arange(length, device=device) - shift
        return torch.where(place < 0, place + windows * side, place), windows

    (row, _), (column, columns) = along(height), along(width)
    window = (row // side)[:, None] * columns + column // side
    return (window * side**2 + (row % side)[:, None] * side + column % side).flatten()


class ToWindows(torch.autograd.Function):
    """Moves (B, H W, C) tokens to (B, nW N, C) places; padding is ``fill`` (C,) or zero.

    Padding and shift take one copy, forward and backward.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, fill: Tensor | None, places: Places) -> Tensor:
        ctx.places, ctx.filled = places, fill is not None
        out = x.index_select(1, places.tokens)
        if not len(places.padding):
            return out
        if fill is None:
            return out.index_fill_(1, places.padding, 0)  # see ToTokens.backward
        out[:, places.padding] = fill.to(out.dtype)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        places: Places = ctx.places
        fill = None
        if ctx.needs_input_grad[1]:
            fill = grad.index_select(1, places.padding).sum((0, 1))
        return grad.index_select(1, places.windows), fill, None


class ToTokens(torch.autograd.Function):
    """Undoes :class:`ToWindows` and drops the padding."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, places: Places) -> Tensor:
        ctx.places = places
        return x.index_select(1, places.windows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        places: Places = ctx.places
        out = grad.index_select(1, places.tokens)
        if len(places.padding):
            # Not by assignment, which on a GPU copies the number from the CPU: no graph may do so.
            out.index_fill_(1, places.padding, 0)
        return out, None


@shared_table(16)
def shift_mask(height: int, width: int, side: int, shift: int, device: torch.device) -> Tensor:
    """Returns the mask of shifted windows: (nW, N, N) float32, 0 or -100.

    It keeps tokens apart that only the roll around the map's edges made neighbours. It is made once
    per size and shared; callers must not write to it.

    Args:
        height, width: size of the map in tokens; it is padded to whole windows.
        side: of a window, in tokens; N is its square.
        shift: in tokens, less than ``side``.
        device: where the mask lives.
    """

    def regions(length: int) -> Tensor:
        windows = (length + side - 1) // side
        position = torch.arange(windows * side, device=device).view(windows, side)
        last = windows * side - side
        return (position >= last).long() + (position >= last + side - shift)

    rows, columns = regions(height), regions(width)
    region = 3 * rows[:, None, :, None] + columns[None, :, None, :]
    region = region.reshape(-1, side * side)
    apart = region[:, None, :] != region[:, :, None]
    return torch.zeros(apart.shape, device=device).masked_fill_(apart, -100.0)
