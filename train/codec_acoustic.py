"""Second stage of codec training: the acoustic codebooks and the decoder, on top of a finished codebook 0."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from speechllm.codec import SpeechCodec
from speechllm.data.corpus import Item
from train.codec_waveform import Reconstruction, WaveformSettings, train_waveform


def forward(codec: SpeechCodec, wav: Tensor) -> tuple[Tensor, Tensor]:
    """Waveforms ``[B, samples]`` to their reconstruction ``[B, samples]`` and the commitment loss."""
    with torch.no_grad():
        mel = codec.mel(wav)
        semantic = codec.semantic.quantizer(codec.semantic.hidden(mel), freeze_codebook=True)[0]
    acoustic, _, commitment = codec.acoustic.quantizer(codec.acoustic.encode(mel, semantic))
    return codec.acoustic.synthesize(semantic, acoustic), commitment.sum()


def train_acoustic(
    codec: SpeechCodec,
    train: list[Item],
    dev: list[Item],
    settings: WaveformSettings,
    out: Path,
    seed: int,
    resume: bool,
) -> None:
    """Train ``codec.acoustic`` in place; ``codec.semantic`` is left as it is."""
    codec.eval()
    task = Reconstruction(
        "acoustic", codec.acoustic, lambda wav: forward(codec, wav), codec.mel, codec.sample_rate, codec.hop_length
    )
    train_waveform(task, train, dev, settings, out, seed, resume)
