"""Runs on disk: what a killed process leaves behind, and what other processes write beside it."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import pickle
import shutil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ttt_video.errors import UserError
from ttt_video.files import file_stem
from ttt_video.stream.directory import RunDirectory
from ttt_video.stream.frame_ranges import FrameRanges
from ttt_video.stream.records import finite


def row(index: int, video: str = "a", **more) -> dict:
    return {"video_id": video, "frame_index": index, **more}


def lines(path) -> list[str]:
    return (path / "frames.jsonl").read_text(encoding="utf-8").splitlines()


def test_rows_are_on_disk_as_they_happen(tmp_path):
    run = RunDirectory(tmp_path / "deep" / "run")
    for index in range(3):
        run.append(row(index, note="é\n\u2028"))
        # Read back through the file, while the run is still open.
        assert [json.loads(line)["frame_index"] for line in lines(run.path)] == [*range(index + 1)]
    assert list(run.rows()) == [row(i, note="é\n\u2028") for i in range(3)]
    run.close()


def test_knows_the_frames_it_has(tmp_path):
    run = RunDirectory(tmp_path)
    run.append(row(3, "b"))
    assert run.has("b", 3)
    assert not run.has("b", 2)
    assert not run.has("a", 3)


def test_a_folder_with_other_files_will_do(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    RunDirectory(tmp_path).close()
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_an_existing_run_is_refused_and_kept(tmp_path):
    run = RunDirectory(tmp_path)
    run.append(row(0))
    run.close()
    before = (tmp_path / "frames.jsonl").read_bytes()
    with pytest.raises(UserError, match=r"already holds a run.*--resume.*--output"):
        RunDirectory(tmp_path)
    assert (tmp_path / "frames.jsonl").read_bytes() == before


def test_a_run_that_never_got_to_a_frame_is_not_in_the_way(tmp_path):
    RunDirectory(tmp_path).close()
    run = RunDirectory(tmp_path)
    run.append(row(0))
    assert run.has("a", 0)


def test_resuming_appends(tmp_path):
    run = RunDirectory(tmp_path)
    run.append(row(0))
    run.append(row(0, "b"))
    run.close()
    run = RunDirectory(tmp_path, resume=True)
    assert run.has("a", 0)
    assert run.has("b", 0)
    run.append(row(1))
    run.close()
    assert [(r["video_id"], r["frame_index"]) for r in run.rows()] == [("a", 0), ("b", 0), ("a", 1)]


def test_resuming_what_is_not_there_starts_it(tmp_path):
    run = RunDirectory(tmp_path / "new", resume=True)
    assert list(run.rows()) == []
    run.append(row(0))


@pytest.mark.parametrize("torn", ['{"video_id": "a", "frame_ind', "{", '{"video_id": "é'])
def test_half_a_row_at_the_end_is_dropped_and_written_anew(tmp_path, torn):
    run = RunDirectory(tmp_path)
    run.append(row(0))
    run.append(row(1))
    run.close()
    whole = (tmp_path / "frames.jsonl").read_bytes()
    # A process may be killed within a character of several bytes.
    (tmp_path / "frames.jsonl").write_bytes(whole + torn.encode()[: len(torn)])
    run = RunDirectory(tmp_path, resume=True)
    assert (tmp_path / "frames.jsonl").read_bytes() == whole
    assert run.has("a", 1)
    assert not run.has("a", 2)
    run.append(row(2))
    run.close()
    assert [r["frame_index"] for r in run.rows()] == [0, 1, 2]


def test_every_way_to_be_cut_off_can_be_resumed(tmp_path):
    run = RunDirectory(tmp_path / "whole")
    for index in range(3):
        run.append(row(index))
    run.close()
    content = (tmp_path / "whole" / "frames.jsonl").read_bytes()
    for length in range(len(content) + 1):
        cut = tmp_path / f"cut{length}"
        cut.mkdir()
        (cut / "frames.jsonl").write_bytes(content[:length])
        run = RunDirectory(cut, resume=True)
        assert len(list(run.rows())) == content[:length].count(b"\n")
        for index in range(3):
            if not run.has("a", index):
                run.append(row(index))
        run.close()
        assert (cut / "frames.jsonl").read_bytes() == content


def test_output_that_is_a_file_or_cannot_be_made(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(UserError, match="is a file"):
        RunDirectory(file)
    with pytest.raises(UserError, match="file/below"):
        RunDirectory(file / "below")


def test_rows_of_two_configs_are_not_mixed(tmp_path):
    run = RunDirectory(tmp_path)
    config = "A:\n  LR: 0.1\n  NAME: x\nSEED: 0\n"
    run.claim(config, {"weights": "1f"})
    run.append(row(0))
    run.close()
    run = RunDirectory(tmp_path, resume=True)
    run.claim(config, {"weights": "1f"})
    with pytest.raises(UserError, match=r"another config \(A.LR: 0.1, now 0.2, NEW: None, now 1\)"):
        run.claim("A:\n  LR: 0.2\n  NAME: x\nSEED: 0\nNEW: 1\n", {"weights": "1f"})
    with pytest.raises(UserError, match=r"another setting \(weights: .1f., now .2e.\)"):
        run.claim(config, {"weights": "2e"})
    assert (tmp_path / "config.yaml").read_text() == config
    assert json.loads((tmp_path / "run.json").read_text()) == {"weights": "1f"}


def test_the_config_of_a_run_without_rows_may_change(tmp_path):
    RunDirectory(tmp_path).claim("SEED: 0\n", {})
    RunDirectory(tmp_path).claim("SEED: 1\n", {})
    assert (tmp_path / "config.yaml").read_text() == "SEED: 1\n"


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_json_on_disk_is_json(tmp_path, value):
    run = RunDirectory(tmp_path)
    with pytest.raises(ValueError, match="JSON"):
        run.append(row(0, loss_recon=value))
    assert lines(tmp_path) == []
    run.append(row(0, **finite({"loss_recon": value, "grad_norm": 2.0})))
    assert json.loads(lines(tmp_path)[0])["loss_recon"] is None
    assert json.loads(lines(tmp_path)[0])["grad_norm"] == 2.0


def test_whole_files_appear_at_once(tmp_path, monkeypatch):
    run = RunDirectory(tmp_path)
    run.write_json("summary.json", {"frames": 1})
    assert json.loads((tmp_path / "summary.json").read_text()) == {"frames": 1}

    def killed(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            run.write_json("summary.json", {"frames": 2})
    assert json.loads((tmp_path / "summary.json").read_text()) == {"frames": 1}
    run.write_json("summary.json", {"frames": 3})
    assert json.loads((tmp_path / "summary.json").read_text()) == {"frames": 3}
    assert sorted(os.listdir(tmp_path)) == ["frames.jsonl", "summary.json"]


def test_torn_rows_in_the_middle_are_dropped_and_others_kept_as_they_are(tmp_path):
    """One of several processes was killed while writing, another went on."""
    kept = ['{"video_id": "a",  "frame_index": 0}\n', '{"frame_index":1, "video_id":"b"}\n']
    torn = ['{"video_id": "a", "fra{"video_id": "b", "frame_index": 0}\n', "\n", "\0\0\n"]
    (tmp_path / "frames.jsonl").write_text(kept[0] + "".join(torn) + kept[1] + '{"video_i')
    run = RunDirectory(tmp_path, resume=True)
    assert (tmp_path / "frames.jsonl").read_text() == "".join(kept)
    assert [list(run.recorded(video)) for video in "abc"] == [[0], [1], []]


@given(st.lists(st.text(max_size=80), unique=True, max_size=6))
def test_different_videos_have_different_file_names(video_ids):
    video_ids += ["a/b", "a_b", "a b", "", ".", "..", "x" * 300, "x" * 301, "é" * 100]
    video_ids = list(dict.fromkeys(video_ids))
    stems = [file_stem(video_id) for video_id in video_ids]
    assert len(set(stems)) == len(stems)
    for stem in stems:
        assert len(f".overlay-{stem}.mp4.12345678.part".encode()) <= 255
        assert stem.strip(".")
        assert not set(stem) & set("/\\\0 \n")
    assert file_stem("a_b-0.c") == "a_b-0.c"


def test_two_processes_do_not_run_into_one_folder(tmp_path):
    run = RunDirectory(tmp_path, resume=True)
    with pytest.raises(UserError, match="another process is writing"):
        RunDirectory(tmp_path, resume=True)
    helper = pickle.loads(pickle.dumps(run))
    run.close()
    with pytest.raises(UserError, match="another process is writing"):
        RunDirectory(tmp_path, resume=True)
    helper.close()
    RunDirectory(tmp_path, resume=True).close()


def _append(run: RunDirectory, video: str, count: int) -> None:
    for index in range(count):
        run.append(row(index, video, padding=video * 5000))


def test_processes_append_whole_rows(tmp_path):
    run = RunDirectory(tmp_path)
    context = multiprocessing.get_context("fork")  # spawn would import PyTorch three times
    processes = [context.Process(target=_append, args=(run, v, 60)) for v in "abc"]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    rows = [json.loads(line) for line in lines(tmp_path)]
    assert len(rows) == 180
    for video in "abc":
        own = [r for r in rows if r["video_id"] == video]
        assert [r["frame_index"] for r in own] == [*range(60)]
        assert all(r["padding"] == video * 5000 for r in own)


def test_a_full_disk_is_told_in_a_line(tmp_path, monkeypatch):
    run = RunDirectory(tmp_path)

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(UserError, match=r"cannot write .*frames.jsonl: No space left"):
        run.append(row(0))
    monkeypatch.setattr(os, "write", lambda *_: 3)
    with pytest.raises(UserError, match="only a part of a row"):
        run.append(row(0))
    assert not run.has("a", 0)


def test_which_videos_are_complete(tmp_path):
    run = RunDirectory(tmp_path)
    for index in range(9):
        run.append(row(index))
    for index in range(5):
        run.append(row(index, "b"))
    assert not run.is_complete("a", 10)
    run.end_video("a", frames=4, total=10, skipped=["x.png"], complete=False)
    assert not run.is_complete("a", 10)
    run.end_video("a", frames=9, total=10, skipped=["x.png"], complete=True)
    assert run.is_complete("a", 10)
    assert run.is_complete("a", 3)
    assert not run.is_complete("a", 11)  # more is wanted now
    assert not run.is_complete("a", None)
    assert not run.is_complete("b", 10)
    run.end_video("b", frames=5, total=None, skipped=[], complete=True)
    assert run.is_complete("b", None)
    assert run.is_complete("b", 3)
    assert run.videos()["a"]["skipped_frames"] == ["x.png"]
    assert len((tmp_path / "videos.jsonl").read_text().splitlines()) == 3
    run.close()
    frames = (tmp_path / "frames.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "frames.jsonl").write_text("".join(["garbled\n", *frames[1:]]))
    run = RunDirectory(tmp_path, resume=True)
    assert not run.is_complete("a", 10)  # a row is lost
    assert run.is_complete("b", None)


@given(st.lists(st.integers(-3, 12) | st.integers(-(2**63), 2**63 - 2)))
def test_ranges_are_a_set_of_indices(indices):
    ranges = FrameRanges()
    for index in indices:
        ranges.add(index)
    expected = sorted(set(indices))
    assert list(ranges) == expected
    assert len(ranges) == len(expected)
    assert all(index in ranges for index in indices)
    assert not any(index in ranges for index in {*range(-5, 15)} - {*indices})
    borders = [border for pair in ranges.ranges() for border in pair]
    assert sorted(set(borders)) == borders  # none is empty, none touches another
    assert ranges.covers(ranges.ranges())
    assert not any(ranges.covers([(start, stop + 1)]) for start, stop in ranges.ranges())


def test_what_is_known_of_frames_takes_no_more_room_for_large_indices(tmp_path):
    """A clock's milliseconds: a byte for each would be two terabytes."""
    run = RunDirectory(tmp_path)
    indices = [1_764_000_000_000 + 40 * k for k in range(3)]
    for index in indices:
        run.append(row(index))
    run.close()
    run = RunDirectory(tmp_path, resume=True)
    assert list(run.recorded("a")) == indices
    assert not run.has("a", indices[0] + 1)


SOURCES = {"a": [[0, "0.png", 5, "ab", None], [1, "1.png", 6, None, None]], "camera": None}


def resumed(path, sources):
    run = RunDirectory(path, resume=True)
    run.claim("SEED: 0\n", {}, sources)
    run.close()


def test_rows_of_two_videos_are_not_mixed(tmp_path):
    run = RunDirectory(tmp_path)
    run.claim("SEED: 0\n", {}, SOURCES)
    run.append(row(0))
    run.append(row(7, "camera"))
    run.close()
    resumed(tmp_path, SOURCES)
    resumed(tmp_path, {**SOURCES, "b": [[0, "x.png", 1, "cd", None]]})  # one more
    resumed(tmp_path, {**SOURCES, "b": [[0, "y.png", 1, "cd", None]]})  # it has no rows yet
    message = r"is of another video 'a' \(1.png is gone; 2 files, now 1\)"
    with pytest.raises(UserError, match=message):
        resumed(tmp_path, {**SOURCES, "a": SOURCES["a"][:1]})
    with pytest.raises(UserError, match="has frames of video 'camera', which is not among"):
        resumed(tmp_path, {"a": SOURCES["a"]})
    mended = [SOURCES["a"][0], [1, "1.png", 9, None, None]]  # no frame that was run
    resumed(tmp_path, {**SOURCES, "a": mended})
    (tmp_path / "sources.json").unlink()  # as an earlier version left it
    resumed(tmp_path, {**SOURCES, "a": SOURCES["a"][:1]})


GARBLED = ["", "]", "[1]", "\0\1", '"a"', "a: [", "{", "\udcff"]


@pytest.mark.parametrize("name", ["config.yaml", "run.json", "sources.json"])
@pytest.mark.parametrize("text", GARBLED)
def test_a_damaged_file_is_one_line_and_stays(tmp_path, name, text):
    run = RunDirectory(tmp_path)
    run.claim("SEED: 0\n", {}, SOURCES)
    run.append(row(0))
    run.close()
    garbled = text.encode("utf-8", "surrogateescape")
    (tmp_path / name).write_bytes(garbled)
    with pytest.raises(UserError, match=rf"{name} is damaged, .* --output") as error:
        resumed(tmp_path, {**SOURCES})
    assert "\n" not in str(error.value)
    assert (tmp_path / name).read_bytes() == garbled


@pytest.mark.parametrize("rows", [5, [7], [[0, "0.png"]], [[0, "0.png", 5, "ab"]] * 2, "01"])
def test_a_damaged_list_of_files_is_one_line(tmp_path, rows):
    run = RunDirectory(tmp_path)
    run.claim("SEED: 0\n", {}, SOURCES)
    run.append(row(0))
    run.close()
    (tmp_path / "sources.json").write_text(json.dumps({"a": rows}))
    with pytest.raises(UserError, match=r"sources.json is damaged|is of another video"):
        resumed(tmp_path, {"a": SOURCES["a"]})


STRANGE = ["5", "[]", "{}", '"a"', '{"video_id": "a"}', '{"video_id": 1, "frame_index": 0}',
           '{"video_id": "a", "frame_index": true}', '{"video_id": "a", "frame_index": 0.5}',
           '{"video_id": "a", "frame_index": 9223372036854775808}']  # fmt: skip


@pytest.mark.parametrize("line", STRANGE)
def test_json_that_is_no_row_is_one_line_and_stays(tmp_path, line):
    text = f'{{"video_id": "a", "frame_index": 0}}\n{line}\n'
    (tmp_path / "frames.jsonl").write_text(text)
    with pytest.raises(UserError, match=r"frames.jsonl has in line 2 something else than a row"):
        RunDirectory(tmp_path, resume=True)
    assert (tmp_path / "frames.jsonl").read_text() == text
    (tmp_path / "frames.jsonl").write_text("")
    (tmp_path / "videos.jsonl").write_text(f"{line}\n")
    run = RunDirectory(tmp_path, resume=True)
    with pytest.raises(UserError, match=r"videos.jsonl has in line 1 something else than a row"):
        run.is_complete("a", 1)


def test_a_folder_that_is_removed_under_a_run_is_one_line(tmp_path):
    run = RunDirectory(tmp_path / "run")
    run.append(row(0))
    shutil.rmtree(tmp_path / "run")
    for again in (False, True):
        if again:
            (tmp_path / "run").mkdir()  # as another run might
        with pytest.raises(UserError, match="run was removed or replaced"):
            run.append(row(1))
        with pytest.raises(UserError, match="run was removed or replaced"):
            run.write_text("summary.json", "")
    assert not list((tmp_path / "run").iterdir())


def test_what_killed_processes_were_writing_is_removed(tmp_path):
    run = RunDirectory(tmp_path)
    run.append(row(0))
    run.close()
    unfinished = run.unfinished("a")
    unfinished.mkdir(parents=True)
    leftovers = [tmp_path / ".summary.json.99999999.part", unfinished / ".state.pth.99999999.part"]
    for file in leftovers:
        file.write_text("half")
    (unfinished / "state.pth").write_text("whole")
    RunDirectory(tmp_path, resume=True).close()
    assert [file.exists() for file in leftovers] == [False, False]
    assert (unfinished / "state.pth").read_text() == "whole"
