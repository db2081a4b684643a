"""Sweeps run many cells from one file: reading, checking and running them."""
