#!/usr/bin/env python
"""Runs ``ttt-video table`` with the code of this checkout."""

import sys
from functools import partial
from importlib.machinery import PathFinder
from importlib.util import module_from_spec
from pathlib import Path

if __name__ == "tabulate":
    # fvcore imports a library of this name, and Python looks into the folder of the running script
    # first, which is this one for every tool: make way for the library.
    others = [path for path in sys.path if Path(path).resolve() != Path(__file__).resolve().parent]
    spec = PathFinder.find_spec(__name__, others)
    if spec is None or spec.loader is None:
        raise ModuleNotFoundError(f"No module named {__name__!r}", name=__name__)
    sys.modules[__name__] = module_from_spec(spec)
    spec.loader.exec_module(sys.modules[__name__])

from _checkout import call, start

main = partial(call, "table")

if __name__ == "__main__":
    start("table")
