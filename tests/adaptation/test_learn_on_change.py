"""learn_on_change: its guarantees, by predictions, weights and scores measured from outside."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from change_streams import (
    AT_ONCE,
    HUGE,
    KEEP,
    LEARN,
    NOTHING,
    REST,
    RETURN,
    distance_by_hand,
    frozen_scores,
    prefer,
    states,
    stream,
    weights,
)

from ttt_video.adaptation import change_states
from ttt_video.adaptation.base import build_adapter
from ttt_video.adaptation.candidates import FROZEN
from ttt_video.adaptation.head_signal import measure_head
from ttt_video.adaptation.learn_on_change import ChangeAdapter
from ttt_video.config import load_config
from ttt_video.errors import UserError
from ttt_video.modeling.weights import save_safetensors
from ttt_video.stream import Stream, load_source_model


def test_rest_is_the_frozen_model_bit_for_bit(change_cfg, tiny_model, make_video):
    runner = stream(change_cfg, tiny_model, ENTER=HUGE)
    runner.generator.manual_seed(0)
    before = weights(runner)
    results = list(runner.run(make_video(num_frames=5)))
    assert states(results) == [REST] * 5
    for result in results:
        assert torch.equal(result.output["sem_seg"], frozen_scores(tiny_model, result.frame))
        assert "loss_recon" not in result.record
    assert all(torch.equal(before[name], value) for name, value in weights(runner).items())
    assert all(r.record["norm_shift"] > 0 for r in results[1:])


def test_rest_takes_one_forward_pass_a_frame(change_cfg, tiny_model, make_video):
    runner = stream(change_cfg, tiny_model, ENTER=HUGE)
    calls = []
    for part in ("backbone", "sem_seg_head", "recon_head"):
        module = runner.adapter.model.get_submodule(part)
        module.register_forward_hook(lambda *_, part=part: calls.append(part))
    list(runner.run(make_video(num_frames=4)))
    assert calls == ["backbone", "sem_seg_head"] * 4


def test_the_distance_is_that_of_a_pass_of_its_own(change_cfg, tiny_model, make_video, head):
    results = list(stream(change_cfg, tiny_model, ENTER=HUGE).run(make_video(num_frames=3)))
    for result, after in itertools.pairwise(results):
        expected = distance_by_hand(tiny_model, result.frame["image"], head)
        assert after.record["norm_shift"] == pytest.approx(expected, rel=1e-3)


def test_a_false_alarm_changes_no_bit_and_is_soon_over(change_cfg, tiny_model, make_video):
    """Steps are taken, but nothing gains enough."""
    settings = {**AT_ONCE, "MARGIN": 1.0, "WAIT": [2, 2], "STEP_FRAMES": 2}
    runner = stream(change_cfg, tiny_model, **settings)
    before, moved, results = weights(runner), [], []
    for result in runner.run(make_video(num_frames=10)):
        results.append(result)
        now = weights(runner)
        moved.append(any(not torch.equal(before[name], now[name]) for name in before))
        assert torch.equal(result.output["sem_seg"], frozen_scores(tiny_model, result.frame))
    # Two turns of the search and two steps; the place is one of the frozen model then.
    assert states(results) == [REST, *[LEARN] * 3, RETURN, RETURN, *[REST] * 4]
    assert moved == [*[False] * 3, True, *[False] * 6]


def test_learns_again_at_a_place_that_is_another(change_cfg, tiny_model, make_video):
    settings = {**AT_ONCE, **NOTHING, "BLUR": [1.0], "MARGIN": 1.0, "MOVED": 0.0}
    settings["WAIT"] = [2, 2]
    found = states(list(stream(change_cfg, tiny_model, **settings).run(make_video(num_frames=7))))
    assert found == [REST, RETURN, RETURN, REST, RETURN, RETURN, REST]


@pytest.mark.parametrize("cut", [None, 8, 12])
def test_a_search_that_changes_nothing_doubles_the_wait(
    change_cfg, tiny_model, make_video, cut, tmp_path, monkeypatch
):
    """The frozen model wins each search, the first one, too."""
    monkeypatch.setattr(change_states, "SUDDEN", HUGE**2)
    settings = {**AT_ONCE, **NOTHING, "BLUR": [1.0], "MARGIN": 1.0, "MOVED": 1e-6, "WAIT": [2, 8]}
    runner, found = stream(change_cfg, tiny_model, **settings), []
    for index, frame in enumerate(make_video(num_frames=24)):
        found.append(runner.step(frame).record["state"])
        if index == cut:
            torch.save(runner.state_dict(), tmp_path / "state.pth")
            runner = stream(change_cfg, tiny_model, **settings)
            runner.load_state_dict(torch.load(tmp_path / "state.pth", weights_only=True))
    returns = [[RETURN] * n for n in (2, 4, 8, 8)]
    assert found == [REST, *itertools.chain(*([*each, REST] for each in returns))][:24]


@pytest.fixture
def kept(change_cfg, tiny_model) -> Stream:
    """Searches a blur for a frame, takes a step in the next, and keeps what is preferred."""
    settings = {**AT_ONCE, **NOTHING, "BLUR": [1.0], "STEP_FRAMES": 1, "WAIT": [1, 1]}
    return stream(change_cfg, tiny_model, **settings, CHECK_EVERY=[2, 2])


@pytest.mark.parametrize("name", ["blur", "steps"])
def test_what_is_kept_takes_no_steps_and_no_more_passes(kept, make_video, name):
    prefer(kept, name)
    calls, found, passes = [], [], []
    kept.adapter.model.get_submodule("backbone").register_forward_hook(lambda *_: calls.append(1))
    for result in kept.run(make_video(num_frames=8)):
        found.append((result.record["state"], weights(kept)))
        passes.append(len(calls))
        calls.clear()
    assert [state for state, _ in found] == [REST, LEARN, *[KEEP] * 6]
    # A turn of two candidates; a step, and the frozen model, what is chosen (where that is another)
    # and the steps; then a check of two. What was compared is not predicted again.
    assert passes == [1, 2, 4 if name == "blur" else 3, 2, 1, 2, 1, 2]
    source, last = found[0][1], found[2][1]
    assert all(torch.equal(last[n], state[n]) for _, state in found[3:] for n in last)
    moved = any(not torch.equal(last[n], source[n]) for n in last)
    assert moved == (name == "steps")


def test_what_no_longer_gains_gives_way_to_the_frozen_model_at_once(kept, tiny_model, make_video):
    """A failed check takes no more passes than one that is passed, and begins no search."""
    prefer(kept, "blur")
    found, calls, passes = [], [], []
    kept.adapter.model.get_submodule("backbone").register_forward_hook(lambda *_: calls.append(1))
    for index, frame in enumerate(make_video(num_frames=8)):
        if index == 5:
            prefer(kept, "frozen")
        result = kept.step(frame)
        found.append(result.record["state"])
        passes.append(len(calls))
        calls.clear()
        frozen = torch.equal(result.output["sem_seg"], frozen_scores(tiny_model, frame))
        assert frozen == (index == 0 or index >= 5)
    assert found == [REST, LEARN, KEEP, KEEP, KEEP, RETURN, REST, REST]
    assert passes[3:7] == [2, 1, 2, 1]


def test_steps_are_taken_on_the_pictures_that_are_predicted(change_cfg, tiny_model, make_video):
    settings = {**AT_ONCE, **NOTHING, "COLOURS": [1.0], "STEP_FRAMES": 1}
    runner = prefer(stream(change_cfg, tiny_model, **settings), "colours")
    seen = []
    augment = runner.adapter.augment
    runner.adapter.augment = lambda image, random: seen.append(image) or augment(image, random)
    video = make_video(num_frames=3)
    for frame in video:
        frame["image"] = frame["image"] // 8
    list(runner.run(video))
    assert seen
    assert all(image.float().mean() > 100 for image in seen)


def test_another_frame_is_not_given_the_prediction_that_was_compared(
    change_cfg, tiny_model, make_video
):
    runner = prefer(stream(change_cfg, tiny_model, **AT_ONCE), "frozen")
    video = make_video(num_frames=3)
    runner.step(video[0])
    runner.window.push(video[1])
    runner.adapter.adapt(runner.window, runner.generator)
    output = runner.adapter.predict(video[2])
    assert torch.equal(output["sem_seg"], frozen_scores(tiny_model, video[2]))


FAST_CUTS = (2, 3, 4, 7)


@pytest.mark.parametrize(
    "cut",
    [
        *FAST_CUTS,
        *(pytest.param(n, marks=pytest.mark.slow) for n in range(1, 12) if n not in FAST_CUTS),
    ],
)
def test_goes_on_in_any_state_as_if_never_stopped(
    change_cfg, tiny_model, make_video, cut, tmp_path
):
    settings = {**AT_ONCE, "STEP_FRAMES": 1, "CHECK_EVERY": [2, 4], "WAIT": [2, 4]}
    settings["MOVED"] = 3.0
    video = [*make_video("a", num_frames=3), *make_video("dark", num_frames=9)]
    for index, frame in enumerate(video):
        frame.update(video_id="a", frame_index=index, image=frame["image"] // 8)
    whole = list(stream(change_cfg, tiny_model, **settings).run(video))
    assert {*states(whole)} >= {REST, LEARN, KEEP}
    stopped = stream(change_cfg, tiny_model, **settings)
    for frame in video[:cut]:
        stopped.step(frame)
    torch.save(stopped.state_dict(), tmp_path / "state.pth")
    resumed = stream(change_cfg, tiny_model, **settings)
    resumed.load_state_dict(torch.load(tmp_path / "state.pth", weights_only=True))
    for frame, expected in zip(video[cut:], whole[cut:], strict=True):
        result = resumed.step(frame)
        assert result.record == expected.record
        assert torch.equal(result.output["sem_seg"], expected.output["sem_seg"])


def test_a_video_begins_in_rest(kept, make_video):
    list(prefer(kept, "blur").run(make_video("a", num_frames=4)))
    assert next(kept.run(make_video("b"))).record == {"state": REST, **FROZEN._asdict()}


def test_a_prediction_that_is_not_finite_says_nothing(change_cfg, tiny_model, make_video):
    runner = stream(change_cfg, tiny_model, **AT_ONCE)
    video = make_video(num_frames=3)
    runner.step(video[0])
    runner.adapter._rest[0] = math.nan
    assert runner.step(video[1]).record == {"state": REST, **FROZEN._asdict()}
    assert runner.step(video[2]).record["state"] == LEARN


def test_parts_that_have_no_layers_are_refused(change_cfg, tiny_model):
    change_cfg.TTT.LEARN_ON_CHANGE.READ = ["h.predictor.class_embed"]
    with pytest.raises(UserError, match=r"READ to parts of the head"):
        build_adapter(change_cfg, tiny_model)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("RESET", "frame", r"TTT\.RESET is 'frame'.*choose video or never"),
        ("METHOD", "majority_vote", r"a majority vote over learn_on_change"),
    ],
)
def test_settings_that_contradict_it_are_refused(change_cfg, tiny_model, key, value, message):
    change_cfg.TTT[key] = value
    with pytest.raises(UserError, match=message):
        build_adapter(change_cfg, tiny_model, "learn_on_change")


def test_layers_that_move_are_no_signal(change_cfg, tiny_model, make_video, tmp_path):
    images = [frame["image"] for frame in make_video(num_frames=8)]
    save_safetensors(measure_head(tiny_model, images, ["f"]), tmp_path / "f.safetensors")
    change_cfg.TTT.LEARN_ON_CHANGE.SOURCE_HEAD = str(tmp_path / "f.safetensors")
    change_cfg.TTT.LEARN_ON_CHANGE.READ = ["f"]
    with pytest.raises(UserError, match=r"reads \['f'\], and its steps move that"):
        build_adapter(change_cfg, tiny_model)


def test_nothing_to_learn_is_refused(change_cfg, tiny_model):
    for key in NOTHING:
        change_cfg.TTT.LEARN_ON_CHANGE[key] = []
    with pytest.raises(UserError, match=r"nothing to learn: give .*STEP_FRAMES"):
        build_adapter(change_cfg, tiny_model)


def test_the_shipped_models_have_what_it_takes():
    for name in ("quick/stream_world.yaml", "quick/stream_world_panoptic.yaml"):
        config = load_config(name, method="learn_on_change")
        assert isinstance(build_adapter(config, load_source_model(config)), ChangeAdapter)
