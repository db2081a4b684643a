"""What the tools share: finding and merging configs, and one line for every mistake."""

from __future__ import annotations

import re
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
import yaml
from detectron2.config import CfgNode

from ttt_video.adaptation import build_adapter, method_names
from ttt_video.cli import SMALLER, run_tool
from ttt_video.config import (
    DEFAULT_STREAM_CONFIG,
    PRESETS,
    check_device,
    find_config,
    load_config,
    merge_preset,
)
from ttt_video.errors import UserError, suggestion
from ttt_video.plugins import run_files
from ttt_video.shipped import config_dir
from ttt_video.stream import load_source_model

SHIPPED = sorted(str(p.relative_to(config_dir())) for p in config_dir().rglob("*.yaml"))
FRAGMENTS = ("presets", "methods.yaml", "sweeps")  # merged on top of a config, or no config
RUNNABLE = [name for name in SHIPPED if name.split("/")[0] not in FRAGMENTS]
SWEEPS = ("all_methods", "all_shifts", "benchmark", "long_stream", "shuffle", "validation")
METHODS = method_names()


@pytest.mark.parametrize("name", RUNNABLE)
def test_every_shipped_config_merges_and_is_valid(name):
    cfg = load_config(name)
    ours = not name.startswith("baselines/")
    assert (cfg.MODEL.META_ARCHITECTURE in ("MaskFormerTTT", "ColorizerTTT", "ViTMAE")) == ours
    assert (cfg.TTT.METHOD == "none") != ours
    assert cfg.TTT.PRESET == ""


@cache
def loaded(name, preset=None):
    """A config that several tests read, and none changes."""
    return load_config(name, preset)


@pytest.mark.parametrize("preset", [None, "paper", "release"])
@pytest.mark.parametrize("method", METHODS)
def test_methods_merge_on_top_of_configs_and_presets(method, preset):
    cfg = load_config("quick/stream_world.yaml", preset, method=method)
    assert method == cfg.TTT.METHOD
    assert cfg == load_config("quick/stream_world.yaml", preset, ["TTT.METHOD", method])
    plain = loaded("quick/stream_world.yaml", preset)
    assert {key for key in cfg if cfg[key] != plain[key]} <= {"TTT"}


def test_a_methods_keys_give_way_to_overrides():
    cfg = load_config(None, method="implicit_only", opts=["TTT.WINDOW_SIZE", "3"])
    assert (cfg.TTT.METHOD, cfg.TTT.WINDOW_SIZE) == ("implicit_only", 3)
    assert load_config(None, method="implicit_only").TTT.WINDOW_SIZE == 1


def test_an_ensemble_takes_the_keys_of_the_method_under_it():
    opts = ["TTT.ENSEMBLE.METHOD", "ttt_mae_no_memory"]
    cfg = load_config(None, method="temporal_smoothing", opts=opts)
    assert (cfg.TTT.METHOD, cfg.TTT.WINDOW_SIZE, cfg.TTT.RESET) == (
        "temporal_smoothing",
        1,
        "frame",
    )


@pytest.mark.parametrize("preset", ["paper", "release"])
@pytest.mark.parametrize("name", ["joint_cityscapes.yaml", "quick/joint_world.yaml"])
def test_presets_merge_on_top_of_any_config(name, preset):
    plain, cfg = load_config(name), load_config(name, preset)
    recorded = cfg.TTT.PRESET
    assert recorded == preset
    for section in ("DATASETS", "SOLVER", "INPUT"):
        assert cfg[section] == plain[section]
    assert {key for key in cfg.MODEL if cfg.MODEL[key] != plain.MODEL[key]} == set()


def keys(node: CfgNode, prefix: str = "") -> dict[str, object]:
    """{"A": {"B": 1}} to {"A.B": 1}."""
    flat: dict[str, object] = {}
    for key, value in node.items():
        nested = isinstance(value, CfgNode)
        flat.update(keys(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value})
    return flat


# What each preset sets, in full: the paper's settings (Sections 3 and 4, and this project's choice
# where it leaves something open), and how the others differ from them.
PAPER = {
    "METHOD": "online_ttt_mae", "MASK_RATIO": 0.8, "MASK_PATCH_SIZE": 16, "RECON.REGION": "masked",
    "MASK_KIND": "random",
    "WINDOW_SIZE": 16, "AUTO_WINDOW.MAX": 64,
    "SAMPLING": "with_replacement", "BATCH_SIZE": 32, "MICRO_BATCH_SIZE": 0,
    "STEPS_PER_FRAME": 1, "UPDATE_EVERY": 1, "FRAME_BUDGET_MS": 0, "PREDICT": "after",
    "FRAME_ORDER": "time", "MODULES": [], "PARAMETERS": "all", "RESET": "video",
    "STEP_MODE": "eval", "PRECISION": "fp32", "PREDICT_PRECISION": "fp32", "CHECKPOINT": False,
    "OPTIMIZER.NAME": "SGD", "OPTIMIZER.BASE_LR": 0.01,
    "OPTIMIZER.MOMENTUM": 0.0, "OPTIMIZER.BETAS": [0.9, 0.999], "OPTIMIZER.WEIGHT_DECAY": 0.0,
    "OPTIMIZER.BACKBONE_MULTIPLIER": 1.0, "OPTIMIZER.CLIP_NORM": 0.0, "OPTIMIZER.RESTART": False,
    "OPTIMIZER.MAX_LOSS_GROWTH": 3.0, "OPTIMIZER.SOURCE_PULL": 0.0,
    "OPTIMIZER.SOURCE_GRADIENTS": "", "CROP.RESIZE": 1.0, "CROP.SIZE": [], "CROP.FLIP": False,
    "CROP.SCALE_RANGE": [],
}  # fmt: skip
RELEASE = {
    **PAPER, "MASK_RATIO": 0.85, "RECON.REGION": "all", "SAMPLING": "shuffled_epochs",
    "STEP_MODE": "train", "PRECISION": "fp16", "OPTIMIZER.NAME": "ADAMW",
    "OPTIMIZER.BASE_LR": 0.0001, "OPTIMIZER.WEIGHT_DECAY": 0.05,
    "OPTIMIZER.BACKBONE_MULTIPLIER": 0.1, "OPTIMIZER.CLIP_NORM": 0.01, "OPTIMIZER.RESTART": True,
    "CROP.SIZE": [512, 1024],
}  # fmt: skip
RELEASE_COCO = {
    **RELEASE, "MICRO_BATCH_SIZE": 4, "CROP.SIZE": [1024, 1024], "CROP.FLIP": True,
    "CROP.SCALE_RANGE": [0.1, 2.0],
}  # fmt: skip
REALTIME = {
    **PAPER, "BATCH_SIZE": 1, "MICRO_BATCH_SIZE": 1, "PARAMETERS": "matrices",
    "OPTIMIZER.BASE_LR": 0.00004, "OPTIMIZER.MOMENTUM": 0.5, "OPTIMIZER.CLIP_NORM": 5000.0,
    "OPTIMIZER.SOURCE_PULL": 0.03, "CROP.RESIZE": 0.45, "CROP.SIZE": [512, 1024],
}  # fmt: skip
del REALTIME["OPTIMIZER.SOURCE_GRADIENTS"]  # measured with the weights
SETS = {"paper": PAPER, "release": RELEASE, "realtime": REALTIME}


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("name", RUNNABLE)
def test_a_preset_sets_the_same_on_every_config_and_leaves_the_rest(name, preset):
    """What it leaves belongs to the weights and their training, or to other methods."""
    lsj = "coco" in name and "world" not in name
    expected = RELEASE_COCO if lsj and preset == "release" else SETS[preset]
    plain, cfg = keys(loaded(name)), keys(load_config(name, preset))
    assert cfg == plain | {f"TTT.{key}": value for key, value in expected.items()} | {
        "TTT.PRESET": preset
    }


def test_a_preset_is_laid_over_whatever_the_config_has():
    cfg = load_config(None)
    changed = {"MASK_RATIO": 0.5, "WINDOW_SIZE": 3, "FRAME_BUDGET_MS": 40, "MODULES": ["backbone"],
               "OPTIMIZER.BETAS": [0.5, 0.9], "CROP.SIZE": [8, 8], "RECON.REGION": "all",
               "OPTIMIZER.SOURCE_GRADIENTS": "sizes.safetensors", "LN_ADAPT.PRIOR": 7.0,
               "RECON.NORMALIZE_TARGET": True, "ENSEMBLE.PREDICTIONS": 9}  # fmt: skip
    for key, value in changed.items():
        cfg.merge_from_list([f"TTT.{key}", value])
    mine = keys(cfg.TTT)
    merge_preset(cfg, "paper")
    assert keys(cfg.TTT) == mine | PAPER | {"PRESET": "paper"}
    cfg.merge_from_list(["TTT.OPTIMIZER.SOURCE_GRADIENTS", "sizes.safetensors"])
    merge_preset(cfg, "realtime")
    assert cfg.TTT.OPTIMIZER.SOURCE_GRADIENTS == "sizes.safetensors"
    cfg.TTT.OPTIMIZER.BETAS.append(1)  # of this config alone
    assert load_config(None, "paper").TTT.OPTIMIZER.BETAS == [0.9, 0.999]


@pytest.mark.parametrize("name", [f"presets/{name}" for name in (*PRESETS, "release_coco")])
def test_preset_files_hold_what_differs_from_the_defaults(name):
    held = keys(CfgNode(CfgNode.load_yaml_with_base(str(find_config(name)))))
    weights = {"TTT.OPTIMIZER.SOURCE_GRADIENTS"}  # no preset has a default for what is theirs
    defaults = keys(load_config(None))
    assert [
        key for key, value in held.items() if defaults[key] == value and key not in weights
    ] == []


@pytest.mark.parametrize("name", [name for name in RUNNABLE if "joint_coco" in name])
def test_the_release_crops_otherwise_on_coco(name):
    cfg, kitti = load_config(name, "release"), load_config("joint_cityscapes.yaml", "release")
    assert cfg.TTT.PRESET == "release"
    assert (list(cfg.TTT.CROP.SIZE), cfg.TTT.CROP.FLIP) == ([1024, 1024], True)
    assert list(cfg.TTT.CROP.SCALE_RANGE) == [0.1, 2.0]
    assert (cfg.TTT.BATCH_SIZE, cfg.TTT.MICRO_BATCH_SIZE) == (32, 4)
    assert cfg.TTT.OPTIMIZER == kitti.TTT.OPTIMIZER


def test_presets_are_the_published_settings():
    """Section 4 of the paper; the release's README commands and code."""
    paper = load_config("joint_cityscapes.yaml", "paper").TTT
    assert (paper.MASK_RATIO, paper.WINDOW_SIZE, paper.OPTIMIZER.NAME) == (0.8, 16, "SGD")
    assert (paper.SAMPLING, paper.STEPS_PER_FRAME, paper.RESET) == ("with_replacement", 1, "video")
    release = load_config("joint_cityscapes.yaml", "release").TTT
    assert (release.MASK_RATIO, release.RECON.REGION) == (0.85, "all")
    assert (release.OPTIMIZER.NAME, release.OPTIMIZER.BASE_LR) == ("ADAMW", 1e-4)
    assert (release.OPTIMIZER.WEIGHT_DECAY, release.OPTIMIZER.CLIP_NORM) == (0.05, 0.01)
    assert (release.OPTIMIZER.BACKBONE_MULTIPLIER, release.OPTIMIZER.RESTART) == (0.1, True)
    assert (release.BATCH_SIZE, release.MICRO_BATCH_SIZE) == (32, 0)
    assert (release.SAMPLING, release.STEP_MODE) == ("shuffled_epochs", "train")
    assert (release.PRECISION, list(release.CROP.SIZE)) == ("fp16", [512, 1024])
    assert paper.RECON.NORMALIZE_TARGET is release.RECON.NORMALIZE_TARGET is False


def test_order_is_defaults_file_preset_overrides(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(
        "SEED: 5\nTTT:\n  MASK_RATIO: 0.5\n  WINDOW_SIZE: 3\n  LN_ADAPT:\n    PRIOR: 7.0\n"
    )
    cfg = load_config(str(file), "paper", ["TTT.WINDOW_SIZE", "4"])
    assert cfg.SEED == 5  # the file, over the defaults
    assert cfg.TTT.LN_ADAPT.PRIOR == 7
    assert cfg.TTT.MASK_RATIO == 0.8  # the preset, over the file
    assert cfg.TTT.WINDOW_SIZE == 4  # the override, over the preset
    assert not cfg.is_frozen()


OWN = """
TTT:
  BATCH_SIZE: 5
  WINDOW_SIZE: 6
  BY_METHOD:
    tent: {BATCH_SIZE: 7, WINDOW_SIZE: 8, MASK_RATIO: 0.3, OPTIMIZER: {BASE_LR: 0.5}}
"""


def test_what_a_file_has_for_one_method_counts_as_the_files_for_that_method(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(OWN)

    def loaded(*args, **kwargs):
        cfg = load_config(str(file), *args, **kwargs)
        assert CfgNode() == cfg.TTT.BY_METHOD  # a run's config.yaml holds what counted
        return cfg.TTT.BATCH_SIZE, cfg.TTT.WINDOW_SIZE, cfg.TTT.OPTIMIZER.BASE_LR

    assert loaded() == loaded(method="self_train") == (5, 6, 0.01)
    assert loaded(method="tent") == loaded(opts=["TTT.METHOD", "tent"]) == (7, 8, 0.5)
    ensemble = ["TTT.ENSEMBLE.METHOD", "tent"]
    assert loaded(method="majority_vote", opts=ensemble) == (7, 8, 0.5)
    assert loaded(method="tent_class_balance") == (7, 8, 0.5)  # it runs tent
    # The preset and overrides go before it.
    assert loaded("paper", method="tent") == (32, 16, 0.01)
    assert loaded(method="tent", opts=["TTT.BATCH_SIZE", "9"]) == (9, 8, 0.5)


@pytest.mark.parametrize("own", ["tent: {BATCH: 7}", "tent: {BATCH_SIZE: many}", "tent: 3"])
def test_a_mistake_in_what_a_method_has_is_one_line(tmp_path, own):
    file = tmp_path / "mine.yaml"
    file.write_text(f"TTT:\n  BY_METHOD:\n    {own}\n")
    with pytest.raises(UserError, match=r"TTT\.BY_METHOD\.tent of config .*mine\.yaml") as error:
        load_config(str(file), method="tent")
    assert "\n" not in str(error.value)


def test_the_small_model_takes_the_same_step_in_tool_demo_and_benchmark():
    """SGD; a twin differs in its files."""
    small = load_config(DEFAULT_STREAM_CONFIG).TTT
    assert small.OPTIMIZER.NAME == "SGD"
    sweeps = [yaml.safe_load(find_config(f"sweeps/{n}.yaml").read_text()) for n in SWEEPS]
    assert {sweep["config"] for sweep in sweeps} == {DEFAULT_STREAM_CONFIG}
    demo = (config_dir().parent / "tools/demo.py").read_text()
    assert f'CONFIG = "{DEFAULT_STREAM_CONFIG}"' in demo
    twin = load_config("quick/stream_world_panoptic.yaml").TTT
    differing = {key for key, value in keys(small).items() if keys(twin)[key] != value}
    assert differing == {
        "LEARN_ON_CHANGE.SOURCE_HEAD",
        "LN_ADAPT.SOURCE_STATISTICS",
        "OPTIMIZER.SOURCE_GRADIENTS",
    }


@pytest.mark.parametrize("twin", ["", "_panoptic"])
def test_every_method_runs_on_the_small_model_as_typed(twin):
    config = f"quick/stream_world{twin}.yaml"
    model = load_source_model(load_config(config))
    of_pixels = {"self_train", "self_train_class_balance", "majority_vote", "temporal_smoothing"}
    for method in {*METHODS} - (of_pixels if twin else set()):
        cfg = load_config(config, method=method)
        build_adapter(cfg, model)
        reconstructs = not method.startswith(("tent", "self_train"))
        assert ("SGD" if reconstructs else "ADAMW") == cfg.TTT.OPTIMIZER.NAME


def test_without_a_file_the_defaults():
    assert load_config(None).TTT.WINDOW_SIZE == 16


@pytest.mark.parametrize("there", [True, False])
def test_the_gpu_is_used_where_there_is_one(monkeypatch, there):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    chosen = load_config(None).MODEL.DEVICE
    assert chosen == ("cuda" if there else "cpu")
    assert load_config(None, opts=["MODEL.DEVICE", "meta"]).MODEL.DEVICE == "meta"


@pytest.mark.parametrize(
    ("name", "gpus", "message"),
    [
        ("cuda", 0, "MODEL.DEVICE is 'cuda' but there is no GPU; use cpu"),
        ("cuda:1", 1, "MODEL.DEVICE is 'cuda:1' but there are 1 GPUs"),
        ("gpu", 1, "MODEL.DEVICE is 'gpu'; give cpu, cuda or cuda:N"),
        ("", 0, "MODEL.DEVICE is ''; give cpu"),
        ("cpu", 0, None),
        ("cuda:1", 2, None),
        ("cuda", 1, None),
    ],
)
def test_devices_that_are_not_there_are_one_line(monkeypatch, name, gpus, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    if message is None:
        check_device(name)
        return
    with pytest.raises(UserError, match=re.escape(message)):
        check_device(name)


def test_configs_are_found_by_path_and_by_name(tmp_path, monkeypatch):
    shipped = find_config("joint_cityscapes.yaml")
    assert shipped.is_file()
    assert find_config("joint_cityscapes") == shipped
    assert find_config(str(shipped)) == shipped
    assert find_config("quick/joint_world.yaml").is_file()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "joint_cityscapes.yaml").write_text("SEED: 1\n")
    assert find_config("joint_cityscapes.yaml").resolve().parent == tmp_path  # one's own first


def test_an_unknown_config_names_the_closest_shipped_one():
    with pytest.raises(UserError, match=r"did you mean joint_cityscapes\.yaml"):
        find_config("joint_cityscape.yml")


@pytest.mark.parametrize(
    ("opts", "said"),
    [
        (["SOLVER.MAX_ITR", "3"], "there is no key SOLVER.MAX_ITR; did you mean SOLVER.MAX_ITER?"),
        (["ZZZZZZ", "3"], "there is no key ZZZZZZ"),
    ],
)
def test_a_misspelt_key_names_the_one_that_was_meant(opts, said):
    with pytest.raises(UserError) as error:
        load_config(None, opts=opts)
    assert str(error.value).endswith(said)


def test_a_config_like_no_other_lists_those_that_can_be_run():
    with pytest.raises(UserError) as error:
        find_config("mine")
    listed = str(error.value).split("give a path or one of: ")[1].split(", ")
    assert listed == [name for name in RUNNABLE if "Base-" not in name]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("tnet", "did you mean tent?"),
        ("seed11", "did you mean seed1?"),
        ("TTT", "did you mean online_ttt_mae?"),  # part of a name is enough
        ("xyz", "choose one of: none, tent, online_ttt_mae, seed1, seed2"),
        ("", "choose one of: none, tent, online_ttt_mae, seed1, seed2"),
    ],
)
def test_what_is_suggested_for_an_unknown_name(name, said):
    assert suggestion(name, ["none", "tent", "online_ttt_mae", "seed1", "seed2"]) == said


BROKEN = {
    "unknown key": "TTT:\n  MASKRATIO: 0.5\n",
    "wrong type": "TTT:\n  WINDOW_SIZE: many\n",
    "no mapping": "- 1\n- 2\n",
    "text": "hello\n",
    "empty": "",
    "syntax": "TTT: [1\n",
    "base is missing": "_BASE_: nowhere.yaml\n",
    "section is a value": "TTT: 3\n",
    "value is a section": "SEED:\n  A: 1\n",
    "python object": "SEED: !!python/object/apply:os.getpid []\n",
    "value out of range": "TTT:\n  MASK_RATIO: 2.0\n",
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_config_is_one_line(tmp_path, kind):
    file = tmp_path / "mine.yaml"
    file.write_text(BROKEN[kind])
    with pytest.raises(UserError) as error:
        load_config(str(file))
    assert "\n" not in str(error.value)
    names = {"unknown key": "MASKRATIO", "wrong type": "WINDOW_SIZE", "base is missing": "nowhere"}
    if kind != "value out of range":
        assert f"config {file}" in str(error.value)
    assert names.get(kind, "") in str(error.value)


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"a": "_BASE_: a.yaml\n"}, "a.yaml -> {folder}/a.yaml"),
        ({"a": "_BASE_: b.yaml\n", "b": "_BASE_: [c.yaml, ./a.yaml]\n", "c": "SEED: 1\n"},
         "{folder}/a.yaml -> {folder}/b.yaml -> {folder}/a.yaml"),
        ({"a": "_BASE_: b.yaml\n", "b": "_BASE_: gone.yaml\n"}, "gone.yaml cannot be read"),
        ({"a": "_BASE_: 3\n"}, "a.yaml: _BASE_ must be the path of a file"),
        ({"a": "_BASE_: [{x: 1}]\n"}, "a.yaml: _BASE_ must be the path of a file"),
        ({"a": "_BASE_:\n"}, "a.yaml: _BASE_ must be the path of a file"),
        ({"a": "_BASE_: b.yaml\n", "b": "- 1\n"}, "does not merge"),
    ],
)  # fmt: skip
def test_a_base_that_cannot_be_followed_is_one_line(tmp_path, files, words):
    for name, text in files.items():
        (tmp_path / f"{name}.yaml").write_text(text)
    with pytest.raises(UserError) as error:
        load_config(str(tmp_path / "a.yaml"))
    assert words.format(folder=tmp_path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_base_may_stand_twice_in_a_tree(tmp_path):
    for name, text in {
        "a": "_BASE_: [b.yaml, c.yaml]\n",
        "b": "_BASE_: d.yaml\n",
        "c": "_BASE_: d.yaml\n",
        "d": "SEED: 4\n",
    }.items():
        (tmp_path / f"{name}.yaml").write_text(text)
    assert load_config(str(tmp_path / "a.yaml")).SEED == 4


@pytest.fixture
def own_file(tmp_path, monkeypatch):
    """``own_file(text)``: my.py with that text beside helper.py; the path is undone after."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "helper_of_mine.py").write_text("def divide(x):\n    return 1 / x\n")

    def write(text: str) -> str:
        (tmp_path / "my.py").write_text(text)
        return str(tmp_path / "my.py")

    yield write
    sys.modules.pop("helper_of_mine", None)


def test_a_registered_file_imports_the_module_beside_it(own_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    own_file("import helper_of_mine\nhelper_of_mine.ran = helper_of_mine.divide(4)\n")
    run_files(["my.py"])
    assert sys.modules["helper_of_mine"].ran == 0.25


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import helper_of_mine\n\nhelper_of_mine.divide(0)\n",
         "helper_of_mine.py, line 2: ZeroDivisionError: division by zero"),
        ("import json\njson.loads('{')\n", "my.py, line 2: JSONDecodeError: Expecting"),
        ("x = 1\nimport no_such_module\n",
         "my.py, line 2: ModuleNotFoundError: No module named 'no_such_module'"),
        ("x = 1\ny = = 2\n", "my.py, line 2: SyntaxError: invalid syntax"),
        ("from ttt_video.errors import UserError\nraise UserError('no folder x')\n",
         "my.py, line 2: no folder x"),
        ("\nassert False\n", "my.py, line 2: AssertionError"),
    ],
)  # fmt: skip
def test_an_error_in_a_registered_file_is_one_line_that_says_where(own_file, text, message):
    file = own_file(text)
    with pytest.raises(UserError) as error:
        run_files([file])
    assert str(error.value).startswith(f"--register {Path(file).parent}/{message}")
    assert "\n" not in str(error.value)


UNSAFE = "SEED: !!python/object/apply:eval ['3 + 4']\n"  # as in Mask2Former's own configs


def test_yaml_that_runs_code_is_refused_unless_asked_for(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(UNSAFE)
    with pytest.raises(UserError, match=r"!!python/object/apply:eval.*--allow-unsafe-yaml"):
        load_config(str(file))
    assert load_config(str(file), allow_unsafe_yaml=True).SEED == 7
    derived = tmp_path / "derived.yaml"
    derived.write_text("_BASE_: mine.yaml\nTTT:\n  WINDOW_SIZE: 3\n")
    with pytest.raises(UserError, match="--allow-unsafe-yaml"):
        load_config(str(derived))
    assert load_config(str(derived), allow_unsafe_yaml=True).SEED == 7


def test_a_file_that_is_no_text(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_bytes(b"\x89PNG\r\n\x1a\n\x00\xff\xfe")
    with pytest.raises(UserError) as error:
        load_config(str(file))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("opts", "words"),
    [
        (["TTT.WINDOW_SIZE"], "'TTT.WINDOW_SIZE' stands alone"),
        (["SEED", "3", "--resume"], "--resume stands among the KEY VALUE overrides; flags go"),
        (["--num-gpus", "2"], "--num-gpus stands among the KEY VALUE overrides"),
        (["TTT.WINDOW", "3"], "TTT.WINDOW"),
        (["TTT.LN_ADAPT.PRIOR", "infinite"], "TTT.LN_ADAPT.PRIOR"),
        (["TTT.CROP", "3"], "TTT.CROP is a section of keys; give one of them, such as TTT.CROP."),
        (["TTT.WINDOW_SIZE", "many"], "TTT.WINDOW_SIZE"),
        (["WINDOW_SIZE", "3"], "WINDOW_SIZE"),
        (["TTT.RESET", "sometimes"], "TTT.RESET is 'sometimes'"),
        (["TTT.OPTIMIZER.BASE_LR", "-1.0"], "TTT.OPTIMIZER.BASE_LR is -1.0"),
        (["TTT.WINDOW_SIZE.X", "1"], "TTT.WINDOW_SIZE.X"),
        (["TTT.MASK_RATIO", "half"], "TTT.MASK_RATIO"),
        (["--output", "x"], "--output"),
    ],
)
def test_overrides_that_do_not_merge_are_one_line(opts, words):
    with pytest.raises(UserError) as error:
        load_config(None, opts=opts)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("raised", "code", "line"),
    [(UserError("no such folder: x"), 2, "error: no such folder: x"),
     (torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB."), 2,
      f"error: CUDA out of memory; {SMALLER}"),
     (KeyboardInterrupt(), 130, "interrupted")],
)  # fmt: skip
def test_tools_end_with_one_line_and_a_code(capsys, raised, code, line):
    def main() -> None:
        raise raised

    with pytest.raises(SystemExit) as error:
        run_tool(main)
    assert error.value.code == code
    assert capsys.readouterr().err == line + "\n"


def test_defects_keep_their_traceback_and_success_is_silent(capsys):
    def defect() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_tool(defect)
    run_tool(lambda: None)
    assert capsys.readouterr() == ("", "")
