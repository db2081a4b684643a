"""Compiles every Triton kernel for GPUs that need not be here, and prints what each one takes.

    python tests/modeling/compile_kernels.py            # capabilities 8.0 and 9.0

Triton's interpreter, which runs the kernels in the other tests, accepts more than its compiler.
"""

from __future__ import annotations

import importlib
import os
from typing import Any, NamedTuple

os.environ["TRITON_INTERPRET"] = "0"  # before the kernels are defined

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


class Case(NamedTuple):
    """A kernel with the types of its arguments, as Triton writes them, and its constants."""

    module: str
    kernel: str
    signature: dict[str, str]
    constants: dict[str, Any]
    warps: int = 4


CASES: list[Case] = []


def main() -> None:
    """Compiles every case; Triton raises what is wrong."""
    for case in CASES:
        module = importlib.import_module(f"ttt_video.modeling.kernels.{case.module}")
        signature = {**case.signature, **dict.fromkeys(case.constants, "constexpr")}
        source = ASTSource(getattr(module, case.kernel), signature, case.constants)
        for capability in (80, 90):
            compiled = triton.compile(
                source,
                target=GPUTarget("cuda", capability, 32),
                options={"num_warps": case.warps},
            )
            ptx = compiled.asm["ptx"]
            print(
                f"{case.module}.{case.kernel} sm_{capability}: {compiled.metadata.shared} bytes of "
                f"shared memory, {len(ptx.splitlines())} lines of PTX"
            )


if __name__ == "__main__":
    main()
