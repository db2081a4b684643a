"""COCO Videos in the released layout, written here by hand: no code under test makes the files."""

from __future__ import annotations

import json

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode
from PIL import Image
from pycocotools import mask as rle

from ttt_video.data.catalog import check_registered
from ttt_video.data.coco_videos import (
    LABEL_PERIOD,
    RELEASED_VIDEOS,
    coco_videos_metadata,
    load_coco_video,
    load_coco_videos,
    register_coco_videos,
)
from ttt_video.data.mapper import JointDatasetMapper
from ttt_video.data.sources import open_dataset
from ttt_video.errors import UserError
from ttt_video.formats.images import FrameTransform

H, W = 6, 8
PERSON, DOG, PAPER = 1, 18, 195  # COCO's category ids; contiguous 0, 16 and 80 + 47
PERSON_ID, DOG_ID, PAPER_ID, VOID_ID = 7, 300, 70000, 5


def label_map():
    """Person above, dog and paper below, an unlabelled column, a void pixel."""
    ids = np.zeros((H, W), np.int64)
    ids[:3], ids[3:, :4], ids[3:, 4:], ids[:, 7] = PERSON_ID, DOG_ID, PAPER_ID, VOID_ID
    ids[5, 0] = 0
    return ids


def compressed(mask):
    shape = rle.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": shape["size"], "counts": shape["counts"].decode()}


def uncompressed(mask):
    """COCO's run lengths, column by column, beginning with zeros."""
    flat = mask.T.reshape(-1).astype(int)
    edges = np.flatnonzero(np.diff(np.concatenate([[0], flat, [1 - flat[-1]]])))
    return {"size": list(mask.shape), "counts": np.diff(np.concatenate([[0], edges])).tolist()}


def segments():
    ids = label_map()
    shapes = {
        PERSON_ID: (PERSON, [[0, 0, 7, 0, 7, 3, 0, 3]]),
        DOG_ID: (DOG, uncompressed(ids == DOG_ID)),
        PAPER_ID: (PAPER, compressed(ids == PAPER_ID)),
        VOID_ID: (255, compressed(ids == VOID_ID)),
    }
    return [
        {
            "id": number,
            "category_id": category,
            "segmentation": shape,
            "bbox": rle.toBbox(rle.encode(np.asfortranarray(ids == number, np.uint8))).tolist(),
            "area": int((ids == number).sum()),
            "iscrowd": 0,
        }
        for number, (category, shape) in shapes.items()
    ]


@pytest.fixture
def root(tmp_path):
    root = tmp_path / "coco_videos"
    for video, count in (("bar", 12), ("tokyo", 1)):
        raw, labels = root / "raw_images" / video, root / "panoptic_images" / video
        raw.mkdir(parents=True)
        labels.mkdir(parents=True)
        for n in range(1, count + 1):
            Image.fromarray(np.full((H, W, 3), n, np.uint8)).save(raw / f"{video}_{n}.png")
        labelled = [n for n in range(1, count + 1) if n % 10 == 1]
        ids = label_map()
        colors = np.stack([ids % 256, ids // 256 % 256, ids // 65536], -1).astype(np.uint8)
        for n in labelled:
            Image.fromarray(colors).save(labels / f"{video}_{n}.png")
        write_annotations(
            root,
            video,
            {
                "images": [
                    {"id": n, "file_name": f"{video}_{n}.png", "height": H, "width": W}
                    for n in labelled
                ],
                "annotations": [
                    {"image_id": n, "file_name": f"{video}_{n}.png", "segments_info": segments()}
                    for n in reversed(labelled)
                ],
            },
        )
    return root


def write_annotations(root, video, content):
    file = root / "annotations" / "train" / f"{video}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content))


def read_annotations(root, video):
    return json.loads((root / "annotations" / "train" / f"{video}.json").read_text())


def test_every_frame_is_listed_in_time_order_and_every_tenth_is_labelled(root):
    records = load_coco_video(root, "bar", "panoptic")
    assert [r["file_name"].rsplit("/", 1)[1] for r in records] == [
        f"bar_{n}.png"
        for n in range(1, 13)  # not bar_1, bar_10, bar_11, bar_12, bar_2
    ]
    assert [r["frame_index"] for r in records] == list(range(12))
    assert {r["video_id"] for r in records} == {"bar"}
    assert len({r["image_id"] for r in records}) == 12
    labelled = [r["frame_index"] for r in records if "segments_info" in r]
    assert labelled == [0, 10]
    assert all(index % LABEL_PERIOD == 0 for index in labelled)
    for record in records:
        assert ("pan_seg_file_name" in record) == (record["frame_index"] in labelled)
        assert "annotations" not in record


def test_hidden_files_are_no_videos(root):
    videos = {r["video_id"] for r in load_coco_videos(root, "panoptic")}
    (root / "annotations" / "train" / "._bar.json").write_bytes(b"\0\5\x16\7")  # as macOS leaves
    (root / "raw_images" / "bar" / "._bar_1.png").write_bytes(b"\0\5\x16\7")
    records = load_coco_videos(root, "panoptic")
    assert {r["video_id"] for r in records} == videos
    assert not [r for r in records if "/._" in r["file_name"]]


def test_segments_have_contiguous_classes_and_keep_what_is_unlabelled(root):
    record = load_coco_video(root, "bar", "panoptic")[10]
    assert (record["height"], record["width"]) == (H, W)
    found = {s["id"]: (s["category_id"], s["isthing"]) for s in record["segments_info"]}
    names = MetadataCatalog.get("coco_2017_val_panoptic").thing_classes
    assert found == {
        PERSON_ID: (names.index("person"), True),
        DOG_ID: (names.index("dog"), True),
        PAPER_ID: (names.index("paper-merged"), False),
        VOID_ID: (255, False),
    }
    colors = np.array(Image.open(record["pan_seg_file_name"])).astype(int)
    assert set(np.unique(colors @ [1, 256, 65536])) == {0, *found}


def test_instances_are_the_things_and_every_mask_decodes(root):
    record = load_coco_video(root, "bar", "instance")[0]
    person, dog = record["annotations"]
    assert (person["category_id"], dog["category_id"]) == (0, 16)
    assert dog["bbox_mode"] == BoxMode.XYWH_ABS
    assert dog["bbox"] == [0, 3, 4, 3]
    np.testing.assert_array_equal(rle.decode(dog["segmentation"]), label_map() == DOG_ID)
    assert len(record["segments_info"]) == 4  # stuff stays within reach
    paper = record["segments_info"][2]
    np.testing.assert_array_equal(rle.decode(paper["segmentation"]), label_map() == PAPER_ID)


def test_the_training_mapper_takes_both_tasks(root):
    """Labelled frames as training stills: the same objects whichever way they are read."""
    for task in ("instance", "panoptic"):
        mapped = JointDatasetMapper(True, task=task, augmentations=[])(
            load_coco_video(root, "bar", task)[0]
        )
        assert mapped["instances"].gt_classes[:2].tolist() == [0, 16]
        mask = mapped["instances"].gt_masks.tensor[1].numpy()
        np.testing.assert_array_equal(mask, label_map() == DOG_ID)


def test_frames_of_a_stream_carry_their_labels(root, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(root.parent))
    register_coco_videos()  # once more changes nothing
    (video,) = open_dataset("coco_videos_instance_bar", FrameTransform())
    frames = list(video)
    assert [frame["image"].max() for frame in frames] == list(range(1, 13))
    assert [("annotations" in frame) for frame in frames] == [i in (0, 10) for i in range(12)]
    sources = open_dataset("coco_videos_panoptic_all", FrameTransform())
    assert [source.video_id for source in sources] == ["bar", "tokyo"]


@pytest.mark.parametrize(("task", "builtin"), [("instance", ""), ("panoptic", "_panoptic")])
def test_classes_are_those_that_the_model_was_trained_with(task, builtin):
    theirs = MetadataCatalog.get(f"coco_2017_train{builtin}")
    for key, value in coco_videos_metadata(task).items():
        if key not in ("ignore_label", "label_period", "evaluator_type"):
            assert value == theirs.get(key), key


def test_every_released_video_has_both_names():
    for task in ("instance", "panoptic"):
        for video in (*RELEASED_VIDEOS, "all"):
            name = f"coco_videos_{task}_{video}"
            assert name in DatasetCatalog
            metadata = MetadataCatalog.get(name)
            assert metadata.evaluator_type == f"video_{task}"
            assert (metadata.ignore_label, metadata.label_period) == (255, 10)


@pytest.mark.parametrize("task", ["instance", "panoptic"])
def test_names_of_the_authors_code_point_to_ours(task):
    with pytest.raises(
        UserError, match=rf"coco_videos_{task}_val.*did you mean coco_videos_{task}_all"
    ):
        check_registered(f"coco_videos_{task}_val")


def test_what_is_missing_is_named(root, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"paris\.json cannot be read.*DETECTRON2_DATASETS"):
        load_coco_video(root, "paris", "panoptic")
    with pytest.raises(UserError, match=r"no COCO Videos: .*nowhere"):
        load_coco_videos(tmp_path / "nowhere", "panoptic")
    (root / "raw_images" / "bar" / "bar_11.png").unlink()
    with pytest.raises(UserError, match=r"labels of bar_11\.png, which is not in .*raw_images"):
        load_coco_video(root, "bar", "panoptic")
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="nowhere"):
        DatasetCatalog.get("coco_videos_instance_havana")


def segment(content, position):
    return content["annotations"][0]["segments_info"][position]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c: c.pop("images"), "has no list 'images'"),
        (lambda c: c["images"].pop(), "bar_11.png is of image 11, not listed"),
        (lambda c: c["images"].append(c["images"][0]), "and image 1 (bar_1.png) have one id"),
        (lambda c: c["annotations"].append(c["annotations"][0]), "more than one annotation"),
        (lambda c: c["annotations"][0].pop("segments_info"), "'segments_info'"),
        (lambda c: c["annotations"][0]["segments_info"][0].update(category_id=12), "12 is not one"),
        (lambda c: c["annotations"][0]["segments_info"][1].pop("segmentation"), "300 has no mask"),
        (lambda c: segment(c, 0).update(segmentation=[]), "segment 7 has no mask"),
        (lambda c: segment(c, 0).update(segmentation=[[0, 0, 1, 1]]), "polygon of 4 numbers"),
        (lambda c: segment(c, 1)["segmentation"].update(size=[W, H]), "its image is [6, 8]"),
        (lambda c: segment(c, 1)["segmentation"]["counts"].append(1), "49 pixels, but its image"),
        (lambda c: segment(c, 1).update(id=PERSON_ID), "segment 7 is listed twice"),
        (lambda c: segment(c, 1).update(area=float("nan")), "300 has area nan"),
        (lambda c: segment(c, 1).update(iscrowd=None), "300 has iscrowd None"),
    ],
)
def test_damaged_annotations(root, change, said):
    content = read_annotations(root, "bar")
    change(content)
    write_annotations(root, "bar", content)
    with pytest.raises(UserError, match=r"bar\.json is not COCO Videos' format") as caught:
        load_coco_video(root, "bar", "instance")
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("text", "said"), [("[]", "no JSON object"), ('{"images"', "no JSON file")]
)
def test_a_file_that_is_no_annotation_file(root, text, said):
    (root / "annotations" / "train" / "bar.json").write_text(text)
    with pytest.raises(UserError, match=said):
        load_coco_video(root, "bar", "panoptic")
