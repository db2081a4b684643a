"""Test-time training on video streams, as a detectron2 plugin.

Importing this package registers names - the model's parts in detectron2's registries, data sets in
its catalogs, ``ttt_video://`` in its path manager - and does nothing else.
"""

from detectron2.utils.file_io import PathManager

from . import shipped
from .config import add_ttt_config, get_cfg
from .data.datasets import register_all
from .modeling import MaskFormerTTT

__version__ = "0.1.0"

__all__ = ["MaskFormerTTT", "add_ttt_config", "get_cfg"]

shipped.register(PathManager)
register_all()
