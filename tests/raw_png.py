"""PNG files of any bit depth and colour type, written byte by byte without an image library."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np

GRAY, RGB, PALETTE, GRAY_ALPHA, RGBA = 0, 2, 3, 4, 6
"""Colour types of the PNG specification."""


def write_raw_png(
    path: Path, samples: np.ndarray, *, bits: int, color_type: int, orientation: int = 0
) -> Path:
    """Writes samples as they are.

    Args:
        path: of the file.
        samples: (H, W) or (H, W, channels) integers below ``2 ** bits``.
        bits: of a sample: 1, 2, 4, 8 or 16.
        color_type: of the PNG specification.
        orientation: of an EXIF tag, 0 for none.
    """
    height, width = samples.shape[:2]
    rows = samples.reshape(height, -1).astype(np.uint16)
    shifts = np.arange(bits - 1, -1, -1)
    in_bits = (rows[:, :, None] >> shifts & 1).reshape(height, -1).astype(np.uint8)
    packed = np.packbits(in_bits, axis=1)  # a row's last byte is filled with zeros
    lines = b"".join(b"\0" + row.tobytes() for row in packed)
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, color_type, 0, 0, 0))]
    if color_type == PALETTE:
        colors = np.arange(3 * 2**bits) * 37 % 251  # no colour is its index
        chunks.append((b"PLTE", colors.astype(np.uint8).tobytes()))
    if orientation:
        tag = struct.pack("<HHIHH", 0x0112, 3, 1, orientation, 0)
        chunks.append((b"eXIf", b"II*\0\x08\0\0\0\x01\0" + tag + b"\0\0\0\0"))
    chunks += [(b"IDAT", zlib.compress(lines)), (b"IEND", b"")]
    with path.open("wb") as file:
        file.write(b"\x89PNG\r\n\x1a\n")
        for name, content in chunks:
            checksum = zlib.crc32(name + content)
            file.write(struct.pack(">I", len(content)) + name + content)
            file.write(struct.pack(">I", checksum))
    return path
