"""Makes models and inputs to measure with, of noise, because values change no cost."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Instances
from PIL import Image

from ttt_video.adaptation import NoAdaptation, SlidingWindow
from ttt_video.errors import UserError
from ttt_video.modeling.meta_arch import MaskFormerTTT
from ttt_video.stream import Stream, load_source_model

MASKS = 12  # per synthetic image, about as many as in Cityscapes
VIDEO = "benchmark"


def model_of(cfg: CfgNode) -> Any:
    """Builds the config's model in eval mode, with ``MODEL.WEIGHTS`` if named, else random ones."""
    torch.manual_seed(0)
    return load_source_model(cfg) if cfg.MODEL.WEIGHTS else build_model(cfg).eval()


def frozen_stream(model: Any) -> Stream:
    """Builds the stream that predicts with a model and never adapts it."""
    return Stream(NoAdaptation(model), SlidingWindow(1, model.device))


def peer_of(cfg: CfgNode, model: Any) -> Any:
    """Builds Hugging Face's Mask2Former with the model's weights.

    Raises:
        UserError: the model is no Mask2Former with decoder g, or transformers is not installed.
    """
    if not isinstance(model, MaskFormerTTT) or "g" not in model.parts:
        raise UserError(
            f"{cfg.MODEL.META_ARCHITECTURE} with these weights has no counterpart among Hugging "
            "Face's models that could be compared: add --no-peers"
        )
    try:
        from costs import huggingface
    except ImportError as error:
        raise UserError(
            "the comparison with Hugging Face's Mask2Former needs transformers: "
            "pip install 'transformers>=5.20,<6', or add --no-peers"
        ) from error
    return huggingface.build_peer(cfg, model)


def frames(
    count: int, height: int, width: int, *, seed: int = 0
) -> Callable[[int], dict[str, Any]]:
    """Returns a video of noise: ``frame(index)``, which repeats ``count`` different pictures."""
    generator = torch.Generator().manual_seed(seed)
    size = (3, height, width)
    images = [
        torch.randint(256, size, generator=generator, dtype=torch.uint8) for _ in range(count)
    ]

    def frame(index: int) -> dict[str, Any]:
        return {
            "image": images[index % count],
            "height": height,
            "width": width,
            "video_id": VIDEO,
            "frame_index": index,
            "file_name": f"{VIDEO}/{index}",
        }

    return frame


def labelled_images(batch: int, size: list[int], num_classes: int) -> list[dict[str, Any]]:
    """Returns training inputs of (height, width): noise labelled with vertical stripes."""
    height, width = size
    generator = torch.Generator().manual_seed(0)
    stripes = torch.arange(width).mul(MASKS).div(width, rounding_mode="floor")
    masks = (stripes == torch.arange(MASKS)[:, None])[:, None].expand(-1, height, -1)
    inputs = []
    for _ in range(batch):
        instances = Instances((height, width))
        instances.gt_classes = torch.arange(MASKS) % num_classes
        instances.gt_masks = BitMasks(masks)
        shape = (3, height, width)
        image = torch.randint(256, shape, generator=generator, dtype=torch.uint8)
        inputs.append({"image": image, "instances": instances})
    return inputs


def write_video(folder: Path, count: int, height: int, width: int, num_classes: int) -> str:
    """Writes PNG frames and label maps, and registers them as a data set for this process.

    The frames are smooth, so that they decode like photographs rather than like noise.

    Returns:
        The data set's name.
    """
    rng = np.random.default_rng(0)
    small = (max(height // 16, 1), max(width // 16, 1))
    stripes = (np.arange(width) * num_classes // width).astype(np.uint8)
    labels = Image.fromarray(np.broadcast_to(stripes, (height, width)).copy())
    records = []
    for index in range(count):
        pixels = Image.fromarray(rng.integers(0, 256, (*small, 3), dtype=np.uint8))
        picture = np.asarray(pixels.resize((width, height), Image.Resampling.BICUBIC))
        grain = rng.integers(0, 8, picture.shape, dtype=np.uint8)
        file = folder / f"{index:06d}.png"
        Image.fromarray(np.minimum(picture, 247) + grain).save(file)
        labels.save(folder / f"{index:06d}_sem.png")
        records.append(
            {
                "file_name": str(file),
                "sem_seg_file_name": str(folder / f"{index:06d}_sem.png"),
                "video_id": VIDEO,
                "frame_index": index,
                "height": height,
                "width": width,
            }
        )
    (folder / "frames.json").write_text(json.dumps(records))
    name = f"benchmark_{folder.resolve()}"
    if name in DatasetCatalog:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    DatasetCatalog.register(name, lambda: records)
    MetadataCatalog.get(name).set(
        stuff_classes=[f"class {i}" for i in range(num_classes)],
        ignore_label=255,
        evaluator_type="video_sem_seg",
    )
    return name
