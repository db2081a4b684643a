"""Builds a run's config from defaults, a file, a preset, a method and KEY VALUE overrides."""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import yaml
from detectron2.config import CfgNode
from fvcore.common.config import BASE_KEY

from ..errors import UserError, nearest, suggestion
from ..shipped import config_dir
from .keys import ADAPTATION
from .methods import named_method
from .schema import get_cfg, merge, merge_words, restore_defaults, validate_config
from .yaml_files import compose_yaml

logger = logging.getLogger(__name__)

PRESETS = ("paper", "release", "realtime")

DEFAULT_STREAM_CONFIG = "quick/stream_world.yaml"
"""The config of ``tools/stream_eval.py`` unless it is given one."""


def find_config(name: str) -> Path:
    """Returns the config file of a path, or of a name under the shipped ``configs/``.

    Raises:
        UserError: there is none; the message names the closest of the shipped ones, or all that
            can be run.
    """
    for candidate in (Path(name), config_dir() / name, config_dir() / f"{name}.yaml"):
        if candidate.is_file():
            return candidate
    files = [p for p in config_dir().rglob("*.yaml") if not p.name.startswith("Base-")]
    shipped = sorted(p.relative_to(config_dir()).as_posix() for p in files)
    known = [k for k in shipped if not k.startswith(("presets/", "sweeps/", "methods."))]
    raise UserError(f"no config {name!r}; {suggestion(name, known, 'give a path or one of: ')}")


def _keys(cfg: CfgNode, section: str = "") -> Iterator[str]:
    """Yields the full names of all keys that have values."""
    for name, value in cfg.items():
        if isinstance(value, CfgNode):
            yield from _keys(value, f"{section}{name}.")
        else:
            yield f"{section}{name}"


def read_config(text: str, what: str) -> CfgNode:
    """Returns the content of a resolved config, without the device of the machine that made it.

    Raises:
        UserError: ``what``, from which the text is, has no config there.
    """
    with _merging(f"the config in {what}"):
        content = CfgNode.load_cfg(text)
        content.MODEL.pop("DEVICE", None)
    return content


@contextmanager
def _merging(what: str) -> Iterator[None]:
    """Turns exceptions of yacs and PyYAML about bad input into one line."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{what}: {error.filename} cannot be read: {error.strerror}") from error
    except (AttributeError, TypeError) as error:  # a value stands where a section belongs
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
        if missing := re.search(r"Non-existent (?:config )?key: ([\w.]+)", reason):
            close = nearest(missing[1], _keys(get_cfg()))
            hint = f"; did you mean {' or '.join(close)}?" if close else ""
            reason = f"there is no key {missing[1]}{hint}"
        raise UserError(f"{what} does not merge: {reason}") from error


@lru_cache(maxsize=64)  # many configs have the same bases, and PyYAML is slow
def _composed(text: bytes, name: str) -> yaml.Node | None:
    """Returns :func:`compose_yaml`'s nodes, which are to be read only."""
    return compose_yaml(text, name)


def _content(
    file: Path, *, allow_unsafe: bool = False, above: tuple[Path, ...] = ()
) -> dict[str, Any]:
    """Returns what a file and its bases (``_BASE_``) say, the later over the earlier.

    A base is sought beside its file, then among the shipped configs. ``above`` are the files that
    lead here.
    """
    chain = (*above, file.resolve())
    if file.resolve() in above:
        raise UserError(f"_BASE_ goes round in circles: {' -> '.join(map(str, chain))}")
    text = file.read_bytes()
    root = _composed(text, str(file))
    try:
        own = None if root is None else yaml.SafeLoader("").construct_document(root)
    except yaml.constructor.ConstructorError:
        if not allow_unsafe:
            raise
        logger.warning("%s is read with tags that run code", file)
        own = yaml.unsafe_load(text)
    if not isinstance(own, dict):
        raise TypeError(f"{file} has no keys")
    content: dict[str, Any] = {}
    if BASE_KEY in own:
        names = own.pop(BASE_KEY)
        for name in names if isinstance(names, list) else [names]:
            if not isinstance(name, str) or not name:
                raise UserError(f"{file}: {BASE_KEY} must be the path of a file, or a list of such")
            if name.startswith(("https://", "http://")):
                base = CfgNode.load_yaml_with_base(name, allow_unsafe=allow_unsafe)
            else:
                beside = file.parent / Path(name).expanduser()
                place = beside if beside.is_file() else config_dir() / name
                place = place if place.is_file() else beside
                base = _content(place, allow_unsafe=allow_unsafe, above=chain)
            _lay_over(content, base)
    _lay_over(content, own)
    return content


def _lay_over(below: dict[str, Any], above: Mapping[str, Any]) -> None:
    """Sets the values of ``above`` in ``below``, section by section."""
    for key, value in above.items():
        if isinstance(value, dict) and key in below:
            if not isinstance(below[key], dict):
                raise ValueError(f"{key} is a section, and a value in {BASE_KEY}")
            _lay_over(below[key], value)
        else:
            below[key] = value


def _read(file: Path, *, allow_unsafe: bool = False) -> CfgNode:
    """Returns the content of a file and its bases.

    Raises:
        ValueError: it is of a version of detectron2's configs that has other keys.
    """
    content = CfgNode(_content(file, allow_unsafe=allow_unsafe))
    version, known = content.get("VERSION"), get_cfg().VERSION
    if version not in (known, None):
        raise ValueError(f"VERSION is {version}, and detectron2's keys are of version {known}")
    return content


def merge_method(cfg: CfgNode, name: str) -> None:
    """Selects a method: ``TTT.METHOD``, and its keys of ``configs/methods.yaml``."""
    merge(cfg, CfgNode({"TTT": copy.deepcopy(named_method(name).keys)}))
    cfg.TTT.METHOD = name


def merge_preset(cfg: CfgNode, name: str) -> None:
    """Selects a preset: its file on top of the defaults of every key of adaptation.

    Keys of the weights and of single methods stay as they are unless the file names them.

    Raises:
        UserError: there is no such preset.
    """
    if name not in PRESETS:
        raise UserError(f"no preset {name!r}; choose from {', '.join(PRESETS)}")
    # The release has other crops on COCO Videos, whose models are trained with this jitter.
    coco = name == "release" and cfg.INPUT.DATASET_MAPPER_NAME.endswith("_lsj")
    file = find_config(f"presets/{name}{'_coco' if coco else ''}.yaml")
    restore_defaults(cfg, ADAPTATION)
    with _merging(f"preset {file}"):
        merge(cfg, _read(file))
    cfg.TTT.PRESET = name


def _merge_own_settings(cfg: CfgNode, file: Path, methods: Sequence[str]) -> None:
    """Merges the settings of these methods in ``TTT.BY_METHOD``, and empties it.

    Settings of the method whose code a method runs count for that method, too.
    """
    own = cfg.TTT.BY_METHOD
    for name in dict.fromkeys(name for m in methods for name in (named_method(m).runs, m)):
        if name in own:
            with _merging(f"TTT.BY_METHOD.{name} of config {file}"):
                merge(cfg, CfgNode({"TTT": own[name]}))
    cfg.TTT.BY_METHOD = CfgNode(new_allowed=True)


def key_values(opts: Sequence[str]) -> dict[str, str]:
    """Returns detectron2's trailing overrides by key; if a key stands twice, the last one counts.

    Raises:
        UserError: a key without a value, or a flag among them.
    """
    flag = next((word for word in opts if word.startswith("--")), None)
    if flag is not None:
        raise UserError(f"{flag} stands among the KEY VALUE overrides; flags go before them")
    if len(opts) % 2:
        raise UserError(f"overrides are KEY VALUE pairs, but {opts[-1]!r} stands alone")
    return dict(zip(opts[::2], opts[1::2], strict=True))


def load_config(
    config_file: str | CfgNode | None,
    preset: str | None = None,
    opts: Sequence[str] = (),
    *,
    method: str | None = None,
    allow_unsafe_yaml: bool = False,
) -> CfgNode:
    """Returns a validated config: defaults, then file, preset, method and KEY VALUE overrides.

    It is not frozen. The file's settings for the selected method (``TTT.BY_METHOD``) are part of
    the file. ``TTT.METHOD`` among the overrides selects a method, too. ``MODEL.DEVICE`` defaults to
    the GPU if PyTorch finds one. ``config_file`` may also be the content of a resolved config. A
    file with ``!!python/`` tags, which run code (some of Mask2Former's have them), is read only
    with ``allow_unsafe_yaml``.
    """
    cfg = get_cfg()
    cfg.MODEL.DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
    overrides = key_values(opts)
    method = overrides.get("TTT.METHOD", method)
    # The method within an ensemble comes first.
    methods = [name for name in (overrides.get("TTT.ENSEMBLE.METHOD"), method) if name is not None]
    if isinstance(config_file, CfgNode):
        with _merging("the config in the weights"):
            merge(cfg, config_file)
    elif config_file is not None:
        file = find_config(config_file)
        with _merging(f"config {file}"):
            merge(cfg, _read(file, allow_unsafe=allow_unsafe_yaml))
        _merge_own_settings(cfg, file, methods)
    if preset is not None:
        merge_preset(cfg, preset)
    selected = method or cfg.TTT.METHOD
    for name in methods:
        merge_method(cfg, name)
    cfg.TTT.METHOD = selected
    with _merging(f"overrides {' '.join(opts)}"):
        merge_words(cfg, overrides)
    validate_config(cfg)
    return cfg


def check_device(name: str) -> None:
    """Refuses a ``MODEL.DEVICE`` that is no device, or a GPU that does not exist."""
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"MODEL.DEVICE is {name!r}; give cpu, cuda or cuda:N") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"MODEL.DEVICE is {name!r} but there is no GPU; use cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"MODEL.DEVICE is {name!r} but there are {torch.cuda.device_count()} GPUs")
