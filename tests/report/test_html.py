import base64
from html.parser import HTMLParser

import pytest

from ttt_video.errors import UserError
from ttt_video.report.formats import Table
from ttt_video.report.html import HtmlFile, HtmlSection, write_html


class Page(HTMLParser):
    """What a browser would find: cells by row, text, sources, and whether every tag is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.sources: list[str] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta", "img"):
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("th", "td"):
            self.rows[-1].append("")
        self.sources += [value for key, value in attrs if key in ("src", "href")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("th", "td"):
            self.rows[-1][-1] += data
        elif data.strip() and "style" not in self.open:
            self.words.append(data)


@pytest.fixture
def page(tmp_path):
    def make(*blocks, title="A page"):
        write_html(tmp_path / "page.html", title, [HtmlSection("Found", blocks)])
        page = Page((tmp_path / "page.html").read_text("utf-8"))
        assert page.open == []
        return page

    return make


def test_tables_and_text_are_shown_as_they_are(page):
    found = page(
        "5 < 6 & so on",
        Table(["method", "mIoU"], [["<script>", "43.1"], ["none", "±"]]),
        title="<Ours>",
    )
    assert found.rows == [["method", "mIoU"], ["<script>", "43.1"], ["none", "±"]]
    assert found.words == ["<Ours>", "<Ours>", "Found", "5 < 6 & so on"]


def test_files_are_part_of_the_page(page, tmp_path):
    (tmp_path / "a.png").write_bytes(b"picture")
    (tmp_path / "b.mp4").write_bytes(b"clip")
    found = page(HtmlFile(tmp_path / "a.png", 'the "first"'), HtmlFile(tmp_path / "b.mp4"))
    kinds, contents = zip(*(source.split(";base64,") for source in found.sources), strict=True)
    assert kinds == ("data:image/png", "data:video/mp4")
    assert [base64.b64decode(content) for content in contents] == [b"picture", b"clip"]
    assert 'the "first"' in found.words


def test_nothing_is_fetched(page):
    assert page("words", Table(["a"], [])).sources == []


@pytest.mark.parametrize(("name", "message"), [("no.png", "cannot be read"), ("a.txt", "shown")])
def test_what_cannot_be_shown(page, tmp_path, name, message):
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(UserError, match=message):
        page(HtmlFile(tmp_path / name))
    assert not (tmp_path / "page.html").exists()


def test_the_notes_of_a_table_stand_below_it(page):
    found = page(Table(["method"], [["none"]], ["the rule of <it>"]), "more")
    assert found.words[2:] == ["Found", "the rule of <it>", "more"]
