import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from panopticapi.utils import rgb2id
from PIL import Image

from ttt_video.data.coco_videos import UNLABELLED
from ttt_video.errors import UserError
from ttt_video.world import datasets, render_still
from ttt_video.world.datasets import (
    load_world_color,
    load_world_panoptic,
    load_world_stills,
    register_world_stills,
)
from ttt_video.world.segments import COCO_IDS, coco_segment_ids
from ttt_video.world.video import SPLIT_SEEDS, WorldStills


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A world of few and small stills, in a folder of its own."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    monkeypatch.setattr(datasets, "STILL_HEIGHT", 16)
    monkeypatch.setattr(datasets, "STILL_WIDTH", 32)
    monkeypatch.setattr(datasets, "NUM_STILLS", {"train": 6, "val": 2})
    monkeypatch.setattr(datasets, "NUM_DISTRICT_STILLS", {"train": 1, "val": 2})
    monkeypatch.setitem(SPLIT_SEEDS, "train", range(3))
    return tmp_path


def test_renders_on_first_use(small):
    dicts = load_world_stills("train")
    assert [d["image_id"] for d in dicts] == [
        "0000_0", "0001_0", "0002_0", "0000_1", "0001_1", "0002_1"
    ]  # fmt: skip
    for d in dicts:
        seed, number = (int(part) for part in d["image_id"].split("_"))
        frame = render_still(seed, 16, 32, number)
        np.testing.assert_array_equal(np.array(Image.open(d["file_name"])), frame.image)
        np.testing.assert_array_equal(np.array(Image.open(d["sem_seg_file_name"])), frame.sem_seg)
        assert (d["height"], d["width"]) == (16, 32)
    assert len(list(small.rglob("*.png"))) == 12


def test_stills_of_districts_have_a_folder_of_their_own(small):
    dicts = DatasetCatalog.get("world_districts_sem_seg_val")
    assert [d["image_id"] for d in dicts] == ["1000_0", "1001_0"]
    for d, seed in zip(dicts, (1000, 1001), strict=True):
        frame = render_still(seed, 16, 32, districts=True)
        np.testing.assert_array_equal(np.array(Image.open(d["file_name"])), frame.image)
        np.testing.assert_array_equal(np.array(Image.open(d["sem_seg_file_name"])), frame.sem_seg)
    plain = load_world_stills("val")
    assert not {d["file_name"] for d in dicts} & {d["file_name"] for d in plain}
    assert MetadataCatalog.get("world_districts_sem_seg_val").evaluator_type == "sem_seg"


def test_the_same_stills_are_their_own_labels_for_colorization(small):
    for d, same in zip(load_world_color("val"), load_world_stills("val"), strict=True):
        assert d["file_name"] == d["original_file_name"] == same["file_name"]
        assert d.keys() == {*same, "original_file_name"} - {"sem_seg_file_name"}
    assert MetadataCatalog.get("world_color_val").evaluator_type == "video_color"


def test_renders_only_what_is_missing(small, monkeypatch):
    dicts = load_world_stills("val")
    rendered = []

    def render(self, index):
        rendered.append(self.origin(index))
        return original(self, index)

    original = WorldStills.__getitem__
    monkeypatch.setattr(WorldStills, "__getitem__", render)
    assert load_world_stills("val") == dicts
    assert rendered == []
    (small / dicts[1]["sem_seg_file_name"]).unlink()
    assert load_world_stills("val") == dicts
    assert rendered == [(1001, 0)]


def test_a_folder_that_cannot_be_written(small):
    (small / "world_stills").write_text("a file is in the way")
    for load in (load_world_stills, load_world_panoptic):
        with pytest.raises(UserError, match="DETECTRON2_DATASETS"):
            load("val")


def test_panoptic_labels_of_the_same_stills(small, monkeypatch):
    dicts = load_world_panoptic("train")
    semantic = load_world_stills("train")
    assert len(dicts) == len(semantic) == 6
    metadata = MetadataCatalog.get("world_panoptic_train")
    contiguous = {
        **metadata.thing_dataset_id_to_contiguous_id,
        **metadata.stuff_dataset_id_to_contiguous_id,
    }
    for d, same in zip(dicts, semantic, strict=True):
        classes = np.array(Image.open(same["sem_seg_file_name"]))
        ids = rgb2id(np.array(Image.open(d["pan_seg_file_name"])))
        for segment in d["segments_info"]:
            (label,) = np.unique(classes[ids == segment["id"]])
            assert contiguous[COCO_IDS[label]] == segment["category_id"]
        assert {*np.unique(ids)} - {0} == {segment["id"] for segment in d["segments_info"]}
        picture = np.array(Image.open(d["file_name"])).astype(float)
        original = np.array(Image.open(same["file_name"]))
        assert np.abs(picture - original).mean() < 16  # a JPEG of the same still
    monkeypatch.setattr(datasets, "write_coco", None)  # nothing is written again
    assert load_world_panoptic("train") == dicts


def test_zoomed_stills_have_a_folder_of_their_own(small):
    dicts = DatasetCatalog.get("world_zoom_panoptic_val")
    plain = load_world_panoptic("val")
    assert not {d["file_name"] for d in dicts} & {d["file_name"] for d in plain}
    for d, seed in zip(dicts, (1000, 1001), strict=True):
        frame = render_still(seed, 16, 32, zoom=datasets.ZOOM)
        ids = rgb2id(np.array(Image.open(d["pan_seg_file_name"])))
        expected = coco_segment_ids(frame)
        expected[expected == UNLABELLED << 16] = 0
        np.testing.assert_array_equal(ids, expected)
    for name in ("world_zoom_panoptic_val", "world_panoptic_val"):
        metadata = MetadataCatalog.get(name)
        assert ("zoom4" in metadata.json_file) == ("zoom" in name)
        assert metadata.evaluator_type == "coco_panoptic_seg"


def test_panoptic_metadata_knows_where_the_labels_are(small):
    load_world_panoptic("val")
    metadata = MetadataCatalog.get("world_panoptic_val")
    for key in ("image_root", "panoptic_root", "panoptic_json", "json_file"):
        assert (small / getattr(metadata, key)).exists(), key
    assert metadata.evaluator_type == "coco_panoptic_seg"


def test_shipped_splits_do_not_meet():
    seeds = {}
    for split, count in datasets.NUM_STILLS.items():
        stills = WorldStills(split, count)
        seeds[split] = {stills.origin(index)[0] for index in range(count)}
    assert seeds == {"train": {*range(1000)}, "val": {*range(1000, 1200)}}


def test_registration():
    register_world_stills()
    register_world_stills()
    kinds = ("sem_seg", "panoptic", "zoom_panoptic", "districts_sem_seg")
    names = {f"world_{k}_{s}" for k in kinds for s in ("train", "val")}
    assert names <= set(DatasetCatalog.list())
    metadata = MetadataCatalog.get("world_sem_seg_val")
    assert metadata.evaluator_type == "sem_seg"
    assert len(metadata.stuff_classes) == 19
