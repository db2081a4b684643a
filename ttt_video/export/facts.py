"""Tells what an exported file takes, gives and was made of."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from torch import Tensor, nn

from ..errors import UserError
from ..formats.images import FrameTransform
from ..modeling.weights import weights_hash
from ..stream.saving.base import Predicted
from ..version import __version__
from ..world.video import SPLIT_SEEDS, WorldVideo

MEANINGS = {
    "scores": "(1, classes, height, width) float32: score of each class at each pixel",
    "labels": "(1, height, width) int32: the class with the largest score",
    "class_logits": "(1, queries, classes + 1) float32: of each query; the last is no object",
    "mask_logits": "(1, queries, height, width) float32: of each query; above 0 is inside",
}
"""What the outputs are, by name."""

SEMANTIC, QUERIES = ("scores", "labels"), ("class_logits", "mask_logits")
"""Outputs that come together."""


def facts_of(
    cfg: CfgNode,
    model: nn.Module,
    header: Mapping[str, Any] | None,
    outputs: Collection[str],
    size: tuple[int, int] | None,
) -> dict[str, Any]:
    """Returns JSON values that describe a prediction.

    Args:
        cfg: the config of the model.
        model: with its weights.
        header: of a file that ``--save-weights`` wrote; None for other weights.
        outputs: their names.
        size: height and width; None for any.

    Raises:
        UserError: the outputs are not those of an ``ExportableModel``.
    """
    if {*outputs} not in ({*SEMANTIC}, {*QUERIES}, {*MEANINGS}):
        raise UserError(
            f"{type(model).__name__}.prediction_tensors gives {', '.join(outputs)}; it has to give "
            f"{' and '.join(SEMANTIC)}, or {' and '.join(QUERIES)}"
        )
    own = header or {}
    predicted = Predicted.of(cfg, model.outputs, str(own.get("dataset", "")), 0)  # type: ignore[arg-type]
    former, digest = cfg.MODEL.MASK_FORMER.TEST, weights_hash(model)
    return {
        "ttt_video": __version__,
        "architecture": type(model).__name__,
        "input": f"(1, 3, height, width) uint8, {cfg.INPUT.FORMAT}",
        "input_order": cfg.INPUT.FORMAT,
        "size": None if size is None else [*size],
        "shorter_side": cfg.INPUT.MIN_SIZE_TEST,
        "longest_side": cfg.INPUT.MAX_SIZE_TEST,
        "normalization": {  # done inside
            "mean": [*cfg.MODEL.PIXEL_MEAN],
            "std": [*cfg.MODEL.PIXEL_STD],
        },
        "outputs": {name: MEANINGS[name] for name in outputs},
        "classes": [*predicted.names],
        "colors": predicted.colors.tolist(),
        "things": None if predicted.things is None else sorted(predicted.things),
        "object_mask_threshold": former.OBJECT_MASK_THRESHOLD,
        "overlap_threshold": former.OVERLAP_THRESHOLD,
        "weights_sha256": digest,
        "source_sha256": own.get("source_sha256", digest),
        "video_id": own.get("video_id"),
        "frame_index": own.get("frame_index"),
    }


def example_images(cfg: CfgNode, size: tuple[int, int] | None) -> list[Tensor]:
    """Returns frames of the street world to compare a file and a model on: (1, 3, H, W) uint8.

    Args:
        cfg: says the size of frames, and the order of colours.
        size: height and width of the only frame; None for three sizes, the config's first.
    """
    (seed, *_) = SPLIT_SEEDS["val"]
    image = FrameTransform.from_config(cfg)(WorldVideo(seed, 1)[0].image)[None]
    height, width = image.shape[-2:]
    sizes = [size] if size else [(height, width), (height * 3 // 4 + 1, width), (height, height)]
    return [_resized(image, *sides) for sides in sizes]


def _resized(image: Tensor, height: int, width: int) -> Tensor:
    if image.shape[-2:] == (height, width):
        return image
    resized = F.interpolate(image.float(), size=(height, width), mode="bilinear", antialias=True)
    return resized.round().clamp(0, 255).to(torch.uint8)
