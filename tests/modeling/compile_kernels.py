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
    """A kernel with the types of its arguments, as Triton writes them, and its constants.

    ``multiples`` are sizes that are multiples of 16, which Triton finds out at a call.
    """

    module: str
    kernel: str
    signature: dict[str, str]
    constants: dict[str, Any]
    warps: int = 4
    multiples: tuple[str, ...] = ()


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


def _norm_cases() -> list[Case]:
    """Layer norms: a block's second one in Swin's last stage, and one of the pixel decoder."""
    swin = {"DIM": 768, "BLOCK_ROWS": 2, "BLOCK_DIM": 1024}
    decoder = {"DIM": 256, "BLOCK_ROWS": 8, "BLOCK_DIM": 256}
    counts = dict.fromkeys(("rows", "tokens", "positions"), "i32")
    forward = {
        **dict.fromkeys(("x", "weight", "bias", "mean", "rstd"), "*fp32"),
        **dict.fromkeys(("delta", "gain", "total", "full", "position", "low", "query"), ""),
        **counts,
    }
    backward = {
        **dict.fromkeys(("grad_total", "grad_full", "grad_low", "grad_query"), ""),
        **dict.fromkeys(("total", "weight", "mean", "rstd", "grad_x", "partial"), "*fp32"),
        **dict.fromkeys(("gain", "grad_delta"), ""),
        **{name: counts[name] for name in ("rows", "tokens")},
    }

    def case(kernel: str, base: dict[str, str], sizes: dict[str, Any], **types: str) -> Case:
        types = {**base, **types}
        absent = {name: None for name, kind in types.items() if not kind}
        constants = {**sizes, **absent, "ACC": tl.float32}
        if kernel == "norm_rows":
            constants["EPS"] = 1e-5
        return Case("norms", kernel, types, constants, 4 if kernel == "norm_rows" else 8)

    half, single = "*bf16", "*fp32"
    return [
        case("norm_rows", forward, swin, delta=half, gain=half, total=single, full=half),
        case(
            "norm_rows",
            forward,
            decoder,
            delta=half,
            total=single,
            full=single,
            low=half,
            position=single,
            query=half,
        ),
        case(
            "norm_rows_backward",
            backward,
            swin,
            grad_total=single,
            grad_full=half,
            gain=half,
            grad_delta=half,
        ),
        case(
            "norm_rows_backward",
            backward,
            decoder,
            grad_full=single,
            grad_low=half,
            grad_query=half,
            grad_delta=half,
        ),
    ]


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


def _group_norm_cases() -> list[Case]:
    """Group norms of the FPN: of a lateral map with a coarser one, and before a ReLU."""
    half, single = "*bf16", "*fp32"
    block = {"BLOCK_ROWS": 32, "BLOCK_DIM": 256}
    sizes: dict[str, Any] = {"DIM": 256, "ACC": tl.float32, **block}
    counts = dict.fromkeys(("height", "width", "coarse_height", "coarse_width"), "i32")
    affine = dict.fromkeys(("mean", "rstd", "weight", "bias"), single)
    statistics = {"EPS": 1e-5, "DIM": 256, "GROUP": 8, "ACC": tl.float32, "BLOCK_ROWS": 32}
    given = {"grad": half, "x": half, **affine}
    means = {"along": single, "level": single}

    def case(kernel: str, signature: dict[str, str], constants: dict[str, Any]) -> Case:
        return Case("group_norms", kernel, signature, constants, warps=8)

    return [
        case("part_statistics", {"x": half, "parts": single, "tokens": "i32"}, sizes),
        case(
            "group_statistics",
            {"parts": single, "mean": single, "rstd": single, "tokens": "i32", "count": "i32"},
            {**statistics, "BLOCK_PARTS": 64, "BLOCK_GROUPS": 4, "BLOCK_GROUP": 8},
        ),
        case(
            "normalise",
            {"x": half, **affine, "coarse": single, "out": half, **counts},
            {**sizes, "RELU": False, "GROUP": 8},
        ),
        case(
            "normalise",
            {"x": half, **affine, "out": half, **counts},
            {**sizes, "RELU": True, "GROUP": 8, "coarse": None},
        ),
        case(
            "part_gradients",
            {**given, "parts": single, "tokens": "i32"},
            {**sizes, "RELU": True, "GROUP": 8},
        ),
        case(
            "input_gradients",
            {**given, **means, "out": half, "tokens": "i32"},
            {**sizes, "RELU": True, "GROUP": 8},
        ),
        case(
            "coarse_gradients",
            {"grad": half, "out": single, **counts},
            {**sizes, "TALL": 6, "WIDE": 6},
        ),
    ]


MASKS = Case(
    "masks",
    "mask_rows",
    {"logits": "*bf16", "bias": "*bf16", "columns": "i32", "stride": "i32"},
    {"BLOCK_COLUMNS": 1024},
)


def _probability_cases() -> list[Case]:
    """Enlarged masks of 160x512 px, as a frame of 618x2048 has them."""
    sizes = ("height", "width", "out_height", "out_width")
    scales = {"vertical": "fp32", "horizontal": "fp32"}
    return [
        Case(
            "masks",
            "enlarged_probabilities",
            {"logits": f"*{kind}", "out": f"*{kind}", **dict.fromkeys(sizes, "i32"), **scales},
            {"ROWS": 8, "COLUMNS": 256},
            multiples=sizes,
        )
        for kind in ("bf16", "fp32")
    ]


def _linear_cases() -> list[Case]:
    """Sums of bias gradients, and the activations of MLPs forward and backward."""
    cases = []
    for kind in ("bf16", "fp32"):
        gelu = {"ACC": tl.float32, "EXACT": kind == "fp32"}
        sizes = {"total": "i32", "width": "i32"}
        tensors = {"grad": f"*{kind}", "kept": f"*{kind}", "out": f"*{kind}", "sums": "*fp32"}
        parts = {"x": f"*{kind}", "sums": "*fp32", **sizes}
        cases += [
            Case("linear", "column_sums", parts, {"ROWS": 32, "COLUMNS": 128}, 4, (*sizes,)),
            Case(
                "linear",
                "gelu_kernel",
                {"x": f"*{kind}", "out": f"*{kind}", "total": "i32"},
                {**gelu, "BLOCK": 2048},
                4,
                ("total",),
            ),
        ]
        for relu in (False, True):
            tile = {"RELU": relu, "ROWS": 16, "COLUMNS": 128}
            signature = {**tensors, **sizes}
            cases.append(
                Case("linear", "activation_gradients", signature, {**gelu, **tile}, 4, (*sizes,))
            )
    last = {"x": "*fp32", "sums": "*fp32", "total": "i32", "width": "i32"}
    tile = {"ROWS": 512, "COLUMNS": 16}
    return [*cases, Case("linear", "column_sums", last, tile, 8, ("total", "width"))]


CASES: list[Case] = [
    *_linear_cases(),
    *_deformable(),
    *_norm_cases(),
    *_group_norm_cases(),
    MASKS,
    *_probability_cases(),
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
        kernel = getattr(module, case.kernel)
        types = {**case.signature, **dict.fromkeys(case.constants, "constexpr")}
        signature = {name: types[name] for name in kernel.arg_names}  # Triton 3.3 goes by the order
        # PyTorch's memory is aligned, and Triton tells its compiler so.
        aligned = {
            (kernel.arg_names.index(name),): [["tt.divisibility", 16]]
            for name, kind in signature.items()
            if kind.startswith("*") or name in case.multiples
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
