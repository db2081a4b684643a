"""What may share a table: every refusal, and what is no reason for one."""

from __future__ import annotations

import pytest
from summaries import TEST_SET, VAL_SET, summary, write

from ttt_video.errors import UserError
from ttt_video.report.runs import check_comparable, read_runs, row_names

SEGFORMER = {"architecture": "SegFormer", "depths": [3, 8, 27, 3]}


def check(folder, *summaries):
    parts = read_runs(write(folder, *summaries))
    check_comparable(parts)
    row_names(parts, variants=False)


def refused(folder, *summaries, match):
    with pytest.raises(UserError, match=match) as raised:
        check(folder, *summaries)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"preset": "release"}, "different presets .* paper in .*run0, release in .*run1"),
        ({"weights_sha256": "b" * 64}, "different weights"),
        ({"videos": {"0002": 12}}, r"different frames per video .*\{'0002': 12\} in .*run1"),
        ({"protocols": {"mIoU": "another"}}, "different protocols of mIoU"),
        ({"seed": 1}, r"seeds on .*val: \[0\] of Online TTT-MAE, \[1\] of Tent"),
    ],
)
def test_other_conditions_are_refused(tmp_path, change, match):
    refused(tmp_path, summary(), summary("tent", **change), match=match)


def test_frozen_model_must_be_the_same(tmp_path):
    one, two = summary(frozen=50.0), summary("tent", frozen=50.3)
    refused(tmp_path, one, two, match="frozen model has mIoU 50.00 in .* and 50.30 in .*run1")
    check(tmp_path / "b", one, summary("tent", frozen=50.05))


def test_the_same_run_twice(tmp_path):
    refused(tmp_path, summary(), summary(), match="same run with the same seed")
    (path,) = write(tmp_path / "b", summary())
    with pytest.raises(UserError, match="given twice"):
        read_runs([path, path + "/."])


def test_seeds_of_every_method(tmp_path):
    seeds = [summary(seed=0), summary(seed=1), summary("tent", seed=0)]
    refused(tmp_path, *seeds, match=r"\[0, 1\] of Online TTT-MAE, \[0\] of Tent")


def test_frozen_models_need_no_seed_and_their_own_weights_may_differ(tmp_path):
    parts = read_runs(
        write(
            tmp_path,
            summary(seed=3),
            summary("joint_training", seed=7),
            summary("none", jointly_trained=False, weights_sha256="b" * 64),
            summary("none", **SEGFORMER, weights_sha256="c" * 64),
            summary(dataset=TEST_SET, seed=4, weights_sha256="d" * 64),
        )
    )
    check_comparable(parts)
    assert list(row_names(parts, variants=False).values()) == [
        "Online TTT-MAE",
        "MAE Joint Training",
        "Main Task Only",
        "SegFormer-B4",
        "Online TTT-MAE",
    ]


def test_variants_of_a_method(tmp_path):
    four = {"settings": {"WINDOW_SIZE": 4, "OPTIMIZER": {"BASE_LR": 0.1}}}
    runs = [
        summary(settings={"OPTIMIZER": {"BASE_LR": 0.2}}),
        summary(**four),
        summary(dataset=TEST_SET, settings={"WINDOW_SIZE": 9, "OPTIMIZER": {"BASE_LR": 0.2}}),
    ]
    match = "runs of Online TTT-MAE differ in TTT.OPTIMIZER.BASE_LR, TTT.WINDOW_SIZE"
    refused(tmp_path, *runs, match=match)
    parts = read_runs(write(tmp_path / "plain", *runs))
    assert list(row_names(parts, variants=True).values()) == [
        "Online TTT-MAE (OPTIMIZER.BASE_LR 0.2, WINDOW_SIZE 16)",
        "Online TTT-MAE (OPTIMIZER.BASE_LR 0.1, WINDOW_SIZE 4)",
        "Online TTT-MAE (OPTIMIZER.BASE_LR 0.2, WINDOW_SIZE 9)",
    ]


def test_settings_of_other_data_sets_may_differ(tmp_path):
    runs = [summary(), summary(dataset=TEST_SET, settings={"WINDOW_SIZE": 4})]
    parts = read_runs(write(tmp_path, *runs))
    check_comparable(parts)
    assert set(row_names(parts, variants=False).values()) == {"Online TTT-MAE"}


def test_names_of_methods(tmp_path):
    smoothing = {"ENSEMBLE": {"METHOD": "none"}}
    parts = read_runs(
        write(
            tmp_path,
            summary("temporal_smoothing", settings=smoothing, frozen=40.0),
            summary("offline_ttt_mae_oracle"),
            summary("something_new"),
        )
    )
    assert [part.name for part in parts] == [
        "MAE Joint Training + Temporal Smoothing",
        "MAE Joint Training",
        "Offline TTT-MAE All Frames",
        "something_new",
    ]


@pytest.mark.parametrize(
    ("architecture", "depths", "name"),
    [
        ("SegFormer", [3, 8, 27, 3], "SegFormer-B4"),
        ("SegFormer", [2, 2, 2, 2], "SegFormer (depth 2, 2, 2, 2)"),
        ("DeepLabV3Plus", [101], "DeepLabV3+/RN101"),
        ("DeepLabV3Plus", [50], "DeepLabV3Plus (depth 50)"),
        ("SegFormer", None, "SegFormer"),
        ("Another", None, "Another"),
    ],
)
def test_names_of_other_architectures(tmp_path, architecture, depths, name):
    facts = {"architecture": architecture, "depths": depths, "jointly_trained": False}
    vote = {"ENSEMBLE": {"METHOD": "none"}}
    runs = [summary("none", **facts), summary("ln_adapt", **facts, frozen=48.0)]
    runs.append(summary("majority_vote", **facts, settings=vote))
    parts = read_runs(write(tmp_path, *runs))
    assert [part.name for part in parts] == [
        name, f"{name} + LN Adapt", name, f"{name} + Majority Vote",
    ]  # fmt: skip


def test_sizes_of_an_architecture_have_their_own_weights(tmp_path):
    small = {**SEGFORMER, "depths": [2, 2, 2, 2], "weights_sha256": "c" * 64}
    check(tmp_path / "a", summary("none", **SEGFORMER), summary("none", **small))
    small["depths"] = SEGFORMER["depths"]
    runs = summary("none", **SEGFORMER), summary("none", **small)
    refused(tmp_path / "b", *runs, match="different weights")


def test_seconds_of_offline_methods_are_without_their_training(tmp_path):
    smoothing = {"ENSEMBLE": {"METHOD": "offline_ttt_mae"}}
    runs = [summary("offline_ttt_mae", frozen=40.0), summary("offline_ttt_mae_oracle"), summary()]
    runs.append(summary("temporal_smoothing", settings=smoothing))
    parts = read_runs(write(tmp_path, *runs))
    assert [part.seconds for part in parts] == [0.3, 0.2, 0.3, 0.5, 0.3]


def test_folders_without_a_finished_run(tmp_path):
    with pytest.raises(UserError, match=r"summary\.json cannot be read: No such file"):
        read_runs([tmp_path])
    (tmp_path / "summary.json").write_text("{")
    with pytest.raises(UserError, match="is no JSON file"):
        read_runs([tmp_path])
    (tmp_path / "summary.json").write_text('{"complete": true, "frames": 3}')
    with pytest.raises(UserError, match=r"has no dataset, videos, .*: another version"):
        read_runs([tmp_path])
    with pytest.raises(UserError, match="no runs"):
        check_comparable([])


def test_incomplete_runs_only_when_asked(tmp_path):
    paths = write(tmp_path, summary(complete=False))
    with pytest.raises(UserError, match="run0 is not complete"):
        read_runs(paths)
    (part,) = read_runs(paths, allow_incomplete=True)
    assert part.dataset == VAL_SET
