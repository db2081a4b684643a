"""Data sets, training loaders, and the frame sources of a stream."""
