"""Builds the config of all keys, and refuses values that cannot work."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from detectron2.config import CfgNode
from detectron2.config import get_cfg as detectron2_cfg

from ..errors import UserError
from .borrowed import BORROWED
from .keys import AUTO, KEYS


def _place(cfg: CfgNode, name: str) -> tuple[CfgNode, str]:
    """Returns the section of a key, which is made if it is missing, and the key's own name."""
    *sections, own = name.split(".")
    for section in sections:
        cfg = cfg.setdefault(section, CfgNode())
    return cfg, own


def add_ttt_config(cfg: CfgNode) -> None:
    """Adds the keys of others and of this project to ``cfg`` where they are missing, in place."""
    for name, default in {**BORROWED, **{name: key.default for name, key in KEYS.items()}}.items():
        section, own = _place(cfg, name)
        section.setdefault(own, copy.deepcopy(default))


def get_cfg() -> CfgNode:
    """Returns detectron2's default config with the keys of this project."""
    cfg = detectron2_cfg()
    add_ttt_config(cfg)
    return cfg


def restore_defaults(cfg: CfgNode, names: Iterable[str]) -> None:
    """Sets keys of :data:`KEYS` to their defaults."""
    for name in names:
        section, own = _place(cfg, name)
        section[own] = copy.deepcopy(KEYS[name].default)


def validate_config(cfg: CfgNode) -> None:
    """Raises UserError for the first key whose value cannot work, with the fix."""
    values = {name: section[own] for name in KEYS for section, own in [_place(cfg, name)]}
    for name, key in KEYS.items():
        if key.choices and values[name] not in key.choices:
            listed = ", ".join(map(repr, key.choices))
            raise UserError(f"{name} is {values[name]!r}; choose one of {listed}")
    for name, key in KEYS.items():
        if key.auto and values[name] == AUTO:
            continue
        for rule in key.rules:
            if not rule.holds(values[name], cfg):
                words = f"{rule.words}, or {AUTO!r}" if key.auto else rule.words
                raise UserError(f"{name} is {values[name]!r}; it must be {words}")


@contextmanager
def words_for_numbers(cfg: CfgNode) -> Iterator[None]:
    """Lets what is merged have :data:`AUTO` for a number, which yacs refuses by its type.

    Raises:
        ValueError: it has another word for a number.
    """
    held = {}
    for name in (name for name, key in KEYS.items() if key.auto):
        section, own = _place(cfg, name)
        held[name] = section[own]
        section[own] = None  # a value of any type may follow
    try:
        yield
    finally:
        for name, before in held.items():
            section, own = _place(cfg, name)
            if section[own] is None:
                section[own] = before
    for name in held:
        section, own = _place(cfg, name)
        if type(section[own]) is not type(KEYS[name].default) and section[own] != AUTO:
            raise ValueError(f"{name} is {section[own]!r}; give a whole number or {AUTO!r}")
