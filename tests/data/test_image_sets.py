"""Image sets: what is read, corrupted and labelled, and what is refused."""

from __future__ import annotations

import gzip
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from fashion import TEST, TRAIN, VAL, write_fashion_mnist, write_idx
from PIL import Image
from test_class_folders import config, save

from ttt_video.config import load_config
from ttt_video.data.catalog import check_registered, read_pixels
from ttt_video.data.checking import DatasetCheck, draw_labels
from ttt_video.data.image_folder import (
    imagenet_classes,
    register_class_folders,
)
from ttt_video.data.image_mapper import training_mapper
from ttt_video.data.mapper import JointDatasetMapper
from ttt_video.data.sources import open_dataset
from ttt_video.errors import UserError
from ttt_video.formats.idx import read_idx
from ttt_video.formats.images import FrameTransform
from ttt_video.world import image_sets
from ttt_video.world.corruptions import corrupt
from ttt_video.world.image_sets import FASHION_MNIST_C, corrupt_small


@pytest.fixture
def fashion(tmp_path, monkeypatch) -> tuple[np.ndarray, np.ndarray]:
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    return write_fashion_mnist(tmp_path / "fashion_mnist", monkeypatch)


# ---- Fashion-MNIST


def test_the_splits_are_the_published_pictures_each_once(fashion):
    images, labels = fashion
    sizes = {"train": TRAIN, "val": VAL, "test": TEST}
    records = {split: DatasetCatalog.get(f"fashion_mnist_{split}") for split in sizes}
    assert {split: len(own) for split, own in records.items()} == sizes
    assert not {r["image_id"] for r in records["train"]} & {r["image_id"] for r in records["val"]}
    for index, record in enumerate(records["test"]):
        assert record["class_id"] == labels[index]
        pixels = read_pixels(record)
        assert pixels.shape == (28, 28, 3)
        assert (pixels == images[index][..., None]).all()
    assert records["val"][0]["file_name"].endswith(f"train-images-idx3-ubyte.gz#{TRAIN}")
    assert MetadataCatalog.get("fashion_mnist_val").classes[9] == "Ankle boot"


def test_a_set_is_a_stream_of_images(fashion):
    images, labels = fashion
    transform = FrameTransform.from_config(config("INPUT.SINGLE_CROP", 28))
    (source,) = open_dataset("fashion_mnist_test", transform)
    assert source.video_id == "fashion_mnist_test"
    for index, frame in enumerate(source):
        assert (frame["frame_index"], frame["class_id"]) == (index, labels[index])
        assert (frame["image"].numpy() == images[index]).all()
    rows = source.fingerprint()
    file = Path(source.records[0]["archive_file_name"])
    write_idx(file, np.zeros((TEST, 28, 28), np.uint8))
    assert source.fingerprint() != rows  # the archive has another size


def test_damaged_idx_files_are_told_in_a_line(tmp_path, fashion):
    folder = tmp_path / "fashion_mnist"
    labels, images = (folder / f"t10k-{kind}-ubyte.gz" for kind in ("labels-idx1", "images-idx3"))
    whole = labels.read_bytes()
    cases = {
        "cannot be read": whole[: len(whole) // 2],
        "is no idx file": gzip.compress(b"\0\0\x0d\x01" + bytes(8)),
        "says that it holds": gzip.compress(gzip.decompress(whole)[:-1]),
        "Not a gzipped file": gzip.decompress(whole),
    }
    for message, content in cases.items():
        labels.write_bytes(content)
        read_idx.cache_clear()
        with pytest.raises(UserError, match=message) as error:
            DatasetCatalog.get("fashion_mnist_test")
        assert "\n" not in str(error.value)
    write_idx(labels, np.full(TEST, 10, np.uint8))
    read_idx.cache_clear()
    with pytest.raises(UserError, match="has label 10, but classes are 0-9"):
        DatasetCatalog.get("fashion_mnist_test")
    labels.write_bytes(whole)
    write_idx(images, np.zeros((3, 28, 28), np.uint8))
    read_idx.cache_clear()
    with pytest.raises(UserError, match=r"holds \(3, 28, 28\) bytes, not \(40, 28, 28\)"):
        DatasetCatalog.get("fashion_mnist_test")
    images.unlink()
    with pytest.raises(UserError, match=r"is missing: run datasets/prepare_fashion_mnist\.py"):
        DatasetCatalog.get("fashion_mnist_test")


# ---- corruptions


@pytest.mark.slow
@pytest.mark.parametrize("corruption", FASHION_MNIST_C)
def test_every_corruption_works_on_28_px_and_grows(corruption):
    """The same seed gives the same picture, whatever the process drew before."""
    rows = np.linspace(20, 230, 28).astype(np.uint8)
    clean = np.repeat((rows[:, None] // 2 + rows[None] // 2)[..., None], 3, 2)
    clean[8:20, 10:18] = 200
    changes = []
    for severity in (1, 3, 5):
        np.random.seed(severity)  # noqa: NPY002
        made = corrupt_small(clean, corruption, severity, 7)
        assert made.shape == (28, 28, 3)
        assert made.dtype == np.uint8
        assert np.array_equal(made, corrupt_small(clean, corruption, severity, 7))
        changes.append(np.abs(made.astype(int) - clean).mean())
    assert changes[0] > 0
    assert changes[0] < changes[2]
    assert np.array_equal(corrupt_small(clean, corruption, 0, 7), clean)


def test_noise_has_the_published_strength_at_the_pictures_own_size():
    """ImageNet-C's severity 5: a standard deviation of 0.38."""
    clean = np.full((28, 28, 3), 128, np.uint8)
    made = [corrupt_small(clean, "gaussian_noise", 5, seed) for seed in range(20)]
    # Values that reach 0 or 1 are cut off; those within one deviation are not.
    within = np.mean(np.abs(np.stack(made) / 255 - 128 / 255) < 0.38)
    assert within == pytest.approx(0.6827, abs=0.01)


def test_a_blur_is_that_of_the_picture_at_twice_its_size():
    clean = np.zeros((28, 28, 3), np.uint8)
    clean[7:21, 7:21] = 200
    large = np.asarray(Image.fromarray(clean).resize((56, 56), Image.Resampling.BICUBIC))
    blurred = corrupt(large, "defocus_blur", 5, 3, 0).astype(float)
    expected = blurred.reshape(28, 2, 28, 2, 3).mean((1, 3))
    assert np.abs(corrupt_small(clean, "defocus_blur", 5, 3) - expected).max() <= 0.5


def test_corrupted_sets_are_always_the_same_and_pictures_differ(fashion):
    images, labels = fashion
    name = "fashion_mnist_c_gaussian_noise"
    first, again = ([read_pixels(r) for r in DatasetCatalog.get(name)] for _ in range(2))
    assert np.array_equal(first, again)
    noise = [a.astype(int) - b[..., None] for a, b in zip(first, images, strict=True)]
    assert not any(np.array_equal(a, b) for a, b in pairwise(noise))
    (source,) = open_dataset(name, FrameTransform())
    for frame, pixels in zip(source, first, strict=True):
        assert (frame["image"].permute(1, 2, 0).numpy() == pixels).all()
        assert frame["class_id"] == labels[frame["frame_index"]]
    weaker = [read_pixels(r) for r in DatasetCatalog.get(f"{name}_1")]
    change = [np.abs(np.stack(each) - images[..., None].astype(int)).mean()
              for each in (weaker, first)]  # fmt: skip
    assert change[0] < change[1]
    assert [r["severity"] for r in DatasetCatalog.get(f"{name}_1")] == [1.0] * TEST


def test_two_corruptions_share_out_the_pictures_evenly(fashion):
    records = DatasetCatalog.get("fashion_mnist_c_gaussian_noise+elastic_transform")
    names = [record["corruption"] for record in records]
    for pair in zip(names[::2], names[1::2], strict=True):
        assert sorted(pair) == ["elastic_transform", "gaussian_noise"]
    assert len(set(zip(names[::2], names[1::2], strict=True))) == 2  # by chance, not in turn
    alone = {name: DatasetCatalog.get(f"fashion_mnist_c_{name}") for name in set(names)}
    for index, record in enumerate(records):
        expected = alone[record["corruption"]][index]
        assert np.array_equal(read_pixels(record), read_pixels(expected))
    turned = DatasetCatalog.get("fashion_mnist_c_elastic_transform+gaussian_noise")
    assert [record["corruption"] for record in turned] == names
    assert [1 - record["group"] for record in turned] == [record["group"] for record in records]


def test_a_ramp_has_all_severities_in_any_part_of_the_stream(fashion):
    severities = [r["severity"] for r in DatasetCatalog.get("fashion_mnist_c_fog_ramp")]
    for part in (severities[:20], severities[20:]):
        counts, _ = np.histogram(part, bins=5, range=(0, 5))
        assert counts.min() >= 3
    assert len(set(severities)) == TEST


def test_validation_pictures_are_corrupted_as_test_pictures_are(fashion):
    clean = DatasetCatalog.get("fashion_mnist_val")
    records = DatasetCatalog.get("fashion_mnist_val_c_gaussian_blur")
    assert [r["image_id"] for r in records] == [r["image_id"] for r in clean]
    assert {r["video_id"] for r in records} == {"fashion_mnist_val_c_gaussian_blur"}
    file, index = clean[1]["read_pixels"].args
    expected = image_sets.read_corrupted(file, index, "gaussian_blur", 5)
    assert np.array_equal(read_pixels(records[1]), expected)
    assert not np.array_equal(expected, read_pixels(clean[1]))


def test_imagenet_c_is_read_from_its_tree(tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    folders, _ = imagenet_classes()
    for corruption in ("fog", "contrast"):
        for severity in range(1, 6):
            for index in range(6):
                value = 10 * severity + (100 if corruption == "fog" else 0)
                pixels = np.full((224, 224, 3), value, np.uint8)
                path = f"imagenet-c/{corruption}/{severity}/{folders[index % 2 + 5]}/{index}.JPEG"
                save(tmp_path / path, pixels)
    records = DatasetCatalog.get("imagenet_c_fog")
    assert [r["class_id"] for r in records] == [5, 5, 5, 6, 6, 6]
    assert all(read_pixels(r)[0, 0, 0] == 150 for r in records)
    assert all(read_pixels(r)[0, 0, 0] == 120 for r in DatasetCatalog.get("imagenet_c_fog_2"))
    ramp = DatasetCatalog.get("imagenet_c_fog_ramp")
    assert [read_pixels(r)[0, 0, 0] for r in ramp] == [100 + 10 * r["severity"] for r in ramp]
    assert {r["severity"] for r in ramp} >= {1, 4, 5}
    mixed = DatasetCatalog.get("imagenet_c_fog+contrast")
    assert sorted(read_pixels(r)[0, 0, 0] for r in mixed) == [50] * 3 + [150] * 3
    (tmp_path / f"imagenet-c/contrast/5/{folders[5]}/0.JPEG").unlink()
    with pytest.raises(UserError, match="hold different pictures: restore them"):
        DatasetCatalog.get("imagenet_c_fog+contrast")


def test_unknown_names_have_a_short_answer():
    with pytest.raises(UserError, match="did you mean fashion_mnist_c_glass_blur"):
        check_registered("fashion_mnist_c_glas_blur")
    with pytest.raises(
        UserError, match=r"fashion_mnist_c_<corruption>, fashion_mnist_test"
    ) as error:
        check_registered("qqq")
    assert "glass_blur" not in str(error.value)
    before = len(DatasetCatalog.list())
    image_sets.register_corrupted_images()
    assert len(DatasetCatalog.list()) == before


def test_a_set_is_checked_by_its_files_and_classes(fashion, tmp_path):
    for name in ("fashion_mnist_test", "fashion_mnist_c_gaussian_noise"):
        check = DatasetCheck(name)
        text = "\n".join(check.lines)
        assert f"{TEST} frames in 1 video(s) of {TEST}, {TEST} with image classification" in text
        assert "images: 1 of 1 files" in text
        assert "28x28 (32)" in text
        assert "10 of 10 classes occur, share of images:" in text
        assert "Trouser 10.00 %" in text
        # The small set has not the published number of images.
        assert [p[:24] for p in check.problems] == ["not the published images"] * (
            "_c_" not in name
        )
    (file,) = draw_labels(check, 1, tmp_path / "pictures")
    assert Image.open(file).size == (28, 28)
    for file in ("cat/1.png", "cat/2.png", "cat/3.png", "dog/8.png", "dog/9.png"):
        save(tmp_path / "own" / file)
    name = "test_image_sets_checked"
    register_class_folders(name, tmp_path / "own", ["cat", "dog", "eel"])
    try:
        check = DatasetCheck(name)
    finally:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    assert check.problems == []
    assert "never seen: eel" in check.lines


# ---- training


def test_the_mapper_gives_the_image_and_its_class_alone(fashion):
    images, labels = fashion
    record = DatasetCatalog.get("fashion_mnist_test")[4]
    before = dict(record)
    sample = training_mapper(config())(record)
    assert sample.keys() == {"image", "class_id"}
    assert sample["class_id"] == labels[4]
    assert (sample["image"].numpy() == images[4]).all()
    assert record == before
    assert training_mapper(config(), labelled=False)(record).keys() == {"image"}
    with pytest.raises(UserError, match="needs 'class_id' in the data set"):
        training_mapper(config())({"file_name": "a.png"})
    other = load_config("joint_cityscapes.yaml")
    assert isinstance(training_mapper(other), JointDatasetMapper)
