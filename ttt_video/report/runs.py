"""Reads runs from their ``summary.json``, and refuses to compare those that do not compare.

The runs of a table may differ in the method alone: not in preset, protocol, weights, videos, seeds.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..files import read_json_object
from ..stream.directory import flatten
from ..tasks import headlines, metrics
from . import published
from .published import Column
from .statistics import mean_by_key

Summary = dict[str, Any]

_FROZEN = ("none", "main_task_only", "joint_training")
_OFFLINE = ("offline_ttt_mae", "offline_ttt_mae_oracle")
_OURS = ("MaskFormerTTT", "ColorizerTTT")  # the architectures of the paper's tables
_ENSEMBLES = {"majority_vote": "Majority Vote", "temporal_smoothing": "Temporal Smoothing"}
_NAMES = {
    **{key: row.name for key, row in {**published.TABLE_1, **published.TABLE_4}.items()},
    "offline_ttt_mae": "Offline TTT-MAE, Fixed Iterations",
}
_REQUIRED = (
    "complete", "dataset", "videos", "method", "settings", "architecture", "jointly_trained",
    "preset", "seed", "weights_sha256", "metrics", "protocols", "seconds", "device",
)  # fmt: skip
_TOLERANCE = 0.1  # points between the frozen model's numbers of two runs, as on two devices


@dataclass(frozen=True, eq=False)
class Part:
    """The results of one model in one run: the method's, or those of the frozen model beside it."""

    path: Path
    summary: Summary
    who: str = "adapted"  # or "frozen"

    @property
    def dataset(self) -> str:
        """Name of the data set; empty where the videos are a folder or a file."""
        return self.summary["dataset"]

    @property
    def frozen(self) -> bool:
        """Whether nothing adapts; then neither seed nor settings matter."""
        return self.who == "frozen" or self.summary["method"] in _FROZEN

    @property
    def offline(self) -> bool:
        """Whether the method trained on the whole video before its first prediction."""
        return self.who == "adapted" and self._inner in _OFFLINE

    @property
    def _inner(self) -> str:
        """The method, or the one inside an ensemble."""
        method = self.summary["method"]
        return self.summary["settings"]["ENSEMBLE"]["METHOD"] if method in _ENSEMBLES else method

    @property
    def name(self) -> str:
        """The paper's name of the method, else ours, after that of any other architecture."""
        if self.who == "frozen":
            return self._name("none")
        ensemble = _ENSEMBLES.get(self.summary["method"])
        return self._name(self._inner) + (f" + {ensemble}" if ensemble else "")

    def _name(self, method: str) -> str:
        architecture = self.summary["architecture"]
        if architecture not in _OURS:
            depths = tuple(self.summary.get("depths") or ())
            known = published.ARCHITECTURES.get((architecture, depths))
            size = f" (depth {', '.join(map(str, depths))})" if depths else ""
            base = known.name if known else f"{architecture}{size}"
            return base if method in _FROZEN else f"{base} + {_NAMES.get(method, method)}"
        if method == "none":
            method = "joint_training" if self.summary["jointly_trained"] else "main_task_only"
        return _NAMES.get(method, method)

    @property
    def _metrics(self) -> dict[str, Any]:
        found: dict[str, Any] = self.summary["metrics"].get(self.who, {})
        return found

    def value(self, metric: str) -> float | None:
        """Returns a metric over all videos; None where it is undefined or was not computed."""
        return self._metrics.get(metric)

    def by_video(self, metric: str) -> dict[str, float]:
        """Returns a metric by video, where it is defined; for a mean over videos, its terms."""
        metric = metric.removesuffix("_video_mean")
        videos = self._metrics.get("videos", {})
        return {k: v[metric] for k, v in videos.items() if v.get(metric) is not None}

    def by_class(self, metric: str) -> dict[str, float]:
        """Returns a metric by class, where it is defined; {} if it is not computed by class."""
        known = metrics().get(metric)
        name = (known and known.per_class) or metric
        numbers = self._metrics.get("per_class", {}).get(name, {})
        return {k: v for k, v in numbers.items() if v is not None}

    def by(self, kind: str, metric: str) -> dict[str, float]:
        """Returns a metric by "class" or "video"."""
        return self.by_class(metric) if kind == "class" else self.by_video(metric)

    def number(self, column: Column) -> float | None:
        """Returns the number that belongs into a column of this data set."""
        if column.by:
            return self.by(column.by, column.metric).get(column.part)
        return self.value(column.metric)

    @property
    def seconds(self) -> float:
        """Mean time of a frame; offline methods are timed without training, as in the paper."""
        alone = "predict" if self.offline else "frame"
        which = "frozen_predict" if self.who == "frozen" else alone
        return self.summary["seconds"][which]["mean"]


def read_runs(paths: Iterable[str | Path], *, allow_incomplete: bool = False) -> list[Part]:
    """Reads the parts of each run from its folder.

    Raises:
        UserError: a folder has no summary, one of another version or of a run that did not finish.
    """
    parts: list[Part] = []
    for path in map(Path, paths):
        part = read_run(path)
        missing = [key for key in _REQUIRED if key not in part.summary]
        if missing:
            what = ", ".join(missing)
            raise UserError(f"{path / 'summary.json'} has no {what}: another version wrote it")
        if not part.summary["complete"] and not allow_incomplete:
            raise UserError(f"the run in {path} is not complete; resume it, or --allow-incomplete")
        if any(path.resolve() == other.path.resolve() for other in parts):
            raise UserError(f"{path} is given twice")
        parts.append(part)
        # The frozen model beside a frozen method would be there twice.
        if "frozen_predict" in part.summary["seconds"] and not part.frozen:
            parts.append(Part(path, part.summary, "frozen"))
    return parts


def read_run(path: Path) -> Part:
    """Reads the method's part of one run.

    Raises:
        UserError: the folder has no readable summary.
    """
    hint = "; give the folders of finished runs"
    if not (path / "summary.json").exists() and any(path.glob("*/summary.json")):
        hint = f"; the folder holds runs: give {path / '*'}"
    return Part(path, read_json_object(path / "summary.json", hint=hint))


def video_means(parts: Iterable[Part], metric: str) -> dict[str, float]:
    """Returns a metric by video: the mean over the runs that have it, one for each seed."""
    return mean_by_key(part.by_video(metric) for part in parts)


def check_comparable(parts: list[Part]) -> None:
    """Raises :class:`UserError` where runs differ in what a table must hold fixed."""
    if not parts:
        raise UserError("no runs; give at least one folder")
    _same(((p, "", p.summary["preset"] or "none") for p in parts), "presets")
    _same(((p, p.dataset, p.summary["videos"]) for p in parts), "frames per video")
    _same(((p, _model(p), p.summary["weights_sha256"]) for p in parts), "weights")
    for metric in sorted({m for p in parts for m in p.summary["protocols"]}):
        rules = ((p, p.summary["protocols"]) for p in parts)
        _same(((p, "", own[metric]) for p, own in rules if metric in own), f"protocols of {metric}")
    for metric in headlines():
        _same_frozen(parts, metric)


def _model(part: Part) -> tuple[Hashable, ...]:
    """Returns what must have the same weights: a kind and size of model on one data set."""
    facts = (part.summary.get(key) for key in ("architecture", "depths", "jointly_trained"))
    return part.dataset, *map(str, facts)


def _same(found: Iterable[tuple[Part, Hashable, Any]], what: str) -> None:
    """Raises UserError if parts have different values (third) in the same group (second)."""
    first: dict[Hashable, tuple[Part, Any]] = {}
    for part, group, value in found:
        other, expected = first.setdefault(group, (part, value))
        if expected != value:
            raise UserError(
                f"runs with different {what} cannot share a table: {_short(expected)} in "
                f"{other.path}, {_short(value)} in {part.path}"
            )


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _same_frozen(parts: list[Part], metric: str) -> None:
    """Raises UserError if the same frozen weights have two results on the same videos."""
    first: dict[Hashable, tuple[float, Path]] = {}
    for part in parts:
        value = part.value(metric)
        if part.frozen and value is not None:
            key = (part.dataset, part.summary["weights_sha256"])
            other, path = first.setdefault(key, (value, part.path))
            if abs(value - other) > _TOLERANCE:
                raise UserError(
                    f"the frozen model has {metric} {other:.2f} in {path} and {value:.2f} in "
                    f"{part.path}: these runs differ in more than the method"
                )


def row_names(parts: list[Part], *, variants: bool) -> dict[Part, str]:
    """Returns each part's row: the name of its method, with the settings that vary if ``variants``.

    Raises:
        UserError: settings of one method vary without ``variants``, two runs are the same, or
            methods have different seeds.
    """
    names = {part: part.name for part in parts}
    adapting = [part for part in parts if not part.frozen]
    for name in sorted({part.name for part in adapting}):
        runs = [part for part in adapting if part.name == name]
        varying = sorted(_varying(runs))
        if varying and not variants:
            keys = ", ".join(f"TTT.{key}" for key in varying)
            raise UserError(
                f"the runs of {name} differ in {keys}; tabulate them apart, or with --layout "
                "plain, where each has a row"
            )
        for part in runs if varying else ():
            settings = flatten(part.summary["settings"])
            values = ", ".join(f"{key} {settings.get(key)}" for key in varying)
            names[part] = f"{name} ({values})"
    _check_seeds(adapting, names)
    return names


def _varying(runs: list[Part]) -> set[str]:
    """Returns the keys that differ between runs on the same data set."""
    keys: set[str] = set()
    first: dict[str, dict[str, Any]] = {}
    for part in runs:
        settings = flatten(part.summary["settings"])
        other = first.setdefault(part.dataset, settings)
        keys |= {k for k in settings.keys() | other.keys() if settings.get(k) != other.get(k)}
    return keys


def _check_seeds(adapting: list[Part], names: Mapping[Part, str]) -> None:
    """Raises UserError unless all methods ran once with each of the same seeds."""
    seen: dict[Hashable, Part] = {}
    seeds: dict[str, dict[str, set[int]]] = {}
    for part in adapting:
        seed, name = part.summary["seed"], names[part]
        other = seen.setdefault((part.dataset, seed, name), part)
        if other is not part:
            raise UserError(f"{other.path} and {part.path} are the same run with the same seed")
        seeds.setdefault(part.dataset, {}).setdefault(name, set()).add(seed)
    for dataset, by_name in seeds.items():
        (first, expected), *others = by_name.items()
        for name, found in others:
            if found != expected:
                raise UserError(
                    f"different seeds on {dataset or 'unnamed videos'}: {sorted(expected)} of "
                    f"{first}, {sorted(found)} of {name}; run all methods with the same ones"
                )
