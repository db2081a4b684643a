"""Registered data sets as videos."""

from __future__ import annotations

import pytest
from detectron2.data import DatasetCatalog
from frame_files import KEEP, write_folder

from ttt_video.data.sources import (
    DatasetSource,
    open_dataset,
)
from ttt_video.errors import UserError


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
