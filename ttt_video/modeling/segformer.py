"""SegFormer (Xie et al., 2021) of Hugging Face's transformers, as a frozen baseline in the stream.

The library is imported when a model is built, not before: it is an optional extra.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY
from torch import Tensor, nn

from ..errors import UserError
from .frozen import FrozenSegmenter
from .weights import read_checkpoint


def _library() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise UserError(
            "SegFormer needs transformers, an optional extra: pip install 'transformers>=5.20,<6'"
        ) from error
    return transformers


@META_ARCH_REGISTRY.register()
class SegFormer(FrozenSegmenter):
    """``SegformerForSemanticSegmentation``; for evaluation only.

    Parameters are named as in the library: ``segformer.*`` and ``decode_head.*``.
    """

    parts: ClassVar = {"f": "segformer", "h": "decode_head"}
    size_divisibility = 32  # the stride of the last stage
    _network: nn.Module

    @configurable
    def __init__(
        self,
        *,
        num_classes: int,
        hidden_sizes: Sequence[int],
        depths: Sequence[int],
        num_heads: Sequence[int],
        decoder_dim: int,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
    ) -> None:
        """
        Args:
            num_classes: of the output.
            hidden_sizes, depths, num_heads: of the four stages.
            decoder_dim: width of the head.
            pixel_mean, pixel_std: of uint8 values, in ``INPUT.FORMAT`` order.
        """
        super().__init__(pixel_mean, pixel_std)
        library = _library()
        network = library.SegformerForSemanticSegmentation(
            library.SegformerConfig(
                num_labels=num_classes,
                hidden_sizes=list(hidden_sizes),
                depths=list(depths),
                num_attention_heads=list(num_heads),
                decoder_hidden_size=decoder_dim,
            )
        )
        # The library's own names are kept: its two parts are the submodules, and it is called
        # through a reference that is none.
        self.segformer = network.segformer
        self.decode_head = network.decode_head
        object.__setattr__(self, "_network", network)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Reads ``MODEL.SEGFORMER.*``, ``MODEL.SEM_SEG_HEAD.NUM_CLASSES`` and ``MODEL.PIXEL_*``."""
        settings = cfg.MODEL.SEGFORMER
        return {
            "num_classes": cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES,
            "hidden_sizes": settings.HIDDEN_SIZES,
            "depths": settings.DEPTHS,
            "num_heads": settings.NUM_HEADS,
            "decoder_dim": settings.DECODER_DIM,
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
        }

    @staticmethod
    def read_weights(path: str) -> dict[str, Tensor]:
        """Reads weights by this model's names, of one of our formats or a folder of Hugging Face's.

        Args:
            path: a checkpoint file with the names of the installed library, or a folder with
                ``config.json`` and weights, whose older names the library translates itself.

        Raises:
            UserError: neither can be read.
        """
        if not Path(path).is_dir():
            return read_checkpoint(path)
        try:
            network = _library().SegformerForSemanticSegmentation.from_pretrained(
                path, local_files_only=True
            )
        except (OSError, ValueError, KeyError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"the folder {path} holds no SegFormer: {reason}") from error
        return network.state_dict()

    def logits(self, images: Tensor) -> Tensor:
        """Scores at a quarter of the images' size."""
        return self._network(pixel_values=images).logits
