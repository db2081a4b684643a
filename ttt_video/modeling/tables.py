"""Tables that follow from sizes alone: made once per size, or by a program that is exported."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import _lru_cache_wrapper, lru_cache, wraps
from typing import Any, TypeVar, cast

import torch

Make = TypeVar("Make", bound=Callable[..., Any])


def is_exporting() -> bool:
    """Returns whether ``torch.export`` traces the call; PyTorch before 2.7 cannot say."""
    compiler = torch.compiler
    return hasattr(compiler, "is_exporting") and compiler.is_exporting()


def shared_table(kept: int) -> Callable[[Make], Make]:
    """Makes a function keep its last ``kept`` results, which callers must not write to.

    They take part in autograd, also those first made in inference mode. A program that is exported
    makes the table itself, because sizes may be symbols there and tensors have no numbers.
    """

    def decorate(make: Make) -> Make:
        made_once = lru_cache(maxsize=kept)(torch.inference_mode(mode=False)(make))

        @wraps(made_once)  # by which shared_tables finds it
        def table(*sizes: Any) -> Any:
            return make(*sizes) if is_exporting() else made_once(*sizes)

        return cast(Make, table)

    return decorate


def caches() -> list[_lru_cache_wrapper]:
    """Returns what keeps results in the modules of this package that are imported."""
    modules = [module for name, module in [*sys.modules.items()] if name.startswith("ttt_video.")]
    values = [value for module in modules for value in [*vars(module).values()]]
    found = [getattr(value, "__wrapped__", value) for value in values]
    unique = {id(value): value for value in [*values, *found]}
    return [value for value in unique.values() if isinstance(value, _lru_cache_wrapper)]
