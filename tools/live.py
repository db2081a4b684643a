#!/usr/bin/env python
"""Runs ``ttt-video live`` with the code of this checkout."""

from functools import partial

from _checkout import call, start

main = partial(call, "live")

if __name__ == "__main__":
    start("live")
