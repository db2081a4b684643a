"""Metrics as pure functions, and runs on disk."""
