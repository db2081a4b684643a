"""A model of your own: convolutions with a mask channel, one head for classes and one for pixels.

python examples/new_model.py small.pth
python tools/stream_eval.py --video VIDEO --register examples/new_model.py --weights small.pth \
    --config quick/joint_world.yaml --method online_ttt_mae MODEL.META_ARCHITECTURE SmallNetwork

The first command writes random weights: train the network before you believe what it predicts.
"""

import sys

import torch
import torch.nn.functional as F
from detectron2.modeling import META_ARCH_REGISTRY, build_model
from detectron2.modeling.postprocessing import sem_seg_postprocess
from torch import nn

from ttt_video.config import load_config
from ttt_video.modeling.interface import normalized_images, output_size
from ttt_video.modeling.masking import PatchMasks
from ttt_video.modeling.pixel_classes import MainTask, PixelClasses, image_area
from ttt_video.modeling.reconstruction import reconstruction_loss

STRIDE = 4


def layer(inputs, outputs):
    """Halves the size of a map."""
    convolution = nn.Conv2d(inputs, outputs, kernel_size=3, stride=2, padding=1)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU())


@META_ARCH_REGISTRY.register()
class SmallNetwork(nn.Module):
    """Has all that `ttt_video.modeling.interface.AdaptableModel` asks for."""

    outputs = frozenset({"sem_seg"})

    def __init__(self, cfg):
        super().__init__()
        self.parts = {"f": "encoder", "g": "painter", "h": "classifier"}
        self.encoder = nn.Sequential(layer(4, 16), layer(16, 32))
        self.painter = nn.Conv2d(32, 3 * STRIDE**2, kernel_size=1)
        self.classifier = nn.Conv2d(32, cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES, kernel_size=1)
        self.masks = PatchMasks.from_config(cfg)
        self.region = cfg.TTT.RECON.REGION
        for name in ("pixel_mean", "pixel_std"):
            values = torch.tensor(cfg.MODEL[name.upper()]).view(3, 1, 1)
            self.register_buffer(name, values, persistent=False)

    @property
    def device(self):
        """Where the model lives."""
        return self.pixel_mean.device

    def normalize(self, batched_inputs):
        """Pads to whole cells."""
        return normalized_images(batched_inputs, self.pixel_mean, self.pixel_std, STRIDE)

    def encode(self, pixels, visible=None):
        """f: (B, 32, H / 4, W / 4). Masked pixels are 0, and the fourth channel says which."""
        if visible is None:
            visible = torch.ones_like(pixels[:, :1])
        return self.encoder(torch.cat([pixels * visible, visible], dim=1))

    def main_task(self, batched_inputs, *, mask_with=None):
        """h: a class for every cell."""
        images, visible = self.normalize(batched_inputs), None
        if mask_with is not None:
            visible = self.masks.of_batch(batched_inputs, images, mask_with)
        logits = self.classifier(self.encode(images.tensor, visible))
        return MainTask(PixelClasses.of_logits(logits), image_area(images, *logits.shape[-2:]))

    def reconstruction_losses(self, batched_inputs, generator=None):
        """g: the pixels of every cell."""
        images = self.normalize(batched_inputs)
        visible = self.masks.of_batch(batched_inputs, images, generator)
        painted = F.pixel_shuffle(self.painter(self.encode(images.tensor, visible)), STRIDE)
        inside = image_area(images, *painted.shape[-2:])[:, None]
        loss = reconstruction_loss(
            painted, images.tensor, visible, region=self.region, inside=inside
        )
        return {"loss_recon": loss}

    def forward(self, batched_inputs):
        """Predicts class probabilities at the size that each input asks for."""
        images = self.normalize(batched_inputs)
        logits = self.classifier(self.encode(images.tensor))
        logits = F.interpolate(logits, scale_factor=STRIDE, mode="bilinear")
        results = []
        for x, scores, size in zip(batched_inputs, logits, images.image_sizes, strict=True):
            scores = sem_seg_postprocess(scores, size, *output_size(x, size))
            results.append({"sem_seg": scores.softmax(0)})
        return results


if __name__ == "__main__":
    cfg = load_config(
        "quick/joint_world.yaml",
        opts=["MODEL.META_ARCHITECTURE", "SmallNetwork", "MODEL.DEVICE", "cpu"],
    )
    torch.save(build_model(cfg).state_dict(), sys.argv[1])
