"""Follows both losses of one labelled frame through gradient steps on it (paper, Figure 3)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from torch import Tensor

from ..adaptation.gradient import GradientAdapter
from ..adaptation.window import SlidingWindow
from ..structures import video_seed


@dataclass
class FrameSteps:
    """One frame as gradient steps go on.

    Attributes:
        video_id, frame_index: the frame.
        image, masked: the frame and what f sees of it in the pictures, (H, W, 3) uint8 RGB.
        reconstructions: by number of steps, the same.
        recon_loss: l_s by number of steps, always with the same masks.
        main_loss: l_m by number of steps, the loss of joint training.
    """

    video_id: str
    frame_index: int
    image: np.ndarray
    masked: np.ndarray
    reconstructions: dict[int, np.ndarray] = field(default_factory=dict)
    recon_loss: dict[int, float] = field(default_factory=dict)
    main_loss: dict[int, float] = field(default_factory=dict)


def follow_steps(
    cfg: CfgNode,
    adapter: GradientAdapter,
    sample: Mapping[str, Any],
    frame: Mapping[str, Any],
    steps: Sequence[int],
) -> FrameSteps:
    """Takes steps on one frame alone, from the source weights, to which it returns at the end.

    Args:
        cfg: the adapter's, for its seed, its batch size and the order of its colours.
        adapter: its losses are l_s.
        sample: the labelled frame, of :func:`~.gradients.labelled_samples`.
        frame: the frame as a stream gives it.
        steps: numbers of steps after which to look; 0 is before the first.
    """
    window = SlidingWindow(1, adapter.device)
    window.push(frame)
    seed = video_seed(max(cfg.SEED, 0), f"{frame['video_id']}/{frame['frame_index']}")
    generator = torch.Generator().manual_seed(seed)
    found: FrameSteps | None = None
    wanted = sorted({*steps})
    try:
        for count in range(wanted[-1] + 1):
            if count:
                adapter.take_steps(1, window, generator)
            if count in wanted:
                found = _look(cfg, adapter, sample, seed, count, found)
    finally:
        adapter.reset()
    assert found is not None
    return found


@torch.no_grad()
def _look(
    cfg: CfgNode,
    adapter: GradientAdapter,
    sample: Mapping[str, Any],
    seed: int,
    count: int,
    found: FrameSteps | None,
) -> FrameSteps:
    model: Any = adapter.model
    image: Tensor = sample["image"]
    shown = {"image": image, "height": image.shape[-2], "width": image.shape[-1]}
    # The same masks, and points of Mask2Former's losses, at every look.
    output = model.reconstruct([shown], torch.Generator().manual_seed(seed))[0]
    masks = torch.Generator().manual_seed(seed + 1)
    recon = adapter.losses([{"image": image}] * cfg.TTT.BATCH_SIZE, masks)["loss_recon"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        main = torch.stack([*model.main_losses([dict(sample)]).values()]).sum()
    if found is None:
        masked = _picture(output["masked_input"], cfg.INPUT.FORMAT)
        place = sample["video_id"], sample["frame_index"]
        found = FrameSteps(*place, _picture(image, cfg.INPUT.FORMAT), masked)
    found.reconstructions[count] = _picture(output["recon"], cfg.INPUT.FORMAT)
    found.recon_loss[count], found.main_loss[count] = float(recon), float(main)
    return found


def _picture(image: Tensor, order: str) -> np.ndarray:
    pixels = image.detach().float().cpu().round().clamp(0, 255).to(torch.uint8)
    return (pixels.flip(0) if order == "BGR" else pixels).permute(1, 2, 0).contiguous().numpy()
