"""A looped video through ``--source``, and kills at a moment that a seed decides."""

from __future__ import annotations

import json
import random
from functools import partial
from pathlib import Path

import av
import long_source
import numpy as np
import pytest
from live_servers import transport_stream
from PIL import Image
from run_folders import content

from ttt_video.cli import run_tool
from ttt_video.modeling.weights import save_safetensors
from ttt_video_cli import call

pytestmark = pytest.mark.slow
LAP, LAPS = 30, 10
FRAMES = LAP * LAPS
GROWTH = 40.0  # MiB; a leak of one 48x80 picture in float32 for each of 200 frames is 9


@pytest.fixture
def flags(tiny_cfg, tiny_model, tmp_path, monkeypatch) -> list[str]:
    """Flags of the tiny model, the same number of threads in every process."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    tiny_cfg.merge_from_list(["TTT.BATCH_SIZE", 1, "TTT.MICRO_BATCH_SIZE", 1])
    config, weights = tmp_path / "tiny.yaml", tmp_path / "tiny.safetensors"
    config.write_text(tiny_cfg.dump())
    save_safetensors(tiny_model.state_dict(), str(weights))
    return ["--config", str(config), "--weights", str(weights), "--save", "masks,coco"]


@pytest.fixture
def lap(tmp_path) -> Path:
    """A video of ``LAP`` pictures."""
    (tmp_path / "lap.ts").write_bytes(transport_stream(0, LAP))
    return tmp_path / "lap.ts"


def kill_between(first: int, last: int, seed: int, words: list[str], out: Path) -> int:
    """Kills a run at a random moment; returns how many rows were seen then."""
    at = random.Random(seed).randrange(first, last)
    rows = long_source.Rows(out / "frames.jsonl")
    process = long_source.start([*words, "--output", str(out)], out.with_suffix(".log"))
    assert long_source.watch(process, rows, lambda count: count < at) == -9
    assert first <= rows.count < FRAMES
    return rows.count


def test_memory_stays_and_no_frame_is_lost_over_breaks(flags, lap, tmp_path):
    out, memory = tmp_path / "out", {}

    def saw(rows: int) -> bool:
        memory[rows] = long_source.resident(process.pid)
        return True

    with long_source.looped(lap, LAPS, breaks=2) as url:
        words = [*flags, "--source", url, "--max-frames", str(FRAMES), "--method", "none"]
        words += ["--save", "confidence"]
        process = long_source.start([*words, "--output", str(out)], tmp_path / "log.txt")
        rows = long_source.Rows(out / "frames.jsonl")
        assert long_source.watch(process, rows, saw) == 0, (tmp_path / "log.txt").read_text()
    found = [json.loads(line) for line in (out / "frames.jsonl").read_text().splitlines()]
    assert [row["frame_index"] for row in found] == list(range(FRAMES))
    (folder,) = (out / "confidence").iterdir()
    # The frozen model is as sure of the same picture, so none was lost, or came twice.
    assert long_source.same_laps(folder, FRAMES, LAP) == {
        "files": FRAMES,
        "same as in lap 0": FRAMES,
    }
    assert len({file.read_bytes() for file in folder.iterdir()}) > LAP / 2
    early = max(mib for count, mib in memory.items() if 50 <= count <= 100)
    assert max(memory[count] for count in memory if count > FRAMES - 50) < early + GROWTH


def test_a_killed_live_run_leaves_whole_files_and_is_not_overwritten(flags, lap, tmp_path, capsys):
    out = tmp_path / "out"
    with long_source.looped(lap, LAPS) as url:
        count = kill_between(150, 250, 1, [*flags, "--source", url], out)
    text = (out / "frames.jsonl").read_text()
    rows = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
    assert [row["frame_index"] for row in rows] == list(range(len(rows)))
    assert len(rows) >= count
    (folder,) = (out / "masks").iterdir()
    masks = sorted(folder.glob("*.png"))
    assert len(masks) >= count - 10  # a few wait for the thread that writes them
    for number, file in enumerate(masks):
        assert file.name == f"{number:06d}.png"
        assert np.asarray(Image.open(file)).shape == (48, 80)
    (lines,) = (out / "unfinished").glob("*/coco.jsonl")
    for line in lines.read_text().splitlines(keepends=True)[:-1]:
        assert json.loads(line)["annotations"]
    (part,) = (out / "unfinished").glob("*/overlay-*.mp4")
    with av.open(str(part)) as overlay:  # 25 frames per second, and some wait for the encoder
        assert sum(1 for _ in overlay.decode(video=0)) >= count - 2 * 25 - 50
    before = {file: file.read_bytes() for file in out.rglob("*") if file.is_file()}
    with long_source.looped(lap, 1) as again:
        for more in ([], ["--resume"]):
            words = [*flags, "--source", again, "--output", str(out), *more]
            with pytest.raises(SystemExit) as end:
                run_tool(partial(call, "stream", words))
            assert end.value.code == 2
            said = capsys.readouterr().err
            assert "choose another --output" in said.splitlines()[-1]
    assert {file: file.read_bytes() for file in out.rglob("*") if file.is_file()} == before


def test_a_killed_run_on_a_looped_file_ends_with_the_same_bytes(flags, tmp_path):
    video, cut, whole = tmp_path / "loop.ts", tmp_path / "cut", tmp_path / "whole"
    video.write_bytes(transport_stream(0, 120))
    words = [*flags, "--video", str(video), "--save-every", "7"]
    for seed, (first, last) in enumerate([(10, 40), (50, 90)]):
        kill_between(first, last, seed, [*words, "--resume"], cut)
    for out in (cut, whole):
        process = long_source.start([*words, "--resume", "--output", str(out)], tmp_path / "log")
        assert process.wait() == 0, (tmp_path / "log").read_text()
    assert content(cut) == content(whole)
    assert len(list((whole / "masks" / "loop").glob("*.png"))) == 120
