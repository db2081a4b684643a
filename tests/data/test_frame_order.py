"""Files are frames in the order in which people count."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ttt_video.formats.images import natural_key


def test_natural_order_by_hand():
    names = ["frame10", "frame2", "frame1", "a", "frame02", "2", "10", "frame2b10", "frame2b9", ""]
    expected = ["", "2", "10", "a", "frame1", "frame02", "frame2", "frame2b9", "frame2b10"]
    assert sorted(names, key=natural_key) == [*expected, "frame10"]


@pytest.mark.slow
@given(st.lists(st.text(max_size=12) | st.from_regex(r"[a-c0-3²٣é]{0,6}", fullmatch=True)))
def test_natural_order_is_total_for_any_names(names):
    ordered = sorted(names, key=natural_key)
    assert sorted(ordered) == sorted(names)
    shuffled = names[:]
    random.Random(0).shuffle(shuffled)
    assert sorted(shuffled, key=natural_key) == ordered


@given(
    st.text(alphabet="abcé_-. ", max_size=5),
    st.lists(st.integers(0, 10**30), unique=True),
    st.text(alphabet="xyz.", max_size=5),
)
def test_natural_order_sorts_numbers_as_numbers(before, numbers, after):
    names = [f"{before}{number}{after}" for number in numbers]
    assert sorted(names, key=natural_key) == [f"{before}{n}{after}" for n in sorted(numbers)]


@given(
    st.text(alphabet="abc", max_size=3),
    st.sampled_from("_- =@"),
    st.lists(st.decimals(0, 10**9, places=3), min_size=2),
    st.sampled_from(["", "_left", "-b"]),
    st.booleans(),
)
def test_decimal_time_stamps_sort_as_numbers(before, separator, times, after, padded):
    start = before + separator if before else ""

    def name(time) -> str:
        return f"{start}{time if padded else time.normalize():f}{after}"

    ordered = sorted({name(time) for time in times}, key=natural_key)
    assert ordered == [name(time) for time in sorted(set(times))]


@pytest.mark.parametrize(
    "ordered",
    [
        ["1.05", "1.1"],
        ["1", "1.05", "1.25", "1.5", "2"],
        ["v1.9", "v1.10"],  # not from a clock
        ["2024.9.1", "2024.10.1"],
        ["x1.9y", "x1.10y"],
        ["1.9.png", "1.10.png"],
        ["1305031102.05", "1305031102.1", "1305031103"],
    ],
)
def test_order_of_dotted_names(ordered):
    for order in itertools.permutations(ordered):
        assert sorted(order, key=natural_key) == ordered
