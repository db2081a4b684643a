"""The model from a config: parts by name, Mask2Former's own names, what is refused."""

from __future__ import annotations

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.config import get_cfg as detectron2_cfg
from detectron2.modeling import build_model

from ttt_video import MaskFormerTTT, add_ttt_config
from ttt_video.errors import UserError
from ttt_video.modeling import MaskFormerTTTHead, SwinTransformerTTT
from ttt_video.stream.source_model import load_source_model
from ttt_video.training.joint_training import JointTrainer


def build(cfg: CfgNode, *opts) -> MaskFormerTTT:
    cfg = cfg.clone()
    cfg.merge_from_list(list(opts))
    return build_model(cfg)


def test_parameter_names_are_the_published_ones(tiny_model):
    prefixes = {
        ".".join(name.split(".")[: 1 if name.startswith(("backbone", "criterion")) else 2])
        for name in tiny_model.state_dict()
    }
    assert prefixes == {
        "backbone",
        "sem_seg_head.pixel_decoder",
        "sem_seg_head.predictor",
        "recon_head.pixel_decoder",
        "recon_head.predictor",
        "criterion",
    }


def test_mask2formers_own_configs(tiny_cfg):
    """Its names for the backbone and the head, in a config that its own functions made."""
    from detectron2.projects.deeplab import add_deeplab_config

    cfg = detectron2_cfg()
    add_deeplab_config(cfg)
    for path in ("INPUT", "SOLVER", "MODEL.SEM_SEG_HEAD"):  # keys that are already there
        node = cfg
        for part in path.split("."):
            node = node[part]
        node.LEFT_BY_MASK2FORMER = "kept"
    cfg.MODEL.MASK_FORMER = CfgNode({"CLASS_WEIGHT": 1.5})
    cfg.MODEL.SEM_SEG_HEAD.PIXEL_DECODER_NAME = "BasePixelDecoder"
    add_ttt_config(cfg)
    assert cfg.SOLVER.LEFT_BY_MASK2FORMER == "kept"
    published = """
MODEL:
  META_ARCHITECTURE: "MaskFormerTTT"
  DEVICE: "cpu"
  BACKBONE:
    NAME: "D2SwinTransformer"
  SWIN:
    EMBED_DIM: 16
    DEPTHS: [1, 1, 1, 1]
    NUM_HEADS: [1, 2, 2, 4]
    WINDOW_SIZE: 4
  SEM_SEG_HEAD:
    NAME: "MaskFormerHead"
    NUM_CLASSES: 19
    CONVS_DIM: 32
    MASK_DIM: 32
    NORM: "GN"
    PIXEL_DECODER_NAME: "MSDeformAttnPixelDecoder"
    IN_FEATURES: ["res2", "res3", "res4", "res5"]
    COMMON_STRIDE: 4
    TRANSFORMER_ENC_LAYERS: 1
  MASK_FORMER:
    TRANSFORMER_IN_FEATURE: "multi_scale_pixel_decoder"
    HIDDEN_DIM: 32
    NHEADS: 4
    DIM_FEEDFORWARD: 32
    NUM_OBJECT_QUERIES: 8
    DEC_LAYERS: 2
"""
    cfg.merge_from_other_cfg(CfgNode.load_cfg(published))
    model = build_model(cfg)
    assert isinstance(model, MaskFormerTTT)
    assert isinstance(model.backbone, SwinTransformerTTT)
    assert isinstance(model.sem_seg_head, MaskFormerTTTHead)
    assert model.criterion.weights["loss_ce"] == 1.5
    names = {k for k, v in model.state_dict().items()}
    assert names == set(build_model(tiny_cfg).state_dict())


@pytest.mark.parametrize(
    ("key", "known"),
    [
        ("MODEL.BACKBONE.NAME", "SwinTransformerTTT"),
        ("MODEL.SEM_SEG_HEAD.NAME", "MaskFormerTTTHead"),
        ("MODEL.SEM_SEG_HEAD.PIXEL_DECODER_NAME", "MSDeformAttnPixelDecoder"),
        ("MODEL.MASK_FORMER.TRANSFORMER_DECODER_NAME", "MultiScaleMaskedTransformerDecoder"),
    ],
)
def test_unknown_names_list_the_known_ones(tiny_cfg, key, known):
    with pytest.raises(UserError, match=rf"{key} is 'nonsense'.*choose one of: .*{known}"):
        build(tiny_cfg, key, "nonsense")


def test_an_unknown_architecture_is_told_before_anything_is_rendered(tiny_cfg, monkeypatch):
    tiny_cfg.MODEL.META_ARCHITECTURE = "nonsense"
    tiny_cfg.MODEL.WEIGHTS = "any.pth"
    monkeypatch.setattr(JointTrainer, "build_train_loader", None)
    for first in (JointTrainer, JointTrainer.build_model, load_source_model):
        with pytest.raises(UserError, match=r"META_ARCHITECTURE is 'nonsense'.*MaskFormerTTT"):
            first(tiny_cfg)


def test_mask2formers_default_pixel_decoder_says_what_to_set(tiny_cfg):
    with pytest.raises(UserError, match=r"'BasePixelDecoder'.* set it to MSDeformAttnPixelDecoder"):
        build(tiny_cfg, "MODEL.SEM_SEG_HEAD.PIXEL_DECODER_NAME", "BasePixelDecoder")


def test_features_that_the_backbone_does_not_give(tiny_cfg):
    message = r"IN_FEATURES names \['p2'\]; the backbone SwinTransformerTTT gives \['res2'"
    with pytest.raises(UserError, match=message):
        build(tiny_cfg, "MODEL.SEM_SEG_HEAD.IN_FEATURES", ["p2", "res3", "res4", "res5"])


@pytest.mark.parametrize("train", [(), ("_test_meta_arch_without_things",)])
def test_panoptic_needs_thing_classes(tiny_cfg, train):
    with pytest.raises(UserError, match=r"PANOPTIC_ON needs to know the thing classes.*DATASETS"):
        build(tiny_cfg, "DATASETS.TRAIN", train, "MODEL.MASK_FORMER.TEST.PANOPTIC_ON", True)


def test_normalised_targets_need_whole_patches(tiny_cfg):
    with pytest.raises(UserError, match=r"MASK_PATCH_SIZE 12 must divide.*32"):
        build(tiny_cfg, "TTT.RECON.NORMALIZE_TARGET", True, "TTT.MASK_PATCH_SIZE", 12)


@pytest.mark.parametrize("divisibility", [0, 1, 6])
def test_padding_that_the_reconstruction_cannot_fill(tiny_cfg, divisibility):
    with pytest.raises(
        UserError, match=rf"multiples of {divisibility} px.*SIZE_DIVISIBILITY to 32"
    ):
        build(tiny_cfg, "MODEL.MASK_FORMER.SIZE_DIVISIBILITY", divisibility)


def test_the_backbones_own_divisibility(tiny_cfg):
    assert build(tiny_cfg, "MODEL.MASK_FORMER.SIZE_DIVISIBILITY", -1).size_divisibility == 32


def test_a_mask_of_another_size_than_the_image(tiny_model):
    x = {"image": torch.zeros(3, 64, 96, dtype=torch.uint8), "image_mask": torch.ones(1, 32, 96)}
    with pytest.raises(ValueError, match=r"image_mask is \(1, 32, 96\); .* \(1, 64, 96\)"):
        tiny_model.reconstruction_losses([x])


def test_a_config_that_cannot_work_is_refused_before_anything_is_built(tiny_cfg):
    with pytest.raises(UserError, match=r"TTT\.MASK_RATIO is 1\.5"):
        build(tiny_cfg, "TTT.MASK_RATIO", 1.5)


@pytest.mark.parametrize(
    ("key", "value", "fix"),
    [
        ("DEFORMABLE_TRANSFORMER_ENCODER_IN_FEATURES", [], r"some of \['res2', .*each once"),
        ("DEFORMABLE_TRANSFORMER_ENCODER_IN_FEATURES", ["res3", "res3"], "each once"),
        ("DEFORMABLE_TRANSFORMER_ENCODER_IN_FEATURES", ["res9"], r"some of \['res2', "),
        ("IN_FEATURES", ["res4"], r"stride 8 to 4 .* needs 1 of"),
        ("CONVS_DIM", 48, r"multiple of 32 and of MODEL\.MASK_FORMER\.NHEADS"),
    ],
)
def test_what_the_pixel_decoder_cannot_be_built_from(tiny_cfg, key, value, fix):
    key = f"MODEL.SEM_SEG_HEAD.{key}"
    with pytest.raises(UserError, match=rf"^{key} is .*{fix}"):
        build(tiny_cfg, key, value)
