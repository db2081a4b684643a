"""Streams of learn_on_change on the tiny model, and its numbers by hand."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from ttt_video.adaptation.candidates import FROZEN, Candidate, Choice
from ttt_video.adaptation.change_states import State
from ttt_video.adaptation.norm_statistics import norm_layers
from ttt_video.stream import Stream

REST, LEARN, KEEP, RETURN = map(float, State)
HUGE = 1e6
AT_ONCE = {"ENTER": 0.0, "MOVED": HUGE, "PATIENCE": 1, "MARGIN": 0.0, "STEP": 0.0}
AT_ONCE |= {"COLOUR_APPROACH": 0.0, "COLOUR_ENTROPY": 0.0}
"""Learn begins with the second frame, and what is nearer to the source is chosen."""
SEARCH = {"BLUR": [1.0], "DENOISE": [], "COLOURS": [0.5, 1.0]}
NOTHING: dict[str, list] = {"BLUR": [], "DENOISE": [], "COLOURS": []}


def stream(cfg, model: nn.Module, **settings) -> Stream:
    cfg = cfg.clone()
    for key, value in {**SEARCH, **settings}.items():
        cfg.TTT.LEARN_ON_CHANGE[key] = value
    return Stream.from_config(cfg, copy.deepcopy(model))


def frozen_scores(model: nn.Module, frame: dict) -> Tensor:
    with torch.no_grad():
        return model([frame])[0]["sem_seg"]


def states(results: list) -> list[float]:
    return [r.record["state"] for r in results]


def weights(runner: Stream) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in runner.adapter.model.named_parameters()}


def distance_by_hand(model: nn.Module, image: Tensor, head: dict[str, Tensor]) -> float:
    """Length of what the head's channel means have beside the training images' directions."""
    layers = norm_layers(model, ["h"])
    means: dict[str, list] = {name: [] for name in layers}
    handles = []
    for name, layer in layers.items():
        axis = -1 if isinstance(layer, nn.LayerNorm) else 1

        def hook(_, x, out, name=name, axis=axis):
            means[name].append(out.movedim(axis, 0).flatten(1).mean(1))

        handles.append(layer.register_forward_hook(hook))
    with torch.no_grad():
        model([{"image": image}])
    for handle in handles:
        handle.remove()
    vector = torch.cat([sum(calls) / len(calls) for calls in means.values()])
    known = head["deviation"] > 1e-6
    plain = ((vector - head["mean"]) / head["deviation"])[known]
    directions = head["directions"].float()[:, known]
    for direction in directions:
        plain = plain - (plain @ direction) * direction
    return float(plain.norm() / len(vector) ** 0.5 / head["level"])


def prefer(runner: Stream, name: str) -> Stream:
    """Comparisons find candidates better that have this property, and "frozen" that one best."""
    choice = runner.adapter.choice

    def score(one: Candidate) -> float:
        if one == FROZEN:
            return 0.0 if name == "frozen" else 1.0
        return 1.0 - 0.1 * getattr(one, name, 0.0)

    choice.compare = lambda found, _: Choice.compare(choice, {one: score(one) for one in found})
    choice.still_leads = lambda found, _: Choice.still_leads(choice, {c: score(c) for c in found})
    return runner
