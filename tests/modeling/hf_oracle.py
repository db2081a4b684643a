"""Small models with random weights, to compare with Hugging Face's Mask2Former."""

from __future__ import annotations

import re

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from torch import nn

from ttt_video.config import load_config


def small_config(*key_values: object) -> CfgNode:
    """A config of a small model, its sizes as different as they may be; then KEY VALUE pairs."""
    cfg = load_config("joint_cityscapes.yaml")
    cfg.MODEL.DEVICE = "cpu"
    swin, head, former = cfg.MODEL.SWIN, cfg.MODEL.SEM_SEG_HEAD, cfg.MODEL.MASK_FORMER
    swin.EMBED_DIM, swin.DEPTHS, swin.NUM_HEADS = 24, [2, 2, 2, 2], [2, 3, 4, 6]
    head.NUM_CLASSES, head.CONVS_DIM, head.MASK_DIM = 7, 64, 32
    head.TRANSFORMER_ENC_LAYERS = 3
    head.DEFORMABLE_TRANSFORMER_ENCODER_DIM_FEEDFORWARD = 96
    former.HIDDEN_DIM, former.NHEADS, former.DIM_FEEDFORWARD = 64, 4, 80
    former.NUM_OBJECT_QUERIES, former.DEC_LAYERS, former.TRAIN_NUM_POINTS = 20, 5, 200
    cfg.merge_from_list(list(key_values))
    return cfg


def build_random(cfg: CfgNode, seed: int) -> nn.Module:
    """Our model in eval mode, every parameter random: what is zero or one at first hides errors."""
    torch.manual_seed(seed)
    model = build_model(cfg)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn_like(parameter)
            if name.endswith("sampling_offsets.bias"):
                parameter.copy_(2 * noise)  # px: beyond the borders now and then
            elif re.search(r"query_|level_embed|bias_table", name):
                parameter.copy_(noise)
            elif parameter.dim() > 1:
                parameter.copy_(noise * parameter[0].numel() ** -0.5)
            elif name.endswith("weight"):  # of a norm
                parameter.copy_(1 + 0.2 * noise)
            else:
                parameter.copy_(0.2 * noise)
    return model.eval()
