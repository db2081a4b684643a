"""Goes on with a live source that was cut off, although its frames do not come a second time."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from itertools import chain

from ..data.ordering import FirstFrames
from ..errors import UserError
from ..structures import Frame, FrameSource
from .directory import Row, RunDirectory
from .sinks import VideoRun

logger = logging.getLogger(__name__)


def check_states(run: RunDirectory, sources: Sequence[FrameSource], max_frames: int | None) -> None:
    """Refuses live sources that have rows and no state from which they could go on.

    Those that are complete, up to ``max_frames``, need none.

    Raises:
        UserError: there is one, which is not complete.
    """
    for source in sources:
        name = source.video_id
        ended = run.is_complete(name, FirstFrames(source, max_frames).num_frames)
        if source.live and run.recorded(name) and not (ended or run.state_file(name).exists()):
            raise UserError(
                f"the run in {run.path} cannot go on: no state of {name} is there (was it "
                "--save-every 0, or had it ended?), and its frames do not come again; choose "
                "another --output"
            )


def last_frame(run: RunDirectory, video_id: str) -> int:
    """Returns the largest index of a frame with a row; -1 without rows."""
    ranges = run.recorded(video_id).ranges()
    return ranges[-1][1] - 1 if ranges else -1


def size_of(frame: Frame) -> tuple[int, ...]:
    """Returns height and width of a frame's picture and of what the network sees of it.

    The network may see pictures of two sizes with one size, but their masks have two.
    """
    return (frame["height"], frame["width"], *frame["image"].shape[1:])


def _shown(size: Sequence[int]) -> str:
    height, width, *seen = size
    return f"{height}x{width} pixels ({seen[0]}x{seen[1]} for the network)"


def after_gap(
    frames: Iterator[Frame], run: RunDirectory, video: VideoRun, state: Row
) -> Iterator[Frame]:
    """Hands on the frames of a live source that goes on; says and records what is missing.

    Args:
        frames: those that come now.
        run: gets a row with the gap, once the first of them has come.
        video: whose rows are on disk.
        state: that was saved of it.

    Raises:
        UserError: the frames have another size than those before.
    """
    first = next(frames, None)
    if first is None:
        return
    size, now = state.get("size"), size_of(first)  # a state of an earlier version has none
    if size is not None and tuple(size) != now:
        raise UserError(
            f"{video.video_id} gives frames of {_shown(now)}, and those before had {_shown(size)}: "
            "set its old size, or choose another --output"
        )
    after, weights = last_frame(run, video.video_id), state["frame_index"]
    logger.warning(
        "%s goes on with frame %d and %s: what it sent in between is lost",
        video.video_id,
        first["frame_index"],
        f"the weights of frame {weights}" if weights >= 0 else "the source weights",
    )
    gap = {"after_frame": after, "weights_of_frame": weights}
    run.end_video(
        video.video_id,
        frames=video.done,
        total=video.source.num_frames,
        skipped=video.skipped,
        complete=False,
        gap=gap,
    )
    yield from chain([{**first, "after_gap": True}], frames)
