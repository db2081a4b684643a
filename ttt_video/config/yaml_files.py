"""Reads YAML, and refuses what PyYAML takes without a word: a key that stands twice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from ..errors import UserError


def compose_yaml(text: str | bytes, name: str) -> yaml.Node | None:
    """Returns the nodes of a document, None for an empty one. No tag runs code.

    Args:
        text: of the document.
        name: of the file, for messages.

    Raises:
        UserError: a key stands twice in one section. PyYAML would take the last one.
        yaml.YAMLError: it is no YAML.
    """
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    nodes, seen = [root], set()
    while nodes:
        node = nodes.pop()
        if id(node) in seen:  # an alias
            continue
        seen.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            nodes += node.value
        elif isinstance(node, yaml.MappingNode):
            nodes += [value for _, value in node.value]
            lines: dict[tuple[str, str], int] = {}
            for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
                line = key.start_mark.line + 1
                known = (key.tag, key.value)
                if known in lines:
                    raise UserError(
                        f"{name}: {key.value} stands twice in one section, in lines "
                        f"{lines[known]} and {line}; leave one out"
                    )
                lines[known] = line
    return root


def load_yaml(text: str | bytes, name: str) -> Any:
    """Returns the values of a document without tags that run code; errors as above."""
    root = compose_yaml(text, name)
    return None if root is None else yaml.SafeLoader("").construct_document(root)


def read_yaml(file: Path) -> Any:
    """Returns the values of a file; also raises OSError."""
    return load_yaml(file.read_bytes(), str(file))
