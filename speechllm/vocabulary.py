"""The one place that does arithmetic on ids: text pieces | control tokens | times | codebook 0 | codebook 1 | …"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from speechllm.errors import InputError


@dataclass(frozen=True)
class Vocabulary:
    """Layout of the id space.

    text_size: text pieces. n_q: codebooks the LM sees. card: codes in each codebook.
    merge_repeats: write a run of equal codes as one id (shorter stream, durations are lost; n_q = 1 only).
    times: marks of times that answers may hold, one every TIME_STEP seconds from 0.
    acoustic_stride: codebooks after the first are written on one frame of so many: who speaks, and how, changes more
    slowly than the sounds, and positions are dear.
    mark_frames, mark_steps: after every `mark_frames` frames, if more follow, stands the mark of the time that has
    passed since the clip began; `mark_steps` is how many TIME_STEPs those frames last. 0 for none. For answers with
    times frames then need not be counted (TimeMarker, Chen et al. 2024).
    """

    text_size: int
    n_q: int
    card: int
    merge_repeats: bool = False
    times: int = 0
    acoustic_stride: int = 1
    mark_frames: int = 0
    mark_steps: int = 0

    TIME_STEP: ClassVar[float] = 0.04  # seconds, a frame of our codec
    MAX_SPEAKERS: ClassVar[int] = 8
    MASKED: ClassVar[int] = -1  # in codes
    # Slots no task uses yet are kept, so that a new control token moves no other id.
    num_controls: ClassVar[int] = 32
    # Settings that came later: left out of what is saved where they are 0, so that old layouts keep their fingerprints.
    _later: ClassVar[frozenset[str]] = frozenset({"mark_frames", "mark_steps"})
    _controls: ClassVar[tuple[str, ...]] = (
        *("pad", "audio_begin", "audio_end", "answer", "end"),
        *(f"speaker_{number}" for number in range(1, 9)),
        "mask",
    )

    def __post_init__(self) -> None:
        for name in ("text_size", "n_q", "card", "acoustic_stride"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise InputError(f"vocabulary.{name} must be a whole number of 1 or more, not {value!r}")
        for name in ("times", "mark_frames", "mark_steps"):
            value = getattr(self, name)
            if type(value) is not int or value < 0:
                raise InputError(f"vocabulary.{name} must be a whole number of 0 or more, not {value!r}")
        if bool(self.mark_frames) != bool(self.mark_steps) or (self.mark_frames and not self.times):
            raise InputError(
                "vocabulary.mark_frames needs mark_steps and times, and mark_steps them: set all, or no marks"
            )
        if type(self.merge_repeats) is not bool:
            raise InputError(f"vocabulary.merge_repeats must be true or false, not {self.merge_repeats!r}")
        if self.merge_repeats and self.n_q != 1:
            raise InputError(f"vocabulary.merge_repeats needs n_q = 1, not {self.n_q}: set merge_repeats to false")
        if self.merge_repeats and self.times:
            raise InputError("vocabulary.merge_repeats loses durations, so there can be no times: set one of them off")

    @property
    def size(self) -> int:
        """Number of ids, text, controls and codes together."""
        return self._audio_start + self.n_q * self.card

    @property
    def pad(self) -> int:
        """Fills a batch to the right; never in a sequence."""
        return self._control("pad")

    @property
    def audio_begin(self) -> int:
        """Before the first audio id of an example."""
        return self._control("audio_begin")

    @property
    def audio_end(self) -> int:
        """After the last audio id; the instruction follows."""
        return self._control("audio_end")

    @property
    def answer(self) -> int:
        """Ends the instruction; the answer follows."""
        return self._control("answer")

    @property
    def end(self) -> int:
        """Ends the answer."""
        return self._control("end")

    @property
    def mask(self) -> int:
        """Stands for a code that is hidden from the LM in training."""
        return self._control("mask")

    def speaker(self, number: int) -> int:
        """The mark of a speaker, numbered from 1. Raises InputError for more speakers than there are marks."""
        if not 1 <= number <= self.MAX_SPEAKERS:
            raise InputError(f"speaker {number}: there are marks for speakers 1 to {self.MAX_SPEAKERS}")
        return self._control(f"speaker_{number}")

    def time(self, seconds: float) -> int:
        """The mark nearest to a time. Raises InputError where there is none."""
        index = round(seconds / self.TIME_STEP)
        if not 0 <= index < self.times:
            last = (self.times - 1) * self.TIME_STEP
            limit = f"marks go from 0 to {last:.2f} s" if self.times else "this vocabulary has no marks of times"
            raise InputError(f"a time of {seconds:.2f} s: {limit}")
        return self._times_start + index

    def speaker_of(self, index: int) -> int | None:
        """The number of the speaker whose mark this id is, None for other ids."""
        number = index - self.speaker(1) + 1
        return number if 1 <= number <= self.MAX_SPEAKERS else None

    def seconds_of(self, index: int) -> float | None:
        """The time that this id marks, None for other ids."""
        step = index - self._times_start
        return round(step * self.TIME_STEP, 6) if 0 <= step < self.times else None

    def is_mark(self, ids: Tensor) -> Tensor:
        """Bool, shape of ids: marks of speakers and times."""
        speaker = (ids >= self.speaker(1)) & (ids <= self.speaker(self.MAX_SPEAKERS))
        return speaker | ((ids >= self._times_start) & (ids < self._audio_start))

    def text_ids(self, pieces: Sequence[int]) -> Tensor:
        """Ids [seq] int64 of text pieces. Raises ValueError for a piece outside [0, text_size)."""
        ids = torch.tensor(pieces, dtype=torch.int64).reshape(-1)  # [seq]
        if not bool(self.is_text(ids).all()):
            raise ValueError(f"a text piece is outside [0, {self.text_size})")
        return ids

    def audio_ids(self, codes: Tensor) -> Tensor:
        """Codes [n_q, frames] to ids [seq] int64, frame by frame: c0 c1 c0 c1 …, or c0 c1 c0 c0 c1 … with a stride.

        Between them are marks of the time, where the layout has them. A code of MASKED gives the id `mask`. With
        merge_repeats: ids [runs], a run of equal codes as one id. Raises ValueError for another shape, a dtype that is
        not integer, or a code outside [0, card); InputError for more frames than there are marks of times.
        """
        if codes.ndim != 2 or codes.shape[0] != self.n_q:
            raise ValueError(f"codes must be [n_q={self.n_q}, frames], not {list(codes.shape)}")
        if codes.dtype == torch.bool or codes.is_floating_point() or codes.is_complex():
            raise ValueError(f"codes must be integers, not {codes.dtype}")
        codes = codes.to(torch.int64)
        masked = codes == self.MASKED
        if bool((((codes < 0) & ~masked) | (codes >= self.card)).any()):
            raise ValueError(f"a code is outside [0, {self.card})")
        ids = (codes + self._offsets(codes)).masked_fill(masked, self.mask)
        if self.merge_repeats:
            return torch.unique_consecutive(ids[0]) if ids.shape[1] else ids[0]
        written = self._written(ids.shape[1], ids.device)
        if self.mark_frames:
            marks, passed = self._marks(ids.shape[1], ids.device)
            ids, written = torch.cat([passed[None], ids]), torch.cat([marks[:, None], written], dim=1)
        return ids.T[written]

    def codes(self, ids: Tensor) -> Tensor:
        """Ids [seq] back to codes [n_q, frames] int64: the inverse of `audio_ids`, MASKED where a code is.

        What the stride left out is as on the frame before. With merge_repeats a frame is a run: how long it was is
        gone. Raises ValueError when an id is no code of the codebook whose turn it is, the last frame is not whole, or
        the marks of the time are others than there should be.
        """
        if self.mark_frames:
            plain = replace(self, mark_frames=0, mark_steps=0)
            codes = plain.codes(ids[(ids < self._times_start) | (ids >= self._audio_start)])
            if not torch.equal(self.audio_ids(codes), ids):
                raise ValueError("the marks of the time are not where they should be among the audio ids")
            return codes
        whole, rest = divmod(ids.numel(), self.n_q + self.acoustic_stride - 1)
        frames = whole * self.acoustic_stride + max(0, rest - self.n_q + 1)
        if ids.ndim != 1 or 0 < rest < self.n_q:
            raise ValueError(f"audio ids must be whole frames with n_q = {self.n_q}, not {list(ids.shape)}")
        codes = torch.empty(frames, self.n_q, dtype=torch.int64, device=ids.device)
        codes[self._written(frames, ids.device)] = ids.to(torch.int64)
        codes[:, 1:] = codes[torch.arange(frames) // self.acoustic_stride * self.acoustic_stride, 1:]
        codes = codes.T  # [n_q, frames]
        masked = codes == self.mask
        codes = codes - self._offsets(codes)
        if bool((((codes < 0) | (codes >= self.card)) & ~masked).any()):
            raise ValueError("an id is not a code of the codebook whose turn it is")
        return codes.masked_fill(masked, self.MASKED).contiguous()

    def heard(self) -> str:
        """How audio is written, for people."""
        told = [f"{self.n_q} codebook{'s' * (self.n_q > 1)}"]
        if self.n_q > 1 and self.acoustic_stride > 1:
            told.append(f"all but the first on one frame of {self.acoustic_stride}")
        if self.merge_repeats:
            told.append("repeats merged")
        if self.mark_frames:
            told.append(f"the time every {self.mark_steps * self.TIME_STEP:.2f} s")
        return ", ".join(told)

    def ids_per_second(self, frame_rate: float) -> float:
        """Audio ids of a second of `frame_rate` frames, repeats not merged."""
        marks = 1 / self.mark_frames if self.mark_frames else 0
        return frame_rate * (1 + (self.n_q - 1) / self.acoustic_stride + marks)

    def _written(self, frames: int, device: torch.device) -> Tensor:
        """Bool [frames, n_q]: which codes are in the stream."""
        written = torch.ones(frames, self.n_q, dtype=torch.bool, device=device)
        written[:, 1:] = (torch.arange(frames, device=device) % self.acoustic_stride == 0)[:, None]
        return written

    def _marks(self, frames: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Bool [frames]: before which of them there is a mark of the time; and int64 [frames], the last mark passed."""
        number = torch.arange(frames, device=device) // self.mark_frames
        if frames:
            self.time(int(number[-1]) * self.mark_steps * self.TIME_STEP)  # refused where there is no such mark
        return number.diff(prepend=number[:1]) > 0, self._times_start + number * self.mark_steps

    def is_text(self, ids: Tensor) -> Tensor:
        """Bool, shape of ids: text pieces."""
        return (ids >= 0) & (ids < self.text_size)

    def is_audio(self, ids: Tensor) -> Tensor:
        """Bool, shape of ids: codes of any codebook, masked ones too."""
        return ((ids >= self._audio_start) & (ids < self.size)) | (ids == self.mask)

    def shared_ids(self, other: "Vocabulary") -> tuple[Tensor, Tensor]:
        """Ids here and ids in another vocabulary of the same text pieces and codebook size that mean the same."""
        marks = min(self.times, other.times)
        codes = min(self.n_q, other.n_q) * self.card
        sizes = (self.text_size + self.num_controls, marks, codes)
        starts = ((0, 0), (self._times_start, other._times_start), (self._audio_start, other._audio_start))
        return tuple(  # type: ignore[return-value]  # two of them
            torch.cat([torch.arange(size) + pair[side] for size, pair in zip(sizes, starts, strict=True)])
            for side in (0, 1)
        )

    def fingerprint(self, text_model: bytes = b"") -> str:
        """SHA-256 (hex) of the layout and the text model's bytes: equal only where ids mean the same."""
        layout = self.to_dict() | {
            "controls": list(self._controls),
            "num_controls": self.num_controls,
            "text_model": hashlib.sha256(text_model).hexdigest(),
        }
        return hashlib.sha256(json.dumps(layout, sort_keys=True).encode("utf-8")).hexdigest()

    def to_dict(self) -> dict[str, int | bool]:
        """The settings, ready for JSON."""
        return {name: value for name, value in asdict(self).items() if value or name not in self._later}

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> "Vocabulary":
        """The inverse of `to_dict`. Raises InputError for missing, unknown or invalid settings."""
        known = {field.name for field in fields(cls)}
        if wrong := sorted(known ^ (set(settings) | cls._later)):
            problem = "unknown" if wrong[0] in settings else "missing"
            raise InputError(f"vocabulary.{wrong[0]}: {problem} setting (expected {', '.join(sorted(known))})")
        return cls(**settings)

    @property
    def _times_start(self) -> int:
        return self.text_size + self.num_controls

    @property
    def _audio_start(self) -> int:
        return self._times_start + self.times

    def _control(self, name: str) -> int:
        return self.text_size + self._controls.index(name)

    def _offsets(self, like: Tensor) -> Tensor:
        return self._audio_start + self.card * torch.arange(self.n_q, device=like.device)[:, None]  # [n_q, 1]
