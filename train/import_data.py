"""Make a manifest of one's own data: ``python -m train.import_data SOURCE --out DIR``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from speechllm.data.columns import Columns, find_columns, parse_columns
from speechllm.data.corpus import MANIFEST
from speechllm.data.held_out import hold_out
from speechllm.data.imports import Importer, split_of
from speechllm.data.languages import language_code
from speechllm.data.manifest import Split, Utterance, write_manifest
from speechllm.data.sources import Source, read_source
from speechllm.errors import InputError
from speechllm.tasks.labels import EMOTIONS, emotion_named
from train.amounts import shown_time
from train.commands import plain_errors
from train.loop import progress_bar

REPORTED = 5  # bad rows listed before a failure


def fixed_split(source: Source, columns: Columns, split: Split | None, held_out: float | None) -> Split | None:
    """The split of every row; None where each row has its own.

    Raises:
        InputError: the data have splits of their own and one is given besides, or theirs is none of ours.
    """
    given = "--split" if split else "--held-out"
    if "split" in columns.known:
        if split or held_out:
            column = columns.known["split"]
            raise InputError(f"{given}: column {column!r} has the splits; leave {given} out, or add --columns split=")
        return None
    for name in source.splits:
        if not split_of(name) and not (split and len(source.splits) == 1):
            raise InputError(
                f"{source.name}: split {name!r} is none of train, validation and test; take it by --hub-split {name} "
                "--split train, or another by --hub-split"
            )
    if len(source.splits) > 1:
        if split or held_out:
            names = ", ".join(source.splits)
            raise InputError(f"{given}: {source.name} has the splits {names}; leave it out, or add --hub-split NAME")
        return None
    only = split or (split_of(source.splits[0]) if source.splits else "train")
    if held_out and only != "train":
        raise InputError(f"--held-out: takes from the train split, and these rows are in {only}; leave it out")
    return only


def import_rows(source: Source, importer: Importer, skip_bad: bool, console: Console) -> list[Utterance]:
    """All rows as utterances; each bad one is named on ``console``.

    Raises:
        InputError: a row is bad and ``skip_bad`` is not given, or none is left.
    """
    utterances: list[Utterance] = []
    bad = 0
    with progress_bar(console) as bar:
        task = bar.add_task(f"import {source.name}", total=source.count)
        for index, row in enumerate(source.rows):
            try:
                utterances.append(importer.utterance(index, row))
            except InputError as error:
                bad += 1
                if skip_bad or bad <= REPORTED:
                    verb = "skipped" if skip_bad else "bad"
                    # One line however narrow the terminal: it is made to be searched.
                    console.print(f"{verb}: {row.where}: {error}", markup=False, highlight=False, soft_wrap=True)
            bar.advance(task)
    rows = f"{bad} of {source.count} rows"
    if bad and not skip_bad:
        listed = f"the first {REPORTED} are listed above" if bad > REPORTED else "listed above"
        raise InputError(f"{source.name}: {rows} cannot be used, {listed}; mend them, or leave them out by --skip-bad")
    if bad:
        console.print(f"skipped {rows}", markup=False, highlight=False)
    if not utterances:
        raise InputError(f"{source.name}: no row can be used")
    return utterances


def import_data(
    source: Source,
    columns: Columns,
    out: Path,
    language: str | None,
    split: Split | None,
    held_out: float | None,
    skip_bad: bool,
    console: Console,
) -> list[Utterance]:
    """Write the manifest, and the audio that is not in files of its own; all of it or nothing."""
    importer = Importer(source, columns, out, language, fixed_split(source, columns, split, held_out))
    try:
        out.mkdir(parents=True, exist_ok=True)
        utterances = import_rows(source, importer, skip_bad, console)
        held = ""
        if held_out:
            utterances, held = hold_out(utterances, held_out)
        new = out / f"{MANIFEST}.new"
        write_manifest(new, utterances)
        importer.finish()
        new.replace(out / MANIFEST)
    except OSError as error:
        where = error.filename or out
        raise InputError(f"{where}: cannot be written ({error.strerror or error}); give another --out") from error
    finally:
        importer.discard()
    notes = [
        (importer.not_scalar, f"not used, as they hold no single values: {', '.join(sorted(importer.not_scalar))}"),
        (importer.without_split, f"{importer.without_split} without a split: taken as train"),
        (held, held),
    ]
    for there, note in notes:
        if there:
            console.print(note, markup=False, highlight=False, soft_wrap=True)
    return utterances


def shown(found: Columns) -> Iterator[str]:
    """A line for each column: what it is taken for, or that it is not used."""
    translations = {f"translation to {language}": column for language, column in found.translations.items()}
    labels = {f"label {name}": column for name, column in found.labels.items()}
    for name, column in (found.known | translations | labels).items():
        yield f"{name} <- {column}"
    if found.unused:
        yield f"not used: {', '.join(filter(None, found.unused)) or '(no name)'}"
    if found.facts:
        yield f"not used, as the audio itself tells it: {', '.join(found.facts)}"


def unknown(utterances: Sequence[Utterance]) -> Iterator[str]:
    """A line for each thing that is not known of some utterances, and how to tell it."""
    silent = sum(u.text is not None and not u.text.strip() for u in utterances)
    without = {
        "without a text: no task of words is trained on them (--columns text=NAME)": sum(
            u.text is None and not u.segments for u in utterances
        ),
        "without a language: give one by --language, for instance en": sum(u.language is None for u in utterances),
        "with an empty text: taken as audio without speech": silent,
        f"with an emotion that is none of {', '.join(EMOTIONS)}: no task of emotions is trained on them": sum(
            "emotion" in u.labels and emotion_named(u.labels["emotion"]) is None for u in utterances
        ),
    }
    for words, count in without.items():
        if count:
            yield f"{count} of {len(utterances)} {words}"


def main(
    source: Annotated[
        str,
        typer.Argument(
            help="a table with a header (.csv, .tsv) or of JSON objects (.jsonl), a .parquet file, a folder that the "
            "datasets library opens or has saved, or a name on the hub"
        ),
    ],
    out: Annotated[Path, typer.Option(help=f"folder for {MANIFEST} and, where audio is not in files, audio/")],
    split: Annotated[Split | None, typer.Option(help="of all rows, where the data have no splits; else train")] = None,
    language: Annotated[str | None, typer.Option(help="of rows that do not say theirs: en, German, …")] = None,
    columns: Annotated[
        str,
        typer.Option(
            help="NAME=COLUMN,…: audio, id, start and end (of an excerpt of the audio, in seconds), text, speaker, "
            "gender, language, intent, emotion, split, translation_de (or any language), translations (an object of "
            "language and text), segments, slots, or any label; found by common names unless given; NAME= uses none"
        ),
    ] = "",
    hub_split: Annotated[str | None, typer.Option(help="the one split of a data set to take; all unless given")] = None,
    config: Annotated[str | None, typer.Option(help="configuration of a data set on the hub")] = None,
    held_out: Annotated[
        float | None,
        typer.Option(help="share of the recordings that goes to dev: whole speakers; sentences, where none are known"),
    ] = None,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="leave out rows that cannot be used")] = False,
) -> None:
    """Make a manifest of one's own data. Audio files stay where they are; their paths are relative to the manifest.

    Excerpts of longer recordings are cut, into audio/.
    """
    console = Console(stderr=True)
    with plain_errors("stopped; nothing was written"):
        if (out / MANIFEST).exists():
            raise InputError(f"{out / MANIFEST}: is there already; give another --out, or remove it")
        if held_out is not None and not 0 < held_out < 1:
            raise InputError(f"--held-out {held_out:g}: give a share between 0 and 1, for instance 0.05")
        if language is not None:
            try:
                language = language_code(language)
            except InputError as error:
                raise InputError(f"--{error}") from error
        given = parse_columns(columns)
        rows = read_source(source, config, hub_split)
        found = find_columns(rows, given)
        for line in shown(found):
            console.print(line, markup=False, highlight=False, soft_wrap=True)
        utterances = import_data(rows, found, out, language, split, held_out, skip_bad, console)
    splits = ", ".join(f"{count} {name}" for name, count in Counter(u.split for u in utterances).items())
    speakers = len({u.speaker for u in utterances if u.speaker})
    length = shown_time(sum(u.duration for u in utterances))
    typer.echo(f"{out / MANIFEST}: {splits}; {length}, {speakers or 'no'} speakers named")
    for line in unknown(utterances):
        typer.echo(line, err=True)


if __name__ == "__main__":
    typer.run(main)
