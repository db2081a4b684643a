"""Pictures of a run: overlays, videos, picture grids and curves. No display, no detectron2 drawing.

Images are (H, W, 3) uint8 RGB arrays throughout.
"""
