"""DeepLabV3+ and SegFormer in the stream: tiny ones, against the libraries they come from."""

from __future__ import annotations

import copy
import sys

import pytest
import torch
import torch.nn.functional as F
import transformers
from detectron2.modeling import META_ARCH_REGISTRY, build_model
from model_contract import FrozenModelContract

from ttt_video.adaptation.base import build_adapter
from ttt_video.config import load_config, merge_method
from ttt_video.errors import UserError
from ttt_video.export.checking import differences, runner
from ttt_video.export.files import content
from ttt_video.export.program import Prediction, trace
from ttt_video.modeling.weights import save_safetensors
from ttt_video.stream import Stream, load_source_model

TINY = {
    "deeplab_v3_plus": [
        "MODEL.RESNETS.DEPTH", 50,
        "MODEL.RESNETS.WIDTH_PER_GROUP", 4,
        "MODEL.SEM_SEG_HEAD.ASPP_CHANNELS", 16,
        "MODEL.SEM_SEG_HEAD.PROJECT_CHANNELS", "[8]",
    ],
    "segformer_b4": [
        "MODEL.SEGFORMER.HIDDEN_SIZES", "[8, 16, 20, 32]",
        "MODEL.SEGFORMER.DEPTHS", "[1, 1, 1, 1]",
        "MODEL.SEGFORMER.DECODER_DIM", 16,
    ],
}  # fmt: skip
NAMES = sorted(TINY)


def config(name: str, *more):
    device = ("MODEL.DEVICE", "cpu")
    return load_config(f"baselines/{name}.yaml", opts=[*map(str, (*device, *TINY[name], *more))])


@pytest.fixture(scope="module")
def built():
    torch.manual_seed(0)
    return {name: build_model(config(name)).eval() for name in NAMES}


@pytest.fixture(params=NAMES)
def name(request) -> str:
    return request.param


@pytest.fixture
def model(name, built):
    return copy.deepcopy(built[name])


@pytest.fixture
def weights(name, model, tmp_path) -> str:
    path = tmp_path / f"{name}.safetensors"
    save_safetensors(model.state_dict(), path)
    return str(path)


class TestContract(FrozenModelContract):
    """Of both models."""


def test_the_tensors_of_a_prediction_are_its_output(model):
    image = torch.randint(256, (3, 70, 131), dtype=torch.uint8)
    with torch.no_grad():
        (output,) = model([{"image": image}])
        found = model.prediction_tensors(image[None])
    assert torch.equal(found["scores"][0], output["sem_seg"])
    assert torch.equal(found["labels"][0], output["sem_seg"].argmax(0))


@pytest.mark.slow
def test_onnx_gives_the_labels_for_any_size(model):
    sizes = [(64, 96), (70, 131), (100, 65)]
    images = [torch.randint(256, (1, 3, *size), dtype=torch.uint8) for size in sizes]
    prediction = Prediction(model)
    program = trace(prediction, images[0], dynamic=True)
    written = content(program, ".onnx", {"outputs": ["scores", "labels"], "size": None})
    for found in differences(prediction, runner(written, ".onnx"), images, "file"):
        assert found.values["scores"] < 1e-6
        assert found.pixels <= 1


def test_frames_of_any_size_become_class_probabilities(model):
    frames = [
        {"image": torch.randint(256, (3, h, w), dtype=torch.uint8), "height": 31, "width": 50}
        for h, w in ((64, 96), (70, 131))
    ]
    with torch.no_grad():
        outputs = model(frames)
        alone = model(frames[:1])
    for output in outputs:
        assert output["sem_seg"].shape == (19, 31, 50)
        torch.testing.assert_close(output["sem_seg"].sum(0), torch.ones(31, 50))
    assert alone[0]["sem_seg"].shape == (19, 31, 50)
    del frames[0]["height"], frames[0]["width"]
    with torch.no_grad():
        assert model(frames[:1])[0]["sem_seg"].shape == (19, 64, 96)


def deeplab_by_hand(weights, images):
    """The layers one by one from a checkpoint's names, at stride 8 as MMSegmentation runs them."""

    def conv(x, conv_name, bn_name, relu=True, **options):
        weight = weights[f"{conv_name}.weight"]
        side = weight.shape[-1] // 2 * options.get("dilation", 1)
        x = F.conv2d(x, weight, padding=side, **options)
        bn = [weights[f"{bn_name}.{k}"] for k in ("running_mean", "running_var", "weight", "bias")]
        x = F.batch_norm(x, *bn)
        return x.relu() if relu else x

    def module(x, name, **options):
        return conv(x, f"{name}.conv", f"{name}.bn", **options)

    def separable(x, name, dilation=1):
        x = module(x, f"{name}.depthwise_conv", dilation=dilation, groups=x.shape[1])
        return module(x, f"{name}.pointwise_conv")

    def stage(x, number, blocks, stride, first, dilation):
        for block in range(blocks):
            name = f"backbone.layer{number}.{block}"
            by = stride if block == 0 else 1
            inner = conv(x, f"{name}.conv1", f"{name}.bn1")
            inner = conv(inner, f"{name}.conv2", f"{name}.bn2", stride=by,
                         dilation=first if block == 0 else dilation)  # fmt: skip
            inner = conv(inner, f"{name}.conv3", f"{name}.bn3", relu=False)
            if block == 0:
                names = (f"{name}.downsample.0", f"{name}.downsample.1")
                x = conv(x, *names, relu=False, stride=by)
            x = (x + inner).relu()
        return x

    def resized(x, like):
        return F.interpolate(x, like.shape[-2:], mode="bilinear", align_corners=False)

    x = images
    for number, stride in ((0, 2), (3, 1), (6, 1)):
        x = conv(x, f"backbone.stem.{number}", f"backbone.stem.{number + 1}", stride=stride)
    low = stage(F.max_pool2d(x, 3, 2, 1), 1, 3, 1, 1, 1)
    deep = stage(stage(stage(low, 2, 4, 2, 1, 1), 3, 6, 1, 1, 2), 4, 3, 1, 2, 4)
    pooled = module(deep.mean((2, 3), keepdim=True), "decode_head.image_pool.1")
    parts = [resized(pooled, deep), module(deep, "decode_head.aspp_modules.0")]
    for number, dilation in ((1, 12), (2, 24), (3, 36)):
        parts.append(separable(deep, f"decode_head.aspp_modules.{number}", dilation))
    x = resized(module(torch.cat(parts, 1), "decode_head.bottleneck"), low)
    x = torch.cat([x, module(low, "decode_head.c1_bottleneck")], 1)
    x = separable(separable(x, "decode_head.sep_bottleneck.0"), "decode_head.sep_bottleneck.1")
    names = ("decode_head.conv_seg.weight", "decode_head.conv_seg.bias")
    return resized(F.conv2d(x, *(weights[name] for name in names)), images)


def normalised(image):
    mean, std = (torch.tensor(v)[:, None, None] for v in ([123.675, 116.28, 103.53],
                                                          [58.395, 57.12, 57.375]))  # fmt: skip
    return ((image - mean) / std)[None]


def test_deeplab_is_its_layers_one_by_one(built):
    model = copy.deepcopy(built["deeplab_v3_plus"])
    generator = torch.Generator().manual_seed(0)
    for name, value in model.state_dict().items():  # statistics that a mix-up would show in
        if name.endswith("running_var"):
            value.uniform_(0.5, 1.5, generator=generator)
        elif name.endswith(("running_mean", "bias")):
            value.normal_(0, 0.1, generator=generator)
    image = torch.randint(256, (3, 75, 110), dtype=torch.uint8, generator=generator)
    with torch.no_grad():
        expected = deeplab_by_hand(model.state_dict(), normalised(image))[0].softmax(0)
        actual = model([{"image": image}])[0]["sem_seg"]
    torch.testing.assert_close(actual, expected)
    assert expected.std() > 1e-3


def test_a_checkpoint_of_mmsegmentation_fits(built, tmp_path):
    """It holds the head that only training uses, and what was known of the run."""
    model = built["deeplab_v3_plus"]
    weights = model.state_dict()
    torch.save(
        {"meta": {"CLASSES": ["road"], "epoch": 1}, "state_dict": weights}, tmp_path / "m.pth"
    )
    loaded = load_source_model(config("deeplab_v3_plus", "MODEL.WEIGHTS", tmp_path / "m.pth"))
    assert all(torch.equal(value, weights[name]) for name, value in loaded.state_dict().items())
    assert weights["auxiliary_head.convs.0.conv.weight"].shape == (256, 1024, 3, 3)
    del weights["auxiliary_head.conv_seg.weight"]
    torch.save({"state_dict": weights}, tmp_path / "m.pth")
    with pytest.raises(UserError, match="1 of the model are missing"):
        load_source_model(config("deeplab_v3_plus", "MODEL.WEIGHTS", tmp_path / "m.pth"))


def test_a_resnet_that_is_not_there_is_said():
    with pytest.raises(UserError, match=r"MODEL\.RESNETS\.DEPTH is 34; choose 50 or 101"):
        build_model(config("deeplab_v3_plus", "MODEL.RESNETS.DEPTH", 34))
    with pytest.raises(UserError, match="PROJECT_CHANNELS"):
        build_model(config("deeplab_v3_plus", "MODEL.SEM_SEG_HEAD.PROJECT_CHANNELS", "[]"))


def test_segformer_is_the_librarys(built):
    ours = built["segformer_b4"]
    reference = transformers.SegformerForSemanticSegmentation(
        transformers.SegformerConfig(
            num_labels=19,
            hidden_sizes=[8, 16, 20, 32],
            depths=[1, 1, 1, 1],
            num_attention_heads=[1, 2, 5, 8],
            decoder_hidden_size=16,
        )
    ).eval()
    reference.load_state_dict(ours.state_dict())
    image = torch.randint(256, (3, 64, 96), dtype=torch.uint8)
    with torch.no_grad():
        logits = reference(normalised(image)).logits
        expected = torch.nn.functional.interpolate(logits, scale_factor=4, mode="bilinear")[0]
        actual = ours([{"image": image}])[0]["sem_seg"]
    torch.testing.assert_close(actual, expected.softmax(0))


@pytest.mark.parametrize(
    ("name", "classes", "millions"),
    [
        ("segformer_b4", 19, 64.0),
        # 62.7 is printed of ADE20K's 150 classes (SegFormer, Table 2); each takes 514 + 257 more.
        ("deeplab_v3_plus", 150, 62.7),
        ("deeplab_v3_plus", 19, 62.683 - 131 * 770e-6),
    ],
)
def test_published_sizes(name, classes, millions):
    opts = ["MODEL.DEVICE", "meta", "MODEL.SEM_SEG_HEAD.NUM_CLASSES", str(classes)]
    cfg = load_config(f"baselines/{name}.yaml", opts=opts)
    kind = META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE)
    with torch.device("meta"):
        model = kind(cfg)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, rel=0.002)


def test_weights_of_a_file_give_the_same_model(name, model, weights, make_video):
    cfg = config(name, "MODEL.WEIGHTS", weights)
    loaded = load_source_model(cfg)
    runner = Stream.from_config(cfg, loaded)
    for result in runner.run(make_video(num_frames=2)):
        with torch.no_grad():
            expected = model([result.frame])[0]["sem_seg"]
        assert torch.equal(result.output["sem_seg"], expected)


def test_copies_and_devices_share_nothing_by_mistake(built):
    model = built["segformer_b4"]
    clone = copy.deepcopy(model).to(torch.float64)
    with torch.no_grad():
        clone.decode_head.classifier.weight.zero_()
        clone.decode_head.classifier.bias.zero_()
        output = clone([{"image": torch.zeros(3, 32, 32, dtype=torch.uint8)}])[0]["sem_seg"]
    torch.testing.assert_close(output, torch.full_like(output, 1 / 19))  # the copy's own weights
    assert model.decode_head.classifier.weight.abs().sum() > 0


def test_a_folder_of_hugging_faces(built, tmp_path):
    network = built["segformer_b4"]._network
    network.save_pretrained(tmp_path / "folder")
    loaded = load_source_model(config("segformer_b4", "MODEL.WEIGHTS", tmp_path / "folder"))
    expected = built["segformer_b4"].state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in loaded.state_dict().items())


def test_folders_that_do_not_fit_are_refused_in_a_line(built, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty holds no SegFormer"):
        load_source_model(config("segformer_b4", "MODEL.WEIGHTS", tmp_path / "empty"))
    built["segformer_b4"]._network.save_pretrained(tmp_path / "folder")
    other = config("segformer_b4", "MODEL.WEIGHTS", tmp_path / "folder")
    other.MODEL.SEM_SEG_HEAD.NUM_CLASSES = 5
    with pytest.raises(UserError, match="another shape"):
        load_source_model(other)


TRAINING = ("online_ttt_mae", "ttt_mae_no_memory", "offline_ttt_mae", "tent", "self_train")


@pytest.mark.parametrize("method", TRAINING)
def test_methods_that_train_parts_of_our_model_refuse(name, model, method):
    cfg = config(name)
    merge_method(cfg, method)
    with pytest.raises(UserError, match="which runs frozen: use --method none") as refusal:
        build_adapter(cfg, model)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("modules", ["()", "('backbone', 'decode_head')"])
def test_batch_norm_is_re_estimated(built, modules, make_video):
    model = copy.deepcopy(built["deeplab_v3_plus"])
    cfg = config("deeplab_v3_plus", "TTT.METHOD", "ln_adapt", "TTT.MODULES", modules)
    before = copy.deepcopy(model.state_dict())
    for result in Stream.from_config(cfg, model).run(make_video(num_frames=2)):
        assert result.record["norm_shift"] > 0
        assert torch.isfinite(result.output["sem_seg"]).all()
    moved = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert {k.rpartition(".")[2] for k in moved} == {"running_mean", "running_var"}
    assert any(k.startswith("decode_head") for k in moved) == ("head" in modules)


@pytest.mark.parametrize("ensemble", ["majority_vote", "temporal_smoothing"])
def test_ensembles_work_on_any_architecture(name, model, ensemble, make_video):
    runner = Stream.from_config(
        config(name, "TTT.METHOD", ensemble, "TTT.ENSEMBLE.PREDICTIONS", 2), model
    )
    for result in runner.run(make_video(num_frames=2)):
        assert result.output["sem_seg"].shape == (19, 64, 96)


def test_they_are_not_trained_here(model):
    with pytest.raises(UserError, match=f"{type(model).__name__} is a frozen baseline"):
        model.train()([{"image": torch.zeros(3, 32, 32, dtype=torch.uint8)}])


def test_without_the_library_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match="pip install 'transformers"):
        build_model(config("segformer_b4"))
