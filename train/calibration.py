"""How well confidences tell what is right: calibration error, Brier score, AUROC, abstention, and a temperature."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from speechllm.errors import InputError

BINS = 15  # of equal width, as in Guo et al. 2017
TEMPERATURES = (1e-3, 1e3)  # between which one is looked for


@dataclass(frozen=True)
class Judgements:
    """Words or answers, how sure the model was of each, and what is wrong with it: arrays ``[n]``.

    log_probs: float64, below 0. errors, totals: int64, of each and what they are counted against (reference words; 1
    for a word or label). clips: int64, which clip each is about; bootstraps draw whole clips.
    """

    log_probs: np.ndarray
    errors: np.ndarray
    totals: np.ndarray
    clips: np.ndarray

    @property
    def right(self) -> np.ndarray:
        """What has no error: bool ``[n]``."""
        return self.errors == 0

    def confidences(self, temperature: float) -> np.ndarray:
        """Probabilities to the power of 1 / temperature: float64 ``[n]``."""
        return np.exp(self.log_probs / temperature)


def fit_temperature(judged: Judgements) -> float:
    """The temperature with the least :func:`negative_log_likelihood`.

    That is convex in 1 / temperature, so that where its slope changes sign is found by bisection.
    Raises InputError when all is right or all is wrong: the likelihood then has no maximum.
    """
    right, wrong = judged.log_probs[judged.right], judged.log_probs[~judged.right]
    if not len(right) or not len(wrong):
        which = "right" if len(right) else "wrong"
        number = len(right) + len(wrong)
        raise InputError(f"--dev: all {number} words and labels answered are {which}: no temperature fits; give others")
    low, high = (np.log(1 / temperature) for temperature in reversed(TEMPERATURES))
    for _ in range(60):
        middle = (low + high) / 2
        with np.errstate(over="ignore"):  # to infinity, which a quotient takes to 0
            slope = -right.sum() + (wrong / np.expm1(-wrong * np.exp(middle))).sum()
        low, high = (low, middle) if slope > 0 else (middle, high)
    return float(np.exp(-(low + high) / 2))


def negative_log_likelihood(judged: Judgements, temperature: float) -> float:
    """Mean over all, in nats, of what is right and wrong given the confidences."""
    log_probs = judged.log_probs / temperature
    return float(-np.where(judged.right, log_probs, np.log(-np.expm1(log_probs))).mean())


@dataclass(frozen=True)
class Reliability:
    """Confidences in bins of equal width over [0, 1]: arrays ``[BINS]``; sums, so that empty bins need no rule."""

    counts: np.ndarray
    confidence: np.ndarray  # sum
    right: np.ndarray  # sum

    @property
    def error(self) -> float:
        """Expected calibration error (Guo et al. 2017), within [0, 1]."""
        return float(np.abs(self.confidence - self.right).sum() / self.counts.sum())


def reliability(judged: Judgements, temperature: float) -> Reliability:
    confidences = judged.confidences(temperature)
    bins = _bins(confidences)
    counts, sure, right = (
        np.bincount(bins, weights, BINS) for weights in (np.ones_like(confidences), confidences, judged.right)
    )
    return Reliability(counts.astype(np.int64), sure, right.astype(np.int64))


def error_interval(judged: Judgements, temperature: float, samples: int = 1000, seed: int = 0) -> tuple[float, float]:
    """95 % interval (low, high) of :attr:`Reliability.error`: percentiles over draws of as many clips."""
    confidences = judged.confidences(temperature)
    _, clips = np.unique(judged.clips, return_inverse=True)
    number = clips.max() + 1
    place = clips * BINS + _bins(confidences)
    gaps = np.bincount(place, confidences - judged.right, number * BINS).reshape(number, BINS)
    counts = np.bincount(clips, minlength=number)
    drawn = np.random.default_rng(seed).multinomial(number, np.full(number, 1 / number), samples)  # [samples, clips]
    low, high = np.percentile(np.abs(drawn @ gaps).sum(axis=1) / (drawn @ counts), [2.5, 97.5])
    return float(low), float(high)


def _bins(confidences: np.ndarray) -> np.ndarray:
    """Bins are open on their left: (0, 1/15], …, (14/15, 1]."""
    return np.clip(np.ceil(confidences * BINS).astype(np.int64) - 1, 0, BINS - 1)


def brier(judged: Judgements, temperature: float) -> float:
    """Mean squared distance of confidence and truth, within [0, 1] (Brier 1950)."""
    return float(np.square(judged.confidences(temperature) - judged.right).mean())


def auroc(judged: Judgements) -> float | None:
    """How often something right is surer than something wrong, a tie counting half; None where there is no such pair.

    A temperature keeps the order, and so this.
    """
    _, rank, count = np.unique(judged.log_probs, return_inverse=True, return_counts=True)
    middle = (np.cumsum(count) - (count - 1) / 2)[rank]  # ranks from 1; those of ties shared
    right = int(judged.right.sum())
    wrong = len(judged.right) - right
    if not right or not wrong:
        return None
    return float((middle[judged.right].sum() - right * (right + 1) / 2) / (right * wrong))


@dataclass(frozen=True)
class Kept:
    """What is left when all that is less sure than ``confidence`` is withheld.

    coverage: the share that is left. risk: its errors by its totals; None where those are 0.
    """

    coverage: float
    confidence: float
    risk: float | None


def abstention(judged: Judgements, temperature: float) -> list[Kept]:
    """The risk–coverage curve, most confident first: a point for each confidence there is."""
    order = np.argsort(-judged.log_probs, kind="stable")
    confidences = judged.confidences(temperature)[order]
    last = np.flatnonzero(np.append(np.diff(confidences) != 0, True))  # of those that are equally sure
    errors, totals = np.cumsum(judged.errors[order])[last], np.cumsum(judged.totals[order])[last]
    return [
        Kept((index + 1) / len(order), float(confidences[index]), float(wrong / of) if of else None)
        for index, wrong, of in zip(last.tolist(), errors, totals, strict=True)
    ]


def at_coverage(curve: Sequence[Kept], coverage: float) -> Kept:
    """The point of a curve that keeps at least this share, and as little more as there is."""
    return next(kept for kept in curve if kept.coverage >= coverage)
