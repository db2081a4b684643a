"""The check of data sets, on the world in the layouts of the real ones and on damaged copies."""

from __future__ import annotations

import json
import os
import runpy
import shutil
import subprocess
import sys
import uuid
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.data.datasets.cityscapes import load_cityscapes_semantic
from PIL import Image

from ttt_video.data import register_custom_coco_video, register_custom_video
from ttt_video.data.checking import DatasetCheck
from ttt_video.data.cityscapes import CITYSCAPES_CLASSES
from ttt_video.data.published_counts import PUBLISHED, compare_with_published
from ttt_video.data.sources import FolderSource, FrameTransform
from ttt_video.errors import UserError
from ttt_video.world import WorldVideo, layouts
from ttt_video_cli import call
from ttt_video_cli.check import MAX_LISTED

TOOL = Path(__file__).parents[2] / "tools" / "check_dataset.py"
check = partial(call, "check")

H, W = 32, 64


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Eleven frames of one world in every layout."""
    root = tmp_path_factory.mktemp("sets")
    video = WorldVideo(2000, 11, H, W)
    frames = [video[t] for t in range(11)]
    layouts.write_kitti_step(root / "kitti_step", "val", "0002", frames, rgb_labels=True)
    layouts.write_coco_videos(root / "coco_videos", "bar", frames)
    layouts.write_coco(root / "coco", "val", frames[:3])
    layouts.write_cityscapes(root / "cityscapes", "val", "ulm", frames[:3])
    for layout in root.iterdir():
        (layout / "world.json").write_text("{}")  # as tools/make_world.py signs what it made
    return root


@pytest.fixture
def root(whole, tmp_path, monkeypatch):
    """A copy to damage, as the data sets' root."""
    root = tmp_path / "sets"
    shutil.copytree(whole, root)
    monkeypatch.setenv("DETECTRON2_DATASETS", str(root))
    return root


@pytest.fixture
def own():
    """A name for a data set, forgotten afterwards."""
    name = f"own_{uuid.uuid4().hex}"
    yield name
    DatasetCatalog.pop(name, None)
    MetadataCatalog.pop(name, None)


def problems(name):
    return DatasetCheck(name).problems


@pytest.mark.parametrize(
    ("name", "first", "some"),
    [
        (
            "kitti_step_video_sem_seg_val",
            "11 frames in 1 video(s) of 11, 11 with semantic labels",
            "panoptic labels with instance ids: 11 of 11 files",
        ),
        (
            "coco_videos_panoptic_bar",
            "11 frames in 1 video(s) of 11, 2 with panoptic labels",
            "panoptic labels: 2 of 2 files",
        ),
        (
            "coco_videos_instance_all",
            "11 frames in 1 video(s) of 11, 2 with instance labels",
            "images: 11 of 11 files",
        ),
    ],
)
@pytest.mark.usefixtures("root")
def test_a_whole_data_set_has_no_problems(tmp_path, capsys, name, first, some):
    check([name, "--pictures", str(tmp_path / "drawn"), "--count", "2"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == [name, first]
    assert some in lines
    assert lines[-1] == "no problems"
    pictures = sorted((tmp_path / "drawn").iterdir())
    assert len(pictures) == 2
    images = {Path(r["file_name"]).stem: r["file_name"] for r in DatasetCatalog.get(name)}
    for picture in pictures:
        drawn = np.array(Image.open(picture).convert("RGB").resize((W, H))).astype(int)
        image = np.array(Image.open(images[picture.stem.split("_", 1)[1]]))
        assert np.abs(drawn - image).mean() > 2  # not the bare image


def test_pictures_are_drawn_unless_something_is_wrong(root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = "coco_videos_panoptic_bar"
    drawn = Path("output/check_dataset") / name
    check([name, "--no-pictures"])
    assert not drawn.exists()
    check([name])
    assert len(list(drawn.iterdir())) == 2
    shutil.rmtree(drawn)
    (root / "coco_videos" / "panoptic_images" / "bar" / "bar_11.png").unlink()
    with pytest.raises(UserError, match="1 problem"):
        check([name])
    assert not drawn.exists()


@pytest.mark.usefixtures("root")
def test_pictures_without_opencv_name_the_command(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(UserError, match="cv2, which is missing: pip install opencv-python-headles"):
        check(["coco_videos_panoptic_bar", "--pictures", str(tmp_path)])


@pytest.mark.slow
def test_detectron2s_own_sets(root):
    """In a process of its own, because detectron2 looks at the variable when it is imported."""
    script = """
from ttt_video.data.checking import DatasetCheck
import json, ttt_video
names = ["cityscapes_fine_sem_seg_val", "coco_2017_val", "coco_2017_val_panoptic",
         "coco_2017_train", "cityscapes_fine_sem_seg_train"]
print(json.dumps({n: [getattr(c.task, "kind", ""), len(c.labelled), c.problems] for n in names
                  if (c := DatasetCheck(n))}))
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script],
        env={**os.environ, "DETECTRON2_DATASETS": str(root)},
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["cityscapes_fine_sem_seg_val"] == ["semantic", 3, []]
    assert found["coco_2017_val"] == ["instance", 3, []]
    assert found["coco_2017_val_panoptic"] == ["panoptic", 3, []]
    coco = root / "coco"
    assert found["coco_2017_train"][2] == [
        f"missing: {coco}/train2017",
        f"missing: {coco}/annotations/instances_train2017.json",
    ]
    gone = [f"missing: {root}/cityscapes/{d}/train/" for d in ("leftImg8bit", "gtFine")]
    assert found["cityscapes_fine_sem_seg_train"][2] == gone


def test_classes_and_shares_are_those_of_the_files(root):
    check = DatasetCheck("kitti_step_video_sem_seg_val", samples=None)
    files = (root / "kitti_step" / "panoptic_maps").rglob("*_sem.png")
    labels = np.stack([np.array(Image.open(file)) for file in files])
    text = "\n".join(check.lines)
    for index, name in enumerate(CITYSCAPES_CLASSES):
        share = 100 * (labels == index).mean()
        assert (f" {name} {share:.2f} %" in text) == (share > 0), name
    assert f"{len(np.unique(labels))} of 19 classes occur" in text


# ---- published sets


@pytest.mark.parametrize(
    ("name", "groups", "total"),
    [
        ("cityscapes_fine_sem_seg_train", 18, 2_975),
        ("cityscapes_fine_sem_seg_val", 3, 500),
        ("cityscapes_fine_sem_seg_test", 6, 1_525),
        ("kitti_step_video_sem_seg_train", 12, 5_027),
        ("kitti_step_video_sem_seg_val", 9, 2_981),
        ("coco_2017_train", 1, 118_287),
        ("coco_2017_train_panoptic", 1, 118_287),
        ("coco_2017_val", 1, 5_000),
        ("coco_2017_val_panoptic", 1, 5_000),
    ],
)
def test_counts_are_those_that_were_published(name, groups, total):
    """The papers' and download pages' totals; those of each city and video add up to them."""
    assert (len(PUBLISHED[name]), sum(PUBLISHED[name].values())) == (groups, total)
    records = [
        {"file_name": f"/{group}/{i}.png", "video_id": group}
        for group, count in PUBLISHED[name].items()
        for i in range(count)
    ]
    line, problem = compare_with_published(name, records)
    assert line.startswith(f"published: {total:,} images")
    assert problem == ""


def test_what_is_missing_of_a_published_set_is_named(root):
    (root / "kitti_step" / "world.json").unlink()
    check = DatasetCheck("kitti_step_video_sem_seg_val")
    assert "published: 2,981 images in 9 videos; here: 11 images in 1 video" in check.lines
    assert check.problems == [
        "not the published images: 0002 has 11 of 233, 0006 is missing, 0007 is missing, 0008 is "
        "missing, 0010 is missing, 0013 is missing, 0014 is missing, 0016 is missing, 0018 is "
        "missing"
    ]
    city = [
        {"file_name": f"/c/leftImg8bit/val/{c}/{i}.png"} for c in ("ulm", "lindau") for i in "12"
    ]
    assert compare_with_published("cityscapes_fine_sem_seg_val", city) == (
        "published: 500 images in 3 cities; here: 4 images in 2 cities",
        "not the published images: frankfurt is missing, lindau has 2 of 59, munster is missing, "
        "ulm is not one of them",
    )
    line, _ = compare_with_published("cityscapes_fine_sem_seg_val", city[:2])
    assert line.endswith("here: 2 images in 1 city")
    assert compare_with_published("coco_2017_val", city) == (
        "published: 5,000 images; here: 4 images",
        "not the published images: 4 of 5000",
    )
    assert compare_with_published("my_own_set", city) == ("", "")


def test_released_videos_that_are_missing_are_named(root):
    (root / "coco_videos" / "world.json").unlink()
    absent = "bangkok, berkeley, havana, house, irvine, paris, restaurant, school, tokyo"
    for task in ("instance", "panoptic"):
        check = DatasetCheck(f"coco_videos_{task}_all")
        assert f"released videos that are not here: {absent}" in check.lines
        assert check.problems == [f"released videos are missing: {absent}"]
    assert problems("coco_videos_panoptic_bar") == []
    for part in ("raw_images", "panoptic_images"):
        (root / "coco_videos" / part / "bar").rename(root / "coco_videos" / part / "walk")
    folder = root / "coco_videos" / "annotations" / "train"
    (folder / "bar.json").rename(folder / "walk.json")
    assert problems("coco_videos_panoptic_all") == []  # a set of one's own in this layout


# ---- what is wrong is said


def test_label_maps_among_frames(own, tmp_path):
    for name in ("0.png", "0_sem.png"):
        Image.fromarray(np.zeros((4, 6, 3), np.uint8)).save(tmp_path / name)
    register_custom_video(own, tmp_path, None, ["a"])
    (problem,) = problems(own)
    assert problem.startswith(f"{tmp_path}/0.png and 0_sem.png are two pictures of one frame")


def test_records_that_list_label_maps_as_frames(own, tmp_path):
    for name in ("0.png", "1.png"):
        Image.fromarray(np.zeros((4, 6), np.uint8)).save(tmp_path / name)
    labels = str(tmp_path / "1.png")
    records = [
        {"file_name": str(tmp_path / name), "sem_seg_file_name": labels}
        for name in ("0.png", "1.png")
    ]
    DatasetCatalog.register(own, lambda: records)
    MetadataCatalog.get(own).set(stuff_classes=["a"], ignore_label=255, evaluator_type="sem_seg")
    (problem,) = problems(own)
    assert f"lists {labels} as a frame and as a label map" in problem


def test_cityscapes_without_train_ids_names_the_script(root, own):
    for file in (root / "cityscapes").rglob("*_labelTrainIds.png"):
        file.unlink()
    folders = [str(root / "cityscapes" / part / "val") for part in ("leftImg8bit", "gtFine")]
    DatasetCatalog.register(own, lambda: load_cityscapes_semantic(*folders))
    assert problems(own) == [
        "cannot be loaded: no labelTrainIds.png: run datasets/prepare_cityscapes.py"
    ]


def test_labels_out_of_range(root):
    file = next((root / "kitti_step").rglob("000003_sem.png"))
    labels = np.array(Image.open(file))
    labels[0, :2] = 19, 33
    Image.fromarray(labels).save(file)
    (problem,) = problems("kitti_step_video_sem_seg_val")
    assert problem == (
        "label values [19, 33] are out of range: classes are 0-18, 255 is unlabelled; "
        f"19 is in {file}"
    )


def test_sizes_that_differ(root):
    file = next((root / "kitti_step").rglob("000003_sem.png"))
    Image.fromarray(np.zeros((H, W + 1), np.uint8)).save(file)
    (problem,) = problems("kitti_step_video_sem_seg_val")
    assert "image (32, 64), labels (32, 65), data set (32, 64)" in problem


def test_a_video_of_two_sizes_is_refused_as_by_a_stream(own, tmp_path):
    """Also where the odd frame is none of those that are decoded."""
    for index in range(40):
        size = (W, H + 2) if index == 37 else (W, H)
        (tmp_path / "frames").mkdir(exist_ok=True)
        (tmp_path / "labels").mkdir(exist_ok=True)
        Image.new("RGB", size).save(tmp_path / "frames" / f"{index}.png")
        Image.new("L", size).save(tmp_path / "labels" / f"{index}.png")
    register_custom_video(own, str(tmp_path / "frames"), str(tmp_path / "labels"), ["road"])
    check = DatasetCheck(own, samples=2)
    assert [problem for problem in check.problems if "several sizes" in problem] == [
        "frames of video frames have several sizes (height x width): "
        f"{H}x{W} in {tmp_path}/frames/0.png, {H + 2}x{W} in {tmp_path}/frames/37.png"
    ]
    with pytest.raises(UserError, match="frames of one video must have one size"):
        list(FolderSource(tmp_path / "frames", FrameTransform(min_size=0)))


def test_missing_frames_and_damaged_files(root):
    kitti = root / "kitti_step"
    (kitti / "images" / "val" / "0002" / "000004.png").unlink()
    image = kitti / "images" / "val" / "0002" / "000008.png"
    image.write_bytes(image.read_bytes()[:60])
    (stray,) = problems("kitti_step_video_sem_seg_val")
    assert stray.startswith(f"label map {kitti}/panoptic_maps/val/0002/000004")
    for labels in (kitti / "panoptic_maps" / "val" / "0002").glob("000004*.png"):
        labels.unlink()
    said = problems("kitti_step_video_sem_seg_val")
    assert len(said) == 2
    assert said[0].endswith("images/val/0002/000003.png")
    assert said[0].startswith("frames are missing after ")
    assert f"frame {image} cannot be read" in said[1]


def test_labels_at_other_frames_than_expected(root):
    (root / "coco_videos" / "raw_images" / "bar" / "bar_3.png").unlink()
    said = problems("coco_videos_panoptic_bar")
    assert said[0].startswith("frames are missing after ")
    assert said[1].startswith("labels are expected at every 10th frame from the first on, but")
    assert said[1].endswith("1 others, as " + str(root / "coco_videos/raw_images/bar/bar_11.png"))


def test_missing_label_files_and_segments(root):
    labels = root / "coco_videos" / "panoptic_images" / "bar"
    (labels / "bar_11.png").unlink()
    ids = np.array(Image.open(labels / "bar_1.png"))
    ids[0, 0] = 1, 2, 3
    Image.fromarray(ids).save(labels / "bar_1.png")
    said = problems("coco_videos_panoptic_bar")
    assert said == [
        f"panoptic labels: 1 files are missing, as {labels / 'bar_11.png'}",
        f"{labels / 'bar_1.png'}: 1 segments are in the picture only, as id {1 + 512 + 3 * 65536}",
    ]


def coco_content(root, kind):
    file = root / "coco" / "annotations" / f"{kind}_val2017.json"
    return file, json.loads(file.read_text())


@pytest.mark.parametrize("register", [register_coco_instances, register_custom_coco_video])
def test_every_kind_of_mistake_in_a_coco_json(root, own, register):
    """Of detectron2's registration too, whose loader takes two images of one id for one."""
    file, content = coco_content(root, "instances")
    content["images"][1]["id"] = 1
    content["annotations"][0]["segmentation"] = []
    content["annotations"][1]["category_id"] = 12
    file.write_text(json.dumps(content))
    arguments = {"metadata": {}} if register is register_coco_instances else {}
    register(own, json_file=str(file), image_root=str(root / "coco" / "val2017"), **arguments)
    said = problems(own)
    assert all(line.startswith(f"{file}: ") for line in said)
    kinds = ["have one id", "has no mask", "has category 12", "not listed"]
    assert [any(kind in line for line in said) for kind in kinds] == [True] * 4
    assert len(said) == 4


def test_mistakes_in_coco_panoptic(root, own):
    file, content = coco_content(root, "panoptic")
    content["annotations"].append(content["annotations"][0])
    file.write_text(json.dumps(content))
    MetadataCatalog.get(own).set(panoptic_json=str(file), evaluator_type="coco_panoptic_seg")
    DatasetCatalog.register(own, lambda: [])
    assert problems(own) == [
        f"{file}: image 1 has more than one annotation: keep one",
        f"{file}: file '000000000001.png' has more than one annotation: keep one",
    ]


def test_objects_of_own_loaders(own, tmp_path):
    Image.fromarray(np.zeros((4, 6, 3), np.uint8)).save(tmp_path / "0.png")
    record = {"file_name": str(tmp_path / "0.png"), "height": 4, "width": 6, "video_id": "a"}
    record |= {"frame_index": 0, "annotations": [{"category_id": 0, "segmentation": []}]}
    DatasetCatalog.register(own, lambda: [record])
    MetadataCatalog.get(own).set(thing_classes=["a"], evaluator_type="video_instance")
    (problem,) = problems(own)
    assert "0.png: object 0 of its annotations has no mask" in problem


def test_class_255_of_300_is_a_class(own, tmp_path):
    Image.fromarray(np.zeros((4, 6, 3), np.uint8)).save(tmp_path / "0.png")
    shape = {"size": [4, 6], "counts": [0, 24]}
    objects = [{"category_id": k, "segmentation": shape} for k in (255, 7, 7)]
    record = {"file_name": str(tmp_path / "0.png"), "height": 4, "width": 6, "video_id": "a"}
    DatasetCatalog.register(own, lambda: [{**record, "frame_index": 0, "annotations": objects}])
    metadata = MetadataCatalog.get(own)
    metadata.set(thing_classes=[f"c{k}" for k in range(300)], evaluator_type="video_instance")
    check = DatasetCheck(own)
    text = "\n".join(check.lines)
    assert check.problems == []
    assert "2 of 300 classes occur" in text
    assert "c255 33.33 %" in text
    assert "unlabelled" not in text


@pytest.mark.usefixtures("root")
def test_what_is_not_there_at_all_is_exit_code_2(capsys):
    for name in ("kitti_step_video_sem_seg_train", "coco_videos_instance_tokyo"):
        with pytest.raises(UserError, match=rf"{name}: 1 problem.*datasets/README\.md"):
            check([name])
        assert "PROBLEM " in capsys.readouterr().out
    with pytest.raises(UserError, match="did you mean kitti_step_video_sem_seg_val"):
        check(["kitti_step_val"])
    with pytest.raises(UserError, match="--count is 0"):
        check(["kitti_step_video_sem_seg_val", "--count", "0"])


def test_many_problems_are_not_all_listed(root, own, tmp_path, capsys):
    for t in range(30):
        for folder, pixels in (("in", (4, 6, 3)), ("gt", (5, 6))):
            (tmp_path / folder).mkdir(exist_ok=True)
            Image.fromarray(np.zeros(pixels, np.uint8)).save(tmp_path / folder / f"{t}.png")
    register_custom_video(own, tmp_path / "in", tmp_path / "gt", ["a"])
    with pytest.raises(UserError, match="30 problem"):
        check([own])
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("PROBLEM") for line in lines) == MAX_LISTED
    assert "... and 10 more" in lines


def test_unlabelled_frames_are_a_problem(own, tmp_path):
    Image.fromarray(np.zeros((4, 6, 3), np.uint8)).save(tmp_path / "0.png")
    register_custom_video(own, tmp_path, None, ["a"])
    check = DatasetCheck(own)
    assert check.lines[0] == "1 frames in 1 video(s) of 1, 0 with no labels"
    assert check.problems == ["nothing is labelled"]


@pytest.mark.usefixtures("root")
def test_the_command_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(TOOL), "kitti_step_video_sem_seg_train"])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(TOOL), run_name="__main__")
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: kitti_step_video_sem_seg_train: 1 problem")
