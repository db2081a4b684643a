"""Images and the network's input against independent readers: Pillow, OpenCV, detectron2."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from detectron2.data.detection_utils import read_image
from detectron2.data.transforms import ResizeShortestEdge
from frame_files import KEEP, picture
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ttt_video.config import get_cfg, load_config
from ttt_video.data.grey import open_videos
from ttt_video.data.sources import (
    FolderSource,
)
from ttt_video.errors import UserError
from ttt_video.formats import images
from ttt_video.formats.images import BadFrame, FrameTransform, read_rgb, read_size


@pytest.mark.parametrize(
    ("suffix", "modes"),
    [
        ("png", "RGB L RGBA LA P 1"),
        ("jpg", "RGB L CMYK"),
        ("bmp", "RGB L P 1"),
        ("webp", "RGB RGBA"),
        ("ppm", "RGB L 1"),
        ("tif", "RGB L RGBA P 1 CMYK"),
    ],
)
def test_reads_what_detectron2_reads(tmp_path, suffix, modes):
    for mode in modes.split():
        path = tmp_path / f"{mode}.{suffix}"
        Image.fromarray(picture(1)).convert(mode).save(path)
        rgb = read_rgb(str(path))
        assert rgb.shape == (24, 40, 3)
        assert rgb.dtype == np.uint8
        np.testing.assert_array_equal(rgb, read_image(str(path), "RGB"))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_tags_agree_with_opencv(tmp_path, orientation):
    cv2 = pytest.importorskip("cv2")
    exif = Image.Exif()
    exif[274] = orientation
    path = str(tmp_path / "phone.jpg")
    Image.fromarray(picture(2)).save(path, exif=exif, quality=95, subsampling=0)
    expected = cv2.imread(path, cv2.IMREAD_COLOR)[:, :, ::-1].astype(int)
    rgb = read_rgb(path)
    assert rgb.shape == expected.shape
    assert np.abs(rgb - expected).max() <= 3  # two JPEG decoders


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_16_bit_images_keep_their_high_byte(tmp_path, channels, suffix):
    cv2 = pytest.importorskip("cv2")
    deep = np.random.default_rng(0).integers(0, 65536, (24, 40, channels), dtype=np.uint16)
    path = str(tmp_path / f"deep.{suffix}")
    assert cv2.imwrite(path, deep if channels > 1 else deep[:, :, 0])
    expected = np.broadcast_to(deep[:, :, [2, 1, 0]] if channels > 1 else deep, (24, 40, 3)) >> 8
    np.testing.assert_array_equal(read_rgb(path), expected)


def test_transparent_palette_keeps_its_colours(tmp_path):
    image = Image.fromarray(picture(3)).quantize(16)
    image.save(tmp_path / "p.png", transparency=bytes([0] + [255] * 15))
    rgb = read_rgb(str(tmp_path / "p.png"))
    np.testing.assert_array_equal(rgb, np.asarray(image.convert("RGB")))


def test_float_pixels_are_refused(tmp_path):
    path = tmp_path / "depth.tiff"
    Image.fromarray(np.ones((4, 4), np.float32)).save(path)
    with pytest.raises(BadFrame, match=r"depth\.tiff has 32-bit pixels.*8-bit"):
        read_rgb(str(path))


@pytest.mark.parametrize("suffix", ["png", "jpg", "bmp", "webp", "ppm", "tif"])
def test_cut_off_images_are_named(tmp_path, suffix):
    path = tmp_path / f"cut.{suffix}"
    noise = np.random.default_rng(0).integers(0, 256, (60, 60, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(BadFrame, match=rf"cut\.{suffix} cannot be read \(.+\)"):
        read_rgb(str(path))


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # Pillow on what it finds damaged
@settings(max_examples=150, deadline=None)
@given(data=st.data(), suffix=st.sampled_from(["PNG", "JPEG", "BMP", "WEBP", "PPM", "TIFF"]))
def test_damaged_images_are_bad_frames_or_images(tmp_path_factory, data, suffix):
    buffer = io.BytesIO()
    Image.fromarray(picture(4)).save(buffer, format=suffix)
    content = bytearray(buffer.getvalue()[: data.draw(st.integers(0, buffer.tell()))])
    for _ in range(data.draw(st.integers(0, 6)) if content else 0):
        # Headers are where damage does most.
        place = data.draw(st.integers(0, min(len(content), 80) - 1))
        content[place] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "damaged"
    path.write_bytes(content)
    try:
        rgb = read_rgb(str(path))
    except BadFrame:
        return
    assert rgb.ndim == 3
    assert rgb.shape[2] == 3
    assert rgb.dtype == np.uint8


@pytest.mark.parametrize("format", ["RGB", "BGR"])
@pytest.mark.parametrize(("min_size", "max_size"), [(0, 1333), (48, 1333), (48, 60), (13, 1333)])
def test_transform_is_default_predictors(format, min_size, max_size):
    cfg = get_cfg()
    cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST = min_size, max_size
    cfg.INPUT.FORMAT = format
    bgr = picture(5)[:, :, ::-1]
    # DefaultPredictor.__call__, up to its cast to float.
    original = bgr[:, :, ::-1] if format == "RGB" else bgr
    resized = (
        ResizeShortestEdge([min_size, min_size], max_size)
        .get_transform(original)
        .apply_image(original)
    )
    image = FrameTransform.from_config(cfg)(picture(5))
    assert image.dtype == torch.uint8
    assert image.is_contiguous()
    np.testing.assert_array_equal(image.numpy(), resized.transpose(2, 0, 1))


@pytest.mark.parametrize(
    ("device", "gpu", "pinned"),
    [("cuda:1", True, True), ("cuda", False, False), ("cpu", True, False)],
)
def test_frames_are_pinned_for_a_gpu_alone(tmp_path, monkeypatch, device, gpu, pinned):
    cfg = load_config("quick/stream_world.yaml", opts=["MODEL.DEVICE", device])
    Image.fromarray(picture(0)).save(tmp_path / "0.png")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    (video,) = open_videos(cfg, lambda transform: [FolderSource(tmp_path, transform)])
    made, empty = [], torch.empty

    def noted(*args, pin_memory, **more):
        made.append(pin_memory)
        return empty(*args, **more)

    monkeypatch.setattr(images.torch, "empty", noted)
    image = video.transform(picture(0))
    assert made == [pinned]
    assert torch.equal(image, FrameTransform.from_config(cfg)(picture(0)))


def test_transform_leaves_the_global_random_state_alone():
    FrameTransform(min_size=48)(picture(0))  # what is imported on the way may draw
    draws = []
    for size in (0, 48):
        np.random.seed(1)  # noqa: NPY002
        FrameTransform(min_size=size)(picture(0))
        draws.append(np.random.random())  # noqa: NPY002
    assert draws[0] == draws[1]


def test_transform_owns_its_memory():
    rgb = picture(0).copy()
    image = KEEP(rgb)
    rgb[:] = 0
    assert image.any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"format": "YUV-BT.601"}, 'must be "RGB" or "BGR", not "YUV-BT.601"'),
        ({"min_size": -1}, "positive, not -1"),
        ({"max_size": 0}, "1333|not 0 and 0"),
    ],
)
def test_transform_refuses(arguments, message):
    with pytest.raises(UserError, match=message):
        FrameTransform(**arguments)


def test_transform_refuses_to_lose_all_pixels():
    with pytest.raises(UserError, match="1x4000 frame"):
        FrameTransform(min_size=8, max_size=100)(np.zeros((1, 4000, 3), np.uint8))


@pytest.mark.parametrize("orientation", [None, *range(10)])
def test_the_size_is_that_of_the_pixels(tmp_path, orientation):
    """0 and 9 are no orientations."""
    path, exif = str(tmp_path / "p.jpg"), Image.Exif()
    if orientation is not None:
        exif[0x0112] = orientation
    Image.new("RGB", (7, 5)).save(path, exif=exif)
    assert read_size(path) == read_rgb(path).shape[:2]


def test_what_is_no_image_has_no_size(tmp_path):
    (tmp_path / "p.png").write_bytes(b"no picture")
    for name in ("p.png", "gone.png"):
        with pytest.raises(BadFrame, match=f"{name} cannot be read"):
            read_size(str(tmp_path / name))
