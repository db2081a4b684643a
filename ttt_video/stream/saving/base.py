"""What every format of saved predictions shares: what it is told, and what it promises."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from detectron2.config import CfgNode
from detectron2.utils.registry import Registry

from ...errors import UserError
from ...files import file_stem
from ...structures import FrameSource
from ...tasks.labels import CLASS_KEYS, class_metadata
from ...visualization.overlay import class_palette

FORMAT_REGISTRY = Registry("TTT_FORMAT")
FORMAT_REGISTRY.__doc__ = """
Subclasses of :class:`Format` by class name. A file of ``--register`` adds others.
"""

VOID = 255
"""Label of pixels without a class."""


@dataclass(frozen=True)
class Predicted:
    """Describes what a model predicts.

    Attributes:
        outputs: keys of its output, some of "sem_seg", "panoptic_seg", "instances", "color".
        names: of the classes, by class id; their ids as text where no data set names them.
        colors: (K, 3) uint8 RGB.
        things: class ids of the countable classes; None if they are unknown.
        dataset_ids: what the data set's own json files call each class id.
        fps: frames per second of video files.
    """

    outputs: frozenset[str]
    names: tuple[str, ...]
    colors: np.ndarray
    things: frozenset[int] | None
    dataset_ids: Mapping[int, int]
    fps: float

    @classmethod
    def of(cls, cfg: CfgNode, outputs: frozenset[str], dataset_name: str, fps: float) -> Predicted:
        """Describes a config's model; its classes are those of :func:`class_metadata`."""
        count = cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES
        names, metadata, ids = tuple(map(str, range(count))), class_metadata(cfg, dataset_name), {}
        things = None
        lists = () if metadata is None else [metadata.get(key) or () for key in CLASS_KEYS]
        named = next((tuple(words) for words in lists if len(words) == count), None)
        if metadata is not None and named is not None:
            names = named
            things = metadata.get("thing_dataset_id_to_contiguous_id")
            ids = {**(metadata.get("stuff_dataset_id_to_contiguous_id") or {}), **(things or {})}
        dataset_ids = {contiguous: own_id for own_id, contiguous in ids.items()}
        if dataset_ids.keys() != set(range(count)):
            dataset_ids = {k: k for k in range(count)}
        return cls(
            outputs,
            names,
            class_palette(metadata, count, things=not outputs & {"sem_seg", "panoptic_seg"}),
            None if things is None else frozenset(things.values()),
            dataset_ids,
            fps,
        )

    def need(self, what: str, *outputs: str, fix: str) -> None:
        """Refuses a model without any of these outputs.

        Raises:
            UserError: it has none of them; ``what`` needs one, ``fix`` says what to do.
        """
        if not self.outputs & set(outputs):
            has = ", ".join(sorted(self.outputs)) or "nothing known"
            raise UserError(f"--save {what}: the model predicts {has}; {fix}")


class Stems:
    """Names the files of a video's frames.

    They are the stems of the frames' own files, if these all differ, also where a file system
    ignores case, and are plain; otherwise the index in six digits.
    """

    def __init__(self, source: FrameSource) -> None:
        """Looks at the names of all files of the source."""
        files = source.fingerprint() or []
        own = [Path(str(row[1])).stem for row in files if row[0] is not None]
        folded = {unicodedata.normalize("NFC", stem).casefold() for stem in own}
        self.own = len(folded) == len(files) > 0 and all(file_stem(stem) == stem for stem in own)
        self.numbers = self.own and all(s.isascii() and s.isdigit() and len(s) == 6 for s in own)

    def __call__(self, frame: Mapping[str, Any]) -> str:
        """Returns the name without suffix."""
        return Path(frame["file_name"]).stem if self.own else f"{frame['frame_index']:06d}"

    def six_digits(self, frame: Mapping[str, Any]) -> str:
        """Returns a name of six digits: the own one where all are such, otherwise the index."""
        return self(frame) if self.numbers else f"{frame['frame_index']:06d}"


@dataclass(frozen=True)
class Place:
    """Where the predictions of one video go.

    Attributes:
        video_id: the video.
        stems: names its frames.
        folder: for the files; it exists.
        unfinished: for what is needed until the video is complete, and then removed; it may not
            exist.
        name: begins the names of files in ``unfinished``, which formats share.
        done: frames that an earlier run wrote and that count.
        unsaved: how many of these came after ``state``; a live source's do not come again, so
            that what is there of them stays.
        state: what :meth:`Format.save` returned after the others; {} at the start.
    """

    video_id: str
    stems: Stems
    folder: Path
    unfinished: Path
    name: str
    done: int = 0
    unsaved: int = 0
    state: Mapping[str, Any] = field(default_factory=dict)


Job = Callable[[], object]
"""Writes what there is of one frame, in another thread."""


class Format:
    """One way to write the predictions of a model, one video after the other::

        form = Masks(predicted)               # refuses what the model cannot give
        form.start(place)
        for frame, output in stream:
            form.frame(frame, output)()       # the call runs in a thread, in the order of frames
            state = form.save()               # now and then, with no call running
        form.end()                            # also of a video that was stopped

    A format is a file in this folder, with a class under :data:`FORMAT_REGISTRY`. Another model, or
    a video at the same time, has an object of its own.

    Attributes:
        name: what ``--save`` calls it, and its folder.
        each_frame: glob of the one file in the folder that each frame has; "" if it has none.
    """

    name: ClassVar[str]
    each_frame: ClassVar[str] = ""

    def __init__(self, predicted: Predicted) -> None:
        """Keeps what the model predicts.

        Raises:
            UserError: the model predicts nothing that this format could hold.
        """
        self.predicted = predicted

    def start(self, place: Place) -> None:
        """Begins a video, or goes on with it."""
        self.place = place

    def frame(self, frame: Mapping[str, Any], output: Mapping[str, Any]) -> Job:
        """Takes from an output what is to be written, and returns what writes it.

        Files are whole or not there (``ttt_video.files.write_atomically``), and the same frame
        writes the same bytes, because a run that goes on may write it again. The output may change
        after the call: keep no view of it.
        """
        raise NotImplementedError

    def save(self) -> dict[str, Any]:
        """Returns what :attr:`Place.state` needs in a run that goes on: plain values."""
        return {}

    def written(self) -> int | None:
        """Returns how many frames of the video are on disk; None if nobody knows."""
        if not self.each_frame:
            return None
        return sum(1 for _ in self.place.folder.glob(self.each_frame))

    def end(self) -> None:
        """Ends the video."""
