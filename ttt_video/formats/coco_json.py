"""Reads COCO's json files and reports each kind of mistake in one line.

Everything is checked when a file is read. Otherwise a mistake in one annotation would end a run
hours later, or change its numbers without a word.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from ..errors import UserError
from ..files import read_json_object
from .coco_masks import is_finite, mask_fault

Json = Mapping[str, Any]

FRAME_KEYS = {"video_id": ("video_id",), "frame_index": ("frame_index", "frame_id")}
"""Keys of an image for its video and index; the first one that all images have is used.

``frame_id`` is the key of CocoVID, the form of mmtracking and BDD100K.
"""
_OTHER_FRAME_KEYS = re.compile(r"video|frame|seq|clip|scene|(^|_)vid(_|$)", re.IGNORECASE)

EXPECTED = (
    "; expected are COCO's images (id, file_name, height, width; for videos also video_id and "
    "frame_index or frame_id), annotations (id, image_id, category_id, segmentation) and categories"
)
MAX_INDEX = 2**63 - 1


class CocoError(UserError):
    """A json file has mistakes: the message says the first, ``lines`` say all kinds."""

    def __init__(self, file: str | os.PathLike[str], lines: Sequence[str]) -> None:
        self.lines = [f"{file}: {line}" for line in lines]
        more = f"; {len(lines) - 1} other kinds of mistakes are in it" if len(lines) > 1 else ""
        super().__init__(self.lines[0] + more)


class _Faults:
    """Counts mistakes by kind and keeps the first of each kind."""

    def __init__(self) -> None:
        self._found: dict[str, tuple[str, int]] = {}

    def add(self, kind: str, line: str) -> None:
        first, count = self._found.get(kind, (line, 0))
        self._found[kind] = first, count + 1

    def lines(self) -> list[str]:
        return [
            line + (f" ({count} such {kind})" if count > 1 else "")
            for kind, (line, count) in self._found.items()
        ]


def read_instances(file: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads a json file of COCO's instances.

    Raises:
        UserError: it cannot be read, or :func:`instance_faults` finds something.
    """
    content = read_json_object(file, expected=EXPECTED)
    if lines := instance_faults(content):
        raise CocoError(file, lines)
    return content


def instance_faults(content: Json) -> list[str]:
    """Returns the mistakes in COCO's instances, one line for each kind.

    ``iscrowd``, ``area`` and ``bbox`` may be missing.
    """
    if missing := _missing_lists(content):
        return [missing]
    faults = _Faults()
    sizes = _image_sizes(content["images"], faults)
    categories = _category_ids(content["categories"], faults)
    seen: set[Any] = set()
    for number, annotation in enumerate(content["annotations"]):
        if not isinstance(annotation, dict):
            faults.add("annotations", f"annotation number {number} is no object: {annotation!r}")
            continue
        name = f"annotation {annotation.get('id')!r} of image {annotation.get('image_id')!r}"
        for kind, fault in _annotation_faults(annotation, sizes, categories, seen):
            faults.add(kind, f"{name} {fault}")
    return faults.lines()


def panoptic_faults(content: Json, *, listed_categories: bool = True) -> list[str]:
    """Returns the mistakes in COCO's panoptic form, one line for each kind.

    ``listed_categories`` says whether the file must list the categories that it uses.
    """
    needed = ("images", "annotations", "categories")[: 3 if listed_categories else 2]
    if missing := _missing_lists(content, needed):
        return [missing]
    faults = _Faults()
    sizes = _image_sizes(content["images"], faults)
    categories = _category_ids(content["categories"], faults) if listed_categories else None
    labelled: set[Any] = set()
    maps: set[str] = set()
    for number, annotation in enumerate(content["annotations"]):
        segments = annotation.get("segments_info") if isinstance(annotation, dict) else None
        if not isinstance(segments, list) or not isinstance(annotation.get("file_name"), str):
            faults.add("annotations", f"annotation {number} has no 'segments_info' or file_name")
            continue
        image, name = annotation.get("image_id"), annotation["file_name"]
        if not _is_id(image) or image not in sizes:
            faults.add("annotations without an image", f"{name} is of image {image!r}, not listed")
        for known, value, what in ((labelled, image, "image"), (maps, name, "file")):
            if _is_id(value) and value in known:
                faults.add(f"{what}s", f"{what} {value!r} has more than one annotation: keep one")
            elif _is_id(value):
                known.add(value)
        seen: set[Any] = set()
        for segment in segments:
            for kind, fault in _segment_faults(segment, categories, seen):
                faults.add(kind, f"{name}: segment {fault}")
    return faults.lines()


def _missing_lists(
    content: Json, keys: Sequence[str] = ("images", "annotations", "categories")
) -> str:
    missing = [key for key in keys if not isinstance(content.get(key), list)]
    if not missing:
        return ""
    form = ""
    videos = content.get("videos")
    if isinstance(videos, list) and any("file_names" in v for v in videos if isinstance(v, dict)):
        form = " (YouTube-VIS' form: convert it to one entry of images for each frame)"
    elif "frames" in content:
        form = " (scalabel's form: convert it with scalabel.label.to_coco)"
    return f"has no list {', '.join(map(repr, missing))}{form}{EXPECTED}"


def _image_sizes(images: Iterable[Any], faults: _Faults) -> dict[Any, tuple[int, int]]:
    """Returns (height, width) by id; adds faults, such as two images with one id or file."""
    sizes: dict[Any, tuple[int, int]] = {}
    first_with_id: dict[Any, str] = {}
    first_with_file: dict[str, Any] = {}
    for number, image in enumerate(images):
        if not isinstance(image, dict) or not _is_id(image.get("id")):
            faults.add("images", f"image number {number} has no id (a whole number or a text)")
            continue
        name, size = image_name(image), (image.get("height", 0), image.get("width", 0))
        if not isinstance(image.get("file_name"), str) or not image["file_name"]:
            faults.add("images without a file_name", f"{name} has no file_name{EXPECTED}")
            continue
        if not all(_is_whole(side) and side > 0 for side in size):
            faults.add("sizes", f"{name} has height, width {size[0]!r}, {size[1]!r}: give pixels")
            continue
        if image["id"] in sizes:
            faults.add(
                "images",
                f"{first_with_id[image['id']]} and {name} have one id: give each image its own",
            )
        path = os.path.normpath(image["file_name"])
        if path in first_with_file:
            faults.add(
                "files",
                f"{image['file_name']} is listed twice, as image {first_with_file[path]!r} and "
                f"image {image['id']!r}: join their annotations in one image",
            )
        first_with_file.setdefault(path, image["id"])
        first_with_id.setdefault(image["id"], name)
        sizes.setdefault(image["id"], size)
    return sizes


def _category_ids(categories: Iterable[Any], faults: _Faults) -> set[int]:
    ids: set[int] = set()
    for number, category in enumerate(categories):
        if (
            not isinstance(category, dict)
            or not _is_whole(category.get("id"))
            or not isinstance(category.get("name"), str)
        ):
            faults.add("categories", f"category number {number} has no whole id and name")
        elif category["id"] in ids:
            faults.add("category ids", f"category {category['id']} is listed twice: keep one")
        else:
            ids.add(category["id"])
    return ids


def _annotation_faults(
    annotation: Json, sizes: Mapping[Any, tuple[int, int]], categories: set[int], seen: set[Any]
) -> Iterator[tuple[str, str]]:
    """Yields kind and description of each mistake in one object; adds its id to ``seen``."""
    number, image, category = (annotation.get(k) for k in ("id", "image_id", "category_id"))
    if not _is_id(number) or number in seen:
        yield "annotation ids", "has no id of its own: give each annotation another"
    else:
        seen.add(number)
    if not _is_whole(category) or category not in categories:
        yield "unknown categories", f"has category {category!r}, which is not in 'categories'"
    if annotation.get("ignore"):
        yield "ignored objects", "has 'ignore', which COCO does not know: use iscrowd, or remove it"
    yield from _number_faults(annotation)
    if not _is_id(image) or image not in sizes:
        yield "annotations without an image", "is of an image that is not listed: remove it"
    elif fault := mask_fault(annotation.get("segmentation"), *sizes[image]):
        yield "masks", f"{fault}: give it a mask or remove it"


def _segment_faults(
    segment: Any, categories: set[int] | None, seen: set[Any]
) -> Iterator[tuple[str, str]]:
    number = segment.get("id") if isinstance(segment, dict) else None
    if not _is_whole(number):
        yield "segments", f"{segment!r} has no id"
        return
    if number in seen:
        yield "segment ids", f"{number} is listed twice: give each segment an id of its own"
    seen.add(number)
    category = segment.get("category_id")
    if not _is_whole(category) or (categories is not None and category not in categories):
        yield "unknown categories", f"{number} has category {category!r}, not in 'categories'"
    for kind, fault in _number_faults(segment):
        yield kind, f"{number} {fault}"


def _number_faults(annotation: Json) -> Iterator[tuple[str, str]]:
    if annotation.get("iscrowd", 0) not in (0, 1):
        yield "values of iscrowd", f"has iscrowd {annotation['iscrowd']!r}: it must be 0 or 1"
    if "area" in annotation and not (is_finite(annotation["area"]) and annotation["area"] >= 0):
        yield "areas", f"has area {annotation['area']!r}: it must be in pixels, or be left out"
    if "bbox" in annotation:
        box = annotation["bbox"]
        if not (isinstance(box, list) and len(box) == 4 and all(map(is_finite, box))):
            yield "boxes", f"has bbox {box!r}: it must be [x, y, width, height], or be left out"


def image_name(image: Json) -> str:
    """Returns an image's name for messages."""
    return f"image {image.get('id')!r} ({image.get('file_name')})"


def frame_places(
    images: Sequence[Json], videos: Sequence[Json] = ()
) -> dict[Any, tuple[str, int]] | None:
    """Returns each image's video and frame index by its id; None if the images have no such keys.

    Args:
        images: checked entries of COCO's ``images``.
        videos: ``id`` and ``name`` of each video; the id replaces a missing name.

    Raises:
        UserError: only some images have both keys, an image has an unknown key for its video, a
            value is no index, or two frames have one place.
    """
    used = _used_keys(images)
    if used is None:
        if videos:
            raise UserError(f"has 'videos', but its images have no video_id{EXPECTED}")
        return None
    titles = _video_titles(videos)
    ids_of_title: dict[str, Any] = {}
    places: dict[Any, tuple[str, int]] = {}
    files: dict[tuple[str, int], Json] = {}
    for image in images:
        video, index = (image[key] for key in used)
        if not _is_id(video):
            raise UserError(f"{image_name(image)} has {used[0]} {video!r}: give a number or a text")
        # Writers of tables turn a 3 into 3.0 in a column with gaps.
        whole = int(index) if isinstance(index, float) and index.is_integer() else index
        if not _is_whole(whole) or not 0 <= whole <= MAX_INDEX:
            raise UserError(
                f"{image_name(image)} has {used[1]} {index!r}: give the frame's place in its "
                "video, a whole number from 0 on"
            )
        title = titles.get(video, str(video))
        other = ids_of_title.setdefault(title, video)
        if other != video:
            raise UserError(f"videos {other!r} and {video!r} are both named {title!r}: rename one")
        place = title, whole
        if place in files:
            raise UserError(
                f"{image_name(files[place])} and {image_name(image)} are both frame {whole} of "
                f"video {title!r}: give each frame a {used[1]} of its own"
            )
        files[place] = image
        places[image["id"]] = place
    return places


def _used_keys(images: Sequence[Json]) -> tuple[str, str] | None:
    """Returns the keys of video and index that all images have; None if no image has any."""

    def has(image: Json, *keys: str) -> bool:
        return any(image.get(key) is not None for key in keys)

    meanings = FRAME_KEYS.values()
    chosen = [[k for k in keys if all(has(image, k) for image in images)] for keys in meanings]
    if all(chosen):
        return chosen[0][0], chosen[1][0]
    if any(has(image, *keys) for image in images for keys in meanings):
        lacking = [image for image in images if not all(has(image, *keys) for keys in meanings)]
        raise UserError(
            f"{len(lacking)} of {len(images)} images have no video_id and frame_index (or "
            f"frame_id), as {image_name(lacking[0])}; give both to all, or to none"
            if lacking
            else "some images have frame_index and others frame_id: use one key for all"
        )
    for image in images:
        foreign = [key for key in image if has(image, key) and _OTHER_FRAME_KEYS.search(key)]
        if foreign:
            raise UserError(
                f"{image_name(image)} names its video or frame by {', '.join(map(repr, foreign))}; "
                "expected are video_id and frame_index (or frame_id), or no such key and a folder "
                "for each video: rename the keys, or remove them"
            )
    return None


def _video_titles(videos: Sequence[Json]) -> dict[Any, str]:
    titles: dict[Any, str] = {}
    for video in videos:
        if not isinstance(video, dict) or not _is_id(video.get("id")):
            raise UserError(f"has an entry of 'videos' without an id: {video!r:.60}")
        if video["id"] in titles:
            raise UserError(f"lists video {video['id']!r} twice in 'videos': keep one")
        titles[video["id"]] = str(video.get("name", video["id"]))
    return titles


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_id(value: Any) -> bool:
    return _is_whole(value) or isinstance(value, str)
