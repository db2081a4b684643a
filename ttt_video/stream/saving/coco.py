"""COCO's json files: masks as run lengths; for panoptic models also segment maps.

A line for each frame goes to a file of the unfinished video. The json files are put together from
these lines at the end, so that a kill leaves no half of one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as rle
from scipy import ndimage

from ...errors import UserError
from ...files import remove_leftovers, write_atomically, writing
from ...formats.images import write_png
from ...tasks import once
from ...tasks.outputs import class_map, finite_scores
from .base import FORMAT_REGISTRY, Format, Job, Place, Predicted

Row = dict[str, Any]


@FORMAT_REGISTRY.register()
class Coco(Format):
    """Json files by what the model predicts, and their pictures.

    - ``instances.json`` (instances): an annotation for each instance, with its ``score``. Instances
      without a pixel are left out, and no score is too low.
    - ``panoptic.json`` and ``panoptic/NAME.png`` (panoptic): ids of segments are R + 256 G + 65536
      B, 0 for none.
    - ``semantic.json`` (neither): an annotation for each class that a frame has.
    """

    name = "coco"

    def __init__(self, predicted: Predicted) -> None:
        """Refuses models without masks."""
        predicted.need(self.name, "sem_seg", "panoptic_seg", "instances", fix="coco needs masks")
        super().__init__(predicted)
        outputs = predicted.outputs
        self.files = [name for name, key in _FILES.items() if key in outputs] or ["semantic"]

    def start(self, place: Place) -> None:
        """Begins the lines, or goes on after those that count.

        Raises:
            UserError: some of them are gone.
        """
        super().start(place)
        file, size = place.unfinished / f"{place.name}.jsonl", place.state.get("bytes", 0)
        self.lines = _Lines(file, size, rest=place.unsaved > 0)
        if "panoptic" in self.files:
            with writing(place.folder):
                (place.folder / "panoptic").mkdir(exist_ok=True)
            remove_leftovers(place.folder / "panoptic")

    def frame(self, frame: Mapping[str, Any], output: Mapping[str, Any]) -> Job:
        """Appends the frame's line, and writes its segment map."""
        stem, suffix = self.place.stems(frame), Path(frame["file_name"]).suffix
        row: Row = {
            "image": {
                "id": frame["frame_index"] + 1,  # some programs take 0 for none
                "file_name": f"{stem}{suffix}" if self.place.stems.own else f"{stem}.png",
                "height": frame["height"],
                "width": frame["width"],
                "video_id": frame["video_id"],
                "frame_index": frame["frame_index"],
            }
        }
        jobs: list[Job] = []
        if "panoptic" in self.files:
            ids, segments = output["panoptic_seg"]
            png = self.place.folder / "panoptic" / f"{stem}.png"
            jobs.append(partial(_segments, ids.cpu().numpy().copy(), segments, png, row))
        if "instances" in self.files:
            instances = output["instances"]
            # In bits, because a hundred masks wait in memory until they are encoded.
            packed = np.packbits((instances.pred_masks > 0).cpu().numpy(), axis=-1)
            facts = instances.pred_classes.tolist(), finite_scores(instances).tolist()
            jobs.append(partial(_instances, packed, frame["width"], *facts, row))
        if "semantic" in self.files:
            jobs.append(partial(_classes, once(class_map, output), row))
        return partial(self._write, jobs, row)

    def _write(self, jobs: list[Job], row: Row) -> None:
        for job in jobs:
            job()
        for annotation in (*row.get("annotations", ()), *row.get("segments_info", ())):
            annotation["category_id"] = self.predicted.dataset_ids[annotation["category_id"]]
        self.lines.append(row)

    def save(self) -> dict[str, Any]:
        """Returns how much of the lines counts."""
        return {"bytes": self.lines.size}

    def written(self) -> int:
        """Returns how many lines count."""
        return sum(1 for _ in self.lines)

    def end(self) -> None:
        """Writes the json files of what there is."""
        if self.lines.size:
            for name in self.files:
                write = partial(self._assemble, name)
                write_atomically(self.place.folder / f"{name}.json", write, durable=True)
        self.lines.close()

    def _assemble(self, name: str, path: Path) -> None:
        """Writes a json file without holding more than a frame of it."""
        things = self.predicted.things
        if things is None:  # all or nothing
            things = frozenset(range(len(self.predicted.names)) if name == "instances" else ())
        categories = [
            {"id": self.predicted.dataset_ids[k], "name": class_name, "isthing": int(k in things)}
            for k, class_name in enumerate(self.predicted.names)
        ]
        for category, color in zip(categories, self.predicted.colors.tolist(), strict=True):
            category["color"] = color
        lists: dict[str, Callable[[], Iterator[Row]]] = {
            "images": lambda: (row["image"] for row in self.lines),
            "annotations": self._panoptic if name == "panoptic" else self._numbered,
            "categories": lambda: iter(categories),
        }
        with path.open("w", encoding="utf-8") as file:
            for place, (key, rows) in enumerate(lists.items()):
                file.write(f"{',' if place else '{'}\n{json.dumps(key)}: [")
                for number, row in enumerate(rows()):
                    file.write(f"{',' if number else ''}\n{json.dumps(row)}")
                file.write("]")
            file.write("}\n")

    def _numbered(self) -> Iterator[Row]:
        number = 0
        for row in self.lines:
            for annotation in row["annotations"]:
                number += 1
                yield {"id": number, "image_id": row["image"]["id"], **annotation}

    def _panoptic(self) -> Iterator[Row]:
        for row in self.lines:
            segments, name = row["segments_info"], row["png"]
            yield {"image_id": row["image"]["id"], "file_name": name, "segments_info": segments}


_FILES = {"instances": "instances", "panoptic": "panoptic_seg"}
"""Json files with the outputs that they hold."""


class _Lines:
    """A file of JSON rows that only grows, and is cut where a run goes on."""

    def __init__(self, path: Path, size: int, *, rest: bool = False) -> None:
        """Keeps the first ``size`` bytes of the file; with ``rest`` also the whole rows after them.

        Raises:
            UserError: it has fewer.
        """
        self.path, self.size = path, size
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("a+b")
            self._file.seek(size)
            if rest:
                self.size = size = size + self._file.read().rfind(b"\n") + 1
            self._file.truncate(min(size, path.stat().st_size))
        if path.stat().st_size < size:
            self.close()
            raise UserError(
                f"{path} lacks rows that were there: put it back, or remove {path.parent} to start "
                "the video anew"
            )

    def append(self, row: Row) -> None:
        """Adds a row."""
        line = f"{json.dumps(row)}\n".encode()
        with writing(self.path):
            self._file.write(line)
            self._file.flush()
        self.size += len(line)

    def __iter__(self) -> Iterator[Row]:
        with self.path.open("rb") as file:
            left = self.size  # a row that a full disk cut does not count
            while left:
                line = file.readline()
                left -= len(line)
                yield json.loads(line)

    def close(self) -> None:
        """Closes the file."""
        with suppress(OSError):  # the rest of a row that a full disk did not take
            self._file.close()


def _turned(pixels: np.ndarray) -> np.ndarray:
    """Returns (H, W) uint8 pixels as (W, H), because COCO counts along columns."""
    # Pillow turns them faster than NumPy copies a transpose.
    return np.asarray(Image.fromarray(pixels).transpose(Image.Transpose.TRANSPOSE))


def _encode(turned: np.ndarray, first: int = 0, width: int | None = None) -> Row | None:
    """Returns the annotation of a mask; None for an empty one.

    Args:
        turned: (w, H) bool, columns of the mask; the others are empty.
        first: the first of these columns.
        width: of the mask; None: w.
    """
    height, width = turned.shape[1], width or len(turned)
    padded = np.concatenate([[False], turned.ravel(), [False]])
    changes = np.flatnonzero(padded[1:] != padded[:-1]) + first * height
    # Of empty pixels, of full ones, and so on.
    counts = np.diff(changes, prepend=0, append=width * height)
    if len(counts) == 1:
        return None
    counts = counts[: len(counts) - (counts[-1] == 0)].astype(np.uint32)
    encoded = rle.frPyObjects({"size": [height, width], "counts": counts}, height, width)
    return {
        "segmentation": {"size": [height, width], "counts": encoded["counts"].decode()},
        "area": int(counts[1::2].sum()),
        "bbox": rle.toBbox(encoded).tolist(),
        "iscrowd": 0,
    }


def _instance(bits: np.ndarray, width: int) -> Row | None:
    """Returns the annotation of (H, ceil(width / 8)) packed pixels; looks at its columns alone."""
    (some,) = np.nonzero(bits.any(axis=0))
    if not len(some):
        return None
    first, last = int(some[0]), int(some[-1]) + 1
    mask = np.unpackbits(bits[:, first:last], axis=-1, count=min(8 * last, width) - 8 * first)
    return _encode(_turned(mask).view(bool), 8 * first, width)


def _instances(
    packed: np.ndarray, width: int, classes: list[int], scores: list[float], row: Row
) -> None:
    row["annotations"] = [
        {"category_id": k, "score": score, **encoded}
        for bits, k, score in zip(packed, classes, scores, strict=True)
        if (encoded := _instance(bits, width)) is not None
    ]


def _classes(classes: np.ndarray, row: Row) -> None:
    # Two bytes, because there may be more classes than one can hold; none is negative here.
    low, high = _turned(classes.astype(np.uint8)), _turned((classes >> 8).astype(np.uint8))
    turned = low.astype(np.uint16) | high.astype(np.uint16) << 8
    row["annotations"] = [
        {"category_id": k, **(_encode(turned == k) or {})}
        for k in np.flatnonzero(np.bincount(turned.ravel())).tolist()
    ]


def _segments(ids: np.ndarray, segments: list[Row], png: Path, row: Row) -> None:
    boxes = ndimage.find_objects(ids, max_label=max((s["id"] for s in segments), default=0))
    areas = np.bincount(ids.ravel(), minlength=len(boxes) + 1).tolist()
    row["png"] = png.name
    row["segments_info"] = [
        {
            "id": segment["id"],
            "category_id": segment["category_id"],
            "area": areas[segment["id"]],
            "bbox": _box(boxes[segment["id"] - 1]),
            "iscrowd": 0,
        }
        for segment in segments
        if areas[segment["id"]]  # the format knows no segment without a pixel
    ]
    colors = ids.astype("<u4").view(np.uint8).reshape(*ids.shape, 4)[..., :3]
    write_png(png, np.ascontiguousarray(colors), tidy=False)


def _box(place: tuple[slice, slice]) -> list[int]:
    rows, columns = place
    return [columns.start, rows.start, columns.stop - columns.start, rows.stop - rows.start]
