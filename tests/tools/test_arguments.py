"""Command lines of all tools: what they answer before anything that takes seconds is imported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import _arguments
import make_world
import pytest
import train_net
from detectron2.engine import default_argument_parser

from ttt_video.adaptation import method_names
from ttt_video.adaptation.settings import PRECISIONS
from ttt_video.config import PRESETS
from ttt_video.report.tables import FORMATS, LAYOUTS
from ttt_video.tasks.metrics import PROTOCOLS
from ttt_video.world import corruptions, layouts, shifts, style

FOLDER = Path(_arguments.__file__).parent
SCRIPTS = (*FOLDER.glob("[!_]*.py"), *(FOLDER.parent / "datasets").glob("*.py"))
TOOLS = sorted(str(path.relative_to(FOLDER.parent)) for path in SCRIPTS)

# Runs every tool as a script with each of some command lines, in one fresh process: what it says,
# its exit code, and what is imported after it that takes long.
HARNESS = """
import contextlib, io, json, runpy, sys
root, tools, lines = json.loads(sys.argv[1])
sys.path.insert(0, f"{root}/tools")
answers = {}
for tool in tools:
    for line in lines:
        sys.argv = [tool, *line]
        out, err, code = io.StringIO(), io.StringIO(), None
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                runpy.run_path(f"{root}/{tool}", run_name="__main__")
            except SystemExit as stop:
                code = stop.code or 0
        heavy = [m for m in ("torch", "detectron2", "ttt_video", "numpy") if m in sys.modules]
        answers[" ".join([tool, *line])] = [code, out.getvalue(), err.getvalue(), heavy]
print(json.dumps(answers))
"""


def answers(tools: list[str], lines: list[list[str]]) -> dict[str, list]:
    job = json.dumps([str(FOLDER.parent), tools, lines])
    done = subprocess.run(
        [sys.executable, "-c", HARNESS, job], capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout)


def test_help_imports_nothing_that_takes_long():
    assert len(TOOLS) >= 15
    subcommands = answers(["tools/measure_costs.py"], [["all", "--help"]])
    for line, (code, out, err, heavy) in {**answers(TOOLS, [["--help"]]), **subcommands}.items():
        assert (code, err, heavy) == (0, "", []), line
        assert Path(line.split()[0]).name in out, line


def test_wrong_arguments_are_one_line_and_import_nothing_that_takes_long():
    for line, (code, out, err, heavy) in answers(TOOLS, [["--no-such-flag", "x"]]).items():
        assert (code, out, heavy) == (2, "", []), line
        assert err.startswith("error: "), line
        assert err.count("\n") == 1, line


def test_names_are_those_of_the_package():
    assert _arguments.method_names() == method_names()
    assert _arguments.PRESETS == PRESETS
    assert tuple(PRECISIONS) == _arguments.PRECISIONS
    assert tuple(PROTOCOLS) == _arguments.PROTOCOLS
    assert tuple(LAYOUTS) == _arguments.TABLE_LAYOUTS
    assert tuple(FORMATS) == _arguments.TABLE_FORMATS
    assert _arguments.SCENES == style.SCENES
    assert _arguments.SCHEDULES == shifts.SCHEDULES
    assert tuple(shifts.FAMILIES) == _arguments.SPLITS
    assert tuple(layouts.VIDEO_DATASETS) == _arguments.VIDEO_LAYOUTS


def test_corruptions_that_help_names_exist():
    (action,) = [a for a in make_world.argument_parser()._actions if a.dest == "corruption"]
    named = action.help.split(" and others")[0].split(", ")
    assert set(named) <= set(corruptions.CORRUPTIONS)


def test_train_net_has_detectron2s_flags():
    ours, theirs = vars(train_net.argument_parser().parse_args([])), default_argument_parser()
    wanted = {**vars(theirs.parse_args([])), "config_file": None}
    assert wanted.items() <= ours.items()


def test_config_arguments():
    parser = _arguments.ToolParser()
    _arguments.add_config_arguments(parser)
    args = parser.parse_args(["--config", "a.yaml", "--preset", "paper", "SEED", "3"])
    assert (args.config_file, args.preset, args.opts) == ("a.yaml", "paper", ["SEED", "3"])
    assert parser.parse_args(["--config-file", "b.yaml"]).config_file == "b.yaml"
    assert parser.parse_args([]).opts == []
    assert not args.allow_unsafe_yaml
    assert parser.parse_args(["--allow-unsafe-yaml"]).allow_unsafe_yaml
    with pytest.raises(SystemExit) as error:
        parser.parse_args(["--preset", "mine"])
    assert error.value.code == 2


# As those libraries word them; "of ours" stands for any other warning.
WARN = """
import warnings
warnings.warn("`torch.jit.script` is deprecated. Please switch to", FutureWarning)
warnings.warn("torch.meshgrid: in an upcoming release, it will be required", UserWarning)
warnings.warn("pkg_resources is deprecated as an API. See", UserWarning)
warnings.warn("of ours", UserWarning)
"""
RUN = """
import runpy, subprocess, sys
sys.path.insert(0, sys.argv[1])
import _arguments
_arguments.answer_first(sys.argv[3], lambda: None)
runpy.run_path(sys.argv[2])
subprocess.run([sys.executable, sys.argv[2]], check=True)
"""


@pytest.mark.parametrize("name", ["__main__", "stream_eval"])
def test_warnings_of_other_libraries_are_silenced_in_tools_alone(name, tmp_path):
    script = tmp_path / "warn.py"
    script.write_text(WARN)
    command = [sys.executable, "-c", RUN, str(FOLDER), str(script), name]
    # Other tests run tools in this process, and so leave the variable.
    plain = {key: value for key, value in os.environ.items() if key != "PYTHONWARNINGS"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=plain)
    warned = [line for line in done.stderr.splitlines() if "Warning: " in line]
    # In the process and in one that it starts.
    others = 0 if name == "__main__" else 2
    expected = {"jit": others, "meshgrid": others, "pkg_resources": others, "of ours": 2}
    assert {key: sum(key in line for line in warned) for key in expected} == expected
