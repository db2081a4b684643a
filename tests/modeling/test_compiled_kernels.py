"""Every Triton kernel compiles for GPUs that need not be here."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
from processes import python_path

SCRIPT = Path(__file__).with_name("compile_kernels.py")
KERNELS = Path(__file__).resolve().parents[2] / "ttt_video" / "modeling" / "kernels"

pytest.importorskip("triton")


def launched() -> set[str]:
    """The names of the kernels that functions launch."""
    found = set()
    for file in KERNELS.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript):
                found.add(ast.unparse(node.func.value).rpartition(".")[2])
    return found


@pytest.mark.slow
def test_kernels_compile_for_ampere_and_hopper(tmp_path):
    environment = {**os.environ, "PYTHONPATH": python_path(), "TRITON_CACHE_DIR": str(tmp_path)}
    run = subprocess.run(
        [sys.executable, SCRIPT], env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr[-2000:]
    compiled = [line.partition(":")[0].split() for line in run.stdout.splitlines() if "sm_" in line]
    for capability in ("sm_80", "sm_90"):
        names = {name.partition(".")[2] for name, own in compiled if own == capability}
        assert names == launched()
