"""EfficientNet-Lite0: the published names, TensorFlow's padding, another implementation."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from ttt_video.modeling.efficientnet_lite0 import (
    EfficientNetLite0,
    _SameConv,
    build_efficientnet_lite0,
)


def test_names_and_shapes_are_those_of_the_published_file():
    with torch.device("meta"):
        network = EfficientNetLite0()
    state = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    assert len(state) == 296
    assert sum(p.numel() for p in network.parameters()) == 4_652_008
    listed = {
        "_conv_stem.weight": (32, 3, 3, 3),
        "_bn0.running_var": (32,),
        "_blocks.0._depthwise_conv.weight": (32, 1, 3, 3),
        "_blocks.0._project_conv.weight": (16, 32, 1, 1),
        "_blocks.1._expand_conv.weight": (96, 16, 1, 1),
        "_blocks.1._bn0.num_batches_tracked": (),
        "_blocks.3._depthwise_conv.weight": (144, 1, 5, 5),
        "_blocks.15._bn2.bias": (320,),
        "_conv_head.weight": (1280, 320, 1, 1),
        "_bn1.weight": (1280,),
        "_fc.weight": (1000, 1280),
        "_fc.bias": (1000,),
    }
    assert {name: state.get(name) for name in listed} == listed
    assert "_blocks.0._expand_conv.weight" not in state


def test_what_is_odd_of_the_padding_goes_to_the_right_and_the_bottom():
    torch.manual_seed(0)
    x = torch.rand(1, 2, 6, 7)
    for kernel, pads in ((3, (1, 1, 0, 1)), (5, (2, 2, 1, 2))):
        layer = _SameConv(2, 3, kernel, 2, bias=False)
        expected = F.conv2d(F.pad(x, pads), layer.weight, stride=2)
        assert torch.equal(layer(x), expected)
        assert expected.shape[2:] == (3, 4)


def test_weights_of_another_network_are_refused():
    with pytest.raises(ValueError, match="not EfficientNet-Lite0's"):
        build_efficientnet_lite0({"_fc.bias": torch.zeros(1000)})


def test_describes_as_another_implementation_does():
    package = pytest.importorskip("efficientnet_lite_pytorch")
    torch.manual_seed(0)
    other = package.EfficientNet.from_name("efficientnet-lite0").eval()
    with torch.no_grad():
        for name, tensor in other.state_dict().items():  # activations that a batch norm would give
            if name.endswith("running_var"):
                tensor.mul_(0.05)
    network = build_efficientnet_lite0(other.state_dict())
    pictures = torch.randint(256, (2, 3, 224, 224), dtype=torch.uint8)
    with torch.no_grad():
        found = network(pictures)
        x = (pictures.float() - 127) / 128
        features = other.extract_features(x).mean((2, 3))
        assert features.std() > 1e-3
        torch.testing.assert_close(found.features, features, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.logits, other(x), rtol=1e-4, atol=1e-5)
