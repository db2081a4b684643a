"""Converts many files in threads, for ``datasets/prepare_*.py``."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

from ..errors import UserError


def convert_files(todo: Sequence[Path], convert: Callable[[Path], None], description: str) -> None:
    """Calls ``convert`` on each file, in as many threads as there are cores, with a progress bar.

    Args:
        todo: the files that are not converted yet.
        convert: writes its result completely or not at all. It should release the interpreter's
            lock most of the time, as reading and writing images does.
        description: text of the progress bar.

    Raises:
        UserError: a file cannot be read or written, or has wrong content. The files that are
            converted stay, so that the next call continues.
    """
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        try:
            for _ in tqdm(pool.map(convert, todo), total=len(todo), desc=description, unit="file"):
                pass
        except OSError as error:
            raise UserError(f"cannot write {error.filename}: {error.strerror}") from error
        finally:
            pool.shutdown(cancel_futures=True)
