"""What a page may ask for, and how what it sends is checked."""

from __future__ import annotations

import json
import math
from typing import Any

from ..errors import UserError, suggestion

COMMANDS: dict[str, type | None] = {
    "pause": bool,  # or go on
    "learn": bool,  # or predict only
    "reset": None,  # to the source weights and an empty window
    "keep": None,  # this moment
    "back": int,  # to the kept moment of this number
    "save": bool,  # predictions from now on, or no more
    "method": str,
    "step_size": float,
}
"""Commands with the type of their value; None: they have none."""

LONGEST = 1000
"""Characters of a message that are read."""


def parse_command(text: str) -> tuple[str, Any]:
    """Reads a message such as ``{"do": "learn", "value": false}``.

    Returns:
        The command's name, and its value (None where it has none).

    Raises:
        UserError: it is no such message, or its value is no possible one.
    """
    try:
        message = json.loads(text) if len(text) <= LONGEST else None
    except (ValueError, RecursionError):
        message = None
    if not isinstance(message, dict) or not isinstance(message.get("do"), str):
        raise UserError('a message is JSON, such as {"do": "pause", "value": true}')
    name, value = message["do"], message.get("value")
    if name not in COMMANDS:
        raise UserError(f"no command {name[:40]!r}; {suggestion(name[:40], COMMANDS)}")
    kind = COMMANDS[name]
    if kind is float and type(value) is int:
        value = float(value) if abs(value) < 1e300 else math.inf
    if type(value) is not (kind or type(None)):
        wanted = "no value" if kind is None else f"a value of the kind {kind.__name__}"
        raise UserError(f"{name} takes {wanted}, not {json.dumps(value)[:60]}")
    if isinstance(value, float) and not (math.isfinite(value) and value >= 0):
        raise UserError(f"{name} is {value:g}; give a finite number of at least 0")
    return name, value
