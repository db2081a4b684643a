"""Where the kernels run, and what makes them leave the work to PyTorch's operations."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from subprocess import CalledProcessError
from typing import Any

import pytest
import torch
from test_backbone import SWIN
from test_pixel_decoder import make
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ttt_video.errors import UserError
from ttt_video.modeling import kernels
from ttt_video.modeling.backbone import SwinTransformerTTT
from ttt_video.modeling.transformer_decoder import MultiScaleMaskedTransformerDecoder

triton = pytest.importorskip("triton")
channels_last = pytest.importorskip("ttt_video.modeling.kernels.channels_last")
deformable = pytest.importorskip("ttt_video.modeling.kernels.deformable")
linear = pytest.importorskip("ttt_video.modeling.kernels.linear")
masks = pytest.importorskip("ttt_video.modeling.kernels.masks")
norms = pytest.importorskip("ttt_video.modeling.kernels.norms")
window_attention = pytest.importorskip("ttt_video.modeling.kernels.window_attention")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def noise(*size: int) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(0)).to(DEVICE)


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv(kernels.VARIABLE, "on")
    kernels._has_triton.cache_clear()
    yield
    kernels._has_triton.cache_clear()


@pytest.mark.parametrize(
    ("version", "runs"),
    [("3.2.0", False), ("2.3.1", False), ("3.3.0+git12", True), ("3.10.0", True), ("4.0", True)],
)
def test_older_tritons_leave_the_work_and_the_log_says_so_once(version, runs, monkeypatch, caplog):
    monkeypatch.setattr(triton, "__version__", version)
    assert [kernels.use_kernels(noise(1)) for _ in range(2)] == [runs, runs]
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == (not runs)
    assert all(f"Triton is {version}; the kernels need 3.3" in line for line in said)


def test_a_cpu_without_the_interpreter_is_refused(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(UserError, match=r"_KERNELS is 'on', and on a cpu .*set TRITON_INTERPRET"):
        kernels.use_kernels(torch.zeros(1))


def test_a_triton_that_cannot_be_imported(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "triton", None)
    assert not kernels.use_kernels(noise(1))
    assert "Triton cannot be imported" in caplog.text


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("Failed to find C compiler. Please specify via CC.\nmore"),
        CalledProcessError(1, ["gcc", "main.c"]),
        FileNotFoundError(2, "No such file or directory", "cc"),
        triton.CompilationError("", None, "no such function"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_triton_that_starts_nothing(error, monkeypatch, caplog):
    def fail(*_: Any) -> None:
        raise error

    assert kernels._starts(DEVICE)
    assert not caplog.records
    monkeypatch.setattr(masks, "attention_bias", fail)
    assert not kernels._starts(DEVICE)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "needs a C compiler and Python's headers, fails: " in record.getMessage()
    assert "\n" not in record.getMessage()


def test_tf32_by_the_newer_name_alone():
    matmul = torch.backends.cuda.matmul
    if not hasattr(matmul, "fp32_precision"):
        pytest.skip("this PyTorch has one name")
    before = matmul.fp32_precision
    try:
        for precision in ("tf32", "ieee"):
            matmul.fp32_precision = precision
            assert window_attention._allows_tf32() == (precision == "tf32")
    finally:
        matmul.fp32_precision = before


def attend_within_windows() -> None:
    window_attention.window_attention(
        noise(1, 6, 24), noise(9, 1), None, height=2, width=3, side=2, shift=0, heads=1, scale=1.0
    )


def attend_to_points() -> None:
    values, logits = noise(1, 6, 1, 4), noise(1, 2, 3)
    deformable.attend(values, ((2, 3),), noise(2, 2), noise(1, 2, 6), logits)


LAUNCHES: dict[str, Callable[[], Any]] = {
    "layer norm": lambda: norms.layer_norm(noise(2, 3, 4), nn.LayerNorm(4, device=DEVICE)),
    "group norm": lambda: channels_last.group_norm(
        noise(2, 6, 4), nn.GroupNorm(2, 4, device=DEVICE), (2, 3), dtype=torch.float32
    ),
    "GELU": lambda: linear.gelu(noise(2, 3)),
    "mask": lambda: masks.attention_bias(noise(1, 2, 3), torch.float32),
    "windows": attend_within_windows,
    "points": attend_to_points,
}


@pytest.mark.skipif(torch.cuda.is_available(), reason="watches the interpreter")
@pytest.mark.parametrize("launch", LAUNCHES.values(), ids=LAUNCHES)
def test_kernels_start_on_the_device_of_their_tensors(launch, monkeypatch):
    """Triton starts them on the current one, which need not be that of a model on "cuda:1"."""
    from triton.runtime.interpreter import GridExecutor

    current, seen = [None], []
    start = GridExecutor.__call__

    @contextmanager
    def device_of(x: Tensor) -> Iterator[None]:
        before, current[0] = current[0], x.device
        yield
        current[0] = before

    def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(current[0])
        return start(self, *args, **kwargs)

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    monkeypatch.setattr(GridExecutor, "__call__", watched)
    launch()
    assert set(seen) == {DEVICE}


def swin_stage() -> tuple[nn.Module, Callable[[], Any]]:
    swin = SwinTransformerTTT(out_features=["res2"], **SWIN | {"depths": [1, 1, 1, 1]}).to(DEVICE)
    stage = swin.layers[0]
    return stage, lambda: stage(noise(1, 4, swin.embed_dim), 2, 2)


def encoder() -> tuple[nn.Module, Callable[[], Any]]:
    transformer = make().transformer.to(DEVICE)
    return transformer, lambda: transformer([noise(1, 32, 1, 1) for _ in range(3)])


def query_decoder() -> tuple[nn.Module, Callable[[], Any]]:
    decoder = MultiScaleMaskedTransformerDecoder(
        16,
        num_queries=3,
        num_classes=2,
        hidden_dim=16,
        mask_dim=8,
        num_layers=1,
        num_heads=2,
        feedforward=8,
        pre_norm=False,
        enforce_input_project=False,
    ).to(DEVICE)
    levels = [noise(1, 16, *size) for size in ((1, 1), (2, 2), (2, 3))]
    return decoder, lambda: decoder(levels, noise(1, 8, 4, 6))


HOOKED = [
    (swin_stage, "blocks.0", "forward"),
    (swin_stage, "blocks.0.norm2", "forward_pre"),
    (encoder, "encoder.layers.0", "forward"),
    (query_decoder, "transformer_ffn_layers.0", "full_backward"),
    (query_decoder, "decoder_norm", "forward_pre"),
]


@pytest.mark.parametrize(("make_module", "name", "kind"), HOOKED, ids=[x[1] for x in HOOKED])
def test_modules_that_kernels_stand_in_for_are_called_if_they_have_a_hook(make_module, name, kind):
    module, run = make_module()
    seen: list[str] = []
    hooked = module.get_submodule(name)
    getattr(hooked, f"register_{kind}_hook")(lambda *_: seen.append(name))
    leaves = [x for x in tree_leaves(run()) if isinstance(x, Tensor)]
    if kind == "full_backward":
        sum(x.sum() for x in leaves).backward()
    assert name in seen


def test_patches_with_a_hook_are_embedded_by_their_modules():
    swin = SwinTransformerTTT(out_features=["res2"], **SWIN).to(DEVICE)
    assert swin._is_fused(noise(1))
    for module in (swin.patch_embed, swin.patch_embed.proj):
        handle = module.register_forward_hook(lambda *_: None)
        assert not swin._is_fused(noise(1))
        handle.remove()


@pytest.mark.parametrize(
    "name", ["input_proj.0", "input_proj.0.0", "adapter_1", "mask_features", "transformer"]
)
def test_a_pixel_decoder_with_a_hook_runs_by_its_modules(name):
    decoder, maps = make().to(DEVICE), {"res2": noise(1)}
    assert decoder._is_fused(maps)
    decoder.get_submodule(name).register_forward_pre_hook(lambda *_: None)
    assert not decoder._is_fused(maps)
