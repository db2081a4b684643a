"""Trains or evaluates a model on still images: detectron2's flags, our configs.

python tools/train_net.py --config quick/joint_world.yaml OUTPUT_DIR output/world
python tools/train_net.py --config joint_cityscapes.yaml --num-gpus 8 MODEL.WEIGHTS swin_s.pkl
python tools/train_net.py --config joint_cityscapes.yaml --eval-only MODEL.WEIGHTS model.pth
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from _arguments import ToolParser, add_config_arguments, answer_first


def argument_parser() -> argparse.ArgumentParser:
    """detectron2's flags with its names and defaults, and what is merged on top of a config."""
    parser = ToolParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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
    add_config_arguments(parser)
    return parser


answer_first(__name__, argument_parser().parse_args)

import torch
from detectron2.config import CfgNode
from detectron2.engine import default_setup, launch
from detectron2.evaluation import verify_results
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from torch.multiprocessing import ProcessRaisedException

from ttt_video.cli import check_device, find_config, load_config, run_files, run_tool
from ttt_video.engine.joint_training import JointTrainer
from ttt_video.errors import UserError, error_of_process
from ttt_video.files import make_folder
from ttt_video.modeling.weights import TTTCheckpointer


def build_config(args: argparse.Namespace) -> CfgNode:
    """The frozen config of the run; fails here, before any process is started, when it cannot."""
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
    if args.eval_only and not (cfg.MODEL.WEIGHTS or args.resume):
        raise UserError("nothing to evaluate; give MODEL.WEIGHTS FILE, or --resume")
    last = Path(cfg.OUTPUT_DIR) / "last_checkpoint"
    if last.is_file() and not (args.resume or args.eval_only):
        raise UserError(
            f"{cfg.OUTPUT_DIR} already holds a training run; add --resume to go on with it, or "
            "choose another OUTPUT_DIR"
        )
    make_folder(Path(cfg.OUTPUT_DIR), "OUTPUT_DIR")
    cfg.freeze()
    return cfg


def train_or_evaluate(args: argparse.Namespace, cfg: CfgNode) -> dict[str, Any] | None:
    """Runs in every training process."""
    run_files(args.register)
    default_setup(cfg, args)
    # The report of what became of every weight, among other things.
    setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="ttt_video")
    if args.eval_only:
        JointTrainer.check_evaluation(cfg)
        model = JointTrainer.build_model(cfg)
        # Predictions need no decoder g, and must not see random weights of a widened input.
        checkpointer = TTTCheckpointer(
            model, cfg.OUTPUT_DIR, allow_new=("recon_head.",), extra_channels="zero"
        )
        last = checkpointer.get_checkpoint_file() if args.resume else ""
        checkpointer.load(last or cfg.MODEL.WEIGHTS, checkpointables=[])
        results = JointTrainer.test(cfg, model)
        if comm.is_main_process():
            verify_results(cfg, results)
        return results
    trainer = JointTrainer(cfg)
    trainer.resume_or_load(resume=args.resume)
    return trainer.train()


def main(argv: list[str] | None = None) -> None:
    """Parses the arguments and starts one process per GPU."""
    args = argument_parser().parse_args(argv)
    cfg = build_config(args)
    try:
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


if __name__ == "__main__":
    run_tool(main)
