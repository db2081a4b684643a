"""mVC by hand, against its definition over whole clips, and through an interruption."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from ttt_video.tasks import Consistency, LabelInfo, ScoredFrame, score
from ttt_video.tasks.color_statistics import Colorfulness
from ttt_video.tasks.columns import ColumnTally
from ttt_video.tasks.consistency import Consistency8
from ttt_video.tasks.metrics import EXAMPLE_INFO


def scores_of(classes: np.ndarray) -> torch.Tensor:
    one_hot = np.eye(4, dtype=np.float32)[classes]
    return torch.from_numpy(one_hot.transpose(2, 0, 1).copy())


@pytest.fixture
def record_all(tmp_path):
    """``record_all(task, predictions, labels, first=0)`` gives the records of a video's frames."""

    def run(task, predictions, labels, first=0, video_id="a"):
        records = []
        for index, (own, truth) in enumerate(zip(predictions, labels, strict=True), start=first):
            file = tmp_path / f"{video_id}{index}.png"
            Image.fromarray(truth.astype(np.uint8)).save(file)
            frame = {"video_id": video_id, "frame_index": index, "sem_seg_file_name": str(file)}
            records.append(task.record(frame, {"sem_seg": scores_of(own)}))
        return records

    return run


def test_by_hand(record_all):
    # Five pixels over 9 frames: right throughout; wrong throughout; changes its mind at frame 4;
    # has another label from frame 1 on; void.
    labels = np.tile(np.array([[[0, 1, 2, 3, 255]]]), (9, 1, 1))
    labels[0, 0, 3] = 0
    predictions = np.tile(np.array([[[0, 2, 2, 3, 1]]]), (9, 1, 1))
    predictions[4:, 0, 2] = 1
    records = record_all(Consistency(), predictions, labels)
    assert records[:7] == [None] * 7
    # Frames 0 to 7: pixels 0, 1, 2 have one label, and 0, 1 one prediction. Frames 1 to 8: pixel 3
    # has both, too.
    assert records[7:] == [
        {"vc8": pytest.approx(200 / 3), "vc16": None},
        {"vc8": 75.0, "vc16": None},
    ]
    frames = [ScoredFrame("a", i, {"consistency": r}) for i, r in enumerate(records) if r]
    numbers = score(frames, LabelInfo())
    assert numbers["mVC8"] == pytest.approx((200 / 3 + 75) / 2)
    assert numbers["mVC16"] is None


def whole_clips(predictions, labels, clip):
    """The definition, clip by clip."""
    shares = []
    for start in range(len(labels) - clip + 1):
        here = slice(start, start + clip)
        steady = (labels[here] == labels[start]).all(0) & (labels[start] != 255)
        constant = (predictions[here] == predictions[start]).all(0)
        shares.append(100 * (steady & constant).sum() / steady.sum())
    return shares


def changing(rng, values, frames=22, often=0.03):
    """A video of a 6x7 picture, of which some pixels change with every frame."""
    video = [rng.choice(values, (6, 7))]
    for _ in range(frames - 1):
        changed = rng.random((6, 7)) < often
        video.append(np.where(changed, rng.choice(values, (6, 7)), video[-1]))
    return np.stack(video)


def test_clips_are_those_of_the_definition_and_survive_an_interruption(record_all):
    rng = np.random.default_rng(0)
    predictions, labels = changing(rng, [0, 1, 2]), changing(rng, [0, 1, 255], often=0.01)
    records = record_all(Consistency(), predictions, labels)
    for clip in (8, 16):
        own = [r[f"vc{clip}"] for r in records if r and r[f"vc{clip}"] is not None]
        assert own == pytest.approx(whole_clips(predictions, labels, clip))
        assert min(own) < max(own)
    before, after = Consistency(), Consistency()
    first = record_all(before, predictions[:12], labels[:12])
    file = io.BytesIO()
    torch.save(before.state_dict(), file)
    file.seek(0)
    after.load_state_dict(torch.load(file, weights_only=True))
    assert first + record_all(after, predictions[12:], labels[12:], first=12) == records


def test_a_gap_or_another_video_ends_a_clip(record_all):
    still = np.zeros((8, 1, 2), np.int64)
    task = Consistency()
    assert record_all(task, still[:7], still[:7]) == [None] * 7
    assert record_all(task, still[:7], still[:7], first=8) == [None] * 7
    assert record_all(task, still[:7], still[:7], first=15, video_id="b") == [None] * 7
    (last,) = record_all(task, still[:1], still[:1], first=22, video_id="b")
    assert last == {"vc8": 100.0, "vc16": None}


def test_a_frame_without_the_number_does_not_count():
    """Frames without a number leave the mean of the others, in any task with columns."""
    tally = ColumnTally()
    for index, share in enumerate([None, 80.0, None, 50.0]):
        tally.add(index, {"vc8": share, "colorfulness": share})
    total = ColumnTally.joined([tally], EXAMPLE_INFO)
    assert [metric().value(total) for metric in (Consistency8, Colorfulness)] == [65.0, 65.0]
    empty = ColumnTally()
    empty.add(0, {"vc8": None})
    assert Consistency8().value(ColumnTally.joined([empty], EXAMPLE_INFO)) is None
