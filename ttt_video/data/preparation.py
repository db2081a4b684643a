"""What ``datasets/prepare_*.py`` share: many files converted, each once, complete or not at all."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

from ..errors import UserError


def convert_files(todo: Sequence[Path], convert: Callable[[Path], None], description: str) -> None:
    """Call ``convert`` on each file, in as many threads as there are cores, with a progress bar.

    Args:
        todo: what is still to be converted.
        convert: writes the result, complete or not at all; most of its work must release the
            interpreter's lock, as reading and writing images does.
        description: of the progress bar.

    Raises:
        UserError: a file cannot be read or written, or is not what it should be. What is converted
            stays, so that the next call goes on from there.
    """
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        try:
            for _ in tqdm(pool.map(convert, todo), total=len(todo), desc=description, unit="file"):
                pass
        except OSError as error:
            raise UserError(f"cannot write {error.filename}: {error.strerror}") from error
        finally:
            pool.shutdown(cancel_futures=True)
