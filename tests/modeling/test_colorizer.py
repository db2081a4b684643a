"""ColorizerTTT: what it sees, its losses by hand, its pictures, and weights that fit it."""

from __future__ import annotations

import copy
import io
import math
from functools import cache
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from detectron2.modeling import build_model
from model_contract import AdaptableModelContract, image, moved_by, seeded
from tiny import TINY

from ttt_video.adaptation import RandomCrop, SlidingWindow
from ttt_video.color.bins import ColorBins
from ttt_video.color.lab import compose, is_one_plane, lightness, rgb_to_lab, to_grey
from ttt_video.config import load_config
from ttt_video.data.grey import grey_input
from ttt_video.errors import UserError
from ttt_video.modeling import colorizer
from ttt_video.modeling.checkpointer import TTTCheckpointer
from ttt_video.modeling.colorizer import PRIOR, ColorizerTTT
from ttt_video.modeling.weights import EVERYTHING, load_weights, save_safetensors
from ttt_video.tasks.outputs import scores_are_finite

TARGETS = ("classification", "regression")


def config(target: str, *opts):
    cfg = load_config("joint_imagenet_color.yaml", opts=[*TINY, "TTT.COLOR.TARGET", target])
    cfg.merge_from_list(["MODEL.SWIN.DROP_PATH_RATE", 0.0, *opts])
    return cfg


def build(target: str, *opts) -> ColorizerTTT:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build_model(config(target, *opts)).eval()
    model.sem_seg_head.predictor.mask_embed.layers[-1].weight.data.mul_(10)  # vivid
    return model


@cache
def built(target: str) -> ColorizerTTT:
    return build(target)


@pytest.fixture(params=TARGETS)
def target(request) -> str:
    return request.param


@pytest.fixture
def model(target) -> ColorizerTTT:
    return copy.deepcopy(built(target))


def soft_picture(height: int = 64, width: int = 96, seed: int = 0) -> torch.Tensor:
    """Colours that sRGB has at any lightness near theirs."""
    spread = torch.randint(-20, 21, (3, height, width), generator=seeded(seed))
    return (120 + spread).to(torch.uint8)


def grey_twin(rgb: torch.Tensor) -> torch.Tensor:
    return to_grey(rgb).expand(3, -1, -1)


class TestContract(AdaptableModelContract):
    @pytest.fixture
    def model(self):
        return copy.deepcopy(built("classification"))


def test_reconstruction_of_a_regression_moves_f_and_g():
    model = copy.deepcopy(built("regression")).requires_grad_(True)
    samples = [{"image": image(64, 96)}]
    assert moved_by(model, model.reconstruction_losses(samples)["loss_recon"]) == {"f", "g"}
    assert moved_by(model, model.main_losses(samples)["loss_color"]) == {"f", "h"}
    with pytest.raises(UserError, match="regression has none"):
        model.main_task(samples)


# ---- what it sees


@torch.no_grad()
def test_the_colour_of_an_input_never_matters(model):
    rgb = image(45, 70)
    inputs = [{"image": rgb}], [{"image": grey_twin(rgb)}]
    coloured, grey = (model(x)[0]["color"] for x in inputs)
    assert torch.equal(coloured, grey)
    losses = [model.reconstruction_losses(x, seeded()) for x in inputs]
    assert losses[0] == losses[1]
    if model.bins is not None:
        first, second = (model.main_task(x, mask_with=seeded()).pixels.classes for x in inputs)
        assert torch.equal(first, second)
    assert torch.equal(*[model.reconstruct(x, seeded())[0]["recon"] for x in inputs])
    labelled = model([{"image": grey_twin(rgb), "original": rgb}])[0]["color"]
    assert torch.equal(labelled, grey)


@torch.no_grad()
def test_channels_may_be_in_the_other_order(target):
    rgb = image(40, 64)
    mean = config(target).MODEL
    opts = ("MODEL.PIXEL_MEAN", mean.PIXEL_MEAN[::-1], "MODEL.PIXEL_STD", mean.PIXEL_STD[::-1])
    model, other = build(target), build(target, "INPUT.FORMAT", "BGR", *opts)
    first = other.backbone.patch_embed.proj.weight
    first[:, :3] = first[:, :3].flip(1).clone()
    ours, theirs = model([{"image": rgb}])[0], other([{"image": rgb.flip(0)}])[0]
    difference = ours["color"].int() - theirs["color"].int()  # sums are rounded in another order
    assert difference.abs().max() <= 1
    expected = model.main_losses([{"image": rgb}])["loss_color"]
    loss, wrong = (other.main_losses([{"image": x}])["loss_color"] for x in (rgb.flip(0), rgb))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    assert wrong.item() != pytest.approx(expected.item(), rel=1e-3)


# ---- what it predicts


@torch.no_grad()
def test_the_lightness_of_the_output_is_that_of_the_input(target):
    model = copy.deepcopy(built(target))
    # Faint colours, so that sRGB has them at every lightness.
    if target == "regression":
        head = model.sem_seg_head.predictor.mask_embed.layers[-1]
        head.weight.data.mul_(0.01)
        head.bias.data.mul_(0.01)
    else:
        model.bins.centres.mul_(0.05)
    rgb = soft_picture(45, 70)
    (output,) = model([{"image": rgb}])
    assert output["color"].shape == (3, 45, 70)
    assert output["color"].dtype == torch.uint8
    assert not torch.equal(output["color"], grey_twin(rgb))
    difference = lightness(output["color"]) - lightness(grey_twin(rgb))
    assert difference.abs().max() < 0.5  # rounding to 8 bits


@pytest.mark.parametrize("size", [(1, 40), (33, 47), (64, 32)])
@torch.no_grad()
def test_any_size_is_predicted_at_its_own(model, size):
    (output,) = model([{"image": image(*size)}])
    assert output["color"].shape == (3, *size)
    (stretched,) = model([{"image": image(*size), "height": 70, "width": 90}])
    assert stretched["color"].shape == (3, 70, 90)


@torch.no_grad()
def test_a_resized_frame_keeps_its_own_lightness(model):
    grey = image(90, 130, 1)[:1]
    small = grey_twin(image(45, 65))
    frame = {"image": small, "height": 90, "width": 130}
    sharp, soft = model([{**frame, "grey": grey}, frame])
    assert sharp["color"].shape == soft["color"].shape == (3, 90, 130)
    zero = model.sem_seg_head.predictor.mask_embed.layers[-1]
    zero.weight.zero_()
    zero.bias.zero_()
    if model.bins is not None:
        model.bins.centres.zero_()
    plain, stretched = model([{**frame, "grey": grey}, frame])  # no colours
    assert torch.equal(plain["color"], grey.expand(3, -1, -1))
    assert not torch.equal(stretched["color"], plain["color"])


@torch.no_grad()
def test_a_distribution_becomes_its_annealed_mean():
    model = copy.deepcopy(built("classification"))
    rgb = soft_picture()
    x = model.normalize([{"image": rgb}])
    logits = model.sem_seg_head(model.encode(x.tensor))
    probs = (logits.double() / 0.38).softmax(1)
    ab = torch.einsum("bqhw,qc->bchw", probs, model.bins.centres.double()).float()
    ab = F.interpolate(ab, (64, 96), mode="bilinear", align_corners=False)
    expected = compose(lightness(grey_twin(rgb)), ab[0])
    difference = model([{"image": rgb}])[0]["color"].int() - expected.int()
    assert difference.abs().max() <= 1
    plain = build("classification", "TTT.COLOR.TEMPERATURE", 1.0)
    assert not torch.equal(plain([{"image": rgb}])[0]["color"], expected)


# ---- its losses


@torch.no_grad()
def test_the_loss_of_regression_by_hand():
    """Smooth L1 of ab / 110, quadratic below one unit of ab."""
    model, rgb = copy.deepcopy(built("regression")), image(64, 96)
    x = model.normalize([{"image": rgb}]).tensor
    errors = (model.sem_seg_head(model.encode(x))[0] - rgb_to_lab(rgb)[1:] / 110).abs()
    robust = torch.where(errors < 1 / 110, errors**2 * 110 / 2, errors - 1 / 220)
    loss = model.main_losses([{"image": rgb}])["loss_color"]
    assert loss.item() == pytest.approx(robust.sum(0).mean().item(), rel=1e-5)


@torch.no_grad()
def test_the_loss_of_classification_by_hand():
    """Cross entropy with Gaussian weights on the ten nearest bins of each cell's mean colour."""
    model, rgb = copy.deepcopy(built("classification")), image(64, 96)
    x = model.normalize([{"image": rgb}]).tensor
    logs = model.sem_seg_head(model.encode(x)).double().log_softmax(1)[0].flatten(1).T
    ab = rgb_to_lab(rgb)[1:].unfold(1, 4, 4).unfold(2, 4, 4).mean((-1, -2)).flatten(1).T
    distances = torch.cdist(ab.double(), ColorBins().centres.double())
    near, bins = distances.topk(10, largest=False)
    weights = (-(near**2) / 50).exp()
    weights = weights / weights.sum(1, keepdim=True)
    expected = -(weights * logs.gather(1, bins)).sum(1).mean()
    loss = model.main_losses([{"image": rgb}])["loss_color"]
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)


def test_the_losses_of_two_parts_are_on_average_the_batchs(model):
    """So micro-batches, and processes, add up to the batch; grey images and padding aside."""
    grey = {"image": grey_twin(image(64, 96, 3))}
    batch = [{"image": image(64, 96, seed)} for seed in range(3)]
    batch = [batch[0], {"image": image(48, 80, 5)}, batch[2], grey]
    whole = model.main_losses(batch)["loss_color"]
    parts = [model.main_losses(part)["loss_color"] for part in (batch[:2], batch[2:])]
    torch.testing.assert_close(whole, torch.stack(parts).mean(), rtol=1e-4, atol=1e-6)
    assert model.main_losses([grey])["loss_color"] == 0
    model.train().requires_grad_(True)
    model.main_losses([grey])["loss_color"].backward()  # and a batch of such trains nothing
    assert not any(p.grad is not None and p.grad.any() for p in model.parameters())


@torch.no_grad()
def test_padding_does_not_count():
    model = copy.deepcopy(built("regression"))
    inputs = [{"image": image(32, 64)}, {"image": image(64, 96, 1)}]
    predicted = model.sem_seg_head(model.encode(model.normalize(inputs).tensor))
    expected = []
    for x, ab in zip(inputs, predicted, strict=True):
        height, width = x["image"].shape[1:]
        colors = rgb_to_lab(x["image"])[1:] / 110
        errors = F.smooth_l1_loss(ab[:, :height, :width], colors, beta=1 / 110, reduction="none")
        expected.append(errors.sum(0).mean())
    loss = model.main_losses(inputs)["loss_color"]
    torch.testing.assert_close(loss, torch.stack(expected).mean())


class Masked:
    """Instances of which the model reads the masks."""

    def __init__(self, mask: torch.Tensor) -> None:
        self.gt_masks = SimpleNamespace(tensor=mask[None])


@pytest.mark.parametrize(("height", "width"), [(32, 64), (30, 61)])
@torch.no_grad()
def test_padding_of_a_mapper_changes_no_target(model, height, width):
    """The loss is that of the picture's own pixels, whatever colour the padding has."""
    rgb = image(height, width)
    padded = torch.full((3, 64, 96), 128, dtype=torch.uint8)
    padded[:, :height, :width] = rgb
    vivid = padded.clone()
    vivid[:, height:], vivid[:, :, width:] = vivid_colour(), vivid_colour()
    shown = torch.zeros(64, 96, dtype=torch.bool)
    shown[:height, :width] = True
    # f sees the padding, grey as it is; so that only the targets differ, predictions are fixed.
    head = model.sem_seg_head
    fixed = head(model.encode(model.normalize([{"image": padded}]).tensor))
    head.forward = lambda features: fixed
    losses = [
        model.main_losses([{"image": x, "instances": Masked(shown)}])["loss_color"]
        for x in (padded, vivid)
    ]
    assert losses[0] == losses[1]
    without = [model.main_losses([{"image": x}])["loss_color"] for x in (padded, vivid)]
    assert without[0] != without[1] != losses[0]
    # A batch pads, too.
    head.forward = lambda features: fixed.expand(2, -1, -1, -1)
    larger = {"image": grey_twin(image(64, 96, 1))}  # trains nothing, and makes the batch large
    (batch,) = model.main_losses([{"image": rgb}, larger]).values()
    torch.testing.assert_close(2 * batch, losses[0])


def vivid_colour() -> torch.Tensor:
    return torch.tensor([200, 30, 10], dtype=torch.uint8)[:, None, None]


@torch.no_grad()
def test_what_a_source_turned_grey_is_not_turned_again(model, monkeypatch):
    """Only one plane of memory is taken at its word; of equal channels nobody knows."""
    turned = []

    def seen(rgb):
        turned.append(rgb.shape)
        return to_grey(rgb)

    monkeypatch.setattr(colorizer, "to_grey", seen)
    frame = grey_input(image(45, 70), lambda pixels: torch.from_numpy(pixels).permute(2, 0, 1))
    window = SlidingWindow(2)
    window.push({"video_id": "a", "frame_index": 0, **frame})
    window.load_state_dict(torch.load(saved(window.state_dict()), weights_only=True))
    for crop in (RandomCrop(), RandomCrop((64, 64), flip=True, scale_range=(0.5, 1.5))):
        sample = {**window.current, "image": crop(window.current["image"], seeded(3))}
        assert is_one_plane(sample["image"])
        expected = crop(frame["image"].contiguous(), seeded(3))
        assert torch.equal(sample["image"], expected)
        model.reconstruction_losses([sample], seeded())
    (ours,) = model([window.current])
    assert turned == []
    (plain,) = model([{**window.current, "image": frame["image"].contiguous()}])
    assert turned == [(3, 45, 70)]
    assert torch.equal(ours["color"], plain["color"])


def saved(state) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return file


@torch.no_grad()
def test_broken_weights_are_seen_though_colours_are_whole_numbers(model):
    (output,) = model([{"image": image(45, 70)}])
    assert scores_are_finite(output)
    next(model.sem_seg_head.parameters()).fill_(math.nan)
    (output,) = model([{"image": image(45, 70)}])
    assert output["color"].dtype == torch.uint8
    assert not scores_are_finite(output)


def test_joint_training_has_both_losses(model):
    losses = model.train()([{"image": image(64, 96)}])
    assert losses.keys() == {"loss_color", "loss_recon"}


def test_rare_colours_weigh_more_in_the_gradient_alone(tmp_path):
    counts = torch.ones(313)
    counts[:100] = 1000
    save_safetensors({PRIOR: counts}, tmp_path / "prior.safetensors")
    plain = build("classification").requires_grad_(True)
    weighed = build("classification", "TTT.COLOR.PRIOR", str(tmp_path / "prior.safetensors"))
    losses, gradients = [], []
    for model in (plain, weighed):
        loss = model.main_losses([{"image": image(64, 96)}])["loss_color"]
        loss.backward()
        losses.append(loss.item())
        gradients.append(model.sem_seg_head.predictor.query_feat.weight.grad)
    assert losses[0] == losses[1]
    assert not torch.allclose(*gradients)
    assert weighed.state_dict().keys() == plain.state_dict().keys()


def test_a_file_that_is_no_prior_is_refused_in_a_line(tmp_path):
    for content in ({"weights": torch.ones(313)}, {PRIOR: torch.ones(300)}):
        save_safetensors(content, tmp_path / "prior.safetensors")
        with pytest.raises(UserError, match=r"has no 'color_prior' .*ttt-video weights colors"):
            build("classification", "TTT.COLOR.PRIOR", str(tmp_path / "prior.safetensors"))


# ---- weights


def test_names_are_those_of_the_segmentation_model(model, tiny_model, target):
    """So a joint checkpoint, or Mask2Former's, fills f and both pixel decoders."""
    theirs, ours = tiny_model.state_dict(), model.state_dict()
    report = load_weights(
        model, theirs, allow_new=EVERYTHING, allow_unused=EVERYTHING, allow_mismatched=EVERYTHING
    )
    queries = {f"sem_seg_head.predictor.{name}.weight" for name in ("query_feat", "query_embed")}
    assert {m.name for m in report.mismatched} == queries
    assert report.new == []
    classes = {
        "sem_seg_head.predictor.class_embed.weight",
        "sem_seg_head.predictor.class_embed.bias",
    }
    assert set(report.unused) == classes | {"criterion.empty_weight"}
    assert set(report.loaded) == ours.keys() - queries
    loaded = model.state_dict()
    for part in ("backbone", "recon_head", "sem_seg_head.pixel_decoder"):
        names = [name for name in ours if name.startswith(f"{part}.")]
        assert names
        assert all(torch.equal(loaded[name], theirs[name]) for name in names)


@pytest.mark.parametrize("allowed", [True, False])
def test_a_joint_checkpoint_is_a_starting_point(model, tiny_model, tmp_path, allowed):
    path = str(tmp_path / "joint.safetensors")
    save_safetensors(tiny_model.state_dict(), path)
    checkpointer = TTTCheckpointer(model, new_classes=allowed)
    if not allowed:
        with pytest.raises(UserError, match=r"set TTT\.NEW_CLASSES True") as error:
            checkpointer.resume_or_load(path, resume=False)
        assert "\n" not in str(error.value)
        return
    before = model.sem_seg_head.predictor.query_feat.weight.clone()
    checkpointer.resume_or_load(path, resume=False)
    assert torch.equal(model.backbone.norm0.weight, tiny_model.backbone.norm0.weight)
    assert torch.equal(model.sem_seg_head.predictor.query_feat.weight, before)


def test_nothing_of_the_bins_is_in_a_checkpoint():
    names = built("classification").state_dict().keys()
    assert names == built("regression").state_dict().keys()
    assert {name.split(".")[0] for name in names} == {"backbone", "recon_head", "sem_seg_head"}
