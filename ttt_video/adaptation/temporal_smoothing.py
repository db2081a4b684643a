"""Temporal smoothing: the mean of the last predictions (paper, Section 5.1)."""

from __future__ import annotations

from typing import Any

import torch
from detectron2.config import CfgNode
from torch import Tensor, nn

from .base import ADAPTER_REGISTRY, Adapter
from .ensemble import EnsembleAdapter, wrapped_method


class TemporalSmoothing(EnsembleAdapter):
    """Predicts the mean class scores of the last ``size`` frames, the current one included.

    A frame's scores are those of the weights at its time; frames are counted in the order in
    which they are predicted. Predicting a frame again replaces its scores. Another video starts
    anew, also where the weights go on (``TTT.RESET never``).
    """

    def __init__(self, inner: Adapter, *, size: int) -> None:
        """``size``: frames to average, at least 1; 1 changes nothing."""
        super().__init__(inner)
        if size < 1:
            raise ValueError(f"smoothing needs at least the current frame, not {size}")
        self.size = size
        self._recent: dict[tuple[Any, Any], Tensor] = {}  # oldest first

    def predict(self, frame: Any) -> dict[str, Any]:
        """``sem_seg``: (K, H, W) mean scores. All frames of a video must have one size."""
        output = self.inner.predict(frame)
        key = (frame.get("video_id"), frame.get("frame_index"))
        if any(video_id != key[0] for video_id, _ in self._recent):
            self._recent.clear()
        self._recent.pop(key, None)
        self._recent[key] = output["sem_seg"]
        if len(self._recent) > self.size:
            del self._recent[next(iter(self._recent))]
        # Summed from the oldest, so that the result depends on nothing but these frames.
        return {**output, "sem_seg": sum(self._recent.values()) / len(self._recent)}

    def reset(self) -> None:
        """Also forgets the predictions."""
        super().reset()
        self._recent.clear()

    def state_dict(self) -> dict[str, Any]:
        """Also the remembered predictions."""
        recent = [(*key, scores.cpu()) for key, scores in self._recent.items()]
        return {**super().state_dict(), "recent": recent}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes what :meth:`state_dict` gave."""
        super().load_state_dict(state)
        device: torch.device = self.model.device  # type: ignore[assignment]
        self._recent = {(v, i): scores.to(device) for v, i, scores in state["recent"]}


@ADAPTER_REGISTRY.register()
def temporal_smoothing(cfg: CfgNode, model: nn.Module) -> TemporalSmoothing:
    """``--method temporal_smoothing``: the mean over ``TTT.ENSEMBLE.WINDOW_SIZE`` frames."""
    return TemporalSmoothing(wrapped_method(cfg, model), size=cfg.TTT.ENSEMBLE.WINDOW_SIZE)
