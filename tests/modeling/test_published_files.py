"""Published files on disk, as the model zoos write them: every weight lands, outputs agree.

The real files cannot be had in a test. These have their names, shapes and format, and random
values, which hide nothing; Hugging Face's Mask2Former with the same values says what is right.
"""

from __future__ import annotations

import functools
import http.server
import importlib.util
import pickle
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from detectron2.modeling import build_model
from torch import Tensor

from ttt_video.config import load_config
from ttt_video.errors import UserError
from ttt_video.modeling.checkpointer import TTTCheckpointer
from ttt_video.modeling.weights import write_checkpoint

CONFIGS = {"cityscapes": 19, "coco_instance": 80, "coco_panoptic": 133}
INSPECT = Path(__file__).resolve().parents[2] / "tools/convert_weights.py"
FROM_NOTHING = ("recon_head.",)


def config(name: str, *opts: str):
    options = ["MODEL.DEVICE", "cpu", *opts]
    if name == "coco_panoptic":
        options += ["MODEL.MASK_FORMER.TEST.PANOPTIC_ON", "False"]  # needs no metadata of COCO
    return load_config(f"joint_{name}.yaml", opts=[*options, "DATASETS.TRAIN", "()"])


def write_zoo_pickle(weights: dict[str, Tensor], path: Path) -> None:
    """detectron2's model zoo format: numpy arrays under "model"."""
    arrays = {name: value.numpy() for name, value in weights.items()}
    path.write_bytes(pickle.dumps({"model": arrays, "__author__": "Mask2Former"}, protocol=2))


def inspect(path: Path, capsys) -> str:
    spec = importlib.util.spec_from_file_location("convert_weights", INSPECT)
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    tool.main(["--inspect", str(path)])
    return capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("joint", [False, True], ids=["mask2former", "joint"])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_published_file_lands_whole_and_computes_what_the_oracle_does(
    tmp_path, capsys, name, joint
):
    pytest.importorskip("transformers", reason="the oracle is in the test extra")
    from costs.huggingface import build_oracle
    from hf_oracle import build_random

    cfg = config(name)
    weights = {k: v.clone() for k, v in build_random(cfg, seed=3).state_dict().items()}
    first = "backbone.patch_embed.proj.weight"
    if not joint:
        weights[first] = weights[first][:, :3].contiguous()
        weights = {k: v for k, v in weights.items() if not k.startswith("recon_head.")}
    path = tmp_path / "model_final.pkl"
    write_zoo_pickle(weights, path)

    shown = inspect(path, capsys)
    rows = dict(line.split(maxsplit=1) for line in shown.splitlines())
    assert (rows["channels"], rows["classes"]) == ("4" if joint else "3", str(CONFIGS[name]))
    assert ("decoder" in rows) == joint

    torch.manual_seed(4)
    model = build_model(cfg).eval()
    # As tools/train_net.py --eval-only loads it.
    checkpointer = TTTCheckpointer(model, allow_new=FROM_NOTHING, extra_channels="zero")
    checkpointer.load(str(path), checkpointables=[])
    report = checkpointer.report
    assert report.unused == []
    assert report.mismatched == []
    assert sorted(report.loaded + [w.name for w in report.widened]) == sorted(weights)
    assert [w.name for w in report.widened] == ([] if joint else [first])
    assert all(n.startswith(FROM_NOTHING) for n in report.new)
    assert joint == (not report.new)

    zoo = cfg.clone()
    zoo.MODEL.SWIN.IN_CHANS = weights[first].shape[1]
    image = torch.randint(256, (3, 64, 96), dtype=torch.uint8)
    pixels = model.normalize([{"image": image}]).tensor
    shown = pixels if not joint else torch.cat([pixels, torch.ones(1, 1, 64, 96)], dim=1)
    with torch.no_grad():
        ours = model.sem_seg_head(model.encode(pixels))[-1]
        theirs = build_oracle(zoo, SimpleNamespace(state_dict=lambda: weights))(shown)
    for mine, other in (("pred_logits", "class"), ("pred_masks", "masks")):
        expected = theirs[f"{other}_queries_logits"]
        assert expected.std() > 0.1
        torch.testing.assert_close(ours[mine], expected, rtol=0, atol=1e-4)


@functools.cache
def full_model():
    return build_model(config("cityscapes"))


def imagenet_weights(model) -> dict[str, Tensor]:
    """swin_small_patch4_window7_224's own names: no prefix, RGB, a last norm and a classifier."""
    weights = {
        name.removeprefix("backbone."): torch.randn_like(value)
        if value.is_floating_point()
        else value
        for name, value in model.state_dict().items()
        if name.startswith("backbone.") and not name.startswith("backbone.norm")
    }
    weights["patch_embed.proj.weight"] = weights["patch_embed.proj.weight"][:, :3].contiguous()
    for stage, depth in enumerate((2, 2, 18)):  # of shifted windows; the last stage is one window
        for block in range(1, depth, 2):
            name = f"layers.{stage}.blocks.{block}.attn_mask"
            weights[name] = torch.zeros((56 >> stage) ** 2 // 49, 49, 49)
    weights |= {"norm.weight": torch.ones(768), "norm.bias": torch.zeros(768)}
    return weights | {"head.weight": torch.zeros(1000, 768), "head.bias": torch.zeros(1000)}


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", ["official.pth", pytest.param("converted.pkl", marks=pytest.mark.slow)]
)
def test_training_starts_from_imagenets_swin(tmp_path, kind):
    model = full_model()
    weights = imagenet_weights(model)
    path = tmp_path / kind
    if kind.endswith(".pth"):
        torch.save({"model": weights}, path)
    else:  # by Mask2Former's convert-pretrained-swin-model-to-d2.py
        arrays = {name: value.numpy() for name, value in weights.items()}
        content = {"model": arrays, "__author__": "third_party", "matching_heuristics": True}
        path.write_bytes(pickle.dumps(content))
    checkpointer = TTTCheckpointer(model)
    checkpointer.resume_or_load(str(path), resume=False)
    report, state = checkpointer.report, model.state_dict()
    left = {"norm.weight", "norm.bias", "head.weight", "head.bias"}
    assert {n for n in report.unused if not n.endswith("attn_mask")} == left
    assert [w.name for w in report.widened] == ["backbone.patch_embed.proj.weight"]
    assert {n.split(".")[0] for n in report.new} == {
        "backbone", "sem_seg_head", "recon_head", "criterion",
    }  # fmt: skip
    assert {n for n in report.new if n.startswith("backbone.")} == {
        f"backbone.norm{i}.{kind}" for i in range(4) for kind in ("weight", "bias")
    }
    for name in report.loaded:
        assert torch.equal(state[name], weights[name.removeprefix("backbone.")]), name
    with pytest.raises(UserError, match="are missing"):  # nothing to evaluate
        checkpointer.load(str(path))


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture
def served(tmp_path, monkeypatch):
    """A folder, and its address on a server of this machine; downloads are cached beside it."""
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "served"
    folder.mkdir()
    handler = functools.partial(Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield folder, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("suffix", [".pkl", ".pth", ".safetensors"])
def test_weights_are_loaded_from_a_url(served, suffix):
    folder, address = served
    given = torch.nn.Linear(2, 3)
    write_checkpoint(given.state_dict(), folder / f"w{suffix}")
    model = torch.nn.Linear(2, 3)
    TTTCheckpointer(model).load(f"{address}/w{suffix}")
    assert torch.equal(model.weight, given.weight)
    with pytest.raises(UserError, match=f"gone{suffix}"):
        TTTCheckpointer(model).load(f"{address}/gone{suffix}")
