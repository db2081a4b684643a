"""Writes results as a few lines to read."""

from __future__ import annotations

from typing import Any


def report(result: dict[str, Any]) -> str:
    """Returns the numbers that matter of any result of ``tools/measure_costs.py``."""

    machine = result["environment"]
    lines = [
        f"{machine['device']}, {machine['threads']} thread(s), load {machine['load']:.1f}, "
        f"{machine['date']}"
    ]
    for name, part in result["results"].items():
        lines.append(f"\n{name}")
        for size in part.get("parameter_bytes", {}).items():
            lines.append(f"  parameters of {size[0]}: {size[1] / 1e6:.1f} MB")
        for case in part.get("cases", ()):
            lines += _case(case)
        for name_of_stream, stream in part.get("streams", {}).items():
            lines += _stream(name_of_stream, stream)
        for method in part.get("methods", ()):
            lines += _method(method)
    return "\n".join(lines)


def _method(found: dict[str, Any]) -> list[str]:
    lines = [f"  {name:24} {_seconds(run['seconds'])}" for name, run in found["runs"].items()]
    lines.append(f"  {found['method']} takes {found['cost']:.3f} of the frozen model's CPU seconds")
    for state, one in found.get("states", {}).items():
        lines.append(f"  in state {state}, {one['share']:.1%} of the frames: {one['cost']:.3f}")
    return lines


def _case(case: dict[str, Any]) -> list[str]:
    height, width = case["size"]
    title = f"  {height}x{width}, batch {case['batch']}, {case['precision']}"
    lines = [title + (f", {case['pass'].replace('_', ' and ')}" if "pass" in case else "")]
    for name, run in case["runs"].items():
        lines.append(f"    {name:12} {_seconds(run['seconds'])}{_speed(run)}")
        if "cpu_seconds_median" in run:
            lines.append(
                f"    {'':12} {run['cpu_seconds_median']:.3f} s of all cores; memory at the peak "
                f"{run['peak_memory_bytes'] / 2**30:.2f} GiB, of this work "
                f"{run['working_memory_bytes'] / 2**30:.2f} GiB"
            )
        if "overhead" in run:
            lines.append(
                f"    {'':12} step {run['step']['median']:.4f} s, prediction "
                f"{run['prediction']['median']:.4f} s, all else "
                f"{run['overhead_seconds']['median']:.4f} s = {run['overhead']['median']:.2%}"
            )
    for name, ratio in case.get("speedup", {}).items():
        lines.append(f"    {name} takes {ratio['median']:.2f} times as long")
        cpu = case.get("cpu_speedup", {}).get(name)
        if cpu and cpu["interval"]:
            low, high = cpu["interval"]
            lines[-1] += f", in CPU seconds {cpu['mean']:.2f} [{low:.2f}, {high:.2f}]"
    for name, flop in case.get("flop", {}).items():
        lines.append(f"    {flop / 1e12:.3f} TFLOP {name}")
    if case.get("stages"):
        shares = ", ".join(f"{name} {share:.1%}" for name, share in case["stages"].items())
        lines.append(f"    stages: {shares}")
    if "saved_activation_bytes" in case:
        lines.append(f"    kept for backward: {case['saved_activation_bytes'] / 2**20:.1f} MiB")
    return lines


def _seconds(seconds: dict[str, Any]) -> str:
    quartiles = f"{seconds['lower_quartile']:.4f} to {seconds['upper_quartile']:.4f}"
    return f"{seconds['median']:.4f} s (median of {len(seconds['all'])}; quartiles {quartiles})"


def _speed(run: dict[str, Any]) -> str:
    if "flop" not in run:
        return ""
    speed = f"; {run['flop'] / 1e12:.4f} TFLOP at {run['flop_per_second'] / 1e12:.4f} TFLOP/s"
    return speed + f", {run['share_of_peak']:.0%} of matrix products"


def _stream(name: str, stream: dict[str, Any]) -> list[str]:
    lines = [f"  {name:24} {_seconds(stream['seconds'])}"]
    for key in ("to_first_window", "to_first_position"):
        ratio = stream[key]
        lines.append(
            f"  {'':24} {key.replace('_', ' ')}: median ratio {ratio['median']:.3f}, "
            f"of CPU seconds {ratio['of_cpu_medians']:.3f}"
        )
    memory = [point["resident_bytes"] / 2**20 for point in stream["memory"]]
    if memory:
        lines.append(
            f"  {'':24} memory on the way: {', '.join(f'{mib:.0f}' for mib in memory)} MiB"
        )
    return lines
