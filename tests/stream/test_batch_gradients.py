"""The gradient of a batch, whatever number of micro-batches and processes compute it."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets.cityscapes import load_cityscapes_semantic
from detectron2.engine import launch
from detectron2.structures import BitMasks, Instances
from detectron2.utils import comm

from ttt_video.config import load_config
from ttt_video.errors import UserError
from ttt_video.modeling import criterion
from ttt_video.training.joint_training import JointTrainer, amp_dtype, bare_model
from ttt_video.world.layouts import write_cityscapes
from ttt_video.world.video import WorldStills

DATASET = "batch_gradients_test"
SMALLEST = [
    "MODEL.DEVICE", "cpu",
    "MODEL.SWIN.EMBED_DIM", "8",
    "MODEL.SWIN.DEPTHS", "[1, 1, 1, 1]",
    "MODEL.SWIN.NUM_HEADS", "[1, 2, 2, 2]",
    "MODEL.SEM_SEG_HEAD.CONVS_DIM", "32",
    "MODEL.SEM_SEG_HEAD.MASK_DIM", "32",
    "MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS", "1",
    "MODEL.SEM_SEG_HEAD.DEFORMABLE_TRANSFORMER_ENCODER_DIM_FEEDFORWARD", "32",
    "MODEL.MASK_FORMER.HIDDEN_DIM", "32",
    "MODEL.MASK_FORMER.DIM_FEEDFORWARD", "32",
    "MODEL.MASK_FORMER.NUM_OBJECT_QUERIES", "6",
    "MODEL.MASK_FORMER.DEC_LAYERS", "2",
    "MODEL.MASK_FORMER.TRAIN_NUM_POINTS", "64",
    "SOLVER.IMS_PER_BATCH", "4",
    "SOLVER.WARMUP_ITERS", "0",
    "TEST.EVAL_PERIOD", "0",
    "DATASETS.TRAIN", f"('{DATASET}',)",
    "DATASETS.TEST", "()",
]  # fmt: skip


def register(root: Path) -> None:
    """As often as it is needed: the second process of a test knows nothing of the first."""
    if DATASET not in DatasetCatalog:
        folders = [str(root / kind / "train") for kind in ("leftImg8bit", "gtFine")]
        DatasetCatalog.register(DATASET, functools.partial(load_cityscapes_semantic, *folders))
        MetadataCatalog.get(DATASET).set(
            evaluator_type="cityscapes_sem_seg", ignore_label=255, stuff_classes=["a"] * 19
        )


@pytest.fixture(scope="module", autouse=True)
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("cityscapes")
    write_cityscapes(root, "train", "town", WorldStills("train", 6, 64, 128))
    register(root)
    yield root
    DatasetCatalog.remove(DATASET)
    MetadataCatalog.remove(DATASET)


def make_trainer(output_dir: Path, *opts: object) -> JointTrainer:
    cfg = load_config(
        "quick/joint_cityscapes.yaml",
        opts=[*SMALLEST, "OUTPUT_DIR", str(output_dir), *map(str, opts)],
    )
    return JointTrainer(cfg)


def gradients_of(trainer: JointTrainer, batch=None) -> dict[str, torch.Tensor]:
    """Losses and gradients of the first batch, under their names."""
    step = trainer._trainer
    step.iter = 0
    step.optimizer.zero_grad()
    losses = step.accumulate_gradients(batch or next(iter(trainer.data_loader)))
    parameters = bare_model(trainer.model).named_parameters()
    return losses | {name: p.grad.clone() for name, p in parameters if p.grad is not None}


def assert_equal_up_to_rounding(actual, expected) -> None:
    assert actual.keys() == expected.keys()
    assert len(actual) > 100
    for name, value in expected.items():
        scale = value.abs().max().item() + 0.02  # some gradients are zero but for rounding
        torch.testing.assert_close(actual[name], value, rtol=0, atol=2e-5 * scale, msg=name)


@pytest.fixture
def fixed_draws(monkeypatch):
    """Points that do not depend on who is drawn with whom."""
    points = torch.rand(1, 64, 2, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(
        criterion,
        "uncertain_points",
        lambda logits, *args, **ratios: points.expand(len(logits), -1, -1),
    )
    monkeypatch.setattr(torch, "rand", lambda *size, **kwargs: points)  # the matcher's


def labelled_images(*num_masks: int) -> list[dict]:
    """Noise with given visibility and this many random rectangles each."""
    generator = torch.Generator().manual_seed(1)
    batch = []
    for count in num_masks:
        masks = torch.zeros(count, 64, 96, dtype=torch.bool)
        for i in range(count):
            masks[i, 5 * i : 5 * i + 20, 10 + i : 60] = True
        instances = Instances((64, 96))
        instances.gt_classes = torch.arange(count) % 19
        instances.gt_masks = BitMasks(masks)
        image = torch.randint(256, (3, 64, 96), generator=generator, dtype=torch.uint8)
        visible = torch.randint(2, (1, 4, 6), generator=generator).float()
        visible = visible.repeat_interleave(16, 1).repeat_interleave(16, 2)
        batch.append({"image": image, "instances": instances, "image_mask": visible})
    return batch


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("num_masks", [(0, 1, 5, 8), (0, 0, 0, 3), (2, 2, 2, 2)], ids=str)
def test_micro_batches_give_the_gradient_of_the_batch(tmp_path, fixed_draws, num_masks, size):
    """Images with no masks, and with more than the six queries, included."""
    batch = labelled_images(*num_masks)
    still = ["MODEL.SWIN.DROP_PATH_RATE", 0.0]
    whole = gradients_of(make_trainer(tmp_path, *still), batch)
    parts = gradients_of(make_trainer(tmp_path, *still, "SOLVER.MICRO_BATCH_SIZE", size), batch)
    assert {"loss_ce", "loss_mask_0", "loss_recon"} <= whole.keys()
    assert_equal_up_to_rounding(parts, whole)


def test_draws_depend_on_the_step_and_the_place_alone(tmp_path):
    trainer = make_trainer(tmp_path, "MODEL.SWIN.DROP_PATH_RATE", 0.3)
    batch = next(iter(trainer.data_loader))
    first = gradients_of(trainer, batch)
    torch.manual_seed(99)
    again = gradients_of(trainer, batch)
    assert all(torch.equal(first[name], again[name]) for name in first)
    trainer._trainer.iter = 1
    later = trainer._trainer.accumulate_gradients(batch)
    assert later["loss_recon"] != first["loss_recon"]


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_mixed_precision_keeps_the_direction(tmp_path, fixed_draws, dtype):
    """Low precision is asked for by name, and fp16's loss scale is taken out again."""
    batch, still = labelled_images(1, 3), ["MODEL.SWIN.DROP_PATH_RATE", 0.0]
    whole = gradients_of(make_trainer(tmp_path, *still), batch)
    amp = ["SOLVER.AMP.ENABLED", True, "SOLVER.AMP.PRECISION", dtype]
    trainer = make_trainer(tmp_path, *still, *amp)
    trainer._trainer.scaler = torch.amp.GradScaler("cpu", init_scale=8.0, enabled=dtype == "fp16")
    gradients_of(trainer, batch)
    assert trainer._trainer.dtype == amp_dtype(torch.device("cpu"), dtype)
    trainer._trainer.scaler.unscale_(trainer.optimizer)
    names = [n for n, p in trainer.model.named_parameters() if p.grad is not None]
    parameters = dict(trainer.model.named_parameters())
    ours = torch.cat([parameters[n].grad.flatten() for n in names])
    full = torch.cat([whole[n].flatten() for n in names])
    assert not torch.equal(ours, full)
    assert torch.cosine_similarity(ours, full, dim=0) > 0.9
    assert 0.8 < ours.norm() / full.norm() < 1.25


@pytest.mark.parametrize(("micro", "words"), [(3, "must divide the 4 image"), (8, "MICRO_BATCH")])
def test_micro_batches_that_do_not_fit(tmp_path, micro, words):
    with pytest.raises(UserError, match=words):
        make_trainer(tmp_path, "SOLVER.MICRO_BATCH_SIZE", micro)


OPTIONS = [
    ("SOLVER.MICRO_BATCH_SIZE", 2, "MODEL.SWIN.DROP_PATH_RATE", 0.3),
    ("SOLVER.MICRO_BATCH_SIZE", 1, "MODEL.SWIN.DROP_PATH_RATE", 0.3),
]


def work(root: Path, out: Path) -> None:
    """One of the two processes."""
    torch.set_num_threads(1)
    register(root)
    for i, options in enumerate(OPTIONS):
        result = gradients_of(make_trainer(out, *options))
        torch.save(result, out / f"{i}_{comm.get_rank()}.pth")


@pytest.mark.slow
def test_two_processes_give_the_gradients_of_one(root, tmp_path):
    """Same images, masks, points and stochastic depth; gloo on the CPU."""
    launch(work, 2, dist_url="auto", args=(root, tmp_path))
    for i, options in enumerate(OPTIONS):
        alone = gradients_of(make_trainer(tmp_path, *options))
        first, second = (torch.load(tmp_path / f"{i}_{rank}.pth") for rank in range(2))
        for name in alone:
            if name.startswith("loss_"):  # of each process's own images
                assert not torch.equal(first[name], second[name])
                first[name] = second[name] = (first[name] + second[name]) / 2
            else:  # averaged by DistributedDataParallel
                assert torch.equal(first[name], second[name]), name
        assert_equal_up_to_rounding(first, alone)
