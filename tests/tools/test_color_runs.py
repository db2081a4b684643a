"""Colorization as a user runs it: training, counted colours, streams of videos and films."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import test_stream_eval as plain
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import build_model
from PIL import Image
from tiny import TINY

from ttt_video.color.lab import to_grey
from ttt_video.config import load_config
from ttt_video.data.image_folder import register_image_folder
from ttt_video.errors import UserError
from ttt_video.modeling import ZhangColorizer
from ttt_video.modeling.colorizer import PRIOR
from ttt_video.modeling.weights import read_checkpoint, save_safetensors
from ttt_video.shipped import config_dir
from ttt_video.sweeps.cells import read_sweep
from ttt_video_cli import call

HEIGHT, WIDTH = 64, 96
DOCS = "docs/colorization.md"


def weights_of(folder: Path, *opts: str) -> tuple[str, str, str, str]:
    """--config and --weights of a tiny model of colours."""
    cfg = load_config("joint_imagenet_color.yaml", opts=[*TINY, "TTT.BATCH_SIZE", "2", *opts])
    torch.manual_seed(0)
    model = build_model(cfg)
    model.sem_seg_head.predictor.mask_embed.layers[-1].weight.data.mul_(10)  # vivid
    (folder / "tiny.yaml").write_text(cfg.dump())
    save_safetensors(model.state_dict(), folder / "tiny.safetensors")
    return ("--config", str(folder / "tiny.yaml"), "--weights", str(folder / "tiny.safetensors"))


@pytest.fixture
def flags(tmp_path):
    return weights_of(tmp_path)


def video(folder: Path, count: int, *, grey: bool = False) -> Path:
    folder.mkdir(parents=True)
    for index in range(count):
        picture = Image.fromarray(plain.picture(index, HEIGHT, WIDTH))
        (picture.convert("L") if grey else picture).save(folder / f"{index}.png")
    return folder


def stream(*args: object, to: Path) -> dict:
    """Runs the command; returns the summary."""
    words = list(map(str, args))
    # KEY VALUE overrides come last.
    call("stream", ["--output", str(to), *words])
    return plain.summary_of(to)


@pytest.mark.slow
def test_a_colour_video_is_coloured_beside_the_frozen_model(flags, tmp_path, capsys):
    folder = video(tmp_path / "video", 5)
    out = tmp_path / "out"
    summary = stream(*flags, "--video-dir", folder, "--compare", to=out)
    numbers = summary["metrics"]
    assert numbers["adapted"].keys() >= {"PSNR", "CIEDE2000", "colorfulness", "CDC"}
    assert numbers["adapted"].keys() == numbers["frozen"].keys()
    assert numbers["adapted"]["colorfulness_original"] > 5
    assert "adapted: PSNR" in capsys.readouterr().out
    assert plain.probe(out / "overlay.mp4")[3] == 5
    assert all(row["loss_recon"] > 0 for row in plain.rows_of(out))
    assert summary["protocols"].keys() >= {"PSNR", "CIEDE2000"}


def test_a_film_has_no_labels_but_is_measured(flags, tmp_path):
    for grey in (True, False):
        folder = video(tmp_path / f"film{grey}", 5, grey=grey)
        args = (*flags, "--video-dir", folder, "--no-video", "INPUT.GREY", "film")
        numbers = stream(*args, to=tmp_path / f"out{grey}")["metrics"]["adapted"]
        assert numbers["colorfulness"] > 0
        assert numbers["CDC"] >= 0
        assert not numbers.keys() & {"PSNR", "PSNR_pooled", "SSIM", "CIEDE2000"}
        assert "colorfulness_original" not in numbers


@pytest.mark.slow
def test_the_documented_command_colours_ten_films(tmp_path):
    root = Path(__file__).parents[2]
    pages = [(root / page).read_text("utf-8") for page in ("datasets/README.md", DOCS)]
    found = [re.findall(r"^python tools/stream_eval\.py (.*/lumiere .*)", p, re.M) for p in pages]
    assert found[0] == found[1]
    for film in range(10):
        video(tmp_path / "lumiere" / f"film_{film}", 1, grey=True)
    words = found[0][0].replace("datasets/lumiere", str(tmp_path / "lumiere")).split()
    summary = stream(*words, "INPUT.MIN_SIZE_TEST", 32, to=tmp_path / "out")
    assert summary["frames"] == 10
    assert len(list((tmp_path / "out").glob("overlay-film_*.mp4"))) == 10
    for numbers in summary["metrics"].values():
        assert numbers["colorfulness"] > 0
        assert "PSNR" not in numbers


def test_a_data_set_with_other_labels_is_scored_by_its_colours(flags, tmp_path):
    """COCO Videos are coloured so, whose labels are segments."""
    folder, name = video(tmp_path / "video", 2), "test_color_runs_other_labels"
    records = [
        {"file_name": str(folder / f"{i}.png"), "sem_seg_file_name": str(folder / f"{i}_sem.png"),
         "video_id": "v", "frame_index": i, "height": HEIGHT, "width": WIDTH} for i in range(2)
    ]  # fmt: skip
    for record in records:
        Image.fromarray(np.zeros((HEIGHT, WIDTH), np.uint8)).save(record["sem_seg_file_name"])
    DatasetCatalog.register(name, lambda: records)
    metadata = {"evaluator_type": "video_sem_seg", "ignore_label": 255}
    MetadataCatalog.get(name).set(stuff_classes=["a", "b", "c"], **metadata)
    numbers = []
    try:
        for method in ("none", "offline_ttt_mae_oracle"):
            keys = ("TTT.OFFLINE.STEPS", 1)
            args = ("--dataset", name, "--method", method, "--no-video", *keys)
            summary = stream(*flags, *args, to=tmp_path / method)
            assert summary["dataset"] == name
            assert "mIoU" not in summary["metrics"]["adapted"]
            numbers.append(summary["metrics"]["adapted"])
    finally:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    by_folder = (*flags, "--video-dir", folder.parent / "plain", "--method", "none", "--no-video")
    video(folder.parent / "plain", 2)
    expected = stream(*by_folder, to=tmp_path / "folder")["metrics"]["adapted"]
    assert numbers[0]["PSNR"] == expected["PSNR"]
    (score,) = {row["offline_score"] for row in plain.rows_of(tmp_path / "offline_ttt_mae_oracle")}
    assert score == pytest.approx(numbers[1]["PSNR"])


def test_models_take_the_frames_they_are_for(flags, tmp_path):
    folder, out = video(tmp_path / "video", 2), tmp_path / "out"
    with pytest.raises(UserError, match=r"ColorizerTTT .* INPUT\.GREY is off: set it to made"):
        stream(*flags, "--video-dir", folder, "INPUT.GREY", "off", to=out)
    segmentation = ("--config", "quick/stream_world.yaml", "--video-dir", folder)
    for grey in ("made", "film"):
        with pytest.raises(UserError, match=rf"INPUT\.GREY is {grey}, .* MaskFormerTTT is none"):
            stream(*segmentation, "INPUT.GREY", grey, to=out)
    assert not out.exists()


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_rows_and_pictures(flags, tmp_path):
    videos = tmp_path / "videos"
    for name, count in (("a", 2), ("b", 20)):
        video(videos / name, count)
    args = (*flags, "--video-dir", videos, "--compare", "--save-every", 4)
    args = (*args, "--method", "temporal_smoothing", "TTT.ENSEMBLE.METHOD", "online_ttt_mae")
    cut, whole = tmp_path / "cut", tmp_path / "whole"
    command = [sys.executable, str(plain.ROOT / "tools/stream_eval.py")]
    words = ["--output", str(cut), "--resume", *map(str, args)]
    plain.kill_at([*command, *words], cut, 8)
    assert not (cut / "summary.json").exists()
    stream("--resume", *args, to=cut)
    stream(*args, to=whole)
    assert plain.without_times(plain.rows_of(cut)) == plain.without_times(plain.rows_of(whole))
    assert plain.summary_of(cut)["metrics"] == plain.summary_of(whole)["metrics"]
    for name in ("overlay-a.mp4", "overlay-b.mp4", "config.yaml"):
        assert (cut / name).read_bytes() == (whole / name).read_bytes()


@pytest.mark.slow
def test_several_workers_give_the_numbers_of_one(flags, tmp_path):
    videos = tmp_path / "videos"
    for name, count in (("a", 3), ("b", 6)):
        video(videos / name, count)
    args = (*flags, "--video-dir", videos, "--compare")
    one = stream(*args, to=tmp_path / "one")
    two = stream("--workers", 2, *args, to=tmp_path / "two")
    assert one["metrics"] == two["metrics"]
    rows = [
        sorted(plain.without_times(plain.rows_of(tmp_path / name)), key=lambda row: (
            row["video_id"], row["frame_index"]
        ))
        for name in ("one", "two")
    ]  # fmt: skip
    assert rows[0] == rows[1]
    for name in ("overlay-a.mp4", "overlay-b.mp4"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_zhangs_network_streams_beside_itself(tmp_path):
    with torch.device("meta"):
        published = ZhangColorizer().state_dict()
    weights = {
        name.split(".", 1)[1]: torch.tensor(0.01).expand(value.shape)
        for name, value in published.items()
    }
    torch.save(weights, tmp_path / "colorization_release_v2.pth")
    args = ("--config", "baselines/zhang2016_color.yaml", "--video-dir")
    args = (*args, video(tmp_path / "video", 2), "--compare", "--weights")
    args = (*args, tmp_path / "colorization_release_v2.pth", "INPUT.MIN_SIZE_TEST", 16)
    summary = stream(*args, "MODEL.DEVICE", "cpu", to=tmp_path / "out")
    assert summary["metrics"]["adapted"] == summary["metrics"]["frozen"]
    assert summary["metrics"]["adapted"]["PSNR"] > 5
    assert plain.probe(tmp_path / "out/overlay.mp4")[3] == 2


# ---- training and measuring


@pytest.fixture
def pictures(tmp_path):
    """Name of a folder of four coloured pictures and a grey one, registered for colorization."""
    for index in range(4):
        video(tmp_path / f"pictures/n{index}", 1)
        Image.fromarray(plain.picture(index, HEIGHT, WIDTH)).save(
            tmp_path / f"pictures/n{index}/0.png"
        )
    Image.fromarray(plain.picture(9, HEIGHT, WIDTH)).convert("L").save(tmp_path / "pictures/9.png")
    name = "test_color_runs_pictures"
    register_image_folder(name, tmp_path / "pictures")
    yield name
    DatasetCatalog.remove(name)
    MetadataCatalog.remove(name)


def training(name: str, out: Path, *opts: object, config: str = "quick/joint_world_color.yaml"):
    tiny = [*TINY, "TTT.BATCH_SIZE", "2"]
    words = ["DATASETS.TRAIN", f"('{name}',)", "DATASETS.TEST", f"('{name}',)"]
    words += ["SOLVER.IMS_PER_BATCH", 2, "SOLVER.MAX_ITER", 2, "TEST.EVAL_PERIOD", 2]
    words += ["MODEL.WEIGHTS", "''", "SOLVER.FROM_SCRATCH", True, "TTT.COLOR.PRIOR", "''"]
    call("train", ["--config", config, *tiny, *map(str, [*words, "OUTPUT_DIR", out, *opts])])


def lines_of(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("target", ["classification", "regression"])
def test_training_with_an_evaluation_then_a_stream(pictures, tmp_path, target):
    out = tmp_path / "training"
    training(pictures, out, "TTT.COLOR.TARGET", target)
    rows = lines_of(out / "metrics.json")
    assert any("loss_color" in row and "loss_recon" in row for row in rows)
    (psnr,) = {row["colorization/PSNR"] for row in rows if "colorization/PSNR" in row}
    assert 3 < psnr < 40
    args = ("--config", out / "config.yaml", "--weights", out / "model_final.pth", "--no-video")
    stream(*args, "--video-dir", video(tmp_path / "v", 2), to=tmp_path / "out")


def test_the_colours_of_the_pictures_weigh_the_loss(pictures, tmp_path, capsys):
    prior = tmp_path / "prior.safetensors"
    config = ("--config", "quick/joint_world_color.yaml")
    words = ["--output", str(prior), *config, "--dataset", pictures, "INPUT.MIN_SIZE_TEST", "0"]
    call("weights colors", words)
    assert f"4 of 5 images have colours, written to {prior}" in capsys.readouterr().out
    counts = read_checkpoint(str(prior))[PRIOR]
    assert counts.shape == (313,)
    assert counts.sum().item() == pytest.approx(4 * HEIGHT * WIDTH)
    training(pictures, tmp_path / "training", "TTT.COLOR.PRIOR", prior)
    grey = tmp_path / "grey"
    video(grey, 2, grey=True)
    register_image_folder("test_color_runs_grey", grey)
    with pytest.raises(UserError, match="all 2 images of test_color_runs_grey are grey"):
        call("weights colors", [*words[:-2], "--dataset", "test_color_runs_grey"])
    DatasetCatalog.remove("test_color_runs_grey")


def test_what_methods_need_is_measured_on_grey_pictures(flags, pictures, tmp_path):
    """Coloured pictures and their grey versions give the same numbers."""
    for index, record in enumerate(DatasetCatalog.get(pictures)):
        rgb = torch.from_numpy(np.array(Image.open(record["file_name"]).convert("RGB")))
        (tmp_path / "grey").mkdir(exist_ok=True)
        grey = Image.fromarray(to_grey(rgb.permute(2, 0, 1))[0].numpy())
        grey.save(tmp_path / f"grey/{index}.png")
    register_image_folder("test_color_runs_grey", tmp_path / "grey")
    for command in ("weights norms", "weights gradients"):
        found = []
        for name in (pictures, "test_color_runs_grey"):
            file = tmp_path / f"{command} {name}.safetensors"
            call(command, [*flags, "--dataset", name, "--output", str(file)])
            found.append(read_checkpoint(str(file)))
        assert found[0].keys() == found[1].keys()
        assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())
    DatasetCatalog.remove("test_color_runs_grey")
    norms = tmp_path / f"weights norms {pictures}.safetensors"
    args = (*flags, "--method", "ln_adapt", "--video-dir", video(tmp_path / "v", 2), "--no-video")
    stream(*args, "TTT.LN_ADAPT.SOURCE_STATISTICS", norms, to=tmp_path / "out")
    assert all(row["norm_shift"] > 0 for row in plain.rows_of(tmp_path / "out"))


def test_a_folder_of_pictures_is_checked(pictures, capsys, tmp_path):
    call("check", [pictures, "--pictures", str(tmp_path / "drawn")])
    said = capsys.readouterr().out
    assert "5 images, 5 with colorization labels" in said
    assert "classes" not in said
    assert len(list((tmp_path / "drawn").iterdir())) > 0
    Path(DatasetCatalog.get(pictures)[1]["file_name"]).write_bytes(b"no picture")
    with pytest.raises(UserError, match="1 problem"):
        call("check", [pictures, "--no-pictures"])
    assert "cannot be read" in capsys.readouterr().out


def test_a_segmentation_model_is_a_starting_point_when_asked(pictures, tmp_path):
    words = ["DATASETS.TRAIN", f"('{pictures}',)", "DATASETS.TEST", "()", "SOLVER.MAX_ITER", 1]
    words += ["SOLVER.IMS_PER_BATCH", 1, "OUTPUT_DIR", tmp_path / "run"]
    command = ["--config", "quick/joint_world_color.yaml", *map(str, words)]
    with pytest.raises(
        UserError, match=r"24 queries .* the model 313,.* set TTT\.NEW_CLASSES True"
    ):
        call("train", [*command, "TTT.NEW_CLASSES", "False"])
    shutil.rmtree(tmp_path / "run", ignore_errors=True)
    call("train", command)  # the config sets it
    assert (tmp_path / "run/model_final.pth").exists()


@pytest.mark.slow
def test_the_full_configuration_trains_and_streams(pictures, tmp_path):
    """Swin-S on the CPU: two steps on four pictures, three frames."""
    out = tmp_path / "training"
    words = ["--config", "joint_imagenet_color.yaml", "--from-scratch", "MODEL.DEVICE", "cpu"]
    words += ["DATASETS.TRAIN", f"('{pictures}',)", "DATASETS.TEST", "()", "SOLVER.MAX_ITER", "2"]
    words += ["SOLVER.IMS_PER_BATCH", "2", "INPUT.MIN_SIZE_TRAIN", "[64]", "OUTPUT_DIR", str(out)]
    call("train", [*words, "INPUT.CROP.SIZE", "[64,64]", "DATALOADER.NUM_WORKERS", "0"])
    assert all(np.isfinite(row["total_loss"]) for row in lines_of(out / "metrics.json"))
    cfg = load_config("joint_imagenet_color.yaml", opts=["MODEL.DEVICE", "cpu"])
    model = build_model(cfg)
    parts = {
        role: sum(p.numel() for p in model.get_submodule(name).parameters())
        for role, name in model.parts.items()
    }
    assert sum(parts.values()) == sum(p.numel() for p in model.parameters())
    assert {role: round(n / 1e6, 1) for role, n in parts.items()} == {
        "f": 48.8,
        "h": 20.0,
        "g": 19.9,
    }
    args = ("--config", out / "config.yaml", "--weights", out / "model_final.pth", "--compare")
    args = (*args, "--video-dir", video(tmp_path / "v", 3), "INPUT.MIN_SIZE_TEST", 0)
    args = (*args, "TTT.OPTIMIZER.BASE_LR", 1e-4)  # of random weights, which larger steps undo
    summary = stream(*args, "TTT.BATCH_SIZE", 2, to=tmp_path / "out")
    assert summary["frames"] == 3
    assert summary["skipped_steps"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["color", "color_validation"])
def test_shipped_sweeps_run_on_tiny_frames(name, tmp_path):
    """The first cell of every row, with the weights and files that ship."""
    sweep = read_sweep(config_dir() / "sweeps" / f"{name}.yaml", tmp_path / "sweep")
    folder = video(tmp_path / "video", 2)
    tiny = ("INPUT.MIN_SIZE_TEST", 32, "TTT.OFFLINE.STEPS", 1)
    for cell in {cell.name: cell for cell in reversed(sweep.cells)}.values():
        at = cell.flags.index("--dataset")
        flags = (*cell.flags[:at], "--video-dir", folder, *cell.flags[at + 2 :])
        opts = (word for pair in cell.overrides.items() for word in pair)
        summary = stream(*flags, *opts, *tiny, to=tmp_path / cell.name)
        assert summary["method"] == cell.method
        assert summary["metrics"]["adapted"].keys() >= {"PSNR", "SSIM", "CIEDE2000", "colorfulness"}
        assert summary["skipped_steps"] == 0


@pytest.mark.parametrize("network", ["inception", "lpips"])
def test_a_flag_names_the_weights_of_a_metrics_network(flags, tmp_path, network):
    """Those of another network are refused by the name of the file that the flag gave."""
    folder = video(tmp_path / "video", 1)
    wrong = flags[-1]  # the colour model's own
    words = [*flags, "--video-dir", folder, f"--{network}", wrong]
    with pytest.raises(UserError, match=rf"TTT.COLOR.{network.upper()} is .*tiny\.safetensors"):
        stream(*words, to=tmp_path / "out")
