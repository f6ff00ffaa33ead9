"""Episodes: which recordings are the shots of a question, and what is asked and answered in each of them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import cycle, repeat
from random import Random

from torch import Tensor

from speechllm.data.label_names import listed, names
from speechllm.tasks import Facts, FewShot, FewShotLabel, Parts

MAX_SHOTS = 16
MAX_TRANSCRIPTS = 3  # shots of transcripts, which are long
ROOM = 1200  # ids of an episode, about: long recordings have fewer shots
CLASSES = (2, 2, 2, 3, 4)  # how many labels an episode has, each number as likely
AGAIN = 0.3  # share of the episodes in which one of the shots is the recording asked about, heard another time
NAMED = 0.5  # share of the turns whose instruction is the class itself: found by reading, before it is by hearing
EXCERPT = (0.6, 1.6)  # seconds that are heard of a longer clip, where all of it is not needed


@dataclass(frozen=True)
class Turn:
    """A recording, by its row, what is asked about it and the answer.

    learnt: whether the answer is trained on; it is not where nothing before it tells it. whole: else an excerpt is
    heard.
    """

    row: int
    instruction: str
    answer: Parts
    learnt: bool = True
    whole: bool = True


class Kin:
    """Which recordings have something in common, for one kind of episodes.

    groups: group (a corpus, or "" for all) -> what they share -> rows, two or more. own: row -> its group and what it
    shares with others; a row of which nothing can be asked is not there. ids: row -> ids of its turn, about.
    """

    def __init__(
        self,
        task: FewShot,
        rows: Sequence[int],
        corpora: Sequence[str],
        keys: Sequence[Sequence[str]],
        ids: Sequence[float],
    ):
        """corpora, keys, ids: of each of the rows."""
        self.task = task
        self.ids = dict(zip(rows, ids, strict=True))
        self.groups: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
        for row, corpus, shared in zip(rows, corpora, keys, strict=True):
            for key in shared:
                self.groups["" if task.across else corpus][key].append(row)
        self.own: dict[int, tuple[str, list[str]]] = {}
        for group, classes in self.groups.items():
            classes = {key: found for key, found in classes.items() if 2 <= len(found) <= task.most}
            self.groups[group] = classes
            if isinstance(task, FewShotLabel) and len(classes) < 2:  # one label tells nothing
                continue
            for key, found in classes.items():
                for row in found:
                    self.own.setdefault(row, (group, []))[1].append(key)

    def shots(self, row: int) -> int:
        """How many it has before it, about; known beforehand, so that sequences of like length meet."""
        most = MAX_SHOTS if isinstance(self.task, FewShotLabel) else MAX_TRANSCRIPTS
        drawn = 1 + (row * 2654435761 % 2**32 * most >> 32)  # multiplicative hashing (Knuth)
        return max(1, min(drawn, int(ROOM / self.ids[row]) - 1))

    def relatives(self, row: int, keys: Iterable[str], rng: Random) -> list[tuple[str, int]]:
        """Other recordings of the row's group that have the keys, one for each: as many as there is room for, and one
        at least.
        """
        found: list[tuple[str, int]] = []
        room = ROOM - self.ids[row]
        for key, _ in zip(keys, range(self.shots(row)), strict=False):
            other = self.relative(row, key, rng)
            room -= self.ids[other]
            if found and room < 0:
                break
            found.append((key, other))
        return found

    def relative(self, row: int, key: str, rng: Random) -> int:
        """Another recording of the row's group that has ``key``."""
        others = self.groups[self.own[row][0]][key]
        while (chosen := rng.choice(others)) == row:
            pass  # there are two at least
        return chosen


def label_turns(
    kin: Kin, row: int, words: Sequence[str], rng: Random, wordings: Sequence[str], named: float = 0.0
) -> list[Turn]:
    """Shots of classes that take turns, in any order, and last the recording of ``row``, whose class is among them.

    words: that labels may be called by. named: share of the turns whose instruction is the class, which is all of them
    where nothing is heard.
    """
    group, (own, *_) = kin.own[row]
    rest = [key for key in kin.groups[group] if key != own]
    classes = [own, *rng.sample(rest, min(rng.choice(CLASSES) - 1, len(rest)))]
    labels = dict(zip(classes, names(len(classes), words, rng), strict=True))
    instruction = rng.choice(wordings).replace("{}", listed(rng.sample([*labels.values()], len(labels))))
    shots = kin.relatives(row, cycle(classes), rng)
    # each class as often, so that the most frequent label is not the answer; of too few shots none has two
    shots = shots[: len(shots) // len(classes) * len(classes)] or shots
    if rng.random() < AGAIN:
        shots[0] = (own, row)
    rng.shuffle(shots)
    turns, told = [], set()
    for key, recording in (*shots, (own, row)):
        asked = key if not kin.task.listens or rng.random() < named else instruction
        turns.append(Turn(recording, asked, (labels[key],), key in told, kin.task.whole))
        told.add(key)
    return turns


def transcript_turns(
    kin: Kin, row: int, facts: Callable[[int], Facts], rng: Random, wordings: Sequence[str]
) -> list[Turn]:
    """Related recordings and their transcripts, and last those of ``row``."""
    key, instruction = rng.choice(kin.own[row][1]), rng.choice(wordings)
    shots = dict.fromkeys(other for _, other in kin.relatives(row, repeat(key), rng))
    turns = []
    for recording in (*shots, row):
        answer = kin.task.write(facts(recording))
        assert answer is not None
        turns.append(Turn(recording, instruction, answer))
    return turns


def excerpt(codes: Tensor, seconds: float, rng: Random) -> Tensor:
    """A stretch of ``EXCERPT`` seconds of a clip's codes ``[n_q, frames]``, anywhere in it; all of a shorter clip."""
    frames = codes.shape[1]
    length = min(frames, round(rng.uniform(*EXCERPT) * frames / seconds))
    start = rng.randint(0, frames - length)
    return codes[:, start : start + length]
