"""Data sets, training loaders, and the frame sources of a stream."""

from .base import BaseSource
from .custom import register_custom_coco_video, register_custom_video

__all__ = ["BaseSource", "register_custom_coco_video", "register_custom_video"]
