"""tools/make_world.py, as a user calls it."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ttt_video.data.coco_videos import UNLABELLED
from ttt_video.data.kitti_step import load_kitti_step_sem_seg
from ttt_video.formats.images import read_rgb
from ttt_video.formats.labels import read_segment_ids, read_sem_seg
from ttt_video.world import DISTRICTS_VERSION, WorldVideo, render_still
from ttt_video.world.corruptions import corrupt
from ttt_video.world.segments import coco_segment_ids

TOOL = Path(__file__).parents[2] / "tools" / "make_world.py"
SIZE = ["--height", "16", "--width", "32"]


@pytest.fixture
def make_world(monkeypatch, capsys):
    """Runs the tool in this process; returns the exit code and stderr without progress bars."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", [str(TOOL), *map(str, arguments)])
        code = 0
        try:
            runpy.run_path(str(TOOL), run_name="__main__")
        except SystemExit as stopped:
            code = stopped.code
        return code, capsys.readouterr().err

    return run


@pytest.mark.slow
def test_in_a_process_of_its_own(tmp_path):
    command = [TOOL, "--frames", 1, *SIZE, "--output", tmp_path / "world"]
    done = subprocess.run([sys.executable, *map(str, command)], check=True, capture_output=True)
    assert done.stdout.decode() == f"written to {tmp_path / 'world'}\n"
    assert (tmp_path / "world" / "images" / "val" / "0000" / "000000.png").is_file()


def test_videos_and_restart(tmp_path, make_world):
    output = tmp_path / "a" / "world"
    command = ["--seed", 2000, "--videos", 2, "--frames", 3, "--corruption", "fog"]
    command += ["--severity", 4, "--schedule", "ramp", *SIZE, "--output", output]
    assert make_world(*command)[0] == 0
    roots = output / "images" / "val", output / "panoptic_maps" / "val"
    dicts = load_kitti_step_sem_seg(*roots)
    assert [d["image_id"] for d in dicts] == [f"{k:04d}/{t:06d}" for k in (0, 1) for t in range(3)]
    for d in dicts:
        seed, t = 2000 + int(d["video_id"]), d["frame_index"]
        frame = WorldVideo(seed, 3, 16, 32)[t]
        shifted = corrupt(frame.image, "fog", 2.0 * t, seed, t, frame.depth)
        np.testing.assert_array_equal(read_rgb(d["file_name"]), shifted)
        np.testing.assert_array_equal(read_sem_seg(d), frame.sem_seg)

    kept = roots[0] / "0001" / "000000.png"
    lost = roots[0] / "0001" / "000002.png"
    before, time = lost.read_bytes(), kept.stat().st_mtime_ns
    lost.unlink()
    assert make_world(*command)[0] == 0
    assert lost.read_bytes() == before
    assert kept.stat().st_mtime_ns == time

    code, error = make_world("--frames", 4, *SIZE, "--output", output)
    assert code == 2
    assert "other settings" in error
    assert json.loads((output / "world.json").read_text())["seed"] == 2000


def test_scenes(tmp_path, make_world):
    flags = ["--frames", 1, *SIZE, "--scenes", "park", "--output", tmp_path / "out"]
    assert make_world(*flags)[0] == 0
    picture = read_rgb(tmp_path / "out" / "images" / "val" / "0000" / "000000.png")
    np.testing.assert_array_equal(picture, WorldVideo(2000, 1, 16, 32, ["park"])[0].image)


def test_districts(tmp_path, make_world):
    flags = ["--frames", 1, *SIZE, "--districts", "--output", tmp_path / "out"]
    assert make_world(*flags)[0] == 0
    picture = read_rgb(tmp_path / "out" / "images" / "val" / "0000" / "000000.png")
    expected = WorldVideo(2000, 1, 16, 32, districts=True)[0].image
    np.testing.assert_array_equal(picture, expected)
    note = json.loads((tmp_path / "out" / "world.json").read_text())
    assert note["districts_version"] == DISTRICTS_VERSION
    # A folder without districts has the note it always had.
    assert make_world("--frames", 1, *SIZE, "--output", tmp_path / "plain")[0] == 0
    assert not [k for k in json.loads((tmp_path / "plain/world.json").read_text()) if "dist" in k]


def test_zoom(tmp_path, make_world):
    flags = ["--frames", 1, *SIZE, "--zoom", 4, "--output", tmp_path / "out"]
    assert make_world(*flags)[0] == 0
    picture = read_rgb(tmp_path / "out" / "images" / "val" / "0000" / "000000.png")
    np.testing.assert_array_equal(picture, WorldVideo(2000, 1, 16, 32, zoom=4.0)[0].image)
    assert json.loads((tmp_path / "out" / "world.json").read_text())["zoom"] == 4
    stills = ["--layout", "coco", "--train", 1, "--val", 1, *SIZE, "--zoom", 4]
    assert make_world(*stills, "--output", tmp_path / "coco")[0] == 0
    (label,) = (tmp_path / "coco" / "panoptic_val2017").iterdir()
    expected = coco_segment_ids(render_still(1000, 16, 32, zoom=4.0))
    expected[expected == UNLABELLED << 16] = 0
    np.testing.assert_array_equal(read_segment_ids(label), expected)
    # A folder without a zoom has the note it always had.
    assert make_world("--frames", 1, *SIZE, "--output", tmp_path / "plain")[0] == 0
    assert "zoom" not in json.loads((tmp_path / "plain" / "world.json").read_text())


def test_two_corruptions_in_one_video(tmp_path, make_world):
    flags = ["--frames", 4, *SIZE, "--corruption", "colour_shift", "darkness"]
    assert make_world(*flags, "--schedule", "switch", "--output", tmp_path / "out")[0] == 0
    for t, name in enumerate(["colour_shift", "colour_shift", "darkness", "darkness"]):
        picture = read_rgb(tmp_path / "out" / "images" / "val" / "0000" / f"{t:06d}.png")
        clean = WorldVideo(2000, 4, 16, 32)[t].image
        np.testing.assert_array_equal(picture, corrupt(clean, name, 3.0, 2000, t))


def test_families_are_dealt_out_to_the_videos(tmp_path, make_world):
    flags = ["--frames", 2, *SIZE, "--videos", 2, "--corruption", "colour_shift", "darkness"]
    flags += ["low_contrast", "impulse_noise", "--each", 2, "--schedule", "switch"]
    assert make_world(*flags, "--output", tmp_path / "out")[0] == 0
    for k, names in enumerate([("colour_shift", "impulse_noise"), ("low_contrast", "darkness")]):
        for t, name in enumerate(names):
            picture = read_rgb(tmp_path / f"out/images/val/{k:04d}/{t:06d}.png")
            clean = WorldVideo(2000 + k, 2, 16, 32)[t].image
            np.testing.assert_array_equal(picture, corrupt(clean, name, 3.0, 2000 + k, t))


def test_names_and_rgb_labels(tmp_path, make_world):
    flags = ["--videos", 2, "--frames", 1, *SIZE, "--names", "0002", "0006", "--rgb-labels"]
    assert make_world(*flags, "--output", tmp_path / "out")[0] == 0
    maps = tmp_path / "out" / "panoptic_maps" / "val"
    assert sorted(str(p.relative_to(maps)) for p in maps.glob("*/*.png")) == [
        "0002/000000.png", "0002/000000_sem.png", "0006/000000.png", "0006/000000_sem.png"
    ]  # fmt: skip


def test_coco_videos(tmp_path, make_world):
    flags = ["--layout", "coco_videos", "--seed", 2007, "--frames", 2, "--corruption", "darkness"]
    assert make_world(*flags, *SIZE, "--output", tmp_path / "out")[0] == 0
    picture = read_rgb(tmp_path / "out" / "raw_images" / "world2007" / "world2007_2.png")
    frame = WorldVideo(2007, 2, 16, 32)[1]
    np.testing.assert_array_equal(picture, corrupt(frame.image, "darkness", 3, 2007, 1))
    assert (tmp_path / "out" / "annotations" / "train" / "world2007.json").is_file()


@pytest.mark.parametrize(
    ("layout", "train", "val"),
    [
        ("cityscapes", "leftImg8bit/train/worldtrain", "leftImg8bit/val/worldval"),
        ("coco", "train2017", "val2017"),
    ],
)
def test_stills(tmp_path, make_world, layout, train, val):
    command = ["--layout", layout, "--train", 3, "--val", 2, *SIZE, "--output", tmp_path / "out"]
    assert make_world(*command)[0] == 0
    assert [len(list((tmp_path / "out" / f).iterdir())) for f in (train, val)] == [3, 2]
    before = {p: p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()}
    next((tmp_path / "out" / val).iterdir()).unlink()
    assert make_world(*command)[0] == 0
    assert {p: p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()} == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--corruption", "sleet"], "unknown corruption 'sleet'"),
        (["--corruption", "fog", "--severity", "6"], "severity is 6.0"),
        (["--corruption", "fog", "night"], "the schedule constant takes one corruption, not 2"),
        (["--schedule", "switch"], "the schedule switch needs at least two corruptions"),
        (["--frames", "0"], "--frames is 0; it must be at least 1"),
        (["--videos", "-1"], "--videos is -1"),
        (["--height", "8"], "--height is 8; it must be at least 16"),
        (["--seed", "-3"], "--seed is -3"),
        (["--zoom", "0.5"], "--zoom is 0.5; it must be at least 1"),
        (["--zoom", "inf"], "--zoom is inf; it must be finite"),
        (["--zoom", "nan"], "--zoom is nan; it must be at least 1"),
        (["--train", "3"], "--train does not go with --layout kitti_step"),
        (["--layout", "coco", "--videos", "3"], "--videos does not go with --layout coco"),
        (["--scenes", "street", "beach"], "scenes are street, beach; choose some of: street"),
        (["--layout", "coco", "--scenes", "park"], "--scenes does not go with --layout coco"),
        (["--layout", "coco", "--districts"], "--districts does not go with --layout coco"),
        (["--districts", "--scenes", "park"], "--scenes does not go with --districts"),
        (["--layout", "coco", "--corruption", "fog"], "--corruption does not go with"),
        (["--layout", "coco_videos", "--rgb-labels"], "--rgb-labels does not go with"),
        (["--layout", "cityscapes", "--val", "0"], "--val is 0; it must be at least 1"),
        (["--videos", "2", "--names", "a", "a"], "--names gives 1 names, --videos is 2"),
        (["--names", "../a"], "a name is that of a folder, not a path"),
        (["--names", ".."], "a name is that of a folder, not a path"),
        (["--names", ""], "a name is that of a folder, not a path"),
    ],
)
def test_bad_arguments(tmp_path, make_world, arguments, message):
    output = tmp_path / "out"
    code, error = make_world(*arguments, "--output", output)
    assert code == 2
    assert message in error
    assert error.count("\n") == 1
    assert not output.exists()


def test_folders_of_others_are_left_alone(tmp_path, make_world):
    (tmp_path / "thesis.txt").write_text("precious")
    code, error = make_world("--frames", 1, *SIZE, "--output", tmp_path)
    assert code == 2
    assert error.startswith("error: ")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
