"""``TTT.WINDOW_SIZE auto``: a window that is chosen by the gradients of the steps."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from contract import AdapterContract
from torch import nn

from ttt_video.adaptation import (
    AutoWindow,
    LimitedWindow,
    SlidingWindow,
    build_adapter,
    build_window,
)
from ttt_video.adaptation.auto_window import ENOUGH, START, GradientWalk, walk_terms
from ttt_video.adaptation.sketch import Sketch
from ttt_video.config import load_config
from ttt_video.errors import UserError
from ttt_video.stream import Stream

SIZE = 400


class Walk:
    """Gradients that are a random walk through noise: of each frame, and of each drawn sample."""

    def __init__(self, drift: float, frames: float, masks: float, seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)
        self.spread = [math.sqrt(value / SIZE) for value in (drift, frames, masks)]
        self.place, self.seen = np.zeros(SIZE), []

    def noise(self, kind: int, *shape: int) -> np.ndarray:
        return self.rng.normal(0, self.spread[kind], (*shape, SIZE))

    def next_frame(self) -> None:
        self.place = self.place + self.noise(0)
        self.seen.append(self.place + self.noise(1))

    def step(self, frames: list[int]) -> np.ndarray:
        return np.mean([self.seen[i] for i in frames] + self.noise(2, len(frames)), 0)


def streamed(walk: Walk, window: AutoWindow, frames: int, batch: int, sampling: str) -> list[int]:
    generator = torch.Generator().manual_seed(1)
    sizes = []
    for index in range(frames):
        walk.next_frame()
        window.push({"image": torch.tensor([index]), "frame_index": index})
        drawn = window.sample(batch, sampling=sampling, generator=generator)
        window.learn(torch.from_numpy(walk.step([x["frame_index"] for x in drawn])))
        sizes.append(int(window.record()["window_size"]))
    return sizes


@pytest.mark.parametrize(("batch", "sampling"), [(4, "with_replacement"), (8, "shuffled_epochs")])
@pytest.mark.parametrize(("drift", "frames"), [(3.0, 16.0), (1.0, 48.0)])
def test_the_window_is_that_of_hand_arithmetic(drift, frames, batch, sampling):
    window = AutoWindow(64)
    sizes = streamed(Walk(drift, frames, 8.0), window, 300, batch, sampling)
    wanted = math.sqrt(3 * frames / drift)  # 4, 12
    found = [*map(float, sizes[100:])]
    assert np.median(found) == pytest.approx(wanted, rel=0.25)
    assert 0.5 * wanted <= min(found)
    assert max(found) <= 2 * wanted
    walk = window.walk
    assert walk.drift == pytest.approx(drift, rel=0.35)
    assert walk.mask_noise + walk.frame_noise == pytest.approx(frames + 8.0, rel=0.25)


def test_noise_of_masks_alone_chooses_the_current_frame():
    window = AutoWindow(64)
    sizes = streamed(Walk(20.0, 0.0, 20.0), window, 150, 4, "with_replacement")
    assert sizes[: ENOUGH - 1] == [START] * (ENOUGH - 1)
    assert np.median(sizes[50:]) <= 2
    # And frames drawn alone, whose noise and that of their masks look alike, keep it there.
    assert window.walk.mask_noise > 5 * window.walk.frame_noise


def test_gradients_that_do_not_drift_choose_the_largest_window():
    assert streamed(Walk(0.0, 30.0, 1.0), AutoWindow(9), 60, 4, "with_replacement")[-1] == 9


def test_terms_are_those_of_the_formula():
    one, other = {3: 0.5, 7: 0.5}, {7: 0.25, 8: 0.75}
    v = {3: 0.5, 7: 0.25, 8: -0.75}
    products = {(i, j): v[i] * v[j] for i in v for j in v}
    a, b = walk_terms(one, other)
    assert a == pytest.approx(-sum(p * abs(i - j) for (i, j), p in products.items()) / 2)
    assert b == pytest.approx(0.25 + 0.0625 + 0.5625)
    assert walk_terms(one, one) == (0.0, 0.0)


def test_an_estimate_goes_on_bit_for_bit_from_its_state():
    def gradients() -> list[tuple[np.ndarray, list[int]]]:
        walk, made = Walk(1.0, 5.0, 2.0), []
        for index in range(60):
            walk.next_frame()
            batch = [index, max(0, index - 3), max(0, index - 1)]
            made.append((walk.step(batch).astype(np.float32), batch))
        return made

    whole, first = GradientWalk(), GradientWalk()
    for gradient, batch in gradients():
        whole.add(gradient, batch)
    for gradient, batch in gradients()[:40]:
        first.add(gradient, batch)
    second = GradientWalk()
    second.load_state_dict(first.state_dict())
    for gradient, batch in gradients()[40:]:
        second.add(gradient, batch)
    assert (second.window, second.mask_noise) == (whole.window, whole.mask_noise)


def test_batches_come_from_the_chosen_frames_and_memory_has_a_bound():
    window, generator = AutoWindow(8), torch.Generator().manual_seed(0)
    for index in range(20):
        window.push({"image": torch.tensor([index]), "frame_index": index})
    window.reach = 3
    drawn = window.sample(50, sampling="with_replacement", generator=generator)
    assert {x["frame_index"] for x in drawn} == {17, 18, 19}
    assert len(window) == 8
    limited = LimitedWindow(window, 2)
    drawn = limited.sample(50, sampling="without_replacement", generator=generator)
    assert {x["frame_index"] for x in drawn} <= {17, 18, 19}
    assert (limited.asked, limited.drawn) == (3, 2)
    assert limited.record() == {"window_size": 3}
    window.clear()
    assert (len(window), window.reach, window.walk.steps) == (0, 8, 0)


def test_a_sketch_keeps_inner_products_and_sums():
    rng = torch.Generator().manual_seed(5)
    vectors = torch.randn(40, 20_000, generator=rng)
    vectors[1::2] += vectors[::2]
    sketch = Sketch([12_345, 7_655], 2039, seed=1)
    small = torch.stack([sketch(v.split([12_345, 7_655])) for v in vectors])
    assert small.shape == (40, 2039)
    both = sketch((vectors[0] + vectors[1]).split([12_345, 7_655]))
    torch.testing.assert_close(both, small[0] + small[1])
    lengths = vectors.norm(dim=1)
    off = (small @ small.T - vectors @ vectors.T) / torch.outer(lengths, lengths)
    # Its standard deviation is at most sqrt(2 / 2039) = 0.031.
    assert off.std() < 0.031
    assert abs(off.mean()) < 0.01
    whole = Sketch([60, 40], 2039)
    assert torch.equal(whole(vectors[0, :100].split([60, 40])), vectors[0, :100])
    assert torch.equal(whole([None, vectors[0, :40]])[:60], torch.zeros(60))


@pytest.mark.parametrize("size", [7, 101, 701])
def test_entries_go_to_the_sums_in_turn_from_part_to_part(size):
    lengths = [3, 1, 250, 101, 2, 600, 7]
    rng = torch.Generator().manual_seed(0)
    vector = torch.randn(sum(lengths), generator=rng)
    signs = torch.randint(2, vector.shape, generator=rng.manual_seed(4), dtype=torch.int8) * 2 - 1
    expected = torch.zeros(size, dtype=torch.float64)
    expected.index_add_(0, torch.arange(len(vector)) % size, vector.double() * signs)
    sketch = Sketch(lengths, size, seed=4)
    parts = vector.split(lengths)
    torch.testing.assert_close(sketch(parts).double(), expected, rtol=0, atol=1e-5)
    without = [None if k == 2 else part for k, part in enumerate(parts)]
    zeros = [torch.zeros(250) if part is None else part for part in without]
    assert torch.equal(sketch(without), sketch(zeros))


def test_a_sketch_keeps_inner_products_of_vectors_that_are_large_in_small_parts():
    """Gradients are like this: norms and biases have most of their length."""
    lengths = [64] * 60 + [40_000]
    rng = torch.Generator().manual_seed(6)
    vectors = torch.randn(40, sum(lengths), generator=rng) * 0.01
    vectors[:, : 60 * 64 : 64] = torch.randn(40, 60, generator=rng)  # the first entry of each
    length = vectors.norm(dim=1)
    errors = []
    for seed in range(8):
        sketch = Sketch(lengths, 4093, seed)
        small = torch.stack([sketch(v.split(lengths)) for v in vectors])
        errors.append((small @ small.T - vectors @ vectors.T) / torch.outer(length, length))
    assert torch.stack(errors).std() < (2 / 4093) ** 0.5


def test_a_measured_step_is_the_gradient_of_all_parameters():
    parameters = [nn.Parameter(torch.zeros(2, 3)), nn.Parameter(torch.zeros(4))]
    parameters[1].grad = torch.arange(4.0)
    assert AutoWindow(4).measure(parameters).tolist() == [0.0] * 6 + [0.0, 1.0, 2.0, 3.0]
    assert SlidingWindow(4).measure(parameters) is None


class TestAutomaticWindow(AdapterContract):
    """Online TTT-MAE keeps its contract, resuming included."""

    method = "online_ttt_mae"

    def build(self, cfg, model, *more: str, seed: int = 0) -> Stream:
        cfg = cfg.clone()
        cfg.TTT.WINDOW_SIZE, cfg.TTT.AUTO_WINDOW.MAX = "auto", 5
        return super().build(cfg, model, *more, seed=seed)


def test_a_stream_chooses_and_says_so(tiny_cfg, tiny_model, make_video):
    cfg = tiny_cfg.clone()
    cfg.TTT.WINDOW_SIZE, cfg.TTT.AUTO_WINDOW.MAX = "auto", 5
    stream = Stream.from_config(cfg, tiny_model)
    results = [*stream.run(make_video(num_frames=ENOUGH + 2))]
    assert results[0].record["window_size"] == 5  # the largest, which is less than START
    assert all(1 <= r.record["window_size"] <= 5 for r in results)
    assert stream.window.walk.steps == ENOUGH + 2
    assert stream.window.walk.mask_noise > 0


def test_config_takes_the_word_in_every_place(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("TTT:\n  WINDOW_SIZE: auto\n  BY_METHOD:\n    tent: {WINDOW_SIZE: 3}\n")
    cfg = load_config(str(file))
    assert cfg.TTT.WINDOW_SIZE == "auto"
    assert isinstance(build_window(cfg, "cpu"), AutoWindow)
    assert load_config(str(file), method="tent").TTT.WINDOW_SIZE == 3
    assert load_config(str(file), opts=["TTT.WINDOW_SIZE", "7"]).TTT.WINDOW_SIZE == 7
    assert load_config(None, opts=["TTT.WINDOW_SIZE", "auto"]).TTT.WINDOW_SIZE == "auto"
    assert load_config(str(file), preset="paper").TTT.WINDOW_SIZE == 16
    assert load_config(cfg).TTT.WINDOW_SIZE == "auto"  # a run's own config
    with pytest.raises(UserError, match=r"WINDOW_SIZE is 'many'; give a whole number or 'auto'"):
        load_config(None, opts=["TTT.WINDOW_SIZE", "many"])
    cfg = load_config(None, method="implicit_only", opts=["TTT.WINDOW_SIZE", "auto"])
    with pytest.raises(UserError, match=r"implicit_only has TTT\.WINDOW_SIZE 1, not 'auto'"):
        build_adapter(cfg, nn.Linear(1, 1))


def test_methods_without_gradients_refuse_it(tiny_cfg, tiny_model):
    cfg = tiny_cfg.clone()
    cfg.TTT.WINDOW_SIZE, cfg.TTT.METHOD = "auto", "ln_adapt"
    with pytest.raises(UserError, match="goes by gradients, and statistics have none"):
        Stream.from_config(cfg, tiny_model)
