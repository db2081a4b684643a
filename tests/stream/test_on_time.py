"""Frames come at a fixed rate and do not wait; what is finished when one comes, counts for it.

All times are those of a simulated clock, whose profile the tests write.
"""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn

from ttt_video.adaptation import Adapter, SlidingWindow
from ttt_video.adaptation.wrappers import Wrapper
from ttt_video.config.named_files import find_profile
from ttt_video.data import BaseSource
from ttt_video.errors import UserError
from ttt_video.stream import (
    BudgetedStream,
    OnTimeStream,
    RunDirectory,
    Settings,
    Stream,
    StreamEvaluation,
    evaluate_in_parallel,
)
from ttt_video.stream.clock import Clock, SimulatedClock
from ttt_video.stream.on_time import _packed, _time_pushes, _TimedAdapter, _unpacked, simulate
from ttt_video.stream.stage_times import (
    StageTimes,
    cost_settings,
    stage_times,
    told_settings,
)

FREE = {"decode": [0.0], "push": [0.0], "predict": [0.0], "others": [0.0]}


class Numbered(Adapter):
    """Predicts the number of the frame; takes batches of four."""

    def __init__(self) -> None:
        super().__init__(nn.Identity())

    def adapt(self, window, generator):
        window.sample(4, sampling="with_replacement", generator=generator)
        return {"loss_recon": 1.0}

    def predict(self, frame):
        return {"frame": frame["frame_index"]}

    def reset(self):
        pass


class Choosy(Numbered):
    """Steps on every third frame, and then tries two predictions, of which one is returned."""

    timed_as = "online_ttt_mae"

    def adapt(self, window, generator):
        self.ready = window.current["frame_index"] % 3 == 0
        if not self.ready:
            return {"state": 0.0}
        for _ in range(2):
            self.model(torch.zeros(1))
        return super().adapt(window, generator)

    def predict(self, frame):
        if not self.ready:
            self.model(torch.zeros(1))
        return super().predict(frame)


class PerFrame(StageTimes):
    """Gives each frame's prediction its own seconds."""

    def draw(self, stage, frame, samples, seed):
        if stage == "predict":
            return self.parts["predict"][frame["frame_index"]]
        return super().draw(stage, frame, samples, seed)


def video(num_frames: int, video_id: str = "a") -> list[dict]:
    image = torch.zeros(3, 4, 6, dtype=torch.uint8)
    return [
        {"video_id": video_id, "frame_index": i, "image": image, "file_name": str(i)}
        for i in range(num_frames)
    ]


def on_time(
    fps=10.0, *, budget=0.0, kind=StageTimes, steps=None, place="after", adapter=None, **parts
):
    """Returns a stream of :class:`Numbered` or another adapter whose stages take these seconds."""
    times = kind("test", (4, 6), {**FREE, **parts}, {0: [0.0]} if steps is None else steps)
    clock = SimulatedClock(times, 0)
    adapter, window = _TimedAdapter(adapter or Numbered(), clock), SlidingWindow(4)
    _time_pushes(window, clock)
    stream = Stream(adapter, window, clock=clock, predict=place)
    return OnTimeStream(BudgetedStream(stream, budget) if budget else stream, fps)


def outcome(stream, num_frames: int, video_id: str = "a"):
    """Returns for each frame the number of the one whose prediction counts, and the dropped."""
    results = list(stream.run(video(num_frames, video_id)))
    assert [r.frame["frame_index"] for r in results] == [*range(num_frames)]
    counts = [r.on_time.output and r.on_time.output["frame"] for r in results]
    for index, (result, own) in enumerate(zip(results, counts, strict=True)):
        assert result.on_time.delay_frames == (None if own is None else index - own)
    return counts, [i for i, r in enumerate(results) if r.on_time.dropped]


@pytest.mark.parametrize(
    ("seconds", "counts", "dropped"),
    [
        # Half a period: each frame has the prediction of the one before.
        ([0.05] * 5, [None, 0, 1, 2, 3], []),
        # No time at all: its own is finished when it comes.
        ([0.0] * 4, [0, 1, 2, 3], []),
        # Exactly a period: a tie at the deadline counts as finished, three times 0.1 s as well.
        ([0.1] * 6, [None, 0, 1, 2, 3, 4], []),
        # 0.15 s: frame 0 ends at 0.15, 1 waits and ends at 0.30 = frame 3's time, which is taken,
        # because 2 came at 0.2 and 3 at 0.3.
        ([0.15] * 7, [None, None, 0, 1, 1, 3, 4], [2, 5]),
        # A slow first frame: until it ends nothing counts. Frame 3, the newest one then, is taken
        # and ends just at frame 4's time.
        ([0.35, *[0.05] * 6], [None, None, None, None, 3, 4, 5], [1, 2]),
        # A slow frame in the middle: the prediction before it grows old.
        ([0.05, 0.05, 0.42, *[0.05] * 6], [None, 0, 1, 1, 1, 1, 1, 6, 7], [3, 4, 5]),
    ],
)
def test_the_newest_prediction_that_is_finished_counts(seconds, counts, dropped):
    found = outcome(on_time(kind=PerFrame, predict=seconds), len(seconds))
    assert found == (counts, dropped)


def test_a_dropped_frame_has_the_output_of_the_one_taken_before_and_no_update():
    results = list(on_time(predict=[0.25]).run(video(6)))
    assert [r.on_time.dropped for r in results] == [False, True, False, True, True, False]
    assert [r.output["frame"] for r in results] == [0, 0, 2, 2, 2, 5]
    assert [bool(r.record) for r in results] == [True, False, True, False, False, True]
    assert [r.on_time.latency_seconds for r in results] == [
        0.25,
        None,
        0.3,
        None,
        None,
        0.25,
    ]  # 0 to 0.25; frame 2 waits 0.05 s, and ends at 0.5, when frame 5 comes
    assert [r.predict_seconds for r in results] == pytest.approx([0.25, 0, 0.25, 0, 0, 0.25])


def test_all_stages_take_time_and_only_what_comes_before_a_prediction_delays_it():
    stages = {"decode": [0.01], "push": [0.02], "predict": [0.03], "others": [0.05]}
    results = list(on_time(**stages, steps={4: [0.04]}).run(video(3)))
    # Each frame: decode, push, step and prediction make 0.10 s; with the others 0.15 s.
    assert [r.on_time.latency_seconds for r in results] == [0.1, 0.15, None]
    assert [r.on_time.dropped for r in results] == [False, False, True]
    assert results[0].adapt_seconds == pytest.approx(
        0.07
    )  # decoding and push count as before, with the update
    early = list(on_time(**stages, steps={4: [0.04]}, place="before").run(video(1)))
    assert early[0].on_time.latency_seconds == 0.06  # its update follows


@pytest.mark.parametrize("wrap", [lambda adapter: adapter, Wrapper])
def test_a_method_that_learns_sometimes_pays_for_what_it_does(wrap):
    stream = on_time(fps=1.0, predict=[0.03], steps={4: [0.04]}, adapter=wrap(Choosy()))
    results = list(stream.run(video(5)))
    # A step and two predictions; else one.
    latencies = [r.on_time.latency_seconds for r in results]
    assert latencies == pytest.approx([0.10, 0.03, 0.03, 0.10, 0.03])


def test_its_seconds_are_those_of_the_method_it_names(timed_cfg):
    stream = Stream(Choosy(), SlidingWindow(2))
    simulate(stream, timed_cfg, "choosy")
    assert stream.clock.times == stage_times(timed_cfg, "online_ttt_mae")


def test_a_video_starts_anew():
    stream = on_time(predict=[0.15])
    first = outcome(stream, 5)
    assert outcome(stream, 5, "b") == first


@pytest.mark.parametrize("seed", range(20))
def test_pairing_is_that_of_the_definition(seed):
    """The last finished prediction counts; in each moment the loop takes the newest frame."""
    generator = torch.Generator().manual_seed(seed)
    hundredths = torch.randint(0, 40, (40,), generator=generator).tolist()
    seconds = [value / 100 for value in hundredths]
    free, ends = 0, {}  # in hundredths of a second; frames come every 10
    for moment in range(400):
        newest = moment // 10
        if moment >= free and newest not in ends:
            ends[newest] = free = moment + hundredths[newest]
    expected = [
        max((j for j, end in ends.items() if end <= 10 * i), default=None) for i in range(40)
    ]
    dropped = [i for i in range(40) if i not in ends]
    assert outcome(on_time(kind=PerFrame, predict=seconds), 40) == (expected, dropped)


@pytest.mark.parametrize("slowest", [20, 60, 200])
def test_pairing_is_that_of_the_toolkit_of_sap(tmp_path, slowest):
    """``pip install --no-deps sap-toolkit==1.0.0``; its rule is for 30 frames per second."""
    utils = pytest.importorskip("sap_toolkit.utils")
    import pickle
    from types import SimpleNamespace

    import numpy as np

    generator = torch.Generator().manual_seed(slowest)
    seconds = (torch.rand(60, generator=generator) * slowest / 1000).tolist()
    results = list(on_time(30.0, kind=PerFrame, predict=seconds).run(video(60)))
    taken = [r for r in results if not r.on_time.dropped]
    ends = [r.frame["frame_index"] / 30 + r.on_time.latency_seconds for r in taken]
    parsed = [
        (np.array([[0.0, 0, 1, 1]]), np.array([1.0]), np.array([r.frame["frame_index"]]), None)
        for r in taken
    ]
    with (tmp_path / "a.pkl").open("wb") as file:
        pickle.dump({"results_parsed": parsed, "timestamps": ends}, file)
    images = {i: {"id": i, "sid": 0} for i in range(60)}
    db = SimpleNamespace(dataset={"sequences": ["a"]}, imgs=images)
    utils.gen_results(db, SimpleNamespace(out_dir=tmp_path, overwrite=True), "results.json")
    theirs = {
        row["image_id"]: row["category_id"]
        for row in json.loads((tmp_path / "results.json").read_text())
    }
    ours = {r.frame["frame_index"]: r.on_time.output["frame"] for r in results if r.on_time.output}
    assert ours == theirs
    assert 0 < len(ours) < 60


def test_a_budget_on_the_simulated_clock_is_in_time():
    """5 ms a sample and 10 ms a prediction: 18 samples fit, of batches of four all."""
    stages = {"predict": [0.010], "steps": {1: [0.005], 4: [0.020]}}
    results = list(on_time(10.0, budget=0.1, **stages).run(video(12)))
    assert [r.record["step_samples"] for r in results] == [0, 1] + 10 * [4]
    assert not any(r.on_time.dropped for r in results)
    tight = list(on_time(10.0, budget=0.1, **{**stages, "predict": [0.082]}).run(video(12)))
    assert [r.record["step_samples"] for r in tight] == [0, 1] + 10 * [2]  # 95 - 82 = 2 * 5 + 3
    assert [r.record["late_frames"] for r in tight] == 12 * [0]


def test_a_budget_pays_for_decoding_and_the_rest_and_not_for_what_was_dropped():
    stages = {"predict": [0.05], "decode": [0.03], "others": [0.09], "steps": {1: [1.0]}}
    results = list(on_time(10.0, budget=0.1, **stages).run(video(6)))
    # 0.17 s a frame: 0 ends at 0.17, 1 is taken 0.07 late and ends at 0.34, 2 is dropped, 3 is
    # taken 0.04 late, and so on.
    taken = [r for r in results if not r.on_time.dropped]
    assert [r.frame["frame_index"] for r in taken] == [0, 1, 3, 5]
    assert [r.record["behind_seconds"] for r in taken] == pytest.approx([0, 0.07, 0.04, 0.01])
    assert [r.frame.get("dropped", 0) for r in taken] == [0, 0, 1, 1]


def test_the_wall_clock_waits_for_frames():
    now = [5.0]
    waits = []

    def sleep(seconds):
        waits.append(round(seconds, 6))
        now[0] += seconds

    class Slow(Numbered):
        def predict(self, frame):
            now[0] += 0.04
            return super().predict(frame)

    clock = Clock(read=lambda: now[0], sleep=sleep)
    stream = OnTimeStream(Stream(Slow(), SlidingWindow(2), clock=clock), 10.0)
    assert outcome(stream, 4) == ([None, 0, 1, 2], [])
    assert waits == [0, 0.06, 0.06, 0.06]


def test_offline_methods_are_refused():
    stream = on_time().stream
    stream.adapter.offline = True
    with pytest.raises(UserError, match=r"TTT\.CLOCK\.FPS is set, but an offline method.*to 0"):
        OnTimeStream(stream, 10.0)


def test_pictures_without_a_place_in_time_are_refused():
    with pytest.raises(UserError, match=r"TTT\.CLOCK\.FPS.*frame_index, and no Tensor"):
        list(on_time().run([torch.zeros(4, 6, 3, dtype=torch.uint8)]))


def test_seconds_are_drawn_by_seed_video_frame_and_stage():
    times = StageTimes("m", (4, 6), {**FREE, "predict": [0.1, 0.2, 0.3]}, {1: [1.0], 5: [3.0, 5.0]})
    frames = [{"video_id": "a", "frame_index": i} for i in range(300)]
    drawn = [times.draw("predict", frame, 0, 0) for frame in frames]
    assert drawn == [times.draw("predict", frame, 7, 0) for frame in frames]
    assert drawn != [times.draw("predict", frame, 0, 1) for frame in frames]
    for value in (0.1, 0.2, 0.3):  # 100 of each are expected, with a deviation of 8
        assert 60 < drawn.count(value) < 140
    other = [times.draw("predict", {**frame, "video_id": "b"}, 0, 0) for frame in frames]
    assert other != drawn
    steps = {n: times.draw("step", frames[0], n, 0) for n in (0, 1, 2, 3, 5, 9)}
    full = steps[5]
    assert full in (3.0, 5.0)
    assert steps == {0: 1.0, 1: 1.0, 2: 1 + (full - 1) / 4, 3: 1 + (full - 1) / 2, 5: full, 9: full}


def test_packed_outputs_come_back(tmp_path):
    from detectron2.structures import Boxes, Instances

    instances = Instances((4, 6), scores=torch.tensor([0.5]), pred_boxes=Boxes(torch.ones(1, 4)))
    instances.pred_masks = torch.ones(1, 4, 6)
    panoptic = (torch.zeros(4, 6, dtype=torch.int32), [{"id": 1, "isthing": True}])
    output = {"instances": instances, "panoptic_seg": panoptic, "sem_seg": torch.ones(2, 4, 6)}
    torch.save(_packed(output), tmp_path / "state.pth")
    back = _unpacked(torch.load(tmp_path / "state.pth", weights_only=True))
    assert back.keys() == output.keys()
    assert back["instances"].image_size == (4, 6)
    assert torch.equal(back["instances"].scores, instances.scores)
    assert torch.equal(back["instances"].pred_boxes.tensor, torch.ones(1, 4))
    assert torch.equal(back["instances"].pred_masks, instances.pred_masks)
    assert back["panoptic_seg"][1] == panoptic[1]
    assert torch.equal(back["sem_seg"], output["sem_seg"])


# ---- runs on disk


@pytest.fixture
def timed_cfg(tiny_cfg, tmp_path):
    """10 frames a second; a step on all samples and a prediction take 0.07 s to 0.17 s."""
    parts = {"decode": [0.001], "push": [0.001], "predict": [0.04, 0.05, 0.06], "others": [0.002]}
    cases = [
        {
            "method": method,
            "size": [64, 64],
            "settings": cost_settings(tiny_cfg, method),
            "seconds": {**parts, "step": {"1": [0.02], "4": [0.03, 0.07, 0.11]}},
        }
        for method in ("none", "online_ttt_mae")
    ]
    file = tmp_path / "profile.json"
    file.write_text(json.dumps({"machine": "a test", "cases": cases}))
    tiny_cfg.TTT.CLOCK.FPS, tiny_cfg.TTT.CLOCK.PROFILE = 10.0, str(file)
    return tiny_cfg


def test_another_window_than_the_profiles_is_told(timed_cfg, tiny_model, caplog, tmp_path):
    timed_cfg.TTT.WINDOW_SIZE = 16
    Stream.from_config(timed_cfg, tiny_model)
    assert "has the seconds of" not in caplog.text  # one that does not say has the default
    timed_cfg.TTT.WINDOW_SIZE = 3
    Stream.from_config(timed_cfg, tiny_model)
    said = "profile.json has the seconds of online_ttt_mae with TTT.WINDOW_SIZE 16 (here 3)"
    assert said in caplog.text
    # If two cases fit, the one with the fewest such differences is taken.
    file = tmp_path / "profile.json"
    content = json.loads(file.read_text())
    nearer = copy.deepcopy(content["cases"][1])
    nearer["settings"] |= told_settings(timed_cfg, "online_ttt_mae")
    nearer["seconds"]["predict"] = [0.5]
    file.write_text(json.dumps({**content, "cases": [*content["cases"], nearer]}))
    times = stage_times(timed_cfg, "online_ttt_mae")
    assert (times.parts["predict"], times.apart) == ([0.5], "")


@pytest.mark.parametrize(
    ("method", "own"),
    [
        ("none", set()),
        ("online_ttt_mae", {"TTT.WINDOW_SIZE"}),
        ("tent_ln_adapt", {"TTT.WINDOW_SIZE", "TTT.LN_ADAPT.PRIOR"}),
        (
            "online_ttt_mae_line_search",
            {
                *("TTT.WINDOW_SIZE", "TTT.LINE_SEARCH.SCALES"),
                *("TTT.LINE_SEARCH.EVERY", "TTT.LINE_SEARCH.DECAY"),
            },
        ),
    ],
)
def test_a_methods_own_keys_are_those_of_its_section(tiny_cfg, method, own):
    assert told_settings(tiny_cfg, method).keys() == own


class Source(BaseSource):
    """Frames of noise; ``stop`` ends them early, as a kill does."""

    fps = None

    def __init__(self, frames, stop=None):
        self.frames, self.stop = frames, stop
        self.video_id, self.num_frames = frames[0]["video_id"], len(frames)

    def __iter__(self):
        for frame in self.frames:
            if frame["frame_index"] == self.stop:
                raise KeyboardInterrupt
            yield dict(frame)


@pytest.fixture
def evaluate(timed_cfg, tiny_model, tmp_path, make_video):
    def run(name, *opts, stop=None, resume=False, videos="ab"):
        for key, value in zip(opts[::2], opts[1::2], strict=True):
            timed_cfg.TTT[key.removeprefix("TTT.")] = value
        directory = RunDirectory(tmp_path / name, resume=resume)
        settings = Settings(timed_cfg, directory, compare=True, save_every=2)
        evaluation = StreamEvaluation(settings, copy.deepcopy(tiny_model))
        sources = [Source(make_video(v, 9, 64, 64), stop if v == "b" else None) for v in videos]
        if stop is None:
            evaluation.evaluate(sources)
        else:
            with pytest.raises(KeyboardInterrupt):
                evaluation.evaluate(sources)
        return {(r["video_id"], r["frame_index"]): r for r in directory.rows()}

    return run


@pytest.mark.slow
@pytest.mark.parametrize(
    "opts",
    [
        (),
        pytest.param(("TTT.FRAME_BUDGET_MS", 100), marks=pytest.mark.slow),
        pytest.param(("TTT.WINDOW_SIZE", "auto"), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_runs_repeat_and_go_on_bit_for_bit(evaluate, tmp_path, opts):
    rows = evaluate("whole", *opts)
    assert len(rows) == 18
    dropped = [row["streaming"]["dropped"] for row in rows.values()]
    assert any(dropped) != ("TTT.FRAME_BUDGET_MS" in opts)
    assert ("window_size" in rows["a", 0]) == ("auto" in opts)
    assert evaluate("again", *opts) == rows
    assert evaluate("alone", *opts, videos="b") == {k: r for k, r in rows.items() if k[0] == "b"}
    cut = evaluate("cut", *opts, stop=5)
    assert 9 < len(cut) < 18
    assert evaluate("cut", *opts, resume=True) == rows
    own, other = (json.loads((tmp_path / n / "summary.json").read_text()) for n in ("whole", "cut"))
    for name in ("metrics", "streaming", "seconds"):
        assert own[name] == other[name]
    assert own["device"] == "simulated: a test"
    assert own["streaming"]["frozen"]["dropped_frames"] == 0
    assert own["streaming"]["adapted"]["dropped_frames"] == sum(dropped)
    assert own["streaming"]["adapted"]["misses"] >= 2
    assert "frozen" in rows["a", 3]
    assert rows["a", 3]["frozen"]["streaming"]["delay_frames"] == 1


def test_a_changed_profile_is_refused(evaluate, timed_cfg, tmp_path):
    evaluate("run", stop=5)
    file = tmp_path / "profile.json"
    file.write_text(file.read_text().replace("0.05", "0.051"))
    with pytest.raises(UserError, match="profile"):
        evaluate("run", resume=True)


def test_on_the_wall_clock_a_run_does_not_go_on_and_videos_do_not_run_at_once(tiny_cfg, tmp_path):
    tiny_cfg.TTT.CLOCK.FPS = 10.0
    with pytest.raises(UserError, match=r"TTT\.CLOCK\.FPS.*use one worker"):
        evaluate_in_parallel(Settings(tiny_cfg, RunDirectory(tmp_path / "run")), [], 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("TTT.BATCH_SIZE", 3), r"TTT\.BATCH_SIZE is 3, there 4"),
        (("TTT.METHOD", "tent"), r"no seconds of tent.*it has none of this method"),
        (("TTT.CLOCK.PROFILE", "nothing"), r"no profile 'nothing'"),
    ],
)
def test_a_profile_is_of_a_method_and_its_settings(timed_cfg, change, message):
    timed_cfg.merge_from_list([*change])
    with pytest.raises(UserError, match=message):
        stage_times(timed_cfg, timed_cfg.TTT.METHOD)


def test_a_profile_is_of_frames_of_a_size(timed_cfg, make_video):
    stream = Stream(Numbered(), SlidingWindow(2))
    simulate(stream, timed_cfg, "none")
    with pytest.raises(UserError, match=r"frames of 64x64 px, and the model sees 128x64"):
        stream.step(make_video("a", 1, 128, 64)[0])


_CASE = '{"machine": "m", "cases": [{"method": "none", "size": %s, "settings": %s, "seconds": %s}]}'


@pytest.mark.parametrize(
    "content",
    [
        "{}",
        '{"machine": "m", "cases": [{"method": "none"}]}',
        "x",
        _CASE % ("[64, 64]", "[]", "{}"),
        _CASE % ("[64, 64]", "SETTINGS", '{"step": [1, 2]}'),
        _CASE % ("[Infinity, 3]", "SETTINGS", '{"predict": [1]}'),
    ],
)
def test_a_damaged_profile_is_a_line(timed_cfg, tmp_path, content):
    settings = json.dumps(cost_settings(timed_cfg, "none"))
    (tmp_path / "profile.json").write_text(content.replace("SETTINGS", settings))
    with pytest.raises(UserError, match=r"profile\.json") as error:
        stage_times(timed_cfg, "none")
    assert "\n" not in str(error.value)


def test_shipped_profiles_can_be_read():
    names = {file.stem for file in find_profile("one_core").parent.glob("*.json")}
    assert names >= {"one_core", "two_cores", "h200"}
    for name in names:
        content = json.loads(find_profile(name).read_text())
        for case in content["cases"]:
            assert case["settings"].keys() >= {"MODEL.META_ARCHITECTURE"}
            assert min(case["seconds"]["predict"]) > 0
