"""Curves, read back with Pillow; rolling means against numpy."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from ttt_video.report.curves import plot_curves, rolling_mean


def test_curves_are_drawn(tmp_path):
    plot_curves({"online": [1.0] * 40}, tmp_path / "one.png", "Loss", "loss")
    plot_curves(
        {"online": [1.0] * 40, "tent": [1.0 - i / 80 for i in range(40)]},
        tmp_path / "two.png",
        "Loss",
        "loss",
    )
    one, two = (np.asarray(Image.open(tmp_path / name)) for name in ("one.png", "two.png"))
    assert one.shape == two.shape

    def colored(image: np.ndarray) -> int:
        return int((np.ptp(image[:, :, :3].astype(int), axis=2) > 60).sum())

    assert colored(one) > 500
    assert colored(two) > 1.5 * colored(one)


@pytest.mark.parametrize(
    "series",
    [{}, {"empty": []}, {"one": [0.5]}, {"gaps": [1.0, float("nan"), float("inf"), 2.0]}],
)
def test_curves_of_hardly_anything(tmp_path, series):
    plot_curves(series, tmp_path / "curve.svg", "title", "loss")
    assert "</svg>" in (tmp_path / "curve.svg").read_text()


def test_curves_do_not_go_through_pyplot(tmp_path, monkeypatch):
    # pyplot would pick a display's backend and keep every figure alive.
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    plot_curves({"a": [1.0, 2.0]}, tmp_path / "a.png", "title", "loss")
    assert (tmp_path / "a.png").stat().st_size > 1000


def test_lines_and_means_do_not_cross_from_video_to_video(tmp_path, monkeypatch):
    lines = []

    def plot(self, x, y, *args, **settings):
        lines.append((list(x), list(y), settings.get("label")))

    monkeypatch.setattr("matplotlib.axes.Axes.plot", plot)
    values = [0.0, 0.0, 0.0, 90.0, 90.0, 5.0]
    plot_curves({"a": values}, tmp_path / "a.svg", "t", "y", rolling=3, starts=[0, 3, 5, 6])
    thin, thick = lines[0::2][:2], lines[1::2][:2]
    assert [line[:2] for line in thin] == [([0, 1, 2], [0, 0, 0]), ([3, 4], [90, 90])]
    assert [line[1] for line in thick] == [[0, 0, 0], [90, 90]]
    assert lines[4:] == [([5], [5.0], None)]
    assert [line[2] for line in thick] == ["a", None]  # one name in the legend


@given(
    st.lists(st.one_of(st.floats(-100, 100), st.just(float("nan"))), max_size=30),
    st.integers(1, 12),
)
def test_rolling_mean_is_the_mean_of_the_neighbours(values, width):
    means = rolling_mean(values, width)
    assert len(means) == len(values)
    for i, found in enumerate(means):
        near = values[max(0, i - width // 2) : i + (width + 1) // 2]
        known = [v for v in near if v == v]
        if known:
            assert found == pytest.approx(np.mean(known), abs=1e-9)
        else:
            assert np.isnan(found)


def test_rolling_mean_by_hand():
    np.testing.assert_array_equal(rolling_mean([3, 6, 9, 0], 3), [4.5, 6, 5, 4.5])
    np.testing.assert_array_equal(rolling_mean([3, 6, 9, 0], 1), [3, 6, 9, 0])


def test_rolling_mean_is_drawn_at_its_positions(tmp_path):
    values = [float(i % 2) for i in range(50)]
    positions = [10 * i for i in range(50)]
    plot_curves({"a": values}, tmp_path / "raw.svg", "t", "y", x=positions)
    plot_curves({"a": values}, tmp_path / "mean.svg", "t", "y", x=positions, rolling=4)
    raw, mean = ((tmp_path / name).read_text() for name in ("raw.svg", "mean.svg"))
    assert "mean of 4 frames" in mean
    assert "mean of 4 frames" not in raw
    assert ">500<" in raw.replace("<!-- 500 -->", ">500<")  # the last tick of the axis
    assert len(mean) > len(raw)
