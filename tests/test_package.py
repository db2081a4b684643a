"""What importing the package does and does not do, and what is packed into its wheel."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from processes import python_path
from test_readme import (
    IN_CI,
    README,
    README_COMMANDS,
    SHORTENED_BY,
    python_blocks,
    write_frames,
)

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "ttt_video"

# Run in a fresh process, after detectron2's own imports, so that only our part is seen.
PROBE = """
import contextlib, io, json, os, sys
import detectron2.checkpoint, detectron2.config, detectron2.data, detectron2.engine
import detectron2.modeling, detectron2.projects
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import BACKBONE_REGISTRY, META_ARCH_REGISTRY, SEM_SEG_HEADS_REGISTRY

REGISTRIES = {
    "META_ARCH": META_ARCH_REGISTRY,
    "BACKBONE": BACKBONE_REGISTRY,
    "SEM_SEG_HEADS": SEM_SEG_HEADS_REGISTRY,
}

def names():
    found = {kind: {name for name, _ in registry} for kind, registry in REGISTRIES.items()}
    found["datasets"] = set(DatasetCatalog.list())
    found["metadata"] = set(MetadataCatalog.list())
    return found

actions, reads = [], []

def audit(event, args):
    if event == "open" and isinstance(args[2], int):
        if args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            actions.append(f"opens {args[0]} for writing")
    elif event in ("os.mkdir", "os.remove", "os.rename", "os.putenv", "os.unsetenv",
                   "socket.connect", "subprocess.Popen", "os.system"):
        actions.append(f"{event} {args[0]}")

class Spy(type(os.environ)):
    def __getitem__(self, key):
        frame = sys._getframe(1)
        while frame.f_code.co_filename.endswith(("os.py", "_collections_abc.py", "<frozen os>",
                                                 "<frozen _collections_abc>")):
            frame = frame.f_back
        if f"{os.sep}ttt_video{os.sep}" in frame.f_code.co_filename:
            reads.append(f"{key} in {frame.f_code.co_filename}")
        return super().__getitem__(key)

before_names, before_modules = names(), set(sys.modules)
printed = io.StringIO()
sys.addaudithook(audit)
os.environ.__class__ = Spy
with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
    import ttt_video
recorded = list(actions)

after = names()
print(json.dumps({
    "file": ttt_video.__file__,
    "added": {kind: sorted(after[kind] - before_names[kind]) for kind in after},
    "names": {kind: sorted(after[kind]) for kind in REGISTRIES},
    "imported": sorted({m.split(".")[0] for m in set(sys.modules) - before_modules}),
    "actions": recorded,
    "reads": reads,
    "printed": printed.getvalue(),
}))
"""

COCO_VIDEOS = [
    "all",
    "bangkok",
    "bar",
    "berkeley",
    "havana",
    "house",
    "irvine",
    "paris",
    "restaurant",
    "school",
    "tokyo",
]
DATASETS = [
    *(f"coco_videos_{task}_{video}" for task in ("instance", "panoptic") for video in COCO_VIDEOS),
    *(f"fashion_mnist_{split}" for split in ("test", "train", "val")),
    *("imagenet_classes_train", "imagenet_classes_val"),
    *("imagenet_color_train", "imagenet_color_val"),
    "kitti_step_video_sem_seg_train",
    "kitti_step_video_sem_seg_val",
    *("photos_color_train", "photos_color_val"),
    *("world_color_train", "world_color_val"),
    *("world_districts_sem_seg_train", "world_districts_sem_seg_val"),
    "world_panoptic_train",
    "world_panoptic_val",
    "world_sem_seg_train",
    "world_sem_seg_val",
    *("world_zoom_panoptic_train", "world_zoom_panoptic_val"),
]

# Each corruption has a set of severity 5, one of each severity, and a ramp; each two have two sets.
CORRUPTED = {
    **dict.fromkeys(("fashion_mnist_c_", "fashion_mnist_val_c_"), 7 * 18 + 18 * 17),
    "imagenet_c_": 7 * 19 + 19 * 18,
}

# Registered by the original mask2former package, which has to be importable beside this one.
MASK2FORMER_NAMES = {
    "META_ARCH": {"MaskFormer"},
    "BACKBONE": {"D2SwinTransformer"},
    "SEM_SEG_HEADS": {
        "BasePixelDecoder",
        "MSDeformAttnPixelDecoder",
        "MaskFormerHead",
        "PerPixelBaselineHead",
        "PerPixelBaselinePlusHead",
        "TransformerEncoderPixelDecoder",
    },
}


def _python(*args: str, folder: Path, **variables: str) -> str:
    """Standard output of a Python that knows nothing of this process' environment.

    It has one thread: those of several, beside other tests, would mostly wait for each other.
    """
    result = subprocess.run(
        [sys.executable, "-B", "-W", "ignore", *args],
        env={"OMP_NUM_THREADS": "1", **variables},
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("elsewhere")
    said = _python("-c", PROBE, folder=folder, PYTHONPATH=python_path())
    report: dict[str, Any] = json.loads(said)
    assert Path(report["file"]).parent == PACKAGE
    assert list(folder.iterdir()) == []
    return report


@pytest.mark.slow
def test_import_registers_exactly_our_names(imported: dict[str, Any]) -> None:
    added = dict(imported["added"])
    for family, count in CORRUPTED.items():
        assert sum(name.startswith(family) for name in added["datasets"]) == count
    for kind in ("datasets", "metadata"):
        added[kind] = [name for name in added[kind] if not name.startswith(tuple(CORRUPTED))]
    assert added == {
        "META_ARCH": [
            *("ColorizerTTT", "DeepLabV3Plus", "MaskFormerTTT", "SegFormer", "ViTMAE"),
            "ZhangColorizer",
        ],
        "BACKBONE": ["SwinTransformerTTT"],
        "SEM_SEG_HEADS": ["ColorHead", "MaskFormerTTTHead", "ReconstructionHead"],
        "datasets": DATASETS,
        "metadata": DATASETS,
    }


@pytest.mark.parametrize("registry", sorted(MASK2FORMER_NAMES))
def test_import_leaves_the_names_of_mask2former_free(
    imported: dict[str, Any], registry: str
) -> None:
    assert not MASK2FORMER_NAMES[registry] & set(imported["names"][registry])


def test_import_only_registers(imported: dict[str, Any]) -> None:
    assert imported["actions"] == []
    assert imported["printed"] == ""


def test_import_reads_no_environment_variable(imported: dict[str, Any]) -> None:
    assert imported["reads"] == []


def test_import_brings_no_heavy_or_optional_package(imported: dict[str, Any]) -> None:
    unwanted = {"argparse", "av", "cv2", "matplotlib", "scipy", "transformers"}
    assert not unwanted & set(imported["imported"])


WITHOUT_OPTIONAL_PACKAGES = """
import sys
missing = sys.argv[1].split(",")
sys.modules.update(dict.fromkeys(missing))  # None: importing them fails as if they were not there
import torch
import ttt_video
from detectron2.modeling import META_ARCH_REGISTRY, SEM_SEG_HEADS_REGISTRY
from detectron2.modeling.roi_heads import (
    ROI_BOX_HEAD_REGISTRY, ROI_HEADS_REGISTRY, ROI_KEYPOINT_HEAD_REGISTRY, ROI_MASK_HEAD_REGISTRY)
from ttt_video.config import load_config
from ttt_video.stream import Stream
from ttt_video.stream import load_source_model

opts = ["MODEL.DEVICE", "cpu", "TTT.BATCH_SIZE", "1", "INPUT.MIN_SIZE_TEST", "32"]
cfg = load_config("quick/stream_world.yaml", opts=opts)
runner = Stream.from_config(cfg, load_source_model(cfg))
frames = [{"image": torch.full((3, 32, 64), 40 * t, dtype=torch.uint8), "height": 32, "width": 64,
           "video_id": "v", "frame_index": t, "file_name": str(t)} for t in range(2)]
for result in runner.run(frames):
    print(tuple(result.output["sem_seg"].shape), result.record["loss_recon"] > 0)
import ttt_video.training.joint_training, ttt_video.data.custom, ttt_video.data.checking
print([name for name in sys.modules if name.split(".")[0] in missing and sys.modules[name]])
registries = (META_ARCH_REGISTRY, SEM_SEG_HEADS_REGISTRY, ROI_HEADS_REGISTRY,
              ROI_MASK_HEAD_REGISTRY, ROI_BOX_HEAD_REGISTRY, ROI_KEYPOINT_HEAD_REGISTRY)
print([name for registry in registries for name, _ in registry if "PointRend" in name])
print([name for name in sys.modules if name.startswith("detectron2.projects.")])
"""


@pytest.mark.slow
def test_streams_without_any_optional_package_and_without_pointrends_heads(tmp_path: Path) -> None:
    extras = "cv2,hotcoco,imagecorruptions,panopticapi,skimage,submitit,torch_ms_deform_attn"
    missing = f"{extras},transformers,matplotlib,scipy.optimize,shapely,tensorboard,timm"
    code, path = WITHOUT_OPTIONAL_PACKAGES, python_path()
    said = _python("-c", code, missing, folder=tmp_path, PYTHONPATH=path)
    assert said.splitlines() == ["(19, 32, 64) True", "(19, 32, 64) True", "[]", "[]", "[]"]


def test_commands_import_nothing_heavy(tmp_path: Path) -> None:
    heavy = "numpy,torch,detectron2,ttt_video,yaml"
    code = (
        "import sys, pkgutil, importlib, ttt_video_cli as cli\n"
        "for module in pkgutil.iter_modules(cli.__path__):\n"
        "    importlib.import_module(f'ttt_video_cli.{module.name}')\n"
        "print(len([*pkgutil.iter_modules(cli.__path__)]), len(cli.COMMANDS))\n"
        f"print([name for name in {heavy!r}.split(',') if name in sys.modules])\n"
    )
    said = _python("-c", code, folder=tmp_path, PYTHONPATH=python_path())
    assert said.splitlines() == ["16 15", "[]"]  # a file for each, and the flags they share


def _copy_of_the_sources(folder: Path) -> Path:
    """Building in the checkout itself would leave files there that a later build picks up."""
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("ttt_video", "ttt_video_cli", "configs", "tools", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignore)
    for name in ("setup.py", "pyproject.toml", "LICENSE", "README.md"):
        shutil.copy(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = _copy_of_the_sources(tmp_path_factory.mktemp("source"))
    target = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "-w", str(target), str(source)], check=True)
    (file,) = target.glob("ttt_video-*.whl")
    return file


@pytest.mark.slow
def test_wheel_holds_the_package_its_configs_and_its_weights(wheel: Path) -> None:
    tracked = subprocess.run(
        ["git", "ls-files", "--cached", "ttt_video", "ttt_video_cli", "configs"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    expected = {
        f"ttt_video/{name}" if name.startswith("configs/") else name
        for name in tracked
        if (ROOT / name).is_file()
    }
    assert any(name.startswith("ttt_video/configs/quick/") for name in expected)
    assert any(name.endswith(".safetensors") for name in expected)
    with zipfile.ZipFile(wheel) as archive:
        packed = set(archive.namelist())
    assert expected <= packed
    tops = {name.split("/")[0] for name in packed}
    assert {top for top in tops if "-" not in top} == {"ttt_video", "ttt_video_cli"}


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that the wheel is installed in, beside the libraries that are there."""
    site = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target"]
    subprocess.run([*command, str(site), str(wheel)], check=True)
    return site


def environment(site: Path) -> dict[str, str]:
    """Variables with which Python finds the installed wheel, and no checkout."""
    checkout = {str(ROOT), str(ROOT / "tools"), str(ROOT / "tests")}
    others = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    path = [str(site), *(folder for folder in others if folder and folder not in checkout)]
    return {"PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1"}


@pytest.mark.slow
def test_installed_wheel_finds_its_configs_and_weights(installed: Path, tmp_path: Path) -> None:
    said = _python(
        "-c",
        "import ttt_video; from ttt_video.config import find_config, load_config\n"
        "from detectron2.utils.file_io import PathManager\n"
        "print(find_config('joint_cityscapes.yaml'))\n"
        "cfg = load_config('quick/joint_world.yaml', preset='release')\n"
        "print(PathManager.get_local_path('ttt_video://quick_joint_world.safetensors'))\n",
        folder=tmp_path,
        **environment(installed),
    )
    config, weights = map(Path, said.split())
    assert config == installed / "ttt_video/configs/joint_cityscapes.yaml"
    assert weights == installed / "ttt_video/weights/quick_joint_world.safetensors"
    assert config.is_file()
    assert weights.is_file()


SWEEP = """
config: quick/stream_world.yaml
settings: {MODEL.DEVICE: cpu, INPUT.MIN_SIZE_TEST: 64, TTT.BATCH_SIZE: 1}
sources: {dark: {world: {seed: 2000, frames: 2, height: 64, width: 128, corruption: darkness}}}
rows: {none:, tent:}
"""


@pytest.mark.slow
def test_installed_wheel_streams_and_sweeps_in_an_empty_folder(
    installed: Path, tmp_path: Path
) -> None:
    def run(*words: str) -> str:
        command = [str(installed / "bin" / "ttt-video"), *words]
        done = subprocess.run(
            command, cwd=tmp_path, env=environment(installed), capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert "Warning" not in done.stderr
        return done.stdout

    assert "weights convert" in run("--help")
    assert "online_ttt_mae_line_search" in run("stream", "--help")  # of the packed methods.yaml
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "frames").mkdir()
    for index in range(3):
        pixels = np.random.default_rng(index).integers(0, 256, (32, 64, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "frames" / f"{index}.png")
    small = ["MODEL.DEVICE", "cpu", "INPUT.MIN_SIZE_TEST", "32", "TTT.BATCH_SIZE", "1"]
    said = run("stream", "--video-dir", "frames", "--output", "run", *small)
    assert "3 frames, " in said
    assert len((tmp_path / "run" / "frames.jsonl").read_text().splitlines()) == 3
    (tmp_path / "two.yaml").write_text(SWEEP)
    said = run("sweep", "two.yaml", "--workers", "1")
    assert "report.html are in output/sweeps/two" in said
    cells = tmp_path / "output/sweeps/two/cells"
    for method in ("none", "tent"):
        summary = json.loads((cells / method / "dark/seed0/summary.json").read_text())
        assert (summary["complete"], summary["frames"]) == (True, 2)
        assert f"| {method} " in said


@pytest.mark.slow
@pytest.mark.parametrize("command", [c for c in README_COMMANDS if c not in IN_CI])
def test_commands_of_the_readme_run_from_the_wheel(
    command: str, installed: Path, tmp_path: Path
) -> None:
    """In a folder with a user's own files alone, each as the command that its script is."""
    _, script, *arguments = shlex.split(command)
    (name,) = re.findall(r'start\("(.+)"\)', (ROOT / script).read_text(encoding="utf-8"))
    write_frames(tmp_path)
    own = {path.name for path in tmp_path.iterdir()}
    tool = [str(installed / "bin" / "ttt-video"), *name.split()]
    done = subprocess.run(
        [*tool, *arguments, *SHORTENED_BY.get(script, [])],
        cwd=tmp_path,
        env=environment(installed),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    made = {path.name for path in tmp_path.iterdir()} - own
    assert "output" in made
    assert made <= {"output", "datasets"}  # the stills that the training draws


@pytest.mark.slow
def test_python_of_the_readme_runs_from_the_wheel(installed: Path, tmp_path: Path) -> None:
    write_frames(tmp_path)
    code = "\n".join(python_blocks(README))
    said = _python("-c", code, folder=tmp_path, **environment(installed))
    assert [line.partition(" ")[2] for line in said.splitlines()] == ["(64, 96)"] * 3


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_shipped_files_stay_small() -> None:
    """Weights under 10 MB each, and nothing else of that order in the repository."""
    names = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    sizes = {name: os.path.getsize(ROOT / name) for name in names if (ROOT / name).is_file()}
    assert sizes
    too_large = {name: size for name, size in sizes.items() if size >= 10_000_000}
    assert too_large == {}
