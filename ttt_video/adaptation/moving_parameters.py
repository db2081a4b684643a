"""Chooses the parameters of a model that move in a gradient step."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator

from torch import nn

from ..errors import UserError
from ..modeling.interface import full_names, is_within, parts_of
from ..modeling.optimizer import NORM_LAYERS

_CHOICES: dict[str, Callable[[nn.Module, str, nn.Parameter], bool]] = {
    "all": lambda layer, name, parameter: True,
    "norm": lambda layer, name, parameter: isinstance(layer, NORM_LAYERS),
    # "in_proj_weight" of attention, too; queries, levels and tables are looked up or added.
    "matrices": lambda layer, name, parameter: (
        name.endswith("weight") and parameter.ndim > 1 and not isinstance(layer, nn.Embedding)
    ),
}
"""Each says whether a parameter moves, given its layer, its name in the layer, and itself."""


def part_names(model: nn.Module, roles: Iterable[str]) -> tuple[str, ...]:
    """Returns the names of a model's parts by their roles.

    Raises:
        UserError: the model has no decoder g.
    """
    parts = parts_of(model)
    for role in roles:
        if role == "g" and role not in parts:
            raise UserError(
                "the weights have no decoder g, which this method trains: give jointly trained "
                "ones, or choose a method without reconstruction"
            )
    return tuple(name for role in roles for name in parts[role])


def unfreeze(model: nn.Module, name: str, parameters: str, parts: Collection[str]) -> None:
    """Makes the parameters of a submodule, or a parameter of its own, require gradients.

    Args:
        model: that has it.
        name: of the submodule or parameter, at any depth; it may begin with a role.
        parameters: which of its parameters: "all"; "norm", those of normalisation layers; or
            "matrices", those that multiply: of linear layers and convolutions, without biases.
        parts: names of the parts that the loss depends on; empty: any.

    Raises:
        UserError: there is no such submodule, or the loss does not depend on it.
    """
    for full in full_names(model, name):
        if parts and not is_within(full, parts):
            raise UserError(
                f"TTT.MODULES names {full!r}, which the loss of this method does not depend on; "
                f"choose within {', '.join(parts)}"
            )
        for layer, own, parameter in _parameters(model, full):
            if _CHOICES[parameters](layer, own, parameter):
                parameter.requires_grad_(True)


def _parameters(model: nn.Module, name: str) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
    """Yields a submodule's parameters, or the one that is named, with layer and name in it."""
    owner, _, own = name.rpartition(".")
    try:
        layer = model.get_submodule(owner)
        single = dict(layer.named_parameters(recurse=False)).get(own)
        if single is not None:
            yield layer, own, single
        elif own not in dict(layer.named_buffers(recurse=False)):
            for inner in model.get_submodule(name).modules():
                for inner_name, parameter in inner.named_parameters(recurse=False):
                    yield inner, inner_name, parameter
    except AttributeError as error:
        raise UserError(
            f"TTT.MODULES names {name!r}, but {error}; the model's parts are "
            + ", ".join(child for child, _ in model.named_children())
        ) from error
