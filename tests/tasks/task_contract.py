"""What every task promises. A test class for a task inherits these tests."""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from ttt_video.errors import UserError
from ttt_video.tasks import FrameMean, ScoredFrame, Task, rules, score, sign
from ttt_video.tasks.metrics import EXAMPLE_INFO

Video = list[tuple[dict[str, Any], dict[str, Any]]]


def _spoilt(output: Any, number: float) -> Any:
    """Returns a copy of an output whose first score is ``number``."""
    output = copy.deepcopy(output)
    scores = getattr(output, "scores", output)
    if isinstance(scores, torch.Tensor) and scores.is_floating_point():
        scores.view(-1)[0] = number
    return output


class TaskContract:
    """Set ``task``, and define the fixture ``video``: labelled frames in order with outputs."""

    task: ClassVar[type[Task]]

    @pytest.fixture
    def video(self, tmp_path) -> Video:
        raise NotImplementedError

    def records(self, video: Video) -> list[ScoredFrame]:
        task = self.task(EXAMPLE_INFO)
        found = [(frame, task.record(frame, output)) for frame, output in video]
        return [
            ScoredFrame(frame["video_id"], frame["frame_index"], {task.name: record})
            for frame, record in found
            if record is not None
        ]

    def scores(self, frames: list[ScoredFrame]) -> dict[str, Any]:
        return score(frames, EXAMPLE_INFO, [self.task])

    def example(self, name: str) -> tuple[list[ScoredFrame], float | None]:
        """The example of a metric: its records as frames of one video, and its value."""
        records, value = self.task.metrics[name].example
        return [ScoredFrame("a", i, {self.task.name: r}) for i, r in enumerate(records)], value

    def test_records_survive_json(self, video):
        for frame in self.records(video):
            assert json.loads(json.dumps(frame.records)) == frame.records

    @pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
    def test_scores_that_are_not_finite_have_a_record_that_json_can_hold(self, video, number):
        """Rows are strict JSON, and broken weights must not end a run."""
        spoilt = [(frame, {k: _spoilt(v, number) for k, v in out.items()}) for frame, out in video]
        for frame in self.records(spoilt):
            assert json.loads(json.dumps(frame.records, allow_nan=False)) == frame.records

    def test_a_missed_frame_finds_nothing_if_the_task_has_streaming_scores(self, video):
        task = self.task(EXAMPLE_INFO)
        missed = [task.missed(frame, output) for frame, output in video]
        if not task.streaming:
            assert missed == [None] * len(video)
            return
        frames = [ScoredFrame("a", i, {task.name: record}) for i, record in enumerate(missed)]
        assert self.scores(frames)[task.headline] == 0
        assert missed != [frame.records[task.name] for frame in self.records(video)]

    def test_the_numbers_do_not_depend_on_the_order_of_frames(self, video):
        frames = self.records(video)
        more = [frame._replace(video_id="other") for frame in frames]
        orders = [[*frames, *more], [*more[::-1], *frames[::-1]]]
        assert self.scores(orders[0]) == self.scores(orders[1]) != {}

    def test_frames_without_labels_have_a_record_if_none_are_needed(self, video):
        for frame, output in video:
            bare = {k: v for k, v in frame.items() if k not in self.task.label_keys}
            assert not self.task.labels(bare)
            if self.task.label_keys:
                assert self.task(EXAMPLE_INFO).record(bare, output) is None

    def test_an_output_of_another_task_is_skipped_unless_it_is_required(self, video):
        frame, _ = video[0]
        assert self.task(EXAMPLE_INFO).record(frame, {"other": 1}) is None
        with pytest.raises(UserError, match=f"labelled for {self.task.name}.*outputs are other"):
            self.task(EXAMPLE_INFO, required=True).record(frame, {"other": 1})

    def test_frame_and_output_stay_as_they_are(self, video):
        for frame, output in video:
            before = dict(frame), dict(output)
            self.task(EXAMPLE_INFO).record(frame, output)
            assert (frame.keys(), output.keys()) == tuple(b.keys() for b in before)
            assert all(output[key] is before[1][key] for key in output)

    def test_goes_on_from_a_saved_state(self, video):
        whole = self.task(EXAMPLE_INFO)
        expected = [whole.record(*pair) for pair in video]
        stopped = self.task(EXAMPLE_INFO)
        before = [stopped.record(*pair) for pair in video[:1]]
        resumed = self.task(EXAMPLE_INFO)
        resumed.load_state_dict(stopped.state_dict())
        assert [*before, *(resumed.record(*pair) for pair in video[1:])] == expected

    def test_each_metric_gives_its_example(self):
        for name, metric in self.task.metrics.items():
            frames, value = self.example(name)
            found = self.scores(frames)[metric.name]
            assert found == (value if value is None else pytest.approx(value, abs=1e-9)), name

    def test_each_metric_says_what_it_is(self):
        for name, metric in self.task.metrics.items():
            assert name == metric.name
            assert len(metric.rule) > 20
            assert metric.unit
            assert type(metric).__doc__
            assert sign(name) == (-1 if metric.higher_is_better is False else 1)
        assert rules(self.task.metrics).keys() == self.task.metrics.keys()

    def test_the_headline_is_one_of_its_metrics_and_has_a_direction(self):
        if self.task.headline:
            assert self.task.metrics[self.task.headline].higher_is_better is not None

    def test_a_frame_alone_has_the_number_of_a_video_of_one_frame(self, video):
        for frame in self.records(video):
            alone = self.scores([frame._replace(frame_index=0)])
            numbers = self.task.frame_metrics(frame.records[self.task.name])
            for metric in self.task.metrics.values():
                key = getattr(metric, "frame_name", "") or metric.name
                if metric.frame is not None and key in numbers:
                    found = alone[metric.name]
                    assert numbers[key] == (found if found is None else pytest.approx(found))

    def test_means_of_frames_take_every_frame_of_the_period(self):
        for name, metric in self.task.metrics.items():
            if isinstance(metric, FrameMean):
                (first, *_), _ = self.example(name)
                values = [metric.frame(r) for r in first.records.values()]
                frames = [first._replace(frame_index=i) for i in range(3)]
                assert self.scores(frames)[name] == pytest.approx(values[0])

    def test_detectron2s_interface_gives_the_same_numbers(self, video):
        task = self.task(EXAMPLE_INFO)
        for pairs in itertools.zip_longest(video[::2], video[1::2]):
            inputs, outputs = zip(*filter(None, pairs), strict=True)
            task.process(list(inputs), list(outputs))
        found = task.evaluate()[task.name]
        for key, value in self.scores(self.records(video)).items():
            if not isinstance(value, Mapping):
                assert found[key] == value or (value is None and np.isnan(found[key]))
        task.reset()
        assert task.evaluate() == {task.name: {}}

    def test_a_picture_is_of_the_predictions_size_and_leaves_the_frame_alone(self, video):
        if self.task.picture_rank is None:
            pytest.skip("the task has no picture")
        frame, output = video[0]
        image = np.full((frame["height"], frame["width"], 3), 100, np.uint8)
        drawn = self.task.painter(output, None)(image)
        assert drawn.shape == image.shape
        assert drawn.dtype == np.uint8
        assert (image == 100).all()
