"""detectron2's Swin Transformer as the shared encoder f: four input channels, fused attention."""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.backbone.swin import SwinTransformer, WindowAttention
from torch import Tensor
from torchvision.ops import StochasticDepth

from ..errors import UserError


class FusedWindowAttention(WindowAttention):
    """detectron2's window attention, computed by ``scaled_dot_product_attention``.

    It holds the same parameters and adds none: an existing module is turned into one by
    assigning its class.
    """

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attention within windows.

        Args:
            x: (B * nW, N, C) tokens of each window, N = window height * window width.
            mask: (nW, N, N), added to the logits of shifted windows (0 or -100), or None.

        Returns:
            (B * nW, N, C).
        """
        num_windows, tokens, channels = x.shape
        qkv = self.qkv(x).view(num_windows, tokens, 3, self.num_heads, -1)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)

        bias = self.relative_position_bias_table[self.relative_position_index.view(-1)]
        bias = bias.view(tokens, tokens, self.num_heads).permute(2, 0, 1).unsqueeze(0)
        if mask is not None:
            bias = bias + mask.unsqueeze(1)
            bias = bias.repeat(num_windows // mask.shape[0], 1, 1, 1)
        out = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=bias.to(query.dtype),
            dropout_p=self.attn_drop.p if self.training else 0.0,
            scale=self.scale,
        )
        return self.proj_drop(self.proj(out.transpose(1, 2).reshape(num_windows, tokens, channels)))


@BACKBONE_REGISTRY.register()
class SwinTransformerTTT(SwinTransformer):
    """detectron2's Swin with Mask2Former's feature names and parameter names.

    Input (B, 4, H, W): normalised RGB and the visibility channel (1 = visible, 0 = masked; all
    ones for the main task). Output ``{"res2": (B, C, H/4, W/4), ... "res5": (B, 8C, H/32, W/32)}``.
    Any H and W work; sizes are rounded up.
    """

    @configurable
    def __init__(
        self,
        *,
        out_features: list[str],
        drop_path_rate: float = 0.3,
        **swin: Any,
    ) -> None:
        """Every other keyword is detectron2's :class:`SwinTransformer`'s."""
        # detectron2 would import timm for stochastic depth alone; torchvision has the same layer.
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.meshgrid")  # not the user's to mend
            super().__init__(drop_path_rate=0.0, **swin)
        blocks = [block for layer in self.layers for block in layer.blocks]
        rates = torch.linspace(0, drop_path_rate, len(blocks)).tolist()
        for block, rate in zip(blocks, rates, strict=True):
            if rate > 0:
                block.drop_path = StochasticDepth(rate, mode="row")
            block.attn.__class__ = FusedWindowAttention

        names = [f"res{i + 2}" for i in self.out_indices]
        unknown = sorted(set(out_features) - set(names))
        if unknown:
            raise UserError(f"MODEL.SWIN.OUT_FEATURES has {unknown}; choose among {names}")
        self._out_features = out_features
        self._out_feature_channels = dict(zip(names, self.num_features, strict=True))
        self._out_feature_strides = {name: 4 * 2**i for i, name in enumerate(names)}

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict[str, Any]:
        """Reads ``MODEL.SWIN.*``."""
        swin = cfg.MODEL.SWIN
        if input_shape.channels != swin.IN_CHANS:
            raise UserError(
                f"MODEL.SWIN.IN_CHANS is {swin.IN_CHANS}; the model feeds {input_shape.channels} "
                "channels (RGB and visibility), so set MODEL.SWIN.IN_CHANS to 4"
            )
        return {
            "pretrain_img_size": swin.PRETRAIN_IMG_SIZE,
            "patch_size": swin.PATCH_SIZE,
            "in_chans": swin.IN_CHANS,
            "embed_dim": swin.EMBED_DIM,
            "depths": swin.DEPTHS,
            "num_heads": swin.NUM_HEADS,
            "window_size": swin.WINDOW_SIZE,
            "mlp_ratio": swin.MLP_RATIO,
            "qkv_bias": swin.QKV_BIAS,
            "qk_scale": swin.QK_SCALE,
            "drop_rate": swin.DROP_RATE,
            "attn_drop_rate": swin.ATTN_DROP_RATE,
            "drop_path_rate": swin.DROP_PATH_RATE,
            "ape": swin.APE,
            "patch_norm": swin.PATCH_NORM,
            "use_checkpoint": swin.USE_CHECKPOINT,
            "out_features": swin.OUT_FEATURES,
        }

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Encodes (B, 4, H, W) into the feature maps named in ``out_features``."""
        features = super().forward(x)
        renamed = {f"res{int(name[1:]) + 2}": feature for name, feature in features.items()}
        return {name: renamed[name] for name in self._out_features}

    @property
    def size_divisibility(self) -> int:
        """32 px, the stride of res5."""
        return 32
