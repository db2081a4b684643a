"""Folders of classes: what is read, how it is cropped and labelled, and what is refused."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.transforms as tv
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image
from torchvision.transforms import InterpolationMode

from ttt_video.config import load_config
from ttt_video.data.catalog import training_images
from ttt_video.data.image_folder import (
    imagenet_classes,
    load_class_folders,
    register_class_folders,
)
from ttt_video.data.image_mapper import ImageClassMapper
from ttt_video.data.loader import seeded
from ttt_video.data.mapper import EvaluationMapper
from ttt_video.data.sources import open_dataset
from ttt_video.errors import UserError
from ttt_video.formats.images import FrameTransform, single_crop
from ttt_video.world.image_sets import corrupt_small

NOISE = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)


def config(*opts: object):
    keys = ("INPUT.MIN_SIZE_TEST", 0, "INPUT.RANDOM_FLIP", "none", "INPUT.IMAGE_SIZE", 28)
    mapper = ("INPUT.DATASET_MAPPER_NAME", "image_classes")
    return load_config("joint_cityscapes.yaml", opts=[str(x) for x in (*keys, *mapper, *opts)])


def save(file: Path, pixels: np.ndarray = NOISE, **options: object) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(file, **options)
    return file


@pytest.mark.parametrize("size", [(40, 60), (61, 40), (333, 500), (500, 375), (256, 256), (17, 99)])
@pytest.mark.parametrize(("resize", "crop"), [(256, 224), (37, 30), (33, 32), (28, 28)])
def test_a_single_crop_is_torchvisions(size, resize, crop):
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    bicubic = tv.Resize(resize, InterpolationMode.BICUBIC)
    expected = tv.Compose([bicubic, tv.CenterCrop(crop)])(Image.fromarray(pixels))
    assert np.array_equal(single_crop(pixels, resize, crop), np.asarray(expected))


def test_a_frame_is_the_single_crop_whatever_the_sizes_of_the_files(tmp_path):
    for index, shape in enumerate([(40, 60), (70, 30), (28, 28)]):
        save(tmp_path / f"cat/{index}.png", np.full((*shape, 3), 50 * index, np.uint8))
    name = "test_image_sets_sizes"
    DatasetCatalog.register(name, lambda: load_class_folders(tmp_path, ["cat"], name))
    try:
        transform = FrameTransform.from_config(config("INPUT.SINGLE_CROP", 32))
        (source,) = open_dataset(name, transform)
        frames = list(source)
        mapped = [EvaluationMapper(config("INPUT.SINGLE_CROP", 32))(r) for r in source.records]
    finally:
        DatasetCatalog.remove(name)
    for index, (frame, other) in enumerate(zip(frames, mapped, strict=True)):
        assert frame["image"].shape == (3, 28, 28)
        assert (frame["height"], frame["width"], frame["class_id"]) == (28, 28, 0)
        assert (frame["image"] == 50 * index).all()
        assert torch.equal(frame["image"], other["image"])
        assert (other["height"], other["width"]) == (28, 28)


def test_a_crop_larger_than_the_resized_image_is_refused():
    with pytest.raises(UserError, match=r"SINGLE_CROP is 20; it must be 0, or at least INPUT.IMAG"):
        config("INPUT.SINGLE_CROP", 20)
    with pytest.raises(UserError, match=r"SINGLE_CROP is 32; .*MIN_SIZE_TEST 0"):
        config("INPUT.SINGLE_CROP", 32, "INPUT.MIN_SIZE_TEST", 64)


def test_class_folders_have_the_ids_of_the_heads_classes(tmp_path):
    for name in ("dog/2.png", "dog/10.JPEG", "cat/deeper/a.png"):
        save(tmp_path / name)
    records = load_class_folders(tmp_path, ["ant", "cat", "dog"], "pets")
    found = [(r["image_id"], r["class_id"], r["frame_index"]) for r in records]
    assert {r["video_id"] for r in records} == {"pets"}
    assert found == [
        ("cat/deeper/a.png", 1, 0), ("dog/2.png", 2, 1), ("dog/10.JPEG", 2, 2),
    ]  # fmt: skip


def test_a_class_that_the_head_does_not_know_and_a_picture_in_no_class(tmp_path):
    save(tmp_path / "cat/0.png")
    save(tmp_path / "axolotl/0.png")
    with pytest.raises(UserError, match=r"axolotl is no class that the head knows: .*cat, dog"):
        load_class_folders(tmp_path, ["cat", "dog"], "pets")
    (tmp_path / "axolotl/0.png").rename(tmp_path / "0.png")
    with pytest.raises(UserError, match=r"0\.png is in no class folder: move it into one of cat"):
        load_class_folders(tmp_path, ["cat", "dog"], "pets")


def test_other_kinds_of_pictures_are_what_they_show(tmp_path):
    grey = NOISE[..., 0]
    smooth = np.asarray(Image.fromarray(NOISE[:3, :4]).resize((60, 40), Image.Resampling.BICUBIC))
    Image.fromarray(grey.astype(np.uint16) * 256 + 37).save(tmp_path / "deep.png")
    Image.fromarray(smooth).convert("CMYK").save(
        tmp_path / "print.JPEG", "JPEG", quality=100, subsampling=0
    )
    mapper = ImageClassMapper(config())
    for name, expected, error in (
        ("deep.png", np.stack([grey] * 3, -1), 0),
        ("print.JPEG", smooth, 6),
    ):
        sample = mapper({"file_name": str(tmp_path / name), "class_id": 3})
        assert sample["class_id"] == 3
        difference = sample["image"].numpy().transpose(1, 2, 0).astype(int) - expected
        assert np.abs(difference).max() <= error


@pytest.mark.parametrize("content", [b"no picture", NOISE.tobytes()])
def test_a_picture_that_cannot_be_read_is_told_in_a_line(tmp_path, content):
    file = tmp_path / "cat/0.JPEG"
    file.parent.mkdir()
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"frame .*0\.JPEG cannot be read \(") as error:
        ImageClassMapper(config())({"file_name": str(file), "class_id": 0})
    assert "\n" not in str(error.value)


def test_imagenet_has_the_published_classes(tmp_path, monkeypatch):
    folders, names = imagenet_classes()
    assert len(folders) == len(set(folders)) == len(names) == 1000
    assert list(folders) == sorted(folders)
    assert (folders[0], folders[999]) == ("n01440764", "n15075141")
    assert names[0].startswith("tench")
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    save(tmp_path / "imagenet/val/n01443537/a.JPEG")
    (record,) = DatasetCatalog.get("imagenet_classes_val")
    assert record["class_id"] == 1
    assert MetadataCatalog.get("imagenet_classes_val").classes[1].startswith("goldfish")


def test_random_parts_are_those_of_the_seed(tmp_path):
    ramp = np.linspace(0, 255, 60).astype(np.uint8)
    pixels = np.stack([np.tile(ramp, (40, 1))] * 3, -1)
    record = {"file_name": str(save(tmp_path / "a.png", pixels)), "class_id": 0}
    mapper = ImageClassMapper(
        config("INPUT.RANDOM_RESIZED_CROP", [0.2, 0.5], "INPUT.RANDOM_FLIP", "horizontal")
    )

    def sample(seed: int) -> np.ndarray:
        with seeded(0, seed):
            return mapper(record)["image"].numpy()

    made = [sample(seed) for seed in range(40)]
    random.seed(9)
    assert all(np.array_equal(sample(seed), made[seed]) for seed in range(3))
    assert all(image.shape == (3, 28, 28) for image in made)
    slopes = np.array([int(image[0, 14, 22]) - int(image[0, 14, 5]) for image in made])
    assert 8 <= (slopes < 0).sum() <= 32  # mirrored
    # A part has 0.2 to 0.5 of the area, sides 3:4 to 4:3, in a picture of 60 x 40 px.
    shares = np.abs(slopes) / 17 * 28 / 255
    assert 0.2 < shares.min() < shares.max() < 0.75
    with pytest.raises(UserError, match=r"vertical.*does not have"):
        ImageClassMapper(config("INPUT.RANDOM_FLIP", "vertical"))


def test_contrast_is_that_of_the_picture_without_a_margin():
    """ImageNet-C: (x - mean) c + mean, with c = 0.4 and 0.05 at severities 1 and 5."""
    picture = np.zeros((28, 28, 3), np.uint8)
    picture[7:21, 7:21] = 200
    for severity, c in ((1, 0.4), (5, 0.05)):
        wanted = (picture / 255 - 50 / 255) * c + 50 / 255
        found = corrupt_small(picture, "contrast", severity, 0) / 255
        np.testing.assert_allclose(found, wanted, atol=1 / 255)


def test_the_published_config_takes_pictures_of_any_size():
    transform = FrameTransform.from_config(load_config("Base-ViTMAE.yaml"))
    picture = np.random.default_rng(0).integers(0, 256, (300, 500, 3), np.uint8)
    assert transform(transform.view(picture)).shape == (3, 224, 224)


def test_measured_images_are_spread_over_classes_and_data_sets(tmp_path):
    folders = {"test_spread_classes": ["n1", "n2", "n3"], "test_spread_other": ["n4"]}
    for name, classes in folders.items():
        for label in classes:
            for index in range(4):
                picture = np.full((32, 32, 3), int(label[1:]), np.uint8)
                save(tmp_path / name / label / f"{index}.png", picture)
        register_class_folders(name, tmp_path / name, classes)
    try:
        one = list(training_images(["test_spread_classes"], FrameTransform(), 6))
        both = list(training_images(list(folders), FrameTransform(), 8))
    finally:
        for name in folders:
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)
    assert [int(image[0, 0, 0]) for image in one] == [1, 1, 2, 2, 3, 3]
    assert [int(image[0, 0, 0]) for image in both] == [1, 1, 2, 2, 3, 3, 4, 4]


def test_measuring_images_of_no_data_set_is_one_line():
    with pytest.raises(UserError, match="TRAIN is empty; name a data set with --dataset"):
        list(training_images([], FrameTransform(), 1))
