"""tools/measure_costs.py: what it writes, and that peers compute what they are compared with."""

from __future__ import annotations

import importlib.util
import json
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import pytest
import torch
from costs import loop, models
from costs.inputs import peer_of, write_video
from PIL import Image
from tiny import TINY

from ttt_video.adaptation import SlidingWindow, build_adapter
from ttt_video.config import load_config
from ttt_video.errors import UserError
from ttt_video.modeling.deformable_attention import COMPILED, deformable_attention
from ttt_video.stream.stage_times import stage_times

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ["--config", "joint_cityscapes.yaml"]
SMALL = ["--size", "32", "64", "--steps", "2", "--warmup", "0"]

needs_transformers = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="the peer is in the test extra"
)


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("measure_costs", ROOT / "tools/measure_costs.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run(tool, tmp_path, capsys):
    """``run(command, *flags)``: what a command on the tiny model wrote, and what it printed."""

    def run(command, *flags, opts=()):
        file = tmp_path / "benchmark.json"
        tool.main([command, *CONFIG, *SMALL, *flags, "--output", str(file), *TINY, *opts])
        result = json.loads(file.read_text())
        assert result["environment"]["versions"]["torch"] == torch.__version__.partition("+")[0]
        assert result["environment"]["device"]
        assert result["environment"]["date"][:2] == "20"
        return result["results"], capsys.readouterr().out

    return run


def check_seconds(seconds, steps=2):
    assert len(seconds["all"]) == steps
    assert 0 < seconds["min"] <= seconds["lower_quartile"] <= seconds["median"]
    assert seconds["median"] <= seconds["upper_quartile"] <= seconds["max"]


def check_runs(case, names):
    assert set(case["runs"]) == set(names)
    for run in case["runs"].values():
        check_seconds(run["seconds"])
        assert run["peak_memory_bytes"] > 2**20
        assert run["flop"] > 1e5
        assert run["flop_per_second"] > 0
        assert run["share_of_peak"] > 0
    assert set(case["speedup"]) == set(names) - {"ttt_video"}


@needs_transformers
def test_predictions_beside_hugging_face(run):
    results, printed = run("predict", "--precision", "fp32", "bf16", "--batch", "1", "2")
    part = results["predict"]
    assert [(c["batch"], c["precision"]) for c in part["cases"]] == [
        (1, "fp32"), (1, "bf16"), (2, "fp32"), (2, "bf16")
    ]  # fmt: skip
    for case in part["cases"]:
        check_runs(case, ["ttt_video", "huggingface"])
        assert max(case["difference"].values()) < 1e-4
        assert abs(sum(case["stages"].values()) - 1) < 1e-6
        assert "backbone, forward" in case["stages"]
    small, large = part["cases"][0], part["cases"][2]
    assert large["runs"]["ttt_video"]["flop"] > 1.9 * small["runs"]["ttt_video"]["flop"]
    assert set(part["parameter_bytes"]) == {"backbone", "sem_seg_head", "recon_head"}
    assert "huggingface takes" in printed


@needs_transformers
def test_steps_beside_hugging_face(run):
    results, printed = run("step", "--batch", "2")
    (case,) = results["step"]["cases"]
    check_runs(case, ["ttt_video", "huggingface"])
    assert max(case["difference"].values()) < 1e-4
    assert {"backbone, backward", "optimizer", "loss"} <= set(case["stages"])
    assert case["saved_activation_bytes"] > 2**20
    assert "kept for backward" in printed


def test_the_steps_batch_is_the_configs_and_peers_can_be_left_out(run):
    results, _ = run("step", "--no-peers", "--no-flops", opts=["TTT.BATCH_SIZE", "3"])
    (case,) = results["step"]["cases"]
    assert case["batch"] == case["micro_batch"] == 3
    assert set(case["runs"]) == {"ttt_video"}
    assert "flop" not in case["runs"]["ttt_video"]


@pytest.mark.parametrize("preset", ["release", "paper"])
def test_presets(run, preset):
    results, _ = run("step", "--no-peers", "--preset", preset, "--batch", "1")
    optimizer = {"release": "ADAMW", "paper": "SGD"}[preset]
    assert results["step"]["settings"]["optimizer"] == optimizer


def test_the_loop_beside_a_plain_one(run):
    results, printed = run("loop", "--overlay")
    (case,) = results["loop"]["cases"]
    for name in ("ttt_video", "plain"):
        run_of = case["runs"][name]
        check_seconds(run_of["seconds"])
        assert 0 < run_of["overhead"]["median"] < 1
    assert case["batch"] == 4
    assert "plain takes" in printed


def test_saving_is_measured_beside_the_frozen_frame(run):
    results, printed = run("saving")
    (case,) = results["saving"]["cases"]
    # The tiny config names no data set, so its classes are not known to be Cityscapes'.
    formats = {"coco", "confidence", "kitti_step", "masks"}
    assert case["runs"].keys() == {"frozen", *formats}
    assert case["speedup"].keys() == formats
    for run_of in case["runs"].values():
        check_seconds(run_of["seconds"])
    assert "masks takes" in printed


def test_a_method_is_measured_beside_the_frozen_model(tool, tmp_path, capsys):
    folder, file = tmp_path / "video", tmp_path / "cost.json"
    folder.mkdir()
    for index in range(4):
        Image.new("RGB", (64, 32), (index * 40, 90, 90)).save(folder / f"{index}.png")
    flags = [*CONFIG, "--video", str(folder), "--steps", "3", "--warmup", "1"]
    tool.main(["method", *flags, "--method", "online_ttt_mae", "--output", str(file), *TINY])
    (found,) = json.loads(file.read_text())["results"]["method"]["methods"]
    assert found["runs"].keys() == {"decode", "frozen", "online_ttt_mae"}
    totals = {name: sum(run["cpu_seconds"]) for name, run in found["runs"].items()}
    assert found["cost"] == pytest.approx(totals["online_ttt_mae"] / totals["frozen"])
    assert "states" not in found  # it has none
    assert "online_ttt_mae takes" in capsys.readouterr().out
    flags[flags.index("--steps") + 1] = "4"
    with pytest.raises(UserError, match="has 4 frames, and --warmup and --steps ask for 5"):
        tool.main(["method", *flags, *TINY])


def test_stages_become_a_profile_that_grows(run, tmp_path):
    file = tmp_path / "profiles" / "mine.json"
    into = ("--profile", str(file))
    results, printed = run("stages", "--method", "none", *into, "--machine", "mine")
    (case,) = results["stages"]["cases"]
    assert case["runs"].keys() == {"decode", "push", "predict", "others"}
    run("stages", *into)
    run("stages", *into, "--steps", "3")  # in place of the one before
    assert f"wrote {file}" in printed
    content = json.loads(file.read_text())
    assert content["machine"] == "mine"
    assert [case["method"] for case in content["cases"]] == ["none", "online_ttt_mae"]
    clock = ("TTT.CLOCK.PROFILE", str(file), "TTT.CLOCK.FPS", "10.0")
    cfg = load_config("joint_cityscapes.yaml", opts=[*TINY, *clock])
    times = stage_times(cfg, "online_ttt_mae")
    assert (times.machine, times.size, times.steps.keys()) == ("mine", (32, 64), {1, 4})
    assert len(times.steps[4]) == len(times.parts["predict"]) == 3
    assert 0 < times.parts["predict"][0] < times.steps[4][0] * 100
    assert stage_times(cfg, "none").steps == {}
    with pytest.raises(UserError, match=r"mine\.json is of mine, not yours"):
        run("stages", *into, "--machine", "yours")


def test_seconds_of_cores_are_those_of_one_thread(run, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    with pytest.raises(UserError, match="OMP_NUM_THREADS=1"):
        run("stages", "--cpu-seconds")


def test_constancy(run):
    results, printed = run("constant", "--windows", "1", "3", "--positions", "2", "4")
    streams = results["constant"]["streams"]
    assert [(s["window"], s["position"]) for s in streams.values()] == [
        (1, 2), (1, 4), (3, 2), (3, 4)
    ]  # fmt: skip
    for stream in streams.values():
        check_seconds(stream["seconds"])
        assert [point["frames"] for point in stream["memory"]] == [
            *range(1, stream["position"] + 1)
        ]
    first = streams["window 1, frame 2"]
    assert first["to_first_window"]["median"] == first["to_first_position"]["median"] == 1
    last = streams["window 3, frame 4"]
    for key, other in (
        ("to_first_window", "window 1, frame 4"),
        ("to_first_position", "window 3, frame 2"),
    ):
        pairs = zip(last["seconds"]["all"], streams[other]["seconds"]["all"], strict=True)
        assert last[key]["max"] == max(a / b for a, b in pairs)
    assert "to first position" in printed


@needs_transformers
@pytest.mark.parametrize("installed", [False, True])
def test_attention_beside_a_reference_and_the_compiled_package(run, monkeypatch, installed):
    def compiled(value, sizes, starts, locations, weights):
        return deformable_attention(value, tuple(map(tuple, sizes.tolist())), locations, weights)

    stub = ModuleType(COMPILED)
    stub.__spec__ = ModuleSpec(COMPILED, None)
    stub.ms_deform_attn = compiled
    monkeypatch.setitem(sys.modules, COMPILED, stub if installed else None)
    results, _ = run("attention")
    cases = results["attention"]["cases"]
    assert [case["pass"] for case in cases] == ["forward", "forward_backward"]
    for case in cases:
        peers = ["reference", *([COMPILED] if installed else [])]
        check_runs(case, ["ttt_video", *peers])
        assert len(case["difference"]) == 4 * len(peers)
        assert max(case["difference"].values()) < 1e-4


def test_training(run):
    results, printed = run("train", "--batch", "2", opts=["SOLVER.MICRO_BATCH_SIZE", "1"])
    (case,) = results["train"]["cases"]
    check_runs(case, ["ttt_video"])
    assert case["flop"]["reconstruction"] > 1e7
    assert case["flop"]["main_task"] > 1e7
    assert "TFLOP main_task" in printed


@pytest.mark.slow
@needs_transformers
def test_everything_in_one_command(run):
    results, _ = run("all", "--preset", "release")
    assert list(results) == ["predict", "step", "loop", "attention"]


# ---- peers


@pytest.mark.slow
def test_parts_of_a_gpus_frame(run):
    opts = ["TTT.BATCH_SIZE", "2", "TTT.CROP.SIZE", "[32, 64]"]
    only = ["parity", "prediction", "step", "frame, release", "around the model", "memory"]
    results, printed = run("gpu", "--only", *only, opts=opts)
    part = results["gpu"]
    assert set(part["rows"]) == {"prediction", "step", "frame, release"}
    for row in part["rows"].values():
        assert set(row["runs"]) == {"now", "reference"}
        for one in row["runs"].values():
            check_seconds(one["seconds"])
        assert 0 < row["target"]["aim"] <= row["target"]["least"]
    release = part["rows"]["frame, release"]["runs"]["now"]
    assert release["seconds"]["median"] > max(release["step"], release["prediction"])
    parity = part["parity"]["difference"]
    # On a CPU both paths are one.
    assert parity["fp32"] == {"scores": 0, "same_classes": 1, "loss": 0, "gradient": 0}
    assert parity["bf16"] == parity["bf16, reference path"]
    assert 0 < parity["bf16"]["scores"] < 0.1
    assert 0 < part["around the model"]["share"] < 1
    assert [case["micro_batch"] for case in part["memory"]["cases"]] == [32, 16, 8, 4, 2]
    assert all(case["peak_memory_bytes"] > 2**20 for case in part["memory"]["cases"])
    assert "(at least 200, aim 90)" in printed


@needs_transformers
def test_the_peers_step_is_ours(tiny_cfg, tiny_model, make_video):
    """Three steps in a row: loss and gradient norm."""
    tiny_cfg.TTT.STEP_MODE = "eval"
    window = SlidingWindow(3)
    for frame in make_video():
        window.push(frame)
    rows = []
    for model in (tiny_model, peer_of(tiny_cfg, tiny_model)):
        adapter, generator = build_adapter(tiny_cfg, model), torch.Generator().manual_seed(0)
        rows.append([adapter.adapt(window, generator) for _ in range(3)])
    for ours, theirs in zip(*rows, strict=True):
        for key in ("loss_recon", "grad_norm"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-3)
    assert rows[0][0]["loss_recon"] != pytest.approx(rows[0][2]["loss_recon"], rel=1e-3)


@needs_transformers
def test_a_peer_with_other_weights_is_refused(tiny_cfg, tiny_model, make_video):
    peer = peer_of(tiny_cfg, tiny_model)
    with torch.no_grad():
        peer.recon_head.predictor.queries_features.weight.add_(1)
    pair, inputs = {"ttt_video": tiny_model, "huggingface": peer}, make_video()[:1]
    assert models._same_predictions(pair, inputs)["pred_masks"] < 1e-4
    with pytest.raises(RuntimeError, match="differs between the models"):
        models._same_gradients(pair, inputs)


def test_the_plain_loop_gives_the_same_losses(tiny_cfg, tmp_path):
    tiny_cfg.TTT.OPTIMIZER.RESTART = True
    tiny_cfg.TTT.OPTIMIZER.NAME = "ADAMW"
    name = write_video(tmp_path, 4, 32, 64, tiny_cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES)
    ours = loop.tool_loop(tiny_cfg, name, tmp_path / "run")
    plain = loop.plain_loop(tiny_cfg, name, workers=0)
    losses = [row["loss_recon"] for row in ours]
    assert losses == [row["loss_recon"] for row in plain]
    assert len(set(losses)) == 4


# ---- mistakes


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["train", "--steps", "0"], "--steps is 0"),
        (["predict", "--warmup", "-1"], "--warmup is -1"),
        (["predict", "--output", "."], r"--output \. is a folder; give a file"),
        (["predict", "--output", "/dev/null/x/y.json"], "--output /dev/null/x cannot be made"),
        (["predict", "--register", "gone.py"], "--register gone.py: no such file"),
        (["step", "--batch", "2", "0"], "--batch is 0"),
        (["loop", "--size", "0", "64"], "--size is 0"),
        (["constant", "--windows", "0", "--steps", "1", *TINY], "windows hold at least 1 frame"),
        (["loop", "--steps", "1", *TINY, "TTT.METHOD", "none"], "add --no-peers"),
        (["step", "--no-peers", *SMALL, *TINY, "TTT.METHOD", "none"], "no gradient steps"),
        (["gpu", "--only", "steps"], "--only names .*steps.*; choose among"),
    ],
)
def test_mistakes_are_one_line(tool, args, words):
    command, *flags = args
    with pytest.raises(UserError, match=words) as error:
        tool.main([command, *CONFIG, *flags])
    assert "\n" not in str(error.value)


def test_a_config_is_asked_for(tool):
    with pytest.raises(UserError, match="no config"):
        tool.main(["predict"])
