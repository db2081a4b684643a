"""Panoptic and instance streams: a tiny model on videos of the world in COCO Videos' layout."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from detectron2.modeling import build_model
from run_folders import copy_running

from ttt_video.config import merge_method
from ttt_video.data.sources import FrameTransform, open_dataset
from ttt_video.modeling.weights import save_safetensors
from ttt_video.report.runs import read_runs
from ttt_video.report.tables import build_table
from ttt_video.stream import (
    OverlayVideos,
    RunDirectory,
    Settings,
    Sink,
    StreamEvaluation,
    evaluate_in_parallel,
)
from ttt_video.world import WorldVideo
from ttt_video.world.layouts import write_coco_videos

FRAMES = 12  # of which COCO Videos' layout labels two
TASKS = {"panoptic": ("panoptic_seg", "PQ"), "instance": ("instances", "AP")}


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Two videos; the second is shorter."""
    root = tmp_path_factory.mktemp("datasets")
    for name, seed, length in (("street", 1602, FRAMES), ("corner", 1605, 3)):
        write_coco_videos(root / "coco_videos", name, WorldVideo(seed, length, 48, 96))
    return root


@pytest.fixture(autouse=True)
def _data_sets(videos, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(videos))


@pytest.fixture
def tiny_cfg(tiny_cfg):
    """As configs/quick/joint_world_panoptic.yaml, with thresholds for random weights."""
    tiny_cfg.merge_from_list(
        [
            "DATASETS.TRAIN", ("coco_videos_panoptic_all",),
            "MODEL.SEM_SEG_HEAD.NUM_CLASSES", 133,
            "MODEL.MASK_FORMER.TEST.SEMANTIC_ON", False,
            "MODEL.MASK_FORMER.TEST.INSTANCE_ON", True,
            "MODEL.MASK_FORMER.TEST.PANOPTIC_ON", True,
            "MODEL.MASK_FORMER.TEST.OBJECT_MASK_THRESHOLD", 0.0,
            "MODEL.MASK_FORMER.TEST.OVERLAP_THRESHOLD", 0.0,
        ]
    )  # fmt: skip
    return tiny_cfg


@pytest.fixture
def tiny_model(tiny_cfg):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build_model(tiny_cfg).eval()


@pytest.fixture
def settings_of(tiny_cfg, tiny_model, tmp_path):
    """``settings_of(method, dataset, run)``: of a run, its overlay videos included."""
    weights = tmp_path / "tiny.safetensors"
    save_safetensors(tiny_model.state_dict(), str(weights))

    def make(method, dataset, name, *, resume=False):
        cfg = tiny_cfg.clone()
        merge_method(cfg, method)
        cfg.merge_from_list(["TTT.BATCH_SIZE", 2, "MODEL.WEIGHTS", str(weights)])
        cfg.merge_from_list(["TTT.OFFLINE.STEPS", 2, "TTT.OFFLINE.EVAL_EVERY", 1])
        run = RunDirectory(tmp_path / name, resume=resume)
        overlay = OverlayVideos(cfg, run.path, fps=10, single=False)
        return Settings(cfg, run, dataset, compare=True, sinks=[overlay], save_every=4)

    return make


@pytest.fixture
def evaluate(settings_of, tiny_model, tmp_path):
    """``evaluate(method, dataset, run)`` in this process; gives the summary.

    ``snapshot`` (n, copy) copies the folder once the n-th frame has been run: what a kill leaves.
    """

    def run(method, dataset, name, *, resume=False, snapshot=None):
        settings = settings_of(method, dataset, name, resume=resume)
        steps = []

        class Kill(Sink):
            def write(self, results):
                steps.append(results.adapted.frame["frame_index"])
                if snapshot is not None and len(steps) == snapshot[0]:
                    copy_running(settings.run.path, tmp_path / snapshot[1])

        settings.sinks = [*settings.sinks, Kill()]
        evaluation = StreamEvaluation(settings, copy.deepcopy(tiny_model))
        sources = open_dataset(dataset, FrameTransform.from_config(settings.cfg))
        return evaluation.evaluate(sources), steps

    return run


def rows_of(folder) -> list:
    """By video and frame, without times."""

    def timeless(value):
        if not isinstance(value, dict):
            return value
        return {k: timeless(v) for k, v in value.items() if not k.endswith("_seconds")}

    rows = [timeless(json.loads(line)) for line in (folder / "frames.jsonl").open()]
    return sorted(rows, key=lambda row: (row["video_id"], row["frame_index"]))


@pytest.mark.slow
@pytest.mark.parametrize(
    "method",
    [
        "online_ttt_mae",
        pytest.param("tent_class_balance", marks=pytest.mark.slow),
        pytest.param("offline_ttt_mae_oracle", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("task", TASKS)
def test_a_killed_run_ends_as_if_it_had_not_been(evaluate, tmp_path, task, method):
    dataset, (record, metric) = f"coco_videos_{task}_all", TASKS[task]
    kill = (3 + 5, "cut")  # in the second video, a frame after its state
    summary, steps = evaluate(method, dataset, "whole", snapshot=kill)
    assert steps == [*range(3), *range(FRAMES)]
    rows = (tmp_path / "cut/frames.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "cut/frames.jsonl").write_text("".join(rows[: 3 + 4]))  # what is there, stays
    again, steps = evaluate(method, dataset, "cut", resume=True)
    assert steps == list(range(4, FRAMES))
    rows = rows_of(tmp_path / "whole")
    assert rows_of(tmp_path / "cut") == rows
    for key in ("metrics", "protocols", "videos", "weights_sha256", "loss_recon"):
        assert again[key] == summary[key]
    videos = [tmp_path / name / "overlay-street.mp4" for name in ("cut", "whole")]
    assert videos[0].read_bytes() == videos[1].read_bytes()

    # It was about something: labels and predictions of the task, and numbers of both models.
    labelled = [(r["video_id"], r["frame_index"]) for r in rows if record in r["records"]]
    assert labelled == [("corner", 0), ("street", 0), ("street", 10)]
    assert all("change" in row["metrics"] for row in rows if row["frame_index"] > 0)
    assert all(row["records"]["prediction"]["classes"] >= 0 for row in rows)
    for who in ("adapted", "frozen"):
        numbers = summary["metrics"][who]
        for name in (metric, f"{metric}_video_mean", f"{metric}_frame_release"):
            assert 0 <= numbers[name] <= 100
        labelled = {video: n["labelled_frames"] for video, n in numbers["videos"].items()}
        assert labelled == {"corner": 1, "street": 2}
        frames = {video: n["frames"] for video, n in numbers["videos"].items()}
        assert frames == {"corner": 3, "street": 12}
    assert any(row["records"] != row["frozen"]["records"] for row in rows)
    if method == "tent_class_balance":
        assert all("source_classes" in row for row in rows)
    if method == "offline_ttt_mae_oracle":  # a video's step is chosen by its PQ, or AP
        scores = {row["video_id"]: row["offline_score"] for row in rows}
        videos = summary["metrics"]["adapted"]["videos"]
        assert scores == pytest.approx({video: n[metric] for video, n in videos.items()})


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_tables_by_class(evaluate, tmp_path, task):
    dataset, (_, metric) = f"coco_videos_{task}_all", TASKS[task]
    summary, _ = evaluate("online_ttt_mae", dataset, "run")
    table = build_table(read_runs([tmp_path / "run"]), by="class")
    shown = {title: cell.value for title, cell in table.rows["Online TTT-MAE"].items()}
    assert shown == summary["metrics"]["adapted"]["per_class"][metric]
    assert "car" in shown


@pytest.mark.slow
def test_several_workers_give_the_numbers_of_one(evaluate, settings_of, tmp_path):
    dataset = "coco_videos_panoptic_all"
    threads = torch.get_num_threads()  # workers share them out; the numbers are those of as many
    try:
        torch.set_num_threads(1)
        expected, _ = evaluate("online_ttt_mae", dataset, "one")
        settings = settings_of("online_ttt_mae", dataset, "two")
        sources = open_dataset(dataset, FrameTransform.from_config(settings.cfg))
        summary = evaluate_in_parallel(settings, sources, 2)
    finally:
        torch.set_num_threads(threads)
    assert summary["workers"] == 2
    assert rows_of(tmp_path / "two") == rows_of(tmp_path / "one")
    for key in ("metrics", "protocols", "videos", "weights_sha256"):
        assert summary[key] == expected[key]
    for video in ("street", "corner"):
        name = f"overlay-{video}.mp4"
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()
