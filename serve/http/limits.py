"""How much is taken on at once, and how long one recording may be."""

from __future__ import annotations

import io

import soundfile

from serve.http.errors import ApiError, busy
from serve.http.settings import ServerSettings
from speechllm.errors import InputError

_HIGHEST_RATE = 48000  # Hz, of a recording of the greatest length: at twice the rate, half of it may be sent


class Places:
    """The questions a server has taken on and not yet answered. Used on the event loop only."""

    def __init__(self, settings: ServerSettings) -> None:
        self._limit = settings.max_queue
        self.taken = 0

    def take(self, count: int) -> None:
        """Raises ApiError: 429 when the places left are too few, 400 when there never are so many."""
        if count > self._limit:
            raise ApiError(400, f"{count} questions at once are more than this server answers ({self._limit})")
        if self.taken + count > self._limit:
            raise busy(f"{self.taken} questions are being answered, and the limit is {self._limit}: ask again later")
        self.taken += count

    def give_back(self, count: int) -> None:
        self.taken -= count


def check_length(content: bytes, name: str, max_seconds: float) -> None:
    """Refuse, by its header, a file that holds more than `max_seconds`: a small one may decode to hours.

    Of an unreadable file nothing is said: reading it tells what is wrong. Raises InputError.
    """
    try:
        info = soundfile.info(io.BytesIO(content))
    except soundfile.LibsndfileError:
        return
    if info.frames > max_seconds * min(info.samplerate, _HIGHEST_RATE):
        raise too_long(name, max_seconds)


def too_long(name: str, max_seconds: float) -> InputError:
    return InputError(f"{name}: longer than the {max_seconds:g} seconds this server takes; send it in parts")
