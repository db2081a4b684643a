"""Test-time training on video streams, as a detectron2 plugin.

Importing this package registers names in detectron2's registries and does nothing else.
"""

from .config import add_ttt_config, get_cfg
from .modeling import MaskFormerTTT

__version__ = "0.1.0"

__all__ = ["MaskFormerTTT", "add_ttt_config", "get_cfg"]
