"""docs/methods: a page for every method."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from ttt_video.adaptation import ADAPTER_REGISTRY

PAGES = Path(__file__).resolve().parents[1] / "docs" / "methods"
METHODS = sorted(name for name, _ in ADAPTER_REGISTRY)


@pytest.mark.parametrize("method", METHODS)
def test_page_says_what_it_has_to(method):
    text = (PAGES / f"{method}.md").read_text(encoding="utf-8")
    assert text.splitlines()[0].replace("`", "") == f"# {method}"
    for topic in (r"\*\*Settings|\| setting", r"\*\*Cost", r"[Ss]ection|Appendix|Table|baseline"):
        assert re.search(topic, text), topic


def test_the_table_lists_every_method():
    text = (PAGES / "README.md").read_text(encoding="utf-8")
    rows = "\n".join(line for line in text.splitlines() if line.startswith("| ["))
    assert sorted(re.findall(r"\[(\w+)\]\(\1\.md\)", rows)) == METHODS
