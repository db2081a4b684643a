from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ttt_video.errors import UserError
from ttt_video.world import WorldVideo
from ttt_video.world.corruptions import CORRUPTIONS, corrupt
from ttt_video.world.shifts import FAMILIES, SHIFTS, Shift, ShiftedVideo, deal, expand

FOG_THEN_NOISE = Shift(("fog", "gaussian_noise"), 4.0, "switch")


def test_constant():
    shift = Shift(("fog",), 2.5)
    assert {shift.at(t, 7) for t in range(7)} == {("fog", 2.5)}


def test_ramp():
    shift = Shift(("fog",), 4.0, "ramp")
    assert [shift.at(t, 5) for t in range(5)] == [("fog", s) for s in (0.0, 1.0, 2.0, 3.0, 4.0)]
    assert shift.at(0, 1) == ("fog", 4.0)


def test_switch():
    assert [FOG_THEN_NOISE.at(t, 5)[0] for t in range(5)] == ["fog"] * 3 + ["gaussian_noise"] * 2
    tunnel = Shift(("none", "darkness", "none"), 3.0, "switch")
    names = [tunnel.at(t, 6)[0] for t in range(6)]
    assert names == ["none", "none", "darkness", "darkness", "none", "none"]
    assert {FOG_THEN_NOISE.at(t, 9)[1] for t in range(9)} == {4.0}


@given(st.integers(1, 400), st.integers(2, 5))
def test_switch_gives_each_corruption_its_share_in_order(num_frames, count):
    shift = Shift(tuple(CORRUPTIONS[:count]), 3.0, "switch")
    names = [shift.at(t, num_frames)[0] for t in range(num_frames)]
    positions = [CORRUPTIONS.index(name) for name in names]
    assert positions == sorted(positions)
    shares = np.bincount(positions, minlength=count)
    assert shares.max() - shares.min() <= 1


@given(st.integers(1, 400), st.floats(0, 5))
def test_ramp_ends_at_its_severity_and_never_falls(num_frames, severity):
    shift = Shift(("darkness",), severity, "ramp")
    severities = [shift.at(t, num_frames)[1] for t in range(num_frames)]
    assert severities == sorted(severities)
    assert severities[-1] == pytest.approx(severity)


def test_names():
    assert Shift().name == "none"
    assert Shift(("fog",), 3.0).name == "fog-3"
    assert Shift(("fog",), 2.5, "ramp").name == "fog-2.5-ramp"
    assert FOG_THEN_NOISE.name == "fog+gaussian_noise-4-switch"


def test_video_under_a_shift():
    video = WorldVideo(1007, 4, 16, 32)
    shifted = ShiftedVideo(video, FOG_THEN_NOISE)
    assert len(shifted) == 4
    for t, name in enumerate(["fog", "fog", "gaussian_noise", "gaussian_noise"]):
        clean, frame = video[t], shifted[t]
        expected = corrupt(clean.image, name, 4.0, 1007, t, clean.depth)
        np.testing.assert_array_equal(frame.image, expected)
        np.testing.assert_array_equal(frame.sem_seg, clean.sem_seg)
        np.testing.assert_array_equal(frame.instances, clean.instances)
    np.testing.assert_array_equal(shifted[-1].image, shifted[3].image)
    with pytest.raises(IndexError):
        shifted[4]
    assert sum(1 for _ in shifted) == 4


def test_no_shift_is_the_video():
    video = WorldVideo(1007, 2, 16, 32)
    for clean, frame in zip(video, ShiftedVideo(video, Shift()), strict=True):
        np.testing.assert_array_equal(frame.image, clean.image)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((("sleet",),), "unknown corruption 'sleet'"),
        ((("fog",), 6.0), "severity is 6"),
        ((("fog",), 3.0, "zigzag"), "unknown schedule 'zigzag'.*constant, ramp, switch, return"),
        ((("fog",), 3.0, "switch"), "switch needs at least two"),
        (((), 3.0, "return"), "return needs at least one"),
        ((("fog", "night"), 3.0, "ramp"), "ramp takes one corruption, not 2"),
        (((), 3.0), "constant takes one corruption, not 0"),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(UserError, match=message):
        Shift(*arguments)


def test_a_video_that_returns_is_clean_before_and_after_each_corruption():
    shift = Shift(("fog", "night"), 3.0, "return")
    names = [shift.at(index, 10)[0] for index in range(10)]
    assert names == [n for n in ("none", "fog", "none", "night", "none") for _ in range(2)]
    assert [shift.part(index, 10) for index in (0, 2, 9)] == [0, 1, 4]
    assert shift.name == "fog+night-3-return"
    assert Shift(("fog",), 3.0, "return").parts == ("none", "fog", "none")


def test_what_is_tuned_on_is_not_scored():
    validation, test = (set(FAMILIES[split]) for split in ("validation", "test"))
    assert not validation & test
    more = set(FAMILIES["more_validation"])
    assert not more & (validation | test)
    assert validation | more | test == set(CORRUPTIONS) - {"none"}
    for split, shifts in SHIFTS.items():
        assert len({shift.name for shift in shifts}) == len(shifts)
        used = {name for shift in shifts for name in shift.corruptions}
        assert used == {"none", *FAMILIES[split]}
        assert {shift.schedule for shift in shifts} == {"constant", "ramp", "switch"}
        assert shifts[0] == Shift()  # the clean video


def test_a_split_stands_for_its_families():
    assert expand(["none", "test", "fog"]) == ("none", *FAMILIES["test"], "fog")


@given(each=st.integers(1, 19), names=st.integers(1, 19), videos=st.integers(1, 12))
def test_corruptions_are_dealt_out_like_cards(each, names, videos):
    """None twice in a video, and none again before all others have been."""
    deck = FAMILIES["test"][:names]
    if each > names:
        with pytest.raises(UserError, match=f"each video gets {each} of {names}"):
            deal(deck, each, 0)
        return
    hands = [deal(deck, each, k) for k in range(videos)]
    assert all(len(set(hand)) == each for hand in hands)
    counts = Counter(name for hand in hands for name in hand)
    assert max(counts.values()) - min(counts[name] for name in deck) <= 1


def test_neighbours_of_the_list_go_to_different_videos():
    assert deal(FAMILIES["test"], 4, 0) == ("shot_noise", "zoom_blur", "night", "jpeg_compression")
