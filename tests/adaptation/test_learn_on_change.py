"""learn_on_change: its guarantees, by predictions, weights and scores measured from outside."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from ttt_video.adaptation.base import build_adapter
from ttt_video.adaptation.candidates import Choice
from ttt_video.adaptation.change_states import State
from ttt_video.adaptation.learn_on_change import ChangeAdapter
from ttt_video.adaptation.norm_statistics import measure_statistics
from ttt_video.config import load_config
from ttt_video.errors import UserError
from ttt_video.stream import Stream, load_source_model

REST, LEARN, KEEP, RETURN = map(float, State)
HUGE = 1e6
AT_ONCE = {"ENTER": 0.0, "MOVED": HUGE, "PATIENCE": 1, "MARGIN": 0.0, "DECAY": 0.0, "EVERY": 1}
"""Learn begins with the second frame, and ends as ``LEARN_FRAMES`` says."""


@pytest.fixture
def cfg(cfg_with_statistics):
    # A step without a look at the loss after it is a single pass.
    return cfg_with_statistics("learn_on_change", "TTT.OPTIMIZER.MAX_LOSS_GROWTH", 0.0)


def stream(cfg, model: nn.Module, **settings) -> Stream:
    cfg = cfg.clone()
    for key, value in settings.items():
        cfg.TTT.LEARN_ON_CHANGE[key] = value
    return Stream.from_config(cfg, copy.deepcopy(model))


def frozen_scores(model: nn.Module, frame: dict) -> Tensor:
    with torch.no_grad():
        return model([frame])[0]["sem_seg"]


def states(results: list) -> list[float]:
    return [r.record["state"] for r in results]


def weights(runner: Stream) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in runner.adapter.model.named_parameters()}


def distance_by_hand(model: nn.Module, image: Tensor, source: dict[str, Tensor]) -> float:
    """Mean over the channels of the head's layers."""
    now = measure_statistics(model, [image], ["sem_seg_head"])
    parts = []
    for name, mean in now.items():
        if name.endswith(".mean"):
            deviation = (source[name.replace(".mean", ".variance")] + 1e-5).sqrt()
            parts.append((mean - source[name]).abs() / deviation)
    return float(torch.cat(parts).mean())


def test_rest_is_the_frozen_model_bit_for_bit(cfg, tiny_model, make_video):
    runner = stream(cfg, tiny_model, ENTER=HUGE)
    runner.generator.manual_seed(0)
    before = weights(runner)
    results = list(runner.run(make_video(num_frames=5)))
    assert states(results) == [REST] * 5
    for result in results:
        assert torch.equal(result.output["sem_seg"], frozen_scores(tiny_model, result.frame))
        assert "loss_recon" not in result.record
    assert all(torch.equal(before[name], value) for name, value in weights(runner).items())
    assert all(r.record["norm_shift"] > 0 for r in results[1:])


def test_rest_takes_one_forward_pass_a_frame(cfg, tiny_model, make_video):
    runner = stream(cfg, tiny_model, ENTER=HUGE)
    calls = []
    for part in ("backbone", "sem_seg_head", "recon_head"):
        module = runner.adapter.model.get_submodule(part)
        module.register_forward_hook(lambda *_, part=part: calls.append(part))
    list(runner.run(make_video(num_frames=4)))
    assert calls == ["backbone", "sem_seg_head"] * 4


def test_a_false_alarm_changes_no_bit_and_is_soon_over(cfg, tiny_model, make_video):
    """Steps are taken, but the frozen model wins every comparison."""
    settings = {**AT_ONCE, "MARGIN": HUGE, "GIVE_UP": 3, "RETURN_FRAMES": 2, "LEARN_FRAMES": 100}
    runner = stream(cfg, tiny_model, **settings)
    before, moved, results = weights(runner), [], []
    for result in runner.run(make_video(num_frames=9)):
        results.append(result)
        now = weights(runner)
        moved.append(any(not torch.equal(before[name], now[name]) for name in before))
        assert torch.equal(result.output["sem_seg"], frozen_scores(tiny_model, result.frame))
    # The comparison of the third frame of learn ends it; the place is one of the frozen model then.
    assert states(results) == [REST, LEARN, LEARN, RETURN, RETURN, REST, REST, REST, REST]
    assert moved == [False, True, True, *[False] * 6]


def test_learns_again_at_a_place_that_is_another(cfg, tiny_model, make_video):
    settings = {**AT_ONCE, "MARGIN": HUGE, "GIVE_UP": 1, "RETURN_FRAMES": 2, "MOVED": 0.0}
    found = states(list(stream(cfg, tiny_model, **settings).run(make_video(num_frames=7))))
    assert found == [REST, RETURN, RETURN, REST, RETURN, RETURN, REST]


def test_predicts_with_the_steps_only_where_they_lead_back_to_the_source(
    cfg, tiny_model, make_video, source
):
    runner = stream(cfg, tiny_model, **AT_ONCE, CANDIDATES=["frozen", "steps"], GIVE_UP=HUGE)
    chosen = set()
    for rate in (0.1, 0.02):
        for group in runner.adapter.optimizer.param_groups:
            group["lr"] = rate
        for result in runner.run(make_video(f"at {rate}", num_frames=4)):
            if result.record["state"] != LEARN:
                continue
            image = result.frame["image"]
            ours = distance_by_hand(runner.adapter.model, image, source)
            theirs = distance_by_hand(tiny_model, image, source)
            adapted = ours < theirs
            assert result.record["candidate"] == (2 if adapted else 0)
            model = runner.adapter.model if adapted else tiny_model
            assert torch.equal(result.output["sem_seg"], frozen_scores(model, result.frame))
            chosen.add(adapted)
    assert len(chosen) == 2  # else any rule would do


@pytest.fixture
def kept(cfg, tiny_model) -> Stream:
    """Learns for two frames and keeps what it got: the frozen model is given bad scores."""
    runner = stream(cfg, tiny_model, **AT_ONCE, LEARN_FRAMES=2, CHECK_EVERY=3, RETURN_FRAMES=1)
    return prefer(runner, "both")


def prefer(runner: Stream, name: str) -> Stream:
    """Comparisons find this candidate best, and statistics alone good enough for "both"."""
    choice = runner.adapter.choice
    scores = {"frozen": 1.0, "steps": 1.0, "norms": 0.5 if name == "both" else 1.0, "both": 1.0}
    scores[name] = 0.0
    choice.compare = lambda found: Choice.compare(choice, {n: scores[n] for n in found})
    return runner


@pytest.mark.parametrize("name", ["norms", "steps", "both"])
def test_what_is_kept_takes_no_steps_and_no_more_passes(kept, make_video, name):
    prefer(kept, name)
    calls, found, passes = [], [], []
    kept.adapter.model.get_submodule("backbone").register_forward_hook(lambda *_: calls.append(1))
    for result in kept.run(make_video(num_frames=8)):
        found.append((result.record["state"], weights(kept)))
        passes.append(len(calls))
        calls.clear()
    assert [state for state, _ in found] == [REST, LEARN, *[KEEP] * 6]
    # Two frames of learn: a step and four candidates beside the prediction; and a check of two.
    assert passes == [1, 6, 6, 1, 3, 1, 1, 3]
    source, last = found[0][1], found[2][1]
    assert all(torch.equal(last[n], state[n]) for _, state in found[3:] for n in last)
    moved = any(not torch.equal(last[n], source[n]) for n in last)
    assert moved == (name != "norms")


def test_what_no_longer_gains_is_given_up(kept, make_video):
    video = make_video(num_frames=7)
    found = []
    for index, frame in enumerate(video):
        if index == 3:
            prefer(kept, "frozen")
        found.append(kept.step(frame).record["state"])
    assert found == [REST, LEARN, KEEP, KEEP, LEARN, RETURN, REST]


@pytest.mark.parametrize("cut", range(1, 12))
def test_goes_on_in_any_state_as_if_never_stopped(cfg, tiny_model, make_video, cut, tmp_path):
    settings = {**AT_ONCE, "LEARN_FRAMES": 2, "CHECK_EVERY": 3, "RETURN_FRAMES": 2, "MOVED": 0.05}
    video = [*make_video("a", num_frames=3), *make_video("dark", num_frames=9)]
    for index, frame in enumerate(video):
        frame.update(video_id="a", frame_index=index)
    whole = list(stream(cfg, tiny_model, **settings).run(video))
    assert {*states(whole)} >= {REST, LEARN, KEEP}
    stopped = stream(cfg, tiny_model, **settings)
    for frame in video[:cut]:
        stopped.step(frame)
    torch.save(stopped.state_dict(), tmp_path / "state.pth")
    resumed = stream(cfg, tiny_model, **settings)
    resumed.load_state_dict(torch.load(tmp_path / "state.pth", weights_only=True))
    for frame, expected in zip(video[cut:], whole[cut:], strict=True):
        result = resumed.step(frame)
        assert result.record == expected.record
        assert torch.equal(result.output["sem_seg"], expected.output["sem_seg"])


def test_goes_on_from_the_place_that_it_comes_back_to(cfg, tiny_model, make_video, monkeypatch):
    settings = {**AT_ONCE, "LEARN_FRAMES": 2, "CHECK_EVERY": 100, "PLACES": 2}
    settings.update(MOVED=0.5, MARGIN=0.2)
    runner = prefer(stream(cfg, tiny_model, **settings), "both")
    adapter = runner.adapter
    take_seen = adapter._take_seen
    changes, back, kept = {1, 4, 8}, False, {}

    def seen() -> tuple[float, float | None]:
        """The stream changes at some frames, whatever they show."""
        shift, _ = take_seen()
        return shift, float(index in changes)

    def score(name: str, frame: dict) -> float:
        """The change of the first place is good when the stream comes back, and none else is."""
        now = weights(runner)
        first = bool(kept) and all(torch.equal(now[n], kept[n]) for n in kept)
        return 0.5 if name == "frozen" else 0.05 if back and first else 0.6

    monkeypatch.setattr(adapter, "_take_seen", seen)
    monkeypatch.setattr(adapter, "_score", score)
    found = []
    for index, frame in enumerate(make_video(num_frames=10)):
        back = index == 8
        result = runner.step(frame)
        found.append((result.record["state"], result.record.get("recalled")))
        if index == 3:
            kept = weights(runner)
            norms = adapter.norms.state_dict()
        if index == 7:
            other = weights(runner)
    learnt, is_kept = (LEARN, 0.0), (KEEP, None)
    expected = [(REST, None), learnt, is_kept, is_kept, learnt, is_kept, is_kept, is_kept]
    assert found == [*expected, (KEEP, 1.0), is_kept]
    now = weights(runner)
    assert all(torch.equal(now[n], kept[n]) for n in kept)
    assert any(not torch.equal(now[n], other[n]) for n in kept)
    assert norms.keys() == adapter.norms.state_dict().keys()
    assert [place.candidate for place in adapter.memory] == ["both"]  # the second place
    runner.adapter.reset()
    assert len(adapter.memory) == 0


def test_a_video_begins_in_rest(kept, make_video):
    list(kept.run(make_video("a", num_frames=4)))
    assert next(kept.run(make_video("b"))).record == {"state": REST, "candidate": 0.0}


def test_a_prediction_that_is_not_finite_says_nothing(cfg, tiny_model, make_video):
    runner = stream(cfg, tiny_model, **AT_ONCE)
    video = make_video(num_frames=3)
    runner.step(video[0])
    runner.adapter._seen.signal[0] = torch.nan
    assert runner.step(video[1]).record == {"state": REST, "candidate": 0.0}
    assert runner.step(video[2]).record["state"] == LEARN


def test_parts_that_have_no_layers_are_refused(cfg, tiny_model):
    cfg.TTT.LEARN_ON_CHANGE.READ = ["h.predictor.class_embed"]
    with pytest.raises(UserError, match=r"READ to parts of the head"):
        build_adapter(cfg, tiny_model)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("WINDOW_SIZE", "auto", r"TTT\.WINDOW_SIZE is 'auto'.*give a number of frames"),
        ("RESET", "frame", r"TTT\.RESET is 'frame'.*choose video or never"),
        ("METHOD", "majority_vote", r"a majority vote over learn_on_change"),
    ],
)
def test_settings_that_contradict_it_are_refused(cfg, tiny_model, key, value, message):
    cfg.TTT[key] = value
    with pytest.raises(UserError, match=message):
        build_adapter(cfg, tiny_model, "learn_on_change")


def test_layers_that_move_are_no_signal(cfg, tiny_model):
    cfg.TTT.LEARN_ON_CHANGE.READ = ["f"]
    with pytest.raises(UserError, match=r"reads \['f'\], and its steps move that"):
        build_adapter(cfg, tiny_model)


def test_the_shipped_models_have_what_it_takes():
    for name in ("quick/stream_world.yaml", "quick/stream_world_panoptic.yaml"):
        config = load_config(name, method="learn_on_change")
        assert isinstance(build_adapter(config, load_source_model(config)), ChangeAdapter)
