"""What ships with the package: configs, and weights as ``ttt_video://NAME`` for keys of paths."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from iopath.common.file_io import PathHandler, PathManager

PREFIX = "ttt_video://"
WEIGHTS_DIR = Path(__file__).parent / "weights"


def config_dir() -> Path:
    """Returns the folder of the shipped configs: inside an installed package, else beside it."""
    package = Path(__file__).parent
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


class ShippedWeightsHandler(PathHandler):
    """Resolves the prefix for detectron2's PathManager, as ``detectron2://`` does for its zoo."""

    def _get_supported_prefixes(self) -> list[str]:
        return [PREFIX]

    def _get_local_path(self, path: str, force: bool = False, **kwargs: Any) -> str:
        return str(WEIGHTS_DIR / path.removeprefix(PREFIX))

    def _open(self, path: str, mode: str = "r", buffering: int = -1, **kwargs: Any) -> Any:
        if set(mode) & set("wax+"):
            raise OSError(f"{path} ships with the package and is read-only")
        return open(self._get_local_path(path), mode, buffering)

    def _exists(self, path: str, **kwargs: Any) -> bool:
        return Path(self._get_local_path(path)).exists()

    def _isfile(self, path: str, **kwargs: Any) -> bool:
        return Path(self._get_local_path(path)).is_file()


def register(manager: PathManager) -> None:
    """Adds the handler; may be called again."""
    manager.register_handler(ShippedWeightsHandler(), allow_override=True)
