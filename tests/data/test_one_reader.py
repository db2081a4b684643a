"""Training, evaluation and streams read the same pictures, and jitter as detectron2 does."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from PIL import Image
from raw_png import GRAY, write_raw_png
from test_mapper import IMAGE, make_mapper

from ttt_video.config import get_cfg
from ttt_video.data.color_jitter import SSDColorJitter
from ttt_video.data.grey import open_videos
from ttt_video.data.mapper import EvaluationMapper
from ttt_video.data.sources import FolderSource
from ttt_video.formats.images import FrameTransform, read_rgb


@pytest.mark.parametrize("image_format", ["RGB", "BGR"])
def test_training_and_evaluation_read_what_a_stream_reads(tmp_path, image_format):
    """16-bit gray is the high byte, and a phone's picture stands upright."""
    deep = np.arange(24).reshape(4, 6) * 2730  # up to 62790
    write_raw_png(tmp_path / "deep.png", deep, bits=16, color_type=GRAY)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(IMAGE).save(tmp_path / "phone.jpg", exif=exif)
    cfg = get_cfg()
    cfg.INPUT.FORMAT, cfg.INPUT.MIN_SIZE_TEST = image_format, 0
    for name, size in (("deep.png", (4, 6)), ("phone.jpg", (6, 4))):
        record = {"file_name": str(tmp_path / name), "annotations": []}
        expected = read_rgb(record["file_name"])
        assert expected.shape[:2] == size
        if name == "deep.png":
            assert (expected == deep[..., None] // 256).all()
        expected = expected[..., ::-1] if image_format == "BGR" else expected
        trained = make_mapper("instance", image_format=image_format)(record)
        evaluated = EvaluationMapper(cfg)(record)
        for sample in (trained, evaluated):
            np.testing.assert_array_equal(sample["image"].numpy(), expected.transpose(2, 0, 1))
            assert (sample["height"], sample["width"]) == size
        assert record.keys() == {"file_name", "annotations"}


def test_evaluation_of_colours_sees_what_a_stream_shows(tmp_path):
    """Grey pixels at the network's size, and those at the file's own, on which colours are laid."""
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "0.png")
    cfg = get_cfg()
    cfg.merge_from_list(["INPUT.MIN_SIZE_TEST", 20, "INPUT.GREY", "made"])
    record = {"file_name": str(tmp_path / "0.png"), "original_file_name": str(tmp_path / "0.png")}
    mapped = EvaluationMapper(cfg)(record)
    sources = [FolderSource(tmp_path, FrameTransform())]
    (frame,) = open_videos(cfg, lambda transform: sources)[0]
    assert mapped["image"].shape == (3, 20, 30)
    for key in ("image", "grey"):
        assert torch.equal(mapped[key], frame[key])
    assert mapped["original_file_name"] == record["original_file_name"]


@pytest.mark.parametrize("image_format", ["RGB", "BGR"])
def test_colour_jitter_is_that_of_pointrends_package(image_format):
    theirs = pytest.importorskip("detectron2.projects.point_rend").ColorAugSSDTransform
    image = np.random.default_rng(0).integers(0, 256, (9, 14, 3), np.uint8)
    untouched = image.copy()
    changed = 0
    for seed in range(64):  # 32 ways through five coins
        results = []
        for jitter in (SSDColorJitter(image_format), theirs(img_format=image_format)):
            random.seed(seed)
            results.append((jitter.apply_image(image), random.random()))
        (ours, after), (expected, after_theirs) = results
        np.testing.assert_array_equal(ours, expected)
        assert after == after_theirs
        changed += not np.array_equal(ours, image)
    assert changed > 40
    np.testing.assert_array_equal(image, untouched)
    assert SSDColorJitter("RGB").apply_segmentation(image) is image
