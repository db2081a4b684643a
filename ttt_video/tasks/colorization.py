"""Colorization: a grey frame goes in, a coloured one comes out, scored against the original.

A frame's record has the numbers of the frame alone, and what a network says of its picture, so that
sets of any frames can be compared later: FID and IS need nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from ..config.keys import declare_keys
from ..errors import UserError
from ..formats.images import read_rgb
from .base import COLOR_LABELS, Augmented, Difference, Painter, Target, Task, once
from .color_numbers import (
    colorfulness,
    frechet_distance,
    mean_ciede2000,
    peak_signal_noise_ratio,
)
from .columns import Columns, ColumnTally, FrameNumber, flat, pack
from .metrics import Metric, Record, mean
from .outputs import STRIDE
from .picture_networks import COLOR_KEYS, describers, lpips, ssim
from .registry import TASK_REGISTRY

declare_keys("COLOR", COLOR_KEYS)


def color_picture(output: Mapping[str, Any]) -> np.ndarray:
    """Returns the coloured frame as (H, W, 3) uint8."""
    return np.ascontiguousarray(output["color"].permute(1, 2, 0).cpu().numpy())


def original_picture(frame: Mapping[str, Any]) -> np.ndarray:
    """Returns a labelled frame's original colours as (H, W, 3) uint8 RGB.

    Raises:
        UserError: the file that has them cannot be read.
    """
    given = frame["original"] if "original" in frame else read_rgb(frame["original_file_name"])
    return np.array(given, order="C")  # torch takes no array of other strides, or read-only


@TASK_REGISTRY.register()
class ColorizationTask(Task):
    """Compares coloured frames (``color``: (3, H, W) uint8 RGB) with the originals.

    A frame's label is its original picture: ``original``, (H, W, 3) uint8 RGB, or the file
    ``original_file_name``.
    """

    name = "colorization"
    kind = "colorization"
    label_keys = ("original", "original_file_name")
    output_keys = ("color",)
    evaluator_types = (COLOR_LABELS,)
    headline = "PSNR"
    tally = ColumnTally
    picture_rank = 0
    difference = Difference("color_distance", "CIEDE2000 of their colours {:.2f}")
    input_title = "grey"
    label_titles = ("original",)
    mappers = {"colorization": "crop", "colorization_lsj": "lsj"}  # noqa: RUF012

    @classmethod
    def labels(cls, frame: Mapping[str, Any]) -> bool:
        """Whether a frame has its original, as a picture or a file."""
        return any(key in frame for key in cls.label_keys)

    def _record(self, frame: Mapping[str, Any], output: Mapping[str, Any]) -> Record:
        ours, original = output["color"], once(original_picture, frame)
        if original.shape != (*ours.shape[1:], 3):
            raise UserError(
                f"{frame.get('file_name')} is {ours.shape[2]}x{ours.shape[1]} px coloured, but its "
                f"original {original.shape[1]}x{original.shape[0]}: give the original of this frame"
            )
        target = torch.from_numpy(original).to(ours.device).permute(2, 0, 1)
        error = ours.long() - target.long()
        record = {
            "squared_error": int((error * error).sum()),
            "values": error.numel(),
            "ciede2000": mean_ciede2000(ours, target),
            "colorfulness": colorfulness(original),
        }
        similarity = ssim(ours, target)
        if similarity is not None:
            record["ssim"] = similarity
        if self.cfg is None:
            return record
        for name, distance in lpips(self.cfg, ours, target).items():
            record[f"lpips_{name}"] = distance
        for name, describer in describers(self.cfg, ours.device).items():
            record[f"{name}_features"] = pack(once(describer.output, output).features)
            record[f"{name}_original"] = pack(describer.picture(target).features)
        return record

    @classmethod
    def class_names(cls, metadata: Any) -> list[str]:
        """Returns [], also for a data set whose other labels have classes."""
        return []

    @classmethod
    def training_labels(cls, record: Mapping[str, Any]) -> list[Any]:
        """Reads nothing: the augmented picture is the label."""
        return []

    @classmethod
    def training_target(cls, labels: Any, record: Mapping[str, Any], image: Augmented) -> Target:
        """Makes one mask, of the pixels that show the picture: the others are padding, no grey."""
        whole = np.ones((record["height"], record["width"]), np.uint8)
        return np.zeros(1, np.int64), image.transforms.apply_segmentation(whole)[None] > 0

    @classmethod
    def painter(cls, output: Mapping[str, Any], metadata: Any) -> Painter:
        """Shows the coloured frame in place of the grey one."""
        return partial(_instead, picture=color_picture(output))

    @classmethod
    def label_pictures(cls, frame: Mapping[str, Any]) -> dict[str, Callable[[], np.ndarray]]:
        """Returns the original colours of a frame that has them."""
        pictures = [partial(once, original_picture, frame)] if cls.labels(frame) else []
        return dict(zip(cls.label_titles, pictures, strict=False))

    @classmethod
    def differing(cls, output: Mapping[str, Any], other: Mapping[str, Any]) -> float:
        """Returns the mean CIEDE2000 of the colours of every fourth row's every fourth pixel."""
        return mean_ciede2000(*(each["color"][:, ::STRIDE, ::STRIDE] for each in (output, other)))


def _instead(image: np.ndarray, picture: np.ndarray) -> np.ndarray:
    return picture


_EXAMPLE = [
    {
        "squared_error": 100,
        "values": 100,
        "ssim": 0.5,
        "lpips_alex": 0.25,
        "lpips_vgg": 0.5,
        "ciede2000": 3.0,
        "colorfulness": 30.0,
    },
    {
        "squared_error": 1000,
        "values": 10,
        "ssim": 1.0,
        "lpips_alex": 0.75,
        "lpips_vgg": 1.0,
        "ciede2000": 5.0,
        "colorfulness": 10.0,
    },
]
_FULL = 20 * math.log10(255)  # dB where the mean squared error is 1


@ColorizationTask.add_metric
class PeakSignalNoiseRatio(Metric):
    """PSNR of each frame, and of all frames' errors pooled."""

    name = "PSNR"
    rule = (
        "10 log10(255^2 / mean squared error over the pixels and RGB channels, 8 bits) of each "
        "frame, one without error as if one value were off by 1; mean over all frames (PSNR_pooled,"
        " of the errors of all frames pooled, is another number)"
    )
    unit = "dB"
    needs = "squared_error"
    example = (_EXAMPLE, _FULL - 10)

    @staticmethod
    def frame(record: Record) -> float:
        return peak_signal_noise_ratio(record["squared_error"], record["values"])

    @staticmethod
    def value(total: Columns) -> float | None:
        pairs = zip(flat(total["squared_error"]), flat(total["values"]), strict=True)
        return mean([peak_signal_noise_ratio(*pair) for pair in pairs])

    @staticmethod
    def details(total: Columns) -> dict[str, float | None]:
        sums = [sum(flat(total.get(key, ()))) for key in ("squared_error", "values")]
        return {"PSNR_pooled": peak_signal_noise_ratio(*sums)} if sums[1] else {}


@ColorizationTask.add_metric
class StructuralSimilarity(FrameNumber):
    """SSIM, by torchmetrics."""

    name = "SSIM"
    rule = (
        "structural similarity of RGB frames, 8 bits (data range 255): Gaussian window of 11 px, "
        "sigma 1.5, K 0.01 and 0.03, borders mirrored and kept, mean over channels (torchmetrics); "
        "mean over all frames"
    )
    unit = "of at most 1"
    digits = 3
    needs = "ssim"
    example = (_EXAMPLE, 0.75)


_LPIPS = (
    "learned perceptual distance of RGB frames at their own size, weights 0.1, by the layers of "
    "ImageNet's {} (torchmetrics); mean over all frames"
)


@ColorizationTask.add_metric
class PerceptualDistance(FrameNumber):
    """LPIPS with the backbone that its authors recommend for evaluation."""

    name = "LPIPS"
    rule = _LPIPS.format("AlexNet")
    unit = "distance"
    digits = 3
    higher_is_better = False
    needs = "lpips_alex"
    example = (_EXAMPLE, 0.5)


@ColorizationTask.add_metric
class PerceptualDistanceVGG(FrameNumber):
    """LPIPS with the other backbone."""

    name = "LPIPS_vgg"
    rule = _LPIPS.format("VGG16")
    unit = "distance"
    digits = 3
    higher_is_better = False
    needs = "lpips_vgg"
    example = (_EXAMPLE, 0.75)


@ColorizationTask.add_metric
class ColorDifference(FrameNumber):
    """CIEDE2000: 1 is about what is just noticeable."""

    name = "CIEDE2000"
    rule = "colour difference CIEDE2000 (sRGB, D65, weights 1); mean over pixels, then all frames"
    unit = "Delta E"
    higher_is_better = False
    needs = "ciede2000"
    example = (_EXAMPLE, 4.0)


COLORFUL = (
    "colourfulness of {} (Hasler and Suesstrunk 2003, M3, population deviations); mean over all "
    "frames; no direction is better, that of the originals is the goal"
)


@ColorizationTask.add_metric
class OriginalColorfulness(FrameNumber):
    """Colourfulness of the labels, beside which that of the coloured frames says something."""

    name = "colorfulness_original"
    rule = COLORFUL.format("the originals")
    unit = "levels"
    higher_is_better = None
    axis = ""
    needs = "colorfulness"
    example = (_EXAMPLE, 20.0)


def _features(network: str, values: Sequence[tuple[float, float]]) -> list[Record]:
    return [
        {
            f"{network}_features": pack(torch.tensor([a])),
            f"{network}_original": pack(torch.tensor([b])),
        }
        for a, b in values
    ]


class _Frechet(Metric):
    """Frechet distance of two sets of features, of a network's layer before the classes."""

    network = ""
    unit = "squared distance"
    higher_is_better = False

    def value(self, total: Columns) -> float | None:
        ours, original = (
            np.concatenate(total[key]) for key in (f"{self.network}_features", self.needs)
        )
        return frechet_distance(ours, original)


_FRECHET = (
    "Frechet distance of normal distributions (unbiased covariances) of the {} of all coloured "
    "frames and of all originals, kept as float16; sets of other sizes do not compare"
)
_FIRST = ((0.0, 1.0), (2.0, 3.0))  # means 1 and 2, variances 2 and 2


@ColorizationTask.add_metric
class FrechetInceptionDistance(_Frechet):
    """FID."""

    name = "FID"
    rule = _FRECHET.format(
        "2,048 pooled features of TensorFlow's InceptionV3 of 2015, frames stretched to 299x299 px "
        "(bilinear, antialiased; torchmetrics),"
    )
    network, needs = "inception", "inception_original"
    example = (_features("inception", _FIRST), 1.0)


@ColorizationTask.add_metric
class FrechetLite0Distance(_Frechet):
    """What FID is, with a small network that can be had offline; the numbers are not FID's."""

    name = "FID_lite0"
    rule = _FRECHET.format(
        "1,280 pooled features of EfficientNet-Lite0 (not FID, which has InceptionV3's), frames "
        "stretched to 224x224 px (bilinear, antialiased),"
    )
    network, needs = "lite0", "lite0_original"
    example = (_features("lite0", _FIRST), 1.0)
