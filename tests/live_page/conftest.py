"""A player of the tiny model whose frames come when a test says so."""

from __future__ import annotations

import copy
import queue
import threading
from collections.abc import Iterator

import pytest
from detectron2.config import CfgNode

from ttt_video.config.loading import merge_method
from ttt_video.data import BaseSource
from ttt_video.live import Player, Shown
from ttt_video.structures import Frame


class Tap(BaseSource):
    """A live video of the frames that a test lets through."""

    live = True

    def __init__(self, frames: list[Frame]) -> None:
        self.video_id, self.frames = frames[0]["video_id"], iter(frames)
        self._let: queue.Queue[Frame | Exception | None] = queue.Queue()

    def let(self, item: Exception | None) -> None:
        self._let.put(item)

    def next(self, frame: Frame | None = None) -> None:
        self._let.put(frame or next(self.frames))

    def __iter__(self) -> Iterator[Frame]:
        while (item := self._let.get()) is not None:
            if isinstance(item, Exception):
                raise item
            yield item


class Studio:
    """A player, what it has shown, and the tap of its frames."""

    def __init__(self, cfg, model, frames, folder) -> None:
        def config(method: str | None) -> CfgNode:
            own = copy.deepcopy(cfg)
            if method is not None:
                merge_method(own, method)
            return own

        self.tap, self.cfg, self.model, self.folder = Tap(frames), cfg, model, folder
        self.player = Player(config, model, [self.tap], folder)
        self.shown: list[Shown] = []
        self._come = threading.Condition()
        self.player.listen(self._take, lambda: None)

    def _take(self, shown: Shown) -> None:
        with self._come:
            self.shown.append(shown)
            self._come.notify_all()

    def next(self, count: int = 1, frame: Frame | None = None) -> dict:
        """Lets frames through; returns the numbers of the last, once they are shown."""
        wanted = len(self.shown) + count
        for _ in range(count):
            self.tap.next(frame)
        with self._come:
            assert self._come.wait_for(lambda: len(self.shown) >= wanted, timeout=60)
        return self.shown[wanted - 1].numbers

    def moved(self) -> list[str]:
        """Names of the weights that are not the source's."""
        return [*self.player.stream.state_dict()["adapter"].get("tensors", {})]


@pytest.fixture
def studio(tiny_cfg, tiny_model, make_video, tmp_path) -> Iterator[Studio]:
    tiny_cfg.merge_from_list(["TTT.BATCH_SIZE", 1, "TTT.MICRO_BATCH_SIZE", 1])
    made = Studio(tiny_cfg, tiny_model, make_video("a", 60, 64, 64), tmp_path / "out")
    yield made
    made.tap.let(None)
    made.player.stop()
