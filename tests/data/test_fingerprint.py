"""A video is known by its fingerprint: the same after a copy, another for other files."""

from __future__ import annotations

import json
import os
import shutil
import time

import pytest

from ttt_video.data.fingerprint import (
    SAMPLED_FILES,
    difference,
    fingerprint_file,
    fingerprint_images,
    fingerprint_records,
)
from ttt_video.data.sources import DatasetSource, FolderSource, FrameTransform

KEEP = FrameTransform(min_size=0)


def write(folder, count: int = 40):
    folder.mkdir()
    for index in range(count):
        (folder / f"{index:02d}.png").write_bytes(bytes([index]) * (100 + index))
    return folder


def known(folder):
    return FolderSource(folder, KEEP).fingerprint()


def test_a_copy_elsewhere_is_the_same_video(tmp_path):
    folder = write(tmp_path / "v")
    os.utime(folder / "03.png", (0, 0))
    copy = shutil.copytree(folder, tmp_path / "elsewhere" / "v", copy_function=shutil.copyfile)
    assert known(copy) == known(folder)
    assert difference(known(folder), known(copy), 39) is None


def remove(folder):
    (folder / "07.png").unlink()


def add(folder):
    (folder / "99.png").write_bytes(b"a")


def rename(folder):
    (folder / "39.png").rename(folder / "40.png")


def resize(folder):
    (folder / "20.png").write_bytes(b"b" * 5)


def rewrite(folder):
    for file in folder.iterdir():
        file.write_bytes(bytes(reversed(range(1, 1 + file.stat().st_size))))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (remove, "07.png is gone; 40 files, now 39"),
        (add, "99.png is new; 40 files, now 41"),
        (rename, "39.png is gone; 40 files, now 40"),
        (resize, "20.png has 5 bytes, had 120"),
        (rewrite, "00.png has other contents"),
    ],
)
def test_what_differs_is_said(tmp_path, change, words):
    folder = write(tmp_path / "v")
    before = known(folder)
    change(folder)
    assert difference(before, known(folder), 39) == words


def test_frames_to_come_may_be_mended(tmp_path):
    folder = write(tmp_path / "v")
    before = known(folder)
    resize(folder)
    assert difference(before, known(folder), 19) is None
    assert difference(before, known(folder), 20) is not None


def test_order_and_labels_are_a_part_of_it(tmp_path):
    folder = write(tmp_path / "v", 3)
    label = tmp_path / "label.png"
    label.write_bytes(b"abc")
    records = [
        {
            "file_name": str(file),
            "video_id": "v",
            "frame_index": index,
            "sem_seg_file_name": str(label),
            "annotations": [{"segmentation": {"counts": b"a\xff"}, "bbox_mode": object()}],
        }
        for index, file in enumerate(sorted(folder.iterdir()))
    ]
    before = DatasetSource(records, KEEP).fingerprint()
    assert difference(before, DatasetSource(records[::-1], KEEP).fingerprint(), 2) is None
    turned = [{**record, "frame_index": 2 - i} for i, record in enumerate(records)]
    message = "its frames have another order"
    assert difference(before, DatasetSource(turned, KEEP).fingerprint(), 2) == message
    moved = [{**record, "sem_seg_file_name": str(tmp_path / "x.png")} for record in records]
    assert difference(before, fingerprint_records(moved), 2) == "00.png has other labels"
    other = [records[0], {**records[1], "annotations": []}, records[2]]
    assert difference(before, fingerprint_records(other), 2) == "01.png has other labels"
    label.write_bytes(b"abcd")
    assert difference(before, fingerprint_records(records), 2) == "00.png has other labels"


def test_a_video_file_is_known_by_size_and_samples(tmp_path):
    file = tmp_path / "a.mp4"
    content = bytearray(os.urandom(300_000))
    file.write_bytes(content)
    before = fingerprint_file(file)
    assert difference(before, fingerprint_file(shutil.copy(file, tmp_path / "b.mp4")), -1) == (
        "a.mp4 is gone; 1 files, now 1"
    )
    for place in (0, 155_000, 299_999):
        changed = bytearray(content)
        changed[place] ^= 1
        file.write_bytes(changed)
        assert difference(before, fingerprint_file(file), -1) == "a.mp4 has other contents"
    file.write_bytes(content + b"a")
    assert difference(before, fingerprint_file(file), -1) == "a.mp4 has 300001 bytes, had 300000"


def test_what_has_no_file_is_not_known(tmp_path):
    assert fingerprint_file("rtsp://camera/stream") is None
    os.mkfifo(tmp_path / "fifo")
    assert fingerprint_file(tmp_path / "fifo") is None
    missing = {"file_name": str(tmp_path / "nowhere.png"), "frame_index": 0}
    assert fingerprint_records([missing]) == [[0, "nowhere.png", None, None, None]]


def test_few_of_many_files_are_read(tmp_path):
    """Opening each of thousands of frames takes long on a network's disk."""
    for count in (1, 2, SAMPLED_FILES, 100):
        rows = known(write(tmp_path / str(count), count))
        read = [row[0] for row in rows if row[3] is not None]
        assert len(read) == min(count, SAMPLED_FILES)
        assert {read[0], read[-1]} == {0, count - 1}


# ---- what a training set lists


def coco(count=8, root="/data", **more):
    return [
        {
            "file_name": f"{root}/{index}.jpg",
            "pan_seg_file_name": f"{root}/{index}.png",
            "segments_info": [{"id": 1}] * index,
            "annotations": [{"category_id": 0}] * index,
            "height": 3,
            **more,
        }
        for index in range(count)
    ]


def test_a_training_set_is_the_same_elsewhere_and_in_another_order():
    known = fingerprint_images(coco())
    assert known["images"] == 8
    assert known == fingerprint_images(reversed(coco(root="/mnt/other")))
    assert known == fingerprint_images(coco(read_pixels=len, height=5))  # functions have addresses
    assert json.loads(json.dumps(known)) == known


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("file_name", "/data/8.jpg"),
        ("pan_seg_file_name", "/data/8.png"),
        ("sem_seg_file_name", "/data/8.png"),
        ("segments_info", []),
        ("annotations", []),
        ("class_id", 3),
    ],
)
def test_another_image_or_label_is_another_training_set(key, value):
    other = coco()
    other[5][key] = value
    assert fingerprint_images(other) != fingerprint_images(coco())
    assert fingerprint_images(other)["images"] == 8


def test_images_that_are_gone_are_counted():
    known = fingerprint_images(coco())
    assert fingerprint_images(coco(3))["images"] == 3
    assert fingerprint_images(coco(3))["listed"] != known["listed"]
    # Names in several folders may be the same.
    assert fingerprint_images(coco() + coco()) != known


@pytest.mark.slow
def test_all_of_coco_takes_about_a_second():
    records = coco(10) * 11_800
    start = time.process_time()
    fingerprint_images(records)
    assert time.process_time() - start < 3  # on a busy machine
