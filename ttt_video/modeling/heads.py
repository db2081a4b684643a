"""The main-task head h and the decoder g, each of a pixel decoder and a query decoder."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import SEM_SEG_HEADS_REGISTRY
from detectron2.utils.registry import Registry
from torch import Tensor, nn

from ..errors import UserError
from .pixel_decoder import PIXEL_DECODER_REGISTRY
from .transformer_decoder import TRANSFORMER_DECODER_REGISTRY

MASK2FORMER_DEFAULT = "BasePixelDecoder"
"""Mask2Former's FPN decoder: the default of its code, which none of its configs uses."""

PIXELS_PER_QUERY_CELL = 4
"""Side in px of the square that one cell of the stride-4 maps stands for in the reconstruction."""


def registered(registry: Registry, key: str, name: str) -> Any:
    """Returns what a config key names; UserError, with the names there are, if there is none."""
    if name not in registry:
        known = ", ".join(sorted(known for known, _ in registry))
        raise UserError(f"{key} is {name!r}, which is not registered; choose one of: {known}")
    return registry.get(name)


class _Head(nn.Module):
    """Holds the parts of h and g, ``pixel_decoder`` and ``predictor``."""

    @configurable
    def __init__(self, *, pixel_decoder: nn.Module, predictor: nn.Module) -> None:
        super().__init__()
        self.pixel_decoder = pixel_decoder
        self.predictor = predictor

    @staticmethod
    def build_parts(
        cfg: CfgNode, input_shape: dict[str, ShapeSpec], num_queries: int, num_classes: int | None
    ) -> dict[str, Any]:
        """Builds the two decoders that the config names."""
        head = cfg.MODEL.SEM_SEG_HEAD
        missing = sorted(set(head.IN_FEATURES) - set(input_shape))
        if missing:
            raise UserError(
                f"MODEL.SEM_SEG_HEAD.IN_FEATURES names {missing}; "
                f"the backbone {cfg.MODEL.BACKBONE.NAME} gives {sorted(input_shape)}"
            )
        if head.PIXEL_DECODER_NAME == MASK2FORMER_DEFAULT not in PIXEL_DECODER_REGISTRY:
            raise UserError(
                f"MODEL.SEM_SEG_HEAD.PIXEL_DECODER_NAME is {MASK2FORMER_DEFAULT!r}, Mask2Former's "
                "default, which is not here: set it to MSDeformAttnPixelDecoder"
            )
        pixel_decoder = registered(
            PIXEL_DECODER_REGISTRY, "MODEL.SEM_SEG_HEAD.PIXEL_DECODER_NAME", head.PIXEL_DECODER_NAME
        )
        predictor = registered(
            TRANSFORMER_DECODER_REGISTRY,
            "MODEL.MASK_FORMER.TRANSFORMER_DECODER_NAME",
            cfg.MODEL.MASK_FORMER.TRANSFORMER_DECODER_NAME,
        )
        return {
            "pixel_decoder": pixel_decoder(cfg, input_shape),
            "predictor": predictor(
                cfg, head.CONVS_DIM, num_queries=num_queries, num_classes=num_classes
            ),
        }


@SEM_SEG_HEADS_REGISTRY.register()
class MaskFormerTTTHead(_Head):
    """Head h, which is all of Mask2Former after the backbone (paper, Section 4.3)."""

    @configurable
    def __init__(
        self, *, num_classes: int, ignore_value: int, pixel_decoder: nn.Module, predictor: nn.Module
    ) -> None:
        """``num_classes`` does not count "no object"; ``ignore_value`` is the label of no class."""
        super().__init__(pixel_decoder=pixel_decoder, predictor=predictor)
        self.num_classes = num_classes
        self.ignore_value = ignore_value

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        """Reads ``MODEL.SEM_SEG_HEAD.*`` and ``MODEL.MASK_FORMER.*``."""
        num_classes = cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES
        queries = cfg.MODEL.MASK_FORMER.NUM_OBJECT_QUERIES
        return {
            "num_classes": num_classes,
            "ignore_value": cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE,
            **cls.build_parts(cfg, input_shape, queries, num_classes),
        }

    def forward(
        self, features: dict[str, Tensor], *, every_layer: bool = False
    ) -> list[dict[str, Tensor]]:
        """Returns ``pred_logits`` (B, Q, K + 1) and ``pred_masks`` (B, Q, H/4, W/4) by layer."""
        mask_features, levels = self.pixel_decoder(features)
        return self.predictor(levels, mask_features, every_layer=every_layer)


@SEM_SEG_HEADS_REGISTRY.register()
class ReconstructionHead(_Head):
    """Decoder g, which has h's architecture except for the last layer, to pixels (Section 4.3).

    It has 48 queries and no class branch. The 48 stride-4 mask channels are the 3 x 4 x 4 pixels
    of each cell: channel ``16 c + 4 p + q`` is colour c of pixel (4 i + p, 4 j + q).
    """

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        """Reads the keys of h; the number of queries is fixed."""
        if cfg.MODEL.SEM_SEG_HEAD.COMMON_STRIDE != PIXELS_PER_QUERY_CELL:
            raise UserError(
                f"MODEL.SEM_SEG_HEAD.COMMON_STRIDE is {cfg.MODEL.SEM_SEG_HEAD.COMMON_STRIDE}; "
                f"the reconstruction needs {PIXELS_PER_QUERY_CELL}"
            )
        return cls.build_parts(cfg, input_shape, 3 * PIXELS_PER_QUERY_CELL**2, None)

    def forward(self, features: dict[str, Tensor]) -> Tensor:
        """Returns (B, 3, H, W) pixels in the units of the training target (normalised RGB)."""
        mask_features, levels = self.pixel_decoder(features)
        (prediction,) = self.predictor(levels, mask_features)
        return F.pixel_shuffle(prediction["pred_masks"], PIXELS_PER_QUERY_CELL)
