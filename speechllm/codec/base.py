"""The codec contract: every number the rest of the system needs is read from here."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor

from speechllm.errors import InputError


class Codec(ABC):
    """Turns a waveform into discrete codes and codes into a waveform.

    Attributes:
        sample_rate: samples per second of the waveforms taken and given.
        hop_length: samples per frame.
        n_q: number of codebooks.
        card: codes per codebook; codes lie in ``[0, card)``.
    """

    sample_rate: int
    hop_length: int
    n_q: int
    card: int

    @property
    def frame_rate(self) -> float:
        """Frames per second."""
        return self.sample_rate / self.hop_length

    @abstractmethod
    def encode(self, wav: Tensor, n_q: int | None = None) -> Tensor:
        """``wav`` float32 ``[1, samples]`` at ``sample_rate`` to codes int64 ``[n_q, frames]`` (default: all).

        The last frame may reach beyond the samples: nothing at the end is dropped.
        """

    @abstractmethod
    def fingerprint(self, n_q: int) -> str:
        """Short hash of the weights the first ``n_q`` codes come from: codecs that give other codes differ in it."""

    @abstractmethod
    def decode(self, codes: Tensor) -> Tensor:
        """Codes int64 ``[k, frames]`` with ``1 <= k <= n_q`` to ``wav`` float32 ``[1, frames * hop_length]``."""

    def check_n_q(self, n_q: int | None) -> int:
        """Codebooks asked for, all when None; InputError when there are fewer."""
        if n_q is not None and not 1 <= n_q <= self.n_q:
            raise InputError(f"n_q = {n_q}: this codec has 1 to {self.n_q} codebooks")
        return n_q or self.n_q


def code_entropy(codes: Tensor) -> list[float]:
    """Entropy in bits of each codebook's histogram, codes ``[n_q, frames]``: ``log2(card)`` if all are used alike."""
    entropies = []
    for row in codes:
        share = row.unique(return_counts=True)[1].double() / len(row)
        entropies.append(float(-(share * share.log2()).sum()) + 0.0)  # no -0.0
    return entropies


def hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    """Sixteen hexadecimal digits that stand for the names and values of ``tensors``."""
    digest = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
