"""Tells what was measured on a GPU."""

from __future__ import annotations

from typing import Any

NOW = "now"
"""The variant that the targets are for."""


def summary(name: str, found: dict[str, Any]) -> str:
    """Returns a part of the result in a line or a few."""
    lines = []
    for variant, run in found.get("runs", {}).items():
        line = f"{name:20} {variant:9} {run['seconds']['median'] * 1e3:8.1f} ms"
        if "share_of_peak" in run:
            line += f"  {run['share_of_peak']:.1%} of the products' peak"
        if "step" in run:
            line += f"  step {run['step'] * 1e3:.1f}, prediction {run['prediction'] * 1e3:.1f}"
        if run.get("peak_memory_bytes"):
            line += f"  {run['peak_memory_bytes'] / 2**30:.1f} GiB"
        for fact, value in run.get("facts", {}).items():
            line += f"  {fact} {value}"
        if "target" in found and variant == NOW:
            line += f"  (at least {found['target']['least'] * 1e3:.0f}"
            line += f", aim {found['target']['aim'] * 1e3:.0f})"
        lines.append(line)
    if "difference" in found:
        for what, own in found["difference"].items():
            lines.append(
                f"{name:20} {what}: scores {own['scores']:.1e}, same classes "
                f"{own['same_classes']:.4%}, loss {own['loss']:.1e}, gradient {own['gradient']:.1e}"
            )
    for case in found.get("cases", ()):
        lines.append(
            f"{name:20} micro-batch {case['micro_batch']:2d}, checkpoint {case['checkpoint']}: "
            f"{case['peak_memory_bytes'] / 2**30:.1f} GiB, {case['seconds'] * 1e3:.0f} ms"
        )
    for work, profile in found.get("profiles", {}).items():
        lines.append(
            f"{work:20} the device is busy for {profile['busy']:.0%} of {profile['wall'] * 1e3:.1f}"
            f" ms, in {profile['launches']} kernels"
        )
        lines += [
            f"    {k['seconds'] * 1e3:8.2f} ms {k['count']:5d} x {k['name']}"
            for k in profile["kernels"]
        ]
    if "share" in found:
        lines.append(f"{name:20} {found['share']:.1%} of a frame, {found['seconds'] * 1e3:.1f} ms")
    return "\n".join(lines)
