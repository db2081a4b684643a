"""Rooms of the package and their layers: a room imports from those below it and no others."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from source_code import parsed

ROOT = Path(__file__).parents[1]

# From the bottom to the top. A room is a folder of the package, or a file at its top. Rooms of one
# layer know nothing of each other.
LAYERS: list[set[str]] = [
    {"errors", "version", "structures", "shipped"},
    {"color", "config", "files", "plugins", "processes"},
    {"formats", "modeling", "visualization"},
    {"tasks"},
    {"adaptation", "data"},
    {"world", "stream"},
    {"training", "sweeps", "locality", "live", "export"},
    {"report"},
    {"cli"},
    {"", "__main__"},  # ttt_video/__init__.py, which registers what the rooms have; `python -m`
]


def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name."""
    found = {}
    for path in sorted((ROOT / "ttt_video").rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(name: str, path: Path, known: dict[str, Path]) -> Iterator[str]:
    """The package's modules that a module imports, also inside functions."""
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) + 1 - node.level] if node.level else []
            base = ".".join([*start, *([node.module] if node.module else [])])
            if base in known:
                for alias in node.names:
                    full = f"{base}.{alias.name}"
                    yield full if full in known else base


def room(module: str) -> str:
    """The room of ``ttt_video.ROOM.file``; "" of the package's own file."""
    return module.partition(".")[2].partition(".")[0]


GRAPH = {name: set(imports(name, path, modules())) - {name} for name, path in modules().items()}


def test_every_room_has_one_layer():
    listed = [name for layer in LAYERS for name in layer]
    assert sorted(listed) == sorted({room(module) for module in GRAPH})


@pytest.mark.parametrize("module", GRAPH)
def test_imports_point_down(module):
    height = {name: i for i, layer in enumerate(LAYERS) for name in layer}
    own = room(module)
    upward = [m for m in GRAPH[module] if room(m) != own and height[room(m)] >= height[own]]
    assert upward == []


def test_no_module_imports_itself_through_others():
    # A file of a room may take names from the room's __init__ if that was there before it.
    files = {m: {d for d in deps if not m.startswith(f"{d}.")} for m, deps in GRAPH.items()}
    assert len(list(TopologicalSorter(files).static_order())) == len(GRAPH)  # else CycleError
