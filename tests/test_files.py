"""Files that are whole or not there; what killed processes leave; folders of one process."""

from __future__ import annotations

import errno
import os
import resource
import threading

import pytest
import torch

from ttt_video import files
from ttt_video.errors import UserError
from ttt_video.files import FolderLock, WriteBehind, remove_leftovers, save_torch, write_atomically

DEAD = 99_999_999
"""No process has this number: Linux has at most 2**22."""


def test_leftovers_of_dead_processes_are_removed_and_of_others_kept(tmp_path):
    alive = tmp_path / f".a.txt.{os.getppid()}.part"
    dead, other = tmp_path / f".a.txt.{DEAD}.part", tmp_path / f".b.txt.{DEAD}.part"
    foreign = [
        tmp_path / ".a.txt.part",
        tmp_path / f"a.txt.{DEAD}.part",
        tmp_path / ".a.txt.x.part",
    ]
    for file in (alive, dead, other, *foreign):
        file.write_text("half")
    write_atomically(tmp_path / "a.txt", lambda part: part.write_text("whole"))
    assert {*tmp_path.iterdir()} == {tmp_path / "a.txt", alive, other, *foreign}
    remove_leftovers(tmp_path)
    assert {*tmp_path.iterdir()} == {tmp_path / "a.txt", alive, *foreign}
    remove_leftovers(tmp_path / "nowhere")


def test_what_is_durable_is_on_disk_before_the_old_file_goes(tmp_path, monkeypatch):
    file = tmp_path / "state.pth"
    steps = []

    def fsync(descriptor):
        steps.append(("flush", os.readlink(f"/proc/self/fd/{descriptor}")))

    def replace(old, new):
        steps.append(("replace", str(new)))

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    save_torch(file, {"a": 1})
    part = tmp_path / f".state.pth.{os.getpid()}.part"
    assert steps == [("flush", str(part)), ("replace", str(file)), ("flush", str(tmp_path))]


def test_torch_files_on_a_full_disk_are_one_line_and_the_old_one_stays(tmp_path):
    save_torch(tmp_path / "state.pth", {"a": 1})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(UserError) as error:
            save_torch(tmp_path / "state.pth", {"a": torch.zeros(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert str(error.value) == f"cannot write {tmp_path}/state.pth: {os.strerror(errno.EFBIG)}"
    assert torch.load(tmp_path / "state.pth", weights_only=True) == {"a": 1}
    assert os.listdir(tmp_path) == ["state.pth"]


def test_a_lock_is_of_one_folder_and_one_process(tmp_path):
    lock = FolderLock(tmp_path, "taken")
    with pytest.raises(UserError, match="taken"):
        FolderLock(tmp_path, "taken", shared=True)
    lock.share()
    FolderLock(tmp_path, "taken", shared=True).close()
    with pytest.raises(UserError, match="taken"):
        FolderLock(tmp_path, "taken")
    lock.close()
    lock.close()
    FolderLock(tmp_path, "taken").close()
    with pytest.raises(UserError, match="nowhere cannot be opened"):
        FolderLock(tmp_path / "nowhere", "taken")


@pytest.mark.parametrize("again", [False, True])
def test_a_folder_that_was_removed_is_noticed(tmp_path, again):
    folder = tmp_path / "run"
    folder.mkdir()
    lock = FolderLock(folder, "taken")
    lock.check()
    folder.rmdir()
    if again:
        folder.mkdir()
    with pytest.raises(UserError, match="was removed or replaced"):
        lock.check()
    lock.close()


def test_jobs_behind_are_run_though_a_wait_for_them_is_interrupted(monkeypatch):
    """Jobs that were queued are run before the thread ends, as after Ctrl-C."""
    go, done = threading.Event(), []

    def interrupted(pending):
        monkeypatch.undo()
        raise KeyboardInterrupt

    thread = WriteBehind("test", 2)
    thread.submit(lambda: done.append(go.wait(20)))
    thread.submit(lambda: done.append("second"))
    monkeypatch.setattr(files, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        thread.submit(lambda: done.append("not queued"))
    go.set()
    thread.close()
    assert done == [True, "second"]


def test_what_went_wrong_behind_is_known_without_waiting():
    def fail():
        raise UserError("full")

    thread, ended = WriteBehind("test"), threading.Event()
    thread.check()
    thread.submit(fail)
    with pytest.raises(UserError, match="full"):
        thread.flush()
    thread.submit(ended.set)
    with pytest.raises(UserError, match="full"):
        thread.check()
    with pytest.raises(UserError, match="full"):
        thread.close()
    assert not ended.is_set()
