"""Decoder g's pixels and the reconstruction loss, by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from ttt_video.errors import UserError
from ttt_video.modeling.heads import ReconstructionHead
from ttt_video.modeling.reconstruction import (
    patch_statistics,
    reconstruction_loss,
    to_pixel_units,
)

# ---- layout of the pixels


class Pass(nn.Module):
    """Stands for both decoders: the features are the 48 channels."""

    def forward(self, *inputs):
        return (inputs[0], []) if len(inputs) == 1 else [{"pred_masks": inputs[1]}]


def test_channel_16c_4p_q_is_colour_c_of_pixel_4i_p_4j_q():
    head = ReconstructionHead(pixel_decoder=Pass(), predictor=Pass())
    channels = torch.randn(2, 48, 3, 5)
    pixels = head(channels)
    assert pixels.shape == (2, 3, 12, 20)
    for c in range(3):
        for p in range(4):
            for q in range(4):
                assert torch.equal(pixels[:, c, p::4, q::4], channels[:, 16 * c + 4 * p + q])


def test_decoder_g_of_a_model(tiny_model):
    predictor = tiny_model.recon_head.predictor
    assert predictor.query_feat.weight.shape[0] == 48
    assert predictor.query_embed.weight.shape[0] == 48
    h, g = (
        {k: v.shape for k, v in head.state_dict().items()}
        for head in (tiny_model.sem_seg_head, tiny_model.recon_head)
    )
    assert h.keys() - g.keys() == {"predictor.class_embed.weight", "predictor.class_embed.bias"}
    assert g.keys() <= h.keys()
    assert {k for k in g if g[k] != h[k]} == {
        "predictor.query_feat.weight",
        "predictor.query_embed.weight",
    }


def test_another_stride_is_refused(tiny_cfg, tiny_model):
    tiny_cfg.MODEL.SEM_SEG_HEAD.COMMON_STRIDE = 8
    with pytest.raises(UserError, match="COMMON_STRIDE is 8; ReconstructionHead needs 4"):
        ReconstructionHead(tiny_cfg, tiny_model.backbone.output_shape())


# ---- the loss


@pytest.fixture
def case() -> dict[str, Tensor]:
    """Two 4x4 images, the second 3 px wide and padded; the left two columns are visible."""
    torch.manual_seed(0)
    visible = torch.zeros(2, 1, 4, 4)
    visible[..., :2] = 1
    inside = torch.ones(2, 1, 4, 4)
    inside[1, ..., 3] = 0
    pixels = torch.randn(2, 3, 4, 4) * inside
    return {
        "prediction": torch.randn(2, 3, 4, 4),
        "pixels": pixels,
        "visible": visible,
        "inside": inside,
    }


def mean_square(case, columns_of_image: list[list[int]]) -> float:
    """Of each image's own columns, then over the images."""
    means = []
    for b, columns in enumerate(columns_of_image):
        values = [
            (case["prediction"][b, c, y, x] - case["pixels"][b, c, y, x]).item() ** 2
            for c in range(3)
            for y in range(4)
            for x in columns
        ]
        means.append(sum(values) / len(values))
    return sum(means) / len(means)


@pytest.mark.parametrize(
    ("region", "columns"),
    [
        ("masked", [[2, 3], [2]]),
        ("visible", [[0, 1], [0, 1]]),
        ("all", [[0, 1, 2, 3], [0, 1, 2, 3]]),  # padding too
    ],
)
def test_regions_by_hand(case, region, columns):
    loss = reconstruction_loss(**case, region=region)
    assert loss.item() == pytest.approx(mean_square(case, columns), rel=1e-5)


@pytest.mark.parametrize("region", ["masked", "visible"])
def test_padding_does_not_count(case, region):
    before = reconstruction_loss(**case, region=region)
    case["prediction"][1, :, :, 3] += 100
    assert reconstruction_loss(**case, region=region) == before


@pytest.mark.parametrize(("region", "visible"), [("masked", 1.0), ("visible", 0.0)])
def test_an_empty_region_costs_nothing(case, region, visible):
    case["visible"] = torch.full_like(case["visible"], visible)
    case["prediction"].requires_grad_()
    loss = reconstruction_loss(**case, region=region)
    assert loss == 0
    loss.backward()
    assert not case["prediction"].grad.any()


def test_gradient_is_twice_the_error_over_the_count(case):
    prediction = case["prediction"].requires_grad_()
    reconstruction_loss(**case, region="masked").backward()
    counted = (1 - case["visible"]) * case["inside"]
    share = len(counted) * 3 * counted.sum(dim=(1, 2, 3), keepdim=True)  # each image weighs alike
    expected = 2 * (prediction - case["pixels"]) * counted / share
    torch.testing.assert_close(prediction.grad, expected.detach())


def test_half_precision_predictions_give_a_float32_loss(case):
    case["prediction"] = (1000 * case["prediction"]).half()  # squares overflow float16
    loss = reconstruction_loss(**case, region="all")
    assert loss.dtype == torch.float32
    assert loss.isfinite()


# ---- per-patch normalisation


def mae_target(images: Tensor, patch: int) -> Tensor:
    """He et al.'s formula, one patch after the other, spelled out in pixels."""
    target = torch.empty_like(images)
    for b in range(images.shape[0]):
        for y in range(0, images.shape[2], patch):
            for x in range(0, images.shape[3], patch):
                values = images[b, :, y : y + patch, x : x + patch]
                mean = values.mean()
                variance = (values - mean).square().sum() / (values.numel() - 1)
                normalised = (values - mean) / (variance + 1.0e-6) ** 0.5
                target[b, :, y : y + patch, x : x + patch] = normalised
    return target


def test_normalised_target_is_maes():
    torch.manual_seed(0)
    pixels = 3 * torch.randn(2, 3, 8, 12) + 1
    pixels[0, :, :4, :4] = 0.7  # a flat patch: its target is zero
    prediction = torch.randn(2, 3, 8, 12)
    ones = torch.ones(2, 1, 8, 12)
    loss = reconstruction_loss(
        prediction, pixels, ones, region="all", inside=ones, normalize_patch=4
    )
    target = mae_target(pixels, 4)
    assert target[0, :, :4, :4].abs().max() < 1e-3
    assert loss.item() == pytest.approx((prediction - target).square().mean().item(), rel=1e-4)


def test_pixel_units_undo_the_normalisation():
    torch.manual_seed(0)
    pixels = 3 * torch.randn(2, 3, 8, 12) + 1
    torch.testing.assert_close(
        to_pixel_units(mae_target(pixels, 4), pixels, 4), pixels, rtol=1e-4, atol=1e-4
    )
    assert to_pixel_units(pixels, -pixels, None) is pixels


def test_statistics_are_constant_within_a_patch():
    torch.manual_seed(0)
    mean, std = patch_statistics(torch.randn(1, 3, 8, 8), 4)
    for statistic in (mean, std):
        assert statistic.shape == (1, 3, 8, 8)
        assert len(statistic.unique()) == 4
