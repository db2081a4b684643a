"""Registers your own data set: folders of frames and label maps, or frames with COCO json."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode
from pycocotools import mask as rle

from ..errors import UserError
from ..formats.coco_json import frame_places, read_instances
from ..formats.coco_masks import compress
from ..formats.images import list_folder, list_frames, natural_key
from ..formats.labels import refuse_label_maps

Record = dict[str, Any]


def register_custom_video(
    name: str,
    frames_dir: str | os.PathLike[str],
    labels_dir: str | os.PathLike[str] | None,
    classes: Sequence[str],
    *,
    label_suffix: str = ".png",
    ignore_label: int = 255,
    colors: Sequence[Sequence[int]] | None = None,
    labelled_only: bool = False,
) -> None:
    """Registers videos, or stills, with one class per pixel; reads no file yet.

    Args:
        name: the data set's new name, for ``DATASETS.TRAIN``, ``DATASETS.TEST`` and ``--dataset``.
        frames_dir: a folder of frames, which is one video, or a folder of such folders. Frames
            are in the natural order of their names ("2.png" before "10.png").
        labels_dir: label maps in the same arrangement; None if there are none. A label map is a PNG
            of class ids (gray or palette, at most 8 bits), as large as its frame. Frames without
            one are streamed, but not scored. It may be ``frames_dir``: then files that end in
            ``label_suffix`` are label maps.
        classes: names of the classes 0, 1, ...
        label_suffix: follows a frame's stem in the name of its label map.
        ignore_label: value of pixels without a class; not a class id.
        colors: one RGB triple, 0-255, per class; None chooses colours when drawing.
        labelled_only: leave out frames without a label map, as training needs.

    Raises:
        UserError: the name is taken, or the arguments contradict each other.
    """
    _check_new(name)
    if isinstance(classes, str):
        raise UserError(f"classes of data set {name} is {classes!r}; give a list: [{classes!r}]")
    if not classes or len(set(classes)) != len(classes):
        raise UserError(f"classes of data set {name} must be different names, not {list(classes)}")
    if not len(classes) <= ignore_label <= 255:
        raise UserError(
            f"ignore_label of data set {name} is {ignore_label}; it must lie between the number of "
            f"classes, {len(classes)}, and 255"
        )
    metadata: dict[str, Any] = {"stuff_classes": list(classes), "ignore_label": ignore_label}
    if labels_dir is not None:  # otherwise there is nothing to score
        metadata["evaluator_type"] = "video_sem_seg"
    if colors is not None:
        if len(colors) != len(classes):
            raise UserError(f"data set {name} has {len(classes)} classes, but {len(colors)} colors")
        metadata["stuff_colors"] = [list(color) for color in colors]
    folders = Path(frames_dir), None if labels_dir is None else Path(labels_dir)
    DatasetCatalog.register(name, partial(_load_video, *folders, label_suffix, labelled_only))
    MetadataCatalog.get(name).set(**metadata)


def _load_video(
    frames_dir: Path, labels_dir: Path | None, label_suffix: str, labelled_only: bool
) -> list[Record]:
    """Lists the frames of `register_custom_video`, video by video in time order.

    Returns:
        One dict per frame: ``file_name``, ``video_id`` (the folder's name), ``frame_index``
        (position in the folder, from 0), ``image_id`` ("<video>/<stem>") and, if there is a label
        map, ``sem_seg_file_name``.

    Raises:
        UserError: a folder is missing or empty, a label map has no frame, a folder of label maps no
            video, or no frame a label map.
    """
    files, folders = list_folder(frames_dir)
    if files and any(list_folder(folder)[0] for folder in folders):
        raise UserError(f"{frames_dir} holds frames and also folders of frames: separate them")
    if labels_dir is not None and labels_dir.is_dir() and not files:
        _refuse_labels_of_no_video(labels_dir, label_suffix, frames_dir, folders)
    records = []
    for folder in [frames_dir] if files else folders:
        labels = labels_dir if labels_dir is None or files else labels_dir / folder.name
        video = _list_frames(folder, labels, label_suffix)
        if not video:
            raise UserError(f"folder {folder} holds no frames: remove it from {frames_dir}")
        records += video
    labelled = [record for record in records if "sem_seg_file_name" in record]
    if not records:
        raise UserError(f"{frames_dir} holds no frames")
    if not labelled and (labels_dir is not None or labelled_only):
        raise UserError(
            f"{labels_dir} holds no label map of any frame in {frames_dir}; a frame's is named by "
            f"the frame's stem and {label_suffix!r}"
        )
    return labelled if labelled_only else records


def _refuse_labels_of_no_video(
    labels_dir: Path, label_suffix: str, frames_dir: Path, videos: Sequence[Path]
) -> None:
    """Raises UserError if a folder of label maps has the name of no video, whose it could be."""
    known = {video.name for video in videos}
    others = [
        folder.name
        for folder in list_folder(labels_dir)[1]
        if folder.name not in known and _label_maps(folder, label_suffix)
    ]
    if others:
        raise UserError(
            f"{labels_dir} has label maps in {', '.join(others[:5])}{', ...' * (len(others) > 5)}, "
            f"but {frames_dir} has no folder of that name ({len(others)} such folders): rename "
            "each to the folder of its frames, or remove it"
        )


def _label_maps(folder: Path, label_suffix: str) -> list[Path]:
    return [file for file in list_folder(folder)[0] if file.name.endswith(label_suffix)]


def _list_frames(frames: Path, labels: Path | None, label_suffix: str) -> list[Record]:
    """Returns the records of one video; its folder of labels may be missing."""
    maps: dict[str, Path] = {}
    files = list_frames(frames)
    if labels is not None and labels.exists():
        found = _label_maps(labels, label_suffix)
        maps = {file.name.removesuffix(label_suffix): file for file in found}
        if labels.samefile(frames):
            files = [file for file in files if not file.name.endswith(label_suffix)]
    refuse_label_maps(
        files,
        "keep the frames in a folder of their own, or name the label maps by label_suffix, with "
        "that folder as labels_dir too",
    )
    video_id = os.path.basename(os.path.abspath(frames))
    records = []
    for index, file in enumerate(files):
        record = {
            "file_name": str(file),
            "image_id": f"{video_id}/{file.stem}",
            "video_id": video_id,
            "frame_index": index,
        }
        if file.stem in maps:
            record["sem_seg_file_name"] = str(maps.pop(file.stem))
        records.append(record)
    if maps:
        stray = next(iter(maps.values()))
        raise UserError(f"label map {stray} has no frame in {frames} ({len(maps)} such label maps)")
    return records


def register_custom_coco_video(
    name: str,
    json_file: str | os.PathLike[str],
    image_root: str | os.PathLike[str],
    *,
    labelled_only: bool = False,
) -> None:
    """Registers videos, or stills, with instances in COCO's json format; reads no file yet.

    ``video_id`` and ``frame_index`` (or ``frame_id``, as in mmtracking and BDD100K) of an image in
    the json say which frame of which video it is; ``videos``, with ``id`` and ``name``, may name
    the videos. Without these keys a video is a folder below ``image_root``, its frames are in the
    natural order of their names, and images that the json does not list are frames without labels.

    Args:
        name: the data set's new name, for ``DATASETS.TRAIN``, ``DATASETS.TEST`` and ``--dataset``.
        json_file: ``images``, ``annotations``, ``categories``. A listed image without annotations
            counts as labelled. Every annotation has a mask; without ``iscrowd`` it is no crowd,
            and without ``area`` the area of its mask counts.
        image_root: the folder that the json's ``file_name`` is relative to.
        labelled_only: leave out the frames that the json does not list, as training needs.

    Raises:
        UserError: the name is taken.
    """
    _check_new(name)
    load = partial(_load_coco_video, json_file, image_root, name, labelled_only)
    DatasetCatalog.register(name, load)
    # The classes are added when the json is read.
    MetadataCatalog.get(name).set(
        json_file=str(json_file),
        image_root=str(image_root),
        ignore_label=255,
        evaluator_type="video_instance",
    )


def _load_coco_video(
    json_file: str | os.PathLike[str],
    image_root: str | os.PathLike[str],
    name: str,
    labelled_only: bool,
) -> list[Record]:
    """Lists the frames of `register_custom_coco_video`, video by video in time order.

    Returns:
        detectron2's dicts of instance segmentation with ``video_id`` and ``frame_index``. Frames
        that the json does not list have no ``annotations``; these have ``area`` if the json does.

    Raises:
        UserError: the json is missing, not COCO's, or has a mistake; it names videos by unknown
            keys, or only for some images.
    """
    content = read_instances(json_file)
    if not content["images"]:
        raise UserError(f"{json_file} lists no images")
    try:
        places = frame_places(content["images"], content.get("videos", []))
    except UserError as error:
        raise UserError(f"{json_file}: {error}") from error
    records = _coco_records(content, os.fspath(image_root), name)
    if places is None:
        return _by_folder(records, Path(image_root), labelled_only)
    for record in records:
        record["video_id"], record["frame_index"] = places[record["image_id"]]
    return sorted(records, key=lambda r: (natural_key(r["video_id"]), r["frame_index"]))


def _coco_records(content: dict[str, Any], image_root: str, name: str) -> list[Record]:
    """Converts checked COCO instances to detectron2's dicts; sets the classes in the metadata."""
    categories = sorted(content["categories"], key=lambda category: category["id"])
    classes = {category["id"]: index for index, category in enumerate(categories)}
    MetadataCatalog.get(name).set(
        thing_classes=[category["name"] for category in categories],
        thing_dataset_id_to_contiguous_id=classes,
    )
    records = {
        image["id"]: {
            "file_name": os.path.join(image_root, image["file_name"]),
            "image_id": image["id"],
            "height": image["height"],
            "width": image["width"],
            "annotations": [],
        }
        for image in content["images"]
    }
    for annotation in content["annotations"]:
        image = records[annotation["image_id"]]
        mask = annotation["segmentation"]
        lengths = compress(mask, image["height"], image["width"])
        converted = {
            "category_id": classes[annotation["category_id"]],
            "iscrowd": int(annotation.get("iscrowd", 0)),
            "segmentation": mask if isinstance(mask, list) else lengths,
            "bbox": annotation.get("bbox") or rle.toBbox(lengths).tolist(),
            "bbox_mode": BoxMode.XYWH_ABS,
        }
        if "area" in annotation:
            converted["area"] = annotation["area"]
        image["annotations"].append(converted)
    return list(records.values())


def _by_folder(records: Iterable[Record], image_root: Path, labelled_only: bool) -> list[Record]:
    """Makes a video of each folder that a record is in, with all images of the folder."""
    listed = {Path(record["file_name"]): record for record in records}
    ordered = []
    for folder in sorted({file.parent for file in listed}, key=lambda f: natural_key(str(f))):
        files = list_frames(folder)
        refuse_label_maps(files, "keep the frames in a folder of their own")
        inside = os.path.relpath(folder, image_root)
        video_id = os.path.basename(os.path.abspath(image_root)) if inside == "." else inside
        for index, file in enumerate(files):
            record = listed.pop(file, None)
            if record is None and labelled_only:
                continue
            record = record or {"file_name": str(file), "image_id": f"{video_id}/{file.stem}"}
            ordered.append({**record, "video_id": video_id, "frame_index": index})
    if listed:
        raise UserError(
            f"{next(iter(listed))} is listed, but not there ({len(listed)} such images)"
        )
    return ordered


def _check_new(name: str) -> None:
    if name in DatasetCatalog:
        raise UserError(f"data set {name} is registered already; choose another name")
