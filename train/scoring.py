"""How good answers are: each task's own metrics, from answers as they are written and read back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from meeteval.wer.wer.cp import cp_word_error_rate
from pyannote.core import Annotation, Timeline
from pyannote.core import Segment as Stretch
from pyannote.metrics.diarization import DiarizationErrorRate

from speechllm.metrics import character_counts, interval, normalize_text, ratio, text_counts, word_counts
from speechllm.tasks import ParsedAnswer, Segment, Task
from speechllm.tasks.words import PlainText
from train.results import LOWER_IS_BETTER, Confusion

__all__ = ["LOWER_IS_BETTER", "SCORES", "Measure", "confusion", "measures", "score", "words"]

# metric of a task -> names of its scores, the first is the one that counts. Percent but BLEU, which is 0-100 too
SCORES = {
    "wer": ("wer", "invented"),
    "bleu": ("bleu", "invented"),
    "accuracy": ("uar", "accuracy"),
    "turns": ("der", "cpwer"),
    "activity": ("f1",),
    "slots": ("slot_f1", "intent_accuracy"),
}
NORMALISER = "lower case, no punctuation (speechllm.metrics.normalize_text)"
NO_COLLAR = "no collar, overlapping speech counted"
NONE = "(none)"  # in confusions: an answer that is no label
Score = Callable[[np.ndarray], float]


@dataclass(frozen=True)
class Measure:
    """A score of a test set as what its clips add to some sums, so that any part of it can be scored and resampled.

    counts: ``[clips, k]``. of: sums ``[k]`` -> the score as in results, NaN where it is undefined. applies: bool
    ``[clips]``, whether a clip tells anything about this score; the counts of the others are 0. kinds: bool
    ``[clips, kinds]``, of which kind a clip is, where the score is a mean over kinds: it is undefined where one is not
    there, for another mean is nothing to compare with.
    """

    metric: str
    counts: np.ndarray
    of: Score
    applies: np.ndarray
    note: str = ""
    kinds: np.ndarray | None = None

    def value(self, chosen: np.ndarray | None = None) -> float:
        """The score of the clips ``chosen``, bool ``[clips]``; of all without it. NaN where it is undefined."""
        rows = self._rows(chosen)
        if self.kinds is not None and chosen is not None and (self.kinds.any(0) & ~self.kinds[chosen].any(0)).any():
            return float("nan")
        return self.of(rows.sum(0)) if len(rows) else float("nan")

    def interval(self, chosen: np.ndarray | None = None) -> tuple[float, float]:
        """Its 95 % bootstrap interval over clips; NaN twice where there are fewer than two."""
        rows = self._rows(chosen)
        return interval(rows, self.of) if len(rows) > 1 else (float("nan"), float("nan"))

    def _rows(self, chosen: np.ndarray | None) -> np.ndarray:
        return self.counts[self.applies if chosen is None else self.applies & chosen]


def score(
    task: Task, true: Sequence[ParsedAnswer], said: Sequence[ParsedAnswer], durations: Sequence[float]
) -> dict[str, float]:
    """The task's scores over a test set, by name, and of answers with a grammar ``malformed``, those with faults in %.

    Recordings in which nobody speaks do not count among the words: ``invented`` is the share of them, in %, that were
    answered with words all the same. durations: of the recordings, in seconds.
    """
    wanted = (*SCORES[task.metric], "malformed")
    values = {m.metric: m.value() for m in measures(task, true, said, durations) if m.metric in wanted}
    return {name: values[name] for name in wanted if name in values and not np.isnan(values[name])}


def measures(
    task: Task, true: Sequence[ParsedAnswer], said: Sequence[ParsedAnswer], durations: Sequence[float]
) -> list[Measure]:
    """All scores of a task, those of ``SCORES`` and more; see `score`. Those that no clip tells about are left out."""
    pairs = list(zip(true, said, strict=True))
    if task.metric in ("wer", "bleu"):
        found = _word_measures(task, pairs)
    elif task.metric == "accuracy":
        found = _label_measures(pairs)
    elif task.metric == "slots":
        found = _slot_measures(pairs)
    elif task.metric == "activity":
        seconds = np.array([_overlap(pair) for pair in pairs])
        found = [Measure("f1", seconds, _all_if_none, np.ones(len(pairs), dtype=bool), "of seconds; " + NO_COLLAR)]
    else:
        found = _turn_measures(pairs, durations)
    if not isinstance(task, PlainText):
        found.append(_shares("malformed", ((bool(s.faults), 1) for s in said)))
    return [measure for measure in found if measure.applies.any()]


def confusion(true: Sequence[ParsedAnswer], said: Sequence[ParsedAnswer]) -> Confusion:
    """Of labels: how often each was answered with each. What is no label counts as ``NONE``, the last one."""
    counts = Counter((t.label or NONE, s.label or NONE) for t, s in zip(true, said, strict=True))
    labels = sorted({label for pair in counts for label in pair}, key=lambda label: (label == NONE, label))
    return Confusion(tuple(labels), tuple(tuple(counts[row, column] for column in labels) for row in labels))


Pairs = Sequence[tuple[ParsedAnswer, ParsedAnswer]]  # right answers and those that were given


def _percent(sums: np.ndarray) -> float:
    return 100 * ratio(sums)


def _shares(metric: str, counts: Iterable[tuple[float, float]], note: str = "") -> Measure:
    """Of (part, whole) of each clip, in percent."""
    table = np.array([(float(part), float(whole)) for part, whole in counts])
    return Measure(metric, table, _percent, np.ones(len(table), dtype=bool), note)


def _word_measures(task: Task, pairs: Pairs) -> list[Measure]:
    texts = [(words(t, task), words(s, task)) for t, s in pairs]
    spoken = np.array([bool(t) for t, _ in texts])
    found = []
    if spoken.any():
        chosen = [pair for pair in texts if pair[0]]
        references, answers = [t for t, _ in chosen], [s for _, s in chosen]

        def measure(metric: str, counts: np.ndarray, of: Score, note: str) -> Measure:
            table = np.zeros((len(texts), counts.shape[1]), dtype=counts.dtype)
            table[spoken] = counts
            return Measure(metric, table, of, spoken, note)

        if task.metric == "wer":
            found.append(measure("wer", word_counts(references, answers), _percent, NORMALISER))
            found.append(measure("cer", character_counts(references, answers), _percent, NORMALISER))
        else:
            for name in ("bleu", "chrf"):
                texts_of = text_counts(name, references, answers)
                found.append(measure(name, texts_of.counts, texts_of.score, f"sacrebleu {texts_of.signature}"))
    silent = np.array([(bool(s) and not t, not t) for t, s in texts], dtype=float)
    return [*found, Measure("invented", silent, _percent, ~spoken)]


def _label_measures(pairs: Pairs) -> list[Measure]:
    """Unweighted average recall over the labels that occur, and accuracy."""
    labels = sorted({t.label or NONE for t, _ in pairs})
    here = np.array([[(t.label or NONE) == label for label in labels] for t, _ in pairs], dtype=float)
    right = np.array([t.label == s.label for t, s in pairs], dtype=float)
    both = np.concatenate([here * right[:, None], here], axis=1)  # [clips, 2 * labels]
    every = np.ones(len(pairs), dtype=bool)
    note = "mean recall of the labels that occur, of groups that have them all"
    return [
        Measure("uar", both, _recall, every, note, here > 0),
        _shares("accuracy", ((value, 1) for value in right)),
    ]


def _recall(sums: np.ndarray) -> float:
    right, count = np.split(sums, 2)
    return float(100 * (right[count > 0] / count[count > 0]).mean()) if count.any() else float("nan")


def _slot_measures(pairs: Pairs) -> list[Measure]:
    """Slots are right when name and value (case and punctuation aside) are."""
    triples = [(t.label == s.label, _slots(t), _slots(s)) for t, s in pairs]
    f1 = np.array([(2.0 * len(true & said), len(true) + len(said)) for _, true, said in triples])
    return [
        Measure("slot_f1", f1, _all_if_none, np.ones(len(pairs), dtype=bool), "slot values: " + NORMALISER),
        _shares("intent_accuracy", ((right, 1) for right, _, _ in triples)),
        _shares("all_slots", ((right and true == said, 1) for right, true, said in triples), "of clips"),
    ]


def _all_if_none(sums: np.ndarray) -> float:
    return _percent(sums) if sums[1] else 100.0


def _slots(answer: ParsedAnswer) -> set[tuple[str, str]]:
    return {(name, normalize_text(value)) for name, value in answer.slots.items()}


def _overlap(pair: tuple[ParsedAnswer, ParsedAnswer]) -> tuple[float, float]:
    """Twice the seconds in which both say that somebody speaks, and those of each together."""
    true, said = (_timeline(answer.segments) for answer in pair)
    return 2 * sum(stretch.duration for stretch in true.crop(said)), true.duration() + said.duration()


def _turn_measures(pairs: Pairs, durations: Sequence[float]) -> list[Measure]:
    """Diarization error rate and, where there are words, cpWER (Watanabe et al. 2020)."""
    rate = DiarizationErrorRate(collar=0.0, skip_overlap=False)
    turns, spoken = [], []
    for (t, s), duration in zip(pairs, durations, strict=True):
        whole = Timeline([Stretch(0, duration)])
        parts = rate.compute_components(_annotation(t.segments), _annotation(s.segments), uem=whole)
        turns.append((sum(parts[name] for name in ("false alarm", "missed detection", "confusion")), parts["total"]))
        if any(segment.text for segment in t.segments):
            counts = cp_word_error_rate(_words(t.segments), _words(s.segments))
            spoken.append((counts.errors, counts.length, True))
        else:
            spoken.append((0, 0, False))
    table = np.array(spoken)
    return [_shares("der", turns, NO_COLLAR), Measure("cpwer", table[:, :2], _percent, table[:, 2] > 0, NORMALISER)]


def words(answer: ParsedAnswer, task: Task) -> str:
    """The words of an answer without its marks."""
    return " ".join(segment.text for segment in answer.segments) if task.marks else answer.text


def _timeline(segments: Sequence[Segment]) -> Timeline:
    return Timeline([Stretch(s.start, s.end) for s in segments]).support()


def _annotation(segments: Sequence[Segment]) -> Annotation:
    annotation = Annotation()
    for number, segment in enumerate(segments):
        annotation[Stretch(segment.start, segment.end), number] = segment.speaker
    return annotation


def _words(segments: Sequence[Segment]) -> dict[str, str]:
    """Speaker -> all words, normalised."""
    words: dict[str, str] = {}
    for segment in segments:
        words[str(segment.speaker)] = f"{words.get(str(segment.speaker), '')} {normalize_text(segment.text)}".strip()
    return words or {"nobody": ""}
