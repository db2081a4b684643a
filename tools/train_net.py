#!/usr/bin/env python
"""Runs ``ttt-video train`` with the code of this checkout."""

from functools import partial

from _checkout import call, start

main = partial(call, "train")

if __name__ == "__main__":
    start("train")
