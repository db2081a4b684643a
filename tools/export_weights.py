#!/usr/bin/env python
"""Runs ``ttt-video weights export`` with the code of this checkout."""

from functools import partial

from _checkout import call, start

main = partial(call, "weights export")

if __name__ == "__main__":
    start("weights export")
