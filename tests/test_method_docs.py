"""docs/methods: a page for every method, with keys that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from ttt_video.adaptation import ADAPTER_REGISTRY
from ttt_video.cli import load_config

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


@pytest.mark.parametrize("page", sorted(PAGES.glob("*.md")), ids=lambda page: page.stem)
def test_keys_and_links_on_the_page_exist(page):
    text = page.read_text(encoding="utf-8")
    text = re.sub(r"```python\n.*?```", "", text, flags=re.DOTALL)  # has keys of its own
    for key in set(re.findall(r"\bTTT(?:\.[A-Z][A-Z0-9_]*)+\b", text)):
        node = load_config(None)
        for part in key.split("."):
            assert part in node, key
            node = node[part]
    for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
        assert (page.parent / link).exists(), link
