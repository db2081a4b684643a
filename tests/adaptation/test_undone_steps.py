"""A step after which the loss on its own batch has exploded is undone (MAX_LOSS_GROWTH)."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from toy_steps import Toy, ToyAdapter, assert_same, seeded, toy, weights, window

from ttt_video.adaptation import build_adapter
from ttt_video.adaptation.snapshot import knows_nothing
from ttt_video.adaptation.source_gradients import measure_gradients
from ttt_video.config import load_config
from ttt_video.stream import Stream


def growth(lr: float, **settings) -> float:
    """By how much a step multiplies the loss of its batch, without the code under test."""
    model = toy()
    adapter = ToyAdapter(model, lr=lr, **settings)
    before = adapter.adapt(window(), seeded())["loss_toy"]
    (batch,) = adapter.batches
    with torch.no_grad():
        return float(model.reconstruction(batch)) / before


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"momentum": 0.9},
        {"name": "ADAMW"},
        {"source_pull": 0.1},
        {"clip_norm": 0.5},
        {"source_gradients": True},
    ],
)
def test_the_limit_is_on_the_loss_of_the_same_batch_after_the_step(settings):
    if "source_gradients" in settings:
        measured = measure_gradients(ToyAdapter(toy()), [window().sample(
            8, sampling="with_replacement", generator=seeded())], seeded())  # fmt: skip
        settings = {"source_gradients": measured}
    grown = growth(30.0, **settings)
    assert grown > 3  # else the test shows nothing
    for limit, undone in [(0.99 * grown, 1), (1.01 * grown, 0), (0, 0)]:
        model = toy()
        adapter = ToyAdapter(model, lr=30.0, max_loss_growth=limit, **settings)
        record = adapter.adapt(window(), seeded())
        assert record["skipped_steps"] == undone
        assert math.isfinite(record["loss_toy"])
        free = toy()
        ToyAdapter(free, lr=30.0, **settings).adapt(window(), seeded())
        assert_same(weights(model), weights(toy() if undone else free))


@pytest.mark.parametrize("micro_batch_size", [3, 8])
@pytest.mark.parametrize(
    "settings",
    [
        {"momentum": 0.9},
        {"name": "ADAMW", "weight_decay": 0.1},
        {"momentum": 0.9, "precision": "fp16"},
        {"momentum": 0.9, "source_pull": 0.2},
    ],
)
def test_after_an_undone_step_everything_is_as_if_it_had_not_been(settings, micro_batch_size):
    """In train mode: batch norm's statistics and dropout's draws, too."""

    def adapter_of(model: Toy) -> ToyAdapter:
        return ToyAdapter(
            model, lr=0.01, mode="train", max_loss_growth=3.0,
            micro_batch_size=micro_batch_size, **settings,
        )  # fmt: skip

    def rate(adapter: ToyAdapter, lr: float) -> None:
        for group in adapter.optimizer.param_groups:
            group["lr"] = lr

    model, undisturbed = (toy(batch_norm=True, dropout=0.2) for _ in range(2))
    adapter, other = adapter_of(model), adapter_of(undisturbed)
    frames, random = window(), seeded(1)
    # The first step, when the optimizer has no state yet, and the third.
    rate(adapter, 1e4)
    assert adapter.adapt(frames, seeded())["skipped_steps"] == 1
    assert knows_nothing(adapter.optimizer)
    rate(adapter, 0.01)
    assert adapter.adapt(frames, random) == other.adapt(frames, seeded(1))
    state = copy.deepcopy(adapter.state_dict())
    rate(adapter, 1e4)
    before = random.get_state()
    assert adapter.adapt(frames, random)["skipped_steps"] == 1
    drawn = random.get_state()
    rate(adapter, 0.01)
    left, right = adapter.state_dict(), state
    assert_same(left["tensors"], right["tensors"])
    torch.testing.assert_close(left["optimizer"], right["optimizer"], rtol=0, atol=0)
    # The video's draws go on as after a step that was taken.
    free = ToyAdapter(
        toy(batch_norm=True, dropout=0.2), mode="train", micro_batch_size=micro_batch_size,
    )  # fmt: skip
    random.set_state(before)
    free.adapt(frames, random)
    assert torch.equal(random.get_state(), drawn)
    assert adapter.adapt(frames, seeded(2)) == other.adapt(frames, seeded(2))
    assert_same(weights(model), weights(undisturbed))


def test_the_loss_is_computed_again_after_large_steps_only():
    small, large = (ToyAdapter(toy(), lr=lr, max_loss_growth=1e9) for lr in (0.01, 10.0))
    for adapter, calls in [(small, 1), (large, 2)]:
        adapter.adapt(window(), seeded())
        assert len(adapter.batches) == calls
    assert [x["frame_index"] for x in large.batches[0]] == [
        x["frame_index"] for x in large.batches[1]
    ]


def test_a_step_to_weights_without_a_loss_is_undone():
    """The loss overflows, so that it has no size that could be compared."""
    model = toy()
    adapter = ToyAdapter(model, lr=1e30, max_loss_growth=1e6)
    assert adapter.adapt(window(), seeded())["skipped_steps"] == 1
    assert_same(weights(model), weights(toy()))


def test_a_loss_below_zero_has_no_growth():
    adapter = ToyAdapter(toy(), lr=30.0, max_loss_growth=3.0)
    adapter.spoil = lambda loss, call: loss - 1e3
    assert adapter.adapt(window(), seeded())["skipped_steps"] == 0


@pytest.mark.parametrize("limit", [0.0, 3.0])
def test_the_papers_step_on_random_weights_does_not_run_away(tiny_model, make_video, limit):
    """SGD of the preset at a rate that is too high for them."""
    opts = [
        "TTT.OPTIMIZER.BASE_LR", "30.0", "TTT.BATCH_SIZE", "2",
        "TTT.OPTIMIZER.MAX_LOSS_GROWTH", str(limit),
    ]  # fmt: skip
    cfg = load_config("joint_cityscapes.yaml", "paper", opts)
    cfg.MODEL.DEVICE = "cpu"
    runner = Stream.from_config(cfg, tiny_model)
    records = [result.record for result in runner.run(make_video(num_frames=4))]
    losses = [record["loss_recon"] for record in records]
    skipped = sum(record["skipped_steps"] for record in records)
    if limit:
        assert skipped > 0
        assert all(loss < 10 * losses[0] for loss in losses)
    else:
        assert not all(loss < 1e4 * losses[0] for loss in losses)  # some may be NaN


@pytest.mark.parametrize("preset", ["paper", "release", "realtime", None])
def test_every_run_has_the_limit(tiny_model, preset):
    cfg = load_config("joint_cityscapes.yaml", preset, ["MODEL.DEVICE", "cpu"])
    assert build_adapter(cfg, tiny_model).update.max_loss_growth == 3.0


def test_a_stream_with_undone_steps_goes_on_from_a_saved_state():
    """Some steps are taken, some undone; nothing of the check outlives its step."""

    def adapter_of() -> ToyAdapter:
        return ToyAdapter(toy(), lr=0.2, momentum=0.3, batch_size=2, max_loss_growth=1.5)

    def records(adapter: ToyAdapter, random: torch.Generator, count: int) -> list[dict]:
        return [adapter.adapt(window(), random) for _ in range(count)]

    whole, random = adapter_of(), seeded()
    records(whole, random, 1)
    state, drawn = copy.deepcopy(whole.state_dict()), random.get_state()
    expected = records(whole, random, 6)
    assert 0 < sum(record["skipped_steps"] for record in expected) < 6
    resumed = adapter_of()
    resumed.load_state_dict(state)
    random.set_state(drawn)
    assert records(resumed, random, 6) == expected
    assert_same(weights(resumed.model), weights(whole.model))
