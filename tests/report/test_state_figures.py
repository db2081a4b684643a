"""Figures of states over time, of rows made by hand."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from ttt_video.adaptation.change_states import State
from ttt_video.cli import run_tool
from ttt_video.errors import UserError
from ttt_video.report.state_figures import COLORS, draw_states, spans


def write_rows(folder, states, **numbers):
    folder.mkdir(parents=True)
    rows = [
        {"video_id": "a", "frame_index": i, "file_name": f"{i}.png", "state": s, **numbers}
        for i, s in enumerate(states)
    ]
    (folder / "frames.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_stretches_are_those_of_equal_states_in_the_order_of_frames():
    # Rows of workers may come out of order, and frames may be missing.
    states = {3: 1, 0: 0, 1: 0, 5: 1, 8: 0}
    assert spans(states) == [(0, 0, 1), (1, 3, 5), (0, 8, 8)]


def test_bands_are_as_wide_as_the_states_last(tmp_path):
    write_rows(tmp_path / "run", [0.0] * 30 + [1.0] * 10 + [2.0] * 60, norm_shift=0.2)
    (file,) = draw_states(tmp_path / "run", "x", tmp_path, name="run", suffix="png")
    assert file.name == "states-run-a.png"
    picture = np.asarray(Image.open(file).convert("RGB")).astype(int)
    middle = picture[picture.shape[0] // 2]

    def width(state):
        rgb = np.array([int(COLORS[state][i : i + 2], 16) for i in (1, 3, 5)])
        shade = 0.35 * rgb + 0.65 * 255
        return (np.abs(middle - shade).max(1) <= 2).sum()

    learn, keep = width(State.LEARN), width(State.KEEP)
    assert keep / learn == pytest.approx(6, rel=0.05)


def test_runs_without_states_have_no_figure(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "frames.jsonl").write_text('{"video_id": "a", "frame_index": 0}\n')
    assert draw_states(tmp_path / "run", "x", tmp_path, name="run") == []


def test_a_state_that_nobody_has_is_named(tmp_path):
    write_rows(tmp_path / "run", [0.0, 9.0])
    with pytest.raises(UserError, match=r"frames\.jsonl has the state 9\.0; known: \[0, 1, 2, 3\]"):
        draw_states(tmp_path / "run", "x", tmp_path, name="run")


def test_the_tool_draws_them(tmp_path, capsys):
    from ttt_video_cli import plot

    write_rows(tmp_path / "run", [0.0, 1.0, 3.0])  # without a distance: no label, no prediction
    parser = plot.argument_parser()
    arguments = [str(tmp_path / "run"), "--output", str(tmp_path / "figures")]
    run_tool(lambda: plot.run(parser.parse_args(arguments)))
    assert (tmp_path / "figures" / "states-run-a.svg").is_file()
    assert "states-run-a.svg" in capsys.readouterr().out
