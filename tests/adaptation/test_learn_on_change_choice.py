"""learn_on_change: what predicts, against distances, entropies and pictures by hand."""

from __future__ import annotations

import math

import pytest
import torch
from change_streams import (
    AT_ONCE,
    HUGE,
    KEEP,
    NOTHING,
    REST,
    RETURN,
    distance_by_hand,
    frozen_scores,
    prefer,
    states,
    stream,
)
from torch import Tensor, nn

from ttt_video.adaptation.base import build_adapter
from ttt_video.adaptation.denoising import denoised
from ttt_video.errors import UserError


def dark_video(make_video, num_frames: int) -> list:
    video = make_video("dark", num_frames=num_frames)
    for frame in video:
        frame["image"] = frame["image"] // 8
    return video


def corrected_by_hand(image: Tensor, head: dict[str, Tensor]) -> Tensor:
    deviation, mean = torch.std_mean(image.float(), (1, 2), keepdim=True, correction=0)
    wanted, spread = (head[f"image_{name}"].view(3, 1, 1) for name in ("mean", "deviation"))
    return ((image - mean) / deviation * spread + wanted).round().clamp(0, 255).byte()


def test_predicts_what_leads_back_to_the_source(change_cfg, tiny_model, make_video, head):
    """A dark video, whose frames are brought back to the colours of the source."""
    runner = stream(change_cfg, tiny_model, **AT_ONCE, **{**NOTHING, "COLOURS": [1.0]})
    _, learnt, kept = runner.run(dark_video(make_video, 3))
    assert (learnt.record["state"], learnt.record["colours"]) == (KEEP, 1.0)
    for result in (learnt, kept):
        corrected = corrected_by_hand(result.frame["image"], head)
        ours = distance_by_hand(tiny_model, corrected, head)
        if result is learnt:
            assert ours < distance_by_hand(tiny_model, result.frame["image"], head)
        close = frozen_scores(tiny_model, {**result.frame, "image": corrected})
        torch.testing.assert_close(result.output["sem_seg"], close, rtol=0.02, atol=0.01)


def test_predicts_a_picture_without_its_noise(change_cfg, tiny_model, make_video, head):
    """Noise of deviation 50, of which a Gaussian blur is the other candidate."""
    video, draw = make_video("noisy", num_frames=3), torch.Generator().manual_seed(0)
    for frame in video:
        noise = 50 * torch.randn(frame["image"].shape, generator=draw)
        frame["image"] = (frame["image"] + noise).round().clamp(0, 255).byte()
    settings = {**AT_ONCE, **NOTHING, "BLUR": [0.8], "DENOISE": [1.0], "CHECK_EVERY": [9, 9]}
    _, learnt, kept = stream(change_cfg, tiny_model, **settings).run(video)
    assert [(r.record["blur"], r.record["denoise"]) for r in (learnt, kept)] == [(0.0, 1.0)] * 2
    for result in (learnt, kept):
        cleared = denoised(result.frame["image"])
        if result is learnt:
            ours = distance_by_hand(tiny_model, cleared, head)
            assert ours < distance_by_hand(tiny_model, result.frame["image"], head)
        expected = frozen_scores(tiny_model, {**result.frame, "image": cleared})
        assert torch.equal(result.output["sem_seg"], expected)


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
    change_cfg, tiny_model, make_video, head
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
        runner = stream(change_cfg, tiny_model, **{**settings, "COLOUR_ENTROPY": limit})
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


def test_a_correction_that_no_longer_makes_the_model_surer_is_given_up(
    change_cfg, tiny_model, make_video
):
    video = dark_video(make_video, 3)
    settings = {**AT_ONCE, **NOTHING, "COLOURS": [1.0], "CHECK_EVERY": [2, 2]}
    runner = stream(change_cfg, tiny_model, **{**settings, "COLOUR_ENTROPY": 0.5})
    entropies = iter([1.0, 0.4, 1.0, 0.6])  # frozen and corrected, at a search and at a check
    runner.adapter.model.prediction_entropy = lambda *_: next(entropies)
    results = list(runner.run(video))
    assert states(results) == [REST, KEEP, RETURN]
    assert torch.equal(results[-1].output["sem_seg"], frozen_scores(tiny_model, video[-1]))


def test_predictions_that_are_not_compared_have_no_entropy(change_cfg, tiny_model, make_video):
    runner = stream(change_cfg, tiny_model, ENTER=HUGE, COLOUR_ENTROPY=0.5)
    runner.adapter.model.prediction_entropy = None  # calling it would fail
    assert states(list(runner.run(make_video(num_frames=3)))) == [REST] * 3


def test_a_model_that_does_not_say_how_sure_it_is_is_refused(change_cfg, tiny_model, monkeypatch):
    monkeypatch.delattr(type(tiny_model), "prediction_entropy")
    with pytest.raises(UserError, match=r"COLOUR_ENTROPY needs .*set it to 0, or COLOURS to \[\]"):
        build_adapter(change_cfg, tiny_model)
    change_cfg.TTT.LEARN_ON_CHANGE.COLOURS = []
    build_adapter(change_cfg, tiny_model)


def test_predicts_with_the_steps_only_where_they_lead_back_to_the_source(
    change_cfg, tiny_model, make_video, head
):
    runner = stream(change_cfg, tiny_model, **AT_ONCE, **NOTHING, STEP_FRAMES=1)
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


def lit_again(make_video, dark: int, num_frames: int) -> list:
    """The same picture in all frames, which is dark in the first of them."""
    video = make_video("lit again", num_frames=num_frames)
    for frame in reversed(video):
        frame["image"] = video[0]["image"] // (8 if frame["frame_index"] < dark else 1)
    return video


@pytest.fixture
def rarely_checked(change_cfg, tiny_model):
    """Keeps the colours that it finds at the second frame; no check is due within the test."""
    settings = {**AT_ONCE, **NOTHING, "COLOURS": [1.0], "CHECK_EVERY": [100, 100]}

    def build(**own):
        runner = prefer(stream(change_cfg, tiny_model, **settings, **own), "colours")
        passes: list[int] = []
        backbone = runner.adapter.model.get_submodule("backbone")
        backbone.register_forward_hook(lambda *_: passes.append(1))

        def steps(video):
            for frame in video:
                passes.clear()
                yield runner.step(frame), len(passes)

        return runner, steps

    return build


@pytest.mark.parametrize("worse", [False, True])
def test_a_correction_is_checked_at_the_frame_where_it_does_something_else(
    rarely_checked, tiny_model, make_video, worse
):
    """It is given up at once if it is worse; else its new effect is the one to go by."""
    runner, steps = rarely_checked()
    video = lit_again(make_video, 5, 9)
    before = list(steps(video[:5]))
    assert [(r.record["state"], n) for r, n in before] == [(REST, 1), (KEEP, 2), *[(KEEP, 1)] * 3]
    if worse:
        prefer(runner, "frozen")
    first, *after = steps(video[5:])
    state = RETURN if worse else KEEP
    assert (first[0].record["state"], first[1]) == (state, 2)
    assert [(r.record["state"], n) for r, n in after] == [(state, 1)] * 3
    frozen = torch.equal(first[0].output["sem_seg"], frozen_scores(tiny_model, video[5]))
    assert frozen == worse


def test_checks_that_no_effect_asks_for_do_not_come(rarely_checked, make_video):
    _, steps = rarely_checked(CHECK_EFFECT=2.0)
    assert [passes for _, passes in steps(lit_again(make_video, 5, 9))] == [1, 2, *[1] * 7]


def test_an_effect_is_remembered_by_a_saved_state(rarely_checked, make_video):
    runner, steps = rarely_checked()
    video = lit_again(make_video, 5, 6)
    list(steps(video[:5]))
    resumed, steps = rarely_checked()
    resumed.load_state_dict(runner.state_dict())
    assert [passes for _, passes in steps(video[5:])] == [2]
