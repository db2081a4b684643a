"""Streets that lead through parks and tunnels."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ttt_video.errors import UserError
from ttt_video.world import WORLD_CLASS_IDS, WorldVideo
from ttt_video.world.scene import BUILDING, SKY, VEGETATION
from ttt_video.world.scenery import daylight, exposure
from ttt_video.world.street import ego_distance
from ttt_video.world.style import Route, draw_style
from ttt_video.world.video import SCENE_SECONDS

H, W = 32, 64
JOURNEY = ("street", "tunnel", "park")


def same(a, b):
    return all(
        (x == y).all()
        for x, y in ((a.image, b.image), (a.sem_seg, b.sem_seg), (a.instances, b.instances))
    )


def test_a_street_alone_is_the_default():
    assert same(WorldVideo(2003, 9, H, W)[8], WorldVideo(2003, 9, H, W, ["street"])[8])


def test_frames_do_not_depend_on_order_or_length():
    short, long = WorldVideo(5, 120, H, W, JOURNEY), WorldVideo(5, 500, H, W, JOURNEY)
    expected = short[110]
    short[3]
    assert same(short[110], expected)
    assert same(long[110], expected)


def test_labels_and_depth_stay_right():
    for seed in range(4):
        video = WorldVideo(seed, 240, H, W, JOURNEY)
        for t in range(0, 240, 30):
            frame = video[t]
            assert set(np.unique(frame.sem_seg)) <= set(WORLD_CLASS_IDS)
            np.testing.assert_array_equal(np.isinf(frame.depth), frame.sem_seg == SKY)


def share(frames, label):
    return np.mean([(frame.sem_seg == label).mean() for frame in frames])


def test_a_park_is_green():
    streets, parks = (
        [WorldVideo(seed, 1, H, W, [scene])[0] for seed in range(12)]
        for scene in ("street", "park")
    )
    assert share(parks, VEGETATION) > 2 * share(streets, VEGETATION)
    assert share(parks, BUILDING) < 0.3 * share(streets, BUILDING)


def test_through_a_tunnel_and_out_again():
    """Inside there is a ceiling and no sky; outside it is too bright at first."""
    bright, settled = [], []
    for seed in range(6):
        style = draw_style(seed)
        distance = np.array([ego_distance(style, t / 10) for t in range(300)])
        exit_at = distance[0] + 2 * SCENE_SECONDS * style.speed
        video = WorldVideo(seed, 300, H, W, ("street", "tunnel", "street"))
        inside, leaving = np.searchsorted(distance, [exit_at - 30, exit_at])
        upper = video[int(inside)].sem_seg[: H // 4]
        assert not (upper == SKY).any()
        assert (upper == BUILDING).mean() > 0.6  # signs, too
        bright.append(video[int(leaving) + 3].image.mean())
        settled.append(video[int(leaving) + 25].image.mean())
    assert np.mean(bright) > np.mean(settled) + 25


def test_daylight_by_hand():
    left = daylight([(10.0, 110.0)], np.array([0.0, 10.0, 17.0, 60.0, 103.0, 110.0, 500.0]))
    deep, edge = 0.16, 0.16 + 0.84 * np.exp(-1)
    np.testing.assert_allclose(left, [1, 1, edge, deep, edge, 1, 1], atol=1e-3)
    assert exposure([(10.0, 110.0)], 0.0) == 1
    assert exposure([(10.0, 110.0)], 60.0) == pytest.approx(0.16**-0.75, rel=1e-2)
    assert exposure([], 60.0) == 1


@given(st.lists(st.sampled_from(("street", "park")), min_size=1, max_size=4), st.floats(-500, 500))
def test_a_route_goes_round(between, z):
    route = Route((*between, "tunnel"), 3.0, 50.0)
    assert route.at(z) == (*between, "tunnel")[int((z - 3.0) // 50.0) % (len(between) + 1)]
    tunnels = route.tunnels(z - 1.0, z + 1.0)
    assert any(start <= z < end for start, end in tunnels) == (route.at(z) == "tunnel")
    assert all(end - start == pytest.approx(50.0) for start, end in tunnels)


@pytest.mark.parametrize(
    ("scenes", "message"),
    [
        (("beach",), "scenes are beach; choose some of: street, park, tunnel"),
        ((), "scenes are none"),
        (("tunnel",), "no tunnel may follow a tunnel"),
        (("tunnel", "park", "tunnel"), "no tunnel may follow a tunnel"),
    ],
)
def test_routes_that_make_no_sense(scenes, message):
    with pytest.raises(UserError, match=message):
        WorldVideo(0, 1, H, W, scenes)
