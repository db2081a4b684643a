"""Ground truth from every kind of labels that a detectron2 mapper makes."""

from __future__ import annotations

import pytest
import torch
from detectron2.structures import BitMasks, Boxes, Instances, PolygonMasks

from ttt_video.errors import UserError
from ttt_video.modeling.targets import prepare_target


def prepare(x, size=(6, 8), *, num_classes=19, ignore_label=255):
    return prepare_target(
        x, size, num_classes=num_classes, ignore_label=ignore_label, device=torch.device("cpu")
    )


def assert_target(target, labels, masks):
    assert target["labels"].dtype == torch.int64
    assert target["masks"].dtype == torch.bool
    assert target["labels"].tolist() == labels
    assert torch.equal(target["masks"], masks)


def instances(masks, classes=(2, 0)):
    labels = Instances((4, 5))
    labels.gt_classes = torch.tensor(classes)
    labels.gt_masks = masks
    return {"instances": labels}


@pytest.fixture
def masks():
    """Two masks of a 4x5 image, and the same padded to 6x8."""
    masks = torch.zeros(2, 4, 5, dtype=torch.bool)
    masks[0, 1:3, 1:4] = True
    masks[1, :, 4] = True
    padded = torch.zeros(2, 6, 8, dtype=torch.bool)
    padded[:, :4, :5] = masks
    return masks, padded


def test_sem_seg_gives_one_mask_per_class():
    sem_seg = torch.tensor([[3, 3, 255], [0, 3, 255]])
    target = prepare({"sem_seg": sem_seg}, size=(3, 4))
    expected = torch.zeros(2, 3, 4, dtype=torch.bool)
    expected[0, 1, 0] = True
    expected[1, 0, :2] = expected[1, 1, 1] = True
    assert_target(target, [0, 3], expected)


def test_sem_seg_of_any_integer_type():
    for dtype in (torch.uint8, torch.int32, torch.int64):
        sem_seg = torch.tensor([[1, 255], [18, 1]], dtype=dtype)
        expected = torch.tensor([[[1, 0], [0, 1]], [[0, 0], [1, 0]]], dtype=torch.bool)
        assert_target(prepare({"sem_seg": sem_seg}, size=(2, 2)), [1, 18], expected)


def test_sem_seg_without_any_label():
    target = prepare({"sem_seg": torch.full((4, 5), 255)})
    assert_target(target, [], torch.zeros(0, 6, 8, dtype=torch.bool))


def test_another_ignore_label():
    x = {"sem_seg": torch.tensor([[0, 255]], dtype=torch.uint8)}
    target = prepare(x, (1, 2), num_classes=256, ignore_label=0)
    assert target["labels"].tolist() == [255]


def test_bit_masks(masks):
    assert_target(prepare(instances(BitMasks(masks[0]))), [2, 0], masks[1])


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.float32])
def test_a_tensor_of_masks(masks, dtype):
    assert_target(prepare(instances(masks[0].to(dtype))), [2, 0], masks[1])


def test_polygons():
    """Rectangles with corners on pixel edges, the second of two parts."""
    first = [[1.0, 1.0, 4.0, 1.0, 4.0, 3.0, 1.0, 3.0]]
    second = [[4.0, 0.0, 5.0, 0.0, 5.0, 1.0, 4.0, 1.0], [4.0, 2.0, 5.0, 2.0, 5.0, 4.0, 4.0, 4.0]]
    target = prepare(instances(PolygonMasks([first, second])))
    expected = torch.zeros(2, 6, 8, dtype=torch.bool)
    expected[0, 1:3, 1:4] = True
    expected[1, 0, 4] = True
    expected[1, 2:4, 4] = True
    assert_target(target, [2, 0], expected)


def test_instances_win_over_sem_seg(masks):
    x = instances(BitMasks(masks[0])) | {"sem_seg": torch.zeros(4, 5, dtype=torch.int64)}
    assert prepare(x)["labels"].tolist() == [2, 0]


def test_an_image_without_annotations():
    """detectron2's mapper leaves gt_masks out where there is nothing to put in."""
    labels = Instances((4, 5))
    labels.gt_boxes = Boxes(torch.zeros(0, 4))
    labels.gt_classes = torch.zeros(0, dtype=torch.int64)
    empty = torch.zeros(0, 6, 8, dtype=torch.bool)
    assert_target(prepare({"instances": labels}), [], empty)


def test_boxes_without_masks_name_the_switch_of_the_mapper():
    labels = Instances((4, 5))
    labels.gt_boxes = Boxes(torch.zeros(3, 4))
    labels.gt_classes = torch.zeros(3, dtype=torch.int64)
    with pytest.raises(UserError, match=r"'a\.png' has 3 instances and 0 masks.*MODEL\.MASK_ON"):
        prepare({"instances": labels, "file_name": "a.png"})


def test_no_labels_at_all():
    with pytest.raises(UserError, match=r"'a\.png' has neither 'instances' nor 'sem_seg'"):
        prepare({"image": torch.zeros(3, 4, 5), "file_name": "a.png"})


def test_labels_beyond_the_classes(masks):
    message = r"'a\.png' has label 2; MODEL\.SEM_SEG_HEAD\.NUM_CLASSES is 2"
    with pytest.raises(UserError, match=message):
        prepare(instances(BitMasks(masks[0])) | {"file_name": "a.png"}, num_classes=2)
    with pytest.raises(UserError, match=message):
        prepare({"sem_seg": torch.tensor([[0, 2]]), "file_name": "a.png"}, num_classes=2)
    with pytest.raises(UserError, match="has label -1"):
        prepare({"sem_seg": torch.tensor([[0, -1]])})
