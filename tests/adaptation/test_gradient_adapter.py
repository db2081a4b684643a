"""A method keeps source weights, flags, draws, its state and what moves between its steps."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from toy_steps import ToyAdapter, assert_same, moving, seeded, toy, weights, window

from ttt_video.adaptation import SlidingWindow, build_adapter
from ttt_video.adaptation.snapshot import knows_nothing
from ttt_video.errors import UserError


@pytest.mark.parametrize("optimizer", ["SGD", "ADAMW"])
def test_reset_restores_weights_and_buffers_and_forgets_the_optimizer(optimizer):
    model = toy(batch_norm=True)
    adapter = ToyAdapter(model, name=optimizer, momentum=0.9, weight_decay=0.1, mode="train")
    source = weights(model)
    frames = window()
    first = [adapter.adapt(frames, seeded(i)) for i in range(3)]
    changed = weights(model)
    assert not torch.equal(changed["backbone.1.running_mean"], source["backbone.1.running_mean"])
    assert int(changed["backbone.1.num_batches_tracked"]) == 3
    adapter.reset()
    assert_same(weights(model), source)
    assert knows_nothing(adapter.optimizer)
    assert [adapter.adapt(frames, seeded(i)) for i in range(3)] == first
    assert_same(weights(model), changed)


def test_reset_restores_weights_that_something_else_broke():
    model = toy()
    adapter = ToyAdapter(model)
    source = weights(model)
    with torch.no_grad():
        for parameter in adapter.parameters:
            parameter.fill_(math.nan)
    adapter.reset()
    assert_same(weights(model), source)


def test_source_weights_are_a_copy():
    model = toy()
    adapter = ToyAdapter(model)
    pointers = {p.data_ptr() for p in model.parameters()}
    assert pointers.isdisjoint(t.data_ptr() for t in adapter._source.values())


def test_nothing_is_built_per_frame(monkeypatch):
    adapter = ToyAdapter(toy())
    frames = window()
    adapter.adapt(frames, seeded())
    optimizer, storage = adapter.optimizer, [t.data_ptr() for t in adapter._state.values()]
    monkeypatch.setattr(torch.optim.Optimizer, "__init__", None)
    adapter.adapt(frames, seeded())
    adapter.reset()
    adapter.adapt(frames, seeded())
    assert adapter.optimizer is optimizer
    assert [t.data_ptr() for t in adapter._state.values()] == storage


def test_only_the_named_modules_want_gradients():
    model = toy().requires_grad_(True)
    ToyAdapter(model)
    wanting = [name for name, p in model.named_parameters() if p.requires_grad]
    assert wanting == moving(dict(model.named_parameters()))
    assert len(wanting) == 6


def test_a_model_without_the_parts_is_refused():
    model = toy()
    model.backbone, model.recon_head = nn.Identity(), nn.Identity()
    model.recon_head.weight = torch.zeros(1)
    with pytest.raises(UserError, match=r"nothing to adapt.*backbone.*recon_head"):
        ToyAdapter(model)


def test_unknown_settings_are_refused():
    with pytest.raises(ValueError, match="warm"):
        ToyAdapter(toy(), mode="warm")
    with pytest.raises(ValueError, match="fp8"):
        ToyAdapter(toy(), precision="fp8")


@pytest.mark.parametrize("step_mode", ["train", "eval"])
def test_flags_of_every_module_survive_and_the_step_has_its_own(step_mode):
    model = toy(dropout=0.5)
    adapter = ToyAdapter(model, mode=step_mode)
    model.eval()
    model.recon_head.train()
    model.backbone[2].train()
    flags = {name: module.training for name, module in model.named_modules()}
    adapter.adapt(window(), seeded())
    assert adapter.flags == [step_mode == "train"]
    assert {name: module.training for name, module in model.named_modules()} == flags
    frame = window().current
    # In eval mode the dropout that was left in train mode does not act.
    first = adapter.predict(frame)["sem_seg"]
    assert all(torch.equal(adapter.predict(frame)["sem_seg"], first) for _ in range(5))
    assert not first.requires_grad
    assert {name: module.training for name, module in model.named_modules()} == flags


def test_flags_survive_an_error_in_the_step_and_in_the_prediction():
    model = toy()
    adapter = ToyAdapter(model, mode="train")
    model.recon_head.train()
    flags = {name: module.training for name, module in model.named_modules()}
    adapter.spoil = lambda loss, call: 1 / 0
    with pytest.raises(ZeroDivisionError):
        adapter.adapt(window(), seeded())
    with pytest.raises(TypeError):
        adapter.predict(None)
    assert {name: module.training for name, module in model.named_modules()} == flags


def test_dropout_follows_the_video_and_not_the_process():
    losses = {}
    for run, (process_seed, video_seed) in enumerate([(1, 0), (2, 0), (1, 3)]):
        torch.manual_seed(process_seed)
        before = torch.get_rng_state()
        # One frame only, so that the batch is the same whatever the seed.
        adapter = ToyAdapter(toy(dropout=0.5), mode="train", micro_batch_size=2)
        losses[run] = adapter.adapt(window(1), seeded(video_seed))["loss_toy"]
        assert torch.equal(torch.get_rng_state(), before)
    assert losses[0] == losses[1] != losses[2]
    quiet = ToyAdapter(toy(dropout=0.5), mode="eval").adapt(window(1), seeded())
    assert quiet["loss_toy"] != losses[0]


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision_step_is_close_to_the_full_one_and_weights_stay_fp32(precision):
    exact, low = toy(), toy()
    ToyAdapter(exact, lr=0.5).adapt(window(), seeded())
    adapter = ToyAdapter(low, lr=0.5, precision=precision, micro_batch_size=3)
    seen = []
    low.recon_head.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    start = toy().state_dict()
    record = adapter.adapt(window(), seeded())
    assert record["skipped_steps"] == 0
    assert set(seen) == {torch.bfloat16 if precision == "bf16" else torch.float16}
    for name, value in low.state_dict().items():
        assert value.dtype == torch.float32
        step, expected = value - start[name], exact.state_dict()[name] - start[name]
        assert (step - expected).norm() <= 0.03 * expected.norm() + 1e-6, name
    assert adapter.predict(window().current)["sem_seg"].dtype == torch.float32


@pytest.mark.parametrize(
    "settings",
    [
        {"name": "ADAMW", "lr": 0.01},
        {"name": "SGD", "lr": 0.01, "momentum": 0.9},
        {"name": "SGD", "lr": 0.01, "precision": "fp16"},
    ],
)
def test_state_holds_what_moved_and_the_optimizer(settings, tmp_path):
    def adapter_after(steps: int) -> tuple[ToyAdapter, torch.Generator]:
        adapter, generator = ToyAdapter(toy(), **settings), seeded()
        for _ in range(steps):
            adapter.adapt(window(), generator)
        return adapter, generator

    fresh, _ = adapter_after(0)
    assert fresh.state_dict()["tensors"] == {}
    whole, generator = adapter_after(2)
    assert whole.state_dict()["tensors"].keys() <= dict(whole.model.named_parameters()).keys()
    torch.save(whole.state_dict(), tmp_path / "state")
    random_state = generator.get_state()
    expected = whole.adapt(window(), generator)
    for steps in (0, 3):  # what it did before does not matter
        other, generator = adapter_after(steps)
        other.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
        generator.set_state(random_state)
        assert other.adapt(window(), generator) == expected
        assert_same(weights(other.model), weights(whole.model))
        left, right = (a.optimizer.state_dict()["state"] for a in (other, whole))
        assert left.keys() == right.keys()
        for index, state in left.items():
            for key, value in state.items():
                assert torch.equal(torch.as_tensor(value), torch.as_tensor(right[index][key]))
        assert other.scaler.state_dict() == whole.scaler.state_dict()


@pytest.mark.parametrize(
    ("parameters", "expected"),
    [
        ("all", {"0.weight", "0.bias", "1.weight", "1.bias"}),
        ("norm", {"1.weight", "1.bias"}),
        ("matrices", {"0.weight"}),
    ],
)
def test_kinds_of_parameters_that_move(parameters, expected):
    adapter = ToyAdapter(toy(), parameters=parameters)
    names = {n for n, p in adapter.model.backbone.named_parameters() if p.requires_grad}
    assert names == expected


def test_matrices_of_a_whole_model(tiny_cfg, tiny_model, make_video):
    """All that multiplies moves, attention's projections included, and nothing that is added."""
    tiny_cfg.TTT.PARAMETERS = "matrices"
    adapter = build_adapter(tiny_cfg, tiny_model)
    parts = [*tiny_model.backbone.modules(), *tiny_model.recon_head.modules()]
    linear = [m.weight for m in parts if isinstance(m, (nn.Linear, nn.Conv2d))]
    linear += [m.in_proj_weight for m in parts if isinstance(m, nn.MultiheadAttention)]
    assert {id(p) for p in adapter.parameters} == {id(p) for p in linear}
    before = {name: p.clone() for name, p in tiny_model.named_parameters()}
    window = SlidingWindow(2)
    window.push(make_video()[0])
    adapter.adapt(window, torch.Generator().manual_seed(0))
    moved = {n for n, p in tiny_model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {n for n, p in tiny_model.named_parameters() if p.requires_grad}
