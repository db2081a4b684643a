"""Runs as tables read them, from ``summary.json`` alone, and the rule of what can be compared.

Runs that differ in more than the method are refused: in preset, protocol, weights, videos, seeds.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..tasks import headlines, metrics
from . import published

Summary = dict[str, Any]

_FROZEN = ("none", "main_task_only", "joint_training")
_OFFLINE = ("offline_ttt_mae", "offline_ttt_mae_oracle")
_OURS = "MaskFormerTTT"  # the architecture of the paper's tables
_ENSEMBLES = {"majority_vote": "Majority Vote", "temporal_smoothing": "Temporal Smoothing"}
_NAMES = {
    **{key: row.name for key, row in {**published.TABLE_1, **published.TABLE_4}.items()},
    "offline_ttt_mae": "Offline TTT-MAE, Fixed Iterations",
}
_REQUIRED = (
    "complete", "dataset", "videos", "method", "settings", "architecture", "jointly_trained",
    "preset", "seed", "weights_sha256", "metrics", "protocols", "seconds", "device",
)  # fmt: skip
# Points by which the frozen model's numbers of two runs may differ, as between devices.
_TOLERANCE = 0.1


@dataclass(frozen=True, eq=False)
class Part:
    """One model's results in one run: of the method, or of the frozen model beside it."""

    path: Path
    summary: Summary
    who: str  # "adapted" or "frozen"

    @property
    def dataset(self) -> str:
        """Name of the data set; empty for a folder or a file."""
        return self.summary["dataset"]

    @property
    def frozen(self) -> bool:
        """Whether nothing adapts, so that neither seed nor settings matter."""
        return self.who == "frozen" or self.summary["method"] in _FROZEN

    @property
    def offline(self) -> bool:
        """Whether it trained on the whole video before its first prediction."""
        return self.who == "adapted" and self._inner in _OFFLINE

    @property
    def _inner(self) -> str:
        """The method, that under an ensemble."""
        method = self.summary["method"]
        return self.summary["settings"]["ENSEMBLE"]["METHOD"] if method in _ENSEMBLES else method

    @property
    def name(self) -> str:
        """The paper's name of the method, else ours; of another architecture than its own, too."""
        if self.who == "frozen":
            return self._name("none")
        ensemble = _ENSEMBLES.get(self.summary["method"])
        return self._name(self._inner) + (f" + {ensemble}" if ensemble else "")

    def _name(self, method: str) -> str:
        architecture = self.summary["architecture"]
        if architecture != _OURS:
            depths = tuple(self.summary.get("depths") or ())
            known = published.ARCHITECTURES.get((architecture, depths))
            own = (
                f"{architecture} (depth {', '.join(map(str, depths))})" if depths else architecture
            )
            base = known.name if known else own
            return base if method in _FROZEN else f"{base} + {_NAMES.get(method, method)}"
        if method == "none":
            method = "joint_training" if self.summary["jointly_trained"] else "main_task_only"
        return _NAMES.get(method, method)

    def value(self, metric: str) -> float | None:
        """A metric over all videos; None where it is undefined or was not computed."""
        return self.summary["metrics"].get(self.who, {}).get(metric)

    def by_video(self, metric: str) -> dict[str, float]:
        """A metric by video, where it is defined; of a mean over videos the metric itself."""
        metric = metric.removesuffix("_video_mean")
        videos = self.summary["metrics"].get(self.who, {}).get("videos", {})
        return {k: v[metric] for k, v in videos.items() if v.get(metric) is not None}

    def by_class(self, metric: str) -> dict[str, float]:
        """A metric by class, where it is defined; empty if it is not computed by class."""
        classes = self.summary["metrics"].get(self.who, {}).get("per_class", {})
        known = metrics().get(metric)
        numbers = classes.get((known and known.per_class) or metric, {})
        return {k: v for k, v in numbers.items() if v is not None}

    @property
    def seconds(self) -> float:
        """Mean time of a frame; of an offline method without its training, as in the paper."""
        alone = "predict" if self.offline else "frame"
        which = "frozen_predict" if self.who == "frozen" else alone
        return self.summary["seconds"][which]["mean"]


def read_runs(paths: Iterable[str | Path], *, allow_incomplete: bool = False) -> list[Part]:
    """The parts of each run, from ``summary.json`` in its folder.

    Raises:
        UserError: a folder has none, of another version or of a run that did not finish.
    """
    parts: list[Part] = []
    for path in map(Path, paths):
        summary = _read(path / "summary.json")
        if not summary["complete"] and not allow_incomplete:
            raise UserError(f"the run in {path} is not complete; resume it, or --allow-incomplete")
        if any(path.resolve() == part.path.resolve() for part in parts):
            raise UserError(f"{path} is given twice")
        parts.append(Part(path, summary, "adapted"))
        # A frozen method run with --compare has the same numbers twice.
        if "frozen_predict" in summary["seconds"] and not parts[-1].frozen:
            parts.append(Part(path, summary, "frozen"))
    return parts


def _read(file: Path) -> Summary:
    try:
        summary = json.loads(file.read_text("utf-8"))
    except OSError as error:
        raise UserError(
            f"{file} cannot be read ({error.strerror}); give the folders of finished runs"
        ) from error
    except json.JSONDecodeError as error:
        raise UserError(f"{file} is damaged ({error}); resume the run to write it") from error
    missing = [key for key in _REQUIRED if key not in summary]
    if missing:
        raise UserError(f"{file} has no {', '.join(missing)}: another version wrote it")
    return summary


def check_comparable(parts: list[Part]) -> None:
    """Raises :class:`UserError` where runs differ in what a table must hold fixed."""
    if not parts:
        raise UserError("no runs; give at least one folder")
    _same(parts, lambda p: "", lambda p: p.summary["preset"] or "none", "presets")
    _same(parts, lambda p: p.dataset, lambda p: p.summary["videos"], "frames per video")
    _same(
        parts,
        lambda p: (p.dataset, *_model(p)),
        lambda p: p.summary["weights_sha256"],
        "weights",
    )
    for metric in sorted({m for p in parts for m in p.summary["protocols"]}):
        _same(
            [p for p in parts if metric in p.summary["protocols"]],
            lambda p: "",
            lambda p, metric=metric: p.summary["protocols"][metric],  # type: ignore[misc]
            f"protocols of {metric}",
        )
    for metric in headlines():
        _same_frozen(parts, metric)


def _model(part: Part) -> tuple[Hashable, ...]:
    """What a set of weights is of."""
    summary = part.summary
    return summary["architecture"], str(summary.get("depths")), summary["jointly_trained"]


def _same(
    parts: list[Part], group: Callable[[Part], Hashable], value: Callable[[Part], Any], what: str
) -> None:
    first: dict[Hashable, Part] = {}
    for part in parts:
        other = first.setdefault(group(part), part)
        if value(other) != value(part):
            raise UserError(
                f"runs with different {what} cannot share a table: {_short(value(other))} in "
                f"{other.path}, {_short(value(part))} in {part.path}"
            )


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _same_frozen(parts: list[Part], metric: str) -> None:
    """The same weights on the same videos give the same frozen result, whichever run it is of."""
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
    """Each part's row: the name of its method, with the settings that vary if ``variants``.

    Raises:
        UserError: settings of one method vary, though not ``variants``; two runs are the same; not
            all methods have the same seeds.
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
    """Keys that differ between runs on the same data set."""
    keys: set[str] = set()
    first: dict[str, dict[str, Any]] = {}
    for part in runs:
        settings = flatten(part.summary["settings"])
        other = first.setdefault(part.dataset, settings)
        keys |= {k for k in settings.keys() | other.keys() if settings.get(k) != other.get(k)}
    return keys


def _check_seeds(adapting: list[Part], names: Mapping[Part, str]) -> None:
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


def flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"A": {"B": 1}} to {"A.B": 1}."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        nested = isinstance(value, Mapping)
        flat.update(flatten(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value})
    return flat
