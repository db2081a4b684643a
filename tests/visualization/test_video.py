"""Written videos, read back with PyAV and by their bytes."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import threading
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch

from ttt_video.errors import UserError
from ttt_video.visualization import video as video_module
from ttt_video.visualization.overlay import BACKGROUND
from ttt_video.visualization.video import VideoWriter, join_videos

COLORS = [(200, 30, 60), (30, 180, 40), (20, 60, 220), (250, 250, 250), (0, 0, 0)]


def flat(index: int, height: int = 48, width: int = 64) -> np.ndarray:
    return np.full((height, width, 3), COLORS[index % len(COLORS)], np.uint8)


def read(path):
    """What the stream says of itself (asked while the file is open), its frames and pictures."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        frames = list(container.decode(stream))
        context = stream.codec_context
        said = SimpleNamespace(
            codec=context.name,
            pix_fmt=context.pix_fmt,
            size=(stream.width, stream.height),
            num_frames=stream.frames,
            fps=float(stream.average_rate),
            colors=(context.colorspace, context.color_range),
        )
    return said, frames, [frame.to_ndarray(format="rgb24").astype(int) for frame in frames]


def boxes(path) -> list[bytes]:
    """The types of the file's top-level MP4 boxes."""
    content, place, found = path.read_bytes(), 0, []
    while place < len(content):
        found.append(content[place + 4 : place + 8])
        place += int.from_bytes(content[place : place + 4], "big") or len(content)
    return found


def encoder_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("video")]


@pytest.mark.parametrize("fps", [10, 29.97, 0.5])
def test_video_reads_back(tmp_path, fps):
    path = tmp_path / "overlay.mp4"
    with VideoWriter(path, fps) as video:
        for index in range(50):
            video.write(flat(index))
    assert video.num_frames == 50
    stream, frames, images = read(path)
    assert (stream.codec, stream.pix_fmt) == ("h264", "yuv420p")
    assert (stream.size, stream.num_frames) == ((64, 48), 50)
    assert stream.fps == pytest.approx(fps, rel=1e-3)
    assert [frame.pts * float(frame.time_base) for frame in frames] == pytest.approx(
        [index / fps for index in range(50)], abs=1e-3
    )
    for index, image in enumerate(images):
        assert np.abs(image - flat(index)).max() <= 6
    assert not encoder_threads()
    assert list(tmp_path.iterdir()) == [path]


def test_no_bit_rate_is_noted_that_depends_on_the_moment(tmp_path):
    with VideoWriter(tmp_path / "v.mp4", fps=10) as video:
        video.write(flat(0))
    content = (tmp_path / "v.mp4").read_bytes()
    assert b"avcC" in content
    assert b"btrt" not in content


def test_bytes_do_not_depend_on_the_number_of_cores(tmp_path):
    """By itself x264 takes as many threads as there are cores, and its bytes depend on them."""
    noise = np.random.default_rng(0).integers(0, 256, (480, 640, 3), dtype=np.uint8)
    allowed = os.sched_getaffinity(0)
    files = [tmp_path / "one.mp4", tmp_path / "all.mp4"]
    try:
        for path, cores in zip(files, ({min(allowed)}, allowed), strict=True):
            os.sched_setaffinity(0, cores)
            with VideoWriter(path, fps=10) as video:
                for index in range(12):
                    video.write(np.roll(noise, 7 * index, axis=1))
    finally:
        os.sched_setaffinity(0, allowed)
    assert files[0].read_bytes() == files[1].read_bytes()


def test_one_thread_encodes_a_picture_as_a_whole(tmp_path):
    """So no race can decide its bytes; x264 writes its settings into the first picture."""
    path = tmp_path / "video.mp4"
    with VideoWriter(path, 10) as video:
        video.write(flat(0, 480, 640))  # of small pictures x264 makes no slices anyway
    settings = path.read_bytes().split(b"x264 - core", 1)[1].split(b"\0", 1)[0].split()
    assert b"threads=1" in settings
    assert b"sliced_threads=0" in settings


@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() != "AVX512", reason="the CPU has no AVX-512"
)
def test_x264_runs_without_avx512(tmp_path):
    """That code depends on what memory held before, so that files differ; see video.py."""
    level = av.logging.get_level()
    av.logging.set_level(av.logging.VERBOSE)
    try:
        with av.logging.Capture(local=False) as said, VideoWriter(tmp_path / "a.mp4", 10) as video:
            video.write(flat(0))
    finally:
        av.logging.set_level(level)
    (used,) = [text for _, _, text in said if "using cpu capabilities" in text]
    assert "AVX2" in used
    assert "AVX512" not in used


@pytest.mark.parametrize(
    ("capability", "named"),
    [("AVX512", "AVX2"), ("AVX2", "AVX2"), ("DEFAULT", "auto"), ("NEON", "auto")],
)
def test_no_instructions_beyond_avx2_and_none_that_the_cpu_lacks(capability, named, monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert video_module._instructions().split(",")[-1] == named


def test_finished_file_has_its_index_in_front_and_names_its_colours(tmp_path):
    path = tmp_path / "overlay.mp4"
    with VideoWriter(path, 10) as video:
        video.write(flat(0))
    found = boxes(path)
    assert found.index(b"moov") < found.index(b"mdat")
    assert b"moof" not in found
    assert read(path)[0].colors == (1, 1)  # BT.709, limited range


def test_odd_sides_repeat_the_last_line(tmp_path):
    with VideoWriter(tmp_path / "odd.mp4", 10) as video:
        video.write(flat(0, 47, 63))
    (image,) = read(tmp_path / "odd.mp4")[2]
    assert image.shape == (48, 64, 3)
    assert np.abs(image - flat(0)).max() <= 6


def test_other_sizes_are_fitted_and_framed(tmp_path):
    with VideoWriter(tmp_path / "mixed.mp4", 10, crf=10) as video:
        video.write(flat(0, 48, 64))
        video.write(flat(1, 48, 32))
        video.write(flat(2, 200, 400))
        video.write(flat(3, 47, 64))
    images = read(tmp_path / "mixed.mp4")[2]
    assert [image.shape for image in images] == [(48, 64, 3)] * 4
    assert np.abs(images[1][:, 18:46] - COLORS[1]).max() <= 12
    assert np.abs(images[1][:, :14] - BACKGROUND).max() <= 12
    assert np.abs(images[2][10:38] - COLORS[2]).max() <= 12
    assert np.abs(images[2][:6] - BACKGROUND).max() <= 12
    assert np.abs(images[3] - COLORS[3]).max() <= 12


def test_long_sides_are_limited(tmp_path):
    with VideoWriter(tmp_path / "wide.mp4", 10, max_side=100) as video:
        video.write(flat(0, 60, 300))
    assert read(tmp_path / "wide.mp4")[2][0].shape == (20, 100, 3)


def test_the_caller_may_reuse_its_array(tmp_path):
    image = flat(0).copy()
    with VideoWriter(tmp_path / "reused.mp4", 10) as video:
        for index in range(8):
            image[:] = COLORS[index % len(COLORS)]
            video.write(image)
    for index, read_back in enumerate(read(tmp_path / "reused.mp4")[2]):
        assert np.abs(read_back - flat(index)).max() <= 6


def test_an_exception_leaves_a_finished_video(tmp_path):
    path = tmp_path / "interrupted.mp4"
    with pytest.raises(KeyboardInterrupt), VideoWriter(path, 10) as video:  # noqa: PT012
        for index in range(7):
            video.write(flat(index))
        raise KeyboardInterrupt
    assert len(read(path)[1]) == 7
    assert b"moof" not in boxes(path)


def test_a_killed_run_leaves_a_playable_video(tmp_path):
    killed = tmp_path / "killed.mp4"
    with VideoWriter(tmp_path / "running.mp4", 5) as video:
        for index in range(200):
            video.write(np.full((48, 64, 3), index, np.uint8))
        video._thread.flush()
        # What the file system holds now is what a kill would leave.
        shutil.copy(video.path, killed)
    images = read(killed)[2]
    # What x264 still looks ahead at, and the fragment that it had not finished, are lost.
    assert 100 <= len(images) < 200
    for index, image in enumerate(images):
        assert np.abs(image - index).max() <= 6


def test_nothing_written_no_file(tmp_path):
    with VideoWriter(tmp_path / "none.mp4", 10):
        pass
    assert not (tmp_path / "none.mp4").exists()
    assert not encoder_threads()


def test_errors_of_the_encoder_surface(tmp_path, monkeypatch):
    def fail(self, image):
        raise OSError("disk full")

    monkeypatch.setattr(VideoWriter, "_encode", fail)
    video = VideoWriter(tmp_path / "full.mp4", 10)
    with pytest.raises(OSError, match="disk full"):  # noqa: PT012
        for _ in range(10):
            video.write(flat(0))
    with pytest.raises(OSError, match="disk full"):
        video.close()
    video.close()
    assert not encoder_threads()


@pytest.mark.parametrize("fps", [0, -1, float("nan"), float("inf")])
def test_impossible_frame_rates(tmp_path, fps):
    with pytest.raises(UserError, match=r"frame rate must be between 0\.0001 and 100000 "):
        VideoWriter(tmp_path / "a.mp4", fps)


@pytest.mark.parametrize("period", [2, 2001, 2003, 10_000])
def test_slow_videos(tmp_path, period):
    with VideoWriter(tmp_path / "a.mp4", 1 / period) as video:
        for index in range(40):
            video.write(flat(index))
    with av.open(str(tmp_path / "a.mp4")) as container:
        times = [frame.time for frame in container.decode(video=0)]
        assert container.streams.video[0].average_rate == Fraction(1, period)
    assert times == pytest.approx([period * i for i in range(40)])


@pytest.mark.parametrize("name", [b"a:b.mp4", b"caf\xe9.mp4", b"50%d.mp4"])
def test_any_file_name_is_written(tmp_path, name):
    folder = Path(os.fsdecode(os.path.join(os.fsencode(tmp_path), b"o:\xff")))
    folder.mkdir()
    path = folder / os.fsdecode(name)
    with VideoWriter(path, 10) as video:
        video.write(flat(0))
    assert [file.name for file in folder.iterdir()] == [path.name]
    with VideoWriter(tmp_path / "plain.mp4", 10) as video:
        video.write(flat(0))
    assert path.read_bytes() == (tmp_path / "plain.mp4").read_bytes()


def test_missing_folder(tmp_path):
    with pytest.raises(UserError, match=r"no such folder for the video: .*nowhere"):
        VideoWriter(tmp_path / "nowhere" / "a.mp4", 10)


@pytest.mark.parametrize(
    "image", [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3)), np.zeros((3, 4, 4), np.uint8)]
)
def test_only_rgb_uint8_frames(tmp_path, image):
    with (
        VideoWriter(tmp_path / "a.mp4", 10) as video,
        pytest.raises(ValueError, match=r"\(H, W, 3\) uint8"),
    ):
        video.write(image)


def test_closed_is_closed(tmp_path):
    video = VideoWriter(tmp_path / "a.mp4", 10)
    video.close()
    with pytest.raises(ValueError, match="closed"):
        video.write(flat(0))


def packets(path) -> list[bytes]:
    with av.open(str(path)) as container:
        return [bytes(packet) for packet in container.demux(video=0) if packet.dts is not None]


@pytest.mark.parametrize("fps", [10, 29.97])
def test_parts_are_joined_without_encoding_again(tmp_path, fps):
    lengths = (7, 25, 1)
    parts, index = [], 0
    for number, length in enumerate(lengths):
        parts.append(tmp_path / f"part{number}.mp4")
        with VideoWriter(parts[-1], fps, part=True) as video:
            for _ in range(length):
                video.write(flat(index))
                index += 1
        assert b"moof" in boxes(parts[-1])
    join_videos(parts, tmp_path / "whole.mp4", fps)
    stream, frames, images = read(tmp_path / "whole.mp4")
    assert stream.num_frames == index == 33
    assert stream.fps == pytest.approx(fps, rel=1e-3)
    assert [frame.pts * float(frame.time_base) for frame in frames] == pytest.approx(
        [i / fps for i in range(index)], abs=1e-3
    )
    for i, image in enumerate(images):
        assert np.abs(image - flat(i)).max() <= 6
    assert packets(tmp_path / "whole.mp4") == [p for part in parts for p in packets(part)]
    names = boxes(tmp_path / "whole.mp4")
    assert names.index(b"moov") < names.index(b"mdat")
    # Whoever joins the same parts again gets the same bytes.
    join_videos(parts, tmp_path / "again.mp4", fps)
    assert (tmp_path / "again.mp4").read_bytes() == (tmp_path / "whole.mp4").read_bytes()


def test_parts_of_two_sizes_are_refused_and_the_file_stays(tmp_path):
    parts = [tmp_path / "a.mp4", tmp_path / "b.mp4"]
    for part, size in zip(parts, [(48, 64), (64, 48)], strict=True):
        with VideoWriter(part, 10, part=True) as video:
            video.write(flat(0, *size))
    whole = tmp_path / "whole.mp4"
    whole.write_bytes(b"before")
    with pytest.raises(UserError, match=r"b\.mp4 has pictures of 64x48 .*a\.mp4 has 48x64: join"):
        join_videos(parts, whole, 10)
    assert whole.read_bytes() == b"before"


@pytest.mark.parametrize("part", [False, True])
def test_a_full_disk_is_one_line(tmp_path, part):
    noise = np.random.default_rng(0).integers(0, 256, (8, 128, 128, 3), np.uint8)

    def write() -> None:
        with VideoWriter(tmp_path / "v.mp4", 2, part=part) as video:
            for image in [*noise, *noise]:
                video.write(image)

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(UserError) as error:
            write()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert str(error.value) == f"cannot write {tmp_path}/v.mp4: {os.strerror(errno.EFBIG)}"
