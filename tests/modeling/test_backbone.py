"""The encoder against detectron2's plain Swin, and a ResNet in its place."""

from __future__ import annotations

import copy

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_model
from detectron2.modeling.backbone.swin import (
    BasicLayer,
    SwinTransformer,
    SwinTransformerBlock,
    window_partition,
)
from torchvision.ops import StochasticDepth

from ttt_video.errors import UserError
from ttt_video.modeling.backbone import (
    FastSwinBlock,
    SwinTransformerTTT,
)
from ttt_video.modeling.windows import ToTokens, ToWindows, shift_mask, window_places

SWIN = {
    "in_chans": 4,
    "embed_dim": 12,
    "depths": [2, 2, 2, 2],
    "num_heads": [1, 2, 3, 4],
    "window_size": 7,
}
NAMES = ["res2", "res3", "res4", "res5"]


def pair(**changes) -> tuple[SwinTransformerTTT, SwinTransformer]:
    """Ours and detectron2's with the same weights, biases large enough to matter, in eval mode."""
    torch.manual_seed(0)
    ours = SwinTransformerTTT(out_features=NAMES, **(SWIN | changes))
    for name, parameter in ours.named_parameters():
        if name.endswith("relative_position_bias_table"):
            torch.nn.init.normal_(parameter)
    plain = SwinTransformer(drop_path_rate=0.0, **(SWIN | changes))
    plain.load_state_dict(ours.state_dict())  # strict: the names are detectron2's
    ours.eval()  # detectron2's returns None
    plain.eval()
    return ours, plain


def noise(*size: int) -> torch.Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("size", [(96, 160), (250, 333), (33, 4)], ids=str)
def test_features_equal_detectron2s(size):
    ours, plain = pair()
    with torch.no_grad():
        features, expected = ours(noise(2, 4, *size)), plain(noise(2, 4, *size))
    assert list(features) == NAMES
    for i, name in enumerate(NAMES):
        torch.testing.assert_close(features[name], expected[f"p{i}"], rtol=0, atol=1e-5)
        height, width = (-(-side // (4 * 2**i)) for side in size)
        assert features[name].shape == (2, 12 * 2**i, height, width)


@pytest.mark.parametrize("frozen", [False, True], ids=["biases learn", "biases are frozen"])
@pytest.mark.parametrize("side", [4, 7])
def test_gradients_equal_detectron2s(side, frozen):
    """Those of the relative position biases too, which fused attention takes as its mask."""
    ours, plain = pair(window_size=side)
    x = noise(1, 4, 70, 90)
    for model in (ours, plain):
        for layer in model.layers if frozen else ():
            for block in layer.blocks:
                block.attn.relative_position_bias_table.requires_grad_(False)
        sum((f * noise(*f.shape)).sum() for f in model(x).values()).backward()
    expected = dict(plain.named_parameters())
    for name, parameter in ours.named_parameters():
        reference = expected[name].grad
        if frozen and name.endswith("table"):
            assert parameter.grad is reference is None
            continue
        scale = reference.abs().max().clamp(min=1e-3)
        torch.testing.assert_close(
            parameter.grad / scale, reference / scale, rtol=0, atol=1e-4, msg=name
        )


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("qk_scale", [None, 0.3])
@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("size", [(6, 9), (5, 7)], ids=["whole", "padded"])
def test_block_equals_detectron2s(size, shift, qk_scale, bias):
    """Padded maps too, whose padding takes part in the attention with the projection's bias."""
    torch.manual_seed(0)
    plain = SwinTransformerBlock(
        8, num_heads=2, window_size=3, shift_size=shift, qkv_bias=bias, qk_scale=qk_scale
    )
    for parameter in plain.parameters():
        torch.nn.init.normal_(parameter)
    plain.H, plain.W = size
    fast = copy.deepcopy(plain)
    fast.__class__ = FastSwinBlock
    x = noise(2, size[0] * size[1], 8)
    mask = torch.where(noise(6, 9, 9) > 1, -100.0, 0.0)
    torch.testing.assert_close(fast(x, mask), plain(x, mask), rtol=1e-5, atol=1e-4)


def test_padding_is_not_multiplied():
    """5 x 7 tokens in 6 x 9 places: the projections of a block see 35 rows each."""
    block = SwinTransformerBlock(8, num_heads=2, window_size=3)
    block.__class__ = FastSwinBlock
    block.H, block.W = 5, 7
    seen = []
    for layer in (block.attn.qkv, block.attn.proj):
        layer.register_forward_hook(lambda layer, args, out: seen.append(out.numel() // 35))
    block(noise(1, 35, 8), noise(6, 9, 9))
    assert seen == [24, 8]


@pytest.mark.parametrize(("height", "width"), [(4, 4), (8, 12), (5, 9), (3, 17), (1, 1)])
@pytest.mark.parametrize(("side", "shift"), [(4, 2), (7, 3), (2, 1)])
def test_mask_of_a_stage_equals_detectron2s(monkeypatch, height, width, side, shift):
    stage = BasicLayer(8, 2, 2, window_size=side, drop_path=0.0)
    seen = []
    monkeypatch.setattr(stage.blocks[1], "forward", lambda x, mask: seen.append(mask) or x)
    stage(torch.randn(1, height * width, 8), height, width)
    assert stage.shift_size == shift
    mask = shift_mask(height, width, side, shift, torch.device("cpu"))
    assert torch.equal(mask, seen[0])
    assert shift_mask(height, width, side, shift, torch.device("cpu")) is mask


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("filled", [True, False])
@pytest.mark.parametrize(("height", "width", "shift"), [(6, 6, 0), (6, 6, 1), (5, 7, 1), (1, 2, 2)])
def test_tokens_go_to_their_windows_and_back(batch, filled, height, width, shift):
    """Places against detectron2's partition, and gradients against differences."""
    places = window_places(height, width, 3, shift, torch.device("cpu"))
    x = noise(batch, height * width, 2).double().requires_grad_()
    fill = torch.tensor([7.0, 8.0], dtype=torch.float64, requires_grad=True) if filled else None
    windows = ToWindows.apply(x, fill, places)
    assert torch.equal(ToTokens.apply(windows, places), x)

    padded = torch.zeros(batch, -(-height // 3) * 3, -(-width // 3) * 3, 2, dtype=torch.float64)
    padded += 0 if fill is None else fill.detach()
    padded[:, :height, :width] = x.detach().view(batch, height, width, 2)
    expected = window_partition(padded.roll((-shift, -shift), (1, 2)), 3)
    assert torch.equal(windows.view(expected.shape), expected)

    inputs = (x, fill) if filled else (x,)
    assert torch.autograd.gradcheck(lambda x, f=None: ToWindows.apply(x, f, places), inputs)
    assert torch.autograd.gradcheck(
        lambda x: ToTokens.apply(x, places), windows.detach().requires_grad_()
    )


def test_dropout_of_attention_in_training_only():
    torch.manual_seed(0)
    block = SwinTransformerBlock(8, num_heads=2, window_size=2, attn_drop=0.5)
    block.__class__ = FastSwinBlock
    block.H = block.W = 2
    x, mask = noise(1, 4, 8), torch.zeros(1, 4, 4)
    assert not torch.equal(block(x, mask), block(x, mask))
    block.eval()
    assert torch.equal(block(x, mask), block(x, mask))


@pytest.mark.parametrize("grad", [False, True], ids=["fused", "by products"])
def test_bfloat16_is_close(grad):
    ours, _ = pair()
    x = noise(1, 4, 64, 64)
    with torch.set_grad_enabled(grad):
        expected = ours(x)
        with torch.autocast("cpu", torch.bfloat16):
            features = ours(x)
    for name in NAMES:
        torch.testing.assert_close(features[name].float(), expected[name], rtol=0, atol=0.1)
        assert features[name].requires_grad == grad


# ---- parameters and names


def test_parameters_are_detectron2s_with_four_channels():
    ours, _ = pair()
    assert ours.patch_embed.proj.weight.shape == (12, 4, 4, 4)
    plain = SwinTransformer(drop_path_rate=0.0, **(SWIN | {"in_chans": 3}))
    names = {k: v.shape for k, v in plain.state_dict().items()}
    names["patch_embed.proj.weight"] = torch.Size([12, 4, 4, 4])
    assert {k: v.shape for k, v in ours.state_dict().items()} == names


def test_the_fourth_channel_is_read():
    ours, _ = pair()
    x = noise(1, 4, 32, 32)
    hidden = x.clone()
    hidden[:, 3] += 1
    assert not torch.allclose(ours(x)["res5"], ours(hidden)["res5"])


def test_some_features():
    ours = SwinTransformerTTT(out_features=["res4", "res5"], **SWIN)
    assert list(ours(noise(1, 4, 32, 32))) == ["res4", "res5"]
    assert ours.output_shape() == {
        "res4": ShapeSpec(channels=48, stride=16),
        "res5": ShapeSpec(channels=96, stride=32),
    }
    assert ours.size_divisibility == 32


def test_unknown_features():
    with pytest.raises(UserError, match=r"OUT_FEATURES has \['p2'\]; choose among \['res2'"):
        SwinTransformerTTT(out_features=["p2", "res5"], **SWIN)


def test_every_key_of_the_config_is_read(tiny_cfg):
    swin = tiny_cfg.MODEL.SWIN
    swin.DEPTHS, swin.PATCH_NORM, swin.APE, swin.QKV_BIAS = [1, 2, 1, 1], False, True, False
    swin.MLP_RATIO, swin.QK_SCALE, swin.DROP_RATE, swin.ATTN_DROP_RATE = 2.0, 0.7, 0.1, 0.2
    swin.PRETRAIN_IMG_SIZE, swin.USE_CHECKPOINT, swin.OUT_FEATURES = 64, True, ["res3", "res5"]
    backbone = SwinTransformerTTT(tiny_cfg, ShapeSpec(channels=4))
    block = backbone.layers[1].blocks[1]
    assert [len(layer.blocks) for layer in backbone.layers] == [1, 2, 1, 1]
    assert backbone.patch_embed.norm is None
    assert backbone.absolute_pos_embed.shape == (1, 16, 16, 16)
    assert block.attn.qkv.bias is None
    assert block.attn.scale == 0.7
    assert (block.attn.attn_drop.p, block.mlp.drop.p, backbone.pos_drop.p) == (0.2, 0.1, 0.1)
    assert block.mlp.fc1.out_features == 2 * 32
    assert backbone.layers[0].use_checkpoint
    assert list(backbone.output_shape()) == ["res3", "res5"]


def test_three_channels_are_refused(tiny_cfg):
    tiny_cfg.MODEL.SWIN.IN_CHANS = 3
    with pytest.raises(UserError, match=r"IN_CHANS is 3.*set MODEL\.SWIN\.IN_CHANS to 4"):
        build_model(tiny_cfg)


# ---- stochastic depth and checkpointing


def test_stochastic_depth_grows_with_depth():
    """As in Swin: linear from 0 at the first block to the rate at the last."""
    ours = SwinTransformerTTT(out_features=NAMES, drop_path_rate=0.7, **SWIN)
    rates = [
        block.drop_path.p if isinstance(block.drop_path, StochasticDepth) else 0.0
        for layer in ours.layers
        for block in layer.blocks
    ]
    assert rates == pytest.approx([0.1 * i for i in range(8)])


def test_stochastic_depth_in_training_only():
    """Each image of a batch loses other blocks."""
    torch.manual_seed(0)
    ours = SwinTransformerTTT(out_features=NAMES, drop_path_rate=0.7, **SWIN)
    x = noise(1, 4, 32, 32).expand(6, -1, -1, -1)
    first, *others = ours(x)["res5"]
    assert not all(torch.allclose(first, other, atol=1e-4) for other in others)
    ours.eval()
    first, *others = ours(x)["res5"]
    for other in others:
        torch.testing.assert_close(first, other, rtol=0, atol=1e-5)


def test_checkpointing_changes_no_gradient():
    gradients = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        ours = SwinTransformerTTT(
            out_features=NAMES, drop_path_rate=0.5, use_checkpoint=checkpointed, **SWIN
        )
        torch.manual_seed(1)
        features = ours(noise(2, 4, 40, 64))["res5"]
        (features * noise(*features.shape)).sum().backward()
        gradients.append([p.grad for p in ours.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) > 50
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, plain, rtol=1e-3, atol=1e-4)


# ---- another backbone


@pytest.mark.parametrize("norm", ["FrozenBN", "BN"])
def test_resnet_with_four_channels_trains_and_predicts(tiny_cfg, norm):
    tiny_cfg.merge_from_list(
        [
            "MODEL.BACKBONE.NAME", "build_resnet_backbone",
            "MODEL.RESNETS.DEPTH", 18,
            "MODEL.RESNETS.RES2_OUT_CHANNELS", 64,
            "MODEL.RESNETS.STEM_OUT_CHANNELS", 64,
            "MODEL.RESNETS.OUT_FEATURES", NAMES,
            "MODEL.RESNETS.NORM", norm,
        ]
    )  # fmt: skip
    torch.manual_seed(0)
    model = build_model(tiny_cfg)
    assert model.backbone.stem.conv1.weight.shape == (64, 4, 7, 7)
    image = torch.randint(0, 256, (3, 50, 70), dtype=torch.uint8)
    inputs = [{"image": image, "sem_seg": torch.arange(3500).view(50, 70) // 1200}] * 2
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    before = model.backbone.stem.conv1.weight.detach().clone()
    losses = model(inputs)
    assert "loss_recon" in losses
    sum(losses.values()).backward()
    optimizer.step()
    change = (model.backbone.stem.conv1.weight - before).abs().sum((0, 2, 3))
    assert (change > 0).all()  # all four channels learn
    model.eval()
    with torch.no_grad():
        (result,) = model(inputs[:1])
        (pictures,) = model.reconstruct(inputs[:1])
    assert result["sem_seg"].shape == (19, 50, 70)
    assert result["sem_seg"].isfinite().all()
    assert pictures["recon"].shape == (3, 50, 70)
