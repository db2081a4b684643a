"""Reads runs on image sets, and computes from their rows what the report of TTT-MAE online shows.

The unit is the picture: the seeds of a picture are averaged first, and intervals are those of a
mean over pictures.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from ..errors import UserError
from ..stream.directory import flatten, read_rows
from ..tasks.metrics import Record
from ..world.image_sets import part_of
from .runs import read_run
from .statistics import Interval, mean_by_key

T = TypeVar("T")

BASELINE = "Baseline"
CASES = {
    (True, True): "both right",
    (True, False): "only the method right",
    (False, True): "only the baseline right",
    (False, False): "none right",
}
"""Names of what may be right, by whether the method and the baseline are."""

_METHODS = {"none": BASELINE, "ttt_mae_no_memory": "TTT-MAE", "online_ttt_mae": "TTT-MAE online"}
_ORDERS = {
    "time": "as listed", "class": "class order", "shuffled": "shuffled",
    "first": "first corruption first", "second": "second corruption first",
    "severity": "rising severity",
}  # fmt: skip
_HOST_KEYS = ("RECORD_STEPS", "MICRO_BATCH_SIZE")  # they change no prediction


@dataclass(frozen=True, eq=False)
class ImageRun:
    """The records of one run by ``frame_index``, in the order in which its pictures came.

    ``row`` is the method, with the order of the pictures where it matters because nothing is reset.
    """

    path: Path
    row: str
    dataset: str
    seed: int
    weights: str
    settings: Mapping[str, Any]
    records: Mapping[int, Record]

    @property
    def steps(self) -> int:
        """Number of gradient steps after each of which every picture has a prediction, else 0."""
        return min(len(record.get("steps", ())) for record in self.records.values())


def has_image_classes(path: Path) -> bool:
    """Returns whether a run has a summary, and the class of an image in its first row."""
    if not (path / "summary.json").is_file():
        return False
    row = next(read_rows(path / "frames.jsonl"), {})
    return "image_classes" in row.get("records", {})


def read_image_runs(paths: Iterable[Path], *, allow_incomplete: bool = False) -> list[ImageRun]:
    """Reads runs, and the frozen model of those with ``--compare`` as a baseline.

    With ``allow_incomplete``, runs that were cut off are read, too, and every run keeps only the
    pictures that all runs on its data set have.

    Raises:
        UserError: a folder holds no finished run on an image set, or runs do not compare: other
            weights, other pictures, other settings of one row, or a seed that is there twice.
    """
    runs: list[ImageRun] = []
    for path in paths:
        summary = read_run(path).summary
        if not summary["complete"] and not allow_incomplete:
            raise UserError(f"the run in {path} is not complete; resume it, or --allow-incomplete")
        found = _records(path)
        settings = {
            key: value for key, value in flatten(summary["settings"]).items()
            if key not in _HOST_KEYS
        }  # fmt: skip
        for who, records in found.items():
            method = "none" if who == "frozen" else summary["method"]
            row = _METHODS.get(method, method)
            if method != "none" and settings["RESET"] == "never":
                row += f", {_order(settings['FRAME_ORDER'], summary['dataset'])}"
            about = (summary["dataset"], summary["seed"], summary["weights_sha256"])
            runs.append(ImageRun(path, row, *about, {} if method == "none" else settings, records))
    if allow_incomplete:
        runs = [_restricted(run, _shared(runs, run.dataset)) for run in runs]
    _check(runs)
    return _one_baseline(runs)


def _order(order: str, dataset: str) -> str:
    """Returns how the pictures of a set came, in words."""
    parts = [part for part in (part_of(dataset, 0), part_of(dataset, 1)) if part is not None]
    corruptions = {("first", "second")[part.group]: part.corruption for part in parts}
    return f"{corruptions[order]} first" if order in corruptions else _ORDERS[order]


def _shared(runs: Sequence[ImageRun], dataset: str) -> set[int]:
    """Returns the pictures that all runs on a data set have."""
    found = set.intersection(*(set(run.records) for run in runs if run.dataset == dataset))
    if not found:
        raise UserError(f"the runs on {dataset} have no picture in common; tabulate them apart")
    return found


def _restricted(run: ImageRun, kept: set[int]) -> ImageRun:
    return replace(run, records={i: r for i, r in run.records.items() if i in kept})


def _records(path: Path) -> dict[str, dict[int, Record]]:
    """Returns the records of the adapted model and, with ``--compare``, of the frozen one."""
    found: dict[str, dict[int, Record]] = {"adapted": {}, "frozen": {}}
    for row in read_rows(path / "frames.jsonl"):
        for who, part in (("adapted", row), ("frozen", row.get("frozen", {}))):
            record = part.get("records", {}).get("image_classes")
            if record is not None:
                found[who][row["frame_index"]] = record
    if not found["adapted"]:
        raise UserError(f"{path} has no rows with classes of images; give runs on an image set")
    return {who: records for who, records in found.items() if records}


def _check(runs: Sequence[ImageRun]) -> None:
    first: dict[Any, tuple[Any, Path]] = {}
    for run in runs:
        facts = (
            ("weights", "", run.weights),
            ("pictures", run.dataset, sorted(run.records)),
            ("settings", (run.row, run.dataset), run.settings),
        )
        for what, group, value in facts:
            expected, path = first.setdefault((what, group), (value, run.path))
            if value != expected:
                raise UserError(
                    f"{path} and {run.path} differ in {what} and cannot share a row or a column; "
                    "tabulate them apart, or with --layout plain"
                )
        if run.row != BASELINE:
            key = (run.row, run.dataset, run.seed)
            _, path = first.setdefault(key, (None, run.path))
            if path != run.path:
                raise UserError(f"{path} and {run.path} are the same method with the same seed")


def _one_baseline(runs: Sequence[ImageRun]) -> list[ImageRun]:
    """Keeps one baseline for each data set, since the frozen model gives the same in every run."""
    kept: dict[Any, ImageRun] = {}
    for run in runs:
        kept.setdefault((run.row, run.dataset, -1 if run.row == BASELINE else run.seed), run)
    return list(kept.values())


def datasets(runs: Sequence[ImageRun]) -> list[str]:
    """Returns the data sets of runs, sorted."""
    return sorted({run.dataset for run in runs})


def corruption(dataset: str, place: int = 0) -> str:
    """Returns the corruption of a picture of a set, else the set's name."""
    part = part_of(dataset, place)
    return part.corruption if part else dataset


def rows(runs: Sequence[ImageRun]) -> list[str]:
    """Returns the methods of runs: baseline, reset for each picture, online, others."""
    known = (*_METHODS.values(),)
    found = {run.row for run in runs}
    return sorted(found, key=lambda r: ([*known, r].index(r.partition(",")[0]), r))


def runs_of(runs: Sequence[ImageRun], row: str, dataset: str) -> list[ImageRun]:
    """Returns the runs of a method on a data set, by seed."""
    own = [run for run in runs if (run.row, run.dataset) == (row, dataset)]
    return sorted(own, key=lambda run: run.seed)


class Share(NamedTuple):
    """A mean over pictures in percent, and its 95 % interval; None of a single picture."""

    percent: float
    interval: Interval | None


def is_right(record: Record, top: int = 1) -> float:
    """Returns 100 if the label is among the first ``top`` classes, else 0."""
    return 100.0 * (record["label"] in record["top"][:top])


def by_picture(runs: Iterable[ImageRun], top: int = 1) -> dict[int, float]:
    """Returns each picture's accuracy, 0 to 100: the mean over seeds."""
    return mean_by_key({i: is_right(r, top) for i, r in run.records.items()} for run in runs)


def share(values: Iterable[float]) -> Share:
    """Returns the mean of values, one per picture, and 1.96 standard errors on each side."""
    array = np.fromiter(values, float)
    mean = float(array.mean())
    if len(array) < 2:
        return Share(mean, None)
    half = 1.96 * float(array.std(ddof=1)) / len(array) ** 0.5
    return Share(mean, Interval(mean - half, mean + half))


def gain(ours: Mapping[int, float], reference: Mapping[int, float]) -> Share:
    """Returns the mean difference of the same pictures."""
    return share(ours[i] - reference[i] for i in ours)


def after_step(runs: Iterable[ImageRun], step: int) -> dict[int, float]:
    """Returns each picture's accuracy, 0 to 100, after a recorded step; the mean over seeds."""
    return mean_by_key(
        {i: 100.0 * (r["label"] in r["steps"][step]["top"][:1]) for i, r in run.records.items()}
        for run in runs
    )


def after_each_step(runs: Sequence[ImageRun]) -> list[Share]:
    """Returns the accuracy after each recorded step."""
    steps = range(min(run.steps for run in runs))
    return [share(after_step(runs, step).values()) for step in steps]


def changes(record: Record) -> int:
    """Returns how often the predicted class differs from that of the step before."""
    return sum(a["top"][:1] != b["top"][:1] for a, b in pairwise(record["steps"]))


def change_counts(runs: Sequence[ImageRun]) -> dict[int, Share]:
    """Returns the share of pictures, in percent, by number of changes from 0 to the most."""
    found = [{i: changes(record) for i, record in run.records.items()} for run in runs]
    most = max(max(counts.values()) for counts in found)
    return _shares(found, range(most + 1))


def four_cases(runs: Sequence[ImageRun], baseline: ImageRun) -> dict[str, Share]:
    """Returns the share of pictures, in percent, in each of :data:`CASES`."""
    found = [
        {i: CASES[bool(is_right(record)), bool(is_right(baseline.records[i]))]
         for i, record in run.records.items()}
        for run in runs
    ]  # fmt: skip
    return _shares(found, CASES.values())


def _shares(runs: Sequence[Mapping[int, T]], values: Iterable[T]) -> dict[T, Share]:
    """Returns the share of pictures with each of some values; a picture's runs are averaged."""

    def of(value: T) -> Share:
        found = mean_by_key({i: 100.0 * (v == value) for i, v in run.items()} for run in runs)
        return share(found.values())

    return {value: of(value) for value in values}


def moving_accuracy(run: ImageRun, width: int = 300) -> list[float]:
    """Returns the accuracy over the last ``width`` pictures, from the ``width``-th picture on."""
    right = [is_right(record) for record in run.records.values()]
    sums = np.cumsum([0.0, *right])
    found: list[float] = ((sums[width:] - sums[:-width]) / width).tolist()
    return found


class Example(NamedTuple):
    """A picture whose scores by step are worth seeing."""

    kind: str  # one of success, near miss, oscillation, constant failure
    frame_index: int


def examples(run: ImageRun) -> list[Example]:
    """Returns a picture of each kind that a run with recorded steps has.

    - success: the first step's prediction is wrong and the last one's right, with the largest gain
      of the label's score;
    - near miss: the last prediction is wrong, the label second, and nearest to the first;
    - oscillation: the most changes of the prediction, at least two;
    - constant failure: the same wrong class after every step, with the highest score at the end.

    The lower ``frame_index`` of equals is taken.
    """
    best: dict[str, tuple[float, int]] = {}
    for index, record in sorted(run.records.items()):
        for kind, value in _kinds(record).items():
            if kind not in best or value > best[kind][0]:
                best[kind] = (value, index)
    order = ("success", "near miss", "oscillation", "constant failure")
    return [Example(kind, best[kind][1]) for kind in order if kind in best]


def _kinds(record: Record) -> dict[str, float]:
    """Returns how well a picture shows each kind that it is of."""
    label, first, last = record["label"], record["steps"][0], record["steps"][-1]
    found: dict[str, float] = {}
    if not (first["top"] and last["top"]):  # nothing was predicted
        return found
    right = last["top"][0] == label
    if right and first["top"][0] != label:
        found["success"] = last["score"] - first["score"]
    if not right and last["top"][1:2] == [label]:
        found["near miss"] = last["scores"][1] - last["scores"][0]
    times = changes(record)
    if times >= 2:
        found["oscillation"] = float(times)
    if not right and times == 0:
        found["constant failure"] = last["scores"][0]
    return found


def scores_by_step(record: Record, count: int = 3) -> dict[int, list[float]]:
    """Returns the probabilities, in percent, of a few classes after each step.

    They are the label and the ``count`` classes with the highest mean probability. NaN stands where
    a class is not among the five that a step has recorded.
    """
    steps = record["steps"]
    means: Counter[int] = Counter()
    for step in steps:
        means.update(dict(zip(step["top"], step["scores"], strict=True)))
    chosen = dict.fromkeys([record["label"], *(c for c, _ in means.most_common(count))])
    lines = {}
    for wanted in chosen:
        known = [dict(zip(s["top"], s["scores"], strict=True)).get(wanted) for s in steps]
        if wanted == record["label"]:
            known = [step["score"] for step in steps]
        lines[wanted] = [float("nan") if p is None else 100 * p for p in known]
    return lines


def by_part(run: ImageRun) -> dict[int, str]:
    """Returns the part of each picture where a set has several: its corruption, or its severity."""
    parts = {i: part_of(run.dataset, i) for i in run.records}
    known = {i: part for i, part in parts.items() if part is not None}
    if len({part.corruption for part in known.values()}) > 1:
        return {i: part.corruption for i, part in known.items()}
    if len({part.severity for part in known.values()}) > 1:
        return {i: f"severity {int(p.severity)} to {int(p.severity) + 1}" for i, p in known.items()}
    return {}
