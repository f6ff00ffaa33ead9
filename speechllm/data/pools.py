"""What each recording can teach: recordings by task and corpus, and which of them have something in common."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random

import numpy as np
from datasets import Dataset, Features, Value
from datasets import Sequence as Values
from datasets.fingerprint import Hasher

import speechllm
from speechllm.data.encoded import is_varied, row_codes, row_facts
from speechllm.data.episodes import EXCERPT, Kin
from speechllm.errors import InputError
from speechllm.tasks import TRAINABLE, Facts, FewShot, FewShotLabel, Parts, Speaker, Time
from speechllm.vocabulary import Vocabulary

CHARACTERS_PER_PIECE = 3.7  # of text, about
AROUND = 4  # control ids of a sequence
LABELLED = 14  # ids of a shot with a label beside its audio, about


@dataclass(frozen=True, eq=False)
class Pool:
    """The recordings of one corpus that have an answer for one task, shortest first."""

    rows: np.ndarray  # int64 [recordings]
    lengths: np.ndarray  # float [recordings]: ids of their sequences, about
    # float [recordings]: ids of question and answer alone, which is what a further question about the audio adds; inf
    # where it cannot be asked so
    further: np.ndarray


Pools = Mapping[str, Mapping[str, Pool]]  # task -> corpus -> recordings


def find_pools(
    rows: Dataset,
    sizes: Mapping[str, int],
    tasks: Sequence[str],
    vocabulary: Vocabulary,
    max_seconds: float,
    task_corpora: Mapping[str, Collection[str]],
) -> tuple[Pools, dict[str, Kin]]:
    """Pools, and for tasks with shots which recordings have something in common.

    sizes: corpus -> how many of the ``rows`` are its own, in their order. Recordings of more than ``max_seconds`` are
    left out. task_corpora: task -> the corpora whose recordings teach it, and are its shots; all unless given.
    """
    told = rows.map(
        describe,
        fn_kwargs={"tasks": list(tasks), "vocabulary": vocabulary, "max_seconds": max_seconds},
        remove_columns=rows.column_names,
        features=Features(
            {
                "tasks": Values(Value("int64")),
                "lengths": Values(Value("float64")),
                "further": Values(Value("float64")),
                "keys": Values(Values(Value("string"))),
            }
        ),
        # kept in the cache of datasets, which by itself would not notice that a task is another
        new_fingerprint=Hasher.hash(
            [rows._fingerprint, [TRAINABLE[t] for t in tasks], vocabulary.to_dict(), max_seconds, _source()]
        ),
        desc="tasks of each recording",
    )
    columns = {name: told.data.column(name).combine_chunks() for name in told.column_names}  # each of lists
    row_of = np.repeat(np.arange(len(told)), columns["tasks"].value_lengths().to_numpy())
    able = {name: columns[name].flatten().to_numpy() for name in ("tasks", "lengths", "further")}
    corpora, ends = np.array([*sizes]), np.cumsum([*sizes.values()])
    pools: dict[str, dict[str, Pool]] = {}
    kin: dict[str, Kin] = {}
    for place, name in enumerate(tasks):
        task, here = TRAINABLE[name], np.flatnonzero(able["tasks"] == place)
        corpus_of = corpora[np.searchsorted(ends, row_of[here], "right")]
        if name in task_corpora:
            own_corpora = np.isin(corpus_of, list(task_corpora[name]))
            here, corpus_of = here[own_corpora], corpus_of[own_corpora]
        rows_here, lengths, further = row_of[here], able["lengths"][here], able["further"][here]
        if isinstance(task, FewShot):
            keys_of = columns["keys"].flatten().take(here).to_pylist()
            own = kin[name] = Kin(task, rows_here.tolist(), corpus_of.tolist(), keys_of, lengths.tolist())
            asked = np.array([row in own.own for row in rows_here.tolist()], dtype=bool)
            rows_here, lengths, further = rows_here[asked], lengths[asked], further[asked]
            lengths = lengths * np.array([1 + own.shots(row) for row in rows_here.tolist()], dtype=np.int64)
        cuts = np.searchsorted(rows_here, ends[:-1])
        split = zip(*(np.split(column, cuts) for column in (rows_here, lengths, further)), strict=True)
        for corpus, (places, sized, more) in zip(sizes, split, strict=True):
            if len(places):
                order = np.argsort(sized, kind="stable")
                pools.setdefault(name, {})[corpus] = Pool(places[order], sized[order], more[order])
    return pools, kin


def describe(row: dict, tasks: Sequence[str], vocabulary: Vocabulary, max_seconds: float) -> dict:
    """What planning needs of a row: ``tasks`` it can teach (by place), ids of their sequences, about (of a turn, for
    those with shots), and of a ``further`` question alone; and ``keys``: for tasks with shots what it may share with
    other rows.
    """
    facts = row_facts(row)
    told: dict[str, list] = {"tasks": [], "lengths": [], "further": [], "keys": []}
    if facts.duration > max_seconds:
        return told
    heard = len(vocabulary.audio_ids(row_codes(row, vocabulary.n_q)))
    for place, task in enumerate(TRAINABLE[name] for name in tasks):
        keys: list[str] = []
        further = float("inf")
        if isinstance(task, FewShot):
            keys = sorted(filter(None, task.keys(facts, None if is_varied(row) else row["speaker"])))
            if not facts.duration or (is_varied(row) and not isinstance(task, FewShotLabel)):
                keys = []  # no clip; or its words would be those of another shot
            length = turn_size(task, facts, heard * task.listens) if keys else None
        else:
            asked = task.pose(facts, Random(0))
            length = size(*asked) + heard * task.listens if asked and writable(asked[1], vocabulary) else None
            further = length - heard if length and task.listens else further
        if length is not None:
            for name, value in (("tasks", place), ("lengths", length), ("further", further), ("keys", keys)):
                told[name].append(value)
    return told


def turn_size(task: FewShot, facts: Facts, heard: int) -> float:
    """Ids of a recording of ``heard`` ids as part of an episode, about."""
    if not isinstance(task, FewShotLabel):
        return heard + size(task.wordings[0], (facts.text or "",))
    return heard * (1.0 if task.whole else min(1.0, sum(EXCERPT) / 2 / facts.duration)) + LABELLED


def size(instruction: str, answer: Parts) -> float:
    """Ids of a question and its answer, about."""
    characters = len(instruction) + sum(len(part) for part in answer if isinstance(part, str))
    return AROUND + characters / CHARACTERS_PER_PIECE + sum(not isinstance(part, str) for part in answer)


def writable(answer: Parts, vocabulary: Vocabulary) -> bool:
    """Whether there is a mark for each time and speaker of an answer, and no segment ends by the mark it begins by."""
    try:
        times = [vocabulary.time(part.seconds) for part in answer if isinstance(part, Time)]
        for part in answer:
            if isinstance(part, Speaker):
                vocabulary.speaker(part.number)
    except InputError:
        return False
    return all(start < end for start, end in zip(times[::2], times[1::2], strict=True))


@cache
def _source() -> str:
    """A hash of the package's code."""
    return Hasher.hash([path.read_bytes() for path in sorted(Path(speechllm.__file__).parent.rglob("*.py"))])
