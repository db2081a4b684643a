"""Fitting weights to a model and reporting what became of each. No model is built here.

Names are those of Mask2Former and of the authors' release, so published checkpoints need no
mapping. What differs between generations of checkpoints (older head names, ImageNet backbones
without prefix, 3 instead of 4 input channels) is handled in one place and reported, never silent.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from detectron2.checkpoint import DetectionCheckpointer
from torch import Tensor, nn

from ..errors import UserError
from ..files import save_torch, write_atomically
from ._weight_files import (
    checkpoint_format,
    input_convolution,
    local_file,
    read_checkpoint,
    read_file,
    save_safetensors,
    set_input_channels,
    weights_hash,
    weights_in,
    write_checkpoint,
)
from .interface import MASKFORMER_PARTS

__all__ = [
    "CLASS_LAYER",
    "EVERYTHING",
    "LoadReport",
    "ShapeDifference",
    "TTTCheckpointer",
    "checkpoint_format",
    "input_convolution",
    "load_weights",
    "read_checkpoint",
    "save_safetensors",
    "set_input_channels",
    "weights_hash",
    "write_checkpoint",
]

logger = logging.getLogger(__name__)

EVERYTHING = ("",)
"""As prefixes of allowed names: every name."""

_F, _H, _G = (f"{MASKFORMER_PARTS[role]}." for role in "fhg")

_CLASS_WEIGHT = "sem_seg_head.predictor.class_embed.weight"

CLASS_LAYER = ("sem_seg_head.predictor.class_embed.", "criterion.empty_weight")
"""Prefixes of the weights whose shape follows from the number of classes."""

# Entries that follow from the configuration: neither missing nor left over when only one side has
# them. Older Swin checkpoints keep attention masks, older detectron2 models the pixel statistics.
_FROM_CONFIG = (
    "relative_position_index",
    "attn_mask",
    "empty_weight",
    "num_batches_tracked",
    "pixel_mean",
    "pixel_std",
)


class ShapeDifference(NamedTuple):
    """A weight whose shape in the file is not the model's."""

    name: str
    file_shape: tuple[int, ...]
    model_shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.name}: {self.file_shape} in the file, {self.model_shape} in the model"


@dataclass
class LoadReport:
    """What became of every weight of a file and of a model. Names are the model's, if it has them.

    Attributes:
        source: where the weights came from, for messages.
        loaded: taken as they are.
        widened: first convolutions that got further input channels.
        copied: weights of the decoder g taken from the main head h.
        new: in the model only, kept at their initialisation.
        unused: in the file only.
        mismatched: in both with different shapes; the model's were kept.
        renamed: (name in the file, name in the model) of loaded weights with an older name.
    """

    source: str = "weights"
    loaded: list[str] = field(default_factory=list)
    widened: list[ShapeDifference] = field(default_factory=list)
    copied: list[str] = field(default_factory=list)
    new: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)
    mismatched: list[ShapeDifference] = field(default_factory=list)
    renamed: list[tuple[str, str]] = field(default_factory=list)

    def _columns(self) -> dict[str, list[str]]:
        return {
            "loaded": self.loaded,
            "widened": [w.name for w in self.widened],
            "copied from h": self.copied,
            "new": self.new,
            "unused": self.unused,
            "mismatched": [m.name for m in self.mismatched],
        }

    def table(self) -> str:
        """Number of tensors per part of the model and fate, then the exceptions by name."""
        columns = self._columns()
        parts = sorted({_part(name) for names in columns.values() for name in names})
        width = max(map(len, [*parts, "tensors"]))
        lines = [f"weights from {self.source}", "  ".join(["tensors".ljust(width), *columns])]
        for part in parts:
            counts = (sum(_part(name) == part for name in names) for names in columns.values())
            cells = (f"{count or '.':>{len(c)}}" for c, count in zip(columns, counts, strict=True))
            lines.append("  ".join([part.ljust(width), *cells]))
        lines += [f"widened     {w}" for w in self.widened]
        lines += [f"new         {name}" for name in _summarise(self.new)]
        lines += [f"unused      {name}" for name in _summarise(self.unused)]
        lines += [f"mismatched  {m}" for m in self.mismatched]
        if self.renamed:
            old, new = self.renamed[0]
            lines.append(f"renamed     {len(self.renamed)} older names, such as {old} -> {new}")
        return "\n".join(lines)

    def raise_if_unfit(
        self,
        *,
        allow_new: Sequence[str] = (),
        allow_unused: Sequence[str] = (),
        allow_mismatched: Sequence[str] = (),
    ) -> None:
        """Raise unless every exception is one that the caller expects.

        Args:
            allow_new: prefixes of names the file need not have.
            allow_unused: prefixes of names the model need not have.
            allow_mismatched: prefixes of names whose shape may differ (kept at initialisation).

        Raises:
            UserError: what does not fit, in one line; the table is logged before. Also when
                nothing at all was loaded, whatever is allowed.
        """
        problems = []
        mismatched = _beyond([m.name for m in self.mismatched], allow_mismatched)
        if not self.loaded and not self.widened:
            problems.append("none of them is in the model")
        if mismatched:
            problems.append(f"{len(mismatched)} have another shape")
        for names, allowed, text in (
            (self.new, allow_new, "of the model are missing"),
            (self.unused, allow_unused, "are not in the model"),
        ):
            unexpected = [n for n in _beyond(names, allowed) if not n.endswith(_FROM_CONFIG)]
            if unexpected:
                problems.append(f"{len(unexpected)} {text}")
        if not problems:
            return
        classes = next((m for m in self.mismatched if m.name.endswith(_CLASS_WEIGHT)), None)
        if mismatched and classes is not None and not _beyond(mismatched, CLASS_LAYER):
            theirs, ours = classes.file_shape[0] - 1, classes.model_shape[0] - 1
            raise UserError(
                f"the weights in {self.source} are of {theirs} classes, the model of {ours}: set "
                f"MODEL.SEM_SEG_HEAD.NUM_CLASSES {theirs}, or TTT.NEW_CLASSES True to train a new "
                "class layer"
            )
        logger.warning("%s", self.table())
        raise UserError(
            f"the weights in {self.source} do not fit: {', '.join(problems)}; use the config the "
            "weights were trained with"
        )


def _beyond(names: Sequence[str], prefixes: Sequence[str]) -> list[str]:
    return [name for name in names if not name.startswith(tuple(prefixes))]


def _part(name: str) -> str:
    """The row of the table a name belongs to: backbone, sem_seg_head.predictor, ..."""
    modules = name.split(".")[:-1]
    return ".".join(modules[: 2 if name.startswith((_H, _G)) else 1]) or name


def _summarise(names: Sequence[str], limit: int = 12) -> list[str]:
    """Names one by one if they are few, else the modules they are in, with counts."""
    depth = max((name.count(".") for name in names), default=0)
    groups = dict.fromkeys(names, 1)
    while len(groups) > limit and depth > 0:
        groups = {}
        for name in names:
            pieces = name.split(".")
            key = name if len(pieces) <= depth else ".".join(pieces[:depth]) + ".*"
            groups[key] = groups.get(key, 0) + 1
        depth -= 1
    return [name if n == 1 else f"{name} ({n} tensors)" for name, n in groups.items()]


def load_weights(
    model: nn.Module,
    weights: Mapping[str, Tensor],
    *,
    source: str = "weights",
    extra_channels: Literal["init", "zero"] = "init",
    init_recon_from_main: bool = False,
    allow_new: Sequence[str] = (),
    allow_unused: Sequence[str] = (),
    allow_mismatched: Sequence[str] = (),
) -> LoadReport:
    """Copy weights into a model by name: everything is checked before anything is changed.

    Older names are understood (Mask2Former's ``static_query`` and heads without
    ``pixel_decoder``), and so are backbones without ``backbone.`` prefix (ImageNet checkpoints).
    A first convolution with fewer input channels than the model's fills the model's first ones.
    As it stands a call accepts only weights that cover the model and nothing more, as evaluation
    needs; what a starting point for training may lack is said by prefixes (:data:`EVERYTHING`).
    The report is logged: as information, or as a warning if not every weight landed as it was.

    Args:
        model: any module; parameters and buffers keep their device and dtype.
        weights: name to tensor.
        source: file name for messages.
        extra_channels: a widened convolution's further channels keep the model's initialisation
            ("init"), or are zero ("zero": the model computes exactly what the file's did).
        init_recon_from_main: fill the decoder g from the main head h where the
            file has no g; its queries, of another number, stay new.
        allow_new: prefixes of names the file need not have.
        allow_unused: prefixes of names the model need not have.
        allow_mismatched: prefixes of names whose shape may differ.

    Raises:
        UserError: if the weights do not fit; the model is unchanged.
    """
    target = model.state_dict()
    report = LoadReport(source)
    values: dict[str, Tensor] = {}
    for file_name, value in weights.items():
        name = _model_name(file_name, target)
        if name not in target:
            report.unused.append(name)
            continue
        if name != file_name:
            if name in weights:
                report.unused.append(file_name)
                continue
            report.renamed.append((file_name, name))
        own = target[name]
        if value.shape == own.shape:
            report.loaded.append(name)
            values[name] = value
        elif _is_narrower_input(name, value, own):
            report.widened.append(ShapeDifference(name, tuple(value.shape), tuple(own.shape)))
            extra = own[:, value.shape[1] :]
            extra = torch.zeros_like(extra) if extra_channels == "zero" else extra
            values[name] = torch.cat([value.to(extra), extra], dim=1)
        else:
            report.mismatched.append(ShapeDifference(name, tuple(value.shape), tuple(own.shape)))

    seen = values.keys() | {m.name for m in report.mismatched}
    has_recon = any(name.startswith(_G) for name in seen)
    for name in target.keys() - seen:
        main = values.get(name.replace(_G, _H, 1))
        if (
            init_recon_from_main
            and not has_recon
            and name.startswith(_G)
            and main is not None
            and main.shape == target[name].shape
        ):
            values[name] = main
    report.copied = [n for n in target if n in values and n not in seen]
    report.new = [n for n in target if n not in values and n not in seen]

    report.raise_if_unfit(
        allow_new=allow_new, allow_unused=allow_unused, allow_mismatched=allow_mismatched
    )
    with torch.no_grad():
        for name, value in values.items():
            target[name].copy_(value)
    whole = not (
        report.widened or report.copied or report.new or report.unused or report.mismatched
    )
    logger.log(logging.INFO if whole else logging.WARNING, "%s", report.table())
    return report


def _model_name(name: str, model_names: Mapping[str, Any]) -> str:
    """The model's name for a weight, or the name itself when the model has nothing like it."""
    candidates = [name, name.replace("predictor.static_query.", "predictor.query_feat.")]
    for head in (_H, _G):
        if name.startswith(head):
            candidates.append(f"{head}pixel_decoder.{name.removeprefix(head)}")
    candidates.append(f"{_F}{name}")
    return next((c for c in candidates if c in model_names), name)


def _is_narrower_input(name: str, value: Tensor, own: Tensor) -> bool:
    """Whether this is a backbone's first convolution, with fewer image channels than the model's.

    Only there are 3 channels colours: no other convolution of the backbones has so few.
    """
    return (
        name.startswith(_F)
        and value.dim() == own.dim() == 4
        and value.shape[1] == 3 < own.shape[1]
        and value.shape[0] == own.shape[0]
        and value.shape[2:] == own.shape[2:]
    )


class TTTCheckpointer(DetectionCheckpointer):
    """detectron2's checkpointer for all formats, with the rules and the report of this module.

    :meth:`load` takes what it saved itself or a checkpoint to evaluate: the weights have to cover
    the model and nothing more, but for what the arguments allow. :meth:`resume_or_load` loads a
    run's own checkpoint under the same rules, and else a *starting point*, which may lack parts
    of the model and may have others. Shapes that differ are an error in both. A killed process
    leaves whole files: the checkpoint before, or the new one.

    Args:
        model: the model to load into and to save.
        save_dir: where checkpoints are written.
        new_classes: whether a starting point may be of another number of classes.
        leave_out: prefixes of names that are not saved; may be set later.
        allow_new, allow_unused, allow_mismatched, extra_channels, init_recon_from_main: as in
            :func:`load_weights`.
        checkpointables: further objects to save and load, as in detectron2.
    """

    def __init__(
        self,
        model: nn.Module,
        save_dir: str = "",
        *,
        new_classes: bool = False,
        leave_out: tuple[str, ...] = (),
        allow_new: Sequence[str] = (),
        allow_unused: Sequence[str] = (),
        allow_mismatched: Sequence[str] = (),
        extra_channels: Literal["init", "zero"] = "init",
        init_recon_from_main: bool = False,
        **checkpointables: Any,
    ) -> None:
        super().__init__(model, save_dir, **checkpointables)
        self._new_classes = new_classes
        self.leave_out = leave_out
        self._options: dict[str, Any] = {
            "allow_new": allow_new,
            "allow_unused": allow_unused,
            "allow_mismatched": allow_mismatched,
            "extra_channels": extra_channels,
            "init_recon_from_main": init_recon_from_main,
        }
        self.report: LoadReport | None = None  # of the last load
        self._source = ""
        self._needed: tuple[str, ...] = ()  # what a file has to hold beside the weights

    def load(self, path: str, checkpointables: list[str] | None = None) -> dict[str, Any]:
        """Load weights and (of detectron2's own files) the other checkpointables; see the class.

        Raises:
            UserError: no such file, an unreadable one, or weights that do not fit.
        """
        self._source = path
        if path:
            path = local_file(path)
        try:
            return super().load(path, checkpointables)
        finally:
            self._parsed_url_during_load = None  # detectron2 leaves it set when a load fails

    def resume_or_load(self, path: str, *, resume: bool = True) -> dict[str, Any]:
        """Load this run's last checkpoint if `resume`, else the starting point at `path`.

        Raises:
            UserError: the checkpoint is missing, damaged or only weights, or the starting point
                does not fit.
        """
        if resume and self.has_checkpoint():
            return self._resume()
        strict = self._options
        self._options = {**strict, "allow_new": EVERYTHING, "allow_unused": EVERYTHING}
        if self._new_classes:
            self._options["allow_mismatched"] = (*strict["allow_mismatched"], *CLASS_LAYER)
        try:
            return self.load(path, checkpointables=[])
        finally:
            self._options = strict

    def get_checkpoint_file(self) -> str:
        """The file that ``last_checkpoint`` names; "" if there is no such note.

        Raises:
            UserError: the note names no file of this folder.
        """
        note = Path(self.save_dir) / "last_checkpoint"
        if not note.is_file():
            return ""
        name = note.read_bytes().decode(errors="replace").strip()
        if name and (note.parent / name).is_file():
            return str(note.parent / name)
        raise UserError(f"{note} names {name!r}, which is no file; {self._way_out()}")

    def _way_out(self) -> str:
        written = sorted(path.name for path in Path(self.save_dir).glob("model_[0-9f]*.pth"))
        if not written:
            return "without it this training starts anew in another OUTPUT_DIR"
        return f"write the name of a whole checkpoint into it (there are {', '.join(written)})"

    def _resume(self) -> dict[str, Any]:
        file = self.get_checkpoint_file()
        self._needed = tuple(self.checkpointables)
        try:
            return self.load(file)
        except UserError as error:
            note = Path(self.save_dir) / "last_checkpoint"
            raise UserError(f"{error} ({note} names it; {self._way_out()})") from error
        finally:
            self._needed = ()

    def weights(self) -> dict[str, Tensor]:
        """What is saved of the model."""
        weights = self.model.state_dict()
        for name in [name for name in weights if name.startswith(self.leave_out)]:
            del weights[name]
        return weights

    def save(self, name: str, **kwargs: Any) -> None:
        """Save the model, the checkpointables and ``kwargs`` in ``<name>.pth``, as detectron2."""
        if not self.save_dir or not self.save_to_disk:
            return
        content = {"model": self.weights(), **kwargs}
        content.update({key: part.state_dict() for key, part in self.checkpointables.items()})
        path = Path(self.save_dir) / f"{name}.pth"
        self.logger.info("Saving checkpoint to %s", path)
        save_torch(path, content)
        self.tag_last_checkpoint(path.name)

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        """Note which checkpoint a resume starts from."""
        note = Path(self.save_dir) / "last_checkpoint"
        write_atomically(note, lambda part: part.write_text(last_filename_basename))

    def _load_file(self, filename: str) -> dict[str, Any]:
        content = read_file(filename)
        weights = weights_in(content, self._source)
        others = content if "model" in content else {}
        if not others.keys() >= set(self._needed):
            raise UserError(f"{self._source} holds weights alone, not the state of a training")
        return {**others, "model": weights}

    def _load_model(self, checkpoint: dict[str, Any]) -> None:
        weights = checkpoint.pop("model")
        self.report = load_weights(self.model, weights, source=self._source, **self._options)
