"""Replayed CUDA graphs: work of a fixed shape is recorded once and then launched as a whole.

A host issues some thousand kernels for a prediction, which takes it longer than a fast GPU needs
to run them. A graph is issued by one call. It always reads and writes the same memory, so inputs
are copied into static buffers first, and everything that it reads must stay where it was.
"""

from __future__ import annotations

import gc
import logging
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from .kernels import kernels_choice
from .tables import caches

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

MOST_GRAPHS = 8
"""Signatures whose graphs are kept: a few sizes of images, and the parts of an uneven batch."""

MOST_SEEN = 64
"""Signatures that are remembered without a graph, because they were seen once."""

MOST_DROPPED = 16
"""Graphs that may be dropped for others before no more are recorded: recording takes a second."""

NOTICED = 32
"""Calls in a row without a replay after which the log says so."""


class Capture(Protocol):
    """Records work on a device. :class:`CudaCapture` is the real one; tests have another."""

    def warm_up(self, work: Callable[[], Result]) -> Result:
        """Runs work as it will be recorded, without recording it, and returns its result."""

    def record(self, work: Callable[[], Result]) -> tuple[Result, Callable[[], None]]:
        """Records work without running it.

        Returns:
            Its result, whose tensors have no values yet, and a function that runs the work and so
            fills them.
        """


class _CudaGraph:
    """Holds a graph, so that one sees when it is dropped."""

    def __init__(self) -> None:
        self.graph = torch.cuda.CUDAGraph()

    def replay(self) -> None:
        self.graph.replay()


class CudaCapture:
    """Records CUDA graphs, which share one pool of memory: no two of them run at once.

    Only the calling thread is restricted while a graph is recorded, so that threads that decode
    or write files go on.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()
        self._alive: weakref.WeakSet[_CudaGraph] = weakref.WeakSet()

    def warm_up(self, work: Callable[[], Result]) -> Result:
        """Runs work on the stream of the recordings, whose libraries then have their workspaces."""
        current = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(current)
        try:
            with torch.cuda.stream(self._stream):
                return work()
        finally:  # what is left of work that failed may still write
            current.wait_stream(self._stream)

    def record(self, work: Callable[[], Result]) -> tuple[Result, Callable[[], None]]:
        """See :meth:`Capture.record`; waits for the device."""
        if not self._alive:  # torch frees a pool without graphs, which then takes no more
            self._pool = torch.cuda.graph_pool_handle()
        recorded, current = _CudaGraph(), torch.cuda.current_stream(self.device)
        try:
            with (
                without_garbage_collection(),
                torch.cuda.graph(
                    recorded.graph,
                    pool=self._pool,
                    stream=self._stream,
                    capture_error_mode="thread_local",
                ),
            ):
                result = work()
        except BaseException:
            # Where the end of a broken recording raises, torch tidies up neither.
            torch.cuda.set_stream(current)
            self._renew_generator()
            raise
        self._alive.add(recorded)
        return result, recorded.replay

    def _renew_generator(self) -> None:
        """Lets layers draw again: the device's generator may be marked as one that is recorded.

        Graphs know a generator by its state, so the state is kept where there are some.
        """
        if not self._alive:
            index = torch.cuda.current_device() if self.device.index is None else self.device.index
            generator = torch.cuda.default_generators[index]
            generator.graphsafe_set_state(generator.clone_state())


@contextmanager
def without_garbage_collection() -> Iterator[None]:
    """Collects garbage first, and none in the block: a graph that is freed breaks a recording."""
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def capture_for(device: torch.device) -> Capture | None:
    """Returns what records work on a device; None where nothing can."""
    if device.type != "cuda" or torch.version.hip is not None:
        return None
    return CudaCapture(device)


@dataclass
class _Recorded(Generic[Result]):
    """A graph with its memory.

    Attributes:
        buffers: its inputs.
        result: of the recorded call; a replay fills its tensors.
        replay: runs it.
        kept: other tensors that it reads, which may not be freed before it is.
    """

    buffers: list[Tensor]
    result: Result
    replay: Callable[[], None]
    kept: list[Any]


class GraphRunner(Generic[Result]):
    """Calls a function of tensors, by a graph where it was called with the same shapes before.

    The first call of a signature (shapes and dtypes of the inputs, and the caller's key) runs the
    function, which fills caches and tunes kernels. The second one records it. From then on, inputs
    are copied into the graph's buffers and the graph is replayed. So a function that also writes
    does so once per call, and a size that comes once costs nothing more.

    **The tensors of a replayed result are overwritten by the next call of any runner with the same
    capture**: a caller copies what it keeps.

    A function that cannot be recorded, for example because it waits for the device, runs as it is
    from then on; the log says once why. Where the memory does not hold a graph, calls of this
    signature alone run as they are: a smaller one may fit.

    Attributes:
        failure: why the function, or some signature of it, runs as it is; "" if none does.
    """

    def __init__(
        self,
        function: Callable[..., Result],
        capture: Capture,
        *,
        name: str,
        weights: Iterable[Tensor] = (),
    ) -> None:
        """
        Args:
            function: takes tensors. It must not change them, nor depend on anything that changes
                between calls but the inputs and the values of tensors that stay in their place.
            capture: records it.
            name: of the function, for the log.
            weights: that the function reads. If one of them moves to other memory, all graphs are
                dropped.
        """
        self.function = function
        self.capture = capture
        self.name = name
        self._weights = [*weights]
        self._places = [weight.data_ptr() for weight in self._weights]
        self._graphs: OrderedDict[Hashable, _Recorded[Result]] = OrderedDict()
        self._seen: OrderedDict[Hashable, None] = OrderedDict()
        self._too_large: set[Hashable] = set()
        self._dropped = self._missed = 0
        self._recordable = True
        self.failure = ""

    def __call__(self, *inputs: Tensor, key: Hashable = ()) -> Result:
        """Returns the function's result for these inputs, which may be on the CPU.

        ``key`` is all else that the function depends on, such as the precision.
        """
        signature = (key, *((tuple(x.shape), x.dtype) for x in inputs))
        self._drop_if_moved()
        recorded = self._graphs.get(signature)
        if recorded is not None:
            self._missed = 0
            self._graphs.move_to_end(signature)
        elif self._shall_record(signature):
            recorded = self._record(signature, inputs)
        if recorded is None and not self._recordable:
            return self.function(*inputs)
        if recorded is None:
            result = self.capture.warm_up(lambda: self.function(*inputs))
            self._remember(signature)  # not if it failed: it must have run once
            return result
        for buffer, value in zip(recorded.buffers, inputs, strict=True):
            buffer.copy_(value, non_blocking=True)
        recorded.replay()
        return recorded.result

    def clear(self) -> bool:
        """Drops all graphs, and returns whether there were any.

        Their memory is free once every runner of a capture did so.
        """
        had_graphs = bool(self._graphs)
        self._graphs.clear()
        self._seen.clear()
        self._too_large.clear()
        return had_graphs

    def _drop_if_moved(self) -> None:
        """Drops graphs that read where a weight was; a tenth of a millisecond for 1,000 weights."""
        places = [weight.data_ptr() for weight in self._weights]
        if places != self._places:
            self._places = places
            self.clear()

    def _shall_record(self, signature: Hashable) -> bool:
        if not self._recordable or signature in self._too_large:
            return False
        self._missed += 1
        if self._missed == NOTICED:
            logger.warning(
                "no CUDA graph of the %s was used in its last %d calls, because the sizes of its "
                "inputs change: it runs without them",
                self.name,
                NOTICED,
            )
        known = signature in self._seen
        return known and (len(self._graphs) < MOST_GRAPHS or self._dropped < MOST_DROPPED)

    def _remember(self, signature: Hashable) -> None:
        self._seen[signature] = None
        if len(self._seen) > MOST_SEEN:
            self._seen.popitem(last=False)

    def _record(self, signature: Hashable, inputs: Sequence[Tensor]) -> _Recorded[Result] | None:
        if len(self._graphs) == MOST_GRAPHS:
            self._graphs.popitem(last=False)
            self._dropped += 1
        device = self._weights[0].device if self._weights else inputs[0].device
        with torch.inference_mode(mode=False):
            buffers = [
                torch.empty(x.shape, dtype=x.dtype, device=device).copy_(x, non_blocking=True)
                for x in inputs
            ]
        try:
            result, replay = self.capture.record(lambda: self.function(*buffers))
        except RuntimeError as error:
            cause = error.__context__ or error  # the end of a broken recording raises, too
            if not isinstance(cause, Exception):  # Ctrl-C
                raise cause from None
            self._give_up(signature, cause)
            return None
        recorded = _Recorded(buffers, result, replay, cached_tensors())
        self._graphs[signature] = recorded
        return recorded

    def _give_up(self, signature: Hashable, cause: Exception) -> None:
        """Has a signature run as it is, or all of them; says so once for each."""
        self.failure = str(cause).splitlines()[0] if str(cause) else type(cause).__name__
        if isinstance(cause, torch.cuda.OutOfMemoryError) and len(self._too_large) < MOST_GRAPHS:
            self._too_large.add(signature)
            what = "for inputs of one size, because the memory does not hold its graph"
        else:
            self._recordable = False
            what = "because it cannot be recorded"
        logger.warning("the %s runs without CUDA graphs, %s: %s", self.name, what, self.failure)


def autocast_in_graphs(device_type: str) -> AbstractContextManager[Any]:
    """Returns the autocast that is on already, but without its cache where it outlives the work.

    A graph would go on reading casts from before it, and so of older weights.
    """
    if not torch.is_autocast_enabled(device_type):
        return nullcontext()
    dtype = torch.get_autocast_dtype(device_type)
    return torch.autocast(device_type, dtype, cache_enabled=False)


def surroundings(device_type: str) -> Hashable:
    """Returns what work on a device depends on besides its inputs: autocast and kernels."""
    enabled = torch.is_autocast_enabled(device_type)
    return enabled and torch.get_autocast_dtype(device_type), kernels_choice()


def cached_tensors() -> list[Any]:
    """Returns what the package's ``lru_cache`` hold, such as tables for a size of feature maps.

    A graph reads them where they are, but a replay does not count as use of a cache, which may
    drop them while the graph lives.
    """
    return [gc.get_referents(cache) for cache in caches()]


def stacked(images: Sequence[Tensor]) -> Tensor | None:
    """Returns uint8 images of one size as one tensor, (B, 3, H, W); None if their sizes differ.

    Images that are one plane, seen three times, become (B, 1, H, W): :func:`unstacked` makes such
    images of them again.
    """
    if len({image.shape for image in images}) != 1:
        return None
    if all(image.stride(0) == 0 for image in images):
        images = [image[:1] for image in images]
    return torch.stack([*images])


def unstacked(images: Tensor) -> list[dict[str, Tensor]]:
    """Returns the inputs of a model for images of :func:`stacked`."""
    return [{"image": image.expand(3, -1, -1)} for image in images]


def defines_together(owner: object, replayed: str, plain: str) -> bool:
    """Says whether ``replayed`` still does what ``plain`` does, after subclasses and patches.

    A class that overrides the plain method alone means another function.
    """

    def definer(name: str) -> type | None:
        return next((kind for kind in type(owner).__mro__ if name in vars(kind)), None)

    if plain in getattr(owner, "__dict__", {}):  # set on the object itself
        return False
    first, second = definer(replayed), definer(plain)
    return first is not None and (second is None or issubclass(first, second))
