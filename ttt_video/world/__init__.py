"""A procedural street world with exact labels: videos and stills made from a seed."""

from .districts import DISTRICTS_VERSION
from .video import (
    SPLIT_SEEDS,
    WORLD_CLASS_IDS,
    WORLD_VERSION,
    WorldFrame,
    WorldStills,
    WorldVideo,
    render_still,
)

__all__ = [
    "DISTRICTS_VERSION",
    "SPLIT_SEEDS",
    "WORLD_CLASS_IDS",
    "WORLD_VERSION",
    "WorldFrame",
    "WorldStills",
    "WorldVideo",
    "render_still",
]
