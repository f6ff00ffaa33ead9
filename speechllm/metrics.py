"""Scores of answers: word and character error rates, BLEU and chrF, through the field's libraries."""

import unicodedata
from collections.abc import Sequence

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
    return _rate(_word_counts(references, hypotheses))


def cer(references: Sequence[str], hypotheses: Sequence[str]) -> float:
    """Character error rate of the corpus, spaces counted as characters; otherwise like `wer`."""
    return _rate(_character_counts(references, hypotheses))


def bootstrap_interval(
    references: Sequence[str], hypotheses: Sequence[str], samples: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """95 % interval (low, high) of `wer`: percentiles over draws of as many utterances, with replacement.

    Raises what `wer` raises. A draw without any reference word is left out.
    """
    counts = _word_counts(references, hypotheses)  # [utterances, 2]
    _rate(counts)
    generator = np.random.default_rng(seed)
    drawn = np.stack([counts[generator.integers(len(counts), size=len(counts))].sum(axis=0) for _ in range(samples)])
    drawn = drawn[drawn[:, 1] > 0]  # [draws, 2]
    low, high = np.percentile(drawn[:, 0] / drawn[:, 1], [2.5, 97.5])
    return float(low), float(high)


def bleu(references: Sequence[str], hypotheses: Sequence[str]) -> tuple[float, str]:
    """Corpus BLEU (0 to 100) of the raw texts, one reference each, and sacrebleu's signature. Raises ValueError."""
    _check_lists(references, hypotheses)
    metric = BLEU()
    score = metric.corpus_score(list(hypotheses), [list(references)]).score
    return float(score), str(metric.get_signature())


def chrf(references: Sequence[str], hypotheses: Sequence[str]) -> tuple[float, str]:
    """Corpus chrF (0 to 100) of the raw texts, one reference each, and sacrebleu's signature. Raises ValueError."""
    _check_lists(references, hypotheses)
    metric = CHRF()
    score = metric.corpus_score(list(hypotheses), [list(references)]).score
    return float(score), str(metric.get_signature())


def _check_lists(references: Sequence[str], hypotheses: Sequence[str]) -> None:
    if len(references) != len(hypotheses):
        raise ValueError(f"{len(references)} references but {len(hypotheses)} hypotheses")
    if not references:
        raise ValueError("nothing to score: the lists are empty")


def _word_counts(references: Sequence[str], hypotheses: Sequence[str]) -> np.ndarray:
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


def _character_counts(references: Sequence[str], hypotheses: Sequence[str]) -> np.ndarray:
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
