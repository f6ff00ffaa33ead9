"""How much is taken on at once, and how long one recording may be."""

from __future__ import annotations

import io

import soundfile

from serve.http.errors import ApiError, busy
from serve.http.settings import ServerSettings
from speechllm._containers import prepare
from speechllm.errors import InputError

_UPLOADS = 8  # as large as they may be: what all requests together may hold in memory, or on disk
_UNKNOWN = 1 << 62  # frames and more: a FLAC that was written to a pipe
_MAX_RATE = 768_000  # Hz
_MAX_CHANNELS = 16
_FULL_RATE = 48000  # Hz, of a recording of the greatest length: at twice the rate, half of it may be sent


class Places:
    """The questions a server has taken on and not yet answered, and their uploads. Used on the event loop only."""

    def __init__(self, settings: ServerSettings) -> None:
        self._limit = settings.max_queue
        self._most_bytes = _UPLOADS * settings.max_upload_bytes
        self.taken = 0
        self.bytes = 0

    def take(self, count: int, held: int = 0) -> None:
        """For a request that holds some. Raises ApiError: 429 when too few are left, 400 when there never are."""
        if count + held > self._limit:
            raise ApiError(400, f"{count + held} questions at once are more than this server answers ({self._limit})")
        if self.taken + count > self._limit:
            raise busy(f"{self.taken} questions are being answered, and the limit is {self._limit}: ask again later")
        self.taken += count

    def give_back(self, count: int) -> None:
        self.taken -= count

    def hold(self, count: int) -> None:
        """More bytes of an upload. Raises ApiError 429 when all uploads together are too large."""
        if self.bytes + count > self._most_bytes:
            raise busy(f"{self.bytes} bytes of uploads are being worked on: ask again later")
        self.bytes += count

    def let_go(self, count: int) -> None:
        self.bytes -= count


def check_length(content: bytes, name: str, max_seconds: float) -> None:
    """Refuse, by its header, a file that holds more than `max_seconds`: a small one may decode to hours.

    So is one of a rate that no recorder has: to change it takes memory by the rate, however short the file.
    Of an unreadable file nothing is said: reading it tells what is wrong. Raises InputError.
    """
    try:
        info = soundfile.info(prepare(io.BytesIO(content), name))
    except soundfile.LibsndfileError:
        return
    if info.frames > _UNKNOWN:
        raise InputError(
            f"{name}: its header does not say how long it is; convert it first: ffmpeg -i INPUT output.wav"
        )
    if info.channels > _MAX_CHANNELS:
        raise InputError(f"{name}: {info.channels} channels; up to {_MAX_CHANNELS} are taken")
    if info.samplerate > _MAX_RATE:
        raise InputError(f"{name}: of {info.samplerate} Hz; rates up to {_MAX_RATE} Hz are taken")
    if info.frames > max_seconds * info.samplerate:
        raise too_long(name, max_seconds)
    if info.frames > max_seconds * _FULL_RATE:
        most = max_seconds * _FULL_RATE / info.samplerate
        raise InputError(f"{name}: at {info.samplerate} Hz up to {most:g} seconds are taken; resample it first")


def too_long(name: str, max_seconds: float) -> InputError:
    return InputError(f"{name}: longer than the {max_seconds:g} seconds this server takes; send it in parts")
