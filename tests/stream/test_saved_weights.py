"""Adapted models as files: which weights, that they need nothing else, and what a kill costs."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import MetadataCatalog
from PIL import Image
from run_folders import copy_running
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ttt_video.config import get_cfg
from ttt_video.config.loading import merge_method
from ttt_video.data.sources import FolderSource, FrameTransform
from ttt_video.errors import UserError
from ttt_video.modeling.weight_header import OWN_KEY, name_classes, read_header
from ttt_video.modeling.weights import save_safetensors, weights_hash
from ttt_video.stream import (
    FrameResult,
    Results,
    RunDirectory,
    Settings,
    Sink,
    Stream,
    StreamEvaluation,
    VideoRun,
)
from ttt_video.stream.saved_state import UnusableState
from ttt_video.stream.saved_weights import SavedWeights, weight_moments
from ttt_video_cli import call

FRAMES, SAVE_EVERY = 8, 3


@pytest.fixture
def video(tmp_path) -> Path:
    folder = tmp_path / "street"
    folder.mkdir()
    for index in range(FRAMES):
        pixels = np.random.default_rng(index).integers(0, 256, (48, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
    return folder


@pytest.fixture
def evaluate(tiny_cfg, tiny_model, video, tmp_path):
    """``evaluate(name, moments)``; ``snapshots`` as in test_resume.py."""
    tiny_cfg.merge_from_list(["TTT.BATCH_SIZE", 1, "TTT.MICRO_BATCH_SIZE", 1])

    def run(name, moments, snapshots=None, resume=False):
        directory = RunDirectory(tmp_path / name, resume=resume)
        count = 0

        class Kill(Sink):
            def write(self, results):
                nonlocal count
                count += 1
                if count in (snapshots or {}):
                    copy_running(directory.path, tmp_path / snapshots[count])

        sinks = [SavedWeights(tiny_cfg, directory.path, weight_moments([moments])), Kill()]
        settings = Settings(tiny_cfg, directory, sinks=sinks, save_every=SAVE_EVERY)
        source = FolderSource(video, FrameTransform())
        StreamEvaluation(settings, copy.deepcopy(tiny_model)).evaluate([source])
        return directory.path / "weights" / "street"

    return run


def files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_files_have_the_weights_of_their_frames(evaluate, tiny_cfg, tiny_model, video):
    folder = evaluate("out", "last,every:3,best-loss")
    assert files(folder).keys() == {
        "last.safetensors", "best-loss.safetensors", "000002.safetensors", "000005.safetensors",
    }  # fmt: skip
    model = copy.deepcopy(tiny_model)
    losses, states = [], []
    for result in Stream.from_config(tiny_cfg, model).run(FolderSource(video, FrameTransform())):
        losses.append(result.loss)
        states.append(copy.deepcopy(model.state_dict()))
    best = int(np.argmin(losses))
    expected = {"last": FRAMES - 1, "best-loss": best, "000002": 2, "000005": 5}
    for name, index in expected.items():
        file = folder / f"{name}.safetensors"
        weights = load_file(file)
        assert weights.keys() == states[index].keys()
        assert all(torch.equal(weights[key], states[index][key]) for key in weights)
        header = read_header(file)
        assert (header["frame_index"], header["loss"]) == (index, losses[index])
        assert header["video_id"] == "street"
        assert header["source_sha256"] == weights_hash(tiny_model)
        assert weights_hash(weights) != header["source_sha256"]


@pytest.mark.slow
def test_a_killed_run_ends_with_the_same_bytes(evaluate, tmp_path):
    kills = {2: "before a state", 3: "at a state", 5: "between", 7: "late"}
    whole = files(evaluate("whole", "last,every:2,best-loss", kills))
    for name in kills.values():
        assert files(evaluate(name, "last,every:2,best-loss", resume=True)) == whole


def test_other_moments_are_another_run(evaluate, tmp_path):
    evaluate("out", "last", {5: "killed"})
    with pytest.raises(UserError, match="--save-weights"):
        evaluate("killed", "every:2", resume=True)


class Losses:
    """A sink that is given losses, around a model of one number, which is the frame's."""

    def __init__(self, folder: Path, done: int = 0, state: dict | None = None) -> None:
        cfg = get_cfg()
        cfg.DATASETS.TEST = ()
        self.sink = SavedWeights(cfg, folder, ("best-loss",))
        self.model = torch.nn.Linear(1, 1, bias=False)
        self.sink.attach(self.model)
        self.run = VideoRun(FakeSource(), folder / "unfinished", done)
        if state is not None:
            self.sink.load(state)
        self.sink.start(self.run)
        self.file = folder / "weights" / "fake" / "best-loss.safetensors"

    def write(self, *losses: float | None) -> None:
        for loss in losses:
            self.model.weight.data.fill_(float(self.run.done))
            self.run.done += 1
            record = {} if loss is None else {"loss_recon": loss, "grad_norm": 0.0}
            frame = {"frame_index": self.run.done - 1}
            self.sink.write(Results(FrameResult(frame, {}, record), None, {}))

    def best(self) -> tuple[int, float]:
        header = read_header(self.file)
        assert load_file(self.file)["weight"].item() == header["frame_index"]
        return header["frame_index"], header["loss"]


class FakeSource:
    video_id = "fake"


def test_the_lowest_loss_counts_and_the_first_of_equals(tmp_path):
    losses = Losses(tmp_path)
    losses.write(None, 3.0, float("nan"), 1.0, 1.0, 2.0)
    losses.sink.end(losses.run)
    assert losses.best() == (3, 1.0)


def test_a_best_of_before_a_state_is_kept_and_beaten(tmp_path):
    before = Losses(tmp_path)
    before.write(2.0, 1.0, 3.0)
    state = before.sink.save()
    assert before.best() == (1, 1.0)
    after = Losses(tmp_path, done=3, state=state)
    after.write(1.5)
    after.sink.end(after.run)
    assert after.best() == (1, 1.0)
    after = Losses(tmp_path, done=3, state=state)
    after.write(0.5)
    after.sink.end(after.run)
    assert after.best() == (3, 0.5)
    after.file.unlink()
    with pytest.raises(UnusableState, match=r"best-loss\.safetensors is gone"):
        Losses(tmp_path, done=3, state=state)


def test_a_best_that_is_later_than_the_state_is_not_replaced_by_a_worse_one(tmp_path):
    """A live source's frames do not come again, so that it would be lost."""
    before = Losses(tmp_path)
    before.write(2.0)
    state = before.sink.save()
    before.write(1.0)
    before.sink.save()  # and the process is killed before the state is on disk
    after = Losses(tmp_path, done=2, state=state)
    after.write(1.5)
    after.sink.end(after.run)
    assert after.best() == (1, 1.0)


def test_without_a_loss_there_is_no_best(tmp_path):
    losses = Losses(tmp_path)
    losses.write(None, None)
    losses.sink.save()
    losses.sink.end(losses.run)
    assert not losses.file.exists()


@pytest.mark.parametrize("asked", ["first", "every:0", "every:", "every:-3", "every:1.5", "last,"])
def test_other_moments_are_refused(asked):
    with pytest.raises(UserError, match="give last, best-loss or every:N"):
        weight_moments([asked])


def test_moments_may_be_repeated():
    assert weight_moments(["last,every:5", "last", "best-loss"]) == ("last", "every:5", "best-loss")


# ---- files that need nothing else


@pytest.fixture
def adapted(tiny_cfg, tiny_model, video, tmp_path, monkeypatch) -> Path:
    """A file that ``ttt-video stream --save-weights`` wrote; its config and source are gone."""
    monkeypatch.chdir(tmp_path)
    options = ["TTT.BATCH_SIZE", 1, "TTT.MICRO_BATCH_SIZE", 1]
    tiny_cfg.merge_from_list([*options, "DATASETS.TEST", ("of_mine",)])
    merge_method(tiny_cfg, "tent")
    config, weights = tmp_path / "tiny.yaml", tmp_path / "tiny.safetensors"
    config.write_text(tiny_cfg.dump())
    save_safetensors(tiny_model.state_dict(), str(weights))
    names = [f"class {k}" for k in range(19)]
    colors = [(k, 2 * k, 255 - k) for k in range(19)]
    MetadataCatalog.get("of_mine").set(
        stuff_classes=names, stuff_colors=colors, stuff_dataset_id_to_contiguous_id={7: 0, 8: 1}
    )
    files = ["--config", str(config), "--weights", str(weights), "--output", "first"]
    more = ["--no-video", "--max-frames", "3", "--save-weights", "last"]
    call("stream", [*files, "--video-dir", str(video), *more])
    config.unlink()
    weights.unlink()
    MetadataCatalog.remove("of_mine")
    yield tmp_path / "first" / "weights" / "street" / "last.safetensors"
    if "of_mine" in MetadataCatalog.list():
        MetadataCatalog.remove("of_mine")


def test_the_file_alone_is_enough(adapted, video, capsys, tmp_path):
    flags = ["--weights", str(adapted), "--video-dir", str(video), "--output", "second"]
    call("stream", [*flags, "--max-frames", "2", "--no-video", "--save", "masks"])
    assert f"config: that of {adapted}" in capsys.readouterr().out
    summary = json.loads(Path("second/summary.json").read_text())
    assert summary["settings"]["METHOD"] == "tent"
    assert summary["weights_sha256"] == weights_hash(load_file(adapted))
    classes = json.loads(Path("second/masks/street/classes.json").read_text())
    assert classes[3] == {"id": 3, "name": "class 3", "color": [3, 6, 252]}
    assert MetadataCatalog.get("of_mine").stuff_dataset_id_to_contiguous_id == {7: 0, 8: 1}


def test_in_a_program_it_is_enough_too(adapted, video, tiny_model):
    stream = Stream.from_pretrained(weights=adapted, method="none", device="cpu")
    pixels = np.asarray(Image.open(video / "0.png"))
    (result,) = stream.run([pixels])
    tiny_model.load_state_dict(load_file(adapted))
    image = torch.from_numpy(pixels.transpose(2, 0, 1).copy())
    with torch.no_grad():
        (expected,) = tiny_model([{"image": image, "height": 48, "width": 64}])
    assert torch.equal(result.output["sem_seg"], expected["sem_seg"])


def test_names_of_a_registered_data_set_stay_as_they_are():
    before = list(MetadataCatalog.get("cityscapes_fine_sem_seg_val").stuff_classes)
    name_classes({"dataset": "cityscapes_fine_sem_seg_val", "metadata": {"stuff_classes": ["x"]}})
    assert MetadataCatalog.get("cityscapes_fine_sem_seg_val").stuff_classes == before


def test_other_files_have_no_such_header(tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "plain.safetensors")
    torch.save({"a": torch.zeros(1)}, tmp_path / "plain.pth")
    assert read_header(tmp_path / "plain.safetensors") is None
    assert read_header(tmp_path / "plain.pth") is None


@pytest.mark.parametrize("text", ["{", "[]", '{"config": 3}'])
def test_a_damaged_header_is_one_line(tmp_path, text):
    file = tmp_path / "odd.safetensors"
    save_file({"a": torch.zeros(1)}, file, {OWN_KEY: text})
    with safe_open(file, "pt") as opened:
        assert opened.metadata()[OWN_KEY] == text
    with pytest.raises(UserError, match=r"odd\.safetensors"):
        read_header(file)


def test_a_config_that_is_none_is_one_line(tmp_path):
    file = tmp_path / "odd.safetensors"
    save_file({"a": torch.zeros(1)}, file, {OWN_KEY: json.dumps({"config": "MODEL: 3"})})
    with pytest.raises(UserError, match="does not merge"):
        Stream.from_pretrained(weights=file)
