"""The mapper of training for image classification: a random part of each image, and its class."""

from __future__ import annotations

from typing import Any

import numpy as np
from detectron2.config import CfgNode
from PIL import Image

from ..errors import UserError, require
from ..formats.images import FrameTransform
from ..tasks import ImageClassTask, Task
from .mapper import JointDatasetMapper, Record, mapper_names, read_image


class ImageClassMapper:
    """Reads and augments one image: ``image`` (3, S, S) uint8 RGB and ``class_id``.

    The image is a random part, resized (bicubic) and mirrored at random, as in MAE's training; S is
    ``INPUT.IMAGE_SIZE``. Where ``INPUT.RANDOM_RESIZED_CROP`` is [] it is what a stream predicts.
    Draws come from Python's global generator, which the loader seeds for each sample.
    """

    task: type[Task] = ImageClassTask

    def __init__(self, cfg: CfgNode, *, labelled: bool = True) -> None:
        """
        Args:
            cfg: with ``INPUT.*``.
            labelled: False leaves the class out: the result has ``image`` alone.

        Raises:
            UserError: images are to be mirrored upside down.
        """
        if cfg.INPUT.RANDOM_FLIP == "vertical":
            raise UserError(
                "INPUT.RANDOM_FLIP is 'vertical', which image classification does not have: set it "
                "to horizontal or none"
            )
        self.transform = FrameTransform.from_config(cfg)
        self.size = cfg.INPUT.IMAGE_SIZE
        self.share = tuple(cfg.INPUT.RANDOM_RESIZED_CROP)
        self.flip = cfg.INPUT.RANDOM_FLIP == "horizontal"
        self.labelled = labelled

    def __call__(self, record: Record) -> dict[str, Any]:
        """Maps one dataset dict, which is not modified.

        Raises:
            UserError: the image cannot be read, or has no class.
        """
        if self.labelled and "class_id" not in record:
            raise UserError(
                f"{record['file_name']}: image classification needs 'class_id' in the data set; "
                "choose another data set or INPUT.DATASET_MAPPER_NAME, or TTT.JOINT pretrain, "
                "which needs no labels"
            )
        pixels = read_image(dict(record), "RGB")
        pixels = self._random_part(pixels) if self.share else self.transform.view(pixels)
        # numpy's generator is seeded for each sample, too.
        if self.flip and np.random.random() < 0.5:  # noqa: NPY002
            pixels = pixels[:, ::-1]
        sample: dict[str, Any] = {"image": self.transform(pixels)}
        if self.labelled:
            sample["class_id"] = record["class_id"]
        return sample

    def _random_part(self, pixels: np.ndarray) -> np.ndarray:
        transforms = require("timm.data.transforms", "'ttt_video[images]'", "a random part")
        crop = transforms.RandomResizedCropAndInterpolation
        image = Image.fromarray(np.ascontiguousarray(pixels))
        top, left, height, width = crop.get_params(image, self.share, (3 / 4, 4 / 3))
        box = (left, top, left + width, top + height)
        part = image.crop(box).resize((self.size, self.size), Image.Resampling.BICUBIC)
        return np.asarray(part)


def training_mapper(
    cfg: CfgNode, *, labelled: bool = True
) -> ImageClassMapper | JointDatasetMapper:
    """Returns the mapper of ``INPUT.DATASET_MAPPER_NAME``, which has the ``task`` that it is for.

    Raises:
        UserError: there is no such mapper, or a key does not fit it.
    """
    task, _ = mapper_names().get(cfg.INPUT.DATASET_MAPPER_NAME, (None, ""))
    if task is ImageClassTask:
        return ImageClassMapper(cfg, labelled=labelled)
    return JointDatasetMapper(cfg, True, labelled=labelled)
