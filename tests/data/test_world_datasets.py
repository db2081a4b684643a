import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from ttt_video.data.world import datasets, render_still
from ttt_video.data.world.datasets import load_world_stills, register_world_stills
from ttt_video.errors import UserError


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A world of few and small stills, in a folder of its own."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    monkeypatch.setattr(datasets, "STILL_HEIGHT", 16)
    monkeypatch.setattr(datasets, "STILL_WIDTH", 32)
    monkeypatch.setattr(datasets, "STILL_SEEDS", {"train": range(3), "val": range(1000, 1002)})
    monkeypatch.setattr(datasets, "STILLS_PER_SEED", {"train": 2, "val": 1})
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


def test_renders_only_what_is_missing(small, monkeypatch):
    dicts = load_world_stills("val")
    rendered = []

    def render(seed, height, width, number):
        rendered.append(seed)
        return render_still(seed, height, width, number)

    monkeypatch.setattr(datasets, "render_still", render)
    assert load_world_stills("val") == dicts
    assert rendered == []
    (small / dicts[1]["sem_seg_file_name"]).unlink()
    assert load_world_stills("val") == dicts
    assert rendered == [1001]


def test_a_folder_that_cannot_be_written(small):
    (small / "world_stills").write_text("a file is in the way")
    with pytest.raises(UserError, match="DETECTRON2_DATASETS"):
        load_world_stills("val")


def test_shipped_splits_do_not_meet():
    seeds = datasets.STILL_SEEDS
    assert max(seeds["train"]) < 1000 <= min(seeds["val"])
    assert max(seeds["val"]) < 2000


def test_registration():
    register_world_stills()
    register_world_stills()
    assert {"world_sem_seg_train", "world_sem_seg_val"} <= set(DatasetCatalog.list())
    metadata = MetadataCatalog.get("world_sem_seg_val")
    assert metadata.evaluator_type == "sem_seg"
    assert len(metadata.stuff_classes) == 19
