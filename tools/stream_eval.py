#!/usr/bin/env python
"""Runs ``ttt-video stream`` with the code of this checkout."""

from functools import partial

from _checkout import call, start

main = partial(call, "stream")

if __name__ == "__main__":
    start("stream")
