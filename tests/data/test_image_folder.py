"""Folders of pictures for colorization: which files count, in which order, and what is refused."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from ttt_video.config import load_config
from ttt_video.data.image_folder import load_image_folder, register_image_folder
from ttt_video.data.mapper import JointDatasetMapper
from ttt_video.errors import UserError
from ttt_video.training.joint_training import load_records

PIXELS = np.random.default_rng(0).integers(0, 256, (16, 24, 3), np.uint8)


def add(file: Path, image: Image.Image | None = None) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    (image or Image.fromarray(PIXELS)).save(file)
    return file


def ids(root: Path) -> list[str]:
    return [record["image_id"] for record in load_image_folder(root)]


def mapped(file: Path) -> np.ndarray:
    """A picture as training sees it, (H, W, 3)."""
    cfg = load_config("joint_imagenet_color.yaml")
    cfg.merge_from_list(["INPUT.CROP.ENABLED", False, "INPUT.MIN_SIZE_TRAIN", [0]])
    cfg.merge_from_list(["INPUT.RANDOM_FLIP", "none", "INPUT.SIZE_DIVISIBILITY", -1])
    record = {"file_name": str(file), "original_file_name": str(file)}
    return JointDatasetMapper(cfg, True)(record)["image"].numpy().transpose(1, 2, 0)


def test_every_picture_at_any_depth_in_natural_order(tmp_path):
    for name in ("n10/b.JPEG", "n2/10.png", "n2/9.png", "n2/deeper/and/a.webp", "top.bmp"):
        add(tmp_path / name)
    for name in (".hidden.png", ".git/a.png", "n2/.DS_Store.png"):
        add(tmp_path / name)
    (tmp_path / "n2/notes.txt").touch()
    records = load_image_folder(tmp_path)
    expected = ["n2/9.png", "n2/10.png", "n2/deeper/and/a.webp", "n10/b.JPEG", "top.bmp"]
    assert [record["image_id"] for record in records] == expected
    for record, name in zip(records, expected, strict=True):
        assert record["file_name"] == record["original_file_name"] == str(tmp_path / name)


def test_links_are_followed_and_folders_count_once(tmp_path):
    elsewhere = add(tmp_path / "elsewhere/0.png").parent
    root = tmp_path / "root"
    add(root / "a/1.png")
    (root / "linked").symlink_to(elsewhere)
    (root / "again").symlink_to(elsewhere)
    (root / "a/round").symlink_to(root)
    (root / "2.png").symlink_to(elsewhere / "0.png")
    assert ids(root) == ["2.png", "a/1.png", "again/0.png"]
    (root / "a/lost.png").symlink_to(root / "nowhere")
    assert "a/lost.png" in ids(root)
    with pytest.raises(UserError, match=r"frame .*lost\.png cannot be read"):
        mapped(root / "a/lost.png")
    (root / "a/lost").symlink_to(root / "nowhere")
    with pytest.raises(UserError, match=r"lost is a link to nothing \(.*nowhere\)"):
        load_image_folder(root)


def test_a_folder_that_cannot_be_listed(tmp_path, monkeypatch):
    add(tmp_path / "a/1.png")
    add(tmp_path / "b/1.png")
    scan = os.scandir

    def refuse(path):
        if Path(path).name == "b":
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UserError, match="b cannot be listed: Permission denied"):
        load_image_folder(tmp_path)


def test_no_folder_and_no_pictures(tmp_path):
    (tmp_path / "empty/a").mkdir(parents=True)
    (tmp_path / "empty/a/notes.txt").touch()
    with pytest.raises(UserError, match=r"empty holds no pictures: expected files ending in .*png"):
        load_image_folder(tmp_path / "empty")
    for name in ("nowhere", "empty/a/notes.txt"):
        with pytest.raises(UserError, match=f"{name}: no such folder of pictures"):
            load_image_folder(tmp_path / name)


@pytest.mark.parametrize("name", ["imagenet", "photos"])
def test_a_set_that_is_not_there_is_told_in_a_line(tmp_path, monkeypatch, name):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    with pytest.raises(UserError) as error:
        load_records((f"{name}_color_train",), True)
    assert str(tmp_path / name / "train") in str(error.value)
    assert "\n" not in str(error.value)
    add(tmp_path / name / "train/n01440764/a.JPEG")
    (record,) = load_records((f"{name}_color_train",), True)
    assert record["image_id"] == "n01440764/a.JPEG"


def test_a_folder_of_ones_own(tmp_path):
    add(tmp_path / "0.png")
    register_image_folder("test_image_folder_own", tmp_path)
    try:
        assert len(DatasetCatalog.get("test_image_folder_own")) == 1
        assert MetadataCatalog.get("test_image_folder_own").evaluator_type == "video_color"
    finally:
        DatasetCatalog.remove("test_image_folder_own")
        MetadataCatalog.remove("test_image_folder_own")


@pytest.mark.parametrize("content", [b"no picture", None])
def test_a_broken_file_is_told_in_a_line_when_it_is_used(tmp_path, content):
    file = add(tmp_path / "0.png")
    file.write_bytes(content or file.read_bytes()[:300])
    assert len(load_image_folder(tmp_path)) == 1
    with pytest.raises(UserError, match=r"frame .*0\.png cannot be read") as error:
        mapped(file)
    assert "\n" not in str(error.value)


def test_other_kinds_of_pictures_are_what_they_show(tmp_path):
    grey = PIXELS[..., 0]
    deep = add(tmp_path / "deep.png", Image.fromarray(grey.astype(np.uint16) * 256 + 37))
    assert np.array_equal(mapped(deep), np.stack([grey] * 3, -1))
    # Smooth colours, because CMYK is stored as a JPEG, and without black, so that it is invertible.
    smooth = np.asarray(Image.fromarray(PIXELS[:3, :4]).resize((24, 16), Image.Resampling.BICUBIC))
    printed = Image.fromarray(smooth).convert("CMYK")
    printed.save(tmp_path / "printed.jpg", quality=100, subsampling=0)
    assert np.abs(mapped(tmp_path / "printed.jpg").astype(int) - smooth).max() <= 6
    palette = add(tmp_path / "palette.png", Image.fromarray(smooth).quantize(64))
    with Image.open(palette) as image:
        assert np.array_equal(mapped(palette), np.asarray(image.convert("RGB")))
