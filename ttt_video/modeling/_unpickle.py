"""Reads pickled weights without running what is inside them.

A pickle is a program: loading one calls whatever it names. Published checkpoints are pickles
(detectron2's ``.pkl``), so this unpickler knows the few names that arrays, tensors and containers
need, and refuses every other one by name. It does not call numpy's own unpickling functions,
because a crafted dtype state makes them read raw bytes as pointers. It rebuilds arrays from their
bytes, which works for files of numpy 1 and numpy 2 alike.
"""

from __future__ import annotations

import collections
import io
import pickle
import re
from typing import Any, BinaryIO

import numpy as np
import torch


class RefusedContent(pickle.UnpicklingError):
    """A pickle holds something other than numeric arrays, tensors and plain containers."""

    def __init__(self, what: str) -> None:
        super().__init__(f"it holds {what}")
        self.what = what


def safe_unpickle(file: BinaryIO) -> Any:
    """Reads one pickle of containers, numbers, strings, numpy arrays and torch tensors.

    Strings of Python-2 pickles are read as latin-1, as in detectron2's model zoo. Arrays come back
    writable and in native byte order.

    Raises:
        RefusedContent: the pickle names another class or function, which was not called.
        Exception: almost any type, if the stream is damaged.
    """
    return _plain(_Unpickler(file, encoding="latin1").load())


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        key = f"{_RENAMED_MODULES.get(module, module)}.{name}"
        if key not in _ALLOWED:
            raise RefusedContent(f"{module}.{name}")
        return _ALLOWED[key]


class _DType:
    """Stands in for `numpy.dtype`: a numeric type code and its byte order, nothing else."""

    def __init__(self, code: str, align: bool = False, copy: bool = False) -> None:
        if not re.fullmatch(r"[biufc]\d{1,2}", code):
            raise RefusedContent(f"an array of dtype {code!r}")
        self.code, self.byte_order = code, "<"

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.byte_order = state[1]

    def read(self, raw: bytes | bytearray | str) -> np.ndarray:
        data = raw.encode("latin1") if isinstance(raw, str) else raw
        big_endian = self.byte_order == ">"
        stored = np.dtype(f"{'>' if big_endian else '<'}{self.code}")
        # astype copies, so the array is writable although `data` may not be.
        return np.frombuffer(data, stored).astype(np.dtype(self.code))


class _Array:
    """Stands in for an array, which a pickle makes empty and then gives its state."""

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, is_fortran, raw = state
        self.value = dtype.read(raw).reshape(shape, order="F" if is_fortran else "C")


def _encode_latin1(text: str, encoding: str) -> bytes:
    # Protocol 2 writes bytes as text in this encoding; data needs no other codec.
    if encoding != "latin1":
        raise RefusedContent(f"the codec {encoding!r}")
    return text.encode("latin1")


def _storage_from_bytes(data: bytes) -> Any:
    # torch's own function of this name unpickles `data` without any restriction.
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


# Numpy 2 and Python 2 have these names for modules of the table below.
_RENAMED_MODULES = {
    "numpy._core.multiarray": "numpy.core.multiarray",
    "numpy._core.numeric": "numpy.core.numeric",
    "__builtin__": "builtins",
}

_ALLOWED: dict[str, Any] = {
    "builtins.bytes": bytes,
    "builtins.bytearray": bytearray,
    "builtins.set": set,
    "collections.OrderedDict": collections.OrderedDict,
    "_codecs.encode": _encode_latin1,
    "numpy.ndarray": object(),  # only ever an argument of _reconstruct
    "numpy.dtype": _DType,
    "numpy.core.multiarray._reconstruct": lambda array_type, shape, code: _Array(),
    "numpy.core.multiarray.scalar": lambda dtype, raw: dtype.read(raw)[0],
    "numpy.core.numeric._frombuffer": lambda raw, dtype, shape, order: dtype.read(raw).reshape(
        shape, order=order
    ),
    "torch._utils._rebuild_tensor_v2": torch._utils._rebuild_tensor_v2,
    "torch._utils._rebuild_parameter": lambda data, requires_grad, hooks: data,
    "torch.storage._load_from_bytes": _storage_from_bytes,
}


def _plain(value: Any) -> Any:
    """Replaces the stand-ins by their arrays, also in nested containers."""
    if isinstance(value, _Array):
        return value.value
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_plain(item) for item in value)
    return value
