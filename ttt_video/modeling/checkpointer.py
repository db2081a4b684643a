"""detectron2's checkpointer for all formats, with this project's rules of what fits a model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from detectron2.checkpoint import DetectionCheckpointer
from torch import Tensor, nn

from ..errors import UserError
from ..files import save_torch, write_atomically
from ._weight_files import local_file, read_file, weights_in
from .weights import EVERYTHING, LoadReport, load_weights


class TTTCheckpointer(DetectionCheckpointer):
    """detectron2's checkpointer for all formats, which loads by :func:`load_weights`.

    :meth:`load` takes a checkpoint to evaluate, whose weights must cover the model and hold
    nothing else. :meth:`resume_or_load` resumes under the same rule, or takes a *starting point*,
    which may lack parts of the model and may have others. Shapes must agree in both. A killed
    process leaves the checkpoint before or the new one, never a part of one.

    Args:
        model: the model to load into and to save.
        save_dir: where checkpoints are written.
        new_classes: a starting point may have another number of classes, or another main task.
        leave_out: prefixes of names that are not saved; may be set later.
        allow_new, extra_channels, init_recon_from_main: as in :func:`load_weights`.
        checkpointables: further objects to save and load, as in detectron2.
    """

    def __init__(
        self,
        model: nn.Module,
        save_dir: str = "",
        *,
        new_classes: bool = False,
        leave_out: tuple[str, ...] = (),
        allow_new: Sequence[str] = (),
        extra_channels: Literal["init", "zero"] = "init",
        init_recon_from_main: bool = False,
        **checkpointables: Any,
    ) -> None:
        super().__init__(model, save_dir, **checkpointables)
        self._new_classes = new_classes
        self.leave_out = leave_out
        self._options: dict[str, Any] = {
            "allow_new": allow_new,
            "extra_channels": extra_channels,
            "init_recon_from_main": init_recon_from_main,
        }
        self.report: LoadReport | None = None  # of the last load
        self._source = ""
        self._needed: tuple[str, ...] = ()  # what a file has to hold beside the weights

    def load(self, path: str, checkpointables: list[str] | None = None) -> dict[str, Any]:
        """Loads weights and, from detectron2's own files, the other checkpointables.

        Raises:
            UserError: the file is missing or damaged, or its weights do not fit.
        """
        self._source = path
        if path:
            path = local_file(path)
        try:
            return super().load(path, checkpointables)
        finally:
            self._parsed_url_during_load = None  # detectron2 leaves it set when a load fails

    def resume_or_load(self, path: str, *, resume: bool = True) -> dict[str, Any]:
        """Loads this run's last checkpoint if ``resume``, else the starting point at ``path``.

        Raises:
            UserError: the checkpoint is missing, damaged or only weights, or the starting point
                does not fit.
        """
        if resume and self.has_checkpoint():
            return self._resume()
        strict = self._options
        self._options = {
            **strict,
            "allow_new": EVERYTHING,
            "allow_unused": EVERYTHING,
            "allow_mismatched": None if self._new_classes else (),
        }
        try:
            return self.load(path, checkpointables=[])
        finally:
            self._options = strict

    def get_checkpoint_file(self) -> str:
        """Returns the file that ``last_checkpoint`` names; "" if there is no such note.

        Raises:
            UserError: the note names no file of this folder.
        """
        note = Path(self.save_dir) / "last_checkpoint"
        if not note.is_file():
            return ""
        name = note.read_bytes().decode(errors="replace").strip()
        if name and (note.parent / name).is_file():
            return str(note.parent / name)
        raise UserError(f"{note} names {name!r}, which is no file; {self._way_out()}")

    def _way_out(self) -> str:
        written = sorted(path.name for path in Path(self.save_dir).glob("model_[0-9f]*.pth"))
        if not written:
            return "without it this training starts anew in another OUTPUT_DIR"
        return f"write the name of a whole checkpoint into it (there are {', '.join(written)})"

    def _resume(self) -> dict[str, Any]:
        file = self.get_checkpoint_file()
        self._needed = tuple(self.checkpointables)
        try:
            return self.load(file)
        except UserError as error:
            note = Path(self.save_dir) / "last_checkpoint"
            raise UserError(f"{error} ({note} names it; {self._way_out()})") from error
        finally:
            self._needed = ()

    def weights(self) -> dict[str, Tensor]:
        """Returns the weights that are saved."""
        weights = self.model.state_dict()
        for name in [name for name in weights if name.startswith(self.leave_out)]:
            del weights[name]
        return weights

    def save(self, name: str, **kwargs: Any) -> None:
        """Saves the model, the checkpointables and ``kwargs`` in ``<name>.pth``."""
        if not self.save_dir or not self.save_to_disk:
            return
        content = {"model": self.weights(), **kwargs}
        content.update({key: part.state_dict() for key, part in self.checkpointables.items()})
        path = Path(self.save_dir) / f"{name}.pth"
        self.logger.info("Saving checkpoint to %s", path)
        save_torch(path, content)
        self.tag_last_checkpoint(path.name)

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        """Notes the checkpoint that a resume starts from."""
        note = Path(self.save_dir) / "last_checkpoint"
        write_atomically(note, lambda part: part.write_text(last_filename_basename))

    def _load_file(self, filename: str) -> dict[str, Any]:
        content = read_file(filename)
        weights = weights_in(content, self._source)
        others = content if "model" in content else {}
        if not others.keys() >= set(self._needed):
            raise UserError(f"{self._source} holds weights alone, not the state of a training")
        return {**others, "model": weights}

    def _load_model(self, checkpoint: dict[str, Any]) -> None:
        weights = checkpoint.pop("model")
        self.report = load_weights(self.model, weights, source=self._source, **self._options)
