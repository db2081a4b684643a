"""Folders of frames, and how frames are decoded ahead of their consumer."""

from __future__ import annotations

import gc
import logging
import os
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from detectron2.data import DatasetCatalog
from frame_files import KEEP, background_threads, picture, pixels, write_folder
from PIL import Image

from ttt_video.data import BaseSource
from ttt_video.data.decoded_source import run_ahead
from ttt_video.data.sources import (
    FolderSource,
    open_dataset,
    open_folder,
)
from ttt_video.errors import UserError
from ttt_video.formats.images import BadFrame, FrameTransform
from ttt_video.structures import FrameSource

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
