"""Reads the idx files that MNIST and its successors are published in."""

from __future__ import annotations

import gzip
import math
import os
import zlib
from functools import lru_cache

import numpy as np

from ..errors import UserError

_UNSIGNED_BYTE = 8
_MAX_DIMENSIONS = 32  # of an array in numpy 1


@lru_cache(maxsize=4)
def read_idx(path: str | os.PathLike[str]) -> np.ndarray:
    """Returns the uint8 array of a gzipped idx file, read-only; a process reads a file once.

    The four bytes at the start are 0, 0, the type of the numbers and the number of dimensions,
    whose lengths follow as 32-bit integers, the high byte first.

    Raises:
        UserError: the file is missing or damaged, or holds other numbers than unsigned bytes.
    """
    try:
        with gzip.open(path, "rb") as file:
            content = file.read()
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"{path} cannot be read ({reason})") from error
    if len(content) < 4 or content[:2] != b"\0\0" or content[2] != _UNSIGNED_BYTE:
        raise UserError(f"{path} is no idx file of unsigned bytes: restore it")
    if not 1 <= content[3] <= _MAX_DIMENSIONS:
        raise UserError(f"{path} says that it has {content[3]} dimensions: restore it")
    start = 4 + 4 * content[3]
    if len(content) < start:
        raise UserError(
            f"{path} is cut inside its header, which has {start} bytes; {len(content)} are there: "
            "restore it"
        )
    shape = np.frombuffer(content[4:start], ">u4").tolist()
    if len(content) - start != math.prod(shape):
        raise UserError(
            f"{path} says that it holds {' x '.join(map(str, shape))} bytes, but has "
            f"{len(content) - start}: restore it"
        )
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)
