"""Corpora of a user's own for fine-tuning: checked against the checkpoint, and encoded where they are manifests."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from speechllm.checkpoint import CODEC
from speechllm.checkpoint_settings import CheckpointSettings
from speechllm.codec import Codec, load_codec
from speechllm.data.corpus import MANIFEST, manifest_of, read_utterances
from speechllm.data.encoded import INFO, read_encoded, row_facts
from speechllm.data.manifest import Split
from speechllm.errors import InputError
from train.encode import encode_corpus
from train.finetune_config import Finetuning
from train.ranks import by_first

CODES = "codes"  # in the folder of a run: manifests that it encoded, each in a folder of its own


@dataclass(frozen=True)
class OwnData:
    """The corpora of a run; ``rank`` is the one of this process."""

    config: Finetuning
    checkpoint: CheckpointSettings
    rank: int

    @cached_property
    def codec(self) -> Codec:
        """The checkpoint's."""
        return load_codec(self.config.model / CODEC)

    def ready(self) -> Finetuning:
        """The settings with encoded corpora alone; what is a manifest is encoded first, by rank 0.

        Raises:
            InputError: a file is missing or damaged, a split is empty, or a clip is longer than the checkpoint allows;
                a corpus is named twice, or what a pretraining needs is not so.
        """
        config, replay = self.config, self.config.replay
        paths = [*config.corpora, *config.scored(), *config.replayed(), *(replay.dev_corpora if replay else ())]
        found = {path: self.encoded_as(path) for path in paths}
        manifests: dict[Path, Path] = {}  # folder of codes -> manifest
        for path, folder in found.items():
            if folder != path:
                manifest = manifest_of(path).resolve()
                if manifests.setdefault(folder, manifest) != manifest:
                    raise InputError(f"{path}: {folder} is for {manifests[folder]}: encode one of the two beforehand")
        self.check_distinct(found)
        for path in config.corpora:
            self.check_lengths(path, "train", "have train.import_data make it so (--split)")
        for path in config.scored():
            self.check_lengths(path, "dev", "split some off (train.import_data --held-out), or set dev_corpora")
        for path in config.replayed():
            self.check_lengths(path, "train", "leave it out of replay.corpora", leave_out=True)
        for path in replay.dev_corpora if replay else ():
            self.check_lengths(path, "dev", "leave it out of replay.dev_corpora", leave_out=True)
        changes: dict[str, Any] = {
            "corpora": {found[path]: weight for path, weight in config.corpora.items()},
            "dev_corpora": [found[path] for path in config.scored()],
        }
        if replay:
            corpora = {found[path]: weight for path, weight in config.replayed().items()}
            dev_corpora = [found[path] for path in replay.dev_corpora]
            changes["replay"] = replay.model_copy(update={"corpora": corpora, "dev_corpora": dev_corpora})
        ready = config.model_copy(update=changes)
        ready.pretraining(self.checkpoint)  # what does not fit is told before hours of encoding
        by_first(lambda: self.encode(manifests))
        return ready

    def check_distinct(self, found: dict[Path, Path]) -> None:
        """Raises InputError when a corpus that is trained on is named twice. found: corpus -> folder of its codes."""
        named: dict[Path, str] = {}  # folder of codes, resolved -> where it was named first
        for setting, corpora in (("corpora", self.config.corpora), ("replay.corpora", self.config.replayed())):
            for path in corpora:
                other = named.setdefault(found[path].resolve(), where := f"{path} in {setting}")
                if other != where:
                    raise InputError(f"{where} is the same corpus as {other}: leave one of them out")

    def check_lengths(self, path: Path, split: Split, way_out: str, leave_out: bool = False) -> None:
        """Raises InputError when ``path`` has nothing of ``split``, or clips that are too long.

        leave_out: say that those are left out, whatever the settings are.
        """
        if is_manifest(path):
            durations = [utterance.duration for utterance in read_utterances(path) if utterance.split == split]
        else:
            rows = read_encoded([path], split, self.codec, may_be_empty=True)
            durations = [row_facts({"facts": facts}).duration for facts in rows["facts"]]
        if not durations:
            raise InputError(f"{path}: holds no {split} utterance: {way_out}")
        limit = self.checkpoint.max_audio_seconds
        longer = [duration for duration in durations if duration > limit]
        if not longer:
            return
        found = f"{path}: {len(longer)} of {len(durations)} {split} utterances are longer than the {limit:g} s that"
        found += f" {self.config.model} was trained on, the longest {max(longer):.1f} s"
        if not (leave_out or self.config.leave_out_longer):
            raise InputError(f"{found}: cut them at pauses, or set leave_out_longer to true")
        if self.rank == 0:
            print(f"{found}: left out")

    def encoded_as(self, path: Path) -> Path:
        """The folder with the codes of a corpus: where a manifest's will be, or the corpus itself."""
        if not is_manifest(path):
            return path
        manifest = manifest_of(path).resolve()
        folder = manifest.parent.name
        name = folder if manifest.name == MANIFEST else f"{folder}-{manifest.stem}"
        return self.config.out / CODES / name

    def encode(self, manifests: dict[Path, Path]) -> None:
        """Encode what is not encoded yet; folder of codes -> manifest. Raises InputError, also for a full disk."""
        jobs = max(1, self.config.loader_workers)
        for folder, manifest in manifests.items():
            n_q = int(self.checkpoint.vocabulary["n_q"])
            try:
                encode_corpus(manifest, self.config.model / CODEC, folder, n_q, copies=1, jobs=jobs)
            except OSError as error:
                reason = (str(error) or type(error).__name__).splitlines()[0]
                raise InputError(
                    f"{folder}: {manifest} cannot be encoded ({reason}): make room or set another 'out', start again"
                ) from error


def is_manifest(path: Path) -> bool:
    """Whether a corpus is a manifest, or the folder of one, rather than what ``train.encode`` wrote."""
    return not (path / INFO).is_file() and (path.suffix == ".jsonl" or (path / MANIFEST).is_file())
