"""Cityscapes' ids against detectron2's table, and its own loader on a tree in its layout."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
from detectron2.data.datasets.builtin_meta import CITYSCAPES_CATEGORIES
from detectron2.data.datasets.cityscapes import load_cityscapes_semantic
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from ttt_video.data.cityscapes import NUM_LABEL_IDS, train_ids

THEIRS = {c["id"]: c["trainId"] for c in CITYSCAPES_CATEGORIES}


def test_every_label_id_has_the_train_id_of_detectron2():
    ids = np.arange(NUM_LABEL_IDS, dtype=np.uint8)[None]
    converted = train_ids(ids)
    assert converted.dtype == np.uint8
    assert converted[0].tolist() == [THEIRS.get(i, 255) for i in range(NUM_LABEL_IDS)]
    assert train_ids(ids[:, :0]).shape == (1, 0)


@given(st.integers(NUM_LABEL_IDS, 255))
def test_values_that_are_no_label_ids(value):
    with pytest.raises(ValueError, match=f"label id {value} is not"):
        train_ids(np.array([[0, value]], np.uint8))


def test_the_semantic_loader_needs_no_cityscapes_scripts(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "cityscapesscripts", None)  # importing it fails
    images, labels = tmp_path / "leftImg8bit", tmp_path / "gtFine"
    still = "ulm_000000_000019"
    for root in (images, labels):
        (root / "ulm").mkdir(parents=True)
    picture = np.zeros((4, 6, 3), np.uint8)
    Image.fromarray(picture).save(images / "ulm" / f"{still}_leftImg8bit.png")
    for kind in ("labelIds", "labelTrainIds", "instanceIds"):
        Image.fromarray(picture[..., 0]).save(labels / "ulm" / f"{still}_gtFine_{kind}.png")
    (labels / "ulm" / f"{still}_gtFine_polygons.json").write_text(
        json.dumps({"imgHeight": 4, "imgWidth": 6, "objects": []})
    )
    (record,) = load_cityscapes_semantic(str(images), str(labels))
    assert record["sem_seg_file_name"].endswith(f"ulm/{still}_gtFine_labelTrainIds.png")
    assert (record["height"], record["width"]) == (4, 6)
