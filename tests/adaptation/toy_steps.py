"""A network of a few numbers, and a method whose loss is plain arithmetic on it."""

from __future__ import annotations

import copy

import torch
from gradient_settings import grouped
from torch import nn

from ttt_video.adaptation import GradientAdapter, SlidingWindow


class Toy(nn.Module):
    """f, g and h as linear layers over the mean colour of an image; f has a norm and dropout."""

    def __init__(self, dropout: float = 0.0, batch_norm: bool = False) -> None:
        super().__init__()
        norm = nn.BatchNorm1d(4) if batch_norm else nn.LayerNorm(4)
        self.backbone = nn.Sequential(nn.Linear(3, 4), norm, nn.Dropout(dropout))
        self.recon_head = nn.Linear(4, 3)
        self.sem_seg_head = nn.Linear(4, 2)

    @property
    def device(self) -> torch.device:
        return self.recon_head.weight.device

    def colours(self, batch) -> torch.Tensor:
        return torch.stack([x["image"].float().mean((1, 2)) / 255 for x in batch])

    def reconstruction(self, batch) -> torch.Tensor:
        colours = self.colours(batch)
        return (self.recon_head(self.backbone(colours)).float() - 3 * colours).square().mean()

    def forward(self, batch):
        return [{"sem_seg": x} for x in self.sem_seg_head(self.backbone(self.colours(batch)))]


class ToyAdapter(GradientAdapter):
    """Keeps what it saw; ``spoil`` may turn the loss of the n-th call into something else."""

    def __init__(self, model, **settings) -> None:
        settings = {"lr": 0.1, "batch_size": 8, "micro_batch_size": 8, **settings}
        super().__init__(model, modules=["backbone", "recon_head"], **grouped(**settings))
        self.batches: list[list] = []
        self.flags: list[bool] = []
        self.spoil = lambda loss, call: loss

    def losses(self, batch, generator):
        self.batches.append(batch)
        self.flags.append(self.model.training)
        loss = self.model.reconstruction(batch)
        return {"loss_toy": self.spoil(loss, len(self.batches))}


def toy(**kwargs) -> Toy:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Toy(**kwargs).eval()


def window(num_frames: int = 5) -> SlidingWindow:
    random = torch.Generator().manual_seed(7)
    frames = SlidingWindow(None)
    for index in range(num_frames):
        image = torch.randint(256, (3, 2, 2), generator=random, dtype=torch.uint8)
        frames.push({"image": image, "video_id": "a", "frame_index": index})
    return frames


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gradient(model: nn.Module, batch) -> dict[str, torch.Tensor]:
    """By autograd on a copy, outside of the code under test."""
    model = copy.deepcopy(model).requires_grad_(True)
    model.reconstruction(batch).backward()
    return {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items()}


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def moving(names) -> list[str]:
    return [name for name in names if not name.startswith("sem_seg_head")]
