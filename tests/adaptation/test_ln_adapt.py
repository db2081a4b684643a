"""LN Adapt: channel statistics brought back to the source's, against the formulas by hand."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from detectron2.layers import FrozenBatchNorm2d
from torch import Tensor, nn

from ttt_video.adaptation import SlidingWindow, precision
from ttt_video.adaptation.ln_adapt import NormAdapter, ln_adapt
from ttt_video.adaptation.norm_statistics import (
    Statistics,
    channel_statistics,
    measure_statistics,
    norm_layers,
)
from ttt_video.config import load_config, merge_method
from ttt_video.errors import UserError
from ttt_video.modeling.weights import read_checkpoint
from ttt_video.stream import load_source_model


def seeded() -> torch.Generator:
    return torch.Generator()


class Toy(nn.Module):
    """One normalisation of the image's three colours; the prediction is its output."""

    device = torch.device("cpu")

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.backbone = nn.Sequential(norm)
        self.last = isinstance(norm, nn.LayerNorm)

    def forward(self, batch):
        (x,) = batch
        pixels = x["image"].float()[None]
        pixels = pixels.movedim(1, -1) if self.last else pixels
        out = self.backbone(pixels)
        return [{"pixels": out.movedim(-1, 1)[0] if self.last else out[0]}]

    def normalize(self, batch):
        return type("Images", (), {"tensor": batch[0]})

    def encode(self, frame):
        return self([frame])


def norm(kind: str) -> nn.Module:
    layer = {
        "layer": nn.LayerNorm(3),
        "group": nn.GroupNorm(1, 3),
        "batch": nn.BatchNorm2d(3),
        "frozen_batch": FrozenBatchNorm2d(3),
    }[kind]
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([1.0, 2.0, -0.5]))
        layer.bias.copy_(torch.tensor([0.3, 0.0, -1.0]))
        if "batch" in kind:
            layer.running_mean.copy_(torch.tensor([0.1, -0.2, 0.3]))
            layer.running_var.copy_(torch.tensor([1.0, 4.0, 0.25]))
    return layer


def frame(seed: int = 0) -> dict:
    random = torch.Generator().manual_seed(seed)
    image = torch.randn(3, 6, 8, generator=random) * torch.tensor([1.0, 3.0, 0.5])[:, None, None]
    return {"image": image + torch.tensor([2.0, 0.0, -1.0])[:, None, None]}


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.mean((1, 2)), x.var((1, 2), correction=0)


def adapter_of(kind: str, prior: float, source_seed: int = 9) -> tuple[NormAdapter, Toy]:
    model = Toy(norm(kind)).eval()
    source = measure_statistics(model, [frame(source_seed)["image"]], ["backbone"])
    return NormAdapter(model, source=source, prior=prior), model


def adapt(adapter: NormAdapter, window: SlidingWindow, sample: dict) -> Tensor:
    window.push(sample)
    adapter.adapt(window, seeded())
    return adapter.predict(sample)["pixels"]


@pytest.mark.parametrize(("given", "allowed"), [("fp32", False), ("bf16", False), ("tf32", True)])
def test_tf32_is_used_only_where_it_is_asked_for(monkeypatch, given, allowed):
    """Without a GPU the switches are there all the same; nothing is computed on one."""
    model, seen = Toy(norm("layer")).eval(), []
    forward = model.forward

    def noting(batch):
        seen.append(precision._allowed())
        return forward(batch)

    monkeypatch.setattr(model, "forward", noting)
    monkeypatch.setattr(Toy, "device", torch.device("cuda"))
    before = precision._allowed()
    try:
        for process in (True, False):
            precision._allow(process, process)
            source = measure_statistics(model, [frame(9)["image"]], ["backbone"])
            adapter = NormAdapter(model, source=source, prior=0.0, precision=given)
            window = SlidingWindow(1)
            window.push(frame(0))
            adapter.adapt(window, seeded())
            assert precision._allowed() == (process, process)
    finally:
        precision._allow(*before)
    assert seen == [(False, False), (allowed, allowed)] * 2


@pytest.mark.parametrize("kind", ["layer", "group"])
def test_output_has_the_sources_mean_and_variance(kind):
    """Without a prior the channels of the frame come out as those of the source did."""
    adapter, model = adapter_of(kind, prior=0.0)
    expected = moments(copy.deepcopy(model)([frame(9)])[0]["pixels"])
    got = moments(adapt(adapter, SlidingWindow(1), frame(0)))
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)
    before = moments(Toy(norm(kind))([frame(0)])[0]["pixels"])
    assert (got[0] - before[0]).abs().max() > 0.02  # else nothing was to be done


@pytest.mark.parametrize("kind", ["batch", "frozen_batch"])
def test_batch_norm_standardises_with_the_statistics_of_the_stream(kind):
    """Schneider et al. (2020), Equation 2, with N = 2 and n = 1."""
    adapter, _ = adapter_of(kind, prior=2.0)
    sample = frame(0)
    got = adapt(adapter, SlidingWindow(1), sample)
    mean, variance = moments(sample["image"])
    layer = norm(kind)
    mean = (2 * layer.running_mean + mean) / 3
    variance = (2 * layer.running_var + variance) / 3
    x = (sample["image"] - mean[:, None, None]) / (variance + layer.eps).sqrt()[:, None, None]
    expected = x * layer.weight[:, None, None] + layer.bias[:, None, None]
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_layer_norm_by_hand():
    adapter, _ = adapter_of("layer", prior=3.0)
    window = SlidingWindow(2)
    adapt(adapter, window, frame(5))  # leaves the window again
    adapt(adapter, window, frame(0))
    got = adapt(adapter, window, frame(1))

    def z(seed: int) -> Tensor:  # what the layer's scale and shift are applied to
        x = frame(seed)["image"]
        return (x - x.mean(0)) / (x.var(0, correction=0) + 1e-5).sqrt()

    source = moments(z(9))
    both = torch.cat([z(0), z(1)], dim=1)
    target = moments(both)
    mean, variance = ((3 * s + 2 * t) / 5 for s, t in zip(source, target, strict=True))
    scale = ((source[1] + 1e-5) / (variance + 1e-5)).sqrt()
    aligned = (z(1) - mean[:, None, None]) * scale[:, None, None] + source[0][:, None, None]
    layer = norm("layer")
    expected = aligned * layer.weight[:, None, None] + layer.bias[:, None, None]
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["layer", "group", "batch", "frozen_batch"])
def test_an_infinite_prior_is_the_frozen_model_bit_for_bit(kind):
    adapter, _ = adapter_of(kind, prior=math.inf)
    window = SlidingWindow(2)
    for seed in range(3):
        got = adapt(adapter, window, frame(seed))
        assert torch.equal(got, Toy(norm(kind)).eval()([frame(seed)])[0]["pixels"])


def test_a_stream_of_source_images_changes_nothing_much():
    adapter, _ = adapter_of("layer", prior=16.0)
    got = adapt(adapter, SlidingWindow(4), frame(9))
    torch.testing.assert_close(got, Toy(norm("layer"))([frame(9)])[0]["pixels"])
    assert adapter.adapt(window_with(frame(9)), seeded())["norm_shift"] < 1e-5
    assert adapter.adapt(window_with(frame(0)), seeded())["norm_shift"] > 0.01


def window_with(sample: dict) -> SlidingWindow:
    window = SlidingWindow(1)
    window.push(sample)
    return window


def test_pooled_statistics_are_those_of_all_pixels_together():
    parts = [frame(seed)["image"] for seed in range(3)]
    layer = nn.BatchNorm2d(3)
    pooled = Statistics.pooled([channel_statistics(layer, part[None]) for part in parts])
    torch.testing.assert_close(tuple(pooled), moments(torch.cat(parts, dim=1)))


# ---- on the model


def test_converges_on_a_stationary_stream(tiny_model, make_video, source):
    """Each layer settles a window after those before it; from then on nothing changes at all."""
    adapter, window = NormAdapter(tiny_model, source=source, prior=2.0), SlidingWindow(2)
    (sample,) = make_video(num_frames=1)
    states, moves = [], []
    for _ in range(60):
        window.push(sample)
        adapter.adapt(window, seeded())
        states.append({k: v.clone() for k, v in tiny_model.backbone.state_dict().items()})
        if len(states) > 1:
            pairs = zip(states[-1].values(), states[-2].values(), strict=True)
            moves.append(max(float((a - b).abs().max()) for a, b in pairs))
    assert moves[0] > 1e-4
    assert moves[-1] <= 1e-6


def test_f_alone_is_run_and_moved(tiny_model, make_video, source):
    tiny_model.sem_seg_head.register_forward_hook(lambda *_: pytest.fail("h ran"))
    adapter, window = NormAdapter(tiny_model, source=source, prior=2.0), SlidingWindow(2)
    before = {k: v.clone() for k, v in tiny_model.state_dict().items()}
    window.push(make_video()[0])
    adapter.adapt(window, seeded())
    moved = {k for k, v in tiny_model.state_dict().items() if not torch.equal(v, before[k])}
    layers = norm_layers(tiny_model, ["backbone"])
    assert moved == {f"{name}.{kind}" for name in layers for kind in ("weight", "bias")}
    assert not any(module._forward_hooks for module in tiny_model.backbone.modules())


def test_the_head_can_be_adapted_too(tiny_model, make_video, source):
    modules = ("backbone", "sem_seg_head")
    adapter = NormAdapter(tiny_model, source=source, prior=2.0, modules=modules)
    kinds = {type(layer) for layer in adapter.layers.values()}
    assert kinds == {nn.LayerNorm, nn.GroupNorm}
    before = {k: v.clone() for k, v in tiny_model.sem_seg_head.state_dict().items()}
    window = SlidingWindow(2)
    window.push(make_video()[0])
    adapter.adapt(window, seeded())
    assert any(
        not torch.equal(v, before[k]) for k, v in tiny_model.sem_seg_head.state_dict().items()
    )


def test_statistics_of_another_model_or_none_are_refused(tiny_cfg, tiny_model, source):
    some = {name: value for name, value in source.items() if "layers.2" not in name}
    with pytest.raises(UserError, match=r"nothing that fits layer backbone\.layers\.2"):
        NormAdapter(tiny_model, source=some, prior=1.0)
    wrong = {name: value[:-1] for name, value in source.items()}
    with pytest.raises(UserError, match="measure_norm_statistics"):
        NormAdapter(tiny_model, source=wrong, prior=1.0)
    merge_method(tiny_cfg, "ln_adapt")
    with pytest.raises(UserError, match=r"SOURCE_STATISTICS is empty.*measure_norm_statistics"):
        ln_adapt(tiny_cfg, tiny_model)
    with pytest.raises(UserError, match=r"no normalisation layers under \['criterion'\]"):
        NormAdapter(tiny_model, source=source, prior=1.0, modules=("criterion",))


def test_shipped_statistics_are_of_the_shipped_model():
    """They cover every layer of f and h, in the shapes that they have."""
    cfg = load_config("quick/stream_world.yaml", method="ln_adapt")
    adapter = ln_adapt(cfg, load_source_model(cfg))
    statistics = read_checkpoint(cfg.TTT.LN_ADAPT.SOURCE_STATISTICS)
    assert len(statistics) == 2 * len(norm_layers(adapter.model, ["backbone", "sem_seg_head"]))
    assert all(torch.isfinite(value).all() for value in statistics.values())
