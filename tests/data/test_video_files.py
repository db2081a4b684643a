"""Video files as phones, editors, cameras and pipes give them: which stream, which way up, when."""

from __future__ import annotations

import gc
import io
import logging
import os
import pickle
import signal
import struct
import threading
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import ExifTags, Image, ImageOps

from ttt_video.data import pipe
from ttt_video.data.sources import FrameTransform, VideoFileSource
from ttt_video.errors import UserError
from ttt_video.formats.images import read_rgb

KEEP = FrameTransform(min_size=0)
TITLE = "TITLE-OF-IT"


def picture(index: int) -> np.ndarray:
    """(32, 48, 3) uint8: unlike any of its mirror images."""
    image = np.zeros((32, 48, 3), np.uint8)
    image[:16, :24, 0] = 240
    image[16:, 24:, 1] = 120
    image[:, :, 2] = 20 * index % 256
    return image


def write_video(path, count: int = 4, **options) -> Path:
    with av.open(str(path), "w", **options) as container:
        container.metadata["title"] = TITLE
        stream = container.add_stream("mpeg4", rate=10, options={"qscale": "2", "g": "1"})
        stream.height, stream.width, stream.pix_fmt = 32, 48, "yuv420p"
        for index in range(count):
            frame = av.VideoFrame.from_ndarray(picture(index), format="rgb24")
            frame.pts, frame.time_base = index, Fraction(1, 10)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return Path(path)


def pixels(frame) -> np.ndarray:
    return frame["image"].permute(1, 2, 0).numpy()


def is_the_film(source: VideoFileSource, count: int = 4) -> bool:
    frames = list(source)
    errors = [
        np.abs(pixels(frame) - picture(i).astype(int)).mean() for i, frame in enumerate(frames)
    ]
    return len(frames) == count and max(errors) < 12


# --- which way up --------------------------------------------------------------------------------

# How EXIF's eight orientations move a pixel (p, q), q downwards: (a p + c q, b p + d q).
MATRICES = {
    1: (1, 0, 0, 1),
    2: (-1, 0, 0, 1),
    3: (-1, 0, 0, -1),
    4: (1, 0, 0, -1),
    5: (0, 1, 1, 0),
    6: (0, 1, -1, 0),
    7: (0, -1, -1, 0),
    8: (0, -1, 1, 0),
}


@pytest.mark.parametrize("orientation", MATRICES)
def test_all_orientations_are_shown_as_pillow_shows_those_of_pictures(tmp_path, orientation):
    path = write_video(tmp_path / "phone.mp4", 1)
    (stored,) = VideoFileSource(path, KEEP)
    content, one = bytearray(path.read_bytes()), 1 << 16
    place = content.index(b"tkhd") + 44  # ISO/IEC 14496-12: 16.16 fixed point, last column 2.30
    a, b, c, d = (n * one for n in MATRICES[orientation])
    content[place : place + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(content)
    image = Image.fromarray(pixels(stored))
    image.getexif()[274] = orientation
    expected = np.asarray(ImageOps.exif_transpose(image))
    (frame,) = VideoFileSource(path, KEEP)
    np.testing.assert_array_equal(pixels(frame), expected)
    assert (frame["height"], frame["width"]) == expected.shape[:2]


# --- which stream --------------------------------------------------------------------------------


def cover() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(file, "JPEG")
    return file.getvalue()


def add_film(container):
    stream = container.add_stream("mpeg4", rate=10, options={"qscale": "2"})
    stream.height, stream.width, stream.pix_fmt = 32, 48, "yuv420p"
    frames = []
    for index in range(4):
        frame = av.VideoFrame.from_ndarray(picture(index), format="rgb24")
        frame.pts, frame.time_base = index, Fraction(1, 10)
        frames.append(frame)
    return stream, frames


def add_sound(container):
    stream = container.add_stream("aac", rate=8000)
    sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
    sound.sample_rate = 8000
    return stream, [sound]


def write_with_cover(path: Path, add) -> Path:
    """An MP4 or MKV of what ``add`` adds, with an attached picture."""
    with av.open(str(path), "w") as container:
        stream, frames = add(container)
        if path.suffix == ".mkv":
            container.add_attachment("cover.jpg", "image/jpeg", cover())
        else:
            attached = container.add_stream("mjpeg")
            attached.height = attached.width = 64
            attached.pix_fmt = "yuvj420p"
            attached.disposition = av.stream.Disposition.attached_pic
        for frame in frames:
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
        if path.suffix != ".mkv":
            packet = av.Packet(cover())
            packet.stream, packet.pts, packet.dts = attached, 0, 0
            packet.time_base = Fraction(1, 1000)
            container.mux(packet)
    return path


def move_tags_to_the_front(path: Path) -> None:
    """Puts an MP4's tags, the cover among them, before its tracks: the cover is stream 0 then."""
    content = path.read_bytes()
    start = content.index(b"moov") - 4
    (length,) = struct.unpack(">I", content[start : start + 4])
    movie = content[start : start + length]
    boxes, place = [], 8
    while place < length:
        (size,) = struct.unpack(">I", movie[place : place + 4])
        boxes.append(movie[place : place + size])
        place += size
    boxes.sort(key=lambda box: [b"mvhd", b"udta", b"trak"].index(box[4:8]))
    path.write_bytes(content[:start] + movie[:8] + b"".join(boxes) + content[start + length :])


@pytest.mark.parametrize("name", ["first.mp4", "last.mp4", "film.mkv"])
def test_a_cover_is_not_the_film(tmp_path, name):
    path = write_with_cover(tmp_path / name, add_film)
    if name == "first.mp4":
        move_tags_to_the_front(path)
    with av.open(str(path)) as container:
        attached = [
            bool(stream.disposition & av.stream.Disposition.attached_pic)
            for stream in container.streams.video
        ]
    assert attached == ([True, False] if name == "first.mp4" else [False, True])
    source = VideoFileSource(path, KEEP)
    assert (source.num_frames, source.fps) == (4, 10.0)
    assert is_the_film(source)


@pytest.mark.parametrize("name", ["song.mp4", "song.mkv"])
def test_a_song_with_a_cover_has_no_video(tmp_path, name):
    path = write_with_cover(tmp_path / name, add_sound)
    with av.open(str(path)) as container:
        assert len(container.streams.video) == 1
    with pytest.raises(UserError, match=rf"{name} has no video in it"):
        VideoFileSource(path, KEEP)


@pytest.mark.parametrize("default", [0, 1])
def test_of_several_videos_the_default_is_read_and_named(tmp_path, default, caplog):
    path = tmp_path / "two.mkv"
    with av.open(str(path), "w") as container:
        both = [add_film(container) for _ in range(2)]
        for number, (stream, _) in enumerate(both):
            stream.disposition = av.stream.Disposition.default if number == default else 0
        for number, (stream, frames) in enumerate(both):
            for frame in frames if number == default else frames[:1]:
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
    with caplog.at_level(logging.WARNING):
        source = VideoFileSource(path, KEEP)
    assert f"two.mkv holds 2 videos: stream {default} is read alone" in caplog.text
    assert source.num_frames == 4
    assert is_the_film(source)


def test_a_format_that_cannot_be_decoded_is_named(tmp_path):
    path = write_video(tmp_path / "new.mp4")
    content = path.read_bytes()
    assert content.count(b"mp4v") == 1
    path.write_bytes(content.replace(b"mp4v", b"zzzz").replace(b"esds", b"free"))
    with pytest.raises(UserError, match=r"the video in .*new\.mp4 is in a format that this FFmpeg"):
        VideoFileSource(path, KEEP)


# --- names and tags ------------------------------------------------------------------------------


@pytest.mark.slow
def test_pictures_that_were_read_do_not_stay(tmp_path):
    """Not until Python looks for circles either: those of a large video would fill the memory."""
    source = VideoFileSource(write_video(tmp_path / "a.mp4", 12), FrameTransform(min_size=0))
    gc.collect()
    gc.disable()
    try:
        for _ in source:
            pictures = [thing for thing in gc.get_objects() if type(thing) is av.VideoFrame]
            assert len(pictures) < 6
            del pictures
    finally:
        gc.enable()


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "avi"])
def test_a_title_that_is_not_utf_8_does_not_matter(tmp_path, suffix):
    path = write_video(tmp_path / f"clip.{suffix}")
    content = path.read_bytes()
    assert content.count(TITLE.encode()) == 1
    path.write_bytes(content.replace(TITLE.encode(), b"caf\xe9 \xff\xfe 123"[: len(TITLE)]))
    assert is_the_film(VideoFileSource(path, KEEP))


@pytest.mark.parametrize("name", [b"a:b.mp4", b"http:x.mp4", b"caf\xe9.mp4", b"50%d.mp4"])
def test_any_file_name_is_read(tmp_path, name, monkeypatch):
    path = os.path.join(os.fsencode(tmp_path), name)
    Path(os.fsdecode(path)).write_bytes(write_video(tmp_path / "plain.mp4").read_bytes())
    monkeypatch.chdir(tmp_path)
    for given in (path, os.fsdecode(path), os.fsdecode(name)):
        source = VideoFileSource(given, KEEP)
        assert is_the_film(source)
        frame = next(iter(source))
        assert source.video_id == name[:-4].decode("utf-8", "backslashreplace")
        text = f"{source.video_id}.mp4#0".encode()
        assert frame["file_name"].encode().endswith(text)


# --- pipes --------------------------------------------------------------------------


@pytest.fixture
def fifo(tmp_path):
    path = tmp_path / "live"
    os.mkfifo(path)
    return path


def write_into(fifo: Path, content: bytes, hold: threading.Event | None = None) -> threading.Thread:
    """Writes in a thread; keeps the pipe open until ``hold`` is set."""

    def write() -> None:
        with open(fifo, "wb") as file:
            file.write(content)
            file.flush()
            if hold is not None:
                hold.wait(timeout=60)

    thread = threading.Thread(target=write, daemon=True)
    thread.start()
    return thread


def test_a_pipe_is_read_once(tmp_path, fifo):
    thread = write_into(fifo, write_video(tmp_path / "clip.mkv", 30).read_bytes())
    source = VideoFileSource(fifo, KEEP)
    assert (source.video_id, source.num_frames, source.fps) == ("live", None, 10.0)
    with pytest.raises(UserError, match="cannot be handed on: use one worker"):
        pickle.dumps(source)
    assert [frame["frame_index"] for frame in source] == [*range(30)]
    thread.join(timeout=10)
    with pytest.raises(UserError, match="live is a pipe, which can be read only once"):
        next(iter(source))


def test_a_pipe_that_stays_open_holds_nobody_up(tmp_path, fifo, monkeypatch):
    """Neither the count of packets, nor the end after as many frames as are wanted."""
    monkeypatch.setattr(pipe, "_GLANCE", 0.02)
    hold = threading.Event()
    thread = write_into(fifo, write_video(tmp_path / "clip.mkv", 60).read_bytes(), hold)
    frames = iter(VideoFileSource(fifo, KEEP))
    # The thread that decodes ahead waits for what follows, which never comes.
    assert [next(frames)["frame_index"] for _ in range(58)] == [*range(58)]
    frames.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("frames")]
    hold.set()
    thread.join(timeout=10)


def test_waiting_for_a_pipe_is_told(fifo, monkeypatch):
    monkeypatch.setattr(pipe, "PATIENCE", 0.05)
    monkeypatch.setattr(pipe, "_GLANCE", 0.02)
    reader = pipe.Pipe(str(fifo))
    said = threading.Event()
    monkeypatch.setattr(pipe.logger, "warning", lambda *_: said.set())
    got: list[bytes] = []
    thread = threading.Thread(target=lambda: got.append(reader.read(10)))
    thread.start()
    assert said.wait(timeout=10)  # nobody has opened it for writing
    reader.stop()
    thread.join(timeout=10)
    assert got == [b""]


def test_an_interrupt_ends_the_wait_for_a_pipe(tmp_path, fifo, monkeypatch):
    """In FFmpeg's call of our code Python's exceptions are lost."""

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pipe.select, "select", interrupt)
        with pytest.raises(KeyboardInterrupt):
            VideoFileSource(fifo, KEEP)
    hold = threading.Event()
    thread = write_into(fifo, write_video(tmp_path / "clip.mkv", 60).read_bytes(), hold)
    frames = iter(VideoFileSource(fifo, KEEP, prefetch=0))
    next(frames)
    monkeypatch.setattr(pipe.select, "select", interrupt)
    with pytest.raises(KeyboardInterrupt):
        list(frames)
    hold.set()
    thread.join(timeout=10)


def test_an_interrupt_of_the_consumer_ends_the_wait_for_a_pipe(tmp_path, fifo):
    hold = threading.Event()
    thread = write_into(fifo, write_video(tmp_path / "clip.mkv", 60).read_bytes(), hold)
    frames = iter(VideoFileSource(fifo, KEEP))
    assert [next(frames)["frame_index"] for _ in range(58)] == [*range(58)]
    timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        list(frames)
    assert not [t for t in threading.enumerate() if t.name.startswith("frames")]
    hold.set()
    thread.join(timeout=10)


@pytest.mark.parametrize(
    ("path", "flag"), [("rtsp://camera/1", "--source for a URL"), ("0", "--camera for a camera")]
)
def test_what_is_no_file_has_a_flag_of_its_own(path, flag):
    with pytest.raises(UserError, match=f"no such video file: {path}; use {flag}"):
        VideoFileSource(path, KEEP)
    with pytest.raises(UserError, match=r"no such video file: gone:1\.mp4$"):
        VideoFileSource("gone:1.mp4", KEEP)
    with pytest.raises(UserError, match="/dev/null is a device, not a video file: use --camera"):
        VideoFileSource("/dev/null", KEEP)


def test_an_animated_webp_is_named(tmp_path):
    """FFmpeg takes it for damaged; a still one is a video of one frame."""
    path = tmp_path / "a.webp"
    pictures = [Image.fromarray(picture(index)) for index in range(3)]
    pictures[0].save(path, save_all=True, append_images=pictures[1:])
    with pytest.raises(UserError, match=r"a\.webp is an animated WebP, .*: convert it to a GIF"):
        VideoFileSource(path, KEEP)
    pictures[0].save(path, lossless=True)
    (frame,) = VideoFileSource(path, KEEP)
    np.testing.assert_array_equal(pixels(frame), picture(0))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
def test_pictures_with_exif_are_upright_videos(tmp_path, suffix, orientation):
    """Cameras may send EXIF in each frame of MJPEG; PyAV has no name for this side data."""
    path, exif = str(tmp_path / f"p.{suffix}"), Image.Exif()
    exif[ExifTags.Base.Orientation], exif[ExifTags.Base.Make] = orientation, "a camera"
    exact = {"quality": 95, "subsampling": 0} if suffix == "jpg" else {"lossless": True}
    Image.fromarray(picture(0)).save(path, exif=exif, **exact)
    (frame,) = VideoFileSource(path, KEEP)
    expected = read_rgb(path)
    assert pixels(frame).shape == expected.shape
    assert np.abs(pixels(frame).astype(int) - expected).max() <= (8 if suffix == "jpg" else 0)
