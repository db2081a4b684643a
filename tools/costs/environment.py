"""Says where numbers come from: machine, versions, and the speed of matrix products."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from datetime import datetime, timezone
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from costs.clock import synchronize
from ttt_video.adaptation.precision import PRECISIONS, tf32
from ttt_video.errors import UserError

PACKAGES = ("torch", "torchvision", "detectron2", "sal-detectron2", "transformers", "numpy")


def environment(device: torch.device) -> dict[str, Any]:
    """Returns machine, versions, commit and date."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        "versions": versions,
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "tf32": torch.backends.cuda.matmul.allow_tf32 if device.type == "cuda" else None,
        "commit": commit.stdout.strip() or None,
    }


def cpu_name() -> str:
    """Returns the processor's name, its maker's if the system tells."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


@cache
def matmul_peak(device: torch.device, precision: str, size: int = 0) -> float:
    """Returns FLOP/s of the fastest of some square matrix products.

    It is measured once, with up to eight products, fewer if the machine lacks instructions for the
    precision and they take seconds.

    Args:
        device: that multiplies.
        precision: of the products, in :data:`PRECISIONS`.
        size: rows and columns; 0 takes 8192 on a GPU, else 1024 for float32 and 256 for others.
    """
    dtype = PRECISIONS[precision] or torch.float32
    if not size:
        small = 1024 if dtype == torch.float32 else 256
        size = 8192 if device.type == "cuda" else small
    a, b = (torch.rand(size, size, device=device).to(dtype) for _ in range(2))
    seconds: list[float] = []
    while len(seconds) < 2 or (len(seconds) < 9 and sum(seconds) < 2.0):
        synchronize(device)
        start = time.perf_counter()
        with tf32(device, precision == "tf32"):
            a @ b
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds[1:])


@cache
def copy_peak(device: torch.device) -> float:
    """Returns bytes per second of the fastest of some large copies, read and written ones."""
    count = 2**30 if device.type == "cuda" else 2**26
    source = torch.ones(count, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds: list[float] = []
    for _ in range(6):
        synchronize(device)
        start = time.perf_counter()
        target.copy_(source)
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return 2 * count / min(seconds[1:])


def limit_memory(gib: float) -> None:
    """Lets this process have so much of the GPU's memory and no more.

    Raises:
        UserError: there is no GPU, or it has less.
    """
    if not torch.cuda.is_available():
        raise UserError(f"--memory {gib:g} limits a GPU's memory, and there is no GPU")
    share = gib * 2**30 / torch.cuda.mem_get_info()[1]
    if not 0 < share <= 1:
        raise UserError(f"--memory {gib:g} is not within the GPU's {gib / share:.1f} GiB")
    torch.cuda.set_per_process_memory_fraction(share)
