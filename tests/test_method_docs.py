"""docs/methods: a page for every method."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from ttt_video.config.methods import shipped_methods

PAGES = Path(__file__).resolve().parents[1] / "docs" / "methods"
METHODS = shipped_methods()


@pytest.mark.parametrize("method", METHODS)
def test_page_says_what_it_has_to(method):
    text = (PAGES / f"{METHODS[method].page}.md").read_text(encoding="utf-8")
    assert method in text.splitlines()[0].replace("`", "").removeprefix("# ").split(", ")
    for topic in (r"\*\*Settings|\| setting", r"\*\*Cost", r"[Ss]ection|Appendix|Table|baseline"):
        assert re.search(topic, text), topic


def test_the_table_lists_every_method_with_its_page_and_its_row():
    text = (PAGES / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| \[(\w+)\]\((\w+)\.md\) \| ([^|]*) \|", text, re.MULTILINE)
    assert sorted(name for name, _, _ in rows) == sorted(METHODS)
    for name, page, title in rows:
        assert page == METHODS[name].page
        assert title.startswith(METHODS[name].title)


def test_every_page_is_of_a_method():
    assert {page.stem for page in PAGES.glob("*.md")} == {
        "README",
        *(method.page for method in METHODS.values()),
    }
