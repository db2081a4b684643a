"""Every command that README.md shows is run: by .ci/run or by a test named here."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Command as README.md has it, without its comment -> where it is run: ".ci/run" or a test.
RUN_BY = {
    "make demo": ".ci/run",
    "make test": ".ci/run",
}


def commands(markdown: str) -> list[str]:
    """Commands of all ``bash`` blocks: continued lines joined, comments and prompts removed."""
    found = []
    for block in re.findall(r"^```(?:bash|sh|shell|console)\n(.*?)^```", markdown, re.M | re.S):
        for line in block.replace("\\\n", " ").splitlines():
            command = re.sub(r"(^|\s)#.*", "", line).strip().removeprefix("$ ")
            if command:
                found.append(" ".join(command.split()))
    return found


def test_commands_are_found_in_markdown() -> None:
    bash = "```bash\n# first\nmake demo   # minutes\n$ python a.py \\\n    --b 1\n```\n"
    text = bash + "```text\nno\n```\n"
    assert commands(text) == ["make demo", "python a.py --b 1"]


def test_every_command_of_the_readme_is_run_somewhere() -> None:
    shown = commands((ROOT / "README.md").read_text(encoding="utf-8"))
    assert {"make demo", "make test"} <= set(shown)
    assert set(shown) == set(RUN_BY)


@pytest.mark.parametrize(("command", "place"), sorted(RUN_BY.items()))
def test_the_place_that_runs_a_command_exists(command: str, place: str) -> None:
    if place == ".ci/run":
        steps = (ROOT / place).read_text(encoding="utf-8").splitlines()
        assert f"step {command}" in [step.strip() for step in steps]
        return
    file, _, test = place.partition("::")
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    functions = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    assert test in functions
