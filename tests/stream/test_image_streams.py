"""Streams of images, as a user runs them: methods, orders, steps, resuming, workers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import build_model
from fashion import TEST, write_fashion_mnist
from PIL import Image
from tiny import TINY
from tiny_classifier import OPTS

from ttt_video.adaptation import SlidingWindow, build_adapter
from ttt_video.adaptation.wrappers import Wrapper
from ttt_video.config import load_config
from ttt_video.data.catalog import read_pixels
from ttt_video.data.image_folder import register_class_folders
from ttt_video.data.sources import open_dataset
from ttt_video.errors import UserError
from ttt_video.formats.images import FrameTransform
from ttt_video.modeling.weights import save_safetensors
from ttt_video.stream import Stream
from ttt_video.structures import StepResult
from ttt_video_cli import call

PAIR = "fashion_mnist_c_gaussian_noise+contrast"
TIMES = ("adapt_seconds", "predict_seconds")
NO_MEMORY = ("--method", "ttt_mae_no_memory", "TTT.STEPS_PER_FRAME", 3)


@pytest.fixture
def labels(tmp_path, monkeypatch) -> np.ndarray:
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    return write_fashion_mnist(tmp_path / "fashion_mnist", monkeypatch)[1]


@pytest.fixture
def flags(tmp_path, labels) -> list[str]:
    cfg = load_config("joint_cityscapes.yaml", opts=OPTS)
    torch.manual_seed(0)
    (tmp_path / "tiny.yaml").write_text(cfg.dump())
    save_safetensors(build_model(cfg).state_dict(), tmp_path / "tiny.safetensors")
    config = ["--config", str(tmp_path / "tiny.yaml")]
    return [*config, "--weights", str(tmp_path / "tiny.safetensors"), "--no-video"]


def rows_of(folder: Path) -> list[dict]:
    rows = [json.loads(line) for line in (folder / "frames.jsonl").read_text().splitlines()]
    for row in rows:
        for key in TIMES:
            row.pop(key)
        row.get("frozen", {}).pop("predict_seconds", None)
    return rows


def stream(flags, folder: Path, *args: object, dataset: str = PAIR) -> list[dict]:
    words = [*flags, "--output", str(folder), "--dataset", dataset, *map(str, args)]
    call("stream", words)
    return rows_of(folder)


def accuracy(rows: list[dict], labels: np.ndarray) -> float:
    right = [
        row["records"]["image_classes"]["top"][0] == labels[row["frame_index"]] for row in rows
    ]
    return 100 * sum(right) / len(right)


@pytest.mark.slow
@pytest.mark.parametrize(
    "args",
    [
        ("--method", "none"),
        NO_MEMORY,
        ("--method", "online_ttt_mae", "TTT.RESET", "never", "TTT.WINDOW_SIZE", 1),
        ("--method", "tent"),
        ("--method", "ln_adapt"),
    ],
    ids=lambda args: args[1],
)
def test_methods_run_on_a_set_of_images(flags, labels, tmp_path, args):
    if args[1] == "ln_adapt":
        file = tmp_path / "norms.safetensors"
        values = {"encoder.1.mean": torch.zeros(16), "encoder.1.variance": torch.ones(16)}
        save_safetensors(values, file)
        args = (*args, "TTT.LN_ADAPT.SOURCE_STATISTICS", file)
    rows = stream(flags, tmp_path / "out", "--compare", *args)
    assert [row["frame_index"] for row in rows] == [*range(TEST)]
    for row in rows:
        record = row["records"]["image_classes"]
        assert record["label"] == labels[row["frame_index"]]
        assert len(set(record["top"])) == 5
        assert row["metrics"]["top1"] == 100 * (record["top"][0] == record["label"])
        assert "steps" not in row
    summary = json.loads((tmp_path / "out/summary.json").read_text())["metrics"]
    assert summary["adapted"]["top1"] == accuracy(rows, labels)
    frozen = [row["frozen"]["records"] for row in rows]
    changed = any(row["records"] != other for row, other in zip(rows, frozen, strict=True))
    assert changed == (args[1] != "none")


def test_the_class_never_reaches_the_window(labels):
    window = SlidingWindow(2)
    (source,) = open_dataset(PAIR, FrameTransform())
    for frame in source:
        assert {"class_id", "corruption", "severity"} <= frame.keys()
        assert window.push(frame).keys() <= {"image", "video_id", "frame_index", "height", "width"}


@pytest.mark.slow
def test_each_step_has_its_prediction_and_no_number_changes(flags, labels, tmp_path):
    for number, args in enumerate([
        NO_MEMORY,
        ("--method", "online_ttt_mae", "TTT.RESET", "never", "TTT.STEPS_PER_FRAME", 2,
         "TTT.STEP_MODE", "train", "TTT.OPTIMIZER.MOMENTUM", 0.9, "TTT.WINDOW_SIZE", 3),
        ("--method", "tent", "--max-frames", 8),
    ]):  # fmt: skip
        plain = stream(flags, tmp_path / f"plain{number}", *args)
        named = [*args, "TTT.RECORD_STEPS", True]
        rows = stream(flags, tmp_path / f"steps{number}", *named)
        count = (3, 2, 1)[number]
        for row, expected in zip(rows, plain, strict=True):
            steps, record = row.pop("steps"), row["records"]["image_classes"]
            own = record.pop("steps")
            assert row == expected  # bit for bit
            assert len(steps) == len(own) == count
            # The frame is predicted after the last step.
            assert own[-1]["top"] == record["top"]
            assert own[-1]["score"] == record["score"]
            assert len(own[-1]["scores"]) == len(record["top"])
            loss = "loss_entropy" if "tent" in args else "loss_recon"
            mean = sum(step[loss] for step in steps) / count
            assert mean == pytest.approx(row[loss], rel=1e-12)
            for step, after in zip(steps, own, strict=True):
                assert step["metrics"]["top1"] == 100 * (after["top"][0] == record["label"])
                entropy = -np.log(after["score"])
                assert step["metrics"]["cross_entropy"] == pytest.approx(entropy)
    summary = json.loads((tmp_path / "steps0/summary.json").read_text())["metrics"]["adapted"]
    assert summary["top1_step_3"] == summary["top1"]
    assert {f"top1_step_{n}" for n in (1, 2)} < summary.keys()


def test_methods_without_steps_have_none(flags, tmp_path):
    rows = stream(flags, tmp_path / "out", "--method", "none", "TTT.RECORD_STEPS", True)
    assert all(row["steps"] == row["records"]["image_classes"]["steps"] == [] for row in rows)


def test_a_prediction_after_a_step_is_that_of_a_run_with_so_many_steps(labels):
    """Without momentum the first n steps do not depend on how many follow."""
    (source,) = open_dataset("fashion_mnist_test", FrameTransform())
    frames = list(source)[:2]
    results = {}
    for count in (1, 2, 3):
        opts = [*OPTS, "TTT.STEPS_PER_FRAME", str(count), "TTT.RECORD_STEPS", "True"]
        cfg = load_config("joint_cityscapes.yaml", opts=opts, method="ttt_mae_no_memory")
        torch.manual_seed(0)
        results[count] = list(Stream.from_config(cfg, build_model(cfg).eval()).run(frames))
    for frame, last in enumerate(results[3]):
        assert all(isinstance(step, StepResult) for step in last.steps)
        for count in (1, 2, 3):
            expected = results[count][frame]
            assert torch.equal(
                last.steps[count - 1].output["image_class"], expected.output["image_class"]
            )
            assert last.steps[count - 1].record["loss_recon"] == pytest.approx(
                sum(step.record["loss_recon"] for step in expected.steps[count - 1 :])
            )


@pytest.mark.parametrize("order", ["class", "first", "second", "shuffled"])
def test_orders_of_a_set(flags, labels, tmp_path, order):
    args = ("--method", "none", "TTT.FRAME_ORDER", order)
    rows = stream(flags, tmp_path / "out", *args)
    indices = [row["frame_index"] for row in rows]
    assert sorted(indices) == [*range(TEST)]
    assert indices != sorted(indices)
    records = DatasetCatalog.get(PAIR)
    groups = [records[i]["group"] for i in indices]
    if order == "class":
        assert indices == sorted(range(TEST), key=lambda i: (labels[i], i))
    elif order == "shuffled":
        assert groups not in (sorted(groups), sorted(groups, reverse=True))
    else:
        assert groups == sorted(groups, reverse=order == "second")
        assert indices[: TEST // 2] != sorted(indices[: TEST // 2])
    again = stream(
        flags, tmp_path / "seed", "--method", "none", "SEED", 1, "TTT.FRAME_ORDER", order
    )
    assert ([row["frame_index"] for row in again] == indices) == (order == "class")
    # The order changes no picture and no prediction of the frozen model.
    by_index = [{row["frame_index"]: row for row in each} for each in (rows, again)]
    assert by_index[0] == by_index[1]


def test_severity_rises(flags, tmp_path):
    name = "fashion_mnist_c_gaussian_noise_ramp"
    args = ("--method", "none", "--max-frames", 20, "TTT.FRAME_ORDER", "severity")
    rows = stream(flags, tmp_path / "out", *args, dataset=name)
    records = DatasetCatalog.get(name)
    severities = [records[row["frame_index"]]["severity"] for row in rows]
    assert severities == sorted(severities)
    assert sorted(row["frame_index"] for row in rows) == [*range(20)]
    assert severities[0] < 0.5
    assert severities[-1] > 4.5


def test_an_order_that_says_nothing_here(flags, tmp_path):
    for name, order, key in (
        ("fashion_mnist_c_contrast", "first", "group"),
        ("fashion_mnist_test", "severity", "severity"),
    ):
        with pytest.raises(UserError, match=f"do not differ in '{key}': choose another order"):
            stream(flags, tmp_path / name, "TTT.FRAME_ORDER", order, dataset=name)


@pytest.mark.slow
def test_an_interrupted_run_goes_on_in_its_order(flags, tmp_path, monkeypatch):
    args = ("--save-every", 7, *NO_MEMORY, "TTT.FRAME_ORDER", "first", "TTT.RECORD_STEPS", True)
    online = ("--save-every", 7, "--method", "online_ttt_mae", "TTT.RESET", "never",
              "TTT.FRAME_ORDER", "class")  # fmt: skip
    for number, words in enumerate((args, online)):
        whole = stream(flags, tmp_path / f"whole{number}", *words)
        step, seen = Stream.step, []

        def stop(self, frame, step=step, seen=seen):
            seen.append(frame)
            if len(seen) == 25:
                raise KeyboardInterrupt
            return step(self, frame)

        out = tmp_path / f"out{number}"
        with monkeypatch.context() as patch:
            patch.setattr(Stream, "step", stop)
            with pytest.raises(KeyboardInterrupt):
                stream(flags, out, *words)
        assert rows_of(out) == whole[:24]
        assert stream(flags, out, "--resume", *words) == whole


def test_a_picture_that_cannot_be_read_is_skipped_if_asked(flags, tmp_path, monkeypatch):
    for index in range(4):
        file = tmp_path / f"own/{'ab'[index % 2]}/{index}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        pixels = read_pixels(DatasetCatalog.get("fashion_mnist_test")[index])
        Image.fromarray(pixels).save(file)
    (tmp_path / "own/b/1.png").write_bytes(b"no picture")
    classes = ["a", "b", *"cdefghij"]
    name = "test_image_streams_own"
    register_class_folders(name, tmp_path / "own", classes)
    try:
        with pytest.raises(UserError, match=r"frame .*1\.png cannot be read .*on-bad-frame skip"):
            stream(flags, tmp_path / "stop", "--method", "none", dataset=name)
        args = ("--method", "none", "--on-bad-frame", "skip", "TTT.FRAME_ORDER", "shuffled")
        rows = stream(flags, tmp_path / "skip", *args, dataset=name)
    finally:
        DatasetCatalog.remove(name)
    assert sorted(Path(row["file_name"]).name for row in rows) == ["0.png", "2.png", "3.png"]
    summary = json.loads((tmp_path / "skip/summary.json").read_text())
    assert len(summary["skipped_frames"]) == 1


def test_a_head_of_other_classes_is_refused(flags, tmp_path):
    with pytest.raises(UserError, match=r"has 10 classes, but the model 7 .*VIT_MAE.NUM_CLASSES"):
        stream(flags, tmp_path / "seven", "MODEL.VIT_MAE.NUM_CLASSES", 7)


def test_an_observer_of_steps_is_told_through_wrappers(labels):
    cfg = load_config(
        "joint_cityscapes.yaml", opts=[*OPTS, "TTT.STEPS_PER_FRAME", "2"], method="online_ttt_mae"
    )
    inner = build_adapter(cfg, build_model(cfg).eval())
    window = SlidingWindow(1)
    (source,) = open_dataset("fashion_mnist_test", FrameTransform())
    window.push(next(iter(source)))
    told = []
    outer = Wrapper(Wrapper(inner))
    outer.observe_steps(lambda adapter, record: told.append((adapter, record)))
    outer.adapt(window, torch.Generator().manual_seed(0))
    assert [adapter for adapter, _ in told] == [outer, outer]
    assert all(record.keys() == {"loss_recon", "grad_norm", "skipped_steps"} for _, record in told)
    outer.observe_steps(None)
    outer.adapt(window, torch.Generator().manual_seed(0))
    assert len(told) == 2


def test_a_segmented_frame_has_loss_and_metric_after_each_step(tiny_model, tmp_path):
    """The paper's Figure 3: l_s falls with the steps, and the frame's own metric says what for."""
    folder = tmp_path / "video"
    folder.mkdir()
    rng = np.random.default_rng(0)
    records = []
    for index in range(2):
        file, label = folder / f"{index}.png", folder / f"{index}_sem.png"
        Image.fromarray(rng.integers(0, 256, (64, 96, 3), np.uint8)).save(file)
        Image.fromarray(rng.integers(0, 19, (64, 96), np.uint8)).save(label)
        names = {"file_name": str(file), "sem_seg_file_name": str(label)}
        records.append({**names, "video_id": "v", "frame_index": index})
    del records[1]["sem_seg_file_name"]
    name = "test_image_streams_segments"
    DatasetCatalog.register(name, lambda: records)
    classes = [f"c{i}" for i in range(19)]
    MetadataCatalog.get(name).set(evaluator_type="video_sem_seg", stuff_classes=classes)
    save_safetensors(tiny_model.state_dict(), tmp_path / "tiny.safetensors")
    opts = [*TINY, "TTT.STEPS_PER_FRAME", "4", "TTT.OPTIMIZER.BASE_LR", "0.1"]
    (tmp_path / "tiny.yaml").write_text(load_config("joint_cityscapes.yaml", opts=opts).dump())
    flags = ["--config", str(tmp_path / "tiny.yaml"), "--no-video"]
    flags += ["--weights", str(tmp_path / "tiny.safetensors")]
    try:
        plain = stream(flags, tmp_path / "plain", dataset=name)
        rows = stream(flags, tmp_path / "steps", "TTT.RECORD_STEPS", True, dataset=name)
    finally:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    first, second = (row.pop("steps") for row in rows)
    assert rows == plain
    assert len(first) == len(second) == 4
    assert first[-1]["loss_recon"] < first[0]["loss_recon"]
    metric = "mIoU_frame_release"
    assert first[-1]["metrics"][metric] == rows[0]["metrics"][metric]
    assert all("metrics" not in step for step in second)  # a frame without labels


@pytest.mark.slow
def test_workers_give_the_same_rows(tmp_path):
    plugin = tmp_path / "plugin.py"
    plugin.write_text(
        f"import sys\nsys.path[:0] = [{str(Path(__file__).parents[1])!r}]\n"
        "import tiny_classifier\n"
        "from pathlib import Path\n"
        "from detectron2.data import DatasetCatalog, MetadataCatalog\n"
        "from ttt_video.data.image_folder import load_class_folders\n"
        f"root, classes = Path({str(tmp_path)!r}), list('abcdefghij')\n"
        "def load():\n"
        "    return [r for v in 'xy' for r in load_class_folders(root / v, classes, v)]\n"
        "if 'test_image_workers' not in DatasetCatalog:\n"
        "    DatasetCatalog.register('test_image_workers', load)\n"
        "    MetadataCatalog.get('test_image_workers').set(\n"
        "        evaluator_type='image_classes', classes=classes)\n"
    )
    for video in "xy":
        for index in range(6):
            file = tmp_path / video / "acd"[index % 3] / f"{index}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            pixels = np.random.default_rng(index).integers(0, 256, (28, 28, 3), np.uint8)
            Image.fromarray(pixels).save(file)
    cfg = load_config("joint_cityscapes.yaml", opts=OPTS)
    torch.manual_seed(0)
    (tmp_path / "tiny.yaml").write_text(cfg.dump())
    save_safetensors(build_model(cfg).state_dict(), tmp_path / "tiny.safetensors")
    flags = ["--config", str(tmp_path / "tiny.yaml"), "--no-video", "--register", str(plugin)]
    flags += ["--weights", str(tmp_path / "tiny.safetensors")]
    args = (*NO_MEMORY, "TTT.FRAME_ORDER", "class", "TTT.RECORD_STEPS", True)
    runs = []
    for count in (1, 2):
        words = ("--workers", count, *args)
        rows = stream(flags, tmp_path / f"{count}", *words, dataset="test_image_workers")
        runs.append(sorted(rows, key=lambda row: (row["video_id"], row["frame_index"])))
    assert len(runs[0]) == 12
    assert runs[0] == runs[1]
