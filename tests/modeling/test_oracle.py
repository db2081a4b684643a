"""The model against independent implementations: Hugging Face's Mask2Former, detectron2's Swin."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from detectron2.modeling.backbone.swin import SwinTransformer
from torch import Tensor

from ttt_video.config import load_config
from ttt_video.modeling.deformable_attention import (
    MSDeformAttn,
    deformable_attention,
    sampled_attention,
)

pytest.importorskip("transformers", reason="the oracle is in the test extra")

from costs.huggingface import build_oracle, translate
from hf_oracle import build_random, small_config
from transformers.models.mask2former.modeling_mask2former import (
    Mask2FormerPixelDecoderEncoderMultiscaleDeformableAttention as OracleAttention,
)
from transformers.models.mask2former.modeling_mask2former import multi_scale_deformable_attention


@pytest.fixture(scope="module")
def pair() -> SimpleNamespace:
    cfg = small_config()
    model = build_random(cfg, seed=0)
    return SimpleNamespace(cfg=cfg, model=model, oracle=build_oracle(cfg, model))


def random_image(height: int, width: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=generator)


def oracle_input(cfg, images: list[Tensor]) -> Tensor:
    """Normalised, then padded with zeros to multiples of 32; the fourth channel is all ones."""
    height, width = (max(-(-x.shape[i] // 32) * 32 for x in images) for i in (1, 2))
    pixels = torch.zeros(len(images), 4, height, width)
    pixels[:, 3] = 1
    for row, image in zip(pixels, images, strict=True):
        for c in range(3):
            normalised = (image[c].double() - cfg.MODEL.PIXEL_MEAN[c]) / cfg.MODEL.PIXEL_STD[c]
            row[c, : image.shape[1], : image.shape[2]] = normalised
    return pixels


def oracle_predictions(oracle, pixels: Tensor) -> list[tuple[Tensor, Tensor]]:
    """(class logits, mask logits) of the initial queries and of every layer."""
    output = oracle(pixels)
    every = [*output.auxiliary_logits, output]
    return [(p["class_queries_logits"], p["masks_queries_logits"]) for p in every]


def our_predictions(model, images: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    pixels = model.normalize([{"image": x} for x in images]).tensor
    predictions = model.sem_seg_head(model.encode(pixels), every_layer=True)
    return [(p["pred_logits"], p["pred_masks"]) for p in predictions]


def assert_same_predictions(cfg, model, oracle, images: list[Tensor]) -> None:
    with torch.no_grad():
        ours = our_predictions(model, images)
        theirs = oracle_predictions(oracle, oracle_input(cfg, images))
    assert len(ours) == len(theirs) == cfg.MODEL.MASK_FORMER.DEC_LAYERS
    for mine, other in zip(ours, theirs, strict=True):
        for ours_logits, their_logits in zip(mine, other, strict=True):
            assert their_logits.std() > 0.1  # not compared where there is nothing to compare
            torch.testing.assert_close(ours_logits, their_logits, rtol=0, atol=1e-4)


# ---- forward


@pytest.mark.parametrize("size", [(96, 160), (64, 64), (100, 141)], ids=str)
def test_class_and_mask_logits_of_every_layer(pair, size):
    assert_same_predictions(pair.cfg, pair.model, pair.oracle, [random_image(*size)])


def test_a_batch_of_images_of_two_sizes(pair):
    images = [random_image(70, 130, seed=1), random_image(96, 64, seed=2)]
    assert_same_predictions(pair.cfg, pair.model, pair.oracle, images)


def test_pre_norm_and_projected_levels():
    cfg = small_config("MODEL.MASK_FORMER.PRE_NORM", True, "MODEL.MASK_FORMER.HIDDEN_DIM", 48)
    model = build_random(cfg, seed=1)
    assert_same_predictions(cfg, model, build_oracle(cfg, model), [random_image(64, 96)])


def test_queries_with_an_empty_mask_look_everywhere(pair):
    """Nearly constant mask features: each query's mask is nearly all inside or all outside."""
    model = build_random(pair.cfg, seed=0)
    with torch.no_grad():
        mask_features = model.sem_seg_head.pixel_decoder.mask_features
        mask_features.weight.mul_(0.01)
        mask_features.bias.mul_(10)
    image = random_image(64, 96)
    steering = torch.stack([masks for _, masks in our_predictions(model, [image])[:-1]])
    empty = (steering < 0).flatten(-2).all(-1)
    assert 0 < empty.sum() < empty.numel()
    assert_same_predictions(pair.cfg, model, build_oracle(pair.cfg, model), [image])


def test_semantic_scores_of_the_whole_model(pair):
    """Masks are upsampled, scored, then cropped and resized to the requested size."""
    image = random_image(100, 141)
    with torch.no_grad():
        (ours,) = pair.model([{"image": image, "height": 50, "width": 77}])
        classes, masks = oracle_predictions(pair.oracle, oracle_input(pair.cfg, [image]))[-1]
        masks = F.interpolate(masks, size=(128, 160), mode="bilinear", align_corners=False)
        scores = torch.einsum("qk,qhw->khw", classes[0].softmax(-1)[:, :-1], masks[0].sigmoid())
        scores = scores[None, :, :100, :141]
        expected = F.interpolate(scores, size=(50, 77), mode="bilinear", align_corners=False)[0]
    assert ours["sem_seg"].shape == (7, 50, 77)
    torch.testing.assert_close(ours["sem_seg"], expected, rtol=0, atol=1e-4)


def test_reconstruction_decoder(pair):
    """g is h's architecture: the oracle's 48 mask channels, rearranged one pixel at a time."""
    image = random_image(64, 96)
    mask = torch.ones(1, 64, 96)
    mask[:, 16:48, 32:64] = 0
    oracle = build_oracle(pair.cfg, pair.model, role="g")
    pixels = oracle_input(pair.cfg, [image])
    pixels[:, :3] *= mask
    pixels[:, 3:] = mask
    with torch.no_grad():
        channels = oracle_predictions(oracle, pixels)[-1][1][0]
        expected = torch.empty(3, 64, 96)
        for colour in range(3):
            for p in range(4):
                for q in range(4):
                    expected[colour, p::4, q::4] = channels[16 * colour + 4 * p + q]
        ours = pair.model.reconstruct([{"image": image, "image_mask": mask}])[0]
    mean, std = (
        torch.tensor(v)[:, None, None]
        for v in (pair.cfg.MODEL.PIXEL_MEAN, pair.cfg.MODEL.PIXEL_STD)
    )
    expected = (expected * std + mean).clamp(0, 255)
    assert expected.std() > 10
    # 1e-4 in normalised units, 255 grey levels wide
    torch.testing.assert_close(ours["recon"], expected, rtol=0, atol=1e-4 * float(std.max()))
    torch.testing.assert_close(ours["masked_input"], image * mask, rtol=0, atol=1e-3)


@pytest.mark.slow
def test_full_size_model():
    """Its large layers take ways of their own, which err at most three times as much as theirs.

    Errors are distances from their model in float64, over all layers.
    """
    cfg = load_config("joint_cityscapes.yaml", opts=["MODEL.DEVICE", "cpu"])
    model = build_random(cfg, seed=0)
    oracle, images = build_oracle(cfg, model), [random_image(100, 141)]
    pixels = oracle_input(cfg, images)
    with torch.no_grad():
        ours, theirs = our_predictions(model, images), oracle_predictions(oracle, pixels)
        exact = oracle_predictions(oracle.double(), pixels.double())
    assert len(ours) == len(exact) == cfg.MODEL.MASK_FORMER.DEC_LAYERS

    def error(predictions: list[tuple[Tensor, Tensor]], output: int) -> float:
        pairs = [(p[output], e[output]) for p, e in zip(predictions, exact, strict=True)]
        return max(float((p - e).norm() / e.norm()) for p, e in pairs)

    for output in range(2):
        assert 0 < error(ours, output) < 3 * error(theirs, output) < 1e-5


# ---- gradients


def test_gradients_of_every_parameter(pair):
    image = random_image(70, 90)
    model = build_random(pair.cfg, seed=2)
    oracle = build_oracle(pair.cfg, model)
    ours = our_predictions(model, [image])
    theirs = oracle_predictions(oracle, oracle_input(pair.cfg, [image]))
    generator = torch.Generator().manual_seed(3)
    for mine, other in zip(ours, theirs, strict=True):
        for a, b in zip(mine, other, strict=True):
            direction = torch.randn(a.shape, generator=generator) / a.numel() ** 0.5
            a.backward(direction, retain_graph=True)
            b.backward(direction, retain_graph=True)
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert not any(n.startswith("recon_head.") for n in gradients)
    expected = {n: p.grad for n, p in oracle.named_parameters() if p.grad is not None}
    translated = translate(gradients)
    assert translated.keys() == expected.keys()
    for name, value in translated.items():
        scale = expected[name].abs().max()
        if name.endswith("k_proj.bias"):  # softmax cancels it: what is left is rounding
            assert max(scale, value.abs().max()) < 1e-5, name
        else:
            assert scale > 1e-4, name
            torch.testing.assert_close(value / scale, expected[name] / scale, rtol=0, atol=1e-4)


# ---- losses


def random_predictions(
    layers: int, batch: int, queries: int, classes: int
) -> list[dict[str, Tensor]]:
    return [
        {
            "pred_logits": torch.randn(batch, queries, classes + 1, requires_grad=True),
            "pred_masks": (3 * torch.randn(batch, queries, 12, 20)).requires_grad_(),
        }
        for _ in range(layers)
    ]


def random_targets(counts: list[int], classes: int) -> list[dict[str, Tensor]]:
    return [
        {"labels": torch.randint(classes, (n,)), "masks": torch.rand(n, 48, 80) < 0.4}
        for n in counts
    ]


@pytest.mark.parametrize("counts", [[4, 1], [6, 20], [0, 3]], ids=str)
def test_losses_and_their_gradients(pair, counts):
    """Both draw the same random points from the same seed, so every number can be compared."""
    torch.manual_seed(5)
    predictions = random_predictions(4, len(counts), 20, 7)
    targets = random_targets(counts, 7)

    torch.manual_seed(6)
    ours = pair.model.criterion(predictions, targets)
    gradients = torch.autograd.grad(
        sum(ours.values()), [t for p in predictions for t in p.values()]
    )

    named = [
        {"class_queries_logits": p["pred_logits"], "masks_queries_logits": p["pred_masks"]}
        for p in predictions
    ]
    torch.manual_seed(6)
    theirs = pair.oracle.get_loss_dict(
        **named[-1],
        mask_labels=[t["masks"].float() for t in targets],
        class_labels=[t["labels"] for t in targets],
        auxiliary_predictions=named[:-1],
    )
    expected = torch.autograd.grad(
        sum(theirs.values()), [t for p in predictions for t in p.values()]
    )
    theirs = {k.replace("cross_entropy", "ce"): v for k, v in theirs.items()}
    assert ours.keys() == theirs.keys()
    assert len(ours) == 12
    for name, loss in ours.items():
        torch.testing.assert_close(loss, theirs[name], rtol=1e-5, atol=1e-5, msg=name)
    for gradient, other in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-4, atol=1e-6)


def oracle_matches(oracle, prediction: dict[str, Tensor], targets: list[dict[str, Tensor]]):
    torch.manual_seed(8)
    return oracle.criterion.matcher(
        prediction["pred_masks"],
        prediction["pred_logits"],
        [t["masks"].float() for t in targets],
        [t["labels"] for t in targets],
    )


def assert_same_matches(ours, theirs) -> None:
    for match, other in zip(ours, theirs, strict=True):
        for a, b in zip(match, other, strict=True):
            assert torch.equal(a, b)


def test_matches(pair):
    torch.manual_seed(7)
    (prediction,) = random_predictions(1, 3, 20, 7)
    targets = random_targets([5, 20, 25], 7)  # the last has more masks than there are queries
    torch.manual_seed(8)
    ours = pair.model.criterion.matcher(prediction, targets)
    assert [len(queries) for queries, _ in ours] == [5, 20, 20]
    assert_same_matches(ours, oracle_matches(pair.oracle, prediction, targets))


def test_predictions_that_are_not_finite_are_matched_last(pair):
    """The others are matched as if it were not there, which the oracle shows without it."""
    torch.manual_seed(7)
    (prediction,) = random_predictions(1, 1, 20, 7)
    targets = random_targets([19], 7)
    others = torch.arange(20) != 4
    alone = {name: values[:, others] for name, values in prediction.items()}
    ((queries, indices),) = oracle_matches(pair.oracle, alone, targets)
    expected = [(torch.arange(20)[others][queries], indices)]
    places = [("pred_masks", torch.nan), ("pred_masks", torch.inf), ("pred_logits", torch.nan)]
    for name, value in places:
        broken = {key: values.detach().clone() for key, values in prediction.items()}
        broken[name][0, 4] = value
        torch.manual_seed(8)
        assert_same_matches(pair.model.criterion.matcher(broken, targets), expected)


def test_matches_under_mixed_precision_are_those_of_full_precision(pair):
    """200 points of logit -400 sum to 80,000: more than float16 holds."""
    torch.manual_seed(7)
    (prediction,) = random_predictions(1, 1, 20, 7)
    prediction["pred_masks"].data.mul_(30).sub_(400)
    targets = random_targets([10], 7)
    for dtype in (torch.float16, torch.bfloat16):
        torch.manual_seed(8)
        with torch.autocast("cpu", dtype):
            ours = pair.model.criterion.matcher(prediction, targets)
        assert_same_matches(ours, oracle_matches(pair.oracle, prediction, targets))


# ---- parts

both_attentions = pytest.mark.parametrize("attention", [deformable_attention, sampled_attention])
"""By compiled loops, as it runs on a CPU, and by grid_sample, as it runs elsewhere."""


@both_attentions
def test_deformable_attention_function(attention):
    """Double precision, points far outside included: values and all three gradients."""
    torch.manual_seed(0)
    shapes = ((6, 9), (3, 5), (2, 2))
    value = torch.randn(2, sum(h * w for h, w in shapes), 4, 3, dtype=torch.float64)
    locations = 2 * torch.rand(2, 11, 4, 3, 5, 2, dtype=torch.float64) - 0.5
    weights = torch.rand(2, 11, 4, 3, 5, dtype=torch.float64)
    inputs = [t.requires_grad_() for t in (value, locations, weights)]
    ours = attention(value, shapes, locations, weights)
    theirs = multi_scale_deformable_attention(value, list(shapes), locations, weights)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    direction = torch.randn_like(ours)
    for a, b in zip(
        torch.autograd.grad(ours, inputs, direction),
        torch.autograd.grad(theirs, inputs, direction),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_deformable_attention_at_the_edges(dtype):
    """Points far outside, on pixels, on edges, and many of them on the same pixels."""
    torch.manual_seed(0)
    shapes = ((6, 9), (3, 5), (1, 2))
    value = torch.randn(2, sum(h * w for h, w in shapes), 4, 3, dtype=dtype)
    locations = 3 * torch.rand(2, 41, 4, 3, 5, 2, dtype=dtype) - 1
    locations[:, ::4] = (18 * locations[:, ::4]).round() / 18
    locations[:, 0, 0] = 1e9
    weights = torch.rand(2, 41, 4, 3, 5, dtype=dtype)
    inputs = [t.requires_grad_() for t in (value, locations, weights)]
    exact = dtype.itemsize == 8
    expected = multi_scale_deformable_attention(value, list(shapes), locations, weights)
    ours = deformable_attention(value, shapes, locations, weights)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12 if exact else 1e-5)
    with torch.inference_mode():
        assert torch.equal(deformable_attention(value, shapes, locations, weights), ours)
    direction = torch.randn_like(ours)
    grads = torch.autograd.grad(ours, inputs, direction)
    for one, two in zip(grads, torch.autograd.grad(expected, inputs, direction), strict=True):
        # On a pixel the function of a place has a corner, and rounding says which side is meant.
        smooth = slice(None) if one.shape != locations.shape else slice(1, None, 4)
        atol = 1e-11 if exact else 1e-4
        torch.testing.assert_close(one[:, smooth], two[:, smooth], rtol=0, atol=atol)


@both_attentions
def test_deformable_attention_of_places_that_are_not_numbers(attention):
    """They give no numbers for their query, and nobody else's."""
    value, weights = torch.randn(1, 6, 1, 2), torch.rand(1, 3, 1, 1, 1)
    locations = torch.rand(1, 3, 1, 1, 1, 2)
    locations[0, 1] = float("nan")
    out = attention(value, ((2, 3),), locations, weights)
    assert out[0, 1].isnan().all()
    assert out[0, ::2].isfinite().all()


@both_attentions
def test_deformable_attention_gradients_by_differences(attention):
    torch.manual_seed(0)
    shapes = ((3, 4), (2, 2))
    value = torch.randn(1, 16, 2, 2, dtype=torch.float64)
    # Between pixel centres: at them, bilinear interpolation has no derivative to compare with.
    cells = torch.randint(0, 4, (1, 3, 2, 2, 2, 2)) + 0.1 + 0.8 * torch.rand(1, 3, 2, 2, 2, 2)
    sizes = torch.tensor([(w, h) for h, w in shapes], dtype=torch.float64)[:, None]
    locations = (cells.double() - 0.5) / sizes
    weights = torch.rand(1, 3, 2, 2, 2, dtype=torch.float64)
    inputs = tuple(t.requires_grad_() for t in (value, locations, weights))
    assert torch.autograd.gradcheck(lambda v, at, w: attention(v, shapes, at, w), inputs)


def test_deformable_attention_module():
    torch.manual_seed(0)
    shapes = ((4, 6), (2, 3))
    ours = MSDeformAttn(16, 2, 4, 3)
    for parameter in ours.parameters():
        torch.nn.init.normal_(parameter)
    theirs = OracleAttention(16, 4, 2, 3)
    theirs.load_state_dict(ours.state_dict())
    query, value = torch.randn(2, 30, 16), torch.randn(2, 30, 16)
    reference = torch.rand(30, 2)
    expected, _ = theirs(
        query,
        encoder_hidden_states=value,
        reference_points=reference[None, :, None].expand(2, -1, 2, -1),
        spatial_shapes_list=list(shapes),
    )
    torch.testing.assert_close(
        ours(query, reference, value, shapes), expected, rtol=1e-5, atol=1e-4
    )


@pytest.mark.parametrize("size", [(96, 160), (250, 333)], ids=str)
def test_backbone_equals_detectron2s(pair, size):
    """Fused attention, our names and stochastic depth at rest change nothing in the features."""
    swin = pair.cfg.MODEL.SWIN
    plain = SwinTransformer(
        in_chans=4,
        embed_dim=swin.EMBED_DIM,
        depths=swin.DEPTHS,
        num_heads=swin.NUM_HEADS,
        window_size=swin.WINDOW_SIZE,
        drop_path_rate=0.0,
    )
    plain.load_state_dict(pair.model.backbone.state_dict())
    plain.eval()
    x = torch.randn(2, 4, *size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours, theirs = pair.model.backbone(x), plain(x)
    assert list(ours) == ["res2", "res3", "res4", "res5"]
    for feature, expected in zip(ours.values(), theirs.values(), strict=True):
        torch.testing.assert_close(feature, expected, rtol=0, atol=1e-5)
