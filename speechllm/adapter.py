"""LoRA adapters (Hu et al. 2021): a folder of a few MB that changes what a checkpoint's language model knows.

adapter_config.json, adapter_model.safetensors    PEFT's own format
adapter.json                                      name, tasks, and the fingerprints of the checkpoint it belongs to

An adapter is merged into the weights when it is loaded: decoding then costs what it does without one, in every
implementation of attention and experts. To change adapters is to load the checkpoint again.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import speechllm._torchaudio  # noqa: F401  # before transformers, whose models import torchaudio

# isort: split
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from speechllm.codec.base import hash_tensors
from speechllm.errors import InputError, first_problem
from speechllm.folders import replaced
from speechllm.model import LOADING_ERRORS

FOLDER = "adapters"  # of a checkpoint's adapters, each by its name
SETTINGS, WEIGHTS = "adapter.json", "adapter_model.safetensors"
PREFIX = "base_model.model."  # of names in PEFT's files


class AdapterSettings(BaseModel):
    """The contents of ``adapter.json``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    checkpoint: str  # its name
    fingerprint: str  # of the checkpoint's vocabulary
    lm_fingerprint: str
    tasks: tuple[str, ...]  # that it was trained on


def lm_fingerprint(folder: Path) -> str:
    """Sixteen hexadecimal digits for the weights in ``folder``, however they are divided into files."""
    digests = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  # not a mapping
                digests[name] = hash_tensors({name: tensors.get_tensor(name)})
    return hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()[:16]


def save_adapter(folder: Path, lm: PreTrainedModel, weights: Mapping[str, Tensor], settings: AdapterSettings) -> None:
    """Write the LoRA of ``lm``, whose values are in ``weights`` under the names of its parameters.

    The folder is replaced as a whole when all is written.
    """
    from peft import get_peft_model_state_dict

    with replaced(folder) as new:
        state = get_peft_model_state_dict(lm, dict(weights), save_embedding_layers=False)
        save_file({PREFIX + name: value.contiguous() for name, value in state.items()}, new / WEIGHTS, {"format": "pt"})
        lm.peft_config["default"].save_pretrained(str(new))
        (new / SETTINGS).write_text(settings.model_dump_json(indent=1) + "\n", encoding="utf-8")
        (new / WEIGHTS).chmod((new / SETTINGS).stat().st_mode)  # safetensors makes files that nobody else may read


def adapter_names(checkpoint: Path) -> list[str]:
    """The adapters in a checkpoint's own folder."""
    return sorted(path.parent.name for path in (checkpoint / FOLDER).glob(f"*/{SETTINGS}"))


def find_adapter(checkpoint: Path, name: str | Path) -> Path:
    """The folder of an adapter: the one of that name among those of the checkpoint, else ``name`` as a path.

    Raises:
        InputError: there is neither.
    """
    for folder in (checkpoint / FOLDER / name, Path(name)):
        if (folder / SETTINGS).is_file():
            return folder
    known = ", ".join(adapter_names(checkpoint)) or "none"
    raise InputError(f"adapter {name}: no such folder with {SETTINGS} in it; those in {checkpoint / FOLDER}: {known}")


def read_adapter(folder: Path) -> AdapterSettings:
    """The settings of an adapter. Raises InputError when they are missing or damaged."""
    path = folder / SETTINGS
    try:
        return AdapterSettings.model_validate_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    except ValidationError as error:
        raise InputError(f"{path}: not an adapter's settings: {first_problem(error)}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not an adapter's settings: not UTF-8") from error


def describe_adapter(checkpoint: Path, name: str) -> str:
    """What an adapter in a checkpoint's own folder is for, or why it cannot be used."""
    try:
        return f"trained on {', '.join(read_adapter(checkpoint / FOLDER / name).tasks)}"
    except InputError as error:
        return str(error)


def merge_adapter(lm: PreTrainedModel, lm_folder: Path, fingerprint: str, folder: Path) -> AdapterSettings:
    """Add the adapter in ``folder`` to the weights of ``lm``, which were read from ``lm_folder``.

    fingerprint: of the checkpoint's vocabulary.

    Raises:
        InputError: a file is missing or damaged, or the adapter was trained on another model.
    """
    settings = read_adapter(folder)
    for fits, other in (
        (settings.fingerprint == fingerprint, "vocabulary"),
        (settings.lm_fingerprint == lm_fingerprint(lm_folder), "language model"),
    ):
        if not fits:
            raise InputError(
                f"{folder}: an adapter of another {other}: it was trained on the checkpoint {settings.checkpoint!r}: "
                "load it with that one"
            )
    # PEFT takes seconds to import: only where there is an adapter
    from peft import LoraConfig, get_peft_model, set_peft_model_state_dict

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about what PEFT and transformers will rename
            adapted = get_peft_model(lm, LoraConfig.from_pretrained(str(folder)))
            result: Any = set_peft_model_state_dict(adapted, load_file(folder / WEIGHTS, str(lm.device)))
    except (*LOADING_ERRORS, KeyError, AttributeError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise InputError(f"{folder}: the adapter cannot be loaded: {reason}") from error
    missing = [name for name in result.missing_keys if "lora_" in name]
    if missing or result.unexpected_keys:
        raise InputError(f"{folder}: {WEIGHTS} does not hold what adapter_config.json says: get the folder anew")
    adapted.merge_and_unload().requires_grad_(True)  # as without an adapter
    return settings
