"""The whole way on a video that is not ours: TTT_TEST_VIDEO names it, in CI a filmed street."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import av
import pytest

ROOT = Path(__file__).resolve().parents[2]


def decoded_frames(path: Path) -> int:
    with av.open(str(path)) as container:
        return sum(1 for _ in container.decode(video=0))


def numbers(value: Any) -> list[float]:
    """Every number in a row, at any depth."""
    if isinstance(value, dict):
        return [n for entry in value.values() for n in numbers(entry)]
    if isinstance(value, list):
        return [n for entry in value for n in numbers(entry)]
    return [value] if isinstance(value, int | float) else []


@pytest.mark.slow
@pytest.mark.skipif("TTT_TEST_VIDEO" not in os.environ, reason="TTT_TEST_VIDEO names no video")
def test_every_frame_of_a_real_video(tmp_path):
    video = Path(os.environ["TTT_TEST_VIDEO"])
    tool = [sys.executable, str(ROOT / "tools/stream_eval.py"), "--video", str(video), "--compare"]
    subprocess.run([*tool, "--output", str(tmp_path / "run")], check=True)
    rows = [json.loads(line) for line in (tmp_path / "run/frames.jsonl").read_text().splitlines()]
    assert [row["frame_index"] for row in rows] == list(range(decoded_frames(video)))
    for row in rows:
        found = numbers(row)
        assert len(found) > 5
        assert all(map(math.isfinite, found)), row
    (overlay,) = (tmp_path / "run").rglob("overlay*.mp4")
    assert decoded_frames(overlay) == len(rows)
