"""A model small enough for every test, and videos to show it."""

from __future__ import annotations

import copy
import os
import sys
import zlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

# Triton reads this where kernels are defined, and its own (tl.sum) where torchvision imports it:
# without a GPU, its interpreter runs them.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from detectron2.config import CfgNode
from detectron2.modeling import build_model
from hypothesis import settings
from tiny import TINY
from torch import nn

from ttt_video.config import KEYS, load_config

# The tools import what is beside them. Last, because tools/tabulate.py has a library's name.
sys.path.append(str(Path(__file__).resolve().parents[1] / "tools"))

# How fast a machine is decides no test.
settings.register_profile("any_machine", deadline=None)
settings.load_profile("any_machine")

Video = list[dict[str, Any]]


@cache
def _read_cfg(known: frozenset[str]) -> CfgNode:
    """Reads the tiny config once for the keys that are known, which an example may add to."""
    return load_config("joint_cityscapes.yaml", opts=TINY)


@pytest.fixture
def tiny_cfg() -> CfgNode:
    """joint_cityscapes.yaml shrunk to 0.4 M parameters; stochastic depth is as published."""
    return _read_cfg(frozenset(KEYS)).clone()


@pytest.fixture(scope="session")
def _built_model() -> nn.Module:
    state = torch.get_rng_state()
    torch.manual_seed(0)
    model = build_model(_read_cfg(frozenset(KEYS)).clone()).eval()
    torch.set_rng_state(state)
    return model


@pytest.fixture
def tiny_model(_built_model: nn.Module) -> nn.Module:
    """The model of ``tiny_cfg`` with the same random weights in every test, in eval mode."""
    return copy.deepcopy(_built_model)


@pytest.fixture(scope="session")
def make_video() -> Callable[..., Video]:
    """``make_video(video_id, num_frames, height, width)``: frames of noise that the id decides."""

    def make(video_id: str = "a", num_frames: int = 3, height: int = 64, width: int = 96) -> Video:
        generator = torch.Generator().manual_seed(zlib.crc32(video_id.encode()))
        size = (3, height, width)
        return [
            {
                "image": torch.randint(256, size, generator=generator, dtype=torch.uint8),
                "height": height,
                "width": width,
                "video_id": video_id,
                "frame_index": index,
                "file_name": f"{video_id}/{index}.png",
            }
            for index in range(num_frames)
        ]

    return make
