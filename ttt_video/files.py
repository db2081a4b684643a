"""Files that are whole or not there, whatever is killed; folders of one process; names; reading."""

from __future__ import annotations

import fcntl
import glob
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from .errors import UserError


def write_atomically(path: Path, write: Callable[[Path], object], *, durable: bool = False) -> None:
    """Lets ``write`` fill a file of its own beside ``path``, then moves it there.

    A process that is killed leaves the old file or the new one, never a part of it. What killed
    processes were writing is removed.

    Args:
        path: the file, replaced if it exists.
        write: is given the path to write to.
        durable: wait until the disk has the new file before it replaces the old one, so that this
            holds for a machine that loses its power, too.

    Raises:
        UserError: the file cannot be written, as on a full disk.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    with writing(path):
        try:
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
    """Turns what the system says of a file that cannot be written into one line.

    Raises:
        UserError: instead of an OSError.
    """
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        named = None
        if error.filename is not None:  # FFmpeg's has the prefix of ffmpeg_name
            named = Path(os.fsdecode(error.filename).removeprefix("file:"))
        if named not in (None, path) and not _is_part(named):
            reason += f": {named}"
        raise UserError(f"cannot write {path}: {reason}") from error


def save_torch(path: Path, content: object) -> None:
    """Writes what ``torch.load`` reads, whole and on disk before it replaces an older file.

    Raises:
        UserError: it cannot be written.
    """
    import torch  # not all that writes files needs it

    def write(part: Path) -> None:
        with part.open("wb") as file:
            try:
                torch.save(content, file)
            except RuntimeError as error:  # torch's own, of its bookkeeping
                if isinstance(error.__context__, OSError):
                    raise error.__context__ from None
                raise

    write_atomically(path, write, durable=True)


def _flush(path: Path) -> None:
    """Waits until a file or the names in a folder are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _is_part(path: Path) -> bool:
    return path.name.startswith(".") and path.suffix == ".part"


def remove_leftovers(folder: Path, name: str = "*") -> None:
    """Removes what processes that are dead by now were writing with :func:`write_atomically`.

    Args:
        folder: where; it need not exist.
        name: of the file that was to be written; "*" for any.
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
    except (PermissionError, OverflowError):  # another user's; no process at all
        return True
    return True


class FolderLock:
    """Keeps other processes out of a folder until :meth:`close`, or the end of this process.

    The lock lies on the folder itself, so nothing is left behind, however the process ends. A
    network file system without locks keeps nobody out.
    """

    def __init__(self, folder: Path, message: str, *, shared: bool = False) -> None:
        """Takes the lock.

        Args:
            folder: must exist.
            message: of the error where another process has it.
            shared: let others in that share it too.

        Raises:
            UserError: another process is in it, or the folder cannot be opened.
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
        """Lets others in that share the lock."""
        with suppress(OSError):
            fcntl.flock(self._descriptor, fcntl.LOCK_SH)

    def check(self) -> None:
        """Makes sure that the folder is still the one that was locked.

        Raises:
            UserError: it was removed or replaced.
        """
        if self._descriptor < 0:
            return
        try:
            same = os.path.samestat(os.stat(self.folder), os.fstat(self._descriptor))
        except OSError:
            same = False
        if not same:
            raise UserError(f"{self.folder} was removed or replaced while a process wrote to it")

    def close(self) -> None:
        """Lets other processes have the folder."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    __del__ = close


def path_text(path: str | os.PathLike[str]) -> str:
    """Returns a path as text that every file, page and terminal takes.

    Bytes of a name that are no UTF-8, which Python keeps as lone surrogates, become ``\\xNN``.
    """
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def ffmpeg_name(path: str | os.PathLike[str]) -> str:
    """Returns the name by which FFmpeg opens a local file, which may contain colons.

    Without the prefix FFmpeg takes what stands before a colon for a protocol.
    """
    return f"file:{os.fsdecode(path)}"


def make_folder(folder: Path, name: str = "--output") -> None:
    """Makes a folder where it is missing.

    Raises:
        UserError: it cannot be made. ``name`` is the flag or key that names it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{name} {folder} cannot be made: {error.strerror}") from error


def file_stem(video_id: str) -> str:
    """Returns a name for a video's files: its id, or if that is no file name, a part and a hash.

    Different ids have different names.
    """
    plain = "".join(c if c.isalnum() or c in "-_." else "_" for c in video_id)[:60]
    if plain == video_id and plain.strip("."):
        return plain
    return f"{plain}-{hashlib.sha256(video_id.encode()).hexdigest()[:8]}"


def names_apart(paths: Sequence[Path]) -> list[str]:
    """Returns short names of different folders: of each the last part, or as many as differ.

    They may hold slashes; :func:`file_stem` makes names of files of them.
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
        UserError: it cannot be read (``hint`` says where it should come from), or holds no object
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
