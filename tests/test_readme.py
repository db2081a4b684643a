"""Every command that README.md shows is run: by .ci/run, or here."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from detectron2.engine import DefaultTrainer
from PIL import Image

from ttt_video.config import load_config

ROOT = Path(__file__).resolve().parents[1]

# Commands for a fresh machine, which .ci/run runs as they are.
IN_CI = {"make demo", "make test", "make benchmark ARGS=--quick"}
# Every other command is run below as it is shown, and ended early by these arguments.
SHORTENED_BY = {
    "tools/stream_eval.py": ["--max-frames", "2"],
    "tools/train_net.py": [
        "SOLVER.MAX_ITER", "2",
        "DATASETS.TRAIN", "('world_sem_seg_val',)",  # 200 stills to render instead of 4000
        "DATASETS.TEST", "()",
        "TEST.EVAL_PERIOD", "0",
    ],
}  # fmt: skip


def commands(markdown: str) -> list[str]:
    """Commands of all ``bash`` blocks: continued lines joined, comments and prompts removed."""
    found = []
    for block in re.findall(r"^```(?:bash|sh|shell|console)\n(.*?)^```", markdown, re.M | re.S):
        for line in block.replace("\\\n", " ").splitlines():
            command = re.sub(r"(^|\s)#.*", "", line).strip().removeprefix("$ ")
            if command:
                found.append(" ".join(command.split()))
    return found


def python_blocks(markdown: str) -> list[str]:
    """The code of all ``python`` blocks."""
    return re.findall(r"^```python\n(.*?)^```", markdown, re.M | re.S)


def test_commands_are_found_in_markdown() -> None:
    bash = "```bash\n# first\nmake demo   # minutes\n$ python a.py \\\n    --b 1\n```\n"
    text = bash + "```text\nno\n```\n"
    assert commands(text) == ["make demo", "python a.py --b 1"]


README = (ROOT / "README.md").read_text(encoding="utf-8")
README_COMMANDS = commands(README)


def test_ci_runs_the_commands_for_a_fresh_machine() -> None:
    make = {command for command in README_COMMANDS if command.split()[0] == "make"}
    steps = (ROOT / ".ci/run").read_text(encoding="utf-8").splitlines()
    assert make == IN_CI
    assert {f"step {command}" for command in make} <= {step.strip() for step in steps}


STREAM, PROJECT = python_blocks(README)


def test_frames_of_a_program_are_streamed(tmp_path: Path, monkeypatch, capsys) -> None:
    write_street(tmp_path)
    monkeypatch.chdir(tmp_path)
    exec(STREAM, {})
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(" ")[2] for line in lines] == ["(64, 96)"] * 3
    assert all(float(line.partition(" ")[0]) > 0 for line in lines)


def test_the_lines_for_a_project_run_anywhere(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(PROJECT, names)
    assert names["model"].device.type == "cpu"


TRAININGS = sorted((ROOT / "configs").glob("**/joint_*.yaml"))


@pytest.mark.parametrize("config", TRAININGS, ids=lambda path: path.stem)
def test_detectron2s_own_trainer_takes_a_shipped_training_with_the_lines_shown(
    config: Path,
) -> None:
    cfg = load_config(str(config))
    model = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="full_model"):
        DefaultTrainer.build_optimizer(cfg, model)
    lines = PROJECT.partition("`DefaultTrainer`")[2].partition("\n")[2]
    exec(lines, {"cfg": cfg})
    optimizer = DefaultTrainer.build_optimizer(cfg, model)
    DefaultTrainer.build_lr_scheduler(cfg, optimizer)
    assert cfg.MODEL.MASK_ON  # else detectron2's mapper drops the masks


def write_street(folder: Path) -> np.ndarray:
    """Writes street.mp4; returns its frames before they were compressed."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (3, 64, 96, 3), dtype=np.uint8)
    with av.open(str(folder / "street.mp4"), "w") as video:
        stream = video.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        for image in images:
            video.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        video.mux(stream.encode())
    return images


def write_frames(folder: Path) -> None:
    """Writes the files of a user that README.md speaks of: street.mp4, and frames/."""
    (folder / "frames").mkdir()
    for index, image in enumerate(write_street(folder)):
        Image.fromarray(image).save(folder / "frames" / f"{index:06d}.png")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder that looks like a checkout, with the files of a user that README.md speaks of."""
    for name in ("configs", "tools", "ttt_video"):
        (tmp_path / name).symlink_to(ROOT / name)
    write_frames(tmp_path)
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("command", [c for c in README_COMMANDS if c not in IN_CI])
def test_command_runs(command: str, checkout: Path) -> None:
    program, script, *arguments = shlex.split(command)
    assert program == "python"
    result = subprocess.run(
        [sys.executable, script, *arguments, *SHORTENED_BY[script]],
        cwd=checkout,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert any((checkout / "output").rglob("*")), "it says where it writes, and writes there"
