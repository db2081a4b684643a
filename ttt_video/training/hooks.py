"""Hooks of detectron2's trainers that joint training runs around its steps."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

import torch
from detectron2.engine import HookBase
from torch import nn

from ..errors import UserError
from ..files import read_json_object, save_torch, write_atomically
from ..modeling import MaskFormerTTT
from ..modeling.checkpointer import TTTCheckpointer
from .stages import Stage

logger = logging.getLogger(__name__)


class FrozenParts(HookBase):
    """Keeps parts that do not learn in eval mode: no stochastic depth, no moving batch statistics.

    It does so before every step, because evaluations return the whole model to train mode.
    """

    def __init__(self, model: nn.Module, stage: Stage):
        frozen = stage.frozen(model)
        self.frozen = [m for name, m in model.named_modules() if f"{name}.".startswith(frozen)]

    def before_step(self) -> None:
        """Called by the trainer."""
        for module in self.frozen:
            module.training = False


class KeepBest(HookBase):
    """Keeps the weights with the best metric in ``model_best.pth``, and the metric in a JSON file.

    Unlike detectron2's ``BestCheckpointer`` it never overwrites the file that a resume starts from,
    and a resumed training still compares with the best so far (``model_best.json``).

    Args:
        checkpointer: knows which weights to keep, and where both files go.
        metric: a name in the event storage.
        direction: 1 if higher is better, -1 if lower is.
    """

    def __init__(self, checkpointer: TTTCheckpointer, metric: str, direction: int = 1):
        self.checkpointer = checkpointer
        self.metric = metric
        self.direction = direction
        self.weights = Path(checkpointer.save_dir) / "model_best.pth"
        self.record = Path(checkpointer.save_dir) / "model_best.json"
        self.best = -direction * float("inf")
        self._seen = -1

    def before_train(self) -> None:
        """Reads the record of the training that is being resumed.

        Raises:
            UserError: the record is damaged.
        """
        if self.trainer.start_iter > 0 and self.record.is_file():
            self.best = self._recorded()

    def _recorded(self) -> float:
        fix = "delete it and the best weights are looked for anew, from here on"
        try:
            value = read_json_object(self.record).get("value")
        except UserError as error:
            raise UserError(f"{error}; {fix}") from error
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not math.isfinite(value)
        ):
            raise UserError(f"{self.record} says {value!r} where a metric's value belongs; {fix}")
        return value

    def after_step(self) -> None:
        """Saves if an evaluation since the last call gave a new best value (never NaN)."""
        value, iteration = self.trainer.storage.latest().get(self.metric, (float("nan"), -1))
        new, self._seen = iteration != self._seen, iteration
        if not (new and self.direction * value > self.direction * self.best):
            return
        self.best = float(value)
        record = {"metric": self.metric, "value": self.best, "iteration": int(iteration)}
        save_torch(self.weights, {"model": self.checkpointer.weights()})
        write_atomically(self.record, lambda part: part.write_text(json.dumps(record) + "\n"))
        logger.info("Best %s so far: %.3f, kept in %s", self.metric, self.best, self.weights)

    after_train = after_step  # the last evaluation runs after the last step


class ReconstructionPictures(HookBase):
    """Shows how decoder g fills in the same masked images as training goes on.

    Each picture is image, masked input and reconstruction side by side. It goes to the event
    storage, from which TensorBoard shows it.

    Args:
        model: the bare model, not wrapped for data parallelism.
        images: each (3, H, W) uint8, in ``image_format`` order.
        period: steps between pictures.
        image_format: "RGB" or "BGR".
    """

    def __init__(
        self, model: MaskFormerTTT, images: list[torch.Tensor], period: int, image_format: str
    ):
        self.model = model
        self.inputs: list[dict[str, Any]] = [
            {"image": image, "height": image.shape[1], "width": image.shape[2]} for image in images
        ]
        self.period = period
        self.image_format = image_format

    def after_step(self) -> None:
        """Draws at the end of every period and of the training."""
        step = self.trainer.iter + 1
        if step % self.period == 0 or step == self.trainer.max_iter:
            self.draw()

    def draw(self) -> None:
        """Puts one picture per sample into the trainer's event storage."""
        was_training = self.model.training
        self.model.eval()
        with torch.no_grad(), torch.random.fork_rng():
            torch.manual_seed(0)  # the same masks every time, so that pictures compare
            outputs = self.model.reconstruct(self.inputs)
        self.model.train(was_training)
        for i, (shown, output) in enumerate(zip(self.inputs, outputs, strict=True)):
            columns = [shown["image"], output["masked_input"], output["recon"]]
            picture = torch.cat([column.detach().float().cpu() for column in columns], dim=2)
            if self.image_format == "BGR":
                picture = picture.flip(0)
            picture = picture.round().clamp(0, 255).to(torch.uint8)
            self.trainer.storage.put_image(f"reconstruction/{i}", picture)
