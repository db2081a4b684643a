"""The head's signal and its distance from training images."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from ttt_video.adaptation.head_signal import (
    HeadSignal,
    SourceHead,
    length,
    measure_head,
    read_head,
)
from ttt_video.adaptation.norm_statistics import norm_layers
from ttt_video.errors import UserError
from ttt_video.modeling.weights import save_safetensors


def test_reads_channel_means_and_changes_no_bit(tiny_model, make_video):
    layers = norm_layers(tiny_model, ("h",))
    (frame,) = make_video("other", num_frames=1)
    outputs: dict[str, list] = {name: [] for name in layers}
    with torch.no_grad():
        plain = tiny_model([frame])[0]["sem_seg"]
        with HeadSignal(layers).reading() as reading:
            read = tiny_model([frame])[0]["sem_seg"]
        for name, layer in layers.items():
            layer.register_forward_hook(lambda m, x, out, name=name: outputs[name].append(out))
        tiny_model([frame])
    assert torch.equal(plain, read)
    expected = []
    for name, layer in layers.items():
        axis = -1 if isinstance(layer, nn.LayerNorm) else 1
        each = [out.movedim(axis, 0).flatten(1).mean(1) for out in outputs[name]]
        expected.append(sum(each) / len(each))
        layer._forward_hooks.clear()
    torch.testing.assert_close(reading.vector(), torch.cat(expected), rtol=1e-4, atol=1e-5)


def test_no_layer_no_signal(tiny_model):
    with HeadSignal(norm_layers(tiny_model, ("h",))).reading() as reading:
        pass
    assert reading.vector() is None


def test_the_distance_leaves_directions_of_training_images_out():
    """By hand, of three channels, one of which never changes."""
    head = SourceHead(
        {
            "mean": torch.tensor([1.0, 2.0, 3.0, 4.0]),
            "deviation": torch.tensor([2.0, 1.0, 0.5, 0.0]),
            "directions": torch.tensor([[1.0, 0.0, 0.0, 0.0]]),
            "level": torch.tensor([2.0]),
        }
    )
    rest = head.rest(torch.tensor([[9.0, 2.0, 3.0, 4.0], [1.0, 6.0, 3.0, 9.0]]))
    torch.testing.assert_close(rest, torch.tensor([[0.0] * 4, [0.0, 2.0, 0.0, 0.0]]))
    assert length(rest[1]) == 1.0


class Channels(nn.Module):
    """A model whose signal is the pictures' channel means, times three."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3, eps=0.0)
        nn.init.constant_(self.norm.weight, 3.0)

    def forward(self, inputs: list[dict]) -> None:
        self.norm(inputs[0]["image"][None].float())


def test_measures_what_numpy_does():
    draw = np.random.default_rng(0)
    content = draw.normal(0.0, 20.0, 40)  # one direction has most of the change
    means = 100 + content[:, None] * [1.0, 1.0, -1.0] + draw.normal(0.0, 1.0, (40, 3))
    images = [torch.tensor(m, dtype=torch.float32).view(3, 1, 1).expand(3, 2, 2) for m in means]
    found = measure_head(Channels(), images, ["norm"])
    fitted = 3 * means[:30]
    np.testing.assert_allclose(found["mean"], fitted.mean(0), rtol=1e-5)
    np.testing.assert_allclose(found["deviation"], fitted.std(0, ddof=1), rtol=1e-4)
    np.testing.assert_allclose(found["image_mean"], means.mean(0), rtol=1e-5)
    np.testing.assert_allclose(found["image_deviation"], 0.0, atol=1e-4)
    first = found["directions"][0].float().numpy()
    np.testing.assert_allclose(first * np.sign(first[0]), np.array([1, 1, -1]) / 3**0.5, atol=0.02)
    # All three directions are left out of three channels: nothing is left but rounding.
    assert found["directions"].shape == (3, 3)


def test_a_usual_picture_is_at_distance_one():
    generator = torch.Generator().manual_seed(0)

    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(60)

        def forward(self, inputs: list[dict]) -> None:
            self.norm(inputs[0]["image"].mean() + torch.randn(1, 60, 1, 1, generator=generator))

    images = [torch.full((3, 2, 2), float(value)) for value in range(40)]
    head = SourceHead(measure_head(Wide(), images, ["norm"]))
    others = torch.randn(50, 60, generator=generator) / (1 + 1e-5) ** 0.5 + 20
    lengths = torch.tensor([length(head.rest(one)) for one in others])
    assert 0.8 < lengths.median() < 1.2
    assert length(head.rest(others[0] + 5 * torch.randn(60, generator=generator))) > 2


def test_mistakes_are_told_in_a_line(tmp_path):
    images = [torch.zeros(3, 2, 2)] * 7
    with pytest.raises(UserError, match=r"7 images .*at least 8"):
        measure_head(Channels(), images, ["norm"])
    with pytest.raises(UserError, match=r"SOURCE_HEAD is empty: .*--head FILE"):
        read_head("", Channels(), 3)
    file = tmp_path / "head.safetensors"
    save_safetensors(measure_head(Channels(), images * 2, ["norm"]), file)
    assert set(read_head(str(file), Channels(), 3).tensors) >= {"mean", "level"}
    with pytest.raises(UserError, match=r"head.safetensors does not fit .* 4 channels"):
        read_head(str(file), Channels(), 4)
    save_safetensors({"mean": torch.zeros(3)}, file)
    with pytest.raises(UserError, match="does not fit"):
        read_head(str(file), Channels(), 3)
