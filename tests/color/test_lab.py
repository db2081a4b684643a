"""CIE Lab against its definition, published values and scikit-image."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ttt_video.color.lab import compose, lab_to_rgb, lightness, rgb_to_lab, to_grey

# L, a, b as Lindbloom's calculator gives them (sRGB, D65, no adaptation).
KNOWN = {
    (255, 0, 0): (53.2408, 80.0925, 67.2032),
    (0, 255, 0): (87.7347, -86.1827, 83.1793),
    (0, 0, 255): (32.2970, 79.1875, -107.8602),
    (255, 255, 0): (97.1393, -21.5537, 94.4780),
    (0, 255, 255): (91.1132, -48.0875, -14.1312),
    (255, 0, 255): (60.3242, 98.2343, -60.8249),
    (255, 255, 255): (100.0, 0.0, 0.0),
    (0, 0, 0): (0.0, 0.0, 0.0),
    (119, 119, 119): (50.0345, 0.0, 0.0),
}


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pixels(*values: tuple[float, ...]) -> torch.Tensor:
    """(3, N, 1) of N colours."""
    return torch.tensor(values, dtype=torch.float64).T[..., None]


def test_colours_that_are_published():
    rgb = pixels(*KNOWN)
    expected = pixels(*KNOWN.values())
    torch.testing.assert_close(rgb_to_lab(rgb / 255), expected, atol=0.011, rtol=0)
    torch.testing.assert_close(rgb_to_lab(rgb.byte()).double(), expected, atol=0.011, rtol=0)
    torch.testing.assert_close(lab_to_rgb(expected), rgb / 255, atol=2e-4, rtol=0)


def test_lightness_is_its_definition():
    # 116 Y^(1/3) - 16, and 903.3 Y below Y = 0.008856, where L is 8. Y of a grey is its linear
    # value, ((v + 0.055) / 1.055)^2.4, and v / 12.92 up to v = 0.04045.
    v = torch.tensor([0.03, 0.0887, 0.2, 0.5, 1.0], dtype=torch.float64)
    y = [0.03 / 12.92, *(((float(x) + 0.055) / 1.055) ** 2.4 for x in v[1:])]
    expected = [903.3 * t if t <= 0.008856 else 116 * t ** (1 / 3) - 16 for t in y]
    assert expected[1] < 8 < expected[2]
    actual = lightness(v.expand(3, 1, 5))[0, 0]
    torch.testing.assert_close(actual, torch.tensor(expected).double(), atol=1e-4, rtol=0)
    both = noise(2, 3, 4, 5)
    torch.testing.assert_close(lightness(both), rgb_to_lab(both)[:, :1])


def test_scikit_image_has_the_same_numbers():
    color = pytest.importorskip("skimage.color")
    rgb = torch.cat([noise(2, 3, 32, 32), 0.05 * noise(2, 3, 32, 32, seed=1)])
    lab = rgb_to_lab(rgb)
    expected = color.rgb2lab(rgb.numpy(), channel_axis=1)
    np.testing.assert_allclose(lab.numpy(), expected, atol=1e-6, rtol=0)
    back = color.lab2rgb(expected, channel_axis=1)
    np.testing.assert_allclose(lab_to_rgb(lab).numpy(), back, atol=1e-6, rtol=0)
    # Colours that sRGB has not: scikit-image clips them.
    lab[:, 1:] *= 1.3
    lab[:, 0] = lab[:, 0].clamp(min=60)
    back = color.lab2rgb(lab.numpy(), channel_axis=1)
    clipped = lab_to_rgb(lab).clamp(0, 1)
    assert ((clipped == 0) | (clipped == 1)).any()
    np.testing.assert_allclose(clipped.numpy(), back, atol=1e-6, rtol=0)


@pytest.mark.parametrize("scale", [1.0, 0.02])
def test_there_and_back_is_the_same(scale):
    rgb = scale * noise(2, 2, 3, 8, 9)
    torch.testing.assert_close(lab_to_rgb(rgb_to_lab(rgb)), rgb, atol=1e-6, rtol=0)
    single = rgb.float()
    assert rgb_to_lab(single).dtype == torch.float32
    torch.testing.assert_close(lab_to_rgb(rgb_to_lab(single)), single, atol=2e-5, rtol=0)


def test_gradients_are_finite_and_right():
    rgb = noise(3, 3, 3).clamp(0.06, 1).requires_grad_()
    assert torch.autograd.gradcheck(rgb_to_lab, rgb)
    assert torch.autograd.gradcheck(lab_to_rgb, rgb_to_lab(rgb).detach().requires_grad_())
    black = torch.zeros(3, 2, 2, requires_grad=True)
    lab_to_rgb(rgb_to_lab(black)).sum().backward()
    assert torch.isfinite(black.grad).all()


def test_a_grey_picture_stays_to_the_bit():
    values = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16)
    assert torch.equal(to_grey(values.expand(3, -1, -1)), values)


def test_grey_has_the_lightness_of_the_picture():
    rgb = (255 * noise(2, 3, 40, 40)).round().byte()
    grey = to_grey(rgb)
    assert grey.shape == (2, 1, 40, 40)
    error = (lightness(grey.expand(-1, 3, -1, -1)) - lightness(rgb)).abs().max()
    assert 0.1 < error <= 0.26  # half of the step of L between two of the 256 greys
    luma = (0.299 * rgb[:, :1] + 0.587 * rgb[:, 1:2] + 0.114 * rgb[:, 2:]).round().byte()
    assert (lightness(luma.expand(-1, 3, -1, -1)) - lightness(rgb)).abs().max() > 5


def test_a_picture_is_its_lightness_and_its_colours():
    rgb = (255 * noise(2, 3, 7, 9)).round().byte()
    lab = rgb_to_lab(rgb)
    assert torch.equal(compose(lab[:, :1], lab[:, 1:]), rgb)
    assert torch.equal(compose(lab[0, :1], lab[0, 1:]), rgb[0])
    grey = to_grey(rgb)
    none = compose(lightness(grey.expand(-1, 3, -1, -1)), torch.zeros(2, 2, 3, 4))
    assert torch.equal(none, grey.expand(-1, 3, -1, -1))


def test_coarse_colours_are_stretched_to_the_lightness():
    levels, ab = 100 * noise(1, 6, 8), 20 * noise(2, 3, 4)
    fine = F.interpolate(ab[None], (6, 8), mode="bilinear", align_corners=False)[0]
    assert torch.equal(compose(levels, ab), compose(levels, fine))
    assert compose(levels, ab).shape == (3, 6, 8)


def test_colours_that_srgb_has_not_are_clipped():
    picture = compose(torch.tensor([[[50.0]]]), torch.tensor([[[110.0]], [[-110.0]]]))
    assert picture.dtype == torch.uint8
    assert picture.flatten().tolist()[1:] == [0, 255]
