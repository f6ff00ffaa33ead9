"""Readers of a user's own data: tables (CSV, TSV, JSON Lines) and whatever the `datasets` library opens."""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from datasets import Audio, ClassLabel, Dataset, DatasetDict, Value, load_dataset, load_from_disk

from speechllm.data.manifest import read_json_lines
from speechllm.errors import InputError

TABLES = (".csv", ".tsv", ".jsonl")
_FEW = 10  # splits named in a message
_SEPARATORS = {",": "commas", "\t": "tabs", ";": "semicolons", "|": "bars"}


@dataclass(frozen=True)
class Row:
    """One row. `where` names it to the user; `problem` says why it cannot be read ("" when it can)."""

    where: str
    values: dict[str, Any]
    split: str | None = None
    problem: str = ""


@dataclass(frozen=True)
class Source:
    """What a reader found. `rows` can be gone through once.

    folder: what relative audio paths are relative to. audio: columns that hold audio by their type.
    splits: names of the data set's splits; none for a table.
    """

    name: str
    folder: Path
    columns: tuple[str, ...]
    audio: tuple[str, ...]
    splits: tuple[str, ...]
    count: int
    rows: Iterator[Row]


def read_source(source: str, config: str | None = None, split: str | None = None) -> Source:
    """Open a table, a folder, a parquet file, or a data set on the hub.

    config, split: of a data set; all of its splits unless one is given.
    Raises InputError when it does not exist, cannot be read, holds no row, or has no such split.
    """
    path = Path(source)
    suffix = path.suffix.lower()
    if suffix in TABLES and not path.is_dir():
        if config or split:
            raise InputError(f"--config and --hub-split are for data sets, and {source} is a table: leave them out")
        if not path.is_file():
            raise InputError(f"{source}: no such file")
        columns, rows = _json_lines(path) if suffix == ".jsonl" else _delimited(path)
        if not rows:
            raise InputError(f"{source}: holds no rows")
        return Source(source, path.parent, columns, (), (), len(rows), iter(rows))
    return _data_set(source, _open(source, config), split)


def _delimited(path: Path) -> tuple[tuple[str, ...], list[Row]]:
    """Columns and rows of a CSV or TSV file with a header; an empty cell is None."""
    rows: list[Row] = []
    line = 1
    tabs = path.suffix.lower() == ".tsv"
    with _text(path) as file:
        _check_separator(path, file.readline(), "\t" if tabs else ",")
        file.seek(0)
        # In TSV files quotes are mostly plain text (Common Voice): as quotes they would swallow whole lines.
        quoted = None if tabs else csv.reader(file, strict=True)
        reader = quoted or csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        try:
            header = [(_unquoted(cell) if tabs else cell).strip() for cell in next(reader, [])]
            if not any(header):
                raise InputError(f"{path}: its first line must name the columns, and is empty")
            if twice := sorted({name for name in header if name and header.count(name) > 1}):
                raise InputError(f"{path}: two columns are named {twice[0]!r}; rename one")
            line = reader.line_num + 1
            for cells in reader:
                values = dict(zip(header, map(_unquoted, cells) if tabs else cells, strict=False))
                problem = "" if len(cells) == len(header) else f"{len(cells)} cells, the header has {len(header)}"
                if cells:
                    known = {name: value if value.strip() else None for name, value in values.items()}
                    rows.append(Row(f"line {line}", known, problem=problem))
                line = reader.line_num + 1
        except csv.Error as error:
            raise InputError(f"{path}, line {line}: not a valid row ({error})") from error
    return tuple(header), rows


def _check_separator(path: Path, header: str, wanted: str) -> None:
    """Raises InputError when it is plain that the cells are separated by something else."""
    other = max(_SEPARATORS, key=header.count)
    if wanted not in header and other in header:
        raise InputError(
            f"{path}: the cells of a {path.suffix.lower()} file are separated by {_SEPARATORS[wanted]}, and its first "
            f"line has {_SEPARATORS[other]} instead; save it with commas as .csv, or with tabs as .tsv"
        )


def _unquoted(cell: str) -> str:
    """A cell of a TSV file without the quotes a program put around it: those inside are then doubled."""
    inner = cell[1:-1]
    if len(cell) > 1 and cell[0] == cell[-1] == '"' and '"' not in inner.replace('""', ""):
        return inner.replace('""', '"')
    return cell


def _json_lines(path: Path) -> tuple[tuple[str, ...], list[Row]]:
    with _text(path) as file:
        rows = [Row(f"line {number}", record) for number, record in read_json_lines(path, file)]
    return tuple(dict.fromkeys(key for row in rows for key in row.values)), rows


@contextmanager
def _text(path: Path) -> Iterator[TextIO]:
    """An open UTF-8 text file, with or without a byte order mark, its line ends as they are."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            yield file
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not a UTF-8 text file; save it as UTF-8") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error


def _open(source: str, config: str | None) -> Dataset | DatasetDict:
    path = Path(source)
    saved = path.is_dir() and ((path / "dataset_dict.json").is_file() or (path / "dataset_info.json").is_file())
    if saved and config:
        raise InputError(f"--config {config}: {source} was saved to disk and has no configurations; leave it out")
    if path.is_file() and path.suffix.lower() != ".parquet":
        raise InputError(f"{source}: give a {', '.join(TABLES)} or .parquet file, a folder, or a name on the hub")
    looks_local = source.startswith(("/", ".", "~")) or source.count("/") > 1 or path.suffix.lower() == ".parquet"
    if not path.exists() and looks_local:
        raise InputError(f"{source}: no such file or folder")
    try:
        with _audio_as_stored():
            if saved:
                return load_from_disk(source)
            if path.is_file():
                return load_dataset("parquet", config, data_files=source)
            return load_dataset(source, config)
    except Exception as error:  # the library raises many kinds, and all of them are about the source
        words = str(error.__cause__ or error).strip() or type(error).__name__
        what = (
            "cannot be opened as a data set"
            if path.exists()
            else "no such file or folder, and the hub does not give it"
        )
        raise InputError(f"{source}: {what} ({words.splitlines()[0]})") from error


@contextmanager
def _audio_as_stored() -> Iterator[None]:
    """Data sets of audio files are made without torchcodec, which `datasets` asks for even to note a path."""
    original = Audio.encode_example

    def encode_example(self: Audio, value: Any) -> dict[str, Any]:
        if isinstance(value, str | Path):
            return {"bytes": None, "path": str(value)}
        if isinstance(value, bytes):
            return {"bytes": value, "path": None}
        if isinstance(value, Mapping) and "array" not in value:
            return {"bytes": value.get("bytes"), "path": value.get("path")}
        return original(self, value)

    Audio.encode_example = encode_example
    try:
        yield
    finally:
        Audio.encode_example = original


def _data_set(source: str, data: Dataset | DatasetDict, split: str | None) -> Source:
    parts: dict[str, Dataset] = dict(data) if isinstance(data, DatasetDict) else {str(data.split or "train"): data}
    if split is not None:
        if split not in parts:
            raise InputError(f"--hub-split {split}: {source} has {', '.join(list(parts)[:_FEW])}")
        parts = {split: parts[split]}
    count = sum(map(len, parts.values()))
    if not count:
        raise InputError(f"{source}: holds no rows")
    features = {name: feature for part in parts.values() for name, feature in part.features.items()}
    return Source(
        name=source,
        folder=Path(source) if Path(source).is_dir() else Path(source).parent,
        columns=tuple(features),
        audio=tuple(name for name, feature in features.items() if _holds_audio(feature)),
        splits=tuple(parts),
        count=count,
        rows=(row for name, part in parts.items() for row in _rows(name, part)),
    )


def _holds_audio(feature: Any) -> bool:
    return isinstance(feature, Audio) or (isinstance(feature, dict) and feature.get("bytes") == Value("binary"))


def _rows(split: str, part: Dataset) -> Iterator[Row]:
    classes = {name: feature for name, feature in part.features.items() if isinstance(feature, ClassLabel)}
    for name, feature in part.features.items():
        if getattr(feature, "decode", False):  # audio and pictures stay the bytes they are
            part = part.cast_column(name, dataclasses.replace(feature, decode=False))
    for index, values in enumerate(part):
        for name, feature in classes.items():
            known = values[name] is not None and values[name] >= 0  # -1 stands for unknown
            values[name] = feature.int2str(values[name]) if known else None
        yield Row(f"{split}[{index}]", values, split)
