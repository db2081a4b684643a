"""Checks the entries of a sweep file; a mistake is told in one line."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ..errors import UserError, suggestion

SWEEP_KEYS = (
    "config", "preset", "weights", "frames", "compare", "settings", "seeds", "sources", "rows",
    "baseline", "figures", "protocol", "quick",
)  # fmt: skip
ROW_KEYS = (
    "method", "config", "preset", "weights", "settings", "sources", "seeds", "labels", "clip",
)  # fmt: skip
SOURCE_KINDS = ("dataset", "video", "video-dir", "world")
SOURCE_KEYS = (*SOURCE_KINDS, "config", "weights", "settings")
FIGURE_KEYS = ("curve", "levels", "bars", "gain_against_time", "over_time")


def is_text(value: Any) -> bool:
    """Returns whether a value is a name or path; YAML reads one such as 2024 as a number."""
    return isinstance(value, str | int | float) and not isinstance(value, bool) and value != ""


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_list(value: Any, of: Callable[[Any], bool]) -> bool:
    return isinstance(value, list) and all(map(of, value))


def _is_weights(value: Any) -> bool:
    """Returns whether a value is a file, or in a row a mapping from sources to files."""
    return is_text(value) or (
        isinstance(value, dict) and bool(value) and all(map(is_text, [*value, *value.values()]))
    )


_TEXT = (is_text, "give one name or path")
_FLAG = (lambda value: isinstance(value, bool), "give True or False")
_KINDS: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(("config", "preset", "method", "baseline", "protocol"), _TEXT),
    **dict.fromkeys(("dataset", "video", "video-dir"), _TEXT),
    **dict.fromkeys(("compare", "labels", "clip", "bars", "gain_against_time"), _FLAG),
    "weights": (_is_weights, "give one file, or in a row one for each of some sources"),
    "frames": (lambda value: _is_whole(value) and value >= 1, "give a whole number, at least 1"),
    "seeds": (lambda value: bool(value) and _is_list(value, _is_whole), "give a list of integers"),
    **dict.fromkeys(
        ("over_time", "levels"), (lambda value: _is_list(value, is_text), "give a list of rows")
    ),
    "curve": (lambda value: isinstance(value, str), "name the setting on its x axis"),
}
"""A check by name of entry, with the fix to tell. Entries that are sections have none."""


def section(value: Any, where: str, keys: Iterable[str], file: str = "") -> dict[str, Any]:
    """Returns the entries of a section that have a value.

    Args:
        value: the section.
        where: its place; "" is the whole file.
        keys: the entries that it may have.
        file: name of the file, if the section is the whole file.

    Raises:
        UserError: it is no mapping, or an entry is unknown or of the wrong kind.
    """
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise UserError(f"{where or file} is {value!r}; it must be a mapping of {', '.join(keys)}")
    for key, entry in value.items():
        if key not in keys:
            raise UserError(f"{where or file}: no entry {key!r}; {suggestion(str(key), keys)}")
        if entry is not None and key in _KINDS and not _KINDS[key][0](entry):
            place = f"{where}.{key}" if where else key
            raise UserError(f"{place} is {entry!r}; {_KINDS[key][1]}")
    return {key: entry for key, entry in value.items() if entry is not None}


def named_sections(
    spec: Mapping[str, Any], name: str, keys: Iterable[str]
) -> dict[str, dict[str, Any]]:
    """Returns the rows or the sources by name, at least one."""
    sections = spec.get(name)
    if not isinstance(sections, dict) or not sections:
        raise UserError(f"{name} is {sections!r}; it must map at least one name to its entries")
    if "" in sections:
        raise UserError(f"{name} has an entry without a name")
    return {str(k): section(v, f"{name}.{k}", keys) for k, v in sections.items()}


def grid(settings: Any, where: str) -> dict[str, list[Any]]:
    """Returns the values to try by key; a list is an axis, anything else is one value."""
    if settings is None:
        return {}
    if not isinstance(settings, dict):
        raise UserError(f"{where} is {settings!r}; it must map config keys to values")
    axes = {key: v if isinstance(v, list) else [v] for key, v in settings.items()}
    for key, values in axes.items():
        if not isinstance(key, str):
            raise UserError(f"{where}: {key!r} is no config key, such as TTT.WINDOW_SIZE")
        if key == "SEED":
            raise UserError(f"{where}.SEED: give seeds, a list, instead")
        if key == "OUTPUT_DIR":
            raise UserError(
                f"{where}.OUTPUT_DIR is for training; the cells' folders are below --output: "
                "remove it"
            )
        if not values:
            raise UserError(f"{where}.{key} is an empty list; give at least one value")
        if any(isinstance(v, dict) or v is None for v in values):
            raise UserError(f"{where}.{key} is {settings[key]!r}; give a value, or a list of some")
    return axes


def row_sources(name: str, row: Mapping[str, Any], known: Iterable[str]) -> list[str]:
    """Returns the sources that a row runs on: all, unless it names some."""
    chosen = row.get("sources", [*known])
    if not _is_list(chosen, is_text) or not chosen or not {*map(str, chosen)} <= {*known}:
        raise UserError(
            f"rows.{name}.sources is {chosen!r}; give a list of some of {', '.join(known)}"
        )
    return [*map(str, chosen)]


def one_of(value: Any, choices: Iterable[str], where: str) -> str:
    """Returns the value; raises UserError if it is none of the choices."""
    if value not in [*choices]:
        raise UserError(f"{where} is {value!r}; choose from {', '.join(choices)}")
    return str(value)
