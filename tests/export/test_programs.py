"""Predictions as tensors, traced, written and compared with the model."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor, nn

from ttt_video.config import load_config
from ttt_video.errors import UserError
from ttt_video.export import files
from ttt_video.export.checking import MOST_PIXELS, TOLERANCE, difference, differences, runner
from ttt_video.export.facts import example_images, facts_of
from ttt_video.export.files import FACTS, SUFFIXES, check_outputs, content
from ttt_video.export.program import Prediction, trace
from ttt_video.modeling.postprocess import panoptic_inference


class Edges(nn.Module):
    """Scores two classes by one convolution, and can do what no program can."""

    def __init__(self, asks: bool = False) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 2, 3, padding=1)
        self.asks = asks

    def prediction_tensors(self, images: Tensor) -> dict[str, Tensor]:
        scores = self.convolution(images.float() / 255)
        if self.asks and scores.sum() > 0:  # depends on numbers
            scores = -scores
        return {"scores": scores, "labels": scores.argmax(1).int()}


@pytest.fixture(scope="module")
def edges():
    torch.manual_seed(0)
    prediction = Prediction(Edges().eval())
    image = torch.randint(256, (1, 3, 40, 50), dtype=torch.uint8)
    program = trace(prediction, image, dynamic=True)
    return prediction, {suffix: content(program, suffix, facts()) for suffix in SUFFIXES}


def facts(size: list[int] | None = None) -> dict:
    return {"outputs": {"scores": "", "labels": ""}, "size": size, "classes": ["Straße", "sky"]}


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".onnx", ".pt2"])
def test_a_file_gives_the_models_numbers_for_any_size(edges, suffix):
    prediction, contents = edges
    run = runner(contents[suffix], suffix)
    images = [torch.randint(256, (1, 3, h, w), dtype=torch.uint8) for h, w in [(33, 47), (64, 64)]]
    found = list(differences(prediction, run, images, "file"))
    assert [each.size for each in found] == [(33, 47), (64, 64)]
    assert all(each.pixels == 0 and each.values["scores"] < 1e-6 for each in found)


def test_facts_are_inside(edges):
    model = onnx.load_from_string(edges[1][".onnx"])
    read = {entry.key: json.loads(entry.value) for entry in model.metadata_props}
    assert read == facts()
    (image,) = model.graph.input
    sides = [side.dim_param or side.dim_value for side in image.type.tensor_type.shape.dim]
    assert (image.name, sides) == ("image", [1, 3, "height", "width"])
    assert [output.name for output in model.graph.output] == ["scores", "labels"]
    extra = {FACTS: ""}
    torch.export.load(io.BytesIO(edges[1][".pt2"]), extra_files=extra)
    assert json.loads(extra[FACTS]) == facts()


@pytest.mark.parametrize("suffix", [".onnx", ".pt2"])
def test_no_path_of_this_machine_is_inside(edges, suffix):
    assert b"test_programs" not in edges[1][suffix].replace(__name__.encode(), b"")


def test_what_no_program_can_is_one_line():
    image = torch.zeros(1, 3, 40, 50, dtype=torch.uint8)
    with pytest.raises(UserError, match=r"^Edges cannot be traced: .+") as raised:
        trace(Prediction(Edges(asks=True)), image, dynamic=False)
    assert "\n" not in str(raised.value)
    with pytest.raises(UserError, match=r"^Linear cannot be exported: it has no prediction_t"):
        Prediction(nn.Linear(1, 1))


def test_an_operation_that_onnx_lacks_is_one_line():
    class Bessel(Edges):
        def prediction_tensors(self, images: Tensor) -> dict[str, Tensor]:
            return {"scores": torch.special.bessel_j0(images.float())}

    image = torch.zeros(1, 3, 40, 50, dtype=torch.uint8)
    program = trace(Prediction(Bessel()), image, dynamic=False)
    with pytest.raises(UserError, match=r"cannot be written as ONNX: .*bessel_j0") as raised:
        content(program, ".onnx", {"outputs": {"scores": ""}, "size": [40, 50]})
    assert "\n" not in str(raised.value)


def test_a_difference_is_counted():
    expected = {"scores": torch.tensor([0.0, 4.0]).view(1, 2, 1, 1).repeat(1, 1, 20, 100)}
    expected["labels"] = expected["scores"].argmax(1).int()
    found = {name: value.clone() for name, value in expected.items()}
    assert difference(expected, found) == ((20, 100), {"scores": 0.0}, {"scores": 4.0}, 0)
    found["scores"][0, 0, 3, 3] += 3.9 * TOLERANCE
    found["labels"][0, 3, 3:5] = 0
    near = difference(expected, found)
    assert near.values["scores"] == pytest.approx(3.9 * TOLERANCE)
    assert near.pixels == 2 == MOST_PIXELS * 20 * 100
    assert near.passes
    found["labels"][0, 3, 5] = 0
    assert not difference(expected, found).passes
    found["labels"][0, 3, 5] = 1
    for wrong in (4.1 * TOLERANCE, math.nan):
        found["scores"][0, 0, 3, 3] = wrong
        assert not difference(expected, found).passes
    with pytest.raises(UserError, match=r"^a.onnx is not written, because it differs from"):
        list(differences(lambda _: expected, lambda _: found, [torch.zeros(1)], "a.onnx"))


def test_the_winning_query_stands_for_labels():
    logits = torch.tensor([[[2.0, 0.0], [1.0, 0.0]]])  # two queries, one class and none
    masks = torch.tensor([1.0, 1.1]).view(1, 2, 1, 1).repeat(1, 1, 2, 2)
    masks[0, 1, 0, 0] = 9.0
    outputs = {"class_logits": logits, "mask_logits": masks}
    flipped = {"class_logits": logits.flip(1), "mask_logits": masks.flip(1)}
    assert difference(outputs, flipped).pixels == 4
    masks = masks.clone()
    masks[0, 0, 1, 1] = -9.0
    assert difference(outputs, {**outputs, "mask_logits": masks}).pixels == 1


def test_scores_are_those_of_the_model(tiny_model, make_video):
    (frame,) = make_video(num_frames=1, height=71, width=98)
    with torch.no_grad():
        expected = tiny_model([frame])[0]["sem_seg"]
        found = tiny_model.prediction_tensors(frame["image"][None])
    torch.testing.assert_close(found["scores"][0], expected, rtol=0, atol=1e-6)  # resized by 1
    assert torch.equal(found["labels"][0], expected.argmax(0).int())
    assert found["labels"].dtype == torch.int32


def test_queries_give_the_models_segments(tiny_model, make_video):
    (frame,) = make_video(num_frames=1, height=71, width=98)
    settings = {"object_mask_threshold": 0.0, "overlap_threshold": 0.0}
    things = frozenset(range(11, 19))
    tiny_model.postprocess = type(tiny_model.postprocess)(
        semantic=False, panoptic=True, resize_masks=True, thing_classes=things, **settings
    )
    with torch.no_grad():
        expected, segments = tiny_model([frame])[0]["panoptic_seg"]
        found = tiny_model.prediction_tensors(frame["image"][None])
    assert found.keys() == {"class_logits", "mask_logits"}
    assert found["mask_logits"].shape == (1, 8, 71, 98)
    logits = found["class_logits"][0], found["mask_logits"][0]
    own, own_segments = panoptic_inference(*logits, **settings, thing_classes=things)
    assert torch.equal(own, expected)
    assert own_segments == segments


def test_examples_are_frames_as_the_model_sees_them(tiny_cfg):
    quick = load_config("quick/stream_world.yaml")
    sizes = [(128, 256), (97, 256), (128, 128)]
    images = example_images(quick, None)
    assert [tuple(x.shape) for x in images] == [(1, 3, *size) for size in sizes]
    assert all(x.dtype == torch.uint8 and x.float().std() > 20 for x in images)
    quick.INPUT.FORMAT = "BGR"
    assert torch.equal(example_images(quick, None)[0], images[0].flip(1))
    (small,) = example_images(quick, (40, 64))
    assert small.shape == (1, 3, 40, 64)


def test_outputs_without_a_meaning_are_refused(tiny_cfg, tiny_model):
    with pytest.raises(UserError, match=r"^MaskFormerTTT.prediction_tensors gives scores; it has"):
        facts_of(tiny_cfg, tiny_model, None, ["scores"], None)


def test_mistakes_are_found_before_any_work(tmp_path, monkeypatch):
    existing = tmp_path / "a.onnx"
    existing.write_bytes(b"old")
    with pytest.raises(UserError, match=r"a.onnx exists; give another name or --overwrite"):
        check_outputs([existing], overwrite=False)
    check_outputs([existing], overwrite=True)
    with pytest.raises(UserError, match=r"--output a.pth: end it with .onnx or .pt2"):
        check_outputs([Path("a.pth")], overwrite=False)
    monkeypatch.setattr(files.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"need onnx and onnxscript: pip install 'onnx>=.*runtime"):
        check_outputs([existing], overwrite=True)
    check_outputs([tmp_path / "a.pt2"], overwrite=False)
