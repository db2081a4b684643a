"""Replayed functions are the plain ones, on a tape in place of a GPU."""

from __future__ import annotations

import gc
import logging
import weakref
from contextlib import contextmanager
from functools import lru_cache
from types import SimpleNamespace

import pytest
import torch
from tape import TapeCapture
from torch import Tensor

from ttt_video.modeling import graphs
from ttt_video.modeling.graphs import (
    MOST_GRAPHS,
    NOTICED,
    CudaCapture,
    GraphRunner,
    autocast_in_graphs,
    capture_for,
    defines_together,
    stacked,
    surroundings,
    unstacked,
    without_garbage_collection,
)


class Line:
    """a x + b, which counts how often Python runs it."""

    def __init__(self) -> None:
        self.a, self.b = torch.tensor(2.0), torch.tensor(1.0)
        self.calls = 0

    def __call__(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.a * x + self.b


@pytest.fixture
def capture() -> TapeCapture:
    return TapeCapture()


def runner_of(function, capture, **settings) -> GraphRunner:
    return GraphRunner(function, capture, name="line", **settings)


def numbers(*values: float) -> Tensor:
    return torch.tensor(values)


def test_a_shape_runs_is_recorded_and_is_replayed(capture):
    line = Line()
    run = runner_of(line, capture)
    for x, calls, replays in [(1.0, 1, 0), (2.0, 2, 1), (3.0, 2, 2), (-4.0, 2, 3)]:
        assert run(numbers(x, 0.0)).tolist() == [2 * x + 1, 1.0]
        assert (line.calls, capture.replayed) == (calls, replays)
    assert capture.recorded == 1


def test_a_replay_reads_its_own_inputs_and_the_weights_as_they_are_now(capture):
    line = Line()
    run = runner_of(line, capture, weights=[line.a, line.b])
    x = numbers(1.0)
    run(x), run(x)
    line.a.fill_(5.0)
    result = run(x)
    x.fill_(float("nan"))  # the caller's memory is its own again
    assert result.tolist() == [6.0]
    assert run(numbers(2.0)).tolist() == [11.0]


def test_a_result_is_good_until_the_next_call(capture):
    run = runner_of(Line(), capture)
    run(numbers(0.0))
    kept, copied = run(numbers(1.0)), run(numbers(1.0)).clone()
    run(numbers(2.0))
    assert (kept.tolist(), copied.tolist()) == ([5.0], [3.0])


def test_shapes_dtypes_and_keys_have_graphs_of_their_own(capture):
    run = runner_of(Line(), capture)
    calls = [
        (torch.ones(2), "a"), (torch.ones(3), "a"), (torch.ones(2).double(), "a"),
        (torch.ones(2), "b"),
    ]  # fmt: skip
    for recorded in (0, 4, 4):
        for x, key in calls:
            assert torch.equal(run(x, key=key), 2 * x + 1)
        assert capture.recorded == recorded


def test_a_weight_that_moved_drops_the_graphs(capture):
    line = Line()
    line.a = torch.nn.Parameter(torch.tensor(2.0), requires_grad=False)
    run = runner_of(line, capture, weights=[line.a])
    for _ in range(3):
        run(numbers(1.0))
    line.a.data = torch.tensor(7.0)
    assert [run(numbers(1.0)).item() for _ in range(3)] == [8.0] * 3
    assert capture.recorded == 2


def test_what_cannot_be_recorded_runs_as_it_is_and_the_log_says_why_once(capture, caplog):
    def waits(x: Tensor) -> Tensor:
        return x + 1 if x.sum() > 0 else x - 1

    run = runner_of(waits, capture)
    with caplog.at_level(logging.WARNING):
        assert [run(numbers(x)).item() for x in (1.0, -1.0, 1.0, -1.0)] == [2.0, -2.0, 2.0, -2.0]
    (message,) = caplog.messages
    assert "line runs without CUDA graphs" in message
    assert "a number is read" in message
    assert capture.recorded == 0


def test_a_broken_recording_undoes_nothing_and_is_not_tried_again(capture):
    seen = torch.zeros(())

    def counts(x: Tensor) -> Tensor:
        seen.add_(1)
        return x + seen

    run = runner_of(counts, capture)
    capture.fail = RuntimeError("out of memory")
    assert [run(numbers(0.0)).item() for _ in range(4)] == [1.0, 2.0, 3.0, 4.0]


def test_a_size_whose_graph_does_not_fit_runs_as_it_is_and_smaller_ones_are_recorded(
    capture, caplog
):
    line = Line()
    run = runner_of(line, capture)
    assert run.failure == ""
    capture.fail = torch.cuda.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB")
    with caplog.at_level(logging.WARNING):
        assert [run(numbers(1.0, 2.0)).tolist() for _ in range(2 * NOTICED)] == [[3.0, 5.0]] * (
            2 * NOTICED
        )
    (message,) = caplog.messages
    assert message.startswith("the line runs without CUDA graphs, for inputs of one size, because")
    assert message.endswith("does not hold its graph: CUDA out of memory.")
    assert run.failure == "CUDA out of memory."
    capture.fail = None
    calls = line.calls
    assert [run(numbers(1.0)).item() for _ in range(4)] == [3.0] * 4
    assert (capture.recorded, line.calls - calls) == (1, 2)


def test_recording_ends_where_no_size_fits(capture, caplog):
    run = runner_of(Line(), capture)
    capture.fail = torch.cuda.OutOfMemoryError("full")
    for count in range(1, MOST_GRAPHS + 3):
        for _ in range(2):
            run(numbers(*[1.0] * count))
    assert len(caplog.messages) == MOST_GRAPHS + 1
    assert "because it cannot be recorded: full" in caplog.messages[-1]


def test_an_interrupt_of_a_recording_is_none_of_its_errors(capture):
    """The end of a broken recording raises an error of its own, after Ctrl-C, too."""

    def interrupted(x: Tensor) -> Tensor:
        if capture.fail is not None:
            try:
                raise KeyboardInterrupt
            finally:
                raise capture.fail
        return x

    run = runner_of(interrupted, capture)
    run(numbers(0.0))
    capture.fail = RuntimeError("the recording is broken")
    with pytest.raises(KeyboardInterrupt):
        run(numbers(0.0))


@pytest.mark.slow
def test_a_broken_recording_leaves_the_stream_and_the_generator_usable(monkeypatch):
    """Its end raises before torch puts back the stream and ends the generator's recording."""
    generator = SimpleNamespace(state="recorded", clone_state=lambda: "new")
    generator.graphsafe_set_state = lambda state: setattr(generator, "state", state)
    streams = ["loop"]

    @contextmanager
    def graph(recorded, *, stream, **_):
        streams.append(stream)
        try:
            yield
        except RuntimeError as error:
            raise RuntimeError("the recording is broken") from error
        streams.pop()

    fakes = {
        "Stream": lambda device: "recordings",
        "CUDAGraph": object,
        "graph_pool_handle": object,
        "graph": graph,
        "current_stream": lambda device: streams[-1],
        "set_stream": streams.append,
        "default_generators": [None, generator],
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    capture = CudaCapture(torch.device("cuda:1"))

    def waits():
        raise RuntimeError("a number is read")

    with pytest.raises(RuntimeError, match="the recording is broken"):
        capture.record(waits)
    assert (streams[-1], generator.state) == ("loop", "new")
    generator.state = "of a graph"
    _, replay = capture.record(lambda: None)
    with pytest.raises(RuntimeError):
        capture.record(waits)
    assert (streams[-1], generator.state) == ("loop", "of a graph")
    del replay


def test_no_garbage_is_collected_while_a_graph_is_recorded():
    """A graph of a model that was dropped is freed before, as freeing it breaks a recording."""

    class Cycle:
        def __init__(self) -> None:
            self.itself = self

    alive, seen = weakref.ref(Cycle()), []

    def record() -> None:
        with without_garbage_collection():
            seen.append((alive(), gc.isenabled()))
            raise KeyError

    with pytest.raises(KeyError):
        record()
    assert seen == [(None, False)]
    assert gc.isenabled()


def test_a_function_that_writes_does_so_once_a_call(capture):
    total = torch.zeros(2)
    run = runner_of(lambda x: total.add_(x) * 1, capture)
    results = [run(numbers(1.0, 10.0)).tolist() for _ in range(4)]
    assert results == [[i, 10.0 * i] for i in (1, 2, 3, 4)]
    assert capture.replayed == 3


def test_a_call_that_failed_is_no_first_call(capture):
    """The first run may make what a graph must find, such as gradients."""
    calls = []

    def fails_at_first(x: Tensor) -> Tensor:
        calls.append(x)
        if len(calls) == 1:
            raise torch.cuda.OutOfMemoryError("too large")
        return x + 1

    run = runner_of(fails_at_first, capture)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        run(numbers(1.0))
    run(numbers(1.0))
    assert capture.recorded == 0
    assert run(numbers(1.0)).item() == 2.0
    assert capture.recorded == 1


def test_sizes_that_change_with_every_call_are_never_recorded(capture, caplog):
    run = runner_of(Line(), capture)
    with caplog.at_level(logging.WARNING):
        for size in range(1, 3 * graphs.NOTICED):
            assert run(torch.ones(size)).sum() == 3 * size
    assert capture.recorded == 0
    assert len(caplog.messages) == 1


def test_few_graphs_are_kept_and_recording_ends(capture, monkeypatch):
    monkeypatch.setattr(graphs, "MOST_GRAPHS", 2)
    monkeypatch.setattr(graphs, "MOST_DROPPED", 3)
    run = runner_of(Line(), capture)
    for _ in range(6):
        for size in (1, 2, 3):  # the oldest graph is always the next one
            assert torch.equal(run(torch.ones(size)), torch.full((size,), 3.0))
    assert capture.recorded == 2 + 3
    assert len(run._graphs) == 2


def test_tables_in_caches_live_as_long_as_a_graph(capture, monkeypatch):
    """A replay does not use the cache, so that other sizes may push them out of it."""

    @lru_cache(maxsize=1)
    def table(size: int) -> Tensor:
        return torch.arange(float(size))

    monkeypatch.setattr(graphs, "table_of_a_test", table, raising=False)
    run = runner_of(lambda x: x + table(len(x)), capture)
    run(torch.zeros(3)), run(torch.zeros(3))
    (recorded,) = run._graphs.values()
    own = table(3)
    table(4)
    assert table.cache_info().currsize == 1
    assert any(one is own for held in recorded.kept for one in held)
    run.clear()
    assert not run._graphs


def test_there_is_no_capture_on_a_cpu():
    assert capture_for(torch.device("cpu")) is None


def test_autocast_around_a_graph_has_no_cache():
    with torch.autocast("cpu", torch.bfloat16):
        outside = surroundings("cpu")
        with autocast_in_graphs("cpu"):
            assert not torch.is_autocast_cache_enabled()
            assert surroundings("cpu") == outside
        assert torch.is_autocast_cache_enabled()
    with autocast_in_graphs("cpu"):
        assert not torch.is_autocast_enabled("cpu")
    assert surroundings("cpu") != outside


def test_images_are_stacked_and_grey_ones_stay_one_plane():
    images = [torch.full((3, 4, 5), i, dtype=torch.uint8) for i in range(3)]
    batch = stacked(images)
    assert batch.shape == (3, 3, 4, 5)
    assert all(torch.equal(x["image"], i) for x, i in zip(unstacked(batch), images, strict=True))
    planes = [image[:1].expand(3, -1, -1) for image in images]
    batch = stacked(planes)
    assert batch.shape == (3, 1, 4, 5)
    for x, plane in zip(unstacked(batch), planes, strict=True):
        assert torch.equal(x["image"], plane)
        assert x["image"].stride(0) == 0
    assert stacked([images[0], planes[1]]).shape == (2, 3, 4, 5)
    assert stacked([images[0], images[1][:, :3]]) is None


def test_a_class_that_overrides_the_plain_method_alone_is_not_replayed():
    class Base:
        def plain(self) -> None: ...
        def replayed(self) -> None: ...

    class Another(Base):
        def plain(self) -> None: ...

    class Both(Another):
        def plain(self) -> None: ...
        def replayed(self) -> None: ...

    class Faster(Another):
        def replayed(self) -> None: ...

    patched = Base()
    patched.plain = lambda: None
    owners = [Base(), Another(), Both(), Faster(), patched, object()]
    assert [defines_together(x, "replayed", "plain") for x in owners] == [
        True, False, True, True, False, False,
    ]  # fmt: skip
