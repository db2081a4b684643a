"""Builds Hugging Face's Mask2Former, an independent implementation, with the weights of ours.

Tests compare every number with it, and cost measurements its speed. It is built offline from a
configuration; only the names of the weights are translated.
"""

from __future__ import annotations

import copy
import re
from typing import Any

import torch.nn.functional as F
from detectron2.config import CfgNode
from torch import Tensor, nn
from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

from ttt_video.modeling.heads import PIXELS_PER_QUERY_CELL
from ttt_video.modeling.interface import MASKFORMER_PARTS, parts_of
from ttt_video.modeling.meta_arch import MaskFormerTTT

# From our names to Hugging Face's, applied in order to names without the prefix of the head.
_BACKBONE = [
    (r"^patch_embed\.proj\.", "swin.embeddings.patch_embeddings.projection."),
    (r"^patch_embed\.norm\.", "swin.embeddings.norm."),
    (r"^norm(\d)\.", lambda m: f"hidden_states_norms.stage{int(m[1]) + 1}."),
    (r"^layers\.", "swin.encoder.layers."),
    (r"\.attn\.(relative_position_bias)_table$", r".attention.\1.\1_table"),
    (r"\.attn\.proj\.", ".attention.o_proj."),
    (r"\.attn\.([qkv])\.", r".attention.\1_proj."),
    (r"\.norm1\.", ".layernorm_before."),
    (r"\.norm2\.", ".layernorm_after."),
]
_PIXEL_DECODER = [
    (r"^transformer\.encoder\.layers\.", "encoder.layers."),
    (r"^transformer\.level_embed", "level_embed"),
    (r"\.norm1\.", ".self_attn_layer_norm."),
    (r"\.norm2\.", ".final_layer_norm."),
    (r"\.linear([12])\.", r".fc\1."),
    (r"^input_proj\.", "input_projections."),
    (r"^mask_features\.", "mask_projection."),
    (r"^((?:adapter|layer)_\d)\.(weight|bias)$", r"\1.0.\2"),
    (r"^((?:adapter|layer)_\d)\.norm\.", r"\1.1."),
]
_PREDICTOR = [
    (r"^input_proj\.", "input_projections."),
    (r"^query_embed\.", "queries_embedder."),
    (r"^query_feat\.", "queries_features."),
    (r"^transformer_self_attention_layers\.(\d+)\.self_attn\.", r"decoder.layers.\1.self_attn."),
    (
        r"^transformer_self_attention_layers\.(\d+)\.norm\.",
        r"decoder.layers.\1.self_attn_layer_norm.",
    ),
    (
        r"^transformer_cross_attention_layers\.(\d+)\.multihead_attn\.",
        r"decoder.layers.\1.cross_attn.",
    ),
    (
        r"^transformer_cross_attention_layers\.(\d+)\.norm\.",
        r"decoder.layers.\1.cross_attn_layer_norm.",
    ),
    (r"^transformer_ffn_layers\.(\d+)\.linear([12])\.", r"decoder.layers.\1.fc\2."),
    (r"^transformer_ffn_layers\.(\d+)\.norm\.", r"decoder.layers.\1.final_layer_norm."),
    (r"^decoder_norm\.", "decoder.layernorm."),
    (r"^mask_embed\.layers\.(\d)\.", r"decoder.mask_predictor.mask_embedder.\1.0."),
]


def build_oracle(
    cfg: CfgNode, model: nn.Module, role: str = "h"
) -> Mask2FormerForUniversalSegmentation:
    """Builds the oracle of our model's backbone and one of its heads, in eval mode.

    Args:
        cfg: the model's.
        model: a MaskFormerTTT with a Swin backbone.
        role: of the head, "h" or "g" (the oracle then has classes, which mean nothing).
    """
    weights, head = model.state_dict(), MASKFORMER_PARTS[role]
    queries = weights[f"{head}.predictor.query_feat.weight"].shape[0]
    oracle = Mask2FormerForUniversalSegmentation(_oracle_config(cfg, queries))
    module = oracle.model.transformer_module  # transformers 5.20 keeps them in a plain list
    module.input_projections = nn.ModuleList(module.input_projections)
    translated = translate(weights, head)
    missing, unexpected = oracle.load_state_dict(translated, strict=False)
    unused = {n for n in missing if ".swin.layernorm." in n}  # the classifier's norm: never run
    if role == "g":
        unused |= {n for n in missing if n.startswith(("class_predictor.", "criterion."))}
    assert set(missing) == unused, sorted(set(missing) - unused)
    assert not unexpected, unexpected
    return oracle.eval()


def _oracle_config(cfg: CfgNode, queries: int) -> Mask2FormerConfig:
    swin, head, former = cfg.MODEL.SWIN, cfg.MODEL.SEM_SEG_HEAD, cfg.MODEL.MASK_FORMER
    backbone: Any = SwinConfig  # their signatures leave out what their base class takes
    config: Any = Mask2FormerConfig
    swin_config = backbone(
        num_channels=swin.IN_CHANS,
        patch_size=swin.PATCH_SIZE,
        embed_dim=swin.EMBED_DIM,
        depths=list(swin.DEPTHS),
        num_heads=list(swin.NUM_HEADS),
        window_size=swin.WINDOW_SIZE,
        mlp_ratio=swin.MLP_RATIO,
        drop_path_rate=0.0,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    return config(
        backbone_config=swin_config,
        feature_size=head.CONVS_DIM,
        mask_feature_size=head.MASK_DIM,
        encoder_layers=head.TRANSFORMER_ENC_LAYERS,
        encoder_feedforward_dim=head.DEFORMABLE_TRANSFORMER_ENCODER_DIM_FEEDFORWARD,
        hidden_dim=former.HIDDEN_DIM,
        num_attention_heads=former.NHEADS,
        dim_feedforward=former.DIM_FEEDFORWARD,
        decoder_layers=former.DEC_LAYERS,
        num_queries=queries,
        num_labels=head.NUM_CLASSES,
        pre_norm=former.PRE_NORM,
        enforce_input_projection=former.ENFORCE_INPUT_PROJ,
        class_weight=former.CLASS_WEIGHT,
        mask_weight=former.MASK_WEIGHT,
        dice_weight=former.DICE_WEIGHT,
        no_object_weight=former.NO_OBJECT_WEIGHT,
        train_num_points=former.TRAIN_NUM_POINTS,
        oversample_ratio=former.OVERSAMPLE_RATIO,
        importance_sample_ratio=former.IMPORTANCE_SAMPLE_RATIO,
        output_auxiliary_logits=True,
        dropout=0.0,
    )


def translate(weights: dict[str, Tensor], head: str = "sem_seg_head") -> dict[str, Tensor]:
    """Returns weights with Mask2Former's names under Hugging Face's."""
    translated = {}
    for name, value in _split(weights).items():
        if name.startswith("backbone."):
            if not name.endswith("relative_position_index"):
                new = _rename(name.removeprefix("backbone."), _BACKBONE)
                translated[f"model.pixel_level_module.encoder.{new}"] = value
        elif name.startswith(f"{head}.pixel_decoder."):
            new = _rename(name.removeprefix(f"{head}.pixel_decoder."), _PIXEL_DECODER)
            translated[f"model.pixel_level_module.decoder.{new}"] = value
        elif name.startswith(f"{head}.predictor.class_embed."):
            translated[name.replace(f"{head}.predictor.class_embed", "class_predictor")] = value
        elif name.startswith(f"{head}.predictor."):
            new = _rename(name.removeprefix(f"{head}.predictor."), _PREDICTOR)
            translated[f"model.transformer_module.{new}"] = value
        elif name == "criterion.empty_weight" and head == "sem_seg_head":
            translated[name] = value
    return translated


def _split(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Splits fused projections into the three that Hugging Face keeps."""
    parts = {}
    for name, value in weights.items():
        if ".attn.qkv." in name or ".self_attn.in_proj_" in name:
            for letter, part in zip("qkv", value.chunk(3), strict=True):
                new = name.replace(".qkv.", f".{letter}.")
                parts[new.replace("in_proj_", f"{letter}_proj.")] = part
        else:
            parts[name] = value
    return parts


def _rename(name: str, rules: list) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


class Encoder(nn.Module):
    """Gives the features of the oracle's Swin our names."""

    def __init__(self, oracle: Mask2FormerForUniversalSegmentation) -> None:
        super().__init__()
        self.encoder = oracle.model.pixel_level_module.encoder

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Maps (B, 4, H, W) to ``res2`` ... ``res5``."""
        maps = self.encoder(x).feature_maps
        return {f"res{i + 2}": feature for i, feature in enumerate(maps)}


class Head(nn.Module):
    """Gives the oracle's two decoders the interface of our heads."""

    def __init__(self, oracle: Mask2FormerForUniversalSegmentation) -> None:
        super().__init__()
        self.pixel_decoder = oracle.model.pixel_level_module.decoder
        self.predictor = oracle.model.transformer_module
        self.class_predictor = oracle.class_predictor

    def decode(self, features: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Returns the last layer's queries (B, Q, C) and mask logits (B, Q, H/4, W/4)."""
        pixels = self.pixel_decoder(list(features.values()), output_hidden_states=False)
        output = self.predictor(list(pixels.multi_scale_features), pixels.mask_features)
        queries = output.intermediate_hidden_states[-1].transpose(0, 1)
        return queries, output.masks_queries_logits[-1]

    def forward(
        self, features: dict[str, Tensor], *, every_layer: bool = False
    ) -> list[dict[str, Tensor]]:
        """Returns the last layer of :class:`ttt_video.modeling.heads.MaskFormerTTTHead`."""
        queries, masks = self.decode(features)
        return [{"pred_logits": self.class_predictor(queries), "pred_masks": masks}]


class Reconstruction(Head):
    """Has the interface of :class:`ttt_video.modeling.heads.ReconstructionHead`."""

    def forward(self, features: dict[str, Tensor]) -> Tensor:  # type: ignore[override]
        """Returns (B, 3, H, W) pixels."""
        return F.pixel_shuffle(self.decode(features)[1], PIXELS_PER_QUERY_CELL)


def build_peer(cfg: CfgNode, model: MaskFormerTTT) -> MaskFormerTTT:
    """Puts Hugging Face's encoder and decoders, with our weights, into our meta-architecture.

    What is around them (normalising, masking, loss, post-processing) is the same code, so adapters
    and predictions run on it as on ours.
    """
    peer = copy.copy(model)
    peer._modules = dict(model._modules)
    main, reconstruction = build_oracle(cfg, model), build_oracle(cfg, model, "g")
    parts: dict[str, Any] = {
        "f": Encoder(main),
        "h": Head(main),
        "g": Reconstruction(reconstruction),
    }
    for role, part in parts.items():
        (name,) = parts_of(model)[role]
        frozen = not any(p.requires_grad for p in model.get_submodule(name).parameters())
        peer._modules[name] = part.to(model.device).requires_grad_(not frozen)
    return peer.eval()
