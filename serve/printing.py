"""What `speechllm ask` says: answers on standard output or in files, remarks and a progress bar on standard error."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from textwrap import shorten

from serve.answer import Answer, Failure
from serve.answerer import Answerer
from serve.formats import Format, Writer
from serve.inputs import output_paths, write_output
from serve.plain_errors import complain
from speechllm.errors import InputError
from speechllm.options import Options
from speechllm.prompt import Example
from speechllm.tasks import find_task


def warn(answerer: Answerer, instructions: Sequence[str], options: Options, examples: bool) -> None:
    """Say which of the instructions are no task that the checkpoint was trained on, where nothing else says what is
    wanted: labels, a task that is named, or examples."""
    if options.labels or options.task or examples:
        return
    known = answerer.checkpoint.settings.tasks
    for instruction in instructions:
        task = find_task(instruction)
        if task is None and instruction.strip():
            complain(
                f"note: {shorten(instruction, 60)!r} is no wording that a task is known by: the answer is what the "
                "model makes of it; `speechllm info` has the tasks"
            )
        elif task and task.name not in known:
            complain(f"warning: this checkpoint was not trained on the task {task.name}; it knows {', '.join(known)}")


def streamed(
    answerer: Answerer, files: Sequence[str], instructions: Sequence[str], shots: Sequence[Example], options: Options
) -> Iterator[Answer | Failure]:
    """The answers one by one, each printed while it is made."""
    for file in files:
        try:
            recording = answerer.listen(file)
            questions = answerer.pose_all(recording, instructions, shots, options)
        except InputError as error:
            yield Failure.of(file, error)
            continue
        for question in questions:
            printed = ""
            while not question.done:
                answerer.drive()
                text = " ".join(question.text.split())
                if text.startswith(printed):
                    print(text[len(printed) :], end="", flush=True)
                    printed = text
            answer = question.answer()
            text = " ".join(answer.text.split())
            rest = text[len(printed) :] if text.startswith(printed) else f"\n{text}"
            print(rest, flush=True)
            yield answer


def second_tries(answers: Iterator[Answer | Failure], second: Answerer, options: Options) -> Iterator[Answer | Failure]:
    """What was withheld is asked of another checkpoint."""
    for answer in answers:
        if isinstance(answer, Failure) or answer.finish_reason != "abstained":
            yield answer
        else:
            try:
                yield from second.ask([answer.file], answer.instruction, options=options)
            except InputError as error:
                yield Failure.of(answer.file, error)


class Printer:
    """Writes answers, ``per_file`` about each file, to standard output, or each file's to one of its own.

    silent: they are on standard output already.
    """

    def __init__(self, format: Format, files: Sequence[str], per_file: int, folder: Path | None, silent: bool):
        self._format, self._files, self._per_file, self._silent = format, files, per_file, silent
        self._writer = Writer(format, files)
        self._paths = output_paths(files, folder, format.suffix) if folder else {}
        self._parts: dict[str, list[str]] = {}  # of files that are not answered whole yet
        self._failed: set[str] = set()  # files that will not be

    def take(self, answer: Answer | Failure) -> None:
        """The next answer."""
        if isinstance(answer, Failure):
            self._failed.add(answer.file)
            if self._format is Format.json and not self._paths:
                print(json.dumps(answer.to_dict(), ensure_ascii=False), flush=True)
        elif self._paths:
            self._collect(answer)
        elif not self._silent:
            print(self._writer.write(answer), end="", flush=True)

    def _collect(self, answer: Answer) -> None:
        if answer.file in self._failed:
            return
        parts = self._parts.setdefault(answer.file, [])
        parts.append((self._writer if parts else Writer(self._format)).write(answer))
        if len(parts) == self._per_file:
            write_output(self._paths[answer.file], "".join(parts))
            del self._parts[answer.file]


def remark(answer: Answer | Failure, format: Format, longest: int) -> None:
    """One line on standard error about what is not as it should be. JSON tells itself what is no error."""
    if isinstance(answer, Failure):
        complain(f"error: {answer.error}")
        return
    about = answer.file or "the text"
    remarks = {
        "length": f"warning: {about}: the answer was cut: at most {longest} text pieces for one piece of audio",
        "repetition": f"warning: {about}: the model said the same again and again; it was cut to once",
        "timeout": f"warning: {about}: the answer was cut: time is up",
        "no_speech": f"note: {about}: {'no speech' if answer.file else 'answered with nothing'}",
        "abstained": f"note: {about}: withheld, its confidence is {answer.confidence:.2f}",
    }
    if format is not Format.json and answer.finish_reason in remarks:
        complain(remarks[answer.finish_reason])


def with_progress(answers: Iterator[Answer | Failure], files: int) -> Iterator[Answer | Failure]:
    """The same answers, with a bar on standard error while they are made, if someone is there to see it."""
    if files < 2 or not sys.stderr.isatty():
        yield from answers
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn

    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    # rich prints redirected output on its own console, standard error: answers may go there on a terminal only.
    with Progress(
        *columns, console=Console(stderr=True), transient=True, redirect_stdout=sys.stdout.isatty()
    ) as progress:
        bar = progress.add_task("", total=files)
        before = None
        for answer in answers:
            progress.advance(bar, answer.file != before)
            before = answer.file
            yield answer
