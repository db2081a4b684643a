"""The tool as a user runs it; its library is tested in tests/evaluation."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
from summaries import summary, write

from ttt_video.cli import run_tool

TOOL = Path(__file__).resolve().parents[2] / "tools" / "tabulate_runs.py"


@pytest.fixture(scope="module")
def main():
    spec = importlib.util.spec_from_file_location("tabulate_runs", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def test_table_to_a_file_and_to_the_terminal(main, tmp_path, capsys):
    runs = write(tmp_path, summary(frozen=48.0), summary("tent"))
    file = tmp_path / "new" / "table.tex"
    main([*runs, "--output", str(file), "--format", "latex"])
    assert capsys.readouterr().out == f"written to {file}\n"
    assert r"\toprule" in file.read_text()
    main([*runs, "--protocol", "release"])
    assert "| Online TTT-MAE | 49.00 (55.4, -6.40) | 0.500 (4.1) |" in capsys.readouterr().out


def test_mistakes_are_one_line(main, tmp_path, capsys):
    mixed = write(tmp_path, summary(), summary("tent", preset="release"))
    for arguments in (mixed, [str(tmp_path)], [mixed[0], "--output", str(tmp_path)]):
        with pytest.raises(SystemExit) as raised:
            run_tool(lambda arguments=arguments: main(arguments))
        assert raised.value.code == 2
        message = capsys.readouterr().err
        assert message.startswith("error: ")
        assert message.count("\n") == 1


def test_no_tool_hides_a_library():
    # A script's own folder comes first on Python's path: a tools/tabulate.py would be imported by
    # fvcore, and so by every tool, in place of the library of that name.
    elsewhere = [path for path in sys.path if Path(path).resolve() != TOOL.parent]
    finder = importlib.machinery.PathFinder
    for tool in TOOL.parent.glob("*.py"):
        assert finder.find_spec(tool.stem, elsewhere) is None, tool.name
