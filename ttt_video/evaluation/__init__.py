"""Metrics as pure functions, and what they make of the rows of a run."""
