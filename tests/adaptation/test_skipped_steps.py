"""Steps whose loss or gradient is not finite leave everything as it was."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from toy_steps import ToyAdapter, assert_same, seeded, toy, weights, window

from ttt_video.adaptation.gradient import HALVINGS

SPOILS = {
    "nan loss": lambda loss, weight: loss * math.nan,
    "infinite loss": lambda loss, weight: loss + math.inf,
    # sqrt has an infinite slope at zero, so the loss is as it was and the gradient is not.
    "infinite gradient": lambda loss, weight: loss + (weight - weight.detach()).sqrt().sum(),
    "nan gradient": lambda loss, weight: loss + (weight - weight.detach()).abs().sqrt().sum(),
}


@pytest.mark.parametrize("optimizer", ["SGD", "ADAMW"])
@pytest.mark.parametrize("kind", SPOILS)
@pytest.mark.parametrize("clip_norm", [0.0, 0.1])
def test_a_step_that_is_not_finite_is_skipped_as_if_it_had_not_been(optimizer, kind, clip_norm):
    settings = {
        "name": optimizer, "lr": 0.01, "momentum": 0.9, "weight_decay": 0.1,
        "clip_norm": clip_norm, "micro_batch_size": 3,
    }  # fmt: skip
    model = toy()
    adapter = ToyAdapter(model, **settings)
    frames = window()
    adapter.adapt(frames, seeded(1))
    before = weights(model)
    state = copy.deepcopy(adapter.optimizer.state_dict())
    # Calls 4 to 6 are the micro-batches of the second frame; the middle one goes wrong.
    spoil = SPOILS[kind]
    weight = model.recon_head.weight
    adapter.spoil = lambda loss, call: spoil(loss, weight) if call == 5 else loss
    record = adapter.adapt(frames, seeded(2))
    assert record["skipped_steps"] == 1
    assert math.isfinite(record["loss_toy"]) == ("gradient" in kind)
    # The loss of a constant infinity has an ordinary gradient.
    assert math.isfinite(record["grad_norm"]) == (kind == "infinite loss")
    assert_same(weights(model), before)
    torch.testing.assert_close(adapter.optimizer.state_dict(), state, rtol=0, atol=0)

    after = adapter.adapt(frames, seeded(3))
    assert after["skipped_steps"] == 0
    undisturbed = ToyAdapter(toy(), **settings)
    undisturbed.adapt(frames, seeded(1))
    assert undisturbed.adapt(frames, seeded(3)) == after
    assert_same(weights(model), weights(undisturbed.model))


def test_skipped_steps_of_a_frame_are_counted_and_the_others_taken():
    model = toy()
    adapter = ToyAdapter(model, per_frame=4)
    adapter.spoil = lambda loss, call: loss * (math.nan if call in (1, 3) else 1.0)
    before = weights(model)
    assert adapter.adapt(window(), seeded())["skipped_steps"] == 2
    assert not torch.equal(model.recon_head.weight, before["recon_head.weight"])
    assert all(torch.isfinite(v).all() for v in weights(model).values())


def test_a_skipped_step_in_train_mode_keeps_the_running_statistics():
    model = toy(batch_norm=True)
    adapter = ToyAdapter(model, mode="train")
    frames = window()
    adapter.adapt(frames, seeded())
    before = weights(model)
    with torch.no_grad():
        good = model.backbone[0].weight.clone()
        model.backbone[0].weight.fill_(math.inf)  # activations, and so batch statistics, are NaN
    assert adapter.adapt(frames, seeded())["skipped_steps"] == 1
    with torch.no_grad():
        model.backbone[0].weight.copy_(good)
    assert_same(weights(model), before)


def test_fp16_overflow_repeats_the_step_with_a_smaller_loss_scale():
    """The same step as with that scale from the start, random draws included."""
    frames, models, randoms = window(), [], []
    for scale in (None, 2.0**7):
        models.append(toy(dropout=0.5))
        randoms.append(seeded())
        adapter = ToyAdapter(models[-1], precision="fp16", mode="train", micro_batch_size=3)
        adapter.spoil = lambda loss, call: loss * 300
        if scale:
            adapter.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        assert adapter.adapt(frames, randoms[-1])["skipped_steps"] == 0
        assert adapter.scaler.get_scale() == 2.0**7
    assert not torch.equal(models[0].recon_head.weight, toy().recon_head.weight)
    assert_same(weights(models[0]), weights(models[1]))
    assert torch.equal(randoms[0].get_state(), randoms[1].get_state())


def test_fp16_step_without_a_finite_gradient_is_skipped():
    model = toy()
    adapter = ToyAdapter(model, precision="fp16")
    scale = adapter.scaler.get_scale()
    before = weights(model)
    adapter.spoil = lambda loss, call: loss * 1e35
    frames = window()
    assert adapter.adapt(frames, seeded())["skipped_steps"] == 1
    assert_same(weights(model), before)
    assert adapter.scaler.get_scale() == scale  # later steps are not scaled to nothing
    assert len(adapter.batches) == 1 + HALVINGS
    adapter.spoil = lambda loss, call: loss * math.nan
    assert adapter.adapt(frames, seeded())["skipped_steps"] == 1
    assert len(adapter.batches) == 2 + HALVINGS  # no scale mends such a loss
    adapter.spoil = lambda loss, call: loss * 0.01
    assert adapter.adapt(frames, seeded())["skipped_steps"] == 0
    assert not torch.equal(model.recon_head.weight, before["recon_head.weight"])
    adapter.reset()
    assert adapter.scaler.get_scale() == scale


@pytest.mark.parametrize("kind", SPOILS)
def test_frames_that_cannot_be_learned_from_leave_the_loss_scale_of_fp16(kind):
    """Halved by each of them, it would be 0 after 200, and all later steps lost."""
    adapter = ToyAdapter(toy(), precision="fp16")
    frames, before = window(), adapter.scaler.state_dict()
    weight = adapter.model.recon_head.weight
    adapter.spoil = lambda loss, call: SPOILS[kind](loss, weight)
    for seed in range(20):
        assert adapter.adapt(frames, seeded(seed))["skipped_steps"] == 1
    assert adapter.scaler.state_dict() == before
    adapter.spoil = lambda loss, call: loss
    assert adapter.adapt(frames, seeded(20))["grad_norm"] > 0


def test_a_gradient_whose_norm_alone_overflows_leaves_the_loss_scale(monkeypatch):
    """Its numbers are finite, so nothing has halved the scale that could be undone."""
    adapter = ToyAdapter(toy(), precision="fp16")
    adapter.scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    before = adapter.scaler.state_dict()
    weight = adapter.model.recon_head.weight
    adapter.spoil = lambda loss, call: loss + ((weight - weight.detach()) * 3e38).sum()
    record = adapter.adapt(window(), seeded())
    assert (record["skipped_steps"], record["grad_norm"]) == (1, math.inf)
    assert adapter.scaler.state_dict() == before
