"""``weights export`` as a user gives it: the page's commands and code, and mistakes."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from PIL import Image
from test_readme import commands, python_blocks
from tiny import TINY

from ttt_video.config import load_config
from ttt_video.errors import UserError
from ttt_video.formats.images import FrameTransform
from ttt_video.modeling.postprocess import panoptic_inference
from ttt_video.modeling.weights import save_safetensors, weights_hash
from ttt_video.stream import load_source_model
from ttt_video.stream.source_model import config_of_weights
from ttt_video.world.video import WorldVideo
from ttt_video_cli import call

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "models.md").read_text(encoding="utf-8")
WITHOUT_TORCH = "import sys\nsys.modules['torch'] = None\n"
export = partial(call, "weights export")


def facts(file: Path) -> dict:
    return {entry.key: json.loads(entry.value) for entry in onnx.load(file).metadata_props}


def compared(said: str) -> list[tuple[str, int]]:
    """Sizes of the frames that a file was compared on, and how many pixels differ."""
    found = re.findall(r"^  (\d+x\d+): .* (\d+) of \d+ pixels differ$", said, re.M)
    return [(size, int(pixels)) for size, pixels in found]


@pytest.fixture
def street(tmp_path, monkeypatch) -> Path:
    """The working folder, with three frames of a street."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "street").mkdir()
    for index in range(3):
        frame = WorldVideo(1001, 3)[index].image
        Image.fromarray(frame).save(tmp_path / "street" / f"{index}.png")
    return tmp_path


@pytest.mark.slow
def test_an_adapted_model_needs_neither_config_nor_torch(street, capsys):
    """The page's first command, and its code on frames of three sizes where torch is not there."""
    words = ["--video-dir", "street", "--save-weights", "last", "--no-video"]
    call("stream", ["--config", "quick/stream_world.yaml", *words, "--output", "output/adapted"])
    adapted = street / "output/adapted/weights/street/last.safetensors"
    capsys.readouterr()
    export(shlex.split(commands(PAGE)[0])[2:])
    pairs = compared(capsys.readouterr().out)
    assert [size for size, _ in pairs] == ["128x256", "97x256", "128x128"]
    assert sum(pixels for _, pixels in pairs) <= 3
    known = facts(street / "street.onnx")
    cfg = load_config(config_of_weights(adapted))
    cfg.MODEL.WEIGHTS = str(adapted)
    model = load_source_model(cfg)
    source = load_source_model(load_config("quick/stream_world.yaml"))
    assert known["weights_sha256"] == weights_hash(model) != known["source_sha256"]
    assert known["source_sha256"] == weights_hash(source)
    assert (known["frame_index"], known["video_id"], known["size"]) == (2, "street", None)
    assert (known["classes"][0], known["colors"][0]) == ("road", [128, 64, 128])
    assert (known["input_order"], known["shorter_side"]) == ("RGB", 128)
    (code,) = [block for block in python_blocks(PAGE) if "onnxruntime" in block]
    code = f"{WITHOUT_TORCH}{code}\nnumpy.save('labels.npy', labels)"
    for height, width in [(128, 256), (100, 202), (65, 33)]:
        frame = Image.open(street / "street" / "2.png").resize((width, height))
        frame.save(street / "street.png")
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        image = FrameTransform.from_config(cfg)(np.array(frame))
        with torch.no_grad():
            expected = model([{"image": image}])[0]["sem_seg"].argmax(0).numpy()
        assert min(expected.shape) == 128
        labels = np.load(street / "labels.npy")
        assert (labels != expected).sum() <= 3
        assert eval(done.stdout) == [known["classes"][k] for k in np.unique(labels)]


@pytest.mark.slow
def test_source_weights_for_one_size(street, capsys):
    """The page's second command."""
    export(shlex.split(commands(PAGE)[1])[2:])
    said = capsys.readouterr().out
    assert [size for size, _ in compared(said)] == ["128x256"] * 2
    assert sum(pixels for _, pixels in compared(said)) <= 2
    assert "the step that adapts the weights is not inside" in said
    known = facts(street / "world.onnx")
    assert (known["size"], known["frame_index"]) == ([128, 256], None)
    assert known["weights_sha256"] == known["source_sha256"]
    assert (street / "world.pt2").stat().st_size < 12e6  # without decoder g


@pytest.mark.slow
def test_a_panoptic_model_gives_its_queries(tmp_path, capsys):
    opts = [*TINY, "DATASETS.TRAIN", "('world_panoptic_train',)"]
    torch.manual_seed(0)
    cfg = load_config("quick/joint_world_panoptic.yaml", opts=opts)
    cfg.MODEL.MASK_FORMER.TEST.OBJECT_MASK_THRESHOLD = 0.0
    from detectron2.modeling import build_model

    model = build_model(cfg).eval()
    save_safetensors(model.state_dict(), tmp_path / "tiny.safetensors")
    (tmp_path / "tiny.yaml").write_text(cfg.dump())
    output = tmp_path / "queries.onnx"
    flags = ["--config", str(tmp_path / "tiny.yaml"), "--output", str(output)]
    export([*flags, "--weights", str(tmp_path / "tiny.safetensors"), "--size", "70", "101"])
    assert "70x101: " in capsys.readouterr().out
    image = torch.randint(256, (3, 70, 101), dtype=torch.uint8)
    session = onnxruntime.InferenceSession(output)
    assert [out.name for out in session.get_outputs()] == ["class_logits", "mask_logits"]
    queries = [torch.from_numpy(x[0]) for x in session.run(None, {"image": image[None].numpy()})]
    known = facts(output)
    names = ("object_mask_threshold", "overlap_threshold")
    settings = {name: known[name] for name in names}
    found, _ = panoptic_inference(*queries, **settings, thing_classes=set(known["things"]))
    with torch.no_grad():
        expected, _ = model([{"image": image}])[0]["panoptic_seg"]
    assert (found != expected).sum() <= 7


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--output", "a.txt"], "--output a.txt: end it with .onnx or .pt2 (torch.export)"),
        (["--output", "no/a.pt2"], "--output no/a.pt2: there is no folder no"),
        (["--output", "a.pt2"], "give --config, or --weights of a file that --save-weights wrote"),
        (["--output", "a.pt2", "--size", "0", "5"], "--size is 0 5; give a height and a width in"),
        (["--output", "a.pt2", "--weights", "no.safetensors"], "no checkpoint file no.safetensors"),
        (
            ["--output", "a.pt2", "--config", "quick/stream_world_color.yaml"],
            "ColorizerTTT cannot be exported: it has no prediction_tensors",
        ),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(words, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=f"^{re.escape(said)}"):
        export(words)
    assert [*tmp_path.iterdir()] == []


def test_a_folder_is_told_before_any_work(tmp_path):
    (tmp_path / "a.pt2").mkdir()
    with pytest.raises(UserError, match=r"a\.pt2 is a folder; give a file"):
        export(["--config", "x", "--output", str(tmp_path / "a.pt2"), "--overwrite"])


def test_a_file_that_exists_is_kept(tmp_path):
    (tmp_path / "a.onnx").write_bytes(b"mine")
    with pytest.raises(UserError, match="exists; give another name or --overwrite"):
        export(["--config", "quick/stream_world.yaml", "--output", str(tmp_path / "a.onnx")])
    assert (tmp_path / "a.onnx").read_bytes() == b"mine"
