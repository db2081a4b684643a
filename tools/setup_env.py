"""Install what this project needs into the Python that runs this script; nothing twice.

    python -m venv .venv
    .venv/bin/python tools/setup_env.py

``make setup``, and with it ``make demo`` and ``make test``, does just that. Only the standard
library is used. In order:

1. detectron2 is chosen: one that is already installed is kept; else the official one is built from
   GitHub, where GitHub and a C++ compiler are at hand; else PyPI's copy of it is taken. The
   environment variable TTT_DETECTRON2 = keep | official | wheel allows only that one.
2. torch and torchvision, if missing, from PyPI. An installed torch is never changed.
3. detectron2, and two libraries that ask for more than they need: panopticapi, imagecorruptions.
4. this project, editable, with what its tests need (``pip install -e .[test,corruptions]``).

A second run compares a stamp and looks up the installed packages, and installs nothing.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import unquote, urlsplit

ROOT = Path(__file__).resolve().parents[1]
CHOICES = ("auto", "keep", "official", "wheel")

OFFICIAL_URL = "https://github.com/facebookresearch/detectron2.git"
OFFICIAL_COMMIT = "02b5c4e295e990042a714712c21dc79b731e8833"  # main, June 2026

# detectron2's main of April 2024. Its only wheel is tagged for CPython 3.10, but the Python part
# runs on any version and this project does not need the compiled part.
WHEEL_NAME = "sal-detectron2"
WHEEL_VERSION = "0.7.2"
WHEEL_SHA256 = "491af0c7f79bdb2d178e46f6cb16a97c4ac968d45c41ea3f6b6435d59bbee561"
# It imports these, and its metadata do not say so.
WHEEL_LACKS = ("fvcore", "iopath")
# The wheel calls numpy.array(..., copy=False), which numpy 2 refuses. An OpenCV that needs numpy 2
# does not import beside it.
WHEEL_PINS = {"numpy": 2, "opencv-python": 5, "opencv-python-headless": 5}
# Python 3.13 has no numpy 1. There the calls are changed as detectron2's main has changed them.
FIRST_PYTHON_WITHOUT_NUMPY_1 = (3, 13)
NUMPY_2_REPAIRS = (
    ("evaluation/sem_seg_evaluation.py", "copy=copy, dtype", "copy=copy or None, dtype"),
    ("layers/mask_ops.py", "np.array(mask, copy=False)", "np.asarray(mask)"),
)

# Installed without what they ask for, by module.
WITHOUT_REQUIREMENTS = {
    # Equal to the original panopticapi but for formatting. It pins numpy<2 without need.
    "panopticapi": "panopticapi-lite==0.2.0",
    # It asks for a second wheel of OpenCV. What it does need is the extra "corruptions".
    "imagecorruptions": "imagecorruptions-imaug==1.1.5",
}
EXTRAS = ("test", "corruptions")
FIRST_PYTHON = (3, 10)
MODULES = ("torch", "torchvision", "detectron2", *WITHOUT_REQUIREMENTS, "cv2")


class SetupError(Exception):
    """The set-up cannot go on; the message is one sentence that says why and what to do."""


class Machine:
    """What the set-up asks of the Python that runs it. Tests replace it with a fake."""

    python_version = sys.version_info[:2]
    site_packages = Path(sysconfig.get_path("purelib"))
    stamp = Path(sys.prefix) / ".ttt_video_setup"

    def log(self, text: str) -> None:
        """Tell the user what happens."""
        print(f"[set-up] {text}", flush=True)

    def origin(self, module: str) -> Path | None:
        """Folder or file that importing ``module`` would load, without importing it."""
        spec = importlib.util.find_spec(module)
        if spec is None or spec.origin is None:
            return None
        return Path(spec.origin).resolve()

    def version(self, distribution: str) -> str | None:
        """Installed version of a distribution, None if it is not installed."""
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            return None

    def project_folder(self) -> Path | None:
        """Folder from which ttt_video is installed as editable, None if it is not."""
        try:
            text = importlib.metadata.distribution("ttt_video").read_text("direct_url.json")
        except importlib.metadata.PackageNotFoundError:
            return None
        source = json.loads(text or "{}")
        if not source.get("dir_info", {}).get("editable"):
            return None
        return Path(unquote(urlsplit(source["url"]).path)).resolve()

    def requirements(self, distribution: str) -> list[str]:
        """What an installed distribution requires, [] if it is not installed."""
        try:
            return importlib.metadata.requires(distribution) or []
        except importlib.metadata.PackageNotFoundError:
            return []

    def pip_install(self, *args: str) -> str | None:
        """Run ``pip install``; None, or the last error of those that pip printed."""
        command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "-q"]
        result = subprocess.run([*command, *args], stderr=subprocess.PIPE, text=True, check=False)
        # What is not cached on disk is imported anew after an installation.
        importlib.invalidate_caches()
        if result.returncode == 0:
            return None
        sys.stderr.write(result.stderr)
        lines = [line.strip() for line in result.stderr.splitlines() if line.strip()]
        errors = [line for line in lines if line.lower().startswith("error")]
        last = (errors or lines or [f"pip ended with code {result.returncode}"])[-1]
        return last.removeprefix("ERROR: ")

    def import_error(self, module: str) -> str | None:
        """Import ``module`` in a process of its own; None, or the last line of what went wrong."""
        result = subprocess.run(
            [sys.executable, "-c", f"import {module}"], capture_output=True, text=True, check=False
        )
        if result.returncode == 0:
            return None
        return (result.stderr.strip().splitlines() or [f"code {result.returncode}"])[-1]

    def official_obstacle(self) -> str | None:
        """Why the official detectron2 cannot be built here; None if it may be tried."""
        if shutil.which("git") is None:
            return "git is not installed"
        compilers = (os.environ.get("CXX", "c++"), "g++", "clang++")
        if not any(shutil.which(name) for name in compilers):
            return "there is no C++ compiler"
        try:
            probe = subprocess.run(
                ["git", "ls-remote", OFFICIAL_URL, "HEAD"],
                env={**os.environ, "GIT_TERMINAL_PROMPT": "0"},
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=15,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return "GitHub does not answer"
        return None if probe.returncode == 0 else "GitHub cannot be reached"


def fingerprint() -> str:
    """Changes whenever a file changes that says what is to be installed."""
    digest = hashlib.sha256()
    for name in ("setup.py", "pyproject.toml", "tools/setup_env.py"):
        digest.update((ROOT / name).read_bytes())
    return digest.hexdigest()


def distribution_name(requirement: str) -> str:
    """``"omegaconf<2.4,>=2.1; extra == 'all'"`` -> ``"omegaconf"``."""
    match = re.match(r"\s*([A-Za-z0-9._-]+)", requirement)
    if match is None:
        raise ValueError(f"not a requirement: {requirement!r}")
    return match.group(1)


def installed_detectron2(machine: Machine) -> str | None:
    """``"wheel"`` for PyPI's copy, ``"official"`` for any other detectron2, None for none."""
    if machine.origin("detectron2") is None:
        return None
    return "wheel" if machine.version(WHEEL_NAME) else "official"


def describe_detectron2(machine: Machine) -> str:
    """Name, version and place of the installed detectron2, for the user."""
    name = WHEEL_NAME if installed_detectron2(machine) == "wheel" else "detectron2"
    origin = machine.origin("detectron2")
    place = origin.parent if origin else "nowhere"
    return f"{name} {machine.version(name) or '(no version)'} in {place}"


def pins(machine: Machine, detectron2: str) -> dict[str, int]:
    """First major version that must not be installed, by distribution."""
    if detectron2 != "wheel" or machine.python_version >= FIRST_PYTHON_WITHOUT_NUMPY_1:
        return {}
    return WHEEL_PINS


def wheel_requirements(machine: Machine) -> list[str]:
    """What the installed copy of PyPI needs beside numpy, whose version :func:`pins` decides."""
    own = [line for line in machine.requirements(WHEEL_NAME) if ";" not in line]
    return [*WHEEL_LACKS, *(line for line in own if distribution_name(line) != "numpy")]


def wanted(machine: Machine) -> str | None:
    """First thing that is missing or does not fit; None when all is there."""
    for module in MODULES:
        if machine.origin(module) is None:
            return f"{module} is missing"
    if machine.project_folder() != ROOT:
        return "ttt_video is not installed from this folder"
    required = [
        line
        for line in machine.requirements("ttt_video")
        if "extra ==" not in line or re.search(rf"""extra == ['"]({"|".join(EXTRAS)})['"]""", line)
    ]
    detectron2 = installed_detectron2(machine) or ""
    if detectron2 == "wheel":
        required += wheel_requirements(machine)
    for name in map(distribution_name, required):
        if machine.version(name) is None:
            return f"{name} is missing"
    for name, limit in pins(machine, detectron2).items():
        version = machine.version(name)
        if version is not None and int(version.split(".")[0]) >= limit:
            return f"{name} {version} is too new for this detectron2"
    return None


def choose_detectron2(machine: Machine, choice: str) -> str:
    """``"keep"``, ``"official"`` or ``"wheel"``, and why is logged.

    Raises:
        SetupError: the one that ``choice`` asks for cannot be had.
    """
    present = installed_detectron2(machine)
    if present is not None:
        if choice not in ("auto", "keep", present):
            raise SetupError(
                f"TTT_DETECTRON2={choice} asks for another detectron2 than the installed"
                f" {describe_detectron2(machine)}: pip uninstall that one first, or unset it"
            )
        machine.log(f"detectron2: keeping {describe_detectron2(machine)}")
        return "keep"
    if choice == "keep":
        raise SetupError(
            "TTT_DETECTRON2=keep, but this Python has no detectron2: install one, or unset it"
        )
    if choice == "wheel":
        return "wheel"
    obstacle = machine.official_obstacle()
    if obstacle is None:
        return "official"
    if choice == "official":
        raise SetupError(f"TTT_DETECTRON2=official cannot be had, because {obstacle}")
    machine.log(f"detectron2: not the official one, because {obstacle}")
    return "wheel"


class Installer:
    """Installs under one set of constraints, so that no step undoes another."""

    def __init__(self, machine: Machine, folder: Path) -> None:
        self.machine = machine
        self._constraints = folder / "constraints.txt"
        self.constrain("")

    def constrain(self, detectron2: str) -> None:
        """Set what may be installed beside this kind of detectron2 and the installed torch."""
        lines = [f"{name}<{limit}" for name, limit in pins(self.machine, detectron2).items()]
        for name in ("torch", "torchvision"):
            version = self.machine.version(name)
            if version is not None:
                lines.append(f"{name}=={version}")
        self._constraints.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")

    def try_install(self, *args: str) -> str | None:
        """None, or why it failed."""
        return self.machine.pip_install("-c", str(self._constraints), *args)

    def install(self, what: str, *args: str) -> None:
        """Install or raise SetupError."""
        self.machine.log(f"installing {what}")
        error = self.try_install(*args)
        if error is not None:
            raise SetupError(f"pip could not install {what}: {error}")

    def official_detectron2(self) -> str | None:
        """Build the official detectron2; None, or why it failed."""
        self.machine.log(f"detectron2: building the official one, commit {OFFICIAL_COMMIT[:8]}")
        # Its setup.py imports torch, so it has to see the installed one.
        self.install("setuptools", "setuptools>=70.1", "ninja")
        source = f"git+{OFFICIAL_URL}@{OFFICIAL_COMMIT}"
        error = self.try_install("--no-build-isolation", source)
        if error is not None:
            return error
        error = self._check()
        if error is not None:
            # PyPI's copy must not be laid over it.
            raise SetupError(
                f"the official detectron2 was built, but does not import ({error}): pip uninstall"
                " detectron2, and set TTT_DETECTRON2=wheel for PyPI's copy of it"
            )
        return None

    def wheel_detectron2(self) -> str | None:
        """Install PyPI's copy of detectron2; None, or why it failed."""
        self.machine.log(f"detectron2: taking {WHEEL_NAME} {WHEEL_VERSION} from PyPI")
        requirement = self._constraints.with_name("detectron2.txt")
        requirement.write_text(f"{WHEEL_NAME}=={WHEEL_VERSION} --hash=sha256:{WHEEL_SHA256}\n")
        site_packages = self.machine.site_packages
        had_tools = (site_packages / "tools").exists()
        error = self.machine.pip_install(
            *("--no-deps", "--require-hashes", "--only-binary=:all:", "--python-version", "3.10"),
            *("--implementation", "cp", "--abi", "none", "--platform", "any"),
            *("--target", str(site_packages), "-r", str(requirement)),
        )
        if error is not None:
            return error
        if not had_tools:
            # The wheel also brings a top-level package "tools", which would hide everybody else's.
            shutil.rmtree(site_packages / "tools", ignore_errors=True)
        if self.machine.python_version >= FIRST_PYTHON_WITHOUT_NUMPY_1:
            repair_for_numpy_2(site_packages / "detectron2")
        self.wheel_needs()
        return self._check()

    def wheel_needs(self) -> None:
        """Install what PyPI's copy of detectron2 needs, as it was installed without."""
        self.install("what detectron2 needs", "numpy", *wheel_requirements(self.machine))

    def _check(self) -> str | None:
        return self.machine.import_error("detectron2.modeling, detectron2.engine")


def repair_for_numpy_2(package: Path) -> None:
    """Replace the two calls in detectron2 0.7.2 that numpy 2 refuses."""
    for name, old, new in NUMPY_2_REPAIRS:
        file = package / name
        source = file.read_text(encoding="utf-8")
        if old not in source:
            raise SetupError(f"{file} is not the file of {WHEEL_NAME} {WHEEL_VERSION}")
        file.write_text(source.replace(old, new), encoding="utf-8")


def install_detectron2(installer: Installer, source: str, choice: str) -> None:
    """Install detectron2 from ``source``, or raise SetupError with every reason."""
    machine = installer.machine
    reasons = []
    if source == "official":
        error = installer.official_detectron2()
        if error is None:
            return
        machine.log(f"detectron2: the official one failed ({error})")
        reasons.append(f"the official one failed ({error})")
    if source == "wheel" or choice == "auto":
        installer.constrain("wheel")
        error = installer.wheel_detectron2()
        if error is None:
            return
        reasons.append(f"{WHEEL_NAME} {WHEEL_VERSION} from PyPI failed ({error})")
    raise SetupError(
        f"no detectron2 can be had: {' and '.join(reasons)}; install detectron2 into"
        f" {sys.executable} by hand and run this again"
    )


def set_up(machine: Machine, choice: str = "auto") -> None:
    """Bring the environment up to date.

    Raises:
        SetupError: something cannot be installed.
    """
    if choice not in CHOICES:
        raise SetupError(f"TTT_DETECTRON2={choice} is not one of {', '.join(CHOICES)}")
    if machine.python_version < FIRST_PYTHON:
        first, version = (".".join(map(str, v)) for v in (FIRST_PYTHON, machine.python_version))
        raise SetupError(
            f"Python {first} or newer is needed, this is {version}: make PYTHON=python3.x"
        )
    if machine.origin("pip") is None:
        raise SetupError(f"{sys.executable} has no pip: make the environment anew with pip in it")

    missing = wanted(machine)
    stamped = machine.stamp.is_file() and machine.stamp.read_text() == fingerprint()
    if missing is None and stamped and choice in ("auto", "keep", installed_detectron2(machine)):
        machine.log(f"nothing to install; detectron2 is {describe_detectron2(machine)}")
        return
    machine.log(missing or "what is to be installed may have changed")

    start = time.monotonic()
    source = choose_detectron2(machine, choice)
    kind = installed_detectron2(machine) if source == "keep" else source
    with tempfile.TemporaryDirectory() as folder:
        installer = Installer(machine, Path(folder))
        installer.constrain(kind or "")
        # Both from PyPI: its torchvision does not import beside a CPU-only torch.
        lacking = [name for name in ("torch", "torchvision") if machine.origin(name) is None]
        if lacking:
            machine.log("torch is a download of about 3 GB")
            installer.install(" and ".join(lacking), *lacking)
        installer.constrain(kind or "")
        if source != "keep":
            install_detectron2(installer, source, choice)
        elif kind == "wheel":
            installer.wheel_needs()
        installer.constrain(installed_detectron2(machine) or "")
        for module, requirement in WITHOUT_REQUIREMENTS.items():
            if machine.origin(module) is None:
                installer.install(module, "--no-deps", requirement)
        # Several wheels provide cv2; a second one would overwrite the first.
        extras = EXTRAS if machine.origin("cv2") else (*EXTRAS, "opencv")
        installer.install("ttt_video and what its tests need", "-e", f"{ROOT}[{','.join(extras)}]")

    error = machine.import_error("detectron2.modeling, torchvision, cv2")
    if error is not None:
        raise SetupError(f"all is installed, but does not import: {error}")
    missing = wanted(machine)
    if missing is not None:
        raise SetupError(f"after the installation {missing}")
    machine.stamp.write_text(fingerprint())
    seconds = time.monotonic() - start
    machine.log(f"done in {seconds:.0f} s; detectron2 is {describe_detectron2(machine)}")


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0 when the environment is ready, 1 when it cannot be made so."""
    arguments = sys.argv[1:] if argv is None else argv
    if arguments and arguments[0] in ("-h", "--help"):
        print((__doc__ or "").strip())
        return 0
    if arguments:
        print(f"error: {arguments[0]}: setup_env.py takes no arguments", file=sys.stderr)
        return 2
    try:
        set_up(Machine(), os.environ.get("TTT_DETECTRON2", "auto") or "auto")
    except SetupError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
