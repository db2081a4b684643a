"""A classifier of images with masked reconstruction, small enough for every test."""

from __future__ import annotations

import torch
from detectron2.modeling import META_ARCH_REGISTRY
from torch import nn

from ttt_video.modeling.interface import normalized_images
from ttt_video.modeling.masking import PatchMasks, patchify
from ttt_video.modeling.pixel_classes import MainTask, PixelClasses

PATCH, WIDTH, SIDE = 4, 16, 28

OPTS = [
    "MODEL.META_ARCHITECTURE", "TinyImageClasses",
    "MODEL.VIT_MAE.NUM_CLASSES", "10",
    "MODEL.DEVICE", "cpu",
    "INPUT.MIN_SIZE_TEST", "0",
    "INPUT.IMAGE_SIZE", "28",
    "INPUT.SINGLE_CROP", "28",
    "DATASETS.TRAIN", "()",
    "DATASETS.TEST", "()",
    "TTT.MASK_PATCH_SIZE", "4",
    "TTT.MASK_RATIO", "0.75",
    "TTT.BATCH_SIZE", "4",
    "TTT.MICRO_BATCH_SIZE", "4",
    "TTT.OPTIMIZER.BASE_LR", "0.1",
]  # fmt: skip


@META_ARCH_REGISTRY.register()
class TinyImageClasses(nn.Module):
    """Has all that ``AdaptableModel`` asks for; f sees each patch by itself."""

    outputs = frozenset({"image_class"})

    def __init__(self, cfg) -> None:
        super().__init__()
        self.parts = {"f": "encoder", "g": "painter", "h": "classifier"}
        size = 3 * PATCH**2
        self.encoder = nn.Sequential(
            nn.Linear(size, WIDTH), nn.LayerNorm(WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH),
            nn.Dropout(0.5),
        )  # fmt: skip
        self.painter = nn.Linear(WIDTH, size)
        tokens = (SIDE // PATCH) ** 2
        self.classifier = nn.Linear(tokens * WIDTH, cfg.MODEL.VIT_MAE.NUM_CLASSES)
        self.masks = PatchMasks.from_config(cfg)
        for name in ("pixel_mean", "pixel_std"):
            values = torch.tensor(cfg.MODEL[name.upper()]).view(3, 1, 1)
            self.register_buffer(name, values, persistent=False)

    @property
    def device(self):
        return self.pixel_mean.device

    def normalize(self, batched_inputs):
        return normalized_images(batched_inputs, self.pixel_mean, self.pixel_std, PATCH)

    def encode(self, pixels, visible=None):
        return self.encoder(patchify(pixels if visible is None else pixels * visible, PATCH))

    def _logits(self, batched_inputs, visible=None):
        pixels = self.normalize(batched_inputs).tensor
        return self.classifier(self.encode(pixels, visible).flatten(1))

    def main_task(self, batched_inputs, *, mask_with=None):
        logits = self._logits(batched_inputs)
        pixels = PixelClasses.of_logits(logits[..., None, None])
        return MainTask(pixels, torch.ones(len(logits), 1, 1))

    def reconstruction_losses(self, batched_inputs, generator=None):
        images = self.normalize(batched_inputs)
        visible = self.masks.of_batch(batched_inputs, images, generator)
        painted = self.painter(self.encode(images.tensor, visible))
        error = (painted - patchify(images.tensor, PATCH)) ** 2
        return {"loss_recon": error.mean()}

    def forward(self, batched_inputs):
        return [{"image_class": logits} for logits in self._logits(batched_inputs)]
