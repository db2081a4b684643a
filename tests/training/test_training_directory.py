"""The folder of a training: its lock, and the settings that a resumed one must keep."""

from __future__ import annotations

import contextlib
import logging
import os
import re

import pytest
import yaml

from ttt_video.config import load_config
from ttt_video.errors import UserError
from ttt_video.stream.directory import RunDirectory
from ttt_video.training.directory import (
    LOG_FILE_ONLY,
    keep_to_images,
    open_logs,
    training_directory,
)


def config(folder, *opts):
    opts = [*map(str, opts), "OUTPUT_DIR", str(folder), "MODEL.DEVICE", "cpu"]
    return load_config("quick/joint_cityscapes.yaml", opts=opts)


def enter(cfg, *, resume=False, evaluate=False, writes=True):
    with training_directory(cfg, resume=resume, evaluate=evaluate, writes=writes):
        pass


@pytest.fixture
def trained(tmp_path):
    """A folder with a checkpoint of the unchanged config."""
    enter(config(tmp_path))
    (tmp_path / "last_checkpoint").write_text("model_0000009.pth")
    return tmp_path


@pytest.mark.parametrize("evaluate", [False, True])
def test_one_process_writes_at_a_time(tmp_path, evaluate):
    """Whether it trains, evaluates or streams."""
    with training_directory(config(tmp_path), resume=False, evaluate=False):
        with pytest.raises(UserError, match=r"another process is writing.*another OUTPUT_DIR"):
            enter(config(tmp_path), resume=True, evaluate=evaluate)
        with pytest.raises(UserError, match="another process is writing"):
            RunDirectory(tmp_path)
        # One of several machines writes; the others only look.
        enter(config(tmp_path), writes=False)
    enter(config(tmp_path))


def test_a_process_that_was_forked_does_not_hold_the_folder(tmp_path):
    """Loading processes live on for seconds after their training was killed."""
    holding = training_directory(config(tmp_path), resume=False, evaluate=False)
    holding.__enter__()
    read, write = os.pipe()
    child = os.fork()
    if not child:
        os.read(read, 1)
        os._exit(0)
    try:
        holding.__exit__(None, None, None)
        enter(config(tmp_path))
    finally:
        os.write(write, b"x")
        os.waitpid(child, 0)


def test_a_training_that_is_there_is_not_overwritten(trained):
    with pytest.raises(UserError, match="already holds a training run; add --resume"):
        enter(config(trained))
    with pytest.raises(UserError, match="already holds a training run; add --resume"):
        enter(config(trained), writes=False)
    enter(config(trained), resume=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("SOLVER.IMS_PER_BATCH", 3, "SOLVER.IMS_PER_BATCH: 8, now 3"),
        ("SOLVER.MAX_ITER", 99, "SOLVER.MAX_ITER: 1500, now 99"),
        ("SOLVER.BASE_LR", 0.5, "SOLVER.BASE_LR: 0.001, now 0.5"),
        ("DATASETS.TRAIN", "('other',)", "now ['other']"),
        ("DATASETS.TEST", "('other',)", "now ['other']"),
        ("TTT.MASK_RATIO", 0.5, "TTT.MASK_RATIO: 0.8, now 0.5"),
        ("SEED", 3, "SEED: 0, now 3"),
        ("MODEL.WEIGHTS", "other.pkl", "MODEL.WEIGHTS: '', now 'other.pkl'"),
    ],
)
def test_other_settings_are_refused_on_resume(trained, key, value, said):
    before = (trained / "config.yaml").read_bytes()
    with pytest.raises(UserError, match=re.escape(said)) as error:
        enter(config(trained, key, value), resume=True)
    assert str(error.value).count(", now ") == 1  # and no other key
    assert "\n" not in str(error.value)
    assert (trained / "config.yaml").read_bytes() == before


def test_what_changes_no_weight_may_change(trained):
    free = {
        "MODEL.DEVICE": "cuda",
        "DATALOADER.NUM_WORKERS": 3,
        "SOLVER.CHECKPOINT_PERIOD": 7,
        "SOLVER.FROM_SCRATCH": False,
        "TTT.RECON.PICTURE_PERIOD": 5,
        "VIS_PERIOD": 10,
        "TEST.EXPECTED_RESULTS": "[['sem_seg', 'mIoU', 1.0, 2.0]]",
    }
    opts = [word for pair in free.items() for word in pair]
    enter(config(trained, *opts), resume=True)
    moved = trained.with_name("moved")
    trained.rename(moved)
    enter(config(moved), resume=True)


def test_weights_may_be_left_out_on_resume(tmp_path):
    enter(config(tmp_path, "MODEL.WEIGHTS", "swin.pkl"))
    (tmp_path / "last_checkpoint").write_text("model_0000009.pth")
    enter(config(tmp_path), resume=True)


def test_evaluation_leaves_the_config_of_the_training(trained, tmp_path_factory):
    before = (trained / "config.yaml").read_bytes()
    enter(config(trained, "DATASETS.TEST", "('other',)"), evaluate=True)
    assert (trained / "config.yaml").read_bytes() == before
    enter(config(trained), resume=True)
    alone = tmp_path_factory.mktemp("alone")
    enter(config(alone, "SEED", 5), evaluate=True)
    assert yaml.safe_load((alone / "config.yaml").read_text())["SEED"] == 5


@pytest.mark.parametrize("content", [b"", b"A: [", b"\xff\xfe\x00", b"- 1\n"])
def test_a_damaged_config_is_said(trained, content):
    (trained / "config.yaml").write_bytes(content)
    with pytest.raises(UserError, match=r"config\.yaml is damaged.*delete it"):
        enter(config(trained), resume=True)
    (trained / "config.yaml").unlink()
    enter(config(trained), resume=True)


# ---- the images of a training


def images(*numbers, root="/data"):
    return [
        {"file_name": f"{root}/{n}.png", "sem_seg_file_name": f"{root}/{n}_ids.png"}
        for n in numbers
    ]


@pytest.fixture
def eight(trained):
    """The config of a training on eight images, with a checkpoint."""
    cfg = config(trained, "DATASETS.TRAIN", "('first', 'second')")
    (trained / "last_checkpoint").unlink()
    keep_to_images(cfg, images(9))  # ended before its first checkpoint
    keep_to_images(cfg, images(*range(8)))
    (trained / "last_checkpoint").write_text("model_0000009.pth")
    return cfg


@pytest.mark.parametrize(
    ("numbers", "said"),
    [
        (range(3), "has 3 images, the run began with 8"),
        (range(9), "has 9 images, the run began with 8"),
        (range(1, 9), "lists other images or labels than the run began with"),
    ],
)
def test_other_images_are_refused_on_resume(eight, numbers, said):
    with pytest.raises(UserError) as error:
        keep_to_images(eight, images(*numbers))
    assert str(error.value) == (
        f"data set first, second {said}; restore it, or start a new run from the weights in "
        f"{eight.OUTPUT_DIR}, with another OUTPUT_DIR"
    )
    keep_to_images(eight, images(*reversed(range(8)), root="/mnt/elsewhere"))


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"images": 8}', "{"])
def test_a_damaged_list_of_images_is_said(eight, trained, content):
    (trained / "training_data.json").write_text(content)
    with pytest.raises(UserError, match=r"training_data\.json is damaged.*delete it to go on"):
        keep_to_images(eight, images(*range(8)))
    (trained / "training_data.json").unlink()
    keep_to_images(eight, images(*range(3)))


def test_a_training_of_an_earlier_version_goes_on(trained):
    keep_to_images(config(trained), images(*range(3)))
    with pytest.raises(UserError, match="has 2 images, the run began with 3"):
        keep_to_images(config(trained), images(*range(2)))


def test_a_folder_that_cannot_be_made_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"OUTPUT_DIR .*file/run cannot be made: Not a directory"):
        enter(config(tmp_path / "file" / "run"))


def test_long_records_go_to_the_file_alone(tmp_path, capsys):
    log = logging.getLogger("ttt_video.test_training_directory")
    for folder in ("first", "second"):
        (tmp_path / folder).mkdir()
        open_logs(str(tmp_path / folder))
        log.info("short of %s", folder)
        log.info("long of %s", folder, extra=LOG_FILE_ONLY)
    shown = capsys.readouterr().out
    assert "short of second" in shown
    assert "long" not in shown
    for folder in ("first", "second"):
        lines = (tmp_path / folder / "log.txt").read_text().splitlines()
        assert [line.partition("INFO: ")[2] for line in lines] == [
            f"short of {folder}",
            f"long of {folder}",
        ]


def test_a_full_disk_is_not_said_for_every_line_of_the_log(tmp_path, capsys):
    open_logs(str(tmp_path))
    log = logging.getLogger("ttt_video")
    (file,) = (h for h in log.handlers if isinstance(h, logging.FileHandler))
    whole, file.stream = file.stream, open("/dev/full", "w")  # noqa: SIM115
    log.info("a line")
    with contextlib.suppress(OSError):
        file.stream.close()
    file.stream = whole
    captured = capsys.readouterr()
    assert "a line" in captured.out
    assert captured.err == ""
