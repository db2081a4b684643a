"""The loop: push, adapt, predict, in that order, and what a video's start resets."""

from __future__ import annotations

import copy
from contextlib import suppress

import pytest
import torch
from torch import nn

from ttt_video.adaptation import Adapter, NoAdaptation, ReconstructionAdapter, SlidingWindow
from ttt_video.errors import UserError
from ttt_video.stream import Stream
from ttt_video.stream.clock import Clock
from ttt_video.structures import video_seed


class Counter(nn.Module):
    """A model whose only weight says how often it was adapted."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        super().__init__()
        self.steps = nn.Parameter(torch.zeros(()))

    def forward(self, batch):
        return [{"steps": self.steps.item(), "saw": x} for x in batch]


class CountingAdapter(Adapter):
    """Adds one to the weight per frame and writes down every call."""

    def __init__(self) -> None:
        super().__init__(Counter())
        self.calls: list[tuple] = []

    def adapt(self, window, generator):
        batch = window.sample(len(window), sampling="shuffled_epochs", generator=generator)
        frames = sorted(x["frame_index"] for x in batch)
        self.calls.append(("adapt", window.current["frame_index"], frames))
        with torch.no_grad():
            self.model.steps += 1
        return {"draw": torch.rand((), generator=generator).item()}

    def predict(self, frame):
        self.calls.append(("predict", frame["frame_index"]))
        return super().predict(frame)

    def reset(self):
        self.calls.append(("reset",))
        self.model.steps.data.zero_()


def runner(reset: str = "video", size: int | None = 2, seed: int = 0) -> Stream:
    return Stream(CountingAdapter(), SlidingWindow(size), reset=reset, seed=seed)


def steps(results) -> list[float]:
    return [r.output["steps"] for r in results]


def draws(results) -> list[float]:
    return [r.record["draw"] for r in results]


def test_frame_is_in_the_window_when_adapting_and_predicted_with_the_weights_after(make_video):
    stream = runner()
    results = list(stream.run(make_video(num_frames=3)))
    assert stream.adapter.calls == [
        ("reset",),
        ("adapt", 0, [0]), ("predict", 0),
        ("adapt", 1, [0, 1]), ("predict", 1),
        ("adapt", 2, [1, 2]), ("predict", 2),
    ]  # fmt: skip
    assert steps(results) == [1, 2, 3]


def test_unbounded_window_keeps_the_whole_video_and_only_that(make_video):
    stream = runner(size=None)
    for name in ("a", "b"):
        for _ in stream.run(make_video(name, num_frames=4)):
            pass
    windows = [call[2] for call in stream.adapter.calls if call[0] == "adapt"]
    assert windows == [[*range(n + 1)] for n in range(4)] * 2


def test_results_come_one_by_one_as_frames_do(make_video):
    stream = runner()
    taken = []

    def source():
        for frame in make_video(num_frames=3):
            taken.append(frame["frame_index"])
            yield frame

    for index, result in enumerate(stream.run(source())):
        assert taken == [*range(index + 1)]
        assert result.frame["frame_index"] == index
        assert result.adapt_seconds >= 0
        assert result.predict_seconds >= 0


def test_result_has_the_labels_and_the_model_has_not(make_video):
    frames = [{**frame, "sem_seg_file_name": "labels.png"} for frame in make_video(num_frames=1)]
    (result,) = runner().run(frames)
    assert result.frame is frames[0]
    assert result.frame["sem_seg_file_name"] == "labels.png"
    assert set(result.output["saw"]) == {"image", "height", "width", "video_id", "frame_index"}


def test_reset_video_starts_every_video_from_the_source(make_video):
    stream = runner("video")
    numbers = [steps(stream.run(make_video(name, num_frames=2))) for name in ("a", "b", "a")]
    assert numbers == [[1, 2]] * 3
    assert len(stream.window) == 2


def test_running_a_video_again_starts_it_again(make_video):
    stream = runner("video")
    assert steps(stream.run(make_video("a"))) == [1, 2, 3]
    assert steps(stream.run(make_video("a"))) == [1, 2, 3]


def test_step_starts_a_video_when_the_id_changes(make_video):
    stream = runner("video", size=None)
    frames = [*make_video("a", num_frames=2), *make_video("b", num_frames=2)]
    assert steps(map(stream.step, frames)) == [1, 2, 1, 2]
    assert len(stream.window) == 2


def test_reset_frame_has_only_explicit_memory(make_video):
    stream = runner("frame")
    results = list(stream.run(make_video(num_frames=3)))
    assert steps(results) == [1, 1, 1]
    # The weights are forgotten, the window is not; draws go on.
    assert [c[2] for c in stream.adapter.calls if c[0] == "adapt"] == [[0], [0, 1], [1, 2]]
    assert len(set(draws(results))) == 3


def test_reset_never_goes_on_across_videos(make_video):
    stream = runner("never", size=3)
    frames = [*make_video("a", num_frames=2), *make_video("b", num_frames=2)]
    assert steps(map(stream.step, frames)) == [1, 2, 3, 4]
    assert ("reset",) not in stream.adapter.calls
    assert [c[2] for c in stream.adapter.calls if c[0] == "adapt"][-1] == [0, 1, 1]  # b, a, b


def test_unknown_reset_is_refused():
    with pytest.raises(ValueError, match="'clip'"):
        runner("clip")


def calls_of(stream: Stream) -> list[tuple]:
    return [call[:2] for call in stream.adapter.calls if call[0] != "reset"]


def test_update_every_n_frames_and_predict_every_one(make_video):
    stream = Stream(CountingAdapter(), SlidingWindow(2), update_every=3)
    for name in ("a", "b"):
        results = list(stream.run(make_video(name, num_frames=5)))
        assert steps(results) == [1, 1, 1, 2, 2]
        assert [set(r.record) for r in results] == [{"draw"}, set(), set(), {"draw"}, set()]
    # Frames between two updates are in the window of the next one.
    assert [call[2] for call in stream.adapter.calls if call[0] == "adapt"][:2] == [[0], [2, 3]]


def test_update_interval_goes_on_from_a_saved_state(make_video):
    stream = Stream(CountingAdapter(), SlidingWindow(2), update_every=3)
    video = make_video(num_frames=6)
    list(stream.run(video[:2]))
    resumed = Stream(CountingAdapter(), SlidingWindow(2), update_every=3)
    resumed.load_state_dict(stream.state_dict())
    records = [resumed.step(frame).record for frame in video[2:]]
    assert [bool(record) for record in records] == [False, True, False, False]


def test_predict_before_the_update(make_video):
    stream = Stream(CountingAdapter(), SlidingWindow(2), predict="before")
    results = list(stream.run(make_video(num_frames=3)))
    assert calls_of(stream) == [
        ("predict", 0), ("adapt", 0), ("predict", 1), ("adapt", 1), ("predict", 2), ("adapt", 2),
    ]  # fmt: skip
    assert steps(results) == [0, 1, 2]
    assert all("draw" in r.record for r in results)
    with pytest.raises(ValueError, match="'during'"):
        Stream(CountingAdapter(), SlidingWindow(2), predict="during")


def test_times_of_update_and_prediction_are_kept_apart(make_video):
    # push, update, prediction; push, prediction, update
    for predict, ticks, ready in (
        ("after", [0, 1, 1, 4, 4, 9], 9),
        ("before", [0, 1, 1, 6, 6, 9], 6),
    ):
        stream = Stream(
            CountingAdapter(),
            SlidingWindow(2),
            predict=predict,
            clock=Clock(read=iter(ticks).__next__),
        )
        (result,) = stream.run(make_video(num_frames=1))
        assert (result.adapt_seconds, result.predict_seconds) == (4, 5)
        assert result.ready_seconds == ready


def test_a_paused_clock_stands():
    ticks = iter([0, 10, 60, 75, 80, 90, 95])
    clock = Clock(read=lambda: next(ticks))
    assert clock() == 0
    with clock.paused():
        pass
    assert clock() == 25
    with suppress(ValueError), clock.paused():
        raise ValueError
    assert clock() == 35


class WatchingAdapter(CountingAdapter):
    offline = True

    def watch(self, video, generator):
        self.calls.append(("watch", [frame["frame_index"] for frame in video]))


def test_offline_methods_see_the_whole_video_once_before_anything_else(make_video):
    stream = Stream(WatchingAdapter(), SlidingWindow(2))
    for name in ("a", "b"):
        list(stream.run(make_video(name, num_frames=2)))
    expected = [("watch", [0, 1]), ("adapt", 0), ("predict", 0), ("adapt", 1), ("predict", 1)]
    assert calls_of(stream) == expected * 2


def test_watching_counts_as_the_first_frames_update(make_video):
    read = iter([0, 100, *range(100, 200)]).__next__
    stream = Stream(WatchingAdapter(), SlidingWindow(2), clock=Clock(read=read))
    first, second = stream.run(make_video(num_frames=2))
    assert (first.adapt_seconds, second.adapt_seconds) == (102, 2)


def test_offline_methods_refuse_what_they_cannot_see_twice(make_video):
    stream = Stream(WatchingAdapter(), SlidingWindow(2))
    with pytest.raises(UserError, match="needs the whole video"):
        list(stream.run(iter(make_video())))
    with pytest.raises(UserError, match="needs the whole video"):
        stream.step(make_video("b")[0])


def test_reset_frame_draws_depend_on_the_frame_and_not_on_its_place(make_video):
    video = make_video(num_frames=3)
    forward = draws(runner("frame", size=1).run(video))
    assert draws(runner("frame", size=1).run(video[::-1])) == forward[::-1]
    assert draws(runner("frame", size=1, seed=1).run(video)) != forward
    assert draws(runner("frame", size=1).run(make_video("b"))) != forward


def test_draws_depend_on_seed_and_video_and_on_no_earlier_video(make_video):
    alone = draws(runner().run(make_video("b")))
    stream = runner()
    after_another = [draws(stream.run(make_video(name))) for name in ("a", "b")]
    assert after_another[1] == alone
    assert after_another[0] != alone
    assert draws(runner(seed=1).run(make_video("b"))) != alone
    assert draws(runner(seed=0).run(make_video("b"))) == alone


def test_video_seeds_differ_and_stay():
    seeds = {video_seed(s, v) for s in range(20) for v in ("", "a", "b", "0001", "0002", "é")}
    assert len(seeds) == 120
    assert all(0 <= s < 2**63 for s in seeds)
    # "1" + "2/x" and "12" + "/x" must not meet.
    assert video_seed(1, "2/x") != video_seed(12, "x")
    # A result on disk can be had again by a later version only if this number never changes.
    assert video_seed(0, "0001") == 10891879392325288


def test_from_config_reads_method_window_reset_and_seed(tiny_cfg, tiny_model):
    stream = Stream.from_config(tiny_cfg, tiny_model)
    assert type(stream.adapter) is ReconstructionAdapter
    assert (stream.window.size, stream.reset, stream.seed) == (3, "video", 0)
    assert stream.window.device == tiny_model.device
    tiny_cfg.merge_from_list(
        ["TTT.METHOD", "none", "TTT.WINDOW_SIZE", 0, "TTT.RESET", "frame", "SEED", 7]
    )
    stream = Stream.from_config(tiny_cfg, tiny_model)
    assert type(stream.adapter) is NoAdaptation
    assert (stream.window.size, stream.reset, stream.seed) == (None, "frame", 7)
    assert (stream.update_every, stream.predict_first) == (1, False)
    tiny_cfg.merge_from_list(["TTT.UPDATE_EVERY", 4, "TTT.PREDICT", "before"])
    stream = Stream.from_config(tiny_cfg, tiny_model)
    assert (stream.update_every, stream.predict_first) == (4, True)
    tiny_cfg.SEED = -1
    assert Stream.from_config(tiny_cfg, tiny_model).seed == 0


@pytest.mark.parametrize("step_mode", ["train", "eval"])
@pytest.mark.parametrize(
    "optimizer", [["SGD", "TTT.OPTIMIZER.MOMENTUM", 0.9], ["ADAMW"]], ids=["SGD", "ADAMW"]
)
@pytest.mark.parametrize("reset", ["video", "frame"])
def test_zero_learning_rate_is_no_adaptation_bit_for_bit(
    tiny_cfg, tiny_model, make_video, optimizer, step_mode, reset
):
    tiny_cfg.merge_from_list(["TTT.OPTIMIZER.NAME", *optimizer])
    tiny_cfg.merge_from_list(["TTT.OPTIMIZER.BASE_LR", 0.0, "TTT.OPTIMIZER.WEIGHT_DECAY", 0.05])
    tiny_cfg.merge_from_list(["TTT.STEP_MODE", step_mode, "TTT.RESET", reset])
    frozen_cfg = tiny_cfg.clone()
    frozen_cfg.TTT.METHOD = "none"
    adapted = Stream.from_config(tiny_cfg, copy.deepcopy(tiny_model))
    frozen = Stream.from_config(frozen_cfg, tiny_model)
    pairs = zip(adapted.run(make_video()), frozen.run(make_video()), strict=True)
    for ours, theirs in pairs:
        assert ours.record["grad_norm"] > 0
        assert torch.equal(ours.output["sem_seg"], theirs.output["sem_seg"])


def test_a_learning_rate_changes_the_prediction_of_the_first_frame_already(
    tiny_cfg, tiny_model, make_video
):
    video = make_video(num_frames=1)
    (adapted,) = Stream.from_config(tiny_cfg, copy.deepcopy(tiny_model)).run(video)
    with torch.no_grad():
        frozen = tiny_model(video)[0]["sem_seg"]
    assert not torch.equal(adapted.output["sem_seg"], frozen)


def test_reset_frame_with_a_window_of_one_is_a_function_of_the_frame_and_its_draws(
    tiny_cfg, tiny_model, make_video
):
    """No memory at all: a frame's result does not depend on what the frames before it show."""
    tiny_cfg.merge_from_list(["TTT.RESET", "frame", "TTT.WINDOW_SIZE", 1])
    first, second = make_video(num_frames=2)
    other = {**first, "image": 255 - first["image"]}
    results = []
    for start in (first, other):
        stream = Stream.from_config(tiny_cfg, copy.deepcopy(tiny_model))
        results.append(list(stream.run([start, second])))
    (a0, a1), (b0, b1) = results
    assert a0.record != b0.record
    assert a1.record == b1.record
    assert torch.equal(a1.output["sem_seg"], b1.output["sem_seg"])
