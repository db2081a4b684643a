"""What all evaluators share: one small record per frame, every number computed from records."""

from __future__ import annotations

import itertools
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm

from ..errors import UserError
from .protocols import LabelInfo, Record, ScoredFrame, score


class StreamingEvaluator(DatasetEvaluator):
    """Scores one frame at a time; keeps nothing that grows with the video while it streams.

    ``record`` is what the stream calls; its results go to disk with the frame's row, and
    :func:`ttt_video.evaluation.protocols.score` computes every number from them. ``process`` and
    ``evaluate`` are detectron2's interface to the same, for ``inference_on_dataset``.

    Attributes:
        name: key of this evaluator's records in a row, one of ``protocols.TASKS``.
        label_key: key of the labels in a frame; frames without it have no record. None: no labels
            are needed.
        output_keys: any of these outputs of a model can be scored.
    """

    name: ClassVar[str]
    label_key: ClassVar[str | None]
    output_keys: ClassVar[tuple[str, ...]]

    def __init__(self, info: LabelInfo | None = None, *, required: bool = False) -> None:
        """
        Args:
            info: classes and void label of the data set.
            required: a labelled frame whose output cannot be scored is an error, not skipped.
        """
        self.info = info or LabelInfo()
        self.required = required
        self.reset()

    def reset(self) -> None:
        """Forgets all frames."""
        self._frames: list[ScoredFrame] = []

    def record(self, frame: Mapping[str, Any], output: Mapping[str, Any]) -> Record | None:
        """The record of one frame: small, JSON values only. None: no labels, nothing to score.

        Args:
            frame: a dataset dict with the data set's label keys.
            output: what the model made of it, in detectron2's format.

        Raises:
            UserError: the labels cannot be read, do not fit the output, or need another output.
        """
        if self.label_key is not None and self.label_key not in frame:
            return None
        if any(key in output for key in self.output_keys):
            return self._record(frame, output)
        if self.required:
            raise UserError(
                f"{frame.get('file_name')} is labelled for {self.name}, but the model's outputs "
                f"are {', '.join(output) or 'none'}: switch the output on "
                "(MODEL.MASK_FORMER.TEST.SEMANTIC_ON, INSTANCE_ON, PANOPTIC_ON)"
            )
        return None

    @abstractmethod
    def _record(self, frame: Mapping[str, Any], output: Mapping[str, Any]) -> Record | None:
        """:meth:`record` of a labelled frame, and an output that can be scored."""

    @abstractmethod
    def frame_metrics(self, record: Record) -> dict[str, float | None]:
        """Numbers of one frame alone, for curves; None where undefined."""

    def process(self, inputs: Sequence[Mapping[str, Any]], outputs: Sequence[Any]) -> None:
        """detectron2's interface: collects the records of a batch."""
        for frame, output in zip(inputs, outputs, strict=True):
            record = self.record(frame, output)
            if record is not None:
                video_id = str(frame.get("video_id", ""))
                index = int(frame.get("frame_index", len(self._frames)))
                self._frames.append(ScoredFrame(video_id, index, {self.name: record}))

    def evaluate(self) -> dict[str, dict[str, float]]:
        """detectron2's interface: ``{name: {metric: value}}`` over all processes, NaN: undefined.

        Other processes than the first return nothing.
        """
        frames = list(itertools.chain(*comm.gather(self._frames)))
        if not comm.is_main_process():
            return {}
        scores = score(frames, self.info)
        per_class = scores.pop("per_class", {})
        scores.pop("videos", None)
        for metric, values in per_class.items():
            scores.update({f"{metric}-{name}": value for name, value in values.items()})
        number = {k: float("nan") if v is None else v for k, v in scores.items()}
        return {self.name: number}

    def state_dict(self) -> dict[str, Any]:
        """What must survive an interruption between two frames; tensors and plain values."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from :meth:`state_dict`."""
        if state:
            raise ValueError(f"{type(self).__name__} has no state, but got {sorted(state)}")
