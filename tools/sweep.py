#!/usr/bin/env python
"""Runs ``ttt-video sweep`` with the code of this checkout."""

from functools import partial

from _checkout import call, start

main = partial(call, "sweep")

if __name__ == "__main__":
    start("sweep")
