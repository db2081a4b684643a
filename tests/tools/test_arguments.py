"""Command lines of commands and scripts: what is answered before anything heavy is imported."""

from __future__ import annotations

import importlib
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from detectron2.engine import default_argument_parser

import ttt_video_cli
from ttt_video.adaptation import method_names
from ttt_video.adaptation.precision import PRECISIONS
from ttt_video.config import PRESETS, get_cfg
from ttt_video.report.tables import FORMATS, LAYOUTS
from ttt_video.tasks.metrics import PROTOCOLS
from ttt_video.version import __version__
from ttt_video.world import corruptions, layouts, shifts, style
from ttt_video_cli import COMMANDS, arguments, train, world

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = (*(ROOT / "tools").glob("[!_]*.py"), *(ROOT / "datasets").glob("*.py"))
TOOLS = sorted(str(path.relative_to(ROOT)) for path in SCRIPTS)
EVERY = [*TOOLS, "ttt-video", *(f"ttt-video {name}" for name in COMMANDS)]

# Runs scripts and commands with each of some command lines, in one fresh process: what each says,
# its exit code, and what is imported after it that takes long.
HARNESS = """
import contextlib, io, json, runpy, sys
root, tools, lines = json.loads(sys.argv[1])
sys.path[:0] = [f"{root}/tools", root]
import ttt_video_cli
answers = {}
for tool in tools:
    for line in lines:
        script, *words = tool.split()
        sys.argv = [script, *words, *line]
        out, err, code = io.StringIO(), io.StringIO(), None
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                if script == "ttt-video":
                    ttt_video_cli.main()
                else:
                    runpy.run_path(f"{root}/{tool}", run_name="__main__")
            except SystemExit as stop:
                code = stop.code or 0
        heavy = [m for m in ("torch", "detectron2", "ttt_video", "numpy") if m in sys.modules]
        answers[" ".join([tool, *line])] = [code, out.getvalue(), err.getvalue(), heavy]
print(json.dumps(answers))
"""


def answers(tools: list[str], lines: list[list[str]]) -> dict[str, list]:
    job = json.dumps([str(ROOT), tools, lines])
    done = subprocess.run(
        [sys.executable, "-c", HARNESS, job], capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout)


def test_help_imports_nothing_that_takes_long():
    assert len(TOOLS) >= 15
    subcommands = answers(["tools/measure_costs.py"], [["all", "--help"]])
    for line, (code, out, err, heavy) in {**answers(EVERY, [["--help"]]), **subcommands}.items():
        assert (code, err, heavy) == (0, "", []), line
        assert Path(line.split()[0]).name in out, line


def test_wrong_arguments_are_one_line_and_import_nothing_that_takes_long():
    said = answers([*EVERY, "ttt-video weights", "ttt-video nonsense"], [["--no-such-flag", "x"]])
    assert len(said) == len(EVERY) + 2
    for line, (code, out, err, heavy) in said.items():
        assert (code, out, heavy) == (2, "", []), line
        assert err.startswith("error: "), line
        assert err.count("\n") == 1, line


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "usage: ttt-video [-h] [--version] COMMAND ...\n\ncommands:\n  stream "),
        (["weights"], "usage: ttt-video weights [-h] COMMAND ...\n\ncommands:\n  convert "),
        (["steam"], "error: no command 'steam': did you mean stream; ttt-video --help"),
        (
            ["demo"],
            "error: no command 'demo': choose from stream, live, train, sweep, table, plot, ",
        ),
        (["weights", "norm"], "error: no command 'norm': did you mean norms; ttt-video wei"),
        (["stream"], "error: no video: give --video FILE, --video-dir DIR, --dataset NAME, --c"),
        (["stream", "a.mp4"], "error: no video: give --video FILE, --video-dir DIR, --dataset "),
        (["stream", "--video", "a", "--latest"], "error: --latest is for --camera and --source; "),
        (
            ["stream", "--camera", "0", "--duration", "0"],
            "error: --duration is 0; give a ",
        ),
        (["stream", "--camera", "0", "--video", "a"], "error: argument --video: not allowed with "),
        (["stream", "--vidoe", "a.mp4"], "error: unrecognized arguments: --vidoe; ttt-video str"),
        (["sweep"], "error: the following arguments are required: SWEEP; ttt-video sweep --help"),
        (["stream", "--preset", "x"], "error: argument --preset: invalid choice: 'x' (choose fr"),
        (["weights", "convert", "a"], "error: give IN and OUT, or --inspect FILE; ttt-video weig"),
    ],
)
def test_what_is_missing_or_misspelt_is_named(words, said, capsys):
    with pytest.raises(SystemExit) as stop:
        ttt_video_cli.main(words)
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith(said)


def test_a_video_without_its_flag_is_named(capsys):
    with pytest.raises(SystemExit):
        ttt_video_cli.main(["stream", "a.mp4"])
    assert "; 'a.mp4' stands where KEY VALUE overrides do; " in capsys.readouterr().err


def test_version_is_that_of_the_package(capsys):
    with pytest.raises(SystemExit) as stop:
        ttt_video_cli.main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"ttt-video {__version__}\n"


def test_help_lists_every_command(capsys):
    for words in (["--help"], ["weights", "--help"]):
        with pytest.raises(SystemExit):
            ttt_video_cli.main(words)
    every, weights = capsys.readouterr().out.split("usage: ")[1:]
    for name, text in COMMANDS.items():
        (line,) = [line for line in every.splitlines() if line.startswith(f"  {name} ")]
        assert line.endswith(text)
        assert (text in weights) == name.startswith("weights ")


def test_every_tool_is_a_command_or_no_part_of_the_package():
    """A command's script runs it under its own name, and holds nothing else."""
    own = {"demo.py", "measure_costs.py", "setup_env.py"}
    scripts = [path for path in (ROOT / "tools").glob("[!_]*.py") if path.name not in own]
    started = {runpy.run_path(str(path))["main"].args for path in scripts}
    assert started == {(name,) for name in COMMANDS}
    for path in scripts:
        (name,) = [name for name in COMMANDS if f'start("{name}")' in path.read_text("utf-8")]
        assert runpy.run_path(str(path))["main"].args == (name,)


def test_names_are_those_of_the_package():
    assert arguments.method_names() == method_names()
    assert arguments.PRESETS == PRESETS
    assert tuple(PRECISIONS) == arguments.PRECISIONS
    assert tuple(PROTOCOLS) == arguments.PROTOCOLS
    assert (*LAYOUTS, "images", "table2") == arguments.TABLE_LAYOUTS
    assert tuple(FORMATS) == arguments.TABLE_FORMATS
    assert arguments.SCENES == style.SCENES
    assert arguments.SCHEDULES == shifts.SCHEDULES
    assert tuple(shifts.FAMILIES) == arguments.SPLITS
    assert tuple(layouts.VIDEO_DATASETS) == arguments.VIDEO_LAYOUTS


def test_corruptions_that_help_names_exist():
    (action,) = [a for a in world.argument_parser()._actions if a.dest == "corruption"]
    named = action.help.split(" and others")[0].split(", ")
    assert set(named) <= set(corruptions.CORRUPTIONS)


def test_train_net_has_detectron2s_flags():
    ours, theirs = vars(train.argument_parser().parse([])), default_argument_parser()
    wanted = {**vars(theirs.parse_args([])), "config_file": None}
    assert wanted.items() <= ours.items()


def test_config_arguments():
    parser = arguments.ToolParser()
    arguments.add_config_arguments(parser)
    args = parser.parse_args(["--config", "a.yaml", "--preset", "paper", "SEED", "3"])
    assert (args.config_file, args.preset, args.opts) == ("a.yaml", "paper", ["SEED", "3"])
    assert parser.parse_args(["--config-file", "b.yaml"]).config_file == "b.yaml"
    assert parser.parse_args([]).opts == []
    assert not args.allow_unsafe_yaml
    assert parser.parse_args(["--allow-unsafe-yaml"]).allow_unsafe_yaml
    with pytest.raises(SystemExit) as error:
        parser.parse_args(["--preset", "mine"])
    assert error.value.code == 2


def test_output_dir_is_refused_by_every_command_that_does_not_train():
    """It was ignored: the results went to --output, or to a folder with a date."""
    parsers = {}
    for name in COMMANDS:
        module = importlib.import_module(f"ttt_video_cli.{name.replace(' ', '_')}")
        parsers[f"ttt-video {name}"] = module.argument_parser()
    overridden = [
        name
        for name, parser in parsers.items()
        if any(action.dest == "opts" for action in parser._actions)
    ]
    assert len(overridden) >= 10
    others = sorted({*overridden} - {"ttt-video train", "ttt-video sweep"})
    words = ["OUTPUT_DIR", "output/x"]
    said = {
        **answers([*others, "tools/demo.py"], [words, ["SEED", "3", *words, "TTT.STEPS", "1"]]),
        **answers(["ttt-video sweep"], [["world", *words], ["a", "--quick", *words]]),
        **answers(["tools/measure_costs.py"], [["loop", *words], ["all", "SEED", "3", *words]]),
    }
    for line, (code, out, err, heavy) in said.items():
        assert (code, out, heavy) == (2, "", []), line
        assert err.startswith("error: OUTPUT_DIR is for training; say --output output/x; "), line
        assert err.count("\n") == 1, line
    assert parsers["ttt-video train"].parse(words).opts == words
    ((_, _, err, _),) = answers(["ttt-video stream"], [["OUTPUT_DIR"]]).values()
    assert err.startswith("error: OUTPUT_DIR is for training; say --output PATH; ")
    # Only the key itself.
    free = ["MODEL.WEIGHTS", "OUTPUT_DIR", "MODEL.OUTPUT_DIR", "x"]
    assert parsers["ttt-video steps"].parse(["--dataset", "a", "--output", "b", *free]).opts == free


def test_a_missing_detectron2_is_one_line_with_what_installs_it(monkeypatch, capsys):
    """A wheel cannot ask pip for it, so that many will start without it."""
    monkeypatch.setitem(sys.modules, "detectron2", None)
    with pytest.raises(SystemExit) as end:
        ttt_video_cli.main(["stream", "--video", "street.mp4"])
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(
        "error: detectron2 is missing: pip install --no-build-isolation git+http"
    )


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
from ttt_video_cli import arguments
arguments.answer_first(sys.argv[3], lambda: None)
runpy.run_path(sys.argv[2])
subprocess.run([sys.executable, sys.argv[2]], check=True)
"""


@pytest.mark.parametrize("name", ["__main__", "stream_eval"])
def test_warnings_of_other_libraries_are_silenced_in_tools_alone(name, tmp_path):
    script = tmp_path / "warn.py"
    script.write_text(WARN)
    command = [sys.executable, "-c", RUN, str(ROOT), str(script), name]
    # Other tests run tools in this process, and so leave the variable.
    plain = {key: value for key, value in os.environ.items() if key != "PYTHONWARNINGS"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=plain)
    warned = [line for line in done.stderr.splitlines() if "Warning: " in line]
    # In the process and in one that it starts.
    others = 0 if name == "__main__" else 2
    expected = {"jit": others, "meshgrid": others, "pkg_resources": others, "of ours": 2}
    assert {key: sum(key in line for line in warned) for key in expected} == expected


@pytest.mark.parametrize("name", ["colors", "gradients", "norms"])
def test_what_is_measured_on_training_images_takes_the_config_s_or_those_that_are_named(name):
    module = importlib.import_module(f"ttt_video_cli.weights_{name}")
    parser = module.argument_parser()
    cfg = get_cfg()
    cfg.DATASETS.TRAIN = ("first", "second")
    named = parser.parse_args(["--output", "a.safetensors", "--dataset", "own"])
    assert module.measured_on(named, cfg) == (["own"], "own")
    default = parser.parse_args(["--output", "a.safetensors"])
    assert module.measured_on(default, cfg) == (["first", "second"], "first + second")
