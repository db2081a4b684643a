"""Workers are built of the right parts; other tests compare their numbers with one process."""

from __future__ import annotations

import sys

import pytest
from detectron2.data import MetadataCatalog

from ttt_video.adaptation import ADAPTER_REGISTRY, find_method
from ttt_video.errors import UserError
from ttt_video.stream import RunDirectory, Settings, evaluate_in_parallel
from ttt_video.stream import parallel as parallel_evaluation


def test_a_worker_runs_the_registered_files_first(tiny_cfg, tmp_path, monkeypatch):
    """A spawned process knows no method and no data set of the user's own."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(parallel_evaluation.torch, "set_num_threads", lambda threads: None)
    built = []
    monkeypatch.setattr(
        parallel_evaluation, "load_source_model", lambda cfg: built.append(find_method("own_one"))
    )
    monkeypatch.setattr(parallel_evaluation, "StreamEvaluation", lambda *args, **kwargs: None)
    file = tmp_path / "own.py"
    file.write_text(
        "from detectron2.data import MetadataCatalog\n"
        "from ttt_video.adaptation import ADAPTER_REGISTRY, NoAdaptation\n"
        "ADAPTER_REGISTRY._do_register('own_one', NoAdaptation)\n"
        "MetadataCatalog.get('own_set').set(classes=['a'])\n"
    )
    run = RunDirectory(tmp_path / "run")
    MetadataCatalog.get("own_set").set(classes=["a"], colors=["b"])
    settings = Settings(tiny_cfg, run, dataset_name="own_set", register=[str(file)])
    orders = parallel_evaluation.Orders.of(settings)
    MetadataCatalog.remove("own_set")  # as in a new process
    try:
        orders.build("cpu", 1)
        assert [method.runs for method in built] == ["own_one"]
        known = MetadataCatalog.get("own_set").as_dict()
        assert (known["classes"], known["colors"]) == (["a"], ["b"])
    finally:
        MetadataCatalog.remove("own_set")
        ADAPTER_REGISTRY._obj_map.pop("own_one", None)
        run.close()


def test_a_run_that_cannot_start_leaves_its_folder_to_others(tiny_cfg, tmp_path):
    settings = Settings(tiny_cfg, RunDirectory(tmp_path))
    with pytest.raises(UserError, match="no weights") as error:
        evaluate_in_parallel(settings, [], 2)
    RunDirectory(tmp_path).close()
    assert error.tb is not None  # it still refers to the run, which was closed, not collected
