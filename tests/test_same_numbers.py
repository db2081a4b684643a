"""The comparison of two revisions finds what differs, and nothing else."""

from __future__ import annotations

from same_numbers import CASES, METHODS, compare

from ttt_video.adaptation import method_names

ROW = {"loss_recon": 0.25, "records": {"sem_seg": [[1, 2], [3, 4]]}, "predict_seconds": 1.0}


def test_only_times_may_differ():
    assert compare(ROW, {**ROW, "predict_seconds": 2.0}) == ([], [])
    differences, added = compare(ROW, {**ROW, "loss_recon": 0.25000000000000006})
    assert differences == [".loss_recon: 0.25 became 0.25000000000000006"]
    assert added == []


def test_what_is_gone_differs_and_what_is_new_is_named():
    after = {"loss_recon": 0.25, "records": {"sem_seg": [[1, 2], [3]]}, "undone_steps": 0}
    assert compare(ROW, after) == ([".records.sem_seg[1][1] is gone"], [".undone_steps"])


def test_every_method_is_a_case():
    assert set(METHODS) == set(method_names())
    assert set(METHODS) <= set(CASES)
