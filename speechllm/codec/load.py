"""A codec as a folder: ``config.json``, whose ``kind`` names the class, and ``model.safetensors``."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from pydantic import BaseModel, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from speechllm.codec.encodec import EncodecCodec, EncodecConfig
from speechllm.codec.speech import SpeechCodec, SpeechCodecConfig
from speechllm.errors import InputError, first_problem

WEIGHTS, CONFIG = "model.safetensors", "config.json"
KINDS: dict[str, tuple[type, type[BaseModel]]] = {
    "speech": (SpeechCodec, SpeechCodecConfig),
    "encodec": (EncodecCodec, EncodecConfig),
}


def save_codec(codec: SpeechCodec | EncodecCodec, folder: Path, dtype: torch.dtype = torch.float32) -> None:
    """Write ``codec`` to ``folder``; trained floating-point weights are stored as ``dtype``."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {
        name: (value.to(dtype) if value.is_floating_point() and not name.startswith("mel.") else value).clone()
        for name, value in codec.state_dict().items()
    }
    save_file(weights, folder / WEIGHTS)
    kind = next(name for name, (cls, _) in KINDS.items() if type(codec) is cls)
    config = {"kind": kind, **codec.config.model_dump(mode="json")}
    (folder / CONFIG).write_text(json.dumps(config, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def load_codec(folder: str | Path) -> SpeechCodec | EncodecCodec:
    """The codec in ``folder``, in float32 and in evaluation mode.

    Raises:
        InputError: a file is missing, damaged, or weights and config do not belong together.
    """
    folder = Path(folder)
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        kind = config.pop("kind")
        if kind not in KINDS:
            raise InputError(f"{folder / CONFIG}: unknown kind of codec {kind!r}; known are {', '.join(KINDS)}")
        make, settings = KINDS[kind]
        codec: SpeechCodec | EncodecCodec = make(settings.model_validate(config))
        weights = load_file(folder / WEIGHTS)
        codec.load_state_dict({name: w.float() if w.is_floating_point() else w for name, w in weights.items()})
    except OSError as error:
        raise InputError(f"{folder}: not a codec folder ({error.strerror or error})") from error
    except ValidationError as error:
        raise InputError(f"{folder / CONFIG}: not a codec's config: {first_problem(error)}") from error
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{folder / CONFIG}: not a codec's config: {error}") from error
    except (SafetensorError, RuntimeError) as error:
        first = str(error).splitlines()[0]
        raise InputError(f"{folder / WEIGHTS}: damaged, or not the weights of this config: {first}") from error
    return codec.eval()
