"""Hugging Face's ViTMAE with the weights of a small ViTMAE, as an oracle."""

from __future__ import annotations

import re
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn

from ttt_video.modeling.masking import patchify
from ttt_video.modeling.vit_mae import ViTMAE

OTHER = {
    "cls_token": "vit.embeddings.cls_token",
    "pos_embed": "vit.embeddings.position_embeddings",
    "patch_embed.proj": "vit.embeddings.patch_embeddings.projection",
    "norm": "vit.layernorm",
    "mask_token": "decoder.mask_token",
    **{
        name: f"decoder.{name}"
        for name in ("decoder_embed", "decoder_pos_embed", "decoder_norm", "decoder_pred")
    },
}
"""Hugging Face's names outside of the blocks"""

BLOCKS = {"blocks": "vit.layers", "decoder_blocks": "decoder.decoder_layers"}

IN_BLOCK = {
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "attn.proj": "attention.o_proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}

# Before version 5.22 or so; the last one for Python 3.10 may have these.
OLDER = {
    "vit.layers": "vit.encoder.layer",
    "attention.o_proj": "attention.output.dense",
    "attention.q_proj": "attention.attention.query",
    "attention.k_proj": "attention.attention.key",
    "attention.v_proj": "attention.attention.value",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}


def _theirs(name: str, known: Mapping[str, Tensor]) -> list[str]:
    """Returns Hugging Face's names of one of our tensors: three for queries, keys and values."""
    block = re.fullmatch(r"(blocks|decoder_blocks)\.(\d+)\.(.+)\.(weight|bias)", name)
    if block is None:
        stem, dot, kind = name.rpartition(".")
        return [OTHER[name]] if name in OTHER else [f"{OTHER[stem]}{dot}{kind}"]
    blocks, index, layer, kind = block.groups()
    inner = [IN_BLOCK[layer]] if layer in IN_BLOCK else [f"attention.{x}_proj" for x in "qkv"]
    found = [f"{BLOCKS[blocks]}.{index}.{own}.{kind}" for own in inner]
    for new, old in OLDER.items():
        found = [n if n in known else n.replace(new, old) for n in found]
    return found


def hugging_face(
    model: ViTMAE, *, mask_ratio: float = 0.75, norm_pix_loss: bool = True
) -> nn.Module:
    """Builds it offline, of the model's sizes and dtype and with its weights."""
    library = pytest.importorskip("transformers", reason="the oracle is in the test extra")
    encoder, decoder = model.blocks[0], model.decoder_blocks[0]
    config = library.ViTMAEConfig(
        image_size=model.image_size,
        patch_size=model.patch_size,
        hidden_size=model.norm.weight.numel(),
        num_hidden_layers=len(model.blocks),
        num_attention_heads=encoder.attn.num_heads,
        intermediate_size=encoder.mlp.fc1.out_features,
        decoder_hidden_size=model.decoder_norm.weight.numel(),
        decoder_num_hidden_layers=len(model.decoder_blocks),
        decoder_num_attention_heads=decoder.attn.num_heads,
        decoder_intermediate_size=decoder.mlp.fc1.out_features,
        layer_norm_eps=1e-6,
        mask_ratio=mask_ratio,
        norm_pix_loss=norm_pix_loss,
    )
    theirs = library.ViTMAEForPreTraining(config).eval().to(model.pos_embed.dtype)
    known = theirs.state_dict()
    given = {}
    for name, value in model.state_dict().items():
        if not name.startswith("classifier"):
            names = _theirs(name, known)
            given.update(zip(names, value.chunk(len(names)), strict=True))
    theirs.load_state_dict(given)  # strict: all of theirs
    return theirs


def hugging_face_gradients(theirs: nn.Module, model: ViTMAE) -> dict[str, Tensor]:
    """Returns the gradients of its parameters by our names."""
    parameters = dict(theirs.named_parameters())
    found = {}
    for name, _ in model.named_parameters():
        if not name.startswith("classifier"):
            found[name] = torch.cat([parameters[n].grad for n in _theirs(name, parameters)])
    return found


def noise_of(visible: Tensor, patch_size: int) -> Tensor:
    """Returns the noise with which it masks as ``visible`` (B, 1, H, W) and keeps the order."""
    hidden = 1 - patchify(visible, patch_size)[..., 0]
    return hidden + torch.arange(hidden.shape[1]) / 1000
