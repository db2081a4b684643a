"""What tables and figures read is what runs write: a tiny run, tabulated and drawn."""

from __future__ import annotations

import copy

import numpy as np
import pytest
from kitti_layout import write_video
from PIL import Image

from ttt_video.data.kitti_step import register_video_sem_seg
from ttt_video.data.sources import FrameTransform, open_dataset
from ttt_video.report.run_figures import (
    draw_curves,
    draw_extremes,
    extreme_frames,
    read_curves,
)
from ttt_video.report.runs import read_runs
from ttt_video.report.tables import build_table, to_markdown
from ttt_video.stream import OverlayVideos, RunDirectory, Settings, StreamEvaluation


@pytest.fixture
def dataset(tmp_path):
    from detectron2.data import DatasetCatalog, MetadataCatalog

    rng = np.random.default_rng(0)
    for video in ("a", "b"):
        images = rng.integers(0, 256, (3, 64, 96, 3), dtype=np.uint8)
        labels = rng.choice(np.array([0, 1, 10, 255], np.uint8), (3, 64, 96))
        frames = zip(images, labels, strict=True)
        write_video(tmp_path / "images", tmp_path / "labels", video, frames)
    register_video_sem_seg("reports_test", tmp_path / "images", tmp_path / "labels")
    yield "reports_test"
    DatasetCatalog.remove("reports_test")
    MetadataCatalog.remove("reports_test")


@pytest.fixture
def run(tiny_cfg, tiny_model, dataset, tmp_path):
    cfg = tiny_cfg.clone()
    cfg.TTT.METHOD = "online_ttt_mae"
    directory = RunDirectory(tmp_path / "run")
    overlay = OverlayVideos(cfg, directory.path, fps=10.0, single=False)
    settings = Settings(cfg, directory, dataset, compare=True, sinks=[overlay])
    evaluation = StreamEvaluation(settings, copy.deepcopy(tiny_model))
    summary = evaluation.evaluate(open_dataset(dataset, FrameTransform.from_config(cfg)))
    return directory.path, summary


@pytest.mark.slow
def test_a_run_becomes_a_table_and_figures(run, tmp_path):
    path, summary = run
    table = build_table(read_runs([path]), metrics=("flicker",))
    assert list(table.rows) == ["MAE Joint Training", "Online TTT-MAE"]
    for name, who in (("MAE Joint Training", "frozen"), ("Online TTT-MAE", "adapted")):
        for metric in ("mIoU", "flicker"):
            cell = table.rows[name][f"reports_test {metric}"]
            assert cell.value == summary["metrics"][who][metric]
            if metric == "mIoU":
                assert cell.over_videos.mean == summary["metrics"][who]["mIoU_video_mean"]
    for by, key in (("class", "per_class"), ("video", "videos")):
        table = build_table(read_runs([path]), by=by)
        numbers = summary["metrics"]["adapted"][key]
        shown = {title: cell.value for title, cell in table.rows["Online TTT-MAE"].items()}
        if by == "class":
            assert shown == numbers["IoU"]
        else:
            assert shown == {video: row["mIoU"] for video, row in numbers.items()}
    release = build_table(read_runs([path]), protocol="release")
    assert "mean over the frames" in to_markdown(release)

    (curves,) = read_curves([path])
    drawn = {file.name.rsplit("-", 1)[0] for file in draw_curves([curves], tmp_path)}
    # Every kind of number that a semantic model's rows hold.
    assert drawn == {"mIoU", "flicker", "predicted_classes", "prediction_entropy", "loss_recon"}
    extremes = extreme_frames(curves, count=1)
    assert draw_extremes(curves, extremes, tmp_path / "extremes.png")
    picture = np.asarray(Image.open(tmp_path / "extremes.png"))
    assert picture.shape[1] == 4 * 420  # with the labels
