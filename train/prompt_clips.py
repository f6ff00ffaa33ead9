"""Clips for prompt files: ``python -m train.prompt_clips`` makes what ``prompts/clips.yaml`` lists and is not there.

A clip is one or more sentences, each spoken by a voice of ``speechllm/data/synthesis.py``. MBROLA's voices are left
out, for their licence.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from pydantic import Field

from speechllm.audio import to_samples, to_seconds, write_audio
from speechllm.data.synthesis import SAMPLE_RATE, VOICES, EngineError, Voice, speak
from speechllm.errors import InputError
from train.commands import plain_errors
from train.config import Settings, read_config

TABLE = Path(__file__).resolve().parent.parent / "prompts" / "clips.yaml"
EDGE = 0.12  # seconds of silence before and after
LEVEL_DB = -23.0  # RMS of every sentence


class Sentence(Settings):
    """One sentence of a clip. gap: seconds of silence before it. rate, pitch: factors of the voice's own."""

    voice: str
    text: str
    gap: float = Field(0.0, ge=0)
    rate: float = Field(1.0, gt=0)
    pitch: float = Field(1.0, gt=0)


class Table(Settings):
    """What clips there are, by name."""

    clips: dict[str, tuple[Sentence, ...]]


def find_voice(name: str) -> Voice:
    """The voice of this name. Raises InputError where there is none, and for one of MBROLA."""
    voice = next((voice for voice in VOICES if voice.name == name), None)
    if voice is None:
        raise InputError(f"there is no voice {name!r}; those there are stand in speechllm/data/synthesis.py")
    if voice.engine == "mbrola":
        raise InputError(f"voice {name}: MBROLA's voices may not be passed on freely; use one of another engine")
    return voice


def make_clip(sentences: tuple[Sentence, ...]) -> tuple[np.ndarray, list[tuple[float, float]]]:
    """The clip, float32 [samples] at SAMPLE_RATE, and where each sentence starts and ends in it, in seconds.

    Raises InputError for a voice that is not there, EngineError where one fails.
    """
    pieces = [np.zeros(to_samples(EDGE, SAMPLE_RATE), np.float32)]
    times: list[tuple[float, float]] = []
    for one in sentences:
        spoken = speak(one.text, find_voice(one.voice), one.rate, one.pitch)  # [samples]
        spoken = spoken * (10 ** (LEVEL_DB / 20) / np.sqrt(np.square(spoken).mean()))
        pieces.append(np.zeros(to_samples(one.gap, SAMPLE_RATE), np.float32))
        start = sum(map(len, pieces))
        pieces.append(spoken * min(1.0, 0.99 / np.abs(spoken).max()))
        times.append((to_seconds(start, SAMPLE_RATE), to_seconds(start + len(spoken), SAMPLE_RATE)))
    return np.concatenate([*pieces, pieces[0]]), times


def main(
    table: Annotated[Path, typer.Argument(help="the list of clips; they go to the folder clips beside it")] = TABLE,
) -> None:
    """Make the clips that are not there yet, 16 kHz FLAC, and say when each sentence in them starts and ends."""
    folder = table.parent / "clips"
    made = kept = 0
    with plain_errors(f"stopped; the same command goes on from {folder}"):
        for name, sentences in read_config(table, Table).clips.items():
            path = folder / f"{name}.flac"
            if path.exists():
                kept += 1
                continue
            try:
                wav, times = make_clip(sentences)
            except (InputError, EngineError) as error:
                raise InputError(f"{table}: clip {name}: {error}") from error
            folder.mkdir(exist_ok=True)
            new = path.with_suffix(".new.flac")  # whole, or not there
            write_audio(new, torch.from_numpy(wav)[None], SAMPLE_RATE)
            new.replace(path)
            made += 1
            spans = ", ".join(f"{start:.2f}-{end:.2f}" for start, end in times)
            typer.echo(f"{path.name}: {to_seconds(len(wav), SAMPLE_RATE):.2f} s, spoken at {spans}")
        typer.echo(f"{folder}: {made} made, {kept} kept from before")


if __name__ == "__main__":
    typer.run(main)
