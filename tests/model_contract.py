"""The contract of all models. A model's test class inherits these and has a fixture ``model``."""

from __future__ import annotations

import copy
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from ttt_video.errors import UserError
from ttt_video.modeling.interface import adaptable, drop_part, is_within, parts_of


def image(height: int, width: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (3, height, width), dtype=torch.uint8, generator=generator)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def moved_by(model: nn.Module, loss: Tensor) -> set[str]:
    """The roles of the parts that a loss has a gradient for."""
    model.zero_grad()
    loss.backward()
    found = set()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and parameter.grad.any():
            roles = {role for role, part in parts_of(model).items() if is_within(name, part)}
            assert roles, f"{name} is in no part"
            found |= roles
    return found


class ModelContract:
    """Of a model in eval mode that predicts."""

    size: ClassVar[tuple[int, int]] = (64, 96)
    other_size: ClassVar[tuple[int, int]] = (48, 64)
    """Height and width of images; equal where the model takes one size alone."""

    @staticmethod
    def check(output: dict[str, Any], keys: frozenset[str], height: int, width: int) -> None:
        assert output.keys() == keys
        maps = []
        if "image_class" in output:
            assert output["image_class"].dim() == 1
            assert torch.isfinite(output["image_class"]).all()
        if "sem_seg" in output:
            maps.append(output["sem_seg"])
        if "color" in output:
            maps.append(output["color"])
        if "panoptic_seg" in output:
            maps.append(output["panoptic_seg"][0])
        if "instances" in output:
            maps.append(output["instances"].pred_masks)
        for map_ in maps:
            assert map_.shape[-2:] == (height, width)
            assert torch.isfinite(map_).all()

    def test_parts_are_different_submodules_with_parameters(self, model):
        assert {"f", "h"} <= model.parts.keys() <= {"f", "g", "h"}
        parameters = dict(model.named_parameters())
        owned = [
            {id(p) for name, p in parameters.items() if is_within(name, part)}
            for part in parts_of(model).values()
        ]
        assert all(owned)
        assert sum(map(len, owned)) == len(set.union(*owned))

    def test_device_is_where_the_parameters_are(self, model):
        assert {p.device for p in model.parameters()} == {model.device}

    @torch.no_grad()
    def test_predictions_have_the_size_that_is_asked_for(self, model):
        before = copy.deepcopy(model.state_dict())
        first = {"image": image(*self.size), "height": 31, "width": 50}
        inputs = [first, {"image": image(*self.other_size, 1)}]
        for output, size in zip(model(inputs), [(31, 50), self.other_size], strict=True):
            self.check(output, model.outputs, *size)
        after = model.state_dict()
        assert all(torch.equal(before[name], after[name]) for name in before)

    @torch.no_grad()
    def test_an_image_is_predicted_as_it_is_alone(self, model):
        inputs = [{"image": image(*self.size, seed)} for seed in range(2)]
        for x, output in zip(inputs, model(inputs), strict=True):
            (alone,) = model([x])
            for key in output.keys() & {"sem_seg", "image_class"}:
                torch.testing.assert_close(output[key], alone[key], rtol=1e-4, atol=1e-5)

    @torch.no_grad()
    def test_a_copy_shares_nothing(self, model):
        before = copy.deepcopy(model.state_dict())
        for parameter in copy.deepcopy(model).parameters():
            parameter.zero_()
        after = model.state_dict()
        assert all(torch.equal(before[name], after[name]) for name in before)


class FrozenModelContract(ModelContract):
    """Of a model that methods which train refuse."""

    def test_it_is_not_adaptable(self, model):
        with pytest.raises(UserError, match="which runs frozen: use --method none"):
            adaptable(model)


class AdaptableModelContract(ModelContract):
    """Of a model in eval mode that gradient methods train."""

    def test_it_is_adaptable(self, model):
        assert adaptable(model) is model

    def test_reconstruction_moves_f_and_g_and_the_main_task_f_and_h(self, model):
        model.requires_grad_(True)
        samples = [{"image": image(*self.size)}]
        losses = model.reconstruction_losses(samples, seeded())
        assert all(name.startswith("loss_") and v.shape == () for name, v in losses.items())
        assert moved_by(model, sum(losses.values())) == {"f", "g"}
        task = model.main_task(samples)
        assert moved_by(model, task.mean(-task.pixels.classes[:, 0])) == {"f", "h"}

    @torch.no_grad()
    def test_the_generator_alone_decides_the_masks(self, model):
        def loss(seed: int) -> float:
            losses = model.reconstruction_losses([{"image": image(*self.size)}], seeded(seed))
            return float(sum(losses.values()))

        state = torch.get_rng_state()
        assert loss(0) == loss(0) != loss(1)
        assert torch.equal(torch.get_rng_state(), state)

    @torch.no_grad()
    def test_a_given_mask_is_used_and_nothing_is_drawn(self, model):
        mask = torch.ones(1, *self.size)
        mask[:, : self.size[0] // 2] = 0
        generator = seeded()
        sample = {"image": image(*self.size), "image_mask": mask}
        first, second = (model.reconstruction_losses([sample], generator) for _ in range(2))
        assert first == second
        assert torch.equal(generator.get_state(), seeded().get_state())
        assert model.reconstruction_losses([{**sample, "image_mask": 1 - mask}]) != first

    @torch.no_grad()
    def test_the_loss_of_a_batch_is_the_mean_of_its_samples(self, model):
        masks = [model.masks.draw(*self.size, seeded(seed)) for seed in range(2)]
        samples = [
            {"image": image(*self.size, i), "image_mask": mask} for i, mask in enumerate(masks)
        ]
        alone = [sum(model.reconstruction_losses([x]).values()) for x in samples]
        together = sum(model.reconstruction_losses(samples).values())
        torch.testing.assert_close(together, torch.stack(alone).mean(), rtol=1e-4, atol=1e-5)

    @torch.no_grad()
    def test_f_sees_neither_hidden_pixels_nor_labels(self, model):
        visible = model.masks.draw(*self.size, seeded())[None]
        pixels = model.normalize([{"image": image(*self.size), "sem_seg": None}]).tensor
        other = torch.where(visible.bool(), pixels, pixels + 1)
        seen, again = model.encode(pixels, visible), model.encode(other, visible)
        maps = seen.items() if isinstance(seen, dict) else [(..., seen)]
        assert all(torch.equal(map_, again[key]) for key, map_ in maps)

    @torch.no_grad()
    def test_the_main_task_is_a_distribution_at_every_pixel(self, model):
        samples = [{"image": image(*self.size)}, {"image": image(*self.other_size, 1)}]
        pixels, inside = model.main_task(samples)
        assert pixels.classes.shape == (2, pixels.classes.shape[1], *inside.shape[1:])
        torch.testing.assert_close(pixels.classes.exp().sum(1), torch.ones_like(inside))
        either = pixels.something.exp() + pixels.nothing.exp()
        torch.testing.assert_close(either, torch.ones_like(inside))
        assert inside[0].all()
        padded = self.other_size != self.size
        assert 0 < inside[1].mean() <= 1
        assert (inside[1].mean() < 1) == padded
        masked = model.main_task(samples, mask_with=seeded()).pixels
        assert not torch.equal(masked.classes, pixels.classes)
        again = model.main_task(samples, mask_with=seeded()).pixels
        assert torch.equal(masked.classes, again.classes)

    @torch.no_grad()
    def test_without_the_decoder_it_predicts_the_same(self, model):
        bare = copy.deepcopy(model)
        drop_part(bare, "g")
        assert bare.parts.keys() == {"f", "h"}
        assert model.parts.keys() == {"f", "g", "h"}
        g = parts_of(model)["g"]
        assert not any(is_within(name, g) for name in bare.state_dict())
        x = [{"image": image(*self.size)}]
        for output, expected in zip(bare(x), model(x), strict=True):
            for key in output.keys() & {"sem_seg", "image_class"}:
                assert torch.equal(output[key], expected[key])
