"""Where numbers come from: machine, versions, and what its matrix products reach."""

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

PACKAGES = ("torch", "torchvision", "detectron2", "sal-detectron2", "transformers", "numpy")


def environment(device: torch.device) -> dict[str, Any]:
    """Machine, versions, commit, date."""
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
    """The processor's name, as its maker gave it where the system tells."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


@cache
def matmul_peak(device: torch.device, dtype: torch.dtype, size: int = 0) -> float:
    """FLOP/s of the fastest of some square matrix products, with torch's own threads and settings.

    Measured once: up to eight products, fewer where a type that the machine has no instructions
    for takes seconds.

    Args:
        device: that multiplies.
        dtype: of both matrices.
        size: rows and columns; 0 takes 8192 on a GPU; elsewhere 1024, or 256 where not float32.
    """
    if not size:
        small = 1024 if dtype == torch.float32 else 256
        size = 8192 if device.type == "cuda" else small
    a, b = (torch.rand(size, size, device=device).to(dtype) for _ in range(2))
    seconds: list[float] = []
    while len(seconds) < 2 or (len(seconds) < 9 and sum(seconds) < 2.0):
        synchronize(device)
        start = time.perf_counter()
        a @ b
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds[1:])
