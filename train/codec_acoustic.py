"""Second stage of codec training: the acoustic codebooks and the decoder, on top of a finished codebook 0."""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from speechllm.codec import SpeechCodec
from speechllm.data.corpus import Item
from train.codec_data import repeated
from train.codec_traits import TRAITS, ProsodyHead, TraitHeads, classes_of
from train.codec_waveform import Auxiliary, Crops, Reconstruction, WaveformSettings, crops, train_waveform
from train.loop import training_device

MEASURED = 128  # held-out crops on which the heads are measured: of 24, as many as the sound takes, a share says little


class AcousticSettings(WaveformSettings):
    repeat: dict[str, Annotated[int, Field(ge=1)]] = Field(
        {}, description="how often the clips of a source are listed, for those with labels are few; once unless given"
    )
    trait_weight: float = Field(
        0.0, ge=0, description="of the loss that has codebook 1 tell speaker, gender and emotion; 0 leaves it out"
    )
    prosody_weight: float = Field(
        0.0, ge=0, description="of the loss that has codebook 1 tell F0, voicing and energy; 0 leaves it out"
    )


def quantize(codec: SpeechCodec, wav: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Waveforms ``[B, samples]`` through codebook 0 and the acoustic ones.

    Returns:
        Both quantised, ``[B, T, dim]`` and ``[B, T, acoustic_dim]``; the commitment loss; and what the first acoustic
        codebook alone makes of its input, ``[B, T, acoustic_code_dim]``, whose gradient goes straight through to it.
    """
    with torch.no_grad():
        mel = codec.mel(wav)
        semantic = codec.semantic.quantizer(codec.semantic.hidden(mel), freeze_codebook=True)[0]
    hidden, quantizer = codec.acoustic.encode(mel, semantic), codec.acoustic.quantizer
    acoustic, _, commitment, codes = quantizer(hidden, return_all_codes=True)  # codes [n_acoustic, B, T, code_dim]
    projected = quantizer.project_in(hidden)
    # the codes are looked up after the codebook's update, without a graph; dropout of codebooks always keeps the first
    first = projected + (codes[0] - projected).detach()
    return semantic, acoustic, commitment.sum(), first


def make_auxiliary(
    codec: SpeechCodec, train: list[Item], dev: list[Item], settings: AcousticSettings, seed: int
) -> Auxiliary | None:
    """The heads whose weight is not 0, untrained, and how to measure them; None when there are none."""
    rate, hop, dim = codec.sample_rate, codec.hop_length, codec.config.acoustic_code_dim
    heads: dict[str, TraitHeads | ProsodyHead] = {}
    weights = {}
    if settings.trait_weight:
        heads["traits"] = TraitHeads(dim, classes_of(train), hop)
        weights["traits"] = settings.trait_weight
    if settings.prosody_weight:
        heads["prosody"] = ProsodyHead(dim, rate, hop)
        weights["prosody"] = settings.prosody_weight
    if not weights:
        return None
    # clips with an emotion have the other labels too; among all clips few would be left to measure emotions on
    told = [item for item in dev if TRAITS["emotion"](item.utterance)] or dev
    samples = settings.samples(rate, hop)
    held_out = crops(told, samples, MEASURED, rate, Random(f"{seed} traits")).to(training_device())

    def measure() -> dict[str, float]:
        first = quantize(codec, held_out.wav)[3]
        found = [head.measure(first, held_out) for head in heads.values()]
        return {f"dev_{name}": value for measures in found for name, value in measures.items()}

    panels = {
        "codebook 1 tells: losses": list(weights),
        "codebook 1 tells: share right": ["dev_emotion", "dev_gender"],
        "codebook 1 tells: F0, semitones off": ["dev_f0_semitones"],
    }
    return Auxiliary(nn.ModuleDict(heads), weights, measure, panels)


def train_acoustic(
    codec: SpeechCodec,
    train: list[Item],
    dev: list[Item],
    settings: AcousticSettings,
    out: Path,
    seed: int,
    resume: bool,
) -> None:
    """Train ``codec.acoustic`` in place; ``codec.semantic`` is left as it is.

    Raises InputError for a source to repeat that has no clips.
    """
    train = repeated(train, settings.repeat, "acoustic.repeat")
    auxiliary = make_auxiliary(codec, train, dev, settings, seed)

    def reconstruct(batch: Crops) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        semantic, acoustic, commitment, first = quantize(codec, batch.wav)
        heads = auxiliary.heads.items() if auxiliary else ()
        told = {name: head(first, batch) for name, head in heads}
        return codec.acoustic.synthesize(semantic, acoustic), commitment, told

    task = Reconstruction(
        "acoustic",
        codec.acoustic,
        reconstruct,
        codec.mel,
        codec.sample_rate,
        codec.hop_length,
        auxiliary,
        base=codec.fingerprint(1),
    )
    codec.to(training_device()).eval()
    train_waveform(task, train, dev, settings, out, seed, resume)
    codec.cpu()
