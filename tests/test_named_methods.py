"""configs/methods.yaml: what names stand for, against the code and the paper."""

from __future__ import annotations

import pytest

from ttt_video.adaptation import ADAPTER_REGISTRY
from ttt_video.adaptation.base import WRAPPER_REGISTRY, find_method
from ttt_video.config import KEYS
from ttt_video.config.methods import named_method, shipped_methods
from ttt_video.errors import UserError
from ttt_video.report.published import TABLE_1, TABLE_4

METHODS = shipped_methods()


def test_all_code_has_a_name_and_all_names_have_code():
    assert {name for name, _ in ADAPTER_REGISTRY} <= METHODS.keys()
    assert {m.runs for m in METHODS.values() if not m.is_ensemble} <= {
        n for n, _ in ADAPTER_REGISTRY
    }
    wrappers = {name for method in METHODS.values() for name in method.wrappers}
    assert wrappers == {name for name, _ in WRAPPER_REGISTRY}


def test_titles_are_the_papers_rows():
    for name, row in {**TABLE_1, **TABLE_4}.items():
        assert METHODS[name].title == row.name
    titles = [method.title for method in METHODS.values() if method.title]
    assert len(titles) == len(set(titles)) == len(METHODS) - 3  # none, and two of our own


@pytest.mark.parametrize("method", METHODS.values(), ids=str)
def test_fixed_keys_are_keys(method):
    assert method.fixed.items() <= method.keys.items()
    assert {f"TTT.{key}" for key in method.keys} - {"TTT.ENSEMBLE", "TTT.OFFLINE"} <= KEYS.keys()


def test_a_name_has_what_the_method_it_runs_has():
    """Table 4, and Section 5.1."""
    memories = {
        name: (METHODS[name].keys.get("WINDOW_SIZE"), METHODS[name].keys["RESET"])
        for name in ("online_ttt_mae", "explicit_only", "implicit_only", "ttt_mae_no_memory")
    }
    assert memories == {
        "online_ttt_mae": (None, "video"),
        "explicit_only": (None, "frame"),
        "implicit_only": (1, "video"),
        "ttt_mae_no_memory": (1, "frame"),
    }
    tent, balanced = METHODS["tent"], METHODS["tent_class_balance"]
    assert (balanced.runs, balanced.keys, balanced.fixed) == ("tent", tent.keys, tent.fixed)
    assert (tent.wrappers, balanced.wrappers) == ((), ("ClassBalance",))


def test_a_name_that_does_not_ship_stands_for_its_own_code(monkeypatch):
    monkeypatch.setitem(ADAPTER_REGISTRY._obj_map, "mine", lambda cfg, model: None)
    assert find_method("mine") == named_method("mine")
    assert (named_method("mine").runs, named_method("mine").keys) == ("mine", {})
    with pytest.raises(
        UserError, match=r"no method 'yours'; choose one of: .*mine, none.*--register"
    ):
        find_method("yours")
