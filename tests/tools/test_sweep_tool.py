"""``ttt-video sweep`` as a user runs it."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import yaml
from detectron2.data import DatasetCatalog
from PIL import Image
from processes import stand_in

from ttt_video.cli import run_tool
from ttt_video.errors import UserError
from ttt_video.modeling.weights import save_safetensors
from ttt_video_cli import call

sweep = partial(call, "sweep")

STREAM = """
import json, pathlib, sys
args = sys.argv[1:]
value = lambda flag: args[args.index(flag) + 1]
if value("--method") == "tent" and not pathlib.Path("mended").exists():
    sys.exit("error: no such thing")
score = {"none": 50.0}.get(value("--method"), 60.0)
seconds = {k: {"mean": 1.0} for k in ("adapt", "predict", "frame")}
summary = {"complete": True, "frames": 2, "seconds": seconds, "preset": "",
           "weights_sha256": "a" * 64,
           "metrics": {"adapted": {"mIoU": score, "mIoU_video_mean": score + 1}}}
pathlib.Path(value("--output"), "summary.json").write_text(json.dumps(summary))
"""


@pytest.fixture
def stream(tmp_path, monkeypatch) -> Path:
    """What cells run for ``python -m ttt_video stream``."""
    return stand_in(STREAM, tmp_path, monkeypatch)


@pytest.fixture
def sweep_file(tmp_path, monkeypatch) -> str:
    monkeypatch.chdir(tmp_path)
    spec = {
        "sources": {"a": {"video": "a.mp4"}},
        "rows": {"none": None, "tent": None, "online_ttt_mae": None},
        "figures": {"bars": True, "gain_against_time": True},
    }
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(spec, sort_keys=False))
    (tmp_path / "a.mp4").touch()
    return "mine.yaml"


@pytest.mark.slow
def test_runs_reports_and_goes_on(sweep_file, stream, tmp_path, capsys):
    sweep([sweep_file, "--dry-run"])
    assert capsys.readouterr().out.count("missing: ") == 3
    with pytest.raises(SystemExit) as stop:
        run_tool(lambda: sweep([sweep_file, "--workers", "2", "--frames", "2", "SEED", "3"]))
    assert stop.value.code == 2
    out, err = capsys.readouterr()
    assert "failed: tent / a / seed 0: no such thing" in out + err
    assert "error: 1 of 3 cells failed" in err
    assert "Traceback" not in err
    folder = tmp_path / "output/sweeps/mine"
    assert "+10.00" in (folder / "results.md").read_text()
    sweep([sweep_file, "--report", "--frames", "2", "SEED", "3"])  # in another process, later
    assert "- Failed: tent / a / seed 0: no such thing" in capsys.readouterr().out
    for file in ("results.md", "results.csv", "report.html"):
        assert "no such thing" in (folder / file).read_text(), file
    assert {p.name for p in folder.iterdir()} == {
        "cells", "results.csv", "results.md", "report.html",
        "bars_mIoU.png", "gain_against_time_mIoU.png",
    }  # fmt: skip
    note = json.loads((folder / "cells/none/a/seed0/cell.json").read_text())
    assert note["arguments"][-4:] == ["--max-frames", "2", "SEED", "3"]
    before = (folder / "cells/none/a/seed0/summary.json").stat().st_mtime_ns
    (tmp_path / "mended").touch()
    sweep([sweep_file, "--frames", "2", "SEED", "3"])
    assert (folder / "cells/none/a/seed0/summary.json").stat().st_mtime_ns == before
    assert capsys.readouterr().out.count("+10.00") == 2
    assert "no such thing" not in (folder / "results.md").read_text()
    stream.unlink()
    sweep([sweep_file, "--report", "--frames", "2", "SEED", "3"])
    assert capsys.readouterr().out.count("+10.00") == 2
    sweep([sweep_file, "--report", "--protocol", "video", "--frames", "2", "SEED", "3"])
    text = capsys.readouterr().out
    assert "51.00" in text
    assert "- mIoU_video_mean: mIoU of each video by itself; mean over videos" in text
    assert "- Preset none, weights aaaaaaaaaaaa: a." in text


def test_other_videos_than_the_files(sweep_file, capsys, tmp_path):
    (tmp_path / "r.py").write_text(
        "from detectron2.data import DatasetCatalog\nDatasetCatalog.register('d/e', list)\n"
    )
    flags = ["--dataset", "d/e", "--weights", "w", "--register", "r.py", "--preset", "paper"]
    try:
        sweep([sweep_file, "--dry-run", *flags])
    finally:
        DatasetCatalog.remove("d/e")
    line = capsys.readouterr().out.splitlines()[0]
    assert line == (
        "missing: none / e / seed 0: --register r.py --dataset d/e --preset paper --weights w "
        "--method none --no-video SEED 0"
    )


@pytest.mark.parametrize("source", [".", "..", "/"])
def test_a_folder_without_a_name(sweep_file, capsys, source, tmp_path):
    sweep([sweep_file, "--dry-run", "--video-dir", source])
    assert f"missing: none / {source} / seed 0: --video-dir {source} " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], "no sweep 'nothing'; give a file or one of: all_methods, "),
        (["benchmrk"], "no sweep 'benchmrk'; did you mean benchmark?"),
        (["mine.yaml", "--frames", "0"], "frames is 0; give a whole number"),
        (["mine.yaml", "--slurm", "a=["], "--slurm a=[: while parsing"),
        (["mine.yaml", "--output", "mine.yaml"], "--output mine.yaml cannot be made: File exists"),
        (
            ["mine.yaml", "--report", "--output", "mine.yaml/x"],
            "--output mine.yaml/x cannot be made",
        ),
        (["mine.yaml", "--weights", "b=gone.pth"], "--weights is 'b'; choose from a"),
        (["mine.yaml", "--dry-run", "TTT.WINDOWSIZE", "3"], "none / a / seed 0: overrides"),
        (["mine.yaml", "--dataset", "nowhere"], "none / nowhere / seed 0: unknown data set"),
        (["mine.yaml", "--register", "gone.py"], "--register gone.py: no such file"),
        (["mine.yaml", "--workers", "0"], "--workers is 0"),
        (["mine.yaml", "--slurm", "partition"], "--slurm partition: give KEY=VALUE"),
        (["mine.yaml", "--workers", "2", "TTT.FRAME_BUDGET_MS", "50"], "with TTT.FRAME_BUDGET_MS"),
    ],
)
def test_mistakes_are_a_line(sweep_file, capsys, arguments, message):
    with pytest.raises(SystemExit) as stop:
        run_tool(lambda: sweep(arguments))
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: {message}")
    assert err.count("\n") == 1
    assert not Path("output").exists()


@pytest.mark.usefixtures("stream")
def test_other_settings_leave_cells_and_table_as_they_are(sweep_file, tmp_path, capsys):
    """Not only the cells: the table of a finished sweep was replaced by one of dashes."""
    (tmp_path / "mended").touch()
    sweep([sweep_file, "--workers", "2"])

    def content():
        files = (path for path in (tmp_path / "output").rglob("*") if path.is_file())
        return {path: path.read_bytes() for path in files}

    before = content()
    for others in (["--frames", "7"], ["--frames", "7", "--report"], ["SEED", "3", "--dry-run"]):
        with pytest.raises(
            UserError, match=r"other settings or weights \(and 2 more cells alike\)"
        ):
            sweep([sweep_file, *others])
    assert content() == before
    sweep([sweep_file, "--report"])
    assert capsys.readouterr().out.count("+10.00") == 4


def test_a_missing_video_is_told_before_anything_runs(sweep_file, tmp_path, capsys):
    (tmp_path / "a.mp4").unlink()
    sweep([sweep_file, "--dry-run"])
    assert "cannot run: tent / a / seed 0: no video at a.mp4; " in capsys.readouterr().out
    with pytest.raises(UserError, match="3 of 3 cells failed"):
        sweep([sweep_file])
    assert not list(Path("output").rglob("log.txt"))


@pytest.mark.parametrize(
    ("world", "message"),
    [
        ({"zoom": 0.5}, "sources.b.world: --zoom is 0.5; it must be at least 1"),
        ({"zoom": "wide"}, "argument --zoom: invalid float value: 'wide'; sources.b.world"),
        ({"corruption": "frog"}, "sources.b.world: "),
    ],
)
def test_a_wrong_world_is_told_before_anything_runs(tmp_path, monkeypatch, capsys, world, message):
    monkeypatch.chdir(tmp_path)
    Path("w.yaml").write_text(
        yaml.safe_dump({"sources": {"b": {"world": world}}, "rows": {"none": None}})
    )
    with pytest.raises(SystemExit) as stop:
        run_tool(lambda: sweep(["w.yaml", "--dry-run"]))
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith(f"error: {message}")
    assert [path.name for path in tmp_path.iterdir()] == ["w.yaml"]


def test_cells_without_weights_fail_at_once(sweep_file, capsys):
    with pytest.raises(UserError, match="3 of 3 cells failed"):
        sweep([sweep_file, "--weights", "gone.pth"])
    out = capsys.readouterr().out
    assert out.count("failed: ") == 3
    assert "- Failed: none / a / seed 0: no weights at gone.pth; give --weights" in out
    assert not list(Path("output").rglob("log.txt"))


def test_table1_as_a_dry_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    sweep(["table1", "--dry-run", "--weights", "val=my.pth", "--preset", "paper"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(": ")[0] for line in lines] == ["missing"] * 36 + ["cannot run"] * 36
    lines = lines[:36]
    own = [line for line in lines if "--weights my.pth" in line]
    assert own == [
        line for line in lines if " / val / " in line and not line.startswith("missing: main_task")
    ]
    assert all("--preset paper" in line for line in lines)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_real_cells(sweep_file, tiny_cfg, tiny_model, tmp_path, capsys):
    (tmp_path / "tiny.yaml").write_text(tiny_cfg.dump())
    save_safetensors(tiny_model.state_dict(), str(tmp_path / "tiny.safetensors"))
    (tmp_path / "video").mkdir()
    for index in range(2):
        pixels = np.random.default_rng(index).integers(0, 256, (48, 80, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"video/{index}.png")
    flags = ["--config", "tiny.yaml", "--weights", "tiny.safetensors", "--video-dir", "video"]
    sweep([sweep_file, *flags, "--workers", "2", "TTT.BATCH_SIZE", "2"])
    assert "| online_ttt_mae " in capsys.readouterr().out
    for method in ("none", "tent", "online_ttt_mae"):
        folder = tmp_path / f"output/sweeps/mine/cells/{method}/video/seed0"
        assert json.loads((folder / "summary.json").read_text())["complete"]
