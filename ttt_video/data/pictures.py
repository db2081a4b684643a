"""Turns pictures that a program holds, arrays or Pillow's images, into frames of a stream."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, cast

import numpy as np
from detectron2.config import CfgNode
from PIL import Image

from ..errors import UserError
from ..formats.images import FrameTransform, image_pixels
from ..structures import Frame
from .grey import grey_input

Picture = Any
"""An (H, W, 3) uint8 array, or anything that NumPy takes for one, or a Pillow image."""

COLORS = ("rgb", "bgr")


class PictureFrames:
    """Makes frames of pictures, for the model of one config."""

    def __init__(self, cfg: CfgNode, color: str = "rgb") -> None:
        """
        Args:
            cfg: resolved; ``INPUT`` says what the model takes.
            color: the order of an array's channels, "rgb" or, as in OpenCV, "bgr".
        """
        if color not in COLORS:
            raise UserError(f"color is {color!r}; give {' or '.join(map(repr, COLORS))}")
        self.reverse = color == "bgr"
        self.grey = cfg.INPUT.GREY != "off"
        self.transform = FrameTransform.from_config(cfg)
        self._size: tuple[int, int] | None = None

    def __call__(self, picture: Picture, video_id: str, frame_index: int) -> Frame:
        """Returns the frame of a picture; a frame comes back as it is.

        Raises:
            UserError: it is no picture, or has another size than the video's frames before.
        """
        if isinstance(picture, Mapping):
            return cast(Frame, picture)
        rgb = self.transform.view(self._rgb(picture))
        height, width = rgb.shape[:2]
        if frame_index == 0 or self._size is None:
            self._size = (height, width)
        if (height, width) != self._size:
            raise UserError(
                f"frame {frame_index} is {height}x{width} (height x width), but the frames before "
                f"it are {self._size[0]}x{self._size[1]}: frames of one video must have one size; "
                "start_video() begins another"
            )
        frame = {
            "height": height,
            "width": width,
            "video_id": video_id,
            "frame_index": frame_index,
            "file_name": f"{video_id}#{frame_index}",
        }
        if self.grey:
            frame.update(grey_input(FrameTransform()(rgb), self.transform))
        else:
            frame["image"] = self.transform(rgb)
        return cast(Frame, frame)

    def _rgb(self, picture: Picture) -> np.ndarray:
        """Returns (H, W, 3) uint8 RGB pixels."""
        if isinstance(picture, Image.Image):
            return image_pixels(picture, "of the image")
        if not hasattr(picture, "__array__"):
            fix = "; open the file first, as with PIL.Image.open" if _is_path(picture) else ""
            raise UserError(
                "a frame is an (H, W, 3) uint8 array or a Pillow image, not "
                f"{type(picture).__name__}{fix}"
            )
        try:
            pixels = np.asarray(picture)
        except (TypeError, RuntimeError) as error:  # a tensor on a GPU, or with gradients
            raise UserError(
                "a frame is no array that NumPy can read: " + " ".join(str(error).split())
            ) from error
        if pixels.dtype != np.uint8:
            such_as = "(255 * image).round().astype('uint8') of values from 0 to 1"
            if pixels.dtype == np.uint16:
                such_as = "(image >> 8).astype('uint8') of values from 0 to 65535"
            elif np.issubdtype(pixels.dtype, np.integer):
                such_as = "image.astype('uint8') of values from 0 to 255"
            raise UserError(f"a frame has {pixels.dtype} values: give uint8, such as {such_as}")
        if self.grey and pixels.ndim == 2:
            pixels = np.stack([pixels] * 3, axis=-1)
        if pixels.ndim != 3 or pixels.shape[2] != 3 or not pixels.size:
            raise UserError(
                f"a frame has the shape {pixels.shape}, not (height, width, 3): "
                + _fix(pixels.shape)
            )
        return pixels[:, :, ::-1] if self.reverse else pixels


def _is_path(picture: object) -> bool:
    return isinstance(picture, str | bytes) or hasattr(picture, "__fspath__")


def _fix(shape: tuple[int, ...]) -> str:
    """Returns what to do with an array of a wrong shape."""
    if 0 in shape:
        return "it has no pixels"
    if len(shape) == 2:
        if shape[1] == 3:  # rows of a single picture
            return "give run() several frames, such as [image], or step() one"
        return "make a grey picture one of three equal channels, np.stack([image] * 3, -1)"
    if len(shape) == 3 and shape[2] == 4:
        return "drop the transparency, image[:, :, :3]"
    if len(shape) == 3 and shape[2] == 1:
        return "make a grey picture one of three equal channels, image.repeat(3, 2)"
    if len(shape) == 3 and shape[0] == 3:
        return "put the channels last, image.transpose(1, 2, 0)"
    if len(shape) == 4:
        return "run() takes several frames, step() one"
    return "give one such array for each frame"


class PictureVideo:
    """The frames of pictures, as often as they are asked for."""

    def __init__(self, to_frame: PictureFrames, pictures: Iterable[Picture], video_id: str) -> None:
        """Keeps the pictures, which are converted when they are iterated over."""
        self.to_frame, self.pictures, self.video_id = to_frame, pictures, video_id

    def __iter__(self) -> Iterator[Frame]:
        for index, picture in enumerate(self.pictures):
            yield self.to_frame(picture, self.video_id, index)
