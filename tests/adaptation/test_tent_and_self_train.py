"""Tent, self-training and class balance on a real, tiny model."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from gradient_settings import grouped
from torch import nn

from ttt_video.adaptation import ClassBalance, RandomCrop, SlidingWindow
from ttt_video.adaptation.base import build_adapter
from ttt_video.adaptation.self_train import SelfTrainAdapter
from ttt_video.adaptation.tent import EntropyAdapter
from ttt_video.config import merge_method
from ttt_video.errors import UserError

SETTINGS = {"lr": 0.05, "batch_size": 2, "micro_batch_size": 2, "augment": RandomCrop()}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def window_of(video) -> SlidingWindow:
    window = SlidingWindow(None)
    for frame in video:
        window.push(frame)
    return window


def tent_of(model: nn.Module, **settings) -> EntropyAdapter:
    settings = {"parameters": "norm", "sampling": "without_replacement", **settings}
    return EntropyAdapter(model, **grouped(**{**SETTINGS, **settings}))


def self_train_of(model: nn.Module, threshold: float = 0.0, **settings) -> SelfTrainAdapter:
    return SelfTrainAdapter(model, threshold=threshold, **grouped(**{**SETTINGS, **settings}))


def predicts(model, *tasks: str) -> None:
    on = {task: task in tasks for task in ("semantic", "instance", "panoptic")}
    model.postprocess = replace(model.postprocess, **on)


# ---- Tent


@pytest.mark.parametrize("task", ["semantic", "instance", "panoptic"])
def test_tent_lowers_the_entropy_of_the_frames_it_sees(tiny_model, make_video, task):
    predicts(tiny_model, task)
    adapter, window = tent_of(tiny_model, name="ADAMW"), window_of(make_video(num_frames=2))
    losses = [adapter.adapt(window, seeded(i))["loss_entropy"] for i in range(6)]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0] - 0.04


def test_tents_loss_is_the_entropy_of_the_predicted_scores(tiny_model, make_video):
    """At the stride of the mask logits, where no resizing comes in between."""
    video = make_video(num_frames=2)
    with torch.no_grad():
        scores = []
        for frame in video:
            images = tiny_model.normalize([frame])
            out = tiny_model.sem_seg_head(tiny_model.encode(images.tensor))[-1]
            probs, masks = out["pred_logits"][0].softmax(-1)[:, :-1], out["pred_masks"][0].sigmoid()
            scores.append(torch.einsum("qk,qhw->khw", probs, masks))
    p = torch.stack(scores)
    p = p / p.sum(1, keepdim=True)
    expected = torch.special.entr(p).sum(1).mean().item()
    record = tent_of(tiny_model).adapt(window_of(video), seeded())
    assert record["loss_entropy"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("task", ["instance", "panoptic"])
def test_pixels_may_be_nothing_also_where_semantic_outputs_are_on_too(tiny_model, make_video, task):
    losses = []
    for tasks in (("semantic",), ("semantic", task), (task,)):
        predicts(tiny_model, *tasks)
        adapter = tent_of(copy.deepcopy(tiny_model), lr=0.0)
        losses.append(adapter.adapt(window_of(make_video()), seeded())["loss_entropy"])
    semantic, both, objects = losses
    assert both == objects != semantic


def test_frozen_heads_cost_no_gradient_of_their_own(tiny_model, make_video):
    adapter = tent_of(tiny_model)
    grads = []
    adapter.optimizer.register_step_pre_hook(
        lambda *_: grads.append({n for n, p in tiny_model.named_parameters() if p.grad is not None})
    )
    adapter.adapt(window_of(make_video()), seeded())
    wanting = {n for n, p in tiny_model.named_parameters() if p.requires_grad}
    assert grads == [wanting]
    assert all(name.startswith("backbone") and "norm" in name for name in wanting)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_whole_backbone_and_low_precision(tiny_model, make_video, precision):
    adapter = tent_of(tiny_model, parameters="all", precision=precision)
    window = window_of(make_video(num_frames=2))
    losses = [adapter.adapt(window, seeded(i))["loss_entropy"] for i in range(4)]
    assert losses[-1] < losses[0]


def test_modules_that_the_loss_does_not_depend_on_are_refused(tiny_model):
    with pytest.raises(UserError, match=r"TTT\.MODULES names 'recon_head'.*backbone, sem_seg_head"):
        tent_of(tiny_model, modules=("recon_head",))
    with pytest.raises(UserError, match=r"'backbone\.layers\.9'.*the model's parts are backbone"):
        tent_of(tiny_model, modules=("backbone.layers.9",))


def test_stages_alone_move(tiny_model, make_video):
    before = {k: v.clone() for k, v in tiny_model.state_dict().items()}
    adapter = tent_of(tiny_model, modules=("backbone.layers.2", "backbone.norm3"), parameters="all")
    adapter.adapt(window_of(make_video()), seeded())
    moved = {k for k, v in tiny_model.state_dict().items() if not torch.equal(v, before[k])}
    assert moved
    assert all(name.startswith(("backbone.layers.2.", "backbone.norm3.")) for name in moved)


# ---- self-training


def test_self_trainings_loss_by_hand(tiny_model, make_video):
    """Labels of the whole frame, cross-entropy of the masked one, over confident pixels."""
    video = make_video(num_frames=1)
    reference = copy.deepcopy(tiny_model)
    with torch.no_grad():
        teacher = reference.main_task(video).pixels
        joint = (teacher.classes + teacher.something[:, None]).exp()
        threshold = joint.amax(1).median().item()  # about half of the pixels
        confidence, labels = joint.max(1)
        mask_draws = seeded()
        torch.randperm(1, generator=mask_draws)  # which frames are in the batch
        student = reference.main_task(video, mask_with=mask_draws).pixels
        wrong = -(student.classes + student.something[:, None]).gather(1, labels[:, None])[:, 0]
        chosen = confidence > threshold
        expected = wrong[chosen].mean().item()
    adapter = self_train_of(
        tiny_model, threshold=threshold, batch_size=1, sampling="without_replacement"
    )
    record = adapter.adapt(window_of(video), seeded())
    assert record["confident"] == pytest.approx(chosen.float().mean().item())
    assert 0.2 < record["confident"] < 0.8
    assert record["loss_self_train"] == pytest.approx(expected, rel=1e-4)


def test_self_training_lowers_its_loss(tiny_model, make_video):
    adapter, window = self_train_of(tiny_model), window_of(make_video(num_frames=1))
    losses = [adapter.adapt(window, seeded())["loss_self_train"] for _ in range(6)]
    assert losses[-1] < losses[0]


def test_labels_are_made_in_eval_mode_also_when_the_step_is_not(tiny_model, make_video):
    modes = []
    tiny_model.backbone.register_forward_pre_hook(lambda m, x: modes.append(m.training))
    self_train_of(tiny_model, mode="train").adapt(window_of(make_video()), seeded())
    assert modes == [False, True]


@pytest.mark.parametrize("method", ["self_train", "self_train_class_balance"])
@pytest.mark.parametrize("task", ["instance", "panoptic"])
def test_refused_without_a_confidence_per_pixel(tiny_cfg, tiny_model, method, task):
    predicts(tiny_model, "semantic", task)
    merge_method(tiny_cfg, method)
    with pytest.raises(UserError, match="needs a confidence for each pixel") as error:
        build_adapter(tiny_cfg, tiny_model)
    assert "\n" not in str(error.value)


# ---- class balance


class Saying(nn.Module):
    """Predicts as many classes as its weight says."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        super().__init__()
        self.count = nn.Parameter(torch.tensor(6.0))

    def forward(self, batch):
        scores = torch.zeros(8, 1, 8)
        for pixel in range(8):
            scores[min(pixel, round(self.count.item()) - 1), 0, pixel] = 1
        return [{"sem_seg": scores} for _ in batch]


class Collapsing(EntropyAdapter):
    """Loses a class with every step."""

    def losses(self, batch, generator):
        return {"loss_entropy": self.model.count}


@pytest.fixture
def saying(monkeypatch) -> ClassBalance:
    model = Saying()
    monkeypatch.setattr(Collapsing, "parts", ())
    inner = Collapsing(model, modules=("",), augment=RandomCrop(), **grouped(lr=1.0, batch_size=1))
    return ClassBalance(inner, threshold=2)


def test_class_balance_resets_when_too_many_classes_are_gone(saying, make_video):
    frames, window, random = make_video(num_frames=7), SlidingWindow(1), seeded()
    history = []
    for frame in frames:
        sample = window.push(frame)
        record = saying.adapt(window, random)
        output = saying.predict(sample)["sem_seg"].argmax(0).unique().numel()
        history.append((record["predicted_classes"], record["class_balance_resets"], output))
        assert record["source_classes"] == 6
    # One class less per frame; three less is too many, and such a frame is predicted by the source.
    assert history == [(5, 0, 5), (4, 0, 4), (3, 1, 6)] * 2 + [(5, 0, 5)]


def test_the_prediction_of_a_frame_is_made_once(saying, make_video):
    window = SlidingWindow(1)
    sample = window.push(make_video(num_frames=1)[0])
    calls = []
    saying.model.register_forward_hook(lambda *_: calls.append(1))
    saying.adapt(window, seeded())
    first = saying.predict(sample)["sem_seg"]
    assert len(calls) == 2  # the method's and the source's
    assert torch.equal(saying.predict(sample)["sem_seg"], first)  # by the weights, as ever
    assert len(calls) == 3


def test_the_sources_prediction_is_the_frozen_models(tiny_model, make_video):
    frozen = copy.deepcopy(tiny_model)
    adapter, video = tent_of(tiny_model, parameters="all"), make_video()
    adapter.adapt(window_of(video), seeded())
    before = {k: v.clone() for k, v in tiny_model.state_dict().items()}
    with torch.no_grad():
        expected = frozen([video[0]])[0]["sem_seg"]
    assert torch.equal(adapter.predict_source(video[0])["sem_seg"], expected)
    assert not torch.equal(adapter.predict(video[0])["sem_seg"], expected)
    assert all(torch.equal(v, before[k]) for k, v in tiny_model.state_dict().items())
