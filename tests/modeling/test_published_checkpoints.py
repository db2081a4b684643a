"""The full Swin-S model has the names and shapes of the published checkpoints, written by rules."""

from __future__ import annotations

import pytest
import torch
from detectron2.modeling import build_model
from torch import Tensor

from ttt_video.config import load_config
from ttt_video.modeling.weights import load_weights


def norm(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def linear(name: str, out: int, *inputs: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (out, *inputs), f"{name}.bias": (out,)}


def swin_small_shapes(channels: int) -> dict[str, tuple[int, ...]]:
    """Swin-S: 96 channels, doubled at each of 3 mergings; 2, 2, 18, 2 blocks; windows of 7."""
    shapes = linear("patch_embed.proj", 96, channels, 4, 4) | norm("patch_embed.norm", 96)
    for i, (depth, heads) in enumerate([(2, 3), (2, 6), (18, 12), (2, 24)]):
        width = 96 * 2**i
        for j in range(depth):
            block = f"layers.{i}.blocks.{j}"
            shapes |= norm(f"{block}.norm1", width) | norm(f"{block}.norm2", width)
            shapes |= linear(f"{block}.attn.qkv", 3 * width, width)
            shapes |= linear(f"{block}.attn.proj", width, width)
            shapes |= linear(f"{block}.mlp.fc1", 4 * width, width)
            shapes |= linear(f"{block}.mlp.fc2", width, 4 * width)
            shapes[f"{block}.attn.relative_position_bias_table"] = (13 * 13, heads)
            shapes[f"{block}.attn.relative_position_index"] = (49, 49)
        if i < 3:
            shapes[f"layers.{i}.downsample.reduction.weight"] = (2 * width, 4 * width)
            shapes |= norm(f"layers.{i}.downsample.norm", 4 * width)
        shapes |= norm(f"norm{i}", width)
    return {f"backbone.{name}": shape for name, shape in shapes.items()}


def head_shapes(prefix: str, queries: int, classes: int | None) -> dict[str, tuple[int, ...]]:
    """6 deformable encoder layers, 9 decoder layers, 256 channels, 8 heads, 4 points, 3 levels."""
    shapes: dict[str, tuple[int, ...]] = {"pixel_decoder.transformer.level_embed": (3, 256)}
    for i, width in enumerate([768, 384, 192]):
        shapes |= linear(f"pixel_decoder.input_proj.{i}.0", 256, width, 1, 1)
        shapes |= norm(f"pixel_decoder.input_proj.{i}.1", 256)
    for i in range(6):
        layer = f"pixel_decoder.transformer.encoder.layers.{i}"
        shapes |= linear(f"{layer}.self_attn.sampling_offsets", 8 * 3 * 4 * 2, 256)
        shapes |= linear(f"{layer}.self_attn.attention_weights", 8 * 3 * 4, 256)
        shapes |= linear(f"{layer}.self_attn.value_proj", 256, 256)
        shapes |= linear(f"{layer}.self_attn.output_proj", 256, 256)
        shapes |= linear(f"{layer}.linear1", 1024, 256) | linear(f"{layer}.linear2", 256, 1024)
        shapes |= norm(f"{layer}.norm1", 256) | norm(f"{layer}.norm2", 256)
    shapes["pixel_decoder.adapter_1.weight"] = (256, 96, 1, 1)
    shapes["pixel_decoder.layer_1.weight"] = (256, 256, 3, 3)
    shapes |= norm("pixel_decoder.adapter_1.norm", 256) | norm("pixel_decoder.layer_1.norm", 256)
    shapes |= linear("pixel_decoder.mask_features", 256, 256, 1, 1)
    for i in range(9):
        for kind, attention in (("self", "self_attn"), ("cross", "multihead_attn")):
            layer = f"predictor.transformer_{kind}_attention_layers.{i}"
            shapes[f"{layer}.{attention}.in_proj_weight"] = (768, 256)
            shapes[f"{layer}.{attention}.in_proj_bias"] = (768,)
            shapes |= linear(f"{layer}.{attention}.out_proj", 256, 256) | norm(f"{layer}.norm", 256)
        layer = f"predictor.transformer_ffn_layers.{i}"
        shapes |= linear(f"{layer}.linear1", 2048, 256) | linear(f"{layer}.linear2", 256, 2048)
        shapes |= norm(f"{layer}.norm", 256)
    shapes |= norm("predictor.decoder_norm", 256)
    shapes["predictor.query_feat.weight"] = shapes["predictor.query_embed.weight"] = (queries, 256)
    shapes["predictor.level_embed.weight"] = (3, 256)
    for i in range(3):
        shapes |= linear(f"predictor.mask_embed.layers.{i}", 256, 256)
    if classes is not None:
        shapes |= linear("predictor.class_embed", classes + 1, 256)
    return {f"{prefix}.{name}": shape for name, shape in shapes.items()}


def published_shapes(
    classes: int, *, joint: bool, queries: int = 100
) -> dict[str, tuple[int, ...]]:
    """Mask2Former's Swin-S checkpoints, or the joint ones with a fourth channel and g."""
    shapes = swin_small_shapes(4 if joint else 3) | head_shapes("sem_seg_head", queries, classes)
    if joint:
        shapes |= head_shapes("recon_head", 48, None)
    return shapes | {"criterion.empty_weight": (classes + 1,)}


@pytest.fixture(scope="module")
def full_model():
    return build_model(load_config("joint_cityscapes.yaml", opts=["MODEL.DEVICE", "cpu"]))


def test_full_model_has_the_published_names_and_shapes(full_model):
    shapes = {name: tuple(value.shape) for name, value in full_model.state_dict().items()}
    assert shapes == published_shapes(19, joint=True)


@pytest.mark.parametrize(
    ("part", "millions"), [("backbone", 48.84), ("sem_seg_head", 19.89), ("recon_head", 19.85)]
)
def test_parameter_counts(full_model, part, millions):
    count = sum(p.numel() for p in getattr(full_model, part).parameters())
    assert round(count / 1e6, 2) == millions


def checkpoint_of(shapes: dict[str, tuple[int, ...]], model) -> dict[str, Tensor]:
    """A state dict of these shapes; a constant per tensor, told apart by the constants."""
    fixed = {n: v for n, v in model.state_dict().items() if n.endswith("relative_position_index")}
    values = {n: torch.full(s, float(i)) for i, (n, s) in enumerate(shapes.items())}
    return values | fixed


def test_a_published_joint_checkpoint_lands_whole(full_model):
    checkpoint = checkpoint_of(published_shapes(19, joint=True), full_model)
    report = load_weights(full_model, checkpoint)
    assert len(report.loaded) == len(checkpoint)
    for name, value in full_model.state_dict().items():
        assert torch.equal(value, checkpoint[name]), name


@pytest.mark.parametrize(
    "classes",
    [
        pytest.param(19, id="cityscapes-semantic"),
        pytest.param(80, id="coco-instance", marks=pytest.mark.slow),
        pytest.param(133, id="coco-panoptic", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("recon_from_main", [False, True])
def test_a_published_mask2former_checkpoint_lands_whole(full_model, classes, recon_from_main):
    if classes != 19:
        opts = ["MODEL.DEVICE", "cpu", "MODEL.SEM_SEG_HEAD.NUM_CLASSES", str(classes)]
        full_model = build_model(load_config("joint_cityscapes.yaml", opts=opts))
    checkpoint = checkpoint_of(published_shapes(classes, joint=False), full_model)
    report = load_weights(
        full_model,
        checkpoint,
        init_recon_from_main=recon_from_main,
        allow_new=("recon_head.predictor.query_",) if recon_from_main else ("recon_head.",),
    )
    assert [w.name for w in report.widened] == ["backbone.patch_embed.proj.weight"]
    assert len(report.loaded) == len(checkpoint) - 1
    assert report.unused == []
    assert all(name.startswith("recon_head.") for name in report.new)
    state = full_model.state_dict()
    for name in report.loaded:
        assert torch.equal(state[name], checkpoint[name]), name
    if recon_from_main:
        recon = [n for n in state if n.startswith("recon_head.")]
        assert sorted(report.copied + report.new) == sorted(recon)
        assert len(report.new) == 2  # 48 queries where h has 100
