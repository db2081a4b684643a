import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from kitti_layout import write_video
from PIL import Image

from ttt_video.data.cityscapes import CITYSCAPES_CLASSES, CITYSCAPES_COLORS
from ttt_video.data.kitti_step import (
    load_kitti_step_sem_seg,
    register_kitti_step,
    register_video_sem_seg,
)
from ttt_video.errors import UserError
from ttt_video.files import write_atomically
from ttt_video.formats.labels import read_sem_seg

H, W = 5, 7


@pytest.fixture
def roots(tmp_path):
    return tmp_path / "images" / "val", tmp_path / "panoptic_maps" / "val"


def make_frames(count, seed=0):
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (count, H, W, 3), dtype=np.uint8)
    labels = rng.integers(0, 19, (count, H, W), dtype=np.uint8)
    labels[:, 0] = 255
    return images, labels


def write_official(roots, sequence, images, labels):
    """KITTI-STEP's own files, written without the code under test."""
    rng = np.random.default_rng(1)
    for root in roots:
        (root / sequence).mkdir(parents=True)
    for index, (image, label) in enumerate(zip(images, labels, strict=True)):
        Image.fromarray(image).save(roots[0] / sequence / f"{index:06d}.png")
        panoptic = rng.integers(0, 256, (H, W, 3), dtype=np.uint8)
        panoptic[..., 0] = label
        Image.fromarray(panoptic).save(roots[1] / sequence / f"{index:06d}.png")


def test_round_trip(roots):
    for sequence, seed in (("0010", 1), ("0002", 2)):
        write_video(*roots, sequence, zip(*make_frames(11, seed), strict=True))
    dicts = load_kitti_step_sem_seg(*roots)
    assert [(d["video_id"], d["frame_index"]) for d in dicts] == [
        (sequence, t) for sequence in ("0002", "0010") for t in range(11)
    ]
    assert len({d["image_id"] for d in dicts}) == 22
    images, labels = make_frames(11, 2)
    for d in dicts[:11]:
        assert (d["height"], d["width"]) == (H, W)
        np.testing.assert_array_equal(
            np.array(Image.open(d["file_name"])), images[d["frame_index"]]
        )
        np.testing.assert_array_equal(read_sem_seg(d), labels[d["frame_index"]])


def test_official_layout(roots):
    images, labels = make_frames(2)
    write_official(roots, "0006", images, labels)
    dicts = load_kitti_step_sem_seg(*roots)
    assert [d["sem_seg_format"] for d in dicts] == ["kitti_step_panoptic"] * 2
    for d, label in zip(dicts, labels, strict=True):
        assert (d["height"], d["width"]) == (H, W)
        np.testing.assert_array_equal(read_sem_seg(d), label)
        assert read_sem_seg(d).dtype == np.uint8
        assert d["panoptic_file_name"] == d["sem_seg_file_name"]


def test_instances_stay_within_reach_of_the_8_bit_labels(roots):
    images, labels = make_frames(2)
    write_official(roots, "0006", images, labels)
    Image.fromarray(labels[1]).save(roots[1] / "0006" / "000001_sem.png")
    without, both = load_kitti_step_sem_seg(*roots)
    assert (without["sem_seg_format"], both["sem_seg_format"]) == (
        "kitti_step_panoptic",
        "train_id",
    )
    assert both["sem_seg_file_name"].endswith("000001_sem.png")
    assert both["panoptic_file_name"].endswith("000001.png")
    np.testing.assert_array_equal(read_sem_seg(both), labels[1])
    write_video(*roots, "0009", zip(images, labels, strict=True))
    assert "panoptic_file_name" not in load_kitti_step_sem_seg(*roots)[-1]


def test_images_of_all_splits_may_lie_in_one_folder(roots):
    write_video(*roots, "0002", zip(*make_frames(1), strict=True))
    (roots[0] / "0000").mkdir()
    assert [d["video_id"] for d in load_kitti_step_sem_seg(*roots)] == ["0002"]


def test_a_failed_write_leaves_nothing_behind(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")

    def fail(part):
        part.write_text("half")
        raise OSError("disk full")

    with pytest.raises(UserError, match=r"cannot write .*a\.txt: disk full"):
        write_atomically(path, fail)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_missing_folder_says_what_is_expected(roots):
    with pytest.raises(UserError, match=r"_sem\.png.*DETECTRON2_DATASETS"):
        load_kitti_step_sem_seg(*roots)
    for root in roots:
        root.mkdir(parents=True)
    with pytest.raises(UserError, match="no sequences"):
        load_kitti_step_sem_seg(*roots)


def test_hidden_folders_are_no_sequences(roots):
    write_video(*roots, "0002", zip(*make_frames(1), strict=True))
    for root in roots:
        (root / ".ipynb_checkpoints").mkdir()
    assert [d["video_id"] for d in load_kitti_step_sem_seg(*roots)] == ["0002"]


def test_images_and_labels_may_lie_in_one_folder(tmp_path):
    images, labels = make_frames(3)
    write_video(tmp_path, tmp_path, "0002", zip(images, labels, strict=True))
    dicts = load_kitti_step_sem_seg(tmp_path, tmp_path)
    assert [d["image_id"] for d in dicts] == [f"0002/{t:06d}" for t in range(3)]
    np.testing.assert_array_equal(np.stack([read_sem_seg(d) for d in dicts]), labels)


@pytest.mark.parametrize("kind", ["_sem", ""])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_labels_without_their_image_are_refused(roots, kind, place):
    if kind:
        write_video(*roots, "0002", zip(*make_frames(3), strict=True))
    else:
        write_official(roots, "0002", *make_frames(3))
    (roots[0] / "0002" / f"{place:06d}.png").unlink()
    with pytest.raises(UserError) as error:
        load_kitti_step_sem_seg(*roots)
    assert str(error.value) == (
        f"label map {roots[1]}/0002/{place:06d}{kind}.png has no frame in {roots[0]}/0002 "
        "(1 such label maps): restore the frames, or remove their labels"
    )


def test_other_files_beside_labels_are_left_alone(roots):
    write_video(*roots, "0002", zip(*make_frames(2), strict=True))
    for name in ("000009.txt", "000009_drawn.png", "overview.png", "._000009.png"):
        (roots[1] / "0002" / name).touch()
    assert len(load_kitti_step_sem_seg(*roots)) == 2


def test_missing_files(roots):
    write_video(*roots, "0000", zip(*make_frames(2), strict=True))
    (roots[1] / "0000" / "000001_sem.png").unlink()
    with pytest.raises(UserError, match=r"no labels for 0000/000001\.png"):
        load_kitti_step_sem_seg(*roots)
    (roots[1] / "0001").mkdir()
    (roots[1] / "0000" / "000001_sem.png").touch()
    with pytest.raises(UserError, match="no images of sequence 0001"):
        load_kitti_step_sem_seg(*roots)


def test_damaged_files(roots):
    write_video(*roots, "0000", zip(*make_frames(1), strict=True))
    (d,) = load_kitti_step_sem_seg(*roots)
    label = roots[1] / "0000" / "000000_sem.png"
    label.write_bytes(label.read_bytes()[:40])
    with pytest.raises(UserError, match="000000_sem"):
        read_sem_seg(d)
    Image.fromarray(np.zeros((H, W, 3), np.uint8)).save(label)
    with pytest.raises(UserError, match=r"no label map of class ids: it is 8-bit RGB, 5x7 "):
        read_sem_seg(d)
    with pytest.raises(UserError, match="'polygons'"):
        read_sem_seg({**d, "sem_seg_format": "polygons"})
    (roots[1] / "0000" / "000000.json").write_text("{")
    with pytest.raises(UserError, match="imgHeight"):
        load_kitti_step_sem_seg(*roots)


@pytest.fixture
def catalog():
    """Removes what a test registers, and what it replaces, afterwards."""
    names = ["kitti_step_video_sem_seg_train", "kitti_step_video_sem_seg_val", "video_for_test"]
    kept = {name: DatasetCatalog[name] for name in names if name in DatasetCatalog}
    for name in names:
        DatasetCatalog.pop(name, None)
        MetadataCatalog.pop(name, None)
    yield
    for name in names:
        DatasetCatalog.pop(name, None)
        MetadataCatalog.pop(name, None)
    if kept:
        register_kitti_step()


@pytest.mark.usefixtures("catalog")
def test_registration_reads_the_variable_when_loading(tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "nowhere"))
    register_kitti_step()
    register_kitti_step()  # a second call changes nothing
    with pytest.raises(UserError, match="nowhere"):
        DatasetCatalog.get("kitti_step_video_sem_seg_train")
    base = tmp_path / "kitti_step"
    roots = (base / "images" / "val", base / "panoptic_maps" / "val")
    write_video(*roots, "0002", zip(*make_frames(2), strict=True))
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    assert len(DatasetCatalog.get("kitti_step_video_sem_seg_val")) == 2
    metadata = MetadataCatalog.get("kitti_step_video_sem_seg_val")
    assert metadata.stuff_classes == list(CITYSCAPES_CLASSES)
    assert (metadata.ignore_label, metadata.evaluator_type) == (255, "video_sem_seg")


@pytest.mark.usefixtures("catalog")
@pytest.mark.parametrize("unpacked", ["training/image_02", "image_02"])
def test_images_where_kitti_tracking_unpacks_them(tmp_path, monkeypatch, unpacked):
    base = tmp_path / "kitti_step"
    for split, sequence in (("train", "0000"), ("val", "0002")):
        maps = base / "panoptic_maps" / split
        write_official((base / unpacked, maps), sequence, *make_frames(2))
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    register_kitti_step()
    for split, sequence in (("train", "0000"), ("val", "0002")):
        dicts = DatasetCatalog.get(f"kitti_step_video_sem_seg_{split}")
        assert [d["image_id"] for d in dicts] == [f"{sequence}/{t:06d}" for t in range(2)]


@pytest.mark.usefixtures("catalog")
def test_own_videos(roots):
    register_video_sem_seg("video_for_test", *roots)
    write_video(*roots, "a street", zip(*make_frames(1), strict=True))
    assert DatasetCatalog.get("video_for_test")[0]["video_id"] == "a street"


def test_class_table_is_detectron2s():
    """The train ids against detectron2's own Cityscapes tables."""
    from detectron2.data.datasets.builtin_meta import CITYSCAPES_CATEGORIES

    own = dict(zip(CITYSCAPES_CLASSES, CITYSCAPES_COLORS, strict=True))
    theirs = {c["name"]: tuple(c["color"]) for c in CITYSCAPES_CATEGORIES}
    assert own == theirs
    assert list(own) == [c["name"] for c in sorted(CITYSCAPES_CATEGORIES, key=lambda c: c["id"])]
