"""Test-time training on video streams, as a detectron2 plugin.

Importing this package registers names - the model's parts in detectron2's registries, data sets in
its catalogs, ``ttt_video://`` in its path manager - and does nothing else.
"""

from detectron2.utils.file_io import PathManager

from . import shipped
from .config import add_ttt_config, get_cfg
from .data.cityscapes import complete_metadata
from .data.coco_videos import register_coco_videos
from .data.image_folder import register_image_folders
from .data.kitti_step import register_kitti_step
from .modeling import MaskFormerTTT
from .version import __version__
from .world.datasets import register_world_stills

__all__ = ["MaskFormerTTT", "__version__", "add_ttt_config", "get_cfg"]


def register_all() -> None:
    """Registers every data set of this project in detectron2's catalogs; may be called again.

    Called when the package is imported, as detectron2 does with its own. Registering reads neither
    files nor the environment: a data set that is not on disk is reported when it is used.
    """
    complete_metadata()
    register_coco_videos()
    register_image_folders()
    register_kitti_step()
    register_world_stills()


shipped.register(PathManager)
register_all()
