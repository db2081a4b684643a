"""Builds the config of all keys, and refuses values that cannot work."""

from __future__ import annotations

import copy
from ast import literal_eval
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from detectron2.config import CfgNode
from detectron2.config import get_cfg as detectron2_cfg

from ..errors import UserError
from .borrowed import BORROWED
from .keys import AUTO, KEYS, RULES_OF_OTHERS, Rule


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
        if not (key.auto and values[name] == AUTO):
            _check(name, values[name], key.rules, cfg, f", or {AUTO!r}" if key.auto else "")
    for name, rules in RULES_OF_OTHERS.items():
        section, own = _place(cfg, name)
        _check(name, section[own], rules, cfg)


def _check(name: str, value: Any, rules: Iterable[Rule], cfg: CfgNode, instead: str = "") -> None:
    """Raises UserError for the first rule that a value breaks; ``instead`` follows its words."""
    for rule in rules:
        if not rule.holds(value, cfg):
            raise UserError(f"{name} is {value!r}; it must be {rule.words}{instead}")


def merge(cfg: CfgNode, given: CfgNode) -> None:
    """Merges sections of keys and values into a config, which yacs does by type.

    A whole number may stand where a key takes a float, and :data:`AUTO` where some keys take a
    number.

    Raises:
        KeyError, ValueError, AssertionError: yacs refuses a key or a value; a key of
            :data:`KEYS` has none, as in "KEY: null"; or a word that is no number.
    """
    given = copy.deepcopy(given)
    _fit(given, cfg)
    with _words_for_numbers(cfg):
        cfg.merge_from_other_cfg(given)


def merge_words(cfg: CfgNode, given: Mapping[str, str]) -> None:
    """Merges what stands on a command line, by key, as :func:`merge` does."""
    words = []
    for name, word in given.items():
        *sections, own = name.split(".")
        section = cfg
        for key in sections:
            section = section.get(key) if isinstance(section, CfgNode) else None
        before = section.get(own) if isinstance(section, CfgNode) else None
        if isinstance(before, float) and word.lower().lstrip("+.") == "inf":
            word = "1e999"  # yacs reads Python's literals, which have no word for it
        try:
            value = literal_eval(word)
        except (SyntaxError, ValueError):  # a word without quotes
            value = word
        fitted = _fitted(name, value, before)
        words += [name, word if fitted is value else str(fitted)]
    with _words_for_numbers(cfg):
        cfg.merge_from_list(words)


def _fit(given: CfgNode, cfg: CfgNode, section: str = "") -> None:
    """Makes values of the types that their keys take, in place."""
    for own, value in given.items():
        before = cfg.get(own)
        if isinstance(value, CfgNode) and isinstance(before, CfgNode):
            _fit(value, before, f"{section}{own}.")
        else:
            given[own] = _fitted(f"{section}{own}", value, before)


def _fitted(name: str, value: Any, before: Any) -> Any:
    """Returns a whole number as a float where its key has one.

    Raises:
        ValueError: there is no value, or a single one for a section.
    """
    if isinstance(before, CfgNode) and not isinstance(value, dict):
        own = next(iter(before), "KEY")
        raise ValueError(f"{name} is a section of keys; give one of them, such as {name}.{own}")
    if value is None and name in KEYS and before is not None:
        raise ValueError(f"{name} has no value; give one, or leave the key out")
    return float(value) if type(value) is int and isinstance(before, float) else value


@contextmanager
def _words_for_numbers(cfg: CfgNode) -> Iterator[None]:
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
