"""EnCodec (Défossez et al. 2022) from the ``encodec`` package, behind our contract: its 24 kHz model, or other sizes.

The package is only needed where this codec is used. Its release on PyPI states the licence CC BY-NC 4.0.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from speechllm._torchaudio import import_torchaudio
from speechllm.codec.base import Codec, hash_tensors
from speechllm.errors import InputError


class EncodecConfig(BaseModel):
    """What is saved next to the weights; unless given, the sizes are those of the published 24 kHz model."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    n_q: int = Field(8, ge=1, description="codebooks in use, the first ones of the model's")
    sample_rate: int = Field(24000, ge=1)
    ratios: tuple[int, ...] = Field((8, 5, 4, 2), min_length=1, description="steps from frames up to samples")
    n_filters: int = Field(32, ge=2, multiple_of=2, description="channels at the sample rate; twice as many each step")
    dimension: int = Field(128, ge=1, description="size of the vectors that are quantised")
    lstm: int = Field(2, ge=0, description="layers, in the encoder and in the decoder")
    causal: bool = True
    codebooks: int = Field(32, ge=1, description="codebooks of the model")
    card: int = Field(1024, ge=2)

    @model_validator(mode="after")
    def _fits(self) -> EncodecConfig:
        if self.n_q > self.codebooks:
            raise ValueError(f"n_q = {self.n_q}: the model has {self.codebooks} codebooks")
        if self.card & (self.card - 1):
            raise ValueError(f"card = {self.card}: must be a power of two")
        if min(self.ratios) < 1:
            raise ValueError(f"ratios = {self.ratios}: must be at least 1")
        return self


class EncodecCodec(nn.Module, Codec):
    """The published model: 75 frames a second, codebooks of 1024 codes (10 bits each: 0.75 kbit/s a codebook)."""

    def __init__(self, config: EncodecConfig):
        super().__init__()
        import_torchaudio()  # encodec imports torchaudio
        try:
            from encodec import EncodecModel
            from encodec.modules import SEANetDecoder, SEANetEncoder
            from encodec.quantization import ResidualVectorQuantizer
        except ImportError as error:
            raise InputError("this codec needs the package 'encodec': pip install encodec") from error
        self.config = config
        self.sample_rate, self.hop_length = config.sample_rate, math.prod(config.ratios)
        self.n_q, self.card = config.n_q, config.card
        sizes: dict[str, Any] = {
            "dimension": config.dimension,
            "n_filters": config.n_filters,
            "ratios": list(config.ratios),
            "lstm": config.lstm,
            "causal": config.causal,
        }
        # For training: an iteration of k-means takes seconds, and the package's replacement of codes that are not in
        # use (threshold_ema_dead_code) is undone by the update right after it, so whoever trains replaces them.
        quantizer = ResidualVectorQuantizer(
            config.dimension, config.codebooks, config.card, kmeans_iters=1, threshold_ema_dead_code=0
        )
        encoder, decoder = SEANetEncoder(**sizes), SEANetDecoder(**sizes)
        self.model = EncodecModel(encoder, decoder, quantizer, [], config.sample_rate, channels=1).eval()

    @classmethod
    def pretrained(cls, config: EncodecConfig, repository: Path | None = None) -> EncodecCodec:
        """The published weights: from ``repository``, a folder that holds the file the package names, else downloaded.

        Raises:
            InputError: the weights are not in the folder, or cannot be downloaded.
        """
        if config != EncodecConfig(n_q=config.n_q):
            raise InputError("the published weights are those of EnCodec's 24 kHz model: set n_q alone")
        codec = cls(config)
        from encodec import EncodecModel

        try:
            codec.model = EncodecModel.encodec_model_24khz(pretrained=True, repository=repository).eval()
        except (OSError, ValueError, AssertionError, RuntimeError) as error:  # RuntimeError: not that file's checksum
            where = repository or "the package's download address"
            raise InputError(
                f"EnCodec's weights cannot be had from {where} ({str(error).splitlines()[0]}): fetch "
                "encodec_24khz-d7cc33bc.th elsewhere and name its folder as the repository"
            ) from error
        return codec

    @torch.inference_mode()
    def encode(self, wav: Tensor, n_q: int | None = None) -> Tensor:
        """See :meth:`Codec.encode`."""
        n_q = self.check_n_q(n_q)
        embedding = self.model.encoder(wav.unsqueeze(0))
        # past the outer quantiser, which counts codebooks by bandwidth
        return self.model.quantizer.vq.encode(embedding, n_q)[:, 0]

    @torch.inference_mode()
    def decode(self, codes: Tensor) -> Tensor:
        """See :meth:`Codec.decode`."""
        return self.model.decoder(self.model.quantizer.decode(codes.unsqueeze(1)))[0]

    def fingerprint(self, n_q: int) -> str:
        """See :meth:`Codec.fingerprint`."""
        return hash_tensors({name: value for name, value in self.state_dict().items() if ".decoder." not in name})
