"""The query decoder: masked attention, supervision of every layer, the decoder without classes."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ttt_video.modeling.transformer_decoder import (
    Attention,
    MultiScaleMaskedTransformerDecoder,
    shrunk,
)

SIZES = [(2, 3), (4, 6), (8, 12)]


def make(**changes) -> MultiScaleMaskedTransformerDecoder:
    torch.manual_seed(0)
    options = {
        "num_queries": 5,
        "num_classes": 3,
        "hidden_dim": 16,
        "mask_dim": 8,
        "num_layers": 4,
        "num_heads": 2,
        "feedforward": 20,
        "pre_norm": False,
        "enforce_input_project": False,
    }
    return MultiScaleMaskedTransformerDecoder(16, **(options | changes))


def maps(batch: int = 2, channels: int = 16) -> tuple[list[torch.Tensor], torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    levels = [torch.randn(batch, channels, *size, generator=generator) for size in SIZES]
    return levels, torch.randn(batch, 8, 16, 24, generator=generator)


# ---- attention


@pytest.mark.parametrize("masked", [False, True])
def test_attention_equals_pytorchs(masked):
    torch.manual_seed(0)
    ours = Attention(16, 4)
    theirs = nn.MultiheadAttention(16, 4, batch_first=True)
    theirs.load_state_dict(ours.state_dict())
    for parameter in (ours.in_proj_bias, theirs.in_proj_bias):
        nn.init.constant_(parameter, 0.1)
    query, key, value = torch.randn(2, 5, 16), torch.randn(2, 7, 16), torch.randn(2, 7, 16)
    allowed = forbidden = None
    if masked:
        allowed = torch.rand(2, 5, 7) < 0.5
        allowed[..., 0] = True
        forbidden = (~allowed).repeat_interleave(4, 0)
    expected, _ = theirs(query, key, value, attn_mask=forbidden)
    torch.testing.assert_close(ours(query, key, value, allowed), expected)


def test_attention_does_not_see_what_is_not_allowed():
    torch.manual_seed(0)
    attention = Attention(8, 2)
    query, memory = torch.randn(1, 2, 8), torch.randn(1, 4, 8)
    allowed = torch.tensor([[[True, True, False, False], [True, True, True, True]]])
    before = attention(query, memory, memory, allowed)
    memory[:, 2:] += 1
    after = attention(query, memory, memory, allowed)
    assert torch.equal(before[:, 0], after[:, 0])
    assert not torch.allclose(before[:, 1], after[:, 1])


# ---- attention masks


@pytest.mark.parametrize(
    ("size", "smaller"),
    [
        ((16, 24), (8, 12)),
        ((16, 24), (4, 6)),
        ((32, 16), (4, 2)),
        ((12, 24), (4, 8)),
        ((9, 8), (4, 4)),
    ],
)
def test_smaller_maps_are_those_of_interpolate_to_the_bit(size, smaller):
    features = torch.randn(2, 16, *size, generator=torch.Generator().manual_seed(0))
    expected = F.interpolate(features, smaller, mode="bilinear", align_corners=False)
    before = features.clone()
    assert torch.equal(shrunk(features, smaller), expected)
    assert torch.equal(features, before)


def with_identity_embedding(dim: int) -> MultiScaleMaskedTransformerDecoder:
    """Masks are then plain products of queries and features."""
    decoder = make(hidden_dim=dim, mask_dim=dim)
    decoder.decoder_norm = nn.Identity()
    decoder.mask_embed = nn.Identity()
    return decoder


def test_queries_look_inside_their_mask():
    decoder = with_identity_embedding(2)
    coarse = torch.tensor([[[[1.0, -1.0, 0.0]], [[0.0, 2.0, -3.0]]]])  # (1, 2, 1, 3)
    queries = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]])
    allowed = decoder.attention_mask(queries, coarse)
    assert allowed.tolist() == [[[True, False, True], [True, True, False], [True, True, False]]]


def test_a_query_with_an_empty_mask_looks_everywhere():
    decoder = with_identity_embedding(2)
    coarse = torch.tensor([[[[1.0, 2.0]], [[0.0, 0.0]]]])
    queries = torch.tensor([[[-1.0, 0.0], [1.0, 0.0]]])
    assert decoder.attention_mask(queries, coarse).all()


@pytest.mark.parametrize("level", range(3))
def test_resized_features_give_the_masks_of_resized_predictions(level):
    """What Mask2Former does: predict at full size, resize the logits, threshold at 0.5."""
    decoder = make()
    _, mask_features = maps()
    queries = torch.randn(2, 5, 16)
    full = decoder.predict(queries, mask_features)["pred_masks"]
    resized = F.interpolate(full, SIZES[level], mode="bilinear", align_corners=False).flatten(2)
    coarse = F.interpolate(mask_features, SIZES[level], mode="bilinear", align_corners=False)
    allowed = decoder.attention_mask(queries, coarse)
    inside = resized.sigmoid() >= 0.5
    inside |= ~inside.any(-1, keepdim=True)
    assert ((allowed == inside) | (resized.abs() < 1e-5)).all()
    assert 0.1 < allowed.float().mean() < 0.9


# ---- the decoder


@pytest.mark.parametrize("pre_norm", [False, True])
def test_every_layer_or_the_last_agree_on_the_last(pre_norm):
    decoder = make(pre_norm=pre_norm)
    (last,) = decoder(*maps())
    every = decoder(*maps(), every_layer=True)
    assert len(every) == 5  # the initial queries and four layers
    for name in ("pred_logits", "pred_masks"):
        assert torch.equal(every[-1][name], last[name])
        for earlier, later in itertools.pairwise(every):
            assert not torch.allclose(earlier[name], later[name])


def test_shapes():
    (prediction,) = make()(*maps())
    assert prediction["pred_logits"].shape == (2, 5, 4)
    assert prediction["pred_masks"].shape == (2, 5, 16, 24)


def test_without_classes_there_is_no_class_branch():
    decoder = make(num_classes=None, num_queries=48)
    (prediction,) = decoder(*maps())
    assert list(prediction) == ["pred_masks"]
    assert prediction["pred_masks"].shape == (2, 48, 16, 24)
    assert not any(name.startswith("class_embed") for name in decoder.state_dict())


def test_levels_are_read_in_turn_from_the_coarsest():
    """Before layer i only levels 0 to i - 1 (mod 3) have been read."""
    decoder = make()
    levels, mask_features = maps()
    before = decoder(levels, mask_features, every_layer=True)
    for level in range(3):
        changed = list(levels)
        changed[level] = changed[level] + 1
        after = decoder(changed, mask_features, every_layer=True)
        same = [
            torch.equal(a["pred_masks"], b["pred_masks"])
            for a, b in zip(before, after, strict=True)
        ]
        assert same == [i <= level for i in range(5)]


def test_images_of_a_batch_do_not_mix():
    decoder = make()
    levels, mask_features = maps()
    (both,) = decoder(levels, mask_features)
    for i in range(2):
        (alone,) = decoder([x[i : i + 1] for x in levels], mask_features[i : i + 1])
        torch.testing.assert_close(
            alone["pred_masks"], both["pred_masks"][i : i + 1], rtol=1e-4, atol=1e-4
        )


def test_levels_are_projected_where_the_widths_differ_or_the_config_asks():
    assert not list(make().input_proj.parameters())
    asked = make(enforce_input_project=True)
    assert asked.input_proj[0].weight.shape == (16, 16, 1, 1)
    wider = make(hidden_dim=8)
    assert wider.input_proj[2].weight.shape == (8, 16, 1, 1)
    (prediction,) = wider(*maps())
    assert prediction["pred_masks"].shape == (2, 5, 16, 24)


def test_gradients_reach_every_parameter():
    decoder = make()
    predictions = decoder(*maps(), every_layer=True)
    sum(x.square().mean() for p in predictions for x in p.values()).backward()
    for name, parameter in decoder.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def test_dec_layers_counts_predictions(tiny_cfg):
    tiny_cfg.MODEL.MASK_FORMER.DEC_LAYERS = 4
    decoder = MultiScaleMaskedTransformerDecoder(tiny_cfg, 32, num_queries=6, num_classes=2)
    assert len(decoder.transformer_ffn_layers) == 3
    levels, _ = maps(channels=32)
    predictions = decoder(levels, torch.randn(2, 32, 16, 24), every_layer=True)
    assert len(predictions) == 4
