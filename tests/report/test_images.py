"""Reports on image sets, from hand-made rows: every number by hand."""

from __future__ import annotations

import csv
import io
import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from ttt_video.errors import UserError
from ttt_video.report import image_figures, image_runs
from ttt_video.report.image_figures import draw_image_runs
from ttt_video.report.image_runs import (
    Share,
    after_each_step,
    by_part,
    by_picture,
    change_counts,
    changes,
    examples,
    four_cases,
    gain,
    moving_accuracy,
    read_image_runs,
    scores_by_step,
    share,
)
from ttt_video.report.image_tables import FORMATS, image_tables
from ttt_video.report.statistics import Interval
from ttt_video.world.image_sets import alternate, part_of, spread
from ttt_video_cli import call

ELASTIC = "fashion_mnist_c_elastic_transform"


def picture(label: int, *tops: list[int], scores: list[list[float]] | None = None) -> dict:
    """A record; of several predictions each is one after a step, and the last is the picture's."""
    scores = scores or [[0.5, 0.25, 0.125][: len(top)] for top in tops]
    steps = [
        {"top": top, "score": dict(zip(top, own, strict=True)).get(label, 0.0), "scores": own}
        for top, own in zip(tops, scores, strict=True)
    ]
    found = {"label": label, **steps[-1]}
    return {**found, "steps": steps} if len(steps) > 1 else found


def write_run(
    folder: Path,
    records: list[dict],
    *,
    method: str = "ttt_mae_no_memory",
    dataset: str = ELASTIC,
    order: list[int] | None = None,
    frozen: list[dict] | None = None,
    **facts,
) -> Path:
    folder.mkdir()
    lines = []
    for index in order or range(len(records)):
        row = {"video_id": "v", "frame_index": index, "file_name": f"f#{index}"}
        row["records"] = {"image_classes": records[index]}
        if frozen:
            row["frozen"] = {"records": {"image_classes": frozen[index]}}
        lines.append(json.dumps(row) + "\n")
    (folder / "frames.jsonl").write_text("".join(lines))
    settings = {"RESET": "frame", "FRAME_ORDER": "time", "RECORD_STEPS": len(lines) > 2}
    summary = {
        "complete": True, "dataset": dataset, "seed": 0, "method": method, "weights_sha256": "w",
        "settings": {**settings, "OPTIMIZER": {"BASE_LR": 0.5}},
    }  # fmt: skip
    summary.update(facts)
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


RIGHT, WRONG = picture(0, [0, 1]), picture(0, [1, 0])
FROZEN = [RIGHT, WRONG, RIGHT, WRONG]
ADAPTED = [
    picture(0, [0, 1], [0, 1], [0, 1]),  # right throughout
    picture(0, [1, 2], [1, 0], [0, 1]),  # becomes right
    picture(0, [0, 1], [1, 0], [2, 1]),  # becomes wrong, changes twice
    picture(0, [1, 2], [1, 2], [1, 2]),  # wrong throughout
]
HALF, QUARTER = "50.0 [-6.6, 106.6]", "25.0 [-24.0, 74.0]"
"""Shares of four pictures: standard deviations are 57.7 and 50, standard errors half of that."""
ONLINE = {"settings": {"RESET": "never", "FRAME_ORDER": "shuffled"}}


@pytest.fixture
def runs(tmp_path):
    return read_image_runs([
        write_run(tmp_path / "frozen", FROZEN, method="none"),
        write_run(tmp_path / "ttt", ADAPTED),
        write_run(
            tmp_path / "online", [RIGHT, RIGHT, RIGHT, WRONG], method="online_ttt_mae",
            order=[3, 0, 1, 2], **ONLINE,
        ),
    ])  # fmt: skip


def test_numbers_of_a_run(runs):
    frozen, ttt, online = runs
    assert [run.row for run in runs] == ["Baseline", "TTT-MAE", "TTT-MAE online, shuffled"]
    assert [found.percent for found in after_each_step([ttt])] == [50.0, 25.0, 50.0]
    assert [changes(record) for record in ttt.records.values()] == [0, 1, 2, 0]
    assert [*change_counts([ttt])] == [0, 1, 2]
    # Shares of a quarter of four pictures: a standard deviation of 50, and so 1.96 x 25 each way.
    quarter = Share(25.0, Interval(25.0 - 49.0, 25.0 + 49.0))
    assert change_counts([ttt])[2] == quarter
    assert {*four_cases([ttt], frozen).values()} == {quarter}
    assert (frozen.steps, ttt.steps) == (0, 3)
    # The stream met picture 3 first, which is wrong; then three that are right.
    assert moving_accuracy(online, 2) == [50.0, 100.0, 100.0]
    assert moving_accuracy(online, 4) == [75.0]
    assert moving_accuracy(online, 5) == []


def test_intervals_are_those_of_pictures(runs):
    frozen, _, online = runs
    found = share(by_picture([online]).values())
    # Values 100, 100, 100, 0: a standard deviation of 50, and so a standard error of 25.
    assert found.percent == 75.0
    assert found.interval == pytest.approx((75 - 1.96 * 25, 75 + 1.96 * 25))
    found = gain(by_picture([online]), by_picture([frozen]))
    assert found.percent == 25.0
    assert found.interval == pytest.approx((25 - 1.96 * 25, 25 + 1.96 * 25))
    assert share([100.0]).interval is None


def test_seeds_are_averaged_by_picture(tmp_path):
    paths = [write_run(tmp_path / "a", [RIGHT, WRONG, RIGHT], seed=0)]
    paths.append(write_run(tmp_path / "b", [RIGHT, WRONG, WRONG], seed=1))
    runs = read_image_runs(paths)
    assert by_picture(runs) == {0: 100.0, 1: 0.0, 2: 50.0}
    (line,) = image_tables(runs)[0].rows
    assert line[:5] == ["TTT-MAE", ELASTIC, "3", "0 1", "50.0 ± 23.6"]  # of 66.7 and 33.3
    assert line[-1] == "100.0 ± 0.0"  # top-5


def test_tables_have_ours_and_the_published(runs):
    tables = {table.title: table for table in image_tables(runs)}
    assert [line[1] for line in tables["Table 3 of the report"].rows] == [
        f"{HALF} (31.4)", f"{HALF} (43.8)", "75.0 [26.0, 124.0] (62.0)",
    ]  # fmt: skip
    assert tables["Table 1 of the report: who is right"].rows == [
        ["TTT-MAE", ELASTIC, QUARTER, f"{QUARTER} (13.42)", f"{QUARTER} (1.02)", QUARTER],
        ["TTT-MAE online, shuffled", ELASTIC, HALF, QUARTER, "0.0 [0.0, 0.0]", QUARTER],
    ]
    # Right before and after: pictures 0 and 2, then 0, 2, then 0, then 0 and 1.
    assert tables["Accuracy (top-1) after each step"].rows == [
        ["0", HALF, "+0.0 [-80.0, +80.0]"], ["1", HALF, "+0.0 [-80.0, +80.0]"],
        ["2", QUARTER, "+25.0 [-24.0, +74.0]"], ["3", HALF, "–"],
    ]  # fmt: skip
    assert tables["Changes of the predicted class"].rows == [
        ["TTT-MAE", ELASTIC, f"{HALF} (62.3)", "25.0", "25.0", "0.75"]
    ]
    assert tables["Differences in top-1"].rows == [
        ["TTT-MAE online, shuffled, less TTT-MAE", ELASTIC, "all", "4", "+25.0", "[-24.0, +74.0]"]
    ]
    accuracy = tables["Accuracy"].rows
    assert accuracy[2][6:8] == ["+25.0", "[-24.0, +74.0]"]
    assert "Table 2 of the report, and severities" not in tables
    lines = [*csv.DictReader(io.StringIO(FORMATS["csv"]([*tables.values()])))]
    assert lines[2]["gain"] == "+25.0"
    assert lines[2]["gain, 95 % interval"] == "[-24.0, +74.0]"
    assert FORMATS["latex"]([*tables.values()]).count(r"\toprule") == len(tables) == 6


def test_a_stream_of_two_corruptions_is_split_by_them(tmp_path):
    pair = "fashion_mnist_c_gaussian_noise+elastic_transform"
    names = [alternate("gaussian_noise", "elastic_transform", i).corruption for i in range(4)]
    assert sorted(names) == ["elastic_transform"] * 2 + ["gaussian_noise"] * 2
    records = [RIGHT if name == "gaussian_noise" else WRONG for name in names]
    first = {"settings": {"RESET": "never", "FRAME_ORDER": "first"}}
    (run,) = read_image_runs(
        [write_run(tmp_path / "r", records, method="online_ttt_mae", dataset=pair, **first)]
    )
    assert list(by_part(run).values()) == names
    tables = {table.title: table.rows for table in image_tables([run])}
    row = "TTT-MAE online, gaussian_noise first"
    assert [line[:1] + line[2:5] for line in tables["Table 2 of the report, and severities"]] == [
        [row, "elastic_transform", "2", "0.0 (60.0)"],
        [row, "gaussian_noise", "2", "100.0 (35.7)"],
        [row, "all", "4", "50.0 (47.8)"],
    ]
    shuffled = {"settings": {"RESET": "never", "FRAME_ORDER": "shuffled"}}
    other = write_run(
        tmp_path / "m", [RIGHT] * 4, method="online_ttt_mae", dataset=pair, **shuffled
    )
    (mixed,) = read_image_runs([other])
    (table,) = [t for t in image_tables([run, mixed]) if t.title.startswith("Differences")]
    assert [line[2:] for line in table.rows] == [
        ["elastic_transform", "2", "+100.0", "[+100.0, +100.0]"],
        ["gaussian_noise", "2", "+0.0", "[+0.0, +0.0]"],
        ["all", "4", "+50.0", "[-6.6, +106.6]"],
    ]
    assert "Table 3 of the report" not in tables
    turned = write_run(
        tmp_path / "s", records, method="online_ttt_mae",
        dataset="fashion_mnist_c_elastic_transform+gaussian_noise",
        settings={"RESET": "never", "FRAME_ORDER": "second"},
    )  # fmt: skip
    (same,) = read_image_runs([turned])
    assert (same.row, by_part(same)) == (row, by_part(run))


def test_a_ramp_is_split_by_severity(tmp_path):
    ramp = "fashion_mnist_c_motion_blur_ramp"
    (run,) = read_image_runs([write_run(tmp_path / "r", FROZEN, dataset=ramp, method="none")])
    # Multiples of the golden ratio, times 5: 0, 3.09, 1.18, 4.27.
    assert [int(spread("motion_blur", i).severity) for i in range(4)] == [0, 3, 1, 4]
    assert by_part(run) == {
        0: "severity 0 to 1", 1: "severity 3 to 4", 2: "severity 1 to 2", 3: "severity 4 to 5",
    }  # fmt: skip
    assert part_of("fashion_mnist_test", 0) is None


def test_examples_are_of_four_kinds(tmp_path):
    records = [
        picture(0, [1, 0], [0, 1], scores=[[0.6, 0.4], [0.7, 0.3]]),  # gains 0.3
        picture(0, [1, 0], [0, 1], scores=[[0.9, 0.1], [0.8, 0.2]]),  # gains 0.7
        picture(0, [1, 0], [1, 0], scores=[[0.6, 0.4], [0.8, 0.2]]),  # misses by 0.6
        picture(0, [0, 1], [1, 0], scores=[[0.6, 0.4], [0.51, 0.49]]),  # by 0.02
        picture(0, [2, 1], [2, 1], scores=[[0.6, 0.4], [0.95, 0.05]]),
        picture(0, [1], [2], [1], [2], scores=[[1.0]] * 4),
    ]
    (run,) = read_image_runs([write_run(tmp_path / "r", records)])
    assert [tuple(example) for example in examples(run)] == [
        ("success", 1), ("near miss", 3), ("oscillation", 5), ("constant failure", 4),
    ]  # fmt: skip
    assert scores_by_step(records[1]) == {0: [10.0, 80.0], 1: [90.0, 20.0]}
    lines = scores_by_step(records[5])
    assert [*lines] == [0, 1, 2]
    assert np.isnan(lines[1]).tolist() == [False, True, False, True]
    broken = {"top": [], "score": None, "scores": []}
    unknown = {"label": 0, **broken, "steps": [broken, broken]}
    assert changes(unknown) == 0
    assert image_runs._kinds(unknown) == {}


def test_a_run_with_its_frozen_model_is_enough(tmp_path):
    runs = read_image_runs([write_run(tmp_path / "r", ADAPTED, frozen=FROZEN)])
    assert sorted(run.row for run in runs) == ["Baseline", "TTT-MAE"]
    again = write_run(tmp_path / "s", ADAPTED, frozen=FROZEN, seed=1)
    runs = read_image_runs([tmp_path / "r", again])
    assert sorted(run.row for run in runs) == ["Baseline", "TTT-MAE", "TTT-MAE"]


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"weights_sha256": "x", "seed": 1}, "differ in weights"),
        ({"settings": {"RESET": "frame", "FRAME_ORDER": "class"}, "seed": 1}, "in settings"),
        ({}, "the same method with the same seed"),
        ({"complete": False}, "is not complete"),
    ],
)
def test_runs_that_do_not_compare_are_refused_in_a_line(tmp_path, facts, message):
    paths = [write_run(tmp_path / "a", ADAPTED), write_run(tmp_path / "b", ADAPTED, **facts)]
    with pytest.raises(UserError, match=message) as error:
        read_image_runs(paths)
    assert "\n" not in str(error.value)


def test_other_pictures_and_other_runs_are_refused(tmp_path):
    paths = [write_run(tmp_path / "a", ADAPTED)]
    fewer = write_run(tmp_path / "b", ADAPTED[:3], seed=1)
    with pytest.raises(UserError, match="differ in pictures"):
        read_image_runs([*paths, fewer])
    cut = read_image_runs([*paths, fewer], allow_incomplete=True)
    assert [list(run.records) for run in cut] == [[0, 1, 2]] * 2
    (fewer / "frames.jsonl").write_text("")
    with pytest.raises(UserError, match="no rows with classes of images"):
        read_image_runs([fewer])


def test_figures(runs, tmp_path):
    files = draw_image_runs(runs, tmp_path, width=2)
    assert sorted(file.name for file in files) == [
        "accuracy.svg", "changes.svg", "examples-ttt.svg", f"moving-{ELASTIC}.svg", "steps.svg",
    ]  # fmt: skip
    assert all(file.read_text().count("<svg") == 1 for file in files)
    assert draw_image_runs([], tmp_path) == []


def test_sets_of_one_family_go_by_their_corruptions():
    pair = "fashion_mnist_c_fog+frost"
    assert image_figures._short_names([ELASTIC, pair]) == {
        ELASTIC: "elastic_transform", pair: "fog+frost",
    }  # fmt: skip
    both = ["fashion_mnist_c_fog", "imagenet_c_fog"]
    assert image_figures._short_names(both) == dict(zip(both, both, strict=True))


def test_the_commands(tmp_path, capsys):
    run = str(write_run(tmp_path / "r", ADAPTED, frozen=FROZEN))
    partial(call, "table")([run, "--layout", "images"])
    assert f"| TTT-MAE | {HALF} (43.8) |" in capsys.readouterr().out
    partial(call, "plot")([run, "--output", str(tmp_path / "figures"), "--extremes", "0"])
    assert (tmp_path / "figures/steps.svg").is_file()
    assert "steps.svg" in capsys.readouterr().out
    with pytest.raises(UserError, match="leave out --metric"):
        partial(call, "table")([run, "--layout", "images", "--metric", "top1"])
