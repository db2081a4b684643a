"""examples/new_method.py under contract, as its page says, and from the command line."""

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

from ttt_video import config
from ttt_video.adaptation import ADAPTER_REGISTRY
from ttt_video.config import load_config
from ttt_video.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "new_method.py"
PAGE = ROOT / "docs" / "methods" / "README.md"


@pytest.fixture
def _registered():
    runpy.run_path(str(EXAMPLE))
    yield
    ADAPTER_REGISTRY._obj_map.pop("any_light")
    config.KEYS.pop("TTT.ANY_LIGHT.DARKEST")


@pytest.mark.slow
@pytest.mark.usefixtures("_registered")
class TestAnyLight(AdapterContract):
    method = "any_light"
    frozen = ("sem_seg_head", "recon_head")


@pytest.mark.usefixtures("_registered")
def test_its_own_keys_have_defaults_and_checks(tiny_model):
    first, second = (load_config(None, method="any_light") for _ in range(2))
    assert first.TTT.ANY_LIGHT.DARKEST == 0.3
    first.TTT.ANY_LIGHT.DARKEST = 0.4
    assert second.TTT.ANY_LIGHT.DARKEST == 0.3
    cfg = load_config(None, opts=["TTT.ANY_LIGHT.DARKEST", "0.6"], method="any_light")
    assert ADAPTER_REGISTRY.get("any_light")(cfg, tiny_model).darkest == 0.6
    for value, message in (("1.5", r"^TTT\.ANY_LIGHT\.DARKEST is 1\.5; it must be between"),
                           ("dark", "does not merge")):  # fmt: skip
        with pytest.raises(UserError, match=message):
            load_config(None, opts=["TTT.ANY_LIGHT.DARKEST", value])


def test_keys_that_nobody_declared_do_not_merge():
    assert "ANY_LIGHT" not in load_config(None).TTT
    with pytest.raises(UserError, match="does not merge"):
        load_config(None, opts=["TTT.ANY_LIGHT.DARKEST", "0.6"])


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
