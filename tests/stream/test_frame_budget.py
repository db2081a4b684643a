"""A loop with a frame budget keeps up with a camera: fewer samples, fewer steps, every prediction.

All times are those of a clock that the tests turn.
"""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from ttt_video.adaptation import Adapter, LimitedWindow, NoAdaptation, SlidingWindow, Wrapper
from ttt_video.config import merge_method
from ttt_video.data import BaseSource
from ttt_video.errors import UserError
from ttt_video.stream import (
    BudgetedStream,
    RunDirectory,
    Settings,
    Sink,
    Stream,
    StreamEvaluation,
    evaluate_in_parallel,
)
from ttt_video.stream.budget import FrameBudget
from ttt_video.stream.clock import Clock

FULL = 32


class Hand:
    """Holds the seconds that a clock reads; tests turn it."""

    seconds = 0.0

    def clock(self) -> Clock:
        return Clock(read=lambda: self.seconds)


class TimedAdapter(Adapter):
    """Turns the clock by the seconds that it is told; draws batches of 32."""

    def __init__(self, clock: Hand, predict=0.010, sample=0.005, fixed=0.0) -> None:
        super().__init__(nn.Identity())
        self.clock = clock
        self.times = {"predict": predict, "sample": sample, "fixed": fixed}
        self.updates_taken: list[float] = []

    def seconds(self, what: str, frame) -> float:
        time = self.times[what]
        return time(frame["frame_index"]) if callable(time) else time

    def adapt(self, window, generator):
        drawn = len(window.sample(FULL, sampling="with_replacement", generator=generator))
        frame = window.current
        spent = self.seconds("fixed", frame) + drawn * self.seconds("sample", frame)
        self.updates_taken.append(spent)
        self.clock.seconds += spent
        return {"loss_recon": 1.0}

    def predict(self, frame):
        self.clock.seconds += self.seconds("predict", frame)
        return {"frame": frame["frame_index"]}

    def reset(self):
        pass


@pytest.fixture
def make_runner():
    """``make_runner(budget, adapter settings...)``, on a clock of its own: ``runner.hand``."""

    def make(budget: float, *, adapter=TimedAdapter, runner=(), **times) -> BudgetedStream:
        hand = Hand()
        made = adapter(hand, **times)
        stream = Stream(made, SlidingWindow(4), clock=hand.clock(), **dict(runner))
        budgeted = BudgetedStream(stream, budget)
        budgeted.hand, budgeted.made = hand, made
        return budgeted

    return make


def video(num_frames: int, video_id: str = "a") -> list[dict]:
    image = torch.zeros(3, 1, 1, dtype=torch.uint8)
    return [
        {"video_id": video_id, "frame_index": i, "image": image, "file_name": str(i)}
        for i in range(num_frames)
    ]


def records(results, name: str) -> list:
    return [result.record[name] for result in results]


def once(index: int, slow: float, usual: float):
    """Seconds of each frame: one is slow."""
    return lambda frame_index: slow if frame_index == index else usual


def test_without_a_budget_nothing_is_limited_and_nothing_is_recorded():
    results = list(Stream(TimedAdapter(Hand()), SlidingWindow(4)).run(video(3)))
    assert [r.record for r in results] == [{"loss_recon": 1.0}] * 3


def test_a_step_has_as_many_samples_as_there_is_room_for(make_runner):
    runner = make_runner(0.106, predict=0.010, sample=0.005)
    results = list(runner.run(video(50)))
    assert records(results, "step_samples") == [0, 1] + 48 * [18]  # 18 * 5 + 10 ms and 5 %
    assert records(results, "skipped_updates") == [1] + 49 * [0]
    assert records(results, "shrunk_updates") == [0] + 49 * [1]
    assert sum(records(results, "late_frames")) == 0
    assert set(records(results, "behind_seconds")) == {0}
    assert [r.output["frame"] for r in results] == [*range(50)]


def test_a_roomy_budget_soon_leaves_the_step_as_it_is(make_runner):
    results = list(make_runner(10.0).run(video(5)))
    assert records(results, "step_samples") == [0, 1, FULL, FULL, FULL]
    assert records(results, "shrunk_updates") == [0, 1, 0, 0, 0]


def test_the_fixed_cost_of_a_step_does_not_make_it_late(make_runner):
    runner = make_runner(0.1, predict=0.010, sample=0.002, fixed=0.020)
    results = list(runner.run(video(60)))
    assert sum(records(results, "late_frames")) == 0
    assert records(results, "step_samples")[-1] >= 25  # (95 - 10 - 20) / 2 = 32


def test_later_frames_pay_for_a_slow_one(make_runner):
    runner = make_runner(0.106, predict=once(20, 0.510, 0.010), sample=0.005)
    results = list(runner.run(video(60)))
    late = [i for i, x in enumerate(records(results, "late_frames")) if x]
    behind = records(results, "behind_seconds")
    samples = records(results, "step_samples")
    assert late[0] == 20
    assert late == [*range(20, late[-1] + 1)]
    # 510 + 18 * 5 - 106 ms; 96 ms less with every frame that is only predicted.
    assert behind[21] == pytest.approx(0.494)
    assert behind[22] == pytest.approx(0.398)
    assert behind[27] == 0
    assert samples[21:28] == [0, 0, 0, 0, 0, 15, 18]
    assert samples[28:] == [18] * 32
    assert runner.hand.seconds <= 60 * 0.106


def test_a_slow_moment_of_the_step_is_forgotten(make_runner):
    """Such as the first one on a GPU, from which no step at all would seem to fit."""
    runner = make_runner(0.106, predict=0.010, sample=once(1, 2.0, 0.005))
    samples = records(list(runner.run(video(120))), "step_samples")
    assert samples[1] == 1
    assert samples[2:30] == [0] * 28  # the debt
    assert samples[-30:] == [18] * 30


def test_a_step_longer_than_the_room_is_taken_once_in_a_while(make_runner):
    runner = make_runner(0.100, predict=0.080, sample=0.045)
    results = list(runner.run(video(200)))
    samples = records(results, "step_samples")
    assert set(samples) == {0, 1}
    assert 8 <= sum(samples) <= 50
    assert max(records(results, "behind_seconds")) == pytest.approx(0.025)
    assert runner.hand.seconds <= 200 * 0.100


def test_predictions_slower_than_the_budget_skip_all_updates_and_say_so_once(make_runner, caplog):
    runner = make_runner(0.030, predict=0.045)
    with caplog.at_level(logging.WARNING):
        results = list(runner.run(video(40)))
        results += runner.run(video(10, "b"))
    assert len(results) == 50
    assert records(results, "skipped_updates") == [1] * 50
    assert runner.made.updates_taken == []
    (warning,) = caplog.messages
    assert "TTT.FRAME_BUDGET_MS is 30" in warning
    assert "takes 45 ms" in warning
    assert "Set it well above 45" in warning


def test_a_slow_first_prediction_is_no_reason_to_warn(make_runner, caplog):
    results = list(make_runner(0.106, predict=once(0, 3.0, 0.010)).run(video(80)))
    assert caplog.messages == []
    assert records(results, "step_samples")[-1] == 18


def test_a_video_owes_nothing_to_the_one_before(make_runner):
    runner = make_runner(0.106, predict=once(5, 9.0, 0.010))
    assert list(runner.run(video(6)))[-1].record["late_frames"] == 1
    again = list(runner.run(video(2, "b")))
    assert records(again, "behind_seconds") == [0, 0]
    assert records(again, "step_samples") == [18, 18]  # what is known of the machine stays


def test_the_callers_work_counts_and_waiting_for_a_frame_does_not(make_runner):
    runner = make_runner(0.106, predict=0.010, sample=0.005)
    clock = runner.hand

    def camera():
        for frame in video(30):
            clock.seconds += 7.0  # nothing happens
            yield frame

    results = []
    for result in runner.run(camera()):
        results.append(result)
        clock.seconds += 0.050  # drawing
        with runner.clock.paused():
            clock.seconds += 3.0  # scoring
    assert records(results, "step_samples")[-1] == 8  # (100.7 - 10 - 50) / 5
    assert sum(records(results, "late_frames")) == 0
    assert max(records(results, "behind_seconds")) == 0


@pytest.mark.parametrize("slow", [0.510, 0.5, 3.0])
def test_pictures_that_a_camera_dropped_leave_no_debt(make_runner, slow):
    """A live camera gives its newest picture: at most one period of the debt is left."""
    period = 0.106
    runner = make_runner(period, predict=lambda index: slow if index == 20 else 0.010, sample=0.005)
    clock = runner.hand

    def camera(num_frames: int):
        """Picture n comes at n periods; whoever is late gets the newest, who is early waits."""
        (frame,) = video(1)
        seen = -1
        for _ in range(num_frames):
            newest = max(int(clock.seconds / period + 1e-9), seen + 1)
            clock.seconds = max(clock.seconds, newest * period)
            arrived.append(clock.seconds - newest * period)
            yield {**frame, "frame_index": newest, "dropped": newest - seen - 1}
            seen = newest

    arrived: list[float] = []
    results = list(runner.run(camera(60)))
    behind = records(results, "behind_seconds")
    assert behind == pytest.approx(arrived, abs=1e-6)  # from its arrival to its being taken up
    assert max(behind) <= period
    assert max(behind) > 0
    samples = records(results, "step_samples")
    assert samples[2:21] == [18] * 19
    assert samples[23:] == [18] * 37  # the recording of the same camera pays for five frames


def test_frames_between_two_updates_are_not_skipped_for_the_budget(make_runner):
    results = list(make_runner(0.106, runner={"update_every": 3}).run(video(9)))
    assert records(results, "skipped_updates") == [1] + [0] * 8
    assert records(results, "step_samples") == [0, 0, 0, 1, 0, 0, 18, 0, 0]
    assert all(result.record.keys() == results[0].record.keys() for result in results[1:3])


def test_a_prediction_before_a_long_update_is_not_late(make_runner):
    slow = {"predict": 0.010, "sample": once(10, 0.1, 0.005)}
    before = list(make_runner(0.106, runner={"predict": "before"}, **slow).run(video(11)))
    after = list(make_runner(0.106, **slow).run(video(11)))
    assert records(before, "late_frames") == [0] * 11
    assert records(after, "late_frames") == [0] * 10 + [1]


def test_methods_without_steps_have_none_to_skip(make_runner, make_video):
    for adapter in (NoAdaptation(nn.Identity()), Wrapper(NoAdaptation(nn.Identity()))):
        adapter.predict = lambda frame: {}
        runner = BudgetedStream(Stream(adapter, SlidingWindow(2)), 1e-9)
        results = list(runner.run(video(3)))
        assert records(results, "skipped_updates") == [0] * 3
        assert records(results, "late_frames") == [1] * 3


class AllOrNothing(TimedAdapter):
    """Draws no batch."""

    def adapt(self, window, generator):
        self.clock.seconds += 0.050
        return {}


def test_updates_without_samples_are_taken_or_skipped_whole(make_runner):
    roomy = list(make_runner(0.064, adapter=AllOrNothing).run(video(20)))
    assert records(roomy, "skipped_updates") == [1] + [0] * 19
    assert set(records(roomy, "step_samples")) == {0}
    tight = list(make_runner(0.040, adapter=AllOrNothing).run(video(40)))
    assert 20 < sum(records(tight, "skipped_updates")) < 40


class Offline(TimedAdapter):
    offline = True


def test_an_update_without_samples_of_a_method_that_draws_some_is_a_rest():
    """0.01 s a sample and 0.065 s of room are 6 samples, whatever a rest in between took."""
    budget = FrameBudget(0.1)
    for drawn in (1, 6, 0, 0, 0, 0, 0, 0, 0, 6):
        budget.take_frame()
        budget.predicted(0.03)
        assert budget.max_samples() in (0, 1, 6)
        budget.updated(0.01 * drawn if drawn else 0.0002, drawn)
    assert budget.max_samples() == 6


def test_offline_methods_are_refused(make_runner):
    with pytest.raises(UserError, match=r"TTT\.FRAME_BUDGET_MS is set.*offline.*set it to 0"):
        make_runner(0.1, adapter=Offline)


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("nan")])
def test_a_budget_is_positive(seconds):
    with pytest.raises(ValueError, match="positive"):
        FrameBudget(seconds)


SECONDS = st.one_of(st.floats(0, 0.3), st.sampled_from([0.0, 1e-12, 5.0]))


@given(
    st.lists(st.tuples(SECONDS, SECONDS, SECONDS, SECONDS), min_size=1, max_size=60),
    st.floats(0.001, 1.0),
    st.sampled_from(["after", "before"]),
)
def test_whatever_the_times_every_frame_is_predicted_and_the_debt_is_bounded(times, budget, place):
    """By that of the predictions alone, one frame, and the one update that was misjudged."""
    clock = Hand()
    predict, sample, fixed, rest = (list(column) for column in zip(*times, strict=True))
    adapter = TimedAdapter(
        clock, predict=predict.__getitem__, sample=sample.__getitem__, fixed=fixed.__getitem__
    )
    stream = Stream(adapter, SlidingWindow(4), clock=clock.clock(), predict=place)
    runner = BudgetedStream(stream, budget)
    unavoidable = 0.0
    for index, result in enumerate(runner.run(video(len(times)))):
        assert result.output == {"frame": index}
        assert 0 <= result.record["step_samples"] <= FULL
        longest = max(adapter.updates_taken, default=0.0)
        behind = result.record["behind_seconds"]
        assert unavoidable - 1e-6 <= behind <= unavoidable + budget + longest + 1e-6
        unavoidable = max(0.0, unavoidable + predict[index] + rest[index] - budget)
        clock.seconds += rest[index]
    assert result.frame["frame_index"] == len(times) - 1


@given(
    predict=st.floats(0, 0.09),
    sample=st.floats(1e-4, 0.2),
    fixed=st.floats(0, 0.05),
)
def test_on_a_steady_machine_no_frame_owes_more_than_one_small_step(predict, sample, fixed):
    clock = Hand()
    adapter = TimedAdapter(clock, predict=predict, sample=sample, fixed=fixed)
    runner = BudgetedStream(Stream(adapter, SlidingWindow(4), clock=clock.clock()), 0.1)
    results = list(runner.run(video(40)))
    assert max(records(results, "behind_seconds")) <= sample + fixed + 1e-9
    fits = predict + sample + fixed < 0.095
    assert sum(records(results, "late_frames")) == 0 or not fits
    assert sum(records(results, "step_samples")) > 0


class Shorter(Wrapper):
    """Gives the wrapped adapter a window of at most two samples."""

    def adapt(self, window, generator):
        self.limited = LimitedWindow(window, 2)
        return self.inner.adapt(self.limited, generator)


@pytest.mark.parametrize("method", ["online_ttt_mae", "tent_class_balance", "temporal_smoothing"])
def test_a_step_of_fewer_samples_is_that_of_a_smaller_batch(
    tiny_cfg, tiny_model, make_video, method
):
    tiny_cfg.TTT.ENSEMBLE.METHOD = "self_train"
    merge_method(tiny_cfg, method)
    outputs = []
    for batch_size in (4, 2):
        tiny_cfg.TTT.BATCH_SIZE = batch_size
        runner = Stream.from_config(tiny_cfg, copy.deepcopy(tiny_model))
        if batch_size == 4:
            runner.adapter = shorter = Shorter(runner.adapter)
        outputs.append([r.output["sem_seg"] for r in runner.run(make_video())])
    asked = 3 if method == "tent_class_balance" else 4  # without replacement: the whole window
    assert (shorter.limited.asked, shorter.limited.drawn) == (asked, 2)
    assert all(map(torch.equal, *outputs))


def test_a_budgeted_stream_goes_on_from_a_state(make_runner):
    runner = make_runner(10.0, runner={"update_every": 3})
    list(runner.run(video(2)))
    resumed = make_runner(10.0, runner={"update_every": 3})
    resumed.load_state_dict(runner.state_dict())
    results = list(resumed.run(video(6)[2:], anew=False))
    assert ["loss_recon" in r.record for r in results] == [False, True, False, False]


@pytest.fixture
def evaluate(tiny_cfg, tiny_model, tmp_path, make_video):
    """``evaluate(KEY VALUE..., resume=)`` runs a video of 5 frames; gives rows and summary."""

    class Source(list, BaseSource):
        video_id, num_frames = "a", 5

    def run(*opts, resume=False, sinks=(), prepare=lambda evaluation: None):
        tiny_cfg.merge_from_list([*opts])
        directory = RunDirectory(tmp_path / "run", resume=resume)
        settings = Settings(tiny_cfg, directory, compare=True, save_every=1, sinks=sinks)
        evaluation = StreamEvaluation(settings, copy.deepcopy(tiny_model))
        prepare(evaluation)
        summary = evaluation.evaluate([Source(make_video("a", 5, 64, 64))])
        assert not (tmp_path / "run" / "unfinished").exists()
        return list(directory.rows()), summary

    return run


def test_rows_and_summary_say_what_the_budget_did(evaluate):
    rows, summary = evaluate("TTT.FRAME_BUDGET_MS", 3_600_000)
    assert [row["step_samples"] for row in rows] == [0, 1, 4, 4, 4]
    assert [row["skipped_updates"] for row in rows] == [1, 0, 0, 0, 0]
    assert [row["behind_seconds"] for row in rows] == [0] * 5
    assert (summary["skipped_updates"], summary["shrunk_updates"]) == (1, 1)
    assert summary["late_frames"] == 0
    assert summary["frame_budget_used"] > 0
    mean = summary["seconds"]["frame"]["mean"]
    assert summary["frame_budget_used"] == pytest.approx(mean / 3600, rel=1e-9)


class Slow(Sink):
    """Turns the hand by a second with every frame."""

    def __init__(self, hand: Hand, *, measures: bool) -> None:
        self.hand, self.measures = hand, measures

    def write(self, results):
        self.hand.seconds += 1.0


@pytest.mark.parametrize("measures", [False, True])
def test_a_run_pays_for_what_it_does_with_results_and_not_for_measuring(evaluate, measures):
    hand = Hand()

    def prepare(evaluation):
        evaluation.stream.clock._read = lambda: hand.seconds
        original = evaluation.frozen.step

        def step(frame):
            hand.seconds += 50.0  # the frozen model is there for the comparison alone
            return original(frame)

        evaluation.frozen.step = step

    sinks = [Slow(hand, measures=measures)]
    rows, _ = evaluate("TTT.FRAME_BUDGET_MS", 400, sinks=sinks, prepare=prepare)
    behind = [row["behind_seconds"] for row in rows]
    paid = [0, 0, 0, 0, 0] if measures else [0, 0.6, 1.2, 1.8, 2.4]
    assert behind == pytest.approx(paid)


def test_without_a_budget_rows_and_summary_say_nothing_of_one(evaluate):
    rows, summary = evaluate()
    names = {"step_samples", "skipped_updates", "shrunk_updates", "late_frames", "behind_seconds"}
    assert not names & rows[0].keys()
    assert not {*names, "frame_budget_used"} & summary.keys()


def test_a_run_with_a_budget_does_not_go_on(evaluate, tmp_path):
    budget = ("TTT.FRAME_BUDGET_MS", 3_600_000)
    evaluate(*budget)
    with pytest.raises(UserError, match=r"cannot go on: with TTT\.FRAME_BUDGET_MS.*--output"):
        evaluate(*budget, resume=True)
    for name in ("frames.jsonl", "videos.jsonl"):
        (tmp_path / "run" / name).write_text("")  # it was killed before its first frame
    assert len(evaluate(*budget, resume=True)[0]) == 5


def test_videos_with_a_budget_do_not_run_at_once(tiny_cfg, tmp_path):
    tiny_cfg.TTT.FRAME_BUDGET_MS = 100
    with pytest.raises(UserError, match=r"TTT\.FRAME_BUDGET_MS.*use one worker"):
        evaluate_in_parallel(Settings(tiny_cfg, RunDirectory(tmp_path / "run")), [], 2)
