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


_SIZES = ("batch", "height", "width", "shift", "heads", "programs")
_WINDOW = {"SIDE": 7, "HEAD_DIM": 32, "BLOCK_N": 64, "BLOCK_D": 32}


def window_cases(dtype: str, precision: str) -> list[Case]:
    """Returns attention within the windows of a Swin, forward and backward."""
    tensors = {"qkv": f"*{dtype}", "table": "*fp32", "fill": "*fp32"}
    grads = {"grad_out": f"*{dtype}", "grad_qkv": f"*{dtype}", "sums": "*fp32"}
    sizes = {**dict.fromkeys(_SIZES, "i32"), "scale": "fp32"}
    warps = 8 if dtype == "fp32" else 4
    constants = {**_WINDOW, "PRECISION": precision}
    learns = {"BIAS_GRAD": True, "FILL_GRAD": True}
    forward = {**tensors, "out": f"*{dtype}", **sizes}
    return [
        Case("window_attention", "_forward_kernel", forward, constants, warps),
        Case(
            "window_attention",
            "_backward_kernel",
            tensors | grads | sizes,
            constants | learns,
            warps,
        ),
    ]


CASES: list[Case] = [
    *window_cases("bf16", "ieee"),
    *window_cases("fp32", "ieee"),
    *window_cases("fp32", "tf32"),
    Case(
        "window_attention",
        "_table_kernel",
        {"grad_bias": "*fp32", "grad_table": "*fp32", "heads": "i32"},
        {"SIDE": 7, "BLOCK_N": 64, "ENTRIES": 16},
    ),
]


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
