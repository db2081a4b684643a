"""Trains encoder, head and decoder jointly on labelled stills."""
