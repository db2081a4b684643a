"""Workers are built of the right parts; other tests compare their numbers with one process."""

from __future__ import annotations

import multiprocessing
import sys
from contextlib import closing
from types import SimpleNamespace

import pytest
import torch
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


@pytest.mark.parametrize(
    ("save_every", "live", "told"),
    [
        (50, False, "all rows are kept, --resume goes on"),
        (50, True, "all rows are kept, --resume goes on"),
        (0, False, r"but no state is \(--save-every 0\): --resume begins unfinished videos anew"),
        (0, True, r"but no state is \(--save-every 0\): --resume refuses live sources"),
    ],
)
def test_a_worker_s_failure_says_what_resuming_does(
    tiny_cfg, tmp_path, monkeypatch, save_every, live, told
):
    """Without states a live source is refused: see tests/stream/test_live_resume.py."""
    source = SimpleNamespace(video_id="street", num_frames=3, live=live, fps=None, fingerprint=None)

    class Process:
        exitcode = -9

        def __init__(self, **settings):
            (_, _, self.connection, _) = settings["args"]

        def start(self):
            self.connection.close()

        def join(self, seconds=None):
            pass

        kill = join

    with closing(RunDirectory(tmp_path / "run")) as run:
        settings = Settings(tiny_cfg, run, save_every=save_every)
        context = SimpleNamespace(
            Process=Process, Pipe=multiprocessing.Pipe, Event=multiprocessing.Event
        )
        monkeypatch.setattr(multiprocessing, "get_context", lambda name: context)
        with pytest.raises(UserError, match=f"^video street: .*exit code -9 .*{told}"):
            parallel_evaluation._Team(settings, 1).work([source])


@pytest.mark.parametrize(
    ("device", "workers", "expected"),
    [
        ("cuda", 5, [("cuda:0", 0.3), ("cuda:1", 0.45)] * 2 + [("cuda:0", 0.3)]),
        ("cuda", 2, [("cuda:0", 1.0), ("cuda:1", 1.0)]),
        ("cuda:1", 2, [("cuda:1", 0.45)] * 2),
        ("cpu", 2, [("cpu", 1.0)] * 2),
    ],
)
def test_workers_on_one_gpu_share_its_memory_out(
    tiny_cfg, tmp_path, monkeypatch, device, workers, expected
):
    """By the same number a micro-batch is chosen: see tests/adaptation/test_micro_batches.py."""
    shares = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(
        torch.cuda, "set_per_process_memory_fraction", lambda share, on: shares.append((on, share))
    )
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    monkeypatch.setattr(parallel_evaluation, "load_source_model", lambda cfg: None)
    monkeypatch.setattr(parallel_evaluation, "StreamEvaluation", lambda *args: None)
    with closing(RunDirectory(tmp_path / "run")) as run:
        orders = parallel_evaluation.Orders.of(Settings(tiny_cfg, run))
        places = parallel_evaluation._places(device, workers)
        for place in places:
            orders.build(*place)
    assert [(place.device, place.share) for place in places] == expected
    assert shares == [(device, share) for device, share in expected if share < 1]


def test_what_ran_without_graphs_is_in_the_summary_of_a_run_with_workers(tiny_cfg, tmp_path):
    with closing(RunDirectory(tmp_path / "run")) as run:
        team = parallel_evaluation._Team(Settings(tiny_cfg, run), 2)
    ran = {"device": "GPU", "peak_memory_mib": 1}
    team.process_facts = [ran, {**ran, "without_graphs": {"prediction": "it waits"}}]
    assert team.facts()["without_graphs"] == {"prediction": "it waits"}
    team.process_facts = [ran, ran]
    assert "without_graphs" not in team.facts()
