"""Overlays, with pixels checked by hand."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from detectron2.data import Metadata
from detectron2.structures import Instances
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from ttt_video.tasks import overlay_painter
from ttt_video.visualization.overlay import (
    BACKGROUND,
    blend,
    caption,
    class_palette,
    colorize,
    distinct_colors,
    resize,
    side_by_side,
    to_rgb,
)


def overlay_prediction(image, output, metadata):
    return overlay_painter(output, metadata)(image)


COLORS = [[100, 0, 0], [0, 100, 0], [0, 0, 100]]
META = SimpleNamespace(stuff_colors=COLORS, thing_colors=[[200, 200, 0], [0, 200, 200]])
GRAY = np.full((6, 8, 3), 100, np.uint8)


def test_colorize_by_hand():
    sem_seg = np.array([[0, 1, 2], [255, 3, -1]])
    expected = [[[100, 0, 0], [0, 100, 0], [0, 0, 100]], [[0, 0, 0]] * 3]
    for dtype in (np.int64, np.int32, np.int16):
        colored = colorize(sem_seg.astype(dtype), np.array(COLORS, np.uint8))
        assert colored.dtype == np.uint8
        np.testing.assert_array_equal(colored, expected)


@given(hnp.arrays(np.uint8, (3, 4)), st.integers(0, 300))
def test_colorize_every_uint8_label(labels, count):
    palette = distinct_colors(count)
    colored = colorize(labels, palette)
    for label, color in zip(labels.ravel(), colored.reshape(-1, 3), strict=True):
        np.testing.assert_array_equal(color, palette[label] if label < count else (0, 0, 0))


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
def test_blend_is_the_weighted_mean(alpha):
    rng = np.random.default_rng(0)
    image, color = rng.integers(0, 256, (2, 5, 7, 3), dtype=np.uint8)
    expected = (1 - alpha) * image + alpha * color.astype(float)
    assert np.abs(blend(image, color, alpha) - expected).max() <= 1


def test_distinct_colors_differ_and_do_not_depend_on_their_number():
    colors = distinct_colors(200).astype(int)
    assert len(np.unique(colors, axis=0)) == 200
    np.testing.assert_array_equal(distinct_colors(20), colors[:20])
    gaps = np.abs(colors[:20, None] - colors[None, :20]).sum(axis=2) + 1000 * np.eye(20, dtype=int)
    assert gaps.min() >= 40
    assert distinct_colors(0).shape == (0, 3)


def test_palette_comes_from_metadata_where_it_suffices():
    for count, things, expected in [
        (3, False, COLORS),
        (2, False, COLORS[:2]),
        (2, True, META.thing_colors),
        (3, True, COLORS),  # too few thing colours
        (4, False, distinct_colors(4)),
    ]:
        np.testing.assert_array_equal(class_palette(META, count, things=things), expected)
    for empty in (None, Metadata(name="overlay_test_empty")):
        np.testing.assert_array_equal(class_palette(empty, 5), distinct_colors(5))


def test_to_rgb():
    image = torch.arange(2 * 3 * 4, dtype=torch.uint8).reshape(3, 2, 4)
    rgb = to_rgb(image)
    assert rgb[1, 2].tolist() == [6, 14, 22]
    np.testing.assert_array_equal(to_rgb(image, "BGR"), rgb[:, :, ::-1])
    assert to_rgb(image, size=(4, 8)).shape == (4, 8, 3)
    wild = torch.tensor([-3.0, 0.4, 254.6, 300.0, float("nan"), float("inf")]).expand(3, 1, 6)
    assert to_rgb(wild)[0, :, 1].tolist() == [0, 0, 255, 255, 0, 255]
    assert to_rgb(wild.clone().requires_grad_())[0, 2].tolist() == [255] * 3


def test_semantic_overlay():
    scores = torch.zeros(3, 6, 8)
    scores[1] = 0.1
    scores[0, :, :3] = 0.5
    scores[2, 0, 7] = 0.9
    drawn = overlay_prediction(GRAY, {"sem_seg": scores}, META)
    assert drawn.shape == (6, 8, 3)
    assert drawn[3, 0].tolist() == [100, 50, 50]
    assert drawn[3, 5].tolist() == [50, 100, 50]
    assert drawn[0, 7].tolist() == [50, 50, 100]
    assert (GRAY == 100).all()


def test_panoptic_overlay():
    ids = torch.zeros(6, 8, dtype=torch.int32)
    ids[:, 4:] = 7
    ids[3:, 4:] = 9
    segments = [
        {"id": 7, "category_id": 2, "isthing": False},
        {"id": 9, "category_id": 1, "isthing": True},
    ]
    drawn = overlay_prediction(GRAY, {"panoptic_seg": (ids, segments)}, META)
    assert drawn[0, 0].tolist() == [100, 100, 100]  # id 0: no segment
    assert drawn[0, 3].tolist() == [100, 100, 100]  # the outline lies inside its segment
    assert drawn[0, 6].tolist() == [50, 50, 100]  # stuff has its class's very colour
    assert drawn[0, 4].tolist() == drawn[2, 6].tolist() == [0, 0, 100]  # outline: undiluted
    # A thing has a shade: thing colours are too few for class 2, so it starts from COLORS[1].
    shade = drawn[3, 6].astype(int)
    assert np.abs(shade - COLORS[1]).max() <= 48
    assert np.abs(2 * drawn[5, 6].astype(int) - 100 - shade).max() <= 1
    again = overlay_prediction(GRAY, {"panoptic_seg": (ids, segments[::-1])}, META)
    np.testing.assert_array_equal(again, drawn)


def instances_of(boxes, scores, classes) -> Instances:
    masks = torch.zeros(len(boxes), 6, 8)
    for mask, (top, bottom, left, right) in zip(masks, boxes, strict=True):
        mask[top:bottom, left:right] = 1
    return Instances(
        (6, 8),
        pred_masks=masks,
        scores=torch.tensor(scores),
        pred_classes=torch.tensor(classes, dtype=torch.long),
    )


def test_instance_overlay():
    boxes = [(0, 6, 0, 5), (0, 6, 2, 8), (0, 1, 0, 8)]
    instances = instances_of(boxes, [0.9, 0.6, 0.2], [0, 1, 1])
    drawn = overlay_prediction(GRAY, {"instances": instances}, META).astype(int)
    # The better one lies on top, columns 0-4; the third is below the threshold.
    best, second = drawn[3, 4], drawn[3, 5]  # their outlines
    assert np.abs(best - META.thing_colors[0]).max() <= 48
    assert np.abs(second - META.thing_colors[1]).max() <= 48
    assert np.abs(2 * drawn[:, :4] - 100 - best).max() <= 1
    assert np.abs(2 * drawn[:, 6:] - 100 - second).max() <= 1
    # The order of the instances changes nothing, nor do those that are left out.
    swapped = overlay_prediction(GRAY, {"instances": instances[[1, 0]]}, META)
    np.testing.assert_array_equal(swapped, drawn)


def test_instances_of_one_class_differ():
    instances = instances_of([(0, 6, 0, 4), (0, 6, 4, 8)], [0.9, 0.8], [1, 1])
    drawn = overlay_prediction(GRAY, {"instances": instances}, META)
    assert drawn[3, 1].tolist() != drawn[3, 6].tolist()


def test_no_instances_no_change():
    for instances in (instances_of([], [], []), instances_of([(0, 6, 0, 4)], [0.1], [1])):
        drawn = overlay_prediction(GRAY, {"instances": instances}, META)
        np.testing.assert_array_equal(drawn, GRAY)
    empty = {"panoptic_seg": (torch.zeros(6, 8, dtype=torch.int32), [])}
    np.testing.assert_array_equal(overlay_prediction(GRAY, empty, META), GRAY)


def test_the_frame_is_scaled_to_the_prediction():
    small = np.full((3, 4, 3), 100, np.uint8)
    drawn = overlay_prediction(small, {"sem_seg": torch.ones(1, 6, 8)}, META)
    assert drawn.shape == (6, 8, 3)
    assert (drawn == [100, 50, 50]).all()


def test_which_prediction_is_drawn():
    ids = torch.zeros(6, 8, dtype=torch.int32)
    both = {"sem_seg": torch.ones(1, 6, 8), "panoptic_seg": (ids, [])}
    np.testing.assert_array_equal(overlay_prediction(GRAY, both, META), GRAY)
    with pytest.raises(ValueError, match=r"keys \['boxes'\]"):
        overlay_prediction(GRAY, {"boxes": 1}, META)


def test_resize_is_pillows():
    image = np.random.default_rng(0).integers(0, 256, (9, 11, 3), dtype=np.uint8)
    assert resize(image, (9, 11)) is image
    expected = np.asarray(Image.fromarray(image).resize((7, 20), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(resize(image, (20, 7)), expected)


@pytest.mark.parametrize(
    ("height", "width", "columns", "layout"),
    [
        (120, 160, None, (1, 3)),
        (60, 240, None, (3, 1)),  # wide frames are stacked
        (120, 160, 2, (2, 2)),
    ],
)
def test_side_by_side_keeps_every_pixel(height, width, columns, layout):
    panels = [np.full((height, width, 3), value, np.uint8) for value in (60, 120, 180)]
    joined = side_by_side(panels, ["frame", "frozen", "adapted"], columns=columns)
    strip = len(caption("frame", width))
    rows, cols = layout
    assert joined.shape == (rows * (height + strip), cols * width, 3)
    for index, panel in enumerate(panels):
        top, left = index // cols * (height + strip) + strip, index % cols * width
        np.testing.assert_array_equal(joined[top : top + height, left : left + width], panel)
    if rows * cols > 3:
        assert (joined[height + strip :, width:] == BACKGROUND).all()


def test_side_by_side_scales_to_the_first_panel():
    joined = side_by_side([np.zeros((90, 160, 3), np.uint8), GRAY], ["a", "b"], columns=2)
    strip = len(caption("a", 160))
    assert joined.shape == (90 + strip, 320, 3)
    assert (joined[strip:, 160:] == 100).all()


def test_side_by_side_refuses_a_missing_title():
    with pytest.raises(ValueError, match="2 panels"):
        side_by_side([GRAY, GRAY], ["one"])


def test_captions_are_legible_and_differ():
    strips = {title: caption(title, 320) for title in ("frozen", "adapted", "größer", "")}
    assert all(strip.shape == (18, 320, 3) for strip in strips.values())
    assert (strips[""] == BACKGROUND).all()
    for title in ("frozen", "adapted", "größer"):
        lit = strips[title].max(axis=2) > 150
        assert 50 < lit.sum() < 0.2 * lit.size
    assert (strips["frozen"] != strips["adapted"]).any()
    assert caption("x" * 500, 60).shape == (18, 60, 3)  # cut off, not wider
