"""Folders of pictures, ImageNet's among them: for colorization, and by class for classification."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NoReturn

from detectron2.data import DatasetCatalog, MetadataCatalog

from ..errors import UserError, require
from ..formats.images import IMAGE_SUFFIXES, natural_key
from .catalog import datasets_root

SPLITS = ("train", "val")

COLOR_SETS = {
    f"{name}_color_{split}": f"{name}/{split}"
    for name in ("imagenet", "photos")
    for split in SPLITS
}
"""Data sets of colorization, with their folders below ``$DETECTRON2_DATASETS``."""


def load_image_folder(root: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Lists the pictures below a folder for colorization, as :func:`_pictures` does.

    Returns:
        One dict per picture: ``file_name``, the same as ``original_file_name``, since a picture is
        the label of its grey version, and ``image_id``, the path below ``root``.
    """
    return [
        {
            "file_name": str(Path(root, path)),
            "original_file_name": str(Path(root, path)),
            "image_id": path.as_posix(),
        }
        for path in _pictures(Path(root))
    ]


def load_class_folders(
    root: str | os.PathLike[str], classes: Sequence[str], video_id: str
) -> list[dict[str, Any]]:
    """Lists the pictures below a folder that has a folder for each class, as :func:`_pictures`.

    Args:
        root: the folder.
        classes: names of the class folders, in the order of the model's classes. Some may be
            missing, as in a part of a data set.
        video_id: name of the stream of these pictures.

    Returns:
        One dict per picture: ``file_name``, ``image_id`` (the path below ``root``), ``class_id``
        (an index into ``classes``), ``video_id`` and ``frame_index``.

    Raises:
        UserError: see :func:`_pictures`; or a picture is in no class folder, or in one of another
            name.
    """
    ids = {name: class_id for class_id, name in enumerate(classes)}
    paths = _pictures(Path(root))
    for path in paths:
        if len(path.parts) < 2:
            raise UserError(
                f"{Path(root, path)} is in no class folder: move it into one of {_few(classes)}"
            )
        if path.parts[0] not in ids:
            raise UserError(
                f"{Path(root, path.parts[0])} is no class that the head knows: its {len(classes)} "
                f"classes are {_few(classes)}; remove or rename the folder"
            )
    return [
        {
            "file_name": str(Path(root, path)),
            "image_id": path.as_posix(),
            "class_id": ids[path.parts[0]],
            "video_id": video_id,
            "frame_index": index,
        }
        for index, path in enumerate(paths)
    ]


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f", ... {names[-1]}" if len(names) > 3 else "")


def _pictures(root: Path) -> list[Path]:
    """Returns the pictures below a folder, at any depth, in the natural order of their paths.

    Hidden files and folders are left out. Links are followed, and a folder that several of them
    lead to counts once. Nothing is decoded: a file that cannot be read is told when it is used.

    Returns:
        Paths relative to ``root``.

    Raises:
        UserError: there is no such folder, or no picture in it; or a folder below cannot be listed,
            or may be lost, because a link leads to nothing.
    """
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
    return sorted(found, key=lambda path: [natural_key(part) for part in path.parts])


def _refuse(error: OSError) -> NoReturn:
    raise UserError(f"folder {error.filename} cannot be listed: {error.strerror}") from error


def register_image_folder(name: str, root: str | os.PathLike[str]) -> None:
    """Registers the pictures below a folder for colorization; it is read when it is used."""
    DatasetCatalog.register(name, partial(load_image_folder, root))
    MetadataCatalog.get(name).set(evaluator_type="video_color")


def register_class_folders(name: str, root: str | os.PathLike[str], classes: Sequence[str]) -> None:
    """Registers pictures in a folder for each class for classification, as a stream of images.

    Nothing is read before it is used. The arguments are those of :func:`load_class_folders`.
    """
    DatasetCatalog.register(name, partial(load_class_folders, root, tuple(classes), name))
    MetadataCatalog.get(name).set(evaluator_type="image_classes", classes=list(classes))


@lru_cache(maxsize=1)
def imagenet_classes() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Returns ImageNet-1k's 1,000 class folders ("n01440764") in order, and the classes' names.

    Raises:
        UserError: the library that lists them is missing.
    """
    timm = require("timm.data", "'ttt_video[images]'", "the list of ImageNet's classes")
    info = timm.ImageNetInfo("imagenet-1k")
    folders = tuple(info.label_names())
    return folders, tuple(info.label_name_to_description(name) for name in folders)


def load_imagenet(split: str) -> list[dict[str, Any]]:
    """Lists ImageNet's pictures of a split by class, and sets the classes of its metadata.

    Raises:
        UserError: see :func:`load_class_folders`.
    """
    folders, classes = imagenet_classes()
    name = f"imagenet_classes_{split}"
    MetadataCatalog.get(name).set(classes=list(classes))
    return load_class_folders(datasets_root() / "imagenet" / split, folders, name)


def register_image_folders() -> None:
    """Registers ``COLOR_SETS`` and ``imagenet_classes_{train,val}``, once.

    The folders are looked for when a set is used.
    """

    def load_colors(folder: str) -> list[dict[str, Any]]:
        return load_image_folder(datasets_root() / folder)

    sets = {
        name: (partial(load_colors, where), "video_color") for name, where in COLOR_SETS.items()
    }
    for split in SPLITS:
        sets[f"imagenet_classes_{split}"] = (partial(load_imagenet, split), "image_classes")
    for name, (load, meaning) in sets.items():
        if name not in DatasetCatalog:
            DatasetCatalog.register(name, load)
            MetadataCatalog.get(name).set(evaluator_type=meaning)
