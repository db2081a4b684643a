"""A small Fashion-MNIST in the published files' form, with as many pictures of each class."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np

from ttt_video.data import fashion_mnist
from ttt_video.formats.idx import read_idx

TRAIN, VAL, TEST = 20, 10, 40


def write_idx(file: Path, array: np.ndarray) -> None:
    """Writes a gzipped idx file of unsigned bytes."""
    header = struct.pack(f">2xBB{array.ndim}I", 8, array.ndim, *array.shape)
    with gzip.open(file, "wb") as opened:
        opened.write(header + array.tobytes())


def write_fashion_mnist(folder: Path, monkeypatch) -> tuple[np.ndarray, np.ndarray]:
    """Writes the four files and makes them the published ones; returns test pictures and labels.

    Pictures are bright on a class's own rows and dark elsewhere.
    """
    folder.mkdir(parents=True)
    files = {}
    for name, count in (("train", TRAIN + VAL), ("t10k", TEST)):
        rng = np.random.default_rng(count)
        labels = (np.arange(count) * 7 % 10).astype(np.uint8)
        images = rng.integers(0, 60, (count, 28, 28)).astype(np.uint8)
        for image, label in zip(images, labels, strict=True):
            image[2 * label + 4 : 2 * label + 8] += 150
        for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
            write_idx(folder / f"{name}-{kind}-ubyte.gz", array)
            files[f"{name}-{kind}-ubyte.gz"] = array.shape
    splits = {
        "train": fashion_mnist.Split("train", 0, TRAIN),
        "val": fashion_mnist.Split("train", TRAIN, TRAIN + VAL),
        "test": fashion_mnist.Split("t10k", 0, TEST),
    }
    monkeypatch.setattr(fashion_mnist, "FILES", files)
    monkeypatch.setattr(fashion_mnist, "SPLITS", splits)
    read_idx.cache_clear()
    return images, labels
