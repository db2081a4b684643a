"""Gradients of l_m and l_s with respect to encoder f, at the source weights, frame by frame."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import transforms as T
from torch import Tensor, nn

from ..adaptation.gradient import GradientAdapter
from ..adaptation.sketch import Sketch
from ..data.mapper import JointDatasetMapper
from ..errors import UserError
from ..modeling.interface import prefixes
from ..structures import Frame, video_seed

SKETCH = 65521
"""Numbers that a gradient is compressed to, a prime."""

DRAWS = 2
"""Independent draws of each gradient, so that a product of both has no noise of the draws in it."""


@dataclass
class Gradients:
    """The gradients of one video, from two independent draws of masks and points.

    Attributes:
        video_id: the video.
        main: of l_m, (2, T, D) float32, as sketches.
        recon: of l_s, the same.
        main_loss, recon_loss: (T,) float64, means of both draws.
    """

    video_id: str
    main: np.ndarray
    recon: np.ndarray
    main_loss: np.ndarray
    recon_loss: np.ndarray


def labelled_samples(cfg: CfgNode, frames: Iterable[Frame]) -> Iterator[dict[str, Any]]:
    """Yields frames as training samples of the config's task: not augmented, at network size.

    Raises:
        UserError: a frame has no labels of that task, or the task is none of pixels or objects.
    """
    if cfg.INPUT.DATASET_MAPPER_NAME == "image_classes":
        raise UserError(
            "locality is measured on videos, and INPUT.DATASET_MAPPER_NAME is of images"
        )
    for frame in frames:
        size = tuple(frame["image"].shape[-2:])
        arguments = JointDatasetMapper.from_config(cfg)
        arguments.update(augmentations=[T.Resize(size)], size_divisibility=0)
        record = {key: value for key, value in frame.items() if key != "image"}
        sample = JointDatasetMapper(**arguments)(record)
        if cfg.INPUT.GREY == "off":  # else the colours are the labels, and the model turns it grey
            sample["image"] = frame["image"]  # exactly the stream's
        yield sample


def measure_gradients(
    adapter: GradientAdapter,
    video_id: str,
    samples: Iterable[Mapping[str, Any]],
    *,
    masks: int,
    size: int = SKETCH,
    seed: int = 0,
    each: Callable[[], object] = lambda: None,
) -> Gradients:
    """Computes both gradients of every frame at the adapter's weights, which stay as they are.

    Args:
        adapter: its losses are l_s, such as those of ``online_ttt_mae``.
        video_id: the video's name, which decides the draws together with ``seed``.
        samples: of :func:`labelled_samples`, in time order.
        masks: masked copies of a frame in one draw of l_s.
        size: of the sketches.
        seed: of all draws.
        each: is called after every frame.

    Raises:
        UserError: the model has no labelled loss, or there are no frames.
    """
    model: Any = adapter.model
    if not hasattr(model, "main_losses"):
        raise UserError(
            f"a {type(model).__name__} has no labelled loss (main_losses): measure locality with a "
            "model that trains here, such as MaskFormerTTT"
        )
    encoder = {
        name: p for name, p in model.named_parameters() if name.startswith(prefixes(model, "f"))
    }
    wanted = {name: p.requires_grad for name, p in encoder.items()}
    try:
        for parameter in encoder.values():
            parameter.requires_grad_(True)
        return _measure(adapter, video_id, samples, encoder, masks, size, seed, each)
    finally:
        for name, parameter in encoder.items():
            parameter.requires_grad_(wanted[name])


def _measure(
    adapter: GradientAdapter,
    video_id: str,
    samples: Iterable[Mapping[str, Any]],
    encoder: Mapping[str, nn.Parameter],
    masks: int,
    size: int,
    seed: int,
    each: Callable[[], object],
) -> Gradients:
    model: Any = adapter.model
    parameters = list(encoder.values())
    lengths = [p.numel() for p in parameters]
    sketch = Sketch(lengths, size, seed, parameters[0].device)
    generator = torch.Generator()
    vectors: list[Tensor] = []
    losses: list[tuple[float, float]] = []
    for index, sample in enumerate(samples):
        values = np.zeros(2)
        for draw in range(DRAWS):
            own = video_seed(seed, f"{video_id}/{index}/{draw}")
            generator.manual_seed(own)
            recon = adapter.losses([{"image": sample["image"]}] * masks, generator)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(own)  # the points of Mask2Former's losses
                main = model.main_losses([dict(sample)])
            for place, loss in enumerate(
                (torch.stack(list(main.values())).sum(), recon["loss_recon"])
            ):
                values[place] += float(loss.detach()) / DRAWS
                parts = torch.autograd.grad(loss, parameters, allow_unused=True)
                vectors.append(sketch(parts).cpu())
        losses.append((values[0], values[1]))
        each()
    if not losses:
        raise UserError(f"video {video_id} has no frames")
    shape = (len(losses), DRAWS, 2, sketch.size)
    stacked = torch.stack(vectors).view(shape).permute(2, 1, 0, 3).contiguous().numpy()
    main_loss, recon_loss = np.array(losses).T
    return Gradients(video_id, stacked[0], stacked[1], main_loss, recon_loss)
