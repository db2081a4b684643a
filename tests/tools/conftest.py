"""Fixtures of the tools' tests."""

from __future__ import annotations

import numpy as np
import pytest
from detectron2.data import DatasetCatalog
from PIL import Image


@pytest.fixture
def pictures(tmp_path):
    """Name of a registered data set of four pictures."""
    rng = np.random.default_rng(0)
    for index in range(4):
        pixels = rng.integers(0, 256, (64, 96, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{index}.png")
    records = [{"file_name": str(tmp_path / f"{index}.png")} for index in range(4)]
    DatasetCatalog.register("four_pictures", lambda: records)
    yield "four_pictures"
    DatasetCatalog.remove("four_pictures")
