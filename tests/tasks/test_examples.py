"""examples/new_task.py and new_metric.py: under contract, and from a stream to the figures."""

from __future__ import annotations

import importlib.util
import json
import runpy
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image
from task_contract import TaskContract

from ttt_video.data import BaseSource, register_custom_video
from ttt_video.data.ordering import FirstFrames
from ttt_video.errors import UserError
from ttt_video.modeling.weights import save_safetensors
from ttt_video.plugins import run_files
from ttt_video.stream import RunDirectory, Settings, VideoRun
from ttt_video.stream.parallel import Orders
from ttt_video.tasks import (
    TASK_REGISTRY,
    LabelInfo,
    Metric,
    ScoredFrame,
    SemanticTask,
    Task,
    build_tasks,
    metrics,
    overlay_painter,
    score,
    tasks,
)
from ttt_video.tasks.labels import warn_of_near_misses

ROOT = Path(__file__).resolve().parents[2]
NEW_TASK, NEW_METRIC = ROOT / "examples" / "new_task.py", ROOT / "examples" / "new_metric.py"


def tool(name: str):
    spec = importlib.util.spec_from_file_location(f"tool_{name}", ROOT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def as_before(monkeypatch):
    """What a test registers is forgotten after it."""
    monkeypatch.setattr(TASK_REGISTRY, "_obj_map", dict(TASK_REGISTRY._obj_map))
    monkeypatch.setattr(SemanticTask, "metrics", dict(SemanticTask.metrics))


def forget() -> None:
    """Forgets what the two examples registered."""
    del TASK_REGISTRY._obj_map["FreeRoad"]
    SemanticTask.metrics.pop("fwIoU")


def write_labelled(folder: Path, count: int = 3) -> None:
    """Frames of noise; a pedestrian stands on the road of all but the first."""
    rng = np.random.default_rng(0)
    for kind in ("frames", "labels"):
        (folder / kind).mkdir()
    for index in range(count):
        image = rng.integers(0, 256, (64, 96, 3), np.uint8)
        labels = np.zeros((64, 96), np.uint8)
        labels[50, 48] = 11 * bool(index)
        Image.fromarray(image).save(folder / "frames" / f"{index}.png")
        Image.fromarray(labels).save(folder / "labels" / f"{index}.png")


class TestNewTask(TaskContract):
    @pytest.fixture(autouse=True)
    def _registered(self, as_before):
        self.task = runpy.run_path(str(NEW_TASK))["FreeRoad"]

    @pytest.fixture
    def video(self, tmp_path):
        write_labelled(tmp_path)
        nobody = torch.zeros(19, 64, 96)
        nobody[0] = 1
        keys = {"video_id": "a", "file_name": "x", "height": 64, "width": 96}
        return [
            ({**keys, "frame_index": i, "sem_seg_file_name": str(tmp_path / f"labels/{i}.png")},
             {"sem_seg": nobody})
            for i in range(3)
        ]  # fmt: skip

    def test_by_hand(self, video):
        assert self.scores(self.records(video))["free_road_accuracy"] == pytest.approx(100 / 3)


def test_the_task_is_under_60_lines():
    assert len(NEW_TASK.read_text().splitlines()) < 60


def test_both_show_up_everywhere(as_before, tmp_path, tiny_cfg, tiny_model, capsys):
    write_labelled(tmp_path)
    classes = [str(k) for k in range(19)]
    register_custom_video("new_task_video", tmp_path / "frames", tmp_path / "labels", classes)
    (tmp_path / "tiny.yaml").write_text(tiny_cfg.dump())
    save_safetensors(tiny_model.state_dict(), str(tmp_path / "tiny.safetensors"))
    register = ["--register", str(NEW_TASK), "--register", str(NEW_METRIC)]
    run = tmp_path / "run"
    try:
        tool("stream_eval").main(
            ["--dataset", "new_task_video", "--config", str(tmp_path / "tiny.yaml"), "--method",
             "none", "--weights", str(tmp_path / "tiny.safetensors"), "--output", str(run),
             *register]
        )  # fmt: skip
        assert "free_road_accuracy" in capsys.readouterr().out
    finally:
        DatasetCatalog.remove("new_task_video")
        MetadataCatalog.remove("new_task_video")

    names = {"mIoU", "fwIoU", "free_road_accuracy"}
    for row in map(json.loads, (run / "frames.jsonl").read_text().splitlines()):
        assert row["records"].keys() >= {"sem_seg", "free_road", "prediction"}
        assert row["metrics"].keys() >= names
    summary = json.loads((run / "summary.json").read_text())
    assert summary["metrics"]["adapted"].keys() >= {*names, "free_road_accuracy_video_mean"}
    assert summary["protocols"].keys() >= {*names, "free_road_accuracy_video_mean"}
    assert summary["protocols"]["fwIoU"] == metrics()["fwIoU"].rule

    forget()  # as in a process of its own
    tool("tabulate").main(
        [str(run), "--layout", "plain", "--metric", "fwIoU", "--format", "csv", *register]
    )
    table = capsys.readouterr().out
    for name in names:
        assert f"new_task_video {name}" in table
        assert summary["protocols"][name].split(";")[0] in table

    forget()
    tool("plot_run").main([str(run), "--output", str(tmp_path / "figures"), *register])
    drawn = {file.name.split("-")[0] for file in (tmp_path / "figures").glob("*.svg")}
    assert drawn >= names

    image = np.full((64, 96, 3), 100, np.uint8)
    scores = torch.zeros(19, 64, 96)
    scores[0] = 1
    red, green, blue = overlay_painter({"sem_seg": scores}, None)(image)[5, 5]
    assert green > red == blue
    with (run / "overlay.mp4").open("rb") as file:
        assert file.read(1)


class Nothing(BaseSource):
    """A video without frames."""

    video_id = "a"

    def __iter__(self):
        return iter(())


def test_a_worker_process_registers_it_too(as_before, tmp_path, tiny_cfg, tiny_model):
    tiny_cfg.MODEL.WEIGHTS = str(tmp_path / "tiny.safetensors")
    save_safetensors(tiny_model.state_dict(), tiny_cfg.MODEL.WEIGHTS)
    with closing(RunDirectory(tmp_path / "run")) as run:
        settings = Settings(tiny_cfg, run, register=[str(NEW_TASK)])
        assert "free_road" not in [task.name for task in tasks()]
        evaluation = Orders.of(settings).build("cpu", torch.get_num_threads())
    scores = evaluation.sinks[0]
    scores.start(VideoRun(FirstFrames(Nothing(), None), tmp_path))
    assert "free_road" in [task.name for task in scores.tasks["adapted"]]


def test_a_task_that_names_no_data_sets_is_scored_where_its_labels_are(as_before):
    @TASK_REGISTRY.register()
    class Anywhere(Task):
        name = "anywhere"
        label_keys = ("sem_seg_file_name",)
        output_keys = ("sem_seg",)

        def _record(self, frame, output):
            return {"frames": 1}

    names = [task.name for task in build_tasks("kitti_step_video_sem_seg_val")]
    assert "anywhere" in names
    assert "panoptic_seg" not in names


def test_mistakes_in_a_task_are_told_when_it_is_registered(as_before):
    with pytest.raises(ValueError, match="there is a task 'sem_seg' already"):
        type("Mine", (Task,), {"name": "sem_seg"})
    given = {"name": "mine", "rule": "r", "example": ([], None), "value": lambda self, total: 1.0}
    for lacking in given:
        own = {key: value for key, value in given.items() if key != lacking}
        with pytest.raises(ValueError, match=f"the metric Lacking has no '{lacking}'"):
            SemanticTask.add_metric(type("Lacking", (Metric,), own))
    SemanticTask.add_metric(type("Whole", (Metric,), given))
    with pytest.raises(ValueError, match="there is a metric 'mine' already"):
        SemanticTask.add_metric(type("Whole", (Metric,), given))


@pytest.mark.parametrize(
    ("types", "keys", "said"),
    [
        (("sem_segg",), ("sem_seg_file_name",), "'sem_segg', and data set 5%d has 'sem_seg'"),
        (("sem_seg",), ("free_raod",), "label key 'free_raod', and data set 5%d has 'free_road'"),
        (("sem_seg",), ("free_road",), None),
        (("depth",), ("depth_file",), None),  # for other data sets
    ],
)
def test_a_misspelt_name_of_a_task_is_told(as_before, caplog, types, keys, said):
    attributes = {"name": "mine", "evaluator_types": types, "label_keys": keys, "output_keys": ()}
    TASK_REGISTRY.register(type("Mine", (Task,), attributes))
    records = [{"file_name": "x", "sem_seg_file_name": "y"}, {"file_name": "z", "free_road": 1}]
    MetadataCatalog.get("5%d").evaluator_type = "sem_seg"
    try:
        warn_of_near_misses("5%d", records)
    finally:
        MetadataCatalog.remove("5%d")
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == (said is not None)
    assert said is None or said in told[0]


@pytest.mark.parametrize("name", ["kitti_step_video_sem_seg_val", "coco_videos_panoptic_bar"])
def test_names_of_the_built_in_tasks_are_no_near_misses(caplog, name):
    keys = ["file_name", "video_id", "frame_index", "image_id", "height", "width"]
    warn_of_near_misses(name, [dict.fromkeys([*keys, "pan_seg_file_name", "segments_info"])])
    assert caplog.records == []


def test_rows_of_a_task_that_is_not_registered_name_it(as_before):
    run_files([str(NEW_TASK)])
    frame = ScoredFrame("a", 0, {"free_road": {"right": 1, "frames": 1}})
    assert score([frame], LabelInfo())["free_road_accuracy"] == 100
    assert tasks()[-1].name == "free_road"
    del TASK_REGISTRY._obj_map["FreeRoad"]
    with pytest.raises(UserError, match=r"task 'free_road'.*--register"):
        score([frame], LabelInfo())
