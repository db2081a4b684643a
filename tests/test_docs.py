"""The manual: links lead somewhere, named files and config keys exist, and no page is lost."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.config import CfgNode
from PIL import Image

from ttt_video import tasks
from ttt_video.config import get_cfg

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
FRONT = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "MODEL_ZOO.md")]
MANUAL = [
    *FRONT,
    ROOT / "datasets" / "README.md",
    *sorted(page for page in DOCS.rglob("*.md") if page.parent.name != "log"),
]
# What was true on a day: its links have to work, but the files and keys it names may be gone.
HISTORY = [ROOT / "CHANGELOG.md", *sorted((DOCS / "log").glob("*.md"))]
# Parts of the repository whose files are named by their path from its top.
FOLDERS = (".ci", "configs", "docs", "examples", "tests", "tools", "ttt_video")


def prose(markdown: str) -> str:
    """The text without its code blocks."""
    return re.sub(r"^```.*?^```", "", markdown, flags=re.M | re.S)


def links(markdown: str) -> list[str]:
    """Targets of links and pictures that are no web addresses."""
    found = re.findall(r"\]\(([^)\s]+)\)", prose(markdown))
    return [link for link in found if not re.match(r"https?://", link)]


def anchors(markdown: str) -> set[str]:
    """What GitHub calls the headings of a page in links to them (no heading stands twice)."""
    headings = re.findall(r"^#+ (.*)", prose(markdown), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in headings}


def paths(markdown: str) -> set[str]:
    """Files and folders of the repository that a page names, in text and in commands."""
    places = "|".join(map(re.escape, FOLDERS))
    markdown = re.sub(r"\[[^]]*\]\([^)]*\)", "", markdown)  # links have a test of their own
    named = re.findall(rf"(?<![\w./-])((?:{places})/[\w./-]*[\w/])(?![\w<{{*]|\.\w)", markdown)
    scripts = re.findall(r"(?<![\w./-])datasets/\w+\.py", markdown)
    return {*named, *scripts}


def configs(markdown: str) -> set[str]:
    """Config files that a page names as the tools take them, and sweeps."""
    given = re.findall(r"(?:--config |`)((?:quick/|baselines/|joint_)\w+\.yaml)", markdown)
    sweeps = re.findall(r"tools/sweep\.py ([a-z_]+)\b", markdown)
    return {*given, *(f"sweeps/{name}.yaml" for name in sweeps)}


def keys(markdown: str) -> set[str]:
    """Config keys that are written out; those of Python code may be declared there."""
    text = re.sub(r"```python\n.*?```", "", markdown, flags=re.DOTALL)
    return set(re.findall(r"\b(?:TTT|MODEL|SOLVER|INPUT)(?:\.[A-Z][A-Z0-9_]*)+\b", text))


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@cache
def config() -> CfgNode:
    return get_cfg()


def test_links_paths_and_keys_are_found_in_markdown() -> None:
    text = (
        "# One: `two`\n[a](b.md#c) ![d](e/f.png) [g](https://h.i)\n```bash\n[x](y)\n"
        "python tools/k.py --config quick/l.yaml TTT.M 1\n```\n"
        "`ttt_video/n/`, configs/methods/NAME.yaml, [`tools/z.py`](../w.py), `docs/<date>-o.md`,\n"
        "`p/tools/q.py`, `tools/sweep.py r_s`\n"
    )
    assert links(text) == ["b.md#c", "e/f.png", "../w.py"]
    assert anchors(text) == {"one-two"}
    assert paths(text) == {
        "tools/k.py", "ttt_video/n/", "configs/methods/NAME.yaml", "tools/sweep.py",
    }  # fmt: skip
    assert configs(text) == {"quick/l.yaml", "sweeps/r_s.yaml"}
    assert keys(text) == {"TTT.M"}


@pytest.mark.parametrize("page", [*MANUAL, *HISTORY], ids=name)
def test_links_lead_to_a_file_and_a_heading(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for link in links(text):
        file, _, anchor = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target.read_text(encoding="utf-8")), link


@pytest.mark.parametrize("page", MANUAL, ids=name)
def test_files_that_a_page_names_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    missing = [path for path in sorted(paths(text)) if not re.search(r"NAME|any_light", path)]
    missing = [path for path in missing if not (ROOT / path).exists()]
    missing += [path for path in sorted(configs(text)) if not (ROOT / "configs" / path).is_file()]
    assert missing == []


@pytest.mark.parametrize("page", MANUAL, ids=name)
def test_config_keys_that_a_page_names_exist(page: Path) -> None:
    for key in sorted(keys(page.read_text(encoding="utf-8"))):
        node = config()
        for part in key.split("."):
            assert part in node, key
            node = node[part]


def test_the_contents_list_every_page() -> None:
    for folder in (DOCS, DOCS / "log"):
        listed = links((folder / "README.md").read_text(encoding="utf-8"))
        pages = {page.name for page in folder.glob("*.md")} - {"README.md"}
        assert pages <= set(listed), folder.name
    assert {"methods/README.md", "log/README.md", "../CONTRIBUTING.md"} <= set(
        links((DOCS / "README.md").read_text(encoding="utf-8"))
    )


def test_reports_are_named_by_date_subject_and_machine() -> None:
    for page in (DOCS / "log").glob("*.md"):
        if page.name != "README.md":
            assert re.fullmatch(r"20\d\d-\d\d-\d\d(-[a-z0-9]+){2,}", page.stem), page.name
            date = page.stem[:10]
            assert re.search(rf"\b{date}\b", page.read_text(encoding="utf-8")), page.name


@pytest.mark.parametrize("page", ["benchmark.md", "PERFORMANCE.md"])
def test_answers_are_short(page: str) -> None:
    assert len((DOCS / page).read_text(encoding="utf-8").splitlines()) < 130


def test_the_task_in_the_recipe_works(tmp_path: Path) -> None:
    (block,) = re.findall(r"^```python\n(.*?)^```", FRONT[1].read_text("utf-8"), re.M | re.S)
    names: dict[str, Any] = {}
    exec(block, names)
    try:
        task = names["HorizonTask"]
        metric = task.metrics["horizon_error"]
        records, value = metric.example
        tally = task.tally()
        for index, record in enumerate(records):
            tally.add(index, record)
        assert metric.value(task.tally.joined([tally], tasks.LabelInfo())) == value

        labels = np.zeros((8, 6), np.uint8)
        labels[:4] = 10  # sky down to row 3
        Image.fromarray(labels).save(tmp_path / "labels.png")
        output = {"sem_seg": torch.zeros(19, 8, 6)}
        output["sem_seg"][10, :6] = 1.0  # to row 5
        frame = {"sem_seg_file_name": str(tmp_path / "labels.png")}
        assert task().record(frame, output) == {"error": 2, "frames": 1}
    finally:
        tasks.TASK_REGISTRY._obj_map.pop("HorizonTask", None)
