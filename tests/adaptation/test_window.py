"""The sliding window: what it remembers, what it lets in, and how batches are drawn from it."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare

from ttt_video.adaptation import LimitedWindow, SlidingWindow


def filled(num_frames: int, size: int | None = None) -> SlidingWindow:
    window = SlidingWindow(size)
    for index in range(num_frames):
        window.push({"image": torch.tensor([index]), "video_id": "a", "frame_index": index})
    return window


def draw(window: SlidingWindow, batch_size: int, sampling: str, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    batch = window.sample(batch_size, sampling=sampling, generator=generator)
    return [sample["frame_index"] for sample in batch]


@given(num_frames=st.integers(1, 40), size=st.one_of(st.none(), st.integers(1, 20)))
def test_holds_the_last_frames_current_one_included(num_frames, size):
    window = filled(num_frames, size)
    kept = min(num_frames, size or num_frames)
    assert len(window) == kept
    assert window.current["frame_index"] == num_frames - 1
    # Every frame that is left is drawn by one whole pass, and no other.
    assert sorted(draw(window, kept, "shuffled_epochs")) == [*range(num_frames - kept, num_frames)]


@pytest.mark.parametrize("size", [0, -1])
def test_a_window_without_room_is_refused(size):
    with pytest.raises(ValueError, match=f"not {size}"):
        SlidingWindow(size)


@pytest.mark.parametrize(
    ("sampling", "asked"),
    [("with_replacement", 9), ("shuffled_epochs", 9), ("without_replacement", 4)],
)
@pytest.mark.parametrize("limit", [1, 3, 20])
def test_a_limited_window_draws_as_for_a_smaller_batch(sampling, asked, limit):
    window = filled(6, 4)
    limited = LimitedWindow(window, limit)
    assert (limited.asked, limited.drawn) == (0, 0)
    assert draw(limited, 9, sampling) == draw(window, min(limit, 9), sampling)
    assert (limited.asked, limited.drawn) == (asked, min(limit, asked))
    assert limited.current is window.current
    assert (len(limited), limited.size, limited.device) == (4, 4, window.device)


def test_clear_forgets_everything():
    window = filled(5)
    window.clear()
    assert len(window) == 0
    window.push({"image": torch.tensor([7]), "video_id": "b", "frame_index": 7})
    assert set(draw(window, 10, "with_replacement")) == {7}


def test_labels_cannot_get_in():
    frame = {
        "image": torch.zeros(3, 4, 4, dtype=torch.uint8),
        "height": 8,
        "width": 9,
        "video_id": "a",
        "frame_index": 0,
        "file_name": "labels_are_one_replace_away.png",
        "sem_seg": torch.ones(4, 4),
        "sem_seg_file_name": "labels.png",
        "pan_seg_file_name": "labels.png",
        "annotations": [{}],
        "instances": object(),
        "key_of_a_future_data_set": 1,
    }
    window = SlidingWindow(2)
    pushed = window.push(frame)
    assert set(pushed) == {"image", "height", "width", "video_id", "frame_index"}
    assert window.current is pushed
    (sampled,) = window.sample(1, sampling="with_replacement", generator=torch.Generator())
    assert sampled is pushed
    assert set(frame) > set(pushed)  # the caller's frame keeps its labels, for the evaluator


def test_image_is_moved_to_the_device_once_and_not_copied_when_it_is_there():
    image = torch.arange(12, dtype=torch.uint8).view(3, 2, 2)
    window = SlidingWindow(2, device="cpu")
    assert window.push({"image": image})["image"].data_ptr() == image.data_ptr()
    elsewhere = SlidingWindow(2, device="meta")
    moved = elsewhere.push({"image": image})["image"]
    assert moved.device.type == "meta"
    for _ in range(2):
        (sample,) = elsewhere.sample(1, sampling="with_replacement", generator=torch.Generator())
        assert sample["image"] is moved


def test_with_replacement_is_uniform_and_independent():
    window = filled(20, size=16)
    picks = draw(window, 16_000, "with_replacement")
    counts = Counter(picks)
    assert set(counts) == set(range(4, 20))
    assert chisquare([counts[i] for i in range(4, 20)]).pvalue > 1e-4
    # Independent draws: a frame follows itself as often as any other does.
    repeats = sum(a == b for a, b in itertools.pairwise(picks))
    assert 800 < repeats < 1200


def test_with_replacement_repeats_frames_within_one_window():
    assert any(len(set(draw(filled(16), 16, "with_replacement", seed))) < 16 for seed in range(5))


def test_full_window_and_published_batch_give_every_frame_exactly_twice():
    window = filled(30, size=16)
    for seed in range(20):
        assert Counter(draw(window, 32, "shuffled_epochs", seed)) == dict.fromkeys(range(14, 30), 2)


@given(num_frames=st.integers(1, 20), batch_size=st.integers(1, 50), seed=st.integers(0, 2**31))
def test_shuffled_epochs_are_whole_passes_one_after_the_other(num_frames, batch_size, seed):
    picks = draw(filled(num_frames), batch_size, "shuffled_epochs", seed)
    assert len(picks) == batch_size
    for start in range(0, batch_size, num_frames):
        one_pass = picks[start : start + num_frames]
        assert len(set(one_pass)) == len(one_pass)


def test_passes_are_shuffled_independently():
    first, second = [], []
    for seed in range(20):
        picks = draw(filled(8), 16, "shuffled_epochs", seed)
        first.append(tuple(picks[:8]))
        second.append(tuple(picks[8:]))
    assert len(set(first)) > 15
    assert all(a != b for a, b in zip(first, second, strict=True))


@given(num_frames=st.integers(1, 20), batch_size=st.integers(1, 50), seed=st.integers(0, 2**31))
def test_without_replacement_no_frame_comes_twice(num_frames, batch_size, seed):
    picks = draw(filled(num_frames), batch_size, "without_replacement", seed)
    assert len(picks) == len(set(picks)) == min(num_frames, batch_size)
    assert set(picks) <= set(range(num_frames))


def test_without_replacement_every_frame_is_as_likely():
    counts = Counter(
        p for seed in range(400) for p in draw(filled(4), 2, "without_replacement", seed)
    )
    assert all(150 < counts[index] < 250 for index in range(4))


@pytest.mark.parametrize("sampling", ["with_replacement", "shuffled_epochs", "without_replacement"])
def test_draws_follow_the_generator_alone(sampling):
    window = filled(16)
    before = torch.get_rng_state()
    same = [draw(window, 32, sampling, seed=3) for _ in range(2)]
    assert same[0] == same[1]
    assert draw(window, 32, sampling, seed=4) != same[0]
    assert torch.equal(torch.get_rng_state(), before)
    generator = torch.Generator().manual_seed(3)
    batches = [
        [s["frame_index"] for s in window.sample(32, sampling=sampling, generator=generator)]
        for _ in range(2)
    ]
    assert batches[0] == same[0]
    assert batches[1] != same[0]


def test_unknown_sampling_is_refused():
    with pytest.raises(ValueError, match="uniform"):
        draw(filled(2), 2, "uniform")
