"""Reads frames: lists folders, decodes files to RGB, and converts pixels to a network's input."""

from __future__ import annotations

import logging
import os
import re
import struct
import zlib
from pathlib import Path

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data.transforms import ResizeShortestEdge, ResizeTransform
from detectron2.utils.file_io import PathManager
from PIL import ExifTags, Image, ImageOps
from torch import Tensor

from ..errors import UserError
from ..files import write_atomically

logger = logging.getLogger(__name__)

IMAGE_SUFFIXES = frozenset(
    {
        *(".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".bmp", ".dib", ".webp", ".tif", ".tiff"),
        *(".ppm", ".pgm", ".pbm", ".pnm", ".tga", ".jp2", ".avif"),
    }
)
"""Endings of the files that are frames."""

DECODING_ERRORS = (
    *(OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, OverflowError),
    *(struct.error, zlib.error, Image.DecompressionBombError),
)
"""The exceptions of Pillow's decoders for files that are damaged or no images."""


class BadFrame(UserError):
    """One frame cannot be read; the frames after it may be fine."""


# A decimal number outside of words and of longer dotted numbers, or else a whole number.
_NUMBER = re.compile(r"((?<![^\W_])(?<!\.)[0-9]+\.[0-9]+(?![^\W_])(?!\.)|[0-9]+)")


def natural_key(name: str) -> tuple[list[str | tuple[int, str]], str]:
    """Returns a sort key that puts ``frame2`` before ``frame10``: digits compare as numbers.

    A decimal number that stands alone or between separators, as in a time stamp, compares by its
    value: ``1.05`` before ``1.1``; in ``v1.9`` and ``2024.5.1`` the dots are text. Only the digits
    0-9 count as numbers; everything else compares as text. Names that differ only in zeros without
    a value are ordered by the name itself, so the order is total.
    """
    # Splitting by a group puts text at even and numbers at odd places, so types never mix.
    parts = enumerate(_NUMBER.split(name))
    return [_number(part) if place % 2 else part for place, part in parts], name


def _number(digits: str) -> tuple[int, str]:
    """Returns the whole part, and the decimals as text without trailing zeros."""
    whole, _, decimals = digits.partition(".")
    return int(whole), decimals.rstrip("0")


def list_folder(folder: Path) -> tuple[list[Path], list[Path]]:
    """Lists the image files and sub-folders of a folder in natural order, without hidden ones.

    A broken link with an image's name counts as an image, and fails when it is read.

    Raises:
        UserError: the folder is missing, a file, or cannot be read, or has another broken link,
            which may have been a folder.
    """
    files, folders, _ = _sort_entries(folder)
    return files, folders


def list_frames(folder: Path) -> list[Path]:
    """Returns the image files of :func:`list_folder`; warns about other files."""
    files, _, others = _sort_entries(folder)
    if files and others:
        logger.warning(
            "%s: %d files are not read as frames, such as %s; frames end in %s",
            folder,
            len(others),
            others[0].name,
            " ".join(sorted(IMAGE_SUFFIXES)),
        )
    return files


def _sort_entries(folder: Path) -> tuple[list[Path], list[Path], list[Path]]:
    """Returns image files, folders, and other files."""
    if not folder.exists():
        raise UserError(f"no such folder: {folder}")
    if not folder.is_dir():
        raise UserError(f"{folder} is a file, not a folder of frames: use --video for a video file")
    try:
        entries = [entry for entry in folder.iterdir() if not entry.name.startswith(".")]
    except OSError as error:
        raise UserError(f"folder {folder} cannot be listed: {error.strerror}") from error
    # The stem comes first, so that "frame.png" precedes "frame1.png".
    entries.sort(key=lambda entry: (natural_key(entry.stem), natural_key(entry.name)))
    images: list[Path] = []
    folders: list[Path] = []
    others: list[Path] = []
    for entry in entries:
        named_so = entry.suffix.lower() in IMAGE_SUFFIXES
        if entry.is_dir():
            folders.append(entry)
        elif entry.is_file():
            (images if named_so else others).append(entry)
        elif entry.exists():  # a pipe, a socket, a device
            others.append(entry)
        elif named_so:
            images.append(entry)
        else:
            raise UserError(
                f"{entry} is a link to nothing ({os.readlink(entry)}): mend or remove it"
            )
    # A folder's name has no suffix, even if it has a dot.
    folders.sort(key=lambda folder: natural_key(folder.name))
    return images, folders, others


def read_rgb(file_name: str) -> np.ndarray:
    """Decodes an image file, any path that detectron2's PathManager opens.

    Orientation (EXIF), palettes, grayscale and CMYK are resolved as detectron2's ``read_image``
    does; transparency is dropped. 16-bit images keep their high byte, as 16-bit colour images do
    in Pillow (its own conversion of 16-bit gray saturates at 255).

    Returns:
        (H, W, 3) uint8, RGB; possibly read-only.

    Raises:
        BadFrame: the file is missing, damaged, no image, or has float or 32-bit pixels.
    """
    try:
        with PathManager.open(file_name, "rb") as file, Image.open(file) as image:
            return image_pixels(image, file_name)
    except DECODING_ERRORS as error:
        raise BadFrame(f"frame {file_name} cannot be read ({decoding_reason(error)})") from error


def read_size(file_name: str) -> tuple[int, int]:
    """Returns the height and width in px of what :func:`read_rgb` gives, from the file's header.

    Raises:
        BadFrame: the file is missing or no image. Damage behind the header is not seen.
    """
    try:
        with PathManager.open(file_name, "rb") as file, Image.open(file) as image:
            width, height = image.size
            return (width, height) if _is_on_its_side(image) else (height, width)
    except DECODING_ERRORS as error:
        raise BadFrame(f"frame {file_name} cannot be read ({decoding_reason(error)})") from error


def image_pixels(image: Image.Image, name: str) -> np.ndarray:
    """Returns the pixels of a Pillow image as :func:`read_rgb` does, which says what is resolved.

    Raises:
        BadFrame: the pixels are float or 32-bit; ``name`` is in the message.
        DECODING_ERRORS: the file behind it is damaged.
    """
    image.load()
    upright = _upright(image)
    if upright.mode.startswith("I;16") or (
        # Older versions of Pillow open 16-bit gray PNG and PNM files in 32-bit mode.
        upright.mode == "I" and image.format in ("PNG", "PPM")
    ):
        upright = Image.fromarray((np.asarray(upright) >> 8).astype(np.uint8))
    elif upright.mode in ("I", "F"):
        raise BadFrame(
            f"frame {name} has 32-bit pixels, whose range is unknown: convert it to an 8-bit image"
        )
    elif upright.mode == "P" and "transparency" in upright.info:
        upright = upright.convert("RGBA")
    return np.asarray(upright.convert("RGB"))


def decoding_reason(error: Exception) -> str:
    """Returns the reason of one of :data:`DECODING_ERRORS` in one line."""
    reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(reason.split())


def _is_on_its_side(image: Image.Image) -> bool:
    """Returns whether the orientation tag turns an image by a quarter."""
    try:
        return image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
    except DECODING_ERRORS:
        return False


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except DECODING_ERRORS:  # the orientation tag is broken, but the pixels may be fine
        return image


class FrameTransform:
    """Converts decoded pixels to the network's input image.

    The result is that of detectron2's ``DefaultPredictor``: ``ResizeShortestEdge`` with bilinear
    interpolation on uint8, but without its draw from numpy's global random state.
    """

    def __init__(
        self,
        min_size: int = 0,
        max_size: int = 1333,
        format: str = "RGB",
        single_crop: tuple[int, int] | None = None,
        *,
        pinned: bool = False,
    ) -> None:
        """Checks and keeps the settings.

        Args:
            min_size: length of the shorter side in pixels; 0 keeps the original size.
            max_size: limit of the longer side in pixels; it takes precedence over ``min_size``.
            format: channel order of the output, "RGB" or "BGR".
            single_crop: (shorter side, side of the crop) in pixels; None takes whole pictures.
            pinned: whether images lie in memory that a GPU copies from while the CPU goes on.
        """
        if min_size < 0 or max_size < 1:
            raise UserError(
                f"frame size limits must be positive, not {min_size} and {max_size} pixels: "
                "set INPUT.MIN_SIZE_TEST (0 = no resizing) and INPUT.MAX_SIZE_TEST"
            )
        if format not in ("RGB", "BGR"):
            raise UserError(f'INPUT.FORMAT must be "RGB" or "BGR", not "{format}"')
        self.min_size = min_size
        self.max_size = max_size
        self.format = format
        self.single_crop = single_crop
        self.pinned = pinned

    @classmethod
    def from_config(cls, cfg: CfgNode, *, pinned: bool = False) -> FrameTransform:
        """Takes ``INPUT.`` MIN_SIZE_TEST, MAX_SIZE_TEST, FORMAT, SINGLE_CROP and IMAGE_SIZE."""
        size = cfg.INPUT
        crop = (size.SINGLE_CROP, size.IMAGE_SIZE) if size.SINGLE_CROP else None
        return cls(size.MIN_SIZE_TEST, size.MAX_SIZE_TEST, size.FORMAT, crop, pinned=pinned)

    def view(self, rgb: np.ndarray) -> np.ndarray:
        """Returns the part of a picture that is the frame: its single crop, or all of it."""
        return rgb if self.single_crop is None else single_crop(rgb, *self.single_crop)

    def __call__(self, rgb: np.ndarray) -> Tensor:
        """Converts (H, W, 3) uint8 RGB pixels to a (3, h, w) uint8 tensor with its own memory."""
        height, width = rgb.shape[:2]
        if self.min_size:
            new_height, new_width = ResizeShortestEdge.get_output_shape(
                height, width, self.min_size, self.max_size
            )
            if min(new_height, new_width) < 1:
                raise UserError(
                    f"a {height}x{width} frame has no pixels left when its longer side is "
                    f"{self.max_size}: raise INPUT.MAX_SIZE_TEST"
                )
            resize = ResizeTransform(height, width, new_height, new_width)
            rgb = resize.apply_image(np.ascontiguousarray(rgb))
        if self.format == "BGR":
            rgb = rgb[:, :, ::-1]
        planes = rgb.transpose(2, 0, 1)
        image = torch.empty(planes.shape, dtype=torch.uint8, pin_memory=self.pinned)
        np.copyto(image.numpy(), planes)
        return image


def single_crop(rgb: np.ndarray, resize: int, crop: int) -> np.ndarray:
    """Returns the centre of an (H, W, 3) uint8 picture whose shorter side was resized before.

    This is torchvision's ``Resize(resize, BICUBIC)`` and ``CenterCrop(crop)`` of Pillow pictures,
    to the last bit: Pillow resizes with antialiasing, the longer side is cut off to whole pixels,
    and a margin of an odd number of pixels is halved as Python rounds.

    Args:
        rgb: of any size.
        resize: length of the shorter side in pixels.
        crop: height and width of the result, at most ``resize``.
    """
    height, width = rgb.shape[:2]
    short = min(height, width)
    new = {side: int(resize * side / short) for side in (height, width)}
    image = Image.fromarray(np.ascontiguousarray(rgb))
    if (new[height], new[width]) != (height, width):
        image = image.resize((new[width], new[height]), Image.Resampling.BICUBIC)
    top, left = (round((new[side] - crop) / 2) for side in (height, width))
    return np.asarray(image.crop((left, top, left + crop, top + crop)))


def write_png(
    path: Path,
    pixels: np.ndarray,
    *,
    palette: np.ndarray | None = None,
    level: int = 6,
    tidy: bool = True,
) -> None:
    """Writes an (H, W) or (H, W, 3) array as PNG, completely or not at all.

    Args:
        path: the file, replaced if it exists.
        pixels: uint8 (or bool).
        palette: (256, 3) uint8, the colours of (H, W) pixels; None for gray.
        level: of zlib, 1 to 9. Pictures take a quarter of the time with 1, and a tenth more
            space.
        tidy: see :func:`~ttt_video.files.write_atomically`.
    """
    image = Image.fromarray(pixels)
    if palette is not None:
        image.putpalette(palette.tobytes())  # turns gray into indices
    write_atomically(
        path, lambda part: image.save(part, format="PNG", compress_level=level), tidy=tidy
    )
