"""The main-task head h and the decoder g, each of a pixel decoder and a query decoder."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import META_ARCH_REGISTRY, SEM_SEG_HEADS_REGISTRY
from detectron2.utils.registry import Registry
from torch import Tensor, nn

from ..color.bins import ColorBins
from ..errors import UserError
from .kernels import has_hooks
from .pixel_decoder import PIXEL_DECODER_REGISTRY, MSDeformAttnPixelDecoder
from .transformer_decoder import (
    TRANSFORMER_DECODER_REGISTRY,
    MultiScaleMaskedTransformerDecoder,
)

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


def check_architecture(cfg: CfgNode) -> None:
    """Raises UserError if ``MODEL.META_ARCHITECTURE`` names nothing; detectron2 has a traceback."""
    registered(META_ARCH_REGISTRY, "MODEL.META_ARCHITECTURE", cfg.MODEL.META_ARCHITECTURE)


def check_grey(cfg: CfgNode, model: nn.Module) -> None:
    """Refuses colour frames for a model of colours, and grey ones for every other.

    Raises:
        UserError: ``INPUT.GREY`` is of the other kind.
    """
    name, grey = cfg.MODEL.META_ARCHITECTURE, cfg.INPUT.GREY
    colours = "color" in getattr(model, "outputs", ())
    if colours and grey == "off":
        raise UserError(
            f"{name} colours grey frames, but INPUT.GREY is off: set it to made (colour videos, "
            "whose colours are taken off and kept as labels) or film (black-and-white films)"
        )
    if not colours and grey != "off":
        raise UserError(f"INPUT.GREY is {grey}, which is for models of colours; {name} is none")


_OURS = (MSDeformAttnPixelDecoder, MultiScaleMaskedTransformerDecoder)
"""Decoders that may leave the mask features' last convolution to the queries."""


class _Head(nn.Module):
    """Holds the parts of h and g, ``pixel_decoder`` and ``predictor``."""

    @configurable
    def __init__(self, *, pixel_decoder: nn.Module, predictor: nn.Module) -> None:
        super().__init__()
        self.pixel_decoder = pixel_decoder
        self.predictor = predictor

    def predictions(self, features: dict[str, Tensor], **options: bool) -> list[dict[str, Tensor]]:
        """Returns what the query decoder predicts; ``options`` are its own."""
        decoders = (self.pixel_decoder, self.predictor)
        ours = tuple(map(type, decoders)) == _OURS and not any(map(has_hooks, decoders))
        lazy = {"project": False} if ours else {}
        mask_features, levels = self.pixel_decoder(features, **lazy)
        return self.predictor(levels, mask_features, **options)

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
        return self.predictions(features, every_layer=every_layer)


class PixelHead(_Head):
    """h's architecture without its last layer and its class branch: queries are channels of pixels.

    ``channels`` x 16 queries give the 4 x 4 pixels of each stride-4 cell: mask channel
    ``16 c + 4 p + q`` is channel c of pixel (4 i + p, 4 j + q).
    """

    @classmethod
    def of_queries(
        cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec], num_queries: int
    ) -> dict[str, Any]:
        """Reads the keys of h; the caller fixes the number of queries."""
        if cfg.MODEL.SEM_SEG_HEAD.COMMON_STRIDE != PIXELS_PER_QUERY_CELL:
            raise UserError(
                f"MODEL.SEM_SEG_HEAD.COMMON_STRIDE is {cfg.MODEL.SEM_SEG_HEAD.COMMON_STRIDE}; "
                f"{cls.__name__} needs {PIXELS_PER_QUERY_CELL}"
            )
        return cls.build_parts(cfg, input_shape, num_queries, None)

    def maps(self, features: dict[str, Tensor]) -> Tensor:
        """Returns the map of each query at stride 4: (B, Q, H/4, W/4)."""
        (prediction,) = self.predictions(features)
        return prediction["pred_masks"]


@SEM_SEG_HEADS_REGISTRY.register()
class ReconstructionHead(PixelHead):
    """Decoder g: h's architecture except the last layer, which maps to pixels (Section 4.3)."""

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        """Reads the keys of h; there are 48 queries, 16 for each colour."""
        return cls.of_queries(cfg, input_shape, 3 * PIXELS_PER_QUERY_CELL**2)

    def forward(self, features: dict[str, Tensor]) -> Tensor:
        """Returns (B, 3, H, W) pixels in the units of the training target (normalised RGB)."""
        return F.pixel_shuffle(self.maps(features), PIXELS_PER_QUERY_CELL)


@SEM_SEG_HEADS_REGISTRY.register()
class ColorHead(PixelHead):
    """Head h of colorization, with g's architecture (paper, Section 5.4).

    For regression it has 32 queries, 16 for each of a and b, and gives every pixel's colour. For
    classification it has a query for each of the 313 colour bins and gives logits at stride 4, as
    the network of Zhang et al. (2016) does.
    """

    @configurable
    def __init__(
        self, *, pixel_decoder: nn.Module, predictor: nn.Module, bins: ColorBins | None
    ) -> None:
        """``bins``: the classes of colours; None for regression."""
        super().__init__(pixel_decoder=pixel_decoder, predictor=predictor)
        self.bins = bins

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        """Reads the keys of h and ``TTT.COLOR.TARGET``."""
        bins = ColorBins() if cfg.TTT.COLOR.TARGET == "classification" else None
        num_queries = 2 * PIXELS_PER_QUERY_CELL**2 if bins is None else len(bins)
        return {**cls.of_queries(cfg, input_shape, num_queries), "bins": bins}

    def forward(self, features: dict[str, Tensor]) -> Tensor:
        """Returns (B, 2, H, W) ab / 110, or (B, 313, H/4, W/4) logits."""
        maps = self.maps(features)
        return maps if self.bins is not None else F.pixel_shuffle(maps, PIXELS_PER_QUERY_CELL)
