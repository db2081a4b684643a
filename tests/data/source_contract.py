"""What every frame source promises. A test class for a kind of source inherits these tests."""

from __future__ import annotations

import json
from itertools import islice

import numpy as np
import pytest
import torch
from PIL import Image

from ttt_video.data.sources import FrameTransform
from ttt_video.structures import FrameSource

HEIGHT, WIDTH, NUM_FRAMES = 48, 80, 5
TRANSFORM = FrameTransform(min_size=32)


def picture(seed: int) -> np.ndarray:
    """(48, 80, 3) uint8, smooth and different for every seed."""
    coarse = np.random.default_rng(seed).integers(0, 256, (3, 5, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC))


class FrameSourceContract:
    """Define ``source``: `NUM_FRAMES` frames that show ``picture(0)``, ``picture(1)``, ..."""

    @pytest.fixture
    def source(self, tmp_path) -> FrameSource:
        raise NotImplementedError

    def test_is_a_source_that_knows_its_name_and_length(self, source):
        assert isinstance(source, FrameSource)
        assert isinstance(source.video_id, str)
        assert source.video_id
        assert source.num_frames in (NUM_FRAMES, None)
        assert source.fps is None or source.fps > 0

    def test_says_what_it_skipped_and_what_it_is_known_by(self, source):
        assert list(source.skipped) == []
        list(source)
        assert list(source.skipped) == []  # nothing is unreadable here
        known = source.fingerprint()
        assert known is None or json.loads(json.dumps(known)) == known
        assert source.fingerprint() == known

    def test_frames_come_in_time_order_and_show_what_they_should(self, source):
        frames = list(source)
        assert [frame["frame_index"] for frame in frames] == [*range(NUM_FRAMES)]
        for index, frame in enumerate(frames):
            image = torch.nn.functional.interpolate(
                frame["image"][None].float(), (HEIGHT, WIDTH), mode="bilinear"
            )[0]
            errors = [
                (image.permute(1, 2, 0).numpy() - picture(seed).astype(float)).__abs__().mean()
                for seed in range(NUM_FRAMES)
            ]
            assert int(np.argmin(errors)) == index
            assert errors[index] < 8

    def test_frames_are_dataset_dicts_at_network_resolution(self, source):
        for frame in source:
            assert frame["image"].dtype == torch.uint8
            assert frame["image"].shape == (3, 32, 53)
            assert frame["image"][0].is_contiguous()  # grey ones are one plane, seen three times
            assert (frame["height"], frame["width"]) == (HEIGHT, WIDTH)
            assert frame["video_id"] == source.video_id
            assert isinstance(frame["file_name"], str)
        names = [frame["file_name"] for frame in source]
        assert len(set(names)) == NUM_FRAMES

    def test_a_model_takes_them_as_they_are(self, source, tiny_model):
        with torch.no_grad():
            (frame,) = islice(source, 1)
            assert tiny_model([frame])[0]["sem_seg"].shape == (19, HEIGHT, WIDTH)

    def test_every_iteration_starts_anew(self, source):
        first = [frame["image"].clone() for frame in source]
        assert len(list(islice(source, 2))) == 2
        again = list(source)
        assert len(again) == NUM_FRAMES
        assert all(torch.equal(a, b["image"]) for a, b in zip(first, again, strict=True))

    def test_iterations_do_not_disturb_each_other(self, source):
        left, right = iter(source), iter(source)
        next(left)
        indices = [frame["frame_index"] for frame in right]
        assert indices == [*range(NUM_FRAMES)]
        assert [frame["frame_index"] for frame in left] == [*range(1, NUM_FRAMES)]

    def test_frames_own_their_pixels(self, source):
        """A window keeps frames while later ones are read, and may change none of them."""
        frames = list(source)
        kept = [frame["image"].clone() for frame in frames]
        frames[0]["image"].zero_()
        assert all(torch.equal(f["image"], k) for f, k in zip(frames[1:], kept[1:], strict=True))
        assert torch.equal(next(iter(source))["image"], kept[0])

    def test_random_states_stay(self, source):
        before = torch.get_rng_state(), np.random.get_state()[1].tolist()  # noqa: NPY002
        list(source)
        assert torch.equal(torch.get_rng_state(), before[0])
        assert np.random.get_state()[1].tolist() == before[1]  # noqa: NPY002

    def test_starts_after_any_frame(self, source):
        frames = list(source)
        for index in (-1, 0, 2, NUM_FRAMES - 1):
            rest = list(source.frames_after(index))
            assert [f["frame_index"] for f in rest] == [*range(index + 1, NUM_FRAMES)]
            expected = frames[index + 1 :]
            for a, b in zip(rest, expected, strict=True):
                assert torch.equal(a["image"], b["image"])
                assert a["file_name"] == b["file_name"]
