"""What a codec hears, how it sounds, how it uses its codes, how steady they are, and how fast it is."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from random import Random

import jiwer
import numpy as np
import torch
import torch.nn.functional as F
from pesq import NoUtterancesError, pesq
from pocketsphinx import Decoder
from pystoi import stoi
from torch import Tensor

from speechllm.audio import resample
from speechllm.codec import Codec, SpeechCodec
from speechllm.codec.base import code_entropy
from speechllm.codec.layers import MEL_HOP, LogMel, unscale_log
from speechllm.data.corpus import Item
from speechllm.data.perturb import add_at, compressed
from speechllm.data.phonemes import phonemes
from speechllm.metrics import bootstrap_interval, interval, ratio, wer
from train.codec_semantic import greedy
from train.resumable import Advance

RATE = 16000  # at which reconstructions are judged
PESQ_LOWEST = 1.0


def _noise(snr_db: float) -> Callable[[Tensor, int, Random], Tensor]:
    def add(wav: Tensor, sample_rate: int, rng: Random) -> Tensor:
        generator = torch.Generator().manual_seed(rng.getrandbits(62))
        return add_at(wav, torch.randn(wav.shape, generator=generator), snr_db)

    return add


def _later(wav: Tensor, sample_rate: int, rng: Random) -> Tensor:
    samples = round(0.005 * sample_rate)
    return F.pad(wav, (samples, 0))[:, : wav.shape[-1]]


# name -> what is done to wav [1, samples] at a sample rate; the number of samples stays
CHANGES: dict[str, Callable[[Tensor, int, Random], Tensor]] = {
    "+1 dB": lambda wav, sample_rate, rng: wav * 10 ** (1 / 20),
    "-1 dB": lambda wav, sample_rate, rng: wav * 10 ** (-1 / 20),
    "noise 30 dB": _noise(30),
    "noise 20 dB": _noise(20),
    "MP3 64 kbit/s": lambda wav, sample_rate, rng: compressed(wav, sample_rate, "MP3", 64),
    "5 ms later": _later,
}


def same_codes(
    codec: Codec, wavs: Sequence[Tensor], changes: dict[str, Callable[[Tensor, int, Random], Tensor]], advance: Advance
) -> dict[str, list[float]]:
    """Share of the frames, in percent, whose code stays the same under each change: one number a codebook."""
    same = {name: torch.zeros(codec.n_q) for name in changes}
    frames = 0
    for number, wav in enumerate(wavs):
        before = codec.encode(wav)
        frames += before.shape[1]
        for name, change in changes.items():
            same[name] += (codec.encode(change(wav, codec.sample_rate, Random(number))) == before).sum(1)
        advance(1)
    return {name: (100 * count / frames).tolist() for name, count in same.items()}


def use(codec: Codec, items: Sequence[Item], advance: Advance) -> dict[str, object]:
    """Perplexity of each codebook, and bits a second: of the codes as such, and if coded by their frequency."""
    rows = []
    for item in items:
        rows.append(codec.encode(item.wav(codec.sample_rate)))
        advance(1)
    codes = torch.cat(rows, dim=1)
    entropies = code_entropy(codes)
    return {
        "frames": codes.shape[1],
        "card": codec.card,
        "perplexity": [2**bits for bits in entropies],
        "nominal_bits_per_second": codec.frame_rate * codec.n_q * math.log2(codec.card),
        "entropy_bits_per_second": codec.frame_rate * sum(entropies),
    }


@torch.inference_mode()
def heard(codec: SpeechCodec, wav: Tensor) -> list[str]:
    """The phonemes that the recogniser behind codebook 0 reads in the codes of ``wav [1, samples]``."""
    codes = codec.encode(wav, n_q=1)
    vectors = codec.semantic.quantizer.get_output_from_indices(codes)  # [1, frames, dim]
    (path,) = greedy(codec.semantic.recognize(vectors), torch.tensor([codes.shape[1]]))
    return [codec.config.phonemes[index - 1] for index in path]


def misheard(codec: SpeechCodec, items: Sequence[Item], advance: Advance) -> dict[str, float | int]:
    """Phoneme error rate of :func:`heard` in percent, with its 95 % interval: how well codebook 0 tells words.

    The phonemes are those that espeak-ng reads from the texts; one that the recogniser does not know counts as wrong.
    """
    counts = []
    for item in items:
        said = phonemes(item.utterance.text or "", item.utterance.language or "")
        found = jiwer.process_words(" ".join(said), " ".join(heard(codec, item.wav(codec.sample_rate))))
        counts.append((found.substitutions + found.deletions + found.insertions, len(said)))
        advance(1)
    sums = np.array(counts)
    low, high = interval(sums, ratio)
    rates = {"per": 100 * ratio(sums.sum(0)), "low": 100 * low, "high": 100 * high}
    return {"clips": len(items), "phonemes": int(sums[:, 1].sum()), **rates}


def si_sdr(original: Tensor, made: Tensor) -> float:
    """Scale-invariant signal-to-distortion ratio in dB (Le Roux et al. 2019) of waveforms ``[samples]``."""
    original, made = original - original.mean(), made - made.mean()
    target = original * (made @ original) / (original @ original).clamp_min(1e-12)
    return float(10 * torch.log10((target @ target).clamp_min(1e-12) / (made - target).square().sum().clamp_min(1e-12)))


class Judge:
    """Compares waveforms ``[1, samples]`` at 16 kHz, and writes down what PocketSphinx understands."""

    def __init__(self) -> None:
        self._mel = LogMel(RATE, 80)
        # the cepstral mean of the clip itself: with the default, answers would depend on the clips before
        self._recognizer = Decoder(samprate=RATE, cmn="batch", loglevel="FATAL")

    def distances(self, original: Tensor, made: Tensor) -> dict[str, float]:
        """Of two waveforms of one length."""
        pad = -original.shape[-1] % MEL_HOP
        mels = [unscale_log(self._mel(F.pad(wav, (0, pad)))) * 10 / math.log(10) for wav in (original, made)]
        a, b = original[0].numpy(), made[0].numpy()
        try:
            quality = float(pesq(RATE, a, b, "wb"))
        except (NoUtterancesError, ValueError):  # nothing left that sounds like speech; ValueError: not even noise
            quality = PESQ_LOWEST
        return {
            "mel_db": float((mels[0] - mels[1]).abs().mean()),
            "si_sdr": si_sdr(original[0], made[0]),
            "stoi": float(stoi(a, b, RATE)),
            "pesq": quality,
        }

    def words(self, wav: Tensor) -> str:
        self._recognizer.start_utt()
        samples = (wav[0].clamp(-1, 1) * 32767).short().numpy().tobytes()
        self._recognizer.process_raw(samples, full_utt=True)
        self._recognizer.end_utt()
        found = self._recognizer.hyp()
        return found.hypstr if found is not None else ""


def reconstruct(codec: Codec, item: Item, n_q: int) -> Tensor:
    """The clip from its first ``n_q`` codebooks, ``[1, samples]`` at 16 kHz."""
    wav = item.wav(codec.sample_rate)
    made = codec.decode(codec.encode(wav, n_q))[:, : wav.shape[-1]]
    return resample(made, codec.sample_rate, RATE)


def fidelity(
    judge: Judge, codec: Codec | None, n_q: int, items: Sequence[Item], advance: Advance
) -> dict[str, float | int]:
    """Means over the clips of :meth:`Judge.distances`, and WER with its 95 % interval in percent.

    Without a codec the WER is that of the original clips, and there are no distances.
    """
    sums: dict[str, float] = {}
    references, hypotheses = [], []
    for item in items:
        wav = item.wav(RATE)
        if codec is not None:
            made = reconstruct(codec, item, n_q)
            made = F.pad(made, (0, max(0, wav.shape[-1] - made.shape[-1])))[:, : wav.shape[-1]]
            for name, value in judge.distances(wav, made).items():
                sums[name] = sums.get(name, 0.0) + value
            wav = made
        references.append(item.utterance.text or "")
        hypotheses.append(judge.words(wav))
        advance(1)
    low, high = bootstrap_interval(references, hypotheses)
    means: dict[str, float | int] = {name: total / len(items) for name, total in sums.items()}
    rates = {"wer": 100 * wer(references, hypotheses), "low": 100 * low, "high": 100 * high}
    return {"clips": len(items), **means, **rates}


def speech_of(items: Sequence[Item], seconds: float) -> Tensor:
    """Clips one after another, again and again, cut to a length: ``[1, samples]`` at 16 kHz."""
    samples = round(seconds * RATE)
    wavs, total = [], 0
    for item in items:
        wavs.append(item.wav(RATE))
        total += wavs[-1].shape[-1]
        if total >= samples:
            break
    return torch.cat(wavs, dim=1).repeat(1, -(-samples // total))[:, :samples]


def speed(codecs: dict[str, Codec], wav: Tensor, threads: int, repeats: int) -> dict[str, dict[str, float]]:
    """Seconds of work per second of audio, of ``wav`` at 16 kHz, for each codec: median of ``repeats`` turns."""
    before, seconds = torch.get_num_threads(), wav.shape[-1] / RATE
    wavs = {name: resample(wav, RATE, codec.sample_rate) for name, codec in codecs.items()}
    taken: dict[str, dict[str, list[float]]] = {name: {"encode": [], "decode": []} for name in codecs}
    torch.set_num_threads(threads)
    try:
        for name, codec in codecs.items():
            codec.decode(codec.encode(wavs[name][:, : codec.sample_rate]))  # the first call also sets things up
        for _ in range(repeats):
            for name, codec in codecs.items():
                started = time.perf_counter()
                codes = codec.encode(wavs[name])
                encoded = time.perf_counter()
                codec.decode(codes)
                taken[name]["encode"].append((encoded - started) / seconds)
                taken[name]["decode"].append((time.perf_counter() - encoded) / seconds)
    finally:
        torch.set_num_threads(before)
    return {name: {way: statistics.median(times) for way, times in ways.items()} for name, ways in taken.items()}
