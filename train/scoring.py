"""How good answers are: each task's own metrics, from answers as they are written and read back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from meeteval.wer.wer.cp import cp_word_error_rate
from pyannote.core import Annotation, Timeline
from pyannote.core import Segment as Stretch
from pyannote.metrics.diarization import DiarizationErrorRate

from speechllm.metrics import bleu, normalize_text, wer
from speechllm.tasks import ParsedAnswer, Segment, Task
from speechllm.tasks.words import PlainText

# metric of a task -> names of its scores, the first is the one that counts. Percent but BLEU, which is 0-100 too
SCORES = {
    "wer": ("wer", "invented"),
    "bleu": ("bleu", "invented"),
    "accuracy": ("uar", "accuracy"),
    "turns": ("der", "cpwer"),
    "activity": ("f1",),
    "slots": ("slot_f1", "intent_accuracy"),
}
LOWER_IS_BETTER = frozenset({"wer", "der", "cpwer", "invented", "malformed"})


def score(
    task: Task, true: Sequence[ParsedAnswer], said: Sequence[ParsedAnswer], durations: Sequence[float]
) -> dict[str, float]:
    """The task's scores over a test set, by name, and of answers with a grammar ``malformed``, those with faults in %.

    Recordings in which nobody speaks do not count among the words: ``invented`` is the share of them, in %, that were
    answered with words all the same. durations: of the recordings, in seconds.
    """
    if task.metric in ("wer", "bleu"):
        spoken, silent = by_speech(true, said, task)
        scores = {"invented": 100 * sum(map(bool, silent)) / len(silent)} if silent else {}
        if spoken[0]:
            scores[task.metric] = 100 * wer(*spoken) if task.metric == "wer" else bleu(*spoken)[0]
    elif task.metric == "accuracy":
        scores = label_scores([a.label for a in true], [a.label for a in said])
    elif task.metric == "slots":
        scores = slot_scores(true, said)
    elif task.metric == "activity":
        scores = {"f1": 100 * activity_f1([a.segments for a in true], [a.segments for a in said])}
    else:
        scores = turn_scores(true, said, durations)
    if isinstance(task, PlainText):
        return scores
    return scores | {"malformed": 100 * sum(bool(answer.faults) for answer in said) / len(said)}


def by_speech(
    true: Sequence[ParsedAnswer], said: Sequence[ParsedAnswer], task: Task
) -> tuple[tuple[list[str], list[str]], list[str]]:
    """References and answers where somebody speaks, and the answers where nobody does."""
    pairs = [(words(t, task), words(s, task)) for t, s in zip(true, said, strict=True)]
    spoken = [pair for pair in pairs if pair[0]]
    return ([t for t, _ in spoken], [s for _, s in spoken]), [s for t, s in pairs if not t]


def words(answer: ParsedAnswer, task: Task) -> str:
    """The words of an answer without its marks."""
    return " ".join(segment.text for segment in answer.segments) if task.marks else answer.text


def label_scores(true: Sequence[str | None], said: Sequence[str | None]) -> dict[str, float]:
    """Unweighted average recall over the labels that occur, and accuracy, in percent."""
    counts, right = Counter(true), Counter(t for t, s in zip(true, said, strict=True) if t == s)
    recalls = [right[label] / count for label, count in counts.items()]
    return {"uar": 100 * sum(recalls) / len(recalls), "accuracy": 100 * right.total() / len(true)}


def slot_scores(true: Sequence[ParsedAnswer], said: Sequence[ParsedAnswer]) -> dict[str, float]:
    """F1 of slots, right when name and value (case and punctuation aside) are, and accuracy of intents, in percent."""

    def pairs(answer: ParsedAnswer) -> set[tuple[str, str]]:
        return {(name, normalize_text(value)) for name, value in answer.slots.items()}

    found = sum(len(pairs(t) & pairs(s)) for t, s in zip(true, said, strict=True))
    both = sum(len(t.slots) + len(s.slots) for t, s in zip(true, said, strict=True))
    intents = sum(t.label == s.label for t, s in zip(true, said, strict=True))
    return {"slot_f1": 100 * 2 * found / both if both else 100.0, "intent_accuracy": 100 * intents / len(true)}


def activity_f1(true: Sequence[Sequence[Segment]], said: Sequence[Sequence[Segment]]) -> float:
    """F1 over the seconds in which somebody speaks, a fraction."""
    both = total = 0.0
    for own, other in zip(map(_timeline, true), map(_timeline, said), strict=True):
        both += sum(stretch.duration for stretch in own.crop(other))
        total += own.duration() + other.duration()
    return 2 * both / total if total else 1.0


def turn_scores(
    true: Sequence[ParsedAnswer], said: Sequence[ParsedAnswer], durations: Sequence[float]
) -> dict[str, float]:
    """Diarization error rate (no collar, overlap counted) and, where there are words, cpWER (Watanabe et al. 2020)."""
    rate = DiarizationErrorRate(collar=0.0, skip_overlap=False)
    errors = length = 0
    for t, s, duration in zip(true, said, durations, strict=True):
        rate(_annotation(t.segments), _annotation(s.segments), uem=Timeline([Stretch(0, duration)]))
        if any(segment.text for segment in t.segments):
            words = cp_word_error_rate(_words(t.segments), _words(s.segments))
            errors, length = errors + words.errors, length + words.length
    return {"der": 100 * abs(rate)} | ({"cpwer": 100 * errors / length} if length else {})


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
