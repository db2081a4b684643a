"""Videos through the loop: rows, comparison, resuming, and summaries of runs that stop early."""

from __future__ import annotations

import copy
import itertools
import json
import threading
import weakref

import numpy as np
import pytest
import torch
from detectron2.data import MetadataCatalog
from PIL import Image

from ttt_video.adaptation import Adapter
from ttt_video.config import get_cfg
from ttt_video.data import BaseSource
from ttt_video.data.decoded_source import run_ahead
from ttt_video.errors import UserError
from ttt_video.modeling.weights import save_safetensors, weights_hash
from ttt_video.stream import (
    OverlayVideos,
    RunDirectory,
    Settings,
    Sink,
    Stream,
    StreamEvaluation,
    load_source_model,
)
from ttt_video.stream.records import summarize
from ttt_video.structures import FrameSource
from ttt_video.tasks import once, outputs, semantic, steadiness

TIMES = ("adapt_seconds", "predict_seconds")


class ListSource(BaseSource):
    """A video in memory; it may break at a frame."""

    def __init__(self, frames: list, breaks_at: int | None = None, known_length: bool = True):
        self.frames, self.breaks_at, self.passes = frames, breaks_at, 0
        self.video_id = frames[0]["video_id"]
        self.num_frames = len(frames) if known_length else None

    def __iter__(self):
        self.passes += 1
        for frame in self.frames:
            if frame["frame_index"] == self.breaks_at:
                raise UserError(f"frame {self.breaks_at} cannot be read")
            yield frame


def labelled(frames: list, folder) -> list:
    """The frames with random label files of a few classes and unlabelled pixels."""
    folder.mkdir(exist_ok=True)
    result = []
    for frame in frames:
        rng = np.random.default_rng([frame["frame_index"], len(frame["video_id"])])
        shape = (frame["height"], frame["width"])
        file = folder / f"{frame['video_id']}_{frame['frame_index']}.png"
        Image.fromarray(rng.choice(np.array([0, 1, 10, 255], np.uint8), shape)).save(file)
        result.append({**frame, "sem_seg_file_name": str(file)})
    return result


def without_times(row: dict) -> dict:
    row = {k: v for k, v in row.items() if k not in TIMES}
    if "frozen" in row:
        row["frozen"] = without_times(row["frozen"])
    return row


@pytest.fixture
def evaluate(tiny_cfg, tiny_model, tmp_path):
    """``evaluate(sources, folder, KEY VALUE...)``; gives the folder of the run and its summary."""

    def run(sources, name="run", *opts, resume=False, max_frames=None, **options):
        cfg = tiny_cfg.clone()
        cfg.merge_from_list([*opts])
        directory = RunDirectory(tmp_path / name, resume=resume)
        settings = Settings(cfg, directory, max_frames=max_frames, **options)
        evaluation = StreamEvaluation(settings, copy.deepcopy(tiny_model))
        return directory, evaluation.evaluate(sources)

    return run


def test_list_source_is_a_frame_source(make_video):
    assert isinstance(ListSource(make_video()), FrameSource)


def test_a_row_for_every_frame_with_the_numbers_of_the_runner(
    evaluate, tiny_cfg, tiny_model, make_video
):
    videos = [make_video("a", 3), make_video("b", 2)]
    run, summary = evaluate([ListSource(v) for v in videos])
    rows = list(run.rows())
    runner = Stream.from_config(tiny_cfg, copy.deepcopy(tiny_model))
    expected = [result for video in videos for result in runner.run(video)]
    assert len(rows) == 5
    for row, result in zip(rows, expected, strict=True):
        for key in ("video_id", "frame_index", "file_name"):
            assert row[key] == result.frame[key]
        for key, value in result.record.items():
            assert row[key] == value
        assert row["loss_recon"] > 0
        assert row["adapt_seconds"] > 0
        assert row["predict_seconds"] > 0
        assert "mIoU" not in row["metrics"]  # no labels
        assert "frozen" not in row
    assert summary["complete"] is True
    assert summary["videos"] == {"a": 3, "b": 2}
    assert "mIoU" not in summary["metrics"]["adapted"]
    assert json.loads((run.path / "summary.json").read_text()) == json.loads(json.dumps(summary))


def test_summary_says_what_was_run(evaluate, tiny_model, make_video):
    run, _ = evaluate([ListSource(make_video("a", 2))], "run", "SEED", 5, "TTT.PRESET", "paper")
    computed = json.loads(json.dumps(summarize(run.rows())))
    on_disk = json.loads((run.path / "summary.json").read_text())
    assert computed.items() <= on_disk.items()
    assert on_disk["method"] == "online_ttt_mae"
    assert on_disk["preset"] == "paper"
    assert on_disk["seed"] == 5
    assert on_disk["weights_sha256"] == weights_hash(tiny_model)  # of the source, not of the end
    assert on_disk["peak_memory_mib"] > 10
    assert on_disk["versions"]["torch"] == torch.__version__
    assert {"ttt_video", "detectron2", "python"} <= on_disk["versions"].keys()
    assert on_disk["device"].startswith("CPU")
    assert on_disk["skipped_frames"] == []


def test_scores_of_labelled_frames_are_those_of_the_predictions(
    evaluate, tiny_cfg, tiny_model, make_video, tmp_path
):
    video = labelled(make_video("a", 2, 48, 64), tmp_path / "labels")
    run, summary = evaluate([ListSource(video)], compare=True)
    adapted = Stream.from_config(tiny_cfg, copy.deepcopy(tiny_model))
    tiny_cfg.TTT.METHOD = "none"
    frozen = Stream.from_config(tiny_cfg, tiny_model)
    totals = {}
    for row, ours, theirs in zip(run.rows(), adapted.run(video), frozen.run(video), strict=True):
        labels = np.asarray(Image.open(ours.frame["sem_seg_file_name"]))
        for who, result, part in (("adapted", ours, row), ("frozen", theirs, row["frozen"])):
            predicted = result.output["sem_seg"].argmax(0).numpy()
            total = totals.setdefault(who, np.zeros((2, 19)))
            frame_ious = []
            for k in range(19):
                there, said = (labels == k), (predicted == k) & (labels != 255)
                total[0, k] += (there & said).sum()
                total[1, k] += (there | said).sum()
                if there.any():
                    frame_ious.append(100 * (there & said).sum() / (there | said).sum())
            assert part["metrics"]["mIoU"] == pytest.approx(np.mean(frame_ious))
    for who, (intersection, union) in totals.items():
        pooled = 100 * intersection[[0, 1, 10]] / union[[0, 1, 10]]
        assert summary["metrics"][who]["mIoU"] == pytest.approx(pooled.mean())


def test_the_offline_oracle_scores_as_the_run_does(evaluate, make_video, tmp_path):
    """Of one video, its score is the summary's, also where a class is ignored."""
    video = make_video("a", 2, 48, 64)
    for frame in video:
        rng = np.random.default_rng(frame["frame_index"])
        frame["sem_seg_file_name"] = str(tmp_path / f"{frame['frame_index']}.png")
        Image.fromarray(rng.integers(0, 19, (48, 64), np.uint8)).save(frame["sem_seg_file_name"])
    MetadataCatalog.get("ignores_3").set(evaluator_type="video_sem_seg", ignore_label=3)
    opts = ("TTT.METHOD", "offline_ttt_mae_oracle", "TTT.OFFLINE.STEPS", 1)
    run, summary = evaluate([ListSource(video)], "run", *opts, dataset_name="ignores_3")
    MetadataCatalog.remove("ignores_3")
    score = next(iter(run.rows()))["offline_score"]
    assert score == pytest.approx(summary["metrics"]["adapted"]["mIoU"], rel=1e-12)


def test_compare_leaves_the_adapted_numbers_as_they_are(evaluate, make_video):
    alone, _ = evaluate([ListSource(make_video())], "alone")
    beside, _ = evaluate([ListSource(make_video())], "beside", compare=True)
    rows = [without_times(row) for row in beside.rows()]
    assert all(row.pop("frozen")["metrics"] for row in rows)
    assert rows == [without_times(row) for row in alone.rows()]


class Collects(Sink):
    """Writes down every call; what it saves comes back as it was."""

    def __init__(self, look=lambda: None) -> None:
        self.calls: list = []
        self.seen: list = []
        self.look = look

    def load(self, state):
        self.calls.append(("load", state["number"].tolist()))

    def start(self, video):
        self.calls.append(("start", video.video_id, video.done))

    def write(self, results):
        self.calls.append(("write", results.row["frame_index"], self.look()))
        self.seen.append((results.adapted, results.frozen))

    def save(self):
        self.calls.append(("save",))
        return {"number": torch.tensor([len(self.seen)])}

    def end(self, video):
        self.calls.append(("end", video.video_id, video.done, video.complete))


def test_sinks_see_every_frame_and_the_frozen_weights_stay(evaluate, tiny_model, make_video):
    video = make_video("a", 3)
    sink = Collects()
    evaluate([ListSource(video)], compare=True, sinks=[sink])
    assert [r.frame["frame_index"] for r, _ in sink.seen] == [0, 1, 2]
    with torch.no_grad():
        for frame, (adapted, frozen) in zip(video, sink.seen, strict=True):
            expected = tiny_model([frame])[0]["sem_seg"]
            assert torch.equal(frozen.output["sem_seg"], expected)
            assert not torch.equal(adapted.output["sem_seg"], expected)
            assert frozen.predict_seconds > 0
    without = Collects()
    evaluate([ListSource(video)], "2", sinks=[without])
    assert [frozen for _, frozen in without.seen] == [None] * 3


def test_a_sink_is_called_as_its_protocol_says(evaluate, make_video, tmp_path):
    """Also by a run that goes on; a frame's row is on disk before others see it."""
    file = tmp_path / "run" / "frames.jsonl"
    sink = Collects(lambda: len(file.read_text().splitlines()))
    broken = ListSource(make_video("b", 3), breaks_at=2)
    with pytest.raises(UserError):
        evaluate([ListSource(make_video("a", 1)), broken], sinks=[sink], save_every=1)
    assert sink.calls == [
        ("start", "a", 0), ("write", 0, 1), ("save",), ("end", "a", 1, True),
        ("start", "b", 0), ("write", 0, 2), ("save",), ("write", 1, 3), ("save",),
        ("end", "b", 2, False),
    ]  # fmt: skip
    again = Collects()
    sources = [ListSource(make_video(name, n)) for name, n in (("a", 1), ("b", 3))]
    evaluate(sources, sinks=[again], save_every=1, resume=True)
    assert again.calls == [
        ("load", [3]), ("start", "b", 2), ("write", 2, None), ("save",), ("end", "b", 3, True),
    ]  # fmt: skip


def test_a_source_that_lacks_members_is_told_in_a_line(evaluate, make_video):
    class Bare(list):
        video_id, num_frames = "a", 1

    with pytest.raises(UserError, match=r"^Bare lacks .*inherit from ttt_video\.data\.BaseSource"):
        evaluate([Bare(make_video("a", 1))])


def test_labels_are_read_and_class_maps_computed_once_per_frame(
    evaluate, make_video, tmp_path, monkeypatch
):
    """Whoever asks: the tasks of both models, the overlay, and a sink from outside."""
    reads, maps = [], []
    read, compute = semantic.read_sem_seg, semantic.class_map

    def read_sem_seg(frame):
        reads.append(frame["frame_index"])
        return read(frame)

    def class_map(output):
        maps.append(1)
        return compute(output)

    for module in (semantic, steadiness, outputs):
        for name, replaced in (("read_sem_seg", read_sem_seg), ("class_map", class_map)):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, replaced)

    class Asks(Sink):
        def write(self, results):
            once(read_sem_seg, results.adapted.frame)
            once(class_map, results.frozen.output)

    video = labelled(make_video("a", 3), tmp_path / "labels")
    settings = {"dataset_name": "", "compare": True}
    overlay = OverlayVideos(get_cfg(), tmp_path, fps=10, single=True)
    evaluate([ListSource(video)], sinks=[overlay, Asks()], **settings)
    assert reads == [0, 1, 2]
    assert len(maps) == 2 * 3  # of the adapted and of the frozen model


@pytest.mark.parametrize("budget", [0, 10_000])
def test_an_output_is_gone_before_the_next_frame(evaluate, make_video, monkeypatch, budget):
    """On a GPU it would take memory beside the step: a few hundred MiB for a large frame."""
    outputs_so_far, alive = [], []
    predict = Adapter.predict

    def watched(adapter, frame):
        alive.append([output() is not None for output in outputs_so_far])
        output = predict(adapter, frame)
        outputs_so_far.append(weakref.ref(output["sem_seg"]))
        return output

    monkeypatch.setattr(Adapter, "predict", watched)
    evaluate([ListSource(make_video("a", 3))], "run", "TTT.FRAME_BUDGET_MS", budget)
    assert alive == [[], [False], [False, False]]


def test_a_frame_counts_though_a_later_sink_stops_the_run(evaluate, make_video, tmp_path):
    """As the sink does by which a worker is told to stop: the frame's row is on disk by then."""

    class Stops(Sink):
        def write(self, results):
            if results.row["frame_index"] == 1:
                raise UserError("stop")

    with pytest.raises(UserError, match="stop"):
        evaluate([ListSource(make_video("a", 3))], sinks=[Stops()])
    run = RunDirectory(tmp_path / "run", resume=True)
    assert len(list(run.rows())) == run.videos()["a"]["frames"] == 2


class EndlessFrames(ListSource):
    """Has its frames decoded ahead, in a thread, and has more of them than anybody takes."""

    def __iter__(self):
        endless = ({**self.frames[0], "frame_index": index} for index in itertools.count())
        return self.ahead(run_ahead(endless, depth=2))

    def ahead(self, frames):
        yield from frames


def test_frames_are_closed_though_somebody_keeps_the_error(evaluate, make_video):
    """Or the thread that decodes ahead would live as long as the error does."""

    class Stops(Sink):
        def write(self, results):
            raise UserError("stop")

    before = set(threading.enumerate())
    with pytest.raises(UserError, match="stop") as kept:
        evaluate([EndlessFrames(make_video("a", 1))], sinks=[Stops()])
    assert set(threading.enumerate()) == before
    assert kept.traceback


def test_frames_are_closed_though_not_all_are_asked_for(evaluate, make_video, monkeypatch):
    source = EndlessFrames(make_video("a", 1))
    kept = []
    monkeypatch.setattr(source, "ahead", lambda frames: kept.append(frames) or frames)
    before = set(threading.enumerate())
    evaluate([source], max_frames=2)
    assert set(threading.enumerate()) == before
    assert next(kept[0], None) is None


def test_max_frames_is_of_each_video(evaluate, make_video):
    sources = [ListSource(make_video("a", 3)), ListSource(make_video("b", 1))]
    run, summary = evaluate(sources, max_frames=2)
    assert summary["videos"] == {"a": 2, "b": 1}
    assert [r["frame_index"] for r in run.rows()] == [0, 1, 0]


def test_a_failure_keeps_the_rows_and_says_that_it_is_not_complete(evaluate, make_video, tmp_path):
    with pytest.raises(UserError, match="frame 2"):
        evaluate([ListSource(make_video("a", 4), breaks_at=2), ListSource(make_video("b", 1))])
    rows = (tmp_path / "run" / "frames.jsonl").read_text().splitlines()
    assert [json.loads(row)["frame_index"] for row in rows] == [0, 1]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["complete"] is False
    assert summary["frames"] == 2


@pytest.mark.parametrize(
    ("reset", "stop"),
    [("video", ("a", 0)), ("video", ("a", 2)), ("video", ("b", 0)), ("never", ("b", 1))],
)
def test_a_resumed_run_has_the_rows_of_one_that_never_stopped(
    evaluate, make_video, tmp_path, reset, stop
):
    videos = [make_video("a", 3), make_video("b", 2)]
    opts = ("TTT.RESET", reset)
    whole, whole_summary = evaluate([ListSource(v) for v in videos], "whole", *opts)
    broken = [ListSource(v, stop[1] if v[0]["video_id"] == stop[0] else None) for v in videos]
    with pytest.raises(UserError):
        evaluate(broken, "cut", *opts)
    with (tmp_path / "cut" / "frames.jsonl").open("a") as file:
        file.write('{"video_id": "a", "fra')  # and the process was killed while writing
    sources = [ListSource(v) for v in videos]
    resumed, summary = evaluate(sources, "cut", *opts, resume=True)
    expected = [without_times(row) for row in whole.rows()]
    assert [without_times(row) for row in resumed.rows()] == expected
    for key in ("frames", "videos", "loss_recon", "complete", "weights_sha256"):
        assert summary[key] == whole_summary[key]
    if reset != "never":
        # A finished video is not run again.
        assert [s.passes for s in sources] == [0 if stop[0] == "b" else 1, 1]


def test_resuming_a_finished_run_changes_nothing_but_times(evaluate, make_video):
    run, summary = evaluate([ListSource(make_video())])
    before = (run.path / "frames.jsonl").read_bytes()
    source = ListSource(make_video())
    _, again = evaluate([source], resume=True)
    assert (run.path / "frames.jsonl").read_bytes() == before
    assert source.passes == 0
    again.pop("peak_memory_mib"), summary.pop("peak_memory_mib")
    assert again == summary


def test_a_longer_run_goes_on_where_a_shorter_one_ended(evaluate, make_video):
    whole, _ = evaluate([ListSource(make_video())], "whole")
    evaluate([ListSource(make_video())], "run", max_frames=1)
    run, _ = evaluate([ListSource(make_video())], "run", resume=True)
    assert list(map(without_times, run.rows())) == list(map(without_times, whole.rows()))


@pytest.mark.parametrize(
    "opts",
    [
        ("TTT.METHOD", "offline_ttt_mae"),
        ("TTT.METHOD", "temporal_smoothing", "TTT.ENSEMBLE.METHOD", "offline_ttt_mae"),
        ("TTT.METHOD", "none", "TTT.FRAME_ORDER", "shuffled"),
        ("TTT.METHOD", "none", "TTT.RESET", "never"),
    ],
)
def test_a_longer_run_of_frames_that_depend_on_later_ones_is_another(evaluate, make_video, opts):
    opts = (*opts, "TTT.OFFLINE.STEPS", 1)
    evaluate([ListSource(make_video())], "run", *opts, max_frames=2)
    evaluate([ListSource(make_video())], "run", *opts, max_frames=2, resume=True)
    with pytest.raises(UserError, match=r"another setting \(--max-frames: 2, now 3\)"):
        evaluate([ListSource(make_video())], "run", *opts, max_frames=3, resume=True)


def test_a_source_of_unknown_length_is_run_to_its_end(evaluate, make_video):
    _, summary = evaluate([ListSource(make_video(), known_length=False)])
    assert summary["frames"] == 3
    _, summary = evaluate([ListSource(make_video(), known_length=False)], "2", max_frames=2)
    assert summary["frames"] == 2


def test_runs_that_differ_are_not_mixed(evaluate, make_video):
    evaluate([ListSource(make_video())], max_frames=1)
    with pytest.raises(UserError, match=r"another config \(TTT.MASK_RATIO: 0.8, now 0.5\)"):
        evaluate([ListSource(make_video())], "run", "TTT.MASK_RATIO", 0.5, resume=True)
    with pytest.raises(UserError, match=r"another setting \(--compare: False, now True\)"):
        evaluate([ListSource(make_video())], resume=True, compare=True)


def test_steps_that_are_skipped_are_counted_and_leave_no_nan(
    evaluate, tiny_model, make_video, monkeypatch
):
    original = type(tiny_model).reconstruction_losses
    calls = []

    def sometimes_nan(self, *args):
        calls.append(1)
        losses = original(self, *args)
        return {k: v * float("nan") if len(calls) == 2 else v for k, v in losses.items()}

    monkeypatch.setattr(type(tiny_model), "reconstruction_losses", sometimes_nan)
    run, summary = evaluate([ListSource(make_video("a", 3))])
    rows = list(run.rows())
    assert [row["skipped_steps"] for row in rows] == [0, 1, 0]
    assert rows[1]["loss_recon"] is None
    assert rows[1]["grad_norm"] is None
    assert rows[2]["loss_recon"] > 0
    assert summary["skipped_steps"] == 1
    assert summary["loss_recon"] == pytest.approx(
        (rows[0]["loss_recon"] + rows[2]["loss_recon"]) / 2
    )


@pytest.mark.parametrize(("value", "size"), [(19, (64, 96)), (0, (64, 95))])
def test_labels_that_do_not_fit_are_told_in_a_line(evaluate, make_video, tmp_path, value, size):
    file = tmp_path / "labels.png"
    Image.fromarray(np.full(size, value, np.uint8)).save(file)
    frames = [{**frame, "sem_seg_file_name": str(file)} for frame in make_video("a", 1)]
    with pytest.raises(UserError, match=r"labels.png does not fit") as error:
        evaluate([ListSource(frames)])
    assert "\n" not in str(error.value)


def test_source_model_loads_what_the_config_names(tiny_cfg, tiny_model, tmp_path):
    with pytest.raises(UserError, match="--weights"):
        load_source_model(tiny_cfg)
    tiny_cfg.MODEL.WEIGHTS = str(tmp_path / "model.safetensors")
    save_safetensors(tiny_model.state_dict(), tiny_cfg.MODEL.WEIGHTS)
    model = load_source_model(tiny_cfg)
    assert not model.training
    assert weights_hash(model) == weights_hash(tiny_model)


def test_a_plain_mask2former_is_enough_without_adaptation(
    tiny_cfg, tiny_model, make_video, tmp_path
):
    weights = {k: v for k, v in tiny_model.state_dict().items() if not k.startswith("recon_head")}
    weights["backbone.patch_embed.proj.weight"] = weights["backbone.patch_embed.proj.weight"][:, :3]
    tiny_cfg.MODEL.WEIGHTS = str(tmp_path / "model.safetensors")
    save_safetensors(weights, tiny_cfg.MODEL.WEIGHTS)
    model = load_source_model(tiny_cfg)
    assert model.recon_head is None
    with pytest.raises(UserError, match=r"recon|decoder"):
        Stream.from_config(tiny_cfg, model)
    # What the visibility channel would add is zero.
    with torch.no_grad():
        tiny_model.backbone.patch_embed.proj.weight[:, 3] = 0
        for frame in make_video("a", 1):
            assert torch.equal(model([frame])[0]["sem_seg"], tiny_model([frame])[0]["sem_seg"])
