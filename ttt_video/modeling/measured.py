"""Files of what was measured with a model on training images; they know that model's weights."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..errors import UserError
from ._weight_files import (
    check_finite,
    checkpoint_format,
    local_file,
    read_checkpoint,
    save_safetensors,
    weights_hash,
)
from .interface import is_within, parts_of

logger = logging.getLogger(__name__)

MARK_KEY = "weights_mark"
"""The header's metadata have the mark under this key."""


def weights_mark(model: nn.Module) -> str:
    """Returns a SHA-256 (hex) of a model's parameters, rounded to fp16 and without decoder g.

    So files in half precision and files without g have the mark of the weights that they are of.
    """
    reconstructing = parts_of(model).get("g", ())
    return weights_hash(
        {
            name: parameter.half()
            for name, parameter in model.named_parameters()
            if not is_within(name, reconstructing)
        }
    )


def save_measured(
    tensors: Mapping[str, Tensor], file: str, model: nn.Module, metadata: Mapping[str, str]
) -> None:
    """Writes a safetensors file that remembers the weights of the model.

    Raises:
        UserError: the extension is another one, or the file cannot be written.
    """
    save_safetensors(tensors, file, {**metadata, MARK_KEY: weights_mark(model)})


class Measured(dict[str, Tensor]):
    """The tensors of such a file.

    Attributes:
        file: where they are from.
        mark: :func:`weights_mark` of the model they were measured with; None in an older file.
        source: the name of its weights.
    """

    def __init__(
        self, tensors: Mapping[str, Tensor], file: str, mark: str | None, source: str | None
    ) -> None:
        super().__init__(tensors)
        self.file, self.mark, self.source = file, mark, source

    def checked(self, model: nn.Module) -> Measured:
        """Returns itself; the log warns if a model has other weights than they were measured with.

        That is no error: adapted weights may go on with what was measured before.
        """
        if self.mark is not None and self.mark != weights_mark(model):
            logger.warning(
                "%s was measured with other weights (%s) than this model's, which changes what it "
                "says; measure it anew if they were not adapted from those",
                self.file,
                self.source or "unnamed",
            )
        return self


def read_measured(file: str) -> Measured:
    """Reads such a file.

    Raises:
        UserError: it is missing or damaged, or a number in it is not finite.
    """
    tensors = read_checkpoint(file)
    check_finite(tensors, file)
    return Measured(tensors, file, *_marked(local_file(file)))


def _marked(file: str) -> tuple[str | None, str | None]:
    """Returns the mark and the name of the weights, where a file has them."""
    if checkpoint_format(file) != "safetensors":
        return None, None
    try:
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata() or {}
    except SafetensorError as error:
        raise UserError(f"{file} cannot be read: {error}") from error
    return metadata.get(MARK_KEY), metadata.get("weights")
