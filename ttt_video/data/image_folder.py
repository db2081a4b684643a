"""Folders of pictures, ImageNet's among them: every image below a folder, for colorization."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from detectron2.data import DatasetCatalog, MetadataCatalog

from ..errors import UserError
from ..formats.images import IMAGE_SUFFIXES, natural_key
from .catalog import datasets_root

SHIPPED_SETS = {
    f"{name}_color_{split}": f"{name}/{split}"
    for name in ("imagenet", "photos")
    for split in ("train", "val")
}
"""Data sets by name, with their folders below ``$DETECTRON2_DATASETS``."""


def load_image_folder(root: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Lists the pictures below a folder, at any depth, in the natural order of their paths.

    Hidden files and folders are left out. Links are followed, and a folder that several of them
    lead to counts once. Nothing is decoded: a file that cannot be read is told when it is used.

    Returns:
        One dict per picture: ``file_name``, the same as ``original_file_name``, since a picture is
        the label of its grey version, and ``image_id``, the path below ``root``.

    Raises:
        UserError: there is no such folder, or no picture in it; or a folder below cannot be listed,
            or may be lost, because a link leads to nothing.
    """
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"{root}: no such folder of pictures; see datasets/README.md")
    found: list[Path] = []
    known: set[str] = set()
    for folder, names, files in os.walk(root, followlinks=True, onerror=_refuse):
        real = os.path.realpath(folder)
        if real in known:  # a link led here, perhaps round in circles
            names.clear()
            continue
        known.add(real)
        names[:] = sorted(name for name in names if not name.startswith("."))
        for path in (Path(folder, name) for name in files if not name.startswith(".")):
            if path.suffix.lower() in IMAGE_SUFFIXES:
                found.append(path.relative_to(root))
            elif path.is_symlink() and not path.exists():
                raise UserError(
                    f"{path} is a link to nothing ({os.readlink(path)}): mend or remove it"
                )
    if not found:
        endings = " ".join(sorted(IMAGE_SUFFIXES))
        raise UserError(f"{root} holds no pictures: expected files ending in {endings}")
    found.sort(key=lambda path: [natural_key(part) for part in path.parts])
    return [
        {
            "file_name": str(root / path),
            "original_file_name": str(root / path),
            "image_id": path.as_posix(),
        }
        for path in found
    ]


def _refuse(error: OSError) -> NoReturn:
    raise UserError(f"folder {error.filename} cannot be listed: {error.strerror}") from error


def register_image_folder(name: str, root: str | os.PathLike[str]) -> None:
    """Registers the pictures below a folder for colorization; it is read when it is used."""
    DatasetCatalog.register(name, partial(load_image_folder, root))
    MetadataCatalog.get(name).set(evaluator_type="video_color")


def register_image_folders() -> None:
    """Registers ``SHIPPED_SETS``, once; the folders are looked for when a set is used."""

    def load(folder: str) -> list[dict[str, Any]]:
        return load_image_folder(datasets_root() / folder)

    for name, folder in SHIPPED_SETS.items():
        if name not in DatasetCatalog:
            DatasetCatalog.register(name, partial(load, folder))
            MetadataCatalog.get(name).set(evaluator_type="video_color")
