#!/usr/bin/env python
"""Runs ``ttt-video weights colors`` with the code of this checkout."""

from functools import partial

from _checkout import call, start

main = partial(call, "weights colors")

if __name__ == "__main__":
    start("weights colors")
