"""The published numbers that tables set our runs beside, in percent.

Wang, Sun, Tandon, Gandelsman, Chen, Efros, Wang: Test-Time Training on Video Streams, JMLR 26
(2025) 1-29. The paper says "mean IoU, AP, PQ" and no more about the rule; the authors' release
averages the metric of single frames (protocol "release" here). The paper's KITTI-STEP "test" set is
the official train split (footnote 1).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

SOURCE = "Wang et al., Test-Time Training on Video Streams, JMLR 26 (2025)"

AP = "COCO Videos AP"
PQ = "COCO Videos PQ"
VAL = "KITTI-STEP val"
TEST = "KITTI-STEP test"


class Column(NamedTuple):
    """A column of Tables 1 and 4: one metric on one data set, or a part of such a column."""

    title: str
    dataset: str  # our name of the data set
    metric: str
    part: str = ""  # the class or video, if it shows only one
    whole: str = ""  # then the title of the column of all of them
    by: str = ""  # then "class" or "video"


COLUMNS = (
    Column(AP, "coco_videos_instance_all", "AP"),
    Column(PQ, "coco_videos_panoptic_all", "PQ"),
    Column(VAL, "kitti_step_video_sem_seg_val", "mIoU"),
    Column(TEST, "kitti_step_video_sem_seg_train", "mIoU"),
)

_THREE_VIDEOS = (
    "The paper's COCO Videos are 3 videos with 10,475 frames (Table 2), which it does not name; "
    "ten are published."
)
CAVEATS: Mapping[str, str] = {
    AP: _THREE_VIDEOS,
    PQ: _THREE_VIDEOS,
    TEST: "KITTI-STEP test is the official train split, as in the paper (footnote 1).",
}

# Frames of each column's videos. COCO Videos have "about 4,000" each.
_KITTI_VAL = {
    "0002": 233, "0006": 270, "0007": 800, "0008": 390, "0010": 294, "0013": 340, "0014": 106,
    "0016": 209, "0018": 339,
}  # fmt: skip
_KITTI_TRAIN = {
    "0000": 154, "0001": 447, "0003": 144, "0004": 314, "0005": 297, "0009": 803, "0011": 373,
    "0012": 78, "0015": 376, "0017": 145, "0019": 1059, "0020": 837,
}  # fmt: skip
_COCO_VIDEOS = (
    "bangkok", "bar", "berkeley", "havana", "house", "irvine", "paris", "restaurant", "school",
    "tokyo",
)  # fmt: skip
_COCO_VIDEOS_AT_LEAST = 2_000  # frames; a video with fewer has been cut short


def is_video_set(title: str, videos: Mapping[str, int] | None) -> bool:
    """Returns whether videos, given with their numbers of frames, are all those of a column.

    Names alone do not tell: a data set of the same name can hold other videos, or be cut short.
    """
    if title in (VAL, TEST):
        return videos == (_KITTI_VAL if title == VAL else _KITTI_TRAIN)
    if not videos or sorted(videos) != sorted(_COCO_VIDEOS):
        return False
    return min(videos.values()) >= _COCO_VIDEOS_AT_LEAST


class Method(NamedTuple):
    """A row: the paper's name, the metrics that it reports by column title, and its time."""

    name: str
    metrics: Mapping[str, float]
    seconds: float | None = None  # per frame on one A100, averaged over the KITTI-STEP test set


def _row(name: str, *values: float | None, seconds: float | None = None) -> Method:
    pairs = zip((AP, PQ, VAL, TEST), values, strict=True)
    return Method(name, {title: value for title, value in pairs if value is not None}, seconds)


# Keys are names of --method; the order is the paper's.
TABLE_1: Mapping[str, Method] = {
    "main_task_only": _row("Main Task Only", 16.7, 13.9, 53.8, 52.5, seconds=1.8),
    "joint_training": _row("MAE Joint Training", 16.5, 13.5, 53.5, 52.5, seconds=1.8),
    "ttt_mae_no_memory": _row("TTT-MAE No Memory", 35.4, 20.1, 53.6, 52.5, seconds=3.8),
    # Labels choose the best iteration of each video (Section 6.1).
    "offline_ttt_mae_oracle": _row(
        "Offline TTT-MAE All Frames", 33.6, 19.6, 53.2, 51.2, seconds=1.8
    ),
    "ln_adapt": _row("LN Adapt", 16.5, 14.7, 53.8, 52.5, seconds=2.0),
    "tent": _row("Tent", 16.6, 14.6, 53.8, 52.2, seconds=2.8),
    "tent_class_balance": _row("Tent with Class Balance", 16.7, 14.8, 53.8, 52.5, seconds=3.7),
    "self_train": _row("Self-Train", None, None, 54.7, 54.0, seconds=6.6),
    "self_train_class_balance": _row(
        "Self-Train with Class Balance", None, None, 54.1, 53.6, seconds=6.9
    ),
    "online_ttt_mae": _row("Online TTT-MAE", 37.6, 21.7, 55.4, 54.3, seconds=4.1),
}


class VideoSet(NamedTuple):
    """A data set of videos: mean seconds of a video, frames in all, frames per second, classes."""

    name: str
    length: float
    frames: int
    rate: float
    classes: int | None


TABLE_2 = (
    VideoSet("CityScapes-VPS", 1.8, 3_000, 17, 19),
    VideoSet("DAVIS", 3.5, 3_455, 30, None),
    VideoSet("YouTube-VOS", 4.5, 123_467, 30, 94),
    VideoSet("KITTI-STEP", 40, 8_008, 10, 19),
    VideoSet("COCO Videos", 350, 10_475, 10, 134),
)

# The ablation of the two forms of memory; its first and last row are in Table 1, too.
TABLE_4: Mapping[str, Method] = {
    "ttt_mae_no_memory": _row("TTT-MAE No Memory", 35.4, 20.1, 53.6, 52.5),
    "implicit_only": _row("Implicit Memory Only", 36.1, 20.7, 54.3, 54.4),
    "explicit_only": _row("Explicit Memory Only", 35.7, 20.2, 53.6, 52.5),
    "online_ttt_mae": _row("Online TTT-MAE", 37.6, 21.7, 55.4, 54.3),
}

# Colorization (Section 5.4), whose columns hold the paper's numbers alone: it does not say which 3
# of the ten videos they are of, nor the metrics' settings, and FID depends on both.
COLOR_COLUMNS = tuple(
    Column(f"COCO Videos {metric}", "the paper's 3 COCO Videos", metric)
    for metric in ("FID", "IS", "LPIPS", "PSNR", "SSIM")
)
COLOR_RULE = "as printed; sizes, set, splits and backbones are not said"
COLOR_CAVEATS = (
    "The paper's text claims that Online TTT-MAE wins by all metrics but SSIM, but of its numbers "
    "of LPIPS, where lower is better, Online TTT-MAE's is the worst and Zhang et al.'s the best.",
    "The paper's IS have deviations: 0.19, 0.12, 0.18 from top to bottom.",
)
COLOR_METRICS = (
    "FID", "FID_lite0", "IS", "IS_lite0", "LPIPS", "LPIPS_vgg", "PSNR", "SSIM", "CIEDE2000",
    "colorfulness", "colorfulness_original", "CDC",
)  # fmt: skip
"""What a table of colorization shows of ours."""


def _color_row(name: str, *values: float) -> Method:
    titles = (column.title for column in COLOR_COLUMNS)
    return Method(name, dict(zip(titles, values, strict=True)))


TABLE_3: Mapping[str, Method] = {
    "zhang": _color_row("Zhang et al.", 62.39, 5.00, 0.180, 22.27, 0.924),
    "main_task_only": _color_row("Main Task Only", 59.96, 5.23, 0.216, 20.42, 0.881),
    "online_ttt_mae": _color_row("Online TTT-MAE", 56.47, 5.31, 0.237, 22.97, 0.901),
}

# Section 5.1, "Alternative architectures", without adaptation; keys: META_ARCHITECTURE and depths.
ARCHITECTURES: Mapping[tuple[str, tuple[int, ...]], Method] = {
    ("SegFormer", (3, 8, 27, 3)): Method("SegFormer-B4", {VAL: 42.0}),
    ("DeepLabV3Plus", (101,)): Method("DeepLabV3+/RN101", {VAL: 53.1}),
    ("ZhangColorizer", ()): TABLE_3["zhang"],
}

# Section 5.1 gives points of mean IoU that an ensemble adds: vote 1.2, smoothing 0.4 and 0.3. (The
# vote adds "roughly the same" to Online TTT-MAE, without a number.)
ENSEMBLES = (
    Method("Main Task Only + Majority Vote", {VAL: 53.8 + 1.2}),
    Method("Main Task Only + Temporal Smoothing", {VAL: 53.8 + 0.4}),
    Method("Online TTT-MAE + Temporal Smoothing", {VAL: 55.4 + 0.3}),
)

IMAGE_SOURCE = (
    "Boelle and Breton, student report on TTT-MAE (January 2025): 5,000 pictures of ImageNet-C, "
    "severity 5, ViT-L, 20 steps of 32 copies"
)


class ImageNumbers(NamedTuple):
    """The numbers that the report has of one corruption, in percent of its pictures.

    top1: accuracy by row of its Table 3.
    only_ttt, only_baseline: Table 1, pictures that one of the two alone gets right.
    unchanged: Section 3.2, pictures whose prediction never changes through the 20 steps.
    """

    top1: Mapping[str, float]
    only_ttt: float
    only_baseline: float
    unchanged: float


_IMAGE_ROWS = (
    "Baseline", "TTT-MAE", "TTT-MAE online, class order", "TTT-MAE online, shuffled",
)  # fmt: skip


def _image_numbers(top1: tuple[float, ...], *others: float) -> ImageNumbers:
    return ImageNumbers(dict(zip(_IMAGE_ROWS, top1, strict=True)), *others)


IMAGES: Mapping[str, ImageNumbers] = {
    "elastic_transform": _image_numbers((31.4, 43.8, 61.6, 62.02), 13.42, 1.02, 62.3),
    "gaussian_noise": _image_numbers((19.0, 23.5, 46.1, 43.1), 5.32, 0.76, 76.6),
    "motion_blur": _image_numbers((32.1, 40.9, 51.1, 52.42), 10.66, 1.78, 61.6),
}

# Table 2, a stream of two corruptions; keys: the row, then the corruption ("all": their average).
IMAGE_PAIRS: Mapping[str, Mapping[str, float]] = {
    "TTT-MAE online, elastic_transform first": {
        "elastic_transform": 60.2, "gaussian_noise": 35.1, "all": 47.6,
    },
    "TTT-MAE online, gaussian_noise first": {
        "elastic_transform": 60.0, "gaussian_noise": 35.7, "all": 47.8,
    },
    "TTT-MAE online, shuffled": {"elastic_transform": 59.4, "gaussian_noise": 35.4, "all": 47.4},
}  # fmt: skip
