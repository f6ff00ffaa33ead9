"""Make a corpus of conversations from single utterances: `python -m train.converse MANIFEST... --out DIR`.

Every conversation follows from (seed, index) and the manifests alone, so an interrupted run goes on where it stopped
and gives the same corpus. Train conversations vary in level, and some are in a room or in noise; dev and test ones are
clean. Speakers of different splits never meet.
"""

import hashlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Annotated, Any

import typer
from rich.console import Console

from speechllm.data import conversations
from speechllm.data.ambience import recorded_noise
from speechllm.data.corpus import read_corpus
from speechllm.data.manifest import Split
from speechllm.data.synthesis import SAMPLE_RATE
from speechllm.errors import InputError
from train.commands import plain_errors
from train.making import Outcome, make_corpus, report, write_utterance


@dataclass(frozen=True)
class Plan:
    """What every conversation of a run follows from; `clips` is a fingerprint of what may be said, and by whom."""

    name: str
    out: Path
    split: Split
    manifests: tuple[str, ...]
    clips: str
    casts: Mapping[int, conversations.Cast]
    seed: int
    max_seconds: float
    noise: Path | None

    def settings(self) -> dict[str, Any]:
        """What the conversations depend on, as JSON holds it."""
        return {
            "manifests": list(self.manifests),
            "clips": self.clips,
            "split": self.split,
            "seed": self.seed,
            "max_seconds": self.max_seconds,
            "noise": None if self.noise is None else str(self.noise),
        }


def prepare(
    manifests: list[Path], out: Path, split: Split, seed: int = 1, max_seconds: float = 20.0, noise: Path | None = None
) -> Plan:
    """Read the manifests and see who can talk to whom; no audio of theirs is read here.

    Raises:
        InputError: a manifest cannot be read, two clips have one id, there are too few speakers, or the noise is none.
    """
    if noise is not None:
        if split != "train":
            raise InputError(f"--noise {noise}: {split} conversations have no noise; leave it out")
        recorded_noise(noise)
    items = read_corpus(manifests, split)
    if twice := [name for name, times in Counter(item.utterance.id for item in items).items() if times > 1]:
        raise InputError(f"{twice[0]}: more than one clip has this id; give every manifest once")
    lines = "\n".join(item.utterance.model_dump_json() for item in items)
    return Plan(
        name=out.resolve().name,
        out=out,
        split=split,
        manifests=tuple(map(str, manifests)),
        clips=hashlib.sha256(lines.encode()).hexdigest()[:16],
        casts=conversations.casts(conversations.people(items), max_seconds),
        seed=seed,
        max_seconds=max_seconds,
        noise=noise,
    )


def make(plan: Plan, index: int) -> Outcome:
    """Mix and write conversation `index`."""
    drawn = conversations.draw(plan.casts, plan.max_seconds, plan.split == "train", Random(f"{plan.seed} {index}"))
    try:
        clips = conversations.clips_of(drawn)
    except InputError as error:
        return Outcome(None, f"conversation {index}: {error}")
    wav = conversations.mix(drawn, clips, plan.noise)
    known = conversations.describe(drawn, clips)
    return Outcome(write_utterance(plan, index, wav[0].numpy(), SAMPLE_RATE, **known))


def main(
    manifests: Annotated[list[Path], typer.Argument(help="Manifests with speakers, or their folders")],
    out: Annotated[Path, typer.Option(help="Folder for audio/ and manifest.jsonl; an earlier run there is continued")],
    count: Annotated[int, typer.Option(min=1, help="Number of conversations")],
    split: Annotated[Split, typer.Option(help="Whose speakers talk")] = "train",
    seed: Annotated[int, typer.Option(min=0, help="The corpus follows from it")] = 1,
    noise: Annotated[Path | None, typer.Option(help="Recorded set whose train split is mixed in as noise")] = None,
    max_seconds: Annotated[float, typer.Option(min=4, max=3600, help="Longest conversation")] = 20.0,
    jobs: Annotated[int, typer.Option(min=1, help="Processes")] = 2,
) -> None:
    """Make a corpus of conversations of one to three speakers."""
    with plain_errors(f"stopped; the same command goes on from {out}"):
        plan = prepare(manifests, out, split, seed, max_seconds, noise)
        tally = make_corpus(plan, make, count, jobs, Console(stderr=True))
    report(out, tally)


if __name__ == "__main__":
    typer.run(main)
