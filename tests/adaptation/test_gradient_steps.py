"""What one gradient step does, against arithmetic, on a network of a few numbers."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from gradient_settings import grouped
from torch import nn

from ttt_video.adaptation import GradientAdapter, SlidingWindow, build_adapter
from ttt_video.adaptation.gradient import HALVINGS
from ttt_video.adaptation.snapshot import knows_nothing
from ttt_video.adaptation.source_gradients import measure_gradients
from ttt_video.errors import UserError


class Toy(nn.Module):
    """f, g and h as linear layers over the mean colour of an image; f has a norm and dropout."""

    def __init__(self, dropout: float = 0.0, batch_norm: bool = False) -> None:
        super().__init__()
        norm = nn.BatchNorm1d(4) if batch_norm else nn.LayerNorm(4)
        self.backbone = nn.Sequential(nn.Linear(3, 4), norm, nn.Dropout(dropout))
        self.recon_head = nn.Linear(4, 3)
        self.sem_seg_head = nn.Linear(4, 2)

    @property
    def device(self) -> torch.device:
        return self.recon_head.weight.device

    def colours(self, batch) -> torch.Tensor:
        return torch.stack([x["image"].float().mean((1, 2)) / 255 for x in batch])

    def reconstruction(self, batch) -> torch.Tensor:
        colours = self.colours(batch)
        return (self.recon_head(self.backbone(colours)).float() - 3 * colours).square().mean()

    def forward(self, batch):
        return [{"sem_seg": x} for x in self.sem_seg_head(self.backbone(self.colours(batch)))]


class ToyAdapter(GradientAdapter):
    """Keeps what it saw; ``spoil`` may turn the loss of the n-th call into something else."""

    def __init__(self, model, **settings) -> None:
        settings = {"lr": 0.1, "batch_size": 8, "micro_batch_size": 8, **settings}
        super().__init__(model, modules=["backbone", "recon_head"], **grouped(**settings))
        self.batches: list[list] = []
        self.flags: list[bool] = []
        self.spoil = lambda loss, call: loss

    def losses(self, batch, generator):
        self.batches.append(batch)
        self.flags.append(self.model.training)
        loss = self.model.reconstruction(batch)
        return {"loss_toy": self.spoil(loss, len(self.batches))}


def toy(**kwargs) -> Toy:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Toy(**kwargs).eval()


def window(num_frames: int = 5) -> SlidingWindow:
    random = torch.Generator().manual_seed(7)
    frames = SlidingWindow(None)
    for index in range(num_frames):
        image = torch.randint(256, (3, 2, 2), generator=random, dtype=torch.uint8)
        frames.push({"image": image, "video_id": "a", "frame_index": index})
    return frames


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gradient(model: nn.Module, batch) -> dict[str, torch.Tensor]:
    """By autograd on a copy, outside of the code under test."""
    model = copy.deepcopy(model).requires_grad_(True)
    model.reconstruction(batch).backward()
    return {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items()}


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def moving(names) -> list[str]:
    return [name for name in names if not name.startswith("sem_seg_head")]


def test_sgd_subtracts_the_learning_rate_times_the_gradient():
    model = toy()
    adapter = ToyAdapter(model, lr=0.3, encoder_multiplier=0.5)
    before = weights(model)
    record = adapter.adapt(window(), seeded())
    grad = gradient_at(before, adapter.batches[0])
    assert moving(grad) == list(grad)
    for name, old in before.items():
        rate = 0.15 if name.startswith("backbone") else 0.3
        expected = old - rate * grad[name] if name in grad else old
        torch.testing.assert_close(model.state_dict()[name], expected, atol=1e-7, rtol=1e-6)
    assert any(bool(g.abs().max() > 1e-3) for g in grad.values())  # else the test shows nothing
    norm = math.sqrt(sum(float(g.square().sum()) for g in grad.values()))
    assert record["grad_norm"] == pytest.approx(norm, rel=1e-5)
    assert record["skipped_steps"] == 0


def gradient_at(state: dict[str, torch.Tensor], batch) -> dict[str, torch.Tensor]:
    model = toy()
    model.load_state_dict(state)
    return gradient(model, batch)


def test_momentum_accumulates_over_frames():
    model = toy()
    adapter = ToyAdapter(model, lr=0.2, momentum=0.9)
    random, frames = seeded(), window()
    start = weights(model)
    adapter.adapt(frames, random)
    middle = weights(model)
    adapter.adapt(frames, random)
    first = gradient_at(start, adapter.batches[0])
    second = gradient_at(middle, adapter.batches[1])
    for name in first:
        velocity = 0.9 * first[name] + second[name]
        torch.testing.assert_close(model.state_dict()[name], middle[name] - 0.2 * velocity)


def test_adamw_decays_weights_and_not_norms():
    model = toy()
    adapter = ToyAdapter(model, name="ADAMW", lr=0.01, weight_decay=0.5)
    before = weights(model)
    adapter.adapt(window(), seeded())
    grad = gradient_at(before, adapter.batches[0])
    for name in grad:
        decay = 0.0 if name.startswith("backbone.1.") else 0.5  # backbone.1 is the LayerNorm
        # The first step of Adam, bias-corrected, is the sign of the gradient.
        sign = grad[name] / (grad[name].abs() + 1e-8)
        expected = before[name] * (1 - 0.01 * decay) - 0.01 * sign
        torch.testing.assert_close(model.state_dict()[name], expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("micro_batch_size", [1, 2, 3, 5, 7, 100])
def test_micro_batches_take_the_step_of_the_whole_batch(micro_batch_size):
    whole, parts = toy(), toy()
    one = ToyAdapter(whole, lr=0.5)
    many = ToyAdapter(parts, lr=0.5, micro_batch_size=micro_batch_size)
    expected = one.adapt(window(), seeded())
    record = many.adapt(window(), seeded())
    sizes = [len(batch) for batch in many.batches]
    assert sum(sizes) == 8
    assert len(sizes) == math.ceil(8 / micro_batch_size)
    order = [x["frame_index"] for batch in many.batches for x in batch]
    assert order == [x["frame_index"] for x in one.batches[0]]
    assert record == pytest.approx(expected, rel=1e-5)
    for name, value in weights(parts).items():
        torch.testing.assert_close(value, weights(whole)[name], atol=1e-6, rtol=1e-5)


def test_a_batch_smaller_than_the_micro_batch_counts_whole():
    model = toy()
    adapter = ToyAdapter(model, batch_size=3, micro_batch_size=8)
    before = weights(model)
    adapter.adapt(window(), seeded())
    grad = gradient_at(before, adapter.batches[0])
    assert len(adapter.batches[0]) == 3
    for name in grad:
        torch.testing.assert_close(model.state_dict()[name], before[name] - 0.1 * grad[name])


def test_clipping_shortens_the_whole_gradient_to_the_norm():
    model = toy()
    adapter = ToyAdapter(model, lr=1.0, clip_norm=0.01)
    before = weights(model)
    record = adapter.adapt(window(), seeded())
    grad = gradient_at(before, adapter.batches[0])
    norm = torch.cat([g.flatten() for g in grad.values()]).norm()
    assert norm > 0.02  # else nothing is clipped
    assert record["grad_norm"] == pytest.approx(float(norm), rel=1e-5)  # before clipping
    for name in grad:
        step = before[name] - model.state_dict()[name]
        torch.testing.assert_close(step, grad[name] * 0.01 / norm, atol=1e-6, rtol=1e-3)


def test_a_gradient_below_the_norm_is_not_stretched():
    free, clipped = toy(), toy()
    ToyAdapter(free).adapt(window(), seeded())
    ToyAdapter(clipped, clip_norm=1e6).adapt(window(), seeded())
    assert_same(weights(free), weights(clipped))


def test_several_steps_are_as_many_batches_and_the_mean_loss():
    model, reference = toy(), toy()
    adapter = ToyAdapter(model, per_frame=3)
    single = ToyAdapter(reference)
    record = adapter.adapt(window(), seeded())
    random, frames = seeded(), window()
    singles = [single.adapt(frames, random) for _ in range(3)]
    assert_same(weights(model), weights(reference))
    assert record["loss_toy"] == pytest.approx(sum(r["loss_toy"] for r in singles) / 3)
    assert record["grad_norm"] == singles[-1]["grad_norm"]
    assert len({tuple(x["frame_index"] for x in batch) for batch in adapter.batches}) == 3


@pytest.mark.parametrize("pull", [0.25, 1.0])
def test_weights_are_pulled_to_the_source_after_every_step(pull):
    free, pulled = toy(), toy()
    source = weights(free)
    random, same = seeded(), seeded()
    ToyAdapter(free).adapt(window(), random)
    adapter = ToyAdapter(pulled, source_pull=pull)
    adapter.adapt(window(), same)
    for name, value in weights(pulled).items():
        expected = (1 - pull) * weights(free)[name] + pull * source[name]
        torch.testing.assert_close(value, expected)
    # The second step starts from there.
    free.load_state_dict(pulled.state_dict())
    ToyAdapter(free).adapt(window(), random)
    adapter.adapt(window(), same)
    for name, value in weights(pulled).items():
        expected = (1 - pull) * weights(free)[name] + pull * source[name]
        torch.testing.assert_close(value, expected)


def test_the_size_of_gradients_is_their_root_mean_square_over_batches():
    model = toy()
    adapter = ToyAdapter(model)
    before = weights(model)
    frames = window().sample(5, sampling="without_replacement", generator=seeded())
    batches = [frames[:2], frames[2:]]
    measured = measure_gradients(adapter, batches, seeded())
    first, second = (gradient_at(before, batch) for batch in batches)
    assert measured.keys() == first.keys()
    for name, size in measured.items():
        expected = ((first[name].square().mean() + second[name].square().mean()) / 2).sqrt()
        torch.testing.assert_close(size, expected)
    assert_same(weights(model), before)
    assert all(p.grad is None for p in model.parameters())


def test_gradients_are_counted_in_units_of_the_source():
    """Each tensor by its own size; tiny ones count as a fifth of the median; then the clipping."""
    model = toy()
    names = moving(dict(model.named_parameters()))
    sizes = dict.fromkeys(names, torch.tensor(0.25))
    sizes["recon_head.weight"] = torch.tensor(2.0)
    sizes["recon_head.bias"] = torch.tensor(1e-9)
    adapter = ToyAdapter(model, lr=0.3, source_gradients=sizes)
    before = weights(model)
    record = adapter.adapt(window(), seeded())
    grad = gradient_at(before, adapter.batches[0])
    scaled = {
        name: g / {"recon_head.weight": 2.0, "recon_head.bias": 0.05}.get(name, 0.25)
        for name, g in grad.items()
    }
    for name, g in scaled.items():
        torch.testing.assert_close(model.state_dict()[name], before[name] - 0.3 * g)
    norm = torch.cat([g.flatten() for g in scaled.values()]).norm()
    assert record["grad_norm"] == pytest.approx(float(norm))


def test_sizes_of_another_model_are_refused():
    with pytest.raises(UserError, match=r"has nothing for backbone\.0\.bias.*measure_gradients"):
        ToyAdapter(toy(), source_gradients={"x": torch.tensor(1.0)})


def test_restarted_optimizer_remembers_nothing_of_earlier_frames():
    model = toy()
    adapter = ToyAdapter(model, name="ADAMW", lr=0.01, restart=True)
    random, frames = seeded(), window()
    adapter.adapt(frames, random)
    middle = weights(model)
    adapter.adapt(frames, random)
    grad = gradient_at(middle, adapter.batches[1])
    differs = False
    remembering = ToyAdapter(toy(), name="ADAMW", lr=0.01)
    random = seeded()
    for _ in range(2):
        remembering.adapt(frames, random)
    for name in grad:
        expected = middle[name] - 0.01 * grad[name] / (grad[name].abs() + 1e-8)
        torch.testing.assert_close(model.state_dict()[name], expected, atol=1e-6, rtol=1e-5)
        differs |= not torch.allclose(remembering.model.state_dict()[name], expected, atol=1e-5)
    assert differs


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
    assert adapter.scaler.get_scale() == scale / 2  # later steps are not scaled to nothing
    assert len(adapter.batches) == 1 + HALVINGS
    adapter.spoil = lambda loss, call: loss * math.nan
    assert adapter.adapt(frames, seeded())["skipped_steps"] == 1
    assert len(adapter.batches) == 2 + HALVINGS  # no scale mends such a loss
    adapter.spoil = lambda loss, call: loss * 0.01
    assert adapter.adapt(frames, seeded())["skipped_steps"] == 0
    assert not torch.equal(model.recon_head.weight, before["recon_head.weight"])
    adapter.reset()
    assert adapter.scaler.get_scale() == scale


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
