"""Corrupted image sets: ImageNet-C as it is published, Fashion-MNIST corrupted when it is read.

For NAME, one of Fashion-MNIST's ``fashion_mnist_c`` (test pictures) and ``fashion_mnist_val_c``
(validation pictures) and ImageNet-C's ``imagenet_c``:

- ``NAME_<corruption>`` has severity 5, ``NAME_<corruption>_<1..5>`` any;
- ``NAME_<corruption>_ramp`` has all severities, each picture one of its own, spread evenly over any
  part of the stream; ``TTT.FRAME_ORDER severity`` lets them rise;
- ``NAME_<corruption>+<corruption>`` has severity 5: of each two pictures in a row one has the first
  corruption, and the other the second. ``TTT.FRAME_ORDER first`` and ``second`` put one of them
  first. The same two in the other order are the same pictures.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from ..data.catalog import datasets_root
from ..data.fashion_mnist import load_fashion_mnist, metadata, read_grey
from ..data.image_folder import imagenet_classes, load_class_folders
from ..errors import UserError
from ..structures import video_seed
from .corruptions import MAX_SEVERITY, corrupt

Record = dict[str, Any]

IMAGENET_C = (
    "gaussian_noise", "shot_noise", "impulse_noise", "defocus_blur", "glass_blur", "motion_blur",
    "zoom_blur", "snow", "frost", "fog", "brightness", "contrast", "elastic_transform", "pixelate",
    "jpeg_compression", "speckle_noise", "gaussian_blur", "spatter", "saturate",
)  # fmt: skip
"""ImageNet-C's 15 corruptions and its four for validation, by the names of its folders."""

FASHION_MNIST_C = tuple(name for name in IMAGENET_C if name != "saturate")
"""Those that change grey pictures at every severity."""

_OUR_NAMES = {"fog": "plasma_fog", "contrast": "low_contrast"}

_PIXELWISE = frozenset(
    {"gaussian_noise", "shot_noise", "impulse_noise", "speckle_noise", "brightness"}
)
_SCALE = 2
_MARGIN = 2  # px on each side, since the library takes no picture of less than 32 x 32


class Part(NamedTuple):
    """What happens to one picture of a set.

    severity: in [0, 5].
    group: 1 for the second of two corruptions, else 0.
    """

    corruption: str
    severity: float
    group: int = 0


Plan = Callable[[int], Part]
"""Says what happens to the picture of a place in the stream, counted from 0."""


def constant(corruption: str, severity: float, place: int) -> Part:
    """Returns the same for every picture."""
    return Part(corruption, severity)


def spread(corruption: str, place: int) -> Part:
    """Returns severities between 0 and 5 that fill any part of a stream evenly.

    They are multiples of the golden ratio, modulo 1.
    """
    return Part(corruption, MAX_SEVERITY * (place * (5**0.5 - 1) / 2 % 1))


def alternate(first: str, second: str, place: int) -> Part:
    """Returns one corruption for one of each two pictures in a row, by chance, else the other.

    Which picture has which does not depend on the order of the two, but ``group`` does.
    """
    swapped = np.random.default_rng((0, place // 2)).random() < 0.5
    corruption = sorted((first, second), key=IMAGENET_C.index)[int((place + swapped) % 2)]
    return Part(corruption, MAX_SEVERITY, int(corruption == second))


def corrupt_small(pixels: np.ndarray, corruption: str, severity: float, seed: int) -> np.ndarray:
    """Corrupts a picture of 28 x 28 px by a corruption that is defined for larger ones.

    What changes each pixel by itself (noise, brightness) is done at the picture's own size, and so
    is contrast, which needs the picture's mean besides. All others are done at twice the size,
    which the picture is brought to by bicubic interpolation and back from by means over 2 x 2 px.

    Args:
        pixels: (H, W, 3) uint8 RGB.
        corruption: one of :data:`FASHION_MNIST_C`.
        severity: in [0, 5]; 0 returns the picture as it is.
        seed: decides all draws.
    """
    if severity == 0:
        return pixels.copy()
    name = _OUR_NAMES.get(corruption, corruption)
    height, width = pixels.shape[:2]
    if corruption in _PIXELWISE:
        margin = ((_MARGIN, _MARGIN), (_MARGIN, _MARGIN), (0, 0))
        padded = corrupt(np.pad(pixels, margin, mode="edge"), name, severity, seed, 0)
        return np.ascontiguousarray(padded[_MARGIN:-_MARGIN, _MARGIN:-_MARGIN])
    if corruption == "contrast":  # with each pixel four times the mean stays what it is
        doubled = pixels.repeat(2, axis=0).repeat(2, axis=1)
        return np.ascontiguousarray(corrupt(doubled, name, severity, seed, 0)[::2, ::2])
    large = (_SCALE * width, _SCALE * height)
    image = Image.fromarray(pixels).resize(large, Image.Resampling.BICUBIC)
    corrupted = Image.fromarray(corrupt(np.asarray(image), name, severity, seed, 0))
    return np.array(corrupted.reduce(_SCALE))


def read_corrupted(file: str, index: int, corruption: str, severity: float) -> np.ndarray:
    """Returns picture ``index`` of an idx file, corrupted; the index decides all draws."""
    seed = video_seed(0, f"fashion_mnist/{index}")
    return corrupt_small(read_grey(file, index), corruption, severity, seed)


def load_fashion_mnist_c(split: str, name: str, plan: Plan) -> list[Record]:
    """Lists the pictures of a split of Fashion-MNIST, which are corrupted when they are read.

    Returns:
        The records of :func:`load_fashion_mnist` with ``corruption``, ``severity`` and ``group``.
    """
    records = load_fashion_mnist(split, name)
    for record in records:
        part = plan(record["frame_index"])
        file, index = record["read_pixels"].args
        read = partial(read_corrupted, file, index, part.corruption, part.severity)
        record.update(part._asdict(), read_pixels=read)
    return records


def load_imagenet_c(name: str, plan: Plan) -> list[Record]:
    """Lists ImageNet-C's pictures; each is taken from the folder of its severity, rounded up.

    The folders are ``$DETECTRON2_DATASETS/imagenet-c/<corruption>/<severity>/<class>/``.

    Returns:
        The records of :func:`load_class_folders` with ``corruption``, ``severity`` and ``group``.

    Raises:
        UserError: a folder is missing, or two that are needed hold different pictures.
    """
    folders, classes = imagenet_classes()
    MetadataCatalog.get(name).set(classes=list(classes))
    known: dict[Part, list[Record]] = {}

    def records_of(part: Part) -> list[Record]:
        if part not in known:
            root = datasets_root() / "imagenet-c" / part.corruption / str(part.severity)
            known[part] = load_class_folders(root, folders, name)
        return known[part]

    first = records_of(_published(plan(0)))
    parts = [_published(plan(place)) for place in range(len(first))]
    for part in dict.fromkeys(parts):
        if [r["image_id"] for r in records_of(part)] != [r["image_id"] for r in first]:
            raise UserError(
                f"imagenet-c/{parts[0].corruption}/{parts[0].severity} and {part.corruption}/"
                f"{part.severity} hold different pictures: restore them"
            )
    return [records_of(part)[i] | part._asdict() for i, part in enumerate(parts)]


def _published(part: Part) -> Part:
    return part._replace(severity=max(1, math.ceil(part.severity)))


@cache
def _plans(corruptions: tuple[str, ...]) -> dict[str, Plan]:
    """Returns what happens to the pictures of a family's sets, by the ends of their names."""
    plans: dict[str, Plan] = {}
    for corruption in corruptions:
        plans[corruption] = partial(constant, corruption, MAX_SEVERITY)
        plans[f"{corruption}_ramp"] = partial(spread, corruption)
        for severity in range(1, 6):
            plans[f"{corruption}_{severity}"] = partial(constant, corruption, float(severity))
    for first, second in itertools.permutations(corruptions, 2):
        plans[f"{first}+{second}"] = partial(alternate, first, second)
    return plans


_FAMILIES: dict[
    str, tuple[tuple[str, ...], Callable[[str, Plan], list[Record]], dict[str, Any]]
] = {
    "fashion_mnist_c": (FASHION_MNIST_C, partial(load_fashion_mnist_c, "test"), metadata()),
    "fashion_mnist_val_c": (FASHION_MNIST_C, partial(load_fashion_mnist_c, "val"), metadata()),
    "imagenet_c": (IMAGENET_C, load_imagenet_c, {"evaluator_type": "image_classes"}),
}


def part_of(name: str, place: int) -> Part | None:
    """Returns what happens to a picture of a corrupted set; None if ``name`` is no such set.

    Args:
        name: a registered data set.
        place: ``frame_index`` of the picture.
    """
    family, ending = family_of(name)
    return _plans(_FAMILIES[family][0])[ending](place) if family else None


def family_of(name: str) -> tuple[str, str]:
    """Returns the family of a corrupted set and the rest of its name; "" and the name if none."""
    for family, (corruptions, _, _) in _FAMILIES.items():
        ending = name.removeprefix(f"{family}_")
        if ending != name and ending in _plans(corruptions):
            return family, ending
    return "", name


def register_corrupted_images() -> None:
    """Registers the corrupted image sets, once; reads nothing."""
    for family, (corruptions, load, facts) in _FAMILIES.items():
        for ending, plan in _plans(corruptions).items():
            name = f"{family}_{ending}"
            if name not in DatasetCatalog:
                DatasetCatalog.register(name, partial(load, name, plan))
                MetadataCatalog.get(name).set(variant_of=f"{family}_<corruption>", **facts)
