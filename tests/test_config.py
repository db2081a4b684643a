"""Config keys: Mask2Former's defaults, merging on top of its own, and what is refused."""

from __future__ import annotations

import math
import re

import pytest
import yaml
from detectron2.config import CfgNode
from detectron2.config import get_cfg as detectron2_cfg

import ttt_video
from ttt_video.config import (
    KEYS,
    Key,
    add_ttt_config,
    at_least,
    declare_keys,
    get_cfg,
    load_config,
    load_yaml,
    read_yaml,
    validate_config,
)
from ttt_video.errors import UserError
from ttt_video.shipped import config_dir


def flatten(cfg: CfgNode, prefix: str = "") -> dict:
    flat = {}
    for key, value in cfg.items():
        if isinstance(value, CfgNode):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def changed(*key_values) -> CfgNode:
    cfg = get_cfg()
    cfg.merge_from_list([*key_values])
    return cfg


def test_defaults_are_valid():
    validate_config(get_cfg())


def test_public_names():
    assert ttt_video.add_ttt_config is add_ttt_config
    assert ttt_video.get_cfg is get_cfg


def test_detectron2s_own_keys_are_left_as_they_are():
    theirs, ours = flatten(detectron2_cfg()), flatten(get_cfg())
    assert theirs.items() <= ours.items()
    added = {key.rsplit(".", 1)[0].split(".")[0] for key in ours.keys() - theirs.keys()}
    assert added == {"INPUT", "MODEL", "SOLVER", "TTT"}


def test_works_on_top_of_mask2formers_own_keys():
    """Its keys keep the values they had, the missing ones are filled in, new ones are added."""
    cfg = detectron2_cfg()
    cfg.INPUT.DATASET_MAPPER_NAME = "theirs"
    cfg.INPUT.IMAGE_SIZE = 512
    cfg.MODEL.MASK_FORMER = CfgNode({"NUM_OBJECT_QUERIES": 77, "TEST": {"INSTANCE_ON": True}})
    cfg.MODEL.SWIN = CfgNode({"EMBED_DIM": 128})
    cfg.MODEL.SEM_SEG_HEAD.PIXEL_DECODER_NAME = "BasePixelDecoder"
    before = flatten(cfg)
    add_ttt_config(cfg)
    after = flatten(cfg)
    assert before.items() <= after.items()
    assert after.keys() == flatten(get_cfg()).keys()
    assert after["MODEL.MASK_FORMER.TEST.PANOPTIC_ON"] is False
    assert after["MODEL.SWIN.IN_CHANS"] == 4


def test_adding_twice_changes_nothing():
    once, twice = get_cfg(), get_cfg()
    twice.TTT.MASK_RATIO = 0.5
    add_ttt_config(twice)
    assert twice.TTT.MASK_RATIO == 0.5
    twice.TTT.MASK_RATIO = once.TTT.MASK_RATIO
    assert flatten(once) == flatten(twice)


def test_configs_do_not_share_lists():
    first, second = get_cfg(), get_cfg()
    first.TTT.OPTIMIZER.BETAS.append(1)
    first.TTT.CROP.SIZE.append(1)
    assert second.TTT.OPTIMIZER.BETAS == [0.9, 0.999]
    assert second.TTT.CROP.SIZE == []


def test_mask2former_defaults():
    """A few of its published defaults, so that its configs merge to the same model."""
    cfg = get_cfg()
    former = cfg.MODEL.MASK_FORMER
    assert (former.CLASS_WEIGHT, former.DICE_WEIGHT, former.MASK_WEIGHT) == (1.0, 1.0, 20.0)
    assert (former.HIDDEN_DIM, former.NUM_OBJECT_QUERIES, former.NHEADS) == (256, 100, 8)
    assert former.TRAIN_NUM_POINTS == 12544
    assert cfg.MODEL.SWIN.PRETRAIN_IMG_SIZE == 224
    assert cfg.SOLVER.BACKBONE_MULTIPLIER == 0.1


@pytest.mark.parametrize("key", [name for name, key in KEYS.items() if key.choices])
def test_closed_sets_of_values(key):
    choices = KEYS[key].choices
    for choice in choices:
        validate_config(changed(key, choice))
    with pytest.raises(UserError, match=rf"{key} is 'nonsense'.*{choices[0]}"):
        validate_config(changed(key, "nonsense"))


def test_keys_of_ones_own_have_a_default_and_a_check(monkeypatch):
    monkeypatch.setitem(KEYS, "TTT.MINE.DARKEST", Key(0.0))  # so that it is gone afterwards
    for _ in range(2):  # a file may run twice
        declare_keys("MINE", {"DARKEST": Key(0.3, at_least(0.1))})
    cfg = get_cfg()
    assert cfg.TTT.MINE.DARKEST == 0.3
    cfg.TTT.MINE.DARKEST = 0.0
    with pytest.raises(UserError, match=r"^TTT\.MINE\.DARKEST is 0\.0; it must be at least 0\.1$"):
        validate_config(cfg)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("TTT.MASK_RATIO", 1.0),
        ("TTT.MASK_RATIO", -0.1),
        ("TTT.MASK_RATIO", float("nan")),
        ("TTT.MASK_PATCH_SIZE", 0),
        ("TTT.MASK_PATCH_SIZE", 6),
        ("TTT.MASK_PATCH_SIZE", -4),
        ("TTT.WINDOW_SIZE", -1),
        ("TTT.BATCH_SIZE", 0),
        ("TTT.MICRO_BATCH_SIZE", -1),
        ("TTT.STEPS_PER_FRAME", 0),
        ("TTT.UPDATE_EVERY", 0),
        ("TTT.FRAME_BUDGET_MS", -1),
        ("TTT.OFFLINE.STEPS", 0),
        ("TTT.OFFLINE.EVAL_EVERY", 0),
        ("TTT.LN_ADAPT.PRIOR", -1.0),
        ("TTT.LINE_SEARCH.SCALES", []),
        ("TTT.LINE_SEARCH.SCALES", [1.0, -0.5]),
        ("TTT.LINE_SEARCH.SCALES", [float("inf")]),
        ("TTT.LINE_SEARCH.SCALES", ["x"]),
        ("TTT.LINE_SEARCH.EVERY", 0),
        ("TTT.LINE_SEARCH.DECAY", 1.0),
        ("TTT.LEARN_ON_CHANGE.READ", []),
        ("TTT.LEARN_ON_CHANGE.READ", [1]),
        ("TTT.LEARN_ON_CHANGE.ENTER", -0.1),
        ("TTT.LEARN_ON_CHANGE.MOVED", float("nan")),
        ("TTT.LEARN_ON_CHANGE.PATIENCE", 0),
        ("TTT.LEARN_ON_CHANGE.WAIT", [0, 5]),
        ("TTT.LEARN_ON_CHANGE.WAIT", [5.0, 40.0]),
        ("TTT.LEARN_ON_CHANGE.WAIT", [5, 4]),
        ("TTT.LEARN_ON_CHANGE.COLOUR_APPROACH", 1.1),
        ("TTT.LEARN_ON_CHANGE.CHECK_EVERY", [0, 4]),
        ("TTT.LEARN_ON_CHANGE.CHECK_EVERY", [5, 4]),
        ("TTT.LEARN_ON_CHANGE.MARGIN", -0.1),
        ("TTT.LEARN_ON_CHANGE.STEP", 1.1),
        ("TTT.LEARN_ON_CHANGE.STEP_FRAMES", -1),
        ("TTT.LEARN_ON_CHANGE.BLUR", [0.0]),
        ("TTT.LEARN_ON_CHANGE.DENOISE", [-1.0]),
        ("TTT.LEARN_ON_CHANGE.COLOURS", [1.5]),
        ("TTT.LEARN_ON_CHANGE.COLOURS", ["all"]),
        ("TTT.SELF_TRAIN.THRESHOLD", 1.1),
        ("TTT.CLASS_BALANCE.THRESHOLD", -1),
        ("TTT.OPTIMIZER.BASE_LR", -0.1),
        ("TTT.OPTIMIZER.BASE_LR", float("nan")),
        ("TTT.OPTIMIZER.CLIP_NORM", -1.0),
        ("TTT.OPTIMIZER.BASE_LR", float("inf")),
        ("TTT.OPTIMIZER.MOMENTUM", 1.0),
        ("TTT.OPTIMIZER.BETAS", [0.9]),
        ("TTT.OPTIMIZER.BETAS", ["a", "b"]),
        ("TTT.OPTIMIZER.WEIGHT_DECAY", -0.1),
        ("TTT.OPTIMIZER.BACKBONE_MULTIPLIER", -1.0),
        ("TTT.MODULES", [1]),
        ("TTT.RECON.WEIGHT", -1.0),
        ("TTT.OPTIMIZER.SOURCE_PULL", 1.5),
        ("TTT.OPTIMIZER.MAX_LOSS_GROWTH", -1.0),
        ("TTT.OPTIMIZER.MAX_LOSS_GROWTH", 0.9),
        ("TTT.OPTIMIZER.MAX_LOSS_GROWTH", float("nan")),
        ("TTT.CROP.SIZE", [64]),
        ("TTT.CROP.SIZE", [0, 64]),
        ("TTT.CROP.SIZE", [1, 2, 3]),
        # keys of detectron2 and Mask2Former
        ("MODEL.SWIN.PATCH_SIZE", 2),
        ("MODEL.SWIN.EMBED_DIM", 0),
        ("MODEL.SWIN.DEPTHS", [1]),
        ("MODEL.SWIN.DEPTHS", [2, 2, 0, 2]),
        ("MODEL.SWIN.DEPTHS", ["x"] * 4),
        ("MODEL.SWIN.NUM_HEADS", [3, 6, 12]),
        ("MODEL.SWIN.NUM_HEADS", [3, 6, 12, 25]),
        ("MODEL.SWIN.WINDOW_SIZE", 0),
        ("MODEL.SWIN.MLP_RATIO", 0.0),
        ("MODEL.SWIN.QK_SCALE", "x"),
        ("MODEL.SWIN.DROP_PATH_RATE", 1.0),
        ("MODEL.SEM_SEG_HEAD.NUM_CLASSES", 0),
        ("MODEL.SEM_SEG_HEAD.NORM", "GroupNorm"),
        ("MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS", -1),
        ("MODEL.SEM_SEG_HEAD.DEFORMABLE_TRANSFORMER_ENCODER_N_POINTS", 0),
        ("MODEL.MASK_FORMER.NHEADS", 7),
        ("MODEL.MASK_FORMER.NHEADS", 0),
        ("MODEL.MASK_FORMER.DROPOUT", -0.1),
        ("MODEL.MASK_FORMER.NUM_OBJECT_QUERIES", 0),
        ("MODEL.MASK_FORMER.CLASS_WEIGHT", -1.0),
        ("MODEL.MASK_FORMER.OVERSAMPLE_RATIO", 0.5),
        ("MODEL.MASK_FORMER.IMPORTANCE_SAMPLE_RATIO", 1.5),
        ("MODEL.MASK_FORMER.TEST.SEMANTIC_ON", False),
        ("TEST.DETECTIONS_PER_IMAGE", 0),
        ("INPUT.FORMAT", "L"),
        ("INPUT.MIN_SIZE_TEST", -1),
        ("INPUT.MAX_SIZE_TEST", 0),
        ("INPUT.MIN_SIZE_TRAIN", ()),
        ("INPUT.MIN_SIZE_TRAIN", (-800,)),
        ("INPUT.MIN_SIZE_TRAIN_SAMPLING", "any"),
        ("INPUT.RANDOM_FLIP", "both"),
        ("INPUT.IMAGE_SIZE", 0),
        ("INPUT.MIN_SCALE", 0.0),
        ("INPUT.MAX_SCALE", 0.05),
        ("DATALOADER.NUM_WORKERS", -1),
        ("SOLVER.BASE_LR", -0.1),
        ("SOLVER.BETAS", [0.9]),
        ("SOLVER.BETAS", [0.9, 1.0]),
        ("SOLVER.MOMENTUM", 1.0),
        ("SOLVER.WEIGHT_DECAY", -1e-4),
        ("SOLVER.WARMUP_ITERS", -1),
        ("SOLVER.CHECKPOINT_PERIOD", 0),
        ("SOLVER.REFERENCE_WORLD_SIZE", 3),
    ],
)
def test_numbers_that_cannot_work(key, value):
    with pytest.raises(UserError, match=rf"^{key} is .*; it must be ") as error:
        validate_config(changed(key, value))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("key", ["MODEL.PIXEL_MEAN", "MODEL.PIXEL_STD"])
@pytest.mark.parametrize("value", [[1.0], [1.0, 2.0], [1.0] * 4, [1.0, 2.0, math.nan], ["a"] * 3])
def test_three_channels_are_normalised(key, value):
    with pytest.raises(UserError, match=rf"{key} is .*; it must be numbers .*for three channels"):
        validate_config(changed(key, value))


def test_clipping_needs_a_bound():
    enabled, bound = "SOLVER.CLIP_GRADIENTS.ENABLED", "SOLVER.CLIP_GRADIENTS.CLIP_VALUE"
    validate_config(changed(enabled, False, bound, 0.0))
    with pytest.raises(UserError, match=rf"{bound} is 0\.0; it must be above 0 where"):
        validate_config(changed(enabled, True, bound, 0.0))


@pytest.mark.parametrize("word", ["inf", ".inf", "1e999"])
def test_an_infinite_prior_is_written_as_a_word(word):
    assert math.inf == load_config(None, opts=["TTT.LN_ADAPT.PRIOR", word]).TTT.LN_ADAPT.PRIOR
    with pytest.raises(UserError, match=r"BASE_LR is inf; it must be at least 0"):
        load_config(None, opts=["TTT.OPTIMIZER.BASE_LR", word])


def test_one_output_is_enough():
    test = "MODEL.MASK_FORMER.TEST"
    validate_config(changed(f"{test}.SEMANTIC_ON", False, f"{test}.INSTANCE_ON", True))
    validate_config(changed(f"{test}.SEMANTIC_ON", False, f"{test}.PANOPTIC_ON", True))


def test_a_deviation_is_above_0():
    validate_config(changed("MODEL.PIXEL_MEAN", [-1.0, 0, 1]))
    with pytest.raises(UserError, match=r"PIXEL_STD is \[0, 1, 1\]; .* above 0"):
        validate_config(changed("MODEL.PIXEL_STD", [0, 1, 1]))


def test_gradients_in_units_of_the_source_are_for_sgd():
    cfg = changed("TTT.OPTIMIZER.SOURCE_GRADIENTS", "sizes.safetensors")
    validate_config(cfg)
    cfg.TTT.OPTIMIZER.NAME = "ADAMW"
    with pytest.raises(UserError, match=r"SOURCE_GRADIENTS is .*ADAMW, which undoes"):
        validate_config(cfg)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("TTT.MASK_RATIO", 0.0),
        ("TTT.MASK_PATCH_SIZE", 4),
        ("TTT.WINDOW_SIZE", 0),
        ("TTT.OPTIMIZER.BASE_LR", 0.0),
        ("TTT.OPTIMIZER.MAX_LOSS_GROWTH", 0.0),
        ("TTT.OPTIMIZER.MAX_LOSS_GROWTH", 1.0),
        ("TTT.CROP.SIZE", [1, 1]),
    ],
)
def test_numbers_at_the_edge_that_work(key, value):
    validate_config(changed(key, value))


def test_a_frame_that_is_reset_is_not_predicted_before_its_update():
    with pytest.raises(UserError, match=r"^TTT\.PREDICT is 'before'; it must be 'after'"):
        validate_config(changed("TTT.PREDICT", "before", "TTT.RESET", "frame"))
    validate_config(changed("TTT.PREDICT", "before"))


def test_a_frame_that_is_reset_is_updated():
    with pytest.raises(UserError, match=r"^TTT\.UPDATE_EVERY is 2; it must be 1 where TTT\.RESET"):
        validate_config(changed("TTT.UPDATE_EVERY", 2, "TTT.RESET", "frame"))
    validate_config(changed("TTT.UPDATE_EVERY", 2))
    with pytest.raises(UserError, match=r"^TTT\.FRAME_BUDGET_MS is 40; it must be 0 where TTT\.R"):
        validate_config(changed("TTT.FRAME_BUDGET_MS", 40, "TTT.RESET", "frame"))
    validate_config(changed("TTT.FRAME_BUDGET_MS", 40))


@pytest.mark.parametrize("scales", [[0.5], [0.0, 1.0], [2.0, 1.0], [0.5, 1.0, 2.0]])
def test_scales_that_cannot_work(scales):
    with pytest.raises(UserError, match=r"TTT\.CROP\.SCALE_RANGE"):
        validate_config(changed("TTT.CROP.SIZE", [64, 64], "TTT.CROP.SCALE_RANGE", scales))


def test_scale_jitter_needs_a_crop():
    with pytest.raises(UserError, match=r"needs TTT\.CROP\.SIZE"):
        validate_config(changed("TTT.CROP.SCALE_RANGE", [0.5, 1.0]))
    validate_config(changed("TTT.CROP.SIZE", [8, 8], "TTT.CROP.SCALE_RANGE", [0.5, 1.0]))


def test_dumped_config_loads_again(tmp_path):
    cfg = changed("TTT.CROP.SIZE", [64, 96], "DATASETS.TEST", ("a", "b"), "SEED", 3)
    file = tmp_path / "config.yaml"
    file.write_text(cfg.dump())
    again = get_cfg()
    again.merge_from_file(str(file), allow_unsafe=False)
    # As YAML, since tuples within tuples come back as lists.
    assert yaml.safe_load(again.dump()) == yaml.safe_load(cfg.dump())
    assert again.TTT == cfg.TTT


def test_a_base_may_be_a_shipped_config(tmp_path):
    """By the name that --config takes; a file beside the config goes before it."""
    name = "quick/stream_world.yaml"
    mine = tmp_path / "mine.yaml"
    mine.write_text(f"_BASE_: [{name}]\nTTT:\n  WINDOW_SIZE: 3\n")
    shipped = load_config(name)
    assert shipped.TTT.WINDOW_SIZE != 3
    shipped.TTT.WINDOW_SIZE = 3
    assert load_config(str(mine)).dump() == shipped.dump()
    (tmp_path / "quick").mkdir()
    (tmp_path / name).write_text("SEED: 5\n")
    assert load_config(str(mine)).SEED == 5 != shipped.SEED
    mine.write_text("_BASE_: quick/stream_wrld.yaml\n")
    with pytest.raises(
        UserError, match=rf"config {mine}: {tmp_path}/quick/stream_wrld.yaml cannot"
    ):
        load_config(str(mine))


def test_a_section_over_a_value_of_a_base_is_a_line(tmp_path):
    (tmp_path / "base.yaml").write_text("TTT:\n  CROP: 3\n")
    (tmp_path / "run.yaml").write_text("_BASE_: base.yaml\nTTT:\n  CROP:\n    RESIZE: 0.5\n")
    with pytest.raises(UserError, match="does not merge: CROP is a section, and a value in _BASE_"):
        load_config(str(tmp_path / "run.yaml"))


def test_a_key_that_stands_twice_is_a_line(tmp_path):
    (tmp_path / "base.yaml").write_text("TTT:\n  BATCH_SIZE: 2\n  SEED: &x 1\n  BATCH_SIZE: 4\n")
    (tmp_path / "run.yaml").write_text("_BASE_: base.yaml\nVERSION: 2\n")
    with pytest.raises(UserError) as error:
        load_config(str(tmp_path / "run.yaml"))
    assert re.fullmatch(
        r".*base\.yaml: BATCH_SIZE stands twice in one section, in lines 2 and 4; leave one out",
        str(error.value),
    )


def test_yaml_is_what_pyyaml_reads():
    text = "a: &x {b: [1, {c: 2.5}], d: 2020-01-01}\ne: *x\nf: {<<: *x, b: null}\n1: yes\n'1': no"
    assert load_yaml(text, "name") == yaml.safe_load(text)
    assert load_yaml("", "name") is None
    shipped = sorted(config_dir().rglob("*.yaml"))
    assert len(shipped) > 20
    assert all(read_yaml(file) == yaml.safe_load(file.read_bytes()) for file in shipped)


@pytest.mark.parametrize(("method", "size"), [("ttt_mae_no_memory", 1), ("online_ttt_mae", "auto")])
def test_a_window_that_is_chosen_goes_with_any_method(tmp_path, method, size):
    file = tmp_path / "own.yaml"
    file.write_text("TTT: {WINDOW_SIZE: auto}\n")
    assert size == load_config(str(file), method=method).TTT.WINDOW_SIZE


WHOLE = [
    "TTT.CLOCK.FPS",
    "TTT.OPTIMIZER.BASE_LR",
    "SOLVER.BASE_LR",
    "MODEL.MASK_FORMER.DICE_WEIGHT",
]


@pytest.mark.parametrize("key", WHOLE)
@pytest.mark.parametrize("place", ["file", "overrides", "weights"])
def test_a_whole_number_may_stand_for_a_float(tmp_path, key, place):
    nested = 2
    for name in reversed(key.split(".")):
        nested = {name: nested}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(nested))
    given = {
        "file": (str(tmp_path / "own.yaml"), None, []),
        "overrides": (None, None, [key, "2"]),
        "weights": (CfgNode(nested), None, []),
    }
    found = flatten(load_config(*given[place]))[key]
    assert (found, type(found)) == (2.0, float)
    assert nested[key.split(".")[0]] is not None
    with pytest.raises(UserError, match="BATCH_SIZE"):  # the other way round is a mistake
        load_config(None, None, ["TTT.BATCH_SIZE", "2.5"])


@pytest.mark.parametrize("key", ["WINDOW_SIZE", "BATCH_SIZE", "METHOD", "RECORD_STEPS"])
def test_a_key_without_a_value_is_a_line(tmp_path, key):
    (tmp_path / "own.yaml").write_text(f"TTT: {{{key}: null}}\n")
    message = f"does not merge: TTT.{key} has no value; give one, or leave the key out"
    with pytest.raises(UserError, match=message):
        load_config(str(tmp_path / "own.yaml"))
    with pytest.raises(UserError, match=message):
        load_config(None, None, [f"TTT.{key}", "None"])


def test_a_config_of_an_older_detectron2_is_a_line(tmp_path):
    (tmp_path / "own.yaml").write_text("VERSION: 1\n")
    with pytest.raises(UserError, match="VERSION is 1, and detectron2's keys are of version 2"):
        load_config(str(tmp_path / "own.yaml"))
