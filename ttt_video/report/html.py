"""Writes text, tables, pictures and clips into one HTML file that opens anywhere."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from ..errors import UserError
from ..files import write_atomically
from .formats import Table

# Files that a browser shows without help, by suffix.
_MEDIA_TYPES = {".png": "image/png", ".jpg": "image/jpeg", ".svg": "image/svg+xml"}
_CLIP_TYPES = {".mp4": "video/mp4", ".webm": "video/webm"}

_STYLE = """
:root { color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif; }
body { max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
h1, h2 { line-height: 1.2; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: 0.25rem 0.75rem; border-bottom: 1px solid #8884; text-align: right; }
th:first-child, td:first-child { text-align: left; }
img { max-width: 100%; background: white; }
video { max-width: 100%; }
figure { margin: 1rem 0; }
figcaption { opacity: 0.75; }
"""


@dataclass(frozen=True)
class HtmlFile:
    """A picture or clip whose bytes go into the page."""

    path: Path
    caption: str = ""


Block = str | Table | HtmlFile


@dataclass(frozen=True)
class HtmlSection:
    """A heading with paragraphs, tables, pictures and clips below it."""

    heading: str
    blocks: Sequence[Block]


def write_html(path: Path, title: str, sections: Sequence[HtmlSection]) -> None:
    """Writes a page that needs no other file and no network.

    Raises:
        UserError: a picture or clip is missing, or of a kind that browsers do not show.
    """
    body = "\n".join(line for section in sections for line in _section(section))
    page = (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n"
        f"<body>\n<h1>{escape(title)}</h1>\n{body}\n</body>\n</html>\n"
    )
    write_atomically(path, lambda part: part.write_text(page, "utf-8"))


def _section(section: HtmlSection) -> Iterator[str]:
    yield f"<h2>{escape(section.heading)}</h2>"
    for block in section.blocks:
        if isinstance(block, Table):
            yield _table(block)
            yield from map(_paragraph, block.notes)
        else:
            yield _figure(block) if isinstance(block, HtmlFile) else _paragraph(block)


def _paragraph(text: str) -> str:
    return f"<p>{escape(text)}</p>"


def _table(table: Table) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in table.head)
    rows = ["".join(f"<td>{escape(cell)}</td>" for cell in row) for row in table.rows]
    body = "\n".join(f"<tr>{row}</tr>" for row in rows)
    return f'<div class="wide"><table>\n<tr>{head}</tr>\n{body}\n</table></div>'


def _figure(file: HtmlFile) -> str:
    suffix = file.path.suffix.lower()
    kind = _MEDIA_TYPES.get(suffix) or _CLIP_TYPES.get(suffix)
    if kind is None:
        known = ", ".join([*_MEDIA_TYPES, *_CLIP_TYPES])
        raise UserError(f"{file.path} cannot be shown in a page; give one of {known}")
    try:
        data = base64.b64encode(file.path.read_bytes()).decode("ascii")
    except OSError as error:
        raise UserError(f"{file.path} cannot be read: {error.strerror}") from error
    caption = escape(file.caption)
    source = f'src="data:{kind};base64,{data}"'
    if suffix in _CLIP_TYPES:
        shown = f"<video controls loop muted {source}></video>"
    else:
        shown = f'<img alt="{caption}" {source}>'
    return f"<figure>{shown}<figcaption>{caption}</figcaption></figure>"
