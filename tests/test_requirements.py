"""setup.py, tools/setup_env.py and the pages ask for what the code imports, in one version each."""

from __future__ import annotations

import ast
import itertools
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import setup_env
from source_code import parsed

ROOT = Path(__file__).resolve().parents[1]

DISTRIBUTIONS = {
    "PIL": "Pillow",
    "cv2": "opencv-python-headless",
    "yaml": "PyYAML",
    "torch_ms_deform_attn": "torch-ms-deform-attn",
}
# Not declared: an installed detectron2 is left alone, the second asks for a second OpenCV, and the
# third comes with PyTorch where it can be used.
UNDECLARED = {"detectron2", "imagecorruptions", "triton"}


def arguments_of_setup() -> dict[str, Any]:
    with mock.patch("setuptools.setup") as setup:
        runpy.run_path(str(ROOT / "setup.py"))
    return dict(setup.call_args.kwargs)


SETUP = arguments_of_setup()
REQUIRED = {setup_env.distribution_name(line) for line in SETUP["install_requires"]}
EXTRAS = {
    extra: {setup_env.distribution_name(line) for line in lines}
    for extra, lines in SETUP["extras_require"].items()
}
OPTIONAL = set().union(*(names for extra, names in EXTRAS.items() if extra != "test"))


def imports(path: Path, *, anywhere: bool) -> Iterator[str]:
    """Top-level names of what a file imports; when it is imported itself, or ``anywhere`` in it."""
    tree = parsed(path)
    for node in ast.walk(tree) if anywhere else tree.body:
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.partition(".")[0]


def third_party(folder: str, *, anywhere: bool) -> set[str]:
    """Distributions that the files below a folder import."""
    files = [*(ROOT / folder).rglob("*.py")]
    found = {name for file in files for name in imports(file, anywhere=anywhere)}
    own = {"ttt_video", "ttt_video_cli", *(path.stem for path in (ROOT / "tools").iterdir())}
    found -= sys.stdlib_module_names | own | UNDECLARED
    return {DISTRIBUTIONS.get(name, name) for name in found}


USED = third_party("ttt_video", anywhere=True) | third_party("ttt_video_cli", anywhere=True)


def test_what_the_package_imports_is_required():
    assert third_party("ttt_video", anywhere=False) <= REQUIRED


def test_what_functions_of_the_package_import_is_required_or_in_an_extra():
    assert (
        third_party("ttt_video", anywhere=True) | third_party("ttt_video_cli", anywhere=True)
        <= REQUIRED | OPTIONAL
    )


@pytest.mark.slow
def test_nothing_is_required_that_the_package_does_not_import():
    assert (
        third_party("ttt_video", anywhere=True) | third_party("ttt_video_cli", anywhere=True)
        >= REQUIRED
    )


def test_the_tools_need_nothing_else_and_the_costs_what_their_tests_have():
    tools = {n for path in (ROOT / "tools").glob("*.py") for n in imports(path, anywhere=True)}
    known = {DISTRIBUTIONS.get(name, name) for name in tools - sys.stdlib_module_names}
    assert known & (OPTIONAL | EXTRAS["test"]) == set()
    assert third_party("tools/costs", anywhere=True) <= REQUIRED | EXTRAS["test"]


def test_requirements_leave_an_environment_with_detectron2_alone():
    """No upper bound that would take a version back, no second OpenCV, no detectron2."""
    assert [line for line in SETUP["install_requires"] if re.search(r"<|==|~=|!=", line)] == []
    assert not re.search("opencv|detectron2", " ".join(SETUP["install_requires"]))


@pytest.mark.slow
@pytest.mark.parametrize("extra", ["", "[opencv]"])
def test_pip_would_add_the_project_alone(extra: str, tmp_path: Path):
    for name in ("setup.py", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("ttt_video", "configs"):
        ignore = shutil.ignore_patterns("__pycache__", "*.safetensors")
        shutil.copytree(ROOT / name, tmp_path / name, ignore=ignore)
    command = ["-m", "pip", "install", "--dry-run", "--no-index", "--no-build-isolation"]
    source = f"ttt_video{extra} @ {tmp_path.as_uri()}"
    done = subprocess.run(
        [sys.executable, *command, source], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    (would,) = re.findall(r"^Would install (.*)$", done.stdout, re.M)
    assert re.fullmatch(r"ttt_video-[\d.]+", would.replace("-video", "_video"))


# ---- one place for each version


def pinned(text: str) -> set[tuple[str, str]]:
    """Names and bounds of the requirements in a text."""
    found = re.findall(r"\b([A-Za-z][\w-]*)((?:[<>=~!]=|<)[\d.]+(?:,<[\d.]+)?)", text)
    return {(name.lower().replace("_", "-"), bound.rstrip(".")) for name, bound in found}


def test_requirements_are_found_in_text():
    text = "`pip install 'a_b>=1.2,<6'` and C==1.0. d<2, no e = 1"
    assert pinned(text) == {("a-b", ">=1.2,<6"), ("c", "==1.0"), ("d", "<2")}


def test_every_bound_of_setup_py_is_the_same_wherever_it_stands():
    lists = [SETUP["install_requires"], *SETUP["extras_require"].values()]
    declared = pinned("\n".join(itertools.chain(*lists)))
    bounds = dict(declared) | dict(pinned("\n".join(setup_env.WITHOUT_REQUIREMENTS.values())))
    assert len(declared) == len(dict(declared)), "a library stands in two extras with two bounds"
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    code = [*(ROOT / "tools").rglob("*.py"), *(ROOT / "ttt_video").rglob("*.py")]
    others = {
        (name, bound)
        for path in [*pages, *code]
        for name, bound in pinned(path.read_text("utf-8"))
        if bounds.get(name, bound) != bound
    }
    # The numpy that PyPI's copy of detectron2 puts up with is no requirement of this project.
    assert others <= {("numpy", "<2")}


def test_python_versions_agree():
    assert SETUP["python_requires"] == ">=" + ".".join(map(str, setup_env.FIRST_PYTHON))
    listed = [c.rpartition(" ")[2] for c in SETUP["classifiers"] if re.search(r":: 3\.\d+$", c)]
    assert f"Python {listed[0]} to {listed[-1]}" in (ROOT / "README.md").read_text("utf-8")
    assert listed[0] == SETUP["python_requires"].removeprefix(">=")
