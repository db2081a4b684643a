"""The folder of a run: a row per frame as it happens, safe from kills and other processes."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from ..config import read_yaml
from ..data.fingerprint import Fingerprint, difference
from ..errors import UserError
from ..files import (
    FolderLock,
    file_stem,
    make_folder,
    read_json_object,
    remove_leftovers,
    write_atomically,
    writing,
)
from .frame_ranges import FrameRanges

Row = dict[str, Any]

_FRAME = {"video_id": str, "frame_index": int}
_VIDEO = {"video_id": str, "complete": bool, "frames": int, "skipped_frames": list}


class RunDirectory:
    """The folder of one run.

    It holds ``config.yaml`` (the resolved config), ``run.json`` (other settings of all rows),
    ``sources.json`` (fingerprints of the videos' files), ``frames.jsonl`` (a row per frame),
    ``videos.jsonl`` (a row whenever a video ends, is interrupted or, live, goes on),
    ``summary.json`` and ``unfinished/VIDEO/`` (the state of an interrupted video).

    A row is one write to the end of its file, so that several processes may append to it; pickling
    the object hands it to another process. Nothing that was written is deleted. A run that was cut
    off goes on with ``resume``: its frames are known and not written again.
    """

    _lock: FolderLock | None = None

    def __init__(self, path: str | os.PathLike[str], *, resume: bool = False) -> None:
        """Creates the folder, or reopens it.

        Raises:
            UserError: it holds a run and ``resume`` is not set, another process is writing to it,
                or it cannot be made.
        """
        self.path = Path(path)
        self.frames_file = self.path / "frames.jsonl"
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"--output {self.path} is a file; give a folder")
        # A run that failed before its first frame may be replaced.
        if self.frames_file.exists() and self.frames_file.stat().st_size and not resume:
            raise UserError(
                f"{self.path} already holds a run; add --resume to go on with it, or choose "
                "another --output (to replace it, delete the folder yourself)"
            )
        make_folder(self.path)
        self._recorded: dict[str, FrameRanges] = {}  # the frames whose rows are on disk
        self._open(shared=False)
        for folder in (self.path, *self.path.glob("unfinished/*")):
            remove_leftovers(folder)
        self._read_back()
        assert self._lock is not None
        self._lock.share()  # with processes that get a copy of this object

    def _open(self, *, shared: bool) -> None:
        message = (
            f"another process is writing to the run in {self.path}: wait for it, or choose "
            "another --output"
        )
        self._lock = FolderLock(self.path, message, shared=shared)

    def _read_back(self) -> None:
        """Learns which rows there are; drops torn ones, which kills leave behind."""

        def copy_whole_rows(part: Path) -> None:
            with self.frames_file.open("rb") as old, part.open("wb") as new:
                new.writelines(line for line in old if _parse(line) is not None)

        with writing(self.frames_file):
            self.frames_file.touch()
        torn = False
        for row in _read_lines(self.frames_file, _FRAME):
            if row is None:
                torn = True
            else:
                self._note(row)
        if torn:
            write_atomically(self.frames_file, copy_whole_rows, durable=True)

    def __getstate__(self) -> Row:
        return {key: value for key, value in self.__dict__.items() if key != "_lock"}

    def __setstate__(self, state: Row) -> None:
        self.__dict__.update(state)
        self._open(shared=True)

    def rows(self) -> Iterator[Row]:
        """Yields the rows so far, in the order in which they were written."""
        return read_rows(self.frames_file)

    def _note(self, row: Row) -> None:
        self._recorded.setdefault(row["video_id"], FrameRanges()).add(row["frame_index"])

    def has(self, video_id: str, frame_index: int) -> bool:
        """Returns whether a frame's row is on disk."""
        return frame_index in self.recorded(video_id)

    def recorded(self, video_id: str) -> FrameRanges:
        """Returns the indices of the video's frames whose rows are on disk."""
        return self._recorded.get(video_id, FrameRanges())

    def append(self, row: Row) -> None:
        """Writes one row, which survives the process from here on."""
        self._append(self.frames_file, row)
        self._note(row)

    def _append(self, file: Path, row: Row) -> None:
        data = (json.dumps(row, allow_nan=False) + "\n").encode()
        self._check_folder()
        with writing(file):
            descriptor = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
            try:
                if os.write(descriptor, data) < len(data):
                    raise UserError(f"{file} took only a part of a row: is the disk full?")
            finally:
                os.close(descriptor)

    def _check_folder(self) -> None:
        if self._lock is not None:
            self._lock.check()

    def end_video(
        self,
        video_id: str,
        *,
        frames: int,
        total: int | None,
        skipped: list[str],
        complete: bool,
        gap: Row | None = None,
    ) -> None:
        """Records that a video ended, or was interrupted, or that a live one goes on.

        Args:
            video_id: the video.
            frames: number of frames that were run, over all attempts.
            total: number that was to be run; None if unknown.
            skipped: files of unreadable frames.
            complete: whether the video came to its end.
            gap: with which a live source goes on: ``after_frame`` and ``weights_of_frame``.
        """
        row = {"video_id": video_id, "complete": complete, "frames": frames, "total": total}
        row = {**row, "skipped_frames": skipped, **({} if gap is None else {"gap": gap})}
        self._append(self.path / "videos.jsonl", row)

    def videos(self) -> dict[str, Row]:
        """Returns the last row of each video in ``videos.jsonl``."""
        rows = _read_lines(self.path / "videos.jsonl", _VIDEO)
        return {row["video_id"]: row for row in rows if row is not None}

    def gaps(self) -> list[Row]:
        """Returns where live sources went on: ``video_id`` and what :meth:`end_video` was told."""
        rows = _read_lines(self.path / "videos.jsonl", _VIDEO)
        return [
            {"video_id": row["video_id"], **row["gap"]}
            for row in rows
            if row is not None and "gap" in row
        ]

    def is_complete(self, video_id: str, total: int | None) -> bool:
        """Returns whether the video was run to its end, or to the ``total`` that is wanted now."""
        row = self.videos().get(video_id)
        if row is None or not row["complete"]:
            return False
        if len(self.recorded(video_id)) < row["frames"]:  # rows were lost or damaged since
            return False
        return row["total"] is None or (total is not None and total <= row["total"])

    def unfinished(self, video_id: str) -> Path:
        """Returns the folder of an unfinished video's state; it may not exist."""
        return self.path / "unfinished" / file_stem(video_id)

    def state_file(self, video_id: str) -> Path:
        """Returns the file of an unfinished video's state; it may not exist."""
        return self.unfinished(video_id) / "state.pth"

    def remove_unfinished(self, *video_ids: str) -> None:
        """Removes the states of those of the videos that are complete."""
        videos = self.videos()
        for video_id in video_ids:
            if videos.get(video_id, {}).get("complete"):
                shutil.rmtree(self.unfinished(video_id), ignore_errors=True)
        with suppress(OSError):  # other videos are unfinished
            (self.path / "unfinished").rmdir()

    def write_text(self, name: str, text: str) -> None:
        """Writes a whole file at once, so that readers see the old one or the new one."""
        self._check_folder()
        write_atomically(
            self.path / name, lambda part: part.write_text(text, encoding="utf-8"), durable=True
        )

    def write_json(self, name: str, value: Row) -> None:
        """Writes indented JSON as :meth:`write_text` does."""
        self.write_text(name, json.dumps(value, indent=2, allow_nan=False) + "\n")

    def claim(
        self,
        config: str,
        facts: Row,
        sources: Mapping[str, Fingerprint | None] | None = None,
    ) -> None:
        """Writes ``config.yaml``, ``run.json`` and ``sources.json``, which hold for every row.

        Args:
            config: resolved, as YAML.
            facts: further settings by the name that a user knows.
            sources: fingerprint of each video's files, None for a video without files; without
                the argument videos are not compared.

        Raises:
            UserError: there are rows of other settings or videos, which must not be mixed with new
                ones; or one of the files is damaged.
        """
        if self._recorded:
            self._compare("config", "config.yaml", yaml.safe_load(config))
            self._compare("setting", "run.json", facts)
            if sources is not None:
                self._compare_sources(sources)
        self.write_text("config.yaml", config)
        self.write_json("run.json", facts)
        if sources is not None:
            rows = ",\n".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in sources.items())
            self.write_text("sources.json", f"{{\n{rows}\n}}\n")

    def _compare(self, what: str, name: str, now: Row) -> None:
        before = self._read(name)
        if before is None:
            return
        values = differences(before, now)
        if values:
            raise UserError(
                f"the run in {self.path} has another {what} ({values}); resume it with the same, "
                "or choose another --output"
            )

    def _compare_sources(self, now: Mapping[str, Fingerprint | None]) -> None:
        before = self._read("sources.json") or {}
        for video_id, recorded in self._recorded.items():
            if video_id not in now:
                raise UserError(
                    f"the run in {self.path} has frames of video {video_id!r}, which is not among "
                    f"the videos given now; resume it with the same, or choose another --output"
                )
            old, new = before.get(video_id), now[video_id]
            if not old or not new:  # a camera, or a run of an earlier version
                continue
            try:
                differs = difference(old, new, max(stop for _, stop in recorded.ranges()) - 1)
            except (TypeError, ValueError, IndexError) as error:
                raise self._damaged("sources.json") from error
            if differs is not None:
                raise UserError(
                    f"the run in {self.path} is of another video {video_id!r} ({differs}); resume "
                    "it with the same files, or choose another --output"
                )

    def _read(self, name: str) -> Row | None:
        """Reads a file of keys and values; None if it does not exist."""
        file = self.path / name
        if not file.exists():
            return None
        try:
            if file.suffix == ".json":
                return read_json_object(file)
            content = read_yaml(file)
        except (UserError, OSError, ValueError, yaml.YAMLError) as error:
            raise self._damaged(name) from error
        if not isinstance(content, dict):
            raise self._damaged(name)
        return content

    def _damaged(self, name: str) -> UserError:
        return UserError(
            f"{self.path / name} is damaged, so it is not known what the run's rows are of: "
            "restore it, or choose another --output"
        )

    def close(self) -> None:
        """Releases the folder to other processes."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None


def differences(old: Row, new: Row) -> str:
    """Returns "KEY: old value, now new value" of all nested keys that differ, or ""."""
    old, new = flatten(old), flatten(new)
    differing = sorted(k for k in old.keys() | new.keys() if old.get(k) != new.get(k))
    return ", ".join(f"{k}: {old.get(k)!r}, now {new.get(k)!r}" for k in differing)


def _parse(line: bytes) -> Any:
    """Returns the content of a line of JSON; None for a broken line."""
    try:
        return json.loads(line) if line.endswith(b"\n") else None
    except ValueError:
        return None


def read_rows(file: Path) -> Iterator[Row]:
    """Returns the whole rows of frames in a file, to which another process may be appending.

    Raises:
        UserError: a line is JSON but no such row.
    """
    return (row for row in _read_lines(file, _FRAME) if row is not None)


def _read_lines(file: Path, kinds: Mapping[str, type]) -> Iterator[Row | None]:
    """Yields rows with these keys; None for a torn line.

    Raises:
        UserError: a line is JSON but has no such keys, which no kill leaves behind.
    """
    if not file.exists():
        return
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            row = _parse(line)
            if row is not None and not (isinstance(row, dict) and _has(row, kinds)):
                raise UserError(
                    f"{file} has in line {number} something else than a row: restore the file, "
                    "remove the line, or choose another --output"
                )
            yield row


def _has(row: Row, kinds: Mapping[str, type]) -> bool:
    index = row.get("frame_index", 0)
    return all(type(row.get(key)) is kind for key, kind in kinds.items()) and (
        not isinstance(index, int) or -(2**63) <= index < 2**63 - 1
    )


def flatten(config: Row, prefix: str = "") -> Row:
    """Turns {"A": {"B": 1}} into {"A.B": 1}."""
    flat: Row = {}
    for key, value in config.items():
        nested = isinstance(value, dict)
        flat.update(flatten(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value})
    return flat
