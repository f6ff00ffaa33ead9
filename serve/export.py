"""`speechllm export`: a checkpoint's language model for vLLM, or any other tool that loads a Hugging Face causal LM.

What is written knows ids alone: no tokenizer, no codec. Whoever asks it makes prompts and reads answers with the
checkpoint itself, as `serve.vllm` does.
"""

from __future__ import annotations

import hashlib
import re
import shlex
import sys
from contextlib import redirect_stdout
from enum import Enum
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any

import typer

from serve.loading import AdapterOption, Device, ModelOption, load
from serve.plain_errors import plain_errors
from speechllm.errors import InputError

if TYPE_CHECKING:
    from speechllm.checkpoint import Checkpoint

_CARD = """# {name}

The language model of the speechllm checkpoint `{name}`: a Hugging Face causal LM, in {dtype}, over {size} ids, which
are pieces of text, marks and codes of audio. There is no tokenizer here; `speechllm` makes the prompts and reads the
answers, with the checkpoint that this was exported from.

To serve it with vLLM, in this folder:

    {command}

To have it answer, where the checkpoint is:

    speechllm serve {options}--vllm http://HOST:8001
"""


class Dtype(str, Enum):
    bfloat16 = "bfloat16"
    float32 = "float32"


def export(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Where to write it; must not exist, or be empty.")],
    model: ModelOption = None,
    adapter: AdapterOption = None,
    dtype: Annotated[Dtype, typer.Option(help="Type of the weights.")] = Dtype.bfloat16,
) -> None:
    """Write the language model for vLLM.

    An adapter is merged into the weights. The README.md beside them has the command that serves them.
    """
    with plain_errors():
        check_folder(folder)
        checkpoint = load(model, Device.cpu, adapter)
        name = served_name(checkpoint, adapter)
        write_export(folder, checkpoint, name, dtype, adapter)
        print(f"{folder}: {name}, see its README.md", flush=True)


def served_name(checkpoint: Checkpoint, adapter: str | None = None) -> str:
    """What vLLM is to call the LM: the checkpoint's name, and digits that tell its weights, its ids and its adapter.

    An export of anything else does not answer to it.
    """
    from speechllm.adapter import WEIGHTS, find_adapter, lm_fingerprint
    from speechllm.checkpoint import LM

    parts = [checkpoint.settings.fingerprint, lm_fingerprint(checkpoint.folder / LM)]
    if adapter is not None:
        weights = find_adapter(checkpoint.folder, adapter) / WEIGHTS
        parts.append(hashlib.sha256(weights.read_bytes()).hexdigest())
    digits = hashlib.sha256(" ".join(parts).encode()).hexdigest()[:8]
    return f"{re.sub(r'[^A-Za-z0-9._]+', '-', checkpoint.settings.name).strip('-')}-{digits}"


def check_folder(folder: Path) -> None:
    """Raises InputError where something is in the way."""
    if folder.is_dir() and any(folder.iterdir()):
        raise InputError(f"{folder}: there are files in it; name a new folder")
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder}: not a folder; name a new one")


def write_export(folder: Path, checkpoint: Checkpoint, name: str, dtype: Dtype, adapter: str | None = None) -> None:
    """Write the LM to ``folder``, all of it or nothing.

    checkpoint: its LM has that type afterwards. name: to be served by. adapter: that is merged into it.

    Raises:
        InputError: something is in the way, or the folder cannot be written to.
    """
    import torch
    from transformers import GenerationConfig

    check_folder(folder)
    lm: Any = checkpoint.lm.to(getattr(torch, dtype.value))
    vocabulary = checkpoint.vocabulary
    # not what the LM it was made from had: vLLM would draw and penalize as that one's authors liked it
    lm.generation_config = GenerationConfig(eos_token_id=vocabulary.end, pad_token_id=vocabulary.pad)
    if hasattr(lm.config, "output_router_logits"):
        lm.config.output_router_logits = False  # for training; generate fails with it
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as parent:
            new = Path(parent) / folder.name
            with redirect_stdout(sys.stderr):  # DeepSpeed, where it is installed, says something when it is imported
                lm.save_pretrained(new)
            (new / "README.md").write_text(_card(checkpoint, name, dtype, adapter), encoding="utf-8")
            for file in new.iterdir():  # safetensors makes files that nobody else may read
                file.chmod((new / "README.md").stat().st_mode)
            new.rename(folder)
    except OSError as error:
        raise InputError(f"{folder}: cannot be written ({error.strerror}); name another folder") from error


def _card(checkpoint: Checkpoint, name: str, dtype: Dtype, adapter: str | None) -> str:
    from serve.vllm_client import MOST_IDS
    from speechllm.adapter import find_adapter
    from speechllm.checkpoint_settings import DEFAULT
    from speechllm.grammar import Grammars
    from speechllm.tasks import TASKS

    text = int(Grammars(checkpoint.vocabulary, checkpoint.text).of(TASKS["transcribe"]).allowed(None).sum())
    size = checkpoint.vocabulary.size
    command = (
        f"vllm serve . --served-model-name {name} --skip-tokenizer-init --dtype {dtype.value} "
        "--logprobs-mode processed_logprobs --port 8001"
    )
    if min(text, size - text) > MOST_IDS:  # lists that long are for the older one
        command = f"VLLM_USE_V2_MODEL_RUNNER=0 {command}"
    options = "" if checkpoint.folder == DEFAULT else f"--model {shlex.quote(str(checkpoint.folder.resolve()))} "
    if adapter:
        options += f"--adapter {shlex.quote(str(find_adapter(checkpoint.folder, adapter).resolve()))} "
    return _CARD.format(name=checkpoint.settings.name, dtype=dtype.value, size=size, command=command, options=options)
