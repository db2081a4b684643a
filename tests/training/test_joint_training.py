"""The joint trainer on four small images."""

from __future__ import annotations

import json
import re
import resource
import sys
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.engine import HookBase
from detectron2.utils.events import EventStorage
from PIL import Image

from ttt_video.config import load_config
from ttt_video.data import register_custom_coco_video
from ttt_video.errors import UserError
from ttt_video.modeling.checkpointer import TTTCheckpointer
from ttt_video.modeling.weights import read_checkpoint, write_checkpoint
from ttt_video.shipped import config_dir
from ttt_video.stream import load_source_model
from ttt_video.tasks import SemanticTask
from ttt_video.training.hooks import KeepBest, ReconstructionPictures
from ttt_video.training.joint_training import (
    JointTrainer,
    amp_dtype,
    check_results,
    headline_metric,
    load_records,
)

DATASET = "joint_training_test_sem_seg"
SMALLEST = [
    "MODEL.DEVICE", "cpu",
    "MODEL.SWIN.EMBED_DIM", 8,
    "MODEL.SWIN.DEPTHS", [1, 1, 1, 1],
    "MODEL.SWIN.NUM_HEADS", [1, 2, 2, 2],
    "MODEL.SEM_SEG_HEAD.CONVS_DIM", 32,
    "MODEL.SEM_SEG_HEAD.MASK_DIM", 32,
    "MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS", 1,
    "MODEL.SEM_SEG_HEAD.DEFORMABLE_TRANSFORMER_ENCODER_DIM_FEEDFORWARD", 32,
    "MODEL.MASK_FORMER.HIDDEN_DIM", 32,
    "MODEL.MASK_FORMER.DIM_FEEDFORWARD", 32,
    "MODEL.MASK_FORMER.NUM_OBJECT_QUERIES", 6,
    "MODEL.MASK_FORMER.DEC_LAYERS", 2,
    "MODEL.MASK_FORMER.TRAIN_NUM_POINTS", 64,
    "SOLVER.IMS_PER_BATCH", 2,
    "TEST.EVAL_PERIOD", 0,
]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def dataset(tmp_path_factory):
    """Four 32x64 images of two coloured halves, labelled 0 and 2."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    records = []
    for i in range(4):
        split = 16 + 8 * i
        labels = np.where(np.arange(64) < split, 0, 2)[None].repeat(32, 0).astype(np.uint8)
        colors = np.array([[200, 40, 40], [0, 0, 0], [30, 60, 220]], np.uint8)[labels]
        image = (colors + rng.integers(0, 20, colors.shape)).astype(np.uint8)
        Image.fromarray(image).save(folder / f"{i}.png")
        Image.fromarray(labels).save(folder / f"{i}_labels.png")
        records.append(
            {
                "file_name": str(folder / f"{i}.png"),
                "sem_seg_file_name": str(folder / f"{i}_labels.png"),
                "height": 32,
                "width": 64,
                "image_id": str(i),
            }
        )
    DatasetCatalog.register(DATASET, lambda: records)
    MetadataCatalog.get(DATASET).set(
        stuff_classes=["a", "b", "c"], ignore_label=255, evaluator_type="sem_seg"
    )
    yield
    DatasetCatalog.remove(DATASET)
    MetadataCatalog.remove(DATASET)


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make_cfg(output_dir, *opts):
    cfg = load_config(
        "quick/joint_world.yaml",
        opts=[str(x) for x in SMALLEST]
        + ["DATASETS.TRAIN", f"('{DATASET}',)", "DATASETS.TEST", "()"]
        + ["MODEL.SEM_SEG_HEAD.NUM_CLASSES", "3", "OUTPUT_DIR", str(output_dir)]
        + [str(x) for x in opts],
    )
    cfg.freeze()
    return cfg


def train(cfg, resume=False, *hooks):
    trainer = JointTrainer(cfg)
    trainer.resume_or_load(resume)
    trainer.register_hooks(hooks)
    trainer.train()
    return trainer


@pytest.mark.slow
def test_every_loss_falls_and_segmentation_improves(tmp_path):
    cfg = make_cfg(
        tmp_path, "SOLVER.MAX_ITER", 40, "SOLVER.IMS_PER_BATCH", 4, "SOLVER.BASE_LR", 0.003,
        "SOLVER.WARMUP_ITERS", 0, "SOLVER.CLIP_GRADIENTS.CLIP_VALUE", 1.0,
        "DATASETS.TEST", f"('{DATASET}',)",
    )  # fmt: skip
    seen = []

    class Record(HookBase):
        def after_step(self):
            latest = self.trainer.storage.latest()
            seen.append({k: v for k, (v, _) in latest.items() if "loss" in k})

    trainer = train(cfg, False, Record())
    assert {"loss_ce", "loss_mask", "loss_dice", "loss_recon", "loss_ce_0"} <= seen[0].keys()

    def mean(rows, name):
        return np.mean([row[name] for row in rows])

    for name in ("total_loss", "loss_dice", "loss_recon"):
        assert mean(seen[-5:], name) < 0.8 * mean(seen[:5], name), name
    assert trainer._last_eval_results["sem_seg"]["mIoU"] > 60  # two of three classes occur


class Kill(HookBase):
    def __init__(self, step):
        self.step = step

    def before_step(self):
        """Ends the training as an error does, after which detectron2 runs ``after_train``."""
        if self.trainer.iter == self.step:
            raise RuntimeError("killed")


def test_resumed_run_equals_uninterrupted_one_bit_for_bit(tmp_path):
    opts = ("SOLVER.MAX_ITER", 6, "SOLVER.CHECKPOINT_PERIOD", 2, "MODEL.SWIN.DROP_PATH_RATE", 0.2)
    whole = train(make_cfg(tmp_path / "whole", *opts))
    cfg = make_cfg(tmp_path / "parts", *opts, "DATALOADER.NUM_WORKERS", 1)
    with pytest.raises(RuntimeError, match="killed"):
        train(cfg, False, Kill(5))  # after the checkpoint of step 4, in the middle of an epoch
    np.random.seed(99)  # noqa: NPY002
    torch.manual_seed(99)
    resumed = train(cfg, True)
    assert resumed.start_iter == 4

    expected, actual = whole.model.state_dict(), resumed.model.state_dict()
    assert expected.keys() == actual.keys()
    for name, value in expected.items():
        assert torch.equal(value, actual[name]), name
    rates = [g["lr"] for g in whole.optimizer.param_groups]
    assert rates == [g["lr"] for g in resumed.optimizer.param_groups]
    assert rates[0] < 0.001


def test_a_finished_run_that_is_resumed_is_scored_at_its_own_length(tmp_path):
    """A run may be killed between its last step and its last evaluation."""
    cfg = make_cfg(tmp_path, "SOLVER.MAX_ITER", 2, "DATASETS.TEST", f"('{DATASET}',)")
    for resume in (False, True):
        assert train(cfg, resume).iter == 2
    rows = [json.loads(row) for row in (tmp_path / "metrics.json").read_text().splitlines()]
    scores = [(row["iteration"], row["sem_seg/mIoU"]) for row in rows if "sem_seg/mIoU" in row]
    assert len(scores) == 2
    assert scores[0] == scores[1]


@pytest.mark.slow
def test_an_evaluation_is_on_disk_before_the_checkpoint_that_comes_after_it(tmp_path):
    """A run that is killed in between makes the steps again, and lacks no evaluation."""
    cfg = make_cfg(
        tmp_path, "SOLVER.MAX_ITER", 21, "SOLVER.CHECKPOINT_PERIOD", 20, "TEST.EVAL_PERIOD", 20,
        "DATASETS.TEST", f"('{DATASET}',)",
    )  # fmt: skip
    trainer = JointTrainer(cfg)
    trainer.resume_or_load(False)
    saved = trainer.checkpointer.save
    seen = []

    def save(name, **state):
        if name == "model_0000019":
            seen.extend(map(json.loads, (tmp_path / "metrics.json").read_text().splitlines()))
        saved(name, **state)

    trainer.checkpointer.save = save
    trainer.train()
    assert [(row["iteration"], "sem_seg/mIoU" in row) for row in seen] == [(19, True)]


def test_the_seed_decides(tmp_path):
    first, again, other = (
        train(make_cfg(tmp_path / name, "SEED", seed, "SOLVER.MAX_ITER", 1)).model.state_dict()
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    assert all(torch.equal(first[name], again[name]) for name in first)
    name = "sem_seg_head.predictor.query_feat.weight"
    assert not torch.equal(first[name], other[name])


@pytest.mark.parametrize(
    ("mode", "moves", "stays", "losses"),
    [
        ("joint", ("backbone", "sem_seg_head", "recon_head"), (), {"loss_ce", "loss_recon"}),
        ("main_only", ("backbone", "sem_seg_head"), ("recon_head",), {"loss_ce"}),
        # detectron2 records a loss that is the only one as total_loss.
        ("pretrain", ("backbone", "recon_head"), ("sem_seg_head",), set()),
        ("probing", ("sem_seg_head",), ("backbone", "recon_head"), {"loss_ce"}),
    ],
)
def test_joint_modes(tmp_path, mode, moves, stays, losses):
    cfg = make_cfg(
        tmp_path, "TTT.JOINT", mode, "SOLVER.MAX_ITER", 2, "MODEL.SWIN.DROP_PATH_RATE", 0.5,
        "SOLVER.WARMUP_ITERS", 0,
    )  # fmt: skip
    trainer = JointTrainer(cfg)
    before = {k: v.clone() for k, v in trainer.model.state_dict().items()}
    trainer.train()
    after = trainer.model.state_dict()

    def moved(part):
        return any(not torch.equal(before[k], after[k]) for k in before if k.startswith(part + "."))

    assert all(moved(part) for part in moves)
    assert not any(moved(part) for part in stays)
    parameters = dict(trainer.model.named_parameters())
    held = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    for part in stays:  # no stochastic depth on frozen features
        assert not any(module.training for module in getattr(trainer.model, part).modules())
    for name, parameter in parameters.items():
        assert (id(parameter) in held) == name.startswith(tuple(f"{p}." for p in moves))
    # All in the optimizer got a gradient: DistributedDataParallel waits for the others.
    assert all(p.grad is not None for p in parameters.values() if id(p) in held)
    assert trainer.storage.histories().keys() & {"loss_ce", "loss_recon"} == losses


def decoder_of(folder):
    """The decoder g of the model that streaming makes of a run's last weights."""
    return load_source_model(
        make_cfg(folder, "MODEL.WEIGHTS", folder / "model_final.pth")
    ).recon_head


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["main_only", "probing"])
def test_a_decoder_that_nothing_trained_is_not_saved(tmp_path, mode):
    train(make_cfg(tmp_path / "f", "TTT.JOINT", "main_only", "SOLVER.MAX_ITER", 1))
    start = tmp_path / "f" / "model_final.pth"
    opts = ["TTT.JOINT", mode, "SOLVER.CHECKPOINT_PERIOD", 2, "MODEL.WEIGHTS", start]
    opts += ["DATASETS.TEST", f"('{DATASET}',)", "TEST.EVAL_PERIOD", 4]
    whole = make_cfg(tmp_path / "whole", *opts, "SOLVER.MAX_ITER", 4)
    train(whole)
    parts = make_cfg(tmp_path / "parts", *opts, "SOLVER.MAX_ITER", 4)
    with pytest.raises(RuntimeError, match="killed"):
        train(parts, False, Kill(3))
    train(parts, True)
    for name in ("model_best.pth", "model_final.pth"):
        expected, actual = (read_checkpoint(tmp_path / f / name) for f in ("whole", "parts"))
        assert not any(key.startswith("recon_head.") for key in actual)
        assert expected.keys() == actual.keys()
        assert all(torch.equal(expected[key], actual[key]) for key in expected)
    assert decoder_of(tmp_path / "parts") is None


def test_probing_keeps_the_decoder_of_the_given_encoder(tmp_path):
    train(make_cfg(tmp_path / "f", "SOLVER.MAX_ITER", 1))
    start = tmp_path / "f" / "model_final.pth"
    opts = ["TTT.JOINT", "probing", "SOLVER.MAX_ITER", 2, "SOLVER.CHECKPOINT_PERIOD", 1]
    cfg = make_cfg(tmp_path / "h", *opts, "MODEL.WEIGHTS", start)
    with pytest.raises(RuntimeError, match="killed"):
        train(cfg, False, Kill(1))
    train(make_cfg(tmp_path / "h", *opts), True)  # what is resumed needs no other weights
    given, probed = read_checkpoint(start), read_checkpoint(tmp_path / "h" / "model_final.pth")
    assert given.keys() == probed.keys()
    for name, value in given.items():
        moved = not torch.equal(value, probed[name])
        assert not (moved and name.startswith(("backbone.", "recon_head."))), name
    assert decoder_of(tmp_path / "h") is not None


@pytest.mark.slow
def test_probing_wants_an_encoder(tmp_path):
    opts = ["TTT.JOINT", "probing", "SOLVER.MAX_ITER", 1]
    with pytest.raises(UserError, match=r"features of a given f, but MODEL\.WEIGHTS is empty"):
        train(make_cfg(tmp_path / "nothing", *opts))
    train(make_cfg(tmp_path / "f", "SOLVER.MAX_ITER", 1))
    weights = read_checkpoint(tmp_path / "f" / "model_final.pth")
    heads = tmp_path / "heads.pth"
    write_checkpoint({k: v for k, v in weights.items() if "backbone" not in k}, heads)
    with pytest.raises(UserError, match=r"heads\.pth lacks weights of f"):
        train(make_cfg(tmp_path / "h", *opts, "MODEL.WEIGHTS", heads))
    # ImageNet's: three channels, no norms of the outputs, no heads. Nothing of f is random.
    encoder = {k: v for k, v in weights.items() if "backbone.norm" not in k}
    encoder = {k: v for k, v in encoder.items() if k.startswith("backbone.")}
    encoder["backbone.patch_embed.proj.weight"] = weights["backbone.patch_embed.proj.weight"][:, :3]
    assert len(encoder) < sum(k.startswith("backbone.") for k in weights)
    write_checkpoint(encoder, tmp_path / "imagenet.pth")
    train(make_cfg(tmp_path / "i", *opts, "MODEL.WEIGHTS", tmp_path / "imagenet.pth"))
    probed = read_checkpoint(tmp_path / "i" / "model_final.pth")
    assert not probed["backbone.patch_embed.proj.weight"][:, 3:].any()


def test_mixed_precision_on_the_cpu_is_bfloat16(tmp_path):
    assert amp_dtype(torch.device("cpu")) == torch.bfloat16
    cfg = make_cfg(tmp_path, "SOLVER.AMP.ENABLED", True, "SOLVER.MAX_ITER", 1)
    trainer = train(cfg)
    assert np.isfinite(trainer.storage.latest()["total_loss"][0])
    assert all(p.dtype == torch.float32 for p in trainer.model.parameters())


def test_pictures_reach_the_event_storage(tmp_path):
    trainer = JointTrainer(make_cfg(tmp_path, "TEST.EVAL_PERIOD", 2))
    (hook,) = (h for h in trainer._hooks if isinstance(h, ReconstructionPictures))
    state = torch.random.get_rng_state()
    with EventStorage() as trainer.storage:
        hook.draw()
        (name, first, _), *others = trainer.storage._vis_data
        trainer.storage.clear_images()
        hook.draw()
        again = trainer.storage._vis_data[0][1]
    assert name == "reconstruction/0"
    assert len(others) == 3
    assert first.shape == (3, 32, 3 * 64)
    assert first.dtype == torch.uint8
    assert torch.equal(first, again)  # the same masks
    assert torch.equal(first[:, :, :64], hook.inputs[0]["image"])
    assert (first[:, :, 64:128] == 0).float().mean() > 0.5  # 80 % of the patches are hidden
    assert trainer.model.training
    assert torch.equal(state, torch.random.get_rng_state())


def test_best_weights_are_kept_over_a_resume(tmp_path):
    model = torch.nn.Linear(1, 1)

    class Trainer:
        start_iter = 0

    def run(scores, start, direction=1):
        hook = KeepBest(TTTCheckpointer(model, str(tmp_path)), "sem_seg/mIoU", direction)
        hook.trainer = Trainer()
        hook.trainer.start_iter = start
        with EventStorage(start) as hook.trainer.storage:
            hook.before_train()
            for i, score in enumerate(scores, start):
                hook.trainer.storage.iter = i
                if score is not None:
                    hook.trainer.storage.put_scalar("sem_seg/mIoU", score)
                    torch.nn.init.constant_(model.weight, score)
                hook.after_step()

    def kept():
        weights = torch.load(tmp_path / "model_best.pth", weights_only=True)
        record = json.loads((tmp_path / "model_best.json").read_text())
        return weights["model"]["weight"].item(), record["value"], record["iteration"]

    run([None, 10.0, None, 30.0, 20.0, float("nan")], 0)
    assert kept() == (30.0, 30.0, 3)
    run([25.0], 6)
    assert kept() == (30.0, 30.0, 3)
    run([35.0], 7)
    assert kept() == (35.0, 35.0, 7)
    run([5.0], 0)  # a new run
    assert kept() == (5.0, 5.0, 0)
    run([float("nan"), 7.0, 3.0, 4.0], 0, direction=-1)
    assert kept() == (3.0, 3.0, 2)
    run([3.5, 2.0], 4, direction=-1)
    assert kept() == (2.0, 2.0, 5)


def test_the_best_is_that_in_the_direction_of_the_data_sets_metric(tmp_path, monkeypatch):
    opts = ("DATASETS.TEST", f"('{DATASET}',)", "TEST.EVAL_PERIOD", 1)
    monkeypatch.setattr(SemanticTask.metrics["mIoU"], "higher_is_better", False)
    hooks = JointTrainer(make_cfg(tmp_path, *opts))._hooks
    assert [hook.direction for hook in hooks if isinstance(hook, KeepBest)] == [-1]


@pytest.mark.parametrize("content", ["", "{", "[1]", "{}", '{"value": "high"}', '{"value": NaN}'])
def test_a_damaged_record_of_the_best_is_said(tmp_path, content):
    (tmp_path / "model_best.json").write_text(content)
    hook = KeepBest(TTTCheckpointer(torch.nn.Linear(1, 1), str(tmp_path)), "sem_seg/mIoU")
    hook.trainer = SimpleNamespace(start_iter=3)
    with pytest.raises(UserError, match=r"model_best\.json .*; delete it") as error:
        hook.before_train()
    assert "\n" not in str(error.value)


class Spoil(HookBase):
    """Makes the weights infinite before a step."""

    def __init__(self, step):
        self.step = step

    def before_step(self):
        if self.trainer.iter == self.step:
            with torch.no_grad():
                self.trainer.model.sem_seg_head.predictor.class_embed.bias.fill_(float("inf"))


@pytest.mark.slow
@pytest.mark.parametrize("last", [False, True])
def test_a_loss_that_is_not_finite_ends_training_in_a_line(tmp_path, caplog, last):
    cfg = make_cfg(tmp_path, "SOLVER.MAX_ITER", 2 if last else 9, "SOLVER.CHECKPOINT_PERIOD", 1)
    with pytest.raises(
        UserError, match=r"loss of iteration 1 is not finite \(loss_ce nan"
    ) as error:
        train(cfg, False, Spoil(1))
    assert re.search(r"loss_recon [\d.]+\)", str(error.value))  # the one that is
    for word in ("SOLVER.BASE_LR", "SOLVER.AMP.ENABLED"):
        assert word in str(error.value)
    assert "\n" not in str(error.value)
    assert "Traceback" not in caplog.text
    # The files that were there are whole, and older than the error.
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000000.pth"
    weights = read_checkpoint(tmp_path / "model_0000000.pth")
    assert all(value.isfinite().all() for value in weights.values())


def test_a_full_disk_ends_training_in_a_line_and_loses_no_checkpoint(tmp_path, caplog):
    """A limit on the size of files stands for the disk: torch meets the same error half way."""
    cfg = make_cfg(tmp_path, "SOLVER.MAX_ITER", 3, "SOLVER.CHECKPOINT_PERIOD", 1)

    class Fill(HookBase):
        def after_step(self):
            if self.trainer.iter == 0:
                resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(UserError, match=r"cannot write .*model_0000001\.pth: ") as error:
            train(cfg, False, Fill())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(error.value)
    assert "Traceback" not in caplog.text
    assert not [path for path in tmp_path.iterdir() if path.suffix == ".part"]
    assert train(cfg, True).start_iter == 1


@pytest.mark.slow
def test_a_full_disk_under_the_metrics_is_a_line_too(tmp_path, monkeypatch):
    """TensorBoard's thread meets it as well, and says nothing of its own."""
    said = []
    monkeypatch.setattr(threading, "excepthook", lambda args: said.append(args.exc_type))
    cfg = make_cfg(tmp_path, "SOLVER.MAX_ITER", 30, "SOLVER.CHECKPOINT_PERIOD", 100)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    class Fill(HookBase):
        def before_train(self):
            resource.setrlimit(resource.RLIMIT_FSIZE, (10, limits[1]))

    try:
        with pytest.raises(UserError, match=r"cannot be written: .*add --resume"):
            train(cfg, False, Fill())
        assert said == []
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_mistakes_are_one_clear_line(tmp_path):
    with pytest.raises(UserError, match=r"coco_2017_trian.*DATASETS\.TRAIN.* coco_2017_train\?"):
        load_records(["coco_2017_trian"], True)
    with pytest.raises(UserError, match=r"DATASETS\.TRAIN is empty"):
        load_records([], True)
    with pytest.raises(UserError, match="DETECTRON2_DATASETS"):
        load_records(["coco_2017_train"], True)
    with pytest.raises(UserError, match="IMS_PER_BATCH"):
        JointTrainer.build_train_loader(make_cfg(tmp_path, "SOLVER.IMS_PER_BATCH", 0))
    MetadataCatalog.get("joint_training_test_other").evaluator_type = "pascal_voc"
    with pytest.raises(UserError, match="pascal_voc"):
        headline_metric(["joint_training_test_other"])


@pytest.mark.parametrize("count", [0, -1])
def test_a_training_without_iterations_is_a_line(tmp_path, count):
    with pytest.raises(UserError, match=rf"SOLVER\.MAX_ITER is {count}; .*--eval-only"):
        JointTrainer(make_cfg(tmp_path, "SOLVER.MAX_ITER", count))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("coco_2017_val", "DETECTRON2_DATASETS"),
        ("coco_2017_val_panoptic", "DETECTRON2_DATASETS"),
        ("cityscapes_fine_sem_seg_val", "DETECTRON2_DATASETS"),
        ("cityscapes_fine_sem_seg_vall", "did you mean cityscapes_fine_sem_seg_val"),
    ],
)
def test_what_cannot_be_evaluated_is_said_before_training(tmp_path, monkeypatch, name, said):
    monkeypatch.chdir(tmp_path)
    cfg = make_cfg(tmp_path / "run", "DATASETS.TEST", f"('{name}',)")
    with pytest.raises(UserError, match=rf"{name}.* DATASETS\.TEST.*{said}") as error:
        JointTrainer(cfg)
    assert "\n" not in str(error.value)


def test_evaluation_wants_labels_for_every_image(tmp_path, monkeypatch):
    first, *others = DatasetCatalog.get(DATASET)
    first = {k: v for k, v in first.items() if k != "sem_seg_file_name"}
    monkeypatch.setattr(DatasetCatalog, "get", lambda name: [first, *others])
    with pytest.raises(UserError, match=r"without 'sem_seg_file_name'; .*labelled_only=True"):
        JointTrainer.check_evaluation(make_cfg(tmp_path, "DATASETS.TEST", f"('{DATASET}',)"))


@pytest.fixture
def own_objects(tmp_path):
    """Registers a json of COCO's, after a change; there is a frame that it does not list."""
    names = []

    def register(change, by=register_coco_instances, **options):
        name = f"joint_training_test_objects_{len(names)}"
        names.append(name)
        for n in range(3):
            Image.fromarray(np.zeros((32, 64, 3), np.uint8)).save(tmp_path / f"{n}.png")
        content = {
            "images": [
                {"id": n, "file_name": f"{n}.png", "height": 32, "width": 64} for n in range(2)
            ],
            "annotations": [
                {
                    "id": n,
                    "image_id": n,
                    "category_id": 1,
                    "iscrowd": 0,
                    "area": 100,
                    "bbox": [0, 0, 10, 10],
                    "segmentation": [[0, 0, 10, 0, 10, 10]],
                }
                for n in range(2)
            ],
            "categories": [{"id": 1, "name": "a"}],
        }
        change(content)
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
        places = {"json_file": str(tmp_path / f"{name}.json"), "image_root": str(tmp_path)}
        by(name, **places, **options)
        return name

    yield register
    for name in names:
        DatasetCatalog.pop(name, None)
        MetadataCatalog.pop(name, None)


def instance_cfg(folder, name, key="TRAIN"):
    return make_cfg(
        folder, f"DATASETS.{key}", f"('{name}',)", "INPUT.DATASET_MAPPER_NAME", "coco_instance_lsj",
        "INPUT.IMAGE_SIZE", 64, "MODEL.SEM_SEG_HEAD.NUM_CLASSES", 1,
        "MODEL.MASK_FORMER.TEST.INSTANCE_ON", True, "MODEL.MASK_FORMER.TEST.SEMANTIC_ON", False,
    )  # fmt: skip


def first_object(**values):
    return lambda content: content["annotations"][0].update(values)


@pytest.mark.parametrize("shape", [[], None, {"size": [64, 32], "counts": [2048]}])
def test_objects_without_a_proper_mask_are_refused_before_training(tmp_path, own_objects, shape):
    """Also those that detectron2's loader of COCO's json lets pass."""
    name = own_objects(first_object(segmentation=shape), metadata={})
    with pytest.raises(UserError, match=r"/0\.png: object 0 of its annotations has ") as error:
        JointTrainer.build_train_loader(instance_cfg(tmp_path, name))
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=r"json: annotation 0 of image 0 has "):
        JointTrainer.check_evaluation(instance_cfg(tmp_path, name, "TEST"))


@pytest.mark.parametrize("labelled_only", [False, True])
def test_training_on_objects_wants_them_in_every_image(tmp_path, own_objects, labelled_only):
    options = {"by": register_custom_coco_video, "labelled_only": labelled_only}
    name = own_objects(lambda content: None, **options)
    train_cfg, test_cfg = (instance_cfg(tmp_path, name, key) for key in ("TRAIN", "TEST"))
    if labelled_only:
        assert len(JointTrainer.build_train_loader(train_cfg).stream.records) == 2
        JointTrainer.check_evaluation(test_cfg)
        return
    for call in (
        lambda: JointTrainer.build_train_loader(train_cfg),
        lambda: JointTrainer.check_evaluation(test_cfg),
    ):
        with pytest.raises(UserError, match=r"no '?annotations'?; .*labelled_only=True") as error:
            call()
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("key", ["TRAIN", "TEST"])
def test_a_broken_json_is_a_line(tmp_path, own_objects, key):
    name = own_objects(lambda content: None, metadata={})
    (tmp_path / f"{name}.json").write_text("{")
    cfg = instance_cfg(tmp_path, name, key)
    check = JointTrainer.build_train_loader if key == "TRAIN" else JointTrainer.check_evaluation
    with pytest.raises(UserError, match=rf"{name} of DATASETS\.{key} .*check_dataset") as error:
        check(cfg)
    assert "\n" not in str(error.value)


def test_training_sets_of_other_things_are_a_line(tmp_path, own_objects):
    """detectron2 has an error of its own for them."""
    two = [own_objects(lambda content: None, metadata={}) for _ in range(2)]
    cfg = instance_cfg(tmp_path, "', '".join(two))
    other = tmp_path / f"{two[1]}.json"
    other.write_text(other.read_text().replace('"name": "a"', '"name": "b"'))
    with pytest.raises(UserError, match=r"different metadata 'thing_classes'"):
        JointTrainer.build_train_loader(cfg)


@pytest.fixture
def with_classes(dataset):
    """Registers the module's images under other names of classes."""
    names = []

    def register(*classes):
        names.append(f"joint_training_test_classes_{len(names)}")
        DatasetCatalog.register(names[-1], lambda: DatasetCatalog.get(DATASET))
        known = MetadataCatalog.get(DATASET).as_dict()
        known = {k: v for k, v in known.items() if k not in ("name", "stuff_classes")}
        MetadataCatalog.get(names[-1]).set(**known, stuff_classes=list(classes))
        return names[-1]

    yield register
    for name in names:
        DatasetCatalog.pop(name)
        MetadataCatalog.pop(name)


def test_the_same_classes_in_another_order_are_refused(tmp_path, with_classes, caplog):
    roads, other = with_classes("road", "wall", "car"), with_classes("car", "road", "wall")
    same, names = with_classes("road", "wall", "car"), with_classes("Strasse", "wall", "car")
    opts = ("MODEL.SEM_SEG_HEAD.NUM_CLASSES", 3)
    for train, test in (((roads,), (other,)), ((roads, other), ()), ((roads,), (same, other))):
        cfg = make_cfg(tmp_path, *opts, "DATASETS.TRAIN", train, "DATASETS.TEST", test)
        said = rf"class 0 is 'road' in data set {roads}, and 'car' in {other}: .*same order"
        with pytest.raises(UserError, match=said):
            JointTrainer.check_evaluation(cfg)
    pretrain = ("DATASETS.TRAIN", (roads, other), "TTT.JOINT", "pretrain")
    JointTrainer.check_evaluation(make_cfg(tmp_path, *opts, *pretrain))  # it reads no labels
    test = ("DATASETS.TEST", (same, names))
    JointTrainer.check_evaluation(make_cfg(tmp_path, *opts, "DATASETS.TRAIN", (roads,), *test))
    assert f"'Strasse' in {names}, as are 1 of 3 classes" in caplog.text


@pytest.mark.parametrize("key", ["TRAIN", "TEST"])
@pytest.mark.parametrize("field", ["file_name", "sem_seg_file_name"])
def test_a_missing_file_is_said_before_training(tmp_path, monkeypatch, key, field):
    first, *others = DatasetCatalog.get(DATASET)
    gone = str(tmp_path / "gone.png")
    monkeypatch.setattr(DatasetCatalog, "get", lambda name: [{**first, field: gone}, *others])
    cfg = make_cfg(tmp_path, f"DATASETS.{key}", f"('{DATASET}',)")
    check = JointTrainer.build_train_loader if key == "TRAIN" else JointTrainer.check_evaluation
    with pytest.raises(UserError, match=rf"{key}: 1 of 4 files of .* are missing, as {gone}"):
        check(cfg)


@pytest.mark.parametrize(
    ("config", "grey"),
    [("quick/joint_world_color.yaml", "off"), ("quick/joint_world.yaml", "made")],
)
def test_grey_frames_are_for_models_of_colours_alone(config, grey):
    """Also in training, whose evaluation would score colours on frames that have them."""
    cfg = load_config(config, opts=["INPUT.GREY", grey])
    with pytest.raises(UserError, match=f"INPUT.GREY is {grey}"):
        JointTrainer.build_model(cfg)


@pytest.mark.parametrize(
    ("expected", "said"),
    [
        (["sem_seg", "miou", 42.0, 1.0], "sem_seg miou.* did you mean sem_seg mIoU"),
        (["semseg", "mIoU", 42.0, 1.0], "semseg mIoU.* did you mean sem_seg mIoU"),
        (["sem_seg", "mIoU", 42.0], "task, metric, value, tolerance"),
        ("sem_seg", "task, metric, value, tolerance"),
    ],
)
def test_expected_results_that_nothing_has_are_a_line(tmp_path, expected, said):
    cfg = make_cfg(tmp_path, "TEST.EXPECTED_RESULTS", [expected])
    with pytest.raises(UserError, match=said) as error:
        check_results(cfg, {"sem_seg": {"mIoU": 42.0, "fwIoU": 50.0}})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("video", [{}, {"video_id": "a", "frame_index": 0}])
@pytest.mark.parametrize("mapper", ["coco_instance_lsj", "mask_former_instance"])
def test_a_mapper_of_objects_is_refused_for_labels_of_pixels(tmp_path, monkeypatch, mapper, video):
    """It spoke of videos that are labelled in parts."""
    records = [{**record, **video} for record in DatasetCatalog.get(DATASET)]
    monkeypatch.setattr(DatasetCatalog, "get", lambda name: records)
    opts = ["INPUT.DATASET_MAPPER_NAME", mapper, "INPUT.CROP.SINGLE_CATEGORY_MAX_AREA", 1.0]
    with pytest.raises(UserError) as error:
        JointTrainer.build_train_loader(make_cfg(tmp_path, *opts))
    assert str(error.value) == (
        f"{records[0]['file_name']}: the instance task needs 'annotations' in the dataset; choose "
        "another INPUT.DATASET_MAPPER_NAME or data set, or TTT.JOINT pretrain, which needs no "
        "labels"
    )


def test_objects_are_evaluated_as_in_a_stream(tmp_path, own_objects):
    name = own_objects(first_object(area=5000), by=register_custom_coco_video, labelled_only=True)
    cfg = instance_cfg(tmp_path, name, "TEST")
    results = JointTrainer.test(cfg, JointTrainer.build_model(cfg))
    assert set(results["segm"]) == {"AP", "AP50", "AP75", "APs", "APm", "APl", "AP-a"}
    assert results["segm"]["APm"] >= 0  # by the stated area; the mask is of 50 pixels
    assert np.isnan(results["segm"]["APl"])


def test_optional_libraries_are_asked_for_before_training(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(UserError, match=r"COLOR_AUG_SSD needs cv2.*pip install opencv-python-head"):
        JointTrainer(make_cfg(tmp_path, "INPUT.COLOR_AUG_SSD", True))
    monkeypatch.setitem(sys.modules, "panopticapi", None)
    with pytest.raises(UserError, match=r"panopticapi.*pip install --no-deps panopticapi-lit"):
        JointTrainer.build_evaluator(make_cfg(tmp_path), "coco_2017_val_panoptic")


CONFIGS = sorted(
    str(p.relative_to(config_dir()))
    for p in config_dir().rglob("*.yaml")
    if p.parent.name in ("configs", "quick") and not p.name.startswith(("Base-", "methods"))
)


@pytest.mark.slow
@pytest.mark.parametrize("preset", [None, "paper", "release"])
@pytest.mark.parametrize("name", CONFIGS)
def test_shipped_configs_load_with_every_preset(name, preset):
    cfg = load_config(name, preset)
    architecture = "ColorizerTTT" if "color" in name else "MaskFormerTTT"
    if "mae_" in name or "fashion" in name:
        architecture = "ViTMAE"
    assert architecture == cfg.MODEL.META_ARCHITECTURE
    assert (preset or "") == cfg.TTT.PRESET
    head, former = cfg.MODEL.SEM_SEG_HEAD, cfg.MODEL.MASK_FORMER
    assert head.CONVS_DIM % head.DEFORMABLE_TRANSFORMER_ENCODER_N_HEADS == 0
    assert former.HIDDEN_DIM % former.NHEADS == 0
    if name.startswith("quick/"):
        if not former.TEST.PANOPTIC_ON:  # only panoptic models ask a data set for their things
            cfg.DATASETS.TRAIN = ()
        model = JointTrainer.build_model(cfg)
        assert 1e6 < sum(p.numel() for p in model.parameters()) < 2.5e6


def test_full_configs_are_swin_s():
    expected = {"cityscapes": 19, "coco_instance": 80, "coco_panoptic": 133}
    for name, num_classes in expected.items():
        cfg = load_config(f"joint_{name}.yaml")
        assert cfg.MODEL.SWIN.DEPTHS == [2, 2, 18, 2]
        assert cfg.MODEL.SWIN.NUM_HEADS == [3, 6, 12, 24]
        assert num_classes == cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES
        assert cfg.SOLVER.CLIP_GRADIENTS.CLIP_TYPE == "full_model"


def test_presets_hold_only_test_time_keys_and_differ_as_published():
    plain = load_config("joint_cityscapes.yaml")
    paper, release = (load_config("joint_cityscapes.yaml", name) for name in ("paper", "release"))
    for cfg in (paper, release):
        assert {k: v for k, v in cfg.items() if k != "TTT"} == {
            k: v for k, v in plain.items() if k != "TTT"
        }
    assert (paper.TTT.MASK_RATIO, release.TTT.MASK_RATIO) == (0.8, 0.85)
    assert (paper.TTT.RECON.REGION, release.TTT.RECON.REGION) == ("masked", "all")
    assert (paper.TTT.OPTIMIZER.NAME, release.TTT.OPTIMIZER.NAME) == ("SGD", "ADAMW")
    assert (paper.TTT.SAMPLING, release.TTT.SAMPLING) == ("with_replacement", "shuffled_epochs")
    assert (release.TTT.BATCH_SIZE, release.TTT.MICRO_BATCH_SIZE) == (32, 0)  # as many as fit
