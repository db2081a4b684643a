"""A source without its colours: what a model that is to restore them may see."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import cast

import numpy as np
import torch
from detectron2.config import CfgNode
from torch import Tensor

from ..color.bins import is_grey
from ..color.lab import in_three_channels, rgb_to_lab, to_grey
from ..formats.images import FrameTransform
from ..structures import Frame, FrameSource
from .fingerprint import Fingerprint

logger = logging.getLogger(__name__)


def open_videos(
    cfg: CfgNode, open_sources: Callable[[FrameTransform], list[FrameSource]]
) -> list[FrameSource]:
    """Opens videos with the frames that a config's model takes, grey where ``INPUT.GREY`` says so.

    Args:
        cfg: resolved.
        open_sources: opens them, with a transform that makes the network's input.
    """
    # Sources call it in the thread that decodes ahead, so that pinning costs the loop no time.
    pinned = cfg.MODEL.DEVICE.startswith("cuda") and torch.cuda.is_available()
    transform = FrameTransform.from_config(cfg, pinned=pinned)
    if cfg.INPUT.GREY == "off":
        return open_sources(transform)
    keep = cfg.INPUT.GREY == "made"
    sources = open_sources(FrameTransform())
    return [GreyFrames(source, transform, keep_original=keep) for source in sources]


def has_colour(rgb: Tensor) -> bool:
    """Says whether a picture, (3, H, W) uint8 RGB, has a pixel with |a| or |b| above 5.

    What compression leaves in a black-and-white film is mostly below that.
    """
    # Where the channels differ by 6 or less, |a| and |b| are below 5. So grey pictures are quick.
    odd = rgb.amax(0).int() - rgb.amin(0).int() > 6
    return bool(odd.any()) and not is_grey(rgb_to_lab(rgb[:, odd][..., None])[None, 1:]).item()


def grey_input(rgb: Tensor, transform: Callable[[np.ndarray], Tensor]) -> dict[str, Tensor]:
    """Returns what a model may see of a picture, (3, H, W) uint8 RGB.

    Returns:
        ``image``, the network's input, three times the same plane, by which a model knows that it
        has no colour (:func:`is_one_plane`); ``grey``, (1, H, W) uint8.
    """
    grey = to_grey(rgb)
    image = transform(np.stack([grey[0].numpy()] * 3, -1))
    return {"image": in_three_channels(image[:1].clone()), "grey": grey}


class GreyFrames:
    """The frames of a source, turned grey before a window or a model sees them.

    The grey is the neutral one of the same lightness L (:func:`to_grey`), since L is what Zhang et
    al. (2016) predict colours from and what a prediction keeps. So a grey frame stays as it is.
    It is taken at the frame's own size and resized after, as a black-and-white film would be.

    A frame has ``image``, three times the same values; ``grey``, the same at its own size, on which
    colours are laid; and with ``keep_original`` the label ``original``, which no window takes.
    """

    def __init__(
        self,
        source: FrameSource,
        transform: Callable[[np.ndarray], Tensor],
        *,
        keep_original: bool,
    ) -> None:
        """
        Args:
            source: gives ``image`` in RGB at the frame's own size: ``FrameTransform(0)``.
            transform: makes the network's input, (3, h, w) uint8, of (H, W, 3) uint8 pixels.
            keep_original: the source's colours are what a prediction is scored by. False for a
                black-and-white film, whose frames have no label.
        """
        self.source = source
        self.transform = transform
        self.keep_original = keep_original
        self.video_id = source.video_id
        self.fps: float | None = source.fps
        self.live = source.live

    @property
    def num_frames(self) -> int | None:
        """Returns how many frames to expect; None where nobody knows."""
        return self.source.num_frames

    @property
    def skipped(self) -> Sequence[str]:
        """Returns the source's."""
        return self.source.skipped

    def fingerprint(self) -> Fingerprint | None:
        """Returns what the source's files are known by; None if it does not say."""
        return self.source.fingerprint()

    def __iter__(self) -> Iterator[Frame]:
        return self._turned(self.source)

    def frames_after(self, frame_index: int) -> Iterator[Frame]:
        """Returns the frames that follow the one with this index, in the source's order."""
        return self._turned(self.source.frames_after(frame_index))

    def _turned(self, frames: Iterable[Frame]) -> Iterator[Frame]:
        coloured = False
        for frame in frames:
            if not coloured and has_colour(frame["image"]):
                coloured = True
                if not self.keep_original:
                    logger.warning(
                        "video %s is taken as black and white, but frame %d has colours: they are "
                        "dropped and score nothing",
                        self.video_id,
                        frame["frame_index"],
                    )
            yield self._grey(frame)
        if self.keep_original and not coloured:
            logger.warning(
                "video %s is black and white: it has no colours that a prediction can be scored by",
                self.video_id,
            )

    def _grey(self, frame: Frame) -> Frame:
        original = frame["image"]
        size = (3, frame["height"], frame["width"])
        if original.shape != size:
            raise ValueError(f"a frame of {size} was resized to {tuple(original.shape)} before")
        turned = {**frame, **grey_input(original, self.transform)}
        turned.pop("picture", None)  # `grey` is what a picture of the frame shows
        if self.keep_original:
            turned["original"] = original.permute(1, 2, 0).numpy()
        return cast(Frame, turned)
