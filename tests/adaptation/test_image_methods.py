"""Methods on a ViTMAE: those that run keep the contract, and the published loop is what they do."""

from __future__ import annotations

import copy
from functools import cache

import pytest
import test_methods
import torch
from contract import AdapterContract
from detectron2.modeling import build_model
from model_contract import image, seeded
from tiny import TINY_VIT, VIT_SIDE
from torch import Tensor, nn

from ttt_video.adaptation import SlidingWindow, build_adapter
from ttt_video.config import load_config
from ttt_video.errors import UserError
from ttt_video.modeling.interface import is_within
from ttt_video.modeling.masking import patchify

source_statistics = test_methods.source_statistics  # the fixture that tests there are run with


@cache
def built(*opts: str) -> nn.Module:
    """Builds a model of random weights that tells images apart."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build_model(load_config("Base-ViTMAE.yaml", opts=[*TINY_VIT, *opts])).eval()


class OfImages:
    """A tiny ViTMAE and images of its size."""

    outputs = frozenset({"image_class"})
    frozen = ("classifier", "decoder")

    @pytest.fixture
    def tiny_cfg(self):
        opts = [*TINY_VIT, "TTT.STEPS_PER_FRAME", "2", "TTT.OPTIMIZER.BASE_LR", "0.05"]
        return load_config("Base-ViTMAE.yaml", opts=opts, method=self.method)

    @pytest.fixture
    def tiny_model(self):
        return copy.deepcopy(built())

    @pytest.fixture
    def make_video(self, make_video):
        def make(video_id="a", num_frames=3, height=0, width=0):
            return make_video(video_id, num_frames, VIT_SIDE, VIT_SIDE)

        return make


class TestNoAdaptation(OfImages, AdapterContract):
    method = "none"
    adapts = False


class TestOnlineTTTMAE(OfImages, AdapterContract):
    method = "online_ttt_mae"


class TestNoMemory(OfImages, AdapterContract):
    method = "ttt_mae_no_memory"


class TestTent(OfImages, AdapterContract):
    method = "tent"
    random = False

    def test_the_loss_is_the_entropy_of_the_classes(self, runner, tiny_model, make_video):
        frame = make_video()[0]
        logits = tiny_model([frame])[0]["image_class"].detach()
        expected = torch.distributions.Categorical(logits=logits).entropy().item()
        record = runner.adapter.take_steps(1, window_of(frame), seeded())
        assert record["loss_entropy"] == pytest.approx(expected, rel=1e-5)


class TestSelfTrain(OfImages, AdapterContract):
    method = "self_train"
    settings = ("TTT.SELF_TRAIN.THRESHOLD", 0.1)


@pytest.mark.usefixtures("source_statistics")
class TestLNAdapt(OfImages, AdapterContract):
    method = "ln_adapt"
    random = False
    still = ("TTT.LN_ADAPT.PRIOR", float("inf"))


def window_of(frame: dict) -> SlidingWindow:
    window = SlidingWindow(1)
    window.push(frame)
    return window


def adapter_of(model: nn.Module, *opts: str, method: str = "ttt_mae_no_memory"):
    cfg = load_config("Base-ViTMAE.yaml", opts=[*TINY_VIT, *opts], method=method)
    return build_adapter(cfg, model)


class Recording:
    """Keeps the masks that another draws."""

    def __init__(self, masks):
        self._masks, self.drawn = masks, []

    def __getattr__(self, name):
        return getattr(self._masks, name)

    def of_batch(self, *arguments):
        self.drawn.append(self._masks.of_batch(*arguments))
        return self.drawn[-1]


def loss_by_hand(model: nn.Module, pixels: Tensor, visible: Tensor) -> Tensor:
    """The mean over all hidden patches of all copies, one copy at a time."""
    errors = []
    for x, shown in zip(pixels[:, None], visible[:, None], strict=True):
        drawn = patchify(model.decode(model.encode(x, shown), shown), 8)[0]
        target = patchify(x, 8)[0]
        target = (target - target.mean(1, keepdim=True)) / (
            target.var(1, keepdim=True) + 1e-6
        ).sqrt()
        hidden = patchify(shown, 8)[0, :, 0] == 0
        errors += [*(drawn - target).square().mean(1)[hidden]]
    return torch.stack(errors).mean()


def test_the_published_loop_by_hand():
    """SGD with momentum on everything but decoder and head, from one image's copies."""
    model, plain = copy.deepcopy(built()), copy.deepcopy(built())
    model.masks = Recording(model.masks)
    frame = {"image": image(VIT_SIDE, VIT_SIDE), "video_id": "a", "frame_index": 0}
    adapter = adapter_of(model, "TTT.STEPS_PER_FRAME", "3", "TTT.MICRO_BATCH_SIZE", "2")
    assert adapter.optimizer.param_groups[0]["lr"] == 5e-3
    record = adapter.adapt(window_of(frame), seeded())

    plain.requires_grad_(True)
    moving = {n: p for n, p in plain.named_parameters() if not n.startswith(("dec", "class"))}
    velocity = {name: torch.zeros_like(p) for name, p in moving.items()}
    losses = []
    for step in range(3):
        masks = torch.cat(model.masks.drawn[2 * step : 2 * step + 2])
        pixels = plain.normalize([frame] * 4).tensor
        loss = loss_by_hand(plain, pixels, masks)  # before the update
        losses.append(loss.item())
        for (name, p), grad in zip(
            moving.items(), torch.autograd.grad(loss, [*moving.values()]), strict=True
        ):
            velocity[name] = 0.9 * velocity[name] + grad
            p.data -= 5e-3 * velocity[name]
    assert record["loss_recon"] == pytest.approx(sum(losses) / 3, rel=1e-5)
    moved = model.state_dict()
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(moved[name], value, rtol=1e-4, atol=1e-6, msg=name)
        assert torch.equal(value, built().state_dict()[name]) == (name not in moving)


def test_a_moving_decoder_shows_from_the_second_step_on():
    """The prediction does not see the decoder; the encoder's next gradient does."""
    frame = {"image": image(VIT_SIDE, VIT_SIDE), "video_id": "a", "frame_index": 0}
    for steps, same in (("1", True), ("2", False)):
        found = []
        for modules in ('["f", "mask_token"]', '["f", "g"]'):
            model = copy.deepcopy(built())
            opts = ("TTT.STEPS_PER_FRAME", steps, "TTT.MODULES", modules)
            adapter = adapter_of(model, *opts)
            adapter.adapt(window_of(frame), seeded())
            found.append(adapter.predict(frame)["image_class"])
        assert torch.equal(*found) == same


def test_modules_of_a_part_with_several_names():
    model = copy.deepcopy(built())
    adapter_of(model, "TTT.MODULES", '["f.blocks.1", "cls_token"]')
    moving = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(moving) == 13
    assert all(is_within(name, ["blocks.1", "cls_token"]) for name in moving)
    for wrong in ("f.decoder_blocks", "nowhere", "forward"):
        with pytest.raises(UserError, match=f"TTT.MODULES names '{wrong}'"):
            adapter_of(copy.deepcopy(built()), "TTT.MODULES", f'["{wrong}"]')
    with pytest.raises(UserError, match=r"'mask_token', which the loss .* does not depend on"):
        adapter_of(copy.deepcopy(built()), "TTT.MODULES", '["mask_token"]', method="tent")
    with pytest.raises(UserError, match="nothing to adapt"):
        adapter_of(copy.deepcopy(built()), "TTT.MODULES", '["pos_embed"]')


def test_a_linear_head_is_a_step_s_in_train_mode_what_it_is_in_eval_mode():
    frame = {"image": image(VIT_SIDE, VIT_SIDE), "video_id": "a", "frame_index": 0}
    found = []
    for mode in ("train", "eval"):
        model = copy.deepcopy(built("MODEL.VIT_MAE.HEAD", "linear"))
        opts = ("MODEL.VIT_MAE.HEAD", "linear", "TTT.STEP_MODE", mode)
        adapter = adapter_of(model, *opts, method="tent")
        adapter.adapt(window_of(frame), seeded())
        found.append(adapter.predict(frame)["image_class"])
    assert torch.equal(*found)


@pytest.mark.parametrize("method", ["majority_vote", "temporal_smoothing", "tent_class_balance"])
def test_methods_of_pixels_refuse(method):
    with pytest.raises(UserError, match=f"^{method} needs predictions of pixels or objects"):
        adapter_of(copy.deepcopy(built()), method=method)


def test_a_search_needs_layers_of_the_head_to_compare():
    linear = ("MODEL.VIT_MAE.HEAD", "linear")
    model = copy.deepcopy(built(*linear))
    with pytest.raises(UserError, match="the head has no normalisation layers"):
        adapter_of(model, *linear, method="online_ttt_mae_line_search")


def test_a_step_of_bf16_is_that_of_fp32_but_for_rounding():
    frame = {"image": image(VIT_SIDE, VIT_SIDE), "video_id": "a", "frame_index": 0}
    losses = []
    for precision in ("fp32", "bf16"):
        adapter = adapter_of(copy.deepcopy(built()), "TTT.PRECISION", precision)
        losses.append(adapter.take_steps(1, window_of(frame), seeded())["loss_recon"])
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)
