"""What the offline oracle chooses its step by: the data set's own metric, of its own labels."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from detectron2.data import MetadataCatalog
from detectron2.structures import Instances
from gradient_settings import grouped
from PIL import Image

from ttt_video.adaptation import RandomCrop
from ttt_video.adaptation.offline_ttt_mae_oracle import OfflineOracleAdapter, scorer
from ttt_video.config import load_config
from ttt_video.errors import UserError


@pytest.fixture
def score(tiny_cfg):
    """``score(frame, output, KEY=VALUE of the metadata...)``."""
    names = []

    def run(frame, output, **metadata):
        names.append(f"oracle_{len(names)}")
        MetadataCatalog.get(names[-1]).set(**metadata)
        tiny_cfg.DATASETS.TEST = (names[-1],)
        return scorer(tiny_cfg)([frame], lambda _: output)

    yield run
    for name in names:
        MetadataCatalog.remove(name)


def test_models_of_several_tasks_are_scored_on_the_labels_of_the_data_set(score, tmp_path):
    """All objects are found and all segments missed: AP 100, PQ 0."""
    Image.fromarray(np.full((8, 8, 3), (5, 0, 0), np.uint8)).save(tmp_path / "pan.png")
    corners = [0, 0, 8, 0, 8, 8, 0, 8]
    frame = {
        "pan_seg_file_name": str(tmp_path / "pan.png"),
        "segments_info": [{"id": 5, "category_id": 0, "iscrowd": 0, "area": 64}],
        "annotations": [{"category_id": 0, "segmentation": [corners], "iscrowd": 0, "area": 64}],
    }
    found = Instances((8, 8), pred_masks=torch.ones(1, 8, 8), scores=torch.ones(1))
    found.pred_classes = torch.zeros(1, dtype=torch.int64)
    output = {"instances": found, "panoptic_seg": (torch.zeros(8, 8, dtype=torch.int32), [])}
    assert score(frame, output, evaluator_type="video_instance") == pytest.approx(100)
    assert score(frame, output, evaluator_type="video_panoptic") == 0


@pytest.mark.parametrize(("ignored", "expected"), [(7, 100), (255, 25)])
def test_labels_that_the_data_set_ignores_do_not_count(score, tmp_path, ignored, expected):
    labels = np.zeros((8, 8), np.uint8)
    labels[:4] = 7
    Image.fromarray(labels).save(tmp_path / "labels.png")
    scores = torch.zeros(19, 8, 8)
    scores[0] = 1
    frame = {"sem_seg_file_name": str(tmp_path / "labels.png")}
    metadata = {"evaluator_type": "video_sem_seg", "ignore_label": ignored}
    assert score(frame, {"sem_seg": scores}, **metadata) == expected


def oracle(model, scores, **settings) -> OfflineOracleAdapter:
    """Four steps, a look after every second; ``scores`` says what each look finds."""
    found = iter(scores)
    return OfflineOracleAdapter(
        model, augment=RandomCrop(), num_steps=4, eval_every=2,
        score=lambda frames, predict: next(found), **grouped(lr=0.1, batch_size=1, **settings),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "scores", "chosen"),
    [
        # One look at the first frame says that there are labels; then those after 2 and 4 steps.
        ({}, [99.0, 40.0, 50.0], (4, 50.0)),
        ({}, [99.0, 50.0, 40.0], (2, 50.0)),
        ({"allow_zero": False}, [99.0, 50.0, 50.0], (2, 50.0)),
        ({"allow_zero": True}, [99.0, 40.0, 50.0], (0, 99.0)),
        ({"allow_zero": True}, [30.0, 40.0, 50.0], (4, 50.0)),
    ],
)
def test_the_source_weights_are_a_candidate_only_where_allowed(
    tiny_model, make_video, settings, scores, chosen
):
    source = {name: p.clone() for name, p in tiny_model.named_parameters()}
    adapter = oracle(tiny_model, scores, **settings)
    adapter.watch(make_video(), torch.Generator().manual_seed(0))
    record = adapter.adapt(None, None)
    assert (record["offline_steps"], record["offline_score"]) == chosen
    moved = any(not torch.equal(p, source[name]) for name, p in tiny_model.named_parameters())
    assert moved == (chosen[0] > 0)


def test_a_video_without_labels_is_refused_before_the_training(tiny_model, make_video):
    adapter = oracle(tiny_model, [float("nan")] * 3)
    adapter.take_steps = None  # type: ignore[method-assign]
    with pytest.raises(UserError, match="video a has no labels"):
        adapter.watch(make_video(num_frames=3), torch.Generator())


def test_one_labelled_frame_is_enough(tiny_model, make_video):
    adapter = oracle(tiny_model, [float("nan"), 1.0, 5.0, 6.0])
    adapter.watch(make_video(num_frames=3), torch.Generator().manual_seed(0))
    assert adapter.adapt(None, None)["offline_score"] == 6.0


def test_the_papers_candidates():
    offline = load_config(None, method="offline_ttt_mae_oracle").TTT.OFFLINE
    assert (offline.STEPS, offline.EVAL_EVERY, offline.ALLOW_ZERO) == (2000, 100, False)
    assert load_config(None, method="offline_ttt_mae").TTT.OFFLINE.STEPS == 1000
