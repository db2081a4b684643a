#!/usr/bin/env python
"""Runs ``ttt-video locality`` with the code of this checkout."""

from functools import partial

from _checkout import call, start

main = partial(call, "locality")

if __name__ == "__main__":
    start("locality")
