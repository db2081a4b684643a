"""The line search: the scale it finds, against weights moved by hand and measured from outside."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from ttt_video.adaptation import build_adapter
from ttt_video.adaptation.norm_statistics import measure_statistics
from ttt_video.adaptation.online_ttt_mae_line_search import LineSearchAdapter
from ttt_video.config import load_config
from ttt_video.errors import UserError
from ttt_video.modeling.weights import save_safetensors
from ttt_video.stream import Stream, load_source_model


@pytest.fixture
def cfg(cfg_with_statistics):
    return cfg_with_statistics("online_ttt_mae_line_search")


def run(cfg, model: nn.Module, video: list, *pairs) -> list:
    cfg = cfg.clone()
    cfg.merge_from_list(list(pairs))
    return list(Stream.from_config(cfg, copy.deepcopy(model)).run(video))


def distance_by_hand(model: nn.Module, image: Tensor, source: dict[str, Tensor]) -> float:
    """Mean over the channels of the head's layers."""
    now = measure_statistics(model, [image], ["sem_seg_head"])
    parts = []
    for name, mean in now.items():
        if name.endswith(".mean"):
            deviation = (source[name.replace(".mean", ".variance")] + 1e-5).sqrt()
            parts.append((mean - source[name]).abs() / deviation)
    return float(torch.cat(parts).mean())


def moved(source: nn.Module, adapted: nn.Module, scale: float) -> nn.Module:
    model = copy.deepcopy(source).eval()
    pairs = zip(source.parameters(), adapted.parameters(), strict=True)
    with torch.no_grad():
        for parameter, (start, end) in zip(model.parameters(), pairs, strict=True):
            parameter.copy_(start.double() + scale * (end.double() - start.double()))
    return model


def test_predicts_with_the_scale_of_the_smallest_shift(cfg, tiny_model, make_video, source):
    scales = [0.0, 0.5, 1.0, 2.0, 3.0]
    search = cfg.TTT.LINE_SEARCH
    search.SCALES, search.EVERY, search.DECAY = scales, 1, 0.0
    model = copy.deepcopy(tiny_model)
    runner = Stream.from_config(cfg, model)
    found = set()
    for lr in (0.1, 0.02):
        for group in runner.adapter.optimizer.param_groups:
            group["lr"] = lr
        for result in runner.run(make_video(f"at {lr}")):
            image = result.frame["image"]
            models = [moved(tiny_model, model, scale) for scale in scales]
            shifts = [distance_by_hand(m, image, source) for m in models]
            best = min(range(len(scales)), key=shifts.__getitem__)
            assert result.record["scale"] == scales[best]
            assert result.record["norm_shift"] == pytest.approx(shifts[best], rel=1e-4)
            with torch.no_grad():
                expected = models[best]([result.frame])[0]["sem_seg"]
            torch.testing.assert_close(result.output["sem_seg"], expected, rtol=1e-3, atol=1e-5)
            found.add(scales[best])
    assert len(found) > 1  # else any rule would do


@pytest.mark.parametrize(("scale", "method"), [(1.0, "online_ttt_mae"), (0.0, "none")])
def test_one_scale_is_another_method_bit_for_bit(cfg, tiny_model, make_video, scale, method):
    video = make_video(num_frames=4)
    ours = run(cfg, tiny_model, video, "TTT.LINE_SEARCH.SCALES", [scale])
    theirs = run(cfg, tiny_model, video, "TTT.METHOD", method)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a.output["sem_seg"], b.output["sem_seg"])


@pytest.mark.parametrize("restart", [False, True])
def test_the_search_does_not_move_the_weights(cfg, tiny_model, make_video, restart):
    """Only predictions follow it: losses are those of the method without, whose optimizer begins
    anew with each video, or each frame.
    """
    cfg.TTT.OPTIMIZER.MOMENTUM, cfg.TTT.OPTIMIZER.RESTART = 0.9, restart
    video = [*make_video("a", num_frames=3), *make_video("b", num_frames=3)]
    ours = run(cfg, tiny_model, video, "TTT.LINE_SEARCH.SCALES", [0.0, 3.0])
    theirs = run(cfg, tiny_model, video, "TTT.METHOD", "online_ttt_mae")
    assert [r.record["loss_recon"] for r in ours] == [r.record["loss_recon"] for r in theirs]
    assert {r.record["scale"] for r in ours[:3]} == {ours[0].record["scale"]}  # one search


def shifts_of(adapter: LineSearchAdapter, monkeypatch, rows: list[list[float]]) -> None:
    """The next searches measure these; one more fails."""
    values = iter([value for row in rows for value in row])
    monkeypatch.setattr(adapter, "_shift_at", lambda *_: torch.tensor(next(values)))


@pytest.fixture
def adapter(cfg, tiny_model, make_video):
    cfg.TTT.LINE_SEARCH.SCALES, cfg.TTT.LINE_SEARCH.EVERY = [0.0, 1.0, 2.0], 3
    return Stream.from_config(cfg, tiny_model)


def records(runner: Stream, video: list) -> list[tuple[float, float]]:
    return [(r.record["scale"], round(r.record["norm_shift"], 6)) for r in runner.run(video)]


def test_searches_every_n_updates_and_averages(adapter, make_video, monkeypatch):
    shifts_of(adapter.adapter, monkeypatch, [[0.4, 0.3, 0.8], [0.4, 0.9, 0.1], [0.4, 0.9, 0.1]])
    # 0.40 0.30 0.80, then 0.40 0.60 0.45, then 0.400 0.750 0.275
    expected = [(1.0, 0.3)] * 3 + [(0.0, 0.4)] * 3 + [(2.0, 0.275)]
    assert records(adapter, make_video(num_frames=7)) == expected


def test_what_is_not_finite_is_never_chosen_and_soon_forgotten(adapter, make_video, monkeypatch):
    nan = math.nan
    shifts_of(adapter.adapter, monkeypatch, [[0.4, nan, 0.8], [0.4, 0.1, nan], [0.4, nan, 0.1]])
    expected = [(0.0, 0.4)] * 3 + [(1.0, 0.1)] * 3 + [(2.0, 0.1)]
    assert records(adapter, make_video(num_frames=7)) == expected


def test_statistics_are_needed_and_have_to_fit(cfg, tiny_model, tmp_path):
    cfg.TTT.LN_ADAPT.SOURCE_STATISTICS = ""
    with pytest.raises(UserError, match=r"SOURCE_STATISTICS is empty.*measure_norm_statistics"):
        build_adapter(cfg, tiny_model)
    save_safetensors({"other.mean": torch.zeros(3)}, tmp_path / "other.safetensors")
    cfg.TTT.LN_ADAPT.SOURCE_STATISTICS = str(tmp_path / "other.safetensors")
    with pytest.raises(UserError, match=r"nothing that fits layer sem_seg_head\."):
        build_adapter(cfg, tiny_model)


def test_the_shipped_models_have_what_it_takes():
    for name in ("quick/stream_world.yaml", "quick/stream_world_panoptic.yaml"):
        config = load_config(name, method="online_ttt_mae_line_search")
        assert isinstance(build_adapter(config, load_source_model(config)), LineSearchAdapter)
