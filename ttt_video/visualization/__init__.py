"""Pictures of frames: overlays, videos and grids. No display, no detectron2 drawing.

Images are (H, W, 3) uint8 RGB arrays throughout.
"""
