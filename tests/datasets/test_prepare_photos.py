"""datasets/prepare_photos.py on packages of a few pictures, laid out as Debian's and Qt's."""

from __future__ import annotations

import io
import struct
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ttt_video.errors import UserError

sys.path.insert(0, str(Path(__file__).parents[2] / "datasets"))

import prepare_photos

RED = np.full((150, 200, 3), (200, 60, 40), np.uint8)
GREY = np.full((150, 200, 3), 128, np.uint8)
DARK = RED // 8
SMALL = RED[:100]


def encoded(pixels: np.ndarray, kind: str = "png") -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def package(path: Path, files: dict[str, bytes], ending: str = "xz") -> Path:
    """A Debian package: an ar archive of its version, and of tars of control data and files."""

    def tar(contents: dict[str, bytes]) -> bytes:
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w:xz") as archive:
            for name, content in contents.items():
                member = tarfile.TarInfo(f"./usr/share/{name}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
        return packed.getvalue()

    parts = b"!<arch>\n"
    members = {"debian-binary": b"2.0\n", "control.tar.xz": tar({"a": b"odd"})}
    for name, content in {**members, f"data.tar.{ending}": tar(files)}.items():
        parts += f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(content):<10}`\n".encode()
        parts += content + b"\n" * (len(content) % 2)
    path.write_bytes(parts)
    return path


def resources(folder: str, files: dict[str, bytes]) -> bytes:
    """Qt's binary resources, version 3: the root, one folder, its files; then contents and names.

    A node is name, flags, then children and the first of them, or language and place; and a time.
    """
    names, places, data = b"", [], b""
    for text in (folder, *files):
        places.append(len(names))
        names += struct.pack(">HI", len(text), 0) + text.encode("utf-16-be")
    tree = struct.pack(">IHIIQ", 0, 2, 1, 1, 0)
    tree += struct.pack(">IHIIQ", places[0], 2, len(files), 2, 0)
    for place, content in zip(places[1:], files.values(), strict=True):
        tree += struct.pack(">IHHHIQ", place, 0, 0, 1, len(data), 0)
        data += struct.pack(">I", len(content)) + content
    head = struct.pack(">4s5I", b"qres", 3, 24, 24 + len(tree), 24 + len(tree) + len(data), 0)
    return head + tree + data + names


def made(folder: Path) -> list[str]:
    return sorted(str(file.relative_to(folder)) for file in folder.rglob("*.png"))


def test_photographs_of_a_package_without_its_drawings(tmp_path, capsys):
    nature = "backgrounds/mate/nature"
    files = {
        f"{nature}/Aqua.jpg": encoded(np.tile(RED, (4, 4, 1)), "jpeg"),
        f"{nature}/Blinds.jpg": encoded(GREY, "jpeg"),
        f"{nature}/Dune.jpg": encoded(DARK, "jpeg"),
        f"{nature}/Garden.jpg": b"no picture",
        f"{nature}/Wood.jpg": encoded(SMALL, "jpeg"),
        "backgrounds/mate/abstract/Waves.jpg": encoded(RED, "jpeg"),
        "doc/copyright": b"GPL-2+",
    }
    deb, out = package(tmp_path / "mate-backgrounds_1_all.deb", files), tmp_path / "photos"
    for new in (1, 0):
        prepare_photos.main([str(deb), "--output", str(out)])
        assert made(out) == ["train/mate-backgrounds_backgrounds_mate_nature_Aqua.png"]
        first, second = capsys.readouterr().out.splitlines()
        assert first == (
            f"{out} has 1 pictures in train and 0 pictures in val, {new} of them new; 4 were left "
            "out, 1 damaged, 1 dark, 1 grey, 1 small"
        )
        assert second.endswith("Garden.jpg")
    pixels = np.asarray(Image.open(out / made(out)[0]))
    assert pixels.shape == (256, 341, 3)  # of 600 x 800
    assert np.abs(pixels.astype(int) - RED[0, 0]).max() < 6


def test_pictures_in_resource_files_are_found_by_their_paths(tmp_path):
    pictures = {"bee.webp": encoded(RED, "webp"), "icon.svg": b"<svg/>"}
    qrc = resources("explore_farm/resource", pictures)
    assert dict(prepare_photos.resource_files(qrc)) == {
        f"explore_farm/resource/{name}": content for name, content in pictures.items()
    }
    other = resources("lang/resource", pictures)
    files = {"rcc/explore_farm.rcc": qrc, "rcc/lang.rcc": other, "rcc/lang.webp": encoded(RED)}
    deb = package(tmp_path / "gcompris-qt-data_3_all.deb", files)
    prepare_photos.main([str(deb), "--output", str(tmp_path / "out")])
    (file,) = made(tmp_path / "out")
    assert file.endswith("explore_farm_resource_bee.png")


def test_every_tenth_picture_is_kept_for_validation(tmp_path):
    folder = tmp_path / "own"
    (folder / "deeper").mkdir(parents=True)
    for place in range(10):
        Image.fromarray(RED).save(folder / "deeper" / f"{place}.png")
    prepare_photos.main([str(folder), "--output", str(tmp_path / "out"), "--size", "128"])
    expected = [f"train/own_deeper_{place}.png" for place in range(9)]
    assert made(tmp_path / "out") == [*expected, "val/own_deeper_9.png"]
    (folder / "deeper" / "0.png").unlink()  # the others move up, and stay where they are
    prepare_photos.main([str(folder), "--output", str(tmp_path / "out"), "--size", "128"])
    assert made(tmp_path / "out") == [*expected, "val/own_deeper_9.png"]


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("unknown_1_all.deb", None, "nobody said which pictures of 'unknown' are photographs"),
        ("mate-backgrounds_1_all.deb", b"MZ", "begin with '!<arch>'"),
        ("mate-backgrounds_1_all.deb", b"!<arch>\n", "has no data.tar"),
        ("mate-backgrounds_1_all.deb", None, "holds no pictures"),
    ],
)
def test_packages_that_give_nothing_are_told_in_a_line(tmp_path, name, change, said):
    deb = package(tmp_path / name, {"doc/copyright": b""})
    if change is not None:
        deb.write_bytes(change)
    with pytest.raises(UserError, match=said) as error:
        prepare_photos.main([str(deb), "--output", str(tmp_path / "out")])
    assert "\n" not in str(error.value)


def test_a_package_that_is_cut_off_or_packed_otherwise(tmp_path):
    files = {"backgrounds/mate/nature/Aqua.jpg": encoded(RED, "jpeg")}
    deb = package(tmp_path / "mate-backgrounds_1_all.deb", files)
    deb.write_bytes(deb.read_bytes()[:-200])
    with pytest.raises(UserError, match="no Debian package that can be read"):
        prepare_photos.main([str(deb), "--output", str(tmp_path / "out")])
    package(deb, files, ending="zst")
    with pytest.raises(UserError, match="packed by zstd; unpack it"):
        prepare_photos.main([str(deb), "--output", str(tmp_path / "out")])
    with pytest.raises(UserError, match=r"gone_1\.deb"):
        prepare_photos.main([str(tmp_path / "gone_1.deb")])


def test_two_pictures_of_one_name_are_refused(tmp_path):
    for name in ("a.png", "a.jpg"):
        Image.fromarray(RED).save(tmp_path / name)
    with pytest.raises(UserError, match=r"a\.png and another picture would be named .*_a\.png"):
        prepare_photos.main([str(tmp_path), "--output", str(tmp_path / "out")])
