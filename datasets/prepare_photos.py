#!/usr/bin/env python3
"""Collect photographs from Debian's packages of free pictures, for colorization.

apt-get download gcompris-qt-data lomiri-wallpapers-16.04 mate-backgrounds
python datasets/prepare_photos.py *.deb

writes them to ``photos/train/`` and every tenth one to ``photos/val/``, with 256 pixels on the
shorter side. The packages also hold drawings, which are left out by their names. A folder may stand
in place of a package, and everything in it is taken. Pictures that are nearly grey, dark or small
are left out. Existing files are kept, so that the next run continues an interrupted one or adds to
it. datasets/README.md lists the packages and their licences.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "tools"))

import _checkout  # noqa: F401 - finds the package of this checkout

from ttt_video_cli.arguments import ToolParser, answer_first

PHOTOGRAPHS: dict[str, tuple[str, ...]] = {
    "gcompris-qt-data": (
        *("*/clickgame/resource/sea*.webp", "*/erase/resource/*.webp", "*/explore_*/resource/*"),
        *("*/categorization/resource/images/[!fan]*/*", "*/images/fishes/*.webp"),
        *("*/details/resource/image/[!EGPV]*_background.webp", "*/image/Eilan*_background.webp"),
        *("*/image/Gizah*_background.webp", "*/image/Egeskov*_background.webp"),
    ),
    "lomiri-wallpapers-16.04": ("*/backgrounds/[!au]*.jpg", "*/backgrounds/aitz*.jpg"),
    "lomiri-wallpapers-20.04": ("*/Kleiber*.jpg",),
    "mate-backgrounds": ("*/mate/nature/*.jpg",),
    "palapeli-data": ("*/palapeli/collection/*.jpg",),
    "plasma-workspace-wallpapers": tuple(
        f"*/{name}/contents/images/2560x1600.jpg"
        for name in (
            *("BytheWater", "ColorfulCups", "DarkestHour", "EveningGlow", "FallenLeaf", "Kite"),
            *("OneStandsOut", "Path"),
        )
    ),
    "python3-skimage": tuple(
        f"*/skimage/data/{name}"
        for name in ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg")
    ),
}
"""Patterns of the photographs' paths in each package; those in a ``.rcc`` file follow its path."""

SPLITS = ("train", "val")
VALIDATION = 10  # every tenth picture
MIN_CHROMA = 4.0  # mean distance from grey in the ab plane of CIE Lab
MIN_LIGHTNESS = 15.0  # mean L, of 100
MIN_SIDE = 128  # px


def argument_parser() -> argparse.ArgumentParser:
    """Returns the parser of the tool's flags."""
    parser = ToolParser(description="Photographs for training colorization.")
    parser.add_argument(
        "sources", nargs="+", type=Path, help=".deb files of known packages, or folders of pictures"
    )
    parser.add_argument(
        "--output", type=Path, help="folder to write (default $DETECTRON2_DATASETS/photos)"
    )
    parser.add_argument("--size", type=int, default=256, help="shorter side in pixels (256)")
    return parser


answer_first(__name__, argument_parser().parse_args)

import lzma
import struct
import tarfile
import tempfile
from collections import Counter
from collections.abc import Iterator
from fnmatch import fnmatchcase
from io import BytesIO
from pathlib import PurePosixPath

import numpy as np
import torch
from PIL import Image

from ttt_video.cli import run_tool
from ttt_video.color.lab import rgb_to_lab
from ttt_video.data.catalog import datasets_root
from ttt_video.data.image_folder import load_image_folder
from ttt_video.data.preparation import convert_files
from ttt_video.errors import UserError
from ttt_video.formats.images import IMAGE_SUFFIXES, BadFrame, read_rgb, write_png


def package_files(deb: Path) -> Iterator[tuple[str, bytes]]:
    """Yields path and content of the files in a Debian package, and of those in ``.rcc`` files.

    Raises:
        UserError: the file cannot be read or is no Debian package.
    """
    try:
        with tarfile.open(fileobj=BytesIO(_data_member(deb.read_bytes()))) as files:
            for member in files:
                if member.isfile():
                    content = files.extractfile(member).read()  # type: ignore[union-attr]
                    if member.name.endswith(".rcc"):
                        inside = resource_files(content)
                        yield from ((f"{member.name}/{path}", data) for path, data in inside)
                    else:
                        yield member.name, content
    except OSError as error:
        raise UserError(f"{deb} cannot be read: {error.strerror or error}") from error
    except (ValueError, struct.error, tarfile.TarError, lzma.LZMAError, EOFError) as error:
        raise UserError(f"{deb} is no Debian package that can be read: {error}") from error


def _data_member(archive: bytes) -> bytes:
    """Returns the compressed tar of a package's files, which is a member of an ``ar`` archive."""
    if not archive.startswith(b"!<arch>\n"):
        raise ValueError("it does not begin with '!<arch>'")
    at = 8
    while at < len(archive):
        name, size = archive[at : at + 16].decode("ascii").strip(), int(archive[at + 48 : at + 58])
        if name.startswith("data.tar.zst"):
            raise ValueError("its files are packed by zstd; unpack it and name the folder")
        if name.startswith("data.tar"):
            return archive[at + 60 : at + 60 + size]
        at += 60 + size + size % 2
    raise ValueError("it has no data.tar")


def resource_files(resources: bytes) -> Iterator[tuple[str, bytes]]:
    """Yields path and content of the uncompressed files in a binary resource file of Qt.

    Pictures are stored as they are, since they are compressed already; other files may not be.
    """
    magic, version, tree, data, names = struct.unpack_from(">4s4I", resources)
    if magic != b"qres" or version not in (2, 3):
        raise ValueError(f"a .rcc file has version {version}, not 2 or 3")

    def walk(node: int, folder: str) -> Iterator[tuple[str, bytes]]:
        name, flags, first, second = struct.unpack_from(">IHII", resources, tree + 22 * node)
        (length,) = struct.unpack_from(">H", resources, names + name)
        text = resources[names + name + 6 :][: 2 * length].decode("utf-16-be")
        path = f"{folder}/{text}" if folder else text
        if flags & 2:  # a folder: number of children, and the first of them
            for child in range(second, second + first):
                yield from walk(child, path if node else "")
        elif flags == 0:  # a file; second is the place of its length and content
            (size,) = struct.unpack_from(">I", resources, data + second)
            yield path, resources[data + second + 4 :][:size]

    return walk(0, "")


def unpack_photographs(deb: Path, folder: Path) -> None:
    """Writes the photographs of a package of ``PHOTOGRAPHS`` to a new folder.

    Raises:
        UserError: the package is not known, cannot be read, or has none of them.
    """
    package = deb.name.partition("_")[0]
    if package not in PHOTOGRAPHS:
        raise UserError(
            f"{deb}: nobody said which pictures of {package!r} are photographs; unpack it and name "
            f"the folder. Known are {' '.join(PHOTOGRAPHS)}"
        )
    folder.mkdir()
    for path, content in package_files(deb):
        is_image = PurePosixPath(path).suffix.lower() in IMAGE_SUFFIXES
        if is_image and any(fnmatchcase(path, pattern) for pattern in PHOTOGRAPHS[package]):
            parts = PurePosixPath(path).parts[-4:]
            (folder / "_".join((package, *parts))).write_bytes(content)


def reason_against(rgb: np.ndarray) -> str:
    """Returns why a picture, (H, W, 3) uint8, is left out: small, dark or grey; "" if it is not."""
    if min(rgb.shape[:2]) < MIN_SIDE:
        return "small"
    lab = rgb_to_lab(torch.from_numpy(rgb).permute(2, 0, 1))
    if lab[0].mean() < MIN_LIGHTNESS:
        return "dark"
    return "grey" if lab[1:].norm(dim=0).mean() < MIN_CHROMA else ""


def find_pictures(sources: list[Path], scratch: Path) -> dict[str, Path]:
    """Returns the pictures of packages, unpacked to a scratch folder, and of folders by new names.

    Raises:
        UserError: a source cannot be read, or two pictures would have the same name.
    """
    pictures: dict[str, Path] = {}
    for source in sources:
        is_package = source.suffix == ".deb"
        folder = scratch / source.name if is_package else source
        if is_package:
            unpack_photographs(source, folder)
        for record in load_image_folder(folder):
            path = PurePosixPath(record["image_id"])
            name = "_".join((*path.parts[:-1], path.stem))
            name = f"{name}.png" if is_package else f"{source.resolve().name}_{name}.png"
            if name in pictures:
                raise UserError(f"{record['file_name']} and another picture would be named {name}")
            pictures[name] = Path(record["file_name"])
    return pictures


def main(argv: list[str] | None = None) -> None:
    """Runs the tool; ``argv`` defaults to the command line."""
    args = argument_parser().parse_args(argv)
    output: Path = args.output or datasets_root() / "photos"
    if args.size < MIN_SIDE:
        raise UserError(f"--size is {args.size}; give at least {MIN_SIDE}")
    left_out: dict[Path, str] = {}
    outputs: dict[Path, Path] = {}

    def convert(file: Path) -> None:
        try:
            image = Image.fromarray(read_rgb(str(file)))
        except BadFrame:
            left_out[file] = "damaged"
            return
        scale = min(1.0, args.size / min(image.size))
        size = (round(image.width * scale), round(image.height * scale))
        pixels = np.array(image.resize(size, Image.Resampling.LANCZOS))
        reason = reason_against(pixels)
        if reason:
            left_out[file] = reason
        else:
            write_png(outputs[file], pixels)

    for split in SPLITS:
        (output / split).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        for place, (name, file) in enumerate(find_pictures(args.sources, Path(scratch)).items()):
            if not any((output / split / name).exists() for split in SPLITS):
                split = "val" if place % VALIDATION == VALIDATION - 1 else "train"
                outputs[file] = output / split / name
        convert_files(list(outputs), convert, "photographs")
    reasons = Counter(left_out.values())
    print(
        f"{output} has "
        + " and ".join(f"{len(list((output / s).glob('*.png')))} pictures in {s}" for s in SPLITS)
        + f", {len(outputs) - len(left_out)} of them new; {len(left_out)} were left out"
        + "".join(f", {count} {reason}" for reason, count in sorted(reasons.items()))
    )
    for file in (file for file, reason in left_out.items() if reason == "damaged"):
        print(f"damaged: {file.name}")


if __name__ == "__main__":
    run_tool(main)
