"""Text to phonemes in IPA through the espeak-ng library: one script for all languages."""

from __future__ import annotations

import ctypes
import ctypes.util
import re
from functools import cache

from speechllm.errors import InputError

VOICES = {"en": "en-us", "de": "de", "fr": "fr", "cs": "cs", "nl": "nl", "pl": "pl", "it": "it", "es": "es"}
_UTF8, _IPA, _NO_AUDIO = 1, 0x02, 0x02
_STRESS = re.compile("[ˈˌ]")


@cache
def _library() -> ctypes.CDLL:
    name = ctypes.util.find_library("espeak-ng")
    if name is None:
        raise InputError("espeak-ng is not installed: apt-get install espeak-ng")
    library = ctypes.CDLL(name)
    library.espeak_TextToPhonemes.restype = ctypes.c_char_p
    if library.espeak_Initialize(_NO_AUDIO, 0, None, 0) < 0:
        raise InputError("espeak-ng could not find its data: reinstall the package espeak-ng-data")
    return library


def phonemes(text: str, language: str) -> list[str]:
    """IPA phonemes of ``text`` without stress marks, e.g. ``["h", "ə", "l", "oʊ"]``.

    Raises:
        InputError: espeak-ng is not installed, or has no voice for the ISO 639-1 code ``language``.
    """
    library = _library()
    voice = VOICES.get(language)
    if voice is None or library.espeak_SetVoiceByName(voice.encode()) != 0:
        raise InputError(f"no phonemes for language {language!r}: known are {', '.join(sorted(VOICES))}")
    buffer = ctypes.create_string_buffer(text.encode())  # must outlive the calls: espeak-ng walks through it
    position = ctypes.c_void_p(ctypes.addressof(buffer))
    found: list[str] = []
    while position.value:  # espeak-ng answers one clause a call and moves the position behind it
        clause = library.espeak_TextToPhonemes(ctypes.byref(position), _UTF8, _IPA | ord("_") << 8)
        found += [p for p in re.split(r"[_\s]+", _STRESS.sub("", clause.decode())) if p and not p.startswith("(")]
    return found
