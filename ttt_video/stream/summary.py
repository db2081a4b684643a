"""Writes ``summary.json``: the numbers of a run, and what was run."""

from __future__ import annotations

import platform
import resource
from collections.abc import Iterable
from typing import Any

import detectron2
import torch
import yaml
from detectron2.config import CfgNode
from torch import nn

from ..errors import counted
from ..modeling.interface import parts_of
from ..modeling.weights import weights_hash
from ..tasks import LabelInfo
from ..version import __version__
from .directory import Row, RunDirectory
from .records import summarize


def source_facts(model: nn.Module) -> Row:
    """Returns a summary's entries about the model with its source weights."""
    return {"weights_sha256": weights_hash(model), "jointly_trained": "g" in parts_of(model)}


def process_facts(device: torch.device) -> Row:
    """Returns a summary's entries about this process, after it ran videos."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        peak = torch.cuda.max_memory_allocated(device) / 2**20
    else:
        name = f"CPU, {counted(torch.get_num_threads(), 'thread')}"
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    return {"device": name, "peak_memory_mib": peak}


def _depths(cfg: CfgNode) -> list[int] | None:
    """Returns the blocks of each stage of f, for a ResNet all layers; None if unknown."""
    known = {
        "MaskFormerTTT": cfg.MODEL.SWIN.DEPTHS,
        "SegFormer": cfg.MODEL.SEGFORMER.DEPTHS,
        "DeepLabV3Plus": [cfg.MODEL.RESNETS.DEPTH],
    }
    depths = known.get(cfg.MODEL.META_ARCHITECTURE)
    return None if depths is None else list(depths)


def write_summary(
    run: RunDirectory,
    cfg: CfgNode,
    video_ids: Iterable[str],
    *,
    dataset_name: str,
    complete: bool,
    **facts: Any,
) -> Row:
    """Computes the summary from the rows on disk, writes it and returns it.

    ``frame_budget_used`` is the share of ``TTT.FRAME_BUDGET_MS`` that updates and predictions took.
    ``gaps`` says where live sources went on.

    Args:
        run: the folder.
        cfg: resolved.
        video_ids: all videos of the run.
        dataset_name: "" if the videos are of no data set.
        complete: whether every video was run to its end.
        facts: :func:`source_facts` and :func:`process_facts`; ``peak_memory_mib`` is PyTorch's on
            a GPU, else the largest resident set of a process.
    """

    info, wanted = LabelInfo.of(dataset_name), set(video_ids)
    ended = [row for video_id, row in run.videos().items() if video_id in wanted]
    summary = summarize(run.rows(), info)
    if cfg.TTT.FRAME_BUDGET_MS and summary["frames"]:
        used = summary["seconds"]["frame"]["mean"] * 1000 / cfg.TTT.FRAME_BUDGET_MS
        summary["frame_budget_used"] = used
    summary.update(
        complete=complete,
        skipped_frames=[name for video in ended for name in video["skipped_frames"]],
        dataset=dataset_name,
        classes=list(info.classes),
        method=cfg.TTT.METHOD,
        preset=cfg.TTT.PRESET,
        settings=yaml.safe_load(cfg.TTT.dump()),
        architecture=cfg.MODEL.META_ARCHITECTURE,
        depths=_depths(cfg),
        seed=max(cfg.SEED, 0),
        weights=cfg.MODEL.WEIGHTS,
        **facts,
        versions={
            "ttt_video": __version__,
            "detectron2": detectron2.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    )
    if gaps := run.gaps():
        summary["gaps"] = gaps
    run.write_json("summary.json", summary)
    return summary
