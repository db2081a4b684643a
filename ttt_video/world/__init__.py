"""A procedural street world with exact labels: videos and stills made from a seed."""

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
    "SPLIT_SEEDS",
    "WORLD_CLASS_IDS",
    "WORLD_VERSION",
    "WorldFrame",
    "WorldStills",
    "WorldVideo",
    "render_still",
]
