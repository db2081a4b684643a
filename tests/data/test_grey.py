"""Grey sources: no colour reaches a model, whatever the frames are and whoever looks at them."""

from __future__ import annotations

import io
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image
from source_contract import HEIGHT, NUM_FRAMES, TRANSFORM, WIDTH, FrameSourceContract, picture
from tiny import TINY

from ttt_video.adaptation.norm_statistics import measure_statistics
from ttt_video.adaptation.window import SlidingWindow
from ttt_video.color.lab import is_one_plane, lightness, rgb_to_lab, to_grey
from ttt_video.config import load_config, merge_method
from ttt_video.data.grey import GreyFrames, has_colour
from ttt_video.data.ordering import FirstFrames, ShuffledFrames
from ttt_video.data.sources import DatasetSource, FolderSource, FrameTransform, VideoFileSource
from ttt_video.modeling.weights import save_safetensors
from ttt_video.stream.loop import Stream

FULL = FrameTransform()  # RGB, at the frames' own size
WHAT_A_MODEL_SEES = {"image", "grey", "video_id", "frame_index", "height", "width"}


def folder_of(path: Path, *pictures: Image.Image, suffix: str = "png") -> Path:
    path.mkdir()
    for index, image in enumerate(pictures):
        image.save(path / f"{index}.{suffix}")
    return path


def coloured(seed: int = 0) -> Image.Image:
    return Image.fromarray(picture(seed))


def grey_of(seed: int = 0) -> np.ndarray:
    """(48, 80) uint8."""
    return to_grey(torch.from_numpy(picture(seed).transpose(2, 0, 1).copy()))[0].numpy()


def film(path: Path, pictures: list[np.ndarray], crf: str = "10") -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(10), options={"crf": crf})
        stream.height, stream.width, stream.pix_fmt = *pictures[0].shape[:2], "yuv420p"
        for rgb in pictures:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(rgb, format="rgb24")))
        container.mux(stream.encode(None))
    return path


def is_one_grey(image: torch.Tensor) -> bool:
    return bool((image == image[:1]).all())


class TestContract(FrameSourceContract):
    @pytest.fixture(params=[True, False])
    def source(self, tmp_path, request):
        folder = folder_of(tmp_path / "video", *map(coloured, range(NUM_FRAMES)))
        return GreyFrames(FolderSource(folder, FULL), TRANSFORM, keep_original=request.param)

    def test_frames_come_in_time_order_and_show_what_they_should(self, source):
        for index, frame in enumerate(source):
            assert frame["frame_index"] == index
            pixels = np.stack([grey_of(index)] * 3, -1)
            assert torch.equal(frame["image"], TRANSFORM(pixels))
            assert torch.equal(frame["grey"], torch.from_numpy(grey_of(index))[None])

    def test_what_the_source_knows_is_passed_on(self, source):
        inner = source.source
        assert source.fingerprint() == inner.fingerprint() != []
        inner.skipped = ["broken.png"]
        assert source.skipped == ["broken.png"]
        assert source.fps is None


def ways_in(path: Path):
    """Sources of colour pictures, of every kind."""
    rgb = coloured()
    for name, image, suffix in (
        ("png", rgb, "png"),
        ("jpg", rgb, "jpg"),
        ("cmyk", rgb.convert("CMYK"), "jpg"),
        ("palette", rgb.quantize(64), "png"),
        ("alpha", rgb.convert("RGBA"), "png"),
        ("bmp", rgb, "bmp"),
    ):
        yield name, FolderSource(folder_of(path / name, image, image, suffix=suffix), FULL)
    yield "film", VideoFileSource(film(path / "film.mp4", [picture(0), picture(1)]), FULL)
    records = [
        {
            "file_name": str(path / "png" / f"{index}.png"),
            "video_id": "data set",
            "frame_index": index,
            "sem_seg_file_name": str(path / "png" / f"{index}.png"),
            "annotations": [],
        }
        for index in range(2)
    ]
    yield "data set", DatasetSource(records, FULL)


@pytest.mark.parametrize("keep_original", [True, False])
def test_no_colour_gets_into_a_window(tmp_path, keep_original):
    for name, inner in ways_in(tmp_path):
        for transform in (TRANSFORM, FrameTransform(format="BGR"), FULL):
            source = GreyFrames(inner, transform, keep_original=keep_original)
            for order in (source, FirstFrames(source, 2), ShuffledFrames(source, 2, seed=0)):
                window = SlidingWindow(4)
                for frame in order:
                    window.push(frame)
                window.load_state_dict(window.state_dict())
                samples = window.sample(4, sampling="shuffled_epochs", generator=torch.Generator())
                assert len(samples) == 4
                for sample in samples:
                    assert sample.keys() == WHAT_A_MODEL_SEES, name
                    assert is_one_grey(sample["image"]), name
                    assert is_one_plane(sample["image"]), name  # so a model need not look
                    assert sample["grey"].shape == (1, HEIGHT, WIDTH)
                    assert sample["image"].float().std() > 5


METHODS = (
    "none", "online_ttt_mae", "ttt_mae_no_memory", "offline_ttt_mae", "ln_adapt", "tent",
    "self_train", "temporal_smoothing", "majority_vote", "tent_class_balance",
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_no_method_shows_a_model_colour(tmp_path, tiny_model, make_video, monkeypatch, method):
    """Everything that a model is called with is looked at."""
    seen = []

    def spied(name):
        call = getattr(tiny_model, name)

        def spy(samples, *args, **kwargs):
            seen.extend(samples)
            return call(samples, *args, **kwargs)

        monkeypatch.setattr(tiny_model, name, spy)

    noise = make_video(num_frames=1)[0]["image"]
    cfg = load_config("joint_cityscapes.yaml", opts=TINY)
    merge_method(cfg, method)
    opts = ["TTT.BATCH_SIZE", 2, "TTT.OFFLINE.STEPS", 1, "TTT.ENSEMBLE.PREDICTIONS", 2]
    if method == "ln_adapt":
        save_safetensors(measure_statistics(tiny_model, [noise]), tmp_path / "norms.safetensors")
        opts += ["TTT.LN_ADAPT.SOURCE_STATISTICS", str(tmp_path / "norms.safetensors")]
    cfg.merge_from_list(opts)
    for name in ("forward", "reconstruction_losses", "main_task", "normalize"):
        spied(name)
    folder = folder_of(tmp_path / "video", coloured(0), coloured(1))
    source = GreyFrames(FolderSource(folder, FULL), FULL, keep_original=True)
    for result in Stream.from_config(cfg, tiny_model).run(source):
        original = result.frame["original"]  # evaluators have it
        assert (original != original[..., :1]).any()
    assert seen
    for sample in seen:
        assert sample.keys() <= WHAT_A_MODEL_SEES | {"image_mask"}
        assert is_one_grey(sample["image"])


def test_the_original_is_the_label(tmp_path):
    source = FolderSource(folder_of(tmp_path / "video", coloured()), FULL)
    (frame,) = GreyFrames(source, TRANSFORM, keep_original=True)
    assert np.array_equal(frame["original"], picture(0))
    shown = lightness(frame["grey"].expand(3, -1, -1))
    original = torch.from_numpy(picture(0).transpose(2, 0, 1).copy())
    assert (shown - lightness(original)).abs().max() < 0.3
    (unlabelled,) = GreyFrames(source, TRANSFORM, keep_original=False)
    assert "original" not in unlabelled


def test_grey_pictures_stay_as_they_are(tmp_path, caplog):
    grey = grey_of()
    deep = Image.fromarray(grey.astype(np.uint16) * 256 + 37)
    kinds = {
        "L": Image.fromarray(grey),
        "I;16": deep,
        "RGB": Image.fromarray(np.stack([grey] * 3, -1)),
        "LA": Image.fromarray(grey).convert("LA"),
    }
    for name, image in kinds.items():
        folder = folder_of(tmp_path / name.replace(";", ""), image)
        (frame,) = GreyFrames(FolderSource(folder, FULL), FULL, keep_original=False)
        assert np.array_equal(frame["image"].numpy(), np.stack([grey] * 3)), name
    assert image_mode_of(tmp_path / "I16" / "0.png").startswith("I")
    assert caplog.messages == []


def image_mode_of(file: Path) -> str:
    with Image.open(io.BytesIO(file.read_bytes())) as image:
        return image.mode


def test_a_black_and_white_film_with_some_colour_of_its_compression(tmp_path, caplog):
    tinted = [(np.stack([grey_of(i)] * 3, -1) * [1, 1, 0.98]).astype(np.uint8) for i in range(3)]
    source = VideoFileSource(film(tmp_path / "film.mp4", tinted, crf="30"), FULL)
    frames = list(source)
    assert not any(is_one_grey(frame["image"]) for frame in frames)
    for frame, before in zip(GreyFrames(source, FULL, keep_original=False), frames, strict=True):
        assert is_one_grey(frame["image"])
        difference = frame["image"].float() - before["image"].float().mean(0)
        assert difference.abs().mean() < 3
    assert caplog.messages == []


def test_one_coloured_frame_among_grey_ones(tmp_path, caplog):
    pictures = [Image.fromarray(grey_of(i)) for i in range(3)]
    pictures[1] = coloured(1)
    source = FolderSource(folder_of(tmp_path / "video", *pictures), FULL)
    for index, frame in enumerate(GreyFrames(source, FULL, keep_original=False)):
        assert np.array_equal(frame["image"].numpy(), np.stack([grey_of(index)] * 3))
        assert "original" not in frame
    assert caplog.messages == [
        "video video is taken as black and white, but frame 1 has colours: they are dropped and "
        "score nothing"
    ]
    caplog.clear()
    labelled = [f["original"] for f in GreyFrames(source, FULL, keep_original=True)]
    assert [bool((x == x[..., :1]).all()) for x in labelled] == [True, False, True]
    assert caplog.messages == []


def test_a_film_without_colours_that_is_to_be_scored_is_said(tmp_path, caplog):
    folder = folder_of(tmp_path / "old", *[Image.fromarray(grey_of())] * 2)
    assert len(list(GreyFrames(FolderSource(folder, FULL), FULL, keep_original=True))) == 2
    (message,) = caplog.messages
    assert message.startswith("video old is black and white: it has no colours")


def test_frames_that_were_resized_before_are_refused(tmp_path):
    source = FolderSource(folder_of(tmp_path / "video", coloured()), TRANSFORM)
    with pytest.raises(ValueError, match="was resized to"):
        list(GreyFrames(source, TRANSFORM, keep_original=True))


def test_what_counts_as_colour():
    grey = torch.full((3, 8, 8), 120, dtype=torch.uint8)
    assert not has_colour(grey)
    grey[0] += 6
    assert not has_colour(grey)
    grey[0, 3, 4] += 20
    assert has_colour(grey)


def test_a_small_difference_of_channels_is_no_colour():
    """It is what lets grey pictures be looked at quickly."""
    lowest = torch.arange(256)[:, None, None]
    offsets = torch.cartesian_prod(*[torch.arange(7)] * 3)[None]
    rgb = (lowest + offsets).clamp(max=255).reshape(1, -1, 3).permute(2, 0, 1).byte()
    assert rgb_to_lab(rgb)[1:].abs().max() < 5
