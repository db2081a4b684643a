#!/usr/bin/env python3
"""Puts Fashion-MNIST's four files where the data sets read them.

apt-get download dataset-fashion-mnist
python datasets/prepare_fashion_mnist.py --source dataset-fashion-mnist_*_all.deb

takes them out of Debian's package without installing it. --source may also be a folder that has
them: by default /usr/share/datasets/fashion-mnist, where the installed package puts them. They are
checked and copied as they are.
"""

from __future__ import annotations

import argparse
import io
import sys
import tarfile
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "tools"))

import _checkout  # noqa: F401 - finds the package of this checkout

from ttt_video_cli.arguments import ToolParser, answer_first

INSTALLED = Path("/usr/share/datasets/fashion-mnist")


def argument_parser() -> argparse.ArgumentParser:
    """Returns the parser of the tool's flags."""
    parser = ToolParser(description="Put Fashion-MNIST's four files where they are read.")
    parser.add_argument(
        "--source", type=Path, default=INSTALLED, help=f"a .deb, or a folder (default {INSTALLED})"
    )
    parser.add_argument(
        "--root", type=Path, help="where to put them (default $DETECTRON2_DATASETS/fashion_mnist)"
    )
    return parser


answer_first(__name__, argument_parser().parse_args)

from ttt_video.cli import run_tool
from ttt_video.data.catalog import datasets_root
from ttt_video.data.fashion_mnist import FILES, check_files
from ttt_video.errors import UserError
from ttt_video.files import write_atomically

_MAGIC = b"!<arch>\n"
_HEADER = 60  # bytes before each member of an ar archive: the name first, the size at byte 48


def ar_members(archive: Path) -> dict[str, bytes]:
    """Returns the members of an ar archive, such as a Debian package, by name.

    Raises:
        UserError: it is none, or ends early.
    """
    content = archive.read_bytes()
    if not content.startswith(_MAGIC):
        raise UserError(f"{archive} is no Debian package")
    members, place = {}, len(_MAGIC)
    while place + _HEADER <= len(content):
        name, size = content[place : place + 16].decode().strip(), content[place + 48 : place + 58]
        start = place + _HEADER
        place = start + int(size)
        if place > len(content):
            raise UserError(f"{archive} ends early: download it again")
        members[name.rstrip("/")] = content[start:place]
        place += place % 2  # members begin at even bytes
    return members


def from_package(archive: Path) -> dict[str, bytes]:
    """Returns the four files of Debian's package by name.

    Raises:
        UserError: it is no such package, or compressed in a way that Python cannot read.
    """
    members = ar_members(archive)
    data = next((name for name in members if name.startswith("data.tar")), None)
    if data is None:
        raise UserError(f"{archive} has no data: download it again")
    try:
        with tarfile.open(fileobj=io.BytesIO(members[data])) as tar:
            files = {Path(member.name).name: member for member in tar if member.isfile()}
            found = {name: tar.extractfile(files[name]) for name in FILES if name in files}
            return {name: file.read() for name, file in found.items() if file is not None}
    except tarfile.TarError as error:
        raise UserError(
            f"{archive}: this Python cannot read its {data}; unpack it with 'dpkg -x {archive} "
            f"FOLDER' and give --source FOLDER{INSTALLED}"
        ) from error


def main(argv: list[str] | None = None) -> None:
    """Runs the tool; ``argv`` defaults to the command line."""
    args = argument_parser().parse_args(argv)
    root = args.root or datasets_root() / "fashion_mnist"
    try:
        if args.source.is_file():
            found = from_package(args.source)
        else:
            files = {name: args.source / name for name in FILES}
            found = {name: file.read_bytes() for name, file in files.items() if file.is_file()}
        missing = [name for name in FILES if name not in found]
        if missing:
            raise UserError(
                f"{args.source} has no {missing[0]}: install Debian's package "
                "dataset-fashion-mnist, or give --source"
            )
        root.mkdir(parents=True, exist_ok=True)
        for name, content in found.items():
            write_atomically(root / name, lambda part, content=content: part.write_bytes(content))
    except OSError as error:
        raise UserError(f"cannot read or write {error.filename}: {error.strerror}") from error
    check_files(root, list(FILES))
    print(f"{root} has Fashion-MNIST's {len(FILES)} files")


if __name__ == "__main__":
    run_tool(main)
