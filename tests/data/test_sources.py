"""Frame sources against independent readers: Pillow, OpenCV, detectron2."""

from __future__ import annotations

import gc
import io
import itertools
import logging
import os
import random
import struct
import threading
import time
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog
from detectron2.data.detection_utils import read_image
from detectron2.data.transforms import ResizeShortestEdge
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ttt_video.config import get_cfg, load_config
from ttt_video.data import BaseSource
from ttt_video.data.decoded_source import run_ahead
from ttt_video.data.grey import open_videos
from ttt_video.data.sources import (
    DatasetSource,
    FolderSource,
    VideoFileSource,
    open_dataset,
    open_folder,
    open_video,
)
from ttt_video.errors import UserError
from ttt_video.formats import images
from ttt_video.formats.images import BadFrame, FrameTransform, natural_key, read_rgb
from ttt_video.structures import FrameSource

KEEP = FrameTransform(min_size=0)


def picture(seed: int, height: int = 24, width: int = 40) -> np.ndarray:
    """Smooth, so that lossy codecs keep it, and different for every seed."""
    coarse = np.random.default_rng(seed).integers(0, 256, (3, 5, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def write_folder(folder, count: int = 4, **size: int):
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        Image.fromarray(picture(index, **size)).save(folder / f"frame{index}.png")
    return folder


def write_video(path, count: int = 12, size=(48, 64), codec="libx264", bt709=False):
    options = {"crf": "4"} if codec == "libx264" else {"qscale": "2"}
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=Fraction(10), options=options)
        stream.height, stream.width = size
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        if bt709:
            context = stream.codec_context
            context.colorspace = context.color_primaries = context.color_trc = 1
        for index in range(count):
            frame = av.VideoFrame.from_ndarray(picture(index, *size), format="rgb24")
            frame = frame.reformat(
                format=stream.pix_fmt, dst_colorspace="ITU709" if bt709 else "ITU601"
            )
            frame.pts, frame.time_base = index, Fraction(1, 10)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def pixels(frame) -> np.ndarray:
    return frame["image"].permute(1, 2, 0).numpy()


def background_threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("frames")]


# --- natural order -------------------------------------------------------------------------------


def test_natural_order_by_hand():
    names = ["frame10", "frame2", "frame1", "a", "frame02", "2", "10", "frame2b10", "frame2b9", ""]
    expected = ["", "2", "10", "a", "frame1", "frame02", "frame2", "frame2b9", "frame2b10"]
    assert sorted(names, key=natural_key) == [*expected, "frame10"]


@given(st.lists(st.text(max_size=12) | st.from_regex(r"[a-c0-3²٣é]{0,6}", fullmatch=True)))
def test_natural_order_is_total_for_any_names(names):
    ordered = sorted(names, key=natural_key)
    assert sorted(ordered) == sorted(names)
    shuffled = names[:]
    random.Random(0).shuffle(shuffled)
    assert sorted(shuffled, key=natural_key) == ordered


@given(
    st.text(alphabet="abcé_-. ", max_size=5),
    st.lists(st.integers(0, 10**30), unique=True),
    st.text(alphabet="xyz.", max_size=5),
)
def test_natural_order_sorts_numbers_as_numbers(before, numbers, after):
    names = [f"{before}{number}{after}" for number in numbers]
    assert sorted(names, key=natural_key) == [f"{before}{n}{after}" for n in sorted(numbers)]


@given(
    st.text(alphabet="abc", max_size=3),
    st.sampled_from("_- =@"),
    st.lists(st.decimals(0, 10**9, places=3), min_size=2),
    st.sampled_from(["", "_left", "-b"]),
    st.booleans(),
)
def test_decimal_time_stamps_sort_as_numbers(before, separator, times, after, padded):
    start = before + separator if before else ""

    def name(time) -> str:
        return f"{start}{time if padded else time.normalize():f}{after}"

    ordered = sorted({name(time) for time in times}, key=natural_key)
    assert ordered == [name(time) for time in sorted(set(times))]


@pytest.mark.parametrize(
    "ordered",
    [
        ["1.05", "1.1"],
        ["1", "1.05", "1.25", "1.5", "2"],
        ["v1.9", "v1.10"],  # not from a clock
        ["2024.9.1", "2024.10.1"],
        ["x1.9y", "x1.10y"],
        ["1.9.png", "1.10.png"],
        ["1305031102.05", "1305031102.1", "1305031103"],
    ],
)
def test_order_of_dotted_names(ordered):
    for order in itertools.permutations(ordered):
        assert sorted(order, key=natural_key) == ordered


# --- reading images ------------------------------------------------------------------------------


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


# --- the transform -------------------------------------------------------------------------------


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


# --- decoding ahead ------------------------------------------------------------------------------


def test_run_ahead_is_bounded_and_in_order():
    made: list[int] = []

    def items():
        for index in range(20):
            made.append(index)
            yield index

    received = []
    for item in run_ahead(items(), depth=3):
        received.append(item)
        time.sleep(0.005)
        assert len(made) <= item + 1 + 3
    assert received == list(range(20))
    assert not background_threads()


def test_run_ahead_runs_while_the_consumer_is_busy():
    reached = threading.Event()

    def items():
        yield 0
        reached.set()
        yield 1

    ahead = run_ahead(items(), depth=1)
    assert next(ahead) == 0
    assert reached.wait(timeout=10)
    ahead.close()


def test_run_ahead_raises_in_place():
    def items():
        yield 1
        yield 2
        raise KeyError("third")

    received = []
    with pytest.raises(KeyError, match="third"):
        received.extend(iter(run_ahead(items(), depth=8)))
    ahead = run_ahead(items(), depth=8)
    assert [next(ahead), next(ahead)] == [1, 2]
    with pytest.raises(KeyError, match="third"):
        next(ahead)
    assert not background_threads()


@pytest.mark.parametrize("consumed", [0, 1, 3])
def test_no_thread_or_file_outlives_its_consumer(tmp_path, consumed):
    closed = threading.Event()

    def items():
        try:
            yield from range(100)
        finally:
            closed.set()

    ahead = run_ahead(items(), depth=2)
    for _ in range(consumed):
        next(ahead)
    assert len(background_threads()) == (1 if consumed else 0)
    del ahead
    gc.collect()
    assert not background_threads()
    assert closed.is_set() == (consumed > 0)


def test_no_thread_outlives_an_early_stop(tmp_path):
    source = FolderSource(write_folder(tmp_path / "video", 6), KEEP)
    for _ in source:
        break
    assert not background_threads()


# --- folders -------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefetch", [0, 1, 2, 50])
def test_folder_frames(tmp_path, prefetch):
    folder = write_folder(tmp_path / "street", 12)
    (folder / "notes.txt").write_text("not a frame")
    (folder / "._frame3.png").write_bytes(b"hidden")
    source = FolderSource(folder, KEEP, prefetch=prefetch)
    assert isinstance(source, FrameSource)
    assert (source.video_id, source.num_frames) == ("street", 12)
    for _ in range(2):  # re-iterable
        frames = list(source)
        assert [frame["frame_index"] for frame in frames] == list(range(12))
        for index, frame in enumerate(frames):
            assert frame["file_name"] == str(folder / f"frame{index}.png")
            assert (frame["height"], frame["width"], frame["video_id"]) == (24, 40, "street")
            np.testing.assert_array_equal(pixels(frame), picture(index))


def test_every_suffix_is_a_frame_in_any_case(tmp_path):
    suffixes = [
        "png",
        "JPG",
        "jpeg",
        "jpe",
        "jfif",
        "BMP",
        "dib",
        "webp",
        "PPM",
        "pgm",
        "pbm",
        "pnm",
        "tga",
        "jp2",
        "avif",
        "tif",
        "TIFF",
    ]
    for index, suffix in enumerate(suffixes):
        mode = {"pgm": "L", "pbm": "1"}.get(suffix, "RGB")
        Image.fromarray(picture(index)).convert(mode).save(tmp_path / f"{index}.{suffix}")
    names = [frame["file_name"] for frame in FolderSource(tmp_path, KEEP)]
    assert [name.rsplit(".", 1)[1] for name in names] == suffixes


def test_files_that_are_no_frames_are_told(tmp_path, caplog):
    write_folder(tmp_path, 3)
    for name in ("frame1.heic", "notes.txt", ".hidden.heic"):
        (tmp_path / name).write_bytes(b"")
    with caplog.at_level(logging.WARNING):
        assert FolderSource(tmp_path, KEEP).num_frames == 3
    (message,) = caplog.messages
    assert "2 files are not read as frames, such as frame1.heic; frames end in .avif " in message


def test_a_link_to_nothing_is_a_frame_that_cannot_be_read(tmp_path):
    folder = write_folder(tmp_path / "video", 4)
    (folder / "frame2.png").unlink()
    (folder / "frame2.png").symlink_to(tmp_path / "gone.png")
    with pytest.raises(BadFrame, match=r"frame2\.png cannot be read .*--on-bad-frame skip"):
        list(FolderSource(folder, KEEP))
    source = FolderSource(folder, KEEP, on_bad_frame="skip")
    assert [frame["frame_index"] for frame in source] == [0, 1, 3]
    assert source.skipped == [str(folder / "frame2.png")]


def test_a_link_to_a_folder_that_is_gone_is_an_error(tmp_path):
    write_folder(tmp_path / "all" / "a", 1)
    (tmp_path / "all" / "b").symlink_to(tmp_path / "gone")
    with pytest.raises(UserError, match=r"all/b is a link to nothing \(.*gone\)"):
        open_folder(tmp_path / "all", KEEP)


def test_folders_named_by_a_clock_are_in_order(tmp_path):
    for name in ("1.1", "1.05", "10.5", "2.5"):
        write_folder(tmp_path / name, 1)
    names = [source.video_id for source in open_folder(tmp_path, KEEP)]
    assert names == ["1.05", "1.1", "2.5", "10.5"]


def test_names_that_are_no_utf_8_and_names_with_colons(tmp_path):
    for name in (b"caf\xe9", b"a:b"):
        folder = Path(os.fsdecode(os.path.join(os.fsencode(tmp_path), name)))
        folder.mkdir()
        file = os.fsdecode(name) + ".png"
        Image.fromarray(picture(3)).save(folder / file)
        (frame,) = FolderSource(folder, KEEP)
        text = name.decode("utf-8", "backslashreplace")
        assert frame["video_id"] == text
        assert frame["file_name"] == f"{tmp_path}/{text}/{text}.png"
        np.testing.assert_array_equal(pixels(frame), picture(3))


def test_frames_are_resized_once_and_keep_their_original_size(tmp_path):
    write_folder(tmp_path, 1)
    (frame,) = FolderSource(tmp_path, FrameTransform(min_size=12))
    assert frame["image"].shape == (3, 12, 20)
    assert (frame["height"], frame["width"]) == (24, 40)


def test_a_bad_frame_stops_at_its_place(tmp_path):
    write_folder(tmp_path, 5)
    (tmp_path / "frame2.png").write_bytes(b"no image")
    frames = iter(FolderSource(tmp_path, KEEP, prefetch=4))
    assert [next(frames)["frame_index"], next(frames)["frame_index"]] == [0, 1]
    with pytest.raises(BadFrame, match=r"frame2\.png cannot be read .*--on-bad-frame skip"):
        next(frames)
    assert not background_threads()


def test_bad_frames_are_skipped_counted_and_named(tmp_path, caplog):
    write_folder(tmp_path, 5)
    for index in (0, 3):
        (tmp_path / f"frame{index}.png").write_bytes(b"no image")
    source = FolderSource(tmp_path, KEEP, on_bad_frame="skip")
    for _ in range(2):  # the list is of one iteration
        with caplog.at_level(logging.WARNING):
            frames = list(source)
        assert [frame["frame_index"] for frame in frames] == [1, 2, 4]
        assert source.skipped == [str(tmp_path / f"frame{index}.png") for index in (0, 3)]
    assert "frame3.png" in caplog.messages[1]
    assert "2 so far" in caplog.messages[1]


@pytest.mark.parametrize("prefetch", [0, 4])
def test_only_frames_that_were_passed_count_as_skipped(tmp_path, prefetch):
    write_folder(tmp_path, 6)
    bad = [tmp_path / f"frame{index}.png" for index in (1, 3, 5)]
    for file in bad:
        file.write_bytes(b"no image")
    source = FolderSource(tmp_path, KEEP, on_bad_frame="skip", prefetch=prefetch)
    frames = iter(source)
    seen = []
    for _ in range(3):
        next(frames)
        seen.append(list(source.skipped))
    assert seen == [[], [str(bad[0])], [str(bad[0]), str(bad[1])]]
    assert list(frames) == []
    assert source.skipped == [str(file) for file in bad]
    assert [f["frame_index"] for f in source.frames_after(2)] == [4]
    assert source.skipped == [str(file) for file in bad[1:]]
    assert list(source.frames_after(4)) == []  # nothing readable is left, which is no error


def test_sources_that_cannot_start_in_the_middle_are_run_and_dropped(make_video):
    class Plain(list, BaseSource):
        video_id = "a"

    video = Plain(make_video(num_frames=4))
    video.reverse()  # "after" means the order of the source
    assert [f["frame_index"] for f in video.frames_after(2)] == [1, 0]
    assert list(video.frames_after(0)) == []
    with pytest.raises(UserError, match="video a has no frame 7 any more"):
        video.frames_after(7)


def test_a_video_of_bad_frames_is_an_error(tmp_path):
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(UserError, match="no readable frame: all 1 were skipped"):
        list(FolderSource(tmp_path, KEEP, on_bad_frame="skip"))


@pytest.mark.parametrize("on_bad_frame", ["stop", "skip"])
def test_changing_sizes_are_an_error(tmp_path, on_bad_frame):
    write_folder(tmp_path, 3)
    Image.fromarray(picture(0, 24, 41)).save(tmp_path / "frame1.png")
    with pytest.raises(UserError, match=r"frame1\.png is 24x41 .* began with 24x40 .*frame0\.png"):
        list(FolderSource(tmp_path, KEEP, on_bad_frame=on_bad_frame))


def test_unknown_bad_frame_policy(tmp_path):
    write_folder(tmp_path, 1)
    with pytest.raises(UserError, match='"stop" or "skip", not "ignore"'):
        FolderSource(tmp_path, KEEP, on_bad_frame="ignore")


@pytest.mark.parametrize("label", ["frame{}.jpg", "frame{}_sem.png"])
def test_label_maps_are_never_streamed_as_frames(tmp_path, label):
    for video in ("a", "b"):
        write_folder(tmp_path / video, 3)
    mixed = tmp_path / "b" / label.format(2)
    Image.fromarray(picture(0)).save(mixed)
    frame = f"{tmp_path}/b/frame2.png"
    for folder in (tmp_path, tmp_path / "b"):
        with pytest.raises(UserError, match="labels must not be streamed as frames") as error:
            open_folder(folder, KEEP)
        assert all(name in str(error.value) for name in ("frame2.png", mixed.name))
        assert "register_custom_video" in str(error.value)
    records = [
        {"file_name": name, "video_id": "b", "frame_index": index, "sem_seg_file_name": str(mixed)}
        for index, name in enumerate([frame, str(mixed)])
    ]
    DatasetCatalog.register("labels_as_frames", lambda: records)
    try:
        with pytest.raises(UserError, match=f"{mixed} as a frame and as a label map"):
            open_dataset("labels_as_frames", KEEP)
    finally:
        DatasetCatalog.pop("labels_as_frames")


def test_open_folder_of_frames_and_of_folders(tmp_path):
    for name in ("video10", "video2"):
        write_folder(tmp_path / "all" / name, 2)
    (tmp_path / "all" / "readme.txt").write_text("")
    (tmp_path / "all" / ".cache").mkdir()
    (one,) = open_folder(tmp_path / "all" / "video2", KEEP)
    assert one.video_id == "video2"
    sources = open_folder(tmp_path / "all", KEEP)
    assert [source.video_id for source in sources] == ["video2", "video10"]
    assert [len(list(source)) for source in sources] == [2, 2]


def test_folder_is_named_as_the_caller_names_it(tmp_path, monkeypatch):
    write_folder(tmp_path / "run.1", 1)
    (tmp_path / "latest").symlink_to(tmp_path / "run.1")
    assert open_folder(tmp_path / "latest", KEEP)[0].video_id == "latest"
    monkeypatch.chdir(tmp_path / "run.1")
    assert open_folder(".", KEEP)[0].video_id == "run.1"


def test_wrong_folders(tmp_path):
    with pytest.raises(UserError, match=r"no such folder: .*nowhere"):
        open_folder(tmp_path / "nowhere", KEEP)
    file = tmp_path / "clip.mp4"
    file.write_bytes(b"")
    with pytest.raises(UserError, match=r"clip\.mp4 is a file.*--video "):
        open_folder(file, KEEP)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty holds no frames: expected .* \.png"):
        open_folder(tmp_path / "empty", KEEP)
    write_folder(tmp_path / "deep" / "a" / "b", 1)
    with pytest.raises(UserError, match=r"deep/a holds no frames but folders \(b\): give .*deep/a"):
        open_folder(tmp_path / "deep", KEEP)
    write_folder(tmp_path / "mixed" / "video", 1)
    write_folder(tmp_path / "mixed", 1)
    with pytest.raises(UserError, match=r"frames and also folders of frames \(video\)"):
        open_folder(tmp_path / "mixed", KEEP)


# --- registered data sets ------------------------------------------------------------------------


@pytest.fixture
def register():
    names = []

    def add(name, function):
        DatasetCatalog.register(name, function)
        names.append(name)

    yield add
    for name in names:
        DatasetCatalog.remove(name)


def video_records(folder, video_id, count, **keys):
    write_folder(folder, count)
    return [
        {
            "file_name": str(folder / f"frame{index}.png"),
            "video_id": video_id,
            "frame_index": index,
            "height": 24,
            "width": 40,
            "image_id": f"{video_id}_{index}",
            **keys,
        }
        for index in range(count)
    ]


def test_dataset_videos_in_time_order_with_their_labels(tmp_path, register):
    one = video_records(tmp_path / "one", "one", 3, sem_seg_file_name="one.png")
    two = video_records(tmp_path / "two", 2, 2, annotations=[{"category_id": 1}])
    register("sources_test_videos", lambda: [two[1], one[2], one[0], two[0], one[1]])
    first, second = open_dataset("sources_test_videos", KEEP)
    assert [source.video_id for source in (first, second)] == ["2", "one"]
    assert [source.num_frames for source in (first, second)] == [2, 3]
    frames = list(second)
    assert [frame["frame_index"] for frame in frames] == [0, 1, 2]
    for frame, record in zip(frames, one, strict=True):
        assert {key: frame[key] for key in record} == record
        assert set(frame) == {*record, "image", "picture"}
    assert next(iter(first))["annotations"] == [{"category_id": 1}]
    assert next(iter(first))["video_id"] == "2"


def test_unknown_data_set_names_close_ones(register):
    register("kitti_step_like_val", lambda: [])
    with pytest.raises(UserError, match=r"unknown data set .*_vla.*kitti_step_like_val"):
        open_dataset("kitti_step_like_vla", KEEP)


def test_data_sets_that_are_no_videos(tmp_path, register):
    (record,) = video_records(tmp_path, "v", 1)
    register("sources_test_images", lambda: [{"file_name": "a.png", "image_id": 3}])
    with pytest.raises(UserError, match=r"not made of videos: .* no video_id \(a\.png\)"):
        open_dataset("sources_test_images", KEEP)
    register("sources_test_empty", lambda: [])
    with pytest.raises(UserError, match="sources_test_empty is empty"):
        open_dataset("sources_test_empty", KEEP)
    register("sources_test_missing", lambda: (tmp_path / "labels.json").read_text())
    with pytest.raises(UserError, match=r"labels\.json.*DETECTRON2_DATASETS"):
        open_dataset("sources_test_missing", KEEP)
    register("sources_test_twice", lambda: [record, record])
    with pytest.raises(UserError, match="more than one frame with index 0"):
        open_dataset("sources_test_twice", KEEP)


def test_dataset_of_a_wrong_size(tmp_path):
    (record,) = video_records(tmp_path, "v", 1)
    with pytest.raises(UserError, match=r"is 24x40 .* says 40x24"):
        list(DatasetSource([{**record, "height": 40, "width": 24}], KEEP))


@pytest.mark.parametrize("index", [-1, 1.5, "0", None])
def test_indices_that_are_none_are_refused(tmp_path, index):
    records = [{**r} for r in video_records(tmp_path, "v", 3)]
    records[1]["frame_index"] = index
    with pytest.raises(UserError, match=rf"video v has a frame with frame_index {index!r}: give"):
        DatasetSource(records, KEEP)


def test_a_source_is_one_video(tmp_path):
    records = video_records(tmp_path, "a", 1) + video_records(tmp_path, "b", 1)
    with pytest.raises(UserError, match="name 2"):
        DatasetSource(records, KEEP)


# --- video files ---------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "avi"])
def test_video_frames(tmp_path, suffix):
    path = write_video(tmp_path / f"clip.{suffix}", 30)
    (source,) = open_video(path, KEEP)
    assert isinstance(source, FrameSource)
    assert (source.video_id, source.num_frames, source.fps) == ("clip", 30, 10.0)
    for _ in range(2):
        frames = list(source)
        assert [frame["frame_index"] for frame in frames] == list(range(30))
        assert frames[7]["file_name"] == f"{path}#7"
        assert (frames[0]["height"], frames[0]["width"]) == (48, 64)
        for index, frame in enumerate(frames):
            expected = picture(index, 48, 64).astype(int)
            assert np.abs(pixels(frame) - expected).mean() < 4  # lossy, but the right frame


def test_video_pixels_agree_with_opencv(tmp_path):
    cv2 = pytest.importorskip("cv2")
    path = write_video(tmp_path / "clip.mp4", 5)
    capture = cv2.VideoCapture(str(path))
    for frame in VideoFileSource(path, KEEP):
        bgr = capture.read()[1]
        assert np.abs(pixels(frame) - bgr[:, :, ::-1].astype(int)).max() <= 3
    assert not capture.read()[0]


def test_video_colour_matrix_is_honoured(tmp_path):
    path = write_video(tmp_path / "hd.mp4", 1, bt709=True)
    (frame,) = VideoFileSource(path, KEEP)
    # BT.601 instead of BT.709 would shift saturated colours by some twenty levels.
    assert np.abs(pixels(frame) - picture(0, 48, 64).astype(int)).mean() < 4


@pytest.mark.parametrize(
    ("cos", "sin", "upright"),
    [
        (1, 0, lambda image: image),
        # The point (p, q), q downwards, goes to (-q, p): right becomes down, a turn clockwise.
        (0, 1, lambda image: image.transpose(1, 0, 2)[:, ::-1]),
        (-1, 0, lambda image: image[::-1, ::-1]),
        # It goes to (q, -p): right becomes up.
        (0, -1, lambda image: image.transpose(1, 0, 2)[::-1]),
    ],
)
def test_phone_videos_are_turned_upright(tmp_path, cos, sin, upright):
    path = write_video(tmp_path / "phone.mp4", 2)
    before = pixels(next(iter(VideoFileSource(path, KEEP))))
    # The 3x3 matrix of the track header (ISO/IEC 14496-12): 16.16 fixed point, last column 2.30,
    # maps (p, q, 1) as a row vector.
    one, content = 1 << 16, bytearray(path.read_bytes())
    place = content.index(b"tkhd") + 4 + 40
    assert content[place : place + 36] == struct.pack(">9i", one, 0, 0, 0, one, 0, 0, 0, 1 << 30)
    matrix = (cos * one, sin * one, 0, -sin * one, cos * one, 0, 0, 0, 1 << 30)
    content[place : place + 36] = struct.pack(">9i", *matrix)
    path.write_bytes(content)
    frame = next(iter(VideoFileSource(path, KEEP)))
    np.testing.assert_array_equal(pixels(frame), upright(before))
    assert (frame["height"], frame["width"]) == upright(before).shape[:2]


def test_wrong_video_files(tmp_path):
    with pytest.raises(UserError, match=r"no such video file: .*none\.mp4"):
        VideoFileSource(tmp_path / "none.mp4", KEEP)
    with pytest.raises(UserError, match=r"is a folder.*--video-dir"):
        VideoFileSource(tmp_path, KEEP)
    for name, content in [("junk.mp4", b"1234" * 500), ("empty.mp4", b"")]:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=f"{name} is not a video"):
            VideoFileSource(tmp_path / name, KEEP)
    (tmp_path / "notes.txt").write_text("FFmpeg would draw this text as a video\n" * 50)
    with pytest.raises(UserError, match=r"notes\.txt has no video in it"):
        VideoFileSource(tmp_path / "notes.txt", KEEP)
    with av.open(str(tmp_path / "sound.wav"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.int16), "s16", "mono")
        silence.sample_rate = 8000
        container.mux(stream.encode(silence))
    with pytest.raises(UserError, match=r"sound\.wav has no video in it"):
        VideoFileSource(tmp_path / "sound.wav", KEEP)


def test_a_cut_off_video_gives_what_it_has_and_says_so(tmp_path, caplog):
    path = write_video(tmp_path / "clip.avi", 60, codec="mpeg4")
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * 0.5)])
    frames = list(VideoFileSource(path, KEEP, on_bad_frame="skip"))
    assert 10 < len(frames) < 60
    assert "it may be cut off" in caplog.text


def test_a_video_without_frames(tmp_path):
    whole = write_video(tmp_path / "whole.mp4", 1)
    with av.open(str(whole)) as source, av.open(str(tmp_path / "none.mp4"), "w") as target:
        target.add_stream_from_template(source.streams.video[0])
        target.start_encoding()
    with pytest.raises(UserError, match=r"none\.mp4 has no video in it"):
        VideoFileSource(tmp_path / "none.mp4", KEEP)


class _Packets:
    """A container whose packet number 3 does not decode."""

    def __init__(self, container):
        self._container = container

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._container.close()

    def demux(self, stream):
        for number, packet in enumerate(self._container.demux(stream)):
            yield _Broken() if number == 3 else packet


class _Broken:
    def decode(self):
        raise av.error.InvalidDataError(1, "Invalid data found when processing input")


def test_packets_that_do_not_decode(tmp_path, monkeypatch):
    path = write_video(tmp_path / "clip.avi", 8, codec="mjpeg")  # every frame stands alone
    source = VideoFileSource(path, KEEP)
    whole = VideoFileSource._open

    def open_damaged(self):
        container, stream = whole(self)
        return _Packets(container), stream

    monkeypatch.setattr(VideoFileSource, "_open", open_damaged)
    frames = iter(source)
    assert [next(frames)["frame_index"] for _ in range(3)] == [0, 1, 2]
    with pytest.raises(BadFrame, match=r"clip\.avi is damaged at about frame 3 .*on-bad-frame"):
        next(frames)
    source.on_bad_frame = "skip"
    assert [frame["frame_index"] for frame in source] == [0, 1, 2, 4, 5, 6, 7]
    assert source.skipped == [f"{path}#3"]
