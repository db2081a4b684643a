"""The decisions of tools/setup_env.py, on a machine that only pretends to install."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "tools" / "setup_env.py"


def _load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("setup_env", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


setup_env = _load()

PROJECT_REQUIREMENTS = ["numpy>=1.23", "av>=12", 'pytest<10,>=8.2; extra == "test"']
WHEEL_METADATA = ["Pillow>=7.1", "numpy<2", 'dataclasses; python_version < "3.7"']
WHEEL_FILES = {
    "evaluation/sem_seg_evaluation.py": "array = np.array(image, copy=copy, dtype=dtype)\n",
    "layers/mask_ops.py": "mask = np.array(mask, copy=False)\n",
}


class FakeMachine(setup_env.Machine):
    """Keeps modules and versions in dictionaries, and every pip call in a list."""

    python_version = (3, 11)

    def __init__(self, folder: Path) -> None:
        self.site_packages = folder / "site-packages"
        self.site_packages.mkdir()
        self.stamp = folder / "stamp"
        self.modules = {"pip": self.site_packages / "pip/__init__.py"}
        self.versions: dict[str, str] = {}
        self.project: Path | None = None
        self.pip_calls: list[str] = []
        self.constraints: list[str] = []
        self.said: list[str] = []
        self.fails: dict[str, str] = {}  # a word of a pip call -> the error it ends with
        self.broken: dict[str, str] = {}  # a module -> the error its import ends with
        self.obstacle: str | None = "GitHub cannot be reached"

    def add(self, module: str, distribution: str | None = None, version: str = "1.0") -> None:
        self.modules[module] = self.site_packages / module / "__init__.py"
        self.versions[distribution or module] = version

    def log(self, text: str) -> None:
        self.said.append(text)

    def origin(self, module: str) -> Path | None:
        return self.modules.get(module)

    def version(self, distribution: str) -> str | None:
        return self.versions.get(distribution)

    def requirements(self, distribution: str) -> list[str]:
        known = {"ttt_video": PROJECT_REQUIREMENTS if self.project else []}
        if setup_env.WHEEL_NAME in self.versions:
            known[setup_env.WHEEL_NAME] = WHEEL_METADATA
        return known.get(distribution, [])

    def project_folder(self) -> Path | None:
        return self.project

    def import_error(self, module: str) -> str | None:
        return next((error for name, error in self.broken.items() if name in module), None)

    def official_obstacle(self) -> str | None:
        return self.obstacle

    def pip_install(self, *args: str) -> str | None:
        words = list(args)
        for flag in ("-c", "-r"):
            if flag in words:
                at = words.index(flag)
                text = Path(words[at + 1]).read_text(encoding="utf-8")
                words[at : at + 2] = text.split() if flag == "-r" else []
                if flag == "-c":
                    self.constraints.append(text)
        call = " ".join(words)
        self.pip_calls.append(call)
        for word, error in self.fails.items():
            if word in call:
                return error
        for word in words:
            self._pretend(word)
        return None

    def _pretend(self, word: str) -> None:
        if word in ("torch", "torchvision"):
            self.add(word)
        elif word.startswith("git+"):
            self.add("detectron2", version="0.6")
        elif word.startswith(setup_env.WHEEL_NAME):
            self.add("detectron2", setup_env.WHEEL_NAME, "0.7.2")
            (self.site_packages / "tools").mkdir()
            for name, text in WHEEL_FILES.items():
                file = self.site_packages / "detectron2" / name
                file.parent.mkdir(parents=True)
                file.write_text(text, encoding="utf-8")
        elif word in setup_env.WITHOUT_REQUIREMENTS.values():
            self.add(word.split("-")[0])
        elif word.startswith(str(ROOT)):
            self.project = ROOT
            self.versions |= {"av": "18.1", "pytest": "9.2", "numpy": "1.26.4"}
            if "opencv" in word:
                self.add("cv2", "opencv-python-headless", "4.11.0")
        elif word[0].isalpha():
            self.versions[setup_env.distribution_name(word)] = "1.0"


@pytest.fixture
def machine(tmp_path: Path) -> FakeMachine:
    return FakeMachine(tmp_path)


def _calls_with(machine: FakeMachine, word: str) -> list[str]:
    return [call for call in machine.pip_calls if word in call]


def test_fresh_machine_without_github_takes_the_wheel(machine: FakeMachine) -> None:
    setup_env.set_up(machine)

    assert machine.pip_calls[0] == "torch torchvision"
    (wheel,) = _calls_with(machine, "sal-detectron2")
    assert "--require-hashes" in wheel
    assert "--no-deps" in wheel
    assert f"sal-detectron2==0.7.2 --hash=sha256:{setup_env.WHEEL_SHA256}" in wheel
    assert f"--target {machine.site_packages}" in wheel
    assert not _calls_with(machine, "git+")
    assert _calls_with(machine, "panopticapi") == ["--no-deps panopticapi-lite==0.2.0"]
    assert _calls_with(machine, "imaug") == ["--no-deps imagecorruptions-imaug==1.1.5"]
    assert machine.pip_calls[-1] == f"-e {ROOT}[test,corruptions,opencv]"
    assert any("taking sal-detectron2" in line for line in machine.said)
    assert "detectron2 is sal-detectron2 0.7.2" in machine.said[-1]


def test_wheel_gets_what_its_metadata_ask_for_and_what_they_forget(machine: FakeMachine) -> None:
    setup_env.set_up(machine)
    assert "numpy fvcore iopath Pillow>=7.1" in machine.pip_calls


def test_pins_of_the_wheel_hold_in_every_step(machine: FakeMachine) -> None:
    setup_env.set_up(machine)
    assert machine.constraints
    for text in machine.constraints:
        assert {"numpy<2", "opencv-python<5", "opencv-python-headless<5"} <= set(text.split())


def test_top_level_tools_of_the_wheel_does_not_stay(machine: FakeMachine) -> None:
    setup_env.set_up(machine)
    assert not (machine.site_packages / "tools").exists()


@pytest.mark.parametrize("minor", [10, 11, 12])
def test_wheel_is_left_as_it_is_where_numpy_1_exists(machine: FakeMachine, minor: int) -> None:
    machine.python_version = (3, minor)
    setup_env.set_up(machine)
    for name, text in WHEEL_FILES.items():
        assert (machine.site_packages / "detectron2" / name).read_text(encoding="utf-8") == text


def test_wheel_is_made_fit_for_numpy_2_where_there_is_no_numpy_1(machine: FakeMachine) -> None:
    machine.python_version = (3, 13)
    setup_env.set_up(machine)
    assert all("numpy<2" not in text for text in machine.constraints)
    package = machine.site_packages / "detectron2"
    repaired = [(package / name).read_text(encoding="utf-8") for name in WHEEL_FILES]
    assert repaired == [
        "array = np.array(image, copy=copy or None, dtype=dtype)\n",
        "mask = np.asarray(mask)\n",
    ]


def test_repair_refuses_another_file(tmp_path: Path) -> None:
    file = tmp_path / "evaluation" / "sem_seg_evaluation.py"
    file.parent.mkdir()
    file.write_text("pass\n", encoding="utf-8")
    with pytest.raises(setup_env.SetupError, match=r"sem_seg_evaluation\.py is not the file of"):
        setup_env.repair_for_numpy_2(tmp_path)


def test_official_one_is_built_where_it_can_be_had(machine: FakeMachine) -> None:
    machine.obstacle = None
    setup_env.set_up(machine)
    (build,) = _calls_with(machine, "git+")
    assert build.startswith("--no-build-isolation git+https://")
    assert build.endswith("@" + setup_env.OFFICIAL_COMMIT)
    assert machine.pip_calls.index(build) > machine.pip_calls.index("torch torchvision")
    assert not _calls_with(machine, "sal-detectron2")
    assert not any("numpy<2" in text for text in machine.constraints)
    assert "detectron2 is detectron2 0.6" in machine.said[-1]


def test_failed_build_falls_back_to_the_wheel(machine: FakeMachine) -> None:
    machine.obstacle = None
    machine.fails["git+"] = "error: command 'g++' failed"
    setup_env.set_up(machine)
    assert setup_env.installed_detectron2(machine) == "wheel"
    assert any("the official one failed (error: command 'g++'" in line for line in machine.said)
    assert "numpy<2" in machine.constraints[-1]


def test_failed_build_is_the_end_when_only_the_official_one_is_wanted(machine: FakeMachine) -> None:
    machine.obstacle = None
    machine.fails["git+"] = "error: command 'g++' failed"
    with pytest.raises(setup_env.SetupError, match=r"command 'g\+\+' failed"):
        setup_env.set_up(machine, "official")
    assert not _calls_with(machine, "sal-detectron2")


def test_nothing_is_laid_over_a_build_that_does_not_import(machine: FakeMachine) -> None:
    machine.obstacle = None
    machine.broken["detectron2"] = "ImportError: undefined symbol"
    with pytest.raises(setup_env.SetupError, match=r"does not import \(ImportError: undefined"):
        setup_env.set_up(machine)
    assert not _calls_with(machine, "sal-detectron2")


@pytest.mark.parametrize(
    ("distribution", "pinned"), [("detectron2", False), ("sal-detectron2", True)]
)
def test_existing_detectron2_is_kept(machine: FakeMachine, distribution: str, pinned: bool) -> None:
    machine.add("detectron2", distribution, "0.7.2")
    machine.obstacle = None
    setup_env.set_up(machine)
    assert not _calls_with(machine, "git+")
    assert not _calls_with(machine, "--target")
    assert any("keeping" in line for line in machine.said)
    assert all(("numpy<2" in text) == pinned for text in machine.constraints)


def test_existing_torch_is_never_changed(machine: FakeMachine) -> None:
    machine.add("torch", version="2.11.0+cu128")
    setup_env.set_up(machine)
    assert "torchvision" in machine.pip_calls
    assert "torch torchvision" not in machine.pip_calls
    assert all("torch==2.11.0+cu128" in text for text in machine.constraints)


def test_existing_cv2_is_not_doubled(machine: FakeMachine) -> None:
    machine.add("cv2", "opencv-contrib-python", "4.10.0")
    setup_env.set_up(machine)
    assert machine.pip_calls[-1] == f"-e {ROOT}[test,corruptions]"


def test_second_run_installs_nothing(machine: FakeMachine) -> None:
    setup_env.set_up(machine)
    machine.pip_calls.clear()
    setup_env.set_up(machine)
    assert machine.pip_calls == []
    assert "nothing to install" in machine.said[-1]


@pytest.mark.parametrize("what", ["torch", "cv2", "panopticapi", "imagecorruptions"])
def test_second_run_notices_a_missing_module(machine: FakeMachine, what: str) -> None:
    setup_env.set_up(machine)
    machine.pip_calls.clear()
    del machine.modules[what]
    setup_env.set_up(machine)
    assert f"{what} is missing" in machine.said
    assert machine.modules[what].name == "__init__.py"
    assert machine.pip_calls


@pytest.mark.parametrize("what", ["av", "pytest", "fvcore", "Pillow"])
def test_second_run_notices_a_missing_requirement(machine: FakeMachine, what: str) -> None:
    setup_env.set_up(machine)
    machine.pip_calls.clear()
    del machine.versions[what]
    setup_env.set_up(machine)
    assert f"{what} is missing" in machine.said
    assert what in machine.versions


def test_second_run_notices_a_numpy_that_does_not_fit(machine: FakeMachine) -> None:
    setup_env.set_up(machine)
    machine.versions["numpy"] = "2.5.5"
    setup_env.set_up(machine)
    assert "numpy 2.5.5 is too new for this detectron2" in machine.said
    assert machine.versions["numpy"] == "1.26.4"


def test_second_run_notices_changed_requirements(machine: FakeMachine) -> None:
    setup_env.set_up(machine)
    machine.pip_calls.clear()
    machine.stamp.write_text("of an older setup.py", encoding="utf-8")
    setup_env.set_up(machine)
    assert machine.pip_calls[-1].startswith("-e")


def test_another_checkout_of_this_project_is_replaced(machine: FakeMachine) -> None:
    setup_env.set_up(machine)
    machine.project = machine.site_packages
    setup_env.set_up(machine)
    assert machine.project == ROOT


def test_none_can_be_had_is_one_sentence(machine: FakeMachine) -> None:
    machine.fails["sal-detectron2"] = "ERROR: No matching distribution found"
    with pytest.raises(setup_env.SetupError) as caught:
        setup_env.set_up(machine)
    message = str(caught.value)
    assert message.startswith("no detectron2 can be had: ")
    assert "No matching distribution found" in message
    assert "by hand" in message
    assert "\n" not in message
    assert not machine.stamp.exists()


def test_wheel_that_does_not_import_is_an_error(machine: FakeMachine) -> None:
    machine.broken["detectron2"] = "ImportError: no"
    with pytest.raises(setup_env.SetupError, match=r"no detectron2 can be had: .*ImportError: no"):
        setup_env.set_up(machine)


def test_kept_detectron2_that_does_not_import_is_an_error(machine: FakeMachine) -> None:
    machine.add("detectron2")
    machine.broken["detectron2"] = "ImportError: libtorch.so"
    with pytest.raises(setup_env.SetupError, match=r"does not import: ImportError: libtorch\.so"):
        setup_env.set_up(machine)
    assert not machine.stamp.exists()


@pytest.mark.parametrize("step", ["torch", "panopticapi", "imaug", "-e"])
def test_failed_installation_is_one_sentence(machine: FakeMachine, step: str) -> None:
    machine.fails[step] = "ERROR: no space left on device"
    with pytest.raises(setup_env.SetupError, match=r"^pip could not install .* no space left"):
        setup_env.set_up(machine)


def test_forced_wheel_does_not_look_for_github(machine: FakeMachine) -> None:
    machine.obstacle = None
    setup_env.set_up(machine, "wheel")
    assert not _calls_with(machine, "git+")
    assert setup_env.installed_detectron2(machine) == "wheel"


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ("keep", "TTT_DETECTRON2=keep, but this Python has no detectron2"),
        ("official", "TTT_DETECTRON2=official cannot be had, because GitHub cannot be reached"),
        ("newest", "TTT_DETECTRON2=newest is not one of auto, keep, official, wheel"),
    ],
)
def test_choice_that_cannot_be_had(machine: FakeMachine, choice: str, message: str) -> None:
    with pytest.raises(setup_env.SetupError, match=f"^{message}"):
        setup_env.set_up(machine, choice)
    assert machine.pip_calls == []


@pytest.mark.parametrize(
    ("distribution", "choice"), [("detectron2", "wheel"), ("sal-detectron2", "official")]
)
def test_installed_detectron2_is_not_overwritten_by_another(
    machine: FakeMachine, distribution: str, choice: str
) -> None:
    setup_env.set_up(machine, "wheel")
    machine.pip_calls.clear()
    del machine.versions["sal-detectron2"]
    machine.versions[distribution] = "0.7.2"
    with pytest.raises(setup_env.SetupError, match="pip uninstall that one first"):
        setup_env.set_up(machine, choice)
    assert machine.pip_calls == []


def test_old_python_and_missing_pip_are_named(machine: FakeMachine) -> None:
    machine.python_version = (3, 9)
    with pytest.raises(
        setup_env.SetupError, match=r"Python 3\.10 or newer is needed, this is 3\.9"
    ):
        setup_env.set_up(machine)
    machine.python_version = (3, 12)
    del machine.modules["pip"]
    with pytest.raises(setup_env.SetupError, match="has no pip"):
        setup_env.set_up(machine)


@pytest.mark.parametrize(
    ("requirement", "name"),
    [
        ("numpy<2", "numpy"),
        ("hydra-core>=1.1", "hydra-core"),
        ("pytest<10,>=8.2; extra == 'test'", "pytest"),
        ("tqdm", "tqdm"),
    ],
)
def test_distribution_name(requirement: str, name: str) -> None:
    assert setup_env.distribution_name(requirement) == name


def _run_script(*args: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPT), *args],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        check=False,
    )


def test_bad_choice_on_the_command_line_is_one_line() -> None:
    result = _run_script(TTT_DETECTRON2="newest")
    assert result.returncode == 1
    assert result.stderr.startswith("error: TTT_DETECTRON2=newest is not one of")
    assert result.stderr.count("\n") == 1


def test_help() -> None:
    result = _run_script("--help")
    assert result.returncode == 0
    assert "TTT_DETECTRON2" in result.stdout
