"""How fast answers are made on this machine: `python -m serve.bench`.

Two things are timed, with one warm-up each: our `generate` against Hugging Face's on the same prompts, taking turns,
and the whole path from files to answers. Ratios carry over to other machines; seconds do not.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from serve.answer import Answer, Answerer
from speechllm.audio import read_audio
from speechllm.checkpoint import DEFAULT, Checkpoint, load_checkpoint
from speechllm.errors import InputError
from speechllm.generate import generate
from speechllm.prompt import Example, render

CLIPS = Path(__file__).resolve().parent.parent / "prompts" / "clips"
INSTRUCTION = "Transcribe this audio"
BATCHES = (1, 8)


def _ours(checkpoint: Checkpoint, prompts: Sequence[Tensor]) -> list[list[int]]:
    vocabulary, limit = checkpoint.vocabulary, checkpoint.settings.max_answer_tokens
    completions = generate(checkpoint.lm, prompts, end_id=vocabulary.end, pad_id=vocabulary.pad, max_new_tokens=limit)
    return [completion.ids for completion in completions]


@torch.inference_mode()
def _hugging_face(checkpoint: Checkpoint, prompts: Sequence[Tensor]) -> list[list[int]]:
    """The same greedy answers by `lm.generate`, without the end id."""
    lm: Any = checkpoint.lm
    vocabulary = checkpoint.vocabulary
    longest = max(len(prompt) for prompt in prompts)
    ids = torch.full((len(prompts), longest), vocabulary.pad)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = prompt
        mask[row, longest - len(prompt) :] = 1
    mixture = {"output_router_logits": False} if hasattr(lm.config, "output_router_logits") else {}
    output = lm.generate(
        input_ids=ids.to(lm.device),
        attention_mask=mask.to(lm.device),
        do_sample=False,
        max_new_tokens=checkpoint.settings.max_answer_tokens,
        eos_token_id=vocabulary.end,
        pad_token_id=vocabulary.pad,
        **mixture,  # its generate fails where a Mixtral returns these
    )
    rows = output[:, longest:].tolist()
    return [row[: row.index(vocabulary.end)] if vocabulary.end in row else row for row in rows]


def compare_generate(checkpoint: Checkpoint, prompts: Sequence[Tensor], repeats: int) -> dict[str, Any]:
    """Median seconds of both for one batch, their ratio, and how many of the answers are the same, id for id."""
    ours, theirs = _ours(checkpoint, prompts), _hugging_face(checkpoint, prompts)
    seconds: dict[str, list[float]] = {"ours": [], "hugging_face": []}
    for _ in range(repeats):
        for name, answer in (("ours", _ours), ("hugging_face", _hugging_face)):
            started = time.perf_counter()
            answer(checkpoint, prompts)
            seconds[name].append(time.perf_counter() - started)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "batch": len(prompts),
        "prompt_ids": sum(len(prompt) for prompt in prompts),
        "answer_ids": sum(len(ids) for ids in ours),
        "ours_seconds": medians["ours"],
        "hugging_face_seconds": medians["hugging_face"],
        "ratio": medians["hugging_face"] / medians["ours"],
        "same_answers": sum(a == b for a, b in zip(ours, theirs, strict=True)),
    }


def time_path(checkpoint: Checkpoint, files: Sequence[str], batch: int, repeats: int) -> dict[str, Any]:
    """Median seconds from files to answers, and the real-time factor: seconds of work per second of audio."""
    answerer = Answerer(checkpoint, batch)
    seconds: list[float] = []
    audio = 0.0
    for _ in range(repeats + 1):
        started = time.perf_counter()
        answers = list(answerer.ask(files, INSTRUCTION))
        seconds.append(time.perf_counter() - started)
        for answer in answers:
            if not isinstance(answer, Answer):
                raise InputError(answer.error)
        audio = sum(answer.seconds_in for answer in answers if isinstance(answer, Answer))
    median = statistics.median(seconds[1:])
    return {
        "batch": batch,
        "files": len(files),
        "audio_seconds": audio,
        "seconds": median,
        "real_time_factor": median / audio,
    }


def measure(checkpoint: Checkpoint, files: Sequence[str], repeats: int) -> dict[str, Any]:
    """All measurements, ready for JSON. Raises InputError when a file cannot be answered."""
    rate, vocabulary = checkpoint.codec.sample_rate, checkpoint.vocabulary
    limit = int(checkpoint.settings.max_audio_seconds * rate)
    prompts = []
    for index in range(max(BATCHES)):  # fewer clips than that are used again
        codes = checkpoint.encode(read_audio(files[index % len(files)], rate)[:, :limit])
        prompts.append(render(Example(codes, INSTRUCTION), vocabulary, checkpoint.text).ids)
    return {
        "checkpoint": checkpoint.settings.name,
        "machine": platform.machine(),
        "device": str(checkpoint.lm.device),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "repeats": repeats,
        "generate": [compare_generate(checkpoint, prompts[:batch], repeats) for batch in BATCHES],
        "path": [time_path(checkpoint, files, batch, repeats) for batch in BATCHES],
    }


def _show(result: dict[str, Any]) -> None:
    console = Console()
    title = f"{result['checkpoint']} on {result['device']}, {result['threads']} threads"
    table = Table("batch", "ours (s)", "Hugging Face (s)", "times faster", "same answers", title=title)
    for row in result["generate"]:
        values = (f"{row[name]:.3f}" for name in ("ours_seconds", "hugging_face_seconds"))
        table.add_row(str(row["batch"]), *values, f"{row['ratio']:.2f}", f"{row['same_answers']} of {row['batch']}")
    console.print(table)
    table = Table("batch", "files", "audio (s)", "seconds", "real-time factor", title="from files to answers")
    for row in result["path"]:
        values = (f"{row[name]:.3f}" for name in ("audio_seconds", "seconds", "real_time_factor"))
        table.add_row(str(row["batch"]), str(row["files"]), *values)
    console.print(table)


def main(
    audio: Annotated[list[str] | None, typer.Argument(help="audio files; without any, the repository's clips")] = None,
    model: Annotated[Path, typer.Option(help="checkpoint folder")] = DEFAULT,
    repeats: Annotated[int, typer.Option(min=1, help="timed runs of each; their median counts")] = 5,
    out: Annotated[Path | None, typer.Option(help="write the measurements to this JSON file too")] = None,
) -> None:
    """Time the engine against Hugging Face's generate, and the whole path. Exit code 1 when the answers differ."""
    try:
        files = audio or sorted(str(path) for path in CLIPS.glob("*.wav"))
        if not files:
            raise InputError(f"{CLIPS}: no clips here; name audio files to measure with")
        result = measure(load_checkpoint(model), files, repeats)
        _show(result)
        if out is not None:
            try:
                out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
            except OSError as error:
                raise InputError(f"{out}: cannot be written ({error.strerror})") from error
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(2) from None
    if any(row["same_answers"] != row["batch"] for row in result["generate"]):
        print("error: our answers and Hugging Face's differ", file=sys.stderr)
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
