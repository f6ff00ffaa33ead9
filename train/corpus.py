"""Build a whole corpus from one recipe: ``python -m train.corpus --config train/configs/corpus.yaml``.

Speech is synthesised, conversations are mixed, everything is encoded, and it is checked that what tests is new to what
trains. What is there already is kept, so an interrupted build goes on where it was.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from speechllm.codec import load_codec
from speechllm.data.corpus import FILTERED, MANIFEST, manifest_of, read_utterances
from speechllm.data.manifest import Utterance, write_manifest
from speechllm.data.overlap import hold_out_sentences
from speechllm.data.recorded import read_sentences
from speechllm.errors import InputError
from train import converse, synthesize
from train.amounts import shown_time
from train.commands import plain_errors
from train.config import read_config
from train.corpus_config import Conversations, Recipe, Synthesis, Texts, naming
from train.corpus_report import Timings, survey, write_report
from train.encode import encode_corpus
from train.making import make_corpus


def placed(utterance: Utterance, folder: Path) -> Utterance:
    """The utterance of a manifest in ``folder`` as any other manifest may hold it."""
    if utterance.is_text:
        return utterance
    key = "audio" if utterance.tar is None else "tar"
    return utterance.model_copy(update={key: str(folder.resolve() / getattr(utterance, key))})


class Builder:
    """The steps of a recipe; each makes what is not there yet, and a line of timings when it made something."""

    def __init__(self, recipe: Recipe, console: Console):
        self.recipe, self.console = recipe, console
        self.timings = Timings(recipe.out / "timings.jsonl")

    def plan(self, name: str, spoken: Synthesis) -> synthesize.Plan:
        """Read the sentences.

        Raises:
            InputError: they are not there, or not in the language, or a voice for them is not installed.
        """
        recipe, options = self.recipe, spoken.model_dump(exclude={"text", "count"})
        text = spoken.text if spoken.text in synthesize.BUILT_IN else str(recipe.source / spoken.text)
        plan = synthesize.prepare(text, recipe.out / name, noise=recipe.noise_for(spoken.split), **options)
        plan.require_voices()
        return plan

    @contextmanager
    def step(self, kind: str, name: str) -> Iterator[Counter[str]]:
        """Time a step; it counts what it ``made``, has ``kept`` from before, and what ``failed``.

        Raises:
            InputError: all failed.
        """
        tally: Counter[str] = Counter()
        begun = time.monotonic()
        try:
            yield tally
        except KeyboardInterrupt:  # what it made stays, and the time that took counts
            self.timings.add(kind, name, time.monotonic() - begun, 0)
            raise
        if tally["made"]:
            self.timings.add(kind, name, time.monotonic() - begun, tally["made"])
        if tally["failed"]:
            self.console.print(f"{name}: {tally['failed']} could not be made", markup=False)
            if not tally["made"] + tally["kept"]:
                raise InputError(f"{name}: nothing could be made; the first reasons are above")

    def synthesize(self, name: str, spoken: Synthesis) -> None:
        plan = self.plan(name, spoken)
        with self.step("synthesize", name) as tally:
            tally.update(synthesize.synthesize(plan, spoken.count, self.recipe.jobs, self.console))
            if tally["failed"]:  # an engine that was too slow once; what fails again is left out
                again = synthesize.synthesize(plan, spoken.count, self.recipe.jobs, self.console)
                tally.update(made=again["made"], failed=again["failed"] - tally["failed"])

    def sentences_of(self, name: str, texts: Texts) -> list[Utterance]:
        """Sentences that train as text, with translations. Raises InputError: there are none."""
        path, found = self.recipe.source / texts.text, []
        for sentence in read_sentences(path, texts.language):
            others = sentence.texts()
            if (text := others.pop(texts.language, None)) and others:
                facts = {"text": text, "language": texts.language, "translations": others}
                found.append(Utterance(id=f"{name}/{sentence.id}", split=texts.split, source=name, **facts))
        if not found:
            raise InputError(f"{path}: no sentence in {texts.language} that has a translation")
        return found

    def keep_for_test(self, name: str, share: float) -> None:
        """A manifest of a recorded set in which ``share`` of the sentences occur in the test split, and there alone."""
        recipe, recording = self.recipe, self.recipe.recording(name)
        folder = manifest_of(recording).parent
        recipe.path(name).parent.mkdir(parents=True, exist_ok=True)
        left = hold_out_sentences(read_utterances(recording), share)
        write_manifest(recipe.path(name), [placed(utterance, folder) for utterance in left])

    def converse(self, name: str, talks: Conversations) -> None:
        recipe, manifests = self.recipe, [self.recipe.path(other) for other in talks.of]
        with naming(f"conversations.{name}"):
            noise = recipe.noise_for(talks.split)
            plan = converse.prepare(manifests, recipe.out / name, talks.split, talks.seed, talks.max_seconds, noise)
        with self.step("converse", name) as tally:
            tally.update(make_corpus(plan, converse.make, talks.count, recipe.jobs, self.console))

    def encode(self, name: str, copies: int) -> None:
        recipe = self.recipe
        with self.step("encode", name) as tally:
            out = recipe.out / "codes" / name
            tally["made"] = encode_corpus(recipe.path(name), recipe.codec, out, recipe.n_q, copies, recipe.jobs)

    def build(self, audio_only: bool = False) -> dict[str, Any]:
        """Make everything (or all but the codes), write the report, and return it.

        Raises:
            InputError: a name, source, voice or the codec is missing, which is seen before the first step; or a task
                has no test set that is new to what is trained on.
        """
        recipe = self.recipe
        recipe.check()
        for name in recipe.unfiltered():
            self.console.print(
                f"{name}: {MANIFEST} is read, not {FILTERED} beside it; to use that, name it in 'recorded'",
                markup=False,
                highlight=False,
                soft_wrap=True,
            )
        if not audio_only:
            with naming("codec"):
                load_codec(recipe.codec).check_n_q(recipe.n_q)
        for name, spoken in recipe.synthesized.items():
            with naming(f"synthesized.{name}"):
                self.plan(name, spoken)
        written: dict[str, list[Utterance]] = {}
        for name, texts in recipe.texts.items():
            with naming(f"texts.{name}"):
                written[name] = self.sentences_of(name, texts)
        for name, utterances in written.items():
            recipe.path(name).parent.mkdir(parents=True, exist_ok=True)
            write_manifest(recipe.path(name), utterances)
        for name, spoken in recipe.synthesized.items():
            self.synthesize(name, spoken)
        for name, share in recipe.unseen_sentences.items():
            self.keep_for_test(name, share)
        for name, talks in recipe.conversations.items():
            self.converse(name, talks)
        untested = survey(recipe.corpora(), self.timings)["untested"]  # known before the codes are made
        if untested:
            raise InputError(f"tests: no set with new speakers and new sentences for {', '.join(untested)}")
        for name, copies in recipe.encoded.items() if not audio_only else ():
            self.encode(name, copies)
        report = survey(recipe.corpora(), self.timings)
        write_report(recipe.out, report)
        return report


def main(
    config: Annotated[Path, typer.Option(help="the recipe, a YAML file")] = Path("train/configs/corpus.yaml"),
    audio_only: Annotated[bool, typer.Option(help="leave the codes for later: a codec is yet to be trained")] = False,
    share: Annotated[float, typer.Option(min=0.001, max=1, help="of what is made to train on: its first part")] = 1.0,
) -> None:
    """Build a corpus: synthesise, mix conversations, encode, check. Interrupted, it goes on where it was."""
    with plain_errors(f"stopped; the same command goes on from {config}"):
        recipe = read_config(config, Recipe).scaled(share)
        totals = Builder(recipe, Console(stderr=True)).build(audio_only)["totals"]
    hours = sum(value for name, value in totals.items() if name.startswith("hours"))
    typer.echo(f"{recipe.out}: {shown_time(3600 * hours)}; {recipe.out / 'corpus.md'} says what is in it")


if __name__ == "__main__":
    typer.run(main)
