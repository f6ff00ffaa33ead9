"""How fast answers are made on this machine: ``python -m serve.bench``.

Everything is measured beside what it is compared with, in one run: the ways take turns, and their medians count. Ratios
carry over to other machines; seconds do not.
"""

from __future__ import annotations

import os
import platform
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import transformers
import typer

from serve.bench_peers import make_peers, versions
from serve.bench_report import HUGGING_FACE, OURS, write_report
from serve.bench_runs import Clips, Decoding, ask_program, compare, latency, several_questions, throughput
from serve.bench_shots import shots_cost
from serve.plain_errors import complain, plain_errors
from speechllm.checkpoint import load_checkpoint
from speechllm.checkpoint_settings import DEFAULT
from speechllm.errors import InputError
from speechllm.grammar import Grammars
from speechllm.tasks import TASKS

DIFFERENT = 1  # exit code


@dataclass(frozen=True)
class Scale:
    """How much is measured.

    lengths: of single clips, seconds. batches: prompts decoded together. concurrent: clips answered at once.
    questions: about one clip. shots: before a question. peer_clips: short ones that the others answer too.
    """

    lengths: Sequence[float]
    batches: Sequence[int]
    concurrent: Sequence[int]
    questions: Sequence[int]
    shots: Sequence[int]
    peer_clips: int


FULL = Scale((1.0, 5.0, 30.0), (1, 4, 16), (1, 4, 16, 64), (1, 2, 4, 8), (0, 1, 2, 4, 8, 16), 8)
QUICK = Scale((1.0, 5.0), (1, 4), (1, 4), (1, 2), (0, 2), 2)


def measure(model: Path, folder: Path, scale: Scale, repeats: int, threads: int) -> dict[str, Any]:
    """All of it, ready for JSON; the clips are written to ``folder``. Raises InputError for a model that has faults."""
    torch.set_num_threads(threads)
    machine = _machine(threads)  # before there is work
    turns = repeats + 1
    checkpoint, clips = load_checkpoint(model), Clips(folder)
    grammar = Grammars(checkpoint.vocabulary, checkpoint.text).of(TASKS["transcribe"])
    _say("decoding")
    prompts = [clips.next(4 + 0.1 * number) for number in range(max(scale.batches))]
    decoding = Decoding(checkpoint, grammar, prompts)
    # a difference of two times is told, so there are more of them; they are short
    batches = [decoding.measure(batch, 3 * repeats + 1) for batch in scale.batches]
    _say("from files to answers")
    latencies = [latency(checkpoint, clips, seconds, turns) for seconds in scale.lengths]
    throughputs = throughput(checkpoint, clips, scale.concurrent, turns)
    questions = several_questions(checkpoint, clips, scale.questions, turns)
    _say("shots")
    shots = shots_cost(checkpoint, clips, scale.shots, turns)
    _say("speechllm ask")
    starts = [ask_program([clips.next(5.0)], model, 1, threads) for _ in range(turns)]
    most = max(scale.concurrent)
    _, megabytes = ask_program(clips.short(most), model, most, threads)
    _say("others")
    peers, missing = make_peers(threads)
    decoding.hugging_face.use(batches[0]["experts"])
    peers = {HUGGING_FACE: decoding.hugging_face, **peers}
    return {
        "checkpoint": checkpoint.settings.name,
        "machine": machine,
        "repeats": repeats,
        "compiled": decoding.engines[OURS].compiled,
        "decoding": batches,
        "latency": latencies,
        "throughput": throughputs,
        "questions": questions,
        "shots": shots,
        "cold_start": median(first for first, _ in starts[1:]),
        "megabytes": {1: starts[0][1], most: megabytes},
        "peers": compare(checkpoint, clips, peers, scale.lengths, scale.peer_clips, turns),
        "computes": {name: peer.computes for name, peer in peers.items()},
        "missing": missing,
    }


def _machine(threads: int) -> dict[str, Any]:
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": threads,
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        **versions(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return next(iter(names), platform.processor() or platform.machine())


def _say(what: str) -> None:
    print(f"measuring: {what}", file=sys.stderr, flush=True)


def main(
    out: Annotated[Path, typer.Option(help="folder for bench.md, bench.json and bench.png")] = Path("runs/bench_serve"),
    repeats: Annotated[int, typer.Option(min=1, help="timed turns of each way; their median counts")] = 3,
    threads: Annotated[int, typer.Option(min=1, help="of every program measured")] = 1,
    quick: Annotated[bool, typer.Option("--quick", help="less of everything: to see that it runs")] = False,
    model: Annotated[Path, typer.Option(help="checkpoint folder")] = DEFAULT,
) -> None:
    """Time answering, from files to words, beside other programs.

    Exit code 1 when answers are not those of Hugging Face's generate.
    """
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    with plain_errors(), tempfile.TemporaryDirectory() as folder:
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"--out {out}: cannot be made ({error.strerror})") from error
        result = measure(model, Path(folder), QUICK if quick else FULL, repeats, threads)
        print(write_report(out, result))
        if any(row["ways"][OURS]["same_answers"] < row["batch"] for row in result["decoding"]):
            complain("error: our answers and those of Hugging Face's generate differ")
            raise typer.Exit(DIFFERENT)


if __name__ == "__main__":
    typer.run(main)
