"""Learns when the stream has changed, and predicts with what the head knows best.

It is not in the paper. At rest the frozen model predicts, bit for bit and at about its cost; the
head's channel means, read in the prediction itself, tell how far the frame is from training images
(:mod:`.head_signal`). When they are far, the method learns for some frames: it searches what to do
about noise and colours to bring the head nearest to what it knows (:mod:`.candidates`), and may
take the steps of :mod:`.online_ttt_mae` on pictures that are corrected so. What gains enough over
the frozen model is kept, and predicts at little more than its cost until the stream changes again
(:mod:`.change_states`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from detectron2.config import CfgNode
from torch import Tensor, nn
from torch.func import functional_call

from ..errors import UserError
from ..modeling.interface import DoubtingModel, parts_of
from .base import ADAPTER_REGISTRY
from .candidates import FROZEN, Candidate, Choice, Search
from .change_states import ChangeStates, State, StateSettings
from .head_signal import HeadSignal, SourceHead, length, read_head
from .image_correction import ImageCorrection, effect, effect_moved
from .norm_statistics import hooked, norm_layers
from .online_ttt_mae import ReconstructionAdapter
from .precision import tf32
from .window import SlidingWindow

FOLLOW = 0.1
"""Weight of a frame in the signal of a place, which follows a scene that passes by."""


_NO_PICTURE: tuple[Any, Candidate, Any] = (None, FROZEN, None)
"""A frame, a candidate, and the frame as that sees it."""


class Predicted(NamedTuple):
    """A prediction, how far it was from training images, and how unsure where that was asked."""

    output: dict[str, Any]
    rest: Tensor | None
    entropy: float = math.nan

    @property
    def score(self) -> float:
        return math.inf if self.rest is None else length(self.rest)


class ChangeAdapter(ReconstructionAdapter):
    """Takes :class:`ReconstructionAdapter`'s steps in the state learn only.

    Guarantees, each with a test: in rest and return predictions are the frozen model's bits (where
    normalisation is fused into Triton's kernels, but for rounding: layers that are read run by
    themselves); in learn and keep another candidate than the frozen model predicts only while it
    leads in the last comparison; and learn ends after a number of frames that is known before.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        head: SourceHead,
        states: StateSettings,
        choice: Choice,
        search: Search,
        read: Sequence[str],
        step_frames: int,
        check_effect: float,
        **settings: Any,
    ) -> None:
        """``settings`` are :class:`ReconstructionAdapter`'s.

        Args:
            model: with its source weights.
            head: signal of the layers under ``read`` on training images.
            states: when states end.
            choice: by which leads a candidate is chosen.
            search: which candidates there are.
            read: submodules of h, by their names or with the role, whose normalisation layers the
                signal is of; they never move.
            step_frames: frames after the search that have a step each; with 0 no weight moves.
            check_effect: what is kept is compared with the frozen model as soon as its effect on
                the picture moves by more than this share of it (:func:`effect_moved`).
        """
        super().__init__(model, **settings)
        layers = norm_layers(model, read)
        if any(p.requires_grad for layer in layers.values() for p in layer.parameters()):
            raise UserError(
                f"learn_on_change reads {list(read)}, and its steps move that: name parts of the "
                "head that stay in TTT.LEARN_ON_CHANGE.READ"
            )
        self.step_frames, self.check_effect = step_frames, check_effect
        self.states, self.choice, self.search = ChangeStates(states), choice, search
        self.signal, self.head = HeadSignal(layers), head.to(self.device)
        self._heads = _heads(model) if choice.entropy else {}  # whose predictions have an entropy
        self.correct = ImageCorrection(
            self.head.tensors["image_mean"], self.head.tensors["image_deviation"]
        )
        self._forget()

    def _forget(self) -> None:
        self.states.reset()
        self.choice.reset()
        self._before = FROZEN  # what was chosen before the search
        self._moved = False  # whether the model's weights are not the source's
        self._rest: Tensor | None = None  # of the last prediction
        self._place: Tensor | None = None  # what is usual under the candidate that is kept
        self._effect: Tensor | None = None  # of what is kept, in the last comparison
        self._ready: dict[Candidate, Predicted] = {}  # of the frame that was compared last
        self._compared: Any = None  # that frame
        self._picture = _NO_PICTURE

    # ---- predictions

    def predict(self, frame: Any) -> dict[str, Any]:
        """Returns detectron2's outputs for one frame, as the candidate that is trusted."""
        candidate = self.choice.trusted
        ready = self._ready.get(candidate) if frame is self._compared else None
        found = ready or self._predict_as(candidate, frame)
        self._rest, self._ready, self._compared = found.rest, {}, None
        return found.output

    def _predict_as(self, candidate: Candidate, frame: Any, *, unsure: bool = False) -> Predicted:
        corrected, said = self._corrected(candidate, frame), []
        heads = self._heads if unsure else {}
        with (
            self.predicting(),
            self.signal.reading() as reading,
            hooked(heads, lambda *args: said.append(args[-1])),
        ):
            if candidate.steps or not self._moved:
                output = self.model([corrected])[0]
            else:
                output = functional_call(self.model, self._source, ([corrected],))[0]
            vector = reading.vector()
        with torch.no_grad():
            rest = None if vector is None else self.head.rest(vector)
            if not unsure:
                return Predicted(output, rest)
            model = cast(DoubtingModel, self.model)
            entropy = model.prediction_entropy(said[-1], frame["image"].shape[1:])
            return Predicted(output, rest, float(entropy))

    def _corrected(self, candidate: Candidate, frame: Any) -> Any:
        whose, how, picture = self._picture
        if frame is whose and candidate == how:
            return picture
        # The step's precision and TF32 are not the picture's.
        with torch.autocast(self.device.type, enabled=False), tf32(self.device, allowed=False):
            image = self.correct(
                frame["image"],
                colours=candidate.colours,
                blur=candidate.blur,
                denoise=candidate.denoise,
            )
        if image is frame["image"]:
            return frame
        self._picture = frame, candidate, {**frame, "image": image}  # asked for again soon
        return self._picture[2]

    # ---- states

    def adapt(self, window: SlidingWindow, generator: torch.Generator) -> dict[str, float]:
        """Goes on to the current frame's state, and learns if that is learn.

        Returns:
            ``state``, the :class:`State` in which the frame is predicted; the properties of the
            candidate that predicts. Of the last prediction, ``norm_shift``, its distance from
            training images, and ``place_shift``, that from the place the state is about; 1 is a
            usual training image's. Where a step was taken, :meth:`GradientAdapter.adapt`'s record.
        """
        record: dict[str, float] = {}
        self._ready, self._compared, self._picture = {}, None, _NO_PICTURE
        shift, moved = self._take_rest()
        for name, value in (("norm_shift", shift), ("place_shift", moved)):
            if value is not None:
                record[name] = value
        if self.states.next_frame(shift, moved):
            self._start_from_source()
        elif self.states.check_is_due() or self._acts_otherwise(window.current):
            self._check(window.current)
        if self.states.state is State.LEARN:
            record.update(self._learn_on(window, generator))
        state = {"state": float(self.states.state)}
        return {**state, **self.choice.trusted._asdict(), **record}

    def _effect_on(self, frame: Any) -> Tensor:
        """Returns the effect of the chosen correction on a frame."""
        corrected = self._corrected(self.choice.chosen, frame)
        return effect(frame["image"], corrected["image"]).cpu()

    def _acts_otherwise(self, frame: Any) -> bool:
        """Returns whether what is kept does something else to the frame than when it was found.

        So a correction ends with its shift: the prediction does not tell, because a picture without
        noise looks like one whose noise was taken away.
        """
        if self.states.state is not State.KEEP or self._effect is None:
            return False
        return effect_moved(self._effect, self._effect_on(frame)) > self.check_effect

    def _take_rest(self) -> tuple[float | None, float | None]:
        """Takes what the last prediction saw; returns its distances from source and place.

        A prediction that is not finite says nothing.
        """
        rest, self._rest = self._rest, None
        if rest is None or not rest.isfinite().all():
            return None, None
        state = self.states.state
        moved = None if self._place is None else length(rest - self._place)
        here = moved is None or moved <= self.states.settings.moved
        if here and state in (State.KEEP, State.RETURN):
            follow = 1 / (self.states.age + 1)
            if state is State.KEEP:
                follow = max(follow, FOLLOW)
            self._place = rest if self._place is None else self._place.lerp(rest, follow)
        return length(rest), moved

    def _learn_on(self, window: SlidingWindow, generator: torch.Generator) -> dict[str, float]:
        """Takes the frame's turn of the search, or a step when that is over."""
        turn, turns, record = self.states.age, len(self.search), {}
        if turn < turns:
            self._compare(self.search.at(turn, self.choice.chosen), window.current)
        else:
            self._moved = True
            record = super().adapt(window, generator)
        if turn + 1 < turns + self.step_frames:
            return record
        if self.step_frames:
            chosen = self.choice.chosen
            ours = dict.fromkeys([FROZEN, chosen, chosen._replace(steps=1.0)])
            self._compare([*ours], window.current)
        frozen_won = self.choice.settle()
        self.states.end_of_learning(
            frozen_won=frozen_won, as_before=self.choice.chosen == self._before
        )
        if not self.choice.chosen.steps:
            self._restore()
        if not frozen_won:
            self._effect = self._effect_on(window.current)
        return record

    def inputs(self, batch: list[Any], generator: torch.Generator) -> Sequence[Tensor] | None:
        """See :meth:`ReconstructionAdapter.inputs`; of the pictures that the candidate sees."""
        return super().inputs([self._corrected(self.choice.chosen, x) for x in batch], generator)

    def losses(self, batch: list[Any], generator: torch.Generator) -> dict[str, Tensor]:
        """See :meth:`ReconstructionAdapter.losses`; of the pictures that the candidate sees."""
        return super().losses([self._corrected(self.choice.chosen, x) for x in batch], generator)

    def _seen(
        self, candidates: Sequence[Candidate], frame: Any
    ) -> tuple[dict[Candidate, float], dict[Candidate, float]]:
        """Predicts as each candidate; returns distances and entropies."""
        unsure = bool(self._heads)
        self._ready = {one: self._predict_as(one, frame, unsure=unsure) for one in candidates}
        self._compared = frame
        found = self._ready.items()
        return {one: p.score for one, p in found}, {one: p.entropy for one, p in found}

    def _compare(self, candidates: Sequence[Candidate], frame: Any) -> None:
        self.choice.compare(*self._seen(candidates, frame))
        trusted = self.choice.trusted  # whose output alone is kept
        self._ready = {one: found for one, found in self._ready.items() if one == trusted}

    def _check(self, frame: Any) -> None:
        """Compares what is kept with the frozen model, which predicts at once if that leads."""
        leads = self.choice.still_leads(*self._seen([FROZEN, self.choice.chosen], frame))
        self.states.checked(leads=leads)
        if leads:
            self._effect = self._effect_on(frame)
        else:
            self._start_from_source()

    def _start_from_source(self) -> None:
        """Begins as at the start of a video, but for the state."""
        self._before = self.choice.chosen
        self._restore()
        self.choice.reset()
        self._place = self._effect = None

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
            "before": [*self._before],
            "moved": self._moved,
            "rest": self._rest,
            "place": self._place,
            "effect": self._effect,
        }
        return {**super().state_dict(), "change": change}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See :meth:`Adapter.load_state_dict`."""
        super().load_state_dict(state)
        change = state["change"]
        self.states.load_state_dict(change["states"])
        self.choice.load_state_dict(change["choice"])
        self._before = Candidate(*change["before"])
        self._moved = change["moved"]
        self._rest = self._on_device(change["rest"])
        self._place = self._on_device(change["place"])
        self._effect = change["effect"]

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
    if cfg.TTT.RESET == "frame":
        raise UserError(
            "TTT.RESET is 'frame', after which learn_on_change never learns: choose video or never"
        )
    if cfg.TTT.RECORD_STEPS and own.STEP_FRAMES:
        raise UserError(
            "TTT.RECORD_STEPS shows what the weights after each step predict, and learn_on_change "
            "predicts with what it trusts: set it to False, or choose another --method"
        )
    if cfg.TTT.METHOD == "majority_vote":
        raise UserError(
            "a majority vote over learn_on_change would take its changed pictures for a change of "
            "the stream: vote over another method, or choose --method temporal_smoothing"
        )
    layers = norm_layers(model, own.READ)
    if not layers:
        raise UserError(
            f"no normalisation layers under {list(own.READ)}, which learn_on_change reads: set "
            "TTT.LEARN_ON_CHANGE.READ to parts of the head that have some, or choose another "
            "--method"
        )
    search = Search([{"blur": own.BLUR, "denoise": own.DENOISE}, {"colours": own.COLOURS}])
    if not (len(search) or own.STEP_FRAMES):
        raise UserError(
            "learn_on_change has nothing to learn: give TTT.LEARN_ON_CHANGE.BLUR, DENOISE, COLOURS "
            "or STEP_FRAMES"
        )
    scales: list[Any] = [layer.weight for layer in layers.values()]
    adapter = ChangeAdapter.from_config(
        cfg,
        model,
        head=read_head(own.SOURCE_HEAD, model, sum(map(len, scales))),
        states=StateSettings(
            enter=own.ENTER,
            moved=own.MOVED,
            patience=own.PATIENCE,
            wait=tuple(own.WAIT),
            check=tuple(own.CHECK_EVERY),
        ),
        choice=Choice(
            margin=own.MARGIN,
            step=own.STEP,
            approach=own.COLOUR_APPROACH,
            entropy=own.COLOUR_ENTROPY if own.COLOURS else 0.0,
        ),
        search=search,
        read=tuple(own.READ),
        step_frames=own.STEP_FRAMES,
        check_effect=own.CHECK_EFFECT,
    )
    adapter.timed_as = _timed_as(cfg)
    return adapter


def _heads(model: nn.Module) -> dict[str, nn.Module]:
    """Returns h by its name; UserError if the model does not say how unsure a prediction is."""
    if not hasattr(model, "prediction_entropy"):
        raise UserError(
            "TTT.LEARN_ON_CHANGE.COLOUR_ENTROPY needs a model with `prediction_entropy`, and the "
            f"model is a {type(model).__name__}: set it to 0, or COLOURS to []"
        )
    return {name: model.get_submodule(name) for name in parts_of(model)["h"]}


def _timed_as(cfg: CfgNode) -> str:
    return "online_ttt_mae" if cfg.TTT.LEARN_ON_CHANGE.STEP_FRAMES else "none"


learn_on_change.timed_as = _timed_as
