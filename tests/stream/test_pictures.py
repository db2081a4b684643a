"""Streams of arrays and Pillow images: the same loop as a source's, results at the given size."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from detectron2.structures import Instances
from PIL import Image
from tiny import TINY

import ttt_video
from ttt_video.config import load_config
from ttt_video.data.pictures import PictureFrames
from ttt_video.data.sources import FolderSource, FrameTransform
from ttt_video.errors import UserError
from ttt_video.modeling.weights import save_safetensors
from ttt_video.stream import FrameResult, Stream

HEIGHT, WIDTH = 40, 72
SIZE = ["INPUT.MIN_SIZE_TEST", 32]


def pictures(count: int = 3) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8) for _ in range(count)]


@pytest.fixture
def pretrained(tiny_model, tmp_path):
    """``pretrained(opts..., color=..., method=...)``: a stream of the tiny model."""
    weights = tmp_path / "tiny.safetensors"
    save_safetensors(tiny_model.state_dict(), str(weights))

    def build(*opts: object, **given: str) -> Stream:
        given.setdefault("device", "cpu")
        opts = (*TINY, *SIZE, *opts)
        return ttt_video.Stream.from_pretrained(
            "joint_cityscapes", weights=weights, opts=opts, **given
        )

    return build


def losses(results) -> list[float]:
    return [result.loss for result in results]


def test_arrays_give_what_the_same_files_give(pretrained, tmp_path):
    folder = tmp_path / "video"
    folder.mkdir()
    for index, pixels in enumerate(pictures()):
        Image.fromarray(pixels).save(folder / f"{index}.png")
    stream = pretrained()
    source = FolderSource(folder, FrameTransform(32))
    files, arrays = list(stream.run(source)), list(stream.run(pictures()))
    for ours, theirs in zip(arrays, files, strict=True):
        assert torch.equal(ours.frame["image"], theirs.frame["image"])
        assert ours.labels.shape == ours.scores.shape == (HEIGHT, WIDTH)
        assert ours.frame["frame_index"] == theirs.frame["frame_index"]
    assert losses(arrays) == losses(files)  # the seed is that of a video of this name
    assert arrays[2].output["sem_seg"].equal(files[2].output["sem_seg"])


def test_run_begins_anew_and_step_goes_on(pretrained):
    stream, frames = pretrained(), pictures()
    expected = losses(stream.run(frames))
    assert len(set(expected)) == 3
    assert losses(stream.run(iter(frames))) == losses(stream.run(np.stack(frames))) == expected
    stream.start_video("video")
    results = [stream.step(frame) for frame in frames]
    assert losses(results) == expected
    assert [result.frame["frame_index"] for result in results] == [0, 1, 2]
    fourth = stream.step(frames[0])
    assert fourth.frame["frame_index"] == 3
    stream.start_video("another")
    assert stream.step(frames[0]).frame["video_id"] == "another"


@pytest.mark.parametrize("budget", [0, 60_000])
def test_colours_are_what_they_are_said_to_be(pretrained, budget):
    frames = pictures()
    opts = ("TTT.FRAME_BUDGET_MS", budget)
    expected = [result.frame["image"] for result in pretrained(*opts).run(frames)]
    bgr = [np.ascontiguousarray(frame[:, :, ::-1]) for frame in frames]
    stream = pretrained(*opts, color="bgr")
    for given in (bgr, [Image.fromarray(frame) for frame in frames]):  # Pillow's say it themselves
        for ours, image in zip(stream.run(given), expected, strict=True):
            assert ours.frame["image"].equal(image)
    with pytest.raises(UserError, match="color is 'gbr'; give 'rgb' or 'bgr'"):
        pretrained(color="gbr")


def test_an_offline_method_watches_all_pictures_first(pretrained):
    stream = pretrained("TTT.OFFLINE.STEPS", 1, method="offline_ttt_mae")
    results = list(stream.run(pictures()))
    assert len(results) == 3
    assert {result.record["offline_steps"] for result in results} == {1}
    with pytest.raises(UserError, match="needs the whole video before its first prediction"):
        next(stream.run(iter(pictures())))


GIVEN = np.zeros((HEIGHT, WIDTH, 3), np.uint8)


@pytest.mark.parametrize(
    ("picture", "message"),
    [
        (GIVEN / 255, r"has float64 values: give uint8, such as \(255 \* image\)"),
        (GIVEN.astype(np.uint16), r"has uint16 values: .*\(image >> 8\).*from 0 to 65535"),
        (GIVEN.astype(np.int64), r"has int64 values: .*image\.astype\('uint8'\) .*from 0 to 255"),
        (GIVEN[..., 0], r"shape \(40, 72\), not .*np\.stack\(\[image\] \* 3, -1\)"),
        (GIVEN[..., :1], r"shape \(40, 72, 1\), .* image\.repeat\(3, 2\)"),
        (GIVEN.transpose(2, 0, 1), r"shape \(3, 40, 72\), .* image\.transpose\(1, 2, 0\)"),
        (torch.zeros(3, 40, 72, dtype=torch.uint8), r"image\.transpose\(1, 2, 0\)"),
        (np.zeros((40, 72, 4), np.uint8), r"drop the transparency, image\[:, :, :3\]"),
        (GIVEN[None], r"shape \(1, 40, 72, 3\), .*: run\(\) takes several frames, step\(\) one"),
        (GIVEN[:0], r"shape \(0, 72, 3\), .*: it has no pixels"),
        ("street.png", r"not str; open the file first, as with PIL\.Image\.open"),
        (None, r"an \(H, W, 3\) uint8 array or a Pillow image, not NoneType"),
        (torch.zeros(4, requires_grad=True), "no array that NumPy can read: Can't call numpy"),
        (Image.new("F", (4, 4)), "frame of the image has 32-bit pixels"),
    ],
)
def test_what_is_no_picture_is_refused_in_one_line(pretrained, picture, message):
    with pytest.raises(UserError, match=message) as error:
        pretrained(method="none").step(picture)
    assert "\n" not in str(error.value)


def test_what_is_no_video_is_refused(pretrained):
    stream = pretrained(method="none")
    for empty in ([], iter(()), np.zeros((0, HEIGHT, WIDTH, 3), np.uint8)):
        with pytest.raises(UserError, match="there are no frames: the iterable is empty"):
            list(stream.run(empty))
    with pytest.raises(UserError, match=r"shape \(72, 3\).*give run\(\) several frames"):
        list(stream.run(GIVEN))  # a single picture
    frames = stream.run([GIVEN, GIVEN[:30]])
    next(frames)
    with pytest.raises(UserError, match=r"frame 1 is 30x72 .* it are 40x72: .*start_video\(\)"):
        next(frames)
    stream.start_video("smaller")
    assert stream.step(GIVEN[:30]).labels.shape == (30, WIDTH)
    with pytest.raises(UserError, match="no config 'quick/stream_wolrd'; did you mean"):
        Stream.from_pretrained("quick/stream_wolrd")
    with pytest.raises(UserError, match=r"MODEL\.DEVICE is 'gpu'"):
        pretrained(device="gpu")
    with pytest.raises(UserError, match=r"'TTT\.SEED' stands alone"):
        Stream.from_pretrained(device="cpu", opts=["TTT.SEED"])


CONTEXTS = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "disabled": lambda: torch.autograd.set_grad_enabled(False),
}


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize(
    "method",
    ["online_ttt_mae", "tent", "self_train", "offline_ttt_mae"],
)
def test_a_caller_without_gradients_learns_as_any_other(pretrained, method, context):
    """A node may decorate its callback with torch.inference_mode(), where steps moved nothing."""
    opts = ("TTT.OFFLINE.STEPS", 2, "TTT.SELF_TRAIN.THRESHOLD", 0.0)
    shown = pictures()
    expected = list(pretrained(*opts, method=method).run(shown))
    with CONTEXTS[context]():
        stream = pretrained(*opts, method=method)
        results = list(stream.run(shown))
        assert stream.adapter.state_dict()["tensors"]
        assert not torch.is_grad_enabled()
    for one, other in zip(results, expected, strict=True):
        assert one.record == other.record
        assert torch.equal(one.output["sem_seg"], other.output["sem_seg"])


def test_what_a_stream_alone_cannot_do_is_refused(pretrained):
    with pytest.raises(UserError, match=r"TTT\.FRAME_ORDER is 'shuffled', .* give run\(\) a list"):
        pretrained("TTT.FRAME_ORDER", "shuffled")


def test_a_stream_within_a_budget_is_switched_as_any_other(pretrained):
    stream = pretrained("TTT.FRAME_BUDGET_MS", 100_000, method="online_ttt_mae")
    stream.learning = False
    results = [stream.step(picture) for picture in pictures()]
    assert [result.loss for result in results] == [None] * len(results)
    stream.learning = True
    assert stream.step(pictures()[0]).loss is not None
    assert stream.video_id == "video"
    assert len(stream.window.state_dict()) == len(stream.stream.window.state_dict())


def test_a_stream_of_parts_takes_frames_alone(pretrained):
    stream = pretrained(method="none")
    parts = Stream(stream.adapter, stream.window)
    with pytest.raises(UserError, match=r"a frame is a dict .* not ndarray: .*from_pretrained"):
        parts.step(GIVEN)


def test_confidence_is_the_share_of_the_winner():
    scores = torch.tensor([[[0.2, 0.0]], [[0.6, 0.0]]])
    result = FrameResult({}, {"sem_seg": scores})
    assert result.labels.tolist() == [[1, 0]]
    np.testing.assert_allclose(result.scores, [[0.75, 0]])
    assert (result.segments, result.colors, result.loss) == (None, None, None)


def test_segments_of_a_panoptic_map_and_of_instances():
    ids = torch.tensor([[0, 1], [2, 1]], dtype=torch.int32)
    info = [{"id": 1, "isthing": True, "category_id": 7}, {"id": 2, "category_id": 3}]
    found = Instances((2, 2))
    found.scores = torch.tensor([0.5, 0.9, 0.4])
    found.pred_classes = torch.tensor([1, 2, 3])
    found.pred_masks = torch.eye(3)[:, None, :2].expand(-1, 2, -1)
    panoptic = FrameResult({}, {"panoptic_seg": (ids, info), "instances": found})
    assert panoptic.labels.tolist() == [[-1, 7], [3, 7]]
    assert [(s.label, s.mask.tolist(), s.score) for s in panoptic.segments] == [
        (7, [[False, True], [False, True]], None),
        (3, [[False, False], [True, False]], None),
    ]
    segments = FrameResult({}, {"instances": found}).segments
    assert [(s.label, round(s.score, 3)) for s in segments] == [(2, 0.9), (1, 0.5)]
    assert segments[0].mask.tolist() == [[False, True], [False, True]]
    assert FrameResult({}, {"instances": found}).labels is None


def test_a_colour_model_takes_grey_arrays():
    frames = [np.random.default_rng(0).integers(0, 256, (32, 64), np.uint8)]
    opts = ["TTT.BATCH_SIZE", 1]
    stream = Stream.from_pretrained("quick/stream_world_color", device="cpu", opts=opts)
    (result,) = stream.run(frames)
    assert result.colors.shape == (32, 64, 3)
    assert result.colors.dtype == np.uint8
    assert result.labels is None
    (again,) = stream.run([np.stack([frames[0]] * 3, -1)])
    np.testing.assert_array_equal(again.colors, result.colors)


def test_pictures_are_cropped_as_a_sources_are(tmp_path):
    """So pictures of several sizes are frames of one."""
    cfg = load_config("Base-ViTMAE.yaml")
    frames = PictureFrames(cfg)
    for index, (height, width) in enumerate([(300, 400), (256, 500)]):
        pixels = np.random.default_rng(index).integers(0, 256, (height, width, 3), np.uint8)
        folder = tmp_path / str(index)
        folder.mkdir()
        Image.fromarray(pixels).save(folder / "0.png")
        (theirs,) = FolderSource(folder, FrameTransform.from_config(cfg))
        ours = frames(pixels, "video", index)
        assert torch.equal(ours["image"], theirs["image"])
        assert (ours["height"], ours["width"]) == (224, 224)
