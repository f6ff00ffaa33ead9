"""What is finished of an evaluation, kept in a file, so that an interrupted one goes on where it was."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from speechllm.adapter import WEIGHTS, find_adapter, lm_fingerprint
from speechllm.checkpoint import LM
from speechllm.checkpoint_settings import CheckpointSettings
from speechllm.data.manifest import read_records
from speechllm.errors import InputError
from train.output import write_whole

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Part = TypeVar("Part", bound="DataclassInstance")


class Kept(Generic[Part]):
    """Finished parts in ``path``, each by a name and beside a fingerprint of all that it depends on.

    read: makes a part of what JSON holds of it.

    Raises InputError where the file is damaged.
    """

    def __init__(self, path: Path, read: Callable[[dict[str, Any]], Part]) -> None:
        self.path = path
        self.parts: dict[str, tuple[str, Part]] = {}
        try:
            for _, line in read_records(path) if path.exists() else ():
                self.parts[line["part"]] = (line["fingerprint"], read(line["found"]))
        except (InputError, KeyError, TypeError) as error:
            raise InputError(f"{path}: damaged ({error}); delete it to evaluate again") from error

    def found(self, name: str, fingerprint: str) -> Part | None:
        """None where it is not there. Raises InputError where it depended on something else."""
        known, part = self.parts.get(name, (fingerprint, None))
        if known != fingerprint:
            raise InputError(
                f"{self.path}: {name} was asked with other settings, sets or another checkpoint: delete the file to "
                "evaluate again, or give another --out"
            )
        return part

    def keep(self, name: str, fingerprint: str, part: Part) -> None:
        """Add a part; the file is replaced as a whole, so that an interruption leaves the old one."""
        self.parts[name] = (fingerprint, part)
        lines = [
            json.dumps({"part": own, "fingerprint": known, "found": asdict(found)}, ensure_ascii=False)
            for own, (known, found) in self.parts.items()
        ]
        write_whole(self.path, "\n".join(lines) + "\n")


def file_digest(path: Path) -> str:
    """SHA-256 of what is in a file, in hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as content:
        while block := content.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def weights_fingerprint(model: Path, settings: CheckpointSettings, adapter: str | None) -> str:
    """Of weights and settings (without the calibration: no answer depends on it), sixteen hexadecimal digits."""
    told = settings.model_dump_json(exclude={"confidence_temperature"})
    digest = hashlib.sha256(f"{told} {lm_fingerprint(model / LM)}".encode())
    if adapter is not None:
        digest.update((find_adapter(model, adapter) / WEIGHTS).read_bytes())
    return digest.hexdigest()[:16]
