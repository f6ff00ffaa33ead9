"""Our own 16 kHz codec: codebook 0 carries the words, the codebooks after it carry how they were said.

Codebook 0 is a vector quantiser inside a phoneme recogniser trained with CTC, as in CosyVoice's S3 tokenizer
(Du et al. 2024). The acoustic codebooks are a residual quantiser (SoundStream, Zeghidour et al. 2021) over a second,
smaller encoder; the decoder joins both and writes the short-time spectrum of the waveform (Vocos, Siuzdak 2023).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from vector_quantize_pytorch import ResidualVQ, VectorQuantize

from speechllm.codec.base import Codec, hash_tensors
from speechllm.codec.layers import LEVEL_REACH, MEL_HOP, ConvStack, Downsample, Kernel, LogMel, relative_to_level
from speechllm.errors import InputError

# beginnings of the names of weights that codes come from: neither the recogniser behind codebook 0 nor the decoder
SEMANTIC_CODES = ("mel.", "semantic.down.", "semantic.stack.", "semantic.norm.", "semantic.quantizer.")
ACOUSTIC_CODES = ("acoustic.down.", "acoustic.known.", "acoustic.stack.", "acoustic.quantizer.")


class SpeechCodecConfig(BaseModel):
    """Sizes of the codec; saved next to its weights."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    sample_rate: int = Field(16000, ge=1)
    n_mels: int = Field(80, ge=16, multiple_of=8)
    card: int = Field(512, ge=2, description="codes in each codebook")
    n_acoustic: int = Field(7, ge=1, description="acoustic codebooks after the semantic one")
    dim: int = Field(256, ge=8)
    depth: int = Field(7, ge=1, description="blocks before the semantic quantiser")
    recognizer_depth: int = Field(2, ge=1, description="blocks between the quantiser and the CTC output")
    kernel: Kernel = 15
    expansion: int = Field(3, ge=1)
    code_dim: int = Field(32, ge=2, description="size of the space in which codes are looked up")
    acoustic_dim: int = Field(160, ge=8)
    acoustic_depth: int = Field(3, ge=1)
    acoustic_code_dim: int = Field(32, ge=2)
    decoder_dim: int = Field(256, ge=8)
    decoder_depth: int = Field(4, ge=1)
    phonemes: tuple[str, ...] = Field((), description="CTC output symbols 1…; 0 is the blank")


class SemanticEncoder(nn.Module):
    """Log-mel to frames whose quantised values still tell the phonemes."""

    def __init__(self, config: SpeechCodecConfig):
        super().__init__()
        self.down = Downsample(config.n_mels, config.dim)
        self.stack = ConvStack(config.dim, config.depth, config.kernel, config.expansion)
        self.norm = nn.LayerNorm(config.dim)
        self.quantizer = VectorQuantize(
            config.dim,
            config.card,
            codebook_dim=config.code_dim,
            use_cosine_sim=True,
            decay=0.99,
            kmeans_init=True,
            threshold_ema_dead_code=1,
            commitment_weight=0.25,
            rotation_trick=False,
        )
        self.recognizer = ConvStack(config.dim, config.recognizer_depth, config.kernel, config.expansion)
        self.output = nn.Linear(config.dim, 1 + len(config.phonemes))

    def hidden(self, mel: Tensor, mask: Tensor | None = None) -> Tensor:  # [B, 4 T, n_mels] -> [B, T, dim]
        feature = relative_to_level(mel)
        if mask is not None:  # zero beyond the clip, as the convolutions pad an unpadded one
            feature = feature * mask.repeat_interleave(Downsample.FACTOR, dim=1)
        return self.norm(self.stack(self.down(feature), mask))

    def unquantized(self, hidden: Tensor) -> Tensor:
        """``[B, T, dim]`` as the quantiser would give it if it had a code for every point of the space it looks in."""
        return self.quantizer.project_out(F.normalize(self.quantizer.project_in(hidden), dim=-1))

    @property
    def reach(self) -> int:
        """Frames of context on either side."""
        return self.stack.reach + -(-LEVEL_REACH // Downsample.FACTOR)

    def recognize(self, hidden: Tensor, mask: Tensor | None = None) -> Tensor:
        """Hidden or quantised frames ``[B, T, dim]`` to CTC log-probabilities ``[B, T, 1 + phonemes]``."""
        return self.output(self.recognizer(hidden, mask)).log_softmax(-1)


class AcousticCoder(nn.Module):
    """Residual quantiser for what the words do not say, and the decoder that turns all codes into sound."""

    N_FFT = 640

    def __init__(self, config: SpeechCodecConfig):
        super().__init__()
        dim, self.hop = config.decoder_dim, MEL_HOP
        self.down = Downsample(config.n_mels, config.acoustic_dim)
        self.known = nn.Linear(config.dim, config.acoustic_dim)
        self.stack = ConvStack(config.acoustic_dim, config.acoustic_depth, 5, config.expansion)
        self.quantizer = ResidualVQ(
            dim=config.acoustic_dim,
            num_quantizers=config.n_acoustic,
            codebook_size=config.card,
            codebook_dim=config.acoustic_code_dim,
            decay=0.99,
            kmeans_init=True,
            threshold_ema_dead_code=0.1,  # uses a batch; crops hold few frames, so each code has about one
            commitment_weight=0.25,
            rotation_trick=False,
            quantize_dropout=True,
        )
        self.from_semantic = nn.Linear(config.dim, dim)
        self.from_acoustic = nn.Linear(config.acoustic_dim, dim)
        self.frames = ConvStack(dim, config.decoder_depth, 7, config.expansion)
        self.up = nn.Linear(dim, dim * Downsample.FACTOR)
        self.columns = ConvStack(dim, config.decoder_depth, 7, 2)
        self.norm = nn.LayerNorm(dim)
        self.spectrum = nn.Linear(dim, self.N_FFT + 2)
        self.window: Tensor
        self.register_buffer("window", torch.hann_window(self.N_FFT), persistent=False)

    @property
    def reach(self) -> int:
        """Frames on either side that the sound of a frame depends on."""
        columns = self.columns.reach + self.N_FFT // self.hop
        return self.frames.reach + -(-columns // Downsample.FACTOR)

    def encode(self, mel: Tensor, semantic: Tensor) -> Tensor:
        """Log-mel ``[B, 4 T, n_mels]`` and what codebook 0 tells, ``[B, T, dim]``, to ``[B, T, acoustic_dim]``."""
        return self.stack(self.down(mel) + self.known(semantic))

    def synthesize(self, semantic: Tensor, acoustic: Tensor) -> Tensor:
        """Quantised frames ``[B, T, dim]`` and ``[B, T, acoustic_dim]`` to a waveform ``[B, T * hop_length]``."""
        x = self.frames(self.from_semantic(semantic) + self.from_acoustic(acoustic))
        batch, frames, dim = x.shape
        x = self.columns(self.up(x).reshape(batch, frames * Downsample.FACTOR, dim))
        magnitude, phase = self.spectrum(self.norm(x)).transpose(1, 2).chunk(2, dim=1)
        spectrum = torch.polar(magnitude.clamp(max=7.0).exp(), phase)
        # istft wants the column that begins at the last sample too: repeat the last one, then cut to length
        spectrum = torch.cat([spectrum, spectrum[..., -1:]], dim=-1)
        return torch.istft(
            spectrum,
            self.N_FFT,
            self.hop,
            window=self.window,
            center=True,
            length=frames * Downsample.FACTOR * self.hop,
        )


def overlapping(frames: int, step: int, reach: int) -> Iterator[tuple[int, int, slice]]:
    """Cut ``frames`` into pieces that overlap by ``reach``: first frame, end, and what of the piece to keep."""
    for start in range(0, frames, step):
        left, stop = max(0, start - reach), min(frames, start + step)
        yield left, min(frames, stop + reach), slice(start - left, stop - left)


class SpeechCodec(nn.Module, Codec):
    """See the module's docstring. 25 frames a second: ``hop_length`` is 640 samples at 16 kHz."""

    def __init__(self, config: SpeechCodecConfig):
        super().__init__()
        self.config = config
        self.sample_rate = config.sample_rate
        self.hop_length = MEL_HOP * Downsample.FACTOR
        self.n_q = 1 + config.n_acoustic
        self.card = config.card
        self.mel = LogMel(config.sample_rate, config.n_mels)
        self.semantic = SemanticEncoder(config)
        self.acoustic = AcousticCoder(config)

    @torch.inference_mode()
    def encode(self, wav: Tensor, n_q: int | None = None, chunk_seconds: float = 60.0) -> Tensor:
        """See :meth:`Codec.encode`. Memory is bounded by ``chunk_seconds``; the codes do not depend on it.

        Raises:
            InputError: a codebook asked for does not exist or has not been trained.
        """
        n_q = self.check_n_q(n_q)
        self.check_trained(n_q)
        frames = -(-wav.shape[-1] // self.hop_length)
        reach = self.semantic.reach + self.acoustic.stack.reach + 4  # 4: mel windows and Downsample
        pieces = [torch.zeros(n_q, 0, dtype=torch.int64, device=wav.device)]
        for left, right, kept in overlapping(frames, max(1, int(chunk_seconds * self.frame_rate)), reach):
            piece = wav[:, left * self.hop_length : right * self.hop_length]
            codes = self._encode_piece(F.pad(piece, (0, (right - left) * self.hop_length - piece.shape[-1])), n_q)
            pieces.append(codes[:, kept])
        return torch.cat(pieces, dim=1)

    def check_trained(self, n_q: int) -> None:
        """Raises InputError when one of the first ``n_q`` codebooks has not been trained."""
        quantizers = [self.semantic.quantizer, self.acoustic.quantizer][: 1 if n_q == 1 else 2]
        flags = [flag for q in quantizers for name, flag in q.named_buffers() if name.endswith("initted")]
        if not all(flag.all() for flag in flags):
            raise InputError("the codec's codebooks are not trained: run python -m train.codec, both stages")

    def _encode_piece(self, wav: Tensor, n_q: int) -> Tensor:  # [1, samples] -> [n_q, frames]
        mel = self.mel(wav)
        known, semantic, _ = self.semantic.quantizer(self.semantic.hidden(mel), freeze_codebook=True)  # [1, frames]
        if n_q == 1:
            return semantic
        acoustic = self.acoustic.quantizer(self.acoustic.encode(mel, known), freeze_codebook=True)[1]
        return torch.cat([semantic.unsqueeze(-1), acoustic], dim=-1)[0, :, :n_q].T.contiguous()

    @torch.inference_mode()
    def decode(self, codes: Tensor, chunk_seconds: float = 60.0) -> Tensor:
        """See :meth:`Codec.decode`. With fewer codebooks than ``n_q`` the missing detail is left out.

        Memory beyond the result is bounded by ``chunk_seconds``, on which the sound does not depend.
        """
        pieces = [torch.zeros(1, 0, device=codes.device)]
        step = max(1, int(chunk_seconds * self.frame_rate))
        for left, right, kept in overlapping(codes.shape[1], step, self.acoustic.reach):
            wav = self._decode_piece(codes[:, left:right])
            pieces.append(wav[:, kept.start * self.hop_length : kept.stop * self.hop_length])
        return torch.cat(pieces, dim=1)

    def _decode_piece(self, codes: Tensor) -> Tensor:  # [n_q, frames] -> [1, samples]
        semantic = self.semantic.quantizer.get_output_from_indices(codes[:1])
        if codes.shape[0] > 1:
            missing = self.n_q - codes.shape[0]
            indices = F.pad(codes[1:].T.unsqueeze(0), (0, missing), value=-1)  # -1: a codebook left out
            acoustic = self.acoustic.quantizer.get_output_from_indices(indices)
        else:
            acoustic = semantic.new_zeros(1, codes.shape[1], self.config.acoustic_dim)
        return self.acoustic.synthesize(semantic, acoustic)

    def fingerprint(self, n_q: int) -> str:
        """See :meth:`Codec.fingerprint`."""
        parts = SEMANTIC_CODES if n_q == 1 else SEMANTIC_CODES + ACOUSTIC_CODES
        return hash_tensors({name: value for name, value in self.state_dict().items() if name.startswith(parts)})

    def code_vectors(self) -> Tensor:
        """Codebook 0 as the recogniser sees it, ``[card, dim]``: codes that sound alike lie close together."""
        return self.semantic.quantizer.get_output_from_indices(torch.arange(self.card).unsqueeze(0))[0]
