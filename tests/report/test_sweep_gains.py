"""Gains by video and by shift, against hand arithmetic."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import yaml

from ttt_video.errors import UserError
from ttt_video.report.formats import to_markdown
from ttt_video.report.sweep_gains import gains_table, shift_table
from ttt_video.report.sweep_tables import cell_record
from ttt_video.sweeps.cells import read_sweep

WORLD = {
    "videos": 2, "frames": 4, "corruption": ["fog", "night", "rain"], "each": 2,
    "schedule": "switch", "severity": 3,
}  # fmt: skip
FROZEN = {"0000": 40.0, "0001": 60.0}
GAINS = {"tent": {"0000": 1.0, "0001": 5.0}, "online_ttt_mae": {"0000": 4.0, "0001": 6.0}}


def hits(correct: int) -> dict:
    """A frame of one class and 100 pixels, of which so many are found: IoU in percent."""
    return {"sem_seg": {"0": [correct, 0, 100 - correct]}}


@pytest.fixture
def sweep(tmp_path):
    """Every frame of a row is as good as its video, 10 points better in the second half; the
    second seed is 2 points better than the first, but for the frozen model."""
    path = tmp_path / "sweep.yaml"
    rows = {"none": {"seeds": [0]}, "tent": None, "online_ttt_mae": None}
    spec = {"sources": {"mixed": {"world": WORLD}}, "rows": rows, "seeds": [0, 1]}
    path.write_text(yaml.safe_dump(spec, sort_keys=False))
    sweep = read_sweep(path, tmp_path / "out")
    folder = sweep.worlds[0].folder
    folder.mkdir(parents=True)
    (folder / "world.json").write_text(json.dumps({"names": None, **WORLD}))
    for cell in sweep.cells:
        cell.folder.mkdir(parents=True)
        scores = {}
        for video, level in FROZEN.items():
            scores[video] = level
            if cell.name != "none":
                scores[video] += GAINS[cell.name][video] + 2 * cell.seed
        videos = {video: {"mIoU": score, "AP": None} for video, score in scores.items()}
        summary = {
            "complete": True, "frames": 8, "preset": None, "weights_sha256": "a" * 64,
            "metrics": {"adapted": {"mIoU": 0.0, "videos": videos}},
            "seconds": {k: {"mean": 1.0} for k in ("adapt", "predict", "frame")},
        }  # fmt: skip
        (cell.folder / "summary.json").write_text(json.dumps(summary))
        frames = [
            {"video_id": v, "frame_index": t, "records": hits(int(score) + 10 * (t > 1))}
            for v, score in scores.items()
            for t in range(4)
        ]
        lines = "".join(json.dumps(frame) + "\n" for frame in frames)
        (cell.folder / "frames.jsonl").write_text(lines)
    return sweep


def records_of(sweep) -> list:
    return [cell_record(cell, cell.summary()) for cell in sweep.cells]


def test_gains_by_video_by_hand(sweep):
    table = gains_table(records_of(sweep), "none")
    assert table.head == ["method", "mixed mIoU"]
    # Of two videos the bootstrap's interval is from the one to the other; seeds are averaged.
    assert table.rows == [
        ["tent", "+4.00 [+2.00, +6.00]"], ["online_ttt_mae", "+6.00 [+5.00, +7.00]"],
    ]  # fmt: skip
    assert "95 % interval" in to_markdown(table)


def test_gains_by_shift_by_hand(sweep):
    """Three corruptions are dealt to two videos of two: fog and rain, night and fog."""
    table = shift_table(sweep.cells, records_of(sweep), "none")
    assert table.head == ["shift", "videos", "none", "tent", "online_ttt_mae"]
    assert table.rows == [
        ["fog", "2", "55.00", "+4.00", "+6.00"],
        ["night", "1", "60.00", "+6.00", "+7.00"],
        ["rain", "1", "50.00", "+2.00", "+5.00"],
        ["mean", "4", "55.00", "+4.00 [+2.00, +6.00]", "+6.00 [+5.00, +7.00]"],
    ]


def test_a_row_that_ran_on_other_videos_has_no_gain(sweep):
    for cell in sweep.cells:
        if cell.name == "tent":
            summary = cell.summary()
            del summary["metrics"]["adapted"]["videos"]["0001"]
            (cell.folder / "summary.json").write_text(json.dumps(summary))
            lines = (cell.folder / "frames.jsonl").read_text().splitlines(keepends=True)
            (cell.folder / "frames.jsonl").write_text("".join(lines[:4]))
    assert gains_table(records_of(sweep), "none").rows[0] == ["tent", "-"]
    table = shift_table(sweep.cells, records_of(sweep), "none")
    assert table.head[2:] == ["none", "online_ttt_mae"]
    assert table.notes[1:] == ["Left out, as they ran on other videos than the frozen model: tent."]


def test_videos_of_two_sources_are_two_though_they_have_one_name(sweep):
    """The frozen model's other source is 10 points better; tent ran on the first alone."""
    cells, records = [*sweep.cells], records_of(sweep)
    for cell in sweep.cells:
        if cell.name == "tent":
            continue
        folder = cell.folder.parent / f"other-{cell.folder.name}"
        folder.mkdir()
        frames = [
            {
                "video_id": "0000",
                "frame_index": t,
                "records": hits(50 if cell.name == "none" else 53),
            }
            for t in range(4)
        ]
        (folder / "frames.jsonl").write_text("".join(json.dumps(f) + "\n" for f in frames))
        cells.append(replace(cell, source="other", folder=folder))
        records.append(
            {**cell_record(cell, cell.summary()), "source": "other", "folder": str(folder)}
        )
    table = shift_table(cells, records, "none")
    assert table.head == ["shift", "videos", "none", "online_ttt_mae"]
    *first, gain = table.rows[-1]  # the other source's one video has fog and rain
    assert first == ["mean", "6", f"{(40 + 50 + 60 + 70 + 50 + 50) / 6:.2f}"]
    assert gain.startswith(f"{(5 + 7 + 3) / 3:+.2f} [")
    assert "tent" in table.notes[1]


def test_a_finished_cell_without_its_rows_is_named(sweep):
    file = sweep.cells[1].folder / "frames.jsonl"
    file.unlink()
    with pytest.raises(UserError, match=f"{file} of a finished cell is missing: restore it"):
        shift_table(sweep.cells, records_of(sweep), "none")


def test_nothing_to_show(sweep):
    records = records_of(sweep)
    assert gains_table([], "none") is None
    alone = [record for record in records if record["name"] == "none"]
    assert alone
    assert gains_table(alone, "none") is None
    assert shift_table(sweep.cells, records, "another") is None
    one = [{**record, "source": "x"} for record in records[:1]]
    summary = sweep.cells[0].summary()
    del summary["metrics"]["adapted"]["videos"]["0001"]
    (sweep.cells[0].folder / "summary.json").write_text(json.dumps(summary))
    assert gains_table(one, "none") is None  # one video says nothing of others
