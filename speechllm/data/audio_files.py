"""What files of audio, or bytes of such files, tell of themselves."""

from __future__ import annotations

import io
from pathlib import Path

import soundfile

from speechllm._containers import check_whole, prepare
from speechllm.audio import read_audio, to_seconds

_SUFFIXES = {"WAV": ".wav", "FLAC": ".flac", "OGG": ".ogg", "MP3": ".mp3", "MPEG": ".mp3", "AIFF": ".aiff"}
_ANY_RATE = 16000  # Hz, where a whole file must be decoded to learn its length, or does not tell its rate
_NO_LENGTH = 1 << 62  # frames: what libsndfile answers when the header does not say


def audio_seconds(source: Path | bytes) -> float:
    """Length in seconds, from the header; a file is decoded only where its header or its end tell nothing.

    Raises InputError when it is missing, not audio, without a sample, or visibly cut short.
    """
    name = "the audio" if isinstance(source, bytes) else str(source)
    try:
        prepared = prepare(io.BytesIO(source) if isinstance(source, bytes) else name, name)
        with soundfile.SoundFile(prepared) as file:
            frames, rate = file.frames, file.samplerate
            if 0 < frames < _NO_LENGTH:
                file.seek(frames - 1)
                if len(file.read(1)):
                    check_whole(prepared, file, frames, name)
                    return to_seconds(frames, rate)
    except (soundfile.LibsndfileError, OSError, TypeError):  # TypeError: raw samples, of which soundfile wants the rate
        pass
    # What is wrong, if anything, is said in the words of the one reader of audio.
    whole = read_audio(io.BytesIO(source) if isinstance(source, bytes) else source, _ANY_RATE)
    return to_seconds(whole.shape[1], _ANY_RATE)


def audio_suffix(content: bytes) -> str:
    """The usual suffix of the format these bytes are in. They must be audio."""
    with soundfile.SoundFile(io.BytesIO(content)) as file:
        return ".opus" if file.subtype == "OPUS" else _SUFFIXES.get(file.format, f".{file.format.lower()}")


def audio_rate(source: Path | bytes) -> int:
    """Its own sample rate in Hz; any rate for what is no audio: reading it then says what is wrong."""
    try:
        return int(soundfile.info(io.BytesIO(source) if isinstance(source, bytes) else str(source)).samplerate)
    except (soundfile.LibsndfileError, TypeError):
        return _ANY_RATE
