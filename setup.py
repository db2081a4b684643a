"""Packaging of ttt_video; settings of the development tools are in pyproject.toml.

detectron2 is deliberately not a requirement here: it is not on PyPI under its own name, and an
installed one (a release, a fork, a source checkout) must be left alone.
``python tools/setup_env.py`` finds or installs one, and everything below with it.

OpenCV is not a requirement either, because several wheels provide the same ``cv2`` and break each
other: ``tools/setup_env.py`` adds the headless one only where no ``cv2`` is found.
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
    packages=[*find_packages(include=["ttt_video", "ttt_video.*"]), "ttt_video.configs"],
    package_dir={"ttt_video.configs": "configs"},
    package_data={
        "ttt_video": ["py.typed", "weights/*.safetensors"],
        "ttt_video.configs": ["*.yaml", "**/*.yaml"],
    },
    zip_safe=False,
    install_requires=[
        "torch>=2.4",
        "torchvision>=0.19",
        "numba>=0.61",
        "numpy>=1.23",
        "scipy>=1.9",
        "Pillow>=10.1",
        "av>=17",
        "safetensors>=0.4",
        "tqdm",
    ],
    extras_require={
        # Webcam input and detectron2's Visualizer; not beside another wheel that provides cv2.
        "opencv": ["opencv-python-headless>=4.6"],
        # Compiled deformable attention for GPUs, picked up when it is importable. It is built for
        # the installed torch: pip install --no-build-isolation 'torch-ms-deform-attn==0.1.1'
        "fast": ["torch-ms-deform-attn==0.1.1"],
        # What ImageNet-C's corruptions of the world need besides the library itself, which asks for
        # a second OpenCV: pip install --no-deps 'imagecorruptions-imaug==1.1.5'
        "corruptions": ["scikit-image>=0.20"],
        # Sweeps on a Slurm cluster (tools/sweep.py --slurm).
        "cluster": ["submitit>=1.5"],
        # SegFormer, one of the frozen baselines (configs/baselines/).
        "segformer": ["transformers>=5.20,<6"],
        # SSIM, LPIPS, FID and IS of colorization; weights of their networks do not come with it.
        "color": ["torchmetrics[image]>=1.9,<2"],
        # The linters are pinned exactly, because a new release may find new faults.
        "test": [
            "hotcoco>=1.3,<2",  # a second opinion on AP and PQ
            "hypothesis>=6.100",
            "mypy==2.4.1",
            "pytest>=8.2,<10",
            "pytest-xdist>=3.6",
            "ruff==0.17.5",
            "setuptools>=70.1",  # builds wheels by itself
            "submitit>=1.5",
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
