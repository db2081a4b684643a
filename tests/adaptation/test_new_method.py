"""docs/examples/new_method.py under contract, as its page says, and from the command line."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from contract import AdapterContract
from PIL import Image

from ttt_video.adaptation import ADAPTER_REGISTRY

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "docs" / "examples" / "new_method.py"
PAGE = ROOT / "docs" / "methods" / "README.md"


@pytest.mark.slow
class TestAnyLight(AdapterContract):
    method = "any_light"
    frozen = ("sem_seg_head", "recon_head")

    @pytest.fixture(autouse=True)
    def _registered(self):
        runpy.run_path(str(EXAMPLE))
        yield
        ADAPTER_REGISTRY._obj_map.pop("any_light")


def test_the_page_shows_the_file_itself():
    assert f"```python\n{EXAMPLE.read_text()}```" in PAGE.read_text()


def test_it_is_under_40_lines():
    assert len(EXAMPLE.read_text().splitlines()) < 40


@pytest.mark.slow
def test_the_command_in_it_runs(tmp_path):
    (command,) = re.findall(r"^python .*$", EXAMPLE.read_text(), re.M)
    frames = tmp_path / "frames"
    frames.mkdir()
    rng = np.random.default_rng(0)
    for index in range(2):
        image = rng.integers(0, 256, (64, 96, 3), np.uint8)
        Image.fromarray(image).save(frames / f"{index}.png")
    arguments = command.split()[1:]
    arguments[arguments.index("--video") : arguments.index("VIDEO") + 1] = [
        "--video-dir", str(frames),
    ]  # fmt: skip
    output = tmp_path / "run"
    run = [sys.executable, *arguments, "--output", str(output), "--no-video"]
    done = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert '"loss_light"' in (output / "frames.jsonl").read_text()
