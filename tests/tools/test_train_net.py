"""tools/train_net.py as a user runs it, on a data set in Cityscapes' own layout."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets.cityscapes import load_cityscapes_semantic
from PIL import Image
from processes import python_path
from torch.multiprocessing import ProcessRaisedException

from ttt_video.errors import UserError
from ttt_video.training.joint_training import JointTrainer

ROOT = Path(__file__).resolve().parents[2]
SMALL = [
    "MODEL.SWIN.EMBED_DIM", "8",
    "MODEL.SWIN.NUM_HEADS", "[1, 2, 2, 2]",
    "MODEL.MASK_FORMER.TRAIN_NUM_POINTS", "64",
    "SOLVER.IMS_PER_BATCH", "2",
    "SOLVER.WARMUP_ITERS", "0",
    "TEST.EVAL_PERIOD", "0",
    "DATASETS.TEST", "()",
]  # fmt: skip

FULL = ["--config", "joint_cityscapes.yaml"]
EVALUATE_COCO = ["--eval-only", "MODEL.WEIGHTS", "gone.pth", "DATASETS.TEST", "('coco_2017_val',)"]


@pytest.fixture(scope="module")
def datasets_root(tmp_path_factory):
    """Cityscapes' tree with three 64x128 images per split; sky above road, and a car."""
    root = tmp_path_factory.mktemp("datasets")
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        images = root / "cityscapes/leftImg8bit" / split / "town"
        labels = root / "cityscapes/gtFine" / split / "town"
        images.mkdir(parents=True)
        labels.mkdir(parents=True)
        for i in range(3):
            label = np.full((64, 128), 10, np.uint8)
            label[30 + i :] = 0
            label[36:48, 20 + 10 * i : 50 + 10 * i] = 13
            color = np.zeros((256, 3), np.uint8)
            color[[0, 10, 13]] = [90, 90, 90], [120, 170, 220], [200, 30, 30]
            image = color[label] + rng.integers(0, 20, (64, 128, 3)).astype(np.uint8)
            name = f"town_{i:06d}_000019"
            Image.fromarray(image).save(images / f"{name}_leftImg8bit.png")
            for kind in ("labelIds", "labelTrainIds", "instanceIds"):
                Image.fromarray(label).save(labels / f"{name}_gtFine_{kind}.png")
            (labels / f"{name}_gtFine_polygons.json").write_text(
                json.dumps({"imgHeight": 64, "imgWidth": 128, "objects": []})
            )
    return root


def command(*args):
    return [sys.executable, str(ROOT / "tools/train_net.py"), *map(str, args)]


def environment(root):
    return {
        **os.environ,
        "DETECTRON2_DATASETS": str(root),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": python_path(),
    }


def run(root, *args):
    return subprocess.run(
        command(*args), env=environment(root), cwd=root, capture_output=True, text=True, timeout=300
    )


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("train_net", ROOT / "tools/train_net.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run_here(tool, datasets_root, monkeypatch):
    """Calls main() in this process, with the tree registered under names of its own."""
    for split in ("train", "val"):
        folders = [datasets_root / "cityscapes" / d / split for d in ("leftImg8bit", "gtFine")]
        name = f"train_net_test_{split}"
        DatasetCatalog.register(
            name, functools.partial(load_cityscapes_semantic, *map(str, folders))
        )
        MetadataCatalog.get(name).set(
            evaluator_type="cityscapes_sem_seg",
            ignore_label=255,
            stuff_classes=MetadataCatalog.get("cityscapes_fine_sem_seg_val").stuff_classes,
        )

    def call(*args):
        monkeypatch.setattr(sys, "argv", ["train_net.py", *map(str, args)])
        tool.main()

    yield call
    for split in ("train", "val"):
        DatasetCatalog.remove(f"train_net_test_{split}")
        MetadataCatalog.remove(f"train_net_test_{split}")


def test_train_evaluate_and_resume(run_here, tmp_path):
    out = tmp_path / "run"
    args = ["--config", "quick/joint_cityscapes.yaml"]
    opts = [*SMALL, "OUTPUT_DIR", out, "DATASETS.TRAIN", "('train_net_test_train',)"]
    run_here(*args, *opts, "SOLVER.MAX_ITER", 2, "DATASETS.TEST", "('train_net_test_val',)")
    assert {p.name for p in out.iterdir()} >= {
        "config.yaml", "log.txt", "metrics.json", "model_final.pth", "last_checkpoint",
    }  # fmt: skip
    rows = [json.loads(row) for row in (out / "metrics.json").read_text().splitlines()]
    assert any("loss_recon" in row for row in rows)
    assert any("sem_seg/mIoU" in row for row in rows)

    with pytest.raises(UserError, match="--resume"):
        run_here(*args, *opts, "SOLVER.MAX_ITER", 3)
    resume = [*args, "--resume", *opts, "SOLVER.MAX_ITER", 2]
    evaluated = ["DATASETS.TEST", "('train_net_test_val',)"]
    run_here(*resume, *evaluated, "DATALOADER.NUM_WORKERS", 1, "SOLVER.CHECKPOINT_PERIOD", 1)
    state = torch.load(out / "model_final.pth", weights_only=False)
    assert state["iteration"] == 1

    # Evaluation alone gives the same number, and wants weights that fit.
    evaluate = [*args, "--eval-only", *opts, "DATASETS.TEST", "('train_net_test_val',)"]
    weights = ["MODEL.WEIGHTS", out / "model_final.pth"]
    run_here(*evaluate, *weights)
    with pytest.raises(UserError, match="val has 19 classes, but the model 20 classes"):
        run_here(*evaluate, *weights, "MODEL.SEM_SEG_HEAD.NUM_CLASSES", 20)


def test_a_training_does_not_go_on_with_fewer_images(run_here, datasets_root, tmp_path):
    args = ["--config", "quick/joint_cityscapes.yaml", *SMALL, "OUTPUT_DIR", tmp_path / "run"]
    args += ["DATASETS.TRAIN", "('train_net_test_train',)", "SOLVER.MAX_ITER", 1]
    args += ["DATALOADER.NUM_WORKERS", 0]
    run_here(*args)
    image = datasets_root / "cityscapes/leftImg8bit/train/town/town_000001_000019_leftImg8bit.png"
    image.rename(tmp_path / "away.png")
    try:
        with pytest.raises(UserError) as error:
            run_here("--resume", *args)
    finally:
        (tmp_path / "away.png").rename(image)
    assert str(error.value).startswith(
        "data set train_net_test_train has 2 images, the run began with 3; restore it, or "
    )
    run_here("--resume", *args)
    (tmp_path / "run/training_data.json").unlink()  # of an earlier version
    run_here("--resume", *args)


def test_what_became_of_every_weight_is_printed_and_results_are_verified(
    run_here, tmp_path, monkeypatch, capsys
):
    """TEST.EXPECTED_RESULTS decides the exit code, for CI of trained models."""
    out = tmp_path / "run"
    args = ["--config", "quick/joint_cityscapes.yaml"]
    opts = [*SMALL, "DATASETS.TRAIN", "('train_net_test_train',)", "SOLVER.MAX_ITER", 1]
    run_here(*args, *opts, "OUTPUT_DIR", out)
    capsys.readouterr()
    monkeypatch.setattr(
        JointTrainer, "test", lambda cfg, model: {"sem_seg": {"mIoU": 42.0, "fwIoU": 50.0}}
    )
    evaluate = [*args, "--eval-only", *opts, "OUTPUT_DIR", tmp_path / "eval"]
    evaluate += ["MODEL.WEIGHTS", out / "model_final.pth", "TEST.EXPECTED_RESULTS"]
    run_here(*evaluate, "[['sem_seg', 'mIoU', 41.5, 1.0]]")
    shown = capsys.readouterr().out
    assert "weights from" in shown
    assert re.search(r"recon_head.predictor +\d+", shown)
    with pytest.raises(SystemExit) as error:
        run_here(*evaluate, "[['sem_seg', 'mIoU', 45.0, 1.0]]")
    assert error.value.code == 1


def test_training_starts_from_other_classes_and_g_from_h_by_keys(run_here, tmp_path, capsys):
    args = ["--config", "quick/joint_cityscapes.yaml"]
    opts = [*SMALL, "DATASETS.TRAIN", "('train_net_test_train',)", "SOLVER.MAX_ITER", 1]
    run_here(*args, *opts, "OUTPUT_DIR", tmp_path / "first")
    content = torch.load(tmp_path / "first/model_final.pth", weights_only=False)["model"]
    start = tmp_path / "start.pth"
    torch.save({"model": {k: v for k, v in content.items() if "recon_head" not in k}}, start)
    capsys.readouterr()
    again = [*opts, "MODEL.WEIGHTS", start, "MODEL.SEM_SEG_HEAD.NUM_CLASSES", 25]
    with pytest.raises(UserError, match="train has 19 classes, but the model 25 classes"):
        run_here(*args, *again, "OUTPUT_DIR", tmp_path / "second")
    metadata = MetadataCatalog.pop("train_net_test_train").as_dict()
    metadata["stuff_classes"] = [str(k) for k in range(25)]
    MetadataCatalog.get("train_net_test_train").set(**metadata)
    with pytest.raises(UserError, match=r"are of 19 classes, the model of 25.*TTT\.NEW_CLASSES"):
        run_here(*args, *again, "OUTPUT_DIR", tmp_path / "second")
    keys = ["TTT.NEW_CLASSES", True, "TTT.RECON.INIT_FROM_MAIN", True]
    run_here(*args, *again, *keys, "OUTPUT_DIR", tmp_path / "third")
    shown = capsys.readouterr().out
    assert "mismatched  sem_seg_head.predictor.class_embed.weight: (20, 64)" in shown
    row = re.search(r"^recon_head.pixel_decoder +(.+)$", shown, re.MULTILINE)[1].split()
    assert int(row[2]) > 50  # copied from h


@pytest.mark.slow
def test_evaluation_refuses_what_it_cannot_read_as_it_is_meant(run_here, datasets_root, tmp_path):
    """Images are read in a process of their own, label maps in this one."""
    args = ["--config", "quick/joint_cityscapes.yaml"]
    opts = [*SMALL, "DATASETS.TRAIN", "('train_net_test_train',)", "SOLVER.MAX_ITER", 1]
    run_here(*args, *opts, "OUTPUT_DIR", tmp_path / "run")
    evaluate = [*args, "--eval-only", *opts, "DATASETS.TEST", "('train_net_test_val',)"]
    evaluate += ["DATALOADER.NUM_WORKERS", 1, "OUTPUT_DIR", tmp_path / "run"]
    evaluate += ["MODEL.WEIGHTS", tmp_path / "run/model_final.pth"]
    folder = datasets_root / "cityscapes"
    label = folder / "gtFine/val/town/town_000001_000019_gtFine_labelTrainIds.png"
    image = folder / "leftImg8bit/val/town/town_000001_000019_leftImg8bit.png"
    labels = np.array(Image.open(label))
    for file, content, said in (
        (label, labels + np.uint8(12), f"{label} has label 22, but its data set has classes 0 to"),
        (label, labels.astype(np.uint16), "it is 16-bit gray"),
        (image, None, f"frame {image} cannot be read"),
    ):
        whole = file.read_bytes()
        if content is None:
            file.write_bytes(whole[:100])
        else:
            Image.fromarray(content).save(file)
        with pytest.raises(UserError, match=said) as error:
            run_here(*evaluate)
        file.write_bytes(whole)
        assert "\n" not in str(error.value)


def test_several_machines_are_detectron2s_flags(tool, monkeypatch, tmp_path):
    seen = {}
    launch = lambda run, gpus, **options: seen.update(options, gpus=gpus)  # noqa: E731
    monkeypatch.setattr("detectron2.engine.launch", launch)
    flags = "--num-gpus 8 --num-machines 2 --machine-rank 1 --dist-url tcp://10.0.0.1:29500"
    monkeypatch.setattr(
        sys, "argv",
        ["train_net.py", "--config", "joint_cityscapes.yaml", *flags.split(),
         "MODEL.WEIGHTS", "swin_s.pkl", "OUTPUT_DIR", str(tmp_path), "MODEL.DEVICE", "cpu"],
    )  # fmt: skip
    tool.main()
    options = ("gpus", "num_machines", "machine_rank", "dist_url")
    assert [seen[name] for name in options] == [8, 2, 1, "tcp://10.0.0.1:29500"]


@pytest.mark.parametrize("config", ["joint_cityscapes.yaml", "quick/joint_world.yaml"])
@pytest.mark.parametrize("flag", [False, True])
def test_training_from_random_weights_is_said_by_flag_or_config(
    tool, monkeypatch, tmp_path, config, flag
):
    seen = []
    launch = lambda run, gpus, args, **options: seen.append(args[1])  # noqa: E731
    monkeypatch.setattr("detectron2.engine.launch", launch)
    argv = ["train_net.py", "--config", config, *(["--from-scratch"] if flag else [])]
    monkeypatch.setattr(sys, "argv", [*argv, "OUTPUT_DIR", str(tmp_path)])
    if not flag and config == "joint_cityscapes.yaml":
        with pytest.raises(UserError, match=r"MODEL\.WEIGHTS is empty"):
            tool.main()
        assert list(tmp_path.iterdir()) == []
        return
    tool.main()
    assert seen[0].SOLVER.FROM_SCRATCH
    assert seen[0].MODEL.WEIGHTS == ""


def test_the_terminal_gets_no_wall_of_config(run_here, tmp_path, capsys):
    opts = [*SMALL, "DATASETS.TRAIN", "('train_net_test_train',)", "SOLVER.MAX_ITER", 1]
    run_here("--config", "quick/joint_cityscapes.yaml", *opts, "OUTPUT_DIR", tmp_path)
    shown = capsys.readouterr().out.splitlines()
    assert any("Training from iteration 0 to 1" in line for line in shown)
    assert len(shown) < 40
    kept = (tmp_path / "log.txt").read_text()
    for text in ("TRAIN_NUM_POINTS: 64", "Environment:", "MaskFormerTTT(", "Training from"):
        assert text in kept
        assert text == "Training from" or not any(text in line for line in shown)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ([], "--config"),
        (["--config", "no_such.yaml"], "joint_cityscapes.yaml"),
        (["--config", "quick/joint_cityscapes.yaml", "NO.SUCH_KEY", "1"], "NO.SUCH_KEY"),
        (["--config", "quick/joint_world.yaml", "--eval-only"], "MODEL.WEIGHTS"),
        (["--config", "quick/joint_world.yaml", "--eval-only", "--resume"], "nothing to evaluate"),
        ([*FULL], "MODEL.WEIGHTS is empty; add MODEL.WEIGHTS FILE at the end, Mask2Former's"),
        ([*FULL], "or add --from-scratch"),
        ([*FULL, "--resume"], "MODEL.WEIGHTS is empty"),
        (["--config", "quick/joint_world.yaml", "SOLVER.FROM_SCRATCH", "False"], "is empty"),
        ([*FULL, "--from-scratch", "MODEL.WEIGHTS", "a.pkl"], "exclude each other"),
        ([*FULL, "SEED", "1", "--num-gpus", "2"], "--num-gpus stands among the KEY VALUE"),
        ([*FULL, "SEED", "1", "--from-scratch"], "--from-scratch stands among the KEY VALUE"),
        (["--config", "quick/joint_world.yaml", "SOLVER.AMP.PRECISION", "fp8"], "'fp8'"),
        (["--config", "quick/joint_world.yaml", "DATASETS.TRAIN", "('nothing',)"], "nothing"),
        (["--config", "quick/joint_world.yaml", *EVALUATE_COCO], "coco_2017_val of DATASETS.TEST"),
        (["--config", "quick/joint_world.yaml", "--num-gpus", "0"], "--num-gpus is 0"),
        (["--config", "quick/joint_world.yaml", "--num-machines", "0"], "--num-machines 0"),
        (["--config", "quick/joint_world.yaml", "--machine-rank", "1"], "--machine-rank is 1"),
        (["--config", "quick/joint_world.yaml", "MODEL.DEVICE", "gpu"], "MODEL.DEVICE is 'gpu'"),
    ],
)
def test_mistakes_are_one_clear_line(run_here, tmp_path, args, words):
    opts = ["OUTPUT_DIR", tmp_path / "run"] if args else []
    with pytest.raises(UserError, match=re.escape(words)) as error:
        run_here(*args, *opts)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("below", ["", "deeper"])
def test_an_output_folder_that_cannot_be_made_is_one_line(run_here, tmp_path, below):
    (tmp_path / "file").touch()
    folder = tmp_path / "file" / below
    with pytest.raises(UserError, match=f"OUTPUT_DIR {folder} cannot be made"):
        run_here("--config", "quick/joint_world.yaml", "OUTPUT_DIR", folder)


@pytest.mark.slow
def test_missing_data_set_ends_with_exit_code_2(tmp_path):
    done = run(tmp_path, "--config", "quick/joint_coco_instance.yaml", "OUTPUT_DIR", tmp_path)
    assert done.returncode == 2
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert "DETECTRON2_DATASETS" in last


def test_mistakes_of_other_processes_are_one_clear_line(run_here, monkeypatch, tmp_path):
    """What torch makes of an exception of a process that it started."""
    mistake = UserError("the labels are wrong; mend them")
    text = "".join(traceback.format_exception(mistake))

    def launch(*args, **options):
        raise ProcessRaisedException(f"\n\n-- Process 1 terminated:\n{text}", 1, 1)

    monkeypatch.setattr("detectron2.engine.launch", launch)
    args = ["--num-gpus", 2, "--config", "quick/joint_world.yaml", "OUTPUT_DIR", tmp_path]
    with pytest.raises(UserError) as error:
        run_here(*args)
    assert str(error.value) == str(mistake)
    text = text.replace("UserError", "OtherError")
    with pytest.raises(ProcessRaisedException):
        run_here(*args)


@pytest.mark.slow
def test_mistakes_of_two_processes_end_with_exit_code_2(datasets_root, tmp_path):
    """Of the second one's mapper, which runs in a loading process of its own."""
    done = run(
        datasets_root, "--config", "quick/joint_cityscapes.yaml", "--num-gpus", 2,
        "--dist-url", "auto", *SMALL, "OUTPUT_DIR", tmp_path, "SOLVER.MAX_ITER", 2,
        "INPUT.DATASET_MAPPER_NAME", "mask_former_panoptic", "DATALOADER.NUM_WORKERS", 1,
        "INPUT.CROP.SINGLE_CATEGORY_MAX_AREA", 1.0,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert "the panoptic task needs 'pan_seg_file_name'" in last
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_kill_9_and_resume_give_the_numbers_of_an_uninterrupted_run(datasets_root, tmp_path):
    args = ["--config", "quick/joint_cityscapes.yaml"]
    opts = [*SMALL, "SOLVER.MAX_ITER", 40, "SOLVER.CHECKPOINT_PERIOD", 4]
    whole = run(datasets_root, *args, *opts, "OUTPUT_DIR", tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr

    out = tmp_path / "killed"
    process = subprocess.Popen(
        command(*args, *opts, "OUTPUT_DIR", out),
        env=environment(datasets_root),
        cwd=datasets_root,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while not (out / "last_checkpoint").is_file():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (out / "model_final.pth").is_file()
    resumed = run(datasets_root, *args, "--resume", *opts, "OUTPUT_DIR", out)
    assert resumed.returncode == 0, resumed.stderr
    expected, actual = (
        torch.load(folder / "model_final.pth", weights_only=False)["model"]
        for folder in (tmp_path / "whole", out)
    )
    assert expected.keys() == actual.keys()
    assert all(torch.equal(expected[name], actual[name]) for name in expected)


@pytest.mark.slow
def test_two_processes_on_the_cpu(datasets_root, tmp_path):
    done = run(
        datasets_root, "--config", "quick/joint_cityscapes.yaml", "--num-gpus", 2,
        "--dist-url", "auto", *SMALL, "OUTPUT_DIR", tmp_path, "SOLVER.MAX_ITER", 2,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "model_final.pth").is_file()
    assert (tmp_path / "log.txt.rank1").is_file()
