"""Builds the model of a config with its source weights."""

from __future__ import annotations

from os import PathLike

from detectron2.config import CfgNode
from detectron2.modeling import build_model
from torch import nn

from ..config.loading import read_config
from ..errors import UserError
from ..modeling.heads import check_architecture, check_grey
from ..modeling.interface import drop_part, prefixes
from ..modeling.weight_header import name_classes, read_header
from ..modeling.weights import load_weights, read_checkpoint


def config_of_weights(path: str | PathLike[str] | None) -> CfgNode | None:
    """Returns the config that ``--save-weights`` put into a file, and names its classes.

    None where there is no file or no such config in it.

    Raises:
        UserError: the file is missing or damaged.
    """
    header = None if path is None else read_header(path)
    if header is None:
        return None
    name_classes(header)
    return read_config(header["config"], str(path))


def load_source_model(cfg: CfgNode) -> nn.Module:
    """The model of the config with ``MODEL.WEIGHTS``, in eval mode: (f0, g0, h0).

    Raises:
        UserError: no weights are named, they cannot be read, or do not fit, the architecture is
            unknown, or the model takes other frames than ``INPUT.GREY`` says.
    """
    if not cfg.MODEL.WEIGHTS:
        raise UserError("no weights: pass --weights FILE, or set MODEL.WEIGHTS")
    check_architecture(cfg)
    model = build_model(cfg)
    check_grey(cfg, model)
    decoder = prefixes(model, "g")
    read = getattr(model, "read_weights", read_checkpoint)  # other architectures', other formats
    report = load_weights(
        model,
        read(cfg.MODEL.WEIGHTS),
        source=cfg.MODEL.WEIGHTS,
        extra_channels="zero",
        allow_new=decoder,
    )
    # Not every method needs the decoder g; those that do refuse a model without.
    if any(name.startswith(decoder) for name in report.new):
        drop_part(model, "g")
    return model.eval()
