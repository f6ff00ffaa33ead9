"""Languages by their codes, whatever they are called, and the scripts they are written in."""

from __future__ import annotations

import unicodedata
from functools import cache

import langcodes
from langcodes.data_dicts import LIKELY_SUBTAGS

from speechllm.errors import InputError

SHORTEST_NAME = 3  # letters: what is shorter is a code
# ISO 15924 script -> how the Unicode names of its letters begin
_LETTERS: dict[str, tuple[str, ...]] = {
    "Arab": ("ARABIC",),
    "Armn": ("ARMENIAN",),
    "Beng": ("BENGALI",),
    "Cyrl": ("CYRILLIC",),
    "Deva": ("DEVANAGARI",),
    "Ethi": ("ETHIOPIC",),
    "Geor": ("GEORGIAN",),
    "Grek": ("GREEK",),
    "Gujr": ("GUJARATI",),
    "Guru": ("GURMUKHI",),
    "Hans": ("CJK",),
    "Hant": ("CJK", "BOPOMOFO"),
    "Hebr": ("HEBREW",),
    "Jpan": ("CJK", "HIRAGANA", "KATAKANA", "KATAKANA-HIRAGANA", "IDEOGRAPHIC"),
    "Khmr": ("KHMER",),
    "Knda": ("KANNADA",),
    "Kore": ("HANGUL", "CJK"),
    "Laoo": ("LAO",),
    "Latn": ("LATIN", "MODIFIER", "FEMININE", "MASCULINE"),
    "Mlym": ("MALAYALAM",),
    "Mymr": ("MYANMAR",),
    "Orya": ("ORIYA",),
    "Sinh": ("SINHALA",),
    "Taml": ("TAMIL",),
    "Telu": ("TELUGU",),
    "Thai": ("THAI",),
    "Tibt": ("TIBETAN",),
}
# Languages that are written in more scripts than their usual one.
_MORE_SCRIPTS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("bs", "sr", "kk", "ky", "ug"), ("Latn", "Cyrl", "Arab")),
    **dict.fromkeys(("az", "ku", "tg", "tk", "tt", "uz"), ("Latn", "Cyrl", "Arab")),
    **dict.fromkeys(("ha", "ms", "so", "wo"), ("Latn", "Arab")),
    **dict.fromkeys(("pa", "sd", "ks"), ("Guru", "Deva", "Arab")),
    "mn": ("Cyrl", "Latn"),
    "ro": ("Latn", "Cyrl"),
}


@cache
def language_code(name: str) -> str:
    """ISO 639 code, of two letters where there is one: "en-US", "eng", "English" -> "en"; "x-…" is one's own name.

    A language that is what another name usually means has the code of that one: "cmn", "Mandarin", "Chinese" -> "zh".

    Raises InputError when no language is called so.
    """
    words = name.strip()
    tag = words.replace("_", "-")
    if tag.lower().startswith("x-"):
        return tag.lower()
    try:
        language = langcodes.get(tag)
        if language.is_valid() and language.language:
            return str(language.prefer_macrolanguage().language)
        raise LookupError(name)
    except (langcodes.LanguageTagError, LookupError):
        pass
    try:
        if len(words) < SHORTEST_NAME:
            raise LookupError(name)
        return str(langcodes.find(words, "en").prefer_macrolanguage().language)
    except LookupError:
        raise InputError(
            f"language {name!r} is none that is known: give its ISO 639 code, such as en or mdw, or x-NAME for a "
            "language without one"
        ) from None


@cache
def _letters_of(language: str) -> tuple[str, ...]:
    """How the names of the letters of a language begin; none when that is not known."""
    if language not in LIKELY_SUBTAGS:  # a set's own name, or a language whose script langcodes would guess
        return ()
    scripts = {langcodes.get(language).maximize().script, *_MORE_SCRIPTS.get(language, ())}
    return tuple(beginning for script in scripts for beginning in _LETTERS.get(script or "", ()))


@cache
def _begins(letter: str) -> str:
    return unicodedata.name(letter, "").partition(" ")[0]


def written_in(text: str, language: str) -> float | None:
    """Share of the letters that are of a script of the language; None without letters, or where that is not known."""
    letters = [character for character in unicodedata.normalize("NFKC", text) if character.isalpha()]
    own = _letters_of(language)
    if not letters or not own:
        return None
    return sum(_begins(letter) in own for letter in letters) / len(letters)
