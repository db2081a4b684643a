"""A procedural street world with exact labels: videos and stills made from a seed."""

from .video import WORLD_CLASS_IDS, WORLD_VERSION, WorldFrame, WorldVideo, render_still

__all__ = ["WORLD_CLASS_IDS", "WORLD_VERSION", "WorldFrame", "WorldVideo", "render_still"]
