"""The model as a whole: losses, predictions of the three tasks, reconstruction."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Instances
from model_contract import AdaptableModelContract
from torch import Tensor

from ttt_video import MaskFormerTTT
from ttt_video.modeling import PatchMasks, SwinTransformerTTT
from ttt_video.tasks.outputs import scores_are_finite

CLASSES = 19


def picture(height: int, width: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=generator)


def labelled(height: int = 50, width: int = 70, seed: int = 0) -> dict:
    sem_seg = torch.full((height, width), 255)
    sem_seg[: height // 2] = 3
    sem_seg[height // 2 :, : width // 2] = 18
    return {"image": picture(height, width, seed), "sem_seg": sem_seg}


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def build(cfg: CfgNode, *opts) -> MaskFormerTTT:
    cfg = cfg.clone()
    cfg.merge_from_list(list(opts))
    torch.manual_seed(0)
    return build_model(cfg)


class TestContract(AdaptableModelContract):
    @pytest.fixture
    def model(self, tiny_model):
        return tiny_model


class TestContractOfThreeTasks(AdaptableModelContract):
    @pytest.fixture
    def model(self, three_tasks):
        return three_tasks


# ---- training


def test_losses_of_joint_training(tiny_cfg):
    """One triple per supervised prediction, the last without a suffix, and the reconstruction."""
    model = build(tiny_cfg, "MODEL.MASK_FORMER.DEC_LAYERS", 4)
    losses = model([labelled(), labelled(64, 64, seed=1)])
    kinds = ("loss_ce", "loss_mask", "loss_dice")
    expected = {kind + suffix for kind in kinds for suffix in ("", "_0", "_1", "_2")}
    assert losses.keys() == expected | {"loss_recon"}
    for name, loss in losses.items():
        assert loss.shape == (), name
        assert loss.isfinite(), name
        assert loss > 0, name


def test_without_deep_supervision(tiny_cfg):
    model = build(tiny_cfg, "MODEL.MASK_FORMER.DEEP_SUPERVISION", False)
    assert model([labelled()]).keys() == {"loss_ce", "loss_mask", "loss_dice", "loss_recon"}


def test_weights_of_the_losses(tiny_cfg):
    def losses(*opts):
        model = build(tiny_cfg, "MODEL.SWIN.DROP_PATH_RATE", 0.0, *opts)
        torch.manual_seed(1)
        return model([labelled()])

    once = losses()
    recon = losses("TTT.RECON.WEIGHT", 3.0)
    torch.testing.assert_close(recon["loss_recon"], 3 * once["loss_recon"])
    torch.testing.assert_close(recon["loss_ce"], once["loss_ce"])
    # The weights also steer the matching: all are scaled together, so that it stays the same.
    scaled = losses(
        "MODEL.MASK_FORMER.CLASS_WEIGHT", 4.0,
        "MODEL.MASK_FORMER.MASK_WEIGHT", 10.0,
        "MODEL.MASK_FORMER.DICE_WEIGHT", 10.0,
    )  # fmt: skip
    for name in once.keys() - {"loss_recon"}:
        torch.testing.assert_close(scaled[name], 2 * once[name], msg=name)


def trained_parts(model: MaskFormerTTT, losses: dict[str, Tensor]) -> set[str]:
    sum(losses.values()).backward()
    return {
        name.split(".")[0]
        for name, p in model.named_parameters()
        if p.grad is not None and p.grad.any()
    }


def test_reconstruction_does_not_train_the_main_head(tiny_cfg):
    model = build(tiny_cfg)
    losses = model.reconstruction_losses([{"image": picture(50, 70)}])
    assert trained_parts(model, losses) == {"backbone", "recon_head"}


def test_instances_and_the_same_sem_seg_give_the_same_losses(tiny_cfg):
    model = build(tiny_cfg, "MODEL.SWIN.DROP_PATH_RATE", 0.0)
    x = labelled()
    instances = Instances((50, 70))
    instances.gt_classes = torch.tensor([3, 18])
    instances.gt_masks = BitMasks(torch.stack([x["sem_seg"] == 3, x["sem_seg"] == 18]))
    torch.manual_seed(1)
    expected = model([x])
    torch.manual_seed(1)
    losses = model([{"image": x["image"], "instances": instances}])
    for name, loss in expected.items():
        torch.testing.assert_close(losses[name], loss, msg=name)


def test_an_image_without_any_label_trains(tiny_cfg):
    model = build(tiny_cfg)
    x = labelled()
    x["sem_seg"].fill_(255)
    losses = model([x])
    assert all(loss.isfinite() for loss in losses.values())
    assert losses["loss_mask"] == losses["loss_dice"] == 0
    sum(losses.values()).backward()


# ---- predictions


@pytest.fixture
def things_cfg(tiny_cfg):
    """Trained on a data set whose classes 11 to 18 are things."""
    name = "_test_meta_arch_things"
    MetadataCatalog.get(name).thing_dataset_id_to_contiguous_id = {i + 13: i for i in range(11, 19)}
    tiny_cfg.DATASETS.TRAIN = (name,)
    yield tiny_cfg
    MetadataCatalog.remove(name)


@pytest.fixture
def three_tasks(things_cfg):
    return build(
        things_cfg,
        "MODEL.MASK_FORMER.TEST.INSTANCE_ON", True,
        "MODEL.MASK_FORMER.TEST.PANOPTIC_ON", True,
        "TEST.DETECTIONS_PER_IMAGE", 30,
    ).eval()  # fmt: skip


@pytest.mark.parametrize("size", [(50, 70), (64, 96), (33, 31)], ids=str)
@torch.no_grad()
def test_outputs_of_three_tasks_at_the_original_size(three_tasks, size):
    inputs = [
        {"image": picture(*size), "height": 100, "width": 141},
        {"image": picture(40, 40)},
    ]
    for result, (height, width) in zip(three_tasks(inputs), [(100, 141), (40, 40)], strict=True):
        assert result.keys() == {"sem_seg", "instances", "panoptic_seg", "finite"}
        assert result["sem_seg"].shape == (CLASSES, height, width)
        assert result["sem_seg"].dtype == torch.float32
        assert result["sem_seg"].min() >= 0
        instances = result["instances"]
        assert instances.image_size == (height, width)
        assert instances.pred_masks.shape == (len(instances), height, width)
        assert set(instances.pred_classes.tolist()) <= set(range(11, 19))
        assert ((instances.scores >= 0) & (instances.scores <= 1)).all()
        ids, segments = result["panoptic_seg"]
        assert ids.shape == (height, width)
        assert set(ids.unique().tolist()) - {0} == {s["id"] for s in segments}


@torch.no_grad()
def test_broken_weights_are_seen_in_a_panoptic_map_without_scores(things_cfg):
    opts = ("MODEL.MASK_FORMER.TEST.SEMANTIC_ON", False, "MODEL.MASK_FORMER.TEST.PANOPTIC_ON", True)
    model = build(things_cfg, *opts).eval()
    x = [{"image": picture(50, 70)}]
    assert scores_are_finite(model(x)[0])
    next(model.backbone.parameters()).fill_(float("nan"))
    (output,) = model(x)
    assert output.keys() == {"panoptic_seg", "finite"}
    assert not scores_are_finite(output)


@torch.no_grad()
def test_only_the_outputs_asked_for(things_cfg):
    model = build(
        things_cfg,
        "MODEL.MASK_FORMER.TEST.SEMANTIC_ON", False,
        "MODEL.MASK_FORMER.TEST.INSTANCE_ON", True,
        "TEST.DETECTIONS_PER_IMAGE", 30,
    ).eval()  # fmt: skip
    (result,) = model([{"image": picture(50, 70)}])
    assert result.keys() == {"instances", "finite"}
    assert len(result["instances"]) == 30
    # Without panoptic inference every class is a thing.
    assert not set(result["instances"].pred_classes.tolist()) <= set(range(11, 19))


@torch.no_grad()
def test_a_batch_equals_its_images_one_by_one(tiny_model):
    inputs = [{"image": picture(50, 70, seed)} for seed in range(2)]
    both = tiny_model(inputs)
    for x, result in zip(inputs, both, strict=True):
        (alone,) = tiny_model([x])
        torch.testing.assert_close(result["sem_seg"], alone["sem_seg"], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_predictions_do_not_depend_on_the_other_image_of_a_batch(tiny_model):
    """Nor on what is beyond an image's edge: padding is zero after normalisation."""
    small, large = picture(40, 40), picture(64, 96, seed=1)
    (first, _) = tiny_model([{"image": small}, {"image": large}])
    (second, _) = tiny_model([{"image": small}, {"image": 255 - large}])
    torch.testing.assert_close(first["sem_seg"], second["sem_seg"], rtol=1e-4, atol=1e-5)


def test_images_are_normalised_then_padded_with_zeros(tiny_model):
    image = picture(50, 70)
    images = tiny_model.normalize([{"image": image}])
    assert images.tensor.shape == (1, 3, 64, 96)
    assert images.image_sizes == [(50, 70)]
    mean = torch.tensor([123.675, 116.280, 103.530])[:, None, None]
    std = torch.tensor([58.395, 57.120, 57.375])[:, None, None]
    torch.testing.assert_close(images.tensor[0, :, :50, :70], (image - mean) / std)
    assert not images.tensor[0, :, 50:].any()
    assert not images.tensor[0, :, :, 70:].any()


@torch.no_grad()
def test_the_main_task_sees_everything(tiny_model, monkeypatch):
    """The fourth channel is all ones, over padding too; image_mask plays no part."""
    seen = []
    monkeypatch.setattr(tiny_model.backbone, "forward", lambda x: seen.append(x) or real(x))
    real = SwinTransformerTTT.forward.__get__(tiny_model.backbone)
    tiny_model([{"image": picture(50, 70), "image_mask": torch.zeros(1, 50, 70)}])
    (pixels,) = seen
    assert pixels.shape == (1, 4, 64, 96)
    assert (pixels[:, 3] == 1).all()
    assert pixels[:, :3, :50, :70].any()


@torch.no_grad()
def test_masks_or_scores_are_resized_as_the_config_asks(tiny_cfg):
    model = build(tiny_cfg).eval()
    x = {"image": picture(50, 70), "height": 20, "width": 200}
    outputs = model.sem_seg_head(model.encode(model.normalize([x]).tensor))[-1]
    masks = F.interpolate(outputs["pred_masks"], (64, 96), mode="bilinear")
    probs = outputs["pred_logits"][0].softmax(-1)[:, :-1]

    def resize(maps):
        return F.interpolate(maps[..., :50, :70], (20, 200), mode="bilinear")[0]

    def score(masks):
        return torch.einsum("qk,qhw->khw", probs, masks.sigmoid())

    scores_resized = resize(score(masks[0])[None])
    masks_resized = score(resize(masks))
    assert (scores_resized - masks_resized).abs().max() > 1e-3
    torch.testing.assert_close(model([x])[0]["sem_seg"], scores_resized)
    model = build(
        tiny_cfg, "MODEL.MASK_FORMER.TEST.SEM_SEG_POSTPROCESSING_BEFORE_INFERENCE", True
    ).eval()
    torch.testing.assert_close(model([x])[0]["sem_seg"], masks_resized)


# ---- reconstruction


def test_a_given_mask_is_used(tiny_model):
    """The encoder sees zero where it is 0, and the fourth channel is the mask."""
    image, mask = picture(64, 96), torch.ones(1, 64, 96)
    mask[:, 16:32, 32:64] = 0
    x = {"image": image, "image_mask": mask}
    first, second = (tiny_model.reconstruction_losses([x])["loss_recon"] for _ in range(2))
    assert first == second  # nothing is drawn
    hidden = image.clone()
    hidden[:, 16:32, 32:64] = 7
    with torch.no_grad():
        recon = [
            tiny_model.reconstruct([{"image": i, "image_mask": mask}])[0]["recon"]
            for i in (image, hidden)
        ]
    assert torch.equal(*recon)  # masked pixels are not seen
    other = {"image": image, "image_mask": 1 - mask}
    assert tiny_model.reconstruction_losses([other])["loss_recon"] != first


@torch.no_grad()
def test_loss_by_hand_from_the_reconstruction(tiny_cfg):
    """The mean over two images of different sizes of their masked regions' means, padding apart."""
    model = build(tiny_cfg, "TTT.RECON.REGION", "masked").eval()
    inputs = []
    for seed, size in enumerate([(50, 70), (64, 96)]):
        mask = (torch.rand(1, *size, generator=torch.Generator().manual_seed(seed)) < 0.3).float()
        inputs.append({"image": picture(*size, seed), "image_mask": mask})
    pixels = model.normalize(inputs).tensor
    visible = torch.zeros(2, 1, 64, 96)
    for row, x in zip(visible, inputs, strict=True):
        row[:, : x["image"].shape[1], : x["image"].shape[2]] = x["image_mask"]
    prediction = model.recon_head(model.backbone(torch.cat([pixels * visible, visible], 1)))
    errors = []
    for i, x in enumerate(inputs):
        height, width = x["image"].shape[1:]
        error = (prediction[i] - pixels[i])[:, :height, :width].square()
        errors.append(error[:, x["image_mask"][0] == 0].mean())
    expected = torch.stack(errors).mean()
    torch.testing.assert_close(model.reconstruction_losses(inputs)["loss_recon"], expected)


@pytest.mark.parametrize("kind", ["random", "block"])
def test_masks_are_drawn_as_the_config_says(tiny_cfg, monkeypatch, kind):
    settings = ["TTT.MASK_RATIO", 0.85, "TTT.MASK_PATCH_SIZE", 8, "TTT.MASK_KIND", kind]
    model = build(tiny_cfg, *settings).eval()
    seen = []
    real = model.encode
    monkeypatch.setattr(model, "encode", lambda p, v=None: seen.append(v) or real(p, v))
    model.reconstruction_losses([{"image": picture(50, 70)}] * 2, generator(3))
    (visible,) = seen
    draws = generator(3)
    expected = [PatchMasks(8, 0.85, kind).draw(64, 96, draws) for _ in range(2)]
    assert torch.equal(visible, torch.stack(expected))
    assert visible.shape == (2, 1, 64, 96)
    assert visible.sum((1, 2, 3)).tolist() == [int(8 * 12 * 0.15) * 64] * 2
    assert not torch.equal(visible[0], visible[1])  # independent


def test_a_generator_decides_the_masks(tiny_model):
    def loss(seed):
        generator = torch.Generator().manual_seed(seed)
        return tiny_model.reconstruction_losses([{"image": picture(50, 70)}], generator)

    torch.manual_seed(1)
    first = loss(0)
    torch.manual_seed(2)
    assert loss(0) == first
    assert loss(1) != first


@pytest.mark.parametrize("normalize", [False, True])
def test_pictures_of_the_reconstruction(tiny_cfg, normalize):
    model = build(tiny_cfg, "TTT.RECON.NORMALIZE_TARGET", normalize).eval()
    inputs = [
        {"image": picture(50, 70), "height": 75, "width": 105},
        {"image": picture(64, 40, seed=1)},
    ]
    results = model.reconstruct(inputs)
    for result, (height, width) in zip(results, [(75, 105), (64, 40)], strict=True):
        assert result.keys() == {"recon", "masked_input"}
        for pixels in result.values():
            assert pixels.shape == (3, height, width)
            assert pixels.dtype == torch.float32
            assert not pixels.requires_grad
            assert pixels.min() >= 0
            assert pixels.max() <= 255
            assert pixels.std() > 1


def test_masked_input_is_the_image_with_black_patches(tiny_model):
    image, mask = picture(64, 96), torch.ones(1, 64, 96)
    mask[:, :16, 16:32] = 0
    (result,) = tiny_model.reconstruct([{"image": image, "image_mask": mask}])
    torch.testing.assert_close(result["masked_input"], image * mask, rtol=0, atol=1e-3)


def test_recon_is_in_the_units_of_the_image(tiny_model, monkeypatch):
    """A decoder that returned the normalised image would show the image."""
    image = picture(64, 96)
    pixels = tiny_model.normalize([{"image": image}]).tensor
    monkeypatch.setattr(tiny_model.recon_head, "forward", lambda features: pixels)
    (result,) = tiny_model.reconstruct([{"image": image}])
    torch.testing.assert_close(result["recon"], image.float(), rtol=0, atol=1e-3)


def test_eval_mode_is_not_changed_by_reconstructing(tiny_model):
    for training in (True, False):
        tiny_model.train(training)
        tiny_model.reconstruct([{"image": picture(64, 64)}])
        assert tiny_model.training == tiny_model.backbone.training == training
