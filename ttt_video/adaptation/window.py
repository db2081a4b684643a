"""Explicit memory: the most recent frames of a video, on the model's device."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..color.lab import in_three_channels, is_one_plane

Sample = dict[str, Any]
"""What a method may see of a frame: ``image`` (3, H, W) uint8 on the device, ``video_id``,
``frame_index``, ``grey`` where a frame has no other colours. Labels cannot get in."""

INPUT_KEYS = ("video_id", "frame_index", "height", "width", "grey")


class SlidingWindow:
    """The last ``size`` frames, the current one included (paper, Section 4.2, "explicit memory").

    Args:
        size: k, in frames; None keeps every frame since :meth:`clear`, and its memory grows.
        device: where the images are kept; a frame is moved there once.

    Attributes:
        drawn: samples of the last batch; 0 where none was drawn.
    """

    def __init__(self, size: int | None, device: torch.device | str = "cpu") -> None:
        if size is not None and size < 1:
            raise ValueError(f"a window holds at least the current frame, not {size}")
        self.size = size
        self.device = torch.device(device)
        self._frames: deque[Sample] = deque(maxlen=size)
        self.drawn = 0
        self.picks: list[int] = []
        """Places in the window, from its oldest frame, of the samples drawn last."""

    def __len__(self) -> int:
        return len(self._frames)

    @property
    def current(self) -> Sample:
        """The frame pushed last."""
        return self._frames[-1]

    def push(self, frame: Any) -> Sample:
        """Adds the current frame, forgetting the oldest; only input keys are kept."""
        sample = {key: frame[key] for key in INPUT_KEYS if key in frame}
        sample["image"] = _moved(frame["image"], self.device)
        self._frames.append(sample)
        return sample

    def clear(self) -> None:
        """Forgets every frame."""
        self._frames.clear()

    def state_dict(self) -> dict[str, Any]:
        """The frames; their images are not copied."""
        return {"frames": list(self._frames)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Holds the frames of ``state`` and no others; images are moved to the device."""
        self.clear()
        for frame in state["frames"]:
            self.push(frame)

    def sample(self, batch_size: int, *, sampling: str, generator: torch.Generator) -> list[Sample]:
        """A batch of frames.

        Args:
            batch_size: number of samples; frames repeat when it exceeds the window.
            sampling: "with_replacement" draws uniformly (Section 4.2); "shuffled_epochs" cuts the
                batch from shuffled passes over the window, one after the other, as the published
                code does: a full window of 16 and 32 samples give every frame exactly twice;
                "without_replacement" draws different frames, no more than the window has.
            generator: on the CPU.
        """
        count = self._drawable()
        if sampling == "without_replacement":
            batch_size = min(batch_size, count)
        if sampling == "with_replacement":
            picks = torch.randint(count, (batch_size,), generator=generator)
        elif sampling == "shuffled_epochs":
            passes = -(-batch_size // count)
            order = [torch.randperm(count, generator=generator) for _ in range(passes)]
            picks = torch.cat(order)[:batch_size]
        elif sampling == "without_replacement":
            picks = torch.randperm(count, generator=generator)[:batch_size]
        else:
            raise ValueError(
                f"no sampling {sampling!r}; with_replacement, without_replacement, shuffled_epochs"
            )
        self.drawn = len(picks)
        self.picks = (picks + (len(self._frames) - count)).tolist()
        return [self._frames[i] for i in self.picks]

    def _drawable(self) -> int:
        """Returns how many of the last frames batches are drawn from."""
        return len(self._frames)

    def measure(self, parameters: Sequence[nn.Parameter]) -> Tensor | None:
        """Returns what :meth:`learn` needs of the gradients of a step; None: nothing."""
        return None

    def learn(self, measured: Tensor) -> None:
        """Learns from a step on the batch drawn last, if its gradients are finite."""

    def record(self) -> dict[str, float]:
        """Returns scalars for a frame's record."""
        return {}


def _moved(image: Tensor, device: torch.device) -> Tensor:
    """Returns an image on a device; one plane stays one, which a plain copy would triple."""
    if is_one_plane(image):
        return in_three_channels(image[:1].to(device, non_blocking=True))
    return image.to(device, non_blocking=True)


class LimitedWindow(SlidingWindow):
    """A view of a window that draws batches of at most ``max_samples``, whatever is asked for.

    So every method that draws its batches from the window it is given takes shorter steps.

    Attributes:
        asked: samples of the last batch without the limit; 0 where none was drawn.
    """

    def __init__(self, window: SlidingWindow, max_samples: int) -> None:
        super().__init__(window.size, window.device)
        self._window = window
        self._frames = window._frames
        self.max_samples = max_samples
        self.asked = 0

    def sample(self, batch_size: int, *, sampling: str, generator: torch.Generator) -> list[Sample]:
        """Returns what :meth:`SlidingWindow.sample` does for a batch of no more than the limit."""
        limit = min(batch_size, self.max_samples)
        batch = self._window.sample(limit, sampling=sampling, generator=generator)
        whole = self._window._drawable() if sampling == "without_replacement" else batch_size
        self.asked, self.drawn = min(batch_size, whole), len(batch)
        return batch

    def measure(self, parameters: Sequence[nn.Parameter]) -> Tensor | None:
        """See :meth:`SlidingWindow.measure`."""
        return self._window.measure(parameters)

    def learn(self, measured: Tensor) -> None:
        """See :meth:`SlidingWindow.learn`."""
        self._window.learn(measured)

    def record(self) -> dict[str, float]:
        """See :meth:`SlidingWindow.record`."""
        return self._window.record()
