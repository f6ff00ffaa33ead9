"""Measure how good a codec is: ``python -m train.evaluate_codec --config train/configs/evaluate-codec.yaml``.

Finished results are kept in the ``parts`` of the out folder: an interrupted evaluation goes on where it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any, TypeVar

import torch
import typer
from pydantic import Field

from speechllm.codec import Codec, EncodecCodec, EncodecConfig, SpeechCodec, load_codec
from speechllm.data.corpus import Item, manifest_of
from speechllm.errors import InputError
from train.codec_data import transcribable
from train.codec_measures import CHANGES, Judge, fidelity, misheard, same_codes, speech_of, speed, use
from train.codec_probes import Clip, Heard, ProbeSettings, letters, read_trait, read_words
from train.codec_report import ENCODEC, LOG_MEL, ORIGINAL, write_report
from train.codec_selection import halves, pick, unseen_speakers
from train.commands import plain_errors
from train.config import Settings, read_config
from train.kept import file_digest
from train.output import output_folder
from train.resumable import Advance, Store, Unit

SENTENCE = 4  # words
AnyCodec = TypeVar("AnyCodec", bound=Codec)
Name = Annotated[str, Field(pattern="^[^/|]+$")]  # becomes part of a key and of a table
Groups = Annotated[dict[Name, list[Path]], Field(min_length=1, description="reported apart: name -> manifests")]
TRAIT_PROBE = ProbeSettings(steps=400, dim=96, depth=2, kernel=5, learning_rate=1e-3, dropout=0.2, short_first=0)


class WordSettings(Settings):
    train: list[Path] = Field(description="manifests; English clips of their train splits teach the probes")
    tests: Groups
    train_clips: int = Field(1500, ge=1, description="at most, of each manifest")
    test_clips: int = Field(200, ge=1, description="at most, of each manifest")
    probe: ProbeSettings = ProbeSettings(steps=1000, batch_seconds=40, short_first=300)


class SpeakerSettings(Settings):
    tests: Groups
    clips: int = Field(60, ge=2, description="at most, of each speaker")
    least: int = Field(8, ge=1, description="clips of a speaker in each half")
    repeats: int = Field(3, ge=1, description="probes with different seeds; their mean counts")
    probe: ProbeSettings = TRAIT_PROBE


class EmotionSettings(Settings):
    sets: Groups
    clips: int = Field(2500, ge=1, description="at most, of each split of a manifest")
    repeats: int = Field(3, ge=1, description="probes with different seeds; their mean counts")
    probe: ProbeSettings = TRAIT_PROBE


class MeasureSettings(Settings):
    tests: Groups
    clips: int = Field(30, ge=1, description="at most, of each manifest")


class SpeedSettings(Settings):
    speech: list[Path] = Field(description="manifests whose test clips are strung together")
    seconds: list[float] = Field([1, 10, 60, 600, 3600], min_length=1)
    threads: list[int] = Field([1, 2], min_length=1)
    repeats: int = Field(3, ge=1, description="turns of clips up to a minute long; longer ones are timed once")
    encodec_seconds: float = Field(60, ge=0, description="longest clip for EnCodec, which needs 12 MB a second")


class CodecEvaluation(Settings):
    """The YAML file."""

    out: Path
    seed: int = 0
    codecs: dict[Name, str] = Field(min_length=1, description="name -> folder; the first is judged, by the others too")
    phonemes: MeasureSettings
    words: WordSettings
    speaker: SpeakerSettings
    emotion: EmotionSettings
    fidelity: MeasureSettings
    use: MeasureSettings
    stability: MeasureSettings
    speed: SpeedSettings


def books_label(books: tuple[int, ...]) -> str:
    """``0``, or ``0-3`` for the first four."""
    return str(books[0]) if len(books) == 1 else f"{books[0]}-{books[-1]}"


def firsts(n_q: int, counts: tuple[int, ...]) -> list[tuple[int, ...]]:
    """The first ``k`` codebooks for each ``k`` in ``counts``, as far as there are."""
    return [tuple(range(k)) for k in counts if k <= n_q]


def inputs(
    codecs: dict[str, Codec], choose: Callable[[int], list[tuple[int, ...]]], level: bool
) -> Iterator[tuple[str, Heard, tuple[int, ...] | None]]:
    """What probes are trained on: key, where frames come from, codebooks; the codecs take turns."""
    yield LOG_MEL, Heard(None, level), None
    heard = {name: Heard(codec) for name, codec in codecs.items()}
    chosen = [(turn, name, books) for name, codec in codecs.items() for turn, books in enumerate(choose(codec.n_q))]
    for _, name, books in sorted(chosen, key=lambda choice: choice[0]):
        yield f"{name}/{books_label(books)}", heard[name], books


def heard_clips(
    heard: Heard,
    items: list[Item],
    target: Callable[[Item], str],
    books: tuple[int, ...] | None,
    advance: Advance,
) -> list[Clip]:
    clips = []
    for item in items:
        clips.append(heard.clip(item, target(item), books))
        advance(1)
    return clips


def word_units(codecs: dict[str, Codec], settings: WordSettings, seed: int) -> Iterator[Unit]:
    """Each single codebook, the first 2, 4 and 8, and log-mel."""

    def said(item: Item) -> str:
        plain = item.utterance.language == "en" and item.utterance.verbatim
        return (letters(item.utterance.text or "") or "") if plain else ""

    what = "an English text of letters"
    train = pick(settings.train, "train", settings.train_clips, seed, said, what)
    tests = {g: pick(paths, "test", settings.test_clips, seed, said, what) for g, paths in settings.tests.items()}
    asked = {said(item) for items in tests.values() for item in items}
    # words alone are the same everywhere; sentences are not to be known from training
    train = [item for item in train if said(item) not in asked or len(said(item).split()) < SENTENCE]
    if not train:
        raise InputError("words.train: says nothing but what is asked: name other manifests")
    clips = len(train) + sum(map(len, tests.values()))

    def run(heard: Heard, books: tuple[int, ...] | None, advance: Advance) -> dict[str, Any]:
        learnt = heard_clips(heard, train, said, books, advance)
        heard_tests = {group: heard_clips(heard, items, said, books, advance) for group, items in tests.items()}
        return {
            "train_clips": len(train),
            "steps": settings.probe.steps,
            "tests": read_words(learnt, heard_tests, heard.card, heard.frame_rate, settings.probe, seed, advance),
        }

    def choose(n_q: int) -> list[tuple[int, ...]]:
        return [(0,), *firsts(n_q, (2, 4, 8)), *((b,) for b in range(1, n_q))]

    for key, heard, books in inputs(codecs, choose, level=False):
        yield Unit(key, clips + settings.probe.steps, partial(run, heard, books))


def trait_units(
    codecs: dict[str, Codec],
    tasks: dict[str, tuple[list[Item], list[Item]]],
    label: Callable[[Item], str],
    probe: ProbeSettings,
    repeats: int,
    seed: int,
) -> Iterator[Unit]:
    """Codebook 0, the first 2, the first 4, all, and log-mel, on each of the tasks (train clips, test clips)."""

    def run(heard: Heard, books: tuple[int, ...] | None, name: str, advance: Advance) -> dict[str, Any]:
        train, test = (heard_clips(heard, items, label, books, advance) for items in tasks[name])
        runs = [read_trait(train, test, heard.card, probe, seed + n, advance) for n in range(repeats)]
        classes = len({clip.target for clip in test})
        counts = {"classes": classes, "chance": 100 / classes, "train_clips": len(train), "test_clips": len(test)}
        return {**counts, "uar": sum(runs) / repeats, "runs": runs}

    def choose(n_q: int) -> list[tuple[int, ...]]:
        return firsts(n_q, tuple(sorted({1, 2, 4, n_q})))

    for key, heard, books in inputs(codecs, choose, level=True):
        for name, (train, test) in tasks.items():
            total = len(train) + len(test) + repeats * probe.steps
            yield Unit(f"{name}/{key}", total, partial(run, heard, books, name))


def speaker_units(codecs: dict[str, Codec], settings: SpeakerSettings, seed: int) -> Iterator[Unit]:
    """Who speaks, among the speakers of a group, who are in no other split of their set."""
    groups = {group: unseen_speakers(paths, settings.clips, seed) for group, paths in settings.tests.items()}
    tasks = {group: halves(items, settings.least) for group, items in groups.items()}
    return trait_units(codecs, tasks, lambda i: i.utterance.speaker or "", settings.probe, settings.repeats, seed)


def emotion_units(codecs: dict[str, Codec], settings: EmotionSettings, seed: int) -> Iterator[Unit]:
    """Emotions of the test speakers by probes that learnt from the train speakers."""

    def label(item: Item) -> str:
        return str(item.utterance.labels.get("emotion", ""))

    tasks = {}
    for group, paths in settings.sets.items():
        train = pick(paths, "train", settings.clips, seed, label, "an emotion")
        test = pick(paths, "test", settings.clips, seed, label, "an emotion")
        both = {label(item) for item in train} & {label(item) for item in test}
        if not both:
            raise InputError(f"emotion.sets: {group}: no emotion is in both its train and its test split: leave it out")
        tasks[group] = ([i for i in train if label(i) in both], [i for i in test if label(i) in both])
    return trait_units(codecs, tasks, label, settings.probe, settings.repeats, seed)


def fidelity_units(codecs: dict[str, Codec], settings: MeasureSettings, seed: int) -> Iterator[Unit]:
    """Reconstructions of English clips from 2, 4 and 8 codebooks, and the originals."""

    def wanted(item: Item) -> bool:  # PESQ and STOI need about a second
        return bool(item.utterance.text) and item.utterance.language == "en" and item.utterance.duration >= 1

    what = "an English text and a second of audio"
    groups = {g: pick(paths, "test", settings.clips, seed, wanted, what) for g, paths in settings.tests.items()}
    judge = Judge()

    def run(codec: Codec | None, n_q: int, advance: Advance) -> dict[str, Any]:
        return {group: fidelity(judge, codec, n_q, items, advance) for group, items in groups.items()}

    clips = sum(map(len, groups.values()))
    yield Unit(ORIGINAL, clips, partial(run, None, 0))
    for name, codec in codecs.items():
        for k in sorted({min(k, codec.n_q) for k in (2, 4, 8)}):
            yield Unit(f"{name}/{k}", clips, partial(run, codec, k))


def measure_units(
    codecs: Mapping[str, AnyCodec],
    settings: MeasureSettings,
    seed: int,
    measure: Callable[[AnyCodec, list[Item], Advance], dict[str, Any]],
    wanted: Callable[[Item], object] = bool,
    what: str = "audio",
) -> Iterator[Unit]:
    """One measurement of each codec on each group."""
    groups = {g: pick(paths, "test", settings.clips, seed, wanted, what) for g, paths in settings.tests.items()}

    def run(codec: AnyCodec, advance: Advance) -> dict[str, Any]:
        return {group: measure(codec, items, advance) for group, items in groups.items()}

    for name, codec in codecs.items():
        yield Unit(name, sum(map(len, groups.values())), partial(run, codec))


def phoneme_units(codecs: dict[str, Codec], settings: MeasureSettings, seed: int) -> Iterator[Unit]:
    """What the recognisers hear of the codecs that were trained in one."""
    trained = {name: codec for name, codec in codecs.items() if isinstance(codec, SpeechCodec)}
    what = "a verbatim text in a language that espeak-ng speaks"
    return measure_units(trained, settings, seed, misheard, lambda item: transcribable([item]), what)


def stability(codec: Codec, items: list[Item], advance: Advance) -> dict[str, Any]:
    return same_codes(codec, [item.wav(codec.sample_rate) for item in items], CHANGES, advance)


def speed_units(codecs: dict[str, Codec], settings: SpeedSettings, seed: int) -> Iterator[Unit]:
    """The first codec, and EnCodec 24 kHz with random weights (they cost the same time) where the clip is short."""
    items = pick(settings.speech, "test", 200, seed, bool, "audio")
    name, codec = next(iter(codecs.items()))
    encodec = EncodecCodec(EncodecConfig(n_q=8)).eval()

    def run(seconds: float, threads: int, advance: Advance) -> dict[str, Any]:
        compared = {name: codec} | ({ENCODEC: encodec} if seconds <= settings.encodec_seconds else {})
        repeats = settings.repeats if seconds <= 60 else 1
        with torch.inference_mode():
            return speed(compared, speech_of(items, seconds), threads, repeats)

    for seconds in settings.seconds:
        for threads in settings.threads:
            yield Unit(f"{seconds:g} s/{threads}", 1, partial(run, seconds, threads))


PARTS: dict[str, Callable[[dict[str, Codec], Any, int], Iterator[Unit]]] = {
    "phonemes": phoneme_units,
    "words": word_units,
    "speaker": speaker_units,
    "emotion": emotion_units,
    "fidelity": fidelity_units,
    "use": partial(measure_units, measure=use),
    "stability": partial(measure_units, measure=stability),
    "speed": speed_units,
}


def evaluate(config: CodecEvaluation, parts: list[str]) -> str:
    """Measure what is missing of ``parts``, write the report of all that is there, and return it.

    Raises:
        InputError: a codec or a manifest cannot be used, or the out folder holds results of other settings.
    """
    codecs: dict[str, Codec] = {name: load_codec(folder) for name, folder in config.codecs.items()}
    judged = {"first codec": next(iter(codecs))}
    weights = judged | {f"codec {name}": codec.fingerprint(codec.n_q) for name, codec in codecs.items()}
    stores = {}
    for name in PARTS:
        settings = getattr(config, name).model_dump()
        of = {"settings": settings, "seed": config.seed, **weights}
        if name in parts:
            of["manifests"] = [file_digest(path) for path in manifests(settings)]
        stores[name] = Store(config.out / "parts" / f"{name}.json", of)
    for name in parts:
        stores[name].fill(name, PARTS[name](codecs, getattr(config, name), config.seed))
    if not any(stores[name].results for name in parts):
        raise InputError(f"--only {','.join(parts)}: none of the codecs has a recogniser")
    return write_report(config.out, codecs, {name: store.results for name, store in stores.items() if store.results})


def manifests(settings: object) -> Iterator[Path]:
    """All that are named anywhere in the settings of a part. Raises InputError for one that is not there."""
    if isinstance(settings, Path):
        path = manifest_of(settings)
        if not path.exists():
            raise InputError(f"{path}: no such file; it is one of those to be measured on")
        yield path
    elif isinstance(settings, dict | list):
        for value in settings.values() if isinstance(settings, dict) else settings:
            yield from manifests(value)


def main(
    config: Annotated[Path, typer.Option(help="YAML file; see train/configs/evaluate-codec.yaml")],
    only: Annotated[str | None, typer.Option(help=f"parts to measure, with commas: {','.join(PARTS)}")] = None,
) -> None:
    """Measure a codec; writes results.json, results.md and plots. Finished parts of an earlier call are kept."""
    with plain_errors("stopped: what is finished is kept; run the same command to go on"):
        parts = only.split(",") if only else list(PARTS)
        if unknown := [name for name in parts if name not in PARTS]:
            raise InputError(f"--only: no part is called {unknown[0]!r}; there are {', '.join(PARTS)}")
        settings = read_config(config, CodecEvaluation)
        with output_folder(settings.out):
            typer.echo(evaluate(settings, parts))


if __name__ == "__main__":
    typer.run(main)
