"""The pixel decoder: order of levels, sizes, wiring, and what must not mix."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from detectron2.layers import ShapeSpec

from ttt_video.modeling.pixel_decoder import (
    PIXEL_DECODER_REGISTRY,
    EncoderSizes,
    MSDeformAttnPixelDecoder,
    pixel_centres,
)

SHAPES = {
    "res2": ShapeSpec(channels=5, stride=4),
    "res3": ShapeSpec(channels=6, stride=8),
    "res4": ShapeSpec(channels=7, stride=16),
    "res5": ShapeSpec(channels=8, stride=32),
}


def make(*, dropout: float = 0.0, **changes) -> MSDeformAttnPixelDecoder:
    torch.manual_seed(0)
    options = {
        "in_features": ["res2", "res3", "res4", "res5"],
        "transformer_in_features": ["res3", "res4", "res5"],
        "dim": 32,
        "mask_dim": 10,
        "norm": "GN",
        "common_stride": 4,
        "encoder": EncoderSizes(layers=2, heads=4, points=2, feedforward=24, dropout=dropout),
    }
    decoder = MSDeformAttnPixelDecoder(SHAPES, **(options | changes))
    for layer in decoder.transformer.encoder.layers:  # offsets that depend on the query
        torch.nn.init.normal_(layer.self_attn.sampling_offsets.weight, std=0.3)
        torch.nn.init.normal_(layer.self_attn.attention_weights.weight, std=0.3)
    return decoder


def features(height: int = 64, width: int = 96, batch: int = 2, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(
            batch, s.channels, -(-height // s.stride), -(-width // s.stride), generator=generator
        )
        for name, s in SHAPES.items()
    }


def test_pixel_centres():
    expected = [
        (0.25, 1 / 6),
        (0.75, 1 / 6),
        (0.25, 0.5),
        (0.75, 0.5),
        (0.25, 5 / 6),
        (0.75, 5 / 6),
    ]
    torch.testing.assert_close(
        pixel_centres(3, 2, torch.device("cpu")), torch.tensor(expected), rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("size", [(64, 96), (50, 70), (32, 32), (1, 33)], ids=str)
def test_sizes_from_coarse_to_fine(size):
    inputs = features(*size)
    mask_features, levels = make()(inputs)
    assert mask_features.shape == (2, 10, *inputs["res2"].shape[-2:])
    assert [level.shape for level in levels] == [
        (2, 32, *inputs[name].shape[-2:]) for name in ("res5", "res4", "res3")
    ]


def test_the_order_of_names_in_the_config_does_not_matter():
    """Features are ordered by their stride."""
    shuffled = make(
        in_features=["res4", "res2", "res5", "res3"],
        transformer_in_features=["res5", "res3", "res4"],
    )
    expected = make()(features())
    found = shuffled(features())
    assert torch.equal(found[0], expected[0])
    for level, other in zip(found[1], expected[1], strict=True):
        assert torch.equal(level, other)


def test_fpn_by_hand():
    """Lateral 1x1 and norm, plus the finest level upsampled; 3x3, norm, ReLU; a last 1x1."""
    decoder = make()
    inputs = features()
    mask_features, levels = decoder(inputs)
    state = decoder.state_dict()

    def conv_norm(x, name, padding):
        x = F.conv2d(x, state[f"{name}.weight"], padding=padding)
        return F.group_norm(x, 32, state[f"{name}.norm.weight"], state[f"{name}.norm.bias"])

    lateral = conv_norm(inputs["res2"], "adapter_1", 0)
    merged = lateral + F.interpolate(levels[-1], (16, 24), mode="bilinear", align_corners=False)
    merged = conv_norm(merged, "layer_1", 1).relu()
    expected = F.conv2d(merged, state["mask_features.weight"], state["mask_features.bias"])
    torch.testing.assert_close(mask_features, expected)


def test_a_longer_fpn_numbers_its_modules_from_the_finest_feature():
    decoder = make(transformer_in_features=["res4", "res5"])
    state = decoder.state_dict()
    assert state["adapter_1.weight"].shape[1] == SHAPES["res2"].channels
    assert state["adapter_2.weight"].shape[1] == SHAPES["res3"].channels
    mask_features, levels = decoder(features())
    assert mask_features.shape == (2, 10, 16, 24)
    assert len(levels) == 2


def test_without_norm_the_convolutions_have_a_bias():
    state = make(norm="").state_dict()
    assert "adapter_1.bias" in state
    assert not any(name.startswith("adapter_1.norm") for name in state)
    assert "adapter_1.bias" not in make().state_dict()


def test_images_of_a_batch_do_not_mix():
    decoder = make()
    both = decoder(features())
    for i in range(2):
        alone = decoder({k: v[i : i + 1] for k, v in features().items()})
        torch.testing.assert_close(alone[0], both[0][i : i + 1], rtol=1e-4, atol=1e-5)


def test_every_level_sees_every_other():
    """A change of one feature reaches all three levels through the attention."""
    decoder = make()
    _, before = decoder(features())
    for name in ("res3", "res4", "res5"):
        changed = features()
        changed[name] = changed[name] + torch.randn(changed[name].shape)
        for level, old in zip(decoder(changed)[1], before, strict=True):
            assert (level - old).abs().max() > 1e-3


def test_dropout_in_training_only():
    decoder = make(dropout=0.3)
    assert not torch.equal(decoder(features())[0], decoder(features())[0])
    decoder.eval()
    assert torch.equal(decoder(features())[0], decoder(features())[0])


def test_gradients_reach_every_parameter():
    decoder = make()
    mask_features, levels = decoder(features())
    sum(x.square().mean() for x in (mask_features, *levels)).backward()
    for name, parameter in decoder.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def test_keys_of_the_config(tiny_cfg):
    head = tiny_cfg.MODEL.SEM_SEG_HEAD
    head.CONVS_DIM, head.MASK_DIM, head.TRANSFORMER_ENC_LAYERS = 64, 12, 3
    head.DEFORMABLE_TRANSFORMER_ENCODER_DIM_FEEDFORWARD = 40
    head.DEFORMABLE_TRANSFORMER_ENCODER_N_POINTS = 3
    tiny_cfg.MODEL.MASK_FORMER.NHEADS = 8
    decoder = PIXEL_DECODER_REGISTRY.get("MSDeformAttnPixelDecoder")(tiny_cfg, SHAPES)
    layers = decoder.transformer.encoder.layers
    assert len(layers) == 3
    assert layers[0].linear1.weight.shape == (40, 64)
    assert layers[0].self_attn.num_points == 3
    assert layers[0].self_attn.num_heads == 8
    assert decoder.mask_features.weight.shape == (12, 64, 1, 1)
