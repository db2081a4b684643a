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
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


class Case(NamedTuple):
    """A kernel with the types of its arguments, as Triton writes them, and its constants."""

    module: str
    kernel: str
    signature: dict[str, str]
    constants: dict[str, Any]
    warps: int = 4


def _deformable() -> list[Case]:
    """The full model's sizes in bfloat16 and float32, and heads of 24 channels."""
    cases = []
    for kind, dim in (("bf16", 32), ("fp32", 32), ("bf16", 24)):
        inputs = ["values", "levels", "reference", "offsets", "logits", "tokens", "queries"]
        pairs = "*i32" if kind == "bf16" else "*i64"
        types = [f"*{kind}", "*i32", "*fp32", pairs, f"*{kind}", "i32", "i32"]
        forward = {"out": f"*{kind}", **dict(zip(inputs, types, strict=True))}
        grads = dict.fromkeys(("grad_offsets", "grad_logits", "grad"), f"*{kind}")
        sizes = {"HEADS": 8, "DIM": dim, "LEVELS": 3, "POINTS": 4, "WIDE": 32}
        constants = {**sizes, "COMPUTE": tl.float32}
        cases += [
            Case(
                "deformable",
                "forward_kernel",
                forward,
                {**constants, "GROUP": 1, "BLOCK": 16 if kind == "bf16" else 8},
                warps=2,
            ),
            Case(
                "deformable",
                "backward_kernel",
                {"grad_values": "*fp32", **grads, **forward},
                {**constants, "GROUP": 4, "BLOCK": 4},
                warps=1,
            ),
        ]
    return cases


CASES: list[Case] = [*_deformable()]


def main() -> None:
    """Compiles every case; Triton raises what is wrong."""
    for case in CASES:
        module = importlib.import_module(f"ttt_video.modeling.kernels.{case.module}")
        signature = {**case.signature, **dict.fromkeys(case.constants, "constexpr")}
        kernel = getattr(module, case.kernel)
        # PyTorch's memory is aligned, and Triton tells its compiler so.
        aligned = {
            (kernel.arg_names.index(name),): [["tt.divisibility", 16]]
            for name, kind in signature.items()
            if kind.startswith("*")
        }
        source = ASTSource(kernel, signature, case.constants, aligned)
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
