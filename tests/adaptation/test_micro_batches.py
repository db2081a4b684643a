"""How many samples of a step go through the model at once, with a memory that is made up."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from toy_steps import ToyAdapter, assert_same, seeded, toy, weights, window

from ttt_video.adaptation import SlidingWindow
from ttt_video.adaptation.micro_batches import ON_CPU, SHARE, GpuMemory, MicroBatches
from ttt_video.adaptation.wrappers import MajorityVote
from ttt_video.errors import UserError

WHOLE = 1000
"""Bytes that the model holds."""


class MadeUpMemory:
    """Has room for ``room`` bytes beside the model. A pass of n samples takes ``fixed + n * each``
    bytes, and ``hidden`` more that a trial with at most three does not show. The first one makes
    ``kept`` bytes that stay.
    """

    def __init__(
        self, room: float, each: int = 10, fixed: int = 5, hidden: int = 0, kept: int = 0
    ) -> None:
        self.room, self.each, self.fixed, self.hidden = room, each, fixed, hidden
        self.held, self.kept = WHOLE, kept
        self.highest = WHOLE
        self.released = 0

    def take(self, samples: int) -> None:
        bytes_ = self.fixed + samples * self.each + (self.hidden if samples > 3 else 0)
        if bytes_ > self.room:
            raise torch.cuda.OutOfMemoryError(f"tried to allocate {bytes_} bytes")
        self.held = WHOLE + self.kept
        self.highest = max(self.highest, self.held + bytes_)

    def free(self) -> int:
        return int(self.room)

    def allocated(self) -> int:
        return self.held

    def peak(self) -> int:
        return self.highest

    def forget_peak(self) -> None:
        self.highest = self.held

    def release(self) -> None:
        self.released += 1


def adapter_on(memory: MadeUpMemory, given: int = 0, **settings) -> ToyAdapter:
    """Its passes fail where the memory does not suffice, after they drew and made gradients."""
    adapter = ToyAdapter(toy(batch_norm=True, dropout=0.2), **settings)
    adapter.micro_batches = MicroBatches(given, memory)

    def taken(loss: torch.Tensor, call: int) -> torch.Tensor:
        samples = len(adapter.batches[-1])
        image = adapter.batches[-1][0]["image"]
        try:
            memory.take(samples * image.shape[-1] // 2)
        except torch.cuda.OutOfMemoryError:
            loss.backward()  # an attempt may fail anywhere
            raise
        return loss

    adapter.spoil = taken
    return adapter


def sizes(adapter: ToyAdapter) -> list[int]:
    found = [len(batch) for batch in adapter.batches]
    adapter.batches.clear()
    return found


@pytest.mark.parametrize("kept", [0, 12])
def test_what_two_and_three_samples_take_decides_the_size(caplog, kept):
    # 8 samples take 85 bytes and 4 take 45: of 60 / SHARE bytes, 5.5 samples.
    adapter = adapter_on(MadeUpMemory(60 / SHARE, kept=kept))
    with caplog.at_level(logging.INFO):
        adapter.adapt(window(), seeded())
    assert sizes(adapter) == [2, 3, 4, 4]
    assert [r.getMessage() for r in caplog.records if "4 samples at a time" in r.getMessage()]
    caplog.clear()
    with caplog.at_level(logging.INFO):
        adapter.adapt(window(), seeded())
    assert sizes(adapter) == [4, 4]
    assert not caplog.records
    assert adapter.facts() == {"micro_batch_size": 4}


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("hidden", [0, 30])
def test_trials_and_failures_leave_no_trace(mode, hidden):
    """The step is that of an adapter that was told the size: draws, buffers and gradients."""
    memory = MadeUpMemory(60 / SHARE, hidden=hidden)  # with 30 more, 4 samples do not fit
    settings = {"mode": mode, "name": "ADAMW", "lr": 0.01}
    found = adapter_on(memory, **settings)
    told = adapter_on(MadeUpMemory(1e9), given=2 if hidden else 4, **settings)
    for index in range(2):
        random, same = seeded(index), seeded(index)
        assert found.adapt(window(), random) == told.adapt(window(), same)
        assert torch.equal(random.get_state(), same.get_state())
        assert_same(weights(found.model), weights(told.model))
    assert sizes(found) == ([2, 3, 4, 2, 2, 2, 2] if hidden else [2, 3, 4, 4]) + (
        [2, 2, 2, 2] if hidden else [4, 4]
    )
    assert memory.released == bool(hidden)


def test_a_batch_that_fits_is_not_divided():
    adapter = adapter_on(MadeUpMemory(1e6), batch_size=6)
    adapter.adapt(window(), seeded())
    assert sizes(adapter) == [2, 3, 6]


def test_a_batch_that_was_cut_short_decides_nothing():
    """A frame budget takes fewer samples for a while."""
    adapter = adapter_on(MadeUpMemory(60 / SHARE))
    generator = seeded()
    short = window().sample(1, sampling="with_replacement", generator=generator)
    adapter._step(short, generator)
    assert (sizes(adapter), adapter.facts()) == ([1], {})
    adapter.adapt(window(), generator)
    assert sizes(adapter) == [2, 3, 4, 4]


def frames_of(width: int) -> SlidingWindow:
    frames = SlidingWindow(None)
    for index in range(3):
        frames.push({"image": torch.full((3, 2, width), 40 * index, dtype=torch.uint8)})
    return frames


def test_larger_frames_are_tried_anew_and_smaller_ones_are_not():
    adapter = adapter_on(MadeUpMemory(60 / SHARE))
    for width, expected in [(2, [2, 3, 4, 4]), (4, [2, 3, 2, 2, 2, 2]), (2, [4, 4]), (4, [2] * 4)]:
        adapter.adapt(frames_of(width), seeded())
        assert sizes(adapter) == expected
    smaller = adapter_on(MadeUpMemory(60 / SHARE))
    smaller.adapt(frames_of(4), seeded())
    sizes(smaller)
    smaller.adapt(frames_of(2), seeded())
    assert sizes(smaller) == [2] * 4


def test_a_saved_state_keeps_the_size():
    adapter = adapter_on(MadeUpMemory(60 / SHARE))
    adapter.adapt(window(), seeded())
    state = copy.deepcopy(adapter.state_dict())
    resumed = adapter_on(MadeUpMemory(1e9))
    resumed.load_state_dict(state)
    resumed.adapt(window(), seeded())
    assert sizes(resumed) == [4, 4]


@pytest.mark.parametrize(("given", "fewer"), [(8, 4), (5, 4), (100, 4), (2, 1)])
def test_a_given_number_that_does_not_fit_is_told_with_the_fix(given, fewer):
    adapter = adapter_on(MadeUpMemory(20), given=given)
    with pytest.raises(
        UserError, match=rf"frames of 2x2 .* TTT.MICRO_BATCH_SIZE to {fewer}, or to 0"
    ):
        adapter.adapt(window(), seeded())


@pytest.mark.parametrize("given", [0, 1])
def test_a_single_sample_that_does_not_fit(given):
    adapter = adapter_on(MadeUpMemory(5), given=given)
    with pytest.raises(UserError, match=r"not even one sample .* TTT\.CHECKPOINT True"):
        adapter.adapt(window(), seeded())


def test_a_cpu_takes_a_fixed_number():
    adapter = ToyAdapter(toy(), batch_size=2 * ON_CPU + 1, micro_batch_size=0)
    adapter.adapt(window(), seeded())
    assert sizes(adapter) == [ON_CPU, ON_CPU, 1]
    assert adapter.facts() == {}
    assert "micro_batches" not in adapter.state_dict()


def test_a_wrapper_tells_the_size():
    adapter = adapter_on(MadeUpMemory(60 / SHARE))
    adapter.adapt(window(), seeded())
    assert MajorityVote(adapter, predictions=1, augment=None).facts() == {"micro_batch_size": 4}


@pytest.mark.parametrize(("share", "free"), [(1.0, 700), (0.5, 400), (0.1, 0)])
def test_a_process_counts_no_more_memory_than_its_share(monkeypatch, share, free):
    """1000 bytes in all, 600 of them free; this process holds 100 in tensors and 100 in a cache."""
    fakes = {
        "mem_get_info": (600, 1000),
        "memory_reserved": 200,
        "memory_allocated": 100,
        "get_per_process_memory_fraction": share,
    }
    for name, value in fakes.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value, raising=False)
    assert GpuMemory(torch.device("cuda:1")).free() == free
