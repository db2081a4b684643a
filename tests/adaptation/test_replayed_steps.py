"""A stream with replayed graphs has the numbers of one without, to the last bit."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
from detectron2.modeling import build_model
from gradient_settings import grouped
from tape import TapeCapture
from tiny import TINY, TINY_VIT, VIT_SIDE

from ttt_video.adaptation import RandomCrop, ReconstructionAdapter, SlidingWindow, build_adapter
from ttt_video.adaptation.gradient import HALVINGS
from ttt_video.adaptation.window import LimitedWindow
from ttt_video.config import load_config
from ttt_video.errors import UserError
from ttt_video.stream import Stream

ADAMW = ["TTT.OPTIMIZER.NAME", "ADAMW", "TTT.OPTIMIZER.BASE_LR", "0.001"]
CROP = ["TTT.CROP.SIZE", "[32, 64]"]


@pytest.fixture
def capture() -> TapeCapture:
    return TapeCapture()


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rows(cfg, model, frames, capture: TapeCapture | None) -> list[Any]:
    """Runs a stream; returns records and predictions, and at last what has moved."""
    stream = Stream.from_config(cfg, copy.deepcopy(model))
    adapter = stream.adapter
    adapter.replay_graphs(capture)
    results = [stream.step(frame) for frame in frames]
    return [
        *((r.record, dict(r.output)) for r in results),
        adapter.state_dict(),
    ]


def assert_same(left: Any, right: Any) -> None:
    torch.testing.assert_close(left, right, rtol=0, atol=0, equal_nan=True)


RARE = [
    ["TTT.STEP_MODE", "train", "TTT.STEPS_PER_FRAME", "2", *CROP],
    ["TTT.PRECISION", "bf16", *CROP],
    ["TTT.PREDICT", "before", "TTT.OPTIMIZER.SOURCE_PULL", "0.1"],
    ["TTT.MASK_KIND", "block", "TTT.RECON.REGION", "all"],
    ["TTT.RECON.NORMALIZE_TARGET", "True", "TTT.MODULES", '["f"]'],
    ["TTT.CROP.SCALE_RANGE", "[0.5, 1.5]", *CROP],
]


@pytest.mark.parametrize(
    ("method", "opts"),
    [
        ("online_ttt_mae", []),
        ("online_ttt_mae", ["TTT.BATCH_SIZE", "5", "TTT.MICRO_BATCH_SIZE", "2"]),
        ("online_ttt_mae", [*ADAMW, "TTT.OPTIMIZER.RESTART", "True", *CROP]),
        ("online_ttt_mae", [*ADAMW, "TTT.OPTIMIZER.CLIP_NORM", "0.01", "TTT.CROP.FLIP", "True"]),
        ("online_ttt_mae", ["TTT.RESET", "frame"]),
        ("online_ttt_mae", ["TTT.RESET", "never", "TTT.UPDATE_EVERY", "2"]),
        ("online_ttt_mae", ["TTT.OPTIMIZER.BASE_LR", "30.0", "TTT.WINDOW_SIZE", "1"]),
        ("tent", []),
        ("self_train", ["TTT.SELF_TRAIN.THRESHOLD", "0.1"]),
        ("majority_vote", ["TTT.ENSEMBLE.PREDICTIONS", "2"]),
        ("none", []),
        *(pytest.param("online_ttt_mae", opts, marks=pytest.mark.slow) for opts in RARE),
    ],
)  # fmt: skip
def test_rows_are_those_without_graphs(tiny_model, make_video, capture, method, opts):
    """Two videos, of which the first changes its size; 60x90 is padded to 64x96."""
    frames = [
        *make_video("a", 4, 60, 90),
        *({**x, "frame_index": 4 + i} for i, x in enumerate(make_video("a", 1, 64, 64))),
        *make_video("b", 3, 60, 90),
    ]
    cfg = load_config("joint_cityscapes.yaml", opts=[*TINY, *opts], method=method)
    expected = rows(cfg, tiny_model, frames, None)
    assert_same(rows(cfg, tiny_model, frames, capture), expected)
    assert capture.replayed > 2


@pytest.fixture
def adapter_of(tiny_model):
    """Returns an adapter on a copy of the model, with or without graphs."""

    def build(capture: TapeCapture | None, **settings) -> ReconstructionAdapter:
        settings = {"lr": 0.01, "batch_size": 4, "micro_batch_size": 2, **settings}
        adapter = ReconstructionAdapter(
            copy.deepcopy(tiny_model),
            augment=RandomCrop(size=(32, 64)),
            **grouped(**settings),
        )
        adapter.replay_graphs(capture)
        return adapter

    return build


@pytest.fixture
def window(make_video) -> SlidingWindow:
    window = SlidingWindow(3)
    for frame in make_video():
        window.push(frame)
    return window


def test_a_step_without_finite_loss_leaves_everything_as_it_was(adapter_of, window, capture):
    adapter = adapter_of(capture, name="ADAMW", mode="train")
    for seed in range(2):
        adapter.adapt(window, seeded(seed))
    replayed = capture.replayed
    before = copy.deepcopy((adapter.model.state_dict(), adapter.optimizer.state_dict()))
    std = adapter.model.pixel_std.clone()
    adapter.model.pixel_std.zero_()  # in its place, so that the graph reads it
    record = adapter.adapt(window, seeded())
    adapter.model.pixel_std.copy_(std)
    assert record["skipped_steps"] == 1
    assert capture.replayed == replayed + 2
    assert_same((adapter.model.state_dict(), adapter.optimizer.state_dict()), before)
    assert adapter.adapt(window, seeded())["skipped_steps"] == 0  # no NaN is left in a gradient


def test_an_exploding_step_is_undone(adapter_of, window, capture):
    adapter, plain = (adapter_of(x, max_loss_growth=1.5) for x in (capture, None))
    records: list[list[dict[str, float]]] = []
    for one in (adapter, plain):
        records.append([])
        for rate in (1e-3, 1e4, 1e-3, 1e4):
            for group in one.optimizer.param_groups:
                group["lr"] = rate
            records[-1].append(one.adapt(window, seeded(3)))
    assert records[0] == records[1]
    assert [record["skipped_steps"] for record in records[0]] == [0, 1, 0, 1]
    assert_same(adapter.state_dict(), plain.state_dict())


def test_the_loss_scale_of_fp16_is_an_input(adapter_of, window, capture):
    """It is halved until the gradient is finite, with the same masks, in one graph."""
    states = []
    for recorder in (capture, None):
        adapter = adapter_of(recorder, precision="fp16", batch_size=2)
        adapter.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24)
        records = [adapter.adapt(window, seeded(i)) for i in range(3)]
        states.append((records, adapter.state_dict()))
    assert_same(*states)
    scale = states[0][1]["scaler"]["scale"]
    assert 2.0**24 > scale >= 2.0 ** (24 - 3 * HALVINGS)
    assert capture.recorded == 1


def test_shorter_batches_of_a_frame_budget(adapter_of, window, capture):
    def records(recorder: TapeCapture | None) -> list[dict[str, float]]:
        adapter, random = adapter_of(recorder, batch_size=5), seeded()
        return [adapter.adapt(LimitedWindow(window, n), random) for n in (5, 3, 1, 2, 4, 5)]

    assert records(capture) == records(None)
    # Micro-batches of 2 and of 1; a sample's share of a batch is an input.
    assert capture.recorded == 2


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_graphs_give_way_where_memory_is_short(adapter_of, window, capture, monkeypatch, mode):
    """The step is taken anew, on the same draws and without what was added already."""
    records = []
    for recorder in (capture, None):
        adapter, random = adapter_of(recorder, mode=mode, batch_size=5), seeded()
        records.append([adapter.adapt(LimitedWindow(window, 4), random) for _ in range(2)])
        if recorder is not None:
            adapter.predict(window.current), adapter.predict(window.current)
            original, failures = adapter.losses_of, [torch.cuda.OutOfMemoryError("too large")]

            def short(images, patches, original=original, failures=failures):
                if len(images) == 1 and failures:  # the third micro-batch of a step
                    raise failures.pop()
                return original(images, patches)

            monkeypatch.setattr(adapter, "losses_of", short)
            recorded = capture.recorded
        records[-1] += [adapter.adapt(window, random) for _ in range(2)]
        if recorder is not None:
            assert not failures
            assert capture.recorded > recorded  # graphs are back
    assert records[0] == records[1]


def test_memory_that_graphs_do_not_hold_is_not_asked_for_twice(adapter_of, window, capture):
    adapter, calls = adapter_of(capture), []

    def fails(*inputs):
        calls.append(inputs)
        raise torch.cuda.OutOfMemoryError("too large")

    adapter.losses_of = fails
    with pytest.raises(UserError, match=r"2 samples of a step on frames of \d+x\d+ do not fit"):
        adapter.adapt(window, seeded())
    assert len(calls) == 1


def test_a_stream_goes_on_from_a_saved_state(adapter_of, window, capture):
    plain, adapter = adapter_of(None, name="ADAMW"), adapter_of(capture, name="ADAMW")
    random = seeded()
    plain.adapt(window, random)
    state, drawn = copy.deepcopy(plain.state_dict()), random.get_state()
    expected = [plain.adapt(window, random) for _ in range(2)]
    for seed in range(2):  # it was elsewhere before
        adapter.adapt(window, seeded(seed))
    adapter.load_state_dict(state)
    random.set_state(drawn)
    assert [adapter.adapt(window, random) for _ in range(2)] == expected
    assert_same(adapter.state_dict(), plain.state_dict())
    adapter.reset()
    assert not adapter.state_dict()["tensors"]


def test_parameters_without_gradient_have_none(adapter_of, window, capture):
    """Weight decay would shrink them otherwise."""
    adapter = adapter_of(capture, weight_decay=0.5)
    unused = torch.nn.Parameter(torch.ones(3))
    adapter.optimizer.param_groups[0]["params"].append(unused)
    adapter.parameters.append(unused)
    for seed in range(3):
        adapter.adapt(window, seeded(seed))
    assert capture.replayed > 0
    assert unused.tolist() == [1, 1, 1]
    assert all(parameter.grad is None for parameter in adapter.parameters)


def test_a_summary_says_what_ran_without_graphs(adapter_of, window, capture):
    adapter = adapter_of(capture)
    assert "without_graphs" not in adapter.facts()
    capture.fail = RuntimeError("it waits")
    for _ in range(2):
        adapter.adapt(window, seeded())
        adapter.predict(window.current)
    assert adapter.facts()["without_graphs"] == dict.fromkeys(
        ["prediction", "gradient step"], "it waits"
    )


def test_predictions_do_not_share_memory_with_the_next(adapter_of, make_video, capture):
    adapter = adapter_of(capture)
    frames = make_video(num_frames=4)
    outputs = [adapter.predict(frame) for frame in frames]
    assert capture.replayed == 3
    plain = adapter_of(None)
    assert_same(outputs, [plain.predict(frame) for frame in frames])


def test_predictions_with_the_source_weights_run_without_graphs(adapter_of, window, capture):
    adapter, frame = adapter_of(capture), window.current
    source = adapter.predict(frame)
    for seed in range(3):
        adapter.adapt(window, seeded(seed))
    moved = adapter.predict(frame)
    assert not torch.equal(moved["sem_seg"], source["sem_seg"])
    assert_same(adapter.predict_source(frame), source)
    assert_same(adapter.predict(frame), moved)


def test_draws_are_given_back_where_a_batch_has_no_fixed_shape(adapter_of, make_video, capture):
    window = SlidingWindow(None)
    for frame in (*make_video("a", 1, 64, 96), *make_video("b", 1, 96, 64)):
        window.push(frame)
    records = []
    for recorder in (capture, None):
        adapter, random = adapter_of(recorder), seeded()
        adapter.augment = RandomCrop(flip=True)
        records.append([adapter.adapt(window, random) for _ in range(3)])
    assert records[0] == records[1]


def test_a_method_that_only_has_losses_runs_without_graphs(tiny_model, window, capture, caplog):
    class Doubled(ReconstructionAdapter):
        def losses(self, batch, generator):
            return {name: 2 * x for name, x in super().losses(batch, generator).items()}

    losses = []
    for kind in (ReconstructionAdapter, Doubled):
        adapter = kind(
            copy.deepcopy(tiny_model), augment=RandomCrop(), **grouped(lr=0.0, batch_size=2)
        )
        with caplog.at_level(logging.INFO):
            adapter.replay_graphs(capture)
        losses.append([adapter.adapt(window, seeded(i))["loss_recon"] for i in range(3)])
    assert losses[1] == [2 * loss for loss in losses[0]]
    assert "Doubled takes its steps without CUDA graphs" in caplog.text


def test_a_vit_runs_without_graphs(make_video, capture):
    """Its masks decide shapes, which a graph cannot."""
    cfg = load_config("mae_imagenet_probing.yaml", opts=TINY_VIT)
    torch.manual_seed(0)
    adapter = build_adapter(cfg, build_model(cfg).eval(), "online_ttt_mae")
    adapter.replay_graphs(capture)
    window = SlidingWindow(1)
    window.push(make_video("a", 1, VIT_SIDE, VIT_SIDE)[0])
    for seed in range(3):
        assert adapter.adapt(window, seeded(seed))["loss_recon"] > 0
    assert adapter.predict(window.current)["image_class"].shape == (5,)
    assert capture.recorded == 0


@pytest.mark.parametrize("choice", ["auto", "off"])
def test_the_config_decides(tiny_model, monkeypatch, capture, choice):
    monkeypatch.setattr("ttt_video.adaptation.base.capture_for", lambda device: capture)
    cfg = load_config("joint_cityscapes.yaml", opts=[*TINY, "TTT.CUDA_GRAPHS", choice])
    adapter = build_adapter(cfg, tiny_model)
    assert (adapter._replayed is not None) == (choice == "auto")
    assert (adapter._replayed_prediction is not None) == (choice == "auto")
