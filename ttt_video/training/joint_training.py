"""Training of encoder f, main-task head h and decoder g on still images.

By default it is joint (Section 4.1 of the paper): one stage, end to end, on the sum of the
main-task loss and the reconstruction loss. ``stages.py`` has the others. Everything that
detectron2's ``DefaultTrainer`` does is left to it.
"""

from __future__ import annotations

import errno
import logging
import threading
import weakref
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import (
    DatasetCatalog,
    MetadataCatalog,
    build_detection_test_loader,
    get_detection_dataset_dicts,
)
from detectron2.engine import DefaultTrainer, HookBase, TrainerBase
from detectron2.engine.defaults import create_ddp_model
from detectron2.engine.hooks import EvalHook, PeriodicCheckpointer
from detectron2.evaluation import DatasetEvaluator, verify_results
from detectron2.modeling import build_model
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from torch import nn
from torch.utils.data import DataLoader

from ..data.catalog import NO_TRAIN_IDS, check_registered, missing_files
from ..data.image_folder import register_image_folder
from ..data.image_mapper import training_mapper
from ..data.loader import TrainingLoader, TrainingStream
from ..data.mapper import EvaluationMapper
from ..errors import UserError, error_of_process, suggestion
from ..formats.coco_masks import LABELLED_ONLY
from ..formats.labels import refuse_labels_as_frames
from ..modeling.checkpointer import TTTCheckpointer
from ..modeling.heads import check_architecture, check_grey
from ..modeling.interface import parts_of, prefixes
from ..modeling.optimizer import build_lr_scheduler, build_optimizer
from ..tasks import Task, sign, tasks, tasks_of
from ..tasks.classes import check_predicted_classes, check_same_classes, check_trained_classes
from .directory import LOG_FILE_ONLY
from .hooks import FrozenParts, KeepBest, ReconstructionPictures
from .stages import Stage, StageLosses
from .step import TrainStep, amp_dtype, bare_model

logger = logging.getLogger(__name__)


class JointTrainer(DefaultTrainer):
    """Trains with detectron2's ``DefaultTrainer``, changed for joint training.

    ``TTT.JOINT`` chooses what is trained (:class:`Stage`). A run with ``SEED >= 0`` gives the same
    numbers if it is killed and resumed, with any number of loading processes, as far as the
    device's kernels are deterministic (the CPU's are).
    """

    iter: int
    _hooks: list[HookBase]

    def __init__(self, cfg: CfgNode):
        # DefaultTrainer's constructor fixes the step, the loader and the checkpointer, which all
        # differ here; its methods need only what is set below.
        TrainerBase.__init__(self)
        if cfg.SOLVER.MAX_ITER < 1:
            raise UserError(
                f"SOLVER.MAX_ITER is {cfg.SOLVER.MAX_ITER}; give at least 1 iteration, or "
                "--eval-only to train nothing"
            )
        check_architecture(cfg)  # before a data set is rendered
        if cfg.MODEL.VIT_MAE.HEAD_WEIGHTS:
            raise UserError(
                "MODEL.VIT_MAE.HEAD_WEIGHTS names a trained head, for streams: set it to nothing, "
                "and give MODEL.WEIGHTS one file with all that the training starts from"
            )
        cfg = DefaultTrainer.auto_scale_workers(cfg, comm.get_world_size())
        self.stage = stage = Stage.from_config(cfg)
        if not stage.labelled and cfg.DATASETS.TEST:
            logger.info("TTT.JOINT %s: no main task is trained, and so none evaluated", stage.name)
            cfg = cfg.clone()
            cfg.defrost()
            cfg.DATASETS.TEST = ()
        self.cfg = cfg
        self.seed = cfg.SEED if cfg.SEED >= 0 else comm.shared_random_seed()
        data_loader = self.build_train_loader(cfg, seed=self.seed)
        self.check_evaluation(cfg)
        torch.manual_seed(self.seed)  # so that new weights do not depend on earlier draws
        model = self.build_model(cfg)
        stage.freeze(model)
        optimizer = self.build_optimizer(cfg, model)
        device = torch.device(cfg.MODEL.DEVICE)
        ids = {} if device.type == "cuda" else {"device_ids": None}
        self._trainer = TrainStep(
            create_ddp_model(StageLosses(model, stage), broadcast_buffers=False, **ids),
            data_loader,
            optimizer,
            micro_batch_size=cfg.SOLVER.MICRO_BATCH_SIZE,
            seed=self.seed,
            dtype=amp_dtype(device, cfg.SOLVER.AMP.PRECISION) if cfg.SOLVER.AMP.ENABLED else None,
        )
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        untrained = stage.frozen(model, "gh")
        self.checkpointer = TTTCheckpointer(
            model,
            cfg.OUTPUT_DIR,
            new_classes=cfg.TTT.NEW_CLASSES,
            init_recon_from_main=cfg.TTT.RECON.INIT_FROM_MAIN,
            # Saved, a g or h that nothing trains would make the weights look jointly trained.
            leave_out=untrained,
            allow_new=untrained,
            # The features of a given f must not change with a channel that it never saw.
            extra_channels="init" if "f" in stage.learns else "zero",
            trainer=weakref.proxy(self),
        )
        self.start_iter = 0
        self.max_iter = cfg.SOLVER.MAX_ITER
        self.register_hooks([FrozenParts(model, stage), *self.build_hooks()])

    def resume_or_load(self, resume: bool = True) -> None:
        """Does what detectron2 does, and lets the data go on where the checkpoint left them.

        Raises:
            UserError: the weights do not fit, or probing was given none for f.
        """
        super().resume_or_load(resume)
        self.data_loader.start_at(self.start_iter)
        if "f" not in self.stage.learns:
            self._take_given_parts(resumed=resume and self.checkpointer.has_checkpoint())

    def train(self) -> dict[str, Any] | None:
        """Runs detectron2's loop; returns the last evaluation's results if they were verified.

        An error that a user can mend is raised without the traceback that detectron2 logs, and a
        failure to close the logs does not hide it.

        Raises:
            UserError: see :meth:`TrainStep.run_step`; or the disk is full.
        """
        logger.info("Training from iteration %d to %d", self.start_iter, self.max_iter)
        self.iter = self.start_iter
        with EventStorage(self.start_iter) as self.storage, _disk_errors(self.cfg.OUTPUT_DIR):
            try:
                self.before_train()
                while self.iter < self.max_iter:
                    self.before_step()
                    self.run_step()
                    self.after_step()
                    self.iter += 1
            except BaseException:
                # After a failure in the last step detectron2 would evaluate the run as a finished
                # one, and the best weights could be some that no run without it evaluates.
                self._hooks = [hook for hook in self._hooks if not isinstance(hook, EvalHook)]
                with suppress(OSError, UserError):
                    self.after_train()
                raise
            self.after_train()
        if len(self.cfg.TEST.EXPECTED_RESULTS) and comm.is_main_process():
            check_results(self.cfg, getattr(self, "_last_eval_results", {}))
            return self._last_eval_results
        return None

    def after_train(self) -> None:
        """Runs detectron2's hooks; a finished run that is resumed takes and counts no step."""
        self.iter = min(self.iter, self.max_iter)
        super().after_train()

    def _take_given_parts(self, resumed: bool) -> None:
        """Makes sure that probing has an f in its weights; a g that is there belongs to it."""
        report = self.checkpointer.report
        model = self.model
        parameters = dict(model.named_parameters())
        lacking = "" if self.cfg.MODEL.WEIGHTS else "MODEL.WEIGHTS is empty"
        if report is not None:
            # Vectors start at 0 or 1 and may lack: ImageNet's Swin has no norms of its outputs.
            drawn = [n for n in report.new if n in parameters and parameters[n].dim() > 1]
            if any(name.startswith(prefixes(model, "f")) for name in drawn):
                lacking = f"{report.source} lacks weights of f ({', '.join(parts_of(model)['f'])})"
            if not any(name.startswith(prefixes(model, "g")) for name in drawn):
                self.checkpointer.leave_out = ()
        if lacking and not resumed:
            raise UserError(
                f"TTT.JOINT {self.stage.name} trains h on the features of a given f, but "
                f"{lacking}; set MODEL.WEIGHTS to weights that have it"
            )

    @property
    def model(self) -> Any:
        """The bare model, without its losses and its wrapper for data parallelism."""
        return bare_model(self._trainer.model).model

    def build_hooks(self) -> list[HookBase]:
        """Returns detectron2's hooks, the best checkpoint's and that of the pictures."""
        built = super().build_hooks()
        if not comm.is_main_process():
            return built
        cfg = self.cfg
        writer = built.pop()  # it runs after those whose numbers it writes
        # The checkpoint is last: all before it is on disk, so that a run that is killed and resumed
        # lacks no evaluation.
        saver = next(hook for hook in built if isinstance(hook, PeriodicCheckpointer))
        built.remove(saver)
        if cfg.TEST.EVAL_PERIOD > 0 and cfg.DATASETS.TEST:
            metric = headline_metric(cfg.DATASETS.TEST)
            direction = sign(main_task_of(cfg.DATASETS.TEST[0]).headline)
            built.append(KeepBest(self.checkpointer, metric, direction))
        period = cfg.TTT.RECON.PICTURE_PERIOD
        period = cfg.TEST.EVAL_PERIOD if period < 0 else period
        if period > 0 and self.stage.reconstructs:
            stream = self.data_loader.stream
            images = [stream[i]["image"] for i in range(min(4, len(stream.records)))]
            built.append(ReconstructionPictures(self.model, images, period, cfg.INPUT.FORMAT))
        return [*built, writer, saver]

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        """Builds the model of ``cfg``; only the log file lists its parts."""
        check_architecture(cfg)
        model = build_model(cfg)
        check_grey(cfg, model)
        logger.info("Model:\n%s", model, extra=LOG_FILE_ONLY)
        return model

    build_optimizer = staticmethod(build_optimizer)
    build_lr_scheduler = staticmethod(build_lr_scheduler)

    @classmethod
    def build_train_loader(cls, cfg: CfgNode, seed: int = 0) -> TrainingLoader:
        """Builds the batches of ``DATASETS.TRAIN``, in :class:`TrainingStream`'s order.

        Raises:
            UserError: a data set is unknown, missing, empty or of other classes than the model,
                or the batch cannot be shared out to the processes and their micro-batches.
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
        labelled = Stage.from_config(cfg).labelled
        empty = labelled and cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS
        records = load_records(cfg.DATASETS.TRAIN, empty)
        mapper = training_mapper(cfg, labelled=labelled)
        if labelled:
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
        """Builds detectron2's loader; images are read and resized as a stream's frames are."""
        return build_detection_test_loader(cfg, dataset_name, mapper=EvaluationMapper(cfg))

    @classmethod
    def test(
        cls, cfg: CfgNode, model: nn.Module, evaluators: Sequence[DatasetEvaluator] | None = None
    ) -> dict[str, Any]:
        """Evaluates as detectron2 does, and tells an error of a loading process in one line."""
        try:
            return super().test(cfg, model, evaluators)
        except UserError as error:
            raise error_of_process(str(error)) or error from None

    @classmethod
    def check_evaluation(cls, cfg: CfgNode) -> None:
        """Checks ``DATASETS.TEST`` now, since an evaluation may come after hours of training.

        Without ``TEST.EVAL_PERIOD``, too, a run ends with an evaluation.

        Raises:
            UserError: a data set is unknown, missing, of other classes, or cannot be scored.
        """
        for name in cfg.DATASETS.TEST:
            with _data_set_errors("DATASETS.TEST", [name]):
                records = get_detection_dataset_dicts([name], filter_empty=False)
                check_predicted_classes(cfg, name)
                cls.build_evaluator(cfg, name)
            _refuse_missing_files("DATASETS.TEST", [name], records)
        if Stage.from_config(cfg).labelled:
            check_same_classes([*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST])

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> DatasetEvaluator:
        """Builds the evaluator of the task that the data set's ``evaluator_type`` means."""
        output_dir = str(Path(cfg.OUTPUT_DIR) / "inference" / dataset_name)
        return main_task_of(dataset_name).still_evaluator(cfg, dataset_name, output_dir)


def _is_full_disk(error: BaseException | None) -> bool:
    full = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return isinstance(error, OSError) and error.errno in full


@contextmanager
def _disk_errors(folder: str) -> Iterator[None]:
    """Turns the error of a full disk into a UserError, and keeps TensorBoard's thread quiet."""
    hook = threading.excepthook

    def say(args: Any) -> None:
        if not _is_full_disk(args.exc_value):
            hook(args)

    threading.excepthook = say
    try:
        yield
    except OSError as error:
        if not _is_full_disk(error):
            raise
        raise UserError(
            f"{error.filename or folder} cannot be written: {error.strerror}; the checkpoints that "
            "were there are whole: make room and add --resume"
        ) from error
    finally:
        threading.excepthook = hook


@contextmanager
def _data_set_errors(key: str, names: Sequence[str]) -> Iterator[None]:
    """Turns detectron2's errors about the data sets of a config key into a line."""
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
    except (FileNotFoundError, NotADirectoryError, AssertionError, ValueError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        if "labelTrainIds" in reason:
            reason, hint = NO_TRAIN_IDS, ""
        elif isinstance(error, OSError):
            hint = (
                "; put it under $DETECTRON2_DATASETS (default ./datasets) in the layout of "
                "datasets/README.md"
            )
        else:
            hint = f"; python tools/check_dataset.py {names[0]} tells more"
        what = f"data set {', '.join(names)} of {key} cannot be loaded"
        raise UserError(f"{what}: {reason}{hint}") from error


def _refuse_missing_files(
    key: str, names: Sequence[str], records: Collection[Mapping[str, Any]]
) -> None:
    """Finds missing files now; the loop would come upon them after hours."""
    for what, count, gone in missing_files([r for r in records if "read_pixels" not in r]):
        if gone:
            raise UserError(
                f"data set {', '.join(names)} of {key}: {len(gone)} of {count} files of {what} are "
                f"missing, as {gone[0]}"
            )


def load_records(names: Sequence[str], filter_empty: bool) -> list[dict[str, Any]]:
    """Returns the records of all named data sets, in the same order on every machine.

    A name may be the path of a folder: of the pictures below it, without labels.

    Raises:
        UserError: no name is given, or a data set is unknown, missing on disk or empty.
    """
    if not names:
        raise UserError("DATASETS.TRAIN is empty; name at least one registered data set")
    for name in names:
        if name not in DatasetCatalog and Path(name).is_dir():
            register_image_folder(name, name)
    with _data_set_errors("DATASETS.TRAIN", names):
        records = get_detection_dataset_dicts(list(names), filter_empty=filter_empty)
    refuse_labels_as_frames(", ".join(names), records)
    _refuse_missing_files("DATASETS.TRAIN", names, records)
    # detectron2's loader of Cityscapes lists folders in the order of the file system.
    if any(MetadataCatalog.get(n).get("evaluator_type") == "cityscapes_sem_seg" for n in names):
        records.sort(key=lambda record: record["file_name"])
    return records


def main_task_of(dataset_name: str) -> type[Task]:
    """Returns the task that a data set means; raises UserError if none of ours can score it."""
    kind = MetadataCatalog.get(dataset_name).get("evaluator_type", None)
    if not tasks_of(kind):
        known = ", ".join(dict.fromkeys(k for task in tasks() for k in task.evaluator_types))
        raise UserError(
            f"data set {dataset_name!r} has evaluator_type {kind!r}; supported are {known}"
        )
    return tasks_of(kind)[0]


def check_results(cfg: CfgNode, results: Mapping[str, Any]) -> None:
    """Compares an evaluation with ``TEST.EXPECTED_RESULTS``; one that is off exits with code 1.

    Raises:
        UserError: the key is no list of task, metric, value and tolerance, or the evaluation has
            no such metric.
    """
    for expected in cfg.TEST.EXPECTED_RESULTS:
        if not (isinstance(expected, Sequence) and len(expected) == 4):
            raise UserError(
                f"TEST.EXPECTED_RESULTS has {expected!r}; write it as "
                "[['sem_seg', 'mIoU', 82.6, 0.5]]: task, metric, value, tolerance"
            )
        task, metric, *_ = expected
        if metric not in results.get(task, {}):
            known = [f"{name} {own}" for name, values in results.items() for own in values]
            raise UserError(
                f"TEST.EXPECTED_RESULTS names {task} {metric}, which the evaluation does not have; "
                + suggestion(f"{task} {metric}", known, "it has ")
            )
    verify_results(cfg, results)


def headline_metric(dataset_names: Sequence[str]) -> str:
    """Returns the first data set's headline metric by its name in detectron2's flat results."""

    task = main_task_of(dataset_names[0])
    metric = f"{task.still_name}/{task.headline}"
    return metric if len(dataset_names) == 1 else f"{dataset_names[0]}/{metric}"
