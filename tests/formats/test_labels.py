"""Label maps of every depth in every reader: right, or refused in one line."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from raw_png import GRAY, GRAY_ALPHA, PALETTE, RGB, RGBA, write_raw_png

from ttt_video.data.checking import DatasetCheck
from ttt_video.data.mapper import JointDatasetMapper
from ttt_video.errors import UserError
from ttt_video.formats.labels import (
    PANOPTIC_FORMAT,
    SEM_SEG_FORMAT_KEY,
    check_class_ids,
    present_ids,
    read_class_map,
    read_segment_colors,
    read_segment_ids,
    read_sem_seg,
    refuse_label_maps,
)
from ttt_video.report.run_figures import label_picture
from ttt_video.tasks.stills import CheckedLabels

IDS = np.array([[0, 1, 1], [1, 0, 1]])  # classes that every depth can hold
SEGMENTS = [{"id": 1 + 256 * 2 + 65536 * 3, "category_id": 1}]
COLORS = np.stack([IDS, 2 * IDS, 3 * IDS], axis=-1)
CLASSES = ["road", "sky"]


@pytest.fixture
def own(tmp_path):
    """``own(kind, label file)``: a registered data set of one picture."""
    names = []

    def register(kind, file):
        picture = tmp_path / "picture.png"
        Image.fromarray(np.full((2, 3, 3), 7, np.uint8)).save(picture)
        key = "pan_seg_file_name" if kind == "panoptic" else "sem_seg_file_name"
        record = {"file_name": str(picture), key: str(file), "height": 2, "width": 3}
        if kind == "panoptic":
            record["segments_info"] = SEGMENTS
        if kind == "kitti_step":
            record[SEM_SEG_FORMAT_KEY] = PANOPTIC_FORMAT
        names.append(f"labels_of_{kind}_{len(names)}")
        DatasetCatalog.register(names[-1], lambda: [record])
        MetadataCatalog.get(names[-1]).set(
            stuff_classes=CLASSES,
            stuff_colors=[[9, 9, 9]] * 2,
            ignore_label=255,
            evaluator_type="panoptic" if kind == "panoptic" else "sem_seg",
        )
        return names[-1]

    yield register
    for name in names:
        DatasetCatalog.pop(name)
        MetadataCatalog.pop(name)


def read_everywhere(name):
    """The class map of the set's only picture, as each reader of the project has it."""
    (record,) = DatasetCatalog.get(name)
    if "pan_seg_file_name" in record:
        ids = read_segment_ids(record["pan_seg_file_name"])
        yield "evaluation", (ids == SEGMENTS[0]["id"]).astype(int)
        mapped = JointDatasetMapper(task="panoptic", augmentations=[])(record)
        yield "training", mapped["instances"].gt_masks.tensor[0].int().numpy()
    else:
        yield "evaluation", read_sem_seg(record)
        yield "training", JointDatasetMapper(task="semantic", augmentations=[])(record)["sem_seg"]
        yield "train_net's evaluation", CheckedLabels(name)(record["sem_seg_file_name"], dtype=int)


def refused_everywhere(name):
    """Yields what each reader of the project says of a data set's only label map."""
    (record,) = DatasetCatalog.get(name)
    panoptic = "pan_seg_file_name" in record
    mapper = JointDatasetMapper(task="panoptic" if panoptic else "semantic", augmentations=[])
    readers = [
        lambda: mapper(record),
        lambda: label_picture(name, record["file_name"]),
    ]
    if panoptic:
        readers.append(lambda: read_segment_ids(record["pan_seg_file_name"]))
    else:
        readers.append(lambda: read_sem_seg(record))
        readers.append(lambda: CheckedLabels(name)(record["sem_seg_file_name"]))
    said = []
    for reader in readers:
        with pytest.raises(UserError) as error:
            reader()
        said.append(str(error.value))
    return [*said, *DatasetCheck(name).problems]


@pytest.mark.parametrize(
    ("bits", "color_type"),
    [*itertools.product((1, 2, 4, 8), (GRAY, PALETTE))],
)
def test_class_maps_of_up_to_8_bits_are_read_as_stored(tmp_path, own, bits, color_type):
    file = write_raw_png(tmp_path / "l.png", IDS, bits=bits, color_type=color_type)
    name = own("semantic", file)
    for reader, labels in read_everywhere(name):
        assert np.asarray(labels).tolist() == IDS.tolist(), reader
    assert DatasetCheck(name).problems == []
    assert label_picture(name, str(tmp_path / "picture.png")).shape == (2, 3, 3)
    every = np.arange(2**bits).reshape(1, -1)  # each value of that depth
    write_raw_png(file, every, bits=bits, color_type=color_type)
    assert read_class_map(file).tolist() == every.tolist()
    assert read_class_map(file).dtype == np.uint8


@pytest.mark.parametrize("kind", ["panoptic", "kitti_step"])
def test_maps_of_segments_are_8_bit_rgb(tmp_path, own, kind):
    file = write_raw_png(tmp_path / "l.png", COLORS, bits=8, color_type=RGB)
    name = own(kind, file)
    for reader, labels in read_everywhere(name):
        assert np.asarray(labels).tolist() == IDS.tolist(), reader
    assert DatasetCheck(name).problems == []


@pytest.mark.parametrize(
    ("kind", "bits", "color_type", "what"),
    [
        ("semantic", 16, GRAY, "16-bit gray"),
        ("semantic", 8, GRAY_ALPHA, "gray with transparency"),
        ("semantic", 8, RGB, "8-bit RGB"),
        ("semantic", 8, RGBA, "RGB with transparency"),
        ("semantic", 16, RGB, "16-bit RGB"),
        ("panoptic", 16, RGB, "16-bit RGB"),
        ("panoptic", 8, RGBA, "RGB with transparency"),
        ("panoptic", 8, GRAY, "8-bit gray"),
        ("panoptic", 16, GRAY, "16-bit gray"),
        ("panoptic", 8, PALETTE, "8-bit palette"),
        ("kitti_step", 16, RGB, "16-bit RGB"),
        ("kitti_step", 8, GRAY_ALPHA, "gray with transparency"),
        ("kitti_step", 16, RGBA, "16-bit RGB with transparency"),
        ("kitti_step", 8, PALETTE, "8-bit palette"),
    ],
)
def test_other_depths_are_refused_by_every_reader(tmp_path, own, kind, bits, color_type, what):
    channels = {GRAY: 1, PALETTE: 1, GRAY_ALPHA: 2, RGB: 3, RGBA: 4}[color_type]
    samples = np.repeat(IDS[..., None], channels, axis=-1)
    file = write_raw_png(tmp_path / "l.png", samples, bits=bits, color_type=color_type)
    said = refused_everywhere(own(kind, file))
    assert set(said) == {
        f"{file} is no label map of {'class' if kind == 'semantic' else 'panoptic'} ids: it is "
        f"{what}, 2x3 (height x width); save it as "
        f"{'8-bit gray or palette' if kind == 'semantic' else '8-bit RGB'} PNG"
    }
    assert len(said) == 4 + (kind != "panoptic")


@pytest.mark.parametrize("orientation", range(2, 9))
@pytest.mark.parametrize("kind", ["semantic", "panoptic"])
def test_an_orientation_tag_is_refused_by_every_reader(tmp_path, own, kind, orientation):
    samples, color_type = (IDS, GRAY) if kind == "semantic" else (COLORS, RGB)
    file = tmp_path / "l.png"
    write_raw_png(file, samples, bits=8, color_type=color_type, orientation=orientation)
    for line in refused_everywhere(own(kind, file)):
        assert line.startswith(f"label map {file} has an orientation tag ({orientation})")


def test_a_tag_that_turns_nothing_is_no_matter(tmp_path):
    file = write_raw_png(tmp_path / "l.png", IDS, bits=8, color_type=GRAY, orientation=1)
    assert read_class_map(file).tolist() == IDS.tolist()


@pytest.mark.parametrize("suffix", ["jpg", "webp", "pgm"])
def test_formats_that_change_ids_are_refused(tmp_path, suffix):
    file = tmp_path / f"l.{suffix}"
    if suffix == "pgm":
        file.write_bytes(b"P5 3 2 18\n" + IDS.astype(np.uint8).tobytes())  # ids up to 18
    else:
        Image.fromarray(IDS.astype(np.uint8)).save(file)
    with pytest.raises(UserError, match=rf"l\.{suffix} is no label map of class ids: it is"):
        read_class_map(file)


@pytest.mark.parametrize("suffix", ["tif", "bmp", "pgm"])
def test_other_lossless_formats_are_read(tmp_path, suffix):
    Image.fromarray(IDS.astype(np.uint8)).save(tmp_path / f"l.{suffix}")
    assert read_class_map(tmp_path / f"l.{suffix}").tolist() == IDS.tolist()


def test_damaged_label_maps_are_named(tmp_path):
    for content in (b"", b"no image", None):
        file = tmp_path / "l.png"
        whole = write_raw_png(file, COLORS, bits=8, color_type=RGB).read_bytes()
        file.write_bytes(whole[:50] if content is None else content)
        with pytest.raises(UserError, match=r"label map .*l\.png cannot be read \(.+\)"):
            read_segment_colors(file)
    with pytest.raises(UserError, match=r"gone\.png cannot be read \(No such file"):
        read_class_map(tmp_path / "gone.png")


def test_labels_that_are_no_class():
    check_class_ids([0, 18, 255], 19, 255, "l.png")
    check_class_ids([200], 0, 255, "l.png")  # nobody knows how many there are
    for wrong in (-1, 19, 254):
        with pytest.raises(UserError, match=f"l.png has label {wrong}, but .* classes 0 to 18"):
            check_class_ids([0, wrong], 19, 255, "l.png")
    assert present_ids(np.array([[3, 255], [0, 3]], np.uint8)) == [0, 3, 255]


# ---- label maps beside frames


def files(names):
    return [Path("walk") / name for name in names.split()]


@pytest.mark.parametrize(
    ("names", "two"),
    [
        ("0.jpg 0.png 1.jpg 1.png", "0.jpg and 0.png"),
        ("0.jpg 0.png 1.jpg 2.jpg", "0.jpg and 0.png"),  # one label map is one too many
        ("0.png 0_sem.png", "0.png and 0_sem.png"),
        ("000010.png 000010_sem.png 000011.png 000012.png", "000010.png and 000010_sem.png"),
        ("f1.png f1mask.png f2.png f2mask.png", "f1.png and f1mask.png"),
        ("f 1.png f 1 gt.png", "f 1.png and f 1 gt.png"),
        ("a.png a_mask.png b.png b_mask.png c.png", "a.png and a_mask.png"),
        (
            "x_leftImg8bit.png x_gtFine_labelIds.png y_leftImg8bit.png y_gtFine_labelIds.png",
            "x_leftImg8bit.png and x_gtFine_labelIds.png",
        ),
        (
            "ulm_000001_000019_gtFine_labelIds.png ulm_000001_000019_leftImg8bit.png "
            "ulm_000002_000019_gtFine_labelIds.png ulm_000002_000019_leftImg8bit.png",
            "ulm_000001_000019_gtFine_labelIds.png and ulm_000001_000019_leftImg8bit.png",
        ),
        ("1_rgb.png 1_seg.png 1_depth.png 2_rgb.png 2_seg.png", "1_rgb.png and 1_seg.png"),
    ],
)
def test_a_folder_of_frames_and_label_maps_is_refused(names, two):
    if " gt" in names:
        listed = [Path("walk") / name for name in ("f 1.png", "f 1 gt.png")]
    else:
        listed = files(names)
    with pytest.raises(UserError) as error:
        refuse_label_maps(listed, "mend it so")
    assert str(error.value).startswith(f"walk/{two} are two pictures of one frame")
    assert str(error.value).endswith(": mend it so")


@pytest.mark.parametrize(
    "names",
    [
        "0.jpg 1.png 2.bmp",
        "1.png 1_2.png 1_3.png 2.png",  # numbers are no endings
        "1.1.png 1.05.png 1.2.png",
        "frame.png frame1.png frame_last.png",
        "street.png street_night.png garden.png",
        "street_day.png garden_night.png",
        "cam1_video_1.png cam1_video_2.png cam2_video_1.png cam2_video_2.png",
        "0_leftImg8bit.png 1_leftImg8bit.png",
        "a.png ab.png abc.png",
        "1_day.png 2_night.png 3_day.png",
    ],
)
def test_other_names_are_frames(names):
    refuse_label_maps(files(names), "")


@given(
    st.text(alphabet="ab_-. 1", max_size=5),
    st.sets(st.integers(0, 10**6), min_size=1, max_size=30),
    st.sampled_from(["", "_leftImg8bit", "b", ".x"]),
)
def test_numbered_frames_are_frames(before, numbers, after):
    refuse_label_maps([Path(f"{before}{number}{after}.png") for number in numbers], "")
