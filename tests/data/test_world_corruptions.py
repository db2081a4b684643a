import itertools

import numpy as np
import pytest

from ttt_video.data.world import WorldVideo
from ttt_video.data.world.corruptions import CORRUPTIONS, corrupt, severity_at
from ttt_video.errors import UserError

REAL = [name for name in CORRUPTIONS if name != "none"]


@pytest.fixture(scope="module")
def frame():
    return WorldVideo(1003, 1, 48, 96)[0]


def error(frame, name, severity, **keys):
    image = corrupt(frame.image, name, severity, keys.get("seed", 3), 0, frame.depth)
    return np.abs(image.astype(float) - frame.image).mean()


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_severity_zero_is_the_image(frame, name):
    image = corrupt(frame.image, name, 0.0, 5, 2, frame.depth)
    np.testing.assert_array_equal(image, frame.image)
    assert not np.shares_memory(image, frame.image)


def test_none_is_the_image_at_any_severity(frame):
    np.testing.assert_array_equal(corrupt(frame.image, "none", 5.0, 5, 2), frame.image)


@pytest.mark.parametrize("name", REAL)
def test_grows_with_severity(frame, name):
    errors = [error(frame, name, s) for s in (0.0, 0.25, 1.0, 2.0, 3.0, 4.0, 5.0)]
    assert all(a < b for a, b in itertools.pairwise(errors))
    assert errors[1] < 20  # no jump at the start of a ramp
    assert errors[4] > 10


@pytest.mark.parametrize("name", REAL)
def test_a_tiny_severity_is_next_to_none(frame, name):
    image = corrupt(frame.image, name, 1e-300, 5, 2, frame.depth)
    assert np.abs(image.astype(int) - frame.image).max() <= 1


@pytest.mark.parametrize("name", REAL)
def test_is_a_function_of_its_arguments(frame, name):
    before = frame.image.copy()
    first = corrupt(frame.image, name, 3.0, 5, 2, frame.depth)
    np.random.seed(1)  # noqa: NPY002  no global state takes part
    np.testing.assert_array_equal(first, corrupt(frame.image, name, 3.0, 5, 2, frame.depth))
    np.testing.assert_array_equal(frame.image, before)
    assert first.dtype == np.uint8
    assert first.shape == frame.image.shape


@pytest.mark.parametrize("name", ["gaussian_noise", "shot_noise", "impulse_noise", "darkness"])
def test_noise_is_new_in_every_frame(frame, name):
    frames = [corrupt(frame.image, name, 3.0, 5, t, frame.depth) for t in (0, 1)]
    assert (frames[0] != frames[1]).any()


@pytest.mark.parametrize("name", ["fog", "colour_shift", "low_contrast"])
def test_a_cast_stays_within_a_video(frame, name):
    frames = [corrupt(frame.image, name, 3.0, 5, t, frame.depth) for t in (0, 1)]
    np.testing.assert_array_equal(*frames)


def test_colour_shift_differs_between_videos(frame):
    frames = [corrupt(frame.image, "colour_shift", 3.0, seed, 0) for seed in (0, 1)]
    assert (frames[0] != frames[1]).any()


def test_gaussian_noise_has_imagenet_c_deviations():
    grey = np.full((200, 200, 3), 128, dtype=np.uint8)
    for severity, sigma in ((1, 0.08), (2, 0.12), (2.5, 0.15)):
        noisy = corrupt(grey, "gaussian_noise", severity, 1, 1) / 255
        assert noisy.std() == pytest.approx(sigma, rel=0.02)


def test_impulse_noise_hits_the_stated_share():
    grey = np.full((200, 200, 3), 128, dtype=np.uint8)
    noisy = corrupt(grey, "impulse_noise", 4, 1, 1)
    assert (noisy == 0).mean() == pytest.approx(0.085, abs=0.005)
    assert (noisy == 255).mean() == pytest.approx(0.085, abs=0.005)


def test_low_contrast_by_hand():
    image = np.zeros((2, 2, 3), dtype=np.uint8)
    image[0] = 200  # mean 100, contrast 0.2 at severity 3
    expected = np.zeros_like(image)
    expected[0], expected[1] = 120, 80
    np.testing.assert_array_equal(corrupt(image, "low_contrast", 3, 0, 0), expected)


def test_fog_is_the_airlight_far_away_and_the_scene_nearby():
    image = np.zeros((1, 3, 3), dtype=np.uint8)
    depth = np.array([[0.0, 10.0, np.inf]], dtype=np.float32)
    near, middle, sky = corrupt(image, "fog", 4, 7, 0, depth)[0].astype(float)
    assert (near == 0).all()
    assert (sky > 0.6 * 255).all()
    # extinction 0.06 at severity 4
    np.testing.assert_allclose(middle, sky * (1 - np.exp(-0.6)), atol=1.0)


def test_errors(frame):
    with pytest.raises(UserError, match=r"'snow'.*gaussian_noise"):
        corrupt(frame.image, "snow", 1, 0, 0)
    for severity in (-0.1, 5.1, float("nan")):
        with pytest.raises(UserError, match="severity"):
            corrupt(frame.image, "darkness", severity, 0, 0)
    with pytest.raises(UserError, match="depth"):
        corrupt(frame.image, "fog", 1, 0, 0)


def test_schedules():
    assert [severity_at(4.0, t, 5, ramp=True) for t in range(5)] == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert [severity_at(4.0, t, 5, ramp=False) for t in range(5)] == [4.0] * 5
    assert severity_at(4.0, 0, 1, ramp=True) == 4.0
