"""Codes on disk: one recording as a safetensors file that says which codec made it.

The file holds one tensor, ``codes`` ``[n_q, frames]``, int16 (int32 where ``card`` is greater than 32767), and the
metadata of :class:`CodesHeader`, as strings.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from speechllm.codec.base import Codec
from speechllm.errors import InputError, first_problem

FORMAT: Final = "speechllm.codes"
VERSION: Final = "1"
TENSOR = "codes"


class CodesHeader(BaseModel):
    """The metadata of a codes file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal["speechllm.codes"] = FORMAT
    version: Literal["1"] = VERSION
    codec: str = Field(description="the codec's fingerprint for the codebooks in the file")
    sample_rate: int = Field(ge=1)
    hop_length: int = Field(ge=1)
    card: int = Field(ge=1)
    samples: int = Field(ge=1, description="of the recording, at sample_rate; the last frame may reach beyond them")


def save_codes(path: str | Path, codes: Tensor, samples: int, codec: Codec) -> None:
    """Write ``codes`` int64 ``[n_q, frames]``, which ``codec`` made of ``samples`` samples at its own rate.

    Raises:
        InputError: the file cannot be written.
    """
    header = CodesHeader(
        codec=codec.fingerprint(codes.shape[0]),
        sample_rate=codec.sample_rate,
        hop_length=codec.hop_length,
        card=codec.card,
        samples=samples,
    )
    content = save(
        {TENSOR: codes.to(_dtype(codec.card)).contiguous()},
        {name: str(value) for name, value in header.model_dump().items()},
    )
    try:
        Path(path).write_bytes(content)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror or error})") from error


def load_codes(path: str | Path, codec: Codec) -> tuple[Tensor, int]:
    """Codes int64 ``[n_q, frames]`` and the samples, at the codec's rate, of the recording they were made of.

    Raises:
        InputError: the file cannot be read, is damaged, holds no codes of ours, or codes of another codec.
    """
    path = Path(path)
    try:
        if not path.is_file():
            raise InputError(f"{path}: {'not a file' if path.exists() else 'no such file'}")
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            stored = file.get_tensor(TENSOR) if TENSOR in file.keys() else None  # noqa: SIM118  # it is no dict
    except SafetensorError as error:
        raise InputError(f"{path}: damaged, or not a file of codes ({str(error).splitlines()[0]})") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error
    if stored is None or metadata.get("format") != FORMAT:
        raise InputError(f"{path}: a safetensors file, but not one of codes; make those with speechllm codes encode")
    if metadata.get("version") != VERSION:
        raise InputError(
            f"{path}: is of format version {metadata.get('version')}, this program reads version {VERSION}: "
            "use the version of speechllm that wrote it"
        )
    try:
        header = CodesHeader.model_validate(metadata)
    except ValidationError as error:
        raise InputError(f"{path}: damaged metadata: {first_problem(error)}") from error
    _check_codec(path, header, codec, stored)
    codes = stored.to(torch.int64)
    if codes.min() < 0 or codes.max() >= header.card:
        raise InputError(f"{path}: damaged: a code is outside [0, {header.card})")
    return codes, header.samples


def _check_codec(path: Path, header: CodesHeader, codec: Codec, stored: Tensor) -> None:
    """What the header says fits the tensor and is what ``codec`` makes; InputError otherwise."""
    if stored.ndim != 2 or not stored.numel() or stored.dtype != _dtype(header.card):
        kind = f"{str(stored.dtype).removeprefix('torch.')} {list(stored.shape)}"
        raise InputError(f"{path}: damaged: its codes are {kind}, not whole numbers [codebooks, frames]")
    n_q, frames = stored.shape
    if not (frames - 1) * header.hop_length < header.samples <= frames * header.hop_length:
        raise InputError(
            f"{path}: damaged: {header.samples} samples do not take {frames} frames of {header.hop_length} samples"
        )
    theirs = (header.sample_rate, header.hop_length, header.card)
    same = theirs == (codec.sample_rate, codec.hop_length, codec.card) and n_q <= codec.n_q
    if not same or header.codec != codec.fingerprint(n_q):
        raise InputError(
            f"{path}: made by another codec ({header.codec}: {header.sample_rate} Hz, {n_q} codebooks of {header.card} "
            f"codes; this one: {codec.fingerprint(min(n_q, codec.n_q))}, {codec.sample_rate} Hz, {codec.n_q} codebooks "
            f"of {codec.card}): name the one that made it with --codec"
        )


def _dtype(card: int) -> torch.dtype:
    return torch.int32 if card > 32767 else torch.int16
