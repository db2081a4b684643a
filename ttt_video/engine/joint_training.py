"""Joint training of encoder f, main-task head h and decoder g on labelled still images.

Section 4.1 of the paper: one stage, end to end, on the sum of the main-task loss and the
reconstruction loss. Everything that detectron2's ``DefaultTrainer`` does is left to it.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import (
    MetadataCatalog,
    build_detection_test_loader,
    get_detection_dataset_dicts,
)
from detectron2.engine import DefaultTrainer, HookBase, SimpleTrainer, TrainerBase
from detectron2.engine.defaults import create_ddp_model
from detectron2.engine.hooks import EvalHook, PeriodicCheckpointer
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from ttt_video.data.coco_masks import LABELLED_ONLY
from ttt_video.data.datasets import check_registered
from ttt_video.data.labels import refuse_labels_as_frames
from ttt_video.data.loader import TrainingLoader, TrainingStream
from ttt_video.data.mapper import EvaluationMapper, JointDatasetMapper
from ttt_video.engine.hooks import FrozenParts, KeepBest, ReconstructionPictures
from ttt_video.engine.optimizer import build_lr_scheduler, build_optimizer
from ttt_video.errors import UserError, error_of_process
from ttt_video.modeling.weights import TTTCheckpointer
from ttt_video.tasks import Task, tasks, tasks_of
from ttt_video.tasks.classes import check_predicted_classes, check_trained_classes


def amp_dtype(device: torch.device, precision: str = "auto") -> torch.dtype:
    """The type that ``SOLVER.AMP.PRECISION`` means on a device: "auto" is bfloat16 where native."""
    if precision == "auto":
        old = device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0)
        precision = "fp16" if old else "bf16"
    return {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]


class TrainStep(SimpleTrainer):
    """One optimizer step on one batch, on any device, in micro-batches, with mixed precision.

    The gradient is that of the loss of the whole batch, whatever number of micro-batches and
    processes compute it, for images of one size (others are padded to the largest beside them).
    Random numbers are a function of the seed, the step and the place of the micro-batch in the
    batch. So processes change nothing but the order of summation: two that share a batch compute
    what one does in micro-batches of the same size. A resumed run needs no generator's state.

    detectron2's ``AMPTrainer`` is not used because it refuses to run without CUDA.

    Args:
        model: returns a dict of losses; if it has ``loss_normalizers``, they are passed to it.
        data_loader: batches.
        optimizer: over the model's parameters.
        micro_batch_size: images per forward and backward, which divides a batch; 0 = all.
        seed: of everything drawn in a step.
        dtype: autocast precision, or None for full precision; float16 scales the loss.
    """

    def __init__(
        self,
        model: nn.Module,
        data_loader: Iterable[list[dict[str, Any]]],
        optimizer: torch.optim.Optimizer,
        *,
        micro_batch_size: int = 0,
        seed: int = 0,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(model, data_loader, optimizer)
        self.micro_batch_size = micro_batch_size
        self.seed = seed
        self.device_type = next(model.parameters()).device.type
        self.dtype = dtype
        self.scaler = torch.amp.GradScaler(self.device_type, enabled=dtype == torch.float16)

    def run_step(self) -> None:
        """Loads a batch, steps, and records the losses; a non-finite loss raises."""
        start = time.perf_counter()
        batch = next(self._data_loader_iter)
        data_time = time.perf_counter() - start

        self.optimizer.zero_grad()
        losses = self.accumulate_gradients(batch)
        self.after_backward()
        # One transfer for all losses: waiting for thirty scalars one by one costs as many syncs.
        values = torch.stack(list(losses.values())).cpu()
        self._write_metrics(dict(zip(losses, values, strict=True)), data_time)
        self.scaler.unscale_(self.optimizer)  # before the optimizer clips
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def accumulate_gradients(self, batch: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Adds the (scaled) gradient of a batch's loss to the parameters; returns the losses."""
        size = self.micro_batch_size or len(batch)
        parts = [batch[i : i + size] for i in range(0, len(batch), size)]
        bare = bare_model(self.model)
        extra = {}
        if hasattr(bare, "loss_normalizers"):
            extra["normalizers"] = bare.loss_normalizers(batch, len(parts))
        sums: dict[str, torch.Tensor] = {}
        for i, part in enumerate(parts):
            place = comm.get_rank() * len(parts) + i
            entropy = np.random.SeedSequence([self.seed, self.iter, place])
            torch.manual_seed(int(entropy.generate_state(1, np.uint64)[0]))
            with self._gradients_shared(after=i == len(parts) - 1):
                with torch.autocast(self.device_type, self.dtype) if self.dtype else nullcontext():
                    losses = self.model(part, **extra)
                self.scaler.scale(sum(losses.values()) / len(parts)).backward()
            for name, loss in losses.items():
                sums[name] = sums.get(name, 0.0) + loss.detach().float() / len(parts)
        return sums

    def _gradients_shared(self, after: bool) -> AbstractContextManager[None]:
        """Among processes, after this backward or a later one."""
        if after or not isinstance(self.model, DistributedDataParallel):
            return nullcontext()
        return self.model.no_sync()

    def state_dict(self) -> dict[str, Any]:
        """State of the optimizer and the loss scale."""
        return {**super().state_dict(), "scaler": self.scaler.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores :meth:`state_dict`."""
        super().load_state_dict(state_dict)
        self.scaler.load_state_dict(state_dict["scaler"])


def bare_model(model: nn.Module) -> Any:
    """The model without its wrapper for data parallelism."""
    return model.module if isinstance(model, DistributedDataParallel) else model


class JointTrainer(DefaultTrainer):
    """detectron2's ``DefaultTrainer`` for joint training.

    ``TTT.JOINT`` chooses what is trained: f, g and h together ("joint"), f and h ("main_only"), or
    h on the frozen features of a given f ("probing"). A run with ``SEED >= 0`` that is killed and
    resumed goes through the same numbers as one that was not, with any number of loading
    processes, as far as the device's kernels are deterministic (the CPU's are).
    """

    iter: int
    _hooks: list[HookBase]

    def __init__(self, cfg: CfgNode):
        # DefaultTrainer's own constructor fixes the step, the loader's wrapper and the
        # checkpointer, which all differ here; its methods need only what is set below.
        TrainerBase.__init__(self)
        self.cfg = cfg = DefaultTrainer.auto_scale_workers(cfg, comm.get_world_size())
        self.seed = cfg.SEED if cfg.SEED >= 0 else comm.shared_random_seed()
        data_loader = self.build_train_loader(cfg, seed=self.seed)
        self.check_evaluation(cfg)
        torch.manual_seed(self.seed)  # of the new weights, whatever was drawn before
        model = self.build_model(cfg)
        optimizer = self.build_optimizer(cfg, model)
        device = torch.device(cfg.MODEL.DEVICE)
        ids = {} if device.type == "cuda" else {"device_ids": None}
        self._trainer = TrainStep(
            create_ddp_model(model, broadcast_buffers=False, **ids),
            data_loader,
            optimizer,
            micro_batch_size=cfg.SOLVER.MICRO_BATCH_SIZE,
            seed=self.seed,
            dtype=amp_dtype(device, cfg.SOLVER.AMP.PRECISION) if cfg.SOLVER.AMP.ENABLED else None,
        )
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        untrained = () if cfg.TTT.JOINT == "joint" else ("recon_head.",)
        self.checkpointer = TTTCheckpointer(
            model,
            cfg.OUTPUT_DIR,
            new_classes=cfg.TTT.NEW_CLASSES,
            init_recon_from_main=cfg.TTT.RECON.INIT_FROM_MAIN,
            # Nothing trains g here: saved, it would make the weights look jointly trained.
            leave_out=untrained,
            allow_new=untrained,
            # A given f is one whose features do not change with a channel that it never saw.
            extra_channels="zero" if cfg.TTT.JOINT == "probing" else "init",
            trainer=weakref.proxy(self),
        )
        self.start_iter = 0
        self.max_iter = cfg.SOLVER.MAX_ITER
        self.register_hooks([FrozenParts(model), *self.build_hooks()])

    def resume_or_load(self, resume: bool = True) -> None:
        """As detectron2's, and the data go on where the checkpoint left them.

        Raises:
            UserError: the weights do not fit, or probing was given none for f.
        """
        super().resume_or_load(resume)
        self.data_loader.start_at(self.start_iter)
        if self.cfg.TTT.JOINT == "probing":
            self._take_given_parts(resumed=resume and self.checkpointer.has_checkpoint())

    def after_train(self) -> None:
        """Runs detectron2's hooks; a finished run that is resumed makes no step and counts none.

        A run that failed in its last step is not evaluated: detectron2 would take it for finished,
        and the best weights could be some that a run without the failure never evaluates.
        """
        if self.iter < self.max_iter:
            self._hooks = [hook for hook in self._hooks if not isinstance(hook, EvalHook)]
        self.iter = min(self.iter, self.max_iter)
        super().after_train()

    def _take_given_parts(self, resumed: bool) -> None:
        """Of probing: f has to be in the weights, and a g that is there belongs to it."""
        report = self.checkpointer.report
        parameters = dict(bare_model(self.model).named_parameters())
        lacking = "" if self.cfg.MODEL.WEIGHTS else "MODEL.WEIGHTS is empty"
        if report is not None:
            # Others start at 0 or 1: ImageNet's Swin lacks the norms of its outputs.
            drawn = [n for n in report.new if n in parameters and parameters[n].dim() > 1]
            if any(name.startswith("backbone.") for name in drawn):
                lacking = f"{report.source} lacks weights of f (backbone)"
            if not any(name.startswith("recon_head.") for name in drawn):
                self.checkpointer.leave_out = ()
        if lacking and not resumed:
            raise UserError(
                f"TTT.JOINT probing trains h on the features of a given f, but {lacking}; set "
                "MODEL.WEIGHTS to weights that have it"
            )

    def build_hooks(self) -> list[HookBase]:
        """detectron2's hooks, the best checkpoint, and the reconstruction pictures."""
        built = super().build_hooks()
        if not comm.is_main_process():
            return built
        cfg, model = self.cfg, bare_model(self.model)
        writer = built.pop()  # after all that it writes
        # Last of all: what comes before a checkpoint is on disk, and a run that is killed and
        # resumed from it lacks no evaluation.
        saver = next(hook for hook in built if isinstance(hook, PeriodicCheckpointer))
        built.remove(saver)
        if cfg.TEST.EVAL_PERIOD > 0 and cfg.DATASETS.TEST:
            built.append(KeepBest(self.checkpointer, headline_metric(cfg.DATASETS.TEST)))
        period = cfg.TTT.RECON.PICTURE_PERIOD
        period = cfg.TEST.EVAL_PERIOD if period < 0 else period
        if period > 0 and cfg.TTT.JOINT == "joint":
            stream = self.data_loader.stream
            images = [stream[i]["image"] for i in range(min(4, len(stream.records)))]
            built.append(ReconstructionPictures(model, images, period, cfg.INPUT.FORMAT))
        return [*built, writer, saver]

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        """See :func:`ttt_video.engine.optimizer.build_optimizer`."""
        return build_optimizer(cfg, model)

    @classmethod
    def build_lr_scheduler(
        cls, cfg: CfgNode, optimizer: torch.optim.Optimizer
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """See :func:`ttt_video.engine.optimizer.build_lr_scheduler`."""
        return build_lr_scheduler(cfg, optimizer)

    @classmethod
    def build_train_loader(cls, cfg: CfgNode, seed: int = 0) -> TrainingLoader:
        """Batches of ``DATASETS.TRAIN`` in the reproducible order of :class:`TrainingStream`.

        Raises:
            UserError: a data set is unknown, missing, empty or of other classes than the model,
                or the batch does not divide among the processes and into their micro-batches.
        """
        world_size, total = comm.get_world_size(), cfg.SOLVER.IMS_PER_BATCH
        if total < 1 or total % world_size:
            raise UserError(
                f"SOLVER.IMS_PER_BATCH is {total}; it must be a multiple of the {world_size} "
                "training process(es)"
            )
        micro = cfg.SOLVER.MICRO_BATCH_SIZE
        if micro and total // world_size % micro:
            raise UserError(
                f"SOLVER.MICRO_BATCH_SIZE is {micro}; it must divide the {total // world_size} "
                "image(s) of each process in SOLVER.IMS_PER_BATCH"
            )
        records = load_records(cfg.DATASETS.TRAIN, cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS)
        mapper = JointDatasetMapper(cfg, True)
        mapper.task.check_records(records, everywhere=True)
        for name in cfg.DATASETS.TRAIN:
            check_trained_classes(cfg, name, mapper.task)
        return TrainingLoader(
            TrainingStream(records, mapper, seed=seed),
            batch_size=total // world_size,
            num_workers=cfg.DATALOADER.NUM_WORKERS,
            rank=comm.get_rank(),
            world_size=world_size,
        )

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> DataLoader:
        """detectron2's, with images read and resized as a stream's frames are."""
        return build_detection_test_loader(cfg, dataset_name, mapper=EvaluationMapper(cfg))

    @classmethod
    def test(
        cls, cfg: CfgNode, model: nn.Module, evaluators: Sequence[DatasetEvaluator] | None = None
    ) -> dict[str, Any]:
        """detectron2's; what a loading process refuses is told in one line."""
        try:
            return super().test(cfg, model, evaluators)
        except UserError as error:
            raise error_of_process(str(error)) or error from None

    @classmethod
    def check_evaluation(cls, cfg: CfgNode) -> None:
        """Raises what would end the evaluation of ``DATASETS.TEST``, hours of training before it.

        Also without ``TEST.EVAL_PERIOD``, because a run ends with an evaluation.

        Raises:
            UserError: a data set is unknown, missing, of other classes, or cannot be scored.
        """
        for name in cfg.DATASETS.TEST:
            with _data_set_errors("DATASETS.TEST", [name]):
                cls.build_test_loader(cfg, name)
                check_predicted_classes(cfg, name)
                cls.build_evaluator(cfg, name)

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> DatasetEvaluator:
        """The evaluator of the task that the data set's ``evaluator_type`` means."""
        output_dir = str(Path(cfg.OUTPUT_DIR) / "inference" / dataset_name)
        return main_task_of(dataset_name).still_evaluator(cfg, dataset_name, output_dir)


@contextmanager
def _data_set_errors(key: str, names: Sequence[str]) -> Iterator[None]:
    """Turns what detectron2 raises where the data sets of a config key are missing into a line."""
    for name in names:
        check_registered(name, key)
    try:
        yield
    except KeyError as error:
        reason = " ".join(map(str, error.args))
        if reason == "annotations":
            reason = f"some images have no annotations; {LABELLED_ONLY}"
        raise UserError(
            f"data set {', '.join(names)} of {key} cannot be loaded: {reason}"
        ) from error
    except (FileNotFoundError, NotADirectoryError, AssertionError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"data set {', '.join(names)} of {key} cannot be loaded ({reason}); put it under "
            "$DETECTRON2_DATASETS (default ./datasets) in the layout of datasets/README.md"
        ) from error


def load_records(names: Sequence[str], filter_empty: bool) -> list[dict[str, Any]]:
    """The records of all named data sets, in the same order on every machine.

    Raises:
        UserError: no name is given, or a data set is unknown, missing on disk or empty.
    """
    if not names:
        raise UserError("DATASETS.TRAIN is empty; name at least one registered data set")
    with _data_set_errors("DATASETS.TRAIN", names):
        records = get_detection_dataset_dicts(list(names), filter_empty=filter_empty)
    refuse_labels_as_frames(", ".join(names), records)
    # detectron2's loader of Cityscapes lists folders in the order of the file system.
    if any(MetadataCatalog.get(n).get("evaluator_type") == "cityscapes_sem_seg" for n in names):
        records.sort(key=lambda record: record["file_name"])
    return records


def main_task_of(dataset_name: str) -> type[Task]:
    """Returns the task that a data set means; UserError if there is none that we can score."""
    kind = MetadataCatalog.get(dataset_name).get("evaluator_type", None)
    if not tasks_of(kind):
        known = dict.fromkeys(kind for task in tasks() for kind in task.evaluator_types)
        raise UserError(
            f"data set {dataset_name!r} has evaluator_type {kind!r}; supported are "
            + ", ".join(known)
        )
    return tasks_of(kind)[0]


def headline_metric(dataset_names: Sequence[str]) -> str:
    """Returns the key of the first data set's headline metric in detectron2's flat results."""
    task = main_task_of(dataset_names[0])
    metric = f"{task.still_name}/{task.headline}"
    return metric if len(dataset_names) == 1 else f"{dataset_names[0]}/{metric}"
