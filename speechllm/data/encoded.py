"""A corpus as codes: parquet shards written once by ``train.encode`` and read through ``datasets``."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from datasets.exceptions import DatasetGenerationError
from pydantic import TypeAdapter
from torch import Tensor

from speechllm.codec import Codec
from speechllm.errors import InputError
from speechllm.tasks import Facts

INFO = "info.json"  # of the codec that made the codes
_FACTS = TypeAdapter(Facts)
_COPY = re.compile(r"#[1-9]\d*$")


def read_encoded(
    folders: Sequence[str | Path], split: str, codec: Codec | None = None, may_be_empty: bool = False
) -> Dataset:
    """The rows of one split of several encoded corpora.

    Columns: ``id``, ``split``, ``source``, ``speaker``; ``facts``, see :func:`row_facts`; and ``codes``, int16,
    flattened ``[n_q * frames]``, with ``n_q``.

    Raises:
        InputError: a folder holds no shards, a file is damaged, no row is of the split (unless it ``may_be_empty``),
            or a corpus was not encoded with ``codec``.
    """
    files: list[str] = []
    for folder in map(Path, folders):
        shards = sorted(folder.glob("*.parquet"))
        if not shards or not (folder / INFO).is_file():
            raise InputError(f"{folder}: not an encoded corpus; make it with python -m train.encode")
        try:
            info = json.loads((folder / INFO).read_text(encoding="utf-8"))
            if "shards" not in info:
                raise InputError(f"{folder}: encoded by an older version; encode it again with python -m train.encode")
            if len(shards) != info["shards"]:
                raise InputError(
                    f"{folder}: {len(shards)} of {info['shards']} shards are there; go on with python -m train.encode"
                )
            fits = codec is None or info["codec"] == codec.fingerprint(info["n_q"])
        except InputError:
            raise
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{folder / INFO}: damaged; encode again with python -m train.encode") from error
        if not fits:
            raise InputError(f"{folder}: encoded with another codec; encode it again with python -m train.encode")
        files += map(str, shards)
    try:
        rows = Dataset.from_parquet(files)
    except (DatasetGenerationError, ValueError) as error:  # a bad footer is a ValueError of pyarrow
        reason = str(error.__cause__ or error).splitlines()[0]
        raise InputError(
            f"{', '.join(map(str, folders))}: a shard is damaged ({reason}): remove it and run train.encode again"
        ) from error
    rows = rows.filter(lambda splits: [s == split for s in splits], input_columns="split", batched=True)
    if not len(rows) and not may_be_empty:
        raise InputError(f"no {split} row in {', '.join(map(str, folders))}")
    return rows


def copy_id(name: str, copy: int) -> str:
    """The id of an utterance's row; all but the first of its copies are varied."""
    return f"{name}#{copy}" if copy or _COPY.search(name) else name


def is_varied(row: dict) -> bool:
    """Whether the row is a copy, which sounds as if from another speaker and place: see :func:`copy_id`."""
    return _COPY.search(row["id"]) is not None


def row_codes(row: dict, n_q: int) -> Tensor:
    """The first ``n_q`` codebooks of a row, int64 ``[n_q, frames]``."""
    flat = torch.from_numpy(np.asarray(row["codes"], dtype=np.int64))
    codes = flat.view(row["n_q"], len(flat) // row["n_q"])  # no frames of a text alone
    if n_q > len(codes):
        raise InputError(f"{row['id']}: encoded with {len(codes)} codebooks, {n_q} are asked for; encode it again")
    return codes[:n_q]


def write_facts(facts: Facts) -> str:
    """As JSON, for the column ``facts``."""
    return _FACTS.dump_json(facts, exclude_defaults=True).decode()


def stretched(facts: Facts, factor: float) -> Facts:
    """The same, said ``factor`` times as slowly."""
    segments = tuple(
        replace(segment, start=segment.start * factor, end=segment.end * factor) for segment in facts.segments
    )
    return replace(facts, duration=facts.duration * factor, segments=segments)


def row_facts(row: dict) -> Facts:
    """What is known about the utterance of a row."""
    return _FACTS.validate_json(row["facts"])
