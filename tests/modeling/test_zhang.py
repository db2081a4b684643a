"""Zhang et al.'s colorization network: its published names, its layers one by one, its pictures."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from detectron2.modeling import META_ARCH_REGISTRY, build_model
from model_contract import FrozenModelContract, image

from ttt_video.adaptation.base import build_adapter
from ttt_video.color.lab import lightness, rgb_to_lab, to_grey
from ttt_video.config import load_config, merge_method
from ttt_video.errors import UserError
from ttt_video.modeling import ZhangColorizer
from ttt_video.modeling.weights import load_weights, save_safetensors
from ttt_video.stream import load_source_model
from ttt_video.stream.loop import Stream
from ttt_video.tasks.outputs import scores_are_finite

# Outputs, inputs and kernel of the published convolutions, and channels of the batch norms.
CONVOLUTIONS = {
    "model1": {0: (64, 1, 3), 2: (64, 64, 3)},
    "model2": {0: (128, 64, 3), 2: (128, 128, 3)},
    "model3": {0: (256, 128, 3), 2: (256, 256, 3), 4: (256, 256, 3)},
    "model4": {0: (512, 256, 3), 2: (512, 512, 3), 4: (512, 512, 3)},
    "model5": {0: (512, 512, 3), 2: (512, 512, 3), 4: (512, 512, 3)},
    "model6": {0: (512, 512, 3), 2: (512, 512, 3), 4: (512, 512, 3)},
    "model7": {0: (512, 512, 3), 2: (512, 512, 3), 4: (512, 512, 3)},
    # The first is transposed: its inputs come first.
    "model8": {0: (512, 256, 4), 2: (256, 256, 3), 4: (256, 256, 3), 6: (313, 256, 1)},
}
NORMS = {"model1.4": 64, "model2.4": 128, "model3.6": 256} | dict.fromkeys(
    (f"model{i}.6" for i in range(4, 8)), 512
)


def published() -> dict[str, tuple[int, ...]]:
    """Every name in the authors' file, with its shape."""
    shapes: dict[str, tuple[int, ...]] = {"model_out.weight": (2, 313, 1, 1)}
    for block, layers in CONVOLUTIONS.items():
        for number, (first, second, kernel) in layers.items():
            shapes[f"{block}.{number}.weight"] = (first, second, kernel, kernel)
            shapes[f"{block}.{number}.bias"] = (second if kernel == 4 else first,)
    for name, channels in NORMS.items():
        for own in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"{name}.{own}"] = (channels,)
    return shapes


def published_names(model) -> dict[str, torch.Tensor]:
    return {name.split(".", 1)[1]: value for name, value in model.state_dict().items()}


@pytest.fixture(scope="module")
def small() -> ZhangColorizer:
    """Has few channels, and statistics that show a mix-up."""
    generator = torch.Generator().manual_seed(0)
    model = ZhangColorizer(width=4).eval()
    for name, value in model.state_dict().items():
        if name.endswith("running_var"):
            value.uniform_(0.01, 0.1, generator=generator)
        elif value.dim() == 1:
            value.normal_(0, 0.1, generator=generator)
        elif value.dim() > 1:
            value.normal_(0, (2 / value[0].numel()) ** 0.5, generator=generator)
    model.head.model8[6].weight.data.mul_(5)
    model.head.model_out.weight.data.uniform_(-1, 1, generator=generator)
    return model


@pytest.fixture
def model(small):
    return copy.deepcopy(small)


def config(*opts):
    return load_config("baselines/zhang2016_color.yaml", opts=["MODEL.DEVICE", "cpu", *opts])


class TestContract(FrozenModelContract):
    """Returns those of a small network."""


def test_the_published_file_loads_as_it_is(tmp_path):
    with torch.device("meta"):
        own = published_names(ZhangColorizer())
    shapes = {n: tuple(t.shape) for n, t in own.items() if not n.endswith("num_batches_tracked")}
    assert shapes == published()
    file = {name: torch.zeros(1).expand(shape) for name, shape in published().items()}
    file["model_out.weight"] = torch.arange(626.0).reshape(2, 313, 1, 1)
    torch.save(file, tmp_path / "colorization_release_v2-9b330a0b.pth")
    path = str(tmp_path / "colorization_release_v2-9b330a0b.pth")
    model = load_source_model(config("MODEL.WEIGHTS", path))
    assert isinstance(model, ZhangColorizer)
    assert torch.equal(model.head.model_out.weight, file["model_out.weight"])
    assert not model.encoder.model7[6].weight.any()
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(32.2, abs=0.05)
    del file["model8.6.bias"]
    torch.save(file, path)
    with pytest.raises(UserError, match="1 of the model are missing"):
        load_source_model(config("MODEL.WEIGHTS", path))


def test_its_own_files_load_too(model, tmp_path):
    save_safetensors(model.state_dict(), tmp_path / "own.safetensors")
    weights = ZhangColorizer.read_weights(str(tmp_path / "own.safetensors"))
    other = ZhangColorizer(width=4)
    load_weights(other, weights)
    assert all(torch.equal(v, weights[name]) for name, v in other.state_dict().items())
    assert weights.keys() == model.state_dict().keys()


def by_hand(weights: dict[str, torch.Tensor], levels: torch.Tensor) -> torch.Tensor:
    """ab of lightness, layer by layer from the published names."""
    x = (levels - 50) / 100
    for block in range(1, 8):
        numbers = list(CONVOLUTIONS[f"model{block}"])
        for number in numbers:
            name = f"model{block}.{number}"
            stride = 2 if block <= 3 and number == numbers[-1] else 1
            by = 2 if block in (5, 6) else 1
            args = (weights[f"{name}.weight"], weights[f"{name}.bias"], stride, by, by)
            x = F.conv2d(x, *args).relu()
        name = f"model{block}.{numbers[-1] + 2}"
        mean, variance, scale, shift = (
            weights[f"{name}.{own}"][:, None, None]
            for own in ("running_mean", "running_var", "weight", "bias")
        )
        x = (x - mean) / (variance + 1e-5).sqrt() * scale + shift
    x = F.conv_transpose2d(
        x, weights["model8.0.weight"], weights["model8.0.bias"], stride=2, padding=1
    ).relu()
    for number in (2, 4):
        name = f"model8.{number}"
        x = F.conv2d(x, weights[f"{name}.weight"], weights[f"{name}.bias"], padding=1).relu()
    x = F.conv2d(x, weights["model8.6.weight"], weights["model8.6.bias"])
    probs = x.exp() / x.exp().sum(1, keepdim=True)
    ab = 110 * torch.einsum("bqhw,cq->bchw", probs, weights["model_out.weight"][..., 0, 0])
    size = [4 * side for side in ab.shape[2:]]
    return F.interpolate(ab, size, mode="bilinear", align_corners=False)


@pytest.mark.parametrize("size", [(37, 51), (40, 56), (1, 9)])
@torch.no_grad()
def test_it_is_its_layers_one_by_one(model, size):
    levels = lightness(image(*size)).double()[None]
    actual = model.double().ab(levels)
    assert actual.shape == (1, 2, *(-(-side // 8) * 8 for side in size))
    torch.testing.assert_close(actual, by_hand(published_names(model), levels))
    assert actual.std() > 1 or size == (1, 9)


@torch.no_grad()
def test_colours_lie_over_the_lightness_of_the_frame(model):
    picture = image(45, 70)[:1].expand(3, -1, -1)
    (output,) = model([{"image": picture}])
    assert output["color"].shape == (3, 45, 70)
    assert output["color"].dtype == torch.uint8
    levels = lightness(picture)
    stretched = F.interpolate(
        by_hand(published_names(model), levels[None]), (45, 70), mode="bilinear"
    )[0]
    color = pytest.importorskip("skimage.color")
    lab = torch.cat([levels, stretched]).double().numpy()
    expected = color.lab2rgb(lab, channel_axis=0)
    np.testing.assert_allclose(output["color"].numpy(), 255 * expected, atol=0.55)


@torch.no_grad()
def test_a_resized_frame_keeps_its_own_lightness(model):
    grey = image(50, 90, 1)[:1]
    small = image(25, 45)[:1].expand(3, -1, -1)
    frame = {"image": small, "height": 50, "width": 90}
    sharp, soft = model([{**frame, "grey": grey}, frame])
    model.head.model_out.weight.zero_()  # no colours
    (plain,) = model([{**frame, "grey": grey}])
    assert torch.equal(plain["color"], grey.expand(3, -1, -1))
    assert sharp["color"].shape == soft["color"].shape == (3, 50, 90)
    assert not torch.equal(sharp["color"], soft["color"])


@torch.no_grad()
def test_nothing_but_lightness_is_looked_at(model):
    red = torch.zeros(3, 16, 24, dtype=torch.uint8)
    red[0, :, :12], red[0, :, 12:] = 246, 140
    grey = to_grey(red).expand(3, -1, -1)
    plain, coloured, labelled = model(
        [{"image": grey}, {"image": red}, {"image": grey, "original": red}]
    )
    assert torch.equal(labelled["color"], plain["color"])
    difference = rgb_to_lab(coloured["color"]) - rgb_to_lab(plain["color"])
    assert difference.abs().max() < 3  # the grey is rounded to 8 bits; a of red itself is 78


def test_it_streams_and_methods_that_train_refuse(model, make_video):
    cfg = config()
    for result in Stream.from_config(cfg, model).run(make_video(num_frames=2)):
        assert result.output["color"].shape == (3, 64, 96)
    merge_method(cfg, "online_ttt_mae")
    with pytest.raises(UserError, match="use --method"):
        build_adapter(cfg, model)


def test_batch_norm_is_re_estimated(model, make_video):
    before = copy.deepcopy(model.state_dict())
    cfg = config("TTT.METHOD", "ln_adapt")
    for result in Stream.from_config(cfg, model).run(make_video(num_frames=2)):
        assert result.record["norm_shift"] > 0
    moved = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert moved == {
        f"encoder.{name}.{own}" for name in NORMS for own in ("running_mean", "running_var")
    }


def test_what_it_cannot_do_is_said_in_a_line(model):
    with pytest.raises(UserError, match="ZhangColorizer is a frozen baseline"):
        model.train()([{"image": image(8, 8)}])
    with pytest.raises(UserError, match=r'INPUT\.FORMAT is "BGR"'):
        build_model(config("INPUT.FORMAT", "BGR"))
    assert META_ARCH_REGISTRY.get("ZhangColorizer") is ZhangColorizer


@torch.no_grad()
def test_broken_weights_are_seen(model):
    assert scores_are_finite(model([{"image": image(37, 51)}])[0])
    next(model.parameters()).fill_(float("nan"))
    assert not scores_are_finite(model([{"image": image(37, 51)}])[0])
