"""Learns when the stream has changed, and predicts with what the head likes best.

It is not in the paper. At rest the frozen model predicts, bit for bit and at its cost; the head's
channel means, read in the prediction itself, tell how far the frame is from training images
(:mod:`.head_signal`). When they are far, the method learns for a while: it takes the steps of
:mod:`.online_ttt_mae`, and corrects the statistics of f's normalisation layers as :mod:`.ln_adapt`
does. Of {frozen, corrected statistics, steps, both} the one that brings the head nearest to what it
knows predicts, if it gains enough over the frozen model (:mod:`.candidates`). What won is kept, and
predicts at about the cost of the frozen model until the stream changes again
(:mod:`.change_states`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from detectron2.config import CfgNode
from torch import Tensor, nn
from torch.func import functional_call

from ..errors import UserError
from .base import ADAPTER_REGISTRY
from .candidates import CANDIDATES, FROZEN, Candidate, Choice
from .change_states import ChangeStates, State, StateSettings
from .head_signal import HeadSignal
from .ln_adapt import check_window
from .norm_correction import Measured, NormCorrection
from .norm_statistics import Statistics, fit_statistics, norm_layers, read_statistics
from .online_ttt_mae import ReconstructionAdapter
from .place_memory import Place, PlaceMemory
from .window import SlidingWindow

CORRECTED = ("f",)
"""Parts whose layers' statistics are corrected."""

FOLLOW = 0.1
"""Weight of a frame in the signal of a place, which follows a scene that passes by."""

_ORDER = [*CANDIDATES]


class Seen(NamedTuple):
    """What a prediction tells besides its output."""

    signal: Tensor | None
    measured: Measured


class ChangeAdapter(ReconstructionAdapter):
    """Takes :class:`ReconstructionAdapter`'s steps in the state learn only.

    Guarantees, each with a test: in rest and return predictions are the frozen model's bits; in
    learn and keep another candidate than the frozen model predicts only while its score was better
    by the margin in the last comparison; and learn ends after ``learn_frames``.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        source: Mapping[str, Tensor],
        states: StateSettings,
        choice: Choice,
        candidates: Sequence[str],
        read: Sequence[str],
        prior: float,
        limit: float,
        every: int,
        check_every: int,
        window_size: int | None,
        places: int = 0,
        **settings: Any,
    ) -> None:
        """``settings`` are :class:`ReconstructionAdapter`'s.

        Args:
            model: with its source weights.
            source: of :func:`measure_statistics`.
            states: when states end.
            choice: by which margins a candidate is chosen.
            candidates: names in :data:`CANDIDATES`, "frozen" among them.
            read: submodules of h, by their names or with the role, whose normalisation layers the
                signal is of; they never move.
            prior: see :class:`NormCorrection`.
            limit: see :class:`NormCorrection`.
            every: frames of learn from one comparison to the next, which costs a prediction per
                candidate.
            check_every: frames of keep from one comparison with the frozen model to the next.
            window_size: frames whose statistics are pooled; None: all since learn began.
            places: changes of the weights that are remembered after keep, for when the stream comes
                back; 0 remembers none.
        """
        super().__init__(model, **settings)
        layers, corrected = norm_layers(model, read), norm_layers(model, CORRECTED)
        if not layers:
            raise UserError(
                f"no normalisation layers under {list(read)}, which learn_on_change reads: set "
                "TTT.LEARN_ON_CHANGE.READ to parts of the head that have some, or choose another "
                "--method"
            )
        if any(p.requires_grad for layer in layers.values() for p in layer.parameters()):
            raise UserError(
                f"learn_on_change reads {list(read)}, and its steps move that: name parts of the "
                "head that stay in TTT.LEARN_ON_CHANGE.READ"
            )
        if not corrected:
            candidates = [name for name in candidates if not CANDIDATES[name].norms]
        self.candidates = {name: CANDIDATES[name] for name in candidates}
        self.every, self.check_every, self.window_size = every, check_every, window_size
        self.states, self.choice = ChangeStates(states), choice
        self.signal = HeadSignal(layers, fit_statistics(layers, source))
        self.norms = NormCorrection(
            corrected, fit_statistics(corrected, source), prior=prior, limit=limit
        )
        self.memory = PlaceMemory(places)
        self._steps = any(candidate.steps for candidate in self.candidates.values())
        self._forget()

    def _forget(self) -> None:
        self.states.reset()
        self.choice.reset()
        self.norms.clear()
        self.memory.clear()
        self._moved = False  # whether the model's weights are not the source's
        self._seen = Seen(None, {})  # by the last prediction
        self._place: Tensor | None = None  # its signal, under the weights that are kept

    # ---- predictions

    def predict(self, frame: Any) -> dict[str, Any]:
        """Returns detectron2's outputs for one frame, as the candidate that is chosen."""
        output, self._seen = self._predict_as(CANDIDATES[self.choice.chosen], frame)
        return output

    def _predict_as(self, candidate: Candidate, frame: Any) -> tuple[dict[str, Any], Seen]:
        correcting: AbstractContextManager[Measured] = nullcontext({})
        if candidate.norms:
            correcting = self.norms.correcting(self.window_size)
        with self.predicting(), self.signal.reading() as reading, correcting as measured:
            if candidate.steps or not self._moved:
                output = self.model([frame])[0]
            else:
                output = functional_call(self.model, self._source, ([frame],))[0]
        return output, Seen(reading.vector(), measured)

    # ---- states

    def adapt(self, window: SlidingWindow, generator: torch.Generator) -> dict[str, float]:
        """Goes on to the current frame's state, and learns if that is learn.

        Returns:
            ``state``, the :class:`State` in which the frame is predicted; ``candidate``, the chosen
            one's place in :data:`CANDIDATES`. Of the last prediction, ``norm_shift``, the mean
            distance of the signal from the source, and ``place_shift``, that from the place the
            state is about, both in the source's standard deviations. Where the stream has changed,
            ``recalled``: whether what was learnt at an earlier place goes on. Where a step was
            taken, :meth:`GradientAdapter.adapt`'s record.
        """
        record: dict[str, float] = {}
        shift, moved = self._take_seen()
        for name, value in (("norm_shift", shift), ("place_shift", moved)):
            if value is not None:
                record[name] = value
        kept = self.states.state is State.KEEP
        if self.states.next_frame(shift, moved):
            if kept:
                self._remember()
            self._start_from_source()
            record["recalled"] = float(self._recall(window.current))
        elif self._is_outdated(window.current):
            self._start_from_source()
        if self.states.state is State.LEARN:
            record.update(self._learn_on(window, generator))
        return {
            "state": float(self.states.state),
            "candidate": float(_ORDER.index(self.choice.chosen)),
            **record,
        }

    def _take_seen(self) -> tuple[float | None, float | None]:
        """Takes what the last prediction saw; returns its distances from source and place.

        A prediction that is not finite says nothing.
        """
        signal, measured = self._seen
        self._seen = Seen(None, {})
        if signal is None or not signal.isfinite().all():
            return None, None
        state = self.states.state
        moved = None if self._place is None else float((signal - self._place).abs().mean())
        here = state is not State.KEEP or moved is None or moved <= self.states.settings.moved
        if here and state in (State.LEARN, State.KEEP):
            self.norms.take(measured, self.window_size)
        if here and state in (State.KEEP, State.RETURN):
            follow = FOLLOW if state is State.KEEP else 1 / max(self.states.age, 1)
            self._place = signal if self._place is None else self._place.lerp(signal, follow)
        return float(signal.abs().mean()), moved

    def _learn_on(self, window: SlidingWindow, generator: torch.Generator) -> dict[str, float]:
        record = {}
        if self._steps:
            record = super().adapt(window, generator)
            self._moved = True
        if self.states.age % self.every == 0:
            self._compare([*self.candidates], window.current)
            self.states.compared(self.choice.chosen == FROZEN)
        self.states.end_of_learning(self.choice.chosen == FROZEN)
        if self.states.state is State.RETURN:
            self._start_from_source()
        elif self.states.state is State.KEEP and not CANDIDATES[self.choice.chosen].steps:
            self._restore()
        return record

    def _compare(self, names: Sequence[str], frame: Any) -> None:
        self.choice.compare({name: self._score(name, frame) for name in names})

    def _score(self, name: str, frame: Any) -> float:
        """Returns the distance from the source of a candidate's prediction of a frame."""
        _, seen = self._predict_as(CANDIDATES[name], frame)
        return math.inf if seen.signal is None else float(seen.signal.abs().mean())

    def _is_outdated(self, frame: Any) -> bool:
        """Compares what is kept with the frozen model once in a while; if it no longer gains, learn
        begins.
        """
        states = self.states
        if states.state is not State.KEEP or (states.age + 1) % self.check_every:
            return False
        self._compare([FROZEN, self.choice.chosen], frame)
        outdated = self.choice.chosen == FROZEN
        if outdated:
            states.learn_again()
        return outdated

    # ---- places

    def _remember(self) -> None:
        """Keeps what the place was predicted with that the stream has just left."""
        name = self.choice.chosen
        if not self.memory.size:
            return
        moved = {n: t.detach().clone() for n, t in self._moving.items()} if self._moved else {}
        norms = self.norms.state_dict() if CANDIDATES[name].norms else {}
        self.memory.keep(Place(name, self.choice.scores[name], moved, norms))

    def _recall(self, frame: Any) -> bool:
        """Goes on from the place that is nearest, if this is that place again.

        It is if the prediction is about as near to the source as it was there, and nearer than the
        frozen model's by the margin. The change is then kept without learning.
        """
        if not len(self.memory):
            return False
        frozen, best, least = self._score(FROZEN, frame), None, math.inf
        for place in self.memory:
            self._install(place)
            score = self._score(place.candidate, frame)
            margin = self.choice.margin * frozen
            # Nothing is nearer than a frozen model whose score is no number.
            if score < min(least, frozen - margin, place.score + margin) and math.isfinite(frozen):
                best, least = place, score
        if best is None:
            self._start_from_source()
            return False
        self._install(best)
        self.memory.take(best)
        self.choice.load_state_dict({"chosen": best.candidate, "scores": {best.candidate: least}})
        self.states.recall()
        return True

    def _install(self, place: Place) -> None:
        self._start_from_source()
        for name, tensor in place.weights.items():
            self._moving[name].data.copy_(tensor)
        self._moved = bool(place.weights)
        self.norms.load_state_dict(place.norms)

    def _start_from_source(self) -> None:
        """Begins as at the start of a video, but for the state and the memory."""
        self._restore()
        self.norms.clear()
        self.choice.reset()
        self._place = None

    def _restore(self) -> None:
        super().reset()
        self._moved = False

    def reset(self) -> None:
        """Returns to the source weights and to rest."""
        super().reset()
        self._forget()

    # ---- saved states

    def state_dict(self) -> dict[str, Any]:
        """Returns :meth:`GradientAdapter.state_dict`'s entries, and ``change``."""
        change = {
            "states": self.states.state_dict(),
            "choice": self.choice.state_dict(),
            "norms": self.norms.state_dict(),
            "moved": self._moved,
            "signal": self._seen.signal,
            "measured": {name: tuple(s) for name, s in self._seen.measured.items()},
            "place": self._place,
            "memory": self.memory.state_dict(),
        }
        return {**super().state_dict(), "change": change}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See :meth:`Adapter.load_state_dict`."""
        super().load_state_dict(state)
        change = state["change"]
        self.states.load_state_dict(change["states"])
        self.choice.load_state_dict(change["choice"])
        self.norms.load_state_dict(change["norms"])
        self.memory.load_state_dict(change["memory"])
        self._moved = change["moved"]
        measured = {
            name: Statistics(*(t.to(self.device) for t in parts))
            for name, parts in change["measured"].items()
        }
        self._seen = Seen(self._on_device(change["signal"]), measured)
        self._place = self._on_device(change["place"])

    def _on_device(self, tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.to(self.device)

    def replay_graphs(self, capture: Any) -> None:
        """Has steps replayed; predictions are not, because their activations are read."""
        super().replay_graphs(capture)
        self._replayed_prediction = None


@ADAPTER_REGISTRY.register()
def learn_on_change(cfg: CfgNode, model: nn.Module) -> ChangeAdapter:
    """Builds ``--method learn_on_change``.

    Raises:
        UserError: another setting contradicts it.
    """
    own = cfg.TTT.LEARN_ON_CHANGE
    check_window(cfg)
    if cfg.TTT.RESET == "frame":
        raise UserError(
            "TTT.RESET is 'frame', after which learn_on_change never learns: choose video or never"
        )
    if cfg.TTT.METHOD == "majority_vote":
        raise UserError(
            "a majority vote over learn_on_change would take its changed pictures for a change of "
            "the stream: vote over another method, or choose --method temporal_smoothing"
        )
    return ChangeAdapter.from_config(
        cfg,
        model,
        source=read_statistics(cfg, norm_layers(model, (*own.READ, *CORRECTED))),
        states=StateSettings(
            enter=own.ENTER,
            moved=own.MOVED,
            patience=own.PATIENCE,
            learn_frames=own.LEARN_FRAMES,
            give_up=own.GIVE_UP,
            return_frames=own.RETURN_FRAMES,
        ),
        choice=Choice(margin=own.MARGIN, hysteresis=own.HYSTERESIS, decay=own.DECAY),
        candidates=tuple(own.CANDIDATES),
        read=tuple(own.READ),
        prior=own.PRIOR,
        limit=own.LIMIT,
        every=own.EVERY,
        check_every=own.CHECK_EVERY,
        window_size=cfg.TTT.WINDOW_SIZE or None,
        places=own.PLACES,
    )
