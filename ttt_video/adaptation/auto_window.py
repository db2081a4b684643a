"""Explicit memory that chooses its own length by the gradients of the steps, without labels.

docs/theory.md derives the rule. A frame's gradient s(t) of the auxiliary loss is taken for a random
walk, whose steps have variance q, seen through noise of each frame, of variance tau^2. Masks are
drawn anew, which moves the gradient of a sample by noise of variance nu^2. A step has the mean over
a batch, in which frame i has the share p(i). Then two steps t, u differ by v = p_t - p_u, whose sum
is 0, and

    E|G_t - G_u|^2  =  q a + tau^2 b + nu^2 c

    a = - sum_{i<j} v_i v_j |i - j|,    b = sum_i v_i^2,    c = 1 / B_t + 1 / B_u

whatever the window and the way batches are drawn. Least squares over the last steps give the three
variances, and the window is (3 tau^2 / q)^(1/2).
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from torch import Tensor, nn

from ..config import AUTO
from .sketch import Sketch
from .window import Sample, SlidingWindow

START = 16
"""The window, in frames, while too few steps were seen: the paper's."""

ENOUGH = 8
"""Steps after which the window is chosen."""

KEPT = 32
"""Steps that a new one is compared with."""

DECAY = 0.98
"""Weight of what was seen one step before: the variances are those of about fifty steps."""

INERTIA = 1e-3
"""Pull of a fit to the one before it, where the batches say nothing: frames that are drawn alone
cannot tell the noise of a frame from that of its masks."""

SKETCH = 4093
"""Numbers that a gradient is compressed to, a prime: inner products are right within 1.6 % of the
product of lengths (standard deviation)."""


class GradientWalk:
    """Estimates, step by step, how gradients drift and how noisy frames and masks make them.

    Attributes:
        steps: that were seen; before the second one all variances are 0.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forgets everything."""
        self.steps = 0
        self._recent: deque[tuple[np.ndarray, dict[int, float], int]] = deque(maxlen=KEPT)
        self._matrix, self._target = np.zeros((3, 3)), np.zeros(3)
        self._found = np.zeros(3)

    @property
    def drift(self) -> float:
        """Variance q of a frame's step."""
        return float(self._found[0])

    @property
    def frame_noise(self) -> float:
        """Variance tau^2 of a frame's noise."""
        return float(self._found[1])

    @property
    def mask_noise(self) -> float:
        """Variance nu^2 of the noise of one sample's masks."""
        return float(self._found[2])

    def add(self, gradient: np.ndarray, frames: Sequence[int]) -> None:
        """Compares a step with those before it.

        Args:
            gradient: of the step, (D,) finite; all have the same D.
            frames: place in the stream of each sample of its batch.
        """
        gradient = gradient.astype(np.float64)
        shares = {i: n / len(frames) for i, n in Counter(frames).items()}
        self._matrix *= DECAY
        self._target *= DECAY
        for other, other_shares, count in self._recent:
            # Lengths of gradients vary a lot, and the largest must not decide alone.
            scale = float(gradient @ gradient + other @ other)
            if scale > 0:
                terms = [*walk_terms(shares, other_shares), 1 / len(frames) + 1 / count]
                row = np.array(terms) / scale
                self._matrix += np.outer(row, row)
                self._target += row * (float(np.sum((gradient - other) ** 2)) / scale)
        self._recent.append((gradient, shares, len(frames)))
        self.steps += 1
        self._fit()

    def _fit(self) -> None:
        """Finds the variances, none negative, by least squares from the sums."""
        from scipy.optimize import nnls  # takes longer to import than all that is imported here

        units = np.sqrt(np.diag(self._matrix))
        if not units.all():
            return
        matrix = self._matrix / np.outer(units, units) + INERTIA * np.eye(3)
        root = np.linalg.cholesky(matrix)
        target = self._target / units + INERTIA * (self._found * units)
        self._found = nnls(root.T, np.linalg.solve(root, target))[0] / units

    @property
    def window(self) -> float:
        """The window whose mean is nearest to the walk's last value, at least 1; inf: no drift."""
        if self.drift <= 0:
            return math.inf
        return max(1.0, math.sqrt(3 * self.frame_noise / self.drift))

    def state_dict(self) -> dict[str, Any]:
        """Returns everything that later estimates depend on."""
        recent = [
            (torch.from_numpy(gradient), list(shares.items()), count)
            for gradient, shares, count in self._recent
        ]
        arrays = {"matrix": self._matrix, "target": self._target, "found": self._found}
        tensors = {name: torch.from_numpy(array.copy()) for name, array in arrays.items()}
        return {"steps": self.steps, "recent": recent, **tensors}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from a state of :meth:`state_dict`."""
        self.reset()
        self.steps = state["steps"]
        for gradient, shares, count in state["recent"]:
            self._recent.append((gradient.cpu().numpy(), dict(shares), count))
        for name in ("matrix", "target", "found"):
            setattr(self, f"_{name}", state[name].cpu().numpy().copy())


def walk_terms(one: dict[int, float], other: dict[int, float]) -> tuple[float, float]:
    """Returns a and b of the module's formula.

    Args:
        one: share of each frame in a batch, by its place in the stream; they sum to 1.
        other: the same for another batch.
    """
    places = sorted({*one, *other})
    v = np.array([one.get(i, 0.0) - other.get(i, 0.0) for i in places])
    # The partial sum of v before each gap crosses it: -sum_{i<j} v_i v_j |i - j|.
    return float(np.diff(places) @ np.cumsum(v)[:-1] ** 2), float(v @ v)


class AutoWindow(SlidingWindow):
    """Keeps the last ``most`` frames and draws from as many of them as the gradients suggest.

    Attributes:
        reach: frames that batches are drawn from, at most.
        walk: the estimate.
    """

    def __init__(self, most: int, device: torch.device | str = "cpu") -> None:
        """Takes ``most``, the largest window, and the device of the images."""
        super().__init__(most, device)
        self.walk = GradientWalk()
        self._sketch: Sketch | None = None
        self._start()

    def _start(self) -> None:
        self.reach = min(START, self.most)
        self._pushed = 0

    @property
    def most(self) -> int:
        """The largest window, in frames."""
        assert self.size is not None
        return self.size

    def push(self, frame: Any) -> Sample:
        """See :meth:`SlidingWindow.push`."""
        self._pushed += 1
        return super().push(frame)

    def _drawable(self) -> int:
        return min(self.reach, len(self))

    def measure(self, parameters: Sequence[nn.Parameter]) -> Tensor:
        """Returns the sketch of a step's gradient; parameters are always the same ones."""
        if self._sketch is None:
            lengths = [parameter.numel() for parameter in parameters]
            self._sketch = Sketch(lengths, SKETCH, device=parameters[0].device)
        return self._sketch([parameter.grad for parameter in parameters])

    def learn(self, measured: Tensor) -> None:
        """Chooses the window by one step more, whose batch was the last one drawn."""
        first = self._pushed - len(self)
        self.walk.add(measured.cpu().numpy(), [first + i for i in self.picks])
        if self.walk.steps >= ENOUGH:
            self.reach = round(min(self.walk.window, self.most))

    def record(self) -> dict[str, float]:
        """Returns ``window_size``, from which the next batch is drawn."""
        return {"window_size": self.reach}

    def clear(self) -> None:
        """Forgets every frame and what was learned from their gradients."""
        super().clear()
        self.walk.reset()
        self._start()

    def state_dict(self) -> dict[str, Any]:
        """Returns the frames, which are not copied, and the estimate."""
        own = {"reach": self.reach, "pushed": self._pushed, "walk": self.walk.state_dict()}
        return {**super().state_dict(), **own}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from ``state``."""
        super().load_state_dict(state)
        self.walk.load_state_dict(state["walk"])
        self.reach, self._pushed = state["reach"], state["pushed"]


def build_window(cfg: CfgNode, device: torch.device | str) -> SlidingWindow:
    """Returns the empty window of ``TTT.WINDOW_SIZE``, with its images on a device."""
    if cfg.TTT.WINDOW_SIZE == AUTO:
        return AutoWindow(cfg.TTT.AUTO_WINDOW.MAX, device)
    return SlidingWindow(cfg.TTT.WINDOW_SIZE or None, device)
