"""Summaries of rows by hand arithmetic."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from ttt_video.stream.records import finite, summarize
from ttt_video.tasks import LabelInfo


def row(index: int, video: str = "a", **more) -> dict:
    return {"video_id": video, "frame_index": index, "adapt_seconds": 0.0, "predict_seconds": 0.0,
            **more}  # fmt: skip


def test_json_has_no_nan():
    record = finite({"loss_recon": math.nan, "grad_norm": math.inf, "steps": 2.0})
    assert record == {"loss_recon": None, "grad_norm": None, "steps": 2.0}


def sem_seg(counts: dict) -> dict:
    return {"sem_seg": counts}


def test_summary_by_hand():
    rows = [
        row(0, "a", adapt_seconds=1.0, predict_seconds=0.5, loss_recon=0.8, skipped_steps=0,
            records=sem_seg({"0": [8, 0, 2], "1": [1, 1, 0]})),
        row(1, "a", adapt_seconds=3.0, predict_seconds=0.7, loss_recon=None, skipped_steps=2,
            records=sem_seg({"0": [0, 4, 6]})),
        row(0, "b", adapt_seconds=2.0, predict_seconds=0.6, loss_recon=0.4, skipped_steps=1,
            records=sem_seg({"2": [5, 0, 0], "3": [0, 7, 0]})),
    ]  # fmt: skip
    summary = summarize(rows, LabelInfo(classes=("road", "car", "tree", "sky")))
    assert summary["frames"] == 3
    assert summary["videos"] == {"a": 2, "b": 1}
    assert summary["skipped_steps"] == 3
    assert summary["loss_recon"] == pytest.approx(0.6)
    adapted = summary["metrics"]["adapted"]
    assert "frozen" not in summary["metrics"]
    assert adapted["per_class"] == {"IoU": pytest.approx({"road": 40, "car": 50, "tree": 100})}
    assert adapted["mIoU"] == pytest.approx((40 + 50 + 100) / 3)
    # Frames: (80 + 50) / 2, 0 / 1, (100 + 0) / 2: sky is predicted, but not there.
    assert adapted["mIoU_frame_release"] == pytest.approx((65 + 0 + 50) / 3)
    assert adapted["mIoU_video_mean"] == pytest.approx((45 + 100) / 2)
    assert adapted["videos"] == {
        "a": pytest.approx(
            {"frames": 2, "labelled_frames": 2, "mIoU": 45, "mIoU_frame_release": 32.5}
        ),
        "b": pytest.approx(
            {"frames": 1, "labelled_frames": 1, "mIoU": 100, "mIoU_frame_release": 50}
        ),
    }
    assert summary["seconds"]["adapt"]["mean"] == pytest.approx(2.0)
    assert summary["seconds"]["predict"]["mean"] == pytest.approx(0.6)
    assert summary["seconds"]["frame"]["mean"] == pytest.approx(2.6)
    frame_seconds = [1.5, 3.7, 2.6]
    for q in (50, 90, 99):
        expected = float(np.percentile(frame_seconds, q))
        assert summary["seconds"]["frame"][f"p{q}"] == pytest.approx(expected)
    assert summary["seconds"]["frame"]["p50"] == pytest.approx(2.6)
    assert summary["protocols"].keys() == {"mIoU", "mIoU_frame_release", "mIoU_video_mean"}
    json.dumps(summary, allow_nan=False)


def test_summary_of_the_frozen_model_beside_it():
    rows = [
        row(i, predict_seconds=1.0, records=sem_seg({"0": [i, 0, 4 - i]}),
            frozen={"predict_seconds": 0.5 + i, "records": sem_seg({"0": [1, 0, 3]})})
        for i in (2, 4)
    ]  # fmt: skip
    summary = summarize(rows)
    assert summary["metrics"]["adapted"]["mIoU"] == pytest.approx(75.0)
    assert summary["metrics"]["frozen"]["mIoU"] == pytest.approx(25.0)
    assert summary["seconds"]["frozen_predict"]["mean"] == pytest.approx(3.5)
    # The frozen model's time is no part of the frame's: it is run for the comparison alone.
    assert summary["seconds"]["frame"]["mean"] == pytest.approx(1.0)


def test_summary_without_records_has_no_metrics_and_no_protocols():
    summary = summarize([row(0, loss_recon=0.5)])
    assert summary["metrics"] == {}
    assert summary["protocols"] == {}


def test_summary_of_labelled_frames_without_a_labelled_pixel():
    summary = summarize([row(0, records=sem_seg({}))])
    undefined = {"mIoU": None, "mIoU_frame_release": None}
    assert summary["metrics"]["adapted"] == {
        **undefined,
        "mIoU_video_mean": None,
        "per_class": {"IoU": {}},
        "videos": {"a": {"frames": 1, "labelled_frames": 1, **undefined}},
    }


def test_summary_of_nothing():
    summary = summarize([])
    assert summary["frames"] == 0
    assert summary["loss_recon"] is None
    json.dumps(summary, allow_nan=False)


def test_summary_does_not_depend_on_the_order_of_rows_to_the_last_bit():
    rng = np.random.default_rng(0)
    rows = []
    for i in range(60):
        quality = [1, 0, 2, float(rng.uniform(0.5, 1))]
        records = {
            "sem_seg": {"0": [int(n) for n in rng.integers(1, 99, 3)]},
            "panoptic_seg": {"standard": {"0": quality}, "release": {"0": quality}},
            "temporal": {"changed": int(rng.integers(0, 100)), "pixels": 100},
            "prediction": {"classes": i % 7, "entropy": float(rng.random())},
        }
        times = {f"{name}_seconds": float(rng.random()) for name in ("adapt", "predict")}
        frozen = {"predict_seconds": float(rng.random()), "records": records}
        loss = float(rng.random())
        more = {"loss_recon": loss, "records": records, "frozen": frozen, **times}
        rows.append(row(i // 3, "abc"[i % 3], **more))
    expected = json.dumps(summarize(rows))
    for seed in range(5):
        shuffled = [rows[i] for i in np.random.default_rng(seed).permutation(60)]
        assert json.dumps(summarize(shuffled)) == expected


def test_unlabelled_frames_between_labelled_ones_count_for_nothing():
    labelled = row(0, records=sem_seg({"0": [3, 0, 1]}))
    one, two = summarize([labelled]), summarize([labelled, row(1)])
    assert (one["frames"], two["frames"]) == (1, 2)
    own = two["metrics"]["adapted"]["videos"]["a"]
    assert (own["frames"], own["labelled_frames"]) == (2, 1)
    own["frames"] = 1
    assert two["metrics"] == one["metrics"]


def test_frames_of_an_unlabelled_video_are_counted():
    records = {"prediction": {"classes": 3, "entropy": 0.5}}
    unlabelled = [row(i, "b", records=records) for i in range(3)]
    rows = [*unlabelled, row(3, "b"), row(0, "a", records=sem_seg({"0": [3, 0, 1]}))]
    summary = summarize([{**r, "frozen": {**r}} for r in rows])
    for who in ("adapted", "frozen"):
        videos = summary["metrics"][who]["videos"]
        assert {name: own["frames"] for name, own in videos.items()} == summary["videos"]
        assert {name: own["labelled_frames"] for name, own in videos.items()} == {"a": 1, "b": 0}
