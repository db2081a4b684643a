"""What every adaptation method promises. A test class for a method inherits these tests."""

from __future__ import annotations

import copy
import math
import random
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from ttt_video.adaptation import Adapter
from ttt_video.config import merge_method
from ttt_video.stream import Stream

LABELS = {
    "sem_seg": torch.zeros(64, 96),
    "sem_seg_file_name": "/nowhere",
    "pan_seg_file_name": "/nowhere",
    "segments_info": [{"id": 1, "category_id": 3, "isthing": False}],
    "original": np.zeros((1, 1, 3), np.uint8),
    "original_file_name": "/nowhere",
    "class_id": 3,
    "annotations": [{"category_id": 11, "bbox": [0, 0, 8, 8], "segmentation": []}],
}
"""Of every task, none of which can be read."""


def tensors(output: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Every number of detectron2's outputs, whichever there are, by name."""
    found = {}
    if "sem_seg" in output:
        found["sem_seg"] = output["sem_seg"]
    for name in output.keys() & {"color", "image_class"}:
        found[name] = output[name]
    if "panoptic_seg" in output:
        found["panoptic_seg"], segments = output["panoptic_seg"]
        rows = [[s["id"], s["category_id"], s["isthing"]] for s in segments]
        found["segments_info"] = torch.tensor(rows)
    if "instances" in output:
        fields = output["instances"].get_fields()
        found.update({name: getattr(value, "tensor", value) for name, value in fields.items()})
    return found


def assert_same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    """Bit for bit, of :func:`tensors`."""
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name


class AdapterContract:
    """Set ``method``; ``settings`` are KEY VALUE pairs that bring its randomness into play."""

    method: ClassVar[str]
    settings: ClassVar[tuple] = ()
    frozen: ClassVar[tuple[str, ...]] = ("sem_seg_head",)
    """Parts of the model that never move; the main-task head unless a method says otherwise."""
    adapts: ClassVar[bool] = True
    """Whether the method changes the model at all."""
    random: ClassVar[bool] = True
    """Whether it draws random numbers."""
    still: ClassVar[tuple] = ("TTT.OPTIMIZER.BASE_LR", 0.0)
    """KEY VALUE pairs with which nothing moves."""
    counterpart: ClassVar[tuple] = ("TTT.METHOD", "none")
    """KEY VALUE pairs of what it then equals, bit for bit."""
    outputs: ClassVar[frozenset[str]] = frozenset({"sem_seg"})
    """What ``tiny_model`` predicts."""

    @pytest.fixture
    def runner(self, tiny_cfg, tiny_model) -> Stream:
        return self.build(tiny_cfg, tiny_model)

    def build(self, cfg, model, *more: str, seed: int = 0) -> Stream:
        cfg = cfg.clone()
        merge_method(cfg, self.method)
        cfg.merge_from_list(["SEED", seed, "TTT.BATCH_SIZE", 2, *self.settings, *more])
        return Stream.from_config(cfg, model)

    @staticmethod
    def numbers(results) -> list:
        """Everything a run computes, times aside."""
        return [
            (r.frame["video_id"], r.frame["frame_index"], r.record, tensors(r.output))
            for r in results
        ]

    @staticmethod
    def assert_equal(left: list, right: list) -> None:
        """Bit for bit."""
        assert len(left) == len(right)
        for a, b in zip(left, right, strict=True):
            assert a[:3] == b[:3]
            assert_same(a[3], b[3])

    @staticmethod
    def random_states() -> tuple:
        """Of the process: Python's, numpy's and torch's."""
        numpy_state = np.random.get_state()[1].tolist()  # noqa: NPY002
        return random.getstate(), numpy_state, torch.get_rng_state().tolist()

    @staticmethod
    def state(model) -> dict[str, torch.Tensor]:
        """Parameters and all buffers, those that checkpoints leave out as well."""
        named = [*model.named_parameters(), *model.named_buffers()]
        return {name: tensor.detach().clone() for name, tensor in named}

    def test_is_an_adapter_around_the_model_it_was_given(self, runner, tiny_model):
        assert isinstance(runner.adapter, Adapter)
        assert runner.adapter.model is tiny_model

    def test_one_result_per_frame_in_order_of_the_original_size(self, runner, make_video):
        video = make_video(num_frames=4, height=48, width=80)
        for frame in video:
            frame["height"], frame["width"] = 31, 57
        results = list(runner.run(video))
        assert [r.frame["frame_index"] for r in results] == [0, 1, 2, 3]
        assert all(r.frame is frame for r, frame in zip(results, video, strict=True))
        for result in results:
            assert result.output.keys() - {"finite"} == self.outputs
            for name, tensor in tensors(result.output).items():
                if name in ("sem_seg", "panoptic_seg", "pred_masks", "color"):
                    assert tensor.shape[-2:] == (31, 57)
                assert torch.isfinite(tensor).all()
                assert not tensor.requires_grad
            if "sem_seg" in result.output:
                assert result.output["sem_seg"].shape[0] == 19

    def test_records_are_named_finite_numbers(self, runner, make_video):
        records = [r.record for r in runner.run(make_video())]
        assert all(r.keys() == records[0].keys() for r in records)
        for name, value in [item for r in records for item in r.items()]:
            assert isinstance(name, str)
            assert isinstance(value, (int, float))
            assert math.isfinite(value)

    def test_moves_what_it_says_and_nothing_else(self, runner, tiny_model, make_video):
        before = self.state(tiny_model)
        for _ in runner.run(make_video()):
            pass
        after = self.state(tiny_model)
        changed = {name for name in before if not torch.equal(before[name], after[name])}
        assert bool(changed) == self.adapts
        assert not [name for name in changed if name.startswith(self.frozen)]

    def test_standing_still_is_the_frozen_model(self, tiny_cfg, tiny_model, make_video):
        video = make_video()
        still = self.build(tiny_cfg, copy.deepcopy(tiny_model), *self.still)
        frozen = self.build(tiny_cfg, tiny_model, *self.counterpart)
        for ours, theirs in zip(still.run(video), frozen.run(video), strict=True):
            assert_same(tensors(ours.output), tensors(theirs.output))

    def test_reset_restores_every_weight_and_buffer(self, runner, tiny_model, make_video):
        before = self.state(tiny_model)
        first = self.numbers(runner.run(make_video()))
        runner.adapter.reset()
        after = self.state(tiny_model)
        assert before.keys() == after.keys()
        for name in before:
            assert torch.equal(before[name], after[name]), name
        self.assert_equal(self.numbers(runner.run(make_video())), first)

    def test_predicting_changes_nothing(self, runner, tiny_model, make_video):
        video = make_video()
        for _ in runner.run(video):
            pass
        before = self.state(tiny_model)
        outputs = [tensors(runner.adapter.predict(frame)) for frame in [video[0], *video]]
        assert_same(outputs[0], outputs[1])
        after = self.state(tiny_model)
        assert all(torch.equal(before[name], after[name]) for name in before)

    def test_flags_of_every_module_survive(self, runner, tiny_model, make_video):
        for index, module in enumerate(tiny_model.modules()):
            module.training = index % 3 == 0
        flags = [module.training for module in tiny_model.modules()]
        for _ in runner.run(make_video()):
            assert [module.training for module in tiny_model.modules()] == flags
        runner.adapter.reset()
        assert [module.training for module in tiny_model.modules()] == flags

    def test_order_of_videos_does_not_matter(self, tiny_cfg, tiny_model, make_video):
        videos = {name: make_video(name, num_frames=2) for name in "abc"}
        runs = {}
        for order in ("abc", "cab", "b"):
            runner = self.build(tiny_cfg, copy.deepcopy(tiny_model))
            runs[order] = {name: self.numbers(runner.run(videos[name])) for name in order}
        for name in "abc":
            self.assert_equal(runs["abc"][name], runs["cab"][name])
        self.assert_equal(runs["abc"]["b"], runs["b"]["b"])

    def test_same_seed_same_numbers(self, tiny_cfg, tiny_model, make_video):
        runs = [
            self.numbers(
                self.build(tiny_cfg, copy.deepcopy(tiny_model), seed=seed).run(make_video())
            )
            for seed in (3, 3, 4)
        ]
        self.assert_equal(runs[0], runs[1])
        if self.adapts and self.random:
            assert [n[2] for n in runs[0]] != [n[2] for n in runs[2]]

    def test_goes_on_from_a_saved_state_as_if_never_stopped(
        self, tiny_cfg, tiny_model, make_video, tmp_path
    ):
        video, other = make_video(num_frames=4), make_video("b", num_frames=1)
        whole = self.build(tiny_cfg, copy.deepcopy(tiny_model))
        expected = self.numbers(whole.run(video))
        stopped = self.build(tiny_cfg, copy.deepcopy(tiny_model))
        before = self.numbers(stopped.run(video[:2]))
        torch.save(stopped.state_dict(), tmp_path / "state.pth")
        # Saving disturbs nothing.
        after = self.numbers(map(stopped.step, video[2:]))
        self.assert_equal(before + after, expected)
        # A fresh process; and one that has run something else.
        resumed = self.build(tiny_cfg, copy.deepcopy(tiny_model))
        for earlier in ([], other):
            if earlier:
                self.numbers(resumed.run(earlier))
            resumed.load_state_dict(torch.load(tmp_path / "state.pth", weights_only=True))
            after = self.numbers(map(resumed.step, video[2:]))
            self.assert_equal(before + after, expected)

    def test_labels_are_not_seen(self, tiny_cfg, tiny_model, make_video):
        runs = []
        for labels in ({}, LABELS):
            runner = self.build(tiny_cfg, copy.deepcopy(tiny_model))
            runs.append(self.numbers(runner.run([{**f, **labels} for f in make_video()])))
        self.assert_equal(*runs)

    def test_the_process_and_its_random_numbers_do_not_matter(
        self, tiny_cfg, tiny_model, make_video
    ):
        runs = []
        for seed in (0, 1):
            random.seed(seed)
            np.random.seed(seed)  # noqa: NPY002
            torch.manual_seed(seed)
            before = self.random_states()
            runner = self.build(tiny_cfg, copy.deepcopy(tiny_model))
            runs.append(self.numbers(runner.run(make_video())))
            assert self.random_states() == before
        self.assert_equal(*runs)
