"""Coloured frames, as pictures and as a video."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from ...formats.images import write_png
from ...tasks import once
from ...tasks.colorization import color_picture
from ..video_parts import VideoParts
from .base import FORMAT_REGISTRY, Format, Job, Place, Predicted


@FORMAT_REGISTRY.register()
class Color(Format):
    """``NAME.png``, RGB, and ``video.mp4`` of all frames."""

    name = "color"
    each_frame = "*.png"

    def __init__(self, predicted: Predicted) -> None:
        """Refuses models of other things."""
        predicted.need(self.name, "color", fix="only models of colours colour frames")
        super().__init__(predicted)

    def start(self, place: Place) -> None:
        """Begins the video file, or goes on after its parts.

        Raises:
            UserError: one of the parts is missing or damaged.
        """
        super().start(place)
        self.video = VideoParts(
            place.folder / "video.mp4",
            self.predicted.fps,
            place.unfinished,
            place.name,
            done=place.done,
            parts=place.state.get("parts", ()),
            unsaved=place.unsaved,
        )

    def frame(self, frame: Mapping[str, Any], output: Mapping[str, Any]) -> Job:
        """Writes the picture; the video has a thread of its own."""
        path = self.place.folder / f"{self.place.stems(frame)}.png"
        picture = once(color_picture, output)
        self.video.write(picture)
        return partial(write_png, path, picture, level=1, tidy=False)

    def save(self) -> dict[str, Any]:
        """Finishes the current part."""
        return {"parts": self.video.save()}

    def end(self) -> None:
        """Writes the video file of what there is."""
        self.video.end()
