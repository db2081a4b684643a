"""A method of your own: what a frame shows does not depend on how bright it is.

python tools/stream_eval.py --video VIDEO --register examples/new_method.py --method any_light
"""

import torch

from ttt_video.adaptation import ADAPTER_REGISTRY, GradientAdapter
from ttt_video.config import Key, declare_keys, must_be

between = must_be("between 0 and 1", lambda x: 0 < x < 1)
declare_keys("ANY_LIGHT", {"DARKEST": Key(0.3, between)})


class AnyLight(GradientAdapter):
    """Classes of a darkened frame's pixels shall be those of the frame as it is."""

    def __init__(self, model, *, darkest, **settings):
        super().__init__(model, **settings)
        self.darkest = darkest

    def losses(self, batch, generator):
        """Kullback-Leibler divergence between the two, in nats."""
        light = self.darkest + (1 - self.darkest) * torch.rand((), generator=generator).item()
        frames = [{"image": x["image"]} for x in batch]
        darker = [{"image": (x["image"] * light).to(torch.uint8)} for x in batch]
        with torch.no_grad():
            target = self.model.main_task(frames).pixels.classes
        prediction = self.model.main_task(darker)
        divergence = target.exp() * (target - prediction.pixels.classes)
        return {"loss_light": prediction.mean(divergence.sum(1))}


@ADAPTER_REGISTRY.register()
def any_light(cfg, model):
    """Encoder f moves; window, optimizer, batches and precision are those of the config."""
    settings = {"modules": ["f"], **GradientAdapter.config_arguments(cfg)}
    return AnyLight(model, darkest=cfg.TTT.ANY_LIGHT.DARKEST, **settings)
