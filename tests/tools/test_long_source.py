"""A looped video through ``--source``, and kills at a moment that a seed decides."""

from __future__ import annotations

import json
import random
from pathlib import Path

import av
import long_source
import numpy as np
import pytest
from live_servers import sending, transport_stream
from PIL import Image
from run_folders import content

from ttt_video.modeling.weights import save_safetensors

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


def whole_lines(file: Path) -> list[dict]:
    lines = file.read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def test_a_live_run_that_is_killed_twice_goes_on_and_loses_nothing_on_disk(flags, lap, tmp_path):
    out, counts, stems = tmp_path / "out", [0], set()
    kept: dict[Path, bytes] = {}
    for seed in (1, 2):
        with long_source.looped(lap, LAPS) as url:
            words = [*flags, "--source", url, "--save-every", "20", "--resume"]
            # The port is a part of the name, which has to stay.
            words += ["--register", str(named(tmp_path))]
            kill_between(counts[-1] + 30, counts[-1] + 70, seed, words, out)
        rows = whole_lines(out / "frames.jsonl")
        counts.append(len(rows))
        assert [row["frame_index"] for row in rows] == [*range(len(rows))]
        (folder,) = (out / "masks").iterdir()
        masks = sorted(folder.glob("*.png"))
        assert len(masks) >= counts[-1] - 10 * seed  # a few wait for the thread that writes them
        assert all(np.asarray(Image.open(file)).shape == (48, 80) for file in masks)
        assert all(file.read_bytes() == content for file, content in kept.items())
        kept = {file: file.read_bytes() for file in masks}
        (lines,) = (out / "unfinished").glob("*/coco.jsonl")
        now = {row["image"]["frame_index"] for row in whole_lines(lines)}
        assert stems <= now
        stems = now
    with long_source.looped(lap, 3) as url:
        more = ["--source", url, "--save-every", "20", "--max-frames", str(counts[-1] + 25)]
        words = [*flags, *more, "--resume", "--register", str(named(tmp_path))]
        process = long_source.start([*words, "--output", str(out)], tmp_path / "log")
        assert process.wait() == 0, (tmp_path / "log").read_text()
    said = (tmp_path / "log").read_text()
    assert f"stream goes on with frame {counts[-1]} and the weights of frame " in said
    rows = whole_lines(out / "frames.jsonl")
    assert [row["frame_index"] for row in rows] == [*range(counts[-1] + 25)]
    assert all(file.read_bytes() == content for file, content in kept.items())
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["complete"], summary["frames"]) == (True, len(rows))
    assert [gap["after_frame"] + 1 for gap in summary["gaps"]] == counts[1:]
    assert all(0 <= g["after_frame"] - g["weights_of_frame"] <= 20 for g in summary["gaps"])
    (file,) = (out / "coco").glob("*/semantic.json")
    images = {image["frame_index"] for image in json.loads(file.read_text())["images"]}
    assert stems | {*range(counts[-1], len(rows))} == images
    with av.open(str(out / "overlay.mp4")) as overlay:
        assert sum(1 for _ in overlay.decode(video=0)) >= len(rows) - 2 * 20
    assert not (out / "unfinished").exists()


def test_the_streams_of_a_list_go_on_after_a_kill(flags, tmp_path):
    out, listed, pictures = tmp_path / "out", tmp_path / "list.txt", transport_stream(0, 120)
    with sending(pictures) as one, sending(pictures) as two:
        listed.write_text(f"{one}\n{two}\n")
        words = [*flags, "--source", str(listed), "--save-every", "5", "--resume"]
        kill_between(30, 60, 3, words, out)
        before = [(r["video_id"], r["frame_index"]) for r in whole_lines(out / "frames.jsonl")]
        most = max(index for _, index in before) + 6
        words += ["--max-frames", str(most), "--output", str(out)]
        process = long_source.start(words, tmp_path / "log")
        assert process.wait() == 0, (tmp_path / "log").read_text()
    rows = [(r["video_id"], r["frame_index"]) for r in whole_lines(out / "frames.jsonl")]
    assert rows[: len(before)] == before
    assert sorted(rows) == sorted((url, index) for url in (one, two) for index in range(most))
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["complete"], summary["videos"]) == (True, {one: most, two: most})
    gaps = {gap["video_id"]: gap["after_frame"] for gap in summary["gaps"]}
    assert gaps == {url: max(index for name, index in before if name == url) for url in (one, two)}


def named(folder: Path) -> Path:
    """Writes a file that calls every network stream the same, whatever its port."""
    file = folder / "named.py"
    file.write_text(
        "from ttt_video.data import live_sources\n"
        "live_sources.public_name = lambda address: 'stream'\n"
    )
    return file


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
