"""Scores of answers: word and character error rates, BLEU and chrF, through the field's libraries."""

import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import jiwer
import numpy as np
from sacrebleu.metrics import BLEU, CHRF

from speechllm.errors import InputError


def normalize_text(text: str) -> str:
    """What WER and CER compare: Unicode NFKC, lower case, white space collapsed, punctuation and symbols removed.

    Each removed character separates words ("well-known" is two). An apostrophe between two letters or digits stays,
    a typographic one as "'". Digits stay as they are written. U+FFFD, the mark of a broken answer, stays: it counts as
    an error.
    """
    text = unicodedata.normalize("NFKC", text).lower()
    text = unicodedata.normalize("NFKC", text).replace("\u2019", "'")
    kept = []
    for index, char in enumerate(text):
        inside = 0 < index < len(text) - 1 and text[index - 1].isalnum() and text[index + 1].isalnum()
        removed = unicodedata.category(char)[0] in "PS" and char != "\ufffd" and not (char == "'" and inside)
        kept.append(" " if removed else char)
    return " ".join("".join(kept).split())


def wer(references: Sequence[str], hypotheses: Sequence[str]) -> float:
    """Word error rate of the corpus, as a fraction: errors over reference words, after normalize_text.

    Words answered to an empty reference are insertions: they add errors and no reference words. Raises ValueError for
    lists that are empty or differ in length, InputError when no reference holds a word (the rate is undefined).
    """
    return _rate(word_counts(references, hypotheses))


def cer(references: Sequence[str], hypotheses: Sequence[str]) -> float:
    """Character error rate of the corpus, spaces counted as characters; otherwise like `wer`."""
    return _rate(character_counts(references, hypotheses))


def interval(
    counts: np.ndarray, score: Callable[[np.ndarray], float], samples: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """95 % interval (low, high) of a corpus score: percentiles over draws of as many units, with replacement.

    counts: ``[units, k]``, what each unit, say a clip, adds to the ``k`` sums that the score is computed of. score: of
    sums ``[k]``; NaN where it is undefined: such draws are left out. Returns NaN twice where all are.
    """
    units = len(counts)
    generator, shares = np.random.default_rng(seed), np.full(units, 1 / units)
    drawn = np.array([score(generator.multinomial(units, shares) @ counts) for _ in range(samples)])
    if np.isnan(drawn).all():
        return float("nan"), float("nan")
    low, high = np.nanpercentile(drawn, [2.5, 97.5])
    return float(low), float(high)


def ratio(sums: np.ndarray) -> float:
    """The first of two sums over the second, NaN where that is 0: the score of most counts."""
    return float(sums[0] / sums[1]) if sums[1] else float("nan")


def bootstrap_interval(
    references: Sequence[str], hypotheses: Sequence[str], samples: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """95 % interval (low, high) of `wer`, over utterances.

    Raises what `wer` raises. A draw without any reference word is left out.
    """
    counts = word_counts(references, hypotheses)
    _rate(counts)
    return interval(counts, ratio, samples, seed)


def mean_interval(
    values: Sequence[float], groups: Sequence[str], samples: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """95 % interval (low, high) of a mean: percentiles over draws of as many groups, with replacement.

    groups: of each value; values about the same recording are no independent evidence, and are drawn together. Raises
    ValueError for lists that are empty or differ in length.
    """
    if not values or len(values) != len(groups):
        raise ValueError(f"{len(values)} values in {len(groups)} groups: one group is needed for each")
    _, places = np.unique(list(groups), return_inverse=True)
    return interval(np.stack([np.bincount(places, values), np.bincount(places)], 1), ratio, samples, seed)


@dataclass(frozen=True)
class TextCounts:
    """What sacrebleu computes a corpus score of.

    counts: ``[utterances, k]``. score: of their sums ``[k]``, 0 to 100. signature: sacrebleu's.
    """

    counts: np.ndarray
    score: Callable[[np.ndarray], float]
    signature: str


def text_counts(metric: Literal["bleu", "chrf"], references: Sequence[str], hypotheses: Sequence[str]) -> TextCounts:
    """Of each utterance what BLEU or chrF of the raw texts, one reference each, adds up. Raises ValueError."""
    _check_lists(references, hypotheses)
    scorer = BLEU() if metric == "bleu" else CHRF()
    # what sacrebleu's own bootstrap resamples; it has no public name
    counts = np.array(scorer._extract_corpus_statistics(list(hypotheses), [list(references)]))

    def score(sums: np.ndarray) -> float:
        return float(scorer._compute_score_from_stats(sums.tolist()).score)

    return TextCounts(counts, score, str(scorer.get_signature()))


def _check_lists(references: Sequence[str], hypotheses: Sequence[str]) -> None:
    if len(references) != len(hypotheses):
        raise ValueError(f"{len(references)} references but {len(hypotheses)} hypotheses")
    if not references:
        raise ValueError("nothing to score: the lists are empty")


def word_counts(references: Sequence[str], hypotheses: Sequence[str]) -> np.ndarray:
    """Errors and reference words of each utterance: int64 [utterances, 2]."""
    _check_lists(references, hypotheses)
    rows = []
    for reference, hypothesis in zip(map(normalize_text, references), map(normalize_text, hypotheses), strict=True):
        if not reference:
            rows.append((len(hypothesis.split()), 0))
            continue
        out = jiwer.process_words(reference, hypothesis)
        rows.append((out.substitutions + out.deletions + out.insertions, len(reference.split())))
    return np.array(rows, dtype=np.int64)


def character_counts(references: Sequence[str], hypotheses: Sequence[str]) -> np.ndarray:
    """Errors and reference characters of each utterance: int64 [utterances, 2]."""
    _check_lists(references, hypotheses)
    rows = []
    for reference, hypothesis in zip(map(normalize_text, references), map(normalize_text, hypotheses), strict=True):
        if not reference:
            rows.append((len(hypothesis), 0))
            continue
        out = jiwer.process_characters(reference, hypothesis)
        rows.append((out.substitutions + out.deletions + out.insertions, len(reference)))
    return np.array(rows, dtype=np.int64)


def _rate(counts: np.ndarray) -> float:
    errors, total = (int(value) for value in counts.sum(axis=0))
    if not total:
        raise InputError("no reference holds a word, so an error rate is undefined: score clips with speech")
    return errors / total
