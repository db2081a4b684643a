"""The encoder f: detectron2's Swin Transformer with four input channels and fused attention."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.backbone.swin import (
    BasicLayer,
    Mlp,
    PatchMerging,
    SwinTransformer,
    SwinTransformerBlock,
)
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

from ..errors import UserError
from .kernels import (
    fuses_norms,
    has_hooks,
    is_large_on_cpu,
    run_linear,
    run_mlp,
    run_product,
    use_kernels,
)
from .recomputing import run_layer
from .tables import is_exporting
from .windows import (
    ToTokens,
    ToWindows,
    shift_mask,
    token_windows,
    window_places,
    window_tokens,
)


class Stream(NamedTuple):
    """A residual stream whose last sum is outstanding, because the next norm can take it along.

    The stream is ``x + gain * branch``, both (B, H W, C); ``gain`` (B,) is None without stochastic
    depth, ``branch`` before the first block.
    """

    x: Tensor
    branch: Tensor | None = None
    gain: Tensor | None = None

    def settled(self) -> Tensor:
        """Returns the sum."""
        if self.branch is None:
            return self.x
        if self.gain is None:
            return self.x + self.branch
        return self.x + self.branch * self.gain[:, None, None]


class FastSwinBlock(SwinTransformerBlock):
    """detectron2's Swin block with less work for the same numbers.

    Maps are padded to whole windows after the projection to queries, keys and values and cropped
    before the output projection, so no weight is multiplied with padding. Attention is fused.
    Parameters are the same, so assigning this class to a block is enough.
    """

    def forward(self, x: Tensor, mask_matrix: Tensor) -> Tensor:
        """Applies attention within windows, then the MLP.

        Args:
            x: (B, H * W, C) tokens; H and W are the block's attributes, set by its stage.
            mask_matrix: (nW, N, N), added to the logits of shifted windows; N tokens in each of
                nW windows. Where a kernel runs, it has to be that of :func:`shift_mask`.

        Returns:
            (B, H * W, C).
        """
        if fuses_norms(x, self.norm1, self.norm2):
            return self.fused(x, None, None, mask_matrix).settled()
        x = x + self.drop_path(self._attention(self.norm1(x), mask_matrix))
        return x + self.drop_path(self._mlp(self.norm2(x)))

    def fused(self, x: Tensor, branch: Tensor | None, gain: Tensor | None, mask: Tensor) -> Stream:
        """Does the same by kernels that sum, normalise and cast in one pass.

        Args:
            x, branch, gain: a :class:`Stream`.
            mask: as in :meth:`forward`.
        """
        from .kernels.norms import add_layer_norm, layer_norm

        if branch is None:
            hidden = layer_norm(x, self.norm1)
        else:
            x, hidden = add_layer_norm(x, branch, self.norm1, gain=gain)
        attended = self._attention(hidden, mask)
        x, hidden = add_layer_norm(x, attended, self.norm2, gain=self._gain(attended))
        branch = self._mlp(hidden)
        return Stream(x, branch, self._gain(branch))

    def _gain(self, branch: Tensor) -> Tensor | None:
        """Returns (B,) factors as torchvision's stochastic depth draws them, or None."""
        drop = self.drop_path
        if not isinstance(drop, StochasticDepth) or not drop.training:
            return None
        kept = 1 - drop.p
        gain = torch.empty(len(branch), dtype=branch.dtype, device=branch.device).bernoulli_(kept)
        return gain.div_(kept) if kept > 0 else gain

    def _attention(self, x: Tensor, mask: Tensor) -> Tensor:
        attn = self.attn
        if is_exporting():
            return self._attention_in_export(x, mask)
        qkv = run_linear(attn.qkv, x)
        out = self._attention_by_kernel(qkv)
        if out is None:
            out = self._attention_by_windows(qkv, mask)
        return attn.proj_drop(run_linear(attn.proj, out))

    def _mlp(self, x: Tensor) -> Tensor:
        mlp = self.mlp
        known = type(mlp) is Mlp and type(mlp.act) is nn.GELU and mlp.act.approximate == "none"
        if not known or (mlp.training and mlp.drop.p > 0) or has_hooks(mlp, mlp.act, mlp.drop):
            return mlp(x)
        return run_mlp(mlp.fc1, mlp.fc2, x, relu=False)

    def _attention_by_kernel(self, qkv: Tensor) -> Tensor | None:
        """Returns (B, H * W, C) from (B, H * W, 3 * C), or None where no kernel runs.

        Kernels work out :func:`shift_mask` from the places of the tokens.
        """
        attn = self.attn
        window_attention = self._kernel(qkv)
        if window_attention is None:
            return None
        return window_attention(
            qkv,
            attn.relative_position_bias_table,
            attn.qkv.bias,
            height=self.H,
            width=self.W,
            side=self.window_size,
            shift=self.shift_size,
            heads=attn.num_heads,
            scale=attn.scale,
        )

    def _kernel(self, qkv: Tensor) -> Callable[..., Tensor] | None:
        """Returns the ``window_attention`` of this device, if there is one for such an input."""
        attn = self.attn
        if attn.training and attn.attn_drop.p > 0:
            return None
        if use_kernels(qkv):
            from .kernels import window_attention as on_gpu  # needs Triton

            takes = on_gpu.can_attend(qkv, self.window_size, attn.num_heads)
            return on_gpu.window_attention if takes else None
        if is_large_on_cpu(qkv, attn.qkv.weight.t()):
            from . import window_attention_cpu as on_cpu  # a GPU needs no Numba

            others = (attn.relative_position_bias_table, attn.qkv.bias)
            takes = on_cpu.can_attend(attn.num_heads, qkv, *others)
            return on_cpu.window_attention if takes else None
        return None

    def _attention_by_windows(self, qkv: Tensor, mask: Tensor) -> Tensor:
        """Returns (B, H * W, C) from (B, H * W, 3 * C)."""
        attn, side, shift = self.attn, self.window_size, self.shift_size
        batch, _, dim = qkv.shape
        dim //= 3
        places = window_places(self.H, self.W, side, shift, qkv.device)
        qkv = ToWindows.apply(qkv, attn.qkv.bias, places)
        qkv = qkv.view(-1, side**2, 3, attn.num_heads, dim // attn.num_heads)
        qkv = qkv.permute(2, 0, 3, 1, 4)
        bias = self._bias(mask if shift else None, batch).to(qkv.dtype)
        if bias.requires_grad and qkv.device.type == "cpu":
            # Fused attention has no gradient of its bias on a CPU; torch would need 12 operations.
            out = self._attention_by_products(qkv, bias)
        else:
            query, key, value = qkv.unbind(0)
            out = F.scaled_dot_product_attention(
                query,
                key,
                value,
                attn_mask=bias,
                dropout_p=attn.attn_drop.p if self.training else 0.0,
                scale=attn.scale,
            )
        out = out.transpose(1, 2).reshape(batch, -1, dim)
        return ToTokens.apply(out, places)

    def _attention_in_export(self, x: Tensor, mask: Tensor) -> Tensor:
        """Returns :meth:`_attention` of any size, by operations whose sizes may be symbols.

        Nothing asks whether there is padding, because the answer would fix the size.
        """
        attn, side = self.attn, self.window_size
        batch, _, dim = x.shape
        places, shown = window_tokens(self.H, self.W, side, self.shift_size, x.device)
        x = x.index_select(1, places) * shown[:, None]
        qkv = attn.qkv(x.view(-1, side**2, dim))
        qkv = qkv.view(-1, side**2, 3, attn.num_heads, dim // attn.num_heads)
        bias = self._bias(mask if self.shift_size else None, batch)
        out = self._attention_by_products(qkv.permute(2, 0, 3, 1, 4), bias)
        out = attn.proj(out.transpose(1, 2).reshape(batch, -1, dim))
        back = token_windows(self.H, self.W, side, self.shift_size, x.device)
        return out.index_select(1, back)

    def _attention_by_products(self, qkv: Tensor, bias: Tensor) -> Tensor:
        """Returns (windows, heads, N, D) from (3, windows, heads, N, D); the bias may broadcast."""
        _, windows, heads, tokens, _ = qkv.shape
        query, key, value = qkv.reshape(3, windows * heads, tokens, -1).unbind(0)
        bias = bias.expand(windows, -1, -1, -1).reshape(-1, tokens, tokens)
        logits = torch.baddbmm(bias, query, key.transpose(1, 2), alpha=self.attn.scale)
        weights = self.attn.attn_drop(logits.softmax(-1))
        return torch.bmm(weights, value).view(windows, heads, tokens, -1)

    def _bias(self, mask: Tensor | None, batch: int) -> Tensor:
        """Returns relative position biases plus mask: (1 or B * nW, heads, N, N)."""
        attn = self.attn
        tokens = self.window_size**2
        bias = attn.relative_position_bias_table[attn.relative_position_index.view(-1)]
        bias = bias.view(tokens, tokens, attn.num_heads).permute(2, 0, 1).unsqueeze(0)
        if mask is None:
            return bias
        bias = bias + mask.unsqueeze(1)
        return bias.expand(batch, *bias.shape).flatten(0, 1)


class FastSwinStage(BasicLayer):
    """detectron2's stage of blocks, with a mask that is made once per size."""

    def forward(self, x: Tensor, H: int, W: int) -> tuple[Tensor, int, int, Tensor, int, int]:
        """Returns the tokens with their map's size, and the same after downsampling.

        ``x`` is (B, H * W, C).
        """
        mask = shift_mask(H, W, self.window_size, self.shift_size, x.device)
        fused = (m for block in self.blocks for m in (block, block.norm1, block.norm2))
        if fuses_norms(x, *fused):
            stream = Stream(x)
            for block in self.blocks:
                block.H, block.W = H, W
                recompute, draws = self.use_checkpoint, block.training
                stream = run_layer(block.fused, *stream, mask, recompute=recompute, draws=draws)
            x = stream.settled()
        else:
            x = self._by_blocks(x, H, W, mask)
        if self.downsample is None:
            return x, H, W, x, H, W
        return x, H, W, self.downsample(x, H, W), (H + 1) // 2, (W + 1) // 2

    def _by_blocks(self, x: Tensor, height: int, width: int, mask: Tensor) -> Tensor:
        for block in self.blocks:
            block.H, block.W = height, width
            x = run_layer(block, x, mask, recompute=self.use_checkpoint, draws=block.training)
        return x


class FastPatchMerging(PatchMerging):
    """detectron2's downsampling, whose four slices are one copy where the kernels run."""

    def forward(self, x: Tensor, H: int, W: int) -> Tensor:
        """Maps (B, H * W, C) tokens to (B, ceil(H / 2) * ceil(W / 2), 2 C)."""
        if not fuses_norms(x, self.norm):
            return super().forward(x, H, W)
        from .kernels.norms import layer_norm

        dim = x.shape[-1]
        x = x.view(-1, H, W, dim)
        if H % 2 or W % 2:
            x = F.pad(x, (0, 0, 0, W % 2, 0, H % 2))
        x = x.unflatten(2, (-1, 2)).unflatten(1, (-1, 2))  # (B, h, 2, w, 2, C)
        # The channels of a square go down its left column, then its right one.
        x = x.permute(0, 1, 3, 4, 2, 5).reshape(len(x), -1, 4 * dim)
        return run_linear(self.reduction, layer_norm(x, self.norm))


@BACKBONE_REGISTRY.register()
class SwinTransformerTTT(SwinTransformer):
    """detectron2's Swin with Mask2Former's feature names and parameter names.

    It maps (B, 4, H, W), normalised RGB and the visibility channel (1 = visible, 0 = masked; all
    ones for the main task), to ``{"res2": (B, C, H/4, W/4), ... "res5": (B, 8C, H/32, W/32)}``.
    Any H and W work; sizes are rounded up.
    """

    @configurable
    def __init__(
        self, *, out_features: list[str], drop_path_rate: float = 0.3, **swin: Any
    ) -> None:
        """``swin`` are keywords of detectron2's :class:`SwinTransformer`."""
        # detectron2 would import timm for stochastic depth alone; torchvision has the same layer.
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.meshgrid")  # no user can mend it
            super().__init__(drop_path_rate=0.0, **swin)
        for layer in self.layers:
            layer.__class__ = FastSwinStage
            if layer.downsample is not None:
                layer.downsample.__class__ = FastPatchMerging
        blocks = [block for layer in self.layers for block in layer.blocks]
        rates = torch.linspace(0, drop_path_rate, len(blocks)).tolist()
        for block, rate in zip(blocks, rates, strict=True):
            if rate > 0:
                block.drop_path = StochasticDepth(rate, mode="row")
            block.__class__ = FastSwinBlock

        names = [f"res{i + 2}" for i in self.out_indices]
        unknown = sorted(set(out_features) - set(names))
        if unknown:
            raise UserError(f"MODEL.SWIN.OUT_FEATURES has {unknown}; choose among {names}")
        self._out_features = out_features
        self._out_feature_channels = dict(zip(names, self.num_features, strict=True))
        self._out_feature_strides = {name: 4 * 2**i for i, name in enumerate(names)}

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict[str, Any]:
        """Reads ``MODEL.SWIN.*``, whose keys are the keywords in capitals."""
        swin = cfg.MODEL.SWIN
        if input_shape.channels != swin.IN_CHANS:
            raise UserError(
                f"MODEL.SWIN.IN_CHANS is {swin.IN_CHANS}; the model feeds {input_shape.channels} "
                "channels (RGB and visibility), so set MODEL.SWIN.IN_CHANS to 4"
            )
        return {key.lower(): value for key, value in swin.items()}

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Encodes (B, 4, H, W) into the feature maps named in ``out_features``."""
        if self._is_fused(x):
            features = self._fused(x)
        else:
            features = super().forward(x)
        renamed = {f"res{int(name[1:]) + 2}": feature for name, feature in features.items()}
        return {name: renamed[name] for name in self._out_features}

    def _is_fused(self, x: Tensor) -> bool:
        norms: list[nn.Module] = [getattr(self, f"norm{i}") for i in self.out_indices]
        if self.ape or self.patch_embed.norm is None:
            return False
        patches = self.patch_embed, self.patch_embed.proj, self.patch_embed.norm
        return fuses_norms(x, *patches, *norms)

    def _fused(self, x: Tensor) -> dict[str, Tensor]:
        """Does detectron2's forward pass on tokens alone; the features are channels-last.

        They have the dtype of the convolutions that read them.
        """
        from .kernels.norms import layer_norm

        projection = self.patch_embed.proj
        rows, columns = self.patch_embed.patch_size
        right, below = -x.shape[-1] % columns, -x.shape[-2] % rows
        if right or below:
            x = F.pad(x, (0, right, 0, below))
        height, width = x.shape[-2] // rows, x.shape[-1] // columns
        # Patches do not overlap, so the convolution is a product.
        x = x.unflatten(3, (width, columns)).unflatten(2, (height, rows))
        x = x.permute(0, 2, 4, 1, 3, 5).reshape(len(x), height * width, -1)
        x = run_product(x, projection.weight.flatten(1), projection.bias)
        x = self.pos_drop(layer_norm(x, self.patch_embed.norm, for_products=False))
        features = {}
        for i, layer in enumerate(self.layers):
            out, rows, columns, x, height, width = layer(x, height, width)
            if i in self.out_indices:
                out = layer_norm(out, getattr(self, f"norm{i}"))
                features[f"p{i}"] = out.unflatten(1, (rows, columns)).permute(0, 3, 1, 2)
        return features

    @property
    def size_divisibility(self) -> int:
        """32 px, the stride of res5."""
        return 32
