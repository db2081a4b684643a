"""Sweep files, their cells, tables, workers and figures; the tool itself is in tests/tools."""

from __future__ import annotations

import copy
import csv
import io
import json
import math
import re
import shutil
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from detectron2.utils.file_io import PathManager
from matplotlib.image import imread
from processes import stand_in

from ttt_video.adaptation import timed_as
from ttt_video.config import DEFAULT_STREAM_CONFIG, load_config
from ttt_video.data.fingerprint import fingerprint_file
from ttt_video.data.sources import FolderSource, FrameTransform
from ttt_video.errors import UserError
from ttt_video.report import published, sweep_figures
from ttt_video.report.formats import to_markdown
from ttt_video.report.metrics import headlines
from ttt_video.report.sweep_figures import draw_figures
from ttt_video.report.sweep_tables import (
    add_gains,
    cell_record,
    comparable,
    metric_columns,
    results_table,
    to_csv,
)
from ttt_video.shipped import config_dir
from ttt_video.sweeps import workers as sweep_workers
from ttt_video.sweeps.cells import read_sweep
from ttt_video.sweeps.checks import check_cells, check_folders, without_files
from ttt_video.sweeps.entries import FIGURE_KEYS, ROW_KEYS, SOURCE_KEYS, SWEEP_KEYS
from ttt_video.sweeps.workers import finished, run_cell, run_local, run_on_cluster
from ttt_video.tasks import rules

KEEP = FrameTransform(min_size=0)
METRICS = headlines()
RULES = rules(["mIoU", "mIoU_frame_release", "predicted_classes_mean", "prediction_entropy_mean"])
SPEC = {
    "config": "quick/stream_world.yaml",
    "frames": 3,
    "seeds": [0, 1],
    "settings": {"TTT.BATCH_SIZE": 2},
    "sources": {"street": {"video": "street.mp4"}, "kitti": {"dataset": "some_set"}},
    "rows": {
        "none": None,
        "online_ttt_mae": {"settings": {"TTT.WINDOW_SIZE": [1, 4], "TTT.SAMPLING": "x"}},
    },
}


@pytest.fixture
def sweep_of(tmp_path):
    """``sweep_of(**entries)``: the sweep of SPEC with other entries (own_quick: its quick)."""

    def make(overrides=(), replace=None, quick=False, weights_of=None, **entries):
        entries = {k.removeprefix("own_"): v for k, v in entries.items()}
        spec = {k: v for k, v in {**SPEC, **entries}.items() if v is not ...}
        path = tmp_path / "sweep.yaml"
        path.write_text(yaml.safe_dump(spec, sort_keys=False))
        flags = {"overrides": overrides, "replace": replace, "weights": weights_of, "quick": quick}
        return read_sweep(path, tmp_path / "out", **flags)

    return make


def test_cells_are_rows_by_settings_by_sources_by_seeds(sweep_of, tmp_path):
    sweep = sweep_of()
    assert len(sweep.cells) == 3 * 2 * 2
    assert list(dict.fromkeys(cell.row for cell in sweep.cells)) == [
        "none", "online_ttt_mae, WINDOW_SIZE=1", "online_ttt_mae, WINDOW_SIZE=4",
    ]  # fmt: skip
    assert sweep.baseline == "none"
    cell = sweep.cells[-1]
    assert (cell.source, cell.seed, cell.method) == ("kitti", 1, "online_ttt_mae")
    assert cell.folder == tmp_path / "out/cells/online_ttt_mae__WINDOW_SIZE=4/kitti/seed1"
    expected = (
        "--dataset some_set --config quick/stream_world.yaml --method online_ttt_mae --no-video "
        "--max-frames 3 TTT.BATCH_SIZE 2 TTT.WINDOW_SIZE 4 TTT.SAMPLING x SEED 1"
    )
    assert " ".join(cell.arguments) == expected
    assert len({cell.folder for cell in sweep.cells}) == 12


def test_rows_go_before_sources_and_those_before_the_sweep(sweep_of):
    sweep = sweep_of(
        overrides=["TTT.MASK_RATIO", "0.5"],
        seeds=[0],
        compare=True,
        preset="paper",
        weights="sweep.pth",
        sources={
            "a": {"video-dir": "a", "weights": "source.pth", "settings": {"TTT.BATCH_SIZE": 8}},
            "b": {"video": "b", "config": "source.yaml"},
        },
        settings=...,
        rows={"x": {"method": "none", "weights": "row.pth"}, "none": None},
    )
    lines = [" ".join(cell.arguments) for cell in sweep.cells]
    tail = "--no-video --max-frames 3 --compare"
    end = "SEED 0 TTT.MASK_RATIO 0.5"
    assert lines == [
        f"--video-dir a --config quick/stream_world.yaml --preset paper --weights row.pth "
        f"--method none {tail} TTT.BATCH_SIZE 8 {end}",
        f"--video b --config source.yaml --preset paper --weights row.pth --method none {tail} "
        f"{end}",
        f"--video-dir a --config quick/stream_world.yaml --preset paper --weights source.pth "
        f"--method none {tail} TTT.BATCH_SIZE 8 {end}",
        f"--video b --config source.yaml --preset paper --weights sweep.pth --method none {tail} "
        f"{end}",
    ]
    assert sweep.baseline == "x"


def test_worlds_are_rendered_to_where_their_data_set_is_looked_for(sweep_of, tmp_path):
    world = {"seed": 7, "corruption": ["fog", "none"], "rgb-labels": True, "frames": 2}
    sweep = sweep_of(sources={"w": {"world": world}, "c": {"world": {"layout": "coco_videos"}}})
    assert " ".join(sweep.worlds[0].arguments) == (
        "--seed 7 --corruption fog none --rgb-labels --frames 2"
    )
    assert sweep.worlds[0].folder == tmp_path / "out/videos/w/kitti_step"
    assert sweep.cells[0].arguments[:2] == ["--dataset", "kitti_step_video_sem_seg_val"]
    assert sweep.cells[0].environment == {"DETECTRON2_DATASETS": str(tmp_path / "out/videos/w")}
    assert sweep.worlds[1].folder == tmp_path / "out/videos/c/coco_videos"
    assert "coco_videos_panoptic_all" in sweep.cells[2].arguments


def test_a_row_for_some_sources(sweep_of):
    rows = {"none": None, "self_train": {"sources": ["kitti"]}}
    sweep = sweep_of(rows=rows, seeds=[0])
    assert [(c.name, c.source) for c in sweep.cells] == [
        ("none", "street"), ("none", "kitti"), ("self_train", "kitti"),
    ]  # fmt: skip
    sweep = sweep_of(rows=rows, seeds=[0], replace={"sources": {"mine": {"video": "mine.mp4"}}})
    assert [(c.name, c.source) for c in sweep.cells] == [("none", "mine"), ("self_train", "mine")]


def test_a_rows_own_seeds(sweep_of):
    sweep = sweep_of(rows={"none": {"seeds": [7]}, "tent": None}, sources={"a": {"video": "x"}})
    assert [(c.name, c.seed) for c in sweep.cells] == [("none", 7), ("tent", 0), ("tent", 1)]


def test_the_shorter_form_of_a_file(sweep_of):
    quick = {"seeds": [3], "frames": 1, "rows": {"none": None}}
    assert len(sweep_of(own_quick=quick).cells) == 12
    with pytest.raises(UserError, match="no entry quick"):
        sweep_of(quick=True)
    short = sweep_of(quick=True, own_quick=quick)
    assert [(c.name, c.source, c.seed) for c in short.cells] == [
        ("none", "street", 3), ("none", "kitti", 3),
    ]  # fmt: skip
    assert "--max-frames 1" in " ".join(short.cells[0].arguments)


def test_a_clip_is_a_video_and_no_row_to_gain_from(sweep_of):
    rows = {"show": {"method": "none", "clip": True}, "none": None}
    sweep = sweep_of(rows=rows, seeds=[0], sources={"a": {"video": "x"}})
    clip, row = sweep.cells
    assert clip.clip
    assert "--compare" in clip.arguments
    assert "--no-video" not in clip.arguments
    assert (row.clip, "--no-video" in row.arguments) == (False, True)
    assert sweep.baseline == "none"


def test_a_row_that_needs_labels_is_left_out_without(sweep_of):
    rows = {"none": None, "offline_ttt_mae_oracle": {"labels": True}}
    sweep = sweep_of(rows=rows, seeds=[0])
    assert [(c.name, c.source) for c in sweep.cells] == [
        ("none", "street"), ("none", "kitti"), ("offline_ttt_mae_oracle", "kitti"),
    ]  # fmt: skip
    for kind in ("video", "video-dir"):
        sweep = sweep_of(rows=rows, seeds=[0], replace={"sources": {"mine": {kind: "mine"}}})
        assert [(c.name, c.source) for c in sweep.cells] == [("none", "mine")]


def test_seconds_are_means_over_sources_that_all_rows_have(sweep_of):
    sweep = sweep_of(rows={"none": None, "tent": {"sources": ["kitti"]}}, seeds=[0])
    for cell, seconds in zip(sweep.cells, (100.0, 2.0, 3.0), strict=True):
        write_run(cell, 50)
        summary = json.loads((cell.folder / "summary.json").read_text())
        summary["seconds"]["frame"]["mean"] = seconds
        (cell.folder / "summary.json").write_text(json.dumps(summary))
    lines = to_markdown(results_table(records_of(sweep), METRICS)).splitlines()[2:4]
    assert [line.split("|")[-2].strip() for line in lines] == ["2.000", "3.000"]


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"rows": {"none": {"sources": ["x"]}}}, "rows.none.sources is .* some of street, kitti"),
        ({"rows": ...}, "rows is None; it must map at least one name"),
        ({"sources": {}}, "sources is {}"),
        ({"seed": [1]}, "no entry 'seed'; did you mean seeds"),
        ({"rows": {"none": {"wieghts": 1}}}, "rows.none: no entry 'wieghts'; did you mean weights"),
        ({"rows": {"none": {"settings": [1]}}}, "rows.none.settings is"),
        ({"rows": {"none": {"settings": {"A": []}}}}, "rows.none.settings.A is an empty list"),
        ({"rows": {"none": {"labels": "yes"}}}, "rows.none.labels is 'yes'; give True or False"),
        (
            {"rows": {"none": {"labels": True}}, "sources": {"a": {"video": "x"}}},
            "every row needs labels",
        ),
        ({"rows": {"none": 3}}, "rows.none is 3; it must be a mapping"),
        ({"seeds": 3}, "seeds is 3; give a list"),
        ({"rows": {"none": {"seeds": "a"}}}, "rows.none.seeds is 'a'; give a list"),
        ({"rows": {"none": {"clip": 1}}}, "rows.none.clip is 1; give True or False"),
        ({"protocol": "frame"}, "protocol is 'frame'; choose from standard, video, release"),
        ({"own_quick": {"row": {}}}, "quick: no entry 'row'"),
        ({"sources": {"a": {}}}, "sources.a needs exactly one of"),
        ({"sources": {"a": {"video": "x", "dataset": "y"}}}, "sources.a needs exactly one of"),
        ({"sources": {"a": {"world": {}, "video": "y"}}}, "sources.a is a world"),
        (
            {"sources": {"a": {"world": {"layout": "coco"}}}},
            "a.world.layout is 'coco'; choose",
        ),
        ({"sources": {"a": {"video": "x", "settings": {"K": [1, 2]}}}}, "single values"),
        ({"baseline": "frozen"}, "baseline 'frozen' is no row"),
        ({"figures": {"pie": True}}, "no entry 'pie'"),
        ({"figures": {"curve": True}}, "name the setting on its x axis"),
        ({"figures": {"over_time": "none"}}, "over_time is 'none'; give a list"),
        ({"figures": {"over_time": ["tent"]}}, "over_time: no row 'tent'; choose from none, "),
        (
            {"sources": {"a b": {"video": "x"}, "c": {"video": "y"}, "a_b": {"video": "z"}}},
            "the sources 'a b' and 'a_b' would share the folder a_b",
        ),
        (
            {"rows": {"a:b": {"method": "none"}, "a/b": {"method": "none"}}},
            "the rows 'a:b' and 'a/b' would share the folder a_b",
        ),
        # Videos of worlds have folders by source, whatever rows run on them.
        (
            {
                "sources": {"a b": {"world": {}}, "a_b": {"world": {}}},
                "rows": {"none": {"sources": ["a b"]}, "tent": {"sources": ["a_b"]}},
            },
            "the sources 'a b' and 'a_b'",
        ),
        ({"rows": {"": {"method": "none"}}}, "rows has an entry without a name"),
        (
            {"sources": {"a": {"world": {"seed": {"x": 1}}}}},
            "sources.a.world.seed is {'x': 1}; give",
        ),
        ({"seeds": [0, 0]}, "none / street / seed 0 is there twice"),
        ({"rows": {"none": {"method": ["a", "b"]}}}, r"rows.none.method is \['a', 'b'\]; give one"),
        ({"rows": {"none": {"preset": ["paper"]}}}, r"rows.none.preset is \['paper'\]; give one"),
        ({"rows": {"none": {"sources": [{"a": 1}]}}}, "rows.none.sources is"),
        ({"rows": {"none": {"settings": {3: 1}}}}, "rows.none.settings: 3 is no config key"),
        ({"settings": {"TTT.X": {"a": 1}}}, "settings.TTT.X is {'a': 1}; give a value"),
        ({"settings": {"SEED": [1, 2]}}, "settings.SEED: give seeds, a list, instead"),
        ({"settings": {"OUTPUT_DIR": "a"}}, "settings.OUTPUT_DIR is for training; the cells' fol"),
        ({"frames": 0}, "frames is 0; give a whole number, at least 1"),
        ({"replace": {"frames": 0}}, "frames is 0; give a whole number, at least 1"),
        ({"frames": [3]}, r"frames is \[3\]; give a whole number"),
        ({"seeds": [True]}, r"seeds is \[True\]; give a list of integers"),
        ({"compare": "yes"}, "compare is 'yes'; give True or False"),
        ({"baseline": ["none"]}, r"baseline is \['none'\]; give one name"),
        ({"protocol": ["video"]}, r"protocol is \['video'\]; give one name"),
        ({"sources": {"a": {"video": ["x"]}}}, r"sources.a.video is \['x'\]; give one name"),
        ({"sources": {"a": {"world": {"layout": ["x"]}}}}, "sources.a.world.layout is"),
        ({"figures": {"bars": 1}}, "figures.bars is 1; give True or False"),
        ({"figures": {"over_time": [["none"]]}}, "figures.over_time is .*; give a list of rows"),
    ],
)
def test_mistakes_are_told_with_their_place(sweep_of, entries, message):
    with pytest.raises(UserError, match=message):
        sweep_of(**entries)


PLACES = [
    *((key,) for key in SWEEP_KEYS),
    *(("rows", "none", key) for key in ROW_KEYS),
    *(("sources", "street", key) for key in SOURCE_KEYS),
    *(("sources", "dark", "world", key) for key in ("layout", "seed", "each")),
    *(("figures", key) for key in FIGURE_KEYS),
    ("settings", "TTT.BATCH_SIZE"),
    ("rows", "none"),
    ("sources", "street"),
]


VALUES = (None, True, 3, -1.5, "x", "", [], {}, ["x", "y"], [[1]], [{}], {"x": 1}, {3: []})


@pytest.mark.parametrize("place", PLACES, ids=".".join)
def test_any_value_anywhere_is_read_or_one_line(sweep_of, place):
    outcomes = []
    for value in VALUES:
        spec = copy.deepcopy({**SPEC, "figures": {"bars": True}})
        spec["sources"]["dark"] = {"world": {"seed": 1}}
        spec["rows"]["none"] = {"seeds": [0]}
        node = spec
        for key in place[:-1]:
            node = node.setdefault(key, {})
        node[place[-1]] = value
        try:
            cells = sweep_of(
                **{"own_quick" if k == "quick" else k: v for k, v in spec.items()}
            ).cells
        except UserError as error:
            outcomes.append(str(error))
        else:
            assert all(isinstance(word, str) for cell in cells for word in cell.arguments)
    assert len(outcomes) >= 3
    assert not any("\n" in line for line in outcomes)


@pytest.mark.parametrize("name", ["..", ".", "a" * 300, "ä" * 150, "kitti/val", "x:y"])
def test_any_name_has_a_folder_of_its_own(sweep_of, tmp_path, name):
    sweep = sweep_of(
        sources={name: {"video": "x"}, "other": {"video": "y"}},
        rows={name: {"method": "none"}, "other": {"method": "none"}},
        seeds=[0],
    )
    for cell in sweep.cells:
        cell.folder.mkdir(parents=True)
        place = cell.folder.resolve().relative_to((tmp_path / "out/cells").resolve())
        assert len(place.parts) == 3
    assert len({cell.folder.resolve() for cell in sweep.cells}) == 4


def test_files_that_are_no_sweeps(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        read_sweep(tmp_path / "none.yaml", tmp_path)
    (tmp_path / "bad.yaml").write_text("a: [")
    with pytest.raises(UserError, match="is no YAML"):
        read_sweep(tmp_path / "bad.yaml", tmp_path)
    (tmp_path / "twice.yaml").write_text("rows: {none: null}\nframes: 3\nrows: {tent: null}\n")
    with pytest.raises(UserError, match=r"twice\.yaml: rows stands twice .*, in lines 1 and 3"):
        read_sweep(tmp_path / "twice.yaml", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted((config_dir() / "sweeps").glob("*.yaml")), ids=str)
def test_shipped_sweeps_name_what_there_is(path, tmp_path):
    sweep = read_sweep(path, tmp_path)
    assert sweep.baseline is not None
    cells = list(sweep.cells)
    if "quick:" in path.read_text():
        cells += read_sweep(path, tmp_path, quick=True).cells
    different = {}
    for cell in cells:
        opts = list(cell.arguments)
        while not opts[0].isupper():  # the flags come before the keys
            del opts[0]
        config = cell.arguments[cell.arguments.index("--config") + 1]
        pairs = zip(opts[::2], opts[1::2], strict=True)
        settings = tuple(pair for pair in pairs if pair[0] != "SEED")  # a number, whatever it is
        different[config, settings, cell.method] = (config, opts, cell)
    for config, opts, cell in different.values():
        cfg = load_config(config, opts=opts, method=cell.method)
        assert cell.method == cfg.TTT.METHOD
        if path.stem == "table1":  # nothing ships for it
            continue
        statistics = cfg.TTT.LN_ADAPT.SOURCE_STATISTICS
        needed = [statistics] if statistics or cell.method == "ln_adapt" else []
        for file in (cfg.MODEL.WEIGHTS, *needed):
            assert file.startswith("ttt_video://")
            assert PathManager.isfile(file), file


def test_all_methods_has_the_rows_of_the_papers_tables(tmp_path):
    sweep = read_sweep(config_dir() / "sweeps" / "all_methods.yaml", tmp_path)
    # Weights that were trained without the joint loss do not ship.
    wanted = {*published.TABLE_1, *published.TABLE_4} - {"main_task_only"}
    assert wanted <= {cell.method for cell in sweep.cells}


def test_table1_is_that_of_the_paper(tmp_path):
    """All rows on all its data sets, but for those that the paper has no number of."""
    sweep = read_sweep(config_dir() / "sweeps" / "table1.yaml", tmp_path)
    wanted = [
        (method, column.dataset, column.metric)
        for method, row in published.TABLE_1.items()
        for column in published.COLUMNS
        if column.title in row.metrics
    ]
    assert len(wanted) == 36
    metrics = {column.dataset: column.metric for column in published.COLUMNS}
    switch = {"AP": "INSTANCE_ON", "PQ": "PANOPTIC_ON", "mIoU": "SEMANTIC_ON"}
    found, weights = [], {}
    for cell in sweep.cells:
        assert cell.flag("--preset") == "release"
        cfg = load_config(cell.flag("--config"), "release", method=cell.method)
        metric = metrics[cell.flag("--dataset")]
        assert cfg.MODEL.MASK_FORMER.TEST[switch[metric]]
        found.append((cell.method, cell.flag("--dataset"), metric))
        main_only, file = cell.method == "main_task_only", Path(cell.flag("--weights"))
        weights.setdefault((main_only, metric), set()).add(file)
        if not main_only:  # where tools/train_net.py leaves them
            assert file.parent == Path(cfg.OUTPUT_DIR)
    assert found == wanted
    # One checkpoint a task, and for Main Task Only another.
    assert [len(files) for files in weights.values()] == [1] * 6
    assert len(set.union(*weights.values())) == 6


def test_colour_settings_are_chosen_on_validation_videos_alone(tmp_path):
    """And streams take what was chosen from the values that were tried."""
    folder = config_dir() / "sweeps"
    worlds, tried = {}, {}
    for name in ("color_validation", "color"):
        spec = yaml.safe_load((folder / f"{name}.yaml").read_text())
        worlds[name] = [source["world"] for source in spec["sources"].values()]
        for cell in read_sweep(folder / f"{name}.yaml", tmp_path).cells:
            for key, value in cell.settings.items():
                tried.setdefault((name, cell.name, key), set()).add(value)
    for name, first, split in (("color_validation", 1000, "validation"), ("color", 2000, "test")):
        seeds = [w["seed"] + k for w in worlds[name] for k in range(w["videos"])]
        assert {seed // 1000 * 1000 for seed in seeds} == {first}
        assert {w["corruption"] for w in worlds[name] if "corruption" in w} == {split}
    # Nothing is left to choose on the test videos.
    assert all(len(values) == 1 for (name, *_), values in tried.items() if name == "color")
    chosen = {
        method: load_config("quick/stream_world_color.yaml", method=method).TTT
        for method in ("online_ttt_mae", "ln_adapt")
    }
    key = ("color_validation", "online_ttt_mae", "TTT.OPTIMIZER.BASE_LR")
    assert chosen["online_ttt_mae"].OPTIMIZER.BASE_LR in tried[key]
    key = ("color_validation", "ln_adapt", "TTT.LN_ADAPT.PRIOR")
    assert chosen["ln_adapt"].LN_ADAPT.PRIOR in tried[key]


@pytest.mark.slow
def test_settings_of_the_fair_table_are_chosen_on_validation_videos_alone(tmp_path):
    """And the table has one rate of each step, which was tried."""
    folder = config_dir() / "sweeps"
    rates = {}
    sweeps = [(name, 1000, "validation") for name in ("districts", "districts_long")]
    for name, first, split in (*sweeps, ("fair_table", 2000, "test")):
        spec = yaml.safe_load((folder / f"{name}.yaml").read_text())
        worlds = [source["world"] for source in spec["sources"].values()]
        seeds = [w["seed"] + k for w in worlds for k in range(w["videos"])]
        assert {seed // 1000 * 1000 for seed in seeds} == {first}
        assert {w["corruption"] for w in worlds if "corruption" in w} == {split}
        assert any(w.get("districts") for w in worlds)
        for cell in read_sweep(folder / f"{name}.yaml", tmp_path).cells:
            if cell.name.removesuffix("_long") in ("online_ttt_mae", "paper", "release"):
                opts = [word for pair in cell.overrides.items() for word in pair]
                ttt = load_config(
                    cell.flag("--config"), cell.flag("--preset"), opts, method=cell.method
                ).TTT
                step = (ttt.OPTIMIZER.NAME, ttt.BATCH_SIZE, ttt.CROP.RESIZE, ttt.MASK_RATIO)
                rates.setdefault((name, cell.name, step), set()).add(ttt.OPTIMIZER.BASE_LR)
    tested = {key: values for key, values in rates.items() if key[0] == "fair_table"}
    assert len(tested) == 5
    for (_, row, step), values in tested.items():
        assert len(values) == 1
        assert values < rates["districts_long", row.removesuffix("_long"), step]
        if not row.endswith("_long"):
            assert values < rates["districts", row, step]
    for row in ("ln_adapt", "self_train", "tent"):
        tried, chosen = (
            [
                cell.settings
                for cell in read_sweep(folder / f"{name}.yaml", tmp_path).cells
                if (cell.name, cell.source) == (row, "districts")
            ]
            for name in ("districts", "fair_table")
        )
        assert len(chosen) == 1
        assert len(tried) > 1
        assert chosen[0] in tried


def test_rates_on_images_are_chosen_on_other_pictures_and_corruptions(tmp_path):
    """And the test runs have a rate that was tried, with the settings it was tried with."""
    cells = {
        name: read_sweep(config_dir() / "sweeps" / f"{name}.yaml", tmp_path).cells
        for name in (
            "fashion", "fashion_orders", "fashion_validation", "fashion_online_validation",
        )
    }  # fmt: skip
    sets = {name: {cell.flag("--dataset") for cell in own} for name, own in cells.items()}
    for name, own in sets.items():
        family = "fashion_mnist_val_c_" if "validation" in name else "fashion_mnist_c_"
        assert all(dataset.startswith(family) for dataset in own)
    tuned = {d.removeprefix("fashion_mnist_val_c_") for n in sets if "val" in n for d in sets[n]}
    tested = " ".join(d for name in ("fashion", "fashion_orders") for d in sets[name])
    assert not [corruption for corruption in tuned if corruption in tested]
    free = ("TTT.RECORD_STEPS", "TTT.FRAME_ORDER")

    def settings(cell):
        return cell.method, tuple(sorted((k, v) for k, v in cell.settings.items() if k not in free))

    tried = {settings(cell) for name in cells if "validation" in name for cell in cells[name]}
    run = {settings(cell) for name in ("fashion", "fashion_orders") for cell in cells[name]}
    assert len(run) == 3  # frozen, reset, online
    assert run <= tried


def write_run(cell, score: float, *, frozen: float | None = None, complete: bool = True) -> None:
    """What stream_eval leaves of a cell."""
    cell.folder.mkdir(parents=True, exist_ok=True)
    metrics = {
        "adapted": {
            "mIoU": score,
            "mIoU_frame_release": score - 5,
            "per_class": {"mIoU": {"road": 1.0}},
            "AP": None,
        }
    }
    if frozen is not None:
        metrics["frozen"] = {"mIoU": frozen}
    window = cell.settings.get("TTT.WINDOW_SIZE", 0)
    seconds = {k: {"mean": v + window} for k, v in (("adapt", 1), ("predict", 2), ("frame", 3))}
    summary = {
        "complete": complete, "frames": 3, "metrics": metrics, "seconds": seconds,
        "preset": "paper", "weights_sha256": ("b" if cell.name == "other" else "a") * 64,
    }  # fmt: skip
    (cell.folder / "summary.json").write_text(json.dumps(summary))
    (cell.folder / "cell.json").write_text(json.dumps(sweep_workers._note(cell)))


def records_of(sweep) -> list:
    records = [cell_record(cell, cell.summary()) for cell in sweep.cells]
    add_gains(records, sweep.baseline, METRICS)
    return records


@pytest.fixture
def scored(sweep_of):
    """The sweep of SPEC with scores: frozen 50 and 40; k = 1 gives +1 and +3, k = 4 +2 and +6;
    the second seed 1 point more, but for the frozen model."""
    sweep = sweep_of(figures={"curve": "TTT.WINDOW_SIZE", "bars": True, "gain_against_time": True})
    for cell in sweep.cells:
        base, step = {"street": (50, 1), "kitti": (40, 3)}[cell.source]
        gain = {None: 0, 1: step, 4: 2 * step}[cell.settings.get("TTT.WINDOW_SIZE")]
        write_run(cell, base + gain + (cell.seed if gain else 0))
    return sweep


def test_table_by_hand(scored):
    records = records_of(scored)
    assert metric_columns(records, METRICS) == [("street", "mIoU"), ("kitti", "mIoU")]
    assert [r["gain_mIoU"] for r in records] == [0, 0, 0, 0, 1, 2, 3, 4, 2, 3, 6, 7]
    table = to_markdown(results_table(records, METRICS)).partition("\n\n")[0].splitlines()
    cells = [[c.strip() for c in line.strip("|").split("|")] for line in table]
    assert cells[0] == [
        "method", "street mIoU", "kitti mIoU", "gain mIoU",
        "adapt s/frame", "predict s/frame", "s/frame",
    ]  # fmt: skip
    assert cells[2] == ["none", "50.00 ± 0.00", "40.00 ± 0.00", "+0.00", "1.000", "2.000", "3.000"]
    assert cells[4] == [
        "online_ttt_mae, WINDOW_SIZE=4", "52.50 ± 0.71", "46.50 ± 0.71", "+4.50",
        "5.000", "6.000", "7.000",
    ]  # fmt: skip
    assert len({len(line) for line in table}) == 1


def test_means_are_over_the_sources_that_all_rows_have(scored):
    """k = 4 never ran on street, where gains are smaller: of k = 1 kitti alone counts, too."""
    records = [
        r for r in records_of(scored) if (r["source"], r.get("TTT.WINDOW_SIZE")) != ("street", 4)
    ]
    assert {r["source"] for r in comparable(records, "gain_mIoU")} == {"kitti"}
    table = results_table(records, METRICS)
    gain = table.head.index("gain mIoU")
    assert [row[gain] for row in table.rows] == ["+0.00", "+3.50", "+6.50"]
    # Rows that share no source cannot be compared.
    apart = [r for r in records if (r["source"], r.get("TTT.WINDOW_SIZE")) != ("kitti", 1)]
    assert comparable(apart, "gain_mIoU") == []
    assert {row[gain] for row in results_table(apart, METRICS).rows} == {"-"}


def test_without_labels_the_table_tells_a_collapse(sweep_of):
    sweep = sweep_of(seeds=[0], sources={"a": {"video": "x"}}, rows={"none": None, "tent": None})
    for cell, classes in zip(sweep.cells, (7, 1), strict=True):
        write_run(cell, 0)
        summary = json.loads((cell.folder / "summary.json").read_text())
        summary["metrics"] = {
            "adapted": {"predicted_classes_min": classes, "prediction_entropy_mean": 0.25}
        }
        (cell.folder / "summary.json").write_text(json.dumps(summary))
    table, below = to_markdown(results_table(records_of(sweep), METRICS)).split("\n\n")
    assert f"- predicted_classes_mean: {RULES['predicted_classes_mean']}.\n" in below
    assert f"- prediction_entropy_mean: {RULES['prediction_entropy_mean']}.\n" in below
    assert below.count("\n") == 3
    cells = [[c.strip() for c in line.strip("|").split("|")] for line in table.splitlines()]
    assert cells[0][1:3] == ["predicted_classes_min", "prediction_entropy_mean"]
    assert [line[1:3] for line in cells[2:]] == [["7.00", "0.25"], ["1.00", "0.25"]]


def test_rules_preset_and_weights_stand_below_the_table(sweep_of):
    rows = {"none": None, "other": {"method": "none", "sources": ["kitti"]}}
    sweep = sweep_of(seeds=[0], rows=rows)
    for cell in sweep.cells:
        write_run(cell, 50)
    below = to_markdown(results_table(records_of(sweep), METRICS)).split("\n\n")[1]
    assert below.splitlines() == [
        f"- mIoU: {RULES['mIoU']}.",
        "- Preset paper, weights aaaaaaaaaaaa: street, kitti (none).",
        "- Preset paper, weights bbbbbbbbbbbb: kitti (other).",
    ]


def test_another_protocol(scored, tmp_path):
    metrics = ["mIoU_frame_release"]
    records = [cell_record(cell, cell.summary()) for cell in scored.cells]
    add_gains(records, scored.baseline, metrics)
    assert [r["gain_mIoU_frame_release"] for r in records][-4:] == [2, 3, 6, 7]
    table = to_markdown(results_table(records, metrics))
    assert "street mIoU_frame_release | kitti mIoU_frame_release | gain mIoU_frame_release" in table
    assert "| 45.00 ± 0.00" in table
    assert f"- mIoU_frame_release: {RULES['mIoU_frame_release']}.\n" in table
    assert RULES["mIoU"] + "." not in table
    (first, *_) = csv.DictReader(io.StringIO(to_csv(records, metrics)))
    assert first["rules"] == f"mIoU_frame_release: {RULES['mIoU_frame_release']}"
    (file,) = draw_figures(records, {"bars": True}, scored.baseline, tmp_path, metrics)
    assert file.name == "bars_mIoU_frame_release.png"


def test_long_table(scored):
    rows = list(csv.DictReader(io.StringIO(to_csv(records_of(scored), METRICS))))
    assert rows[0]["rules"] == f"mIoU: {RULES['mIoU']}"
    assert (rows[0]["preset"], rows[0]["weights_sha256"]) == ("paper", "a" * 64)
    assert len(rows) == 12
    assert rows[-1]["TTT.WINDOW_SIZE"] == "4"
    assert rows[-1]["mIoU"] == "47"
    assert rows[-1]["state"] == "complete"
    assert rows[0]["TTT.WINDOW_SIZE"] == ""
    assert list(rows[0])[-1] == "folder"


def test_incomplete_cells_are_dashes(sweep_of):
    sweep = sweep_of(seeds=[0], sources={"a": {"video": "x"}})
    write_run(sweep.cells[0], 50)
    write_run(sweep.cells[1], 60, complete=False)
    records = records_of(sweep)
    assert [r["state"] for r in records] == ["complete", "missing", "missing"]
    line = to_markdown(results_table(records, METRICS)).splitlines()[3]
    assert [c.strip() for c in line.strip("|").split("|")][1:] == ["-"] * 5


def test_a_frozen_model_beside_goes_before_the_baseline_row(sweep_of):
    sweep = sweep_of(seeds=[0], sources={"a": {"video": "x"}}, compare=True)
    for cell, score, frozen in zip(sweep.cells, (50, 60, 70), (50, 58, 58), strict=True):
        write_run(cell, score, frozen=frozen)
    assert [r["gain_mIoU"] for r in records_of(sweep)] == [0, 2, 12]


def test_rows_are_lines_across_a_curve(tmp_path, monkeypatch):
    """The frozen model, an offline method and a window that is no number; k is the curve's."""

    def record(name: str, value: float, window: object, source: str = "a") -> dict:
        own = {"name": name, "row": name, "method": "m", "seed": 0, "source": source}
        return {**own, "mIoU": value, "TTT.WINDOW_SIZE": window}

    records = [
        record("none", 40.0, None), record("none", 20.0, None, "b"),
        record("online", 41.0, 1), record("online", 43.0, 16), record("online", 21.0, 1, "b"),
        record("online", 25.0, 16, "b"), record("auto", 42.0, "auto"), record("all", 39.0, None),
    ]  # fmt: skip
    seen, original = [], sweep_figures.figure_axes

    @contextmanager
    def figure_axes(*args, **kwargs):
        with original(*args, **kwargs) as axes:
            seen.append(axes)
            yield axes

    monkeypatch.setattr(sweep_figures, "figure_axes", figure_axes)
    figures = {"curve": "TTT.WINDOW_SIZE", "levels": ["all", "auto"]}
    (file,) = draw_figures(records, figures, "none", tmp_path, ["mIoU"])
    assert file.stat().st_size > 5000
    (axes,) = seen
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert sorted(labels) == ["all (39.0)", "auto (42.0)", "m", "none (30.0)"]
    (mean,) = [line for line in axes.lines if line.get_lw() == 2]
    assert [*mean.get_ydata()] == [31.0, 34.0]


def test_curves_over_time_are_the_means_of_seeds(sweep_of, tmp_path, monkeypatch):
    sweep = sweep_of(rows={"none": None, "tent": None}, figures={"over_time": ["tent"]})
    for cell in sweep.cells:
        write_run(cell, 50)
        rows = [
            {"video_id": "a", "frame_index": i, "metrics": {"mIoU": 10.0 * cell.seed + i}}
            for i in range(3)
        ] + [{"video_id": "a", "frame_index": 3, "metrics": {}}]
        (cell.folder / "frames.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    drawn = {}
    monkeypatch.setattr(
        sweep_figures, "plot_curves", lambda lines, path, *_, **__: drawn.update({path.name: lines})
    )
    draw_figures(records_of(sweep), sweep.figures, sweep.baseline, tmp_path, METRICS)
    assert [*drawn] == ["over_time_mIoU_street.png", "over_time_mIoU_kitti.png"]
    lines = drawn["over_time_mIoU_street.png"]
    assert [*lines] == ["tent"]
    assert lines["tent"][:3] == [5.0, 6.0, 7.0]
    assert math.isnan(lines["tent"][3])


def test_curves_over_time_end_where_a_video_ends(sweep_of, tmp_path, monkeypatch):
    sweep = sweep_of(rows={"none": None, "tent": None}, figures={"over_time": ["tent"]})
    for cell in sweep.cells:
        write_run(cell, 50)
        # Two workers wrote the rows, and the order of the names is not that of text.
        rows = [("v10", 0, 1.0), ("v2", 1, 3.0), ("v2", 0, 2.0), ("v10", 1, 4.0), ("v2", 2, 5.0)]
        text = "".join(
            json.dumps({"video_id": v, "frame_index": i, "metrics": {"mIoU": m}}) + "\n"
            for v, i, m in rows
        )
        (cell.folder / "frames.jsonl").write_text(text)
    drawn = []
    monkeypatch.setattr(
        sweep_figures, "plot_curves", lambda lines, *_, starts, **__: drawn.append((lines, starts))
    )
    draw_figures(records_of(sweep), sweep.figures, sweep.baseline, tmp_path, METRICS)
    assert drawn == [({"tent": [2.0, 3.0, 5.0, 1.0, 4.0]}, [3, 5])] * 2


def test_a_source_with_a_slash_in_its_name_has_its_figures(sweep_of, tmp_path):
    rows = {"none": None, "tent": None}
    figures = {"over_time": ["tent"], "bars": True}
    sweep = sweep_of(rows=rows, sources={"kitti/val": {"video": "x"}}, seeds=[0], figures=figures)
    for cell in sweep.cells:
        write_run(cell, 50)
        rows = [{"video_id": "a", "frame_index": i, "metrics": {"mIoU": 10.0}} for i in range(3)]
        (cell.folder / "frames.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    out = tmp_path / "figures"
    out.mkdir()
    files = draw_figures(records_of(sweep), sweep.figures, sweep.baseline, out, METRICS)
    assert len(files) == 2
    assert sorted(files) == sorted(out.iterdir())


def test_the_table_says_why_a_cell_failed(sweep_of):
    sweep = sweep_of(seeds=[0], sources={"a": {"video": "x"}})
    done, failed, missing = sweep.cells
    write_run(done, 50)
    failed.note_failure("this video is broken (exit code 2)")
    records = records_of(sweep)
    assert [r["state"] for r in records] == ["complete", "failed", "missing"]
    line = f"Failed: {failed}: this video is broken (exit code 2)"
    assert [note for note in results_table(records, METRICS).notes if "ailed" in note] == [line]
    assert [r["reason"] for r in csv.DictReader(io.StringIO(to_csv(records, METRICS)))] == [
        "", "this video is broken (exit code 2)", "",
    ]  # fmt: skip
    write_run(failed, 60)  # what is complete has not failed, whatever was noted before
    assert "reason" not in records_of(sweep)[1]
    failed.note_failure(None)
    assert (failed.failure(), missing.failure()) == (None, None)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"preset": "papr"}, "none / a / seed 0: no preset 'papr'; choose from paper"),
        (
            {"rows": {"none": None, "tentt": None}},
            "tentt / a / seed 0: no method 'tentt'; did",
        ),
        ({"settings": {"TTT.WINDOWSIZE": [1, 2]}}, "WINDOWSIZE"),
        ({"settings": {"TTT.WINDOW_SIZE": ["x"]}}, "TTT.WINDOW_SIZE"),
        ({"settings": {"TTT.WINDOW_SIZE": [4, -1]}}, "=-1 / a / seed 0: TTT.WINDOW_SIZE is -1"),
        ({"overrides": ["TTT.RESET", "x"]}, "none / a / seed 0: TTT.RESET is 'x'; choose"),
        ({"config": "quick/nothing.yaml"}, "no config 'quick/nothing.yaml'"),
        ({"settings": {"TTT.ENSEMBLE.METHOD": "tentt"}}, "no method 'tentt'"),
        (
            {"sources": {"a": {"dataset": "kitti_step_video_sem_seg_vall"}}},
            "unknown data set 'kitti_step_video_sem_seg_vall'; did you mean kitti",
        ),
    ],
)
def test_what_cannot_run_is_told_before_cells_run(sweep_of, entries, message):
    usual = {"sources": {"a": {"video": "x"}}, "rows": {"none": None}, "settings": ...}
    sweep = sweep_of(**{**usual, **entries})
    with pytest.raises(UserError, match=re.escape(message)) as error:
        check_cells(sweep.cells)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("settings", "timed"),
    [([], "none"), (["TTT.LEARN_ON_CHANGE.STEP_FRAMES", "2"], "online_ttt_mae")],
)
def test_a_simulated_clock_is_looked_up_as_the_method_is_timed(settings, timed):
    """learn_on_change is predictions, and the steps of online TTT-MAE where it takes some."""
    cfg = load_config("quick/stream_world.yaml", None, settings, method="learn_on_change")
    assert timed_as(cfg, "learn_on_change") == timed
    cfg.TTT.ENSEMBLE.METHOD = "learn_on_change"
    assert timed_as(cfg, "temporal_smoothing") == timed
    assert timed_as(cfg, "tent") == "tent"


@pytest.mark.parametrize("name", ["streaming", "learn_on_change_streaming"])
def test_shipped_profiles_have_the_seconds_of_shipped_sweeps(name, tmp_path):
    check_cells(read_sweep(config_dir() / "sweeps" / f"{name}.yaml", tmp_path).cells)


def test_cells_whose_weights_are_not_there_are_told_before_any_runs(sweep_of, tmp_path):
    there = tmp_path / "there.pth"
    there.touch()
    sweep = sweep_of(
        sources={"a": {"video": str(there)}},
        settings=...,
        seeds=[0],
        rows={
            "none": None,  # the shipped ones
            "other": {"method": "none", "weights": "gone.pth"},
            "published": {"method": "none", "config": "joint_cityscapes.yaml"},
            "own": {"method": "none", "weights": str(there)},
            "far": {"method": "none", "weights": "https://example.org/x.pth"},
        },
    )
    assert {cell.name: reason for cell, reason in without_files(sweep.cells).items()} == {
        "other": "no weights at gone.pth; give --weights, or put them there",
        "published": "no weights; give --weights, or weights in the sweep file",
    }


def test_weights_by_source(sweep_of):
    entries = {
        "rows": {"none": None, "own": {"method": "none", "weights": {"kitti": "row.pth"}}},
        "weights": "sweep.pth",
        "seeds": [0],
    }
    files = [cell.flag("--weights") for cell in sweep_of(**entries).cells]
    assert files == ["sweep.pth", "sweep.pth", "sweep.pth", "row.pth"]
    sweep = sweep_of(**entries, weights_of={"street": "flag.pth", "kitti": "x.pth"})
    files = [cell.flag("--weights") for cell in sweep.cells]
    assert files == ["flag.pth", "x.pth", "flag.pth", "row.pth"]
    with pytest.raises(UserError, match="--weights is 'stret'; choose from street, kitti"):
        sweep_of(weights_of={"stret": "x.pth"})
    entries["rows"]["own"]["weights"] = {"kiti": "row.pth"}
    with pytest.raises(UserError, match=r"rows.own.weights is 'kiti'; choose from street, kitti"):
        sweep_of(**entries)


def test_figures_are_drawn_from_the_records(scored, tmp_path):
    files = draw_figures(records_of(scored), scored.figures, scored.baseline, tmp_path, METRICS)
    assert [f.name for f in files] == [
        "curve_mIoU.png", "bars_mIoU.png", "gain_against_time_mIoU.png",
    ]  # fmt: skip
    for file in files:
        pixels = imread(file)
        assert pixels.shape[0] > 300
        assert pixels.std() > 0.05  # something is on it
    first = [f.read_bytes() for f in files]
    draw_figures(records_of(scored), scored.figures, scored.baseline, tmp_path, METRICS)
    assert [f.read_bytes() for f in files] == first
    assert draw_figures([], scored.figures, scored.baseline, tmp_path, METRICS) == []


STREAM = """
import json, os, pathlib, sys, time
command, *args = sys.argv[1:]
assert command == "stream"
value = lambda flag: args[args.index(flag) + 1]
folder = pathlib.Path(value("--output"))
print("ran with", os.environ["OMP_NUM_THREADS"], "threads")
if "fail" in value("--video"):
    sys.exit("error: this video is broken")
runs = folder / "runs.txt"
runs.write_text((runs.read_text() if runs.exists() else "") + "x")
summary = {"complete": "cut" not in value("--video") or len(runs.read_text()) > 1}
(folder / "summary.json").write_text(json.dumps(summary))
"""


@pytest.fixture
def stream(tmp_path, monkeypatch) -> Path:
    """What cells run for ``python -m ttt_video stream``."""
    return stand_in(STREAM, tmp_path, monkeypatch)


def local_sweep(sweep_of, **entries):
    sources = {name: {"video": f"{name}.mp4"} for name in ("good", "fail", "cut")}
    return sweep_of(seeds=[0], sources=sources, rows={"none": None}, **entries)


@pytest.mark.usefixtures("stream")
def test_cells_run_beside_each_other_and_failures_are_a_line(sweep_of):
    sweep = local_sweep(sweep_of)
    ended = {c.source: r for c, r in run_local(sweep.cells, workers=2, threads=3)}
    assert ended["good"] is None
    assert ended["fail"].startswith("this video is broken (exit code 1, see ")
    assert "no complete summary.json" in ended["cut"]
    assert [finished(cell) for cell in sweep.cells] == [True, False, False]
    assert "ran with 3 threads" in (sweep.cells[0].folder / "log.txt").read_text()
    # Again: what is missing goes on in the same folder.
    missing = [cell for cell in sweep.cells if not finished(cell)]
    ended = {c.source: r for c, r in run_local(missing, workers=1, threads=1)}
    assert ended.keys() == {"fail", "cut"}
    assert ended["cut"] is None
    assert (sweep.cells[0].folder / "runs.txt").read_text() == "x"


@pytest.mark.usefixtures("stream")
def test_a_folder_of_other_settings_is_left_alone(sweep_of):
    cell = local_sweep(sweep_of).cells[0]
    assert run_cell(cell, {"OMP_NUM_THREADS": "1"}) is None
    other = local_sweep(sweep_of, frames=9).cells[0]
    assert other.folder == cell.folder
    assert not finished(other)
    assert "holds a run of other settings" in run_cell(other, {})
    with pytest.raises(UserError, match=r"^\S+ holds a run of other settings .*nothing was run"):
        check_folders([other])
    check_folders([cell])
    assert finished(cell)


def test_a_notebook_runs_cells_with_the_package_of_its_folder(sweep_of, tmp_path, monkeypatch):
    """Python finds it by "", not by the folder's name."""
    code = "print('error: from here')\nraise SystemExit(2)\n"
    monkeypatch.chdir(stand_in(code, tmp_path, monkeypatch).parents[1])
    monkeypatch.setattr(sys, "path", ["", *sys.path[1:]])
    assert run_cell(local_sweep(sweep_of).cells[0], {}).startswith("from here (exit code 2")


NAMED_FILES = {
    "--weights": "weights",
    "MODEL.WEIGHTS": "settings",
    "TTT.LN_ADAPT.SOURCE_STATISTICS": "settings",
    "TTT.OPTIMIZER.SOURCE_GRADIENTS": "settings",
    "MODEL.VIT_MAE.HEAD_WEIGHTS": "settings",
    "TTT.COLOR.LITE0": "settings",
}


@pytest.mark.usefixtures("stream")
@pytest.mark.parametrize("key", NAMED_FILES)
def test_another_file_under_the_same_name_is_another_cell(sweep_of, tmp_path, key):
    config, file = tmp_path / "own.yaml", tmp_path / "own.pth"
    config.write_text("TTT: {WINDOW_SIZE: 4}")
    file.write_bytes(b"first")
    entry = NAMED_FILES[key]
    named = {entry: str(file) if entry == "weights" else {key: str(file)}}

    def cell():
        return local_sweep(sweep_of, config=str(config), **named).cells[0]

    assert run_cell(cell(), {"OMP_NUM_THREADS": "1"}) is None
    assert finished(cell())
    file.write_bytes(b"second")
    assert not finished(cell())
    file.write_bytes(b"first")
    assert finished(cell())
    config.write_text("TTT: {WINDOW_SIZE: 5}")
    assert not finished(cell())
    assert "holds a run of other settings" in run_cell(cell(), {})


@pytest.mark.parametrize("kind", ["video", "video-dir"])
def test_a_cell_is_finished_for_the_same_videos_only(sweep_of, tmp_path, kind):
    """A sweep over other videos is refused; where there are none any more, nothing is compared."""
    video = tmp_path / "street" / "0.png"
    video.parent.mkdir()
    video.write_bytes(b"first")
    path = video if kind == "video" else video.parent
    cell = sweep_of(seeds=[0], rows={"none": None}, sources={"s": {kind: str(path)}}).cells[0]
    cell.folder.mkdir(parents=True)
    (cell.folder / "cell.json").write_text(json.dumps(sweep_workers._note(cell)))
    (cell.folder / "summary.json").write_text('{"complete": true}')

    def is_finished():
        sweep_workers._known_videos.cache_clear()  # as in another process
        return finished(cell)

    assert is_finished()  # by an earlier version, which did not say
    source = fingerprint_file(path) if kind == "video" else FolderSource(path, KEEP).fingerprint()
    known = cell.folder / "sources.json"
    known.write_text(json.dumps({"street": source}))
    assert is_finished()
    video.write_bytes(b"second")
    assert not is_finished()
    with pytest.raises(UserError, match="holds a run of other videos; nothing was run"):
        check_folders([cell])
    video.write_bytes(b"first")
    assert is_finished()
    known.write_text("[")
    assert not is_finished()
    with pytest.raises(UserError, match=r"sources\.json"):
        check_folders([cell])
    known.write_text(json.dumps({"street": source}))
    shutil.rmtree(video.parent)
    assert is_finished()  # its report is drawn where the videos are not


@pytest.mark.usefixtures("stream")
@pytest.mark.parametrize("text", ["", "[", "5"])
def test_a_damaged_note_is_a_line(sweep_of, text):
    cell = local_sweep(sweep_of).cells[0]
    cell.folder.mkdir(parents=True)
    (cell.folder / "cell.json").write_text(text)
    assert "holds a run of other settings" in run_cell(cell, {})
    (cell.folder / "summary.json").write_text(text)
    assert not finished(cell)


def test_a_cell_without_a_config_is_one_of_the_tools_own(sweep_of):
    content = {
        config: sweep_workers._content(local_sweep(sweep_of, config=config).cells[0])
        for config in (None, DEFAULT_STREAM_CONFIG, "quick/stream_world_panoptic.yaml")
    }
    assert (
        content[None]
        == content[DEFAULT_STREAM_CONFIG]
        != content["quick/stream_world_panoptic.yaml"]
    )


@pytest.mark.slow
def test_jobs_through_submitit(sweep_of, stream, tmp_path):
    pytest.importorskip("submitit")
    sweep = local_sweep(sweep_of)
    # A job's own process must find the package and not what stands for it.
    path = {"PYTHONPATH": str(stream.parents[1])}
    cells = [replace(cell, environment=path) for cell in sweep.cells]
    jobs = run_on_cluster(
        cells, tmp_path / "jobs", workers=3,
        parameters={"timeout_min": 2, "cpus_per_task": 2, "slurm_partition": "p"}, cluster="local",
    )  # fmt: skip
    ended = {cell.source: reason for cell, reason in jobs}
    assert ended["good"] is None
    assert "this video is broken" in ended["fail"]
    assert "ran with 2 threads" in (sweep.cells[0].folder / "log.txt").read_text()


def test_cluster_mistakes(sweep_of, tmp_path, monkeypatch):
    cells = local_sweep(sweep_of).cells
    arguments = {"workers": 1, "parameters": {}}
    monkeypatch.setattr("shutil.which", lambda name: None)
    pytest.importorskip("submitit")
    with pytest.raises(UserError, match="no sbatch"):
        next(run_on_cluster(cells, tmp_path / "jobs", **arguments))
    bad = {"workers": 1, "parameters": {"nonsense": 1}, "cluster": "local"}
    with pytest.raises(UserError, match="nonsense"):
        next(run_on_cluster(cells, tmp_path / "jobs", **bad))
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(UserError, match="pip install submitit"):
        next(run_on_cluster(cells, tmp_path / "jobs", **arguments))
