"""The configuration: its keys and how it is loaded.

``MODEL.MASK_FORMER.*``, ``MODEL.SEM_SEG_HEAD.*``, ``MODEL.SWIN.*`` and some keys of ``INPUT`` and
``SOLVER`` are Mask2Former's (:mod:`.borrowed`). ``TTT.*`` and the rest of :data:`KEYS` are this
project's (:mod:`.keys`). :func:`add_ttt_config` also works on top of Mask2Former's own
``add_maskformer2_config``.
"""

from .keys import ADAPTATION, AUTO, KEYS, Key, Rule, at_least, declare_keys, must_be
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
