"""The tool as a user runs it; its library is tested in tests/evaluation."""

from __future__ import annotations

import subprocess
import sys
from functools import partial
from importlib.machinery import PathFinder
from pathlib import Path

import pytest
from summaries import summary, write

from ttt_video.cli import run_tool
from ttt_video.errors import UserError
from ttt_video_cli import call

TOOL = Path(__file__).resolve().parents[2] / "tools" / "tabulate.py"
main = partial(call, "table")


def test_table_to_a_file_and_to_the_terminal(tmp_path, capsys):
    runs = write(tmp_path, summary(frozen=48.0), summary("tent"))
    file = tmp_path / "new" / "table.tex"
    main([*runs, "--output", str(file), "--format", "latex"])
    assert capsys.readouterr().out == f"written to {file}\n"
    assert r"\toprule" in file.read_text()
    main([*runs, "--protocol", "release"])
    assert "| Online TTT-MAE | 49.00 (55.4, -6.40) | 0.500 (4.1) |" in capsys.readouterr().out
    main([*runs, "--by", "video"])
    assert "| Method | 0002 | 0006 |" in capsys.readouterr().out


def test_mistakes_are_one_line(tmp_path, capsys):
    mixed = write(tmp_path, summary(), summary("tent", preset="release"))
    for arguments in (mixed, [str(tmp_path)], [mixed[0], "--output", str(tmp_path)]):
        with pytest.raises(SystemExit) as raised:
            run_tool(lambda arguments=arguments: main(arguments))
        assert raised.value.code == 2
        message = capsys.readouterr().err
        assert message.startswith("error: ")
        assert message.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize("tool", ["tabulate.py", "convert_weights.py"])
def test_makes_way_for_the_library_of_its_name(tool, tmp_path):
    # A script's own folder comes first on Python's path, and fvcore imports the library.
    flags = ["nowhere"] if tool == "tabulate.py" else ["--inspect", "nowhere"]
    command = [sys.executable, str(TOOL.parent / tool), *flags]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ")
    assert "nowhere" in done.stderr


def test_is_no_module_where_there_is_no_library(tmp_path):
    # -S: no installed packages.
    code = f"import sys; sys.path.insert(0, {str(TOOL.parent)!r}); import tabulate"
    command = [sys.executable, "-S", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert "ModuleNotFoundError: No module named 'tabulate'" in done.stderr


def test_no_other_tool_hides_a_library():
    elsewhere = [path for path in sys.path if Path(path).resolve() != TOOL.parent]
    for tool in set(TOOL.parent.glob("*.py")) - {TOOL}:
        assert PathFinder.find_spec(tool.stem, elsewhere) is None, tool.name


def test_data_sets_beside_those_of_the_papers_table_2(tmp_path, monkeypatch, capsys):
    words = ["--layout", "kitti_step", "--seed", "1700", "--videos", "2", "--frames", "3"]
    size = ["--height", "32", "--width", "64", "--output", str(tmp_path / "kitti_step")]
    call("world", [*words, *size])
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    capsys.readouterr()
    main(["kitti_step_video_sem_seg_val", "--layout", "table2", "--format", "csv"])
    lines = [line.split(",") for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == ["Data set", "Videos", "Length (s)", "Frames", "Rate (1/s)", "Classes"]
    # Two videos of 3 frames at 10 frames a second, with Cityscapes' classes.
    assert lines[1] == ["kitti_step_video_sem_seg_val", "2", "0.3", "6", "10", "19"]
    main(["kitti_step_video_sem_seg_val", "--layout", "table2"])
    table = capsys.readouterr().out
    (line,) = [line for line in table.splitlines() if "COCO Videos (published)" in line]
    assert [cell.strip() for cell in line.split("|")[2:-1]] == ["-", "350", "10,475", "10", "134"]
    main(["kitti_step_video_sem_seg_val", "--layout", "table2", "--format", "latex"])
    assert r"KITTI-STEP (published)" in capsys.readouterr().out
    for flags, reason in (
        (["nowhere"], "nowhere"),
        (["kitti_step_video_sem_seg_val", "--by", "class"], "has no metrics"),
    ):
        with pytest.raises(UserError, match=reason):
            main([*flags, "--layout", "table2"])
