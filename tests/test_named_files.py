"""The content of the files that a config names."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import pytest

import ttt_video.tasks  # noqa: F401, whose keys are declared
from ttt_video.config import KEYS, get_cfg
from ttt_video.config.named_files import digest_of, file_digests, find_profile

FILES = [name for name, key in KEYS.items() if key.file]
WORDS = {
    "TTT.PRESET", "TTT.METHOD", "TTT.MASK_KIND", "TTT.ENSEMBLE.METHOD",
}  # fmt: skip
"""Keys of a name out of a registry, whose choices stand there."""


def test_every_key_of_a_free_text_is_a_file_or_known_to_be_none():
    texts = {name for name, key in KEYS.items() if isinstance(key.default, str) and not key.choices}
    assert texts - set(FILES) == WORDS


@pytest.mark.parametrize("key", FILES)
def test_each_file_is_told_by_its_content(key, tmp_path):
    file = tmp_path / "a.json"
    cfg = get_cfg()
    cfg.merge_from_list([key, str(file)])
    shutil.copy(find_profile("one_core"), file)
    assert file_digests(cfg) == {key: hashlib.sha256(file.read_bytes()).hexdigest()}
    before = file_digests(cfg)
    with file.open("ab") as more:
        more.write(b"\n")
    assert file_digests(cfg).keys() == before.keys()
    assert file_digests(cfg) != before


def test_a_config_may_be_older_than_a_key():
    cfg = get_cfg()
    del cfg.TTT.COLOR["LPIPS"]
    del cfg.MODEL["VIT_MAE"]
    assert file_digests(cfg) == {}


def test_no_file_is_no_content(tmp_path):
    assert file_digests(get_cfg()) == {}
    assert digest_of(str(tmp_path)) == digest_of(str(tmp_path / "missing")) == ""


def test_a_shipped_file_is_read_by_its_name():
    name = "quick_joint_world_head.safetensors"
    file = Path(__file__).parents[1] / "ttt_video" / "weights" / name
    assert digest_of(f"ttt_video://{name}") == hashlib.sha256(file.read_bytes()).hexdigest()
