"""Writes predictions while they are made, in any of the formats of this folder."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode

from ...errors import UserError, counted, ending_with, suggestion
from ...files import WriteBehind, file_stem, make_folder, remove_leftovers
from ..sinks import Results, Sink, VideoRun
from ..video_parts import DEFAULT_FPS, video_fps
from .base import FORMAT_REGISTRY, Format, Place, Predicted, Stems

logger = logging.getLogger(__name__)


def format_names(asked: Iterable[str]) -> tuple[str, ...]:
    """Returns the formats that flags ask for, each once: ["masks,coco", "color"] are three.

    Raises:
        UserError: there is no such format.
    """
    known = _formats()
    names = [name.strip() for words in asked for name in words.split(",")]
    for name in names:
        if name not in known:
            raise UserError(f"--save {name}: no such format; {suggestion(name, known)}")
    return tuple(dict.fromkeys(names))


def _formats() -> dict[str, type[Format]]:
    return {form.name: form for _, form in FORMAT_REGISTRY}


class SavedPredictions(Sink):
    """Writes each prediction to ``FORMAT/VIDEO/``, that of the frozen model to ``FORMAT_frozen/``.

    Files are encoded and written in one thread beside the loop, and all are on disk when a state is
    saved. A run that goes on writes the frames after the state again, with the same bytes.
    """

    behind = True

    def __init__(
        self,
        cfg: CfgNode,
        folder: Path,
        names: Sequence[str],
        *,
        fps: float | None = None,
        compare: bool = False,
        dataset_name: str = "",
    ) -> None:
        """
        Args:
            cfg: resolved.
            folder: of the run.
            names: of formats; see :func:`format_names`.
            fps: frames per second of video files; None: the video's own, else 10.
            compare: there is a frozen model, whose predictions are saved, too.
            dataset_name: of the videos; "" for others.
        """
        # Names, not objects: a worker knows the formats of --register only after it has this.
        self.cfg, self.folder, self.names = cfg, folder, tuple(names)
        self.fps, self.dataset_name = fps, dataset_name
        self.models = ("adapted", "frozen") if compare else ("adapted",)
        self.flags: dict[str, Any] = {"--save": ",".join(sorted(self.names))}
        if fps is not None:
            self.flags["--fps"] = fps
        self.outputs: frozenset[str] = frozenset()
        self._state: dict[str, Any] = {}

    def check(self, outputs: frozenset[str]) -> None:
        """Refuses a model that cannot give what is asked for."""
        self.outputs = outputs
        self._build(DEFAULT_FPS)

    def _build(self, fps: float) -> dict[tuple[str, str], Format]:
        """Makes the formats, by folder name and model."""
        predicted = Predicted.of(self.cfg, self.outputs, self.dataset_name, fps)
        return {
            (name if model == "adapted" else f"{name}_{model}", model): _formats()[name](predicted)
            for name in self.names
            for model in self.models
        }

    def load(self, state: dict[str, Any]) -> None:
        """Goes on after what is written."""
        self._state = dict(state)

    def start(self, video: VideoRun) -> None:
        """Makes the folders, or goes on in them.

        Raises:
            UserError: a folder cannot be made, or a file that is needed to go on is gone.
        """
        self.formats = self._build(video_fps(self.fps, video.source))
        stems = Stems(video.source)
        for (name, _), form in self.formats.items():
            folder = self.folder / name / file_stem(video.video_id)
            make_folder(folder, "folder")
            remove_leftovers(folder)
            state = self._state[name] if video.done else {}
            counts = video.done, video.unsaved
            form.start(Place(video.video_id, stems, folder, video.folder, name, *counts, state))
        if video.unsaved:
            self._tell_what_is_lost(video)
        self._thread = WriteBehind("saving")

    def _tell_what_is_lost(self, video: VideoRun) -> None:
        """Warns of frames that have a row, but no prediction: a kill came in between."""
        written = {name: form.written() for (name, _), form in self.formats.items()}
        lost = [
            f"{video.done - count} in {name}"
            for name, count in written.items()
            if count is not None and count < video.done
        ]
        if lost:
            logger.warning(
                "%s: of %s that have a row, predictions are missing (%s), which were not yet "
                "written when the run was killed: their frames do not come again",
                video.video_id,
                counted(video.done, "frame"),
                ", ".join(lost),
            )

    def write(self, results: Results) -> None:
        """Hands one frame to all formats."""
        for (_, model), form in self.formats.items():
            result = results.adapted if model == "adapted" else results.frozen
            assert result is not None
            self._thread.submit(form.frame(result.frame, result.output))

    def save(self) -> dict[str, Any]:
        """Returns the states of all formats, once all files are written."""
        self._thread.flush()
        return {name: form.save() for (name, _), form in self.formats.items()}

    def end(self, video: VideoRun) -> None:
        """Ends all formats."""
        with ending_with(*(form.end for form in self.formats.values())):
            self._thread.close()
