"""Writes files completely or not at all, or behind; locks folders, names files, reads JSON."""

from __future__ import annotations

import fcntl
import glob
import hashlib
import json
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from .errors import UserError

_QUEUE = 4  # jobs that may wait for the thread of a WriteBehind


def write_atomically(
    path: Path,
    write: Callable[[Path], object],
    *,
    durable: bool = False,
    tidy: bool = True,
) -> None:
    """Lets ``write`` fill a temporary file beside ``path``, then moves it to ``path``.

    A process that is killed leaves the old file or the new one, never a part of it. Temporary files
    of dead processes are removed.

    Args:
        path: the file, replaced if it exists.
        write: is given the path to write to.
        durable: wait until the new file is on disk before it replaces the old one, so that a power
            cut leaves one of the two, too.
        tidy: look for the temporary files of dead processes first. This lists the whole folder, so
            whoever writes thousands of files into one does it once (:func:`remove_leftovers`).

    Raises:
        UserError: the file cannot be written, for example because the disk is full.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    with writing(path):
        try:
            if tidy:
                remove_leftovers(path.parent, path.name)
            write(part)
            if durable:
                _flush(part)
            os.replace(part, path)
            if durable:
                _flush(path.parent)
        finally:
            with suppress(OSError):
                part.unlink(missing_ok=True)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raises UserError with one line instead of an OSError about writing ``path``."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        if error.filename is not None:
            # FFmpeg reports the name that ffmpeg_name gave it.
            named = Path(os.fsdecode(error.filename).removeprefix("file:"))
            is_part = named.name.startswith(".") and named.suffix == ".part"
            if named != path and not is_part:
                reason += f": {named}"
        raise UserError(f"cannot write {path}: {reason}") from error


def save_torch(path: Path, content: object) -> None:
    """Saves ``content`` for ``torch.load``; see :func:`write_atomically`, ``durable``."""
    import torch  # here, because importing this module must stay cheap

    def write(part: Path) -> None:
        with part.open("wb") as file:
            try:
                torch.save(content, file)
            except RuntimeError as error:  # torch raises it while it handles a full disk
                if isinstance(error.__context__, OSError):
                    raise error.__context__ from None
                raise

    write_atomically(path, write, durable=True)


def _flush(path: Path) -> None:
    """Waits until a file, or the list of names in a folder, is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class WriteBehind:
    """Runs jobs in a thread of its own, one after the other, while the caller goes on.

    Once a job has failed, none of those after it is run.
    """

    def __init__(self, name: str, depth: int = _QUEUE) -> None:
        """
        Args:
            name: of the thread.
            depth: jobs that may be unfinished when :meth:`submit` returns, at least 1.
        """
        self._depth = depth
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix=name)
        self._pending: deque[Future[None]] = deque()
        self._error: BaseException | None = None

    def submit(self, job: Callable[[], object]) -> None:
        """Queues a job, and waits where too many are queued; raises what went wrong with one."""
        self._wait(self._depth - 1)
        self._pending.append(self._pool.submit(self._run, job))

    def flush(self) -> None:
        """Waits for all jobs; raises what went wrong with one, every time."""
        self._wait(0)
        self.check()

    def check(self) -> None:
        """Raises what went wrong with a job, without waiting for any."""
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """Waits for all jobs and ends the thread, also where one went wrong."""
        try:
            self.flush()
        finally:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def _wait(self, unfinished: int) -> None:
        """Waits until no more jobs than this are unfinished; raises what went wrong with one."""
        while len(self._pending) > unfinished:
            wait([self._pending[0]])  # where this is interrupted, the job stays in the queue
            self._pending.popleft().result()

    def _run(self, job: Callable[[], object]) -> None:
        self.check()
        try:
            job()
        except BaseException as error:
            self._error = error
            raise


def remove_leftovers(folder: Path, name: str = "*") -> None:
    """Removes the temporary files that :func:`write_atomically` left in dead processes.

    Args:
        folder: may be missing.
        name: the file that was to be written; "*" for any.
    """
    pattern = "*" if name == "*" else glob.escape(name)
    for part in folder.glob(f".{pattern}.*.part"):
        process = part.name.split(".")[-2]
        if process.isdecimal() and not _is_alive(int(process)):
            part.unlink(missing_ok=True)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):  # another user's process; a number of no process
        pass
    return True


class FolderLock:
    """Keeps other processes out of a folder until :meth:`close` or the end of this process.

    The lock is on the folder itself, so that a killed process leaves nothing behind. A network file
    system without locks keeps nobody out.
    """

    def __init__(self, folder: Path, message: str, *, shared: bool = False) -> None:
        """Takes the lock.

        Args:
            folder: must exist.
            message: of the error if another process has the lock.
            shared: allow other processes that share the lock.

        Raises:
            UserError: another process has the lock, or the folder cannot be opened.
        """
        self.folder = folder
        self._descriptor = -1
        try:
            self._descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        except OSError as error:
            raise UserError(f"{folder} cannot be opened: {error.strerror}") from error
        try:
            kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
            fcntl.flock(self._descriptor, kind | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self.close()
            raise UserError(message) from error
        except OSError:  # a network file system without locks
            pass

    def share(self) -> None:
        """Allows other processes that share the lock."""
        with suppress(OSError):
            fcntl.flock(self._descriptor, fcntl.LOCK_SH)

    def check(self) -> None:
        """Raises UserError if the folder was removed or replaced since it was locked."""
        if self._descriptor < 0:
            return
        try:
            same = os.path.samestat(os.stat(self.folder), os.fstat(self._descriptor))
        except OSError:
            same = False
        if not same:
            raise UserError(f"{self.folder} was removed or replaced while a process wrote to it")

    def close(self) -> None:
        """Releases the lock."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    __del__ = close


def path_text(path: str | os.PathLike[str]) -> str:
    """Returns a path as valid UTF-8: bytes that are not become ``\\xNN``.

    Python keeps such bytes as lone surrogates, which files and terminals refuse.
    """
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def ffmpeg_name(path: str | os.PathLike[str]) -> str:
    """Returns a local file's name for FFmpeg, which takes text before a colon for a protocol."""
    return f"file:{os.fsdecode(path)}"


def make_folder(folder: Path, name: str = "--output") -> None:
    """Makes a folder if it is missing.

    Raises:
        UserError: it cannot be made; ``name`` is the flag or key to blame.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{name} {folder} cannot be made: {error.strerror}") from error


def make_empty_folder(folder: Path) -> None:
    """Makes the folder of ``--output`` if it is missing.

    Raises:
        UserError: it cannot be made, or something is in it.
    """
    make_folder(folder)
    if any(folder.iterdir()):
        raise UserError(f"{folder} is not empty: give another --output")


def file_stem(video_id: str) -> str:
    """Returns a file name for a video: its id, or a part of it with a hash if it is no file name.

    Different ids have different names.
    """
    plain = "".join(c if c.isalnum() or c in "-_." else "_" for c in video_id)[:60]
    if plain == video_id and plain.strip("."):
        return plain
    return f"{plain}-{hashlib.sha256(video_id.encode()).hexdigest()[:8]}"


def names_apart(paths: Sequence[Path]) -> list[str]:
    """Returns a short name for each folder: its last part, or more parts until all names differ.

    Names may contain slashes, which :func:`file_stem` removes.
    """
    parts = [path.resolve().parts for path in paths]
    for depth in range(1, max(map(len, parts), default=0) + 1):
        names = ["/".join(own[-depth:]) for own in parts]
        if len(set(names)) == len(set(parts)):
            return names
    return []


def read_json_object(
    file: str | os.PathLike[str], *, hint: str = "", expected: str = ""
) -> dict[str, Any]:
    """Returns the JSON object in a file.

    Raises:
        UserError: the file cannot be read (``hint`` says where to get it), or holds no object
            (``expected`` says what it should hold).
    """
    try:
        content = json.loads(Path(file).read_bytes())
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}{hint}") from error
    except ValueError as error:
        raise UserError(f"{file} is no JSON file: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{file} holds no JSON object{expected}")
    return content
