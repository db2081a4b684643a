"""An update that is issued before the host knows its step gives what the host's decision gives."""

from __future__ import annotations

import math

import pytest
import torch
from toy_steps import ToyAdapter, seeded, toy, window


class Ahead(ToyAdapter):
    """Decides on the device, as on a GPU."""

    def _updates_ahead(self) -> bool:
        return self.can_go_ahead()

    def can_go_ahead(self) -> bool:
        return self._mover.can_go_ahead(self.scaler)


def run(kind, spoiled=(), **settings):
    """Returns the records and the weights of five frames; some losses are NaN or far too large."""
    adapter, generator = kind(toy(), **settings), seeded()
    calls = dict(spoiled)
    adapter.spoil = lambda loss, call: loss * calls.get(call, 1.0)
    records = [adapter.adapt(window(), generator) for _ in range(5)]
    return adapter, records, [p.detach().clone() for p in adapter.model.parameters()]


SETTINGS = {
    "momentum": {"momentum": 0.9},
    "clipped": {"clip_norm": 0.05, "momentum": 0.5},
    "hardly clipped": {"clip_norm": 1e6},
    "adamw": {"name": "ADAMW", "lr": 0.01, "weight_decay": 0.1},
    "restarted": {"name": "ADAMW", "lr": 0.01, "restart": True},
    "restarted momentum": {"momentum": 0.9, "restart": True, "max_loss_growth": 2.0},
    "pulled": {"source_pull": 0.1, "max_loss_growth": 2.0, "momentum": 0.9},
    "undone": {"lr": 50.0, "max_loss_growth": 1.1, "momentum": 0.9},
}


@pytest.mark.parametrize("spoiled", [{}, {1: math.nan}, {1: math.nan, 3: math.inf}], ids=str)
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_same_rows_and_weights(settings, spoiled):
    plain, expected, weights = run(ToyAdapter, spoiled, **settings)
    ahead, records, moved = run(Ahead, spoiled, **settings)
    assert ahead.can_go_ahead()
    for given, own in zip(records, expected, strict=True):
        assert given == pytest.approx(own, nan_ok=True, rel=1e-6)
        assert given["skipped_steps"] == own["skipped_steps"]
    for one, other in zip(moved, weights, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-8)
    assert sum(record["skipped_steps"] for record in records) >= len(spoiled)
    states = zip(ahead.optimizer.state.values(), plain.optimizer.state.values(), strict=True)
    for one, other in states:
        assert one.keys() == other.keys()
        for key in one:
            torch.testing.assert_close(one[key], other[key], rtol=1e-6, atol=1e-8)


def test_weights_that_are_pulled_need_a_copy():
    assert not Ahead(toy(), source_pull=0.1, max_loss_growth=0.0).can_go_ahead()
    assert not Ahead(toy(), precision="fp16").can_go_ahead()
    assert not ToyAdapter(toy())._updates_ahead()  # on a CPU the host knows at once


def test_a_first_step_that_is_skipped_leaves_no_momentum(monkeypatch):
    """The fused SGD makes momentum of whatever is in the memory, and fills it only in a step."""
    monkeypatch.setattr(torch, "empty_like", lambda x, **_: torch.full_like(x, math.nan))
    adapter = Ahead(toy(), momentum=0.9)
    adapter.load_state_dict(ToyAdapter(toy(), momentum=0.9).state_dict())  # of before any step
    adapter.spoil = lambda loss, call: loss * (math.nan if call == 1 else 1.0)
    generator = seeded()
    assert [adapter.adapt(window(), generator)["skipped_steps"] for _ in range(2)] == [1, 0]
    assert all(bool(p.isfinite().all()) for p in adapter.model.parameters())
