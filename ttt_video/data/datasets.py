"""Registration of the data sets that this project brings."""

from __future__ import annotations

import os
from pathlib import Path


def datasets_root() -> Path:
    """``$DETECTRON2_DATASETS``, by default ``./datasets``."""
    return Path(os.environ.get("DETECTRON2_DATASETS", "datasets")).expanduser()


def register_all() -> None:
    """Registers every data set of this project in detectron2's catalogs; may be called again.

    Called when the package is imported, as detectron2 does with its own. Registering reads neither
    files nor the environment: a data set that is not on disk is reported when it is used.
    """
    # Imported here because these modules look up datasets_root above.
    from .cityscapes import complete_metadata
    from .coco_videos import register_coco_videos
    from .kitti_step import register_kitti_step
    from .world.datasets import register_world_stills

    complete_metadata()
    register_coco_videos()
    register_kitti_step()
    register_world_stills()
