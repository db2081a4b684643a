"""The adapted model as files that need nothing else: weights, config and classes in one."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from torch import Tensor, nn

from ..adaptation.gradient import total_loss
from ..errors import UserError
from ..files import file_stem, make_folder, remove_leftovers
from ..modeling.weight_header import OWN_KEY, read_header
from ..modeling.weights import save_safetensors, weights_hash
from .saved_state import UnusableState
from .sinks import Results, Sink, VideoRun

METADATA = (
    *("stuff_classes", "stuff_colors", "thing_classes", "thing_colors"),
    *("thing_dataset_id_to_contiguous_id", "stuff_dataset_id_to_contiguous_id"),
)
"""What of a data set's metadata says how predictions are named and drawn."""


def weight_moments(asked: Iterable[str]) -> tuple[str, ...]:
    """Returns what flags ask for, each once: ["last,every:50", "best-loss"] are three.

    Raises:
        UserError: there is no such moment.
    """
    names = [name.strip() for words in asked for name in words.split(",")]
    for name in names:
        if name not in ("last", "best-loss") and not re.fullmatch(r"every:0*[1-9]\d{0,8}", name):
            raise UserError(
                f"--save-weights {name}: give last, best-loss or every:N, such as every:50"
            )
    return tuple(dict.fromkeys(names))


class SavedWeights(Sink):
    """Writes the adapted weights of each video to ``weights/VIDEO/``.

    ``last.safetensors`` has the weights after the last frame's update; ``best-loss.safetensors``
    those after the update whose loss was the lowest, the first of equals (an update's loss is taken
    before its step); and ``NNNNNN.safetensors`` those after each N-th frame's, by its index. The
    header has what :func:`ttt_video.modeling.weight_header.read_header` returns.
    """

    def __init__(
        self, cfg: CfgNode, folder: Path, moments: Iterable[str], *, dataset_name: str = ""
    ) -> None:
        """
        Args:
            cfg: resolved.
            folder: of the run.
            moments: of :func:`weight_moments`.
            dataset_name: of the videos, whose classes are noted; "" for the config's own.
        """
        self.cfg, self.folder, self.moments = cfg, folder, tuple(moments)
        self.dataset_name = dataset_name or next(iter(cfg.DATASETS.TEST), "")
        self.flags = {"--save-weights": ",".join(sorted(self.moments))}
        self.every = sorted({int(m[6:]) for m in self.moments if m.startswith("every:")})
        self._loaded: dict[str, Any] = {}

    def attach(self, model: nn.Module) -> None:
        """Keeps the model, whose source weights it still has."""
        self._model = model
        self._source = weights_hash(model)

    def load(self, state: dict[str, Any]) -> None:
        """Goes on from the best that is on disk, which may be later than the state.

        Raises:
            UnusableState: it is not there any more.
        """
        file = self.folder / state["file"]
        if state["best"] is not None and not file.is_file():
            raise UnusableState(f"{file} is gone")
        header = (read_header(file) if file.is_file() else None) or {}
        self._loaded = {"best": header.get("loss")}

    def start(self, video: VideoRun) -> None:
        """Makes the folder, or goes on in it."""
        self.video = video
        self.place = self.folder / "weights" / file_stem(video.video_id)
        make_folder(self.place, "folder")
        remove_leftovers(self.place)
        self.best: float | None = self._loaded["best"] if video.done else None
        self._kept: dict[str, tuple[dict[str, Tensor], dict[str, Any]]] = {}

    def write(self, results: Results) -> None:
        """Writes the weights of this frame, or keeps a copy of them."""
        record = results.adapted.record
        loss = total_loss(record) if any(name.startswith("loss_") for name in record) else None
        frame = results.adapted.frame
        facts = {"frame_index": int(frame["frame_index"]), "loss": loss}
        if "last" in self.moments:
            self._keep("last", facts)
        if "best-loss" in self.moments and self._is_best(loss):
            self.best = loss
            self._keep("best-loss", facts)
        if any(self.video.done % every == 0 for every in self.every):
            self._write(f"{facts['frame_index']:06d}", self._model.state_dict(), facts)

    def save(self) -> dict[str, Any]:
        """Returns the lowest loss, whose weights are on disk then."""
        if "best-loss" in self._kept:
            self._write("best-loss", *self._kept.pop("best-loss"))
        return {"best": self.best, "file": str(self._file("best-loss").relative_to(self.folder))}

    def end(self, video: VideoRun) -> None:
        """Writes what was kept, also of a video that was stopped."""
        for name, (weights, facts) in self._kept.items():
            self._write(name, weights, facts)
        self._kept = {}

    def _is_best(self, loss: float | None) -> bool:
        return loss is not None and math.isfinite(loss) and (self.best is None or loss < self.best)

    def _file(self, name: str) -> Path:
        return self.place / f"{name}.safetensors"

    def _keep(self, name: str, facts: dict[str, Any]) -> None:
        """Copies the weights, into the memory of the copy before if there is one."""
        weights, _ = self._kept.get(name, (None, None))
        now = self._model.state_dict()
        if weights is None:
            weights = {key: tensor.clone() for key, tensor in now.items()}
        else:
            for key, tensor in now.items():
                weights[key].copy_(tensor)
        self._kept[name] = (weights, facts)

    def _write(self, name: str, weights: dict[str, Tensor], facts: dict[str, Any]) -> None:
        metadata = MetadataCatalog.get(self.dataset_name) if self.dataset_name else None
        known = {} if metadata is None else {key: metadata.get(key) for key in METADATA}
        content = {
            "config": self.cfg.dump(),
            "dataset": self.dataset_name,
            "metadata": {key: _plain(value) for key, value in known.items() if value is not None},
            "source_sha256": self._source,
            "video_id": self.video.video_id,
            **facts,
        }
        header = json.dumps(content, ensure_ascii=False, sort_keys=True)
        save_safetensors(weights, self._file(name), {OWN_KEY: header})


def _plain(value: Any) -> Any:
    """Returns metadata as JSON has it; keys of dicts become pairs, because JSON's are text."""
    if isinstance(value, dict):
        return [[int(key), int(entry)] for key, entry in sorted(value.items())]
    return [entry if isinstance(entry, str) else [int(v) for v in entry] for entry in value]
