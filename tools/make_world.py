#!/usr/bin/env python
"""Runs ``ttt-video world`` with the code of this checkout."""

from functools import partial

from _checkout import call, start

main = partial(call, "world")

if __name__ == "__main__":
    start("world")
