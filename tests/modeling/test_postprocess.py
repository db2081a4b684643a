"""Semantic, instance and panoptic inference by hand on masks of a few pixels."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from detectron2.modeling.postprocessing import sem_seg_postprocess
from torch import Tensor

from ttt_video.modeling import postprocess
from ttt_video.modeling.kernels import VARIABLE
from ttt_video.modeling.postprocess import (
    enlarged_semantic_inference,
    instance_inference,
    panoptic_inference,
    resized,
    semantic_inference,
)

YES, NO = 9.0, -9.0
"""Mask logits of nearly 1 and nearly 0."""


def log(*rows: list[float]) -> Tensor:
    """Class logits whose softmax is the rows; the last column is "no object"."""
    probs = torch.tensor(rows)
    assert torch.allclose(probs.sum(1), torch.ones(len(rows)))
    return probs.log()


def masks(*rows: str) -> Tensor:
    """Mask logits (Q, 1, W) from strings: # is inside, . outside."""
    return torch.tensor([[[YES if pixel == "#" else NO for pixel in row]] for row in rows])


def logit(p: float) -> float:
    return math.log(p / (1 - p))


@pytest.mark.parametrize("size", [(3, 4), (6, 8)])
def test_scores_at_another_size_leave_the_logits_alone(size):
    generator = torch.Generator().manual_seed(0)
    classes, logits = (torch.randn(s, generator=generator) for s in ((2, 3), (2, 3, 4)))
    before = logits.clone()
    scores = enlarged_semantic_inference(classes, logits, size)
    assert torch.equal(logits, before)
    larger = F.interpolate(logits[None], size, mode="bilinear", align_corners=False)[0]
    assert torch.equal(scores, semantic_inference(classes, larger))


@pytest.mark.parametrize("rows", [1, 4, 5, 64])
@pytest.mark.parametrize("factor", [1, 2, 4])
def test_scores_from_bands_of_large_masks_are_those_of_whole_ones(monkeypatch, rows, factor):
    generator = torch.Generator().manual_seed(0)
    classes, logits = (torch.randn(s, generator=generator) for s in ((5, 4), (5, 11, 7)))
    size = 11 * factor, 7 * factor
    expected = enlarged_semantic_inference(classes, logits, size)
    monkeypatch.setattr(postprocess, "LEAST", 5 * size[0] * size[1])
    monkeypatch.setattr(postprocess, "FEWEST_ROWS", 1)
    monkeypatch.setattr(postprocess, "BAND", rows * 5 * size[1] * factor)
    shapes = []
    interpolate = F.interpolate

    def noted(maps, **how):
        shapes.append(maps.shape[2])
        return interpolate(maps, **how)

    monkeypatch.setattr(F, "interpolate", noted)
    enlarged_semantic_inference(classes, logits, size)  # autograd has no bands
    assert shapes == [11]
    shapes.clear()
    with torch.no_grad():
        found = enlarged_semantic_inference(classes, logits, size)
    assert shapes[0] == min(rows + 1, 11)
    assert len(shapes) == -(-11 // rows)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    with torch.no_grad():  # not a whole number of times as large: no bands
        shapes.clear()
        enlarged_semantic_inference(classes, logits, (size[0] + 1, size[1]))
        with torch.autocast("cpu", torch.bfloat16):
            enlarged_semantic_inference(classes, logits, size)
        monkeypatch.setenv(VARIABLE, "off")
        enlarged_semantic_inference(classes, logits, size)
        assert shapes == [11, 11, 11]


def test_semantic_sums_class_times_mask_over_queries():
    classes = log([0.5, 0.2, 0.3], [0.1, 0.8, 0.1])
    mask_logits = torch.tensor([[[logit(0.9), logit(0.2)]], [[logit(0.4), logit(0.6)]]])
    scores = semantic_inference(classes, mask_logits)
    expected = [
        [0.5 * 0.9 + 0.1 * 0.4, 0.5 * 0.2 + 0.1 * 0.6],
        [0.2 * 0.9 + 0.8 * 0.4, 0.2 * 0.2 + 0.8 * 0.6],
    ]
    torch.testing.assert_close(scores, torch.tensor(expected)[:, None])


@pytest.mark.parametrize("size", [(5, 7), (8, 8)])
def test_what_has_its_size_already_is_not_interpolated(size):
    """detectron2's function gives the same numbers, and does the work."""
    pictures = torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(0))
    found = resized(pictures, size, *size)
    assert torch.equal(found, sem_seg_postprocess(pictures, size, *size))
    assert found.data_ptr() == pictures.data_ptr()


def test_padding_is_cut_off_before_resizing():
    pictures = torch.tensor([[[1.0, 3.0, 9.0], [1.0, 3.0, 9.0], [9.0, 9.0, 9.0]]])
    assert resized(pictures, (2, 2), 1, 1).tolist() == [[[2.0]]]


# ---- instances


def test_instances_score_class_times_mask_inside():
    classes = log([0.7, 0.1, 0.2])
    mask_logits = torch.tensor([[[logit(0.9), logit(0.6), logit(0.4)]]])
    found = instance_inference(classes, mask_logits, topk=2)
    assert found.image_size == (1, 3)
    assert found.pred_masks.tolist() == [[[1, 1, 0]], [[1, 1, 0]]]
    order = found.pred_classes.argsort()
    scores = [0.7 * (0.9 + 0.6) / 2, 0.1 * (0.9 + 0.6) / 2]
    torch.testing.assert_close(found.scores[order], torch.tensor(scores))
    assert found.pred_boxes.tensor.shape == (2, 4)


def test_instances_keep_the_best_pairs_of_query_and_class():
    """One query may give several instances; queries keep their own masks."""
    classes = log([0.5, 0.4, 0.1], [0.3, 0.05, 0.65])
    found = instance_inference(classes, masks("##..", "..##"), topk=3)
    pairs = {
        (label, "".join("#" if x else "." for x in mask[0]))
        for label, mask in zip(found.pred_classes.tolist(), found.pred_masks.tolist(), strict=True)
    }
    assert pairs == {(0, "##.."), (1, "##.."), (0, "..##")}


def test_instances_of_an_empty_mask_score_zero():
    found = instance_inference(log([0.9, 0.1]), masks("..."), topk=1)
    assert found.scores.tolist() == [0.0]


def test_no_more_instances_than_pairs():
    assert len(instance_inference(log([0.5, 0.4, 0.1]), masks("##"), topk=100)) == 2


def test_instances_of_thing_classes_only():
    classes = log([0.5, 0.4, 0.1], [0.2, 0.7, 0.1])
    found = instance_inference(classes, masks("#.", ".#"), topk=4, thing_classes={1})
    assert found.pred_classes.tolist() == [1, 1]
    assert len(instance_inference(classes, masks("#.", ".#"), topk=4, thing_classes=set())) == 0


# ---- panoptic


def panoptic(classes, mask_logits, *, score=0.0, overlap=0.0, things=frozenset({0})):
    ids, segments = panoptic_inference(
        classes,
        mask_logits,
        object_mask_threshold=score,
        overlap_threshold=overlap,
        thing_classes=set(things),
    )
    assert ids.dtype == torch.int32
    assert ids.shape == mask_logits.shape[-2:]
    return ids[0].tolist(), segments


THING, STUFF = [0.8, 0.1, 0.1], [0.1, 0.8, 0.1]


def test_things_stay_apart():
    ids, segments = panoptic(log(THING, THING), masks("##..", "..#."))
    assert ids == [1, 1, 2, 0]
    assert segments == [
        {"id": 1, "isthing": True, "category_id": 0},
        {"id": 2, "isthing": True, "category_id": 0},
    ]


def test_segments_of_a_stuff_class_merge():
    ids, segments = panoptic(log(STUFF, THING, STUFF), masks("##...", "..#..", "...#."))
    assert ids == [1, 1, 2, 1, 0]
    assert [s["category_id"] for s in segments] == [1, 0]
    assert [s["isthing"] for s in segments] == [False, True]


def test_two_stuff_classes_do_not_merge():
    classes = log([0.8, 0.1, 0.1], [0.1, 0.8, 0.1])
    ids, segments = panoptic(classes, masks("#.", ".#"), things=())
    assert ids == [1, 2]
    assert [s["category_id"] for s in segments] == [0, 1]


def test_a_pixel_goes_to_the_highest_score_times_mask():
    sure, unsure = [0.9, 0.05, 0.05], [0.5, 0.3, 0.2]
    ids, _ = panoptic(log(unsure, sure), masks("###.", ".###"))
    assert ids == [1, 2, 2, 2]


@pytest.mark.parametrize(("threshold", "kept"), [(0.24, True), (0.26, False)])
def test_a_segment_that_lost_most_of_its_mask_is_dropped(threshold, kept):
    """The unsure query has four pixels and keeps one: a quarter."""
    sure, unsure = [0.9, 0.05, 0.05], [0.5, 0.3, 0.2]
    ids, segments = panoptic(log(unsure, sure), masks("####", ".###"), overlap=threshold)
    assert ids == ([1, 2, 2, 2] if kept else [0, 1, 1, 1])
    assert [s["id"] for s in segments] == ([1, 2] if kept else [1])


def test_queries_below_the_score_threshold_take_no_pixels():
    classes = log([0.6, 0.2, 0.2], [0.9, 0.05, 0.05])
    assert panoptic(classes, masks("##..", ".##."), score=0.5)[0] == [1, 2, 2, 0]
    assert panoptic(classes, masks("##..", ".##."), score=0.7)[0] == [0, 1, 1, 0]


def test_queries_without_an_object_take_no_pixels():
    classes = log([0.2, 0.1, 0.7], THING)
    assert panoptic(classes, masks("##..", ".##."))[0] == [0, 1, 1, 0]


def test_no_query_kept():
    nothing = [0.1, 0.1, 0.8]
    assert panoptic(log(nothing, nothing), masks("##", "##")) == ([0, 0], [])


def test_a_mask_that_wins_nothing_or_is_empty_gives_no_segment():
    sure, unsure = [0.9, 0.05, 0.05], [0.5, 0.3, 0.2]
    ids, segments = panoptic(log(unsure, sure, sure), masks(".##.", ".##.", "...."))
    assert ids == [0, 1, 1, 0]
    assert len(segments) == 1
