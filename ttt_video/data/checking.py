"""Checks whether a registered data set is complete and correct, for ``tools/check_dataset.py``."""

from __future__ import annotations

import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from ..errors import UserError, require
from ..files import read_json_object
from ..formats.coco_json import CocoError, instance_faults, panoptic_faults
from ..formats.images import BadFrame, read_size
from ..formats.labels import refuse_labels_as_frames
from ..tasks import Task, tasks, tasks_of
from .catalog import FILES, NO_TRAIN_IDS, check_registered, file_of, missing_files, read_pixels
from .published_counts import compare_with_published

Record = dict[str, Any]
MAX_NAMES = 20  # classes in one line
_PATHS = ("image_root", "image_dir", "gt_dir", "panoptic_root", "panoptic_json", "json_file")


class DatasetCheck:
    """Checks a data set: its records, its files, and the labels of some frames.

    Attributes:
        lines: a description of the data set.
        problems: what is missing or wrong, one line each; empty if the data set is fine.
        labelled: the records with labels.
        task: what the labels are for; None if nothing is labelled.
    """

    def __init__(self, name: str, samples: int | None = 32) -> None:
        """Runs all checks.

        Args:
            name: a registered data set.
            samples: how many labelled frames to decode, evenly spread; None for all.

        Raises:
            UserError: the data set is unknown.
        """
        check_registered(name)
        self.name = name
        self.metadata = MetadataCatalog.get(name)
        self.lines: list[str] = []
        self.problems: list[str] = []
        self.labelled: list[Record] = []
        self.task: type[Task] | None = None
        records = self._load()
        if not records:
            return
        self.task = labelled_task(records, self.metadata)
        self.labelled = [r for r in records if self.task is not None and self.task.labels(r)]
        self._count(records)
        self._check_videos(records)
        missing = self._check_files(records)
        self._check_sizes(records, missing)
        there = [r for r in self.labelled if not any(file_of(r, k) in missing for k in FILES)]
        self._check_labels(_spread(there, samples))

    def _load(self) -> list[Record]:
        missing = [path for path in self._paths() if not os.path.exists(path)]
        self.problems += [f"missing: {path}" for path in missing]
        if faults := self._json_faults():
            self.problems += faults
            return []
        try:
            records = list(DatasetCatalog.get(self.name))
            for task in tasks_of(self.metadata.get("evaluator_type"))[:1]:
                task.check_records(records)
            return records
        except CocoError as error:
            self.problems += error.lines
        except UserError as error:
            self.problems.append(str(error))
        except (OSError, AssertionError, KeyError, TypeError, ValueError) as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            if "labelTrainIds" in reason:
                reason = NO_TRAIN_IDS
            if not missing:  # otherwise a missing folder is the reason
                self.problems.append(f"cannot be loaded: {reason}")
        return []

    def _json_faults(self) -> list[str]:
        """Returns mistakes in COCO's json files that detectron2's own loaders hide."""
        faults: list[str] = []
        if self.metadata.get("evaluator_type") in ("coco", "coco_panoptic_seg"):
            for key, check in (("json_file", instance_faults), ("panoptic_json", panoptic_faults)):
                file = self.metadata.get(key)
                if file and os.path.exists(file):
                    faults += [f"{file}: {fault}" for fault in check(read_json_object(file))]
        return faults

    def _paths(self) -> list[str]:
        """Returns the paths in the metadata of detectron2's own data sets."""
        paths = (path for key in _PATHS if (path := self.metadata.get(key)) and "://" not in path)
        return list(dict.fromkeys(paths))

    def _count(self, records: list[Record]) -> None:
        videos = Counter(r["video_id"] for r in records if "video_id" in r)
        size = f"{len(records)} {'frames' if videos else 'images'}"
        if videos:
            lengths = sorted({min(videos.values()), max(videos.values())})
            size += f" in {len(videos)} video(s) of {' to '.join(map(str, lengths))}"
        kind = self.task.kind if self.task else "no"
        self.lines.append(f"{size}, {len(self.labelled)} with {kind} labels")
        twice = [f for f, n in Counter(r["file_name"] for r in records).items() if n > 1]
        if twice:
            self.problems.append(f"{len(twice)} images are listed more than once, as {twice[0]}")
        if not self.labelled:
            self.problems.append("nothing is labelled")
        line, problem = compare_with_published(self.name, records)
        self.lines += [line] if line else []
        self.problems += [problem] if problem else []
        try:
            refuse_labels_as_frames(self.name, records)
        except UserError as error:
            self.problems.append(str(error))

    def _check_videos(self, records: list[Record]) -> None:
        """Looks for missing frames: by the numbers in their names, and by which are labelled."""
        videos = defaultdict(list)
        for record in records:
            number = re.search(r"[0-9]+$", Path(record["file_name"]).stem)
            if self.task is not None and self.task.image_class(record) is not None:
                continue  # neighbours in an image set have nothing to do with each other
            if number and "video_id" in record:
                videos[record["video_id"]].append((int(number[0]), record["file_name"]))
        for frames in videos.values():
            steps = [b[0] - a[0] for a, b in pairwise(frames)]
            gaps = [i for i, step in enumerate(steps) if step != 1]
            if gaps and len(gaps) < len(steps) / 2:  # otherwise they are not numbered by one
                self.problems.append(f"frames are missing after {frames[gaps[0]][1]}")
        period = self.metadata.get("label_period", 1)
        odd = [r["file_name"] for r in self.labelled if r.get("frame_index", 0) % period]
        if odd:
            self.problems.append(
                f"labels are expected at every {period}th frame from the first on, but there are "
                f"{len(odd)} others, as {odd[0]}"
            )

    def _check_files(self, records: list[Record]) -> set[str]:
        missing: set[str] = set()
        for what, count, gone in missing_files(records):
            self.lines.append(f"{what}: {count - len(gone)} of {count} files")
            if gone:
                self.problems.append(f"{what}: {len(gone)} files are missing, as {gone[0]}")
            missing.update(gone)
        return missing

    def _check_sizes(self, records: list[Record], missing: set[str]) -> None:
        """Looks at the headers of a video's frames, which have one size, or no stream takes it."""
        first: dict[Any, tuple[tuple[int, int], str]] = {}
        odd: dict[Any, str] = {}
        for record in records:
            file, video = record["file_name"], record.get("video_id")
            image_class = self.task is not None and self.task.image_class(record) is not None
            if video is None or video in odd or image_class or "read_pixels" in record:
                continue
            if file in missing:
                continue
            try:
                size = read_size(file)
            except BadFrame as error:
                self.problems.append(str(error))
                continue
            known, where = first.setdefault(video, (size, file))
            if size != known:
                odd[video] = (
                    f"frames of video {video} have several sizes (height x width): "
                    f"{known[0]}x{known[1]} in {where}, {size[0]}x{size[1]} in {file}"
                )
        self.problems += odd.values()

    def _check_labels(self, sample: list[Record]) -> None:
        """Checks sizes, values and classes of the sample; listed classes in all records."""
        task = self.task
        if task is None:
            return
        sizes: Counter[tuple[int, ...]] = Counter()
        seen: Counter[int] = Counter()
        first: dict[int, str] = {}  # the first file of each class
        for record in sample:
            try:
                image = read_pixels(record).shape[:2]
                labels = task.label_map(record)
            except (BadFrame, UserError) as error:
                if str(error) not in self.problems:
                    self.problems.append(str(error))
                continue
            sizes[image] += 1
            said = tuple(record.get(k, n) for k, n in zip(("height", "width"), image, strict=True))
            if said != image or (labels is not None and labels.shape != image):
                shape = image if labels is None else labels.shape
                self.problems.append(
                    f"sizes differ (height, width): image {image}, labels {shape}, data set {said}:"
                    f" {record['file_name']}"
                )
            if labels is None:
                continue
            values, counts = (part.tolist() for part in np.unique(labels, return_counts=True))
            if task.objects_key:
                self._check_segments(record, set(values) - {0})
                continue
            seen.update(dict(zip(values, counts, strict=True)))
            for value in values:
                first.setdefault(value, record[task.label_keys[0]])
        self.lines.append(
            f"{len(sample)} of {len(self.labelled)} labelled ones decoded; height x width: "
            + ", ".join(f"{h}x{w} ({n})" for (h, w), n in sizes.most_common(4))
        )
        for record in self.labelled:
            class_id = task.image_class(record)
            if class_id is not None:
                seen[class_id] += 1
                first.setdefault(class_id, record["file_name"])
        for record in self.labelled if task.objects_key else ():
            for part in record[task.objects_key]:
                seen[part["category_id"]] += 1
                first.setdefault(part["category_id"], record["file_name"])
        self._report_classes(seen, task, first)

    def _check_segments(self, record: Record, drawn: set[int]) -> None:
        listed = {segment["id"] for segment in record["segments_info"]}
        for what, ids in (
            ("are in the picture only", drawn - listed),
            ("are in the json only", listed - drawn),
        ):
            if ids:
                self.problems.append(
                    f"{record['pan_seg_file_name']}: {len(ids)} segments {what}, as id {min(ids)}"
                )

    def _report_classes(
        self, seen: Counter[int], task: type[Task], first: Mapping[int, str]
    ) -> None:
        unit = "segments" if task.objects_key else "pixels decoded"
        if any(task.image_class(record) is not None for record in self.labelled[:1]):
            unit = "images"
        classes = task.class_names(self.metadata)
        if not classes and not seen:
            return  # such as colorization
        void = self.metadata.get("ignore_label", 255)
        # Where objects are listed, a number below 255 may be a class like any other.
        ignored = not (task.objects_key and void < len(classes))
        unlabelled = seen.pop(void, 0) if ignored else 0
        total = sum(seen.values())
        wrong = sorted(value for value in seen if not 0 <= value < len(classes))
        if wrong:
            self.problems.append(
                f"label values {wrong[:8]} are out of range: classes are 0-{len(classes) - 1}, "
                f"{void} is unlabelled; {wrong[0]} is in {first[wrong[0]]}"
            )
        known = [(c, n) for c, n in seen.most_common() if 0 <= c < len(classes)]
        self.lines.append(f"{len(known)} of {len(classes)} classes occur, share of {unit}:")
        self.lines += _columns(f"{classes[c]} {100 * n / total:.2f} %" for c, n in known)
        never = [name for i, name in enumerate(classes) if i not in seen]
        if never:
            more = f" and {len(never) - MAX_NAMES} more" if len(never) > MAX_NAMES else ""
            self.lines.append(f"never seen: {', '.join(never[:MAX_NAMES])}{more}")
        if unlabelled:
            share = 100 * unlabelled / (total + unlabelled)
            self.lines.append(f"unlabelled: {share:.2f} % of {unit}")


def labelled_task(records: Iterable[Record], metadata: Any) -> type[Task] | None:
    """Returns the task that a data set has labels for; its ``evaluator_type`` comes first."""
    keys: set[str] = set().union(*records)
    known = [*tasks_of(metadata.get("evaluator_type")), *reversed(tasks())]
    return next((task for task in known if task.labels(dict.fromkeys(keys))), None)


def _spread(records: list[Record], count: int | None) -> list[Record]:
    count = len(records) if count is None else min(count, len(records))
    return [records[i * len(records) // count] for i in range(count)]


def _columns(items: Iterable[str], width: int = 26, count: int = 3) -> list[str]:
    cells = list(items)
    rows = [cells[i : i + count] for i in range(0, len(cells), count)]
    return ["  " + "".join(cell.ljust(width) for cell in row).rstrip() for row in rows]


def draw_labels(check: DatasetCheck, count: int, folder: Path) -> list[Path]:
    """Draws labels with class names over ``count`` images, evenly spread; returns the PNG files.

    Raises:
        UserError: a file is missing or damaged, the folder cannot be written, or OpenCV is missing.
    """
    require("cv2", "opencv-python-headless", "drawing labels")
    from detectron2.utils.visualizer import Visualizer  # here, because it imports matplotlib

    written: list[Path] = []
    if check.task is None:
        return written
    for number, record in enumerate(_spread(check.labelled, count)):
        canvas = Visualizer(read_pixels(record), check.metadata)
        picture = check.task.draw_labels(canvas, record, check.metadata)
        path = folder / f"{number:02d}_{Path(record['file_name']).stem}.png"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture.get_image()).save(path)
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}") from error
        written.append(path)
    return written
