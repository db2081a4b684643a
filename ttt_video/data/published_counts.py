"""Counts of images in the published data sets, and the comparison of a copy with them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .coco_videos import RELEASED_VIDEOS

_COCO = {"train": {"": 118_287}, "val": {"": 5_000}}

PUBLISHED: dict[str, dict[str, int]] = {
    "cityscapes_fine_sem_seg_train": {
        "aachen": 174, "bochum": 96, "bremen": 316, "cologne": 154, "darmstadt": 85,
        "dusseldorf": 221, "erfurt": 109, "hamburg": 248, "hanover": 196, "jena": 119,
        "krefeld": 99, "monchengladbach": 94, "strasbourg": 365, "stuttgart": 196,
        "tubingen": 144, "ulm": 95, "weimar": 142, "zurich": 122,
    },
    "cityscapes_fine_sem_seg_val": {"frankfurt": 267, "lindau": 59, "munster": 174},
    "cityscapes_fine_sem_seg_test": {
        "berlin": 544, "bielefeld": 181, "bonn": 46, "leverkusen": 58, "mainz": 298, "munich": 398,
    },
    **{f"coco_2017_{split}{kind}": _COCO[split] for split in _COCO for kind in ("", "_panoptic")},
    "fashion_mnist_train": {"": 55_000},
    "fashion_mnist_val": {"": 5_000},
    "fashion_mnist_test": {"": 10_000},
    "imagenet_classes_train": {"": 1_281_167},
    "imagenet_classes_val": {"": 50_000},
    "kitti_step_video_sem_seg_train": {
        "0000": 154, "0001": 447, "0003": 144, "0004": 314, "0005": 297, "0009": 803, "0011": 373,
        "0012": 78, "0015": 376, "0017": 145, "0019": 1059, "0020": 837,
    },
    "kitti_step_video_sem_seg_val": {
        "0002": 233, "0006": 270, "0007": 800, "0008": 390, "0010": 294, "0013": 340, "0014": 106,
        "0016": 209, "0018": 339,
    },
}  # fmt: skip
"""Images of each video or city by the data set's name; "" for a set in one folder."""


def compare_with_published(name: str, records: Sequence[dict[str, Any]]) -> tuple[str, str]:
    """Compares a copy of a published data set, at least one record, with the original.

    Returns:
        A line with the numbers of images published and found, and a problem: what is missing or
        does not belong there. Either is "" if there is nothing to say, as of sets in this layout
        that ``tools/make_world.py`` made.
    """
    if _is_world(Path(records[0]["file_name"])):
        return "", ""
    if name in ("coco_videos_instance_all", "coco_videos_panoptic_all"):
        return _released_videos({str(record["video_id"]) for record in records})
    published = PUBLISHED.get(name)
    if published is None:
        return "", ""
    groups = "" if "" in published else "videos" if "video_id" in records[0] else "cities"
    here = Counter(_group(record) if groups else "" for record in records)
    line = f"published: {_count(published, groups)}; here: {_count(here, groups)}"
    wrong = []
    for group in sorted(published.keys() | here.keys()):
        expected, found = published.get(group, 0), here[group]
        if not groups and expected != found:
            wrong.append(f"{found} of {expected}")
        elif not found:
            wrong.append(f"{group} is missing")
        elif not expected:
            wrong.append(f"{group} is not one of them")
        elif expected != found:
            wrong.append(f"{group} has {found} of {expected}")
    return line, f"not the published images: {', '.join(wrong)}" if wrong else ""


def _released_videos(here: set[str]) -> tuple[str, str]:
    absent = ", ".join(video for video in RELEASED_VIDEOS if video not in here)
    line = f"released videos that are not here: {absent or 'none'}"
    own = not here & set(RELEASED_VIDEOS)  # the user's own videos in this layout
    return line, f"released videos are missing: {absent}" if absent and not own else ""


def _is_world(file: Path) -> bool:
    """Whether ``tools/make_world.py`` made a file; it writes world.json into its folder."""
    return any((folder / "world.json").is_file() for folder in list(file.parents)[:5])


def _group(record: dict[str, Any]) -> str:
    """Returns the video of a frame, or the city of a still."""
    return str(record.get("video_id") or Path(record["file_name"]).parent.name)


def _count(images: Counter[str] | dict[str, int], groups: str) -> str:
    noun = {"videos": "video", "cities": "city"}.get(groups, "") if len(images) == 1 else groups
    among = f" in {len(images)} {noun}" if groups else ""
    return f"{sum(images.values()):,} images{among}"
