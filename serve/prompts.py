"""`speechllm prompts`: what prompt files there are, what the model gets of one, and whether they can be used."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from serve.codes import CODES_SUFFIX
from serve.loading import Device, ModelOption, make_answerer
from serve.plain_errors import USER_ERROR, complain, plain_errors
from speechllm.errors import InputError
from speechllm.prompt_file import PromptFile, find_prompt_file, prompt_files, prompts_folder, read_prompt_file

# Commands import torch and the rest themselves: --help and usage errors do not wait for them.
if TYPE_CHECKING:
    from serve.answerer import Answerer
    from serve.recording import Recording
    from speechllm.prompt import Example


class _Prompts(TyperGroup):
    """What a user can cause ends as in the other commands: one line, and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        with plain_errors():
            return super().invoke(ctx)


app = typer.Typer(
    name="prompts",
    cls=_Prompts,
    help="Prompt files, for ask --shots: which there are, what the model gets of them, whether they can be used.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


@app.command("list")
def list_prompts(
    folder: Annotated[
        Path | None, typer.Argument(metavar="FOLDER", help="Without it, prompts of the repository, or ./prompts.")
    ] = None,
) -> None:
    """Name the prompt files of a folder: the instruction of each, its number of shots, and its labels."""
    files = prompt_files(folder or prompts_folder())
    width, bad = max(len(file.stem) for file in files), False
    for file in files:
        try:
            prompt = read_prompt_file(file)
        except InputError as error:
            complain(f"error: {error}")
            bad = True
            continue
        print(f"{file.stem:<{width}}  {prompt.instruction}", flush=True)
        print(f"{'':<{width}}  {_outline(prompt)}", flush=True)
        if prompt.description:
            print(f"{'':<{width}}  {prompt.description}", flush=True)
    if bad:
        raise typer.Exit(USER_ERROR)


@app.command()
def show(
    prompt: Annotated[str, typer.Argument(metavar="NAME_OR_FILE", help="As list names it, or a file.")],
    model: ModelOption = None,
) -> None:
    """Print a prompt as the model gets it, with the length of each clip and the ids each shot takes."""
    file = read_prompt_file(find_prompt_file(prompt))
    file.check_clips()
    answerer = make_answerer(model, Device.cpu, None, 1, None)
    from speechllm.tasks import shown

    measured = _Measured.of(answerer, file)
    print(f"{file.path}: {_outline(file)}", flush=True)
    for line in filter(None, (file.description, measured.unusable)):
        print(line, flush=True)
    for (clip, _), one in zip(file.shots, measured.shots, strict=True):
        answer = one.example.answer
        answer = shown(answer) if isinstance(answer, tuple) else answer
        print(
            f"\n<audio: {clip.name}, {one.seconds:.2f} s> {one.example.instruction} <answer> {answer} <end>\n"
            f"    {one.ids} ids, {one.audio_ids} of them audio",
            flush=True,
        )
    print(f"\n<audio: the clip asked about> {file.instruction} <answer> …", flush=True)
    share = 100 * measured.ids / measured.positions
    print(
        f"\nThe shots take {measured.ids:,} of {measured.positions:,} positions ({share:.1f} %). Beside the "
        f"instruction and the longest answer, {max(0, measured.left):,} are left for the audio asked about.",
        flush=True,
    )


@app.command()
def check(
    files: Annotated[
        list[str] | None, typer.Argument(metavar="FILES", help="Without them, all that list shows.")
    ] = None,
    model: ModelOption = None,
) -> None:
    """Check prompt files: what they say, their clips, and that the shots fit.

    Exit code 2 if one is not as it should be. That a checkpoint has no marks of time is no fault of a file's.
    """
    named: Sequence[str | Path] = files or prompt_files(prompts_folder())
    answerer = make_answerer(model, Device.cpu, None, 1, None)
    bad = False
    for name in named:
        try:
            path = find_prompt_file(name)
            prompt = read_prompt_file(path)
            prompt.check_clips()
            measured = _Measured.of(answerer, prompt)
            longest = max((shot.audio_ids for shot in measured.shots), default=1)
            if measured.left < longest:
                raise InputError(
                    f"{path}: its shots take {measured.ids} of {measured.positions} positions, and what is left is not "
                    "enough for a clip like them: use fewer or shorter ones"
                )
        except InputError as error:
            complain(f"error: {error}")
            bad = True
            continue
        remark = f"; {measured.unusable}" if measured.unusable else ""
        print(f"{path}: good; {_outline(prompt)}; {measured.ids:,} ids{remark}", flush=True)
    if bad:
        raise typer.Exit(USER_ERROR)


def examples_of(answerer: Answerer, prompt: PromptFile) -> list[Example]:
    """The shots of a prompt file as examples to put before a question.

    Raises InputError, with the line, for one that this checkpoint cannot use.
    """
    from speechllm.prompt import render

    examples = []
    for number in range(len(prompt.shots)):
        example, _ = _example(answerer, prompt, number)
        try:
            render(example, answerer.checkpoint.vocabulary, answerer.checkpoint.text)
        except InputError as error:
            raise prompt.error(number, error) from error
        examples.append(example)
    return examples


def listen_shot(answerer: Answerer, path: str | Path) -> Recording:
    """A clip of a solved example: audio, or a file of its codes, made by ``speechllm codes encode``.

    Raises InputError when it cannot be read, or another codec made the codes.
    """
    if not str(path).endswith(CODES_SUFFIX):
        return answerer.listen(path)
    import torch

    from serve.recording import Recording, Span
    from speechllm.audio import to_seconds
    from speechllm.checkpoint import CODEC
    from speechllm.codec.files import load_codes

    checkpoint = answerer.checkpoint
    codec, n_q = checkpoint.codec, checkpoint.vocabulary.n_q
    again = f"make it anew: speechllm codes encode CLIP --codec {checkpoint.folder / CODEC}"
    try:
        codes, samples = load_codes(path, codec)  # [codebooks of the file, frames]
    except InputError as error:
        raise InputError(f"{error}; or {again}") from error
    if len(codes) < n_q:
        raise InputError(f"{path}: this checkpoint hears {n_q} codebooks, and {len(codes)} are in it; {again}")
    seconds = to_seconds(samples, codec.sample_rate)
    span = Span(0.0, seconds, codes[:n_q], torch.empty(0))
    key = hashlib.sha256(codes.numpy().tobytes()).hexdigest()
    return Recording(str(path), seconds, seconds, (span,), key, {"read": 0.0, "encode": 0.0})


def _example(answerer: Answerer, prompt: PromptFile, number: int) -> tuple[Example, Recording]:
    """A shot of a prompt file, and its clip. Raises InputError, with the line."""
    from speechllm.tasks import TASKS

    clip, answer = prompt.shots[number]
    task = TASKS[prompt.task] if prompt.task else None
    try:
        recording = listen_shot(answerer, clip)
        return answerer.shot(recording, prompt.instruction, answer, task), recording
    except InputError as error:
        raise prompt.error(number, error) from error


@dataclass(frozen=True)
class _Shot:
    """A shot as the model gets it. seconds: of its clip. ids: of all of it; audio_ids: of its audio alone."""

    example: Example
    seconds: float
    ids: int
    audio_ids: int


@dataclass(frozen=True)
class _Measured:
    """What the shots of a prompt file take.

    ids: of the shots together. positions: those of the model. left: those for the audio asked about, beside the shots,
    the instruction and the longest answer. unusable: why this checkpoint cannot take the shots, "" where it can.
    """

    shots: tuple[_Shot, ...]
    ids: int
    positions: int
    left: int
    unusable: str

    @classmethod
    def of(cls, answerer: Answerer, prompt: PromptFile) -> _Measured:
        """Raises InputError, with the line, for a clip that cannot be heard at once, and an answer that is no answer.

        A checkpoint without marks of time is no fault of the file's: they are counted, and it is told.
        """
        from speechllm.prompt import render
        from speechllm.tasks import TASKS, Time, find_task

        checkpoint = answerer.checkpoint
        settings, vocabulary, text = checkpoint.settings, checkpoint.vocabulary, checkpoint.text
        task = None if prompt.labels else TASKS[prompt.task] if prompt.task else find_task(prompt.instruction)
        shots: list[_Shot] = []
        unusable = ""
        for number in range(len(prompt.shots)):
            example, recording = _example(answerer, prompt, number)
            if recording.seconds > settings.max_audio_seconds:
                limit = f"the model hears {settings.max_audio_seconds:g} s at once"
                raise prompt.error(number, f"{recording.name}: has {recording.seconds:.1f} s, and {limit}: cut it")
            assert example.answer is not None
            parts = (example.answer,) if isinstance(example.answer, str) else example.answer
            if task is not None and (faults := task.read(parts).faults):
                raise prompt.error(number, f"no answer of the task {task.name}: {faults[0]}")
            times = 0
            if not vocabulary.times and (times := sum(isinstance(part, Time) for part in parts)):
                unusable = "this checkpoint has no marks of time, so it cannot be asked with them"
                parts = tuple(part for part in parts if not isinstance(part, Time))
            try:
                ids = len(render(replace(example, answer=parts), vocabulary, text).ids) + times
            except InputError as error:
                raise prompt.error(number, error) from error
            shots.append(_Shot(example, recording.seconds, ids, len(vocabulary.audio_ids(example.codes))))
        taken = sum(shot.ids for shot in shots)
        positions = answerer.positions
        question = 3 + len(text.encode(prompt.instruction))  # audio_begin, audio_end and answer are around it
        left = positions - taken - question - settings.max_answer_tokens
        return cls(tuple(shots), taken, positions, left, unusable)


def _outline(prompt: PromptFile) -> str:
    """What a prompt file holds, in a few words."""
    number = len(prompt.shots)
    held = [f"{number} shot{'' if number == 1 else 's'}"]
    held += [f"labels: {', '.join(prompt.labels)}"] if prompt.labels else []
    held += [f"task: {prompt.task}"] if prompt.task else []
    return "; ".join(held)
