"""What the benchmark of answering times: each way in turns with what it is compared with, on clips not heard before."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import soundfile
import torch
from torch import Tensor

from serve import decoder
from serve.answer import Answer
from serve.answerer import Answerer
from serve.bench_peers import EXPERTS, HuggingFace, Peer
from serve.bench_report import HUGGING_FACE, INT8, OURS, PLAIN
from serve.engine import Engine, Job, Request
from speechllm.audio import read_audio
from speechllm.checkpoint import Checkpoint
from speechllm.errors import InputError
from speechllm.grammar import Grammar
from speechllm.options import Options
from speechllm.prompt import Example, render
from speechllm.tasks import TASKS

CLIPS = Path(__file__).resolve().parent.parent / "prompts" / "clips"
RATE = 16000  # Hz, of the clips made
INSTRUCTION = "Transcribe this audio"
SHORT_LENGTHS = (1.5, 2.5, 3.5, 4.5, 5.5)  # seconds, of clips that come many at once
STEP_SECONDS = 0.77  # each clip begins so much later in the material than the one before


class Clips:
    """Speech of any length: the repository's clips one after another and over again, each clip begun elsewhere."""

    def __init__(self, folder: Path):
        files = sorted(CLIPS.glob("*.wav"))
        if not files:
            raise InputError(f"{CLIPS}: no clips here to measure with; run this in a copy of the repository")
        self._material = torch.cat([read_audio(file, RATE)[0] for file in files])  # [samples]
        self._folder, self._count = folder, 0

    def next(self, seconds: float) -> str:
        """A file that was not there before: nothing that is kept of others helps to answer it."""
        start, size = round(self._count * STEP_SECONDS * RATE) % len(self._material), round(seconds * RATE)
        samples = self._material.repeat(2 + size // len(self._material))[start : start + size]
        path = self._folder / f"{self._count}.wav"
        soundfile.write(path, samples.numpy(), RATE)
        self._count += 1
        return str(path)

    def short(self, count: int) -> list[str]:
        """So many new files, of SHORT_LENGTHS."""
        return [self.next(SHORT_LENGTHS[number % len(SHORT_LENGTHS)]) for number in range(count)]


def in_turns(ways: Mapping[Any, Callable[[int], object]], turns: int) -> dict[Any, float]:
    """Median seconds of each way. A way is given the number of the turn; the first, for warming up, does not count."""
    laps: dict[Any, list[float]] = {name: [] for name in ways}
    for turn in range(turns):
        for name, way in ways.items():
            started = time.perf_counter()
            way(turn)
            laps[name].append(time.perf_counter() - started)
    return {name: median(own[1:]) for name, own in laps.items()}


class Decoding:
    """The same prompts continued by our engine and by Hugging Face's ``generate``; no prefixes are kept."""

    def __init__(self, checkpoint: Checkpoint, grammar: Grammar, files: Sequence[str]) -> None:
        self._checkpoint, self._grammar = checkpoint, grammar
        self._prompts = [self._prompt(file) for file in files]
        lm, end, size = checkpoint.lm, checkpoint.vocabulary.end, len(files)
        self.engines = {OURS: Engine(lm, end, size)}
        if self.engines[OURS].compiled:
            self.engines[INT8] = Engine(lm, end, size, "int8")
            with mock.patch.object(decoder, "fits", return_value=False):  # as on a machine without a compiler
                self.engines[PLAIN] = Engine(lm, end, size)
        self.hugging_face = HuggingFace(checkpoint, INSTRUCTION, grammar)

    def measure(self, batch: int, turns: int) -> dict[str, Any]:
        """The first prompts, answered in each way: ids a second, in all and after the first; and the same answers."""
        prompts, limit = self._prompts[:batch], self._checkpoint.settings.max_answer_tokens
        experts = self._fastest_experts(prompts)
        self.hugging_face.use(experts)
        theirs = self.hugging_face.generate(prompts, limit)
        ways: dict[tuple[str, int], Callable[[int], object]] = {}
        for most in (limit, 1):
            for name, engine in self.engines.items():
                ways[name, most] = partial(self._ours, engine, prompts, most)
            ways[HUGGING_FACE, most] = partial(self._theirs, prompts, most)
        seconds = in_turns(ways, turns)
        measured: dict[str, Any] = {}
        for name in (*self.engines, HUGGING_FACE):
            if name in self.engines:
                jobs = self._ours(self.engines[name], prompts, limit)
                answers = [list(job.best.ids) for job in jobs]
                same = sum(map(_same, jobs, theirs))
            else:
                answers, same = theirs, batch
            ids = sum(min(len(answer) + 1, limit) for answer in answers)  # the end is an id too
            later = seconds[name, limit] - seconds[name, 1]
            measured[name] = {
                "ids": ids,
                "ids_per_second": ids / seconds[name, limit],
                "later_ids_per_second": (ids - batch) / later if later > 0 else None,
                "same_answers": same,
            }
        return {"batch": batch, "prompt_ids": sum(map(len, prompts)), "experts": experts, "ways": measured}

    def _fastest_experts(self, prompts: Sequence[Tensor]) -> str:
        """Transformers' best setting here."""

        def generate(experts: str, turn: int) -> None:
            self.hugging_face.use(experts)
            self._theirs(prompts, self._checkpoint.settings.max_answer_tokens, turn)

        seconds = in_turns({experts: partial(generate, experts) for experts in EXPERTS}, 2)
        return min(seconds, key=seconds.__getitem__)

    def _prompt(self, file: str) -> Tensor:
        checkpoint = self._checkpoint
        with torch.inference_mode():
            codes = checkpoint.encode(read_audio(file, checkpoint.codec.sample_rate))
        return render(Example(codes, INSTRUCTION), checkpoint.vocabulary, checkpoint.text).ids

    def _ours(self, engine: Engine, prompts: Sequence[Tensor], limit: int, turn: int = 0) -> list[Job]:
        options = Options(max_tokens=limit)
        jobs = [engine.prepare(Request(prompt, self._grammar, limit, options)) for prompt in prompts]
        for job in jobs:
            engine.submit(job)
        while engine.step():
            pass
        return jobs

    def _theirs(self, prompts: Sequence[Tensor], limit: int, turn: int) -> None:
        self.hugging_face.generate(prompts, limit)


def _same(job: Job, theirs: Sequence[int]) -> bool:
    """Whether it is the answer of Hugging Face's ``generate``, which does not stop where it repeats itself."""
    ids = list(job.best.ids)
    return ids == list(theirs[: len(ids)] if job.finish == "repetition" else theirs)


def latency(checkpoint: Checkpoint, clips: Clips, seconds: float, turns: int) -> dict[str, float]:
    """Median seconds from a file to the first word of its answer, and to the last."""
    answerer = Answerer(checkpoint)
    laps = []
    for _ in range(turns):
        file, first = clips.next(seconds), 0.0
        started = time.perf_counter()
        question = answerer.pose(answerer.listen(file), INSTRUCTION)
        while not question.done:
            answerer.drive()
            if not first and question.text:
                first = time.perf_counter() - started
        answer, last = question.answer(), time.perf_counter() - started
        laps.append((first or last, last, answer.tokens_out))
    first, last, tokens = (median(values) for values in zip(*laps[1:], strict=True))
    return {"seconds": seconds, "first": first, "last": last, "tokens": tokens, "real_time_factor": last / seconds}


def throughput(checkpoint: Checkpoint, clips: Clips, concurrent: Sequence[int], turns: int) -> list[dict[str, float]]:
    """The same clips, as many as the most at once, answered so many at a time."""
    files = [clips.short(max(concurrent)) for _ in range(turns)]
    seconds = in_turns({count: partial(ask_files, Answerer(checkpoint, count), files) for count in concurrent}, turns)
    audio = sum(soundfile.info(file).duration for file in files[0])
    return [
        {"concurrent": count, "clips_per_second": len(files[0]) / lap, "audio_per_second": audio / lap}
        for count, lap in seconds.items()
    ]


def several_questions(
    checkpoint: Checkpoint, clips: Clips, counts: Sequence[int], turns: int
) -> list[dict[str, float]]:
    """So many questions about a clip of 5 s in one call, and each by an answerer that knows nothing of the others."""
    wordings = TASKS["transcribe"].wordings[: max(counts)]
    at_once, alone = Answerer(checkpoint), [Answerer(checkpoint) for _ in wordings]

    def one_by_one(files: Sequence[Sequence[str]], asked: Sequence[str], turn: int) -> None:
        for answerer, instruction in zip(alone, asked, strict=False):
            ask_files(answerer, files, turn, [instruction])

    found = []
    for count in counts:
        files, asked = [[clips.next(5.0)] for _ in range(turns)], wordings[:count]
        ways: dict[str, Callable[[int], object]] = {
            "together": partial(ask_files, at_once, files, instructions=asked),
            "one_by_one": partial(one_by_one, files, asked),
        }
        found.append({"questions": count, **in_turns(ways, turns)})
    return found


def compare(
    checkpoint: Checkpoint, clips: Clips, peers: Mapping[str, Peer], lengths: Sequence[float], count: int, turns: int
) -> list[dict[str, Any]]:
    """Seconds a second of audio, ours and the peers': for a clip of each length, and for so many short ones."""
    scout, ours = Answerer(checkpoint), Answerer(checkpoint)  # the scout says how many ids there are to make

    def theirs(peer: Peer, files: Sequence[Sequence[str]], tokens: Sequence[int], turn: int) -> None:
        peer.answer(files[turn], tokens[turn])

    found = []
    for seconds in (*lengths, None):
        files = [clips.short(count) if seconds is None else [clips.next(seconds)] for _ in range(turns)]
        # several clips get the same number each
        answers = [ask_files(scout, files, turn) for turn in range(turns)]
        tokens = [max(1, round(sum(answer.tokens_out for answer in own) / len(own))) for own in answers]
        ways: dict[str, Callable[[int], object]] = {OURS: partial(ask_files, ours, files)}
        ways |= {name: partial(theirs, peer, files, tokens) for name, peer in peers.items()}
        audio = sum(answer.seconds_in for answer in answers[0])
        factors = {name: lap / audio for name, lap in in_turns(ways, turns).items()}
        found.append(
            {"seconds": seconds, "clips": len(files[0]), "tokens": median(tokens), "real_time_factors": factors}
        )
    return found


def ask_files(
    answerer: Answerer,
    files: Sequence[Sequence[str]],
    turn: int,
    instructions: Sequence[str] = (INSTRUCTION,),
    shots: Sequence[Example] = (),
) -> list[Answer]:
    """Answers about the files of a turn. Raises InputError when there is none."""
    answers = []
    for answer in answerer.ask(files[turn], instructions, shots):
        if not isinstance(answer, Answer):
            raise InputError(answer.error)
        answers.append(answer)
    return answers


def ask_program(files: Sequence[str], model: Path, batch: int, threads: int) -> tuple[float, float | None]:
    """`speechllm ask` as a program: seconds from its start to its first answer, and the most memory it held, in MB."""
    options = ("--model", str(model), "--batch", str(batch), "--beams", "1", "--device", "cpu")
    command = [sys.executable, "-m", "serve.cli", "ask", INSTRUCTION, *files, *options]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    started = time.perf_counter()
    first = megabytes = None
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE) as program:
        assert program.stdout is not None
        os.set_blocking(program.stdout.fileno(), False)
        while program.poll() is None:
            if program.stdout.read() and first is None:
                first = time.perf_counter() - started
            megabytes = _peak_megabytes(program.pid) or megabytes
            time.sleep(0.01)
    if program.returncode:
        raise InputError(f"speechllm ask ended with exit code {program.returncode}; its message is above")
    return first or time.perf_counter() - started, megabytes


def _peak_megabytes(pid: int) -> float | None:
    """The most a process held so far; None where the system does not tell."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM:")), None)
