"""Frame sources: a folder of frames, a video file, a registered data set, a camera, a stream.

A source is one video and yields its frames in time order as :class:`~ttt_video.structures.Frame`
dicts. A background thread decodes and resizes a few frames ahead of the consumer.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog

from ..errors import UserError
from ..formats.images import (
    IMAGE_SUFFIXES,
    BadFrame,
    FrameTransform,
    list_folder,
    list_frames,
)
from ..formats.labels import refuse_label_maps, refuse_labels_as_frames
from ..structures import FrameSource
from ..tasks import tasks_of
from ..tasks.labels import warn_of_near_misses
from .catalog import check_registered, read_pixels
from .decoded_source import DecodedSource, Reading, Record
from .fingerprint import Fingerprint, fingerprint_records
from .live_sources import LiveSource, open_live
from .video_sources import VideoFileSource

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = [
    "BadFrame",
    "DatasetSource",
    "FolderSource",
    "FrameTransform",
    "LiveSource",
    "VideoFileSource",
    "open_dataset",
    "open_folder",
    "open_live",
    "open_video",
]


class DatasetSource(DecodedSource):
    """One video of a registered data set."""

    def __init__(
        self, dicts: Sequence[Record], transform: FrameTransform, **reading: Unpack[Reading]
    ) -> None:
        """Sorts the records, which ``records`` has, by time; decodes nothing yet.

        Args:
            dicts: detectron2 dataset dicts of one video with ``file_name``, ``video_id`` and
                ``frame_index``. Other keys are passed on with the frames.
            transform: converts decoded pixels to the network's input.
            reading: see `Reading`.
        """
        indices = [record["frame_index"] for record in dicts]
        odd = [i for i in indices if not isinstance(i, int | np.integer) or i < 0]
        if odd:
            raise UserError(
                f"video {dicts[0]['video_id']} has a frame with frame_index {odd[0]!r}: give whole "
                "numbers, from 0 on"
            )
        videos = sorted({str(record["video_id"]) for record in dicts})
        if len(videos) != 1:
            raise UserError(f"a source is one video, but its records name {len(videos)}: {videos}")
        if len(set(indices)) != len(indices):
            twice = next(index for index in indices if indices.count(index) > 1)
            raise UserError(f"video {videos[0]} has more than one frame with index {twice}")
        super().__init__(videos[0], len(indices), transform, **reading)
        self.records = sorted(dicts, key=lambda record: record["frame_index"])

    def fingerprint(self) -> Fingerprint:
        """Returns the fingerprint of the frames' files and labels."""
        return fingerprint_records(self.records)

    def reordered(self, places: Sequence[int]) -> DatasetSource:
        """Returns a source of these of its records, in this order; decodes nothing."""
        other = copy.copy(self)
        other.records = [self.records[place] for place in places]
        other.num_frames = len(places)
        return other

    def _decode(self, after: int) -> Generator[tuple[Record, np.ndarray | BadFrame], None, None]:
        places = (i for i, r in enumerate(self.records) if r["frame_index"] == after)
        start = next(places, -1) + 1
        for record in self.records[start:]:
            if start == 0 and record["frame_index"] <= after:
                continue
            try:
                pixels: np.ndarray | BadFrame = read_pixels(record)
            except BadFrame as error:
                pixels = error
            yield record, pixels


class FolderSource(DatasetSource):
    """A folder of frames in the natural order of their names; its name is the ``video_id``.

    ``frame_index`` is the position among the folder's image files, including skipped ones.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        transform: FrameTransform,
        **reading: Unpack[Reading],
    ) -> None:
        """Lists the folder; decodes nothing yet. Arguments as for `DatasetSource`."""
        files = list_frames(Path(folder))
        if not files:
            raise UserError(
                f"folder {folder} holds no frames: expected files ending in "
                + " ".join(sorted(IMAGE_SUFFIXES))
            )
        refuse_label_maps(
            files,
            "give a folder of frames alone, or register both with register_custom_video "
            "(docs/custom_dataset.md)",
        )
        video_id = os.path.basename(os.path.abspath(folder))
        dicts = [
            {"file_name": str(file), "video_id": video_id, "frame_index": index}
            for index, file in enumerate(files)
        ]
        super().__init__(dicts, transform, **reading)


def open_folder(
    path: str | os.PathLike[str], transform: FrameTransform, **reading: Unpack[Reading]
) -> list[FrameSource]:
    """Opens a folder of frames as one video, or a folder of such folders as several videos.

    Names are sorted naturally, hidden ones ignored. Arguments as for `DatasetSource`.

    Raises:
        UserError: no such folder; no frames; frames beside folders; folders nested deeper.
    """
    files, folders = list_folder(Path(path))
    framed = [folder for folder in folders if list_folder(folder)[0]]
    if files and framed:
        raise UserError(
            f"{path} holds frames and also folders of frames ({framed[0].name}): "
            "give the folder of one video, or a folder of nothing but videos"
        )
    if files or not folders:
        return [FolderSource(path, transform, **reading)]
    for folder in folders:
        if folder not in framed:
            below = list_folder(folder)[1]
            raise UserError(
                f"folder {folder} holds no frames"
                + (f" but folders ({below[0].name}): give {folder} itself?" if below else "")
            )
    return [FolderSource(folder, transform, **reading) for folder in framed]


def open_video(
    path: str | os.PathLike[str], transform: FrameTransform, **reading: Unpack[Reading]
) -> list[FrameSource]:
    """Opens a video file as a list of one source, like the other ``open_`` functions."""
    return [VideoFileSource(path, transform, **reading)]


def open_dataset(
    name: str, transform: FrameTransform, **reading: Unpack[Reading]
) -> list[FrameSource]:
    """Opens the videos of a registered data set in the order in which they first appear.

    Arguments as for `DatasetSource`.

    Raises:
        UserError: the name is unknown, files are missing, records are no video frames, or an
            object has no mask.
    """
    check_registered(name)
    try:
        dicts = DatasetCatalog.get(name)
    except OSError as error:
        raise UserError(
            f"data set {name} cannot be loaded ({error}): is DETECTRON2_DATASETS set to its folder?"
        ) from error
    warn_of_near_misses(name, dicts)
    for task in tasks_of(MetadataCatalog.get(name).get("evaluator_type"))[:1]:
        task.check_records(dicts)
    refuse_labels_as_frames(name, dicts)
    videos: dict[str, list[Record]] = {}
    for record in dicts:
        missing = {"file_name", "video_id", "frame_index"} - record.keys()
        if missing:
            raise UserError(
                f"data set {name} is not made of videos: a record has no {sorted(missing)[-1]} "
                f"({record.get('file_name', 'no file_name')})"
            )
        videos.setdefault(str(record["video_id"]), []).append(record)
    if not videos:
        raise UserError(f"data set {name} is empty")
    return [DatasetSource(records, transform, **reading) for records in videos.values()]
