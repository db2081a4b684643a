"""The world in the layouts of other data sets, read by the loaders of those."""

import json
import os

import numpy as np
import pycocotools.mask as mask_util
import pytest
from detectron2.data import MetadataCatalog
from detectron2.data.datasets.cityscapes import load_cityscapes_instances, load_cityscapes_semantic
from detectron2.data.datasets.cityscapes_panoptic import load_cityscapes_panoptic
from detectron2.data.datasets.coco import load_coco_json
from detectron2.data.datasets.coco_panoptic import load_coco_panoptic_json
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from panopticapi.utils import rgb2id
from PIL import Image, ImageDraw

from ttt_video.data.coco_videos import load_coco_video
from ttt_video.data.kitti_step import load_kitti_step_sem_seg
from ttt_video.formats.labels import read_sem_seg
from ttt_video.world import WorldFrame, WorldStills, WorldVideo, layouts, render_still, segments
from ttt_video.world.scene import BUILDING, CAR, PERSON, POLE, ROAD, SIDEWALK, SIGN, SKY

H, W = 48, 96
POLE_OR_SIGN = [POLE, SIGN]


def read(path):
    return np.array(Image.open(path))


def frame_of(sem_seg, instances):
    """A frame with hand-made labels."""
    sem_seg = np.array(sem_seg, dtype=np.uint8)
    image = np.repeat(sem_seg[..., None], 3, axis=2)
    return WorldFrame(image, sem_seg, np.array(instances, dtype=np.int32), sem_seg.astype("f4"))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("datasets")


@pytest.fixture(scope="module")
def video():
    return [WorldVideo(2003, 12, H, W)[t] for t in range(12)]


@pytest.fixture(scope="module")
def kitti(root, video):
    layouts.write_kitti_step(root / "kitti_step", "val", "0002", video, rgb_labels=True)
    return root / "kitti_step"


@pytest.fixture(scope="module")
def coco_videos(root, video):
    layouts.write_coco_videos(root / "coco_videos", "bangkok", video)
    return root / "coco_videos"


@pytest.fixture(scope="module")
def coco(root, video):
    layouts.write_coco(root / "coco", "val", video[:4])
    return root / "coco"


@pytest.fixture(scope="module")
def cityscapes(root, video):
    layouts.write_cityscapes(root / "cityscapes", "train", "aworld", video[:4])
    return root / "cityscapes"


def test_kitti_step_has_both_kinds_of_labels(kitti, video):
    dicts = load_kitti_step_sem_seg(kitti / "images/val", kitti / "panoptic_maps/val")
    assert len(dicts) == len(video)
    for frame, record in zip(video, dicts, strict=True):
        np.testing.assert_array_equal(read(record["file_name"]), frame.image)
        np.testing.assert_array_equal(read_sem_seg(record), frame.sem_seg)
        label = record["panoptic_file_name"]
        colors = read(label).astype(int)
        np.testing.assert_array_equal(colors[..., 0], frame.sem_seg)
        np.testing.assert_array_equal(256 * colors[..., 1] + colors[..., 2], frame.instances)
        record = {"sem_seg_file_name": label, "sem_seg_format": "kitti_step_panoptic"}
        np.testing.assert_array_equal(read_sem_seg(record), frame.sem_seg)


def agrees(ids, segments_info, frame, coco_ids):
    """Every id of the picture is listed once and rightly described."""
    assert sorted(s["id"] for s in segments_info) == np.unique(ids[ids > 0]).tolist()
    things = 0
    for segment in segments_info:
        mask = ids == segment["id"]
        assert segment["area"] == mask.sum()
        rows, columns = np.nonzero(mask)
        x, y, w, h = segment["bbox"]
        assert (x, y, x + w - 1, y + h - 1) == (
            columns.min(), rows.min(), columns.max(), rows.max()
        )  # fmt: skip
        assert segment["iscrowd"] == 0
        if segment["category_id"] in (1, 3):
            things += 1
            assert len(np.unique(frame.instances[mask])) == 1
        classes = {coco_ids.get(c, 255) for c in np.unique(frame.sem_seg[mask]).tolist()}
        assert classes == {segment["category_id"]}
    assert things == len(np.unique(frame.instances[frame.instances > 0]))


COCO_IDS = {ROAD: 149, SIDEWALK: 191, BUILDING: 197, 8: 184, SKY: 187, PERSON: 1, CAR: 3}


def test_coco_videos_by_hand(coco_videos, video):
    raw = coco_videos / "raw_images/bangkok"
    assert {p.name for p in raw.iterdir()} == {f"bangkok_{n}.png" for n in range(1, 13)}
    for n, frame in enumerate(video, start=1):
        np.testing.assert_array_equal(read(raw / f"bangkok_{n}.png"), frame.image)
    content = json.loads((coco_videos / "annotations/train/bangkok.json").read_text())
    assert [i["file_name"] for i in content["images"]] == ["bangkok_1.png", "bangkok_11.png"]
    labels = coco_videos / "panoptic_images/bangkok"
    assert {p.name for p in labels.iterdir()} == {"bangkok_1.png", "bangkok_11.png"}
    assert [a["image_id"] for a in content["annotations"]] == [i["id"] for i in content["images"]]
    for frame, annotation in zip(video[::10], content["annotations"], strict=True):
        ids = rgb2id(read(labels / annotation["file_name"]))
        assert (ids > 0).all()
        agrees(ids, annotation["segments_info"], frame, COCO_IDS)
        for segment in annotation["segments_info"]:
            mask = mask_util.decode(segment["segmentation"]).astype(bool)
            np.testing.assert_array_equal(mask, ids == segment["id"])
        unlabelled = [s for s in annotation["segments_info"] if s["category_id"] == 255]
        assert sum(s["area"] for s in unlabelled) == np.isin(frame.sem_seg, POLE_OR_SIGN).sum() > 0


def test_coco_video_things_keep_their_ids(coco_videos, video):
    for t in (0, 10):
        ids = rgb2id(read(coco_videos / f"panoptic_images/bangkok/bangkok_{t + 1}.png"))
        np.testing.assert_array_equal(ids % 65536, video[t].instances)


@pytest.mark.parametrize("task", ["instance", "panoptic"])
def test_coco_videos_load(coco_videos, video, task):
    records = load_coco_video(coco_videos, "bangkok", task)
    assert [r["frame_index"] for r in records] == list(range(12))
    for frame, record in zip(video, records, strict=True):
        np.testing.assert_array_equal(read(record["file_name"]), frame.image)
    assert [r["frame_index"] for r in records if "segments_info" in r] == [0, 10]
    for index in (0, 10):
        segments_info = records[index]["segments_info"]
        ids = rgb2id(read(records[index]["pan_seg_file_name"]))
        assert sorted(s["id"] for s in segments_info) == np.unique(ids).tolist()
        objects = records[index].get("annotations", [])
        assert len(objects) == (sum(s["isthing"] for s in segments_info) if objects else 0)
        for item in objects:
            mask = mask_util.decode(item["segmentation"]).astype(bool)
            label = {0: PERSON, 2: CAR}[item["category_id"]]
            assert (video[index].sem_seg[mask] == label).all()
        assert bool(objects) == (task == "instance")


def test_coco_instances_load(coco, video):
    name = "test_world_coco_instances"
    MetadataCatalog.pop(name, None)
    dicts = load_coco_json(
        str(coco / "annotations/instances_val2017.json"), str(coco / "val2017"), name
    )
    assert len(MetadataCatalog.get(name).thing_classes) == 80
    assert len(dicts) == 4
    for frame, record in zip(video, dicts, strict=False):
        close = np.abs(read(record["file_name"]).astype(int) - frame.image)  # a JPEG
        assert close.mean() < 3
        seen = np.zeros((H, W), dtype=int)
        for annotation in record["annotations"]:
            mask = mask_util.decode(annotation["segmentation"]).astype(bool)
            (instance,) = np.unique(frame.instances[mask])
            label = {0: PERSON, 2: CAR}[annotation["category_id"]]  # contiguous ids
            np.testing.assert_array_equal(mask, frame.instances == instance)
            assert (frame.sem_seg[mask] == label).all()
            seen += mask
        np.testing.assert_array_equal(seen, frame.instances > 0)


def test_coco_panoptic_loads(coco, video):
    meta = MetadataCatalog.get("coco_2017_val_panoptic").as_dict()
    dicts = load_coco_panoptic_json(
        str(coco / "annotations/panoptic_val2017.json"),
        str(coco / "val2017"),
        str(coco / "panoptic_val2017"),
        meta,
    )
    back = {v: k for k, v in meta["thing_dataset_id_to_contiguous_id"].items()}
    back |= {v: k for k, v in meta["stuff_dataset_id_to_contiguous_id"].items()}
    for frame, record in zip(video, dicts, strict=False):
        ids = rgb2id(read(record["pan_seg_file_name"]))
        np.testing.assert_array_equal(ids == 0, np.isin(frame.sem_seg, POLE_OR_SIGN))
        for segment in record["segments_info"]:
            assert segment["isthing"] == (segment["category_id"] < 80)
            segment["category_id"] = back[segment["category_id"]]
        agrees(ids, record["segments_info"], frame, COCO_IDS)
    assert len(dicts) == 4


def test_cityscapes_semantic_loads(cityscapes, video):
    dicts = load_cityscapes_semantic(
        str(cityscapes / "leftImg8bit/train"), str(cityscapes / "gtFine/train")
    )
    assert len(dicts) == 4
    for record in dicts:
        frame = video[int(os.path.basename(record["file_name"]).split("_")[1])]
        np.testing.assert_array_equal(read(record["file_name"]), frame.image)
        np.testing.assert_array_equal(read(record["sem_seg_file_name"]), frame.sem_seg)
        assert (record["height"], record["width"]) == (H, W)


LABEL_IDS = {ROAD: 7, SIDEWALK: 8, BUILDING: 11, POLE: 17, SIGN: 20, 8: 21, SKY: 23, PERSON: 24,
             CAR: 26}  # fmt: skip
LABEL_NAMES = {"road": 7, "sidewalk": 8, "building": 11, "pole": 17, "traffic sign": 20,
               "vegetation": 21, "sky": 23, "person": 24, "car": 26}  # fmt: skip


def test_cityscapes_label_and_instance_ids(cityscapes, video):
    folder = cityscapes / "gtFine/train/aworld"
    for index, frame in enumerate(video[:4]):
        stem = f"aworld_{index:06d}_000000_gtFine"
        labels = read(folder / f"{stem}_labelIds.png")
        expected = np.vectorize(LABEL_IDS.get)(frame.sem_seg)
        np.testing.assert_array_equal(labels, expected)
        ids = read(folder / f"{stem}_instanceIds.png").astype(int)
        np.testing.assert_array_equal(np.where(ids >= 1000, ids // 1000, ids), expected)
        np.testing.assert_array_equal(ids >= 1000, frame.instances > 0)
        pairs = {pair for pair in zip(ids.flat, frame.instances.flat, strict=True) if pair[1]}
        assert len(pairs) == len({i for i, _ in pairs}) == len({n for _, n in pairs})
        content = json.loads((folder / f"{stem}_polygons.json").read_text())
        drawn = draw(content, LABEL_NAMES)
        np.testing.assert_array_equal(drawn, labels)


def draw(content, values):
    """Cityscapes' json2labelImg: each polygon over those before it."""
    picture = Image.new("L", (content["imgWidth"], content["imgHeight"]))
    pencil = ImageDraw.Draw(picture)
    for item in content["objects"]:
        assert len(item["polygon"]) >= 3
        pencil.polygon([tuple(p) for p in item["polygon"]], fill=values[item["label"]])
    return np.array(picture)


def test_cityscapes_instances_load(cityscapes, video):
    pytest.importorskip("cityscapesscripts")
    dicts = load_cityscapes_instances(
        str(cityscapes / "leftImg8bit/train"),
        str(cityscapes / "gtFine/train"),
        from_json=False,
        to_polygons=False,
    )
    assert len(dicts) == 4
    for record in dicts:
        frame = video[int(record["image_id"].split("_")[1])]
        for annotation in record["annotations"]:
            mask = mask_util.decode(annotation["segmentation"]).astype(bool)
            assert (frame.sem_seg[mask] == {0: PERSON, 2: CAR}[annotation["category_id"]]).all()


def test_cityscapes_panoptic_loads(cityscapes, video):
    meta = MetadataCatalog.get("cityscapes_fine_panoptic_train").as_dict()
    ground_truth = cityscapes / "gtFine"
    dicts = load_cityscapes_panoptic(
        str(cityscapes / "leftImg8bit/train"),
        str(ground_truth / "cityscapes_panoptic_train"),
        str(ground_truth / "cityscapes_panoptic_train.json"),
        meta,
    )
    assert [d["image_id"] for d in dicts] == [f"aworld_{i:06d}_000000" for i in range(4)]
    for frame, record in zip(video, dicts, strict=False):
        ids = rgb2id(read(record["pan_seg_file_name"]))
        assert sorted(s["id"] for s in record["segments_info"]) == np.unique(ids).tolist()
        for segment in record["segments_info"]:  # category ids are train ids now
            mask = ids == segment["id"]
            assert (frame.sem_seg[mask] == segment["category_id"]).all()
            assert segment["area"] == mask.sum()


blobs = hnp.arrays(
    np.uint8, st.tuples(st.integers(1, 9), st.integers(1, 9)),
    elements=st.sampled_from((ROAD, SKY, POLE, CAR, PERSON)),
)  # fmt: skip


DIAMOND = np.full((5, 5), SKY, dtype=np.uint8)
DIAMOND[[1, 2, 2, 3], [2, 1, 3, 2]] = CAR  # hangs together by corners, and so does what is inside


@given(blobs)
@example(DIAMOND)
def test_polygons_drawn_give_any_picture_back(sem_seg):
    ids = segments.cityscapes_label_ids(frame_of(sem_seg, np.zeros_like(sem_seg)))
    np.testing.assert_array_equal(draw(layouts._polygons(ids), LABEL_NAMES), ids)


@given(hnp.arrays(np.int32, (3, 4), elements=st.integers(0, 2**24 - 1)))
def test_ids_survive_their_colours(ids):
    colors = segments.ids_to_rgb(ids)
    assert colors.dtype == np.uint8
    np.testing.assert_array_equal(rgb2id(colors), ids)


def test_ids_by_hand():
    frame = frame_of([[CAR, CAR, PERSON, SKY, POLE]], [[65535, 7, 300, 0, 0]])
    np.testing.assert_array_equal(
        segments.coco_segment_ids(frame),
        [[3 * 65536 + 65535, 3 * 65536 + 7, 65536 + 300, 187 * 65536, 255 * 65536]],
    )
    np.testing.assert_array_equal(
        segments.cityscapes_instance_ids(frame), [[26001, 26000, 24000, 23, 17]]
    )
    np.testing.assert_array_equal(
        segments.kitti_step_panoptic(frame)[0, :3], [[13, 255, 255], [13, 0, 7], [11, 1, 44]]
    )


class Counted:
    """Frames that note when they are looked up."""

    def __init__(self, frames):
        self.frames, self.seen = frames, []

    def __len__(self):
        return len(self.frames)

    def __getitem__(self, index):
        self.seen.append(index)
        return self.frames[index]


WRITERS = {
    "kitti_step": lambda root, f: layouts.write_kitti_step(root, "val", "0", f, rgb_labels=True),
    "coco_videos": lambda root, f: layouts.write_coco_videos(root, "tokyo", f),
    "coco": lambda root, f: layouts.write_coco(root, "train", f),
    "cityscapes": lambda root, f: layouts.write_cityscapes(root, "val", "ulm", f),
}


@pytest.mark.parametrize("layout", WRITERS)
def test_what_is_missing_is_written_again_and_nothing_else(tmp_path, video, layout):
    frames = Counted(video[:2])
    WRITERS[layout](tmp_path, frames)
    files = sorted(p for p in tmp_path.rglob("*") if p.is_file())
    before = {p: p.read_bytes() for p in files}
    assert frames.seen == [0, 1]
    for lost in files:
        frames.seen.clear()
        lost.unlink()
        leftover = lost.with_name(f".{lost.name}.9999999.part")  # of a process that was killed
        leftover.write_text("half")
        WRITERS[layout](tmp_path, frames)
        assert len(frames.seen) <= 1
        assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_leftovers_do_not_confuse_cityscapes_loader(tmp_path, video):
    WRITERS["cityscapes"](tmp_path, video[:1])
    leftover = tmp_path / "leftImg8bit/val/ulm/.ulm_000000_000000_leftImg8bit.png.9999999.part"
    leftover.write_text("half")
    WRITERS["cityscapes"](tmp_path, video[:1])
    assert len(load_cityscapes_semantic(tmp_path / "leftImg8bit/val", tmp_path / "gtFine/val")) == 1


def test_stills_are_of_their_split():
    for split, first in (("train", 0), ("val", 1000), ("test", 2000)):
        stills = WorldStills(split, 1001, 16, 32)
        assert len(stills) == 1001
        for index, (seed, number) in {2: (first + 2, 0), 1000: (first, 1)}.items():
            expected = render_still(seed, 16, 32, number)
            np.testing.assert_array_equal(stills[index].image, expected.image)
        for index in (-1, 1001):
            with pytest.raises(IndexError, match="1001"):
                stills[index]
