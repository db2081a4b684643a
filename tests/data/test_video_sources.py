"""Video files against independent readers: OpenCV, NumPy."""

from __future__ import annotations

import struct

import av
import numpy as np
import pytest
from frame_files import KEEP, picture, pixels, write_video

from ttt_video.data.sources import (
    VideoFileSource,
    open_video,
)
from ttt_video.errors import UserError
from ttt_video.formats.images import BadFrame
from ttt_video.structures import FrameSource


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


@pytest.mark.parametrize(("suffix", "codec"), [("mkv", "mpeg4"), ("flv", "flv")])
@pytest.mark.parametrize("sound", [False, True])
def test_a_cut_off_video_without_a_number_of_frames_says_so(tmp_path, caplog, suffix, codec, sound):
    """By its seconds, which count those of a longer sound, too; a whole one says nothing."""
    path = tmp_path / f"clip.{suffix}"
    with av.open(str(path), "w") as container:
        film = container.add_stream(codec, rate=10)
        film.width, film.height, film.pix_fmt = 64, 48, "yuv420p"
        voice = container.add_stream("pcm_s16le", rate=8000) if sound else None
        for index in range(100):
            if index < 60:
                picture = np.random.default_rng(index).integers(0, 256, (48, 64, 3), np.uint8)
                container.mux(film.encode(av.VideoFrame.from_ndarray(picture)))
            if voice is not None:
                silence = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), "s16", "mono")
                silence.sample_rate, silence.pts = 8000, 800 * index
                container.mux(voice.encode(silence))
        container.mux(film.encode())
    assert len(list(VideoFileSource(path, KEEP))) == 60
    assert not caplog.records
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    frames = list(VideoFileSource(path, KEEP, on_bad_frame="skip"))
    assert 10 < len(frames) < 60
    seconds = 10.0 if sound else 6.0
    assert f" of the {seconds} seconds it announces: it may be cut off" in caplog.text


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
