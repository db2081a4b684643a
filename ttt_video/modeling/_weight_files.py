"""Checkpoint files in three formats, read and written as ``{name: tensor}`` on the CPU."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import safetensors.torch
import torch
from detectron2.utils.file_io import PathManager
from safetensors import SafetensorError
from torch import Tensor, nn

from ..errors import UserError
from ..files import save_torch, write_atomically
from ._unpickle import RefusedContent, safe_unpickle

CheckpointFormat = Literal["safetensors", "torch", "pickle"]

_ZIP_MAGIC = b"PK\x03\x04"
_LEGACY_TORCH_MAGIC = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."
_NESTED_UNDER = ("model", "state_dict")
_NUMPY_DATA = r"numpy\.(_?core\.(multiarray|numeric)\.\w+|ndarray|dtype)"
_REFUSED = (
    "refused to load {path}: it holds {what}, and weights need only arrays and containers;"
    " if you trust it, load it yourself and save its state dict"
)


def checkpoint_format(path: str | os.PathLike[str]) -> CheckpointFormat:
    """Returns the format that a file's first bytes show: many a ``.pkl`` is a torch file.

    Raises:
        UserError: the file is empty or has none of the three formats.
    """
    with open(path, "rb") as file:
        head = file.read(16)
    if head.startswith((_ZIP_MAGIC, _LEGACY_TORCH_MAGIC)):
        return "torch"
    if head[8:9] == b"{":  # after the 8-byte length of the JSON header
        return "safetensors"
    if head.startswith(b"\x80") or (head and Path(path).suffix == ".pkl"):
        return "pickle"
    what = "is empty" if not head else f"is no checkpoint (it starts with {head[:8]!r})"
    raise UserError(f"{path} {what}; expected a .safetensors, .pth or .pkl file")


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Reads the weights of a checkpoint onto the CPU, with the dtypes that are stored.

    Weights under a "model" or "state_dict" key are unwrapped, and the "module." prefix of
    data-parallel training is removed.

    Args:
        path: a safetensors file, a torch file (``.pth``, ``.pt``, ``.bin``) or a pickle of arrays
            (``.pkl``): a local path, or an address that detectron2's PathManager knows
            (``https://``, ``detectron2://``, ``ttt_video://``).

    Raises:
        UserError: the file is missing, damaged or foreign, or holds more than data.
    """
    return weights_in(read_file(local_file(path)), str(path))


def local_file(path: str | os.PathLike[str]) -> str:
    """Returns the local path of a file or URL, downloaded if need be; UserError if it is none."""
    try:
        local = PathManager.get_local_path(os.fspath(path))
    except OSError as error:  # includes failed downloads
        raise UserError(f"cannot fetch checkpoint {path}: {error}") from error
    if not os.path.isfile(local):
        raise UserError(f"no checkpoint file {path}; give a file or a URL")
    return local


def read_file(path: str) -> Any:
    """Returns whatever a local checkpoint file holds, usually nested dicts."""
    kind = checkpoint_format(path)
    try:
        if kind == "safetensors":
            return safetensors.torch.load_file(path)
        if kind == "torch":
            _check_sums(path)
            with _flags_allowed():
                return torch.load(path, map_location="cpu", weights_only=True)
        with open(path, "rb") as file:
            return safe_unpickle(file)
    except RefusedContent as error:
        raise UserError(_REFUSED.format(path=path, what=error.what)) from error
    except SafetensorError as error:
        raise UserError(f"cannot read {path}: {error}; is it complete?") from error
    except Exception as error:  # a damaged pickle stream can raise almost any type
        reason = str(error)
        refused = re.search(r"unsupported global:?\s+(?:GLOBAL\s+)?(\S+)", reason, re.IGNORECASE)
        if refused and re.fullmatch(_NUMPY_DATA, refused[1]):
            raise UserError(
                f"refused to load {path}: it is a torch file that holds numpy arrays or numbers;"
                " save tensors there (torch.as_tensor), or pickle the arrays to a .pkl"
            ) from error
        if refused:
            raise UserError(_REFUSED.format(path=path, what=refused[1])) from error
        reason = reason.partition("WeightsUnpickler error: ")[2] or reason
        brief = " ".join(reason.split())[:160] or type(error).__name__
        raise UserError(f"cannot read {path} ({brief}); is it complete?") from error


@contextmanager
def _flags_allowed() -> Iterator[None]:
    """Lets ``torch.load`` read the command line that MAE's code saves with weights.

    A Namespace is a bag of attributes: making one runs nothing, and what it holds is checked, too.
    """
    before = torch.serialization.get_safe_globals()
    torch.serialization.add_safe_globals([argparse.Namespace])
    try:
        yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)


def _check_sums(path: str) -> None:
    """Compares a torch file with the checksums in it, which ``torch.load`` does not look at."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise ValueError(f"the checksum of {damaged} in it is another")


def weights_in(content: Any, source: str) -> dict[str, Tensor]:
    """Returns the state dict within a file's content; UserError if there is none."""
    while isinstance(content, Mapping):
        key = next((k for k in _NESTED_UNDER if isinstance(content.get(k), Mapping)), None)
        if key is None:
            break
        content = content[key]
    if not isinstance(content, Mapping) or not content:
        raise UserError(f"{source} holds no weights: expected names with arrays")
    weights = {}
    for name, value in content.items():
        if isinstance(value, (np.ndarray, np.generic)):
            value = torch.from_numpy(np.asarray(value))
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise UserError(
                f"{source} holds no plain weights: entry {name!r} is a {type(value).__name__}, not"
                " an array; give a file with the model's state dict, alone or under 'model'"
            )
        weights[name.removeprefix("module.")] = value.detach()
    return weights


def check_finite(tensors: Mapping[str, Tensor], source: str) -> None:
    """Raises UserError with the first tensor of ``source`` that has a NaN or an infinite number."""
    known = {name: value for name, value in tensors.items() if not value.is_meta}
    broken = [name for name, value in known.items() if not torch.isfinite(value).all()]
    if broken:
        raise UserError(
            f"{source} has numbers that are NaN or infinite in {len(broken)} of {len(tensors)} "
            f"tensors, such as {broken[0]}: what wrote it went wrong, so give another file"
        )


def write_checkpoint(
    weights: Mapping[str, Tensor],
    path: str | os.PathLike[str],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes weights in the format of the file's extension, whole or not at all.

    Args:
        weights: name to tensor, on any device; tensors that share memory are written apart.
        path: ``.safetensors``, ``.pth`` (under "model", as detectron2 does) or ``.pkl`` (numpy
            arrays under "model", as in detectron2's model zoo; numpy has no bfloat16, which
            becomes float32). An existing file is replaced.
        metadata: strings for the header of a safetensors file, such as the command that made it.

    Raises:
        UserError: the extension is another one, or the file cannot be written.
    """
    path = Path(path)
    if path.suffix not in (".safetensors", ".pth", ".pkl"):
        raise UserError(f"cannot write {path}: the extension must be .safetensors, .pth or .pkl")
    tensors = {name: t.detach().cpu().clone().contiguous() for name, t in weights.items()}
    if path.suffix == ".pth":
        save_torch(path, {"model": tensors})
        return
    if path.suffix == ".safetensors":
        content = _in_order(safetensors.torch.save(tensors, {"format": "pt", **(metadata or {})}))
    else:
        known = {n: t.float() if t.dtype == torch.bfloat16 else t for n, t in tensors.items()}
        arrays = {name: tensor.numpy() for name, tensor in known.items()}
        content = pickle.dumps({"model": arrays, "__author__": "ttt_video"}, protocol=4)
    write_atomically(path, lambda part: part.write_bytes(content), durable=True)


def _in_order(content: bytes) -> bytes:
    """Sorts the metadata of a safetensors file, which the library writes in a random order."""
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return b"".join([len(text).to_bytes(8, "little"), text, memoryview(content)[end:]])


def save_safetensors(
    weights: Mapping[str, Tensor],
    path: str | os.PathLike[str],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes a safetensors file as :func:`write_checkpoint` does, and refuses other names."""
    if Path(path).suffix != ".safetensors":
        raise UserError(f"cannot write {path}: name it .safetensors")
    write_checkpoint(weights, path, metadata)


def set_input_channels(weights: Mapping[str, Tensor], channels: int) -> dict[str, Tensor]:
    """Converts weights between 3 (RGB) and 4 (RGB and visibility) input channels.

    On fully visible images the converted weights compute what the original ones do: a new channel
    is zero, and a removed one goes into the convolution's bias. A ResNet's first convolution has
    no bias; its channel is dropped, which changes the outputs.

    Raises:
        UserError: `channels` is neither, or no first convolution is recognised.
    """
    if channels not in (3, 4):
        raise UserError(f"input channels are 3 or 4, not {channels}")
    name = input_convolution(weights)
    if name is None:
        raise UserError("no first convolution with 3 or 4 input channels among the weights")
    converted = dict(weights)
    kernel = weights[name]
    if channels > kernel.shape[1]:
        converted[name] = torch.cat([kernel, torch.zeros_like(kernel[:, :1])], dim=1)
    elif channels < kernel.shape[1]:
        converted[name] = kernel[:, :channels].clone()
        bias = f"{name.removesuffix('weight')}bias"
        if bias in weights:
            converted[bias] = weights[bias] + kernel[:, channels:].sum(dim=(1, 2, 3))
    return converted


def half_precision(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rounds floating-point weights to fp16, 11 bits; a model takes them in its own dtype again.

    Raises:
        UserError: a finite value is too large for fp16.
    """
    rounded = {n: t.half() if t.is_floating_point() else t for n, t in weights.items()}
    for name, value in weights.items():
        if not torch.equal(torch.isfinite(rounded[name]), torch.isfinite(value)):
            raise UserError(
                f"{name} has values up to {value.abs().max():.3g}, beyond fp16's 65504; keep its "
                "dtype"
            )
    return rounded


def input_convolution(weights: Mapping[str, Tensor]) -> str | None:
    """Returns the convolution that sees the image: a patch embedding, a ResNet's stem."""
    ends = ("patch_embed.proj.weight", "stem.conv1.weight")
    return next((n for n, v in weights.items() if n.endswith(ends) and v.dim() == 4), None)


def weights_hash(weights: nn.Module | Mapping[str, Tensor]) -> str:
    """Returns the SHA-256 (hex) of sorted names, dtypes, shapes and values, on any device."""
    if isinstance(weights, nn.Module):
        weights = weights.state_dict()
    digest = hashlib.sha256()
    for name in sorted(weights):
        tensor = weights[name].detach().cpu().contiguous()
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
