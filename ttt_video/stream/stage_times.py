"""Profiles: how long each stage of a frame takes on a machine, measured once and drawn from later.

A profile is a JSON file of ``tools/measure_costs.py stages``. It has a case for each method and
model that was measured, with the settings that decide the time, the frames' size and, for every
stage, the measured seconds themselves, so that draws from them have the spread that there was.
"""

from __future__ import annotations

import hashlib
import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode

from ..adaptation import timed_as
from ..config import KEYS
from ..config.methods import named_method
from ..config.named_files import find_profile
from ..errors import UserError
from ..files import read_json_object

PARTS = ("decode", "push", "predict", "others")
"""Stages that a frame always has: reading it, moving it to the device, predicting it, and all that
the loop does with a result, such as rows."""

STAGES = (*PARTS, "step")
"""The step is measured for several numbers of samples; 0 stands for an update that draws none."""

MODEL_KEYS = (
    "MODEL.META_ARCHITECTURE", "MODEL.SWIN.EMBED_DIM", "MODEL.SWIN.DEPTHS",
    "MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS", "MODEL.SEM_SEG_HEAD.CONVS_DIM",
    "MODEL.MASK_FORMER.DEC_LAYERS", "MODEL.MASK_FORMER.NUM_OBJECT_QUERIES",
    "MODEL.MASK_FORMER.TEST.SEMANTIC_ON", "MODEL.MASK_FORMER.TEST.PANOPTIC_ON",
    "MODEL.MASK_FORMER.TEST.INSTANCE_ON", "TTT.PREDICT_PRECISION",
)  # fmt: skip
STEP_KEYS = (
    "TTT.BATCH_SIZE", "TTT.STEPS_PER_FRAME", "TTT.PRECISION", "TTT.CHECKPOINT", "TTT.CROP.RESIZE",
    "TTT.CROP.SIZE", "TTT.PARAMETERS", "TTT.MODULES", "TTT.OPTIMIZER.NAME", "TTT.ENSEMBLE.METHOD",
    "TTT.ENSEMBLE.PREDICTIONS", "TTT.ENSEMBLE.WINDOW_SIZE",
)  # fmt: skip
"""Settings that decide what frames cost: those of the model, and of a method with steps. A case
with another value of one is not used."""

_NEAR = 0.1  # share of a frame's pixels by which the profile's frames may differ


def cost_settings(cfg: CfgNode, method: str) -> dict[str, Any]:
    """Returns the values of the settings that decide what a method's frames cost, by key."""
    keys = MODEL_KEYS if method == "none" else (*MODEL_KEYS, *STEP_KEYS)
    return {key: attrgetter(key)(cfg) for key in keys}


def told_settings(cfg: CfgNode, method: str) -> dict[str, Any]:
    """Returns further settings that a method's seconds may depend on, by key.

    They are the window's size and the method's own keys, which stand in a section of ``TTT`` whose
    name is a part of the method's; names of files do not count.
    """
    if method == "none":
        return {}
    names = f"{method} {named_method(method).runs}"
    sections = [name for name in cfg.TTT if name.lower() in names]
    starts = tuple(f"TTT.{name}." for name in sections if isinstance(cfg.TTT[name], CfgNode))
    own = [name for name in KEYS if name.startswith(starts) and not KEYS[name].file]
    return {key: attrgetter(key)(cfg) for key in ("TTT.WINDOW_SIZE", *own)}


@dataclass(frozen=True)
class StageTimes:
    """The measured seconds of one method and model on one machine.

    Attributes:
        machine: in words.
        size: (height, width) in px of the frames at the network's resolution.
        parts: of :data:`PARTS`, each with at least one number, in rising order.
        steps: of updates by their number of samples, in rising order; {} if there are none.
        apart: says which of :func:`told_settings` the case had otherwise; "" for none.
    """

    machine: str
    size: tuple[int, int]
    parts: Mapping[str, Sequence[float]]
    steps: Mapping[int, Sequence[float]]
    apart: str = ""

    def draw(self, stage: str, frame: Mapping[str, Any], samples: int, seed: int) -> float:
        """Returns the seconds of a stage on a frame: one of those that were measured.

        The draw depends on seed, video, frame and stage alone. The seconds of an update lie on the
        line between those of the two measured numbers of samples beside ``samples``, or are those
        of the nearest one.

        Raises:
            UserError: the method updates, and no step was measured.
        """
        name = f"{seed}/{frame['video_id']}/{frame['frame_index']}/{stage}"
        place = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64
        if stage != "step":
            return _pick(self.parts[stage], place)
        if not self.steps:
            raise UserError(
                f"the profile of {self.machine} has no seconds of steps for this method: measure "
                "them (tools/measure_costs.py stages)"
            )
        counts = sorted(self.steps)
        right = bisect_left(counts, samples)
        low, high = counts[max(right - 1, 0)], counts[min(right, len(counts) - 1)]
        first, last = _pick(self.steps[low], place), _pick(self.steps[high], place)
        share = min(max((samples - low) / (high - low), 0.0), 1.0) if high > low else 0.0
        return first + share * (last - first)

    def check_size(self, frame: Mapping[str, Any]) -> None:
        """Refuses frames of another size than those that were measured.

        Raises:
            UserError: their numbers of pixels differ by more than a tenth.
        """
        height, width = frame["image"].shape[-2:]
        if abs(height * width - math.prod(self.size)) > _NEAR * math.prod(self.size):
            raise UserError(
                f"the profile of {self.machine} has seconds of frames of {self.size[0]}x"
                f"{self.size[1]} px, and the model sees {height}x{width}: measure frames of that "
                "size (tools/measure_costs.py stages --size)"
            )


def _pick(seconds: Sequence[float], place: float) -> float:
    """Returns the number at a place in [0, 1) of the sorted numbers."""
    return seconds[int(place * len(seconds))]


def stage_times(cfg: CfgNode, method: str | None = None) -> StageTimes:
    """Returns the seconds of a method with a config's settings, from ``TTT.CLOCK.PROFILE``.

    By default these are the seconds that the config's method takes (:func:`timed_as`).

    Raises:
        UserError: there is no such profile, it is damaged, or it has no such case.
    """
    method = method or timed_as(cfg, cfg.TTT.METHOD)
    file = find_profile(cfg.TTT.CLOCK.PROFILE)
    content = read_json_object(file)
    wanted = cost_settings(cfg, method)
    told = told_settings(cfg, method)
    apart: list[str] = []
    found: list[StageTimes] = []
    for case in read_cases(file, content):
        try:
            own, settings = case["method"], case["settings"]
            if own != method:
                continue
            differing = [key for key, value in wanted.items() if settings.get(key) != value]
            if not differing:
                others = [
                    f"{key} {there!r} (here {value!r})"
                    for key, value in told.items()
                    if (there := settings.get(key, KEYS[key].default)) != value
                ]
                found.append(_case(content["machine"], case, ", ".join(others)))
                continue
            (key, *_) = differing
            apart.append(f"{key} is {wanted[key]!r}, there {settings.get(key)!r}")
        except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
            raise UserError(
                f"{file} has a case that is damaged ({error!r}): measure anew"
            ) from error
    if found:
        return min(found, key=lambda times: len(times.apart))
    why = apart[0] if apart else "it has none of this method"
    raise UserError(
        f"profile {file.stem} has no seconds of {method} with these settings ({why}): measure them "
        "(tools/measure_costs.py stages)"
    )


def read_cases(file: Path, content: Mapping[str, Any]) -> list[Any]:
    """Returns the cases of a profile.

    Raises:
        UserError: ``content``, which ``file`` has, is none.
    """
    cases = content.get("cases")
    if not isinstance(cases, list) or not isinstance(content.get("machine"), str):
        raise UserError(f"{file} is no profile of tools/measure_costs.py stages: choose another")
    return cases


def _case(machine: str, case: Mapping[str, Any], apart: str) -> StageTimes:
    """Reads a case; raises KeyError, TypeError or ValueError where it is damaged."""
    seconds = case["seconds"]
    parts = {name: _sorted(seconds[name]) for name in PARTS}
    steps = {int(count): _sorted(values) for count, values in seconds.get("step", {}).items()}
    height, width = map(int, case["size"])
    return StageTimes(machine, (height, width), parts, steps, apart)


def _sorted(values: Sequence[float]) -> list[float]:
    numbers = sorted(float(value) for value in values)
    if not numbers or not 0 <= numbers[0] <= numbers[-1] < math.inf:
        raise ValueError(f"seconds {values!r}")
    return numbers
