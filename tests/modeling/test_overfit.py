"""Joint training learns: four images by heart."""

from __future__ import annotations

import pytest
import torch
from detectron2.modeling import build_model
from torch import Tensor


def scene(seed: int) -> dict[str, Tensor]:
    """A 64x96 picture of three coloured boxes on a ground, with noise: classes 0 and 1 to 3."""
    generator = torch.Generator().manual_seed(seed)
    colours = torch.tensor([[90, 90, 90], [200, 40, 40], [40, 200, 40], [40, 40, 200]])
    sem_seg = torch.zeros(64, 96, dtype=torch.int64)
    for label in (1, 2, 3):
        top, left = (int(torch.randint(0, n, (), generator=generator)) for n in (36, 62))
        height, width = (int(torch.randint(16, 28, (), generator=generator)) for _ in range(2))
        sem_seg[top : top + height, left : left + width] = label
    pixels = colours[sem_seg].permute(2, 0, 1)
    noise = torch.randint(-20, 21, pixels.shape, generator=generator)
    return {"image": (pixels + noise).clamp(0, 255).to(torch.uint8), "sem_seg": sem_seg}


def mean_iou(predicted: Tensor, truth: Tensor) -> float:
    ious = []
    for label in truth.unique():
        a, b = predicted == label, truth == label
        ious.append(((a & b).sum() / (a | b).sum()).item())
    return sum(ious) / len(ious)


@pytest.mark.slow
def test_overfits_four_images(tiny_cfg):
    options = [
        "MODEL.SWIN.DROP_PATH_RATE", 0.0,
        "MODEL.MASK_FORMER.DEC_LAYERS", 4,
        "MODEL.MASK_FORMER.TRAIN_NUM_POINTS", 512,
        "MODEL.SEM_SEG_HEAD.NUM_CLASSES", 4,
        "TTT.MASK_RATIO", 0.5,
    ]  # fmt: skip
    tiny_cfg.merge_from_list(options)
    torch.manual_seed(0)
    model = build_model(tiny_cfg)
    images = [scene(seed) for seed in range(4)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    history = []
    for _ in range(160):
        losses = model(images)
        history.append({name: loss.item() for name, loss in losses.items()})
        optimizer.zero_grad()
        sum(losses.values()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    for name in ("loss_ce", "loss_mask", "loss_dice", "loss_recon"):
        start, end = history[0][name], sum(h[name] for h in history[-10:]) / 10
        assert end < start / 4, (name, start, end)
    model.eval()
    with torch.no_grad():
        results = model(images)
    scores = [
        mean_iou(result["sem_seg"].argmax(0), x["sem_seg"])
        for result, x in zip(results, images, strict=True)
    ]
    assert min(scores) > 0.9
