#!/usr/bin/env python
"""Runs ``ttt-video steps`` with the code of this checkout."""

from functools import partial

from _checkout import call, start

main = partial(call, "steps")

if __name__ == "__main__":
    start("steps")
