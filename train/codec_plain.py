"""Train a codec for reconstruction alone: ``python -m train.codec_plain --config train/configs/codec-plain.yaml``.

EnCodec's networks and residual quantiser (Défossez et al. 2022) in our frame rate, codebooks and losses: what the codec
of ``train.codec``, whose first codebook is taught to carry the words, is to be compared with.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn

from speechllm.codec import EncodecCodec, EncodecConfig, save_codec
from speechllm.codec.layers import LogMel
from speechllm.data.corpus import read_corpus
from train.codec_waveform import Reconstruction, WaveformSettings, train_waveform
from train.commands import plain_errors
from train.config import Settings, read_config
from train.output import output_folder

N_MELS = 80  # of the loss
SELDOM = 0.1  # of the average use; a code that is used less is given a new place


class PlainTraining(Settings):
    """The YAML file: where the audio is, the sizes of the codec, and how it is trained."""

    out: Path
    seed: int = 0
    manifests: list[Path]
    dev_manifests: list[Path]
    codec: EncodecConfig
    training: WaveformSettings


def reconstruct(codec: EncodecCodec, wav: Tensor) -> tuple[Tensor, Tensor]:
    """Waveforms ``[B, samples]``, samples a multiple of the hop, to their reconstruction and the commitment loss.

    In training half of the batches use only a random number of the codebooks, so that the first ones can do without
    the others.
    """
    n_q = codec.n_q
    if codec.model.training and torch.rand(()) < 0.5:
        n_q = int(torch.randint(1, n_q + 1, ()))
    quantized, commitment = quantize(codec, codec.model.encoder(wav.unsqueeze(1)), n_q)
    return codec.model.decoder(quantized).squeeze(1), commitment


def quantize(codec: EncodecCodec, hidden: Tensor, n_q: int) -> tuple[Tensor, Tensor]:
    """``hidden [B, dimension, T]`` through the first ``n_q`` codebooks, and their mean commitment loss.

    The package's own loop lets only the first codebook's commitment loss reach the encoder: it subtracts from the
    residual what carries the residual's gradient.
    """
    residual, total, commitments = hidden, torch.zeros_like(hidden), []
    for layer in codec.model.quantizer.vq.layers[:n_q]:
        if layer.training:
            replace_seldom_used(layer._codebook, residual.detach())
        quantized, _, commitment = layer(residual)
        residual, total = residual - quantized.detach(), total + quantized.detach()
        commitments.append(commitment)
    return hidden + (total - hidden).detach(), torch.cat(commitments).mean()


def replace_seldom_used(codebook: Any, residual: Tensor) -> None:
    """Move the codes hardly any vector is nearest to onto vectors of this batch; ``residual [B, dimension, T]``."""
    usual = codebook.cluster_size.mean()
    seldom = codebook.cluster_size < SELDOM * usual
    if not codebook.inited or not seldom.any():
        return
    vectors = residual.transpose(1, 2).flatten(0, 1)
    chosen = vectors[torch.randint(len(vectors), (int(seldom.sum()),))]
    codebook.embed[seldom] = chosen
    codebook.embed_avg[seldom] = chosen * usual
    codebook.cluster_size[seldom] = usual


def even_out(model: nn.Module) -> None:
    """Start the convolutions so that a signal keeps its size through them, with no biases.

    PyTorch's start divides it by about the square root of 3 in each. In networks as deep as these biases are then all
    that is left: the vectors to quantise hardly differ, and stay so for the length of a short training.
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("weight_g"):
                parameter.mul_(math.sqrt(3))
            elif name.endswith(("conv.bias", "convtr.bias")):
                parameter.zero_()


def train_plain(config: PlainTraining, resume: bool) -> None:
    """Train as ``config`` says, and save the codec in ``out/codec``."""
    torch.manual_seed(config.seed)
    codec = EncodecCodec(config.codec)
    even_out(codec.model)
    train, dev = read_corpus(config.manifests, "train"), read_corpus(config.dev_manifests, "dev")
    task = Reconstruction(
        "plain",
        codec.model,
        lambda batch: (*reconstruct(codec, batch.wav), {}),
        LogMel(codec.sample_rate, N_MELS),
        codec.sample_rate,
        codec.hop_length,
    )
    train_waveform(task, train, dev, config.training, config.out, config.seed, resume)
    save_codec(codec, config.out / "codec")


def main(
    config: Annotated[Path, typer.Option(help="YAML file; see train/configs/codec-plain.yaml")],
    resume: Annotated[bool, typer.Option(help="go on from the last saved state")] = False,
) -> None:
    """Train a codec for reconstruction alone, into OUT/codec."""
    with plain_errors():
        settings = read_config(config, PlainTraining)
        with output_folder(settings.out):
            train_plain(settings, resume)


if __name__ == "__main__":
    typer.run(main)
