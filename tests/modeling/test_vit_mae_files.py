"""The published files of MAE and TTT-MAE: names and shapes as they are, and how they are read."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.modeling import build_model
from model_contract import image
from tiny import TINY_VIT, VIT_SIDE
from torch import Tensor

from ttt_video.adaptation.moving_parameters import part_names, unfreeze
from ttt_video.config import load_config
from ttt_video.errors import UserError
from ttt_video.modeling.checkpointer import TTTCheckpointer
from ttt_video.modeling.interface import prefixes
from ttt_video.modeling.vit_mae import ViTMAE
from ttt_video.modeling.weights import load_weights, read_checkpoint
from ttt_video.stream import load_source_model

Shapes = dict[str, tuple[int, ...]]

# width, depth, patch side and patches of an image of 224 px
ENCODERS = {"base": (768, 12, 16, 196), "large": (1024, 24, 16, 196), "huge": (1280, 32, 14, 256)}

# In millions; MAE's page of models and He et al. give 86, 304 and 632 for encoders, and Hugging
# Face's ViTMAEForPreTraining has these with position tables.
WITH_DECODER = {"base": 111.908, "large": 329.542, "huge": 657.074}


def layer(name: str, outputs: int, inputs: int) -> Shapes:
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def norm(name: str, width: int) -> Shapes:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def blocks(name: str, width: int, depth: int) -> Shapes:
    shapes: Shapes = {}
    for i in range(depth):
        shapes |= norm(f"{name}.{i}.norm1", width)
        shapes |= layer(f"{name}.{i}.attn.qkv", 3 * width, width)
        shapes |= layer(f"{name}.{i}.attn.proj", width, width)
        shapes |= norm(f"{name}.{i}.norm2", width)
        shapes |= layer(f"{name}.{i}.mlp.fc1", 4 * width, width)
        shapes |= layer(f"{name}.{i}.mlp.fc2", width, 4 * width)
    return shapes


def encoder(size: str) -> Shapes:
    """``mae_pretrain_vit_<size>.pth``"""
    width, depth, patch, patches = ENCODERS[size]
    return {
        "cls_token": (1, 1, width),
        "pos_embed": (1, patches + 1, width),
        "patch_embed.proj.weight": (width, 3, patch, patch),
        "patch_embed.proj.bias": (width,),
        **blocks("blocks", width, depth),
        **norm("norm", width),
    }


def decoder(size: str) -> Shapes:
    """Returns the decoder of ``mae_pretrain_vit_<size>_full.pth``, and of ``mae_visualize_*``."""
    width, _, patch, patches = ENCODERS[size]
    return {
        "mask_token": (1, 1, 512),
        **layer("decoder_embed", 512, width),
        "decoder_pos_embed": (1, patches + 1, 512),
        **blocks("decoder_blocks", 512, 8),
        **norm("decoder_norm", 512),
        **layer("decoder_pred", 3 * patch**2, 512),
    }


def vit_head(size: str) -> Shapes:
    """Returns the head of ``prob_lr1e-3_wd.2_blk12_ep20.pth``, which has an encoder, too."""
    width, _, _, patches = ENCODERS[size]
    return {
        **layer("classifier_embed", 768, width),
        "classifier_pos_embed": (1, patches + 1, 768),
        **blocks("classifier_blocks", 768, 12),
        **norm("classifier_norm", 768),
        **layer("classifier_pred", 1000, 768),
    }


def linear_head(size: str) -> Shapes:
    width = ENCODERS[size][0]
    statistics: Shapes = {"bn.running_mean": (width,), "bn.running_var": (width,)}
    return {**statistics, "bn.num_batches_tracked": (), **layer("head", 1000, width)}


HEADS = {"classifier": vit_head, "linear": linear_head}


def on_meta(*opts: str) -> ViTMAE:
    """The model without memory for its weights."""
    with torch.device("meta"):
        return ViTMAE(load_config("Base-ViTMAE.yaml", opts=list(opts)))


def empty(shapes: Shapes) -> dict[str, Tensor]:
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


@pytest.mark.parametrize("size", ENCODERS)
def test_the_sizes_are_those_that_their_authors_state(size):
    values = sum(torch.Size(s).numel() for s in {**encoder(size), **decoder(size)}.values())
    assert values / 1e6 == pytest.approx(WITH_DECODER[size], abs=0.001)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("size", ENCODERS)
def test_published_names_and_shapes_are_the_models_and_all_are_loaded(size, head):
    model = on_meta("MODEL.VIT_MAE.SIZE", size, "MODEL.VIT_MAE.HEAD", head)
    published = {**encoder(size), **decoder(size), **HEADS[head](size)}
    assert {n: tuple(v.shape) for n, v in model.state_dict().items()} == published
    report = load_weights(model, empty(published))
    assert sorted(report.loaded) == sorted(published)
    assert report.new == report.unused == report.mismatched == report.renamed == []

    bare = {**encoder(size), **HEADS[head](size)}
    report = load_weights(model, empty(bare), allow_new=prefixes(model, "g"))
    assert sorted(report.loaded) == sorted(bare)
    assert report.unused == report.mismatched == []
    assert sorted(report.new) == sorted(decoder(size))


def test_what_the_published_step_moves_is_all_but_decoder_and_head():
    model = on_meta()
    rest = {name for name, _ in model.named_parameters() if not name.startswith("decoder")}
    model.requires_grad_(False)
    for name in load_config("Base-ViTMAE.yaml").TTT.MODULES:
        unfreeze(model, name, "all", part_names(model, "fg"))
    moving = {name for name, p in model.named_parameters() if p.requires_grad}
    assert moving == {name for name in rest if not name.startswith("classifier")}
    assert {"cls_token", "mask_token"} < moving


# ---- files of a small model in the published form


def build(*opts: str, seed: int = 0) -> ViTMAE:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build_model(load_config("Base-ViTMAE.yaml", opts=[*TINY_VIT, *opts])).eval()


def write(path: Path, weights: dict[str, Tensor], **more: Any) -> str:
    torch.save({"model": weights, **more}, path)
    return str(path)


def of(model: ViTMAE, *roles: str) -> dict[str, Tensor]:
    """The weights of some roles."""
    starts = prefixes(model, *roles)
    return {name: v for name, v in model.state_dict().items() if name.startswith(starts)}


def loaded(path: str, *opts: str) -> ViTMAE:
    cfg = load_config("Base-ViTMAE.yaml", opts=[*TINY_VIT, *opts, "MODEL.WEIGHTS", path])
    with torch.random.fork_rng():
        torch.manual_seed(9)
        return load_source_model(cfg)


def prediction(model: ViTMAE) -> Tensor:
    with torch.no_grad():
        return model([{"image": image(VIT_SIDE, VIT_SIDE)}])[0]["image_class"]


ARGS = argparse.Namespace(batch_size=64, blr=1e-3, data_path="/data", weight_decay=0.2)


def test_the_two_files_of_the_published_commands(tmp_path):
    """f and g of MAE's file, h of the other, whose encoder is not taken."""
    first, second = build(), build(seed=1)
    mae = write(tmp_path / "mae.pth", of(first, "f", "g"), args=ARGS, epoch=799)
    head = write(tmp_path / "head.pth", of(second, "f", "h"), args=ARGS, optimizer={}, epoch=19)
    model = loaded(mae, "MODEL.VIT_MAE.HEAD_WEIGHTS", head)
    for name, value in {**of(first, "f", "g"), **of(second, "h")}.items():
        assert torch.equal(model.state_dict()[name], value), name


def test_a_linear_head_by_the_names_of_linear_probing(tmp_path):
    linear = ("MODEL.VIT_MAE.HEAD", "linear")
    first = build(*linear)
    first.bn.running_mean.normal_()
    mae = write(tmp_path / "mae.pth", of(first, "f", "g"))
    names = {"bn.running_mean": "head.0.running_mean", "bn.running_var": "head.0.running_var",
             "head.weight": "head.1.weight", "head.bias": "head.1.bias"}  # fmt: skip
    weights = of(first, "h")
    head = write(tmp_path / "head.pth", {new: weights[own] for own, new in names.items()})
    model = loaded(mae, *linear, "MODEL.VIT_MAE.HEAD_WEIGHTS", head)
    assert torch.equal(prediction(model), prediction(first))


def test_an_encoder_without_decoder_predicts_and_has_no_mask_token(tmp_path):
    first = build()
    mae = write(tmp_path / "mae.pth", of(first, "f"))
    head = write(tmp_path / "head.pth", of(first, "h"))
    model = loaded(mae, "MODEL.VIT_MAE.HEAD_WEIGHTS", head)
    assert model.parts.keys() == {"f", "h"}
    assert sorted(model.state_dict()) == sorted(of(first, "f", "h"))
    assert torch.equal(prediction(model), prediction(first))


def test_one_file_of_all_needs_no_other(tmp_path):
    first = build()
    model = loaded(write(tmp_path / "all.pth", first.state_dict()))
    assert torch.equal(prediction(model), prediction(first))


def test_training_starts_from_an_encoder_without_decoder(tmp_path):
    first, model = build(), build(seed=1)
    mae = write(tmp_path / "mae.pth", of(first, "f"), args=ARGS)
    checkpointer = TTTCheckpointer(model, str(tmp_path))
    checkpointer.resume_or_load(mae)
    assert sorted(checkpointer.report.loaded) == sorted(of(first, "f"))
    assert set(checkpointer.report.new) == set(of(model, "g", "h"))


def test_a_file_without_the_head_that_is_asked_for_is_one_line(tmp_path):
    first = build()
    mae = write(tmp_path / "mae.pth", of(first, "f", "g"))
    with pytest.raises(UserError, match=r"HEAD_WEIGHTS .*mae\.pth has none of classifier_embed"):
        loaded(mae, "MODEL.VIT_MAE.HEAD_WEIGHTS", mae)
    with pytest.raises(UserError, match=r"do not fit: \d+ of the model are missing"):
        loaded(mae)


@pytest.mark.parametrize("head", HEADS)
def test_a_head_of_other_classes_is_one_line_and_may_be_trained_anew(head, tmp_path):
    kind = ("MODEL.VIT_MAE.HEAD", head)
    file = write(tmp_path / "all.pth", build(*kind).state_dict())
    seven = (*kind, "MODEL.VIT_MAE.NUM_CLASSES", "7")
    with pytest.raises(UserError, match=r"of 5 classes, the model of 7: set .*NUM_CLASSES 5, or"):
        loaded(file, *seven)
    checkpointer = TTTCheckpointer(build(*seven), str(tmp_path), new_classes=True)
    checkpointer.resume_or_load(file)
    assert len(checkpointer.report.mismatched) == 2


class Trap:
    def __reduce__(self):
        return os.mkdir, ("trapped",)


def test_a_command_line_in_a_file_is_data_and_nothing_in_it_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    weights = {"norm.weight": torch.ones(3)}
    before = torch.serialization.get_safe_globals()
    path = write(tmp_path / "args.pth", weights, args=ARGS)
    assert read_checkpoint(path).keys() == {"norm.weight"}
    path = write(tmp_path / "trap.pth", weights, args=argparse.Namespace(output_dir=Trap()))
    with pytest.raises(UserError, match=r"refused to load .*trap\.pth: it holds \w+\.mkdir"):
        read_checkpoint(path)
    assert not Path("trapped").exists()
    assert torch.serialization.get_safe_globals() == before
