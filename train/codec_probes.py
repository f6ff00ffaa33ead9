"""What codes tell about words, speakers and emotions: small networks trained to read them out, and their errors.

Every input gets the same network, data, steps and seed; only its first layer differs: learned embeddings, summed over
the codebooks, or a linear layer on log-mel columns.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from speechllm.codec import Codec
from speechllm.codec.layers import MEL_HOP, ConvStack, Kernel, LogMel, relative_to_level
from speechllm.data.corpus import Item
from speechllm.data.sampling import LengthSampler, short_first
from speechllm.metrics import bootstrap_interval, cer, normalize_text, wer
from train.codec_semantic import greedy
from train.config import Settings
from train.loop import cosine
from train.resumable import Advance

MEL_RATE, N_MELS, STACKED = 16000, 80, 4  # the log-mel input: 80 bands, four columns of 10 ms a frame
LETTERS = "abcdefghijklmnopqrstuvwxyz' "  # symbol 0 of the CTC output is the blank
OUTPUT_RATE = 50  # CTC outputs a second at least: fast speech has more letters than a codec of 25 Hz has frames


class ProbeSettings(Settings):
    steps: int = Field(gt=0)
    dim: int = Field(192, ge=4)
    depth: int = Field(4, ge=1)
    kernel: Kernel = 9
    learning_rate: float = Field(2e-3, gt=0)
    warmup: int = Field(50, ge=1)
    short_first: int = Field(200, ge=0, description="steps over which clips of growing length come in")
    batch_seconds: float = Field(60, gt=0)
    max_clips: int = Field(64, ge=1)
    dropout: float = Field(0.1, ge=0, lt=1)


@dataclass(frozen=True)
class Clip:
    """What a probe sees of a clip, ``[T, width]`` (codes int32, or log-mel float16), and what it should say."""

    frames: Tensor
    target: str
    seconds: float


class Heard:
    """Frames of clips as a codec, or log-mel when it is None, gives them; computed when first asked for and kept.

    Log-mel comes with the clip's ``level`` taken off where that is False: words are read better without, emotions with.
    """

    def __init__(self, codec: Codec | None, level: bool = True):
        self.codec, self.level = codec, level
        self.frame_rate = codec.frame_rate if codec else MEL_RATE / MEL_HOP / STACKED
        self.card = codec.card if codec else None
        self._mel = LogMel(MEL_RATE, N_MELS)
        self._kept: dict[tuple[str, str], Tensor] = {}

    def frames(self, item: Item) -> Tensor:
        """``[T, n_q]`` codes, or ``[T, STACKED * N_MELS]``."""
        key = (str(item.root), item.utterance.id)
        if key not in self._kept:
            if self.codec is not None:
                self._kept[key] = self.codec.encode(item.wav(self.codec.sample_rate)).T.int().contiguous()
            else:
                wav = item.wav(MEL_RATE)
                wav = F.pad(wav, (0, -wav.shape[-1] % (MEL_HOP * STACKED)))
                mel = self._mel(wav)
                mel = mel if self.level else relative_to_level(mel)
                self._kept[key] = mel[0].half().reshape(-1, STACKED * N_MELS)
        return self._kept[key]

    def clip(self, item: Item, target: str, books: Sequence[int] | None) -> Clip:
        """The clip through codebooks ``books`` only."""
        frames = self.frames(item)
        return Clip(frames if books is None else frames[:, list(books)], target, item.utterance.duration)


class Front(nn.Module):
    """First layer of a probe: ``width`` codebooks of ``card`` codes, or (card None) as many real values a frame."""

    def __init__(self, width: int, card: int | None, dim: int, dropout: float):
        super().__init__()
        self.card = card
        self.table = nn.Linear(width, dim) if card is None else nn.Embedding(width * card, dim)
        self.norm, self.dropout = nn.LayerNorm(dim), nn.Dropout(dropout)

    def forward(self, frames: Tensor) -> Tensor:  # [B, T, width] -> [B, T, dim]
        if self.card is None:
            x = self.table(frames)
        else:
            x = self.table(frames + self.card * torch.arange(frames.shape[-1])).sum(2)
        return self.dropout(self.norm(x))


class WordProbe(nn.Module):
    """Letters by CTC."""

    def __init__(self, width: int, card: int | None, frame_rate: float, settings: ProbeSettings):
        super().__init__()
        self.outputs = max(1, -int(-OUTPUT_RATE // frame_rate))  # a frame
        self.front = Front(width, card, settings.dim, settings.dropout)
        self.stack = ConvStack(settings.dim, settings.depth, settings.kernel, expansion=4)
        self.output = nn.Linear(settings.dim, self.outputs * (1 + len(LETTERS)))

    def forward(self, frames: Tensor, mask: Tensor) -> Tensor:
        """``[B, T, width]`` and ``[B, T, 1]`` to log-probabilities ``[B, T * outputs, 1 + letters]``."""
        x = self.output(self.stack(self.front(frames), mask))
        return x.reshape(len(x), -1, 1 + len(LETTERS)).log_softmax(-1)


class TraitProbe(nn.Module):
    """One label a clip, from the mean and spread of its frames, weighted by attention (Okabe et al. 2018)."""

    def __init__(self, width: int, card: int | None, classes: int, settings: ProbeSettings):
        super().__init__()
        self.front = Front(width, card, settings.dim, settings.dropout)
        self.stack = ConvStack(settings.dim, settings.depth, settings.kernel, expansion=2)
        self.attention = nn.Sequential(nn.Linear(settings.dim, settings.dim), nn.Tanh(), nn.Linear(settings.dim, 1))
        self.output = nn.Linear(2 * settings.dim, classes)

    def forward(self, frames: Tensor, mask: Tensor) -> Tensor:  # [B, T, width], [B, T, 1] -> [B, classes]
        x = self.stack(self.front(frames), mask)
        weight = self.attention(x).masked_fill(~mask, -torch.inf).softmax(1)
        mean = (weight * x).sum(1)
        spread = (weight * (x - mean.unsqueeze(1)).square()).sum(1).clamp_min(1e-6).sqrt()
        return self.output(torch.cat([mean, spread], dim=-1))


def padded(clips: Sequence[Clip]) -> tuple[Tensor, Tensor]:
    """Frames ``[B, T, width]`` (int64 or float32) and which of them are real, bool ``[B, T, 1]``."""
    frames = pad_sequence([clip.frames for clip in clips], batch_first=True)
    lengths = torch.tensor([len(clip.frames) for clip in clips])
    mask = torch.arange(frames.shape[1])[None] < lengths[:, None]
    return (frames.float() if frames.is_floating_point() else frames.long()), mask.unsqueeze(-1)


def fit(
    probe: nn.Module,
    loss: Callable[[Sequence[Clip]], Tensor],
    clips: Sequence[Clip],
    settings: ProbeSettings,
    seed: int,
    advance: Advance,
) -> None:
    """Train ``probe`` in place and leave it in evaluation mode."""
    sampler = LengthSampler([clip.seconds for clip in clips], settings.batch_seconds, settings.max_clips, seed)
    optimizer = torch.optim.AdamW(probe.parameters(), settings.learning_rate, betas=(0.9, 0.98), weight_decay=0.02)
    probe.train()
    for step in range(settings.steps):
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * cosine(step, settings.warmup, settings.steps)
        value = loss([clips[i] for i in sampler(step, short_first(step, settings.short_first))])
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        torch.nn.utils.clip_grad_norm_(probe.parameters(), 5.0)
        optimizer.step()
        advance(1)
    probe.eval()


def letters(text: str) -> str | None:
    """The text as the word probe writes it, or None when it holds anything but letters (digits, accents) or nothing."""
    text = normalize_text(text)
    return text if text and set(text) <= set(LETTERS) else None


def read_words(
    train: Sequence[Clip],
    tests: Mapping[str, Sequence[Clip]],
    card: int | None,
    frame_rate: float,
    settings: ProbeSettings,
    seed: int,
    advance: Advance,
) -> dict[str, dict[str, float]]:
    """Train a word probe; its error rates in percent on each group of ``tests``, WER with a 95 % interval.

    Targets are texts as of :func:`letters`.
    """
    torch.manual_seed(seed)
    probe = WordProbe(train[0].frames.shape[1], card, frame_rate, settings)
    symbols = {letter: number + 1 for number, letter in enumerate(LETTERS)}

    def loss(clips: Sequence[Clip]) -> Tensor:
        frames, mask = padded(clips)
        targets = [torch.tensor([symbols[letter] for letter in clip.target]) for clip in clips]
        lengths = torch.tensor([len(target) for target in targets])
        outputs = probe.outputs * mask.sum((1, 2))
        log_probs = probe(frames, mask).transpose(0, 1)
        value = F.ctc_loss(log_probs, torch.cat(targets), outputs, lengths, reduction="sum", zero_infinity=True)
        return value / lengths.sum()

    @torch.inference_mode()
    def answers(clips: Sequence[Clip]) -> list[str]:
        found: list[str] = []
        for start in range(0, len(clips), 32):
            frames, mask = padded(clips[start : start + 32])
            paths = greedy(probe(frames, mask), probe.outputs * mask.sum((1, 2)))
            found += ["".join(LETTERS[symbol - 1] for symbol in path) for path in paths]
        return found

    fit(probe, loss, train, settings, seed, advance)
    scores = {}
    for group, clips in tests.items():
        references, hypotheses = [clip.target for clip in clips], answers(clips)
        low, high = bootstrap_interval(references, hypotheses)
        scores[group] = {
            "clips": len(clips),
            "words": sum(len(reference.split()) for reference in references),
            "wer": 100 * wer(references, hypotheses),
            "low": 100 * low,
            "high": 100 * high,
            "cer": 100 * cer(references, hypotheses),
        }
    return scores


def read_trait(
    train: Sequence[Clip],
    test: Sequence[Clip],
    card: int | None,
    settings: ProbeSettings,
    seed: int,
    advance: Advance,
) -> float:
    """Train a trait probe on clips whose targets are labels; its UAR on ``test`` in percent."""
    from sklearn.metrics import balanced_accuracy_score  # a second

    torch.manual_seed(seed)
    classes = sorted({clip.target for clip in train})
    counts = torch.tensor([sum(clip.target == name for clip in train) for name in classes])
    weights = len(train) / (len(classes) * counts)  # UAR counts rare classes as much as frequent ones
    probe = TraitProbe(train[0].frames.shape[1], card, len(classes), settings)

    def loss(clips: Sequence[Clip]) -> Tensor:
        targets = torch.tensor([classes.index(clip.target) for clip in clips])
        return F.cross_entropy(probe(*padded(clips)), targets, weights)

    fit(probe, loss, train, settings, seed, advance)
    answers: list[str] = []
    with torch.inference_mode():
        for start in range(0, len(test), 64):
            answers += [classes[i] for i in probe(*padded(test[start : start + 64])).argmax(-1).tolist()]
    return 100 * float(balanced_accuracy_score([clip.target for clip in test], answers))
