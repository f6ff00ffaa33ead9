"""What ``train.evaluate_icl`` asks: its rows, their questions with shots, and the controls.

Everything is drawn from a seed and the name of a row: a question has the same shots each time, and the fewer shots it
is asked with are the first of the more.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from random import Random

from speechllm.data.episodes import MAX_SHOTS
from speechllm.data.label_names import HELD_OUT_NAMES, listed
from speechllm.errors import InputError
from speechllm.tasks import FEW_SHOT
from speechllm.tasks.few_shot import HOT_WORD_RECORDINGS, LABEL_HELD_OUT
from speechllm.tasks.wordings import TRANSCRIBE
from train.icl_answers import Listener, Shot
from train.icl_clips import (
    SINGLE_WORDS,
    Classes,
    Clip,
    MakeClasses,
    Sets,
    apart,
    grouped,
    in_noise,
    new_words,
    pairs,
    sharing,
)

SHOTS = (0, 1, 2, 4, MAX_SHOTS // 2)  # of each of two classes, as many as there are in training
CONTROLLED = 4  # shots of each class that controls are asked with, at most
TRANSCRIPTS = (0, 1, 2, 4)  # shots, of transcripts
WORD_SHOTS = 2  # of which one holds the rare word
# English sets in whose train splits rare words are rare
TRAIN_TEXTS = ("captions_en", "words", "snips", "slurp", "orders", "read_en_ljtext")
WHICH_WORD = "Which word was said, {}?"
SAME_SPEAKER = "Do both parts of this clip come from the same speaker?"
PARTS = {"A": "held-out label names", "B": "held-out label sets", "C": "held-out tasks", "D": "transcription"}


@dataclass(frozen=True)
class LabelRow:
    """Questions that are answered with one of two labels.

    sets: whose recordings are heard. needs: other sets that are read. wording: ``{}`` stands for the labels. labels:
    two of them are drawn for each question; the classes' own names unless given.
    """

    name: str
    part: str
    sets: tuple[str, ...]
    classes: MakeClasses
    wording: str = LABEL_HELD_OUT[0]
    labels: tuple[str, ...] = HELD_OUT_NAMES
    needs: tuple[str, ...] = ()


@dataclass(frozen=True)
class WordRow:
    """Recordings of a set that are transcribed. rare: it counts whether words that are rare in training are found."""

    name: str
    sets: tuple[str, ...]
    rare: bool = False
    needs: tuple[str, ...] = ()
    part: str = "D"


def _attribute(attribute: str, *sets: str, name: str = "") -> LabelRow:
    return LabelRow(f"{attribute}/{name or sets[0]}", "A", sets, sharing(attribute, *sets))


def _same_speaker(name: str) -> tuple[LabelRow, LabelRow]:
    row = LabelRow(f"same-speaker/{name}", "C", (name,), pairs(name), SAME_SPEAKER, ())
    return row, replace(row, name=f"{row.name}/names", wording=LABEL_HELD_OUT[0], labels=HELD_OUT_NAMES)


ROWS: dict[str, LabelRow | WordRow] = {
    row.name: row
    for row in (
        _attribute("word", "digits_fsdd"),
        _attribute("word", "commands_sc_en"),
        _attribute("gender", "alnum_en"),  # other test splits have one man and one woman
        _attribute("speaker", "emodb_de"),
        _attribute("speaker", "commands_sc_en"),
        _attribute("speaker", "alnum_en"),
        _attribute("language", "test_en", "test_de", "test_fr", "nemo_pl", name="four"),
        _attribute("emotion", "nemo_pl"),
        _attribute("accent", "test_accents"),
        _attribute("intent", "test_snips"),
        _attribute("speech", "test_en", "test_nonspeech", name="test_nonspeech"),
        LabelRow("word/test_words", "B", ("test_words",), new_words("test_words"), needs=SINGLE_WORDS),
        LabelRow(
            *("which-word/test_words", "C", ("test_words",), new_words("test_words"), WHICH_WORD, ()),
            needs=SINGLE_WORDS,
        ),
        LabelRow("which-word/digits_fsdd", "C", ("digits_fsdd",), sharing("word", "digits_fsdd"), WHICH_WORD, ()),
        *_same_speaker("commands_sc_en"),
        *_same_speaker("alnum_en"),
        *_same_speaker("emodb_de"),
        LabelRow("noisy/test_en", "C", ("test_en",), in_noise("test_en")),
        WordRow("transcribe/test_en", ("test_en",)),
        WordRow("rare-words/test_en", ("test_en",), True, TRAIN_TEXTS),
        WordRow("rare-words/test_snips", ("test_snips",), True, TRAIN_TEXTS),
    )
}


@dataclass(frozen=True)
class Episode:
    """One question, and shots that were asked the same.

    labels: among which the answer is; none where it is words. others: of each label, the clips without a recording in
    common with that asked about. word: the rare word of the transcript that counts.
    """

    clip: Clip
    instruction: str
    answer: str
    shots: tuple[Shot, ...]
    labels: tuple[str, ...] = ()
    others: tuple[tuple[Clip, ...], ...] = ()
    word: str = ""

    @property
    def clips(self) -> list[Clip]:
        """That are heard."""
        return [self.clip, *(shot.clip for shot in self.shots if shot.clip)]

    def first(self, count: int) -> Episode:
        """With its first ``count`` shots."""
        return replace(self, shots=self.shots[:count])


Asked = dict[tuple[str, int], list[Episode]]  # condition and number of shots -> the questions


def short_enough(row: LabelRow, classes: Classes, most: int, listener: Listener) -> tuple[Classes, int]:
    """The clips that leave room for ``most`` shots of each of two classes, and how many they are without.

    Raises InputError where no two classes of two clips are left.
    """
    longest = sorted(row.labels or classes, key=lambda label: listener.answer_ids([label]))[-2:]
    room = (listener.positions - listener.answer_ids(longest)) / (2 * most + 1)
    wording = row.wording.replace("{}", listed(longest))
    fitting = {
        key: [clip for clip in clips if listener.turn_ids(clip.seconds, wording, longest[-1]) <= room]
        for key, clips in classes.items()
    }
    kept = {key: clips for key, clips in fitting.items() if len(clips) > 1}
    if len(kept) < 2:
        raise InputError(
            f"{row.name}: there are no two classes of clips so short that {most} shots of each fit the model's "
            f"{listener.positions} positions: ask for fewer --shots, or leave the row out with --only"
        )
    names = [{clip.key for clips in some.values() for clip in clips} for some in (classes, kept)]
    return kept, len(names[0] - names[1])


def episodes(row: LabelRow, classes: Classes, count: int, most: int, seed: int) -> list[Episode]:
    """``count`` questions, each about a clip of one of two classes, with ``most`` shots of either.

    Shots come in rounds of one of each class, in any order. Where a class has fewer clips they come again. Whoever is
    heard in what is asked about is heard in no shot of a class that has others, so that the voice does not tell the
    class. Raises InputError where a class has none but those asked about.
    """
    rng = Random(f"{seed} {row.name}")
    decks = {key: rng.sample(clips, len(clips)) for key, clips in classes.items()}
    asked = dict.fromkeys(classes, 0)
    found = []
    for number in range(count):
        rng = Random(f"{seed} {row.name} {number}")
        keys = rng.sample(sorted(classes), 2)
        names = rng.sample(row.labels, 2) if row.labels else keys
        clip = decks[keys[0]][asked[keys[0]] % len(decks[keys[0]])]
        asked[keys[0]] += 1
        others = tuple(_by_others(apart(classes[key], clip), clip) for key in keys)
        if not all(others):
            raise InputError(f"{row.name}: no other recording to compare {clip.key} with; leave it out with --only")
        instruction = row.wording.replace("{}", listed(rng.sample(names, 2)))
        orders = [rng.sample(clips, len(clips)) for clips in others]
        shots = []
        for turn in range(most):
            for side in rng.sample(range(2), 2):
                shots.append(Shot(orders[side][turn % len(orders[side])], names[side]))
        found.append(Episode(clip, instruction, names[0], tuple(shots), tuple(names), others))
    return found


def _by_others(clips: tuple[Clip, ...], clip: Clip) -> tuple[Clip, ...]:
    """Those by another speaker than that of ``clip``; all where there are none."""
    return tuple(other for other in clips if other.speaker != clip.speaker) or clips


def shuffled_labels(episode: Episode, rng: Random) -> Episode:
    """Each shot has the label of any of them, each label as often as before."""
    answers = [shot.answer for shot in episode.shots]
    rng.shuffle(answers)
    return _with(episode, [Shot(s.clip, answer) for s, answer in zip(episode.shots, answers, strict=True)])


def other_audio(episode: Episode, rng: Random) -> Episode:
    """In each shot a clip of either class is heard, whatever its label."""
    return _with(episode, [Shot(rng.choice(rng.choice(episode.others)), shot.answer) for shot in episode.shots])


def no_audio(episode: Episode, rng: Random) -> Episode:
    """Nothing is heard in the shots."""
    return _with(episode, [Shot(None, shot.answer) for shot in episode.shots])


CONTROLS: Mapping[str, Callable[[Episode, Random], Episode]] = {
    "shuffled labels": shuffled_labels,
    "other audio": other_audio,
    "no audio": no_audio,
}


def controlled(row: LabelRow, found: Sequence[Episode], control: str, seed: int) -> list[Episode]:
    """The questions with their shots as in one of ``CONTROLS``."""
    return [
        CONTROLS[control](episode, Random(f"{seed} {row.name} {number} {control}"))
        for number, episode in enumerate(found)
    ]


def transcripts(row: WordRow, sets: Sets, listener: Listener, count: int, seed: int) -> tuple[Asked, int]:
    """Up to ``count`` questions by condition and number of shots, and how many clips are too long for them.

    Raises InputError where there are none.
    """
    (name,) = row.sets
    clips = [Clip((item,)) for item in sets.items(name) if item.utterance.text]
    most = WORD_SHOTS if row.rare else TRANSCRIPTS[-1]
    room = (listener.positions - listener.checkpoint.settings.max_answer_tokens) / (most + 1)
    fitting = [clip for clip in clips if listener.turn_ids(clip.seconds, TRANSCRIBE[0], clip.text) <= room]
    found = _rare(row, sets, fitting, count, seed) if row.rare else _by_speaker(row, fitting, count, seed)
    if not any(found.values()):
        raise InputError(
            f"{row.name}: nothing to ask: no clip that fits the model's {listener.positions} positions with {most} "
            "shots has others to compare it with; leave the row out with --only"
        )
    return found, len(clips) - len(fitting)


def _by_speaker(row: WordRow, clips: Sequence[Clip], count: int, seed: int) -> Asked:
    """Shots of the same speaker, or of others; their words are not those asked about."""
    most = TRANSCRIPTS[-1]
    clips = [clip for clip in clips if clip.speaker]
    found: Asked = {}
    for clip in Random(f"{seed} {row.name}").sample(clips, len(clips)):
        rng = Random(f"{seed} {row.name} {clip.key}")
        new = [other for other in apart(clips, clip) if other.text != clip.text]
        same = [other for other in new if other.speaker == clip.speaker]
        rest = [other for other in new if other.speaker != clip.speaker]
        if min(len(same), len(rest)) < most or len(found.get(("no shots", 0), ())) == count:
            continue
        found.setdefault(("no shots", 0), []).append(_transcript(clip, ()))
        for condition, others in (("same speaker", same), ("another speaker", rest)):
            whole = _transcript(clip, rng.sample(others, most))
            for shots in TRANSCRIPTS[1:]:
                found.setdefault((condition, shots), []).append(whole.first(shots))
    return found


def _rare(row: WordRow, sets: Sets, clips: Sequence[Clip], count: int, seed: int) -> Asked:
    """Shots one of which holds the word, and the same with another in its place."""
    task = FEW_SHOT["few_shot_hot_words"]
    often = dict.fromkeys(grouped(task, (clip.items[0] for clip in clips)), 0)  # word -> recordings to train on
    for item in chain.from_iterable(sets.items(name, "train") for name in row.needs):
        for word in task.keys(item.utterance.facts(), None):
            if word in often:
                often[word] += 1
    words = {clip.key: {*filter(None, task.keys(clip.items[0].utterance.facts(), None))} for clip in clips}
    asked = [(clip, word) for clip in clips for word in sorted(words[clip.key]) if word in often]
    asked = [(clip, word) for clip, word in asked if often[word] <= HOT_WORD_RECORDINGS]
    found: Asked = {}
    for clip, word in Random(f"{seed} {row.name}").sample(asked, len(asked)):
        rng = Random(f"{seed} {row.name} {clip.key} {word}")
        new = [other for other in apart(clips, clip) if other.text != clip.text]
        holding = [other for other in new if word in words[other.key]]
        rest = [other for other in new if word not in words[other.key]]
        if not holding or len(rest) < WORD_SHOTS or len(found.get(("no shots", 0), ())) == count:
            continue
        place, others = rng.randrange(WORD_SHOTS), rng.sample(rest, WORD_SHOTS)
        with_word = [*others[:place], rng.choice(holding), *others[place + 1 :]]
        for condition, shots in (("no shots", ()), ("with the word", with_word), ("without the word", others)):
            episode = replace(_transcript(clip, shots), word=word)
            found.setdefault((condition, len(shots)), []).append(episode)
    return found


def _transcript(clip: Clip, shots: Sequence[Clip]) -> Episode:
    return Episode(clip, TRANSCRIBE[0], clip.text, tuple(Shot(other, other.text) for other in shots))


def _with(episode: Episode, shots: Sequence[Shot]) -> Episode:
    return replace(episode, shots=tuple(shots))
