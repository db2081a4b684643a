"""What every command-line tool shares: finding configs, building them, and failing in one line."""

from __future__ import annotations

import argparse
import difflib
import logging
import re
import runpy
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
import yaml
from detectron2.config import CfgNode

from .config import get_cfg, validate_config
from .errors import UserError
from .processes import (
    drop_broken_streams,
    end_with_parent,
    kill_helpers,
    open_closed_streams,
    signals_interrupt,
)

PRESETS = ("paper", "release", "realtime")

DEFAULT_STREAM_CONFIG = "quick/stream_world.yaml"
"""What ``tools/stream_eval.py`` runs where it is given no config."""


def config_dir() -> Path:
    """The folder of the shipped configs: inside an installed package, else beside it."""
    package = Path(__file__).parent
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


def find_config(name: str) -> Path:
    """A config file from a path, or from a name under the shipped ``configs/``.

    Raises:
        UserError: there is none; the message lists the shipped ones, closest first.
    """
    for candidate in (Path(name), config_dir() / name, config_dir() / f"{name}.yaml"):
        if candidate.is_file():
            return candidate
    known = sorted(str(p.relative_to(config_dir())) for p in config_dir().rglob("*.yaml"))
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
    listed = close + [k for k in known if k not in close]
    raise UserError(f"no config {name!r}; give a path or one of: {', '.join(listed)}")


@contextmanager
def _merging(what: str) -> Iterator[None]:
    """Turns what yacs and PyYAML raise on bad input into one line."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{what}: {error.filename} cannot be read: {error.strerror}") from error
    except (AttributeError, TypeError) as error:  # keys were looked for in something else
        raise UserError(
            f"{what} does not merge: a section of keys and values is missing"
        ) from error
    except yaml.constructor.ConstructorError as error:
        tag = re.search(r"'tag:yaml.org,2002:(python/\S+)'", str(error))
        if tag is None:
            raise UserError(f"{what} does not merge: {' '.join(str(error).split())}") from error
        raise UserError(
            f"{what} has a tag that runs code when it is read, !!{tag[1]}; write its value out, or "
            "add --allow-unsafe-yaml if you trust the file"
        ) from error
    except (KeyError, ValueError, AssertionError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{what} does not merge: {reason}") from error


def _merge_fragment(cfg: CfgNode, file: Path, what: str) -> None:
    """Merges a file that is no config by itself; detectron2 would warn that it has no VERSION."""
    with _merging(what):
        cfg.merge_from_other_cfg(CfgNode(CfgNode.load_yaml_with_base(str(file))))


def merge_method(cfg: CfgNode, name: str) -> None:
    """Selects an adaptation method: ``TTT.METHOD``, and the keys that make it what it is.

    Those stand in ``configs/methods/<name>.yaml`` alone; a method without such a file needs none.
    """
    file = config_dir() / "methods" / f"{name}.yaml"
    if file.is_file():
        _merge_fragment(cfg, file, f"method {file}")
    cfg.TTT.METHOD = name


def key_values(opts: Sequence[str]) -> dict[str, str]:
    """detectron2's trailing overrides by their keys; of two for one key the last counts.

    Raises:
        UserError: a key without a value.
    """
    if len(opts) % 2:
        raise UserError(f"overrides are KEY VALUE pairs, but {opts[-1]!r} stands alone")
    return dict(zip(opts[::2], opts[1::2], strict=True))


def load_config(
    config_file: str | None,
    preset: str | None = None,
    opts: Sequence[str] = (),
    *,
    method: str | None = None,
    allow_unsafe_yaml: bool = False,
) -> CfgNode:
    """Defaults, the file, the preset, the method, KEY VALUE overrides; validated, not frozen.

    ``TTT.METHOD`` among the overrides selects a method as ``method`` does. ``MODEL.DEVICE``
    defaults to the GPU where PyTorch finds one, else to the CPU. A file with ``!!python/`` tags,
    which run code (some of Mask2Former's have them), is read only if ``allow_unsafe_yaml``.
    """
    cfg = get_cfg()
    cfg.MODEL.DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
    if config_file is not None:
        file = find_config(config_file)
        with _merging(f"config {file}"):
            cfg.merge_from_file(str(file), allow_unsafe=allow_unsafe_yaml)
    if preset is not None:
        # The release crops otherwise on COCO Videos, whose models are trained with this jitter.
        coco = preset == "release" and cfg.INPUT.DATASET_MAPPER_NAME.endswith("_lsj")
        file = find_config(f"presets/{preset}{'_coco' if coco else ''}.yaml")
        _merge_fragment(cfg, file, f"preset {file}")
        cfg.TTT.PRESET = preset
    overrides = key_values(opts)
    method = overrides.get("TTT.METHOD", method)
    selected = method or cfg.TTT.METHOD
    for name in (overrides.get("TTT.ENSEMBLE.METHOD"), method):  # the one under an ensemble first
        if name is not None:
            merge_method(cfg, name)
    cfg.TTT.METHOD = selected
    with _merging(f"overrides {' '.join(opts)}"):
        cfg.merge_from_list(list(opts))
    validate_config(cfg)
    return cfg


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds ``--config``, ``--preset`` and detectron2's trailing ``KEY VALUE`` overrides."""
    parser.add_argument(
        "--config",
        "--config-file",
        dest="config_file",
        metavar="FILE",
        help="config file, or the name of one under configs/",
    )
    add_merge_arguments(parser)
    parser.add_argument(
        "opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="config overrides, last"
    )


def add_merge_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds ``--preset``, ``--allow-unsafe-yaml`` and ``--register``."""
    parser.add_argument(
        "--preset",
        choices=PRESETS,
        help="settings to merge on top: the published ones, or much less work per frame",
    )
    add_register_argument(parser)
    parser.add_argument(
        "--allow-unsafe-yaml",
        action="store_true",
        help="let !!python/ tags in the config file run code, as in some of Mask2Former's configs",
    )


def add_register_argument(parser: argparse.ArgumentParser) -> None:
    """Adds ``--register``, whose files :func:`run_files` runs."""
    parser.add_argument(
        "--register",
        action="append",
        default=[],
        metavar="FILE",
        help="Python file to run first, such as one that registers your own data sets",
    )


def run_files(files: Sequence[str]) -> None:
    """Runs Python files, such as those that register data sets; once in every process.

    Raises:
        UserError: a file cannot be read. What its code raises is passed on.
    """
    for file in files:
        if not Path(file).is_file():
            raise UserError(f"--register {file}: no such file")
        runpy.run_path(file)


def run_tool(main: Callable[[], None]) -> None:
    """Runs a tool's ``main`` and ends the process as a command does.

    A :class:`UserError` becomes one line on stderr and exit code 2. Ctrl-C, SIGTERM and SIGHUP stop
    ``main`` as an exception does, so that it keeps what there is; the exit code is 128 and the
    signal's number. So it is, with SIGPIPE's, where nobody reads what is printed any more.
    """
    open_closed_streams()
    end_with_parent()
    logging.raiseExceptions = False  # a log that nobody reads any more stops nothing
    code, line = 0, ""
    try:
        with signals_interrupt():
            main()
    except UserError as error:
        code, line = 2, f"error: {error}"
    except KeyboardInterrupt as error:
        kill_helpers()
        code = getattr(error, "exit_code", 128 + signal.SIGINT)
        line = "interrupted" + (f" by {error}" if code != 128 + signal.SIGINT else "")
    except BrokenPipeError:
        code = 128 + signal.SIGPIPE
    except SystemExit:
        drop_broken_streams()
        raise
    if line:
        with suppress(BrokenPipeError):
            print(line, file=sys.stderr)
    if drop_broken_streams():
        code = code or 128 + signal.SIGPIPE
    if code:
        sys.exit(code)
