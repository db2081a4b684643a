"""Figures of made-up runs, whose every frame can be told from its colour."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from kitti_layout import write_video
from PIL import Image

from ttt_video.cli import run_tool
from ttt_video.data.kitti_step import register_video_sem_seg
from ttt_video.errors import UserError
from ttt_video.report.run_figures import (
    _label_panel,
    _split_panels,
    adjacent_frames,
    draw_adjacent,
    draw_curves,
    draw_extremes,
    draw_training,
    extreme_frames,
    is_training,
    label_picture,
    read_curves,
)
from ttt_video.stream.overlay import OverlayVideos, _draw
from ttt_video.stream.results import FrameResult
from ttt_video.stream.sinks import Results
from ttt_video.visualization.legend import BACKGROUND
from ttt_video.visualization.overlay import caption, side_by_side
from ttt_video.visualization.video import VideoWriter

HEIGHT, WIDTH, NUM_FRAMES = 48, 64, 30
# Frame 21 gains most, frame 0 loses most; every frame between 1 and 29 is near a chosen one.
GAINS = {21: 9.0, 0: -8.0, 10: 3.0, 20: 8.0}


SHUFFLED = [int(index) for index in np.random.default_rng(0).permutation(NUM_FRAMES)]


def make_run(
    folder,
    method="online_ttt_mae",
    *,
    videos=("a",),
    every=1,
    dataset="",
    compare=True,
    order=range(NUM_FRAMES),
):
    folder.mkdir(parents=True)
    rows = []
    for index in order:
        for video in videos:  # several processes write
            row = {"video_id": video, "frame_index": index, "file_name": f"{video}/{index}.png"}
            row |= {"loss_recon": 1.0 / (index + 1), "metrics": {"prediction_entropy": 0.5}}
            if index % every == 0:
                row["metrics"]["mIoU"] = 40.0 + GAINS.get(index, 0.0)
                if compare:
                    row["frozen"] = {"metrics": {"mIoU": 40.0, "flicker": None}}
            rows.append(row)
    lines = [json.dumps(row) for row in rows] + ['{"video_id": "a", "frame_in']
    (folder / "frames.jsonl").write_text("\n".join(lines))
    (folder / "summary.json").write_text(json.dumps({"method": method, "dataset": dataset}))
    return folder


def write_overlay(file, height=HEIGHT, width=WIDTH, frames=range(NUM_FRAMES)):
    with VideoWriter(file, fps=10) as video:
        for index in frames:
            panels = [np.full((height, width, 3), 8 * index + k, np.uint8) for k in range(3)]
            video.write(side_by_side(panels, ["original", "frozen", "method"]))


def test_rows_are_read_in_order_and_labelled(tmp_path):
    (run,) = read_curves([make_run(tmp_path / "run", videos=("b", "a"), order=SHUFFLED)])
    assert run.label == "online_ttt_mae"
    assert run.headline == "mIoU"
    assert list(run.videos) == ["a", "b"]
    assert list(run.videos["a"]) == list(range(NUM_FRAMES))
    frame = run.videos["a"][21]
    assert frame.adapted == {"prediction_entropy": 0.5, "mIoU": 49.0, "loss_recon": 1 / 22}
    assert frame.frozen == {"mIoU": 40.0}


def test_runs_of_one_method_are_told_apart(tmp_path):
    folders = [make_run(tmp_path / x, m) for x, m in (("a", "tent"), ("b", "tent"), ("c", "none"))]
    assert [run.label for run in read_curves(folders)] == ["tent, a", "tent, b", "none"]


def test_folders_of_one_name_are_told_apart(main, tmp_path, capsys):
    """As those of a sweep are, whose runs all end in seed0."""
    folders = [make_run(tmp_path / f"cells/{x}/seed0", "tent") for x in ("a", "b", "..c")]
    assert [run.label for run in read_curves(folders)] == [
        "tent, a/seed0", "tent, b/seed0", "tent, ..c/seed0",
    ]  # fmt: skip
    for folder in folders:
        write_overlay(folder / "overlay.mp4")
    output = tmp_path / "figures"
    # The first is given twice.
    main([*map(str, folders), f"{folders[0]}/", "--output", str(output), "--extremes", "1"])
    drawn = sorted(file.name for file in output.glob("extremes-*"))
    assert len(drawn) == 3
    assert capsys.readouterr().out.count("written: ") == 3 + len(list(output.glob("*.svg")))


def test_a_registered_data_set_gives_the_labels(main, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    run = make_run(tmp_path / "run", dataset="plotted_set")
    write_overlay(run / "overlay.mp4")
    (tmp_path / "sets.py").write_text(
        "from detectron2.data import DatasetCatalog\n"
        "import pathlib\n"
        "asked = pathlib.Path(__file__).with_name('asked')\n"
        "DatasetCatalog.register('plotted_set', lambda: asked.touch() or [])\n"
    )
    try:
        main([str(run), "--output", str(tmp_path / "out"), "--register", str(tmp_path / "sets.py")])
        assert (tmp_path / "asked").exists()  # for the labels of the best and worst frames
    finally:
        DatasetCatalog.remove("plotted_set")


def test_folder_without_rows(tmp_path):
    with pytest.raises(UserError, match="has no rows of frames"):
        read_curves([tmp_path])


def test_every_number_that_is_there_is_drawn(tmp_path):
    runs = read_curves(
        [
            make_run(tmp_path / "one", videos=("a", "b/c"), every=10),
            make_run(tmp_path / "two", "tent"),
        ]
    )
    files = draw_curves(runs, tmp_path, rolling=1)
    names = {file.name.split("-")[0] for file in files}
    assert names == {"mIoU", "loss_recon", "prediction_entropy"}
    assert len(files) == 6  # of each video
    text = (tmp_path / "mIoU-a.svg").read_text()
    for label in ("frozen", "online_ttt_mae", "tent"):
        assert f"<!-- {label} -->" in text


def lines_of(file) -> list[str]:
    found = set(re.findall(r"<!-- (.*?) -->", file.read_text()))
    return sorted(label for label in found if "frozen" in label or "tent" in label)


def test_frozen_models_that_differ_are_lines_of_their_own(tmp_path):
    """Videos of many data sets have the same names."""
    first, other = make_run(tmp_path / "one"), make_run(tmp_path / "two", "tent", every=10)
    (file,) = [f for f in draw_curves(read_curves([first, other]), tmp_path) if "mIoU" in f.name]
    assert lines_of(file) == ["frozen", "tent"]
    rows = (other / "frames.jsonl").read_text().replace('"mIoU": 40.0, "fl', '"mIoU": 41.0, "fl')
    (other / "frames.jsonl").write_text(rows)
    draw_curves(read_curves([first, other]), tmp_path)
    assert lines_of(file) == ["frozen", "frozen, tent", "tent"]


def test_a_run_without_a_summary_is_not_taken_for_the_frozen_model(tmp_path):
    folder = make_run(tmp_path / "frozen")
    (folder / "summary.json").unlink()
    (run,) = read_curves([folder])
    assert run.label == "frozen, frozen"


def test_extremes_are_the_extremes_and_apart(tmp_path):
    (run,) = read_curves([make_run(tmp_path / "run")])
    extremes = extreme_frames(run, count=2)
    # 20 gains more than 10, but lies beside 21.
    assert [(e.rank, e.frame_index) for e in extremes] == [
        ("best 1", 21),
        ("best 2", 10),
        ("worst 1", 0),
    ]
    assert str(extremes[0]) == ("best 1: video a, frame 21, mIoU 40.0 frozen, 49.0 adapted (+9.0)")


def test_no_extremes_without_the_frozen_model(tmp_path):
    (run,) = read_curves([make_run(tmp_path / "run", compare=False)])
    assert extreme_frames(run) == []


@pytest.mark.slow
@pytest.mark.parametrize("order", [range(NUM_FRAMES), SHUFFLED], ids=["in time", "shuffled"])
@pytest.mark.parametrize("name", ["overlay.mp4", "overlay-a.mp4"])
@pytest.mark.parametrize(("height", "width"), [(48, 64), (32, 128), (64, 40)])
def test_pictures_of_extremes_are_the_right_frames(tmp_path, name, height, width, order):
    folder = make_run(tmp_path / "run", order=order)
    write_overlay(folder / name, height, width, order)
    (run,) = read_curves([folder])
    extremes = extreme_frames(run, count=1)
    assert draw_extremes(run, extremes, tmp_path / "out.png")
    picture = np.asarray(Image.open(tmp_path / "out.png")).astype(int)
    assert picture.shape[1] == 3 * 420  # three panels in a row, however the video has them
    half = len(picture) // 2
    for number, extreme in enumerate(extremes):
        bottom = picture[half * number + half - 20]  # below the captions
        for panel in range(3):
            center = bottom[420 * panel + 210].mean()
            assert center == pytest.approx(8 * extreme.frame_index + panel, abs=4)


@pytest.mark.parametrize(("height", "width"), [(64, 128), (60, 200), (48, 64)])
def test_parts_of_an_overlay_are_its_panels(tiny_cfg, make_video, tmp_path, height, width):
    """Also where they are stacked and have a legend, which the first one has none of."""
    frame = dict(make_video("a", 1, height=height, width=width)[0])
    scores = torch.zeros(19, height, width)
    scores[3] = 1
    both = [FrameResult(frame, {"sem_seg": scores}) for _ in range(2)]
    results = Results(*both, {})
    name = "cityscapes_fine_sem_seg_val"
    videos = OverlayVideos(tiny_cfg, tmp_path, single=True, dataset_name=name)
    shown = _draw(*videos.pictures(results), "", None)
    folder = make_run(tmp_path / "run")
    (run,) = read_curves([folder])
    picture, frozen, adapted = _split_panels(shown, run)
    assert picture.shape == frozen.shape == adapted.shape
    # Below its title each has the same: the frame, or the same classes over it, and its legend.
    title = len(caption("frozen", frozen.shape[1]))
    np.testing.assert_array_equal(frozen[title:], adapted[title:])
    assert (picture[:title, -8:] == BACKGROUND).all()
    assert not (picture[title : title + 8, -8:] == BACKGROUND).all()
    # Labels stand beside them at the same height, whatever their own size.
    labels = _label_panel(np.full((2 * height, 2 * width, 3), 7, np.uint8), picture.shape)
    assert labels.shape == picture.shape
    below = title + round(height * picture.shape[1] / width)
    assert (labels[title:below] == 7).all()
    assert (labels[below:] == BACKGROUND).all()
    # A picture with a bar between both models is not cut.
    (folder / "run.json").write_text(json.dumps({"--view": "split"}))
    (run,) = read_curves([folder])
    (whole,) = _split_panels(shown, run)
    assert whole is shown
    write_overlay(folder / "overlay.mp4")
    assert draw_extremes(run, extreme_frames(run, count=1), tmp_path / "out.png")


def test_adjacent_frames_are_those_that_adaptation_steadies_most(main, tmp_path, capsys):
    folder = make_run(tmp_path / "run", order=SHUFFLED)
    changes = {3: (9.0, 8.0), 12: (20.0, 5.0), 25: (12.0, 3.0), 0: (90.0, 0.0)}  # none before 0
    lines = (folder / "frames.jsonl").read_text().splitlines()[:-1]
    rows = [json.loads(line) for line in lines]
    for row in rows:
        frozen, adapted = changes.get(row["frame_index"], (1.0, 1.0))
        row["frozen"]["metrics"]["change"], row["metrics"]["change"] = frozen, adapted
    (folder / "frames.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_overlay(folder / "overlay.mp4", frames=SHUFFLED)
    (run,) = read_curves([folder])
    assert [pair.frame_index for pair in adjacent_frames(run, 2)] == [12, 25]
    main([str(folder), "--output", str(tmp_path / "out"), "--extremes", "0"])
    said = "frames 11 and 12: 20.0 % of the pixels change frozen, 5.0 % adapted"
    assert said in capsys.readouterr().out
    picture = np.asarray(Image.open(tmp_path / "out/adjacent-run.png")).astype(int)
    top = 4 + len(caption("video", 420)) + 4
    height = (len(picture) - top) // 3
    for column, index in enumerate((11, 12)):
        for row in range(3):
            place = top + (row + 1) * height - 30
            center = picture[place, 4 + 424 * column + 210].mean()
            assert center == pytest.approx(8 * index + row, abs=4)
    (folder / "overlay.mp4").unlink()
    assert not draw_adjacent(run, adjacent_frames(run), tmp_path / "no.png")
    (alone,) = read_curves([make_run(tmp_path / "alone", compare=False)])
    assert adjacent_frames(alone) == []


def test_no_picture_without_an_overlay(tmp_path):
    (run,) = read_curves([make_run(tmp_path / "run")])
    assert not draw_extremes(run, extreme_frames(run), tmp_path / "out.png")
    write_overlay(tmp_path / "run" / "overlay.mp4", frames=range(2))  # the run was cut off
    assert not draw_extremes(run, extreme_frames(run)[:1], tmp_path / "out.png")
    assert not (tmp_path / "out.png").exists()


@pytest.fixture
def labelled(tmp_path):
    """A registered video of one frame, whose upper half is road (0) and lower half void."""
    labels = np.zeros((HEIGHT, WIDTH), np.uint8)
    labels[HEIGHT // 2 :] = 255
    image = np.full((HEIGHT, WIDTH, 3), 100, np.uint8)
    write_video(tmp_path / "images", tmp_path / "labels", "a", [(image, labels)])
    register_video_sem_seg("figures_test", tmp_path / "images", tmp_path / "labels")
    yield DatasetCatalog.get("figures_test")[0]["file_name"]
    DatasetCatalog.remove("figures_test")
    MetadataCatalog.remove("figures_test")


def test_labels_over_their_image(labelled):
    picture = label_picture("figures_test", labelled)
    assert picture.shape == (HEIGHT, WIDTH, 3)
    np.testing.assert_array_equal(picture[0, 0], (114, 82, 114))  # half road's 128, 64, 128
    np.testing.assert_array_equal(picture[-1, 0], (50, 50, 50))
    assert label_picture("figures_test", "elsewhere.png") is None
    assert label_picture("not_registered", labelled) is None


def test_panoptic_labels(tmp_path):
    ids = np.zeros((8, 8, 3), np.uint8)
    ids[:4] = (1, 2, 3)  # id 1 + 2 * 256 + 3 * 65536
    ids[4] = (9, 0, 0)
    Image.fromarray(ids).save(tmp_path / "ids.png")
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "image.png")
    record = {
        "file_name": str(tmp_path / "image.png"),
        "pan_seg_file_name": str(tmp_path / "ids.png"),
        "segments_info": [
            {"id": 1 + 2 * 256 + 3 * 65536, "category_id": 1},
            {"id": 9, "category_id": 299},
        ],
    }
    DatasetCatalog.register("figures_panoptic", lambda: [record])
    MetadataCatalog.get("figures_panoptic").set(
        stuff_classes=[str(k) for k in range(300)],
        stuff_colors=[(2, 2, 2), (200, 100, 50), *[(40, 40, 40)] * 297, (20, 200, 60)],
    )
    try:
        picture = label_picture("figures_panoptic", record["file_name"])
    finally:
        DatasetCatalog.remove("figures_panoptic")
        MetadataCatalog.remove("figures_panoptic")
    assert tuple(picture[0, 0]) == (100, 50, 25)
    assert tuple(picture[4, 0]) == (10, 100, 30)
    assert tuple(picture[7, 0]) == (0, 0, 0)


@pytest.fixture
def training(tmp_path):
    """TensorBoard files as detectron2 writes them."""
    from torch.utils.tensorboard import SummaryWriter

    folder = tmp_path / "training"
    writer = SummaryWriter(str(folder))
    for step in range(0, 100, 10):
        parts = [np.full((16, 24, 3), value, np.uint8) for value in (10, 20, 100 + step)]
        writer.add_image("reconstruction/0", np.concatenate(parts, 1), step, dataformats="HWC")
    writer.close()
    return folder


def test_reconstruction_by_iteration(training, tmp_path):
    assert is_training(training)
    assert draw_training(training, tmp_path / "strip.png", columns=4)
    picture = np.asarray(Image.open(tmp_path / "strip.png"))
    # Columns of 240 pixels, 4 between: image, masked, and the steps 0, 30, 60, 90.
    row = picture[-30, 4 + 120 :: 244, 0]
    np.testing.assert_array_equal(row, [10, 20, 100, 130, 160, 190])


def test_training_without_reconstructions(tmp_path):
    from torch.utils.tensorboard import SummaryWriter

    SummaryWriter(str(tmp_path)).close()
    assert not draw_training(tmp_path, tmp_path / "strip.png")
    assert not is_training(tmp_path / "nowhere")


@pytest.fixture(scope="module")
def main():
    tool = Path(__file__).resolve().parents[2] / "tools" / "plot_run.py"
    spec = importlib.util.spec_from_file_location("plot_run", tool)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def test_tool_draws_what_there_is_and_says_what_is_not(main, tmp_path, training, capsys):
    run = make_run(tmp_path / "run")
    bare = make_run(tmp_path / "bare", "tent", compare=False)
    write_overlay(run / "overlay.mp4")
    output = tmp_path / "new" / "figures"
    main([str(run), str(bare), str(training), "--output", str(output), "--format", "png"])
    assert sorted(file.name for file in output.iterdir()) == [
        "extremes-run.png",
        "loss_recon-a.png",
        "mIoU-a.png",
        "prediction_entropy-a.png",
        "reconstruction-training.png",
    ]
    shown = capsys.readouterr().out
    assert "online_ttt_mae: best 1: video a, frame 21" in shown
    assert "tent: no best and worst frames without labels and --compare" in shown
    (run / "overlay.mp4").unlink()
    main([str(run), "--output", str(output)])
    assert "no pictures of frames; stream without --no-video" in capsys.readouterr().out


def test_mistakes_are_one_line(main, tmp_path, capsys):
    run = str(make_run(tmp_path / "run"))
    (tmp_path / "file").touch()
    no_method, no_names = make_run(tmp_path / "no_method"), make_run(tmp_path / "no_names")
    (no_method / "summary.json").write_text("[1]")
    (no_names / "frames.jsonl").write_text('{"video_id": "a"}\n')
    for arguments in (
        [str(tmp_path), "--output", str(tmp_path / "out")],
        [run, "--output", str(tmp_path / "file")],
        [run, "--output", str(tmp_path / "out"), "--rolling", "0"],
        [run, "--output", str(tmp_path / "out"), "--extremes", "-1"],
        [str(no_method), "--output", str(tmp_path / "out")],
        [str(no_names), "--output", str(tmp_path / "out")],
        [run, "--output", str(tmp_path / "out"), "--register", "gone.py"],
    ):
        with pytest.raises(SystemExit) as raised:
            run_tool(lambda arguments=arguments: main(arguments))
        assert raised.value.code == 2
        message = capsys.readouterr().err
        assert message.startswith("error: ")
        assert message.count("\n") == 1


def test_extremes_of_colours_have_the_original_too(tmp_path):
    """Four pictures stand 2 x 2."""
    folder = make_run(tmp_path / "run")
    rows = (folder / "frames.jsonl").read_text().replace("mIoU", "PSNR")
    (folder / "frames.jsonl").write_text(rows)
    titles = ["grey", "frozen", "method", "original"]
    with VideoWriter(folder / "overlay.mp4", fps=10) as video:
        for index in range(NUM_FRAMES):
            panels = [np.full((48, 64, 3), 8 * index + 5 * k, np.uint8) for k in range(4)]
            video.write(side_by_side(panels, titles, sides=(128, 3840)))
    (run,) = read_curves([folder])
    extremes = extreme_frames(run, count=1)[:1]
    assert draw_extremes(run, extremes, tmp_path / "out.png")
    picture = np.asarray(Image.open(tmp_path / "out.png")).astype(int)
    assert picture.shape[1] == 4 * 420
    for panel in range(4):
        center = picture[-20, 420 * panel + 210].mean()
        assert center == pytest.approx(8 * extremes[0].frame_index + 5 * panel, abs=4)
