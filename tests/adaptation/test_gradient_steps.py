"""What one gradient step does, against arithmetic, on a network of a few numbers."""

from __future__ import annotations

import math

import pytest
import torch
from toy_steps import ToyAdapter, assert_same, gradient, moving, seeded, toy, weights, window

from ttt_video.adaptation.source_gradients import measure_gradients
from ttt_video.errors import UserError


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
