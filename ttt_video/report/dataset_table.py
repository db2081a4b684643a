"""Puts data sets of videos beside those of the paper's Table 2: lengths, rates, classes."""

from __future__ import annotations

from collections.abc import Sequence

from detectron2.data import MetadataCatalog

from ..data.sources import open_dataset
from ..formats.images import FrameTransform
from ..tasks import tasks_of
from .formats import Table
from .published import TABLE_2

UNKNOWN = "-"


def dataset_table(names: Sequence[str]) -> Table:
    """Returns a row per data set, and the published ones below; no picture is read.

    A data set has a rate, in frames per second, if its metadata has ``frame_rate``.

    Raises:
        UserError: a name is unknown, or a data set's files are missing or no videos.
    """
    rows = []
    for name in names:
        lengths = [source.num_frames for source in open_dataset(name, FrameTransform())]
        frames = None if None in lengths else sum(n for n in lengths if n is not None)
        metadata = MetadataCatalog.get(name)
        rate = metadata.get("frame_rate")
        found = tasks_of(metadata.get("evaluator_type"))
        known = len(found[0].class_names(metadata)) if found else 0
        seconds = f"{frames / len(lengths) / rate:.1f}" if rate and frames else UNKNOWN
        numbers = [str(len(lengths)), seconds, UNKNOWN if frames is None else f"{frames:,}"]
        rows.append([name, *numbers, f"{rate:g}" if rate else UNKNOWN, str(known or UNKNOWN)])
    for own in TABLE_2:
        numbers = [
            f"{own.length:g}",
            f"{own.frames:,}",
            f"{own.rate:g}",
            str(own.classes or UNKNOWN),
        ]
        rows.append([f"{own.name} (published)", UNKNOWN, *numbers])
    head = ["Data set", "Videos", "Length (s)", "Frames", "Rate (1/s)", "Classes"]
    return Table(head, rows, ["Length: the mean over the videos."], "Data sets")
