"""Cameras and network streams: every picture in order, breaks, silence, and a busy consumer."""

from __future__ import annotations

import http.server
import io
import os
import pickle
import signal
import sys
import threading
import time
from functools import partial
from itertools import islice
from types import SimpleNamespace

import av
import numpy as np
import pytest
from live_servers import HEIGHT, WIDTH, sending, transport_stream
from PIL import Image

from ttt_video.data import captures, live_sources
from ttt_video.data.captures import NetworkStream, public_name
from ttt_video.data.ordering import FirstFrames, ShuffledFrames
from ttt_video.data.sources import FrameTransform, LiveSource, open_live
from ttt_video.errors import UserError
from ttt_video.structures import FrameSource

KEEP = FrameTransform(min_size=0)


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(live_sources, "PAUSES", (0.01, 0.03))


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "live source"]


def grey(frame) -> int:
    """The number that ``transport_stream`` wrote into a picture."""
    return round(float(frame["image"].float().mean()) / 2)


# --- network streams -----------------------------------------------------------------------------


def test_a_stream_that_breaks_comes_back_without_a_lost_picture(caplog):
    with sending(transport_stream(0, 30), b"", transport_stream(30, 30)) as url:
        source = LiveSource(url, KEEP)
        assert isinstance(source, FrameSource)
        assert (source.num_frames, source.fps, source.live) == (None, 25, True)
        assert (source.fingerprint(), source.video_id) == (None, url)
        frames = list(islice(source, 60))
    assert [frame["frame_index"] for frame in frames] == [*range(60)]
    assert np.abs([grey(frame) - frame["frame_index"] for frame in frames]).max() <= 2  # lossy
    assert (frames[0]["height"], frames[0]["width"]) == (HEIGHT, WIDTH)
    assert frames[7]["file_name"] == f"{url}#7"
    assert "dropped" not in frames[7]
    said = [record.getMessage() for record in caplog.records]
    assert said[0] == f"{url} ended; it is opened again in 0.01 s"
    assert said[1].startswith(f"{url} cannot be read (")
    assert said[1].endswith("; it is opened again in 0.02 s")
    assert said[2] == f"{url} is back, after 2 tries"
    assert not threads()


def test_a_stream_that_stalls_is_opened_again(monkeypatch, caplog):
    monkeypatch.setattr(captures, "SILENCE", 0.3)
    with sending(transport_stream(0, 30), transport_stream(30, 30), hold=True) as url:
        indices = [frame["frame_index"] for frame in islice(LiveSource(url, KEEP), 50)]
    assert indices == [*range(50)]
    line = f"nothing came from {url} for 0.3 seconds: is it sending?; it is opened again in 0.01 s"
    assert line in caplog.text


def test_a_stream_that_cannot_be_opened_at_first_is_refused(monkeypatch):
    monkeypatch.setattr(captures, "SILENCE", 0.3)
    with (
        sending(b"", hold=True) as url,
        pytest.raises(UserError, match=rf"nothing came from {url} for 0\.3 seconds"),
    ):
        LiveSource(url, KEEP)
    with pytest.raises(UserError, match=rf"{url} cannot be read \(Connection refused\)"):
        LiveSource(url, KEEP)
    with pytest.raises(UserError, match=r"nosuch://x cannot be read \(Protocol not found\)"):
        LiveSource("nosuch://x", KEEP)


def test_an_interrupt_ends_the_wait_for_a_connection():
    with sending(b"", hold=True) as url:
        timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            LiveSource(url, KEEP)


@pytest.fixture
def web(tmp_path):
    """A web server's address of the files of ``tmp_path``."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    handler = partial(Quiet, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://user:secret@127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def test_a_recording_on_a_web_server_ends(web, tmp_path, caplog):
    with av.open(str(tmp_path / "street.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for _ in range(6):
            pixels = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode(None))
    source = LiveSource(f"{web}/street.mp4", KEEP)
    assert [frame["frame_index"] for frame in source] == [*range(6)]
    assert not caplog.records
    with pytest.raises(UserError) as error:
        LiveSource(f"{web}/none.mp4", KEEP)
    assert "404" in str(error.value)
    for text in (source.video_id, str(error.value)):
        assert "secret" not in text


def test_a_password_is_no_part_of_a_name():
    assert public_name("rtsp://a:b@c@host:5/x@y?z=@") == "rtsp://host:5/x@y?z=@"
    assert public_name("http://host/a@b") == "http://host/a@b"


def test_damaged_pictures_of_a_stream_are_left_out(caplog):
    def packet(number: int):
        def decode():
            if number:
                raise av.error.InvalidDataError(1, "Invalid data")
            return ["picture"]

        return SimpleNamespace(decode=decode)

    stream = NetworkStream.__new__(NetworkStream)
    stream.name, stream._stream = "tcp://a", None
    stream._container = SimpleNamespace(demux=lambda _: map(packet, [0, *range(1, 12), 0]))
    assert list(stream) == ["picture", "picture"]
    said = [record.getMessage() for record in caplog.records]
    assert [line.rpartition("the ")[2] for line in said] == [
        "1. of this connection",
        "10. of this connection",
    ]


def test_another_process_opens_its_own_connection():
    with sending(transport_stream(0, 30)) as url:
        source = pickle.loads(pickle.dumps(LiveSource(url, KEEP, latest=False)))
        assert [frame["frame_index"] for frame in islice(source, 3)] == [0, 1, 2]


# --- cameras -------------------------------------------------------------------------------------


class FakeCamera:
    """cv2.VideoCapture's methods; picture number i has the value i everywhere, in blue.

    ``lives`` has the number of pictures that a camera gives each time it is opened; None is endless
    and -1 cannot be opened.
    """

    def __init__(self, monkeypatch, *lives: int | None):
        cv2 = pytest.importorskip("cv2")
        self.lives, self.taken, self.devices, self.released = list(lives), 0, [], 0
        monkeypatch.setattr(cv2, "VideoCapture", self.open)

    def open(self, device):
        self.devices.append(device)
        self.left = self.lives.pop(0) if self.lives else -1
        return self

    def isOpened(self):
        return self.left != -1

    def get(self, _):
        return 30.0

    def read(self):
        if self.left == 0:
            return False, None
        self.left = None if self.left is None else self.left - 1
        bgr = np.zeros((6, 8, 3), np.uint8)
        bgr[:, :, 0] = self.taken % 256
        self.taken += 1
        return True, bgr

    def release(self):
        self.released += 1


def test_a_camera_gives_all_pictures_and_is_opened_again(monkeypatch, caplog):
    camera = FakeCamera(monkeypatch, 3, -1, -1, -1, 2, 4)
    source = LiveSource("0", KEEP)
    assert (source.video_id, source.fps) == ("camera 0", 30.0)
    frames = list(islice(source, 9))
    assert [frame["frame_index"] for frame in frames] == [*range(9)]
    assert [int(frame["image"][2, 0, 0]) for frame in frames] == [*range(9)]  # RGB
    assert camera.devices[:6] == [0] * 6
    said = [record.getMessage() for record in caplog.records]
    pauses = [line.rpartition(" in ")[2] for line in said if "opened again" in line]
    assert pauses[:5] == ["0.01 s", "0.02 s", "0.03 s", "0.03 s", "0.01 s"]
    assert camera.released >= 6
    assert not threads()


def test_a_camera_that_is_not_there(monkeypatch, capfd):
    camera = FakeCamera(monkeypatch, -1)
    with pytest.raises(UserError, match="camera 7 cannot be opened: is it there and free"):
        LiveSource(7, KEEP)
    assert camera.released == 1
    monkeypatch.undo()
    with pytest.raises(UserError, match="camera 97 cannot be opened"):
        LiveSource(97, KEEP)
    assert capfd.readouterr().err == ""  # no lines of OpenCV's beside ours
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(UserError, match="a camera needs cv2, which is missing: pip install opencv"):
        LiveSource(7, KEEP)


def test_few_pictures_wait_for_a_busy_consumer(monkeypatch):
    camera = FakeCamera(monkeypatch, None)
    frames = iter(LiveSource(0, KEEP))
    for consumed in (1, 2, 3):
        assert next(frames)["frame_index"] == consumed - 1
        full = consumed + live_sources.WAITING + 1  # one is in the reader's hand
        deadline = time.monotonic() + 30
        while camera.taken < full and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.1)
        assert camera.taken == full
    frames.close()
    assert camera.released == 1
    assert not threads()


def test_the_latest_picture_is_given_and_the_dropped_ones_are_counted(monkeypatch, caplog):
    camera = FakeCamera(monkeypatch, 0)
    allowed, asked = threading.Semaphore(0), threading.Semaphore(0)
    read = camera.read

    def read_when_allowed():
        asked.release()  # the picture before has been handed on
        allowed.acquire(timeout=30)
        return read()

    def let(count: int) -> None:
        for _ in range(count):
            allowed.release()
            asked.acquire(timeout=30)

    monkeypatch.setattr(camera, "read", read_when_allowed)
    camera.lives = [None]
    frames = iter(LiveSource(0, KEEP, latest=True))
    allowed.release()
    seen = [next(frames)]
    for _ in range(2):
        asked.acquire(timeout=30)
    for burst in (1, 4, 2):
        let(burst)
        seen.append(next(frames))
    allowed.release(10)
    frames.close()
    assert [frame["frame_index"] for frame in seen] == [0, 1, 5, 7]
    assert [int(frame["image"][2, 0, 0]) for frame in seen] == [0, 1, 5, 7]
    assert [frame["dropped"] for frame in seen] == [0, 0, 3, 1]
    assert "camera 0: 4 of 8 pictures were dropped, which came while the model" in caplog.text


def test_waiting_for_a_picture_is_told_and_ends_in_time(monkeypatch, caplog):
    monkeypatch.setattr(live_sources, "PATIENCE", 0.05)
    camera = FakeCamera(monkeypatch, 1)
    monkeypatch.setattr(live_sources, "PAUSES", (60.0, 60.0))
    frames = list(LiveSource(0, KEEP, seconds=0.4))
    assert [frame["frame_index"] for frame in frames] == [0]
    assert "camera 0: still waiting for a picture" in caplog.text
    assert camera.released == 1
    assert not threads()  # a pause does not hold it up


def test_no_picture_in_time_is_no_error(monkeypatch, caplog):
    FakeCamera(monkeypatch, 0)
    assert list(LiveSource(0, KEEP, seconds=0.2)) == []
    assert "camera 0: no picture came in 0.2 s" in caplog.text


@pytest.mark.parametrize(
    ("told", "latest", "fps"),
    [
        (30.0, False, 30.0),
        (30.0, True, None),  # some are dropped
        (240.0, False, 240.0),
        (90000.0, False, None),
        (0.5, False, None),
        (float("nan"), False, None),
        (0.0, False, None),
    ],
)
def test_a_rate_that_no_camera_has_is_unknown(monkeypatch, told, latest, fps):
    camera = FakeCamera(monkeypatch, None)
    monkeypatch.setattr(camera, "get", lambda _: told)
    assert LiveSource(0, KEEP, latest=latest).fps == fps


def test_an_error_in_the_reader_is_the_consumers(monkeypatch):
    camera = FakeCamera(monkeypatch, None)
    monkeypatch.setattr(camera, "read", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        list(LiveSource(0, KEEP))


def test_a_source_that_goes_on_counts_on(monkeypatch):
    FakeCamera(monkeypatch, None, None)
    frames = list(islice(LiveSource(0, KEEP).frames_after(4), 3))
    assert [frame["frame_index"] for frame in frames] == [5, 6, 7]
    assert frames[0]["file_name"] == "camera 0#5"
    (newest,) = islice(LiveSource(0, KEEP, latest=True).frames_after(4), 1)
    assert newest["frame_index"] == 5 + newest["dropped"]


def test_what_comes_once_has_no_other_order(monkeypatch):
    FakeCamera(monkeypatch, None)
    source = FirstFrames(LiveSource(0, KEEP), 3)
    assert (source.live, source.num_frames) == (True, 3)
    with pytest.raises(UserError, match=r"camera 0 gives its frames as they come: .*FRAME_ORDER"):
        ShuffledFrames(source, 3, seed=0)


# --- lists ---------------------------------------------------------------------------------------


def test_a_list_has_a_source_on_each_line(monkeypatch, tmp_path):
    FakeCamera(monkeypatch, None, None, None)
    file = tmp_path / "cameras.txt"
    file.write_text("# front\n0\n\n  /dev/video2  \n")
    assert [source.video_id for source in open_live(str(file), KEEP)] == [
        "camera 0",
        "camera /dev/video2",
    ]
    (one,) = open_live("3", KEEP, latest=True, seconds=5)
    assert (one.address, one.latest, one.seconds) == (3, True, 5)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"the list of sources .*a\.txt cannot be read: No such file"),
        (b"\xff", r"a\.txt cannot be read: it is no UTF-8 text"),
        (b"# none\n", r"a\.txt names no source: write a URL or a camera's number on each line"),
        (
            b"# two users\nrtsp://u:p@a/1\nrtsp://v:q@a/1\n",
            r"a\.txt names rtsp://a/1 in lines 2 and 3, which would write the same files: remove",
        ),
        (b"0\n\n00\n", r"a\.txt names camera 0 in lines 1 and 3"),
        (b"street\n", r"'street' is neither a URL, such as .*, nor a camera, such as 0 or /dev/vi"),
    ],
)
def test_lists_that_are_none(tmp_path, content, message):
    if content is not None:
        (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(UserError, match=message):
        open_live(str(tmp_path / "a.txt"), KEEP)


def test_a_file_is_no_live_source(tmp_path):
    file = tmp_path / "street.mp4"
    file.touch()
    with pytest.raises(UserError, match=r"street\.mp4' is neither .*: use --video for a file"):
        open_live(str(file), KEEP)


def test_pictures_over_http_tell_no_frame_rate():
    """FFmpeg says 25 a second of any MJPEG, so that a camera of 2 would have videos of a tenth."""
    content = b"HTTP/1.0 200 OK\r\nContent-Type: multipart/x-mixed-replace; boundary=next\r\n\r\n"
    for index in range(8):
        jpeg = io.BytesIO()
        Image.new("RGB", (WIDTH, HEIGHT), (20 * index,) * 3).save(jpeg, "JPEG")
        length = len(jpeg.getvalue())
        content += b"--next\r\nContent-Type: image/jpeg\r\n"
        content += b"Content-Length: %d\r\n\r\n%s\r\n" % (length, jpeg.getvalue())
    with sending(content, hold=True) as url:
        source = LiveSource(url.replace("tcp://", "http://"), KEEP)
        assert source.fps is None
        frames = source.frames_after(-1)
        assert next(frames)["frame_index"] == 0
        frames.close()
    with sending(transport_stream(0, 50), hold=True) as url:
        assert LiveSource(url, KEEP).fps == 25
