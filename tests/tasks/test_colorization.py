"""Coloured frames against their originals: records, what networks add, order, kills."""

from __future__ import annotations

import json
import logging
import math
import os
import pickle
import random
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from run_folders import copy_running
from torch import nn

from ttt_video.config import get_cfg
from ttt_video.data.sources import FolderSource, FrameTransform
from ttt_video.errors import UserError
from ttt_video.modeling.efficientnet_lite0 import PACKAGE, Described
from ttt_video.modeling.weights import save_safetensors
from ttt_video.stream import RunDirectory, Settings, Sink, StreamEvaluation
from ttt_video.tasks import (
    ColorizationTask,
    ColorStatistics,
    LabelInfo,
    ScoredFrame,
    build_tasks,
    score,
    score_frame,
)
from ttt_video.tasks import picture_networks as networks
from ttt_video.tasks.color_numbers import frechet_distance, inception_scores
from ttt_video.tasks.columns import pack, unpack

INFO = LabelInfo()


@pytest.fixture
def color_cfg():
    """Keys of a run without any network."""
    cfg = get_cfg()
    cfg.TTT.COLOR.LITE0 = ""
    return cfg


@pytest.fixture(autouse=True)
def _say_it_again():
    networks._leave_out.cache_clear()


class TwoNumbers(networks.Describer):
    """Describes a picture by its mean red and blue; the classes are dark and bright."""

    def __init__(self):
        super().__init__(self.numbers)
        self.seen = 0

    def numbers(self, pictures):
        self.seen += 1
        means = pictures.float().mean((2, 3))
        return Described(means[:, [0, 2]] / 64, torch.stack([means[:, 1], 128 - means[:, 1]], 1))


def make_frames(video_id, count, seed=0, size=(8, 10)):
    rng = np.random.default_rng([seed, *video_id.encode()])
    for index in range(count):
        original = rng.integers(0, 256, (*size, 3), np.uint8)
        ours = original // 2 + rng.integers(0, 10, original.shape)
        frame = {"video_id": video_id, "frame_index": index, "original": original}
        yield frame, {"color": torch.from_numpy(ours.astype(np.uint8)).permute(2, 0, 1)}


def records_of(videos, cfg):
    scored = []
    for video in videos:
        tasks = [ColorizationTask(INFO, cfg=cfg), ColorStatistics(INFO, cfg=cfg)]
        for frame, output in video:
            records = score_frame(tasks, frame, output)["records"]
            scored.append(ScoredFrame(frame["video_id"], frame["frame_index"], records))
    return scored


def test_a_record_by_hand():
    original = np.zeros((2, 3, 3), np.uint8)
    ours = original.copy()
    ours[0, 0] = [3, 4, 0]
    frame = {"original": original[:, :, ::-1], "video_id": "a", "frame_index": 0}  # any strides
    output = {"color": torch.from_numpy(ours).permute(2, 0, 1)}
    record = ColorizationTask().record(frame, output)
    assert (record["squared_error"], record["values"]) == (25, 18)
    assert record["colorfulness"] == 0
    numbers = ColorizationTask.frame_metrics(record)
    assert numbers["PSNR"] == pytest.approx(10 * math.log10(255**2 / (25 / 18)))
    found = score([ScoredFrame("a", 0, {"colorization": record})], INFO)
    assert found["PSNR"] == found["PSNR_pooled"] == found["PSNR_video_mean"] == numbers["PSNR"]
    assert found["videos"]["a"]["labelled_frames"] == 1


def test_the_mean_of_frames_is_not_the_psnr_of_pooled_errors():
    frames = [ScoredFrame("a", i, {"colorization": r}) for i, r in enumerate(
        [{"squared_error": 10, "values": 10}, {"squared_error": 1000, "values": 10}]
    )]  # fmt: skip
    full = 20 * math.log10(255)
    found = score(frames, INFO)
    assert found["PSNR"] == pytest.approx(full - 10)
    assert found["PSNR_pooled"] == pytest.approx(full - 10 * math.log10(50.5))


def test_psnr_and_ssim_are_torchmetrics_and_scikit_images():
    functional = pytest.importorskip("torchmetrics.functional.image")
    metrics = pytest.importorskip("skimage.metrics")
    ((frame, output),) = make_frames("a", 1, size=(24, 30))
    numbers = ColorizationTask.frame_metrics(ColorizationTask().record(frame, output))
    original = torch.from_numpy(frame["original"]).permute(2, 0, 1)[None].float()
    ours = output["color"][None].float()
    expected = functional.peak_signal_noise_ratio(ours, original, data_range=255.0)
    assert numbers["PSNR"] == pytest.approx(float(expected), abs=1e-4)
    pair = (output["color"].permute(1, 2, 0).numpy(), frame["original"])
    options = {"data_range": 255, "gaussian_weights": True, "sigma": 1.5}
    _, picture = metrics.structural_similarity(
        *pair, channel_axis=2, use_sample_covariance=False, full=True, **options
    )
    # The borders are mirrored in different ways, and both keep them.
    assert numbers["SSIM"] == pytest.approx(picture.mean(), abs=2e-3)
    rule = ColorizationTask.metrics["SSIM"].rule
    assert all(words in rule for words in ("11 px", "sigma 1.5", "K 0.01 and 0.03", "range 255"))


def test_films_without_an_original_have_statistics_alone(color_cfg):
    ((frame, output),) = make_frames("a", 1)
    frame.pop("original")
    tasks = build_tasks("", color_cfg)
    assert score_frame(tasks, frame, output)["records"].keys() == {"prediction", "color_statistics"}


def test_an_original_is_read_from_its_file(tmp_path):
    ((frame, output),) = make_frames("a", 1)
    Image.fromarray(frame["original"]).save(tmp_path / "a.png")
    named = {"original_file_name": str(tmp_path / "a.png")}
    assert ColorizationTask().record(named, output) == ColorizationTask().record(frame, output)


def test_an_original_of_another_size_is_refused():
    ((frame, output),) = make_frames("a", 1)
    frame["original"], frame["file_name"] = frame["original"][1:], "f.png"
    with pytest.raises(UserError, match=r"f\.png is 10x8 px coloured, but its original 10x7"):
        ColorizationTask().record(frame, output)


def test_the_picture_is_the_coloured_frame():
    ((_, output),) = make_frames("a", 1)
    drawn = ColorizationTask.painter(output, None)(np.zeros((4, 5, 3), np.uint8))
    assert (drawn == output["color"].permute(1, 2, 0).numpy()).all()


def test_consistency_by_hand():
    black, white = np.zeros((2, 2, 3), np.uint8), np.full((2, 2, 3), 255, np.uint8)
    # Frames 0-2 black, 3-5 white: of the pairs 1, 2, 4 apart 1 of 5, 2 of 4, 2 of 2 differ by ln 2.
    task = ColorStatistics()
    frames = []
    for i, picture in enumerate([black] * 3 + [white] * 3):
        output = {"color": torch.from_numpy(picture).permute(2, 0, 1)}
        record = task.record({"video_id": "a", "frame_index": i}, output)
        frames.append(ScoredFrame("a", i, {"color_statistics": record}))
    expected = math.log(2) * (1 / 5 + 2 / 4 + 2 / 2) / 3
    assert score(frames, INFO)["CDC"] == pytest.approx(expected)
    assert score(frames, INFO)["colorfulness"] == 0
    assert score(frames[:4], INFO)["CDC"] is None
    # A video that is too short counts for nothing; a new video starts without a past.
    short = ScoredFrame("b", 0, {"color_statistics": task.record(
        {"video_id": "b", "frame_index": 6}, {"color": torch.zeros(3, 2, 2, dtype=torch.uint8)}
    )})  # fmt: skip
    assert short.records["color_statistics"]["change_1"] is None
    assert score([*frames, short], INFO)["CDC"] == pytest.approx(expected)


def test_features_are_kept_with_half_precision():
    values = torch.tensor([0.0, 0.3331, 5.9, 1234.0])
    np.testing.assert_allclose(unpack(json.loads(json.dumps(pack(values)))), values, rtol=2**-11)


def test_numbers_of_networks_do_not_depend_on_order_or_process(monkeypatch, color_cfg):
    describer = TwoNumbers()
    monkeypatch.setattr(networks, "_inception", lambda file, device: describer)
    color_cfg.TTT.COLOR.INCEPTION = "some file"
    videos = [list(make_frames(name, count)) for name, count in (("b", 13), ("a", 9))]
    frames = records_of(videos, color_cfg)
    assert describer.seen == 2 * len(frames)  # each coloured frame once, for both tasks
    whole = score(frames, INFO)
    pairs = [pair for video in videos[::-1] for pair in video]
    ours = np.array([describer.output(output).features.numpy() for _, output in pairs])
    original = np.array([
        describer.picture(torch.from_numpy(frame["original"]).permute(2, 0, 1)).features.numpy()
        for frame, _ in pairs
    ])  # fmt: skip
    assert whole["FID"] == pytest.approx(frechet_distance(ours, original), rel=1e-3)
    logits = np.array([describer.output(output).logits.numpy() for _, output in pairs])
    assert whole["IS"] == pytest.approx(np.mean(inception_scores(logits, 10)), rel=1e-3)
    assert whole["videos"]["a"]["IS"] is None  # fewer frames than splits
    for seed in range(3):
        rows = [json.dumps(frame) for frame in frames]
        random.Random(seed).shuffle(rows)
        assert score([ScoredFrame(*json.loads(row)) for row in rows], INFO) == whole


def test_a_number_that_some_frames_lack_is_left_out(monkeypatch, color_cfg):
    bare = records_of([make_frames("a", 2)], color_cfg)
    monkeypatch.setattr(networks, "_inception", lambda file, device: TwoNumbers())
    color_cfg.TTT.COLOR.INCEPTION = "some file"
    full = records_of([make_frames("b", 2)], color_cfg)
    found = score([*bare, *full], INFO)
    assert "FID" not in found
    assert "FID" not in found["videos"]["a"]
    assert found["videos"]["b"]["FID"] is not None
    assert found["PSNR"] is not None


def test_each_missing_file_is_named_once(monkeypatch, caplog):
    monkeypatch.setattr(networks, "_lite0_file", lambda: "")
    with caplog.at_level(logging.WARNING):
        found = score(records_of([make_frames("a", 3)], get_cfg()), INFO)
    said = [r.message for r in caplog.records if "left out" in r.message]
    assert len([line for line in said if not line.startswith("SSIM")]) == 3
    for key, names in (
        ("LPIPS", ["LPIPS"]), ("INCEPTION", ["FID", "IS"]), ("LITE0", ["FID_lite0", "IS_lite0"]),
    ):  # fmt: skip
        assert any(f"set TTT.COLOR.{key} to " in line for line in said)
        assert not found.keys() & set(names)


def test_files_of_other_networks_are_refused(tmp_path, color_cfg):
    save_safetensors({"_fc.bias": torch.zeros(3)}, tmp_path / "a.safetensors")
    color_cfg.TTT.COLOR.LITE0 = str(tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=r"TTT\.COLOR\.LITE0 is .*not EfficientNet-Lite0's: give"):
        records_of([make_frames("a", 1)], color_cfg)
    color_cfg.TTT.COLOR.LITE0 = str(tmp_path / "none")
    with pytest.raises(UserError, match="no checkpoint file"):
        records_of([make_frames("a", 1)], color_cfg)
    pytest.importorskip("torchmetrics")
    color_cfg.TTT.COLOR.LITE0, color_cfg.TTT.COLOR.LPIPS = "", str(tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=r"TTT\.COLOR\.LPIPS is .*another network's weights"):
        records_of([make_frames("a", 1, size=(64, 64))], color_cfg)
    with pytest.raises(UserError, match="10x8 px, but LPIPS needs 64"):
        records_of([make_frames("a", 1)], color_cfg)


@pytest.mark.parametrize("key", ["INCEPTION", "LPIPS"])
def test_without_torchmetrics_a_line_says_what_to_install(key, monkeypatch, color_cfg):
    for module in ("torchmetrics.image.fid", "torchmetrics.functional.image.lpips"):
        monkeypatch.setitem(sys.modules, module, None)
    color_cfg.TTT.COLOR[key] = "some file"
    with pytest.raises(UserError, match=rf"TTT\.COLOR\.{key} needs torchmetrics: pip install"):
        records_of([make_frames("a", 1, size=(64, 64))], color_cfg)


class Harmful:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (self.folder,)


@pytest.mark.parametrize("key", ["LITE0", "INCEPTION", "LPIPS"])
def test_no_file_runs_what_is_pickled_in_it(key, tmp_path, color_cfg):
    if key != "LITE0":
        pytest.importorskip("torchmetrics")
    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"a": Harmful(str(tmp_path / "harm"))}))
    color_cfg.TTT.COLOR[key] = str(tmp_path / "a.pkl")
    with pytest.raises(UserError, match="refused to load"):
        records_of([make_frames("a", 1, size=(64, 64))], color_cfg)
    assert not (tmp_path / "harm").exists()


def test_lpips_by_its_formula(tmp_path, color_cfg):
    lpips = pytest.importorskip("torchmetrics.functional.image.lpips")
    from torchvision.models import alexnet

    torch.manual_seed(0)
    features = alexnet(weights=None).features.eval()
    weights = {f"features.{name}": tensor for name, tensor in features.state_dict().items()}
    save_safetensors(weights, tmp_path / "alex.safetensors")
    color_cfg.TTT.COLOR.LPIPS = str(tmp_path / "alex.safetensors")
    ((frame, output),) = make_frames("a", 1, size=(70, 64))
    found = ColorizationTask(cfg=color_cfg).record(frame, output)["lpips_alex"]

    folder = os.path.dirname(lpips.__file__)
    linear = torch.load(os.path.join(folder, "lpips_models", "alex.pth"), "cpu", weights_only=True)
    shift = torch.tensor([-0.030, -0.088, -0.188]).view(3, 1, 1)
    scale = torch.tensor([0.458, 0.448, 0.450]).view(3, 1, 1)
    original = torch.from_numpy(frame["original"]).permute(2, 0, 1)
    x, y = ((p / 127.5 - 1 - shift)[None] / scale for p in (original, output["color"]))
    expected, layer = 0.0, 0
    with torch.no_grad():
        for module in features:
            x, y = module(x), module(y)
            if isinstance(module, nn.ReLU):
                unit = [z / z.norm(dim=1, keepdim=True).clamp(min=1e-8) for z in (x, y)]
                weight = linear[f"lin{layer}.model.1.weight"]
                expected += float(((unit[0] - unit[1]) ** 2 * weight).sum(1).mean())
                layer += 1
    assert layer == 5
    assert found == pytest.approx(expected, rel=1e-2)
    numbers = score([ScoredFrame("a", 0, {"colorization": {"lpips_alex": found}})], INFO)
    assert numbers["LPIPS"] == found


@pytest.mark.slow
def test_lpips_of_vgg_and_inception_load_their_files(tmp_path, color_cfg, monkeypatch):
    pytest.importorskip("torchmetrics")
    fidelity = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    from torchvision.models import vgg16

    torch.manual_seed(0)
    features = vgg16(weights=None).features
    weights = {f"features.{name}": tensor for name, tensor in features.state_dict().items()}
    save_safetensors(weights, tmp_path / "vgg.safetensors")
    with monkeypatch.context() as patch:
        patch.setattr(fidelity, "load_state_dict_from_url", lambda *args, **kwargs: {})
        patch.setattr(
            fidelity.FeatureExtractorInceptionV3, "load_state_dict", lambda *args, **kwargs: None
        )
        network = fidelity.FeatureExtractorInceptionV3("any", ["2048", "logits_unbiased"])
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
    torch.save(network.state_dict(), tmp_path / "inception.pth")
    color_cfg.TTT.COLOR.LPIPS = str(tmp_path / "vgg.safetensors")
    color_cfg.TTT.COLOR.INCEPTION = str(tmp_path / "inception.pth")
    frames = records_of([make_frames("a", 2, size=(299, 299))], color_cfg)
    record = frames[0].records["colorization"]
    ((_, output), _) = make_frames("a", 2, size=(299, 299))
    with torch.no_grad():  # at its own size nothing is stretched
        expected, logits = network(output["color"][None])
    kept = unpack(record["inception_features"])
    np.testing.assert_allclose(kept, expected[0], rtol=2e-3, atol=1e-4)
    kept = unpack(frames[0].records["color_statistics"]["inception_logits"])
    np.testing.assert_allclose(kept, logits[0] - logits[0].max(), rtol=2e-3, atol=1e-2)
    assert len(unpack(record["inception_original"])) == 2048
    found = score(frames, INFO)
    assert found["FID"] > 0
    assert found["LPIPS_vgg"] > 0
    assert "LPIPS" not in found


def test_lite0_of_a_cat_is_a_cat(color_cfg):
    if not networks._lite0_file():
        pytest.skip(f"{PACKAGE} is not installed")
    data = pytest.importorskip("skimage.data")
    color_cfg.TTT.COLOR.LITE0 = "auto"
    picture = data.chelsea()
    frame = {"video_id": "a", "frame_index": 0, "original": picture}
    output = {"color": torch.from_numpy(picture).permute(2, 0, 1)}
    records = records_of([[(frame, output)]], color_cfg)[0].records
    logits = unpack(records["color_statistics"]["lite0_logits"])
    assert set(np.argsort(logits)[-3:].tolist()) == {281, 282, 285}  # tabby, tiger, Egyptian cat
    record = records["colorization"]
    assert record["lite0_features"] == record["lite0_original"]
    assert len(unpack(record["lite0_features"])) == 1280


class TintedFrames(FolderSource):
    """Frames with their colours beside them."""

    def frames_after(self, frame_index):
        for frame in super().frames_after(frame_index):
            color = frame["image"].permute(1, 2, 0).numpy().copy()
            yield {**frame, "original": color, "image": frame["image"].float().mean(0, keepdim=True)
                   .expand(3, -1, -1).to(torch.uint8)}  # fmt: skip


class Tinter(nn.Module):
    """Colours a frame with one tint; stands in for a model that does better."""

    outputs = frozenset({"color"})

    def __init__(self):
        super().__init__()
        self.parts = {"f": "encoder", "h": "encoder"}
        self.encoder = nn.Conv2d(3, 3, 1)
        nn.init.zeros_(self.encoder.weight)
        nn.init.zeros_(self.encoder.bias)

    @property
    def device(self):
        return self.encoder.weight.device

    def forward(self, batch):
        tint = torch.tensor([20, 0, 40]).view(3, 1, 1)
        return [{"color": (x["image"] // 2 + tint).to(torch.uint8)} for x in batch]


def test_a_killed_run_has_the_same_numbers(tmp_path, color_cfg, monkeypatch):
    describer = TwoNumbers()
    monkeypatch.setattr(networks, "_lite0", lambda file, device: describer)
    color_cfg.TTT.COLOR.LITE0 = "some file"
    color_cfg.TTT.METHOD = "none"
    for name, count in (("a", 7), ("b", 5)):
        (tmp_path / name).mkdir()
        for i in range(count):
            pixels = np.random.default_rng([i, count]).integers(0, 256, (16, 20, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / name / f"{i}.png")

    def run(folder, *, resume=False, stop_after=None):
        sources = [TintedFrames(tmp_path / v, FrameTransform(min_size=0)) for v in ("a", "b")]
        directory = RunDirectory(tmp_path / folder, resume=resume)
        frames = []

        class Killer(Sink):
            def write(self, results):
                frames.append(results)
                if len(frames) == stop_after:
                    copy_running(directory.path, tmp_path / "killed")

        settings = Settings(color_cfg, directory, compare=True, sinks=[Killer()], save_every=3)
        return StreamEvaluation(settings, Tinter()).evaluate(sources), len(frames)

    whole, count = run("whole", stop_after=5)
    assert count == 12
    resumed, count = run("killed", resume=True)
    assert count == 12 - 3
    assert resumed["metrics"] == whole["metrics"]
    numbers = whole["metrics"]["adapted"]
    assert numbers == whole["metrics"]["frozen"]
    assert numbers["FID_lite0"] > 0
    assert numbers["CDC"] > 0
    assert whole["protocols"].keys() >= {"PSNR", "FID_lite0", "IS_lite0", "CDC", "colorfulness"}
