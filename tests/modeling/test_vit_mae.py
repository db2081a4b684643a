"""ViTMAE against Hugging Face's and hand arithmetic: the model, its loss and its two heads."""

from __future__ import annotations

import copy
import math
import sys
from functools import cache

import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from model_contract import AdaptableModelContract, image, seeded
from tiny import TINY_VIT, VIT_SIDE
from torch import Tensor, nn
from vit_oracle import hugging_face, hugging_face_gradients, noise_of

from ttt_video.config import load_config
from ttt_video.errors import UserError
from ttt_video.modeling.masking import MAEMasks, PatchMasks
from ttt_video.modeling.position_encoding import mae_position_table
from ttt_video.modeling.vit_mae import ViTMAE, shown_patches

PATCH = 8
CLASSES = 5


def build(*opts: str) -> ViTMAE:
    """A small model in eval mode, every parameter and statistic random."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build_model(load_config("Base-ViTMAE.yaml", opts=[*TINY_VIT, *opts])).eval()
        for name, parameter in model.named_parameters():
            scale = parameter[0].numel() ** -0.5 if parameter.dim() == 2 else 0.3
            parameter.data = torch.randn_like(parameter) * scale
            if "norm" in name and name.endswith("weight"):
                parameter.data += 1
        if model.linear:
            model.bn.running_mean.normal_()
            model.bn.running_var.uniform_(0.5, 2)
    return model


@cache
def built(*opts: str) -> ViTMAE:
    return build(*opts)


LINEAR = ("MODEL.VIT_MAE.HEAD", "linear")


@pytest.fixture
def model() -> ViTMAE:
    return copy.deepcopy(built())


@pytest.fixture
def linear() -> ViTMAE:
    return copy.deepcopy(built(*LINEAR))


def inputs(count: int = 2) -> list[dict[str, Tensor]]:
    return [{"image": image(VIT_SIDE, VIT_SIDE, seed)} for seed in range(count)]


class TestViTMAE(AdaptableModelContract):
    size = other_size = (VIT_SIDE, VIT_SIDE)

    @pytest.fixture
    def model(self):
        return copy.deepcopy(built())


class TestLinearHead(TestViTMAE):
    @pytest.fixture
    def model(self):
        return copy.deepcopy(built(*LINEAR))


# ---- Hugging Face's ViTMAE


@pytest.mark.parametrize("normalized", [True, False])
def test_latent_prediction_loss_and_gradients_are_hugging_faces(normalized):
    ours = build("TTT.RECON.NORMALIZE_TARGET", str(normalized)).double()
    theirs = hugging_face(ours, norm_pix_loss=normalized)
    samples = inputs(3)
    masks = [ours.masks.draw(VIT_SIDE, VIT_SIDE, seeded(seed)) for seed in range(3)]
    pixels, visible = ours.normalize(samples).tensor, torch.stack(masks).double()
    noise = noise_of(visible, PATCH)

    latent = ours.encode(pixels, visible)
    expected = theirs.vit(pixels, noise=noise).last_hidden_state
    torch.testing.assert_close(latent, expected, rtol=1e-10, atol=1e-12)

    output = theirs(pixels, noise=noise)
    drawn = theirs.unpatchify(output.logits)
    torch.testing.assert_close(ours.decode(latent, visible), drawn, rtol=1e-10, atol=1e-12)

    given = [{**x, "image_mask": mask} for x, mask in zip(samples, masks, strict=True)]
    loss = ours.reconstruction_losses(given)["loss_recon"]
    torch.testing.assert_close(loss, output.loss, rtol=1e-10, atol=0)

    loss.backward()
    output.loss.backward()
    found = {name: p.grad for name, p in ours.named_parameters() if p.grad is not None}
    gradients = hugging_face_gradients(theirs, ours)
    assert found.keys() == gradients.keys()
    assert not any(name.startswith("classifier") for name in found)
    for name, gradient in gradients.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-8, atol=1e-12, msg=name)


def test_the_whole_image_is_hugging_faces_without_a_mask(model):
    theirs = hugging_face(model.double(), mask_ratio=0.0)
    pixels = model.normalize(inputs()).tensor
    noise = torch.arange(16.0).expand(2, -1)
    expected = theirs.vit(pixels, noise=noise).last_hidden_state
    torch.testing.assert_close(model.encode(pixels), expected, rtol=1e-10, atol=1e-12)


# ---- hand arithmetic


def block_by_hand(x: Tensor, block: nn.Module, heads: int) -> Tensor:
    """A pre-norm transformer block, one head and one image at a time."""

    def norm(z: Tensor, layer: nn.Module) -> Tensor:
        mean, variance = z.mean(-1, keepdim=True), z.var(-1, correction=0, keepdim=True)
        return (z - mean) / (variance + 1e-6).sqrt() * layer.weight + layer.bias

    width = x.shape[-1] // heads
    normed = norm(x, block.norm1)
    qkv = normed @ block.attn.qkv.weight.T + block.attn.qkv.bias
    q, k, v = qkv.split(x.shape[-1], dim=-1)
    parts = []
    for i in range(heads):
        own = slice(i * width, (i + 1) * width)
        weights = (q[..., own] @ k[..., own].transpose(1, 2) / math.sqrt(width)).exp()
        parts.append(weights / weights.sum(-1, keepdim=True) @ v[..., own])
    x = x + torch.cat(parts, -1) @ block.attn.proj.weight.T + block.attn.proj.bias
    hidden = norm(x, block.norm2) @ block.mlp.fc1.weight.T + block.mlp.fc1.bias
    hidden = hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2
    return x + hidden @ block.mlp.fc2.weight.T + block.mlp.fc2.bias


@torch.no_grad()
def test_the_head_of_a_vit_by_hand(model):
    model.double()
    tokens = model.encode(model.normalize(inputs()).tensor)
    x = tokens @ model.classifier_embed.weight.T + model.classifier_embed.bias
    x = block_by_hand(x + model.classifier_pos_embed, model.classifier_blocks[0], heads=3)
    first = x[:, 0]
    scale = (first.var(-1, correction=0, keepdim=True) + 1e-6).sqrt()
    first = (first - first.mean(-1, keepdim=True)) / scale
    first = first * model.classifier_norm.weight + model.classifier_norm.bias
    logits = first @ model.classifier_pred.weight.T + model.classifier_pred.bias
    torch.testing.assert_close(model.classify(tokens), logits, rtol=1e-10, atol=1e-12)
    found = torch.stack([output["image_class"] for output in model(inputs())])
    torch.testing.assert_close(found, logits.float())


@torch.no_grad()
def test_the_linear_head_by_hand(linear):
    linear.double()
    token = linear.encode(linear.normalize(inputs()).tensor)[:, 0]
    normed = (token - linear.bn.running_mean) / (linear.bn.running_var + 1e-6).sqrt()
    logits = normed @ linear.head.weight.T + linear.head.bias
    found = torch.stack([output["image_class"] for output in linear(inputs())])
    torch.testing.assert_close(found, logits.float())


def test_the_linear_head_has_batch_statistics_in_training_alone(linear):
    statistics = linear.bn.running_mean.clone()
    expected = linear.main_task(inputs()).pixels.classes
    linear.train()
    assert torch.equal(linear.main_task(inputs()).pixels.classes, expected)
    assert torch.equal(linear.bn.running_mean, statistics)
    labelled = [{**x, "class_id": 1} for x in inputs(3)]
    with torch.no_grad():
        token = linear.encode(linear.normalize(labelled).tensor)[:, 0]
        normed = (token - token.mean(0)) / (token.var(0, correction=0) + 1e-6).sqrt()
        logits = normed @ linear.head.weight.T + linear.head.bias
    loss = linear.main_losses(labelled)["loss_class"]
    torch.testing.assert_close(loss, -logits.log_softmax(1)[:, 1].mean())
    assert not torch.equal(linear.bn.running_mean, statistics)


def test_a_masked_image_has_its_visible_patches_at_their_places_in_the_head(model):
    """Attention sees no order, so the head's input may be laid out in any."""
    visible = model.masks.draw(VIT_SIDE, VIT_SIDE, seeded())[None]
    tokens = model.encode(model.normalize(inputs(1)).tensor, visible)
    shown = shown_patches(visible, PATCH)[0]
    x = model.classifier_embed(tokens)
    x = x + model.classifier_pos_embed[:, [0, *(shown + 1).tolist()]]
    x = block_by_hand(x, model.classifier_blocks[0], heads=3)
    logits = model.classifier_pred(model.classifier_norm(x)[:, 0])
    torch.testing.assert_close(model.classify(tokens, visible), logits, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_the_loss_of_a_constant_prediction_by_hand(model):
    """One mean over the hidden patches of all copies; values of a patch by row, column, colour."""
    values = torch.linspace(-1, 1, 3 * PATCH**2)
    model.decoder_pred.weight.zero_()
    model.decoder_pred.bias.copy_(values)
    samples = [{"image": image(VIT_SIDE, VIT_SIDE)}] * 3
    masks = [model.masks.draw(VIT_SIDE, VIT_SIDE, seeded(seed)) for seed in range(3)]
    given = [{**x, "image_mask": mask} for x, mask in zip(samples, masks, strict=True)]

    mean, std = (np.array(v, np.float64) for v in ([123.675, 116.28, 103.53],
                                                   [58.395, 57.12, 57.375]))  # fmt: skip
    pixels = (samples[0]["image"].permute(1, 2, 0).numpy() - mean) / std
    errors = []
    for mask in masks:
        for top in range(0, VIT_SIDE, PATCH):
            for left in range(0, VIT_SIDE, PATCH):
                if mask[0, top, left] == 0:
                    patch = pixels[top : top + PATCH, left : left + PATCH].ravel()
                    target = (patch - patch.mean()) / np.sqrt(patch.var(ddof=1) + 1e-6)
                    errors.append(np.mean((values.numpy() - target) ** 2))
    assert len(errors) == 3 * 12
    loss = model.reconstruction_losses(given)["loss_recon"]
    assert loss.item() == pytest.approx(np.mean(errors), rel=1e-5)


def test_loss_class_by_hand(model):
    labelled = [{**x, "class_id": label} for x, label in zip(inputs(), (4, 0), strict=True)]
    logs = torch.stack([x["image_class"] for x in model(inputs())]).log_softmax(1)
    plain = -(logs[0, 4] + logs[1, 0]) / 2
    torch.testing.assert_close(model.main_losses(labelled)["loss_class"], plain)
    model.label_smoothing = 0.1
    smooth = 0.9 * plain - 0.1 * logs.mean()
    torch.testing.assert_close(model.main_losses(labelled)["loss_class"], smooth)


# ---- what is easy to get wrong


def test_the_encoder_gets_visible_patches_alone(model):
    lengths = []
    model.blocks[0].register_forward_pre_hook(lambda _, x: lengths.append(tuple(x[0].shape[:2])))
    model.reconstruction_losses(inputs(), seeded())
    model(inputs())
    assert lengths == [(2, 1 + 4), (2, 1 + 16)]


def test_every_layer_norm_adds_a_millionth(model):
    norms = [module for module in model.modules() if isinstance(module, nn.LayerNorm)]
    assert len(norms) == 2 * (2 + 1 + 1) + 3
    assert {norm.eps for norm in norms} == {1e-6}


def test_the_first_half_of_a_table_encodes_the_column():
    table = mae_position_table(3, 4, 8)[0]
    assert table.shape == (13, 8)
    assert not table[0].any()
    frequencies = [1, 1 / 100]
    for row in range(3):
        for column in range(4):
            expected = [
                wave(place * frequency)
                for place in (column, row)
                for wave in (math.sin, math.cos)
                for frequency in frequencies
            ]
            torch.testing.assert_close(table[1 + 4 * row + column], torch.tensor(expected))


def test_visible_patches_are_counted_in_floating_point_as_maes_code_does():
    assert MAEMasks(16, 0.75).num_visible(196) == 49
    assert MAEMasks(16, 0.8).num_visible(100) == 19  # 100 * 0.19999999999999996
    assert PatchMasks(16, 0.8).num_visible(100) == 20
    assert MAEMasks(1, 0.8).draw(10, 10, seeded()).sum() == 19


def test_shown_patches_come_row_by_row():
    mask = torch.zeros(2, 1, 4, 4)
    mask[0, :, :2, 2:] = mask[0, :, 2:, :2] = 1
    mask[1, :, :2] = 1
    assert shown_patches(mask, 2).tolist() == [[1, 2], [0, 1]]


@pytest.mark.parametrize(
    ("rows", "message"), [(slice(0, 1), "hides parts of patches"), (slice(0, 2), r"\[3, 4\]")]
)
def test_masks_that_a_vit_cannot_take(rows, message):
    masks = torch.ones(2, 1, 4, 4)
    masks[0, :, rows, :2] = 0
    with pytest.raises(ValueError, match=message):
        shown_patches(masks, 2)


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        (("MODEL.VIT_MAE.IMAGE_SIZE", "30"), "30 px, which patches of 8 px do not divide"),
        (("MODEL.VIT_MAE.NUM_HEADS", "5"), r"VIT_MAE\.EMBED_DIM is 24; .*NUM_HEADS, which is 5"),
        (("MODEL.VIT_MAE.DECODER_EMBED_DIM", "18"), r"DECODER_EMBED_DIM is 18; .* multiple of 4"),
        (
            ("MODEL.VIT_MAE.CLASSIFIER_EMBED_DIM", "10"),
            "HEADS, which is 3",
        ),
        (("TTT.MASK_PATCH_SIZE", "12"), "hides its own patches of 8 px"),
    ],
)
def test_sizes_that_cannot_work(pairs, message):
    with pytest.raises(UserError, match=message):
        build(*pairs)


def test_without_timm_it_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm.models", None)
    with pytest.raises(UserError, match="ViTMAE needs timm, an optional extra: pip install"):
        build()


def test_an_image_of_another_size_is_one_line(model):
    with pytest.raises(UserError, match="an image of 32x40 px, but the model takes 32x32"):
        model([{"image": image(32, 40)}])


@torch.no_grad()
def test_pictures_of_the_reconstruction_have_the_visible_patches_where_they_were(model):
    visible = model.masks.draw(VIT_SIDE, VIT_SIDE, seeded())
    (picture,) = model.reconstruct([{**inputs(1)[0], "image_mask": visible}])
    assert picture["recon"].shape == (3, VIT_SIDE, VIT_SIDE)
    expected = image(VIT_SIDE, VIT_SIDE) * visible
    torch.testing.assert_close(picture["masked_input"], expected, rtol=0, atol=1e-3)
