"""Mask2Former's pixel decoder: deformable attention over three levels, then an FPN to stride 4."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.layers import Conv2d, ShapeSpec, get_norm
from detectron2.utils.registry import Registry
from fvcore.nn import weight_init
from torch import Tensor, nn

from ..errors import UserError
from .deformable_attention import MSDeformAttn, Shapes
from .kernels import (
    fuses_norms,
    has_hooks,
    is_large_on_cpu,
    run_convolution,
    run_mlp,
    run_product,
)
from .mask_features import MaskFeatures, Unprojected
from .position_encoding import sine_position_embedding
from .recomputing import Result, run_layer
from .tables import shared_table

if TYPE_CHECKING:
    from .kernels.norms import Normed

NORM_GROUPS = 32
"""Groups of the norms behind the input projections, as in Mask2Former."""

PIXEL_DECODER_REGISTRY = Registry("TTT_PIXEL_DECODER")
PIXEL_DECODER_REGISTRY.__doc__ = """
Pixel decoders by Mask2Former's names: ``decoder(cfg, input_shape)`` maps backbone features to mask
features (B, MASK_DIM, H/4, W/4) and three maps from coarse to fine. The original package, whose
registry has these names, can be imported beside it.
"""


@dataclass(frozen=True)
class EncoderSizes:
    """What the layers of the deformable encoder are made of.

    Attributes:
        layers: their number.
        heads: of the attention; points: that each head samples in each level.
        feedforward: width of the feed-forward network.
        dropout: of its hidden layer and of what each part adds.
    """

    layers: int
    heads: int
    points: int
    feedforward: int
    dropout: float


class EncoderLayer(nn.Module):
    """Deformable self-attention and a feed-forward network, each with a residual and a norm."""

    def __init__(self, dim: int, levels: int, sizes: EncoderSizes) -> None:
        super().__init__()
        self.self_attn = MSDeformAttn(dim, levels, sizes.heads, sizes.points)
        self.dropout1 = nn.Dropout(sizes.dropout)
        self.norm1 = nn.LayerNorm(dim)
        self.linear1 = nn.Linear(dim, sizes.feedforward)
        self.dropout2 = nn.Dropout(sizes.dropout)
        self.linear2 = nn.Linear(sizes.feedforward, dim)
        self.dropout3 = nn.Dropout(sizes.dropout)
        self.norm2 = nn.LayerNorm(dim)

    def forward(
        self, tokens: Tensor, position: Tensor, reference: Tensor, shapes: Shapes
    ) -> Tensor:
        attended = self.self_attn(tokens + position, reference, tokens, shapes)
        tokens = self.norm1(tokens + self.dropout1(attended))
        if self.drops:
            hidden = self.linear2(self.dropout2(F.relu(self.linear1(tokens))))
        else:
            hidden = run_mlp(self.linear1, self.linear2, tokens, relu=True)
        return self.norm2(tokens + self.dropout3(hidden))

    @property
    def drops(self) -> bool:
        """Whether dropout is active, which the kernels leave to :meth:`forward`."""
        return self.training and self.dropout1.p > 0

    def fused(
        self, tokens: Normed, reference: Tensor, shapes: Shapes, position: Tensor | None
    ) -> Normed:
        """Does the same by kernels that sum, normalise and cast in one pass.

        ``tokens`` hold the query of this layer; ``position`` is what the next one's query adds.
        """
        from .kernels.norms import norm_of_sum

        assert tokens.query is not None
        attended = self.self_attn(tokens.query, reference, tokens.low, shapes)
        tokens = norm_of_sum(tokens.full, attended, self.norm1)
        hidden = run_mlp(self.linear1, self.linear2, tokens.low, relu=True)
        return norm_of_sum(tokens.full, hidden, self.norm2, position)


class DeformableEncoder(nn.Module):
    """A transformer encoder over the tokens of several feature maps at once."""

    def __init__(self, layers: list[EncoderLayer], dim: int, num_levels: int) -> None:
        super().__init__()
        self.use_checkpoint = False
        self.encoder = nn.ModuleDict({"layers": nn.ModuleList(layers)})
        self.level_embed = nn.Parameter(torch.empty(num_levels, dim).normal_())

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        """Maps [(B, C, h, w), ...] to maps of the same shapes."""
        shapes = tuple((f.shape[2], f.shape[3]) for f in features)
        tokens = torch.cat([f.flatten(2) for f in features], dim=2).transpose(1, 2)
        return maps_of_levels(self.encode(tokens, shapes), shapes)

    def encode(self, tokens: Tensor, shapes: Shapes) -> Tensor:
        """Maps (B, S, C) tokens of all levels, one after the other, to tokens."""
        dim, device = tokens.shape[-1], tokens.device
        position = torch.cat(
            [
                sine_position_embedding(h, w, dim, device).flatten(2).transpose(1, 2) + embed
                for (h, w), embed in zip(shapes, self.level_embed, strict=True)
            ],
            dim=1,
        )
        reference = reference_points(shapes, device)
        layers: list[EncoderLayer] = [*self.encoder["layers"].children()]  # type: ignore[list-item]
        fused = [module for layer in layers for module in (layer, layer.norm1, layer.norm2)]
        if not fuses_norms(tokens, *fused) or any(layer.drops for layer in layers):
            for layer in layers:
                tokens = self._run(layer, layer, tokens, position, reference, shapes)
            return tokens
        from .kernels.norms import Normed, product_dtype

        low = product_dtype(tokens)
        stream = Normed(tokens, tokens.to(low), (tokens + position).to(low))
        for layer in layers:
            following = None if layer is layers[-1] else position[0]
            stream = self._run(layer, layer.fused, stream, reference, shapes, following)
        return stream.full

    def _run(self, layer: EncoderLayer, run: Callable[..., Result], *arguments: Any) -> Result:
        draws = layer.drops
        return run_layer(run, *arguments, recompute=self.use_checkpoint, draws=draws)


def maps_of_levels(tokens: Tensor, shapes: Shapes) -> list[Tensor]:
    """Returns (B, S, C) tokens as [(B, C, h, w), ...], which share their memory."""
    batch, _, dim = tokens.shape
    maps = tokens.transpose(1, 2).split([h * w for h, w in shapes], dim=2)
    return [m.reshape(batch, dim, h, w) for m, (h, w) in zip(maps, shapes, strict=True)]


@shared_table(64)
def reference_points(shapes: Shapes, device: torch.device) -> Tensor:
    """Returns the pixel centres of all levels, one after the other: (S, 2) float32.

    They are made once per size and shared, as they take a dozen operations; callers must not write
    to them.
    """
    return torch.cat([pixel_centres(h, w, device) for h, w in shapes])


def pixel_centres(height: int, width: int, device: torch.device) -> Tensor:
    """Returns (x, y) of pixel centres: (height * width, 2) float32; 0..1 spans edge to edge."""
    y = (torch.arange(height, dtype=torch.float32, device=device) + 0.5) / height
    x = (torch.arange(width, dtype=torch.float32, device=device) + 0.5) / width
    grid_y, grid_x = torch.meshgrid(y, x, indexing="ij")
    return torch.stack([grid_x, grid_y], dim=-1).view(-1, 2)


class MergingConv(Conv2d):
    """detectron2's convolution with norm and activation, by :func:`run_convolution`."""

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, C, H, W) to (B, D, H, W)."""
        x = run_convolution(self, x)
        if self.norm is not None:
            x = self.norm(x)
        return x if self.activation is None else self.activation(x)


@PIXEL_DECODER_REGISTRY.register()
class MSDeformAttnPixelDecoder(nn.Module):
    """Mask2Former's pixel decoder, with its parameter names."""

    @configurable
    def __init__(
        self,
        input_shape: dict[str, ShapeSpec],
        *,
        in_features: list[str],
        transformer_in_features: list[str],
        dim: int,
        mask_dim: int,
        norm: str,
        common_stride: int,
        encoder: EncoderSizes,
    ) -> None:
        """
        Args:
            input_shape: channels and stride of each backbone feature.
            in_features: features used, the finer ones by the FPN alone.
            transformer_in_features: features that go through deformable attention.
            dim: channels inside; mask_dim: channels of the mask features.
            norm: of the FPN's convolutions, as in :func:`detectron2.layers.get_norm`.
            common_stride: stride of the mask features, 4 in every published config.
            encoder: sizes of the deformable encoder.
        """
        super().__init__()

        def by_stride(names: list[str]) -> list[str]:
            return sorted(names, key=lambda name: input_shape[name].stride)

        self.transformer_in_features = by_stride(transformer_in_features)[::-1]
        self.input_proj = nn.ModuleList()
        for name in self.transformer_in_features:
            conv = nn.Conv2d(input_shape[name].channels, dim, kernel_size=1)
            nn.init.xavier_uniform_(conv.weight)
            assert conv.bias is not None
            nn.init.zeros_(conv.bias)
            self.input_proj.append(nn.Sequential(conv, nn.GroupNorm(NORM_GROUPS, dim)))
        levels = len(self.transformer_in_features)
        layers = [EncoderLayer(dim, levels, encoder) for _ in range(encoder.layers)]
        for layer in layers:
            for linear in (layer.linear1, layer.linear2):
                nn.init.xavier_uniform_(linear.weight)
        self.transformer = DeformableEncoder(layers, dim, levels)

        # The FPN goes on from the finest transformer level down to common_stride.
        finest = input_shape[self.transformer_in_features[-1]].stride
        num_fpn = int(math.log2(finest) - math.log2(common_stride))
        finer = [name for name in by_stride(in_features) if input_shape[name].stride < finest]
        self.fpn_features = finer[:num_fpn][::-1]
        if len(self.fpn_features) < num_fpn:
            raise UserError(
                f"MODEL.SEM_SEG_HEAD.IN_FEATURES is {in_features}; from stride {finest} to "
                f"{common_stride} the pixel decoder needs {num_fpn} of {sorted(input_shape)}"
            )
        use_bias = norm == ""
        # Mask2Former numbers these modules from the finest feature up.
        self.fpn_modules = [(f"adapter_{i}", f"layer_{i}") for i in range(num_fpn, 0, -1)]
        for name, (adapter, output) in zip(self.fpn_features, self.fpn_modules, strict=True):
            lateral = Conv2d(
                input_shape[name].channels, dim, 1, bias=use_bias, norm=get_norm(norm, dim)
            )
            merged = MergingConv(
                dim,
                dim,
                3,
                padding=1,
                bias=use_bias,
                norm=get_norm(norm, dim),
                activation=F.relu,
            )
            for conv in (lateral, merged):
                weight_init.c2_xavier_fill(conv)
            self.add_module(adapter, lateral)
            self.add_module(output, merged)
        self.mask_features = Conv2d(dim, mask_dim, kernel_size=1)
        weight_init.c2_xavier_fill(self.mask_features)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        """Reads ``MODEL.SEM_SEG_HEAD.*`` and ``MODEL.MASK_FORMER.{NHEADS, DROPOUT}``.

        Raises:
            UserError: the features or the sizes do not fit each other.
        """
        head = cfg.MODEL.SEM_SEG_HEAD
        key, levels = "DEFORMABLE_TRANSFORMER_ENCODER_IN_FEATURES", sorted(input_shape)
        names = head[key]
        if not names or not set(names) <= set(levels) or len(set(names)) < len(names):
            raise UserError(
                f"MODEL.SEM_SEG_HEAD.{key} is {names}; give some of {levels}, each once"
            )
        heads = cfg.MODEL.MASK_FORMER.NHEADS
        if head.CONVS_DIM % math.lcm(NORM_GROUPS, heads):
            raise UserError(
                f"MODEL.SEM_SEG_HEAD.CONVS_DIM is {head.CONVS_DIM}; it must be a multiple of "
                f"{NORM_GROUPS} and of MODEL.MASK_FORMER.NHEADS, which is {heads}"
            )
        return {
            "input_shape": input_shape,
            "in_features": head.IN_FEATURES,
            "transformer_in_features": head.DEFORMABLE_TRANSFORMER_ENCODER_IN_FEATURES,
            "dim": head.CONVS_DIM,
            "mask_dim": head.MASK_DIM,
            "norm": head.NORM,
            "common_stride": head.COMMON_STRIDE,
            "encoder": EncoderSizes(
                layers=head.TRANSFORMER_ENC_LAYERS,
                # As in Mask2Former, whose DEFORMABLE_TRANSFORMER_ENCODER_N_HEADS nothing reads.
                heads=heads,
                points=head.DEFORMABLE_TRANSFORMER_ENCODER_N_POINTS,
                feedforward=head.DEFORMABLE_TRANSFORMER_ENCODER_DIM_FEEDFORWARD,
                dropout=cfg.MODEL.MASK_FORMER.DROPOUT,
            ),
        }

    def forward(
        self, features: dict[str, Tensor], *, project: bool = True
    ) -> tuple[MaskFeatures, list[Tensor]]:
        """Returns mask features and the transformer's levels.

        Args:
            features: of the backbone.
            project: False leaves the last convolution to the queries where that is faster.

        Returns:
            (B, mask_dim, H/4, W/4) and [(B, dim, h, w), ...] from the coarsest level to the finest.
        """
        if self._is_fused(features):
            return self._fused(features)
        projected = [
            proj(features[name])
            for name, proj in zip(self.transformer_in_features, self.input_proj, strict=True)
        ]
        levels = self.transformer(projected)
        finest = levels[-1]
        for name, (adapter, output) in zip(self.fpn_features, self.fpn_modules, strict=True):
            lateral = getattr(self, adapter)(features[name])
            # Contiguous, as levels are tokens, of which it would interpolate each number by itself.
            upsampled = F.interpolate(
                finest.contiguous(), size=lateral.shape[-2:], mode="bilinear", align_corners=False
            )
            finest = getattr(self, output)(lateral + upsampled)
        last = self.mask_features
        plain = type(last) is Conv2d and not (last.norm or last.activation or has_hooks(last))
        if not project and plain and is_large_on_cpu(finest, last.weight[:, :, 0, 0]):
            return Unprojected(finest, last), levels
        return last(finest), levels

    def _is_fused(self, features: dict[str, Tensor]) -> bool:
        convs: list[nn.Module] = [getattr(self, name) for pair in self.fpn_modules for name in pair]
        norms = [list(module.children())[1] for module in self.input_proj]
        norms += [conv.norm for conv in convs]  # type: ignore[misc]
        if not all(isinstance(norm, nn.GroupNorm) for norm in norms):
            return False
        skipped = [*self.input_proj.modules(), *convs, self.mask_features, self.transformer]
        return fuses_norms(next(iter(features.values())), *norms, *skipped)

    def _fused(self, features: dict[str, Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Does the same on channels-last maps, by kernels that normalise, add and cast in one pass.

        Convolutions of one pixel are products of tokens. The mask features are channels-last.
        """
        from .kernels.channels_last import group_norm
        from .kernels.norms import full_dtype, product_dtype

        def product(x: Tensor, conv: nn.Conv2d) -> Tensor:
            return run_product(x, conv.weight.flatten(1), conv.bias)

        sizes: dict[str, tuple[int, int]] = {
            name: (x.shape[2], x.shape[3]) for name, x in features.items()
        }
        tokens = {name: x.flatten(2).transpose(1, 2) for name, x in features.items()}
        projected = []
        for name, module in zip(self.transformer_in_features, self.input_proj, strict=True):
            conv, norm = module.children()
            x = product(tokens[name], conv)  # type: ignore[arg-type]
            projected.append(group_norm(x, norm, sizes[name], dtype=full_dtype(x)))  # type: ignore[arg-type]
        shapes = tuple(sizes[name] for name in self.transformer_in_features)
        encoded = self.transformer.encode(torch.cat(projected, 1), shapes)
        size = shapes[-1]
        finest = encoded[:, -size[0] * size[1] :]
        for i, name in enumerate(self.fpn_features, start=1):
            adapter, output = (getattr(self, module) for module in self.fpn_modules[i - 1])
            x = product(tokens[name], adapter)
            low, full = product_dtype(x), full_dtype(x)
            coarse, size = (finest, size), sizes[name]
            x = group_norm(x, adapter.norm, size, dtype=low, coarse=coarse)
            x = x.unflatten(1, size).permute(0, 3, 1, 2)
            x = F.conv2d(x, output.weight, output.bias, padding=output.padding)
            x = x.permute(0, 2, 3, 1).flatten(1, 2)
            # The last one feeds a product alone, any other a sum.
            dtype = low if i == len(self.fpn_features) else full
            finest = group_norm(x, output.norm, size, dtype=dtype, relu=True)
        mask_features = product(finest, self.mask_features)
        mask_features = mask_features.unflatten(1, size).permute(0, 3, 1, 2)
        return mask_features, maps_of_levels(encoded, shapes)
