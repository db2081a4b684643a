"""The model: encoder f, main-task head h, reconstruction decoder g."""

from .backbone import SwinTransformerTTT
from .deeplab import DeepLabV3Plus
from .heads import MaskFormerTTTHead, ReconstructionHead
from .masking import random_patch_mask
from .meta_arch import MaskFormerTTT
from .pixel_decoder import PIXEL_DECODER_REGISTRY
from .segformer import SegFormer
from .transformer_decoder import TRANSFORMER_DECODER_REGISTRY

__all__ = [
    "PIXEL_DECODER_REGISTRY",
    "TRANSFORMER_DECODER_REGISTRY",
    "DeepLabV3Plus",
    "MaskFormerTTT",
    "MaskFormerTTTHead",
    "ReconstructionHead",
    "SegFormer",
    "SwinTransformerTTT",
    "random_patch_mask",
]
