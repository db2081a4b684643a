"""An optimizer that forgets: a state of zeros leads to the steps of a new optimizer."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from toy_steps import ToyAdapter, assert_same, seeded, toy, weights, window

from ttt_video.adaptation.snapshot import Snapshot, forget, knows_nothing, state_tensors
from ttt_video.modeling.optimizer import load_optimizer, make_optimizer

OPTIMIZERS = [
    {"name": "SGD", "momentum": 0.9},
    {"name": "SGD", "momentum": 0.9, "nesterov": True},
    {"name": "SGD"},
    {"name": "ADAMW", "betas": (0.8, 0.99)},
]


def network() -> tuple[list[nn.Parameter], list[dict]]:
    random = seeded(3)
    parameters = [nn.Parameter(torch.randn(shape, generator=random)) for shape in [(3, 4), (5,)]]
    decays = zip(parameters, (0.1, 0.0), strict=True)
    return parameters, [{"params": [p], "lr": 0.01, "weight_decay": d} for p, d in decays]


def take_steps(optimizer, parameters, count: int, seed: int) -> None:
    random = seeded(seed)
    for _ in range(count):
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=random)
            parameter.grad.flatten()[0] = 0.0
        optimizer.step()


@pytest.mark.parametrize("settings", OPTIMIZERS)
def test_a_state_of_zeros_takes_the_steps_of_a_new_optimizer(settings):
    parameters, groups = network()
    used = make_optimizer(groups=groups, **settings)
    take_steps(used, parameters, 3, seed=0)
    kept = [id(tensor) for tensor in state_tensors(used)]
    assert knows_nothing(used) == (not kept)
    forget(used)
    assert knows_nothing(used)
    others = [nn.Parameter(p.detach().clone()) for p in parameters]
    own = [{**group, "params": [p]} for group, p in zip(groups, others, strict=True)]
    fresh = make_optimizer(groups=own, **settings)
    take_steps(used, parameters, 3, seed=1)
    take_steps(fresh, others, 3, seed=1)
    for one, other in zip(parameters, others, strict=True):
        assert torch.equal(one, other)
    for one, other in zip(state_tensors(used), state_tensors(fresh), strict=True):
        assert torch.equal(one, other)
    assert [id(tensor) for tensor in state_tensors(used)] == kept  # nothing was made anew


def test_a_snapshot_restores_a_state_in_place():
    parameters, groups = network()
    optimizer = make_optimizer("ADAMW", groups)
    before = Snapshot(parameters, optimizer)
    values = [p.detach().clone() for p in parameters]
    take_steps(optimizer, parameters, 1, seed=0)
    before.restore()
    assert all(torch.equal(p, value) for p, value in zip(parameters, values, strict=True))
    assert knows_nothing(optimizer)  # it had no state then
    take_steps(optimizer, parameters, 2, seed=1)
    before, kept = Snapshot(parameters, optimizer), state_tensors(optimizer)
    expected: list[Tensor] = [t.clone() for t in kept]
    take_steps(optimizer, parameters, 1, seed=2)
    before.restore()
    for tensor, own, value in zip(state_tensors(optimizer), kept, expected, strict=True):
        assert tensor is own
        assert torch.equal(tensor, value)


@pytest.mark.parametrize("settings", [{"momentum": 0.9}, {"name": "ADAMW", "lr": 0.01}])
def test_the_file_of_a_restarted_optimizer_holds_no_zeros(settings):
    """It is like files of earlier versions, which therefore go on to the same numbers."""
    adapter, generator = ToyAdapter(toy(), restart=True, **settings), seeded()
    adapter.adapt(window(), generator)
    state = copy.deepcopy(adapter.state_dict())
    assert state["optimizer"]["state"] == {}
    drawn = generator.get_state()
    expected = adapter.adapt(window(), generator)
    resumed = ToyAdapter(toy(), restart=True, **settings)
    resumed.adapt(window(), seeded(9))
    resumed.load_state_dict(state)
    generator.set_state(drawn)
    assert resumed.adapt(window(), generator) == expected
    assert_same(weights(resumed.model), weights(adapter.model))


def test_a_loaded_state_does_not_say_how_to_compute():
    """A file of a CPU, or of an optimizer that was made to be captured in a graph."""
    parameters, groups = network()
    optimizer = make_optimizer("ADAMW", groups)
    take_steps(optimizer, parameters, 1, seed=0)
    state = copy.deepcopy(optimizer.state_dict())
    for group in state["param_groups"]:
        group.update(fused=None, capturable=True, lr=0.5)
    load_optimizer(optimizer, state)
    for group in optimizer.param_groups:
        assert (group["fused"], group["capturable"], group["lr"]) == (True, False, 0.5)


@pytest.mark.parametrize("name", ["SGD", "ADAMW"])
def test_a_step_after_a_restart_is_undone_to_the_restart(name):
    """No copy is made of AdamW's zeros."""
    parameters, groups = network()
    optimizer = make_optimizer(name, groups, momentum=0.9)
    take_steps(optimizer, parameters, 1, seed=0)
    forget(optimizer)
    before = Snapshot(parameters, optimizer, forgotten=True)
    assert before._state_values == []
    take_steps(optimizer, parameters, 1, seed=1)
    assert not knows_nothing(optimizer)
    before.restore()
    assert not any(bool(tensor.any()) for tensor in state_tensors(optimizer))
