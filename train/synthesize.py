"""Make a corpus of synthetic speech: `python -m train.synthesize --text FILE.jsonl.gz|digits|nonspeech …`.

Every utterance follows from (seed, index) alone, so an interrupted run goes on where it stopped and gives the same
corpus. Train utterances vary in voice, rate, pitch, level and noise; dev and test ones do not, and the voices of those
splits speak in turn, each its own captions.
"""

import json
import multiprocessing
import re
import signal
import string
from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, get_args

import numpy as np
import soundfile
import torch
import typer
from rich.console import Console

from speechllm.data.ambience import nonspeech, recorded_noise, room_for
from speechllm.data.manifest import Split, Utterance, append, read_manifest
from speechllm.data.recorded import Caption, read_captions
from speechllm.data.synthesis import SAMPLE_RATE, Engine, EngineError, Voice, require_voice, speak, voices
from speechllm.errors import InputError
from train.loop import progress_bar

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
RATES, PITCHES = (0.85, 1.2), (0.9, 1.1)  # factors
LEVELS_DB = (-30.0, -12.0)  # dBFS, rms of the speech
CLEAN_LEVEL_DB = -23.0  # of dev and test
NOISE_SHARE, SNRS_DB = 0.3, (10.0, 30.0)
MAX_FRAGMENT = 4  # words
MAX_DIGITS = 6
REPORTED_FAILURES = 5


@dataclass(frozen=True)
class Plan:
    """What every utterance of a run follows from. The text is "digits", "nonspeech", or the file of the captions."""

    name: str
    out: Path
    text: str
    captions: tuple[Caption, ...]
    language: str
    split: Split
    fragments: float
    seed: int
    noise: Path | None
    engines: tuple[str, ...] = get_args(Engine)

    def settings(self) -> dict[str, Any]:
        """What the utterances depend on, as JSON holds it."""
        return {
            "text": self.text,
            "language": self.language,
            "split": self.split,
            "fragments": self.fragments,
            "seed": self.seed,
            "noise": None if self.noise is None else str(self.noise),
            "voices": [voice.name for voice in self.voices()],
        }

    def voices(self) -> list[Voice]:
        return [voice for voice in voices(self.split, self.language) if voice.engine in self.engines]


@dataclass(frozen=True)
class Outcome:
    """One utterance made, or why it was not."""

    utterance: Utterance | None
    failure: str = ""


def fragment_of(text: str, rng: np.random.Generator) -> str:
    """A random run of 1 to 4 consecutive words, without punctuation at its ends."""
    words = text.split()
    size = int(rng.integers(1, min(MAX_FRAGMENT, len(words)) + 1))
    start = int(rng.integers(0, len(words) - size + 1))
    return " ".join(words[start : start + size]).strip(string.punctuation + " ")


def digits_text(rng: np.random.Generator) -> str:
    """A single digit word half of the time, 2 to 6 of them otherwise."""
    size = 1 if rng.random() < 0.5 else int(rng.integers(2, MAX_DIGITS + 1))
    return " ".join(DIGITS[digit] for digit in rng.integers(0, len(DIGITS), size))


@cache
def _order(count: int, seed: int, turn: int) -> np.ndarray:
    """The order of the captions [count] when they are gone through for the `turn`-th time."""
    return np.random.default_rng([seed, turn]).permutation(count)


def _voice(plan: Plan, index: int, rng: np.random.Generator) -> Voice:
    """By share in train, in turn in dev and test."""
    choices = plan.voices()
    if plan.split != "train":
        return choices[index % len(choices)]
    shares = np.array([voice.share for voice in choices])
    return choices[int(rng.choice(len(choices), p=shares / shares.sum()))]


def make(plan: Plan, index: int) -> Outcome:
    """Speak and write utterance `index`."""
    rng = np.random.default_rng([plan.seed, 0, index])
    if plan.text == "nonspeech":
        return Outcome(_write(plan, index, nonspeech(plan.noise, rng), text=""))
    labels: dict[str, str | int | float] = {}
    translations: dict[str, str] = {}
    if plan.captions:
        turn, place = divmod(index, len(plan.captions))
        caption = plan.captions[_order(len(plan.captions), plan.seed, turn)[place]]
        translations = {"en": caption.text, **caption.translations}
        text = " ".join(translations.pop(plan.language).split())
        labels["caption_id"] = caption.id
        if rng.random() < plan.fragments:
            fragment = fragment_of(text, rng)
            if re.search(r"\w", fragment):  # a run of punctuation alone cannot be spoken
                text, translations = fragment, {}
    else:
        text = digits_text(rng)
    voice = _voice(plan, index, rng)
    labels["voice"] = voice.name
    varied = plan.split == "train"
    rate, pitch, level_db = rng.uniform(*RATES), rng.uniform(*PITCHES), rng.uniform(*LEVELS_DB)
    if not varied:
        rate, pitch, level_db = 1.0, 1.0, CLEAN_LEVEL_DB
    snr_db = round(rng.uniform(*SNRS_DB), 1) if varied and rng.random() < NOISE_SHARE else None
    if snr_db is not None:
        labels["snr_db"] = snr_db
    try:
        speech = speak(text, voice, rate, pitch)
    except EngineError as error:
        return Outcome(None, f"utterance {index}: {error}")
    wav = room_for(speech, level_db, snr_db, plan.noise, rng)
    known = {"speaker": voice.name, "gender": voice.gender, "language": plan.language}
    return Outcome(_write(plan, index, wav, text=text, translations=translations, labels=labels, **known))


def _write(plan: Plan, index: int, wav: np.ndarray, **known: Any) -> Utterance:
    """Write the audio [samples] and say what is known about it."""
    audio = f"audio/{index // 1000:03d}/{index:07d}.flac"
    path = plan.out / audio
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, wav, SAMPLE_RATE, subtype="PCM_16")
    duration = round(len(wav) / SAMPLE_RATE, 4)
    return Utterance(
        id=f"{plan.name}/{index}", audio=audio, duration=duration, split=plan.split, source=plan.name, **known
    )


_plan: Plan | None = None  # of this worker process


def _start_worker(plan: Plan) -> None:
    global _plan
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    torch.set_num_threads(1)
    _plan = plan


def _work(index: int) -> Outcome:
    assert _plan is not None
    return make(_plan, index)


def indices_done(manifest: Path) -> set[int]:
    """Indices in a manifest of an earlier run; a last line cut short by a kill is removed from the file."""
    if not manifest.exists():
        return set()
    content = manifest.read_bytes()
    if not content.endswith(b"\n"):
        manifest.write_bytes(content[: content.rfind(b"\n") + 1])
    return {int(utterance.id.rpartition("/")[2]) for utterance in read_manifest(manifest)}


def keep_settings(plan: Plan) -> None:
    """Write what the corpus follows from beside it; InputError when the folder holds a corpus of other settings."""
    path = plan.out / "settings.json"
    settings = json.dumps(plan.settings(), indent=1) + "\n"
    if path.is_file() and path.read_text(encoding="utf-8") != settings:
        raise InputError(f"{path}: a corpus made with other settings is here: give another --out, or remove it")
    path.write_text(settings, encoding="utf-8")


def synthesize(plan: Plan, count: int, jobs: int, console: Console) -> Counter[str]:
    """Make what is missing of utterances 0 ... count - 1, in order; counts of 'made', 'kept' and 'failed'."""
    if plan.text != "nonspeech" and not plan.voices():
        raise InputError(
            f"--engine {' '.join(plan.engines)}: none of these has a voice for --split {plan.split} "
            f"--language {plan.language}"
        )
    for voice in plan.voices() if plan.text != "nonspeech" else ():
        require_voice(voice)
    if plan.noise is not None:
        recorded_noise(plan.noise)
    plan.out.mkdir(parents=True, exist_ok=True)
    keep_settings(plan)
    manifest = plan.out / "manifest.jsonl"
    done = indices_done(manifest)
    missing = [index for index in range(count) if index not in done]
    tally = Counter(kept=count - len(missing), made=0, failed=0)
    context = multiprocessing.get_context("spawn")  # a forked torch may hang
    with (
        progress_bar(console) as progress,
        context.Pool(min(jobs, max(len(missing), 1)), _start_worker, (plan,)) as pool,
    ):
        task = progress.add_task(plan.name, total=count, completed=count - len(missing))
        for outcome in pool.imap(_work, missing, chunksize=4):
            if outcome.utterance is None:
                tally["failed"] += 1
                if tally["failed"] <= REPORTED_FAILURES:
                    console.print(f"failed: {outcome.failure}", markup=False)
            else:
                append(manifest, outcome.utterance)
                tally["made"] += 1
            progress.advance(task)
    return tally


def main(
    text: Annotated[
        str, typer.Option(help="Captions file (.jsonl.gz with id, en, de, fr, cs), 'digits' or 'nonspeech'")
    ],
    out: Annotated[Path, typer.Option(help="Folder for audio/ and manifest.jsonl; an earlier run there is continued")],
    count: Annotated[int, typer.Option(min=1, help="Number of utterances")],
    language: Annotated[str, typer.Option(help="Of the captions that are spoken: en, de or fr")] = "en",
    split: Annotated[Split, typer.Option(help="Whose voices speak")] = "train",
    fragments: Annotated[float, typer.Option(min=0, max=1, help="Share that speaks only 1-4 words of a caption")] = 0.0,
    seed: Annotated[int, typer.Option(min=0, help="The corpus follows from it")] = 1,
    noise: Annotated[Path | None, typer.Option(help="Recorded set whose train split is mixed in as noise")] = None,
    engine: Annotated[list[str] | None, typer.Option(help="Only voices of this engine; repeatable")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Processes")] = 2,
) -> None:
    """Make a corpus of synthetic speech."""
    console = Console(stderr=True)
    try:
        engines = tuple(engine or get_args(Engine))
        if unknown := set(engines) - set(get_args(Engine)):
            raise InputError(f"--engine {' '.join(sorted(unknown))}: give any of {', '.join(get_args(Engine))}")
        captions = () if text in ("digits", "nonspeech") else tuple(read_captions(text))
        if language != "en":
            if not captions:
                raise InputError(f"--language {language}: {text} are spoken in English only")
            captions = tuple(caption for caption in captions if language in caption.translations)
            if not captions:
                raise InputError(f"{text}: no caption in {language}")
        plan = Plan(out.resolve().name, out, text, captions, language, split, fragments, seed, noise, engines)
        tally = synthesize(plan, count, jobs, console)
    except InputError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from error
    except KeyboardInterrupt:
        typer.echo(f"stopped; the same command goes on from {out}", err=True)
        raise typer.Exit(130) from None
    summary = f"{out}: {tally['made']} made, {tally['kept']} kept from before, {tally['failed']} failed"
    typer.echo(summary, err=bool(tally["failed"]))
    if tally["failed"]:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
