#!/usr/bin/env python
"""Runs ``ttt-video check`` with the code of this checkout."""

from functools import partial

from _checkout import call, start

main = partial(call, "check")

if __name__ == "__main__":
    start("check")
