"""Words on pictures: which classes a legend lists, where, and names on segments."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from detectron2.structures import Instances

from ttt_video.tasks import overlay_painter
from ttt_video.visualization.legend import (
    _ABSENT,
    BACKGROUND,
    TEXT,
    LegendEntry,
    legend,
    write_names,
)
from ttt_video.visualization.overlay import grid_columns, side_by_side

RED, GREEN, BLUE = (250, 10, 10), (10, 250, 10), (10, 10, 250)
NAMES = ("road", "car", "person")
META = SimpleNamespace(
    stuff_classes=NAMES,
    thing_classes=NAMES,
    stuff_colors=[RED, GREEN, BLUE],
    thing_colors=[RED, GREEN, BLUE],
)


def entries(*seen: bool) -> tuple[LegendEntry, ...]:
    return tuple(map(LegendEntry, NAMES, (RED, GREEN, BLUE), seen))


def has(strip: np.ndarray, color: tuple[int, int, int]) -> bool:
    return bool((strip == color).all(-1).any())


def test_classes_that_are_not_in_the_frame_are_dimmed_where_they_stand():
    both, one = legend(entries(True, True, False), 400), legend(entries(True, False, False), 400)
    assert both.shape == one.shape
    assert has(both, RED)
    assert has(both, GREEN)
    assert not has(both, BLUE)
    assert not has(one, GREEN)
    # The others do not move.
    left = int(np.flatnonzero((both == GREEN).all(-1).any(0))[0]) - 1
    assert (both[:, :left] == one[:, :left]).all()
    assert (one != BACKGROUND).any(-1)[:, left:].any()


def test_of_many_classes_only_those_of_the_frame_are_listed():
    many = [LegendEntry(f"a class with a name {i}", (i, 255, i), False) for i in range(100)]
    seen = [entry._replace(seen=entry.name.endswith("7")) for entry in many]
    few = [entry._replace(seen=entry.name.endswith("77")) for entry in many]
    strips = [legend(tuple(each), 300) for each in (many, seen, few)]
    assert len({strip.shape for strip in strips}) == 1  # the video has one size
    assert (strips[0] == BACKGROUND).all()
    assert has(strips[2], (77, 255, 77))
    assert has(strips[1], (7, 255, 7))
    assert not has(strips[1], (97, 255, 97))  # there is no room; "+7" says so
    assert (strips[1][-14:, -20:] != BACKGROUND).any()


def test_a_legend_lists_what_is_predicted():
    scores = torch.zeros(3, 20, 30)
    scores[0, :10] = scores[2, 10:] = 1
    assert overlay_painter({"sem_seg": scores}, META).legend() == entries(True, False, True)
    ids = torch.zeros(20, 30, dtype=torch.int32)
    ids[5:, 5:] = 4
    segments = [{"id": 4, "category_id": 1, "isthing": True}]
    panoptic = overlay_painter({"panoptic_seg": (ids, segments)}, META)
    assert panoptic.legend() == entries(False, True, False)
    assert panoptic.names == {4: "car"}
    instances = Instances(
        (20, 30),
        pred_masks=torch.ones(2, 20, 30),
        scores=torch.tensor([0.9, 0.2]),
        pred_classes=torch.tensor([2, 0]),
    )
    found = overlay_painter({"instances": instances}, META)
    assert found.legend() == entries(False, False, True)
    assert found.names == {1: "person"}


def test_without_names_there_is_no_legend():
    bare = SimpleNamespace(stuff_colors=META.stuff_colors)
    output = {"sem_seg": torch.rand(3, 20, 30)}
    assert overlay_painter(output, bare).legend() == ()
    assert overlay_painter(output, SimpleNamespace(stuff_classes=NAMES[:2])).legend() == ()


@pytest.mark.parametrize("shade", [0, 128, 255])
def test_names_can_be_read_on_any_frame(shade):
    image = np.full((100, 200, 3), shade, np.uint8)
    ids = np.zeros((100, 200), np.int32)
    ids[20:60, 100:190] = 2
    ids[90:95, 10:80] = 3  # lower than the letters
    written = write_names(image, ids, {2: "car", 3: "train", 5: "elsewhere"})
    changed = (written != image).any(-1)
    assert changed[:, :100].sum() == 0
    rows, columns = np.nonzero(changed)
    assert abs(rows.mean() - 40) < 4
    assert abs(columns.mean() - 145) < 4
    inked = written[changed].mean(-1)
    assert (inked < 60).any() or shade == 0
    assert (inked > 200).any() or shade == 255
    assert (image == shade).all()


def test_a_name_stands_on_its_segment():
    """Also where the middle of its box does not."""
    ids = np.ones((200, 200), np.int32)
    ids[:, 40:] = 2
    ids[:150, 60:140] = 1  # 2 is a U, whose middle is 1's
    written = write_names(np.zeros((200, 200, 3), np.uint8), ids, {2: "U"})
    rows, columns = np.nonzero(written.any(-1))
    y, x = round(rows.mean()), round(columns.mean())
    assert (ids[y - 2 : y + 3, x - 2 : x + 3] == 2).any()


def test_a_name_that_would_cover_a_larger_segments_is_left_out():
    ids = np.zeros((100, 300), np.int32)
    ids[50:60, 100:200], ids[60:70, 130:170] = 1, 2  # closer to one another than two lines
    ids[40:60, 240:290] = 3
    black = np.zeros((100, 300, 3), np.uint8)
    written = write_names(black, ids, {1: "train", 2: "bus", 3: "car"})
    assert (written == write_names(black, ids, {1: "train", 3: "car"})).all()
    assert written[:, :220].any()
    assert written[:, 220:].any()
    assert write_names(black, ids, {2: "bus"}).any()  # it has room without the other


@pytest.mark.parametrize(
    ("count", "height", "width", "columns"),
    [
        (1, 9, 16, 1),
        (2, 9, 16, 2),
        (3, 9, 16, 3),
        (4, 9, 16, 2),
        (3, 375, 1242, 1),
        (4, 16, 9, 2),
        (3, 16, 9, 3),
    ],
)
def test_the_whole_is_close_to_a_screen(count, height, width, columns):
    assert grid_columns(count, height, width) == columns


def test_pictures_are_enlarged_to_be_read_and_made_smaller_to_be_decoded():
    def size(height: int, width: int, count: int) -> tuple[int, ...]:
        panels = [np.zeros((height, width, 3), np.uint8)] * count
        return side_by_side(panels, ["x"] * count, sides=(480, 3840)).shape[:2]

    caption = 18 + 4  # at 512 px
    assert size(128, 256, 2) == (2 * (256 + caption), 512)
    assert size(720, 1280, 2)[1] == 2560
    assert size(720, 1280, 3)[1] == 3840
    assert size(1080, 1920, 3)[1] == 3840
    assert size(2160, 3840, 4)[1] == 3840


def test_panels_are_of_one_height_where_one_has_a_legend():
    """Figures of runs cut the picture into equal parts."""
    panels = [np.full((90, 300, 3), 200, np.uint8)] * 2
    strip = legend(entries(True, False, True), 300)
    legends = [(), entries(True, False, True)]
    beside = side_by_side(panels, ["a", "b"], columns=2, legends=legends)
    assert (beside[-len(strip) :, 300:] == strip).all()
    assert (beside[-len(strip) :, :300] == BACKGROUND).all()
    below = side_by_side(panels, ["a", "b"], columns=1, legends=legends)
    assert (below[-len(strip) :] == strip).all()
    without = side_by_side(panels, ["a", "b"], columns=1, legends=[(), ()])
    assert len(below) == len(without) + 2 * len(strip)
    assert (below[len(below) // 2 - len(strip) : len(below) // 2] == BACKGROUND).all()
    three = side_by_side([*panels, panels[0]], ["a", "b", "c"], columns=2, legends=[*legends, ()])
    assert len(three) == len(without) + 2 * len(strip)
    assert (three[-90:, 300:] == BACKGROUND).all()


def test_names_of_absent_classes_can_be_read():
    """At 4.5 to 1, the least contrast that WCAG 2 asks of text."""

    def luminance(value: float) -> float:
        return ((value / 255 + 0.055) / 1.055) ** 2.4

    low, high = luminance(BACKGROUND[0]), luminance(round(_ABSENT * TEXT[0]))
    assert (high + 0.05) / (low + 0.05) >= 4.5
