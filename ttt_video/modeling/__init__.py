"""The model: encoder f, main-task head h, reconstruction decoder g."""

from .backbone import SwinTransformerTTT
from .colorizer import ColorizerTTT
from .deeplab import DeepLabV3Plus
from .heads import ColorHead, MaskFormerTTTHead, ReconstructionHead
from .interface import AdaptableModel, Model
from .masking import MASK_KINDS, PatchMasks
from .meta_arch import MaskFormerTTT
from .pixel_decoder import PIXEL_DECODER_REGISTRY
from .segformer import SegFormer
from .transformer_decoder import TRANSFORMER_DECODER_REGISTRY
from .vit_mae import ViTMAE
from .zhang import ZhangColorizer
