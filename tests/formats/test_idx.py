"""The idx files that image sets are published in: what a damaged one says."""

from __future__ import annotations

import gzip
import struct

import numpy as np
import pytest

from ttt_video.errors import UserError
from ttt_video.formats.idx import read_idx

ARRAY = np.arange(12, dtype=np.uint8).reshape(2, 3, 2)


@pytest.fixture
def file(tmp_path):
    """A small file that is whole."""
    path = tmp_path / "own-idx3-ubyte.gz"
    path.write_bytes(gzip.compress(header(*ARRAY.shape) + ARRAY.tobytes()))
    read_idx.cache_clear()
    assert (read_idx(path) == ARRAY).all()
    yield path
    read_idx.cache_clear()


def header(*shape: int, number: int = 8) -> bytes:
    return struct.pack(f">2xBB{len(shape)}I", number, len(shape), *shape)


def complaint(path, content: bytes) -> str:
    path.write_bytes(content)
    read_idx.cache_clear()
    with pytest.raises(UserError) as error:
        read_idx(path)
    message = str(error.value)
    assert message.startswith(f"{path} ")
    assert "\n" not in message
    return message.removeprefix(f"{path} ")


def test_every_cut_of_a_file_is_told_in_a_line(file):
    packed = file.read_bytes()
    content = gzip.decompress(packed)
    for length in range(len(packed)):
        assert complaint(file, packed[:length]), length
    for length in range(len(content)):
        said = complaint(file, gzip.compress(content[:length]))
        if length < 4:
            assert said == "is no idx file of unsigned bytes: restore it"
        elif length < 16:
            assert said == (
                f"is cut inside its header, which has 16 bytes; {length} are there: restore it"
            )
        else:
            assert said == (
                f"says that it holds 2 x 3 x 2 bytes, but has {length - 16}: restore it"
            )


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"\0\0\x08\0", "says that it has 0 dimensions"),
        (b"\0\0\x08\0" + bytes(8), "says that it has 0 dimensions"),
        (header(*[1] * 33) + b"a", "says that it has 33 dimensions"),
        (b"\0\0\x08\xff" + bytes(12), "says that it has 255 dimensions"),
        (header(2, 3) + bytes(7), "says that it holds 2 x 3 bytes, but has 7"),
        (header(2**32 - 1, 2**32 - 1) + bytes(7), "but has 7"),
        (header(3, number=13) + bytes(12), "is no idx file of unsigned bytes"),
        (b"\1\0\x08\1" + bytes(4), "is no idx file of unsigned bytes"),
    ],
)
def test_a_damaged_header_is_told_in_a_line(file, content, said):
    assert f"{said}: restore it" in complaint(file, gzip.compress(content))


def test_every_wrong_byte_of_a_header_gives_an_array_or_a_line(file):
    content = gzip.decompress(file.read_bytes())
    for place in range(16):
        for value in range(256):
            if value != content[place]:
                wrong = content[:place] + bytes([value]) + content[place + 1 :]
                complaint(file, gzip.compress(wrong, 1))
