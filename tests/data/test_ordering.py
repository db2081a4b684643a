"""The first frames of a source, and shuffled ones."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest

from ttt_video.data import BaseSource
from ttt_video.data.ordering import FirstFrames, ShuffledFrames
from ttt_video.errors import UserError
from ttt_video.structures import FrameSource


class Source(BaseSource):
    """Counts how often it is read."""

    fps = 12.5

    def __init__(self, num_frames: int | None = 6, video_id: str = "a") -> None:
        self.num_frames, self.video_id = num_frames, video_id
        self.skipped = ["broken.png"]
        self.reads = 0

    def __iter__(self):
        self.reads += 1
        for index in range(self.num_frames or 6):
            yield {"video_id": self.video_id, "frame_index": index}


def indices(frames) -> list[int]:
    return [frame["frame_index"] for frame in frames]


@pytest.mark.parametrize(("count", "expected"), [(None, 6), (4, 4), (6, 6), (9, 6)])
def test_first_frames_in_time_order_as_often_as_asked(count, expected):
    source = FirstFrames(Source(), count)
    assert isinstance(source, FrameSource)
    assert source.num_frames == expected
    assert indices(source) == indices(source) == [*range(expected)]
    assert (source.video_id, source.fps, source.skipped) == ("a", 12.5, ["broken.png"])


def test_a_number_of_frames_that_nobody_knows():
    assert FirstFrames(Source(None), None).num_frames is None
    assert FirstFrames(Source(None), 3).num_frames == 3


def test_first_frames_after_one_of_them():
    assert indices(FirstFrames(Source(), 4).frames_after(1)) == [2, 3]
    assert indices(FirstFrames(Source(), 4).frames_after(-1)) == [0, 1, 2, 3]
    with pytest.raises(UserError, match="no frame 5"):
        FirstFrames(Source(), 4).frames_after(5)


def test_shuffled_frames_are_the_first_ones_in_another_order():
    shuffled = indices(ShuffledFrames(Source(100), 50, seed=0))
    assert sorted(shuffled) == [*range(50)]
    assert shuffled != sorted(shuffled)
    neighbours = sum(abs(a - b) == 1 for a, b in itertools.pairwise(shuffled))
    assert neighbours < 10


def test_order_depends_on_seed_and_video_alone():
    orders = {
        (seed, video): tuple(indices(ShuffledFrames(Source(20, video), None, seed=seed)))
        for seed in (0, 1)
        for video in ("a", "b")
    }
    assert len(set(orders.values())) == 4
    assert indices(ShuffledFrames(Source(20), None, seed=1)) == [*orders[1, "a"]]
    # A run on disk can be gone on with by a later version only if this order never changes.
    assert indices(ShuffledFrames(Source(6), None, seed=0)) == [1, 0, 2, 5, 3, 4]


def test_every_first_frame_is_as_likely():
    firsts = Counter(indices(ShuffledFrames(Source(4), None, seed=s))[0] for s in range(400))
    assert all(60 < firsts[index] < 140 for index in range(4))


def test_the_source_is_read_once():
    source = Source()
    shuffled = ShuffledFrames(source, None, seed=0)
    assert indices(shuffled) == indices(shuffled)
    assert source.reads == 1


def test_frames_after_one_of_them():
    shuffled = ShuffledFrames(Source(), None, seed=0)
    order = indices(shuffled)
    for place, index in enumerate(order):
        assert indices(shuffled.frames_after(index)) == order[place + 1 :]
    assert indices(shuffled.frames_after(-1)) == order
    with pytest.raises(UserError, match="video a has no frame 6 any more"):
        shuffled.frames_after(6)


def test_the_source_is_closed_with_the_first_frames():
    """Its thread or connection would stay where somebody keeps the error of a loop over them."""
    closed = []

    class Open(Source):
        def __iter__(self):
            try:
                yield from super().__iter__()
            finally:
                closed.append(self.video_id)

    frames = iter(FirstFrames(Open(), 4))
    next(frames)
    frames.close()
    assert closed == ["a"]
    assert len(list(FirstFrames(Open(), 2))) == 2
    assert closed == ["a", "a"]
