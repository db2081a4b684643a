"""Draws figures of runs on disk: metrics by frame, the best and worst frames, reconstructions.

Curves come from ``frames.jsonl``, pictures from the overlay videos, and a training's
reconstructions from its TensorBoard files.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from ..errors import UserError
from ..files import ffmpeg_name, file_stem, names_apart, path_text, read_json_object
from ..formats.images import read_rgb
from ..stream.directory import read_rows
from ..tasks import headlines, metrics, sign, tasks
from ..visualization.grid import picture_grid
from ..visualization.legend import BACKGROUND
from ..visualization.overlay import blend, caption, class_palette, colorize, resize, side_by_side
from .curves import plot_curves

_PANEL_WIDTH = 420  # pixels of each picture of a frame


def axes() -> dict[str, str]:
    """Returns the per-frame numbers that are drawn, with the labels of their axes."""
    drawn = {
        metric.frame_name or metric.name: metric.axis_label()
        for metric in metrics().values()
        if metric.axis_label()
    }
    return {**drawn, "loss_recon": "reconstruction loss before the step"}


class FrameNumbers(NamedTuple):
    """Numbers of one frame by name, without those that have no value.

    ``position`` is the frame's in the order in which the run met them, from 0 on.
    """

    file_name: str
    position: int
    adapted: dict[str, float]
    frozen: dict[str, float]


@dataclass
class RunCurves:
    """A run's per-frame numbers: by video, then by ``frame_index`` in ascending order."""

    path: Path
    label: str
    dataset: str
    split: bool = False  # overlays are one picture with a bar (--view split)
    videos: dict[str, dict[int, FrameNumbers]] = field(default_factory=dict)

    @property
    def headline(self) -> str | None:
        """The metric by which frames are best and worst; None without labels."""
        frames = [frame for video in self.videos.values() for frame in video.values()]
        return next((m for m in headlines() if any(m in frame.adapted for frame in frames)), None)


def read_curves(paths: Sequence[Path]) -> list[RunCurves]:
    """Reads the numbers of runs; a run's label is its method, with its folder if two share it.

    Raises:
        UserError: a folder holds no rows.
    """
    runs = []
    for path in paths:
        run = RunCurves(path, *_method_and_dataset(path), split=_has_split_view(path))
        for row in read_rows(path / "frames.jsonl"):
            missing = {"file_name", "video_id", "frame_index"} - row.keys()
            if missing:
                raise UserError(
                    f"{path / 'frames.jsonl'} has a row without {sorted(missing)[0]}; give the "
                    "folder of a run"
                )
            frozen = row.get("frozen", {})
            video = run.videos.setdefault(row["video_id"], {})
            video[row["frame_index"]] = FrameNumbers(
                row["file_name"],
                len(video),
                _known({**row.get("metrics", {}), "loss_recon": row.get("loss_recon")}),
                _known(frozen.get("metrics", {})),
            )
        if not run.videos:
            raise UserError(f"{path} has no rows of frames; give the folder of a run")
        run.videos = {
            video: dict(sorted(frames.items())) for video, frames in sorted(run.videos.items())
        }
        runs.append(run)
    labels = [run.label for run in runs]
    for run, name in zip(runs, names_apart(paths), strict=True):
        if labels.count(run.label) > 1 or run.label == "frozen":
            run.label = f"{run.label}, {name}"
    return runs


def _method_and_dataset(path: Path) -> tuple[str, str]:
    file = path / "summary.json"
    if not file.is_file():  # a run that is still going has no summary yet
        return path.name, ""
    summary = read_json_object(file)
    if not isinstance(summary.get("method"), str):
        raise UserError(f"{file} names no method; give the folder of a run")
    return summary["method"], summary.get("dataset", "")


def _has_split_view(path: Path) -> bool:
    file = path / "run.json"
    return file.is_file() and read_json_object(file).get("--view") == "split"


def _known(numbers: Mapping[str, float | None]) -> dict[str, float]:
    return {name: value for name, value in numbers.items() if value is not None}


# --- curves ---------------------------------------------------------------------------------------


def draw_curves(
    runs: Sequence[RunCurves], folder: Path, *, rolling: int | None = None, suffix: str = "svg"
) -> list[Path]:
    """Draws all runs into one figure for each video and each of :func:`axes`; returns the files.

    The files are ``NAME-VIDEO.SUFFIX`` in a folder. ``rolling`` is the width of the rolling mean in
    frames; None is a 25th of the video, and 1 draws no mean.
    """
    files = []
    for video_id in sorted({video for run in runs for video in run.videos}):
        for name, label in axes().items():
            series, frames = _series(runs, video_id, name)
            if series:
                file = folder / f"{name}-{file_stem(video_id)}.{suffix}"
                width = rolling if rolling is not None else max(1, len(frames) // 25)
                plot_curves(series, file, f"Video {video_id}", label, x=frames, rolling=width)
                files.append(file)
    return files


def _series(
    runs: Sequence[RunCurves], video_id: str, name: str
) -> tuple[dict[str, list[float]], list[int]]:
    """Returns the lines of one figure, and the frames that have a value in some line."""
    lines: dict[str, dict[int, float]] = {}
    for run in runs:
        video = run.videos.get(video_id, {})
        frozen = {i: frame.frozen[name] for i, frame in video.items() if name in frame.frozen}
        adapted = {i: frame.adapted[name] for i, frame in video.items() if name in frame.adapted}
        if frozen:
            others = lines.setdefault("frozen", {})
            if all(others.get(i, value) == value for i, value in frozen.items()):
                others.update(frozen)  # the same in every run of one video and model
            else:
                lines[f"frozen, {run.label}"] = frozen
        if adapted:
            lines[run.label] = adapted
    frames = sorted({i for line in lines.values() for i in line})
    return {
        label: [line.get(i, float("nan")) for i in frames] for label, line in lines.items()
    }, frames


# --- best and worst frames ------------------------------------------------------------------------


class Extreme(NamedTuple):
    """A frame with an extreme gain of the adapted over the frozen model."""

    rank: str  # "best 1", "worst 2"
    video_id: str
    frame_index: int
    metric: str
    frozen: float
    adapted: float

    def __str__(self) -> str:
        return (
            f"{self.rank}: video {self.video_id}, frame {self.frame_index}, {self.metric} "
            f"{self.frozen:.1f} frozen, {self.adapted:.1f} adapted "
            f"({self.adapted - self.frozen:+.1f})"
        )


def extreme_frames(run: RunCurves, count: int = 3, apart: int = 10) -> list[Extreme]:
    """Returns the frames that gained most and then those that gained least, most extreme first.

    Args:
        run: streamed with ``--compare``.
        count: of each kind, at most.
        apart: smallest distance of two chosen frames of a video, because neighbours look alike.
    """
    metric = run.headline
    candidates = [
        Extreme("", video_id, index, metric, frame.frozen[metric], frame.adapted[metric])
        for video_id, video in run.videos.items()
        for index, frame in video.items()
        if metric is not None and metric in frame.frozen and metric in frame.adapted
    ]
    chosen: list[Extreme] = []
    better = sign(metric or "")
    for kind, direction in (("best", -better), ("worst", better)):
        number = 0
        for one in sorted(candidates, key=lambda c: direction * (c.adapted - c.frozen)):
            near = (
                c.video_id == one.video_id and abs(c.frame_index - one.frame_index) < apart
                for c in chosen
            )
            if number < count and not any(near):
                number += 1
                chosen.append(one._replace(rank=f"{kind} {number}"))
    return chosen


def draw_extremes(run: RunCurves, extremes: Sequence[Extreme], file: Path) -> bool:
    """Draws frames as the overlay videos show them, with their labels if these are found.

    Returns False, and writes nothing, if no overlay video has any of these frames.
    """
    strips = []
    for one in extremes:
        shown = _overlay_frame(run, one.video_id, one.frame_index)
        if shown is None:
            continue
        panels = _split_panels(shown, run)
        labels = label_picture(run.dataset, run.videos[one.video_id][one.frame_index].file_name)
        if labels is not None:
            panels.insert(1, _label_panel(labels, panels[0].shape))
        height = round(panels[0].shape[0] * _PANEL_WIDTH / panels[0].shape[1])
        row = np.concatenate([resize(panel, (height, _PANEL_WIDTH)) for panel in panels], axis=1)
        strips += [caption(str(one), row.shape[1]), row]
    if strips:
        Image.fromarray(np.concatenate(strips)).save(file)
    return bool(strips)


class Pair(NamedTuple):
    """A frame and the one before it, between which predictions change: shares of pixels in %."""

    video_id: str
    frame_index: int
    frozen: float
    adapted: float

    def __str__(self) -> str:
        return (
            f"video {self.video_id}, frames {self.frame_index - 1} and {self.frame_index}: "
            f"{self.frozen:.1f} % of the pixels change frozen, {self.adapted:.1f} % adapted"
        )


def adjacent_frames(run: RunCurves, count: int = 1) -> list[Pair]:
    """Returns pairs of adjacent frames that the adapted model predicts most consistently.

    They have the largest difference in changed pixels to the frozen model, most first; motion
    changes pixels of both. A run without ``--compare`` has none.
    """
    pairs = [
        Pair(video_id, index, frame.frozen["change"], frame.adapted["change"])
        for video_id, video in run.videos.items()
        for index, frame in video.items()
        if index - 1 in video and "change" in frame.frozen and "change" in frame.adapted
    ]
    return sorted(pairs, key=lambda pair: pair.adapted - pair.frozen)[:count]


def draw_adjacent(run: RunCurves, pairs: Sequence[Pair], file: Path) -> bool:
    """Draws the paper's Figures 7 and 8: two columns for each pair, and rows as in the overlay.

    Returns False, and writes nothing, if no overlay video has any of these frames.
    """
    rows: list[dict[str, np.ndarray]] = [{}, {}, {}]
    for pair in pairs:
        for index in (pair.frame_index - 1, pair.frame_index):
            shown = _overlay_frame(run, pair.video_id, index)
            if shown is not None:
                panels = _split_panels(shown, run)
                chosen = (panels[0], *panels[1:][-2:])  # the frame, frozen, adapted
                for row, panel in zip(rows, chosen, strict=False):
                    row[f"video {pair.video_id}, frame {index}"] = panel
    if rows[0]:
        picture_grid([row for row in rows if row], file, column_width=_PANEL_WIDTH)
    return bool(rows[0])


def _split_panels(shown: np.ndarray, run: RunCurves) -> list[np.ndarray]:
    """Splits an overlay into the frame, frozen and adapted: stacked ones, or ones in a row.

    One with a bar between both models stays whole.

    `side_by_side` stacks what is wider than 16:9, so that a stack of three is at least 0.5 times as
    wide as high; three in a row are at least 1.3 times, if none is higher than twice its width.
    Frames of a task whose labels are pictures have a fourth one, and stand 2 x 2.
    """
    if run.split:
        return [shown]
    if any(task.label_titles for task in tasks() if task.headline == run.headline):
        return [part for row in np.array_split(shown, 2) for part in np.array_split(row, 2, axis=1)]
    stacked = shown.shape[1] < 1.3 * shown.shape[0]
    return np.array_split(shown, 3, axis=0 if stacked else 1)


def _label_panel(labels: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
    """Returns labels with a title, of the size of a panel that may have a legend below."""
    height, width = size[:2]
    scaled = resize(labels, (round(labels.shape[0] * width / labels.shape[1]), width))
    panel = np.full((height, width, 3), BACKGROUND, np.uint8)
    titled = side_by_side([scaled], ["labels"])[:height]
    panel[: len(titled)] = titled
    return panel


def _overlay_frame(run: RunCurves, video_id: str, frame_index: int) -> np.ndarray | None:
    names = [f"overlay-{file_stem(video_id)}.mp4"]
    if len(run.videos) == 1:
        names.append("overlay.mp4")
    file = next((run.path / name for name in names if (run.path / name).is_file()), None)
    if file is None:
        return None
    position = run.videos[video_id][frame_index].position  # skipped frames are in no video
    with av.open(ffmpeg_name(file)) as container:
        for number, frame in enumerate(container.decode(video=0)):
            if number == position:
                return frame.to_ndarray(format="rgb24")
    return None


def label_picture(dataset: str, file_name: str) -> np.ndarray | None:
    """Returns the labels of a frame over its image, (H, W, 3) uint8; None if it has none.

    The data set may be unknown; ``file_name`` is the frame's, as in its record.
    """
    if dataset not in DatasetCatalog.list():
        return None
    records = (r for r in DatasetCatalog.get(dataset) if path_text(r["file_name"]) == file_name)
    record = next(records, None)
    if record is None:
        return None
    labelled = (task.label_classes(record) for task in tasks() if task.labels(record))
    classes = next((found for found in labelled if found is not None), None)
    if classes is None:
        return None
    metadata = MetadataCatalog.get(dataset)
    image = read_rgb(record["file_name"])
    names = metadata.get("stuff_classes") or metadata.get("thing_classes")
    return blend(image, colorize(classes, class_palette(metadata, len(names))))


# --- reconstruction as training goes on -----------------------------------------------------------


def draw_training(folder: Path, file: Path, *, columns: int = 6) -> bool:
    """Draws the paper's Figure 3: image, masked input, and reconstructions, a row per image.

    The folder is the output of ``tools/train_net.py``; ``columns`` reconstructions are taken evenly
    over the training up to its end. Returns False, and writes nothing, if it drew none.
    """
    from tensorboard.backend.event_processing import event_accumulator

    events = event_accumulator.EventAccumulator(str(folder), size_guidance={"images": 0})
    events.Reload()
    rows: list[dict[str, np.ndarray]] = []
    for tag in sorted(tag for tag in events.Tags()["images"] if tag.startswith("reconstruction/")):
        found = {event.step: event.encoded_image_string for event in events.Images(tag)}
        steps = sorted(found)
        chosen = {steps[round(i)] for i in np.linspace(0, len(steps) - 1, columns)}
        row: dict[str, np.ndarray] = {}
        for step in sorted(chosen):
            # training/hooks.py draws image, masked input and reconstruction side by side.
            image, masked, reconstruction = np.split(_decode(found[step]), 3, axis=1)
            row.setdefault("image", image)
            row.setdefault("masked", masked)
            row[f"step {step}"] = reconstruction
        rows.append(row)
    if rows:
        picture_grid(rows, file, column_width=240)
    return bool(rows)


def _decode(encoded: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(encoded)).convert("RGB"))


def is_training(folder: Path) -> bool:
    """Returns whether a folder holds a training's TensorBoard files."""
    return any(folder.glob("events.out.tfevents.*"))
