"""A run on disk: one row per frame as it happens, safe from kills and from other processes."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from ..errors import UserError
from ..files import file_stem, write_atomically

Row = dict[str, Any]


class RunDirectory:
    """The folder of one run.

    ``config.yaml`` (the resolved config), ``run.json`` (what else every row depends on),
    ``frames.jsonl`` (a row per frame), ``videos.jsonl`` (a row whenever a video ends or is
    interrupted), ``summary.json``, ``unfinished/VIDEO/`` (what an interrupted video goes on from).

    A row is one write to the end of its file, so that several processes may append to it: pickling
    the object hands it to another process. Nothing that was written is deleted. A run that was cut
    off goes on with ``resume``: its frames are known and not written again.
    """

    _lock = -1

    def __init__(self, path: str | os.PathLike[str], *, resume: bool = False) -> None:
        """Creates the folder, or reopens it.

        Raises:
            UserError: it holds a run and ``resume`` is not set, another process is writing to it,
                or it cannot be a folder.
        """
        self.path = Path(path)
        self.frames_file = self.path / "frames.jsonl"
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"--output {self.path} is a file; give a folder")
        # A run that failed before its first frame is in nobody's way.
        if self.frames_file.exists() and self.frames_file.stat().st_size and not resume:
            raise UserError(
                f"{self.path} already holds a run; add --resume to go on with it, or choose "
                "another --output (to replace it, delete the folder yourself)"
            )
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--output {self.path} cannot be made: {error.strerror}") from error
        self._recorded: dict[str, bytearray] = {}  # a byte per frame: 1 where its row is on disk
        self._open(fcntl.LOCK_EX)
        self._read_back()
        fcntl.flock(self._lock, fcntl.LOCK_SH)  # from here on, processes it is handed to may join

    def _open(self, lock: int) -> None:
        self._lock = lock_folder(self.path, lock, "--output")

    def _read_back(self) -> None:
        """Learns which rows there are; drops torn ones, which kills leave behind."""
        self.frames_file.touch()
        torn = False
        for row in _read_lines(self.frames_file):
            if row is None:
                torn = True
            else:
                self._note(row)
        if torn:

            def copy_whole_rows(part: Path) -> None:
                with self.frames_file.open("rb") as old, part.open("wb") as new:
                    new.writelines(line for line in old if _parse(line) is not None)

            write_atomically(self.frames_file, copy_whole_rows)

    def __getstate__(self) -> Row:
        return {key: value for key, value in self.__dict__.items() if key != "_lock"}

    def __setstate__(self, state: Row) -> None:
        self.__dict__.update(state)
        self._open(fcntl.LOCK_SH)

    def rows(self) -> Iterator[Row]:
        """The rows so far, in the order in which they were written."""
        return read_rows(self.frames_file)

    def _note(self, row: Row) -> None:
        seen, index = self._recorded.setdefault(row["video_id"], bytearray()), row["frame_index"]
        if index >= len(seen):
            seen.extend(bytes(index + 1 - len(seen)))
        seen[index] = 1

    def has(self, video_id: str, frame_index: int) -> bool:
        """Whether a frame's row is on disk."""
        seen = self._recorded.get(video_id, b"")
        return frame_index < len(seen) and bool(seen[frame_index])

    def recorded(self, video_id: str) -> list[int]:
        """Indices of the video's frames whose rows are on disk."""
        return [index for index, there in enumerate(self._recorded.get(video_id, b"")) if there]

    def append(self, row: Row) -> None:
        """Writes one row; it survives the process from here on."""
        self._append(self.frames_file, row)
        self._note(row)

    def _append(self, file: Path, row: Row) -> None:
        data = (json.dumps(row, allow_nan=False) + "\n").encode()
        descriptor = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            if os.write(descriptor, data) < len(data):
                raise UserError(f"{file} took only a part of a row: is the disk full?")
        except OSError as error:
            raise UserError(f"{file} cannot be written: {error.strerror}") from error
        finally:
            os.close(descriptor)

    def end_video(
        self, video_id: str, *, frames: int, total: int | None, skipped: list[str], complete: bool
    ) -> None:
        """Records that a video ended, or was interrupted, after ``frames`` of ``total`` frames.

        Args:
            video_id: the video.
            frames: number of its frames that were run, over all attempts.
            total: number that was to be run; None for an unknown number.
            skipped: files of its unreadable frames.
            complete: whether it came to its end.
        """
        row = {"video_id": video_id, "complete": complete, "frames": frames, "total": total}
        self._append(self.path / "videos.jsonl", {**row, "skipped_frames": skipped})

    def videos(self) -> dict[str, Row]:
        """The last row of each video in ``videos.jsonl``."""
        rows = _read_lines(self.path / "videos.jsonl")
        return {row["video_id"]: row for row in rows if row is not None}

    def is_complete(self, video_id: str, total: int | None) -> bool:
        """Whether the video was run to its end, or as far as the ``total`` that is wanted now."""
        row = self.videos().get(video_id)
        if row is None or not row["complete"]:
            return False
        return row["total"] is None or (total is not None and total <= row["total"])

    def unfinished(self, video_id: str) -> Path:
        """The folder of what an unfinished video goes on from; it may not exist."""
        return self.path / "unfinished" / file_stem(video_id)

    def remove_unfinished(self, *video_ids: str) -> None:
        """Removes that folder of videos that are complete."""
        videos = self.videos()
        for video_id in video_ids:
            if videos.get(video_id, {}).get("complete"):
                shutil.rmtree(self.unfinished(video_id), ignore_errors=True)
        with suppress(OSError):  # other videos are unfinished
            (self.path / "unfinished").rmdir()

    def write_text(self, name: str, text: str) -> None:
        """Writes a whole file at once: readers see the old one or the new one."""
        write_atomically(self.path / name, lambda part: part.write_text(text, encoding="utf-8"))

    def write_json(self, name: str, value: Row) -> None:
        """:meth:`write_text` of indented JSON."""
        self.write_text(name, json.dumps(value, indent=2, allow_nan=False) + "\n")

    def claim(self, config: str, facts: Row) -> None:
        """Writes ``config.yaml`` and ``run.json``, which hold for every row.

        Args:
            config: resolved, as YAML.
            facts: further settings by the name a user knows them by.

        Raises:
            UserError: there are rows of other settings, which must not be mixed with new ones.
        """
        if self._recorded:
            self._compare("config", "config.yaml", yaml.safe_load(config))
            self._compare("setting", "run.json", facts)
        self.write_text("config.yaml", config)
        self.write_json("run.json", facts)

    def _compare(self, what: str, name: str, now: Row) -> None:
        file = self.path / name
        if not file.exists():
            return
        values = differences(yaml.safe_load(file.read_text("utf-8")), now)
        if values:
            raise UserError(
                f"the run in {self.path} has another {what} ({values}); resume it with the same, "
                "or choose another --output"
            )

    def close(self) -> None:
        """Lets other processes have the folder."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    __del__ = close


def lock_folder(folder: Path, lock: int, option: str) -> int:
    """Locks a folder for as long as the returned descriptor is open.

    Args:
        folder: exists.
        lock: ``fcntl.LOCK_EX`` or ``fcntl.LOCK_SH``.
        option: by which the user chose the folder.

    Raises:
        UserError: another process holds it.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, lock | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise UserError(
            f"another process is writing to the run in {folder}: wait for it, or choose "
            f"another {option}"
        ) from error
    except OSError:  # a network file system without locks
        pass
    return descriptor


def differences(old: Row, new: Row) -> str:
    """Returns "KEY: old value, now new value" of all nested keys that differ, or ""."""
    old, new = _flatten(old), _flatten(new)
    differing = sorted(k for k in old.keys() | new.keys() if old.get(k) != new.get(k))
    return ", ".join(f"{k}: {old.get(k)!r}, now {new.get(k)!r}" for k in differing)


def _parse(line: bytes) -> Row | None:
    """A row; None for what is none, such as the first half of one."""
    try:
        return json.loads(line) if line.endswith(b"\n") else None
    except ValueError:
        return None


def read_rows(file: Path) -> Iterator[Row]:
    """Whole rows of a ``.jsonl`` file, also while another process appends to it."""
    return (row for row in _read_lines(file) if row is not None)


def _read_lines(file: Path) -> Iterator[Row | None]:
    if file.exists():
        with file.open("rb") as lines:
            yield from map(_parse, lines)


def _flatten(config: Row, prefix: str = "") -> Row:
    """{"A": {"B": 1}} to {"A.B": 1}."""
    flat: Row = {}
    for key, value in config.items():
        nested = isinstance(value, dict)
        flat.update(_flatten(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value})
    return flat
