"""What is predicted in time is scored against the labels of the frame that has come by then."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from detectron2.structures import Instances
from PIL import Image

from ttt_video.report.metrics import headlines
from ttt_video.stream.records import summarize
from ttt_video.stream.results import FrameResult, OnTime
from ttt_video.stream.sinks import Results
from ttt_video.stream.streaming_scores import StreamingScores
from ttt_video.tasks import (
    InstanceTask,
    LabelInfo,
    PanopticTask,
    SemanticTask,
    digits,
    rules,
    sign,
    streaming_headlines,
    tasks,
)


def predicted(classes) -> dict:
    one_hot = np.eye(3, dtype=np.float32)[np.array([classes])]
    return {"sem_seg": torch.from_numpy(one_hot.transpose(2, 0, 1).copy())}


@pytest.fixture
def frames(tmp_path):
    """Three frames of one row; class 1 moves to the right, the last pixel is void."""
    found = []
    for index, labels in enumerate([[1, 0, 0, 255], [0, 1, 0, 255], [0, 0, 1, 255]]):
        file = tmp_path / f"{index}.png"
        Image.fromarray(np.array([labels], np.uint8)).save(file)
        frame = {"video_id": "a", "frame_index": index, "file_name": str(index)}
        found.append({**frame, "sem_seg_file_name": str(file)})
    return found


def test_by_hand(tiny_cfg, frames):
    right = [predicted(c) for c in ([1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0])]
    sink = StreamingScores(tiny_cfg, "", compare=True)
    in_time = [
        OnTime(None, None, latency_seconds=0.15),
        OnTime(None, None, dropped=True),
        OnTime(right[0], 2, latency_seconds=0.05),
    ]
    rows = []
    for frame, output, on_time in zip(frames, right, in_time, strict=True):
        seconds = {"adapt_seconds": 0.5, "predict_seconds": 0.25}
        ordinary = {"sem_seg": SemanticTask().record(frame, output)}
        row = {"video_id": "a", "frame_index": frame["frame_index"], **seconds}
        row |= {"records": ordinary, "frozen": {"predict_seconds": 0.5, "records": ordinary}}
        adapted = FrameResult(frame, output, on_time=on_time)
        frozen = FrameResult(frame, output, on_time=OnTime(output, 0, latency_seconds=0.0))
        sink.write(Results(adapted, frozen, row))
        rows.append(row)
    # Pixels 0, 1, 2 of frames 0, 1 are missed; frame 2 has 0 0 1 and counts with 1 0 0. Class 0:
    # 1 right, 1 false, 2 + 2 + 1 missed: 1/7. Class 1: none right.
    assert rows[0]["streaming"]["records"] == {"sem_seg": {"0": [0, 0, 2], "1": [0, 0, 1]}}
    assert rows[2]["streaming"]["records"] == {"sem_seg": {"0": [1, 1, 1], "1": [0, 1, 1]}}
    summary = summarize(rows)
    adapted, frozen = summary["metrics"]["adapted"], summary["metrics"]["frozen"]
    assert adapted["mIoU"] == frozen["mIoU"] == frozen["streaming_mIoU"] == 100
    assert adapted["streaming_mIoU"] == pytest.approx(100 / 14)
    assert adapted["streaming_mIoU_video_mean"] == adapted["streaming_mIoU"]
    assert adapted["videos"]["a"]["streaming_mIoU"] == adapted["streaming_mIoU"]
    assert summary["streaming"]["adapted"] == {
        "frames": 3,
        "misses": 2,
        "dropped_frames": 1,
        "delay_frames": 2.0,
        "latency_seconds": pytest.approx(0.1),
    }
    assert summary["streaming"]["frozen"]["misses"] == 0
    assert "finished when the frame came" in summary["protocols"]["streaming_mIoU"]
    assert summary["seconds"]["frame"]["mean"] == 0.75  # of two frames, not of the dropped one


def test_without_a_rate_there_is_nothing(tiny_cfg, frames):
    row = {"video_id": "a", "frame_index": 0, "adapt_seconds": 0.0, "predict_seconds": 0.0}
    result = FrameResult(frames[0], predicted([1, 0, 0, 0]))
    StreamingScores(tiny_cfg, "", compare=False).write(Results(result, None, row))
    assert "streaming" not in row
    assert "streaming" not in summarize([row])


def test_what_is_missed_has_only_misses(tmp_path, frames):
    assert SemanticTask().missed(frames[0], predicted([0, 0, 0, 0])) == {
        "0": [0, 0, 2],
        "1": [0, 0, 1],
    }
    assert SemanticTask().missed({"video_id": "a"}, predicted([0, 0, 0, 0])) is None
    square = [[1, 1, 3, 3]]  # segment ids: one pixel of a class is two pixels wide
    file = tmp_path / "panoptic.png"
    picture = np.zeros((1, 4, 3), np.uint8)
    picture[..., 0] = square
    Image.fromarray(picture).save(file)
    segments = [
        {"id": k, "category_id": k, "area": 2, "iscrowd": 0, "isthing": True} for k in (1, 3)
    ]
    frame = {"pan_seg_file_name": str(file), "segments_info": segments}
    late = {"panoptic_seg": (torch.ones(1, 4, dtype=torch.int32), [{"id": 1, "category_id": 1}])}
    info = LabelInfo(classes=("a", "b", "c", "d"))
    missed = PanopticTask(info).missed(frame, late)
    assert missed["standard"] == {"1": [0, 0, 1, 0.0], "3": [0, 0, 1, 0.0]}
    mask = {"size": [1, 4], "counts": [0, 2, 2]}
    objects = [{"category_id": 1, "segmentation": mask, "area": 2, "iscrowd": 0}]
    found = Instances((1, 4), scores=torch.tensor([0.9]), pred_classes=torch.tensor([1]))
    found.pred_masks = torch.tensor([[[1.0, 1, 0, 0]]])
    frame = {"annotations": objects, "file_name": "x"}
    task = InstanceTask(info)
    things = task.missed(frame, {"instances": found})["things"]
    assert things == task.record(frame, {"instances": found[:0]})["things"]
    assert things.keys() == {"1"}
    assert things != task.record(frame, {"instances": found})["things"]


def test_names():
    assert streaming_headlines() == ["streaming_mIoU", "streaming_PQ", "streaming_AP"]
    assert all(task.missed is not None for task in tasks() if task.streaming)
    assert sign("streaming_mIoU_video_mean") == 1
    assert digits("streaming_PQ") == digits("PQ")
    assert rules(["streaming_AP", "streaming_AP_video_mean"]).keys() == {
        "streaming_AP",
        "streaming_AP_video_mean",
    }
    assert "streaming_mIoU_video_mean" in headlines("video")
    assert not any(name.startswith("streaming") for name in headlines("release"))
