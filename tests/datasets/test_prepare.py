"""datasets/prepare_*.py on tiny trees in the layouts of the downloads."""

from __future__ import annotations

import json
import runpy
import shutil
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from fashion import write_fashion_mnist
from PIL import Image

from ttt_video.data import fashion_mnist
from ttt_video.data.kitti_step import load_kitti_step_sem_seg
from ttt_video.data.preparation import convert_files
from ttt_video.errors import UserError
from ttt_video.formats.labels import read_sem_seg

SCRIPTS = Path(__file__).parents[2] / "datasets"
sys.path.insert(0, str(SCRIPTS))

import prepare_cityscapes  # noqa: E402
import prepare_fashion_mnist  # noqa: E402
import prepare_kitti_step  # noqa: E402


def save(path: Path, pixels: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def read(path: Path) -> np.ndarray:
    return np.array(Image.open(path))


# ---- Cityscapes


def label_file(root: Path, split: str, number: int) -> Path:
    city = "ulm" if split == "train" else "lindau"
    return root / "gtFine" / split / city / f"{city}_{number:06d}_000019_gtFine_labelIds.png"


@pytest.fixture
def cityscapes(tmp_path):
    """Label maps of road (7), person (24), unlabelled (0) and license plate's neighbour, 33."""
    labels = np.array([[0, 7, 24], [33, 4, 7]], np.uint8)
    for split, count in (("train", 3), ("val", 1)):
        for number in range(count):
            save(label_file(tmp_path, split, number), labels)
    return tmp_path


def test_cityscapes_train_ids(cityscapes, capsys):
    prepare_cityscapes.main(["--root", str(cityscapes)])
    made = sorted((cityscapes / "gtFine").glob("*/*/*_gtFine_labelTrainIds.png"))
    assert len(made) == 4
    for file in made:
        assert Image.open(file).mode == "L"
        assert read(file).tolist() == [[255, 0, 11], [18, 255, 0]]
    assert "4 label maps have train ids, 4 of them new" in capsys.readouterr().out


def test_cityscapes_goes_on_where_it_stopped(cityscapes, capsys):
    broken = label_file(cityscapes, "train", 1)
    whole = broken.read_bytes()
    broken.write_bytes(whole[:40])
    with pytest.raises(UserError, match="000001_000019_gtFine_labelIds"):
        prepare_cityscapes.main(["--root", str(cityscapes)])
    made = set((cityscapes / "gtFine").glob("*/*/*_labelTrainIds.png"))
    first = prepare_cityscapes.train_id_file(label_file(cityscapes, "train", 0))
    save(first, np.full((2, 3), 9, np.uint8))  # somebody's own file is left alone
    broken.write_bytes(whole)
    prepare_cityscapes.main(["--root", str(cityscapes)])
    assert read(first).tolist() == [[9] * 3] * 2
    assert f"{4 - len(made | {first})} of them new" in capsys.readouterr().out
    assert not list(cityscapes.rglob("*.part"))


@pytest.mark.parametrize(
    ("pixels", "said"),
    [
        (np.full((2, 2), 34, np.uint8), "label id 34 is not"),
        (np.zeros((2, 2, 3), np.uint8), "no label map of class ids: it is 8-bit RGB"),
        (np.zeros((2, 2), np.uint16), "no label map of class ids: it is 16-bit gray"),
    ],
)
def test_cityscapes_files_of_another_kind(tmp_path, pixels, said):
    file = save(label_file(tmp_path, "val", 0), pixels)
    with pytest.raises(UserError, match=f"{file.name}.*{said}"):
        prepare_cityscapes.main(["--root", str(tmp_path)])
    assert not prepare_cityscapes.train_id_file(file).exists()


# ---- KITTI-STEP


@pytest.fixture
def kitti_step(tmp_path):
    """Official files: instances in green and blue, void in red; sequences of two splits."""
    rng = np.random.default_rng(0)
    for split, sequence in (("train", "0000"), ("val", "0002")):
        for t in range(3):
            panoptic = rng.integers(0, 256, (4, 6, 3), dtype=np.uint8)
            panoptic[..., 0] = rng.choice([0, 11, 18, 255], (4, 6))
            save(tmp_path / "panoptic_maps" / split / sequence / f"{t:06d}.png", panoptic)
            save(tmp_path / "training" / "image_02" / sequence / f"{t:06d}.png", panoptic)
    return tmp_path


def test_kitti_step_labels_mean_the_same_before_and_after(kitti_step):
    roots = kitti_step / "training" / "image_02", kitti_step / "panoptic_maps" / "val"
    before = load_kitti_step_sem_seg(*roots)
    expected = [read_sem_seg(record) for record in before]
    prepare_kitti_step.main(["--root", str(kitti_step)])
    after = load_kitti_step_sem_seg(*roots)
    assert [r["sem_seg_format"] for r in before] == ["kitti_step_panoptic"] * 3
    assert [r["sem_seg_format"] for r in after] == ["train_id"] * 3
    for record, labels in zip(after, expected, strict=True):
        np.testing.assert_array_equal(read_sem_seg(record), labels)
        size = json.loads(
            Path(record["sem_seg_file_name"].replace("_sem.png", ".json")).read_text()
        )
        assert size == {"imgHeight": 4, "imgWidth": 6}
    assert [r["panoptic_file_name"] for r in after] == [r["panoptic_file_name"] for r in before]


def test_kitti_step_goes_on_where_it_stopped(kitti_step, capsys):
    prepare_kitti_step.main(["--root", str(kitti_step)])
    (kitti_step / "panoptic_maps" / "val" / "0002" / "000001.json").unlink()
    (kitti_step / "panoptic_maps" / "train" / "0000" / "000002_sem.png").unlink()
    prepare_kitti_step.main(["--root", str(kitti_step)])
    assert capsys.readouterr().out.splitlines() == [
        "6 maps have train ids and sizes, 6 of them new",
        "6 maps have train ids and sizes, 2 of them new",
    ]


@pytest.mark.parametrize(
    ("pixels", "said"),
    [
        (np.full((2, 2, 3), 19, np.uint8), "red value 19 is not a class"),
        (np.zeros((2, 2), np.uint8), "no label map of panoptic ids: it is 8-bit gray"),
    ],
)
def test_kitti_step_files_of_another_kind(tmp_path, pixels, said):
    save(tmp_path / "panoptic_maps" / "val" / "0002" / "000000.png", pixels)
    with pytest.raises(UserError, match=said):
        prepare_kitti_step.main(["--root", str(tmp_path)])
    assert len(list(tmp_path.rglob("000000*"))) == 1


# ---- both


@pytest.mark.parametrize("name", ["cityscapes", "kitti_step"])
def test_nothing_there_is_one_line_and_exit_code_2(tmp_path, name, monkeypatch, capsys):
    script = str(SCRIPTS / f"prepare_{name}.py")
    monkeypatch.setattr(sys, "argv", [script, "--root", str(tmp_path)])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(script, run_name="__main__")
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {tmp_path}/")


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    def fail(path: Path) -> None:
        raise OSError(28, "No space left on device", str(path))

    with pytest.raises(UserError, match=r"cannot write .*a\.png: No space left"):
        convert_files([tmp_path / "a.png"], fail, "nothing")


# ---- Fashion-MNIST


@pytest.fixture
def fashion(tmp_path, monkeypatch) -> Path:
    """A folder with the four files, small."""
    write_fashion_mnist(tmp_path / "files", monkeypatch)
    monkeypatch.setattr(prepare_fashion_mnist, "FILES", fashion_mnist.FILES)
    return tmp_path / "files"


def package(files: Path, deb: Path, compression: str) -> Path:
    """A Debian package: an ar archive, here in Python, with the tree that dpkg would unpack."""
    tree = deb.parent / "tree/usr/share/datasets/fashion-mnist"
    shutil.copytree(files, tree)
    data = deb.parent / f"data.tar.{compression}"
    with tarfile.open(data, f"w:{compression}") as tar:
        tar.add(deb.parent / "tree", arcname=".")
    members = {"debian-binary": b"2.0\n", "control.tar.xz": b"odd", data.name: data.read_bytes()}
    content = b"!<arch>\n"
    for name, part in members.items():
        header = f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(part):<10}`\n".encode()
        content += header + part + b"\n" * (len(part) % 2)
    deb.write_bytes(content)
    return deb


@pytest.mark.parametrize("compression", ["", "xz", "gz"])
def test_fashion_mnist_comes_from_a_folder_or_a_package(fashion, tmp_path, compression, capsys):
    source = package(fashion, tmp_path / "a.deb", compression) if compression else fashion
    root = tmp_path / "root"
    prepare_fashion_mnist.main(["--source", str(source), "--root", str(root)])
    assert "has Fashion-MNIST's 4 files" in capsys.readouterr().out
    made = {file.name: file.read_bytes() for file in root.iterdir()}
    assert made == {file.name: file.read_bytes() for file in fashion.iterdir()}
    assert made.keys() == fashion_mnist.FILES.keys()


def test_packages_that_cannot_be_read_are_told_in_a_line(fashion, tmp_path):
    deb = package(fashion, tmp_path / "a.deb", "xz")
    whole = deb.read_bytes()
    cases = {
        "is no Debian package": b"PK" + whole,
        "ends early": whole[:-500],
        "has no data": whole.replace(b"data.tar.xz ", b"date.tar.xz "),
        "dpkg -x .* and give --source FOLDER/usr/share/datasets/fashion-mnist": whole.replace(
            b"\xfd7zXZ",
            b"\x28\xb5\x2f\xfd\x00",  # zstd's first bytes
        ),
    }
    for message, content in cases.items():
        deb.write_bytes(content)
        with pytest.raises(UserError, match=message) as error:
            prepare_fashion_mnist.main(["--source", str(deb), "--root", str(tmp_path / "root")])
        assert "\n" not in str(error.value)
    (fashion / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(UserError, match=r"has no t10k-labels-idx1-ubyte\.gz: install Debian's"):
        prepare_fashion_mnist.main(["--source", str(fashion), "--root", str(tmp_path / "root")])
