"""Methods have the keys and the parts that their names stand for, and each is under contract."""

from __future__ import annotations

import copy

import pytest
import test_methods
from contract import AdapterContract
from torch import nn

from ttt_video.adaptation import NoAdaptation, ReconstructionAdapter, method_names
from ttt_video.adaptation.base import build_adapter
from ttt_video.config import merge_method
from ttt_video.errors import UserError
from ttt_video.modeling.interface import drop_part


def test_without_memory_the_order_of_frames_does_not_matter(tiny_cfg, tiny_model, make_video):
    contract, video, runs = test_methods.TestTTTMAENoMemory(), make_video(num_frames=3), []
    for order in (video, video[::-1], [video[i] for i in (1, 2, 0)]):
        runner = contract.build(tiny_cfg, copy.deepcopy(tiny_model))
        runs.append(sorted(contract.numbers(runner.run(order)), key=lambda frame: frame[1]))
    contract.assert_equal(runs[0], runs[1])
    contract.assert_equal(runs[0], runs[2])


def test_methods_that_reconstruct_need_the_decoder(tiny_cfg, tiny_model):
    drop_part(tiny_model, "g")  # as load_source_model leaves it where the weights have no g
    for method in ("online_ttt_mae", "ttt_mae_no_memory", "offline_ttt_mae", "joint_training"):
        merge_method(tiny_cfg, method)
        with pytest.raises(UserError, match=r"have no decoder g"):
            build_adapter(tiny_cfg, tiny_model)
    for method in ("main_task_only", "none", "tent", "self_train"):
        merge_method(tiny_cfg, method)
        build_adapter(tiny_cfg, tiny_model)


@pytest.mark.parametrize(
    ("method", "key", "value"),
    [
        ("implicit_only", "WINDOW_SIZE", 16),
        ("implicit_only", "RESET", "frame"),
        ("explicit_only", "RESET", "video"),
        ("ttt_mae_no_memory", "WINDOW_SIZE", 2),
        ("offline_ttt_mae", "RESET", "never"),
        ("ln_adapt", "RESET", "frame"),
        ("tent", "PARAMETERS", "all"),  # also what a file gives that names it and nothing else
        ("tent_class_balance", "PARAMETERS", "all"),
    ],
)
def test_a_method_with_other_keys_is_not_what_its_name_says(
    tiny_cfg, tiny_model, method, key, value
):
    merge_method(tiny_cfg, method)
    tiny_cfg.TTT[key] = value
    with pytest.raises(UserError, match=rf"{method} has TTT\.{key} .*--method {method}"):
        build_adapter(tiny_cfg, tiny_model)


def test_a_method_under_an_ensemble_has_its_keys_too(tiny_cfg, tiny_model):
    tiny_cfg.TTT.METHOD, tiny_cfg.TTT.ENSEMBLE.METHOD = "temporal_smoothing", "tent"
    with pytest.raises(
        UserError, match=r"tent has .* with TTT\.ENSEMBLE\.METHOD tent on the command"
    ):
        build_adapter(tiny_cfg, tiny_model)


def test_every_registered_method_is_under_contract():
    classes = [*AdapterContract.__subclasses__(), *test_methods.OfflineContract.__subclasses__()]
    tested = {cls.method for cls in classes if cls is not test_methods.OfflineContract}
    assert tested >= set(method_names())


def test_methods_by_name(tiny_cfg, tiny_model):
    for name, cls in (("none", NoAdaptation), ("online_ttt_mae", ReconstructionAdapter)):
        tiny_cfg.TTT.METHOD = name
        assert type(build_adapter(tiny_cfg, tiny_model)) is cls


def test_an_unknown_method_is_named_with_those_there_are(tiny_cfg):
    for name, answer in (
        ("online_ttt", r"did you mean online_ttt_mae or"),
        ("xyzzy", r"none, offline_ttt_mae.*online_ttt_mae"),
    ):
        tiny_cfg.TTT.METHOD = name
        with pytest.raises(UserError, match=rf"'{name}'.*{answer}"):
            build_adapter(tiny_cfg, nn.Identity())
