import hashlib
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ttt_video.world import WORLD_CLASS_IDS, WORLD_VERSION, WorldVideo, render_still
from ttt_video.world.renderer import Camera, Canvas, Patch
from ttt_video.world.rng import Draw, cell_hash, noise_tile, wave, wave_array
from ttt_video.world.scene import CAR, PERSON, ROAD, SIDEWALK, SKY
from ttt_video.world.street import ego_distance
from ttt_video.world.style import draw_style
from ttt_video.world.textures import plain

H, W = 48, 96


def frame_bytes(frame):
    arrays = (frame.image, frame.sem_seg, frame.instances, frame.depth)
    return b"".join(array.tobytes() for array in arrays)


@pytest.fixture(scope="module")
def stills():
    return [render_still(seed, H, W) for seed in range(40)]


def test_shapes_and_types():
    for height, width in ((H, W), (33, 71), (16, 16)):
        frame = WorldVideo(3, 2, height, width)[1]
        assert (frame.image.shape, frame.image.dtype) == ((height, width, 3), np.uint8)
        assert (frame.sem_seg.shape, frame.sem_seg.dtype) == ((height, width), np.uint8)
        assert (frame.instances.shape, frame.instances.dtype) == ((height, width), np.int32)
        assert (frame.depth.shape, frame.depth.dtype) == ((height, width), np.float32)
        assert all(array.flags.c_contiguous for array in (frame.image, frame.sem_seg, frame.depth))


def test_frames_do_not_depend_on_order_or_length():
    forward = [frame_bytes(frame) for frame in WorldVideo(7, 4, H, W)]
    video = WorldVideo(7, 90, H, W)
    assert [frame_bytes(video[t]) for t in (3, 2, 1, 0)] == forward[::-1]
    assert len(set(forward)) == 4


def test_same_bytes_as_when_this_version_was_made():
    """A change of the world's looks must raise WORLD_VERSION: caches and weights hang on it."""
    digest = hashlib.sha256()
    for seed in range(6):
        digest.update(frame_bytes(render_still(seed, H, W)))
    assert (WORLD_VERSION, digest.hexdigest()[:16]) == (1, "104ce98ad4768677")


def test_seeds_and_still_numbers_differ():
    images = {render_still(seed, H, W, k).image.tobytes() for seed in range(4) for k in range(3)}
    assert len(images) == 12


def test_a_zoomed_frame_is_the_middle_of_a_larger_one():
    for seed, time in itertools.product((0, 7, 2005), (0, 40)):
        zoomed = WorldVideo(seed, 60, H, W, zoom=2.0)[time]
        whole = WorldVideo(seed, 60, 2 * H, 2 * W)[time]
        middle = slice(H // 2, H // 2 + H), slice(W // 2, W // 2 + W)
        np.testing.assert_array_equal(zoomed.sem_seg, whole.sem_seg[middle])
        np.testing.assert_array_equal(zoomed.instances, whole.instances[middle])
        np.testing.assert_array_equal(zoomed.depth, whole.depth[middle])
        assert np.abs(zoomed.image.astype(float) - whole.image[middle]).mean() < 2


@pytest.mark.parametrize("zoom", [0.5, 0.0, -1.0, float("nan"), float("inf")])
def test_a_zoom_that_is_none_is_refused(zoom):
    with pytest.raises(ValueError, match=f"zoom must be at least 1, got {zoom}"):
        WorldVideo(0, 1, H, W, zoom=zoom)


def test_a_still_is_a_frame_of_its_video():
    still = frame_bytes(render_still(5, 16, 32))
    video = WorldVideo(5, 600, 16, 32)
    assert any(frame_bytes(frame) == still for frame in video)


@pytest.mark.slow
def test_labels_are_the_documented_ones_and_all_occur(stills):
    seen = np.unique(np.stack([frame.sem_seg for frame in stills]))
    assert seen.tolist() == list(WORLD_CLASS_IDS)


def test_no_class_is_a_rarity(stills):
    """A class that shows in few worlds could be neither learned nor scored."""
    for label in WORLD_CLASS_IDS:
        share = np.mean([(frame.sem_seg == label).any() for frame in stills])
        assert share > 0.5, label


def test_instances_are_cars_and_persons(stills):
    for frame in stills:
        things = np.isin(frame.sem_seg, (CAR, PERSON))
        np.testing.assert_array_equal(frame.instances > 0, things)
        assert frame.instances.min() >= 0
        assert frame.instances.max() <= 65535  # fits KITTI-STEP's two bytes
        for number in np.unique(frame.instances[things]):
            assert len(np.unique(frame.sem_seg[frame.instances == number])) == 1


def test_instance_ids_persist_over_time():
    video = WorldVideo(11, 5, 64, 128)
    for before, after in itertools.pairwise(video):
        ids = [set(np.unique(f.instances).tolist()) - {0} for f in (before, after)]
        assert len(ids[0] & ids[1]) >= 0.5 * len(ids[0])


def test_depth_is_infinite_in_the_sky_only(stills):
    for frame in stills:
        np.testing.assert_array_equal(np.isinf(frame.depth), frame.sem_seg == SKY)
        assert frame.depth.min() > 0


def test_ground_comes_nearer_down_the_picture(stills):
    """Depth of a plane seen from above falls monotonically towards the bottom of a column."""
    for frame in stills:
        ground = np.isin(frame.sem_seg, (ROAD, SIDEWALK))
        for column in range(0, W, 8):
            depth = frame.depth[ground[:, column], column]
            assert (np.diff(depth) < 0).all()


def test_ground_depth_is_that_of_the_camera_height():
    """Half-way down a level camera of height h and focal f, the ground is at h f / (H / 2)."""
    style = draw_style(4)
    frame = WorldVideo(4, 1, 200, 400)[0]
    row, column = np.argwhere(np.isin(frame.sem_seg, (ROAD, SIDEWALK)))[-1]
    down = (row + 0.5 - 100) / (style.focal * 400)
    expected = style.camera_height / (down - style.pitch)
    assert frame.depth[row, column] == pytest.approx(expected, rel=0.12)  # bounce and roll


def test_camera_drives_forward_and_changes_speed():
    for seed in range(20):
        style = draw_style(seed)
        distance = np.array([ego_distance(style, t / 10) for t in range(600)])
        speed = np.diff(distance) * 10
        assert speed.min() > 0
        assert speed.mean() == pytest.approx(style.speed, rel=0.1)
        assert speed.max() - speed.min() > 1.0


def test_picture_moves_but_not_much():
    video = WorldVideo(2, 3, 64, 128)
    change = np.abs(video[0].image.astype(int) - video[1].image.astype(int)).mean()
    other = np.abs(video[0].image.astype(int) - WorldVideo(1, 1, 64, 128)[0].image).mean()
    assert 0 < change < other


def test_index_like_a_sequence():
    video = WorldVideo(1, 3, 16, 32)
    assert len(video) == 3
    assert frame_bytes(video[-1]) == frame_bytes(video[2])
    for index in (3, -4):
        with pytest.raises(IndexError, match="3 frames"):
            video[index]


@pytest.mark.parametrize("bad", [(-1, 1, 32, 32), (0, -1, 32, 32), (0, 1, 15, 32), (0, 1, 32, 8)])
def test_bad_arguments(bad):
    with pytest.raises(ValueError, match="must"):
        WorldVideo(*bad)
    with pytest.raises(ValueError, match="index"):
        render_still(0, 32, 32, -1)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10**12), time=st.integers(0, 10**5), h=st.integers(16, 40),
    w=st.integers(16, 80),
)  # fmt: skip
def test_any_seed_time_and_size(seed, time, h, w):
    frame = WorldVideo(seed, time + 1, h, w)[time]
    assert set(np.unique(frame.sem_seg)) <= set(WORLD_CLASS_IDS)
    assert not np.isnan(frame.depth).any()


# The rasteriser, against geometry done by hand.

CAMERA = Camera((0.0, 0.0, 0.0), 0.0, 0.0, 0.0, focal=10.0)


def square(z, label, size=2.0, color=(1.0, 0.0, 0.0)):
    half = 0.5 * size
    return Patch((-half, -half, z), (size, 0, 0), (0, size, 0), plain(color), label)


def test_a_square_lands_where_projection_says():
    canvas = Canvas(CAMERA, 20, 20, background=10)
    canvas.draw([square(5.0, 2)])  # 2 m at 5 m with focal 10: 4 pixels, in the middle
    expected = np.full((20, 20), 10, dtype=np.uint8)
    expected[8:12, 8:12] = 2
    np.testing.assert_array_equal(canvas.label, expected)
    np.testing.assert_allclose(canvas.depth[8:12, 8:12], 5.0, rtol=1e-6)
    assert np.isinf(canvas.depth[0, 0])


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
def test_the_nearest_surface_shows(order):
    squares = [square(3.0, 13, 0.6), square(6.0, 2, 4.0), square(4.0, 8, 1.6)]
    canvas = Canvas(CAMERA, 20, 20, background=10)
    canvas.draw([squares[i] for i in order])
    assert canvas.label[10, 10] == 13
    assert canvas.label[10, 11] == 8
    assert canvas.label[10, 12] == 2


def test_intersecting_surfaces_share_the_picture():
    """A wall along the view direction cuts a frontal one at its depth."""
    wall = Patch((0.05, -9, 1.0), (0.0, 0.0, 50.0), (0, 18, 0), plain((0, 1, 0)), 8)
    canvas = Canvas(CAMERA, 20, 20, background=10)
    canvas.draw([square(5.0, 2, 20.0), wall])
    row = canvas.label[10]
    np.testing.assert_array_equal(row[:10], 2)
    visible = [10 * 0.05 / (column + 0.5 - 10) < 5 for column in range(10, 20)]
    nearest_wall = [10 * 0.05 / (column + 0.5 - 10) >= 1 for column in range(10, 20)]
    expected = [8 if v and n else 2 for v, n in zip(visible, nearest_wall, strict=True)]
    np.testing.assert_array_equal(row[10:], expected)


def test_a_surface_through_the_camera_plane_is_clipped():
    floor = Patch((-50.0, -1.0, -50.0), (100.0, 0, 0), (0, 0, 100.0), plain((0, 0, 1)), 0)
    canvas = Canvas(CAMERA, 20, 20, background=10)
    canvas.draw([floor])
    assert (canvas.label[:10] == 10).all()
    # rays reach the floor at depth 10 / (row - 9.5), which ends at 50
    assert (canvas.label[10:] == 0).all()
    np.testing.assert_allclose(canvas.depth[15, 3], 10 / 5.5, rtol=1e-5)
    behind = Canvas(CAMERA, 20, 20, background=10)
    behind.draw([square(-5.0, 2)])
    assert (behind.label == 10).all()


def test_cut_outs_and_light():
    patch = square(5.0, 2)
    patch.shade = lambda x, y, depth: ((1.0, 0.5, 0.25), x < 1.0)
    patch.light = (0.5, 0.5, 1.0)
    canvas = Canvas(CAMERA, 20, 20, background=10)
    canvas.draw([patch])
    assert (canvas.label[8:12, 8:10] == 2).all()
    assert (canvas.label[8:12, 10:12] == 10).all()
    np.testing.assert_allclose(canvas.color[9, 9], (0.5, 0.25, 0.25))


@given(st.integers(-(2**70), 2**70), st.integers(-5, 5))
def test_draws_are_named_by_their_keys(a, b):
    first, second = Draw(a, b), Draw(a, b)
    values = [first.random() for _ in range(4)]
    assert values == [second.random() for _ in range(4)]
    assert all(0 <= v < 1 for v in values)
    assert len(set(values)) == 4
    assert Draw(a, b + 1).random() != values[0]


def test_draws_are_uniform():
    values = np.array([Draw(seed, 9).random() for seed in range(20000)])
    counts, _ = np.histogram(values, bins=20, range=(0, 1))
    assert np.abs(counts - 1000).max() < 150  # about five standard deviations
    i, j = np.meshgrid(np.arange(-100, 100), np.arange(-100, 100))
    counts, _ = np.histogram(cell_hash(i, j, 3), bins=20, range=(0, 1))
    assert np.abs(counts - 2000).max() < 250


def test_wave_is_nearly_a_sine():
    x = np.linspace(-3, 3, 601)
    ours = np.array([wave(v) for v in x])
    assert np.abs(ours - np.sin(2 * np.pi * x)).max() < 0.06
    np.testing.assert_allclose(wave_array(x.astype(np.float32)), ours, atol=1e-5)


def test_noise_tile_wraps():
    tile = noise_tile()
    assert (tile.min(), tile.max()) == (0.0, 1.0)
    inner = np.abs(np.diff(tile, axis=1)).mean()
    seam = np.abs(tile[:, 0] - tile[:, -1]).mean()
    assert seam < 1.5 * inner
