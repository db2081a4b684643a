"""A run on disk: one row per frame as it happens, and a summary computed from the rows alone."""

from __future__ import annotations

import json
import math
import os
from array import array
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import yaml

from ..errors import UserError
from .protocols import LabelInfo, Row, ScoredFrame, Scores, mean, rules


class RunDirectory:
    """The folder of one run: ``config.yaml``, ``frames.jsonl``, ``summary.json``.

    Rows are appended and flushed one by one; nothing that was written is deleted. A run that was
    cut off goes on with ``resume``: its finished frames are known and not written again.
    """

    def __init__(self, path: str | os.PathLike[str], *, resume: bool = False) -> None:
        """Creates the folder, or reopens it.

        Raises:
            UserError: it holds a run and ``resume`` is not set, or it cannot be a folder.
        """
        self.path = Path(path)
        self.frames_file = self.path / "frames.jsonl"
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"--output {self.path} is a file; give a folder")
        # A run that failed before its first frame is in nobody's way.
        if self.frames_file.exists() and self.frames_file.stat().st_size and not resume:
            raise UserError(
                f"{self.path} already holds a run; add --resume to go on with it, or choose "
                "another --output (to replace it, delete the folder yourself)"
            )
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--output {self.path} cannot be made: {error.strerror}") from error
        self.recorded: dict[str, set[int]] = {}
        self._drop_torn_row()
        for row in self.rows():
            self.recorded.setdefault(row["video_id"], set()).add(row["frame_index"])
        self._file = self.frames_file.open("a", encoding="utf-8")

    def _drop_torn_row(self) -> None:
        """A process killed while writing leaves half a row at the end, which is no result."""
        if not self.frames_file.exists():
            return
        content = self.frames_file.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            os.truncate(self.frames_file, whole)

    def rows(self) -> Iterator[Row]:
        """The rows so far, in the order in which they were written."""
        if self.frames_file.exists():
            with self.frames_file.open(encoding="utf-8") as file:
                for line in file:
                    yield json.loads(line)

    def has(self, video_id: str, frame_index: int) -> bool:
        """Whether a frame's row is on disk."""
        return frame_index in self.recorded.get(video_id, ())

    def append(self, row: Row) -> None:
        """Writes one row; it survives the process from here on."""
        self._file.write(json.dumps(row, allow_nan=False) + "\n")
        self._file.flush()
        self.recorded.setdefault(row["video_id"], set()).add(row["frame_index"])

    def write_text(self, name: str, text: str) -> None:
        """Writes a whole file at once: readers see the old one or the new one."""
        temporary = self.path / f".{name}.tmp"
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(self.path / name)

    def write_json(self, name: str, value: Row) -> None:
        """:meth:`write_text` of indented JSON."""
        self.write_text(name, json.dumps(value, indent=2, allow_nan=False) + "\n")

    def write_config(self, text: str) -> None:
        """Writes ``config.yaml``, the resolved config of all rows.

        Raises:
            UserError: there are rows of another config, which must not be mixed with new ones.
        """
        file = self.path / "config.yaml"
        if self.recorded and file.exists():
            old, new = (_flatten(yaml.safe_load(t)) for t in (file.read_text("utf-8"), text))
            differing = sorted(k for k in old.keys() | new.keys() if old.get(k) != new.get(k))
            if differing:
                raise UserError(
                    f"the run in {self.path} has another config ({', '.join(differing)}); resume "
                    "it with the same settings, or choose another --output"
                )
        self.write_text("config.yaml", text)

    def close(self) -> None:
        """Closes ``frames.jsonl``."""
        self._file.close()


def _flatten(config: Row, prefix: str = "") -> Row:
    """{"A": {"B": 1}} to {"A.B": 1}."""
    flat: Row = {}
    for key, value in config.items():
        nested = isinstance(value, dict)
        flat.update(_flatten(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value})
    return flat


def finite(record: dict[str, float]) -> Row:
    """Scalars for a row: JSON has no NaN, so a non-finite one becomes null."""
    return {k: v if math.isfinite(v) else None for k, v in record.items()}


def summarize(rows: Iterable[Row], info: LabelInfo | None = None) -> Row:
    """Metrics, counts and times of a run, from its rows alone, in whatever order they are.

    Args:
        rows: of ``frames.jsonl``.
        info: class names of the data set, and which frames its protocols score.

    Returns:
        ``frames``, ``videos`` (frames of each), ``skipped_steps``, ``loss_recon`` (mean),
        ``metrics`` of "adapted" and, where rows have it, "frozen" (see ``protocols.score``),
        ``protocols`` (the rule of each metric) and ``seconds`` per frame (mean, percentiles).
    """
    videos: dict[str, int] = {}
    scores = {who: Scores(info or LabelInfo()) for who in ("adapted", "frozen")}
    seconds: defaultdict[str, array[float]] = defaultdict(lambda: array("d"))
    losses = array("d")
    skipped = 0
    for row in rows:
        video_id = row["video_id"]
        videos[video_id] = videos.get(video_id, 0) + 1
        skipped += int(row.get("skipped_steps", 0))
        if row.get("loss_recon") is not None:
            losses.append(row["loss_recon"])
        for name in ("adapt_seconds", "predict_seconds"):
            seconds[name.removesuffix("_seconds")].append(row[name])
        seconds["frame"].append(row["adapt_seconds"] + row["predict_seconds"])
        if "frozen" in row:
            seconds["frozen_predict"].append(row["frozen"]["predict_seconds"])
        for who, part in (("adapted", row), ("frozen", row.get("frozen", {}))):
            if part.get("records"):
                scores[who].add(ScoredFrame(video_id, row["frame_index"], part["records"]))
    metrics = {who: result for who, own in scores.items() if (result := own.result())}
    return {
        "frames": sum(videos.values()),
        "videos": dict(sorted(videos.items())),
        "skipped_steps": skipped,
        "loss_recon": mean(losses),
        "metrics": metrics,
        "protocols": rules({name for numbers in metrics.values() for name in numbers}),
        "seconds": {name: _distribution(values) for name, values in seconds.items()},
    }


def _distribution(values: array[float]) -> Row:
    percentiles = {f"p{q}": float(np.percentile(values, q)) for q in (50, 90, 99)}
    return {"mean": mean(values), **percentiles}
