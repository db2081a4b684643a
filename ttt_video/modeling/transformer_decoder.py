"""Mask2Former's masked-attention transformer decoder (arXiv:2112.01527), with its names."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.layers import Conv2d
from detectron2.utils.registry import Registry
from fvcore.nn import weight_init
from torch import Tensor, nn

from .kernels import fuses_norms, run_linear, run_mlp, run_product
from .mask_features import MaskFeatures, Unprojected, mask_logits
from .position_encoding import sine_position_embedding
from .tables import is_exporting

if TYPE_CHECKING:
    from .kernels.norms import Normed

TRANSFORMER_DECODER_REGISTRY = Registry("TTT_TRANSFORMER_DECODER")
TRANSFORMER_DECODER_REGISTRY.__doc__ = """
Query decoders by Mask2Former's names: ``decoder(cfg, in_channels, num_queries=, num_classes=)``,
which has no class branch if ``num_classes`` is None.
"""


class Attention(nn.MultiheadAttention):
    """``nn.MultiheadAttention`` with one mask for all heads, which is never copied per head."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__(dim, num_heads, dropout=0.0, batch_first=True)

    def forward(  # type: ignore[override]
        self, query: Tensor, key: Tensor, value: Tensor, allowed: Tensor | None = None
    ) -> Tensor:
        """Attends with (B, Q, C) queries over (B, S, C) keys and values; returns (B, Q, C).

        ``allowed`` (B, Q, S) bool is True where a query may look, or of the queries' dtype what is
        added to the logits; None allows everything.
        """
        weights, biases = self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3)
        q, k, v = (
            run_product(x, weight, bias).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for x, weight, bias in zip((query, key, value), weights, biases, strict=True)
        )
        mask = None if allowed is None else allowed.unsqueeze(1)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return run_linear(self.out_proj, out.transpose(1, 2).flatten(2))


class Residual(nn.Module):
    """Adds an update to x; a layer norm follows, or goes before the update if ``pre_norm``."""

    def __init__(self, dim: int, pre_norm: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.pre_norm = pre_norm

    def forward(self, x: Tensor, *args: Tensor) -> Tensor:
        if self.pre_norm:
            return x + self.update(self.norm(x), *args)
        return self.norm(x + self.update(x, *args))

    def fused(self, x: Normed, position: Tensor, update: Tensor) -> Normed:
        """Adds an update and normalises in one pass; ``position`` is what queries add."""
        from .kernels.norms import norm_of_sum

        return norm_of_sum(x.full, update, self.norm, position)

    def update(self, x: Tensor, *args: Tensor) -> Tensor:
        raise NotImplementedError


class SelfAttentionLayer(Residual):
    """Queries look at each other."""

    def __init__(self, dim: int, num_heads: int, pre_norm: bool) -> None:
        super().__init__(dim, pre_norm)
        self.self_attn = Attention(dim, num_heads)

    def update(self, x: Tensor, position: Tensor) -> Tensor:  # type: ignore[override]
        return self.self_attn(x + position, x + position, x)


class CrossAttentionLayer(Residual):
    """Queries look at the pixels of their own mask."""

    def __init__(self, dim: int, num_heads: int, pre_norm: bool) -> None:
        super().__init__(dim, pre_norm)
        self.multihead_attn = Attention(dim, num_heads)

    def update(  # type: ignore[override]
        self, x: Tensor, position: Tensor, memory: Tensor, memory_position: Tensor, allowed: Tensor
    ) -> Tensor:
        return self.multihead_attn(x + position, memory + memory_position, memory, allowed)


class FFNLayer(Residual):
    """Two linear layers with a ReLU between."""

    def __init__(self, dim: int, feedforward: int, pre_norm: bool) -> None:
        super().__init__(dim, pre_norm)
        self.linear1 = nn.Linear(dim, feedforward)
        self.linear2 = nn.Linear(feedforward, dim)

    def update(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return run_mlp(self.linear1, self.linear2, x, relu=True)


class MLP(nn.Module):
    """Linear layers with ReLU between them, under the parameter name ``layers``."""

    def __init__(self, dims: list[int]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(dims))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = F.relu(run_linear(layer, x))  # type: ignore[arg-type]
        return run_linear(self.layers[-1], x)  # type: ignore[arg-type]


def shrunk(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Returns (B, C, H, W) at a smaller size by ``F.interpolate``'s bilinear rule, without grad.

    A size that is 1/2, 1/4, ... of the maps' takes the mean of the four pixels around its own
    pixels' centres. A CPU reads only them, and sums in PyTorch's order for 16 channels or more.
    """
    step = maps.shape[-2] // size[0]
    exact = (step * size[0], step * size[1]) == maps.shape[-2:] and step in (2, 4, 8, 16)
    if maps.device.type != "cpu" or not exact or is_exporting():
        return F.interpolate(maps, size=size, mode="bilinear", align_corners=False)
    first, second = (
        (maps[..., row::step, step // 2 - 1 :: step], maps[..., row::step, step // 2 :: step])
        for row in (step // 2 - 1, step // 2)
    )
    total = second[0] + second[1]
    return total.add_(first[1]).add_(first[0]).mul_(0.25)


def shrunk_features(features: MaskFeatures, size: tuple[int, int]) -> MaskFeatures:
    """Returns :func:`shrunk` of mask features, which may as well come before their projection."""
    if isinstance(features, Unprojected):
        return features._replace(maps=shrunk(features.maps.detach(), size))
    return shrunk(features.detach(), size)


@TRANSFORMER_DECODER_REGISTRY.register()
class MultiScaleMaskedTransformerDecoder(nn.Module):
    """Learned queries that read the pixel decoder's levels in turn, each inside its own mask."""

    num_feature_levels = 3
    _version = 2

    @configurable
    def __init__(
        self,
        in_channels: int,
        *,
        num_queries: int,
        num_classes: int | None,
        hidden_dim: int,
        mask_dim: int,
        num_layers: int,
        num_heads: int,
        feedforward: int,
        pre_norm: bool,
        enforce_input_project: bool,
    ) -> None:
        """
        Args:
            in_channels: channels of the pixel decoder's levels.
            num_queries: Q.
            num_classes: K, without "no object"; None builds no class branch (decoder g).
            hidden_dim: width of the queries; mask_dim: channels of the mask features.
            num_layers: each one cross-attention, self-attention and feed-forward.
            num_heads, feedforward, pre_norm: of those.
            enforce_input_project: project the levels even where the widths agree.
        """
        super().__init__()
        self.hidden_dim = hidden_dim
        self.transformer_self_attention_layers = nn.ModuleList()
        self.transformer_cross_attention_layers = nn.ModuleList()
        self.transformer_ffn_layers = nn.ModuleList()
        for _ in range(num_layers):
            self.transformer_self_attention_layers.append(
                SelfAttentionLayer(hidden_dim, num_heads, pre_norm)
            )
            self.transformer_cross_attention_layers.append(
                CrossAttentionLayer(hidden_dim, num_heads, pre_norm)
            )
            self.transformer_ffn_layers.append(FFNLayer(hidden_dim, feedforward, pre_norm))
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)

        self.decoder_norm = nn.LayerNorm(hidden_dim)
        self.query_feat = nn.Embedding(num_queries, hidden_dim)
        self.query_embed = nn.Embedding(num_queries, hidden_dim)
        self.level_embed = nn.Embedding(self.num_feature_levels, hidden_dim)
        self.input_proj = nn.ModuleList()
        for _ in range(self.num_feature_levels):
            if in_channels != hidden_dim or enforce_input_project:
                conv = Conv2d(in_channels, hidden_dim, kernel_size=1)
                weight_init.c2_xavier_fill(conv)
                self.input_proj.append(conv)
            else:
                self.input_proj.append(nn.Sequential())
        self.class_embed = None if num_classes is None else nn.Linear(hidden_dim, num_classes + 1)
        self.mask_embed = MLP([hidden_dim, hidden_dim, hidden_dim, mask_dim])

    @classmethod
    def from_config(
        cls, cfg: CfgNode, in_channels: int, *, num_queries: int, num_classes: int | None
    ) -> dict[str, Any]:
        """Reads ``MODEL.MASK_FORMER.*``; DEC_LAYERS counts predictions, one more than layers."""
        former = cfg.MODEL.MASK_FORMER
        return {
            "in_channels": in_channels,
            "num_queries": num_queries,
            "num_classes": num_classes,
            "hidden_dim": former.HIDDEN_DIM,
            "mask_dim": cfg.MODEL.SEM_SEG_HEAD.MASK_DIM,
            "num_layers": former.DEC_LAYERS - 1,
            "num_heads": former.NHEADS,
            "feedforward": former.DIM_FEEDFORWARD,
            "pre_norm": former.PRE_NORM,
            "enforce_input_project": former.ENFORCE_INPUT_PROJ,
        }

    def forward(
        self, levels: list[Tensor], mask_features: MaskFeatures, *, every_layer: bool = False
    ) -> list[dict[str, Tensor]]:
        """Predicts with the last layer, or with the initial queries and every layer.

        Args:
            levels: [(B, C, h, w), ...], three maps from coarse to fine.
            mask_features: (B, mask_dim, H/4, W/4), or before their projection.
            every_layer: also predict before each layer, for deep supervision.

        Returns:
            From first to last, ``{"pred_masks": (B, Q, H/4, W/4) logits}`` and, with a class
            branch, ``"pred_logits": (B, Q, K + 1)``.
        """
        batch = levels[0].shape[0]
        memories, positions = [], []
        coarse_features: list[MaskFeatures] = []
        for i, (level, proj) in enumerate(zip(levels, self.input_proj, strict=True)):
            height, width = size = (level.shape[-2], level.shape[-1])
            memory = proj(level).flatten(2) + self.level_embed.weight[i][:, None]
            memories.append(memory.transpose(1, 2))
            position = sine_position_embedding(height, width, self.hidden_dim, level.device)
            positions.append(position.flatten(2).transpose(1, 2))
            # Resizing is linear, so features resized once per level give the attention masks that
            # resizing every full-size prediction would, for a fraction of the work.
            coarse_features.append(shrunk_features(mask_features, size))

        if isinstance(mask_features, Tensor) and self._is_fused(mask_features):
            return self._fused(memories, positions, coarse_features, mask_features, every_layer)
        query_position = self.query_embed.weight.expand(batch, -1, -1)
        queries = self.query_feat.weight.expand(batch, -1, -1)
        predictions = []
        layers = zip(
            self.transformer_cross_attention_layers,
            self.transformer_self_attention_layers,
            self.transformer_ffn_layers,
            strict=True,
        )
        for i, (cross_attention, self_attention, feed_forward) in enumerate(layers):
            at = i % self.num_feature_levels
            if every_layer:
                predictions.append(self.predict(queries, mask_features))
            allowed = self.attention_mask(queries, coarse_features[at])
            queries = cross_attention(queries, query_position, memories[at], positions[at], allowed)
            queries = self_attention(queries, query_position)
            queries = feed_forward(queries)
        predictions.append(self.predict(queries, mask_features))
        return predictions

    def _is_fused(self, x: Tensor) -> bool:
        layers = [module for module in self.modules() if isinstance(module, Residual)]
        if any(layer.pre_norm for layer in layers):
            return False
        return fuses_norms(x, self.decoder_norm, *layers, *(layer.norm for layer in layers))

    def _fused(
        self,
        memories: list[Tensor],
        positions: list[Tensor],
        coarse_features: list[MaskFeatures],
        mask_features: Tensor,
        every_layer: bool,
    ) -> list[dict[str, Tensor]]:
        """Does the layers by kernels that sum, normalise and cast in one pass.

        Keys and values of a level are cast once for all layers that read it.
        """
        from .kernels.masks import attention_bias
        from .kernels.norms import Normed, product_dtype

        low = product_dtype(memories[0])
        keys = [(x + p).to(low) for x, p in zip(memories, positions, strict=True)]
        values = [x.to(low) for x in memories]
        position = self.query_embed.weight
        queries = self.query_feat.weight.expand(len(mask_features), -1, -1)
        x = Normed(queries, queries.to(low), (queries + position).to(low))
        predictions = []
        for i in range(len(self.transformer_ffn_layers)):
            at = i % self.num_feature_levels
            if every_layer:
                predictions.append(self.predict(x.full, mask_features))
            with torch.no_grad():
                logits = self._coarse_logits(x.full, coarse_features[at])
                allowed = attention_bias(logits, low)
            cross = cast(CrossAttentionLayer, self.transformer_cross_attention_layers[i])
            update = cross.multihead_attn(x.query, keys[at], values[at], allowed)
            x = cross.fused(x, position, update)
            among = cast(SelfAttentionLayer, self.transformer_self_attention_layers[i])
            x = among.fused(x, position, among.self_attn(x.query, x.query, x.low))
            feed_forward = cast(FFNLayer, self.transformer_ffn_layers[i])
            x = feed_forward.fused(x, position, feed_forward.update(x.low))
        predictions.append(self.predict(x.full, mask_features))
        return predictions

    def _normed(self, queries: Tensor) -> Tensor:
        """Returns the queries as predictions read them."""
        if not fuses_norms(queries, self.decoder_norm):
            return self.decoder_norm(queries)
        from .kernels.norms import layer_norm

        return layer_norm(queries, self.decoder_norm)

    def predict(self, queries: Tensor, mask_features: MaskFeatures) -> dict[str, Tensor]:
        """Returns class and mask logits of (B, Q, C) queries."""
        queries = self._normed(queries)
        masks = mask_logits(self.mask_embed(queries), mask_features)
        if self.class_embed is None:
            return {"pred_masks": masks}
        return {"pred_logits": self.class_embed(queries), "pred_masks": masks}

    @torch.no_grad()
    def attention_mask(self, queries: Tensor, coarse_features: MaskFeatures) -> Tensor:
        """Returns (B, Q, h * w) bool, True inside a query's mask, or everywhere if it is empty."""
        inside = self._coarse_logits(queries, coarse_features) >= 0
        return inside | ~inside.any(dim=-1, keepdim=True)

    def _coarse_logits(self, queries: Tensor, coarse_features: MaskFeatures) -> Tensor:
        """Returns the mask logits (B, Q, h * w) of a level."""
        embed = self.mask_embed(self._normed(queries))
        return mask_logits(embed, coarse_features).flatten(2)
