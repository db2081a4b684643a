"""The loop over a video, and a run of it on disk."""
