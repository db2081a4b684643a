"""Trains or evaluates a model on still images: detectron2's flags, our configs.

%(prog)s --config quick/joint_world.yaml OUTPUT_DIR output/world
%(prog)s --config joint_cityscapes.yaml --num-gpus 8 MODEL.WEIGHTS swin_s.pkl
%(prog)s --config joint_cityscapes.yaml --eval-only MODEL.WEIGHTS model.pth
"""

from __future__ import annotations

import argparse
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .arguments import ToolParser, add_config_arguments

if TYPE_CHECKING:
    from detectron2.config import CfgNode

logger = logging.getLogger("ttt_video.train_net")


def argument_parser(prog: str | None = None) -> ToolParser:
    """Returns a parser of detectron2's flags, with its names and defaults, and of the config's."""
    parser = ToolParser(prog, __doc__)
    parser.add_argument("--resume", action="store_true", help="go on with the run in OUTPUT_DIR")
    parser.add_argument("--eval-only", action="store_true", help="evaluate, and train nothing")
    parser.add_argument("--num-gpus", type=int, default=1, metavar="N", help="of each machine")
    parser.add_argument("--num-machines", type=int, default=1, metavar="N", help="in all")
    parser.add_argument("--machine-rank", type=int, default=0, metavar="N", help="of this one")
    # A port of the user's own, so that two people on one machine do not meet.
    port = 2**15 + 2**14 + hash(os.getuid()) % 2**14
    parser.add_argument(
        "--dist-url",
        default=f"tcp://127.0.0.1:{port}",
        metavar="URL",
        help="where processes meet; with several machines tcp://HOST:PORT of the first",
    )
    parser.add_argument(
        "--from-scratch",
        action="store_true",
        help="train from random weights: sets SOLVER.FROM_SCRATCH, without which MODEL.WEIGHTS is "
        "asked for",
    )
    add_config_arguments(parser, trains=True)
    return parser


def build_config(args: argparse.Namespace) -> CfgNode:
    """The frozen config of the run; fails here, before any process is started, when it cannot."""
    import torch

    from ttt_video.config import check_device, find_config, load_config
    from ttt_video.errors import UserError
    from ttt_video.files import make_folder

    if not args.config_file:
        raise UserError("no config; give --config FILE, such as --config quick/joint_world.yaml")
    args.config_file = str(find_config(args.config_file))
    cfg = load_config(
        args.config_file, args.preset, args.opts, allow_unsafe_yaml=args.allow_unsafe_yaml
    )
    check_device(cfg.MODEL.DEVICE)
    gpus = torch.cuda.device_count()
    if args.num_gpus < 1:
        raise UserError(f"--num-gpus is {args.num_gpus}; give at least 1, without GPUs too")
    # On the CPU it is the number of processes.
    if cfg.MODEL.DEVICE.startswith("cuda") and args.num_gpus > gpus:
        raise UserError(f"--num-gpus is {args.num_gpus}; this machine has {gpus}")
    if args.num_machines < 1 or not 0 <= args.machine_rank < args.num_machines:
        raise UserError(
            f"--machine-rank is {args.machine_rank} and --num-machines {args.num_machines}; ranks "
            "count from 0"
        )
    resumed = args.resume and (Path(cfg.OUTPUT_DIR) / "last_checkpoint").is_file()
    if args.eval_only and not (cfg.MODEL.WEIGHTS or resumed):
        raise UserError(
            "nothing to evaluate; give MODEL.WEIGHTS FILE, or --resume and the OUTPUT_DIR of a "
            "training"
        )
    if args.from_scratch:
        if cfg.MODEL.WEIGHTS:
            raise UserError(
                f"--from-scratch and MODEL.WEIGHTS {cfg.MODEL.WEIGHTS} exclude each other; leave "
                "one out"
            )
        cfg.SOLVER.FROM_SCRATCH = True
    if not (args.eval_only or resumed or cfg.MODEL.WEIGHTS or cfg.SOLVER.FROM_SCRATCH):
        raise UserError(
            f"{args.config_file} trains from given weights, and MODEL.WEIGHTS is empty; add "
            "MODEL.WEIGHTS FILE at the end, Mask2Former's checkpoint with a Swin-S, from which the "
            "paper starts, or ImageNet's swin_small_patch4_window7_224; or add --from-scratch, "
            "before the overrides, to train from random weights"
        )
    make_folder(Path(cfg.OUTPUT_DIR), "OUTPUT_DIR")
    cfg.freeze()
    return cfg


def set_up(cfg: CfgNode, args: argparse.Namespace) -> None:
    """Opens the logs and seeds the random numbers of a process, as detectron2's ``default_setup``.

    The environment and the config, hundreds of lines, go to ``log.txt`` alone.
    """
    import torch
    from detectron2.utils import comm
    from detectron2.utils.collect_env import collect_env_info
    from detectron2.utils.env import seed_all_rng

    from ttt_video.training.directory import LOG_FILE_ONLY, open_logs

    open_logs(cfg.OUTPUT_DIR)
    rank = comm.get_rank()
    logger.info("Process %d of %d; %s", rank, comm.get_world_size(), args, extra=LOG_FILE_ONLY)
    logger.info("Environment:\n%s", collect_env_info(), extra=LOG_FILE_ONLY)
    logger.info("Config:\n%s", cfg.dump(), extra=LOG_FILE_ONLY)
    seed_all_rng(None if cfg.SEED < 0 else cfg.SEED + rank)
    if not args.eval_only:
        torch.backends.cudnn.benchmark = cfg.CUDNN_BENCHMARK


def train_or_evaluate(args: argparse.Namespace, cfg: CfgNode) -> dict[str, Any] | None:
    """Runs in every training process."""
    from detectron2.utils import comm

    from ttt_video.modeling.checkpointer import TTTCheckpointer
    from ttt_video.modeling.interface import prefixes
    from ttt_video.plugins import run_files
    from ttt_video.training.directory import keep_to_images
    from ttt_video.training.joint_training import JointTrainer, check_results

    run_files(args.register)
    set_up(cfg, args)
    if args.eval_only:
        JointTrainer.check_evaluation(cfg)
        model = JointTrainer.build_model(cfg)
        # Predictions need no decoder g, and must not see random weights of a widened input.
        checkpointer = TTTCheckpointer(
            model, cfg.OUTPUT_DIR, allow_new=prefixes(model, "g"), extra_channels="zero"
        )
        last = checkpointer.get_checkpoint_file() if args.resume else ""
        checkpointer.load(last or cfg.MODEL.WEIGHTS, checkpointables=[])
        results = JointTrainer.test(cfg, model)
        if comm.is_main_process():
            check_results(cfg, results)
        return results
    trainer = JointTrainer(cfg)
    keep_to_images(cfg, trainer.data_loader.stream.records)
    trainer.resume_or_load(resume=args.resume)
    return trainer.train()


def run(args: argparse.Namespace) -> None:
    """Starts one process per GPU."""
    from detectron2.engine import launch
    from torch.multiprocessing import ProcessRaisedException

    from ttt_video.errors import error_of_process
    from ttt_video.training.directory import training_directory

    cfg = build_config(args)
    folder = training_directory(
        cfg, resume=args.resume, evaluate=args.eval_only, writes=args.machine_rank == 0
    )
    try:
        with folder:
            launch(
                train_or_evaluate,
                args.num_gpus,
                num_machines=args.num_machines,
                machine_rank=args.machine_rank,
                dist_url=args.dist_url,
                args=(args, cfg),
            )
    except ProcessRaisedException as error:  # its message is the traceback of the process
        known = error_of_process(str(error))
        if known is None:
            raise
        raise known from None
