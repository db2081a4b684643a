"""Fits weights to a model and reports what became of each.

Names are those of Mask2Former and of the authors' release, so published checkpoints need no
mapping. Checkpoints of several generations (older head names, ImageNet backbones without prefix,
3 instead of 4 input channels) are understood here, and the report says so.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import UserError
from ._weight_files import (
    check_finite,
    checkpoint_format,
    half_precision,
    input_convolution,
    read_checkpoint,
    read_file,
    save_safetensors,
    set_input_channels,
    weights_hash,
    write_checkpoint,
)
from .interface import MASKFORMER_PARTS

__all__ = [
    "CLASS_LAYER",
    "CLASS_WEIGHTS",
    "EVERYTHING",
    "LoadReport",
    "ShapeDifference",
    "checkpoint_format",
    "half_precision",
    "input_convolution",
    "load_weights",
    "read_checkpoint",
    "read_file",
    "save_safetensors",
    "set_input_channels",
    "weights_hash",
    "write_checkpoint",
]

logger = logging.getLogger(__name__)

EVERYTHING = ("",)
"""Prefixes that allow every name."""

_F, _H, _G = (f"{MASKFORMER_PARTS[role]}." for role in "fhg")

_CLASS_WEIGHT = "sem_seg_head.predictor.class_embed.weight"

_IMAGE_CLASS_WEIGHTS = ("classifier_pred.weight", "head.weight")
"""Of the two heads of :class:`ViTMAE`"""

CLASS_WEIGHTS = {_CLASS_WEIGHT: 1, **dict.fromkeys(_IMAGE_CLASS_WEIGHTS, 0)}
"""Names of weights with a row for each class, and how many of their rows are no class."""

CLASS_LAYER = (
    "sem_seg_head.predictor.class_embed.",
    "criterion.empty_weight",
    *_IMAGE_CLASS_WEIGHTS,
    "classifier_pred.bias",
    "head.bias",
)
"""Prefixes of the weights whose shape follows from the number of classes."""

MAIN_QUERIES = (f"{_H}predictor.query_feat.", f"{_H}predictor.query_embed.")
"""Prefixes of the main head's queries; in a head without classes they are what it predicts."""

# These follow from the configuration, so a file or a model may lack them. Older Swin checkpoints
# keep attention masks, older detectron2 models the pixel statistics.
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
    """Says what became of every weight of a file and of a model, by the model's names.

    Attributes:
        source: where the weights came from, for messages.
        loaded: weights that were taken as they are.
        widened: first convolutions that got further input channels.
        copied: weights of the decoder g that were taken from the main head h.
        new: weights that only the model has; they keep their initialisation.
        unused: weights that only the file has, by its names.
        mismatched: weights of different shapes; the model keeps its own.
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

    def table(self) -> str:
        """Returns numbers of tensors by part of the model and fate, then exceptions by name."""
        columns = {
            "loaded": self.loaded,
            "widened": [w.name for w in self.widened],
            "copied from h": self.copied,
            "new": self.new,
            "unused": self.unused,
            "mismatched": [m.name for m in self.mismatched],
        }
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

    def new_task_layers(self) -> tuple[str, ...]:
        """Returns prefixes of the weights that another number of classes, or task, makes new.

        A head without classes, such as that of colours, has as many queries as its target needs.
        """
        own = [*self.loaded, *self.copied, *self.new, *(m.name for m in self.mismatched)]
        has_classes = any(name.startswith(CLASS_LAYER[0]) for name in own)
        return CLASS_LAYER if has_classes else CLASS_LAYER + MAIN_QUERIES

    def raise_if_unfit(
        self, allow_new: Sequence[str], allow_unused: Sequence[str], allow_mismatched: Sequence[str]
    ) -> None:
        """Refuses exceptions that are not allowed, and weights of which none was loaded.

        Raises:
            UserError: says in one line what does not fit; the table is logged before.
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
        images = next((m for m in self.mismatched if m.name in _IMAGE_CLASS_WEIGHTS), None)
        if mismatched and images is not None and not _beyond(mismatched, CLASS_LAYER):
            theirs, ours = images.file_shape[0], images.model_shape[0]
            raise UserError(
                f"the weights in {self.source} are of {theirs} classes, the model of {ours}: set "
                f"MODEL.VIT_MAE.NUM_CLASSES {theirs}, or TTT.NEW_CLASSES True to train a new class "
                "layer"
            )
        layers = self.new_task_layers()
        queries = next((m for m in self.mismatched if m.name.startswith(MAIN_QUERIES)), None)
        if mismatched and queries is not None and not _beyond(mismatched, layers):
            raise UserError(
                f"the weights in {self.source} have {queries.file_shape[0]} queries in the main "
                f"head, the model {queries.model_shape[0]}, because they predict something else: "
                "use the config they were trained with, or set TTT.NEW_CLASSES True to train new "
                "queries"
            )
        logger.warning("%s", self.table())
        raise UserError(
            f"the weights in {self.source} do not fit: {', '.join(problems)}; use the config the "
            "weights were trained with"
        )


def _beyond(names: Sequence[str], prefixes: Sequence[str]) -> list[str]:
    return [name for name in names if not name.startswith(tuple(prefixes))]


def _part(name: str) -> str:
    """Returns the row of the table for a name: backbone, sem_seg_head.predictor, ..."""
    modules = name.split(".")[:-1]
    return ".".join(modules[: 2 if name.startswith((_H, _G)) else 1]) or name


def _summarise(names: Sequence[str], limit: int = 12) -> list[str]:
    """Returns the names if they are few, else their modules with counts."""
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
    allow_mismatched: Sequence[str] | None = (),
) -> LoadReport:
    """Copies weights into a model by name, after everything was checked.

    It understands older names (Mask2Former's ``static_query`` and heads without ``pixel_decoder``)
    and backbones without ``backbone.`` prefix (ImageNet checkpoints). A first convolution with
    fewer input channels than the model's fills the model's first ones. Unless prefixes allow more,
    the weights must cover the model and hold nothing else. The report is logged, as a warning if
    not every weight was loaded as it was.

    Args:
        model: any module; parameters and buffers keep their device and dtype.
        weights: name to tensor.
        source: file name for messages.
        extra_channels: further channels of a widened convolution keep the model's initialisation
            ("init"), or are zero ("zero"), so that the model computes what the file's did.
        init_recon_from_main: fills the decoder g from the main head h where the file has no g; its
            queries stay new, because their number is another one.
        allow_new: prefixes of names that the file may lack.
        allow_unused: prefixes of names that the model may lack.
        allow_mismatched: prefixes of names whose shape may differ; None for those that follow from
            the classes or the task (:meth:`LoadReport.new_task_layers`).

    Raises:
        UserError: the weights do not fit, or are not finite; the model is unchanged.
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

    if allow_mismatched is None:
        allow_mismatched = report.new_task_layers()
    report.raise_if_unfit(allow_new, allow_unused, allow_mismatched)
    check_finite(values, source)
    with torch.no_grad():
        for name, value in values.items():
            target[name].copy_(value)
    whole = not (
        report.widened or report.copied or report.new or report.unused or report.mismatched
    )
    logger.log(logging.INFO if whole else logging.WARNING, "%s", report.table())
    return report


def _model_name(name: str, model_names: Mapping[str, Any]) -> str:
    """Returns the model's name for a weight, or the name itself if the model has none like it."""
    candidates = [name, name.replace("predictor.static_query.", "predictor.query_feat.")]
    for head in (_H, _G):
        if name.startswith(head):
            candidates.append(f"{head}pixel_decoder.{name.removeprefix(head)}")
    candidates.append(f"{_F}{name}")
    return next((c for c in candidates if c in model_names), name)


def _is_narrower_input(name: str, value: Tensor, own: Tensor) -> bool:
    """Says whether this is a backbone's first convolution without the visibility channel.

    No other convolution of the backbones has as few as 3 channels.
    """
    return (
        name.startswith(_F)
        and value.dim() == own.dim() == 4
        and value.shape[1] == 3 < own.shape[1]
        and value.shape[0] == own.shape[0]
        and value.shape[2:] == own.shape[2:]
    )
