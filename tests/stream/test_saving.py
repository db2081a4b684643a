"""Saved predictions: other programs read back what the model gave, also after a kill."""

from __future__ import annotations

import copy
import errno
import json
import os
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from detectron2.data import MetadataCatalog
from detectron2.structures import Instances
from panopticapi.evaluation import pq_compute
from panopticapi.utils import rgb2id
from PIL import Image
from pycocotools import mask as rle
from pycocotools.coco import COCO
from run_folders import copy_running

from ttt_video.config import load_config
from ttt_video.data import BaseSource
from ttt_video.data.cityscapes import CITYSCAPES_CLASSES, CITYSCAPES_COLORS, train_ids
from ttt_video.data.coco_videos import CLASS_OF_CATEGORY
from ttt_video.data.custom import register_custom_coco_video
from ttt_video.data.kitti_step import load_kitti_step_sem_seg
from ttt_video.data.sources import FolderSource, FrameTransform, open_dataset
from ttt_video.errors import UserError
from ttt_video.formats.coco_json import panoptic_faults, read_instances
from ttt_video.formats.labels import read_class_map, read_segment_ids, read_sem_seg
from ttt_video.stream import (
    FrameResult,
    Results,
    RunDirectory,
    Settings,
    Sink,
    StreamEvaluation,
    VideoRun,
)
from ttt_video.stream.saving import SavedPredictions, Stems, coco, format_names
from ttt_video.stream.saving.confidence import confidence
from ttt_video.tasks import Shared

HEIGHT, WIDTH, FRAMES = 30, 41, 5  # odd, so that the bits of a row do not fill its bytes
CLASSES = 19


class Source(BaseSource):
    """Frames without files, or with files of these names."""

    def __init__(self, *names: str, video_id: str = "street"):
        self.names, self.video_id = names, video_id

    def __iter__(self):
        return iter(())

    def fingerprint(self):
        return [[index, name, 1, None, None] for index, name in enumerate(self.names)] or None


def frames(names=(), video_id: str = "street") -> list[dict[str, Any]]:
    names = names or [f"street.mp4#{index}" for index in range(FRAMES)]
    return [
        {"file_name": f"v/{name}", "height": HEIGHT, "width": WIDTH, "video_id": video_id,
         "frame_index": index}
        for index, name in enumerate(names)
    ]  # fmt: skip


def semantic(seed: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    return {"sem_seg": torch.rand(CLASSES, HEIGHT, WIDTH, generator=generator)}


def boxes(seed: int, count: int) -> torch.Tensor:
    masks = torch.zeros(count, HEIGHT, WIDTH)
    for index, mask in enumerate(masks):
        y, x = (seed + 3 * index) % 20, (2 * seed + 5 * index) % 30
        mask[y : y + 9, x : x + 8] = 1
    return masks


def instances(seed: int) -> dict[str, Any]:
    found = Instances((HEIGHT, WIDTH))
    found.pred_masks = torch.cat([boxes(seed, 4), torch.zeros(1, HEIGHT, WIDTH)])  # one is empty
    found.scores = torch.tensor([0.9, 0.3, 0.6, 0.01, 0.5])
    found.pred_classes = torch.tensor([0, 2, 79, 2, 3])
    return {"instances": found}


def panoptic(seed: int) -> dict[str, Any]:
    ids = torch.zeros(HEIGHT, WIDTH, dtype=torch.int32)
    segments = []
    for number, (mask, k) in enumerate(zip(boxes(seed, 4), (0, 100, 0, 2), strict=True), start=1):
        ids[mask > 0] = number
        segments.append({"id": number, "category_id": k, "isthing": k < 80})
    segments.append({"id": 5, "category_id": 3, "isthing": True})  # others took all its pixels
    return {"panoptic_seg": (ids, segments), **instances(seed)}


def color(seed: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    size = (3, HEIGHT, WIDTH)
    return {"color": torch.randint(256, size, generator=generator, dtype=torch.uint8)}


KINDS = {"semantic": semantic, "instances": instances, "panoptic": panoptic, "color": color}
FORMATS = {
    "semantic": ("masks", "coco", "cityscapes", "kitti_step", "confidence"),
    "instances": ("coco", "confidence"),
    "panoptic": ("masks", "coco", "kitti_step", "confidence"),
    "color": ("color",),
}


@pytest.fixture(scope="module")
def cfgs():
    """A config of each kind, with the data sets that name its classes."""
    named = {
        "semantic": ("joint_cityscapes.yaml", "kitti_step_video_sem_seg_val"),
        "instances": ("joint_coco_instance.yaml", "coco_videos_instance_all"),
        "panoptic": ("joint_coco_panoptic.yaml", "coco_videos_panoptic_all"),
        "color": ("quick/joint_world_color.yaml", "kitti_step_video_sem_seg_val"),
    }
    return {
        kind: load_config(file, opts=["DATASETS.TEST", f"('{name}',)"])
        for kind, (file, name) in named.items()
    }


@pytest.fixture
def save(cfgs, tmp_path):
    """``save(kind)`` writes a video's predictions in the kind's formats; returns the folder.

    ``done`` and ``state`` go on with an interrupted video; ``kill`` n copies what there is after n
    frames to ``killed``, and returns the state after two.
    """

    def run(kind, *formats, name="run", source=None, videos=None, done=0, state=None, kill=None):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        sink = SavedPredictions(cfgs[kind], folder, formats or FORMATS[kind], fps=10)
        sink.check(frozenset(KINDS[kind](0)))
        if state is not None:
            sink.load(state)
        source = source or Source()
        video = VideoRun(source, folder / "unfinished" / "street", done)
        sink.start(video)
        saved = None
        for index, frame in enumerate(videos or frames(source.names, source.video_id)):
            if index < done:
                continue
            output = KINDS[kind](index)
            sink.write(Results(FrameResult(Shared(frame), Shared(output)), None, {}))
            for value in output.values():  # the loop may do with a prediction what it likes
                if isinstance(value, torch.Tensor):
                    value.zero_()
            if index == 1 and kill:
                saved = sink.save()
            if index + 1 == kill:
                sink._thread.flush()
                copy_running(folder, tmp_path / "killed")
        video.done = FRAMES
        sink.end(video)
        return folder if kill is None else (folder, saved)

    return run


def content(folder: Path) -> dict[str, bytes]:
    files = (file for file in folder.rglob("*") if file.is_file())
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in files
        if "unfinished" not in file.parts
    }


def decoded(file: Path) -> dict[int, list[tuple[int, np.ndarray]]]:
    """Category and mask of each annotation by image, as pycocotools reads them.

    An annotation without a segmentation, or with a wrong one, is an error.
    """
    read_instances(file)
    coco = COCO(str(file))
    return {
        image: [
            (annotation["category_id"], coco.annToMask(annotation))
            for annotation in coco.loadAnns(coco.getAnnIds(image))
        ]
        for image in coco.getImgIds()
    }


# ---- what other programs read


def test_masks_are_class_ids_with_the_colours_inside(save):
    folder = save("semantic", "masks") / "masks" / "street"
    for index in range(FRAMES):
        classes = semantic(index)["sem_seg"].numpy().argmax(0)
        file = folder / f"{index:06d}.png"
        np.testing.assert_array_equal(read_class_map(file), classes)
        with Image.open(file) as image:
            assert image.mode == "P"
            np.testing.assert_array_equal(np.asarray(image), classes)
            colors = np.array(CITYSCAPES_COLORS)[classes]
            np.testing.assert_array_equal(np.asarray(image.convert("RGB")), colors)
    rows = json.loads((folder / "classes.json").read_text())
    assert [(row["id"], row["name"]) for row in rows] == [
        *enumerate(CITYSCAPES_CLASSES), (255, "void"),
    ]  # fmt: skip
    assert [tuple(row["color"]) for row in rows[:-1]] == list(CITYSCAPES_COLORS)


def test_panoptic_masks_have_classes_and_void(save):
    file = save("panoptic", "masks") / "masks" / "street" / "000001.png"
    ids = panoptic(1)["panoptic_seg"][0].numpy()
    np.testing.assert_array_equal(read_class_map(file), np.array([255, 0, 100, 0, 2])[ids])


@pytest.mark.parametrize("kind", ["instances", "panoptic"])
def test_instances_are_read_by_pycocotools(save, kind):
    file = save(kind, "coco") / "coco" / "street" / "instances.json"
    found = decoded(file)
    coco_ids = {k: category for category, k in CLASS_OF_CATEGORY.items()}
    assert list(found) == [1, 2, 3, 4, 5]
    for index in range(FRAMES):
        given = instances(index)["instances"]
        assert [k for k, _ in found[index + 1]] == [
            coco_ids[k] for k in given.pred_classes[:4].tolist()
        ]
        masks = np.stack([mask for _, mask in found[index + 1]])
        np.testing.assert_array_equal(masks, given.pred_masks[:4].numpy())
    rows = json.loads(file.read_text())
    assert [a["id"] for a in rows["annotations"]] == list(range(1, 4 * FRAMES + 1))
    assert {a["area"] for a in rows["annotations"]} == {72}
    assert rows["annotations"][0]["bbox"] == [0, 0, 8, 9]
    scores = [a["score"] for a in rows["annotations"][:4]]
    assert scores == pytest.approx([0.9, 0.3, 0.6, 0.01])
    names = {c["id"]: c["name"] for c in rows["categories"]}
    assert (names[1], names[90]) == ("person", "toothbrush")


def test_an_annotation_without_a_segmentation_is_not_taken(save, tmp_path):
    content = json.loads((save("instances") / "coco" / "street" / "instances.json").read_text())
    for spoil in (lambda a: a.pop("segmentation"), lambda a: a.update(segmentation=[])):
        spoilt = copy.deepcopy(content)
        spoil(spoilt["annotations"][1])
        (tmp_path / "spoilt.json").write_text(json.dumps(spoilt))
        with pytest.raises(UserError, match="has no mask"):
            decoded(tmp_path / "spoilt.json")


def test_instances_are_read_as_labels_of_the_frames_by_our_own_loader(save, tmp_path):
    names = [f"frame{index}.png" for index in range(FRAMES)]
    source = Source(*names)
    file = save("instances", "coco", source=source) / "coco" / "street" / "instances.json"
    (tmp_path / "pictures").mkdir()
    for name in names:
        Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / "pictures" / name)
    register_custom_coco_video("saved_instances", file, tmp_path / "pictures")
    try:
        (video,) = open_dataset("saved_instances", FrameTransform())
        read = list(video)
        classes = MetadataCatalog.get("saved_instances").thing_classes
    finally:
        MetadataCatalog.remove("saved_instances")
    assert [frame["file_name"] for frame in read] == [
        str(tmp_path / "pictures" / name) for name in names
    ]
    assert [classes[a["category_id"]] for a in read[2]["annotations"]] == [
        "person", "car", "toothbrush", "car",
    ]  # fmt: skip


def test_segments_are_read_by_panopticapi(save):
    folder = save("panoptic", "coco") / "coco" / "street"
    content = json.loads((folder / "panoptic.json").read_text())
    assert panoptic_faults(content) == []
    for index, annotation in enumerate(content["annotations"]):
        ids, segments = panoptic(index)["panoptic_seg"]
        file = folder / "panoptic" / annotation["file_name"]
        np.testing.assert_array_equal(read_segment_ids(file), ids.numpy())
        with Image.open(file) as image:
            np.testing.assert_array_equal(rgb2id(np.array(image)), ids.numpy())
        of_category = {
            s["id"]: CLASS_OF_CATEGORY[s["category_id"]] for s in annotation["segments_info"]
        }
        present = set(ids.unique().tolist()) - {0}
        assert of_category == {s["id"]: s["category_id"] for s in segments if s["id"] in present}
        for segment in annotation["segments_info"]:
            rows, columns = np.nonzero(ids.numpy() == segment["id"])
            assert segment["area"] == len(rows)
            left, top, width, height = segment["bbox"]
            assert (left, left + width - 1) == (columns.min(), columns.max())
            assert (top, top + height - 1) == (rows.min(), rows.max())
    things = {c["id"]: c["isthing"] for c in content["categories"]}
    assert sum(things.values()) == 80
    # They are all right as labels and as predictions of themselves.
    quality = pq_compute(str(folder / "panoptic.json"), str(folder / "panoptic.json"))
    assert quality["All"]["pq"] == quality["Things"]["pq"] == 1.0


def test_classes_of_pixels_are_masks_in_coco(save):
    found = decoded(save("semantic", "coco") / "coco" / "street" / "semantic.json")
    for index in range(FRAMES):
        classes = semantic(index)["sem_seg"].numpy().argmax(0)
        again = np.full_like(classes, -1)
        for k, mask in found[index + 1]:
            assert (again[mask > 0] == -1).all()
            again[mask > 0] = k
        np.testing.assert_array_equal(again, classes)


@pytest.mark.parametrize("empty", ["", "left", "right", "all"])
@pytest.mark.parametrize("share", [0.03, 0.5, 1.0])
def test_run_lengths_are_pycocotools_own(share, empty):
    """Byte for byte, though only the columns of a mask are looked at."""
    rng = np.random.default_rng(7)
    for height, width in [(1, 1), (1, 9), (9, 1), (5, 8), (13, 31), *rng.integers(1, 40, (20, 2))]:
        mask = rng.random((height, width)) < share
        half = width // 2
        mask[:, {"": slice(0), "left": slice(half), "right": slice(half, None)}.get(empty)] = False
        row = {}
        coco._instances(np.packbits(mask, axis=-1)[None], int(width), [3], [0.5], row)
        theirs = rle.encode(np.asfortranarray(mask.astype(np.uint8)))
        assert len(row["annotations"]) == mask.any()
        for found in row["annotations"]:
            assert found["segmentation"] == {
                "size": [height, width],
                "counts": theirs["counts"].decode(),
            }
            assert (found["area"], found["bbox"]) == (mask.sum(), rle.toBbox(theirs).tolist())


def test_cityscapes_has_its_label_ids_and_names(save):
    names = ["aachen_000003_000019_leftImg8bit.png", *(f"{i}.png" for i in range(1, FRAMES))]
    source = Source(*names, video_id="my_street")
    folder = save("semantic", "cityscapes", source=source) / "cityscapes" / "my_street"
    first, second = sorted(folder.iterdir())[:2]
    assert first.name == "aachen_000003_000019_pred_labelIds.png"
    city, sequence, frame, *_ = second.name.split("_")
    assert (city[:10], sequence, frame) == ("my-street-", "000000", "000001")
    for index, file in enumerate(sorted(folder.iterdir())):
        classes = semantic(index)["sem_seg"].numpy().argmax(0)
        np.testing.assert_array_equal(train_ids(read_class_map(file)), classes)


def test_kitti_step_is_read_by_our_own_loader(save, tmp_path):
    source = Source(*(f"{index:06d}.png" for index in range(7, 7 + FRAMES)))
    folder = save("semantic", "kitti_step", source=source) / "kitti_step"
    images = tmp_path / "images" / "street"
    images.mkdir(parents=True)
    for name in source.names:
        Image.new("RGB", (WIDTH, HEIGHT)).save(images / name)
    records = load_kitti_step_sem_seg(images.parent, folder)
    assert len(records) == FRAMES
    for index, record in enumerate(records):
        classes = semantic(index)["sem_seg"].numpy().argmax(0)
        np.testing.assert_array_equal(read_sem_seg(record), classes)


def test_kitti_step_numbers_the_things_of_each_class(save):
    file = save("panoptic", "kitti_step") / "kitti_step" / "street" / "000002.png"
    pixels = np.asarray(Image.open(file)).astype(int)
    ids = panoptic(2)["panoptic_seg"][0].numpy()
    np.testing.assert_array_equal(pixels[..., 0], np.array([255, 0, 100, 0, 2])[ids])
    instance = 256 * pixels[..., 1] + pixels[..., 2]
    np.testing.assert_array_equal(instance, np.array([0, 1, 0, 2, 1])[ids])


def test_confidence_is_the_best_class_s_share(save):
    file = save("semantic", "confidence") / "confidence" / "street" / "000003.png"
    scores = semantic(3)["sem_seg"].double().numpy()
    share = 255 * scores.max(0) / scores.sum(0)
    read = np.asarray(Image.open(file)).astype(float)
    assert np.abs(read - share).max() <= 0.5 + 1e-4


def test_confidence_of_scores_that_are_none_of_a_probability_is_0():
    scores = torch.tensor([[3.0, -1.0, float("nan"), 0.0, 2.0], [1.0, 1.0, 1.0, 0.0, torch.inf]])
    assert confidence({"sem_seg": scores[:, None]}).tolist() == [[0.75, 1.0, 0.0, 0.0, 0.0]]


def test_confidence_of_instances_is_the_best_one_s_score(save):
    file = save("instances", "confidence") / "confidence" / "street" / "000000.png"
    given = instances(0)["instances"]
    best = (given.pred_masks * given.scores[:, None, None]).amax(0).numpy()
    expected = np.rint(255 * best)
    np.testing.assert_array_equal(np.asarray(Image.open(file)), expected)
    assert set(np.unique(expected)) > {0, 230}


def test_coloured_frames_are_pictures_and_a_video(save):
    folder = save("color") / "color" / "street"
    for index in range(FRAMES):
        picture = np.asarray(Image.open(folder / f"{index:06d}.png"))
        np.testing.assert_array_equal(picture, color(index)["color"].permute(1, 2, 0).numpy())
    with av.open(str(folder / "video.mp4")) as video:
        shapes = [frame.to_ndarray(format="rgb24").shape for frame in video.decode(video=0)]
    assert shapes == [(HEIGHT, WIDTH + 1, 3)] * FRAMES  # H.264 wants even sides


# ---- names


@pytest.mark.parametrize(
    ("names", "stems"),
    [
        (["a1.png", "a2.jpg"], ["a1", "a2"]),
        (["été.png", "雪.png"], ["été", "雪"]),
        (["a.png", "a.jpg"], ["000000", "000001"]),
        (["a.png", "A.png"], ["000000", "000001"]),  # one file on a Mac
        (["e\u0301.png", "\u00e9.png"], ["000000", "000001"]),  # and so are these
        (["a b.png", "c.png"], ["000000", "000001"]),
        (["x" * 70 + ".png", "y.png"], ["000000", "000001"]),
        ([], ["000000"]),  # a camera
    ],
)
def test_frames_have_the_names_of_their_files_if_these_differ(names, stems):
    named = [{"file_name": f"d/{n}", "frame_index": i} for i, n in enumerate(names or ["webcam 0"])]
    assert [Stems(Source(*names))(frame) for frame in named] == stems


def test_videos_whose_ids_are_no_file_names_have_folders_of_their_own(save):
    for video_id in ("a/b", "a_b", "../a_b"):
        source = Source(video_id=video_id)
        folder = save("semantic", "masks", "cityscapes", source=source)
    assert len(list((folder / "masks").iterdir())) == 3
    cities = {file.name.split("_")[0] for file in (folder / "cityscapes").rglob("*.png")}
    assert len(cities) == 3
    assert {file.parent for file in folder.rglob("*.png")} == {
        *(folder / "masks").iterdir(), *(folder / "cityscapes").iterdir(),
    }  # fmt: skip


# ---- what cannot be


@pytest.mark.parametrize(
    ("kind", "name", "words"),
    [
        ("color", "masks", "--save masks: the model predicts color; its pixels have no class"),
        ("instances", "kitti_step", "--save kitti_step: the model predicts instances"),
        ("color", "coco", "--save coco: the model predicts color; coco needs masks"),
        ("semantic", "color", "--save color: the model predicts sem_seg; only models of colours"),
        ("color", "confidence", "--save confidence: the model predicts color; these have no"),
        ("panoptic", "cityscapes", r"classes \(person, bicycle, car, ...\) are not Cityscapes' 19"),
    ],
)
def test_what_a_model_cannot_give_is_told_before_the_run(cfgs, tmp_path, kind, name, words):
    sink = SavedPredictions(cfgs[kind], tmp_path / "run", (name,), fps=10)
    with pytest.raises(UserError, match=words) as error:
        sink.check(frozenset(KINDS[kind](0)))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_formats_are_named_once_and_known():
    assert format_names(["masks, coco", "color", "coco"]) == ("masks", "coco", "color")
    with pytest.raises(UserError, match="--save mask: no such format; did you mean masks"):
        format_names(["coco,mask"])
    with pytest.raises(UserError, match="--save : no such format; choose one of: masks, coco,"):
        format_names(["masks,"])


def test_more_classes_than_8_bits_hold(cfgs, tmp_path):
    cfg = cfgs["semantic"].clone()
    cfg.merge_from_list(["MODEL.SEM_SEG_HEAD.NUM_CLASSES", 256])
    sink = SavedPredictions(cfg, tmp_path, ("masks",), fps=10)
    with pytest.raises(UserError, match="has 256 classes, and 8 bits hold 255: --save coco"):
        sink.check(frozenset({"sem_seg"}))


# ---- kills and full disks


@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_video_ends_with_the_bytes_of_one_that_was_not(save, tmp_path, kind):
    whole, state = save(kind, kill=4)
    killed = tmp_path / "killed"
    assert not list(killed.rglob("*.json")) or kind not in ("instances",)
    with (
        (killed / "unfinished" / "street" / "coco.jsonl").open("a")
        if kind != "color"
        else (tmp_path / "nothing").open("w") as file
    ):
        file.write('{"image": {"id"')  # a row that the kill tore
    name = FORMATS[kind][0]
    (killed / name / "street" / ".000004.png.2147483646.part").write_bytes(b"half")
    state = json.loads(json.dumps(state))  # plain values
    again = save(kind, name="killed", done=2, state=state)
    assert content(again) == content(whole)


def test_lines_that_are_gone_are_told_before_the_video_goes_on(save, tmp_path):
    _, state = save("semantic", "coco", kill=2)
    lines = tmp_path / "killed" / "unfinished" / "street" / "coco.jsonl"
    lines.write_bytes(lines.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"coco.jsonl lacks rows that were there: put it back"):
        save("semantic", "coco", name="killed", done=2, state=state)


@pytest.fixture
def evaluate(cfgs, tiny_cfg, tiny_model, tmp_path):
    """``evaluate(name)`` runs the tiny model over a folder of seven frames, with ``--compare``."""
    video = tmp_path / "street"
    video.mkdir()
    rng = np.random.default_rng(0)
    for index in range(7):
        pixels = rng.integers(0, 256, (64, 96, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(video / f"s{index}.png")
    tiny_cfg.DATASETS.TEST = cfgs["semantic"].DATASETS.TEST
    tiny_cfg.TTT.BATCH_SIZE = 2

    def run(name, *formats, resume=False, more=()):
        directory = RunDirectory(tmp_path / name, resume=resume)
        formats = formats or FORMATS["semantic"]
        sink = SavedPredictions(tiny_cfg, directory.path, formats, fps=10, compare=True)
        settings = Settings(tiny_cfg, directory, compare=True, save_every=3, sinks=[sink, *more])
        source = FolderSource(video, FrameTransform(min_size=0))
        try:
            StreamEvaluation(settings, copy.deepcopy(tiny_model)).evaluate([source])
        finally:
            directory.close()
        return tmp_path / name

    return run


class After(Sink):
    """Does something after a frame."""

    def __init__(self, frame_index, do):
        self.frame_index, self.do = frame_index, do

    def write(self, results):
        if results.adapted.frame["frame_index"] == self.frame_index:
            self.do()


def saved_files(folder: Path) -> dict[str, bytes]:
    return {name: data for name, data in content(folder).items() if "/" in name}


def test_a_killed_run_goes_on_to_the_same_files(evaluate, tmp_path):
    copied = After(4, lambda: copy_running(tmp_path / "whole", tmp_path / "killed"))
    whole = saved_files(evaluate("whole", more=[copied]))
    assert len(whole) == 2 * (5 * 7 - 7 + 2)  # two models; coco has one file, masks one more
    assert not (tmp_path / "whole" / "unfinished").exists()
    assert whole["masks/street/s6.png"] != whole["masks_frozen/street/s6.png"]
    again = evaluate("killed", resume=True, more=[After(-1, lambda: None)])
    assert saved_files(again) == whole
    with pytest.raises(UserError, match=r"another setting .*--save: .*, now 'masks'"):
        evaluate("killed", "masks", resume=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["s3.png", "coco.jsonl", "semantic.json"])
def test_a_full_disk_is_one_line_and_rows_are_kept(evaluate, tmp_path, monkeypatch, name):
    original = Path.open, os.replace

    def full(path) -> bool:
        return Path(path).name == name and "run" in Path(path).parts

    def opened(self, *args, **kwargs):
        if full(self):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original[0](self, *args, **kwargs)

    def replaced(old, new):
        if full(new):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original[1](old, new)

    monkeypatch.setattr(Path, "open", opened)
    monkeypatch.setattr(os, "replace", replaced)
    with pytest.raises(UserError, match=f"^cannot write .*{name}: No space left") as error:
        evaluate("run", "masks", "coco")
    assert "\n" not in str(error.value)
    run = tmp_path / "run"
    rows = len((run / "frames.jsonl").read_text().splitlines())
    assert rows in {"s3.png": (4, 5, 6, 7), "coco.jsonl": (0,), "semantic.json": (7,)}[name]
    assert not list(run.rglob("*.part"))
    assert json.loads((run / "summary.json").read_text())["frames"] == rows
    monkeypatch.undo()
    evaluate("run", "masks", "coco", resume=True)
    evaluate("whole", "masks", "coco")
    assert saved_files(run) == saved_files(tmp_path / "whole")
