"""Every registered method keeps the contract."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from contract import AdapterContract
from detectron2.data import MetadataCatalog
from detectron2.modeling import build_model
from PIL import Image
from torch import nn

from ttt_video.adaptation.head_signal import measure_head
from ttt_video.adaptation.norm_statistics import measure_statistics
from ttt_video.config import merge_method
from ttt_video.errors import UserError
from ttt_video.modeling.weights import save_safetensors
from ttt_video.stream import Stream


@pytest.fixture
def source_statistics(tiny_cfg, tiny_model, make_video, tmp_path) -> None:
    """Those of ``tiny_model``, in ``tiny_cfg``."""
    images = [frame["image"] for frame in make_video("source")]
    file = tmp_path / "norms.safetensors"
    save_safetensors(measure_statistics(tiny_model, images), file)
    tiny_cfg.TTT.LN_ADAPT.SOURCE_STATISTICS = str(file)


class TestNoAdaptation(AdapterContract):
    method = "none"
    adapts = False

    def test_is_the_model_itself(self, runner, tiny_model, make_video):
        video = make_video()
        results = list(runner.run(video))
        with torch.no_grad():
            expected = [tiny_model([frame])[0]["sem_seg"] for frame in video]
        for result, scores in zip(results, expected, strict=True):
            assert torch.equal(result.output["sem_seg"], scores)
            assert result.record == {}


class TestOnlineTTTMAE(AdapterContract):
    method = "online_ttt_mae"


class TestOnlineTTTMAEWithEverySourceOfRandomness(AdapterContract):
    method = "online_ttt_mae"
    settings = (
        "TTT.STEP_MODE", "train",
        "TTT.SAMPLING", "shuffled_epochs",
        "TTT.OPTIMIZER.NAME", "ADAMW",
        "TTT.OPTIMIZER.BASE_LR", 0.001,
        "TTT.OPTIMIZER.WEIGHT_DECAY", 0.05,
        "TTT.OPTIMIZER.CLIP_NORM", 0.01,
        "TTT.MICRO_BATCH_SIZE", 3,
        "TTT.CROP.SIZE", "[32, 64]",
        "TTT.CROP.FLIP", True,
        "TTT.CROP.SCALE_RANGE", "[0.5, 2.0]",
    )  # fmt: skip


class TestOnlineTTTMAELineSearch(AdapterContract):
    method = "online_ttt_mae_line_search"
    settings = ("TTT.LINE_SEARCH.EVERY", 2)

    @pytest.fixture(autouse=True)
    def _with_statistics(self, source_statistics):
        """Measures the model's own layers."""


class TestLearnOnChange(AdapterContract):
    """The second frame is blurred if that leads to the source; then there are steps."""

    method = "learn_on_change"
    settings = (
        "TTT.LEARN_ON_CHANGE.ENTER", 0.0,
        "TTT.LEARN_ON_CHANGE.PATIENCE", 1,
        "TTT.LEARN_ON_CHANGE.MARGIN", 0.0,
        "TTT.LEARN_ON_CHANGE.STEP", 0.0,
        "TTT.LEARN_ON_CHANGE.BLUR", [1.0],
        "TTT.LEARN_ON_CHANGE.DENOISE", [],
        "TTT.LEARN_ON_CHANGE.COLOURS", [],
        "TTT.LEARN_ON_CHANGE.STEP_FRAMES", 4,
    )  # fmt: skip
    still = (*AdapterContract.still, "TTT.LEARN_ON_CHANGE.BLUR", [])

    @pytest.fixture(autouse=True)
    def _with_statistics(self, source_statistics, tiny_cfg, tiny_model, make_video, tmp_path):
        """Measures the model's own layers."""
        images = [frame["image"] for frame in make_video("source", num_frames=8)]
        file = tmp_path / "head.safetensors"
        save_safetensors(measure_head(tiny_model, images, ["h"]), file)
        tiny_cfg.TTT.LEARN_ON_CHANGE.SOURCE_HEAD = str(file)

    def test_records_are_named_finite_numbers(self, runner, make_video):
        """A state has the numbers of what it does: there is no loss without a step."""
        records = [r.record for r in runner.run(make_video())]
        assert "loss_recon" in records[2].keys() - records[1].keys()
        assert all({"state", "colours", "blur", "steps", "denoise"} <= r.keys() for r in records)
        assert all(math.isfinite(value) for r in records for value in r.values())


@pytest.mark.slow  # the code of another row, with other keys or inside of another
class TestMainTaskOnly(AdapterContract):
    method = "main_task_only"
    adapts = False


@pytest.mark.slow  # the code of another row, with other keys or inside of another
class TestJointTraining(AdapterContract):
    method = "joint_training"
    adapts = False


@pytest.mark.slow  # the code of another row, with other keys or inside of another
class TestImplicitOnly(AdapterContract):
    method = "implicit_only"


@pytest.mark.slow  # the code of another row, with other keys or inside of another
class TestExplicitOnly(AdapterContract):
    method = "explicit_only"


@pytest.mark.slow  # the code of another row, with other keys or inside of another
class TestTTTMAENoMemory(AdapterContract):
    method = "ttt_mae_no_memory"
    settings = ("TTT.STEPS_PER_FRAME", 2)


class TestTent(AdapterContract):
    method = "tent"
    settings = ("TTT.BATCH_SIZE", 2)  # fewer than the window: which frames, is drawn
    frozen = ("sem_seg_head", "recon_head")

    def test_norms_alone_move(self, runner, tiny_model, make_video):
        before = self.state(tiny_model)
        for _ in runner.run(make_video()):
            pass
        after = self.state(tiny_model)
        moved = {name for name in before if not torch.equal(before[name], after[name])}
        norms = {name for name, m in tiny_model.named_modules() if isinstance(m, nn.LayerNorm)}
        assert moved
        assert {name.rpartition(".")[0] for name in moved} <= norms


class TestTentClassBalance(AdapterContract):
    method = "tent_class_balance"
    settings = ("TTT.BATCH_SIZE", 2, "TTT.CLASS_BALANCE.THRESHOLD", 19)
    frozen = ("sem_seg_head", "recon_head")


class TestSelfTrain(AdapterContract):
    method = "self_train"
    settings = ("TTT.SELF_TRAIN.THRESHOLD", 0.0)  # random weights are sure of nothing
    frozen = ("sem_seg_head", "recon_head")

    def test_threshold_1_does_nothing(self, tiny_cfg, tiny_model, make_video):
        optimizer = ("TTT.OPTIMIZER.NAME", "ADAMW", "TTT.OPTIMIZER.WEIGHT_DECAY", 0.5)
        runner = self.build(tiny_cfg, tiny_model, "TTT.SELF_TRAIN.THRESHOLD", 1.0, *optimizer)
        before = self.state(tiny_model)
        for result in runner.run(make_video()):
            assert result.record["confident"] == 0
            assert result.record["grad_norm"] == 0
        after = self.state(tiny_model)
        assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.slow  # the code of another row, with other keys or inside of another
class TestSelfTrainClassBalance(AdapterContract):
    method = "self_train_class_balance"
    settings = ("TTT.SELF_TRAIN.THRESHOLD", 0.0, "TTT.CLASS_BALANCE.THRESHOLD", 19)
    frozen = ("sem_seg_head", "recon_head")


class TestLNAdapt(AdapterContract):
    method = "ln_adapt"
    frozen = ("sem_seg_head", "recon_head")
    random = False
    still = ("TTT.LN_ADAPT.PRIOR", 1e30)

    @pytest.fixture(autouse=True)
    def _with_statistics(self, source_statistics):
        """Measures the model's own layers."""


class TestTentWithStatistics(AdapterContract):
    method = "tent_ln_adapt"
    frozen = ("sem_seg_head", "recon_head")
    random = False
    still = ("TTT.LN_ADAPT.PRIOR", 1e30, "TTT.OPTIMIZER.BASE_LR", 0.0)

    @pytest.fixture(autouse=True)
    def _with_statistics(self, source_statistics):
        """Measures the model's own layers."""

    def test_it_is_tent_without_statistics_and_ln_adapt_without_steps(
        self, tiny_cfg, tiny_model, make_video
    ):
        def run(method: str, *more) -> list:
            cfg = tiny_cfg.clone()
            merge_method(cfg, method)
            cfg.merge_from_list(["TTT.BATCH_SIZE", 2, *more])
            stream = Stream.from_config(cfg, copy.deepcopy(tiny_model))
            return [r.output["sem_seg"] for r in stream.run(make_video(num_frames=4))]

        rate, prior = ("TTT.OPTIMIZER.BASE_LR", 0.3), ("TTT.LN_ADAPT.PRIOR", 2.0)
        none, infinite = ("TTT.OPTIMIZER.BASE_LR", 0.0), ("TTT.LN_ADAPT.PRIOR", float("inf"))
        both = run("tent_ln_adapt", *rate, *prior)
        for ours, other in zip(
            run("tent_ln_adapt", *rate, *infinite), run("tent", *rate), strict=True
        ):
            assert torch.equal(ours, other)
        without = run("tent_ln_adapt", *none, *prior)
        for ours, other in zip(without, run("ln_adapt", *prior), strict=True):
            torch.testing.assert_close(ours, other, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(both[-1], without[-1], atol=1e-4)
        assert not torch.allclose(both[-1], run("tent", *rate)[-1], atol=1e-4)


class OfflineContract(AdapterContract):
    settings = ("TTT.OFFLINE.STEPS", 3, "TTT.OFFLINE.EVAL_EVERY", 1)

    def test_goes_on_from_a_saved_state_as_if_never_stopped(
        self, tiny_cfg, tiny_model, make_video, tmp_path
    ):
        """The whole video is seen at the start, however soon the run stops."""
        video = make_video(num_frames=5)
        expected = self.numbers(self.build(tiny_cfg, copy.deepcopy(tiny_model)).run(video))
        stopped = self.build(tiny_cfg, copy.deepcopy(tiny_model))
        stopped.start_video("a", video)
        before = self.numbers(map(stopped.step, video[:2]))
        torch.save(stopped.state_dict(), tmp_path / "state.pth")
        resumed = self.build(tiny_cfg, tiny_model)
        resumed.load_state_dict(torch.load(tmp_path / "state.pth", weights_only=True))
        self.assert_equal(before + self.numbers(map(resumed.step, video[2:])), expected)

    def test_does_not_predict_before_it_has_trained(self, runner, make_video):
        (frame,) = make_video(num_frames=1)
        with pytest.raises(RuntimeError, match="must watch the video before it predicts"):
            runner.adapter.predict(frame)
        list(runner.run(make_video()))
        runner.adapter.predict(frame)
        runner.adapter.reset()
        with pytest.raises(RuntimeError, match="must watch the video before it predicts"):
            runner.adapter.predict(frame)

    def test_first_prediction_is_by_the_last_weights(self, runner, tiny_model, make_video):
        seen = []
        for _ in runner.run(make_video()):
            seen.append(self.state(tiny_model))
        for name in seen[0]:
            assert torch.equal(seen[0][name], seen[-1][name])

    def test_a_live_stream_is_refused(self, runner, make_video):
        with pytest.raises(UserError, match="whole video before its first prediction"):
            list(runner.run(iter(make_video())))
        with pytest.raises(UserError, match="whole video before its first prediction"):
            runner.step(make_video("b")[0])


class TestOfflineTTTMAE(OfflineContract):
    method = "offline_ttt_mae"


@pytest.mark.slow
class TestOfflineTTTMAEOracle(OfflineContract):
    method = "offline_ttt_mae_oracle"

    @pytest.fixture
    def make_video(self, make_video, tmp_path):
        """With random labels."""

        def make(video_id="a", num_frames=3, height=64, width=96):
            video = make_video(video_id, num_frames, height, width)
            rng = np.random.default_rng(0)
            for frame in video:
                file = tmp_path / f"{video_id}_{frame['frame_index']}_{height}.png"
                Image.fromarray(rng.integers(0, 19, (height, width), np.uint8)).save(file)
                frame["sem_seg_file_name"] = str(file)
            return video

        return make

    def test_one_result_per_frame_in_order_of_the_original_size(self, runner, make_video):
        results = list(runner.run(make_video(num_frames=4)))
        assert [r.frame["frame_index"] for r in results] == [0, 1, 2, 3]

    def test_labels_are_not_seen(self, runner, make_video):
        """They are: that is what it is for."""
        with pytest.raises(UserError, match="has no labels"):
            list(runner.run([{k: v for k, v in f.items() if "sem" not in k} for f in make_video()]))


@pytest.mark.slow  # the code of rows above, in one another
class TestMajorityVoteOverOnlineTTTMAE(AdapterContract):
    method = "majority_vote"
    settings = (
        "TTT.ENSEMBLE.METHOD", "online_ttt_mae",
        "TTT.ENSEMBLE.PREDICTIONS", 2,
        "TTT.ENSEMBLE.SCALE_RANGE", "[0.5, 1.2]",
    )  # fmt: skip
    counterpart = ("TTT.ENSEMBLE.METHOD", "none")


@pytest.mark.slow
class TestTemporalSmoothingOverOnlineTTTMAE(AdapterContract):
    method = "temporal_smoothing"
    settings = ("TTT.ENSEMBLE.METHOD", "online_ttt_mae", "TTT.ENSEMBLE.WINDOW_SIZE", 2)
    counterpart = ("TTT.ENSEMBLE.METHOD", "none")


class OfThreeTasks:
    """The tiny model with panoptic and instance inference, at thresholds for random weights."""

    outputs = frozenset({"sem_seg", "panoptic_seg", "instances"})

    @pytest.fixture
    def tiny_cfg(self, tiny_cfg):
        name = "_test_methods_things"
        MetadataCatalog.get(name).thing_dataset_id_to_contiguous_id = {i: i for i in range(11, 19)}
        tiny_cfg.merge_from_list(
            [
                "DATASETS.TRAIN", (name,),
                "MODEL.MASK_FORMER.TEST.INSTANCE_ON", True,
                "MODEL.MASK_FORMER.TEST.PANOPTIC_ON", True,
                "MODEL.MASK_FORMER.TEST.SEMANTIC_ON", "sem_seg" in self.outputs,
                "MODEL.MASK_FORMER.TEST.OBJECT_MASK_THRESHOLD", 0.0,
                "MODEL.MASK_FORMER.TEST.OVERLAP_THRESHOLD", 0.0,
                "TEST.DETECTIONS_PER_IMAGE", 30,
            ]
        )  # fmt: skip
        yield tiny_cfg
        MetadataCatalog.remove(name)

    @pytest.fixture
    def tiny_model(self, tiny_cfg):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return build_model(tiny_cfg).eval()

    def test_there_is_something_of_every_task(self, runner, make_video):
        for result in runner.run(make_video()):
            ids, segments = result.output["panoptic_seg"]
            assert segments
            assert set(ids.unique().tolist()) - {0} == {s["id"] for s in segments}
            assert len(result.output["instances"])


class TestOnlineTTTMAEOfThreeTasks(OfThreeTasks, TestOnlineTTTMAE):
    pass


@pytest.mark.slow  # the code of another row, with other outputs
class TestTentClassBalanceOfTwoTasks(OfThreeTasks, TestTentClassBalance):
    outputs = frozenset({"panoptic_seg", "instances"})

    def test_counts_the_classes_of_segments_where_pixels_have_no_scores(self, runner, make_video):
        for result in runner.run(make_video()):
            classes = {s["category_id"] for s in result.output["panoptic_seg"][1]}
            assert result.record["predicted_classes"] == len(classes)
