"""Writes a traced prediction as ONNX or a ``torch.export`` program, with its meaning inside."""

from __future__ import annotations

import importlib.util
import io
import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..errors import UserError
from .program import first_line

FACTS = "ttt_video.json"
"""Name of the facts inside a ``torch.export`` file."""

INSTALL = "pip install 'onnx>=1.19,<2' 'onnxscript>=0.7,<1' 'onnxruntime>=1.22,<2'"
"""The optional extra "export", in words."""

SUFFIXES = {".onnx": "ONNX", ".pt2": "torch.export"}
"""Formats by the ending of their files."""


def check_outputs(paths: list[Path], *, overwrite: bool) -> None:
    """Refuses what cannot be written, before any work.

    Raises:
        UserError: an ending is unknown, a file exists, or a folder or library is missing.
    """
    for path in paths:
        if path.suffix not in SUFFIXES:
            raise UserError(f"--output {path}: end it with .onnx or .pt2 (torch.export)")
        if not path.parent.is_dir():
            raise UserError(f"--output {path}: there is no folder {path.parent}")
        if path.is_dir():
            raise UserError(f"--output {path} is a folder; give a file")
        if path.exists() and not overwrite:
            raise UserError(f"{path} exists; give another name or --overwrite")
        missing = [n for n in ("onnx", "onnxscript") if importlib.util.find_spec(n) is None]
        if path.suffix == ".onnx" and missing:
            raise UserError(f"ONNX files need {' and '.join(missing)}: {INSTALL}")


def content(program: ExportedProgram, suffix: str, facts: Mapping[str, Any]) -> bytes:
    """Returns a file's content.

    Args:
        program: of :func:`.program.trace`.
        suffix: one of ``SUFFIXES``.
        facts: JSON values by name. In ONNX each is an entry of the metadata, as JSON text; in a
            ``torch.export`` file they are the extra file ``FACTS``.

    Raises:
        UserError: ONNX lacks an operation.
    """
    if suffix == ".onnx":
        return _onnx(program, facts)
    buffer = io.BytesIO()
    torch.export.save(program, buffer, extra_files={FACTS: json.dumps(facts)})
    return buffer.getvalue()


def _onnx(program: ExportedProgram, facts: Mapping[str, Any]) -> bytes:
    names = list(facts["outputs"])
    try:
        with _quiet(), sdpa_kernel(SDPBackend.MATH):
            written = torch.onnx.export(
                program, input_names=["image"], output_names=names, dynamo=True, verbose=False
            )
    except torch.onnx.OnnxExporterError as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        reason = f"{type(cause).__name__}: {first_line(cause)}"  # type: ignore[arg-type]
        raise UserError(f"the prediction cannot be written as ONNX: {reason}") from error
    assert written is not None
    if facts["size"] is None:
        axes: Any = written.model.graph.inputs[0].shape
        _, _, height, width = axes
        written.rename_axes({height: "height", width: "width"})
    for node in written.model.graph.all_nodes():
        node.metadata_props.clear()  # a third of a small model's file is where its code stands
    for key, value in facts.items():
        written.model.metadata_props[key] = json.dumps(value, ensure_ascii=False)
    return written.model_proto.SerializeToString()


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences what onnxscript says of each operation that it leaves as it is."""
    logger = logging.getLogger("onnxscript")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
