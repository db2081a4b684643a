"""Shifts of whole videos: which corruption, how strong, and when.

``SHIFTS`` is split by family: settings are chosen on the validation families only, and the test
families are for the final scores.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import UserError
from .corruptions import check_corruption, corrupt
from .video import WorldFrame, WorldVideo

SCHEDULES = ("constant", "ramp", "switch", "return")


@dataclass(frozen=True)
class Shift:
    """The corruptions of a video and their schedule.

    Attributes:
        corruptions: names; several only with "switch" and "return".
        severity: the highest severity, in [0, 5].
        schedule: "constant"; "ramp", from 0 in the first frame to ``severity`` in the last; or
            "switch", one corruption after another, each for an equal part of the video ("none" is
            allowed among them); or "return", the same with the clean video before the first one and
            after each: A B A C A.

    Raises:
        UserError: a name or schedule is unknown, the severity is out of range, or the number of
            corruptions does not fit the schedule.
    """

    corruptions: tuple[str, ...] = ("none",)
    severity: float = 3.0
    schedule: str = "constant"

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            raise UserError(
                f"unknown schedule {self.schedule!r}; choose one of: {', '.join(SCHEDULES)}"
            )
        for corruption in self.corruptions:
            check_corruption(corruption, self.severity)
        if self.schedule == "switch" and len(self.corruptions) < 2:
            raise UserError("the schedule switch needs at least two corruptions")
        if self.schedule == "return" and not self.corruptions:
            raise UserError("the schedule return needs at least one corruption")
        if self.schedule in ("constant", "ramp") and len(self.corruptions) != 1:
            raise UserError(
                f"the schedule {self.schedule} takes one corruption, not "
                f"{len(self.corruptions)}; several take turns with the schedule switch or return"
            )

    @property
    def name(self) -> str:
        """Returns a short and unique file name: "none", "fog-3", "fog-5-ramp", ..."""
        if set(self.corruptions) == {"none"}:
            return "none"
        name = f"{'+'.join(self.corruptions)}-{self.severity:g}"
        return name if self.schedule == "constant" else f"{name}-{self.schedule}"

    def at(self, frame_index: int, num_frames: int) -> tuple[str, float]:
        """Returns corruption and severity of a frame; a ramp over one frame is at its end."""
        if self.schedule == "ramp" and num_frames > 1:
            return self.corruptions[0], self.severity * frame_index / (num_frames - 1)
        return self.parts[self.part(frame_index, num_frames)], self.severity

    @property
    def parts(self) -> tuple[str, ...]:
        """The corruptions of the equal parts of the video, in time order."""
        if self.schedule != "return":
            return self.corruptions
        return ("none", *(name for own in self.corruptions for name in (own, "none")))

    def part(self, frame_index: int, num_frames: int) -> int:
        """Returns the number of the part that a frame is in, from 0."""
        return frame_index * len(self.parts) // max(num_frames, 1)


class ShiftedVideo:
    """A world video under a shift: a sequence of the same frames with corrupted images."""

    def __init__(self, video: WorldVideo, shift: Shift) -> None:
        self.video, self.shift = video, shift

    def __len__(self) -> int:
        return len(self.video)

    def __getitem__(self, index: int) -> WorldFrame:
        """Renders and corrupts frame ``index``; raises IndexError outside [-len, len)."""
        frame = self.video[index]
        index %= len(self)
        name, severity = self.shift.at(index, len(self))
        image = corrupt(frame.image, name, severity, self.video.seed, index, depth=frame.depth)
        return dataclasses.replace(frame, image=image)


FAMILIES: dict[str, tuple[str, ...]] = {
    "validation": (
        "gaussian_noise", "colour_shift", "fog", "darkness",  # looked at from the first day on
        "speckle_noise", "gaussian_blur", "spatter", "saturate",  # ImageNet-C's own for validation
    ),
    # For validation, too. They came later, and are apart so that "validation" still means the same.
    "more_validation": ("veiling_glare", "colour_matrix", "sensor_lines"),
    "test": (
        "shot_noise", "impulse_noise",
        "defocus_blur", "glass_blur", "motion_blur", "zoom_blur",
        "snow", "frost", "plasma_fog", "rain", "night",
        "brightness", "low_contrast", "elastic_transform", "pixelate", "jpeg_compression",
        "lens_dirt", "exposure_drift", "white_balance_drift",
    ),
}  # fmt: skip
"""Corruptions by split. The test families are 14 of ImageNet-C's 15 and five of our own;
gaussian_noise is for validation, because it was used before there was a split."""


def deal(corruptions: Sequence[str], each: int, video: int) -> tuple[str, ...]:
    """Deals out corruptions to videos like cards; returns those of one video.

    Neighbours in the list, which tend to be similar, go to different videos.

    Args:
        corruptions: n names, or one of ``FAMILIES``.
        each: the number of corruptions that a video gets, from 1 to n, all different.
        video: its number, from 0.

    Raises:
        UserError: ``each`` is out of range.
    """
    names = expand(corruptions)
    count = len(names)
    if not 1 <= each <= count:
        raise UserError(f"each video gets {each} of {count} corruptions; give 1 to {count}")
    stride = next(s for s in range(math.isqrt(count - 1) + 1, count + 2) if math.gcd(s, count) == 1)
    cards = range(video * each, (video + 1) * each)
    return tuple(names[card * stride % count] for card in cards)


def video_shift(
    corruptions: Sequence[str], each: int | None, severity: float, schedule: str, video: int
) -> Shift:
    """Returns the shift of a video that ``tools/make_world.py`` makes with these flags."""
    names = expand(corruptions) if each is None else deal(corruptions, each, video)
    return Shift(names, severity, schedule)


def expand(corruptions: Sequence[str]) -> tuple[str, ...]:
    """Replaces "validation" and "test" by their families."""
    return tuple(name for given in corruptions for name in FAMILIES.get(given, (given,)))


SHIFTS: dict[str, tuple[Shift, ...]] = {
    "validation": (
        Shift(),
        *(Shift((family,)) for family in FAMILIES["validation"]),
        *(Shift((family,), 5.0, "ramp") for family in ("darkness", "colour_shift")),
        Shift(("fog", "gaussian_noise"), 3.0, "switch"),
        Shift(("none", "gaussian_blur", "none", "colour_shift"), 3.0, "switch"),
    ),
    "test": (
        Shift(),
        *(Shift((family,)) for family in FAMILIES["test"]),
        *(Shift((family,), 5.0, "ramp") for family in ("night", "frost")),
        Shift(("rain", "motion_blur"), 3.0, "switch"),
        Shift(("none", "night", "none", "lens_dirt"), 3.0, "switch"),
    ),
}
"""The shifts of a comparison by split, with the clean video."""
