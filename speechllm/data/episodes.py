"""Episodes: which recordings are the shots of a question, and what is asked and answered in each of them."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

from torch import Tensor

from speechllm.data.label_names import listed, names
from speechllm.metrics import normalize_text
from speechllm.tasks import Facts, FewShot, FewShotLabel, Parts

MIN_SHOTS, MAX_SHOTS = 2, 16  # with labels: the label of a single one would be the answer
MAX_TRANSCRIPTS = 3  # shots of transcripts, which are long
ROOM = 1200  # ids of an episode, about: long recordings have fewer shots, and longer ones than a third of it are none
CLASSES = (2, 2, 2, 3, 4)  # how many labels an episode has, each number as likely
AGAIN = 0.3  # share of the episodes in which one of the shots is the recording asked about, heard another time
NAMED = 0.5  # share of the turns whose instruction is the class itself: found by reading, before it is by hearing
TRIES = 4  # recordings looked at for each that must say something new
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

    A recording of which so few fit into ``ROOM`` that there is no episode is left out.

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
            for key in shared if self.ids[row] * (MIN_SHOTS + 1) <= ROOM else ():
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
        fewest, most = (MIN_SHOTS, MAX_SHOTS) if isinstance(self.task, FewShotLabel) else (1, MAX_TRANSCRIPTS)
        drawn = fewest + (row * 2654435761 % 2**32 * (most - fewest + 1) >> 32)  # multiplicative hashing (Knuth)
        group, (key, *_) = self.own[row]
        others = 2 * len(self.groups[group][key]) - 1  # of two classes like its own, of which none is heard twice
        return min(drawn, others, int(ROOM / self.ids[row]) - 1)

    def relatives(
        self, row: int, keys: Sequence[str], rng: Random, fits: Callable[[int], bool] = lambda other: True
    ) -> list[tuple[str, int]]:
        """Other recordings of the row's group that have the keys, one for each and none twice, as many as there is room
        for. A key for which none is left has none; fits: whether one will do, asked of each ``TRIES`` times at most.
        """
        group = self.groups[self.own[row][0]]
        others = {}
        for key, count in Counter(keys).items():
            drawn = rng.sample(group[key], min(TRIES * count + 1, len(group[key])))
            others[key] = (other for other in drawn if other != row and fits(other))
        found: list[tuple[str, int]] = []
        room = ROOM - self.ids[row]
        for key in keys:
            other = next(others[key], None)
            if other is None:
                continue
            room -= self.ids[other]
            if room < 0:
                break
            found.append((key, other))
        return found


def label_turns(
    kin: Kin,
    row: int,
    words: Sequence[str],
    rng: Random,
    wordings: Sequence[str],
    named: float = 0.0,
    again: float = 0.0,
) -> list[Turn]:
    """Shots of a few classes, and last the recording of ``row``, whose class is among them.

    Each shot is of any class, whatever those before it were: neither what comes next nor what is asked is told by
    counting. words: that labels may be called by. named: share of the turns whose instruction is the class, which is
    all of them where nothing is heard. again: share of the episodes in which a shot is the recording of ``row`` itself.
    """
    group, (own, *_) = kin.own[row]
    rest = [key for key in kin.groups[group] if key != own]
    classes = [own, *rng.sample(rest, min(rng.choice(CLASSES) - 1, len(rest)))]
    labels = dict(zip(classes, names(len(classes), words, rng), strict=True))
    instruction = rng.choice(wordings).replace("{}", listed(rng.sample([*labels.values()], len(labels))))
    shots: list[tuple[str, int]] = []
    while all(key != own for key, _ in shots):
        shots = kin.relatives(row, rng.choices(classes, k=kin.shots(row)), rng)
    if rng.random() < again:
        shots[rng.choice([place for place, (key, _) in enumerate(shots) if key == own])] = (own, row)
    turns, told = [], set()
    for key, recording in (*shots, (own, row)):
        asked = key if not kin.task.listens or rng.random() < named else instruction
        turns.append(Turn(recording, asked, (labels[key],), key in told, kin.task.whole))
        told.add(key)
    return turns


def transcript_turns(
    kin: Kin, row: int, facts: Callable[[int], Facts], rng: Random, wordings: Sequence[str]
) -> list[Turn]:
    """Related recordings and their transcripts, no two of which are the same, and last those of ``row``.

    There may be no shots, where all that is related says the same.
    """
    key, instruction = rng.choice(kin.own[row][1]), rng.choice(wordings)
    said = {normalize_text(facts(row).text or "")}

    def says_more(other: int) -> bool:
        known = len(said)
        said.add(normalize_text(facts(other).text or ""))
        return len(said) > known

    shots = kin.relatives(row, [key] * kin.shots(row), rng, says_more)
    turns = []
    for recording in (*(other for _, other in shots), row):
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
