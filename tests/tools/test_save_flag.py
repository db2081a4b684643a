"""``--save`` as a user gives it: formats, their folders, mistakes, an own format, workers."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import test_stream_eval as plain
from processes import python_path
from test_readme import commands, python_blocks

from ttt_video.errors import UserError
from ttt_video.formats.labels import read_class_map
from ttt_video.modeling.weights import save_safetensors
from ttt_video.stream.saved_weights import weight_moments
from ttt_video.stream.saving import FORMAT_REGISTRY, format_names
from ttt_video_cli import call
from ttt_video_cli.stream import argument_parser

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = str(ROOT / "examples" / "new_format.py")


@pytest.fixture
def flags(tiny_cfg, tiny_model, tmp_path, monkeypatch):
    """The flags of the tiny model, which takes a method without steps."""
    monkeypatch.setattr(FORMAT_REGISTRY, "_obj_map", dict(FORMAT_REGISTRY._obj_map))
    (tmp_path / "tiny.yaml").write_text(tiny_cfg.dump())
    save_safetensors(tiny_model.state_dict(), tmp_path / "tiny.safetensors")
    files = (
        "--config",
        str(tmp_path / "tiny.yaml"),
        "--weights",
        str(tmp_path / "tiny.safetensors"),
    )
    return (*files, "--method", "none", "--no-video", "--output", str(tmp_path / "out"))


def saved(folder: Path) -> list[str]:
    """Files in the folders of formats."""
    return sorted(str(f.relative_to(folder)) for f in folder.rglob("*/*/*") if f.is_file())


PAGE = (ROOT / "docs" / "outputs.md").read_text(encoding="utf-8")


def test_the_page_lists_every_format_and_its_commands_are_right():
    # A later table says what they cost.
    rows = list(dict.fromkeys(re.findall(r"^\| `(\w+)` \|", PAGE, re.M)))
    assert rows == list(format_names([",".join(rows)]))
    assert sorted(rows) == sorted(form.name for _, form in FORMAT_REGISTRY)
    shown = commands(PAGE)
    assert len(shown) == 6
    for number, command in enumerate(shown):
        program, script, *words = shlex.split(command)
        assert (program, script) == ("python", "tools/stream_eval.py")
        args = argument_parser().parse(words)
        assert bool(args.save) == (number < 4)
        assert bool(args.save_weights) == (number == 4)
        format_names(args.save)
        weight_moments(args.save_weights)


def test_the_second_command_takes_what_the_first_has_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plain.write_mp4(tmp_path / "street.mp4", 2)
    for command in commands(PAGE)[4:]:
        words = shlex.split(command)[2:]
        call("stream", [*words, "--no-video", "--save-every", "0"])
    assert sorted(f.name for f in (tmp_path / "output/adapted/weights/street").iterdir()) == [
        "000001.safetensors", "last.safetensors",
    ]  # fmt: skip


def test_the_code_on_the_page_reads_what_is_saved(flags, tmp_path, monkeypatch, capsys):
    plain.write_frames(tmp_path / "street", 1)
    (tmp_path / "street" / "frame8.png").rename(tmp_path / "street" / "000000.png")
    words = ["--video-dir", str(tmp_path / "street"), "--save", "masks,coco"]
    call("stream", [*flags, *words])
    capsys.readouterr()
    monkeypatch.chdir(tmp_path / "out")
    (block,) = python_blocks(PAGE)
    names: dict = {}
    exec(block, names)
    assert names["classes"].shape == (plain.HEIGHT, plain.WIDTH)
    counted = [line.split() for line in capsys.readouterr().out.splitlines()]
    pixels = {k: int(n) for k, n in (line for line in counted if len(line) == 2) if k.isdigit()}
    assert pixels == {
        str(k): int((names["classes"] == k).sum()) for k in np.unique(names["classes"])
    }


def test_formats_have_folders_by_video_and_model(flags, tmp_path):
    plain.write_frames(tmp_path / "frames", 2)
    words = ["--video-dir", str(tmp_path / "frames"), "--save", "masks,coco"]
    call("stream", [*flags, *words, "--save", "confidence", "--compare"])
    names = ["frame8.png", "frame9.png"]
    assert saved(tmp_path / "out") == sorted(
        f"{form}{model}/frames/{name}"
        for model in ("", "_frozen")
        for form, files in (
            ("masks", [*names, "classes.json"]), ("confidence", names), ("coco", ["semantic.json"]),
        )
        for name in files
    )  # fmt: skip
    assert json.loads((tmp_path / "out" / "run.json").read_text())["--save"] == (
        "coco,confidence,masks"
    )


def test_frames_of_a_video_file_are_named_by_their_index(flags, tmp_path):
    video = plain.write_mp4(tmp_path / "street.mp4", 2)
    call("stream", [*flags, "--video", str(video), "--save", "masks"])
    (folder,) = (tmp_path / "out" / "masks").iterdir()
    assert sorted(f.name for f in folder.iterdir()) == ["000000.png", "000001.png", "classes.json"]


@pytest.mark.parametrize(
    ("formats", "words"),
    [
        ("maskes", "--save maskes: no such format; did you mean masks"),
        ("color", "--save color: the model predicts sem_seg; only models of colours"),
        ("cityscapes", "are not Cityscapes' 19: --save masks takes any"),
    ],
)
def test_mistakes_are_one_line_and_leave_no_folder(flags, tmp_path, formats, words):
    plain.write_frames(tmp_path / "frames", 1)
    with pytest.raises(UserError, match=words):
        call("stream", [*flags, "--video-dir", str(tmp_path / "frames"), "--save", formats])
    assert not (tmp_path / "out").exists()


def test_a_format_of_ones_own(flags, tmp_path):
    plain.write_frames(tmp_path / "frames", 2)
    words = ["--register", EXAMPLE, "--video-dir", str(tmp_path / "frames"), "--save", "npy,masks"]
    call("stream", [*flags, *words])
    for name in ("frame8", "frame9"):
        classes = np.load(tmp_path / "out" / "npy" / "frames" / f"{name}.npy")
        masks = read_class_map(tmp_path / "out" / "masks" / "frames" / f"{name}.png")
        np.testing.assert_array_equal(classes, masks)


@pytest.mark.slow
def test_workers_write_the_same_files_also_in_a_format_of_ones_own(flags, tmp_path):
    for video in ("a", "b"):
        plain.write_frames(tmp_path / "videos" / video, 3)
    words = ["--register", EXAMPLE, *flags[:4], "--video-dir", str(tmp_path / "videos")]
    words += ["--no-video", "--save-every", "2", "--save", "masks,coco,npy"]
    words += ["--save-weights", "last,every:2"]
    for name, workers in (("one", "1"), ("two", "2")):
        subprocess.run(
            [
                *(sys.executable, str(ROOT / "tools" / "stream_eval.py"), *words),
                *("--workers", workers, "--output", str(tmp_path / name), "TTT.BATCH_SIZE", "2"),
            ],
            env={"PYTHONPATH": python_path(), "OMP_NUM_THREADS": "1", "PATH": ""},
            check=True,
            capture_output=True,
        )
    assert saved(tmp_path / "one") == saved(tmp_path / "two")
    assert len(saved(tmp_path / "one")) == 2 * (4 + 1 + 3 + 2)
    for file in saved(tmp_path / "one"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
