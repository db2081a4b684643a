"""learn_on_change: its guarantees, by predictions, weights and scores measured from outside."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
from torch import Tensor, nn

from ttt_video.adaptation import change_states
from ttt_video.adaptation.base import build_adapter
from ttt_video.adaptation.candidates import FROZEN, Candidate, Choice
from ttt_video.adaptation.change_states import State
from ttt_video.adaptation.head_signal import measure_head
from ttt_video.adaptation.learn_on_change import ChangeAdapter
from ttt_video.adaptation.norm_statistics import norm_layers
from ttt_video.config import load_config
from ttt_video.errors import UserError
from ttt_video.modeling.weights import save_safetensors
from ttt_video.stream import Stream, load_source_model

REST, LEARN, KEEP, RETURN = map(float, State)
HUGE = 1e6
AT_ONCE = {"ENTER": 0.0, "MOVED": HUGE, "PATIENCE": 1, "MARGIN": 0.0, "STEP": 0.0}
AT_ONCE |= {"COLOUR_APPROACH": 0.0, "COLOUR_ENTROPY": 0.0}
"""Learn begins with the second frame, and what is nearer to the source is chosen."""
SEARCH = {"BLUR": [1.0], "COLOURS": [0.5, 1.0]}
NOTHING: dict[str, list] = {"BLUR": [], "COLOURS": []}


@pytest.fixture
def head(tiny_model, make_video) -> dict[str, Tensor]:
    """Measurements of the tiny model's head on a few frames."""
    images = [frame["image"] for name in "abcd" for frame in make_video(f"source {name}")]
    return measure_head(tiny_model, images, ["h"])


@pytest.fixture
def cfg(cfg_with_statistics, head, tmp_path):
    file = tmp_path / "head.safetensors"
    save_safetensors(head, file)
    # A step without a look at the loss after it is a single pass.
    pairs = ["TTT.OPTIMIZER.MAX_LOSS_GROWTH", 0.0, "TTT.LEARN_ON_CHANGE.SOURCE_HEAD", str(file)]
    return cfg_with_statistics("learn_on_change", *pairs)


def stream(cfg, model: nn.Module, **settings) -> Stream:
    cfg = cfg.clone()
    for key, value in {**SEARCH, **settings}.items():
        cfg.TTT.LEARN_ON_CHANGE[key] = value
    return Stream.from_config(cfg, copy.deepcopy(model))


def frozen_scores(model: nn.Module, frame: dict) -> Tensor:
    with torch.no_grad():
        return model([frame])[0]["sem_seg"]


def states(results: list) -> list[float]:
    return [r.record["state"] for r in results]


def weights(runner: Stream) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in runner.adapter.model.named_parameters()}


def distance_by_hand(model: nn.Module, image: Tensor, head: dict[str, Tensor]) -> float:
    """Length of what the head's channel means have beside the training images' directions."""
    layers = norm_layers(model, ["h"])
    means: dict[str, list] = {name: [] for name in layers}
    handles = []
    for name, layer in layers.items():
        axis = -1 if isinstance(layer, nn.LayerNorm) else 1

        def hook(_, x, out, name=name, axis=axis):
            means[name].append(out.movedim(axis, 0).flatten(1).mean(1))

        handles.append(layer.register_forward_hook(hook))
    with torch.no_grad():
        model([{"image": image}])
    for handle in handles:
        handle.remove()
    vector = torch.cat([sum(calls) / len(calls) for calls in means.values()])
    known = head["deviation"] > 1e-6
    plain = ((vector - head["mean"]) / head["deviation"])[known]
    directions = head["directions"].float()[:, known]
    for direction in directions:
        plain = plain - (plain @ direction) * direction
    return float(plain.norm() / len(vector) ** 0.5 / head["level"])


def dark_video(make_video, num_frames: int) -> list:
    video = make_video("dark", num_frames=num_frames)
    for frame in video:
        frame["image"] = frame["image"] // 8
    return video


def corrected_by_hand(image: Tensor, head: dict[str, Tensor]) -> Tensor:
    deviation, mean = torch.std_mean(image.float(), (1, 2), keepdim=True, correction=0)
    wanted, spread = (head[f"image_{name}"].view(3, 1, 1) for name in ("mean", "deviation"))
    return ((image - mean) / deviation * spread + wanted).round().clamp(0, 255).byte()


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


def test_the_distance_is_that_of_a_pass_of_its_own(cfg, tiny_model, make_video, head):
    results = list(stream(cfg, tiny_model, ENTER=HUGE).run(make_video(num_frames=3)))
    for result, after in itertools.pairwise(results):
        expected = distance_by_hand(tiny_model, result.frame["image"], head)
        assert after.record["norm_shift"] == pytest.approx(expected, rel=1e-3)


def test_a_false_alarm_changes_no_bit_and_is_soon_over(cfg, tiny_model, make_video):
    """Steps are taken, but nothing gains enough."""
    settings = {**AT_ONCE, "MARGIN": 1.0, "WAIT": [2, 2], "STEP_FRAMES": 2}
    runner = stream(cfg, tiny_model, **settings)
    before, moved, results = weights(runner), [], []
    for result in runner.run(make_video(num_frames=10)):
        results.append(result)
        now = weights(runner)
        moved.append(any(not torch.equal(before[name], now[name]) for name in before))
        assert torch.equal(result.output["sem_seg"], frozen_scores(tiny_model, result.frame))
    # Two turns of the search and two steps; the place is one of the frozen model then.
    assert states(results) == [REST, *[LEARN] * 3, RETURN, RETURN, *[REST] * 4]
    assert moved == [*[False] * 3, True, *[False] * 6]


def test_learns_again_at_a_place_that_is_another(cfg, tiny_model, make_video):
    settings = {**AT_ONCE, **NOTHING, "BLUR": [1.0], "MARGIN": 1.0, "MOVED": 0.0}
    settings["WAIT"] = [2, 2]
    found = states(list(stream(cfg, tiny_model, **settings).run(make_video(num_frames=7))))
    assert found == [REST, RETURN, RETURN, REST, RETURN, RETURN, REST]


@pytest.mark.parametrize("cut", [None, 8, 12])
def test_a_search_that_changes_nothing_doubles_the_wait(
    cfg, tiny_model, make_video, cut, tmp_path, monkeypatch
):
    """The frozen model wins each search, the first one, too."""
    monkeypatch.setattr(change_states, "SUDDEN", HUGE**2)
    settings = {**AT_ONCE, **NOTHING, "BLUR": [1.0], "MARGIN": 1.0, "MOVED": 1e-6, "WAIT": [2, 8]}
    runner, found = stream(cfg, tiny_model, **settings), []
    for index, frame in enumerate(make_video(num_frames=24)):
        found.append(runner.step(frame).record["state"])
        if index == cut:
            torch.save(runner.state_dict(), tmp_path / "state.pth")
            runner = stream(cfg, tiny_model, **settings)
            runner.load_state_dict(torch.load(tmp_path / "state.pth", weights_only=True))
    returns = [[RETURN] * n for n in (2, 4, 8, 8)]
    assert found == [REST, *itertools.chain(*([*each, REST] for each in returns))][:24]


def test_predicts_what_leads_back_to_the_source(cfg, tiny_model, make_video, head):
    """A dark video, whose frames are brought back to the colours of the source."""
    runner = stream(cfg, tiny_model, **AT_ONCE, **{**NOTHING, "COLOURS": [1.0]})
    _, learnt, kept = runner.run(dark_video(make_video, 3))
    assert (learnt.record["state"], learnt.record["colours"]) == (KEEP, 1.0)
    for result in (learnt, kept):
        corrected = corrected_by_hand(result.frame["image"], head)
        ours = distance_by_hand(tiny_model, corrected, head)
        if result is learnt:
            assert ours < distance_by_hand(tiny_model, result.frame["image"], head)
        close = frozen_scores(tiny_model, {**result.frame, "image": corrected})
        torch.testing.assert_close(result.output["sem_seg"], close, rtol=0.02, atol=0.01)


def entropy_by_hand(model: nn.Module, image: Tensor) -> float:
    """Mean over pixels of the entropy over classes and nothing, in float64."""
    with torch.no_grad():
        pixels = model.normalize([{"image": image}]).tensor
        said = model.sem_seg_head(model.encode(pixels))[-1]
    classes = said["pred_logits"][0].double().softmax(1)[:, :-1]
    masks = said["pred_masks"][0].double().sigmoid()
    values = []
    for row in range(math.ceil(image.shape[1] / 4)):
        for column in range(math.ceil(image.shape[2] / 4)):
            mask = masks[:, row, column]
            nothing = float((1 - classes.sum(1) * mask).prod())
            scores = classes.T @ mask
            shares = [nothing, *((1 - nothing) * scores / scores.sum()).tolist()]
            values.append(-sum(p * math.log(p) for p in shares if p))
    return sum(values) / len(values)


def test_the_models_entropy_is_that_of_float64_by_hand(tiny_model, make_video):
    """Padding does not count: 60 of 64 rows are a picture's."""
    tiny_model.eval()
    for image in (make_video()[0]["image"], make_video()[0]["image"][:, :-4, :-7]):
        with torch.no_grad():
            said = tiny_model.sem_seg_head(
                tiny_model.encode(tiny_model.normalize([{"image": image}]).tensor)
            )
            ours = tiny_model.prediction_entropy(said, image.shape[1:])
        assert float(ours) == pytest.approx(entropy_by_hand(tiny_model, image), rel=1e-4)


def test_other_colours_predict_only_where_they_make_the_model_surer(
    cfg, tiny_model, make_video, head
):
    """At a search and at a check, in the passes that they take without the rule."""
    video = dark_video(make_video, 3)
    ratios = []
    for frame in video[1:]:
        corrected = corrected_by_hand(frame["image"], head)
        ours, frozen = (entropy_by_hand(tiny_model, x) for x in (corrected, frame["image"]))
        ratios.append(ours / frozen)
    found = []
    settings = {**AT_ONCE, **NOTHING, "COLOURS": [1.0], "CHECK_EVERY": [2, 2]}
    for limit in (0.99 * min(ratios), 1.01 * max(ratios)):
        runner = stream(cfg, tiny_model, **{**settings, "COLOUR_ENTROPY": limit})
        calls = []
        runner.adapter.model.get_submodule("backbone").register_forward_hook(
            lambda *_, calls=calls: calls.append(1)
        )
        _, learnt, after = runner.run(video)
        found.append((states([learnt, after]), len(calls)))
        for result in (learnt, after):
            frozen = torch.equal(result.output["sem_seg"], frozen_scores(tiny_model, result.frame))
            assert frozen == (limit < min(ratios))
    assert found == [([RETURN, RETURN], 4), ([KEEP, KEEP], 5)]


def test_a_correction_that_no_longer_makes_the_model_surer_is_given_up(cfg, tiny_model, make_video):
    video = dark_video(make_video, 3)
    settings = {**AT_ONCE, **NOTHING, "COLOURS": [1.0], "CHECK_EVERY": [2, 2]}
    runner = stream(cfg, tiny_model, **{**settings, "COLOUR_ENTROPY": 0.5})
    entropies = iter([1.0, 0.4, 1.0, 0.6])  # frozen and corrected, at a search and at a check
    runner.adapter.model.prediction_entropy = lambda *_: next(entropies)
    results = list(runner.run(video))
    assert states(results) == [REST, KEEP, RETURN]
    assert torch.equal(results[-1].output["sem_seg"], frozen_scores(tiny_model, video[-1]))


def test_predictions_that_are_not_compared_have_no_entropy(cfg, tiny_model, make_video):
    runner = stream(cfg, tiny_model, ENTER=HUGE, COLOUR_ENTROPY=0.5)
    runner.adapter.model.prediction_entropy = None  # calling it would fail
    assert states(list(runner.run(make_video(num_frames=3)))) == [REST] * 3


def test_a_model_that_does_not_say_how_sure_it_is_is_refused(cfg, tiny_model, monkeypatch):
    monkeypatch.delattr(type(tiny_model), "prediction_entropy")
    with pytest.raises(UserError, match=r"COLOUR_ENTROPY needs .*set it to 0, or COLOURS to \[\]"):
        build_adapter(cfg, tiny_model)
    cfg.TTT.LEARN_ON_CHANGE.COLOURS = []
    build_adapter(cfg, tiny_model)


def test_predicts_with_the_steps_only_where_they_lead_back_to_the_source(
    cfg, tiny_model, make_video, head
):
    runner = stream(cfg, tiny_model, **AT_ONCE, **NOTHING, STEP_FRAMES=1)
    chosen = set()
    for rate in (0.1, 0.02, -0.02, 0.005):
        for group in runner.adapter.optimizer.param_groups:
            group["lr"] = rate
        _, result = runner.run(make_video("a video", num_frames=2))
        ours = distance_by_hand(runner.adapter.model, result.frame["image"], head)
        theirs = distance_by_hand(tiny_model, result.frame["image"], head)
        adapted = result.record["steps"] == 1.0
        assert result.record["state"] == (KEEP if adapted else RETURN)
        # Where they do not win, the weights are the source's again.
        assert (ours < theirs) if adapted else (ours == pytest.approx(theirs))
        model = runner.adapter.model if adapted else tiny_model
        assert torch.equal(result.output["sem_seg"], frozen_scores(model, result.frame))
        chosen.add(adapted)
    assert len(chosen) == 2  # else any rule would do


def prefer(runner: Stream, name: str) -> Stream:
    """Comparisons find candidates better that have this property, and "frozen" that one best."""
    choice = runner.adapter.choice

    def score(one: Candidate) -> float:
        if one == FROZEN:
            return 0.0 if name == "frozen" else 1.0
        return 1.0 - 0.1 * getattr(one, name, 0.0)

    choice.compare = lambda found, _: Choice.compare(choice, {one: score(one) for one in found})
    choice.still_leads = lambda found, _: Choice.still_leads(choice, {c: score(c) for c in found})
    return runner


@pytest.fixture
def kept(cfg, tiny_model) -> Stream:
    """Searches a blur for a frame, takes a step in the next, and keeps what is preferred."""
    settings = {**AT_ONCE, **NOTHING, "BLUR": [1.0], "STEP_FRAMES": 1, "WAIT": [1, 1]}
    return stream(cfg, tiny_model, **settings, CHECK_EVERY=[2, 2])


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


def test_steps_are_taken_on_the_pictures_that_are_predicted(cfg, tiny_model, make_video):
    settings = {**AT_ONCE, **NOTHING, "COLOURS": [1.0], "STEP_FRAMES": 1}
    runner = prefer(stream(cfg, tiny_model, **settings), "colours")
    seen = []
    augment = runner.adapter.augment
    runner.adapter.augment = lambda image, random: seen.append(image) or augment(image, random)
    video = make_video(num_frames=3)
    for frame in video:
        frame["image"] = frame["image"] // 8
    list(runner.run(video))
    assert seen
    assert all(image.float().mean() > 100 for image in seen)


def test_another_frame_is_not_given_the_prediction_that_was_compared(cfg, tiny_model, make_video):
    runner = prefer(stream(cfg, tiny_model, **AT_ONCE), "frozen")
    video = make_video(num_frames=3)
    runner.step(video[0])
    runner.window.push(video[1])
    runner.adapter.adapt(runner.window, runner.generator)
    output = runner.adapter.predict(video[2])
    assert torch.equal(output["sem_seg"], frozen_scores(tiny_model, video[2]))


@pytest.mark.parametrize("cut", range(1, 12))
def test_goes_on_in_any_state_as_if_never_stopped(cfg, tiny_model, make_video, cut, tmp_path):
    settings = {**AT_ONCE, "STEP_FRAMES": 1, "CHECK_EVERY": [2, 4], "WAIT": [2, 4]}
    settings["MOVED"] = 3.0
    video = [*make_video("a", num_frames=3), *make_video("dark", num_frames=9)]
    for index, frame in enumerate(video):
        frame.update(video_id="a", frame_index=index, image=frame["image"] // 8)
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


def test_a_video_begins_in_rest(kept, make_video):
    list(prefer(kept, "blur").run(make_video("a", num_frames=4)))
    assert next(kept.run(make_video("b"))).record == {"state": REST, **FROZEN._asdict()}


def test_a_prediction_that_is_not_finite_says_nothing(cfg, tiny_model, make_video):
    runner = stream(cfg, tiny_model, **AT_ONCE)
    video = make_video(num_frames=3)
    runner.step(video[0])
    runner.adapter._rest[0] = math.nan
    assert runner.step(video[1]).record == {"state": REST, **FROZEN._asdict()}
    assert runner.step(video[2]).record["state"] == LEARN


def test_parts_that_have_no_layers_are_refused(cfg, tiny_model):
    cfg.TTT.LEARN_ON_CHANGE.READ = ["h.predictor.class_embed"]
    with pytest.raises(UserError, match=r"READ to parts of the head"):
        build_adapter(cfg, tiny_model)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("RESET", "frame", r"TTT\.RESET is 'frame'.*choose video or never"),
        ("METHOD", "majority_vote", r"a majority vote over learn_on_change"),
    ],
)
def test_settings_that_contradict_it_are_refused(cfg, tiny_model, key, value, message):
    cfg.TTT[key] = value
    with pytest.raises(UserError, match=message):
        build_adapter(cfg, tiny_model, "learn_on_change")


def test_layers_that_move_are_no_signal(cfg, tiny_model, make_video, tmp_path):
    images = [frame["image"] for frame in make_video(num_frames=8)]
    save_safetensors(measure_head(tiny_model, images, ["f"]), tmp_path / "f.safetensors")
    cfg.TTT.LEARN_ON_CHANGE.SOURCE_HEAD = str(tmp_path / "f.safetensors")
    cfg.TTT.LEARN_ON_CHANGE.READ = ["f"]
    with pytest.raises(UserError, match=r"reads \['f'\], and its steps move that"):
        build_adapter(cfg, tiny_model)


def test_nothing_to_learn_is_refused(cfg, tiny_model):
    for key in NOTHING:
        cfg.TTT.LEARN_ON_CHANGE[key] = []
    with pytest.raises(UserError, match=r"nothing to learn: give .*STEP_FRAMES"):
        build_adapter(cfg, tiny_model)


def test_the_shipped_models_have_what_it_takes():
    for name in ("quick/stream_world.yaml", "quick/stream_world_panoptic.yaml"):
        config = load_config(name, method="learn_on_change")
        assert isinstance(build_adapter(config, load_source_model(config)), ChangeAdapter)
