"""Nothing on the way of a step or a prediction goes from the CPU to the GPU, which no graph can do.

Shown on tensors without numbers that say they are on a GPU; there need be none.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tiny import TINY
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ttt_video.adaptation import build_adapter
from ttt_video.config import load_config
from ttt_video.modeling.kernels import VARIABLE
from ttt_video.modeling.tables import caches

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU shows it by itself")

IMAGES, PATCHES = (2, 3, 60, 90), (2, 4, 6)
"""Images that are padded to 64 x 96, and their masks of 16 px."""


class Copies(TorchDispatchMode):
    """Lists operations on tensors of several devices, or on numbers from Python."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs, result)) if isinstance(x, Tensor)]
        self.calls += 1
        if len({x.device.type for x in tensors}) > 1:
            self.found.append(str(func))
        return result


@pytest.fixture
def adapter(tiny_model: nn.Module, monkeypatch) -> Iterator[Any]:
    """An adapter whose model has shapes and a device, and no numbers."""
    monkeypatch.setenv(VARIABLE, "off")  # a kernel would be compiled for the GPU that is not there
    with FakeTensorMode():
        for module in tiny_model.modules():
            for tensors in (module._parameters, module._buffers):
                for name, old in tensors.items():
                    if old is not None:
                        new = torch.empty(old.shape, dtype=old.dtype, device="cuda")
                        tensors[name] = nn.Parameter(new) if isinstance(old, nn.Parameter) else new
        cfg = load_config("joint_cityscapes.yaml", opts=[*TINY, "TTT.CUDA_GRAPHS", "off"])
        yield build_adapter(cfg, tiny_model)
    for cache in caches():
        cache.cache_clear()  # of tables without numbers


@pytest.mark.slow
@pytest.mark.parametrize("training", [False, True])
def test_the_loss_of_a_step(adapter, training):
    adapter.model.train(training)
    images = torch.zeros(IMAGES, dtype=torch.uint8, device="cuda")
    patches = torch.zeros(PATCHES, device="cuda")
    adapter.losses_of(images, patches)  # fills the caches
    with Copies() as copies:
        loss = adapter.losses_of(images, patches)["loss_recon"]
    assert loss.device.type == "cuda"
    assert copies.calls > 100
    assert copies.found == []


@pytest.mark.slow
def test_a_prediction(adapter):
    images = torch.zeros(IMAGES, dtype=torch.uint8, device="cuda")
    adapter.model.eval()
    with torch.no_grad():
        adapter.model.replayed(images)
        with Copies() as copies:
            logits = adapter.model.replayed(images)
    assert [x.device.type for x in logits] == ["cuda", "cuda"]
    assert copies.calls > 100
    assert copies.found == []


@pytest.mark.slow
def test_a_mask_that_comes_from_the_cpu_is_found(adapter):
    images = [{"image": torch.zeros(IMAGES[1:], dtype=torch.uint8, device="cuda")}]
    mask = torch.zeros(1, *IMAGES[2:])
    with Copies() as copies:
        adapter.model.reconstruction_losses([{**x, "image_mask": mask} for x in images])
    assert any("_to_copy" in operation for operation in copies.found)
