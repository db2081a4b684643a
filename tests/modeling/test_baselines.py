"""DeepLabV3+ and SegFormer in the stream: tiny ones, against the libraries they come from."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
import transformers
from detectron2.modeling import SemanticSegmentor, build_model
from model_contract import FrozenModelContract

from ttt_video.adaptation.base import build_adapter
from ttt_video.cli import load_config, merge_method
from ttt_video.engine.stream import StreamRunner
from ttt_video.engine.stream_evaluation import load_source_model
from ttt_video.errors import UserError
from ttt_video.modeling import segformer
from ttt_video.modeling.weights import save_safetensors

TINY = {
    "deeplab_v3_plus": [
        "MODEL.RESNETS.DEPTH", 50,
        "MODEL.RESNETS.RES2_OUT_CHANNELS", 16,
        "MODEL.RESNETS.WIDTH_PER_GROUP", 4,
        "MODEL.RESNETS.STEM_OUT_CHANNELS", 8,
        "MODEL.SEM_SEG_HEAD.ASPP_CHANNELS", 16,
        "MODEL.SEM_SEG_HEAD.CONVS_DIM", 16,
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


def test_deeplab_is_detectron2s_segmentor(built):
    image = {"image": torch.randint(256, (3, 64, 96), dtype=torch.uint8)}
    cfg = config("deeplab_v3_plus")
    cfg.MODEL.META_ARCHITECTURE = "SemanticSegmentor"
    reference = build_model(cfg).eval()
    assert type(reference) is SemanticSegmentor
    reference.load_state_dict(built["deeplab_v3_plus"].state_dict())
    with torch.no_grad():
        expected = reference([image])[0]["sem_seg"].softmax(0)
        assert torch.equal(built["deeplab_v3_plus"]([image])[0]["sem_seg"], expected)


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
    mean, std = (torch.tensor(v)[:, None, None] for v in ([123.675, 116.28, 103.53],
                                                          [58.395, 57.12, 57.375]))  # fmt: skip
    with torch.no_grad():
        logits = reference(((image - mean) / std)[None]).logits
        expected = torch.nn.functional.interpolate(logits, scale_factor=4, mode="bilinear")[0]
        actual = ours([{"image": image}])[0]["sem_seg"]
    torch.testing.assert_close(actual, expected.softmax(0))


def test_published_sizes():
    cfg = load_config("baselines/segformer_b4.yaml", opts=["MODEL.DEVICE", "meta"])
    with torch.device("meta"):
        model = segformer.SegFormer(**segformer.SegFormer.from_config(cfg))
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(64.0e6, rel=0.002)
    deeplab = load_config("baselines/deeplab_v3_plus.yaml")
    assert (deeplab.MODEL.RESNETS.DEPTH, deeplab.MODEL.RESNETS.STEM_OUT_CHANNELS) == (101, 128)


def test_weights_of_a_file_give_the_same_model(name, model, weights, make_video):
    cfg = config(name, "MODEL.WEIGHTS", weights)
    loaded = load_source_model(cfg)
    runner = StreamRunner.from_config(cfg, loaded)
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


@pytest.mark.parametrize("modules", ["()", "('backbone', 'sem_seg_head')"])
def test_batch_norm_is_re_estimated(built, modules, make_video):
    model = copy.deepcopy(built["deeplab_v3_plus"])
    cfg = config("deeplab_v3_plus", "TTT.METHOD", "ln_adapt", "TTT.MODULES", modules)
    before = copy.deepcopy(model.state_dict())
    for result in StreamRunner.from_config(cfg, model).run(make_video(num_frames=2)):
        assert result.record["norm_shift"] > 0
        assert torch.isfinite(result.output["sem_seg"]).all()
    moved = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert {k.rpartition(".")[2] for k in moved} == {"running_mean", "running_var"}
    assert any(k.startswith("sem_seg_head") for k in moved) == ("head" in modules)


@pytest.mark.parametrize("ensemble", ["majority_vote", "temporal_smoothing"])
def test_ensembles_work_on_any_architecture(name, model, ensemble, make_video):
    runner = StreamRunner.from_config(
        config(name, "TTT.METHOD", ensemble, "TTT.ENSEMBLE.PREDICTIONS", 2), model
    )
    for result in runner.run(make_video(num_frames=2)):
        assert result.output["sem_seg"].shape == (19, 64, 96)


def test_segformer_is_not_trained_here(built):
    model = copy.deepcopy(built["segformer_b4"]).train()
    with pytest.raises(UserError, match="frozen baseline"):
        model([{"image": torch.zeros(3, 32, 32, dtype=torch.uint8)}])


def test_without_the_library_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match="pip install 'transformers"):
        build_model(config("segformer_b4"))


def test_without_detectron2s_projects_that_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "detectron2.projects.deeplab", None)
    with pytest.raises(UserError, match="project deeplab"):
        build_model(config("deeplab_v3_plus"))


def test_importing_the_package_imports_neither():
    code = (
        "import sys, ttt_video; "
        "assert not {'transformers', 'detectron2.projects.deeplab'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
