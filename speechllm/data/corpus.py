"""Several manifests read as one corpus."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from speechllm.data.manifest import Split, Utterance, load_wav, read_manifest
from speechllm.data.recorded import read_recorded
from speechllm.errors import InputError


@dataclass(frozen=True)
class Item:
    """An utterance and the folder its audio path is relative to."""

    utterance: Utterance
    root: Path

    def wav(self, sample_rate: int) -> Tensor:
        """Mono audio ``[1, samples]`` at ``sample_rate``."""
        return load_wav(self.utterance, self.root, sample_rate)


def read_corpus(paths: Sequence[str | Path], split: Split, may_be_empty: bool = False) -> list[Item]:
    """The utterances of one split: a path is a manifest of ours, or the folder of a recorded set.

    Raises:
        InputError: a path does not exist or a line is not valid, or nothing of the split is in any of them (unless it
            ``may_be_empty``).
    """
    items = []
    for path in map(Path, paths):
        folder = path.is_dir()
        utterances = read_recorded(path) if folder else read_manifest(path)
        items += [Item(u, path if folder else path.parent) for u in utterances if u.split == split]
    if not items and not may_be_empty:
        raise InputError(f"no {split} utterance in {', '.join(map(str, paths)) or 'an empty list of manifests'}")
    return items
