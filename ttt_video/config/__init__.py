"""The configuration: its keys (:mod:`.keys`, :mod:`.borrowed`) and how one is loaded.

``MODEL.MASK_FORMER.*``, ``MODEL.SEM_SEG_HEAD.*``, ``MODEL.SWIN.*`` and the ``INPUT`` / ``SOLVER``
additions are Mask2Former's; ``TTT.*`` and the rest of :data:`KEYS` are ours.
:func:`add_ttt_config` works alone and on top of Mask2Former's own ``add_maskformer2_config``: keys
that are already there are left as they are.
"""

from .keys import ADAPTATION, KEYS, Key, Rule, at_least, declare_keys, must_be
from .loading import (
    DEFAULT_STREAM_CONFIG,
    PRESETS,
    check_device,
    find_config,
    key_values,
    load_config,
    merge_method,
    merge_preset,
)
from .schema import add_ttt_config, get_cfg, restore_defaults, validate_config
from .yaml_files import load_yaml, read_yaml

__all__ = [
    "ADAPTATION",
    "DEFAULT_STREAM_CONFIG",
    "KEYS",
    "PRESETS",
    "Key",
    "Rule",
    "add_ttt_config",
    "at_least",
    "check_device",
    "declare_keys",
    "find_config",
    "get_cfg",
    "key_values",
    "load_config",
    "load_yaml",
    "merge_method",
    "merge_preset",
    "must_be",
    "read_yaml",
    "restore_defaults",
    "validate_config",
]
