"""What a run is of, and the two ends of every run: its folder is claimed, its summary written."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass

from detectron2.config import CfgNode

from ..config.named_files import file_digests
from ..errors import UserError, ending_with
from ..structures import FrameSource
from .directory import Row, RunDirectory
from .gaps import check_states
from .on_time import on_machine_time
from .overlay import OverlayVideos
from .sinks import Sink
from .summary import write_summary

logger = logging.getLogger(__name__)

_ROW_KEYS = ("file_name", "adapt_seconds", "predict_seconds", "metrics", "records")


@dataclass
class Settings:
    """What is run, and where the results go.

    Attributes:
        cfg: resolved; its ``TTT`` keys decide the method.
        run: the folder of rows and summary.
        dataset_name: of the videos, which says what is scored; "" for others.
        compare: also predict every frame with the frozen model.
        sinks: take all results once their rows are on disk, in this order.
        save_every: frames from one saved state of a video to the next, from which an interrupted
            run goes on; 0 saves none: interrupted videos start anew, and live sources cannot go on.
        max_frames: of each video; None for all.
        register: files that a worker runs first.
        behind: whether sinks work in a thread behind the loop, with the same results; None: where
            the model is on a GPU. On a CPU they would take the model's cores. They never do with a
            frame budget or rate, because the loop pays for them, with a model of colours, whose
            scores ask networks, or with a sink that is not :attr:`Sink.behind`.
    """

    cfg: CfgNode
    run: RunDirectory
    dataset_name: str = ""
    compare: bool = False
    sinks: Sequence[Sink] = ()
    save_every: int = 0
    max_frames: int | None = None
    register: Sequence[str] = ()
    behind: bool | None = None


@contextmanager
def recorded(
    settings: Settings,
    sources: Sequence[FrameSource],
    source_facts: Row,
    process_facts: Callable[[], Row],
    *,
    offline: bool,
) -> Iterator[Row]:
    """Claims the run's folder for the block, and writes its summary after it, come what may.

    Args:
        settings: of the run.
        sources: its videos.
        source_facts: of :func:`~ttt_video.stream.summary.source_facts`.
        process_facts: asked at the end for what
            :func:`~ttt_video.stream.summary.process_facts` says.
        offline: whether the method is.

    Yields:
        The summary, which is empty until the block has ended.

    Raises:
        UserError: the folder holds rows of another config, other weights, other flags or other
            videos.
    """
    run, video_ids = settings.run, [source.video_id for source in sources]
    summary: Row = {}
    complete = False

    def summarize() -> None:
        summary.update(
            write_summary(
                run,
                settings.cfg,
                video_ids,
                dataset_name=settings.dataset_name,
                complete=complete,
                **source_facts,
                **process_facts(),
            )
        )

    with closing(run):
        _claim(settings, sources, source_facts["weights_sha256"], offline=offline)
        with ending_with(summarize):
            yield summary
            run.remove_unfinished(*video_ids)
            complete = True


def _claim(
    settings: Settings, sources: Sequence[FrameSource], weights: str, *, offline: bool
) -> None:
    """Makes sure that all rows of the folder are of one config, model, set of flags and videos.

    Raises:
        UserError: there are rows of others, or that lack what a row has; or there are any of a file
            with a frame budget, or of a live source of which no state is there; or a source lacks
            what one has.
    """
    run, cfg = settings.run, settings.cfg
    for source in sources:
        if not isinstance(source, FrameSource):
            raise UserError(
                f"{type(source).__name__} lacks members of a FrameSource: let it inherit from "
                "ttt_video.data.BaseSource, which has defaults"
            )
    for row in run.rows():
        lacking = [key for key in _ROW_KEYS if key not in row]
        if lacking:
            raise UserError(
                f"{run.frames_file} has a row without {', '.join(lacking)} (video "
                f"{row['video_id']}, frame {row['frame_index']}): remove it or restore the file"
            )
    most = settings.max_frames
    for name in (source.video_id for source in sources):
        if most is not None and (done := len(run.recorded(name))) > most:
            logger.warning(
                "video %s has %d frames already, more than --max-frames %d: they stay",
                name,
                done,
                most,
            )
    live = next((source.video_id for source in sources if source.live), None)
    check_states(run, sources, settings.max_frames)
    files = [source.video_id for source in sources if not source.live]
    if (key := on_machine_time(cfg)) and any(run.recorded(video_id) for video_id in files):
        raise UserError(
            f"the run in {run.path} cannot go on: with {key} the frames that are run again would "
            "get other updates than their rows say; choose another --output, or simulate the time "
            "(--clock)"
        )
    if live is not None and cfg.TTT.CLOCK.FPS:
        raise UserError(
            f"TTT.CLOCK.FPS is {cfg.TTT.CLOCK.FPS:g}, and {live} gives its frames at a rate of its "
            "own: set it to 0"
        )
    video = any(isinstance(sink, OverlayVideos) for sink in settings.sinks)
    flags: Row = {
        "--dataset": settings.dataset_name,
        "--compare": settings.compare,
        "--no-video": not video,
    }
    for sink in settings.sinks:
        flags.update(sink.flags)
    # Elsewhere a longer run goes on from a shorter one; here the frames that are there depend on
    # how many were to come, or on how many the videos before them had.
    if offline or cfg.TTT.FRAME_ORDER != "time" or cfg.TTT.RESET == "never":
        flags["--max-frames"] = settings.max_frames
    if cfg.TTT.RESET == "never":
        flags["videos"] = [source.video_id for source in sources]
    run.claim(
        cfg.dump(),
        {"weights_sha256": weights, **file_digests(cfg), **flags},
        {source.video_id: source.fingerprint() for source in sources},
    )
