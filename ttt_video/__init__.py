"""Test-time training on video streams, as a detectron2 plugin.

Importing this package registers names - the model's parts in detectron2's registries, data sets in
its catalogs, ``ttt_video://`` in its path manager - and does nothing else.
"""

from typing import TYPE_CHECKING, Any

from detectron2.utils.file_io import PathManager

from . import shipped
from .config import add_ttt_config, get_cfg
from .data.cityscapes import complete_metadata
from .data.coco_videos import register_coco_videos
from .data.fashion_mnist import register_fashion_mnist
from .data.image_folder import register_image_folders
from .data.kitti_step import register_kitti_step
from .modeling import MaskFormerTTT
from .version import __version__
from .world.datasets import register_world_stills
from .world.image_sets import register_corrupted_images

if TYPE_CHECKING:
    from .stream import Stream

__all__ = ["MaskFormerTTT", "Stream", "__version__", "add_ttt_config", "get_cfg"]


def __getattr__(name: str) -> Any:
    """Imports ``Stream`` when it is first asked for: it brings PyAV."""
    if name == "Stream":
        from .stream import Stream

        return Stream
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def register_all() -> None:
    """Registers every data set of this project in detectron2's catalogs; may be called again.

    Called when the package is imported, as detectron2 does with its own. Registering reads neither
    files nor the environment: a data set that is not on disk is reported when it is used.
    """
    complete_metadata()
    register_coco_videos()
    register_corrupted_images()
    register_fashion_mnist()
    register_image_folders()
    register_kitti_step()
    register_world_stills()


shipped.register(PathManager)
register_all()
