"""EnCodec 24 kHz (Défossez et al. 2022) through the ``encodec`` package, behind our contract.

The package is only needed where this codec is used. Its release on PyPI states the licence CC BY-NC 4.0.
"""

from __future__ import annotations

from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from speechllm._torchaudio import import_torchaudio
from speechllm.codec.base import Codec, hash_tensors
from speechllm.errors import InputError

FRAME_RATE, CARD, MAX_N_Q, HOP = 75, 1024, 32, 320


class EncodecConfig(BaseModel):
    """What is saved next to the weights."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    n_q: int = Field(8, ge=1, le=MAX_N_Q)


class EncodecCodec(nn.Module, Codec):
    """75 frames a second, ``n_q`` codebooks of 1024 codes (10 bits each: 0.75 kbit/s a codebook)."""

    def __init__(self, config: EncodecConfig):
        super().__init__()
        import_torchaudio()  # encodec imports torchaudio
        try:
            from encodec import EncodecModel
        except ImportError as error:
            raise InputError("this codec needs the package 'encodec': pip install encodec") from error
        self.config = config
        self.sample_rate, self.hop_length, self.n_q, self.card = 24000, HOP, config.n_q, CARD
        self.model = EncodecModel.encodec_model_24khz(pretrained=False).eval()

    @classmethod
    def pretrained(cls, config: EncodecConfig, repository: Path | None = None) -> EncodecCodec:
        """The published weights: from ``repository``, a folder that holds the file the package names, else downloaded.

        Raises:
            InputError: the weights are not in the folder, or cannot be downloaded.
        """
        codec = cls(config)
        from encodec import EncodecModel

        try:
            codec.model = EncodecModel.encodec_model_24khz(pretrained=True, repository=repository).eval()
        except (OSError, ValueError, AssertionError) as error:
            where = repository or "the package's download address"
            raise InputError(
                f"EnCodec's weights cannot be had from {where} ({error}): fetch encodec_24khz-d7cc33bc.th elsewhere "
                "and name its folder as the repository"
            ) from error
        return codec

    @torch.inference_mode()
    def encode(self, wav: Tensor, n_q: int | None = None) -> Tensor:
        """See :meth:`Codec.encode`."""
        embedding = self.model.encoder(wav.unsqueeze(0))
        # the quantiser counts codebooks by bandwidth: 10 bits x 75 frames a second each
        bandwidth = self.check_n_q(n_q) * FRAME_RATE * 10 / 1000
        return self.model.quantizer.encode(embedding, FRAME_RATE, bandwidth)[:, 0]

    @torch.inference_mode()
    def decode(self, codes: Tensor) -> Tensor:
        """See :meth:`Codec.decode`."""
        return self.model.decoder(self.model.quantizer.decode(codes.unsqueeze(1)))[0]

    def fingerprint(self, n_q: int) -> str:
        """See :meth:`Codec.fingerprint`."""
        return hash_tensors({name: value for name, value in self.state_dict().items() if ".decoder." not in name})
