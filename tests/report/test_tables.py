"""Tables of made-up runs: every number by hand, every format read back."""

from __future__ import annotations

import csv
import io
import re

import pytest
from summaries import RULES, TEST_SET, summary, write

from ttt_video.errors import UserError
from ttt_video.report.published import TABLE_1, TEST, VAL
from ttt_video.report.runs import read_runs
from ttt_video.report.tables import Cell, build_table, to_csv, to_latex, to_markdown


@pytest.fixture
def table_of(tmp_path):
    def build(*summaries, **arguments):
        return build_table(read_runs(write(tmp_path, *summaries)), **arguments)

    return build


def test_ours_beside_the_published(table_of):
    table = table_of(summary(mean=56.0, frozen=53.0), summary("tent", mean=52.0, frozen=53.0))
    assert [column.title for column in table.columns] == [VAL]
    assert list(table.rows) == [row.name for row in TABLE_1.values()]  # all of them, in order
    online = table.rows["Online TTT-MAE"][VAL]
    assert (online.value, online.published, online.seeds) == (56.0, 55.4, (0,))
    # Every one of the nine videos gains 3: the interval is a point, p = 2 / 2^9.
    assert online.gain.difference == (9, 3.0, (3.0, 3.0))
    assert online.gain.p_permutation == online.gain.p_wilcoxon == 2 / 512
    assert table.rows["Tent"][VAL].gain.difference.mean == -1.0
    frozen = table.rows["MAE Joint Training"][VAL]
    assert (frozen.value, frozen.published, frozen.gain) == (53.0, 53.5, None)
    assert table.rows["Self-Train"][VAL] == Cell(published=54.7)
    assert table.seconds["Online TTT-MAE"] == (0.5, 4.1)
    assert table.seconds["MAE Joint Training"] == (0.2, 1.8)
    assert table.seconds["Self-Train"] == (None, 6.6)
    assert table.rules == {VAL: RULES["mIoU"]}


def test_memory_ablation(table_of):
    runs = [summary(m) for m in ("online_ttt_mae", "explicit_only", "ttt_mae_no_memory", "tent")]
    table = table_of(*runs, layout="table4")
    assert list(table.rows) == [
        "TTT-MAE No Memory",
        "Tent",  # not of this table, but run; in the paper's order
        "Online TTT-MAE",
        "Implicit Memory Only",
        "Explicit Memory Only",
    ]
    assert table.rows["Implicit Memory Only"][VAL] == Cell(published=54.3)
    assert table.rows["Tent"][VAL].published is None


def test_frozen_reference_of_another_run(table_of):
    table = table_of(
        summary(mean=56.0), summary("joint_training", mean=50.0, seconds={"frame": {"mean": 0.1}})
    )
    assert table.rows["Online TTT-MAE"][VAL].gain.difference.mean == 6.0
    assert table.seconds["MAE Joint Training"] == (0.1, 1.8)


def test_no_gain_over_other_weights(table_of):
    main_only = summary("none", mean=50.0, jointly_trained=False, weights_sha256="b" * 64)
    table = table_of(summary(mean=56.0), main_only)
    assert table.rows["Online TTT-MAE"][VAL].gain is None
    assert table.rows["Main Task Only"][VAL].value == 50.0


def test_a_frozen_model_alone_has_no_seeds(table_of):
    table = table_of(summary("none", mean=50.0))
    assert table.notes
    assert not any("Seeds" in note for note in table.notes)


def test_seeds_are_averaged(table_of):
    table = table_of(*(summary(mean=m, frozen=53.0, seed=s) for s, m in ((4, 55.0), (2, 57.0))))
    cell = table.rows["Online TTT-MAE"][VAL]
    assert (cell.value, cell.seeds) == (56.0, (2, 4))
    assert cell.deviation == pytest.approx(2**0.5)
    assert cell.gain.difference == (9, 3.0, (3.0, 3.0))  # 9 videos, not 18
    assert "56.00 ± 1.41 (55.4, +0.60)" in to_markdown(table)
    assert any("Seeds: 2, 4" in note for note in table.notes)


def test_release_protocol(table_of):
    table = table_of(summary(mean=56.0), protocol="release")
    assert table.rows["Online TTT-MAE"][VAL].value == 55.0
    assert table.rules == {VAL: RULES["mIoU_frame_release"]}
    assert any("Protocol: release" in note for note in table.notes)


def test_mean_over_videos_as_protocol(table_of):
    table = table_of(summary(mean=56.0, frozen=53.0), protocol="video")
    cell = table.rows["Online TTT-MAE"][VAL]
    assert cell.value == cell.over_videos.mean == 56.0
    assert cell.gain.difference.mean == 3.0
    assert table.rules == {VAL: RULES["mIoU_video_mean"]}


def colored(run, **numbers):
    """The summary with metrics of colorization, the same in every video."""
    for who, share in (("adapted", 1.0), ("frozen", 0.5)):
        found = {name: share * value for name, value in numbers.items()}
        scores = run["metrics"].get(who)
        if scores:
            scores.clear()
            scores.update(found, videos=dict.fromkeys(run["videos"], found))
    run["protocols"] = dict.fromkeys(numbers, "some rule")
    return run


def test_colorization(table_of):
    run = summary(frozen=1.0, dataset="")
    run = colored(run, PSNR=24.0, SSIM=0.8, FID_lite0=30.0, colorfulness=20.0, CDC=0.001)
    table = table_of(run, layout="table3")
    ours = [f"unnamed videos {m}" for m in ("FID_lite0", "PSNR", "SSIM", "colorfulness", "CDC")]
    papers = [f"COCO Videos {m}" for m in ("FID", "IS", "LPIPS", "PSNR", "SSIM")]
    assert [column.title for column in table.columns] == [*papers, *ours]
    assert list(table.rows) == [
        "Zhang et al.", "Main Task Only", "MAE Joint Training", "Online TTT-MAE",
    ]  # fmt: skip
    assert table.rows["Main Task Only"]["COCO Videos LPIPS"] == Cell(published=0.216)
    first, over_videos = to_markdown(table).split("\nOver videos")
    lines = first.splitlines()
    assert [cell[-1] for cell in lines[0].split(" | ")[1:-1]] == [*"↓↑↓↑↑", *"↓↑↑", "s", "↓"]
    zhang = "| Zhang et al. | – (62.39) | – (5.00) | – (0.180) | – (22.27) | – (0.924) | – | – |"
    assert lines[2].startswith(zhang)
    assert "| 30.00 | 24.00 | 0.800 | 20.00 | 0.00100 |" in lines[5]
    assert (
        "| Online TTT-MAE | unnamed videos CDC ↓ | 2 | 0.00100 | [0.00100, 0.00100] | +0.00050 |"
    ) in over_videos
    assert "COCO Videos LPIPS: as printed" in over_videos
    assert "; lower is better." in over_videos
    assert "of LPIPS, where lower is better, Online TTT-MAE's is the worst" in over_videos
    assert r"LPIPS $\downarrow$" in to_latex(table)


def test_the_network_of_zhang_et_al_has_their_row(table_of):
    facts = {"architecture": "ZhangColorizer", "depths": None, "weights_sha256": "b" * 64}
    ours = colored(summary(dataset=""), PSNR=24.0)
    theirs = colored(summary("none", dataset="", **facts), PSNR=20.0)
    table = table_of(ours, theirs, layout="table3")
    row = table.rows["Zhang et al."]
    assert row["unnamed videos PSNR"].value == 20.0
    assert row["COCO Videos PSNR"].published == 22.27
    assert "MAE Joint Training" not in table.rows


def test_colorization_by_video(table_of):
    run = colored(summary(dataset=""), PSNR=24.0, SSIM=0.8)
    table = table_of(run, layout="table3", by="video")
    metrics = ("PSNR", "SSIM")
    expected = [f"unnamed videos {metric} {video}" for metric in metrics for video in "ab"]
    assert [column.title for column in table.columns] == expected


def test_arrows_stand_where_directions_differ(table_of):
    run = summary()
    run["metrics"]["adapted"]["flicker"] = 2.0
    run["protocols"]["flicker"] = "some rule"
    head = to_markdown(table_of(run, metrics=["flicker"])).splitlines()[0]
    assert head == f"| Method | {VAL} ↑ | {run['dataset']} flicker ↓ | seconds per frame |"


def test_no_arrows_stand_where_all_directions_are_one(table_of):
    assert "↑" not in to_markdown(table_of(summary()))


def with_classes(run, ious):
    """The summary with IoUs of classes, and of the frozen model 1 less each."""
    run["classes"] = ["road", "sky", "car"]
    for lower, who in enumerate(("adapted", "frozen")):
        if who in run["metrics"]:
            run["metrics"][who]["per_class"] = {"IoU": {k: v - lower for k, v in ious.items()}}
    return run


def test_by_class(table_of):
    runs = [
        with_classes(summary(frozen=40.0, seed=0), {"sky": 50.0, "road": 90.0}),
        with_classes(summary(seed=1), {"sky": 52.0, "road": 91.0}),
    ]
    table = table_of(*runs, by="class")
    assert [(c.title, c.whole) for c in table.columns] == [("road", VAL), ("sky", VAL)]
    assert list(table.rows) == ["MAE Joint Training", "Online TTT-MAE"]
    assert table.rows["MAE Joint Training"]["road"] == Cell(89.0)
    sky = table.rows["Online TTT-MAE"]["sky"]
    assert (sky.value, sky.seeds, sky.published, sky.gain) == (51.0, (0, 1), None, None)
    assert table.rules == {VAL: f"by class: {RULES['mIoU']}"}
    text = to_markdown(table)
    assert "| Method | road | sky | seconds per frame |" in text
    assert "| Online TTT-MAE | 90.50 ± 0.71 | 51.00 ± 1.41 | 0.500 |" in text
    assert f"- {VAL}: by class: {RULES['mIoU']}.\n" in text
    assert "JMLR" not in text
    assert r"Method & road & sky & seconds" in to_latex(table)
    lines = list(csv.DictReader(io.StringIO(to_csv(table))))
    assert [(n["method"], n["part"], float(n["ours"])) for n in lines] == [
        ("MAE Joint Training", "road", 89.0),
        ("MAE Joint Training", "sky", 49.0),
        ("Online TTT-MAE", "road", 90.5),
        ("Online TTT-MAE", "sky", 51.0),
    ]
    assert lines[0]["rule"] == table.rules[VAL]


def test_by_video(table_of):
    table = table_of(summary(dataset="world", frozen=40.0), by="video", protocol="release")
    assert [c.title for c in table.columns] == ["a", "b"]
    assert table.rows["Online TTT-MAE"]["a"].value == 49.5
    assert table.rows["Online TTT-MAE"]["b"].value == 50.5
    assert table.rows["MAE Joint Training"]["b"].value == 40.5
    assert table.rules == {"world mIoU": f"by video: {RULES['mIoU_frame_release']}"}


def test_by_video_of_several_data_sets(table_of):
    table = table_of(summary(dataset="world"), summary(dataset="other"), by="video")
    titles = ["other mIoU a", "other mIoU b", "world mIoU a", "world mIoU b"]
    assert [c.title for c in table.columns] == titles
    assert all(table.rows["Online TTT-MAE"][title].value for title in titles)
    assert len(list(csv.DictReader(io.StringIO(to_csv(table))))) == 4


def test_what_is_not_computed_by_class(table_of):
    run = with_classes(summary(), {"sky": 50.0})
    with pytest.raises(UserError, match=r"run0 has no mIoU_frame_release by class; .* standard"):
        table_of(run, by="class", protocol="release")


def test_protocol_that_was_not_computed(table_of):
    run = summary(dataset="world")
    del run["metrics"]["adapted"]["mIoU_frame_release"]
    with pytest.raises(UserError, match="has mIoU, but not mIoU_frame_release"):
        table_of(run, protocol="release")


def test_both_splits_and_own_data_sets(table_of):
    table = table_of(
        summary(dataset="world_panoptic", metric="PQ"), summary(dataset=TEST_SET), summary()
    )
    assert [c.title for c in table.columns] == [VAL, TEST, "world_panoptic PQ"]
    assert table.rows["Online TTT-MAE"]["world_panoptic PQ"].published is None
    assert any("official train split" in note for note in table.notes)


def test_own_data_under_a_published_name_gets_no_published_number(table_of):
    table = table_of(summary(videos={"0002": 20}))
    assert [c.title for c in table.columns] == ["kitti_step_video_sem_seg_val mIoU"]
    assert list(table.rows) == ["Online TTT-MAE"]
    assert table.rows["Online TTT-MAE"]["kitti_step_video_sem_seg_val mIoU"].published is None
    assert table.seconds["Online TTT-MAE"] == (0.5, None)


def test_what_section_5_1_adds(table_of):
    vote = {"settings": {"ENSEMBLE": {"METHOD": "main_task_only"}}}
    segformer = {"architecture": "SegFormer", "depths": [3, 8, 27, 3]}
    table = table_of(summary("majority_vote", **vote), summary("none", **segformer))
    names = list(table.rows)
    assert names.index("Main Task Only + Majority Vote") == names.index("Main Task Only") + 1
    assert names[-1] == "SegFormer-B4"
    assert table.rows["Main Task Only + Majority Vote"][VAL].published == pytest.approx(55.0)
    assert table.rows["SegFormer-B4"][VAL].published == 42.0


def test_other_sizes_have_no_published_number(table_of):
    small = {"architecture": "SegFormer", "depths": [2, 2, 2, 2], "jointly_trained": False}
    table = table_of(summary("none", **small))
    assert table.rows["SegFormer (depth 2, 2, 2, 2)"][VAL].published is None


def test_seconds_of_offline_methods_compare_with_the_published(table_of):
    table = table_of(summary("offline_ttt_mae_oracle"), summary())
    assert table.seconds["Offline TTT-MAE All Frames"] == (0.3, 1.8)
    assert table.seconds["Online TTT-MAE"] == (0.5, 4.1)
    assert any("without their training" in note for note in table.notes)


def test_another_metric(table_of):
    run = summary(dataset="world")
    run["metrics"]["adapted"]["flicker"] = 3.5
    run["protocols"]["flicker"] = "share of pixels"
    table = table_of(run, metrics=("flicker",))
    assert [c.title for c in table.columns] == ["world mIoU", "world flicker"]
    assert table.rows["Online TTT-MAE"]["world flicker"].value == 3.5


def test_a_metric_that_no_run_has(table_of):
    with pytest.raises(UserError, match="metric 'flicker'; there are mIoU, mIoU_frame_release"):
        table_of(summary(), metrics=("flicker",))


def test_videos_without_labels_have_times(table_of):
    run = summary(dataset="", metrics={}, protocols={}, videos={"clip": 100})
    table = table_of(run)
    assert table.rows == {"Online TTT-MAE": {}}
    assert table.seconds == {"Online TTT-MAE": (0.5, None)}
    assert "| Online TTT-MAE | 0.500 |" in to_markdown(table)
    assert "Online TTT-MAE" in to_csv(table)


def test_undefined_metrics_and_videos(table_of):
    run = summary(dataset="world", frozen=40.0)
    run["metrics"]["adapted"]["videos"]["b"]["mIoU"] = None
    cell = table_of(run).rows["Online TTT-MAE"]["world mIoU"]
    assert cell.over_videos.videos == 1
    assert cell.over_videos.interval is None
    assert (cell.gain.difference.videos, cell.gain.p_permutation) == (1, 1.0)


def test_plain_layout_has_variants_and_nothing_published(table_of):
    table = table_of(summary(), summary(settings={"WINDOW_SIZE": 4}), layout="plain")
    assert list(table.rows) == ["Online TTT-MAE (WINDOW_SIZE 16)", "Online TTT-MAE (WINDOW_SIZE 4)"]
    assert not any("JMLR" in note for note in table.notes)


def test_notes_say_what_must_be_said(table_of):
    table = table_of(
        summary(complete=True, device="H100"),
        summary("tent", device="A100"),
    )
    text = "\n".join(table.notes)
    assert "Preset: paper" in text
    assert "9 videos, 2,981 frames; weights aaaaaaaaaaaa." in text
    assert "A100; H100" in text
    assert "do not compare" in text
    assert "JMLR 26 (2025)" in text
    assert "INCOMPLETE" not in text


def test_incomplete_runs_are_marked(tmp_path):
    parts = read_runs(write(tmp_path, summary(complete=False)), allow_incomplete=True)
    assert any("INCOMPLETE" in note and "run0" in note for note in build_table(parts).notes)


def test_markdown_has_as_many_cells_in_every_line(table_of):
    text = to_markdown(table_of(summary(frozen=49.0), summary(dataset=TEST_SET)))
    first, second = re.findall(r"(?:^\|.*\n)+", text, re.M)
    assert len({line.count("|") for line in first.splitlines()}) == 1
    assert len({line.count("|") for line in second.splitlines()}) == 1
    assert "| Tent | – (53.8) | – (52.2) | – (2.8) |" in first
    assert "| Online TTT-MAE | KITTI-STEP val | 9 | 50.00 | [" in second
    assert f"- KITTI-STEP val: {RULES['mIoU']}." in text


def test_csv_reads_back(table_of):
    text = to_csv(table_of(summary(mean=56.0, frozen=53.0)))
    lines = {line["method"]: line for line in csv.DictReader(io.StringIO(text))}
    online = lines["Online TTT-MAE"]
    assert float(online["ours"]) == 56.0
    assert float(online["difference"]) == pytest.approx(0.6)
    assert (online["gain"], online["gain_low"], online["gain_high"]) == ("3.0", "3.0", "3.0")
    assert float(online["p_wilcoxon"]) == 2 / 512
    assert online["rule"] == RULES["mIoU"]
    assert (lines["Tent"]["ours"], lines["Tent"]["published"]) == ("", "53.8")


def test_latex_is_escaped_and_balanced(table_of):
    run = summary(dataset="my_set", protocols={"mIoU": "100 % of {pixels} & no_more", "x": ""})
    text = to_latex(table_of(run))
    assert text.count(r"\begin{tabular}") == text.count(r"\end{tabular}") == 2
    assert r"my\_set mIoU" in text
    assert r"100 \% of \{pixels\} \& no\_more" in text
    assert not re.search(r"(?<!\\)[%#_]", text)
    rows = re.findall(r"\\midrule\n(.*?)\\bottomrule", text, re.S)
    assert all(line.endswith(r" \\") for row in rows for line in row.splitlines())


def test_a_metric_asked_for_that_is_shown_anyway_stands_once(table_of):
    table = table_of(summary(), layout="plain", metrics=("mIoU", "mIoU"))
    assert [column.metric for column in table.columns] == ["mIoU"]


def test_a_folder_of_runs_is_answered_with_how_to_name_them(tmp_path):
    write(tmp_path, summary())
    with pytest.raises(
        UserError, match=r"summary\.json cannot be read: .*; the folder holds runs"
    ) as e:
        read_runs([tmp_path])
    assert str(e.value).endswith(f"give {tmp_path}/*")
