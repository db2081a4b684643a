"""Runs on disk: what a killed process leaves behind, and summaries by hand arithmetic."""

from __future__ import annotations

import json
import math
import os

import numpy as np
import pytest

from ttt_video.errors import UserError
from ttt_video.evaluation.protocols import LabelInfo
from ttt_video.evaluation.records import RunDirectory, finite, summarize


def row(index: int, video: str = "a", **more) -> dict:
    return {"video_id": video, "frame_index": index, "adapt_seconds": 0.0, "predict_seconds": 0.0,
            **more}  # fmt: skip


def lines(path) -> list[str]:
    return (path / "frames.jsonl").read_text(encoding="utf-8").splitlines()


def test_rows_are_on_disk_as_they_happen(tmp_path):
    run = RunDirectory(tmp_path / "deep" / "run")
    for index in range(3):
        run.append(row(index, note="é\n\u2028"))
        # Read back through the file, while the run is still open.
        assert [json.loads(line)["frame_index"] for line in lines(run.path)] == [*range(index + 1)]
    assert list(run.rows()) == [row(i, note="é\n\u2028") for i in range(3)]
    run.close()


def test_knows_the_frames_it_has(tmp_path):
    run = RunDirectory(tmp_path)
    run.append(row(3, "b"))
    assert run.has("b", 3)
    assert not run.has("b", 2)
    assert not run.has("a", 3)


def test_a_folder_with_other_files_will_do(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    RunDirectory(tmp_path).close()
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_an_existing_run_is_refused_and_kept(tmp_path):
    run = RunDirectory(tmp_path)
    run.append(row(0))
    run.close()
    before = (tmp_path / "frames.jsonl").read_bytes()
    with pytest.raises(UserError, match=r"already holds a run.*--resume.*--output"):
        RunDirectory(tmp_path)
    assert (tmp_path / "frames.jsonl").read_bytes() == before


def test_a_run_that_never_got_to_a_frame_is_not_in_the_way(tmp_path):
    RunDirectory(tmp_path).close()
    run = RunDirectory(tmp_path)
    run.append(row(0))
    assert run.has("a", 0)


def test_resuming_appends(tmp_path):
    run = RunDirectory(tmp_path)
    run.append(row(0))
    run.append(row(0, "b"))
    run.close()
    run = RunDirectory(tmp_path, resume=True)
    assert run.has("a", 0)
    assert run.has("b", 0)
    run.append(row(1))
    run.close()
    assert [(r["video_id"], r["frame_index"]) for r in run.rows()] == [("a", 0), ("b", 0), ("a", 1)]


def test_resuming_what_is_not_there_starts_it(tmp_path):
    run = RunDirectory(tmp_path / "new", resume=True)
    assert list(run.rows()) == []
    run.append(row(0))


@pytest.mark.parametrize("torn", ['{"video_id": "a", "frame_ind', "{", '{"video_id": "é'])
def test_half_a_row_at_the_end_is_dropped_and_written_anew(tmp_path, torn):
    run = RunDirectory(tmp_path)
    run.append(row(0))
    run.append(row(1))
    run.close()
    whole = (tmp_path / "frames.jsonl").read_bytes()
    # A process may be killed within a character of several bytes.
    (tmp_path / "frames.jsonl").write_bytes(whole + torn.encode()[: len(torn)])
    run = RunDirectory(tmp_path, resume=True)
    assert (tmp_path / "frames.jsonl").read_bytes() == whole
    assert run.has("a", 1)
    assert not run.has("a", 2)
    run.append(row(2))
    run.close()
    assert [r["frame_index"] for r in run.rows()] == [0, 1, 2]


def test_every_way_to_be_cut_off_can_be_resumed(tmp_path):
    run = RunDirectory(tmp_path / "whole")
    for index in range(3):
        run.append(row(index))
    run.close()
    content = (tmp_path / "whole" / "frames.jsonl").read_bytes()
    for length in range(len(content) + 1):
        cut = tmp_path / f"cut{length}"
        cut.mkdir()
        (cut / "frames.jsonl").write_bytes(content[:length])
        run = RunDirectory(cut, resume=True)
        assert len(list(run.rows())) == content[:length].count(b"\n")
        for index in range(3):
            if not run.has("a", index):
                run.append(row(index))
        run.close()
        assert (cut / "frames.jsonl").read_bytes() == content


def test_output_that_is_a_file_or_cannot_be_made(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(UserError, match="is a file"):
        RunDirectory(file)
    with pytest.raises(UserError, match="file/below"):
        RunDirectory(file / "below")


def test_rows_of_two_configs_are_not_mixed(tmp_path):
    run = RunDirectory(tmp_path)
    config = "A:\n  LR: 0.1\n  NAME: x\nSEED: 0\n"
    run.write_config(config)
    run.append(row(0))
    run.close()
    run = RunDirectory(tmp_path, resume=True)
    run.write_config(config)
    with pytest.raises(UserError, match=r"another config \(A.LR, NEW\)"):
        run.write_config("A:\n  LR: 0.2\n  NAME: x\nSEED: 0\nNEW: 1\n")
    assert (tmp_path / "config.yaml").read_text() == config


def test_the_config_of_a_run_without_rows_may_change(tmp_path):
    RunDirectory(tmp_path).write_config("SEED: 0\n")
    RunDirectory(tmp_path).write_config("SEED: 1\n")
    assert (tmp_path / "config.yaml").read_text() == "SEED: 1\n"


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_json_on_disk_is_json(tmp_path, value):
    run = RunDirectory(tmp_path)
    with pytest.raises(ValueError, match="JSON"):
        run.append(row(0, loss_recon=value))
    assert lines(tmp_path) == []
    run.append(row(0, **finite({"loss_recon": value, "grad_norm": 2.0})))
    assert json.loads(lines(tmp_path)[0])["loss_recon"] is None
    assert json.loads(lines(tmp_path)[0])["grad_norm"] == 2.0


def test_whole_files_appear_at_once(tmp_path, monkeypatch):
    run = RunDirectory(tmp_path)
    run.write_json("summary.json", {"frames": 1})
    assert json.loads((tmp_path / "summary.json").read_text()) == {"frames": 1}

    def killed(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(type(tmp_path), "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            run.write_json("summary.json", {"frames": 2})
    assert json.loads((tmp_path / "summary.json").read_text()) == {"frames": 1}
    run.write_json("summary.json", {"frames": 3})
    assert json.loads((tmp_path / "summary.json").read_text()) == {"frames": 3}
    assert sorted(os.listdir(tmp_path)) == ["frames.jsonl", "summary.json"]


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
        "a": pytest.approx({"frames": 2, "mIoU": 45, "mIoU_frame_release": 32.5}),
        "b": pytest.approx({"frames": 1, "mIoU": 100, "mIoU_frame_release": 50}),
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
        "videos": {"a": {"frames": 1, **undefined}},
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
    assert summarize([labelled, row(1)])["metrics"] == summarize([labelled])["metrics"]
    assert summarize([labelled, row(1)])["frames"] == 2
