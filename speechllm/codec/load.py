"""A codec as a folder: ``config.json``, whose ``kind`` names the class, and ``model.safetensors``.

A folder of ``transformers`` (``config.json`` with a ``model_type``) and a name on its hub are opened too.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from speechllm.codec.encodec import EncodecCodec, EncodecConfig
from speechllm.codec.huggingface import KIND as HUGGING_FACE
from speechllm.codec.huggingface import HuggingFaceCodec, HuggingFaceConfig, is_hub_name
from speechllm.codec.speech import SpeechCodec, SpeechCodecConfig
from speechllm.errors import InputError, first_problem

WEIGHTS, CONFIG = "model.safetensors", "config.json"
KINDS: dict[str, tuple[type, type[BaseModel]]] = {
    "speech": (SpeechCodec, SpeechCodecConfig),
    "encodec": (EncodecCodec, EncodecConfig),
}
AnyCodec = SpeechCodec | EncodecCodec | HuggingFaceCodec


def save_codec(codec: AnyCodec, folder: Path, dtype: torch.dtype = torch.float32) -> None:
    """Write ``codec`` to ``folder``; trained floating-point weights are stored as ``dtype``."""
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(codec, HuggingFaceCodec):
        codec.save(folder, dtype)
        return
    weights = {
        name: (value.to(dtype) if value.is_floating_point() and not name.startswith("mel.") else value).clone()
        for name, value in codec.state_dict().items()
    }
    new = folder / f"{WEIGHTS}.new"
    save_file(weights, new)
    new.replace(folder / WEIGHTS)  # a process that is killed leaves the old ones
    kind = next(name for name, (cls, _) in KINDS.items() if type(codec) is cls)
    config = {"kind": kind, **codec.config.model_dump(mode="json")}
    (folder / CONFIG).write_text(json.dumps(config, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def load_codec(source: str | Path) -> AnyCodec:
    """The codec in a folder, or of a name on the hub (``org/name``), in float32 and in evaluation mode.

    Raises:
        InputError: a file is missing, damaged, or weights and config do not belong together.
    """
    folder = Path(source)
    if is_hub_name(source):
        return HuggingFaceCodec.pretrained(source)
    try:
        config = _read_config(folder)
        kind = config.pop("kind", None)
        if kind == HUGGING_FACE or (kind is None and "model_type" in config):
            return HuggingFaceCodec.pretrained(folder, HuggingFaceConfig(n_q=config.get("n_q") if kind else None))
        if not isinstance(kind, str) or kind not in KINDS:
            known = ", ".join((*KINDS, HUGGING_FACE))
            raise InputError(f"{folder / CONFIG}: unknown kind of codec {kind!r}; known are {known}")
        make, settings = KINDS[kind]
        codec: SpeechCodec | EncodecCodec = make(settings.model_validate(config))
        weights = load_file(folder / WEIGHTS)
        codec.load_state_dict({name: w.float() if w.is_floating_point() else w for name, w in weights.items()})
    except OSError as error:
        raise InputError(f"{folder}: not a codec folder ({error.strerror or error})") from error
    except ValidationError as error:
        raise InputError(f"{folder / CONFIG}: not a codec's config: {first_problem(error)}") from error
    except (SafetensorError, RuntimeError) as error:
        first = str(error).splitlines()[0]
        raise InputError(f"{folder / WEIGHTS}: damaged, or not the weights of this config: {first}") from error
    return codec.eval()


def copy_codec(source: str | Path, folder: Path) -> AnyCodec:
    """Put the codec at ``source`` into ``folder``: a codec folder of ours file by file, but for what is told about it
    there (``train.evaluate_codec``), any other as one of ours.

    Raises:
        InputError: as :func:`load_codec`.
    """
    codec = load_codec(source)
    if Path(source).is_dir() and "kind" in _read_config(Path(source)):
        told = shutil.ignore_patterns("README.md", "results.json", "*.png")
        shutil.copytree(source, folder, dirs_exist_ok=True, ignore=told)
    else:
        save_codec(codec, folder)
    return codec


def _read_config(folder: Path) -> dict[str, Any]:
    """Raises OSError, and InputError for what is no JSON object."""
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{folder / CONFIG}: not a codec's config: {error}") from error
    if not isinstance(config, dict):
        raise InputError(f"{folder / CONFIG}: not a codec's config: no JSON object")
    return config
