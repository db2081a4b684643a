"""SegFormer (Xie et al., 2021) of Hugging Face's transformers, a frozen baseline.

The library is an optional extra, so it is imported when a model is built.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from detectron2.config import CfgNode
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

    def __init__(self, cfg: CfgNode) -> None:
        """Reads ``MODEL.SEGFORMER.*``, ``MODEL.SEM_SEG_HEAD.NUM_CLASSES`` and ``MODEL.PIXEL_*``."""
        super().__init__(cfg)
        library, settings = _library(), cfg.MODEL.SEGFORMER
        network = library.SegformerForSemanticSegmentation(
            library.SegformerConfig(
                num_labels=cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES,
                hidden_sizes=settings.HIDDEN_SIZES,
                depths=settings.DEPTHS,
                num_attention_heads=settings.NUM_HEADS,
                decoder_hidden_size=settings.DECODER_DIM,
            )
        )
        # Its two parts are the submodules, which keeps the library's names of parameters. The
        # network is called through a reference that torch does not register.
        self.segformer = network.segformer
        self.decode_head = network.decode_head
        object.__setattr__(self, "_network", network)

    @staticmethod
    def read_weights(path: str) -> dict[str, Tensor]:
        """Reads a checkpoint with the library's names, or a folder of Hugging Face's.

        Args:
            path: a checkpoint file with the names of the installed library, or a folder with
                ``config.json`` and weights, whose older names the library translates itself.

        Raises:
            UserError: the file or folder cannot be read.
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
        """Returns scores at a quarter of the images' size."""
        return self._network(pixel_values=images).logits
