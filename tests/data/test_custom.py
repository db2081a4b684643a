"""Own data sets by one call: what is found, in which order, and what a wrong folder says."""

from __future__ import annotations

import json
import uuid

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json
from PIL import Image

from ttt_video.data import register_custom_coco_video, register_custom_video
from ttt_video.data.checking import DatasetCheck
from ttt_video.data.mapper import JointDatasetMapper
from ttt_video.data.sources import open_dataset
from ttt_video.errors import UserError
from ttt_video.formats.images import BadFrame, FrameTransform
from ttt_video.formats.labels import read_sem_seg

H, W = 6, 8
CLASSES = ["road", "sky", "hedgehog"]


@pytest.fixture
def name():
    """A name of its own, forgotten afterwards."""
    name = f"own_{uuid.uuid4().hex}"
    yield name
    DatasetCatalog.pop(name, None)
    MetadataCatalog.pop(name, None)


def save(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def frames(folder, numbers, suffix=".png"):
    for n in numbers:
        save(folder / f"f{n}{suffix}", np.full((H, W, 3), n, np.uint8))


def labels(folder, numbers, suffix=".png"):
    for n in numbers:
        save(folder / f"f{n}{suffix}", np.full((H, W), n % 3, np.uint8))


# ---- label maps


def test_one_folder_is_one_video(tmp_path, name):
    frames(tmp_path / "walk", range(1, 12), ".jpg")
    labels(tmp_path / "maps", (1, 11))
    register_custom_video(name, tmp_path / "walk", tmp_path / "maps", CLASSES)
    (video,) = open_dataset(name, FrameTransform())
    streamed = list(video)
    assert video.video_id == "walk"
    assert [f["frame_index"] for f in streamed] == list(range(11))
    assert [f["file_name"].rsplit("/", 1)[1] for f in streamed] == [
        f"f{n}.jpg" for n in range(1, 12)
    ]
    labelled = [f for f in streamed if "sem_seg_file_name" in f]
    assert [f["frame_index"] for f in labelled] == [0, 10]
    assert [read_sem_seg(dict(f)).max() for f in labelled] == [1, 2]
    metadata = MetadataCatalog.get(name)
    assert metadata.stuff_classes == CLASSES
    assert (metadata.ignore_label, metadata.evaluator_type) == (255, "video_sem_seg")
    assert metadata.get("stuff_colors") is None


def test_folders_are_videos_and_labels_may_have_a_suffix(tmp_path, name):
    for video in ("v10", "v9"):
        frames(tmp_path / "in" / video, (1, 2))
    labels(tmp_path / "gt" / "v9", (2,), "_ids.png")
    register_custom_video(
        name,
        tmp_path / "in",
        tmp_path / "gt",
        CLASSES,
        label_suffix="_ids.png",
        colors=[(1, 2, 3)] * 3,
        ignore_label=3,
    )
    records = DatasetCatalog.get(name)
    assert [(r["video_id"], r["frame_index"]) for r in records] == [
        ("v9", 0), ("v9", 1), ("v10", 0), ("v10", 1),
    ]  # fmt: skip
    assert ["sem_seg_file_name" in r for r in records] == [False, True, False, False]
    assert len({r["image_id"] for r in records}) == 4
    assert MetadataCatalog.get(name).stuff_colors == [[1, 2, 3]] * 3


def test_labelled_frames_train(tmp_path, name):
    frames(tmp_path / "in", range(4))
    labels(tmp_path / "gt", (1, 3))
    register_custom_video(name, tmp_path / "in", tmp_path / "gt", CLASSES, labelled_only=True)
    records = DatasetCatalog.get(name)
    assert [r["frame_index"] for r in records] == [1, 3]  # places in the video, not in the list
    mapper = JointDatasetMapper(True, task="semantic", augmentations=[])
    assert [mapper(r)["instances"].gt_classes.tolist() for r in records] == [[1], [0]]


def test_videos_without_labels_stream(tmp_path, name):
    frames(tmp_path / "in", range(2))
    register_custom_video(name, tmp_path / "in", None, CLASSES)
    assert [sorted(r) for r in DatasetCatalog.get(name)] == [
        ["file_name", "frame_index", "image_id", "video_id"]
    ] * 2
    assert MetadataCatalog.get(name).get("evaluator_type") is None  # there is nothing to score


def test_no_frame_of_own_videos_is_left_out_without_a_word(tmp_path, name, caplog):
    frames(tmp_path / "in" / "1.1", (1, 2, 3))
    frames(tmp_path / "in" / "1.05", (1,))
    (tmp_path / "in" / ".cache").mkdir()
    frame = tmp_path / "in" / "1.1" / "f2.png"
    frame.rename(frame.with_suffix(".heic"))
    (tmp_path / "in" / "1.1" / "f10.png").symlink_to("gone.png")
    register_custom_video(name, tmp_path / "in", None, CLASSES)
    found = [r["file_name"].split("/in/")[1] for r in DatasetCatalog.get(name)]
    assert found == ["1.05/f1.png", "1.1/f1.png", "1.1/f3.png", "1.1/f10.png"]
    assert "1 files are not read as frames, such as f2.heic" in caplog.text
    with pytest.raises(BadFrame, match=r"f10\.png cannot be read"):
        list(open_dataset(name, FrameTransform())[1])
    (tmp_path / "in" / "empty").mkdir()
    with pytest.raises(UserError, match=r"folder .*/empty holds no frames: remove it"):
        DatasetCatalog.get(name)
    (tmp_path / "in" / "empty").rmdir()
    (tmp_path / "in" / "video3").symlink_to("gone")
    with pytest.raises(UserError, match=r"video3 is a link to nothing \(gone\)"):
        DatasetCatalog.get(name)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"classes": []}, "different names"),
        ({"classes": "road"}, r"is 'road'; give a list: \['road'\]"),
        ({"classes": ["a", "a"]}, "different names"),
        ({"ignore_label": 2}, "between the number of classes, 3, and 255"),
        ({"ignore_label": 256}, "between"),
        ({"colors": [(0, 0, 0)]}, "3 classes, but 1 colors"),
    ],
)
def test_arguments_that_contradict_each_other(tmp_path, name, arguments, said):
    with pytest.raises(UserError, match=said):
        register_custom_video(name, tmp_path, None, **{"classes": CLASSES, **arguments})
    assert name not in DatasetCatalog


def test_folders_that_do_not_fit(tmp_path, name):
    register_custom_video(name, tmp_path / "in", tmp_path / "gt", CLASSES)
    with pytest.raises(UserError, match="registered already"):
        register_custom_video(name, tmp_path / "in", tmp_path / "gt", CLASSES)
    with pytest.raises(UserError, match=r"no such folder: .*in"):
        DatasetCatalog.get(name)
    (tmp_path / "in").mkdir()
    with pytest.raises(UserError, match="holds no frames"):
        DatasetCatalog.get(name)
    frames(tmp_path / "in", (1,))
    with pytest.raises(UserError, match=r"gt holds no label map of any frame in .*'\.png'"):
        DatasetCatalog.get(name)
    labels(tmp_path / "gt", (1, 2))
    with pytest.raises(UserError, match=r"f2\.png has no frame in .*\(1 such"):
        DatasetCatalog.get(name)
    frames(tmp_path / "in" / "more", (1,))
    with pytest.raises(UserError, match="separate them"):
        DatasetCatalog.get(name)


@pytest.mark.parametrize("suffix", [".png", "_ids.png"])
@pytest.mark.parametrize(
    ("renamed", "added", "named"),
    [
        ("V2", [], "V2"),
        ("v2", ["v9"], "v9"),
        ("V2", ["v9", "v10"], "V2, v9, v10"),
        ("v2", [f"w{n}" for n in range(7)], "w0, w1, w2, w3, w4, ..."),
    ],
)
def test_folders_of_label_maps_that_belong_to_no_video_are_refused(
    tmp_path, name, suffix, renamed, added, named
):
    for video in ("v1", "v2"):
        frames(tmp_path / "in" / video, (1, 2))
    for video in ("v1", renamed, *added):
        labels(tmp_path / "gt" / video, (1, 2), suffix)
    register_custom_video(
        name, tmp_path / "in", tmp_path / "gt", CLASSES, label_suffix=suffix, labelled_only=True
    )
    count = len(added) + (renamed != "v2")
    with pytest.raises(UserError) as error:
        DatasetCatalog.get(name)
    assert str(error.value) == (
        f"{tmp_path}/gt has label maps in {named}, but {tmp_path}/in has no folder of that name "
        f"({count} such folders): rename each to the folder of its frames, or remove it"
    )
    assert DatasetCheck(name).problems == [str(error.value)]


def test_other_folders_beside_those_of_labels_are_left_alone(tmp_path, name):
    """Whatever has no label maps in it, and what lies beside the label maps of one video."""
    frames(tmp_path / "in" / "v1", (1, 2))
    labels(tmp_path / "gt" / "v1", (1, 2), "_ids.png")
    labels(tmp_path / "gt" / "drawn", (1, 2))
    labels(tmp_path / "gt" / ".cache", (1, 2), "_ids.png")
    (tmp_path / "gt" / "empty").mkdir()
    register_custom_video(name, tmp_path / "in", tmp_path / "gt", CLASSES, label_suffix="_ids.png")
    assert all("sem_seg_file_name" in record for record in DatasetCatalog.get(name))
    DatasetCatalog.pop(name)
    MetadataCatalog.pop(name)
    labels(tmp_path / "gt" / "v1" / "drawn", (1, 2))
    register_custom_video(
        name, tmp_path / "in" / "v1", tmp_path / "gt" / "v1", CLASSES, label_suffix="_ids.png"
    )
    assert all("sem_seg_file_name" in record for record in DatasetCatalog.get(name))


@pytest.mark.parametrize(("frame", "label"), [(".jpg", ".png"), (".png", "_sem.png")])
def test_label_maps_beside_their_frames_are_no_frames(tmp_path, name, frame, label):
    frames(tmp_path / "walk", (9, 10), frame)
    labels(tmp_path / "walk", (10,), label)
    register_custom_video(name, tmp_path / "walk", tmp_path / "walk", CLASSES, label_suffix=label)
    (video,) = open_dataset(name, FrameTransform())
    streamed = [(f["file_name"], f.get("sem_seg_file_name")) for f in video]
    folder = f"{tmp_path}/walk"
    assert streamed == [
        (f"{folder}/f9{frame}", None),
        (f"{folder}/f10{frame}", f"{folder}/f10{label}"),
    ]


def test_label_maps_among_the_frames_are_refused(tmp_path, name):
    frames(tmp_path / "walk", (1, 2))
    labels(tmp_path / "walk", (1,), "_sem.png")
    for folder in (None, tmp_path / "gt"):
        labels(tmp_path / "gt", (1, 2))
        register_custom_video(name, tmp_path / "walk", folder, CLASSES)
        with pytest.raises(UserError, match=r"f1\.png and f1_sem\.png are two pic.*label_suffix"):
            DatasetCatalog.get(name)
        DatasetCatalog.pop(name)
        MetadataCatalog.pop(name)
    register_custom_video(name, tmp_path / "gt", tmp_path / "gt", CLASSES)
    with pytest.raises(UserError, match=r"label map .*f1\.png has no frame in .*gt"):
        DatasetCatalog.get(name)


def test_label_maps_beside_the_frames_of_a_json_are_refused(tmp_path, name):
    frames(tmp_path / "walk", (1, 2), ".jpg")
    labels(tmp_path / "walk", (1,))
    write_json(tmp_path / "a.json", [{"id": 1, "file_name": "f1.jpg"}], [])
    register_custom_coco_video(name, tmp_path / "a.json", tmp_path / "walk")
    with pytest.raises(UserError, match=r"f1\.jpg and f1\.png are two pictures of one frame"):
        DatasetCatalog.get(name)


# ---- COCO json


def write_json(path, images, annotated, **more):
    content = {
        "images": [{"height": H, "width": W, **image} for image in images],
        "annotations": [
            {
                "id": number,
                "image_id": image_id,
                "category_id": 9,
                "iscrowd": 0,
                "area": 9,
                "bbox": [1, 1, 3, 3],
                "segmentation": [[1, 1, 4, 1, 4, 4, 1, 4]],
            }
            for number, image_id in enumerate(annotated, start=1)
        ],
        "categories": [{"id": 4, "name": "cat"}, {"id": 9, "name": "dog"}],
        **more,
    }
    path.write_text(json.dumps(content))


def test_json_says_videos_and_indices(tmp_path, name):
    numbers = [(1, 7, 1), (2, 7, 0), (3, 2, 0)]  # image, video, index
    frames(tmp_path / "in", (1, 2, 3))
    write_json(
        tmp_path / "a.json",
        [
            {"id": i, "file_name": f"f{i}.png", "video_id": v, "frame_index": t}
            for i, v, t in numbers
        ],
        [1],
        videos=[{"id": 7, "name": "park"}],
    )
    register_custom_coco_video(name, tmp_path / "a.json", tmp_path / "in")
    records = DatasetCatalog.get(name)
    assert [(r["image_id"], r["video_id"], r["frame_index"]) for r in records] == [
        (3, "2", 0), (2, "park", 0), (1, "park", 1),
    ]  # fmt: skip
    (dog,) = records[2]["annotations"]
    assert dog["category_id"] == 1
    metadata = MetadataCatalog.get(name)
    assert metadata.thing_classes == ["cat", "dog"]
    assert metadata.thing_dataset_id_to_contiguous_id == {4: 0, 9: 1}
    assert metadata.evaluator_type == "video_instance"


def test_the_form_of_mmtracking_and_bdd100k(tmp_path, name):
    """Two videos in one folder, whose names would interleave; frames in another order."""
    for n in range(4):
        save(tmp_path / "in" / f"{n}.jpg", np.full((H, W, 3), 60 * n, np.uint8))
    places = [(2, 5), (1, 0), (2, 0), (1, 10**12)]  # of picture n: video, frame; milliseconds
    write_json(
        tmp_path / "a.json",
        [
            {"id": n + 1, "file_name": f"{n}.jpg", "video_id": v, "frame_id": t}
            for n, (v, t) in enumerate(places)
        ],
        [1],
        videos=[{"id": 1, "name": "b1c66a42"}, {"id": 2, "name": "0000f77c"}],
    )
    register_custom_coco_video(name, tmp_path / "a.json", tmp_path / "in")
    sources = open_dataset(name, FrameTransform())
    assert [source.video_id for source in sources] == ["0000f77c", "b1c66a42"]
    shown = [[round(f["image"].float().mean().item() / 60) for f in source] for source in sources]
    assert shown == [[2, 0], [1, 3]]
    assert [f["frame_index"] for f in sources[1]] == [0, 10**12]


def test_records_are_those_of_detectron2s_loader_and_the_stated_areas(tmp_path, name):
    frames(tmp_path / "in", (1, 2))
    listed = [{"id": 1, "file_name": "f1.png"}, {"id": 2, "file_name": "f2.png"}]
    file = tmp_path / "a.json"
    write_json(file, listed, [1, 1, 2])
    content = json.loads(file.read_text())
    content["annotations"][1]["segmentation"] = {"size": [H, W], "counts": [7, 3, 38]}
    content["annotations"][1]["area"] = 400.5
    del content["annotations"][2]["area"], content["annotations"][2]["bbox"]
    del content["annotations"][2]["iscrowd"]
    file.write_text(json.dumps(content))
    register_custom_coco_video(name, file, tmp_path / "in")
    ours = DatasetCatalog.get(name)
    theirs = load_coco_json(str(file), str(tmp_path / "in"), f"{name}_theirs")
    MetadataCatalog.pop(f"{name}_theirs")
    areas = [[a.pop("area", None) for a in record["annotations"]] for record in ours]
    assert areas == [[9, 400.5], [None]]
    # The file does not say these: no crowd, and the box of the mask.
    theirs[1]["annotations"][0].update(iscrowd=0, bbox=[1.0, 1.0, 3.0, 3.0])
    for index, record in enumerate(theirs):
        record.update(video_id="in", frame_index=index)
    assert ours == theirs


@pytest.mark.parametrize("labelled_only", [False, True])
def test_folders_say_videos_and_indices(tmp_path, name, labelled_only):
    frames(tmp_path / "in" / "b", (2, 10, 9))
    frames(tmp_path / "in" / "a", (1,))
    listed = [{"id": 5, "file_name": "b/f10.png"}, {"id": 6, "file_name": "a/f1.png"}]
    write_json(tmp_path / "a.json", listed, [5])
    register_custom_coco_video(
        name, tmp_path / "a.json", tmp_path / "in", labelled_only=labelled_only
    )
    found = [
        (r["video_id"], r["frame_index"], len(r["annotations"]) if "annotations" in r else None)
        for r in DatasetCatalog.get(name)
    ]
    everything = [("a", 0, 0), ("b", 0, None), ("b", 1, None), ("b", 2, 1)]
    assert found == ([f for f in everything if f[2] is not None] if labelled_only else everything)
    if labelled_only:
        record = DatasetCatalog.get(name)[1]
        mapped = JointDatasetMapper(True, task="instance", augmentations=[])(record)
        assert mapped["instances"].gt_masks.tensor.sum() == 9
    else:
        assert [len(list(s)) for s in open_dataset(name, FrameTransform())] == [1, 3]


def test_images_beside_the_root_are_one_video(tmp_path, name):
    frames(tmp_path / "walk", (1, 2))
    write_json(tmp_path / "a.json", [{"id": 1, "file_name": "f1.png"}], [])
    register_custom_coco_video(name, tmp_path / "a.json", tmp_path / "walk")
    assert [r["video_id"] for r in DatasetCatalog.get(name)] == ["walk", "walk"]


def test_json_that_does_not_fit(tmp_path, name):
    path = tmp_path / "a.json"
    register_custom_coco_video(name, path, tmp_path)
    with pytest.raises(UserError, match=r"a\.json cannot be read: No such file"):
        DatasetCatalog.get(name)
    path.write_text("nonsense")
    with pytest.raises(UserError, match="no JSON file"):
        DatasetCatalog.get(name)
    path.write_text("[1]")
    with pytest.raises(UserError, match="no JSON object"):
        DatasetCatalog.get(name)
    path.write_text('{"images": [], "categories": []}')
    with pytest.raises(UserError, match="'annotations'"):
        DatasetCatalog.get(name)
    write_json(path, [], [])
    with pytest.raises(UserError, match="lists no images"):
        DatasetCatalog.get(name)
    image = {"id": 1, "file_name": "f1.png"}
    write_json(path, [image, {"id": 2, "file_name": "f2.png", "video_id": 1, "frame_index": 0}], [])
    with pytest.raises(UserError, match=r"a\.json: 1 of 2 images have no video_id"):
        DatasetCatalog.get(name)
    write_json(path, [image], [1], annotations=[{"id": 1, "image_id": 1, "category_id": 4}])
    with pytest.raises(UserError, match=r"a\.json: annotation 1 of image 1 has no mask"):
        open_dataset(name, FrameTransform())
    write_json(path, [image], [])
    with pytest.raises(UserError, match=r"f1\.png is listed, but not there"):
        DatasetCatalog.get(name)
