"""Reads ``configs/methods.yaml``, whose first lines say what a method's name stands for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from ..shipped import config_dir
from .yaml_files import read_yaml

ENSEMBLE = "TTT.ENSEMBLE.METHOD"


@dataclass(frozen=True)
class NamedMethod:
    """A method's name with its settings, those of the method it runs included.

    Attributes:
        name: name for ``--method``, ``TTT.METHOD`` and a run's summary.
        runs: name of the registered code; :data:`ENSEMBLE` stands for the method it names.
        wrappers: names of the classes put around it, the innermost first.
        title: its row in tables; "" stands for the name.
        keys: ``TTT.*`` keys that go with it, the fixed ones included.
        fixed: those of them that must not have another value.
        decoder: weights without decoder g are refused.
        page: name of its page in ``docs/methods/``.
    """

    name: str
    runs: str
    wrappers: tuple[str, ...] = ()
    title: str = ""
    keys: Mapping[str, Any] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    decoder: bool = False
    page: str = ""

    @property
    def is_ensemble(self) -> bool:
        """Says whether it combines predictions of the method that ``TTT.ENSEMBLE.METHOD`` names."""
        return self.runs == ENSEMBLE


@cache
def shipped_methods() -> Mapping[str, NamedMethod]:
    """Returns the methods of ``configs/methods.yaml`` by name, in its order."""
    known: dict[str, NamedMethod] = {}
    for name, entry in read_yaml(config_dir() / "methods.yaml").items():
        runs = entry.pop("runs", name)
        base = known.get(runs, NamedMethod(name, runs))
        fixed = {**base.fixed, **entry.pop("fixed", {})}
        known[name] = NamedMethod(
            name,
            base.runs,
            wrappers=(*base.wrappers, *entry.pop("wrappers", ())),
            keys={**base.keys, **entry.pop("keys", {}), **fixed},
            fixed=fixed,
            page=entry.pop("page", name),
            **entry,
        )
    return known


def named_method(name: str) -> NamedMethod:
    """Returns the method of a name; one that does not ship is the code of this name."""
    return shipped_methods().get(name, NamedMethod(name, name))
