"""The stages of training, on models that differ in all but the names of their roles."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image
from tiny import TINY
from torch import nn

from ttt_video.config import load_config
from ttt_video.data.image_folder import register_class_folders
from ttt_video.errors import UserError
from ttt_video.modeling.optimizer import build_lr_scheduler, build_optimizer
from ttt_video.modeling.weights import read_checkpoint
from ttt_video.training.hooks import FrozenParts
from ttt_video.training.joint_training import JointTrainer
from ttt_video.training.stages import LEARN, Stage, StageLosses


class Toy(nn.Module):
    """Numbers instead of images; f has a layer whose statistics move in train mode."""

    def __init__(self, roles="fgh"):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
        self.painter, self.classifier = nn.Linear(4, 4), nn.Linear(4, 3)
        names = {"f": "body", "g": "painter", "h": "classifier"}
        self.parts = {role: names[role] for role in roles}

    def main_losses(self, batch, normalizers=None):
        x = torch.stack([sample["x"] for sample in batch])
        target = torch.tensor([sample["class"] for sample in batch])
        return {"loss_main": nn.functional.cross_entropy(self.classifier(self.body(x)), target)}

    def reconstruction_losses(self, batch, generator=None):
        x = torch.stack([sample["x"] for sample in batch])
        return {"loss_recon": (self.painter(self.body(x)) - x).square().mean()}


def toy_batch(labelled=True):
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    return [{"x": x[i], **({"class": i % 3} if labelled else {})} for i in range(6)]


@pytest.mark.parametrize("name", LEARN)
def test_what_does_not_learn_stays_bit_for_bit(name):
    torch.manual_seed(0)
    model, stage = Toy().train(), Stage(name)
    stage.freeze(model)
    losses = StageLosses(model, stage)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    hook = FrozenParts(model, stage)
    for _ in range(2):
        model.train()  # as after an evaluation
        hook.before_step()
        optimizer.zero_grad()
        sum(losses(toy_batch(labelled=name != "pretrain")).values()).backward()
        optimizer.step()
    after = model.state_dict()
    moved = {key.split(".")[0] for key in before if not torch.equal(before[key], after[key])}
    assert moved == {{"f": "body", "g": "painter", "h": "classifier"}[r] for r in LEARN[name]}


def test_the_loss_of_a_stage_is_that_of_what_learns():
    model = Toy().eval()
    batch = toy_batch()
    main, recon = model.main_losses(batch), model.reconstruction_losses(batch)
    half = {"loss_recon": recon["loss_recon"] * 0.5}
    expected = {"joint": main | half, "main_only": main, "pretrain": half, "probing": main}
    for name, losses in expected.items():
        assert StageLosses(model, Stage(name, weight=0.5))(batch) == losses


@pytest.mark.parametrize(
    ("stage", "model", "said"),
    [
        ("pretrain", Toy("fh"), "Toy has no part g: choose main_only or probing"),
        ("joint", Toy("fh"), "Toy has no part g: choose main_only or probing"),
        ("probing", Toy("fg"), "Toy has no part h: choose pretrain"),
        ("joint", nn.Linear(2, 2), "Linear has no part g: train it with its own library"),
    ],
)
def test_a_stage_that_does_not_fit_is_a_line(stage, model, said):
    with pytest.raises(UserError, match=f"^TTT.JOINT is {stage}, and {said}$"):
        Stage(stage).freeze(model)


# ---- models of images, on folders without labels


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def folder(tmp_path):
    """A folder of pictures that no data set names."""
    path = tmp_path / "pictures"
    path.mkdir()
    rng = np.random.default_rng(0)
    for i in range(3):
        Image.fromarray(rng.integers(0, 256, (32, 64, 3), np.uint8)).save(path / f"{i}.png")
    yield path
    DatasetCatalog.pop(str(path), None)
    MetadataCatalog.pop(str(path), None)


def make_cfg(config, out, folder, *opts):
    common = [
        *TINY, "DATASETS.TRAIN", f"('{folder}',)", "DATASETS.TEST", "()", "OUTPUT_DIR", out,
        "TEST.EVAL_PERIOD", 0, "SOLVER.MAX_ITER", 2, "SOLVER.IMS_PER_BATCH", 2,
        "INPUT.CROP.SIZE", "[32, 32]", "INPUT.MIN_SIZE_TRAIN", "[32]", "MODEL.DEVICE", "cpu",
        "SOLVER.WARMUP_ITERS", 0, "DATALOADER.NUM_WORKERS", 0, "SOLVER.AMP.ENABLED", False,
    ]  # fmt: skip
    cfg = load_config(config, opts=[*map(str, common), *map(str, opts)])
    cfg.freeze()
    return cfg


def train(cfg, resume=False):
    trainer = JointTrainer(cfg)
    trainer.resume_or_load(resume)
    trainer.train()
    return trainer


@pytest.mark.slow
@pytest.mark.parametrize("config", ["joint_cityscapes.yaml", "joint_imagenet_color.yaml"])
def test_pretraining_wants_no_labels_and_probing_takes_its_encoder(tmp_path, folder, config):
    """The two stages of the paper's Section 3.1, with an interruption of the first."""
    opts = ["TTT.JOINT", "pretrain", "SOLVER.CHECKPOINT_PERIOD", 1]
    color = "color" in config
    # A crop that one class fills cannot be drawn again without labels.
    opts += [] if color else ["INPUT.CROP.SINGLE_CATEGORY_MAX_AREA", 0.75]
    opts += [] if color else ["INPUT.COLOR_AUG_SSD", False]
    cfg = make_cfg(config, tmp_path / "f", folder, *opts)
    trainer = train(cfg)
    # detectron2 records a loss that is the only one as total_loss.
    assert {name for name in trainer.storage.histories() if "loss" in name} == {"total_loss"}
    pretrained = read_checkpoint(tmp_path / "f" / "model_final.pth")
    assert {name.split(".")[0] for name in pretrained} - {"criterion"} == {"backbone", "recon_head"}
    (tmp_path / "f" / "last_checkpoint").write_text("model_0000000.pth")
    train(cfg, resume=True)
    again = read_checkpoint(tmp_path / "f" / "model_final.pth")
    assert all(torch.equal(value, again[name]) for name, value in pretrained.items())

    opts = ["TTT.JOINT", "probing", "MODEL.WEIGHTS", tmp_path / "f" / "model_final.pth"]
    if not color:
        with pytest.raises(UserError, match=r"'sem_seg_file_name'.* or TTT\.JOINT pretrain, which"):
            train(make_cfg(config, tmp_path / "no", folder, *opts, "INPUT.COLOR_AUG_SSD", False))
        return
    train(make_cfg(config, tmp_path / "h", folder, *opts))
    probed = read_checkpoint(tmp_path / "h" / "model_final.pth")
    assert any(name.startswith("sem_seg_head.") for name in probed)
    assert all(torch.equal(value, probed[name]) for name, value in pretrained.items())


def test_pretraining_evaluates_nothing(tmp_path, folder):
    """Its head is random, and the data set that the config names need not be there."""
    cfg = make_cfg(
        "joint_imagenet_color.yaml", tmp_path / "out", folder, "TTT.JOINT", "pretrain",
        "DATASETS.TEST", "('imagenet_color_val',)", "TEST.EVAL_PERIOD", 1,
    )  # fmt: skip
    trainer = train(cfg)
    rows = [json.loads(row) for row in (tmp_path / "out/metrics.json").read_text().splitlines()]
    assert rows
    assert {key.split("/")[0] for row in rows for key in row if "/" in key} == set()
    assert not (tmp_path / "out/model_best.pth").exists()
    assert "total_loss" in trainer.storage.histories()


# ---- a vision transformer

TINY_VIT = [
    "MODEL.DEVICE", "cpu", "MODEL.VIT_MAE.IMAGE_SIZE", 16, "MODEL.VIT_MAE.PATCH_SIZE", 4,
    "MODEL.VIT_MAE.EMBED_DIM", 8, "MODEL.VIT_MAE.DEPTH", 1, "MODEL.VIT_MAE.NUM_HEADS", 2,
    "MODEL.VIT_MAE.DECODER_EMBED_DIM", 8, "MODEL.VIT_MAE.DECODER_DEPTH", 1,
    "MODEL.VIT_MAE.DECODER_NUM_HEADS", 2, "MODEL.VIT_MAE.CLASSIFIER_EMBED_DIM", 8,
    "MODEL.VIT_MAE.CLASSIFIER_DEPTH", 1, "MODEL.VIT_MAE.CLASSIFIER_NUM_HEADS", 2,
    "MODEL.VIT_MAE.NUM_CLASSES", 2, "INPUT.IMAGE_SIZE", 16, "INPUT.SINGLE_CROP", 16,
    "SOLVER.MICRO_BATCH_SIZE", 2, "SOLVER.IMS_PER_BATCH", 4, "SOLVER.MAX_ITER", 2,
    "SOLVER.WARMUP_ITERS", 0, "SOLVER.CHECKPOINT_PERIOD", 1, "SOLVER.BLR", 1.0,
    "TEST.EVAL_PERIOD", 0, "DATASETS.TEST", "()", "DATALOADER.NUM_WORKERS", 0,
]  # fmt: skip


def train_vit(stage, out, dataset, *opts):
    config = "mae_imagenet_pretrain.yaml" if stage == "pretrain" else "mae_imagenet_probing.yaml"
    common = ["TTT.JOINT", stage, "DATASETS.TRAIN", f"('{dataset}',)", "OUTPUT_DIR", out]
    cfg = load_config(config, opts=[*map(str, [*TINY_VIT, *common, *opts])])
    cfg.freeze()
    train(cfg)
    return read_checkpoint(out / "model_final.pth")


@pytest.fixture
def classes(tmp_path):
    """A data set with a folder for each of two classes."""
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (tmp_path / "set" / name).mkdir(parents=True)
        for i in range(2):
            pixels = rng.integers(0, 256, (20, 24, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "set" / name / f"{i}.png")
    register_class_folders("stages_test_classes", tmp_path / "set", ("cat", "dog"))
    yield "stages_test_classes"
    for name in ("stages_test_classes", str(tmp_path / "set")):
        DatasetCatalog.pop(name, None)
        MetadataCatalog.pop(name, None)


@pytest.mark.parametrize("head", ["classifier", "linear"])
def test_the_stages_of_a_vit(tmp_path, classes, head):
    """Published names have no module for a role; the linear head's statistics move with it."""
    opts = ["MODEL.VIT_MAE.HEAD", head, "SOLVER.AMP.ENABLED", True]
    pretrained = train_vit("pretrain", tmp_path / "f", tmp_path / "set", *opts)
    assert {"cls_token", "mask_token", "blocks.0.attn.qkv.weight"} <= pretrained.keys()
    own = {"classifier": "classifier_", "linear": ("bn.", "head.")}[head]
    assert not any(name.startswith(own) for name in pretrained)
    start = ["MODEL.WEIGHTS", tmp_path / "f" / "model_final.pth"]
    probed = train_vit("probing", tmp_path / "h", classes, *opts, *start)
    assert all(torch.equal(value, probed[name]) for name, value in pretrained.items())
    new = {name for name in probed if name not in pretrained}
    assert new
    assert all(name.startswith(own) for name in new)
    if head == "linear":
        assert int(probed["bn.num_batches_tracked"]) == 4  # two steps of two micro-batches
    joint = train_vit("joint", tmp_path / "j", classes, *opts, *start)
    fixed = {name for name in pretrained if torch.equal(pretrained[name], joint[name])}
    assert fixed == {"pos_embed", "decoder_pos_embed"}


# ---- the rate


def optimizer_of(*opts):
    cfg = load_config("joint_cityscapes.yaml", opts=[*map(str, opts)])
    model = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
    return cfg, build_optimizer(cfg, model)


def test_a_base_rate_counts_256_images():
    opts = ["SOLVER.BLR", 1.5e-4, "SOLVER.BASE_LR", 0.0, "SOLVER.IMS_PER_BATCH", 4096]
    _, optimizer = optimizer_of(*opts, "SOLVER.BETAS", "[0.9, 0.95]")
    for group in optimizer.param_groups:
        assert group["lr"] == pytest.approx(2.4e-3)  # MAE's published large batch
        assert group["betas"] == (0.9, 0.95)
    _, plain = optimizer_of("SOLVER.BASE_LR", 0.003, "SOLVER.IMS_PER_BATCH", 4096)
    assert {group["lr"] for group in plain.param_groups} == {0.003}


@pytest.mark.parametrize(("rate", "blr"), [(0.001, 0.1), (0.0, 0.0)])
def test_one_of_two_keys_is_the_rate(rate, blr):
    with pytest.raises(UserError, match=r"SOLVER\.BLR is .*one of the two is the rate"):
        optimizer_of("SOLVER.BASE_LR", rate, "SOLVER.BLR", blr)


def test_warm_up_and_half_a_cosine_are_maes():
    cfg, optimizer = optimizer_of(
        "SOLVER.LR_SCHEDULER_NAME", "WarmupCosineLR", "SOLVER.RESCALE_INTERVAL", True,
        "SOLVER.WARMUP_FACTOR", 0.0, "SOLVER.WARMUP_ITERS", 10, "SOLVER.MAX_ITER", 50,
        "SOLVER.BASE_LR", 0.0, "SOLVER.BLR", 0.5, "SOLVER.IMS_PER_BATCH", 512,
    )  # fmt: skip
    scheduler = build_lr_scheduler(cfg, optimizer)
    for step in range(50):
        # MAE's adjust_learning_rate, with steps for epochs.
        expected = step / 10 if step < 10 else 0.5 * (1 + np.cos(np.pi * (step - 10) / 40))
        assert optimizer.param_groups[0]["lr"] == pytest.approx(expected, abs=1e-9), step
        optimizer.step()
        scheduler.step()


def test_a_warm_up_that_never_ends_is_a_line():
    cfg, optimizer = optimizer_of(
        "SOLVER.LR_SCHEDULER_NAME", "WarmupCosineLR",
        "SOLVER.WARMUP_ITERS", 5, "SOLVER.MAX_ITER", 5,
    )  # fmt: skip
    with pytest.raises(UserError, match=r"WARMUP_ITERS is 5; it must be less than .*MAX_ITER 5$"):
        build_lr_scheduler(cfg, optimizer)


def test_biases_decay_by_their_own_key():
    model = nn.Linear(2, 2)
    for value, expected in (("None", {0.05}), ("0.0", {0.05, 0.0})):
        cfg = load_config("joint_cityscapes.yaml", opts=["SOLVER.WEIGHT_DECAY_BIAS", value])
        groups = build_optimizer(cfg, model).param_groups
        assert {group["weight_decay"] for group in groups} == expected
