"""The numbers of docs/theory.md from a video's gradients."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ..errors import UserError
from .gradients import Gradients

CHUNK = 4096  # entries of the gradients that are worked on at once


@dataclass(frozen=True)
class WindowTerms:
    """The mean gradient of l_s over k frames beside the gradient of l_m of the last frame t.

    All are over the frames t that have the largest window.

    Attributes:
        bias: |mean over the window of grad l_m, less grad l_m(t)|^2, mean: what drift does.
        variance: |mean over the window of delta, less delta's own mean|^2, mean; None without a
            scale.
        bound: k^2 (beta eta)^2 + sigma^2 / k, the theorem's; None without a scale.
        cosine: between the window's mean of grad l_s and grad l_m(t), with no scale in it: what a
            step gets of the direction that it should take; None where the noise of the draws
            hides the length of one of them.
        shuffled_cosine: the same for frame t and k - 1 other frames of the video, the expected
            value over all choices of them: what a step gets where frames come in random order.
    """

    bias: float
    variance: float | None
    bound: float | None
    cosine: float | None
    shuffled_cosine: float | None


@dataclass(frozen=True)
class Locality:
    """What the gradients of one video say. Lengths are those of grad l_m.

    Attributes:
        video_id: the video; frames: their number.
        scale: the factor c with which delta = grad l_m - c grad l_s has no part along grad l_m, as
            the theory has it; None if the gradients do not agree (cosine not above 0), and so are
            all numbers of delta.
        cosine: between grad l_m and grad l_s of a frame, without the noise of the draws.
        main_norm: root mean square of |grad l_m|.
        offset: |mean of delta|^2; the theory has it as 0.
        sigma2: variance of delta, without its mean.
        drift: root mean square of |grad l_m(t) - grad l_m(t - d)|, by lag d.
        recon_drift: the same of grad l_s, in units of its root mean square length.
        beta_eta: drift at lag 1, the theory's bound for one frame.
        best_bound: the theory's k* = (sigma^2 / (2 (beta eta)^2))^(1/3).
        best_cosine: the measured window of the largest cosine; None if no window has one.
        best_unlabelled: the window that the drift of grad l_s alone suggests, without labels.
        windows: the terms by k.
    """

    video_id: str
    frames: int
    scale: float | None
    cosine: float
    main_norm: float
    offset: float | None
    sigma2: float | None
    drift: dict[int, float]
    recon_drift: dict[int, float]
    beta_eta: float
    best_bound: float | None
    best_cosine: int | None
    best_unlabelled: float
    windows: dict[int, WindowTerms]

    def to_json(self) -> dict[str, Any]:
        """Returns all numbers as JSON values; infinite ones, which JSON lacks, as None."""
        return {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in asdict(self).items()
        }


def estimate_locality(
    gradients: Gradients, *, windows: Sequence[int], lags: Sequence[int]
) -> Locality:
    """Computes the numbers from products of independent draws, which have no noise of the draws.

    Args:
        gradients: of one video, of T frames.
        windows: values of k.
        lags: values of d, at least 1.

    Raises:
        UserError: the video is too short for them, or l_s has no gradient.
    """
    main, recon = gradients.main, gradients.recon
    frames, longest = main.shape[1], max(*windows, *(lag + 1 for lag in lags))
    if frames < longest + 1:
        raise UserError(
            f"video {gradients.video_id} has {frames} frames; windows and lags of up to {longest} "
            f"frames need {longest + 1}: give a longer video or smaller ones"
        )
    mm, ss, ms = _product(main, main), _product(recon, recon), _product(main, recon)
    for name, square in (("l_m", mm), ("l_s", ss)):
        if square <= 0:
            raise UserError(
                f"video {gradients.video_id}: the gradient of {name} is nothing but noise"
            )
    scale = offset = sigma2 = None
    if ms > 0:
        scale = mm / ms
        square = scale**2 * ss - mm  # of delta, which has no product with grad l_m
        mean_square = _mean_product(main, recon, scale)
        sigma2 = max(0.0, (square - mean_square) * frames / (frames - 1))
        offset = max(0.0, mean_square - sigma2 / frames)
    squares = {d: _product(*2 * (main[:, d:] - main[:, :-d],)) for d in lags}
    recon_squares = {d: _product(*2 * (recon[:, d:] - recon[:, :-d],)) for d in lags}
    step = squares[1] if 1 in squares else _product(*2 * (main[:, 1:] - main[:, :-1],))
    beta_eta = math.sqrt(max(0.0, step))
    terms = _window_terms(main, recon, windows, scale, offset, sigma2, max(0.0, step))
    cosines = {k: own.cosine for k, own in terms.items() if own.cosine is not None}
    return Locality(
        video_id=gradients.video_id,
        frames=frames,
        scale=scale,
        cosine=ms / math.sqrt(mm * ss),
        main_norm=math.sqrt(mm),
        offset=offset,
        sigma2=sigma2,
        drift={d: math.sqrt(max(0.0, v)) for d, v in squares.items()},
        recon_drift={d: math.sqrt(max(0.0, v) / ss) for d, v in recon_squares.items()},
        beta_eta=beta_eta,
        best_bound=None if sigma2 is None else best_window(sigma2, beta_eta),
        best_cosine=max(cosines, key=lambda k: cosines[k], default=None),
        best_unlabelled=window_of_drift(recon_squares),
        windows=terms,
    )


def best_window(sigma2: float, beta_eta: float) -> float:
    """Returns the k at which k^2 (beta eta)^2 + sigma^2 / k is least: inf where nothing drifts."""
    return math.inf if beta_eta <= 0 else (sigma2 / (2 * beta_eta**2)) ** (1 / 3)


def window_of_drift(squares: dict[int, float]) -> float:
    """Returns the window for gradients that are a random walk seen through noise of each frame.

    With E|s(t) - s(t - d)|^2 = 2 tau^2 + q d, the mean over k frames is off the walk's last value
    by tau^2 / k + q (k - 1) (2 k - 1) / (6 k), which is about tau^2 / k + q k / 3 and least at
    k = sqrt(3 tau^2 / q). Both are fitted by least squares.

    Args:
        squares: mean squared differences by lag, at least two lags.

    Returns:
        The k, at least 1; inf where the gradients do not drift.
    """
    lags = np.array(list(squares), np.float64)
    slope, start = np.polyfit(lags, np.array(list(squares.values())), 1)
    if slope <= 1e-12 * abs(start):  # rounding of the fit
        return math.inf
    return max(1.0, math.sqrt(3 * max(0.0, start / 2) / slope))


def _product(left: np.ndarray, right: np.ndarray) -> float:
    """Returns the mean over frames of <left, right>, of different draws: (2, T, D) each."""
    sums = 0.0
    for start in range(0, left.shape[-1], CHUNK):
        a, b = (x[..., start : start + CHUNK].astype(np.float64) for x in (left, right))
        sums += ((a[0] * b[1]).sum() + (a[1] * b[0]).sum()) / 2
    return float(sums / left.shape[1])


def _mean_product(main: np.ndarray, recon: np.ndarray, scale: float) -> float:
    """Returns |mean over frames of main - scale recon|^2."""
    delta = main.mean(1, np.float64) - scale * recon.mean(1, np.float64)
    return float(delta[0] @ delta[1])


def _window_terms(
    main: np.ndarray,
    recon: np.ndarray,
    windows: Sequence[int],
    scale: float | None,
    offset: float | None,
    sigma2: float | None,
    step: float,
) -> dict[int, WindowTerms]:
    first = max(windows) - 1  # the same frames for all windows
    names = ("bias", "delta", "both", "recon", "main")
    sums = {k: dict.fromkeys(names, 0.0) for k in windows}
    shuffled = {k: dict.fromkeys(("both", "recon"), 0.0) for k in windows}
    for start in range(0, main.shape[-1], CHUNK):
        m, s = (x[..., start : start + CHUNK].astype(np.float64) for x in (main, recon))
        now = m[:, first:]
        for k in windows:
            mean_m, mean_s = (_window_mean(x, k)[:, first - k + 1 :] for x in (m, s))
            delta = mean_m - (scale or 0.0) * mean_s
            pairs = (mean_m - now,) * 2, (delta,) * 2, (mean_s, now), (mean_s,) * 2, (now,) * 2
            for name, (a, b) in zip(names, pairs, strict=True):
                sums[k][name] += _product(a, b)
            for name, value in _shuffled_products(s, now, k).items():
                shuffled[k][name] += value
    return {
        k: WindowTerms(
            bias=own["bias"],
            variance=None if offset is None else own["delta"] - offset,
            bound=None if sigma2 is None else k**2 * step + sigma2 / k,
            cosine=_cosine(own["both"], own["recon"], own["main"]),
            shuffled_cosine=_cosine(shuffled[k]["both"], shuffled[k]["recon"], own["main"]),
        )
        for k, own in sums.items()
    }


def _shuffled_products(s: np.ndarray, now: np.ndarray, k: int) -> dict[str, float]:
    """Returns means over the last frames t of products with the mean of s(t) and k - 1 others.

    Each is the expected value over the others, which are drawn from all frames but t, without one
    twice. They are means of products of pairs of frames, so nothing has to be drawn.

    Args:
        s: grad l_s of all T frames, (2, T, D).
        now: grad l_m of the last frames, whose products are wanted.
        k: frames in the window.

    Returns:
        "both", with grad l_m(t), and "recon", with itself.
    """
    frames, first = s.shape[1], s.shape[1] - now.shape[1]
    own, rest = s[:, first:], s.sum(1, keepdims=True) - s[:, first:]
    one = (k - 1) / (frames - 1)  # the share of choices that hold a frame other than t
    two = one * (k - 2) / (frames - 2)  # that hold both of a pair
    square = _product(s, s) * frames - _product(own, own)  # of frames other than t, summed
    recon = _product(own, own) + one * (square + 2 * _product(own, rest))
    return {
        "both": (_product(own, now) + one * _product(rest, now)) / k,
        "recon": (recon + two * (_product(rest, rest) - square)) / k**2,
    }


def _cosine(product: float, left: float, right: float) -> float | None:
    """Returns the cosine from a product and squared lengths, whose estimates may be negative."""
    return product / math.sqrt(left * right) if min(left, right) > 0 else None


def _window_mean(x: np.ndarray, k: int) -> np.ndarray:
    """Returns the means over k frames, (2, T - k + 1, D), of (2, T, D)."""
    sums = np.cumsum(x, axis=1)
    sums[:, k:] = sums[:, k:] - sums[:, :-k]
    return sums[:, k - 1 :] / k
