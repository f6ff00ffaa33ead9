"""Manifests of either schema, one or several, read as a corpus.

A manifest whose rows have an ``id`` is in the schema of :mod:`speechllm.data.manifest`; one whose rows have none is
that of a recorded set (:mod:`speechllm.data.recorded`). A folder stands for the ``manifest.jsonl`` in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from speechllm.data.manifest import Split, Utterance, load_wav, read_manifest, read_records
from speechllm.data.recorded import read_recorded
from speechllm.errors import InputError

MANIFEST = "manifest.jsonl"  # in the folder of a set
FILTERED = "filtered.jsonl"  # what train.filter leaves of it


@dataclass(frozen=True)
class Item:
    """An utterance and the folder its audio path is relative to."""

    utterance: Utterance
    root: Path

    def wav(self, sample_rate: int) -> Tensor:
        """Mono audio ``[1, samples]`` at ``sample_rate``."""
        return load_wav(self.utterance, self.root, sample_rate)


def manifest_of(path: str | Path) -> Path:
    """The manifest that a path stands for; InputError when it is a folder without one."""
    path = Path(path)
    if not path.is_dir():
        return path
    if not (path / MANIFEST).is_file():
        raise InputError(f"{path}: no {MANIFEST} in this folder")
    return path / MANIFEST


def read_utterances(path: str | Path) -> list[Utterance]:
    """The utterances of a manifest, or of the folder of one, in file order.

    Raises InputError, naming file and line, when it is not there or a line is not valid.
    """
    manifest = manifest_of(path)
    _, first = next(iter(read_records(manifest)), (0, {"id": ""}))
    return read_manifest(manifest) if "id" in first else read_recorded(manifest)


def read_corpus(
    paths: Sequence[str | Path], split: Split, may_be_empty: bool = False, texts: bool = False
) -> list[Item]:
    """The recordings of one split of several manifests, or folders of manifests.

    texts: and what is a text alone.

    Raises:
        InputError: a path does not exist or a line is not valid, or nothing of the split is in any of them (unless it
            ``may_be_empty``).
    """
    items = []
    for path in paths:
        root, found = manifest_of(path).parent, read_utterances(path)
        items += [Item(u, root) for u in found if u.split == split and (texts or not u.is_text)]
    if not items and not may_be_empty:
        raise InputError(f"no {split} utterance in {', '.join(map(str, paths)) or 'an empty list of manifests'}")
    return items
