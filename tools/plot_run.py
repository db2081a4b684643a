#!/usr/bin/env python
"""Runs ``ttt-video plot`` with the code of this checkout."""

from functools import partial

from _checkout import call, start

main = partial(call, "plot")

if __name__ == "__main__":
    start("plot")
