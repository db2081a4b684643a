"""The four precisions of steps and predictions."""

from __future__ import annotations

import copy

import pytest
import torch
from toy_steps import ToyAdapter, toy, window

from ttt_video.adaptation import build_adapter
from ttt_video.adaptation.precision import PRECISIONS, in_precision, tf32

GPU, CPU = torch.device("cuda"), torch.device("cpu")


def switches() -> tuple[bool, bool]:
    return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32


@pytest.fixture(params=[(False, True), (True, False)])
def process(request):
    """Switches of the process that no precision has, set by the names that every version knows."""
    before = switches()
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = request.param
    yield request.param
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@pytest.mark.parametrize("allowed", [True, False])
def test_products_and_convolutions_alike_may_use_tf32_or_not(process, allowed):
    """The switches exist without a GPU."""
    with tf32(GPU, allowed):
        assert switches() == (allowed, allowed)
        with tf32(GPU, not allowed):  # a prediction within a step
            assert switches() == (not allowed, not allowed)
        assert switches() == (allowed, allowed)
    assert switches() == process
    with pytest.raises(ZeroDivisionError), tf32(GPU, allowed):
        1 / 0  # noqa: B018
    assert switches() == process
    with tf32(CPU, allowed):
        assert switches() == process  # nothing of a CPU hangs on them


@pytest.mark.skipif(
    not hasattr(torch.backends.cudnn, "conv"), reason="this torch has the old names only"
)
def test_a_process_that_used_the_newer_names(process):
    matmul, convolution = torch.backends.cuda.matmul, torch.backends.cudnn.conv
    before = matmul.fp32_precision, convolution.fp32_precision
    matmul.fp32_precision, convolution.fp32_precision = "tf32", "ieee"
    try:
        with tf32(GPU, False):
            assert switches() == (False, False)
        assert (matmul.fp32_precision == "tf32", convolution.fp32_precision == "tf32") == (
            True,
            False,
        )
    finally:
        matmul.fp32_precision, convolution.fp32_precision = before


@pytest.mark.parametrize("precision", PRECISIONS)
def test_predictions_have_their_own_precision(precision):
    model = toy()
    adapter = ToyAdapter(model)
    adapter.predict_precision = precision
    seen: list[torch.dtype] = []
    model.sem_seg_head.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    adapter.predict(window().current)
    adapter.predict_source(window().current)
    assert seen == 2 * [PRECISIONS[precision] or torch.float32]
    model.recon_head.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    adapter.adapt(window(), torch.Generator())
    assert seen[2:] == [torch.float32]


def test_casts_outlive_their_use_only_where_they_are_kept():
    """Autocast's cache is seen by the number of casts of a weight that is used twice."""
    layer, x = torch.nn.Linear(3, 3), torch.ones(2, 3)
    for kept in (True, False):
        with torch.profiler.profile() as profile, in_precision(CPU, "bf16", keep_casts=kept):
            layer(layer(x))
        casts = sum(e.count for e in profile.key_averages() if e.key == "aten::_to_copy")
        assert casts == (3 if kept else 5)  # the input; weight and bias once or twice


@pytest.mark.parametrize(
    "method", ["none", "online_ttt_mae", "majority_vote", "temporal_smoothing"]
)
def test_every_method_predicts_in_the_precision_of_the_config(
    tiny_cfg, tiny_model, make_video, method
):
    tiny_cfg.merge_from_list(
        ["TTT.METHOD", method, "TTT.ENSEMBLE.PREDICTIONS", 1, "TTT.PREDICT_PRECISION", "bf16"]
    )
    (frame, *_) = make_video()
    expected = build_adapter(tiny_cfg, copy.deepcopy(tiny_model)).predict(frame)["sem_seg"]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        low = tiny_model([frame])[0]["sem_seg"]
    with torch.no_grad():
        exact = tiny_model([frame])[0]["sem_seg"]
    assert not torch.equal(low, exact)
    if method == "majority_vote":
        low = torch.nn.functional.one_hot(low.argmax(0), len(low)).permute(2, 0, 1).float()
    assert torch.equal(expected, low)
