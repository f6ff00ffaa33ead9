"""The recipe of a corpus: what is made, of what, what is encoded and what tests."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, TypeVar, get_args

from pydantic import Field

from speechllm.data.corpus import FILTERED, MANIFEST, read_utterances
from speechllm.data.manifest import Split, Utterance
from speechllm.data.overlap import hold_out_sentences
from speechllm.data.synthesis import Engine
from speechllm.errors import InputError
from train.config import Settings

Spoken = Literal["synthesized", "conversations", "recorded"]
Kind = Spoken | Literal["texts"]
SPOKEN: tuple[Spoken, ...] = get_args(Spoken)
Share = Annotated[float, Field(gt=0, lt=1)]
Copies = Annotated[int, Field(ge=1)]


@dataclass(frozen=True)
class Corpus:
    """One corpus of a recipe. ``path`` is its manifest or the folder of that, ``codes`` where these are.

    The train split of an ``encoded`` one is trained on, the test split of one that ``tests`` is what tests.
    """

    name: str
    kind: Kind
    path: Path
    codes: Path
    encoded: bool
    tests: bool

    def by_split(self) -> dict[str, list[Utterance]]:
        """Its utterances; InputError when the manifest is missing or damaged."""
        splits: dict[str, list[Utterance]] = {split: [] for split in get_args(Split)}
        for utterance in read_utterances(self.path):
            splits[utterance.split].append(utterance)
        return splits

    def sizes(self) -> dict[str, int]:
        """Bytes of the audio made for it (none for a recorded set), and of its codes."""
        audio = self.path.parent.glob("audio/*/*.flac") if self.kind != "recorded" else ()
        files = {"audio_bytes": audio, "codes_bytes": self.codes.glob("*.parquet")}
        return {name: sum(path.stat().st_size for path in paths) for name, paths in files.items()}


class Synthesis(Settings):
    """Options of ``train.synthesize``; a file of sentences is below the recipe's ``source``."""

    text: str
    count: int = Field(ge=1)
    language: str = "en"
    split: Split = "train"
    fragments: float = Field(0.0, ge=0, le=1)
    words: int = Field(0, ge=0)
    seed: int = Field(1, ge=0)
    engines: tuple[Engine, ...] = ()


class Conversations(Settings):
    """Options of ``train.converse``."""

    of: list[str] = Field(min_length=1)
    count: int = Field(ge=1)
    split: Split = "train"
    seed: int = Field(1, ge=0)
    max_seconds: float = Field(12.0, ge=4)


class Texts(Settings):
    """Sentences of a file below the recipe's ``source`` that train as they are, with their translations."""

    text: str
    language: str = "en"
    split: Split = "train"


AnyMade = TypeVar("AnyMade", Synthesis, Conversations)


class Recipe(Settings):
    """The YAML file. A corpus is called by its name: that of a recorded set, or of one made by the recipe.

    A recorded set is the manifest that ``recorded`` gives for its name, else the folder of that name in ``source``.
    """

    out: Path
    source: Path
    codec: Path = Path("tokenizers/codec")
    n_q: int = Field(1, ge=1)
    jobs: int = Field(2, ge=1)
    noise: str | None = Field(None, description="recorded set that is mixed into train utterances")
    recorded: dict[str, Path] = Field(default_factory=dict, description="name: a manifest, or the folder of one")
    synthesized: dict[str, Synthesis] = Field(default_factory=dict)
    conversations: dict[str, Conversations] = Field(default_factory=dict)
    texts: dict[str, Texts] = Field(default_factory=dict, description="for tasks on text alone")
    unseen_sentences: dict[str, Share] = Field(default_factory=dict)
    encoded: dict[str, Copies] = Field(min_length=1)
    tests: list[str] = Field(default_factory=list)

    def scaled(self, share: float) -> Recipe:
        """The same with the first ``share`` of each set of speech that is made to train on; texts stay whole.

        More speech can be made later; conversations, and codes of what grew, are then to be removed first.
        """

        def part(plan: AnyMade) -> AnyMade:
            return plan.model_copy(update={"count": math.ceil(share * plan.count)}) if plan.split == "train" else plan

        return self.model_copy(
            update={
                "synthesized": {name: part(plan) for name, plan in self.synthesized.items()},
                "conversations": {name: part(plan) for name, plan in self.conversations.items()},
            }
        )

    def path(self, name: str) -> Path:
        """The manifest made by the recipe, or the recorded set."""
        made = {*self.synthesized, *self.conversations, *self.texts, *self.unseen_sentences}
        return self.out / name / MANIFEST if name in made else self.recording(name)

    def recording(self, name: str) -> Path:
        """A recorded set as it is: a manifest, or the folder of one."""
        return self.recorded.get(name, self.source / name)

    def noise_for(self, split: Split) -> Path | None:
        """Only what trains has noise."""
        return self.recording(self.noise) if self.noise and split == "train" else None

    def unfiltered(self) -> list[str]:
        """Sets in folders that hold a filtered manifest too, which is not what is read."""
        names = [corpus.name for corpus in self.corpora() if corpus.kind == "recorded"]
        return [name for name in names if (self.recording(name) / FILTERED).is_file()]

    def corpora(self) -> list[Corpus]:
        """Everything that is made, then the recorded sets in the order of their use."""
        kinds: dict[str, Kind] = dict.fromkeys(self.synthesized, "synthesized")
        kinds |= dict.fromkeys(self.conversations, "conversations")
        kinds |= dict.fromkeys(self.texts, "texts")
        mixed = [name for talks in self.conversations.values() for name in talks.of]
        for name in (*self.encoded, *self.tests, *mixed):
            kinds.setdefault(name, "recorded")
        return [
            Corpus(name, kind, self.path(name), self.out / "codes" / name, name in self.encoded, name in self.tests)
            for name, kind in kinds.items()
        ]

    def check(self) -> None:
        """See that every name stands for a corpus that has what it is named for.

        Raises:
            InputError: one does not; the message names the setting, and where to put a recorded set that is missing.
        """
        made = [*self.synthesized, *self.conversations, *self.texts, *self.unseen_sentences]
        if twice := [name for name, times in Counter(made).items() if times > 1]:
            raise InputError(f"{twice[0]}: the recipe makes two corpora of this name; rename one")
        used = {corpus.name for corpus in self.corpora() if corpus.kind == "recorded"} | {self.noise}
        for name in self.recorded:
            if name in self.synthesized or name in self.conversations or name in self.texts:
                raise InputError(f"recorded.{name}: the recipe makes a corpus of this name; rename one")
            if name not in used:
                raise InputError(f"recorded.{name}: is not used; name it in encoded, tests or conversations too")
        if self.noise is not None:
            self.recordings("noise", self.noise)
        for name, share in self.unseen_sentences.items():
            setting = f"unseen_sentences.{name}"
            utterances = self.recordings(setting, name)
            with naming(setting):
                hold_out_sentences(utterances, share)
        for name, talks in self.conversations.items():
            for other in talks.of:
                if other in self.conversations:
                    raise InputError(f"conversations.{name}.of: {other} are conversations; name single speakers")
                if other in self.texts:
                    raise InputError(f"conversations.{name}.of: {other} are texts; name recordings")
                self.known(f"conversations.{name}.of", other, talks.split)
        for name in self.encoded:
            self.known("encoded", name)
        for name in self.tests:
            self.known("tests", name, "test")

    def known(self, setting: str, name: str, split: Split | None = None) -> None:
        """InputError when there will be no corpus of this name, or nothing of the split in it."""
        if name in self.unseen_sentences:
            return  # has a train and a test split
        plan = self.synthesized.get(name) or self.conversations.get(name) or self.texts.get(name)
        splits = {plan.split} if plan else {utterance.split for utterance in self.recordings(setting, name)}
        if split and split not in splits:
            raise InputError(f"{setting}: {name} has no {split} recordings")

    def recordings(self, setting: str, name: str) -> list[Utterance]:
        """What is in a recorded set; InputError when it is not there."""
        if name in self.recorded:
            with naming(f"recorded.{name}"):
                return read_utterances(self.recorded[name])
        folder = self.source / name
        if not (folder / MANIFEST).is_file():
            raise InputError(
                f"{setting}: {name} is not made by the recipe, and not recorded: there is no {folder / MANIFEST}; "
                "put the set there, name its manifest in 'recorded', or correct the name"
            )
        return read_utterances(folder)


@contextmanager
def naming(setting: str) -> Iterator[None]:
    """Errors begin with the setting that they are about."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{setting}: {error}") from error
