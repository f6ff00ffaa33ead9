"""`speechllm ask`: what it takes. What is done with it is in serve.answerer, how it is shown in serve.printing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer

from serve.formats import Format
from serve.inputs import NO_AUDIO, STDIN, collect, on_text_alone, parse_shot, record
from serve.loading import (
    AdapterOption,
    BatchOption,
    Device,
    DeviceOption,
    ModelOption,
    QuantizeOption,
    check_folder,
    make_answerer,
)
from serve.plain_errors import USER_ERROR, plain_errors
from serve.prompts import examples_of, listen_shot
from speechllm.errors import InputError
from speechllm.options import Options
from speechllm.prompt_file import find_prompt_file, read_prompt_file

BEAMS = 4  # a ninth fewer words of dev captions are wrong than with one, in twice the time; labels stay as they are


def ask(
    instruction: Annotated[
        str, typer.Argument(metavar="INSTRUCTION", help='What to do, e.g. "Translate this audio to German".')
    ],
    audio: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="AUDIO",
            help="Files (wav, flac, ogg, opus, mp3), folders of them, patterns; - is standard input. "
            "None where the instruction is about a text that it holds.",
        ),
    ] = None,
    also: Annotated[
        list[str] | None,
        typer.Option(metavar="INSTRUCTION", help="Another question about the same audio, heard once. Repeatable."),
    ] = None,
    shots: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE_OR_NAME",
            help="Prompt file: solved examples, and what answers there are; or the name of one of those that "
            "speechllm prompts list shows, e.g. emotion.",
        ),
    ] = None,
    shot: Annotated[
        list[str] | None,
        typer.Option(metavar="AUDIO=ANSWER", help="A solved example of the instruction. Repeatable."),
    ] = None,
    label: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="One of the answers there are. Repeatable.")
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Task whose answers are wanted, whatever the words; see speechllm info."),
    ] = None,
    format: Annotated[Format, typer.Option("--format", "-f", help="How answers are written.")] = Format.text,
    output_dir: Annotated[
        Path | None, typer.Option("--output-dir", "-o", metavar="FOLDER", help="Write a file for each one asked about.")
    ] = None,
    stream: Annotated[bool, typer.Option("--stream", help="Print words as they come.")] = False,
    microphone: Annotated[bool, typer.Option("--microphone", help="Record first, until Enter is pressed.")] = False,
    model: ModelOption = None,
    adapter: AdapterOption = None,
    device: DeviceOption = Device.auto,
    quantize: QuantizeOption = None,
    batch: BatchOption = 16,
    beams: Annotated[
        int | None,
        typer.Option(
            help=f"Hypotheses kept side by side; without it {BEAMS}, or --batch; one where words are streamed or drawn."
        ),
    ] = None,
    temperature: Annotated[float, typer.Option(help="Above 0, words are drawn at random.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Draw from the likeliest that have this probability together.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the draws.")] = 0,
    max_tokens: Annotated[
        int | None, typer.Option(help="Longest answer about a piece of audio; without it, the checkpoint's.")
    ] = None,
    timeout: Annotated[float | None, typer.Option(metavar="SECONDS", help="Take what is there by then.")] = None,
    min_confidence: Annotated[float, typer.Option(help="Withhold answers that are less sure (0 to 1).")] = 0.0,
    fallback: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER", help="Checkpoint that is asked where an answer was withheld; it must be as sure."
        ),
    ] = None,
) -> None:
    """Ask something about audio files.

    Answers go to standard output, in the order of the files. Audio longer than the model was
    trained on is cut at pauses and answered piece by piece, to the end.

    Exit code: 0 when every file was answered; 2 when one was not (the others still are), or the command cannot be
    used as given; 130 when interrupted, 141 when nobody reads the answers.

    \b
    Examples:
      speechllm ask "Transcribe this audio" a.wav b.mp3
      speechllm ask "Transcribe this audio" --also "Translate this audio to German" a.wav
      speechllm ask "Transcribe this audio" recordings/ --format srt --output-dir subtitles
      speechllm ask "Is it a question?" --shot asked.wav=yes --shot told.wav=no new.wav
      speechllm ask "What is the speaker's emotion?" --shots emotion new.wav
      speechllm ask "Translate this text to German: Two dogs run."
      ffmpeg -i talk.mp4 -f wav - | speechllm ask "Transcribe this audio" -
    """
    with plain_errors(), TemporaryDirectory() as folder:
        instructions = [instruction, *(also or ())]
        examples_given = shots is not None or bool(shot)
        unheard = not (audio or microphone or examples_given) and all(map(on_text_alone, instructions))
        _check(audio, instructions, microphone, format, output_dir, fallback, examples_given, unheard)
        if fallback and not min_confidence:
            raise InputError("--fallback: it answers what is withheld, and nothing is without --min-confidence")
        if top_p < 1 and not temperature:
            raise InputError("--top-p: nothing is drawn without --temperature; set that too, or leave --top-p out")
        for checkpoint in (model, fallback):
            check_folder(checkpoint)
        if stream:
            _check_stream(format, output_dir, fallback, certain_late=(beams or 1) > 1 or min_confidence > 0)
        files = [NO_AUDIO] if unheard else collect(audio or ())
        prompt = read_prompt_file(find_prompt_file(shots)) if shots else None
        if prompt:
            prompt.check_clips()
        labels = tuple(label or ()) or (prompt.labels if prompt else ())
        task = task or (prompt.task if prompt and not label else None)
        if also and (labels or task):
            raise InputError("--also: labels, or a task that is named, are for one question: ask the others alone")
        if beams is None:
            beams = 1 if stream or temperature > 0 else min(BEAMS, batch)
        options = Options(temperature, top_p, seed, beams, max_tokens, timeout, min_confidence, labels, task)
        files = files or [_recorded(folder)]

        answerer = make_answerer(model, device, adapter, batch, quantize)
        second = make_answerer(fallback, device, None, batch, quantize) if fallback else None
        from serve.answer import Failure
        from serve.printing import Printer, remark, second_tries, streamed, warn, with_progress
        from speechllm.tasks import TASKS

        warn(answerer, instructions, options, examples_given)
        examples = examples_of(answerer, prompt) if prompt else []
        solved = map(parse_shot, shot or ())
        named = TASKS[task] if task else None
        examples += [answerer.shot(listen_shot(answerer, path), instruction, answer, named) for path, answer in solved]
        if stream:
            answers = streamed(answerer, files, instructions, examples, options)
        else:
            answers = with_progress(answerer.ask(files, instructions, examples, options), len(files))
        if second:
            answers = second_tries(answers, second, options)
        limit = options.max_tokens or answerer.checkpoint.settings.max_answer_tokens
        failed = False
        printer = Printer(format, files, len(instructions), output_dir, silent=stream)
        for answer in answers:
            failed = failed or isinstance(answer, Failure)
            remark(answer, format, limit)
            printer.take(answer)
        if failed:
            raise typer.Exit(USER_ERROR)


def _check(
    audio: Sequence[str] | None,
    instructions: Sequence[str],
    microphone: bool,
    format: Format,
    output_dir: Path | None,
    fallback: Path | None,
    examples: bool,
    unheard: bool,
) -> None:
    """Raises InputError for what does not go together."""
    several = len(instructions) > 1 and format not in (Format.text, Format.json)
    for wrong, message in (
        (microphone and audio, "--microphone: there are files to ask about too; leave one of them out"),
        (
            not (microphone or audio or unheard),
            "no audio: name files or folders, - for standard input, or use --microphone",
        ),
        (
            unheard and format not in (Format.text, Format.json),
            f"--format {format.value} is about a recording: answers on text alone are text or json",
        ),
        (unheard and output_dir, "--output-dir: a file is written for each recording, and there is none"),
        (several, f"--format {format.value} has room for one answer: leave --also out, or use json"),
        (output_dir and output_dir.exists() and not output_dir.is_dir(), f"--output-dir {output_dir}: is not a folder"),
        (fallback and STDIN in (audio or ()), "--fallback: standard input cannot be heard twice; name a file"),
        (fallback and examples, "--fallback: examples are encoded for one checkpoint; leave them out, or --fallback"),
    ):
        if wrong:
            raise InputError(message)


def _check_stream(format: Format, output_dir: Path | None, fallback: Path | None, certain_late: bool) -> None:
    """Raises InputError for what cannot be printed word by word."""
    for wrong, message in (
        (format is not Format.text, f"--stream prints words as they come: not as {format.value}"),
        (output_dir, "--stream prints words as they come: leave --output-dir out"),
        (
            fallback or certain_late,
            "--stream: leave --beams, --min-confidence, --fallback out: they decide last",
        ),
    ):
        if wrong:
            raise InputError(message)


def _recorded(folder: str) -> str:
    """What the microphone hears, as a file."""
    path = Path(folder, "microphone.wav")
    path.write_bytes(record())
    return str(path)
