"""COCO's json files: which forms are read, and what one line says of every mistake in them."""

from __future__ import annotations

import copy
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as rle

from ttt_video.errors import UserError
from ttt_video.formats.coco_json import (
    frame_places,
    instance_faults,
    panoptic_faults,
    read_instances,
)
from ttt_video.formats.coco_masks import _decompress, check_annotations, compress, mask_fault
from ttt_video.world import WorldVideo, layouts

H, W = 6, 8
SQUARE = [[1, 1, 4, 1, 4, 4, 1, 4]]


def square() -> np.ndarray:
    mask = np.zeros((H, W), np.uint8, order="F")
    mask[1:4, 1:4] = 1
    return mask


def compressed(mask: np.ndarray) -> dict:
    shape = rle.encode(np.asfortranarray(mask))
    return {"size": shape["size"], "counts": shape["counts"].decode()}


def content() -> dict:
    return {
        "images": [{"id": n, "file_name": f"f{n}.png", "height": H, "width": W} for n in (1, 2, 3)],
        "annotations": [
            {
                "id": n,
                "image_id": 1 + n // 2,
                "category_id": 9,
                "iscrowd": 0,
                "area": 9.5,
                "bbox": [1, 1, 3, 3],
                "segmentation": shape,
            }
            for n, shape in enumerate([SQUARE, compressed(square()), SQUARE])
        ],
        "categories": [{"id": 4, "name": "cat"}, {"id": 9, "name": "dog"}],
    }


# ---- mistakes in objects


def first(**values):
    return lambda c: c["annotations"][0].update(values)


def lengths(**values):
    return lambda c: c["annotations"][1]["segmentation"].update(values)


MISTAKES = [
    (first(segmentation=[]), r"annotation 0 of image 1 has no mask \(segmentation: \[\]\): give"),
    (first(segmentation=None), "annotation 0 of image 1 has no mask"),
    (lambda c: c["annotations"][0].pop("segmentation"), "annotation 0 of image 1 has no mask"),
    (first(segmentation={}), "annotation 0 of image 1 has no mask"),
    (first(segmentation="mask.png"), "neither polygons nor run lengths"),
    (first(segmentation=[[]]), "polygon of 0 numbers; 3 points"),
    (first(segmentation=[[1, 1, 4, 4]]), "polygon of 4 numbers; 3 points"),  # pycocotools: a box
    (first(segmentation=[*SQUARE, [1, 1, 4, 1, 4, 4, 1]]), "polygon of 7 numbers"),
    (first(segmentation=SQUARE[0]), "no flat list of numbers"),
    (first(segmentation=[[[1, 1], [4, 1], [4, 4]]]), "no flat list of numbers"),
    (first(segmentation=[[1, 1, 4, [1, 4], 4, 1]]), "no flat list of numbers"),
    (first(segmentation=[["1", "1", "4", "1", "4", "4"]]), "no flat list of numbers"),
    (first(segmentation=[[1, 1, math.nan, 1, 4, 4]]), "not finite"),
    (first(segmentation=[[1, 1, math.inf, 1, 4, 4]]), "not finite"),
    (first(segmentation=[[1, 1, 1e9, 1, 4, 4]]), "beyond a million pixels"),  # of memory
    (lengths(size=[W, H]), r"run lengths of \(height, width\) \[8, 6\], but its image is \[6, 8\]"),
    (lengths(size=None), "run lengths of size None"),
    (lengths(counts=None), "run lengths that cannot be read"),
    (lengths(counts=""), "run lengths that cannot be read"),
    (lengths(counts="not run lengths"), "run lengths that cannot be read"),
    (lengths(counts="é"), "run lengths that cannot be read"),
    (lengths(counts="0"), "run lengths of 0 pixels, but its image has 48"),  # pycocotools: noise
    (lengths(counts=[5, 2]), "run lengths of 7 pixels, but its image has 48"),
    (lengths(counts=[50, -2]), "run lengths that cannot be read"),
    (lengths(counts=[1.5, 46.5]), "run lengths that cannot be read"),
    (first(category_id=5), "annotation 0 of image 1 has category 5, which is not in 'categories'"),
    (first(category_id="dog"), "has category 'dog'"),
    (first(image_id=7), "annotation 0 of image 7 is of an image that is not listed"),
    (first(image_id=[1]), "is of an image that is not listed"),
    (first(id=1), "annotation 1 of image 1 has no id of its own"),
    (lambda c: c["annotations"][0].pop("id"), "annotation None of image 1 has no id"),
    (first(ignore=1), "has 'ignore'"),
    (first(iscrowd=None), "has iscrowd None: it must be 0 or 1"),
    (first(area=math.nan), "has area nan: it must be in pixels, or be left out"),
    (first(area=None), "has area None"),
    (first(area=-1), "has area -1"),
    (first(bbox=[]), r"has bbox \[\]: it must be"),
    (first(bbox=[1, 1, 3, math.nan]), "has bbox"),
    (lambda c: c["annotations"].insert(0, 3), "annotation number 0 is no object"),
    # ---- in images and categories
    (lambda c: c["images"][1].update(id=1), r"image 1 \(f1\.png\) and image 1 \(f2\.png\) have on"),
    (
        lambda c: c["images"][1].update(file_name="./f1.png"),
        r"\./f1\.png is listed twice, as image 1 and image 2",
    ),
    (lambda c: c["images"][1].pop("file_name"), r"image 2 \(None\) has no file_name; expected are"),
    (lambda c: c["images"][1].update(height=None), "has height, width None, 8"),
    (lambda c: c["images"][1].update(height=0), "has height, width 0, 8"),
    (lambda c: c["images"][1].pop("id"), "image number 1 has no id"),
    (lambda c: c["categories"].append({"id": 9, "name": "wolf"}), "category 9 is listed twice"),
    (lambda c: c["categories"].append({"id": 10}), "category number 2 has no whole id and name"),
    (lambda c: c.pop("annotations"), "has no list 'annotations'; expected are COCO's images"),
    (lambda c: c.update(images={}), "has no list 'images'"),
    (lambda c: c.pop("categories"), "has no list 'categories'"),
]


@pytest.mark.parametrize(("change", "said"), MISTAKES)
def test_mistakes_are_one_line(tmp_path, change, said):
    damaged = content()
    change(damaged)
    file = tmp_path / "a.json"
    file.write_text(json.dumps(damaged))
    with pytest.raises(UserError, match=said) as caught:
        read_instances(file)
    assert str(caught.value).startswith(f"{file}: ")
    assert "\n" not in str(caught.value)


def test_files_without_mistakes_are_read_as_they_are(tmp_path):
    good = content()
    for key in ("iscrowd", "area", "bbox"):  # need not be there
        good["annotations"][0].pop(key)
    good["annotations"][2].update(iscrowd=True, segmentation={"size": [H, W], "counts": [40, 8]})
    (tmp_path / "a.json").write_text(json.dumps(good))
    assert read_instances(tmp_path / "a.json") == good


def test_each_kind_of_mistake_is_counted_and_told_once():
    damaged = content()
    for annotation in damaged["annotations"]:
        annotation.update(segmentation=[])
    damaged["annotations"][2].update(category_id=5)
    assert instance_faults(damaged) == [
        "annotation 0 of image 1 has no mask (segmentation: []): give it a mask or remove it "
        "(3 such masks)",
        "annotation 2 of image 2 has category 5, which is not in 'categories'",
    ]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('[{"name": "f1.jpg", "videoName": "a", "frameIndex": 0}]', "no JSON object; expected are"),
        ('{"frames": [{"name": "f1.jpg", "videoName": "a"}]}', r"scalabel's form: convert it"),
        (
            '{"videos": [{"id": 1, "file_names": ["a/0.jpg"]}], "categories": [], "annotations": '
            '[{"id": 1, "video_id": 1, "segmentations": [null]}]}',
            r"has no list 'images' \(YouTube-VIS' form: convert it",
        ),
    ],
)
def test_other_forms_are_refused_with_what_is_expected(tmp_path, text, said):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(UserError, match=said) as caught:
        read_instances(tmp_path / "a.json")
    assert "video_id and frame_index or frame_id" in str(caught.value)


# ---- masks


@settings(max_examples=60)
@given(st.integers(0, 2**32 - 1), st.sampled_from([0.0, 0.02, 0.5, 0.98, 1.0]))
def test_run_lengths_are_those_that_pycocotools_wrote(seed, share):
    rng = np.random.default_rng(seed)
    # The longest run of 40x40 pixels takes three digits.
    mask = (rng.random(rng.integers(1, 41, 2)) < share).astype(np.uint8)
    shape = compressed(mask)
    flat = mask.T.reshape(-1).astype(int)  # column by column, beginning with zeros
    edges = np.flatnonzero(np.diff(np.concatenate([[0], flat, [1 - flat[-1]]])))
    expected = np.diff(np.concatenate([[0], edges]))
    assert _decompress(shape["counts"].encode()).tolist() == expected.tolist()
    assert mask_fault(shape, *mask.shape) == ""
    # Whatever is cut off its end, it is no mask of this image.
    for end in range(0, len(shape["counts"]), 1 + len(shape["counts"]) // 8):
        assert mask_fault({**shape, "counts": shape["counts"][:end]}, *mask.shape) != ""


def test_every_form_of_a_mask_is_the_same_pixels():
    plain = {"size": [H, W], "counts": [7, 3, 3, 3, 3, 3, 26]}
    for shape in (SQUARE, plain, compressed(square()), square()):
        assert mask_fault(shape, H, W) == ""
        np.testing.assert_array_equal(rle.decode(compress(shape, H, W)), square())
    assert mask_fault(square(), W, H) == "has a bitmap of (6, 8), not (8, 6)"


def test_objects_of_any_data_set_are_checked_before_a_run():
    good = {"segmentation": SQUARE, "category_id": 0}
    record = {"file_name": "f.png", "height": H, "width": W, "annotations": [good]}
    other = {"file_name": "g.png", "video_id": "a"}
    check_annotations([record, other])
    for labelled in ({}, {"video_id": "b"}):  # images, and another video
        check_annotations([{**record, **labelled}, other], everywhere=True)
    with pytest.raises(UserError, match=r"g\.png has no 'annotations'; .*labelled_only=True"):
        check_annotations([other, {**record, "video_id": "a"}], everywhere=True)
    for wrong, said in (
        ({"category_id": 0}, r"f\.png: object 1 of its annotations has no mask"),
        ({**good, "segmentation": []}, "object 1 of its annotations has no mask"),
        ({**good, "segmentation": {"size": [W, H], "counts": [48]}}, r"its image is \[6, 8\]"),
        ({**good, "area": math.nan}, "has area nan"),
    ):
        with pytest.raises(UserError, match=said):
            check_annotations([{**record, "annotations": [good, wrong]}])
    del record["height"], record["width"]  # not every loader says them
    check_annotations([record])


# ---- panoptic


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    root = tmp_path_factory.mktemp("coco")
    layouts.write_coco(root, "val", [WorldVideo(2000, 1, 32, 64)[0]])
    return {
        kind: json.loads((root / "annotations" / f"{kind}_val2017.json").read_text())
        for kind in ("instances", "panoptic")
    }


def test_the_worlds_files_have_no_mistakes(coco):
    assert instance_faults(coco["instances"]) == []
    assert panoptic_faults(coco["panoptic"]) == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c: c["images"].append(c["images"][0]), ["have one id", "is listed twice"]),
        (
            lambda c: c["annotations"].append(c["annotations"][0]),
            ["image 1 has more than one", "file '000000000001.png' has more than one annotation"],
        ),
        (lambda c: c["annotations"][0].update(image_id=5), ["is of image 5, not listed"]),
        (lambda c: c["annotations"][0].pop("segments_info"), ["annotation 0 has no 'segments_in"]),
        (
            lambda c: c["annotations"][0]["segments_info"][1].update(
                id=c["annotations"][0]["segments_info"][0]["id"]
            ),
            ["is listed twice: give each segment an id of its own"],
        ),
        (
            lambda c: c["annotations"][0]["segments_info"][0].update(category_id=12, area=None),
            ["has category 12, not in 'categories'", "has area None"],
        ),
    ],
)
def test_mistakes_in_panoptic_files(coco, change, said):
    damaged = copy.deepcopy(coco["panoptic"])
    change(damaged)
    faults = panoptic_faults(damaged)
    assert len(faults) == len(said)
    assert all(part in fault for part, fault in zip(said, faults, strict=True))


# ---- videos and frames


def images(*values: dict) -> list[dict]:
    return [{"id": n, "file_name": f"f{n}.png", **v} for n, v in enumerate(values)]


@pytest.mark.parametrize("key", ["frame_index", "frame_id"])
def test_the_accepted_keys(key):
    told = images(
        {"video_id": 7, key: 3}, {"video_id": "b", key: 0.0}, {"video_id": 7, key: 10**12}
    )
    assert frame_places(told, [{"id": 7, "name": "park"}]) == {
        0: ("park", 3), 1: ("b", 0), 2: ("park", 10**12),
    }  # fmt: skip


def test_of_two_keys_the_first_that_all_images_have():
    both = {"video_id": 1, "frame_index": 4, "frame_id": 900, "is_vid_train_frame": True}
    assert frame_places(images(both)) == {0: ("1", 4)}
    assert frame_places(images({**both, "frame_index": None})) == {0: ("1", 900)}


def test_without_any_key_folders_decide():
    assert (
        frame_places(images({}, {"license": 3, "date_captured": "2017", "video_id": None})) is None
    )


@pytest.mark.parametrize(
    ("values", "videos", "said"),
    [
        ([{"videoName": "a", "frameIndex": 0}], [], "by 'videoName', 'frameIndex'; expected are"),
        ([{"video": "a"}], [], "by 'video'; expected"),
        ([{}, {"seq_name": "a"}], [], "by 'seq_name'; expected"),
        ([{"clip": 4}], [], "by 'clip'; expected"),
        ([{}], [{"id": 1, "name": "a"}], "has 'videos', but its images have no video_id"),
        ([{"video_id": 1}], [], "1 of 1 images have no video_id and frame_index"),
        ([{"frame_index": 1}], [], "1 of 1 images have no video_id and frame_index"),
        ([{"video_id": 1, "frameIndex": 1}], [], "1 of 1 images have no video_id and frame_index"),
        (
            [{"video_id": 1, "frame_index": 0}, {}, {"video_id": 1, "frame_index": None}],
            [],
            r"2 of 3 images have no .*, as image 1 \(f1\.png\)",
        ),
        (
            [{"video_id": 1, "frame_index": 0}, {"video_id": 1, "frame_id": 1}],
            [],
            "some images have frame_index and others frame_id",
        ),
        (
            [{"video_id": 1, "frame_index": 2}, {"video_id": 1, "frame_index": 2}],
            [],
            r"image 0 \(f0\.png\) and image 1 \(f1\.png\) are both frame 2 of video '1'",
        ),
        ([{"video_id": 1, "frame_id": -1}], [], "has frame_id -1: give the frame's place"),
        ([{"video_id": 1, "frame_id": 2.5}], [], "has frame_id 2.5"),
        ([{"video_id": 1, "frame_id": "2"}], [], "has frame_id '2'"),
        ([{"video_id": 1, "frame_id": True}], [], "has frame_id True"),
        ([{"video_id": 1, "frame_id": 2**63}], [], "has frame_id 9223372036854775808"),
        ([{"video_id": 1, "frame_id": math.nan}], [], "has frame_id nan"),
        ([{"video_id": 1.5, "frame_id": 0}], [], "has video_id 1.5"),
        (
            [{"video_id": 1, "frame_id": 0}, {"video_id": 2, "frame_id": 1}],
            [{"id": 1, "name": "park"}, {"id": 2, "name": "park"}],
            "videos 1 and 2 are both named 'park'",
        ),
        (
            [{"video_id": 1, "frame_id": 0}, {"video_id": "1", "frame_id": 1}],
            [],
            "videos 1 and '1' are both named '1'",
        ),
        ([{"video_id": 1, "frame_id": 0}], [{"id": 1}, {"id": 1}], "lists video 1 twice"),
        ([{"video_id": 1, "frame_id": 0}], [{"name": "a"}], "entry of 'videos' without an id"),
    ],
)
def test_videos_are_never_mixed_without_a_word(values, videos, said):
    with pytest.raises(UserError, match=said) as caught:
        frame_places(images(*values), videos)
    assert "\n" not in str(caught.value)
