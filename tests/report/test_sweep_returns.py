"""Source, target, loop-back, drop and recovery time, by hand."""

from __future__ import annotations

import json

import pytest
import yaml

from ttt_video.report.sweep_returns import recovery_frames, returns_table
from ttt_video.report.sweep_tables import cell_record
from ttt_video.sweeps.cells import read_sweep

WORLD = {
    "videos": 1, "frames": 50, "corruption": ["fog", "night"], "each": None,
    "schedule": "return", "severity": 3,
}  # fmt: skip


@pytest.mark.parametrize(
    ("scores", "frames"),
    [
        ([50.0] * 20, 0),  # nothing happens
        ([80.0] * 5 + [50.0] * 15, 0),  # better than later is not worse
        # Level 50. Five frames have 49 or more from the first on that has one of 45 at most.
        ([30.0, 40, 45, 45] + [50.0] * 16, 3),
        ([49.0] * 10 + [50.0] * 10, 0),  # just within a point
        ([48.9] * 10 + [50.0] * 10, 6),  # (4 * 48.9 + 50) / 5 = 49.12 from frame 6 on
        ([40.0] * 9 + [50.0] * 11, 9),  # frame 8 has (40 + 4 * 50) / 5 = 48
        ([20.0, 60.0], 2),  # shorter than the running mean: its mean is 40, its level 60
        ([60.0], 0),
    ],
)
def test_recovery_by_hand(scores, frames):
    assert recovery_frames(scores) == frames


def test_table_by_hand(tmp_path):
    path = tmp_path / "sweep.yaml"
    rows = {"none": None, "tent": None}
    path.write_text(yaml.safe_dump({"sources": {"w": {"world": WORLD}}, "rows": rows}))
    sweep = read_sweep(path, tmp_path / "out")
    folder = sweep.worlds[0].folder
    folder.mkdir(parents=True)
    (folder / "world.json").write_text(json.dumps({"names": None, **WORLD}))
    # Ten frames of each part: clean, fog, clean, night, clean.
    scores = {"none": [60, 30, 60, 20, 60], "tent": [61, 40, 58, 30, 57]}
    for cell in sweep.cells:
        cell.folder.mkdir(parents=True)
        own = [s for level in scores[cell.name] for s in [level] * 10]
        if cell.name == "tent":
            own[10:13] = [20, 20, 20]  # fog: level 40 from the first 5 frames of 39, frame 13 on
        summary = {
            "complete": True, "frames": 50, "preset": None, "weights_sha256": "a" * 64,
            "metrics": {"adapted": {"mIoU": 0.0, "videos": {}}},
            "streaming": {"adapted": {"misses": 1}, "frozen": {"delay_frames": 1.5}},
            "seconds": {k: {"mean": 1.0} for k in ("adapt", "predict", "frame")},
        }  # fmt: skip
        (cell.folder / "summary.json").write_text(json.dumps(summary))
        lines = [
            {"video_id": "0000", "frame_index": i, "records": {"sem_seg": {"0": [s, 0, 100 - s]}}}
            for i, s in enumerate(own)
        ]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (cell.folder / "frames.jsonl").write_text(text)
    records = [cell_record(cell, cell.summary()) for cell in sweep.cells]
    numbers = ("streaming_misses", "frozen_streaming_delay_frames")
    assert [records[0][name] for name in numbers] == [1, 1.5]
    table = returns_table(sweep.cells, records)
    assert table.head == ["videos", "method", "source", "target", "drop", "loop-back", "recovery"]
    assert table.rows == [
        ["w", "none", "60.00", "25.00", "35.00", "60.00", "0.0"],
        # Fog: (3 * 20 + 7 * 40) / 10 = 34; recovery 3 frames at one of four changes.
        ["w", "tent", "61.00", "32.00", "29.00", "57.50", "0.8"],
    ]
    assert returns_table(sweep.cells, []) is None
