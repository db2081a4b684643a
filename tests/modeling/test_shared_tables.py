"""Tables that are made once per size, and what an exported program does in their place."""

from __future__ import annotations

import sys
from functools import lru_cache

import pytest
import torch
from torch import Tensor

from ttt_video.modeling.tables import caches, shared_table
from ttt_video.modeling.windows import shift_mask, token_windows, window_places, window_tokens

CPU = torch.device("cpu")


@shared_table(2)
def ramp(length: int) -> Tensor:
    return torch.arange(float(length))


@pytest.fixture
def exporting(monkeypatch):
    """Runs what an exported program runs, with numbers."""
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)


def test_a_table_is_made_once_and_the_oldest_goes():
    first = ramp(3)
    assert ramp(3) is first
    ramp(4), ramp(5)
    assert ramp(3) is not first
    assert torch.equal(ramp(3), first)


def test_a_table_first_made_in_inference_mode_serves_autograd():
    with torch.inference_mode():
        table = ramp(7)
    assert not table.is_inference()


def test_an_exported_program_makes_its_own(exporting):
    assert ramp(3) is not ramp(3)


def test_caches_are_found_where_graphs_look_for_them(monkeypatch):
    other = lru_cache(maxsize=1)(abs)
    module = sys.modules["ttt_video.modeling.backbone"]
    monkeypatch.setattr(module, "ramp", ramp, raising=False)
    monkeypatch.setattr(module, "other", other, raising=False)
    found = caches()
    assert len({id(cache) for cache in found}) == len(found)
    assert sum(cache is other or cache is ramp.__wrapped__ for cache in found) == 2
    assert any(cache is window_places.__wrapped__ for cache in found)


@pytest.mark.parametrize(
    ("height", "width", "side", "shift"),
    [(5, 7, 4, 0), (5, 7, 4, 2), (8, 4, 4, 2), (3, 9, 7, 3), (14, 13, 7, 0), (1, 1, 12, 6)],
)
def test_windows_by_arithmetic_are_those_of_the_table(height, width, side, shift):
    places = window_places(height, width, side, shift, CPU)
    tokens, shown = window_tokens(height, width, side, shift, CPU)
    expected = torch.ones(len(tokens))
    expected[places.padding] = 0
    assert torch.equal(shown, expected)
    assert torch.equal(tokens[shown > 0], places.tokens[shown > 0])
    assert tokens.max() < height * width
    assert torch.equal(token_windows(height, width, side, shift, CPU), places.windows)


def test_the_prediction_of_an_exported_program(tiny_model, make_video, monkeypatch):
    """Its operations take another way through windows, tables and deformable attention."""
    (frame,) = make_video(num_frames=1, height=71, width=98)
    with torch.no_grad():
        expected = tiny_model.prediction_tensors(frame["image"][None])
        calls = []
        monkeypatch.setattr(torch.compiler, "is_exporting", lambda: calls.append(1) or True)
        found = tiny_model.prediction_tensors(frame["image"][None])
    assert len(calls) > 20
    torch.testing.assert_close(found["scores"], expected["scores"], rtol=0, atol=1e-5)
    assert (found["labels"] != expected["labels"]).sum() <= 2


def test_a_mask_keeps_apart_what_the_roll_made_neighbours():
    """A window of 2 on 3 x 2 tokens, rolled by one: rows 1 2 | 3 0, columns 1 0, 3 is padding."""
    mask = shift_mask(3, 2, 2, 1, CPU) == 0
    columns = torch.eye(2, dtype=torch.bool)
    together = torch.ones(2, 2, dtype=torch.bool)
    expected = [torch.kron(rows, columns).bool() for rows in (together, torch.eye(2).bool())]
    assert torch.equal(mask, torch.stack(expected))
