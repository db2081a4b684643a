"""Online TTT-MAE on a real, tiny model: Equation 2 of the paper, step by step."""

from __future__ import annotations

import copy
from statistics import median

import pytest
import torch
from gradient_settings import grouped
from torch import nn

from ttt_video.adaptation import RandomCrop, ReconstructionAdapter, SlidingWindow
from ttt_video.adaptation.snapshot import knows_nothing
from ttt_video.config import merge_preset
from ttt_video.modeling.masking import PatchMasks
from ttt_video.modeling.reconstruction import ReconstructionTask
from ttt_video.stream import Stream


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def adapter_of(model: nn.Module, **settings) -> ReconstructionAdapter:
    settings = {"lr": 0.1, "batch_size": 4, "micro_batch_size": 4, **settings}
    return ReconstructionAdapter(
        model, augment=settings.pop("augment", RandomCrop()), **grouped(**settings)
    )


def window_of(video, size: int | None = None) -> SlidingWindow:
    window = SlidingWindow(size)
    for frame in video:
        window.push(frame)
    return window


@pytest.fixture
def inputs_seen(tiny_model, monkeypatch):
    """What reaches ``reconstruction_losses``, and the visibility channel that f sees."""
    seen = {"inputs": [], "visible": []}
    original = tiny_model.reconstruction_losses

    def record(batched_inputs, generator=None):
        seen["inputs"].append(batched_inputs)
        return original(batched_inputs, generator)

    monkeypatch.setattr(tiny_model, "reconstruction_losses", record)
    tiny_model.backbone.register_forward_pre_hook(
        lambda module, args: seen["visible"].append(args[0][:, 3].clone())
    )
    return seen


def test_step_is_sgd_on_the_reconstruction_loss(tiny_model, make_video, inputs_seen):
    source = copy.deepcopy(tiny_model)
    record = adapter_of(tiny_model).adapt(window_of(make_video()), seeded())

    # The same masks, drawn anew, and autograd on a copy.
    (inputs,), (visible,) = inputs_seen["inputs"], inputs_seen["visible"]
    source.requires_grad_(True)
    masked = [{**x, "image_mask": v[None]} for x, v in zip(inputs, visible, strict=True)]
    loss = type(source).reconstruction_losses(source, masked)["loss_recon"]
    loss.backward()
    assert record["loss_recon"] == pytest.approx(loss.item(), rel=1e-5)
    after = dict(tiny_model.named_parameters())
    largest = 0.0
    for name, parameter in source.named_parameters():
        if name.startswith("sem_seg_head"):
            assert parameter.grad is None  # h has no part in l_s
            expected = parameter
        else:
            expected = parameter - 0.1 * parameter.grad
            largest = max(largest, float(parameter.grad.abs().max()))
        torch.testing.assert_close(after[name].data, expected.data, atol=1e-5, rtol=1e-4)
    assert largest > 1e-2


def test_f_and_g_move_and_h_stays(tiny_model, make_video):
    before = {k: v.clone() for k, v in tiny_model.state_dict().items()}
    adapter_of(tiny_model).adapt(window_of(make_video()), seeded())
    moved = {k for k, v in tiny_model.state_dict().items() if not torch.equal(v, before[k])}
    assert {name.split(".")[0] for name in moved} == {"backbone", "recon_head"}
    parts = {"recon_head.pixel_decoder", "recon_head.predictor", "backbone.layers"}
    assert parts <= {".".join(name.split(".")[:2]) for name in moved}
    assert not any(p.requires_grad for p in tiny_model.sem_seg_head.parameters())


def test_steps_lower_the_loss_of_the_frame_they_are_taken_on(tiny_model, make_video):
    """By as much as the gradient says, to first order: the rate times its squared norm.

    The median of some frames: the loss jumps where a small step changes a mask of the decoder's
    attention.
    """
    rate = 1e-5
    adapter = adapter_of(tiny_model, lr=rate)
    ratios = []
    for video in "abcde":
        adapter.reset()
        window = window_of(make_video(video, num_frames=1))
        # The same frame and, from the same seed, the same masks.
        before, after = (adapter.adapt(window, seeded(5)) for _ in range(2))
        decrease = before["loss_recon"] - after["loss_recon"]
        ratios.append(decrease / (rate * before["grad_norm"] ** 2))
    assert median(ratios) == pytest.approx(1, abs=0.2)


def test_every_sample_has_a_mask_of_its_own(tiny_model, make_video, inputs_seen):
    adapter = adapter_of(tiny_model, batch_size=6, micro_batch_size=4)
    adapter.adapt(window_of(make_video(num_frames=1)), seeded(0))
    adapter.adapt(window_of(make_video(num_frames=1)), seeded(1))
    masks = torch.cat(inputs_seen["visible"])
    assert masks.shape == (12, 64, 96)
    assert len({mask.numpy().tobytes() for mask in masks}) == 12
    patches = masks.view(12, 4, 16, 6, 16)
    assert torch.equal(patches.amax((2, 4)), patches.amin((2, 4)))  # whole patches of 16 px
    assert (patches.amax((2, 4)).sum((1, 2)) == 4).all()  # int(24 * 0.2) visible


@pytest.mark.parametrize(
    ("micro_batch_size", "height", "width"),
    [
        (1, 64, 96),
        (2, 64, 96),
        (3, 64, 96),
        # Padded, so that samples differ in the number of masked pixels that count.
        (3, 50, 70),
    ],
)
def test_micro_batches_take_the_step_of_the_whole_batch(
    tiny_model, make_video, micro_batch_size, height, width
):
    parts = copy.deepcopy(tiny_model)
    window = window_of(make_video(height=height, width=width))
    expected = adapter_of(tiny_model).adapt(window, seeded())
    record = adapter_of(parts, micro_batch_size=micro_batch_size).adapt(window, seeded())
    assert record == pytest.approx(expected, rel=1e-4)
    ours = dict(parts.named_parameters())
    for name, parameter in tiny_model.named_parameters():
        torch.testing.assert_close(ours[name], parameter, atol=2e-5, rtol=1e-4)


def test_crops_reach_the_model_as_slices_of_the_window(tiny_model, make_video, inputs_seen):
    video = make_video()
    adapter = adapter_of(tiny_model, augment=RandomCrop(size=(32, 64)), batch_size=6)
    adapter.adapt(window_of(video), seeded())
    inputs = [x for batch in inputs_seen["inputs"] for x in batch]
    assert len(inputs) == 6
    for x in inputs:
        assert set(x) == {"image"}
        places = [
            (index, top, left)
            for index, frame in enumerate(video)
            for top in range(64 - 32 + 1)
            for left in range(96 - 64 + 1)
            if torch.equal(frame["image"][:, top : top + 32, left : left + 64], x["image"])
        ]
        assert len(places) == 1
    assert len({x["image"].numpy().tobytes() for x in inputs}) == 6


@pytest.mark.parametrize("preset", ["paper", "release"])
def test_published_presets_take_a_step(tiny_cfg, tiny_model, make_video, preset):
    merge_preset(tiny_cfg, preset)
    tiny_cfg.merge_from_list(["TTT.PRECISION", "fp32", "TTT.BATCH_SIZE", 4])
    tiny_model.masks = PatchMasks.from_config(tiny_cfg)
    tiny_model.reconstruction = ReconstructionTask.from_config(tiny_cfg)
    runner = Stream.from_config(tiny_cfg, tiny_model)
    before = {k: v.clone() for k, v in tiny_model.state_dict().items()}
    (result,) = runner.run(make_video(num_frames=1))
    assert result.record["skipped_steps"] == 0
    adapter = runner.adapter
    moved = {k for k, v in tiny_model.state_dict().items() if not torch.equal(v, before[k])}
    assert {name.split(".")[0] for name in moved} == {"backbone", "recon_head"}
    assert runner.window.size == 16
    if preset == "paper":
        assert type(adapter.optimizer) is torch.optim.SGD
        assert adapter.step.sampling == "with_replacement"
        assert not adapter.training_step
    else:
        assert type(adapter.optimizer) is torch.optim.AdamW
        assert adapter.step.sampling == "shuffled_epochs"
        assert adapter.training_step
        assert knows_nothing(adapter.optimizer)  # rebuilt after every frame
        assert {g["lr"] for g in adapter.optimizer.param_groups} == {1e-4, 1e-5}
        assert {g["weight_decay"] for g in adapter.optimizer.param_groups} == {0.0, 0.05}


@pytest.mark.parametrize("settings", [{}, {"name": "ADAMW", "weight_decay": 0.1}])
@pytest.mark.parametrize("step_mode", ["train", "eval"])
def test_zero_learning_rate_moves_nothing(tiny_model, make_video, settings, step_mode):
    before = {k: v.clone() for k, v in tiny_model.state_dict().items()}
    adapter = adapter_of(tiny_model, lr=0.0, mode=step_mode, **settings)
    for _ in range(2):
        assert adapter.adapt(window_of(make_video()), seeded())["grad_norm"] > 0
    after = tiny_model.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_prediction_does_not_depend_on_g(tiny_model, make_video):
    adapter = adapter_of(tiny_model)
    (frame,) = make_video(num_frames=1)
    before = adapter.predict(frame)["sem_seg"]
    with torch.no_grad():
        for parameter in tiny_model.recon_head.parameters():
            parameter.zero_()
    assert torch.equal(adapter.predict(frame)["sem_seg"], before)
