"""What load_weights and the checkpointer do with each kind of weight."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from torch import nn

from ttt_video.errors import UserError
from ttt_video.modeling import weights as W
from ttt_video.modeling.checkpointer import TTTCheckpointer


class Head(nn.Module):
    def __init__(self, queries: int, classes: int | None) -> None:
        super().__init__()
        self.pixel_decoder = nn.ModuleDict({"mask_features": nn.Conv2d(8, 8, 1)})
        self.predictor = nn.ModuleDict(
            {
                "query_feat": nn.Embedding(queries, 8),
                "query_embed": nn.Embedding(queries, 8),
                "mask_embed": nn.Linear(8, 8),
            }
        )
        if classes is not None:
            self.predictor["class_embed"] = nn.Linear(8, classes + 1)


class Toy(nn.Module):
    """The names and shapes that matter, without the arithmetic."""

    def __init__(self, channels: int = 4, classes: int = 3, recon: bool = True) -> None:
        super().__init__()
        self.backbone = nn.Module()
        self.backbone.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(channels, 8, 4, 4)})
        self.backbone.layers = nn.ModuleList([nn.Linear(8, 8)])
        self.backbone.layers[0].register_buffer("relative_position_index", torch.arange(4))
        self.sem_seg_head = Head(5, classes)
        if recon:
            self.recon_head = Head(6, None)
        self.criterion = nn.Module()
        self.criterion.register_buffer("empty_weight", torch.ones(classes + 1))


def randomised(module: nn.Module) -> dict[str, torch.Tensor]:
    """A state dict of the module's names and shapes with fresh values."""
    return {
        name: torch.randn_like(value) if value.is_floating_point() else value.clone()
        for name, value in module.state_dict().items()
    }


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


WEIGHTS = randomised(Toy())


def test_a_matching_file_lands_whole():
    model = Toy()
    report = W.load_weights(model, WEIGHTS)
    assert same(model.state_dict(), WEIGHTS)
    assert sorted(report.loaded) == sorted(WEIGHTS)
    others = (report.widened, report.copied, report.new, report.unused, report.mismatched)
    assert not any(others)
    assert not report.renamed


def test_values_take_the_models_dtype():
    model = Toy().half()
    W.load_weights(model, {k: v.double() for k, v in WEIGHTS.items()})
    weight = model.sem_seg_head.predictor["mask_embed"].weight
    assert weight.dtype == torch.float16
    torch.testing.assert_close(
        weight.float(), WEIGHTS["sem_seg_head.predictor.mask_embed.weight"], rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize("extra", ["init", "zero"])
def test_three_channels_are_widened(extra):
    published = randomised(Toy(channels=3, recon=False))
    model = Toy()
    before = model.backbone.patch_embed["proj"].weight.detach().clone()
    report = W.load_weights(model, published, extra_channels=extra, allow_new=("recon_head.",))
    name = "backbone.patch_embed.proj.weight"
    assert report.widened == [W.ShapeDifference(name, (8, 3, 4, 4), (8, 4, 4, 4))]
    conv = model.backbone.patch_embed["proj"]
    assert torch.equal(conv.weight[:, :3], published[name])
    assert torch.equal(conv.weight[:, 3], before[:, 3] if extra == "init" else before[:, 3] * 0)
    assert all(n.startswith("recon_head.") for n in report.new)
    assert len(report.new) == 6


def test_a_zero_extra_channel_changes_nothing_in_the_output():
    published = randomised(Toy(channels=3, recon=False))
    three, four = Toy(channels=3, recon=False), Toy(recon=False)
    W.load_weights(three, published)
    W.load_weights(four, published, extra_channels="zero")
    rgb = torch.randn(2, 3, 8, 8)
    rgbv = torch.cat([rgb, torch.ones(2, 1, 8, 8)], 1)
    torch.testing.assert_close(
        four.backbone.patch_embed["proj"](rgbv), three.backbone.patch_embed["proj"](rgb)
    )


def test_a_resnet_stem_is_widened_and_other_convolutions_are_not():
    model = nn.Module()
    model.backbone = nn.Module()
    model.backbone.stem = nn.ModuleDict({"conv1": nn.Conv2d(4, 8, 7, bias=False)})
    model.backbone.res2 = nn.Conv2d(4, 8, 1, bias=False)
    stem = {"backbone.stem.conv1.weight": torch.randn(8, 3, 7, 7)}
    W.load_weights(model, {**stem, "backbone.res2.weight": torch.randn(8, 4, 1, 1)})
    assert torch.equal(
        model.backbone.stem["conv1"].weight[:, :3], stem["backbone.stem.conv1.weight"]
    )
    with pytest.raises(UserError, match="1 have another shape"):
        W.load_weights(model, {**stem, "backbone.res2.weight": torch.randn(8, 2, 1, 1)})


def test_g_from_h_fills_what_has_the_same_shape():
    published = {k: v for k, v in WEIGHTS.items() if not k.startswith("recon_head.")}
    model = Toy()
    report = W.load_weights(
        model, published, init_recon_from_main=True, allow_new=("recon_head.predictor.query_",)
    )
    state = model.state_dict()
    assert sorted(report.copied) == [
        f"recon_head.{n}"
        for n in (
            "pixel_decoder.mask_features.bias",
            "pixel_decoder.mask_features.weight",
            "predictor.mask_embed.bias",
            "predictor.mask_embed.weight",
        )
    ]
    for name in report.copied:
        assert torch.equal(state[name], WEIGHTS[name.replace("recon_head", "sem_seg_head")])
    # 5 queries in h, 6 in g: they stay as they were made
    assert sorted(report.new) == [
        "recon_head.predictor.query_embed.weight",
        "recon_head.predictor.query_feat.weight",
    ]


def test_g_is_never_overwritten_by_h():
    model = Toy()
    report = W.load_weights(model, WEIGHTS, init_recon_from_main=True)
    assert report.copied == []
    assert same(model.state_dict(), WEIGHTS)


def test_older_head_names():
    """Mask2Former before version 2 of its head: no ``pixel_decoder``, and ``static_query``."""
    old = {
        k.replace("sem_seg_head.pixel_decoder.", "sem_seg_head.").replace(
            "query_feat", "static_query"
        ): v
        for k, v in WEIGHTS.items()
    }
    assert old.keys() != WEIGHTS.keys()
    model = Toy()
    report = W.load_weights(model, old)
    assert same(model.state_dict(), WEIGHTS)
    assert (
        "sem_seg_head.mask_features.weight",
        "sem_seg_head.pixel_decoder.mask_features.weight",
    ) in report.renamed
    assert "renamed     4 older names" in report.table()


def test_an_imagenet_backbone():
    """No prefix, 3 channels, a classifier and attention masks that nobody needs."""
    prefix = "backbone."
    imagenet = {
        k.removeprefix(prefix): v for k, v in randomised(Toy(3)).items() if k.startswith(prefix)
    }
    extra = {"head.weight": torch.ones(2), "layers.0.attn_mask": torch.ones(2)}
    model = Toy()
    start = {k: v.clone() for k, v in model.state_dict().items()}
    report = W.load_weights(
        model, {**imagenet, **extra}, allow_new=W.EVERYTHING, allow_unused=("head.",)
    )
    assert sorted(report.unused) == sorted(extra)
    state = model.state_dict()
    for name, value in imagenet.items():
        loaded = state[prefix + name]
        assert torch.equal(loaded[:, :3] if loaded.dim() == 4 else loaded, value)
    for name in report.new:
        assert torch.equal(state[name], start[name])
    with pytest.raises(UserError, match=r"of the model are missing, 1 are not in the model"):
        W.load_weights(model, {**imagenet, **extra})


def test_config_buffers_may_be_absent():
    weights = {k: v for k, v in WEIGHTS.items() if not k.endswith(("_index", "empty_weight"))}
    report = W.load_weights(Toy(), weights)
    assert sorted(report.new) == [
        "backbone.layers.0.relative_position_index",
        "criterion.empty_weight",
    ]


def test_another_number_of_classes_is_one_line_and_no_change():
    model = Toy(classes=3)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(UserError) as caught:
        W.load_weights(model, randomised(Toy(classes=7)), source="coco.pkl")
    assert str(caught.value) == (
        "the weights in coco.pkl are of 7 classes, the model of 3: set "
        "MODEL.SEM_SEG_HEAD.NUM_CLASSES 7, or TTT.NEW_CLASSES True to train a new class layer"
    )
    name = "sem_seg_head.predictor.class_embed.weight"
    assert same(model.state_dict(), before)

    names = ("sem_seg_head.predictor.class_embed.", "criterion.empty_weight")
    report = W.load_weights(model, randomised(Toy(classes=7)), allow_mismatched=names)
    assert [m.name for m in report.mismatched] == [n for n in before if n.startswith(names)]
    assert torch.equal(model.state_dict()[name], before[name])


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_one_line_and_no_change(number):
    name = "sem_seg_head.predictor.class_embed.weight"
    broken = {key: value.clone() for key, value in WEIGHTS.items()}
    broken[name].view(-1)[1] = number
    model = Toy()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    message = rf"^a\.pth has numbers .* in 1 of {len(broken)} tensors, such as {name}: "
    with pytest.raises(UserError, match=message):
        W.load_weights(model, broken, source="a.pth")
    assert same(model.state_dict(), before)
    # A tensor that the model does not take does not matter, such as a mask of another one.
    extra = {**WEIGHTS, "other.mask": torch.tensor([number])}
    W.load_weights(model, extra, allow_unused=("other.",))


def test_missing_and_left_over_weights_are_errors_unless_expected():
    part = {k: v for k, v in WEIGHTS.items() if "mask_embed" not in k}
    with pytest.raises(UserError, match="4 of the model are missing"):
        W.load_weights(Toy(), part)
    with pytest.raises(UserError, match="2 of the model are missing"):
        W.load_weights(Toy(), part, allow_new=("recon_head.",))
    deeper = {**WEIGHTS, "backbone.layers.1.weight": torch.ones(8, 8)}
    with pytest.raises(UserError, match="1 are not in the model"):
        W.load_weights(Toy(), deeper)


def test_a_file_with_nothing_of_the_model_is_always_an_error():
    with pytest.raises(UserError, match="none of them is in the model"):
        W.load_weights(
            Toy(), {"fc.weight": torch.ones(2)}, allow_new=W.EVERYTHING, allow_unused=W.EVERYTHING
        )


def test_the_report_is_logged_without_being_asked_for(caplog):
    with caplog.at_level(logging.INFO, logger="ttt_video"):
        W.load_weights(Toy(), WEIGHTS, source="whole.pth")
        W.load_weights(Toy(), {**WEIGHTS, "a": torch.ones(1)}, source="b", allow_unused=("a",))
    assert [r.levelname for r in caplog.records] == ["INFO", "WARNING"]
    assert "weights from whole.pth" in caplog.text


def test_table_is_short_for_many_names():
    report = W.LoadReport("big.pkl")
    report.loaded = [f"backbone.layers.{i}.weight" for i in range(500)]
    report.new = [f"recon_head.pixel_decoder.layer_{i}.weight" for i in range(200)]
    lines = report.table().splitlines()
    assert len(lines) < 8
    assert any("recon_head.pixel_decoder.* (200 tensors)" in line for line in lines)
    row = next(line.split() for line in lines if line.startswith("backbone"))
    assert row == ["backbone", "500", ".", ".", ".", ".", "."]


# ---- channels


def test_channels_there_and_back():
    three = randomised(Toy(channels=3))
    four = W.set_input_channels(three, 4)
    assert four["backbone.patch_embed.proj.weight"].shape == (8, 4, 4, 4)
    assert same(W.set_input_channels(four, 3), three)
    assert same(W.set_input_channels(four, 4), four)


def test_dropping_the_visibility_channel_keeps_fully_visible_outputs():
    converted = W.set_input_channels(WEIGHTS, 3)
    three, four = Toy(channels=3), Toy(channels=4)
    W.load_weights(three, converted)
    W.load_weights(four, WEIGHTS)
    rgb = torch.randn(2, 3, 8, 8)
    rgbv = torch.cat([rgb, torch.ones(2, 1, 8, 8)], 1)
    torch.testing.assert_close(
        three.backbone.patch_embed["proj"](rgb), four.backbone.patch_embed["proj"](rgbv)
    )


def test_channels_refuse_what_makes_no_sense():
    with pytest.raises(UserError, match="3 or 4, not 5"):
        W.set_input_channels(WEIGHTS, 5)
    with pytest.raises(UserError, match="no first convolution"):
        W.set_input_channels({"fc.weight": torch.ones(2, 2)}, 3)


# ---- checkpointer


class Counter:
    """Something beside the model that a checkpointer saves."""

    def __init__(self) -> None:
        self.value = 0

    def state_dict(self) -> dict[str, int]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.value = state["value"]


def test_checkpointer_resumes_its_own_files(tmp_path):
    model, counter = Toy(), Counter()
    saver = TTTCheckpointer(model, str(tmp_path), counter=counter)
    counter.value = 5
    saver.save("model_0", iteration=41)

    fresh, other = Toy(), Counter()
    checkpointer = TTTCheckpointer(fresh, str(tmp_path), counter=other)
    rest = checkpointer.resume_or_load("nothing.pth", resume=True)
    assert same(fresh.state_dict(), model.state_dict())
    assert (other.value, rest["iteration"]) == (5, 41)
    assert checkpointer.report is not None
    assert not checkpointer.report.new


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".pkl"])
def test_checkpointer_starts_from_every_format_and_says_so(tmp_path, caplog, suffix):
    path = tmp_path / f"start{suffix}"
    published = randomised(Toy(channels=3, recon=False))
    W.write_checkpoint({**published, "more": torch.ones(1)}, path)
    model, counter = Toy(), Counter()
    checkpointer = TTTCheckpointer(model, str(tmp_path), counter=counter)
    with caplog.at_level(logging.WARNING, logger="ttt_video"):
        checkpointer.resume_or_load(str(path), resume=False)
    assert torch.equal(model.criterion.empty_weight, published["criterion.empty_weight"])
    assert "widened     backbone.patch_embed.proj.weight" in caplog.text
    assert "unused      more" in caplog.text
    with pytest.raises(UserError, match="do not fit"):
        checkpointer.load(str(path))  # the same file, to evaluate or to go on: not enough
    checkpointer.resume_or_load(str(path), resume=False)  # and a failure leaves nothing behind


def test_checkpointer_errors_are_ours(tmp_path):
    checkpointer = TTTCheckpointer(Toy(), str(tmp_path))
    with pytest.raises(UserError, match="no checkpoint file"):
        checkpointer.load(str(tmp_path / "gone.pth"))
    path = tmp_path / "w.pth"
    W.write_checkpoint(randomised(Toy(classes=9)), path)
    with pytest.raises(UserError, match="are of 9 classes, the model of 3"):
        checkpointer.resume_or_load(str(path), resume=False)
    assert checkpointer.load("") == {}  # no path: from scratch, as in detectron2


def test_checkpointer_starts_new_classes_where_asked(tmp_path):
    path = tmp_path / "w.pth"
    given = randomised(Toy(classes=9))
    W.write_checkpoint(given, path)
    model = Toy()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    checkpointer = TTTCheckpointer(model, str(tmp_path), new_classes=True)
    checkpointer.resume_or_load(str(path), resume=False)
    for name, value in model.state_dict().items():
        is_new = name.startswith(W.CLASS_LAYER)
        assert torch.equal(value, (before if is_new else given)[name]), name
    with pytest.raises(UserError, match="are of 9 classes"):  # to evaluate, they must fit
        checkpointer.load(str(path))


@pytest.mark.parametrize("name", ["model_0000001.pth", "last_checkpoint"])
def test_a_checkpoint_that_cannot_be_finished_leaves_the_one_before(tmp_path, monkeypatch, name):
    """Killed while writing either file: a resume finds the old one, whole."""
    model = Toy()
    checkpointer = TTTCheckpointer(model, str(tmp_path))
    checkpointer.save("model_0000000", iteration=0)
    real = os.replace

    def killed(part, path):
        if Path(path).name == name:
            raise KeyboardInterrupt
        real(part, path)

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        checkpointer.save("model_0000001", iteration=1)
    again = TTTCheckpointer(Toy(), str(tmp_path))
    assert again.resume_or_load("", resume=True)["iteration"] == 0


@pytest.mark.parametrize("suffix", [".pth", ".pkl"])
def test_detectron2_reads_what_we_write(tmp_path, suffix):
    """DefaultPredictor loads through detectron2's own checkpointer."""
    path = tmp_path / f"w{suffix}"
    W.write_checkpoint(WEIGHTS, path)
    model = Toy()
    DetectionCheckpointer(model).load(str(path))
    assert same(model.state_dict(), WEIGHTS)


def stateful_checkpointer(folder):
    model = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return TTTCheckpointer(model, str(folder), optimizer=optimizer)


def test_a_note_of_the_last_checkpoint_that_leads_nowhere_is_said(tmp_path):
    checkpointer = stateful_checkpointer(tmp_path)
    checkpointer.save("model_0000004", iteration=4)
    checkpointer.save("model_0000009", iteration=9)
    note = tmp_path / "last_checkpoint"
    assert checkpointer.resume_or_load("")["iteration"] == 9

    def refused():
        with pytest.raises(UserError) as error:
            checkpointer.resume_or_load("")
        assert "\n" not in str(error.value)
        assert str(note) in str(error.value)
        assert "there are model_0000004.pth" in str(error.value)
        return str(error.value)

    whole = (tmp_path / "model_0000009.pth").read_bytes()
    for content in (b"", b"gone.pth", b"\xff\x00", b"."):
        note.write_bytes(content)
        assert "which is no file" in refused()
    note.write_text("model_0000009.pth")
    flipped = bytearray(whole)
    flipped[whole.index(checkpointer.model.weight.detach().numpy().tobytes())] ^= 1
    for content in (b"", b"garbage", whole[: len(whole) // 2], bytes(flipped)):
        (tmp_path / "model_0000009.pth").write_bytes(content)
        refused()
    torch.save({"model": checkpointer.model.state_dict()}, tmp_path / "model_0000009.pth")
    assert "holds weights alone" in refused()

    note.write_text("model_0000004.pth")  # as the message says
    assert checkpointer.resume_or_load("")["iteration"] == 4


def test_a_training_without_a_whole_checkpoint_starts_anew(tmp_path):
    (tmp_path / "last_checkpoint").write_text("model_0000004.pth")
    with pytest.raises(UserError, match="starts anew in another OUTPUT_DIR"):
        stateful_checkpointer(tmp_path).resume_or_load("")
