"""Synthetic speech from free engines run as subprocesses, behind one table of voices.

The same person stands behind several voices; splits are cut by person: a test voice is a person never trained on.
"""

import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from xml.sax.saxutils import escape

import numpy as np
import soundfile
import torch

from speechllm.audio import resample
from speechllm.data.manifest import Gender, Split
from speechllm.errors import InputError

SAMPLE_RATE = 16000  # Hz
Engine = Literal["flite", "festival", "espeak", "pico", "rhvoice", "mbrola"]

_PROGRAMS: dict[Engine, tuple[str, str]] = {  # engine -> program, Debian package that has it
    "flite": ("flite", "flite"),
    "festival": ("text2wave", "festival"),
    "espeak": ("espeak-ng", "espeak-ng"),
    "pico": ("pico2wave", "libttspico-utils"),
    "rhvoice": ("RHVoice-test", "rhvoice"),
    "mbrola": ("espeak-ng", "espeak-ng"),
}
# Without these an engine would fail on every text (festival) or speak in another voice without a word (the others).
_VOICE_DATA: dict[Engine, tuple[str, str]] = {  # engine -> folder of a voice below share/, Debian packages
    "festival": ("festival/voices/english/{}", "festvox-kallpc16k festvox-kdlpc16k"),
    "rhvoice": ("RHVoice/voices/{}", "rhvoice-english"),
    "mbrola": ("mbrola/{}", "mbrola mbrola-{}"),
}
_SHARE = (Path("/usr/share"), Path("/usr/local/share"))
_TIMEOUT = 60.0  # seconds; a sentence takes under one
_ESPEAK_WORDS_PER_MINUTE = 175
_ESPEAK_PITCH = 50
_FESTIVAL_PITCH = 105.0  # Hz, mean of the diphone voices
_EDGE_MARGIN = 0.03  # seconds kept around the speech


class EngineError(RuntimeError):
    """An engine that is installed failed on a text or returned silence."""


@dataclass(frozen=True)
class Voice:
    """A synthetic voice: `name` is ours, `engine_voice` the engine's, `person` the speaker it was made from.

    `share` is the relative weight of the voice when voices of its split and language are drawn at random. `accent` is
    that of English: an engine of another language reads English with its own sounds.
    """

    name: str
    engine: Engine
    engine_voice: str
    person: str
    language: str
    gender: Gender
    split: Split
    share: float
    accent: str | None = None

    @property
    def data(self) -> str:
        """Name of the voice's data on disk; espeak-ng calls MBROLA's `de2` speaking English `mb-de2-en`."""
        return self.engine_voice.split("-")[1] if self.engine == "mbrola" else self.engine_voice


_ESPEAK: tuple[tuple[str, Gender], ...] = (
    *((f"f{number}", "female") for number in range(1, 6)),
    *((name, "male") for name in ("m1", "m2", "m3", "m4", "m5", "m6", "m7", "klatt2", "klatt4")),
)

_ESPEAK_OTHER: tuple[tuple[str, Gender], ...] = (
    ("f2", "female"),
    ("f4", "female"),
    ("m2", "male"),
    ("m4", "male"),
    ("klatt2", "male"),
)
_ACCENTS = {
    "us": "American",
    "en": "British",
    "de": "German",
    "fr": "French",
    "nl": "Dutch",
    "gr": "Greek",
    "sw": "Swedish",
    "hu": "Hungarian",
    "pl": "Polish",
}
_MBROLA: tuple[tuple[str, str, Gender, Split, float], ...] = (  # espeak-ng's name, language, gender, split, share
    ("mb-us1", "en", "female", "train", 0.06),
    ("mb-us2", "en", "male", "train", 0.06),
    ("mb-en1", "en", "male", "train", 0.06),
    ("mb-de1-en", "en", "female", "train", 0.015),
    ("mb-de2-en", "en", "male", "train", 0.015),
    ("mb-fr1-en", "en", "male", "train", 0.015),
    ("mb-fr4-en", "en", "female", "train", 0.015),
    ("mb-nl2-en", "en", "male", "train", 0.015),
    ("mb-gr2-en", "en", "male", "train", 0.015),
    ("mb-sw1-en", "en", "male", "train", 0.015),
    ("mb-hu1-en", "en", "female", "train", 0.015),
    ("mb-pl1-en", "en", "female", "train", 0.015),
    ("mb-us3", "en", "male", "test", 0.5),
    ("mb-de4-en", "en", "male", "test", 0.5),
    ("mb-de5-en", "en", "female", "test", 0.5),
    ("mb-de1", "de", "female", "train", 0.13),
    ("mb-de2", "de", "male", "train", 0.13),
    ("mb-de3", "de", "female", "train", 0.13),
    ("mb-de6", "de", "male", "train", 0.13),
    ("mb-de7", "de", "female", "dev", 1.0),
    ("mb-de4", "de", "male", "test", 0.5),
    ("mb-de5", "de", "female", "test", 0.5),
    ("mb-fr1", "fr", "male", "train", 0.17),
    ("mb-fr4", "fr", "female", "train", 0.17),
    ("mb-fr6", "fr", "male", "train", 0.17),
    ("mb-fr7", "fr", "male", "dev", 1.0),
    ("mb-fr2", "fr", "female", "test", 0.5),
    ("mb-fr5", "fr", "male", "test", 0.5),
)


def _mbrola(name: str, language: str, gender: Gender, split: Split, share: float) -> Voice:
    person = name.split("-")[1]
    accent = _ACCENTS[person[:2]] if language == "en" else None
    return Voice(name.replace("mb-", "mbrola-"), "mbrola", name, person, language, gender, split, share, accent)


VOICES: tuple[Voice, ...] = (
    Voice("rhvoice-slt", "rhvoice", "slt", "slt", "en", "female", "train", 0.10, "American"),
    Voice("rhvoice-alan", "rhvoice", "alan", "awb", "en", "male", "train", 0.10, "Scottish"),
    Voice("rhvoice-lyubov", "rhvoice", "lyubov", "lyubov", "en", "female", "train", 0.075, "Russian"),
    Voice("rhvoice-evgeniy", "rhvoice", "evgeniy-eng", "evgeniy", "en", "male", "train", 0.075, "Russian"),
    Voice("flite-slt", "flite", "slt", "slt", "en", "female", "train", 0.10, "American"),
    Voice("flite-rms", "flite", "rms", "rms", "en", "male", "train", 0.11, "American"),
    Voice("flite-awb", "flite", "awb", "awb", "en", "male", "train", 0.08, "Scottish"),
    Voice("flite-kal16", "flite", "kal16", "kal", "en", "male", "train", 0.06, "American"),
    Voice("pico-en-us", "pico", "en-US", "pico-en-us", "en", "female", "train", 0.12, "American"),
    *(
        Voice(f"espeak-{v}", "espeak", f"en-us+{v}", "espeak", "en", gender, "train", 0.01, "American")
        for v, gender in _ESPEAK
    ),
    *(
        Voice(f"espeak-{lang}-{v}", "espeak", f"{lang}+{v}", "espeak", lang, gender, "train", 0.03)
        for lang in ("de", "fr")
        for v, gender in _ESPEAK_OTHER
    ),
    Voice("pico-de", "pico", "de-DE", "pico-de", "de", "female", "train", 0.33),
    Voice("pico-fr", "pico", "fr-FR", "pico-fr", "fr", "female", "train", 0.34),
    *(_mbrola(*row) for row in _MBROLA),
    Voice("festival-kal", "festival", "kal_diphone", "kal", "en", "male", "train", 0.04, "American"),
    Voice("festival-ked", "festival", "ked_diphone", "ked", "en", "male", "dev", 0.5, "American"),
    Voice("pico-en-gb", "pico", "en-GB", "pico-en-gb", "en", "female", "dev", 0.5, "British"),
    Voice("rhvoice-clb", "rhvoice", "clb", "clb", "en", "female", "test", 0.5, "American"),
    Voice("rhvoice-bdl", "rhvoice", "bdl", "bdl", "en", "male", "test", 0.5, "American"),
)


def voices(split: Split, language: str = "en") -> list[Voice]:
    """The voices of a split in one language, in table order."""
    return [voice for voice in VOICES if voice.split == split and voice.language == language]


def require_voice(voice: Voice) -> str:
    """Path of the voice's program; InputError naming the Debian package when it or the voice's data is missing."""
    program, package = _PROGRAMS[voice.engine]
    path = shutil.which(program)
    if path is None:
        raise InputError(f"speech engine {program} is not installed: apt-get install {package}")
    if voice.engine in _VOICE_DATA:
        folder, packages = _VOICE_DATA[voice.engine]
        if not any((share / folder.format(voice.data)).is_dir() for share in _SHARE):
            raise InputError(
                f"{program} has no voice {voice.engine_voice}: apt-get install {packages.format(voice.data)}"
            )
    return path


def _command(program: str, voice: Voice, text: str, rate: float, pitch: float, out: Path) -> tuple[list[str], str]:
    """The engine's command line and what it reads on standard input."""
    name = voice.engine_voice
    if voice.engine == "flite":  # f0_shift has no effect on the voice rms, whose pitch is fixed
        settings = ["--setf", f"duration_stretch={1 / rate:.4f}", "--setf", f"f0_shift={pitch:.4f}"]
        return [program, "-voice", name, *settings, "-t", text, "-o", str(out)], ""
    if voice.engine in ("espeak", "mbrola"):
        speed = str(round(_ESPEAK_WORDS_PER_MINUTE * rate))
        height = str(min(max(round(_ESPEAK_PITCH + 100 * (pitch - 1)), 0), 99))
        return [program, "-v", name, "-s", speed, "-p", height, "-w", str(out), "--stdin"], text
    if voice.engine == "pico":  # at volume 100 pico clips
        spoken = f"<volume level='50'>{escape(text)}</volume>"
        spoken = f"<speed level='{round(100 * rate)}'><pitch level='{round(100 * pitch)}'>{spoken}</pitch></speed>"
        return [program, "-l", name, "-w", str(out), spoken], ""
    if voice.engine == "rhvoice":
        settings = ["-r", str(round(100 * rate)), "-t", str(round(100 * pitch))]
        return [program, "-p", name, *settings, "-o", str(out)], text + "\n"
    setup = f"(begin (voice_{name}) (Parameter.set 'Duration_Stretch {1 / rate:.4f})"
    if pitch != 1:
        mean = f"(target_f0_mean {_FESTIVAL_PITCH * pitch:.1f})"
        setup += f" (set! int_lr_params '({mean} (target_f0_std 14) (model_f0_mean 170) (model_f0_std 34)))"
    setup += ")"
    return [program, "-eval", setup, "-o", str(out)], text + "\n"


def _trim(wav: np.ndarray) -> np.ndarray:
    """Cut the engine's own silence (50 dB below the loudest 10 ms) at both ends; empty when all is silence."""
    step = SAMPLE_RATE // 100
    blocks = wav[: len(wav) // step * step].reshape(-1, step)
    level = np.sqrt((blocks**2).mean(axis=1))
    if not len(level) or level.max() < 1e-4:
        return wav[:0]
    loud = np.flatnonzero(level > level.max() * 10 ** (-50 / 20))
    margin = round(_EDGE_MARGIN * SAMPLE_RATE)
    return wav[max(loud[0] * step - margin, 0) : (loud[-1] + 1) * step + margin]


def speak(text: str, voice: Voice, rate: float = 1.0, pitch: float = 1.0) -> np.ndarray:
    """Speak `text`: float32 [samples] at 16 kHz, silence at the ends trimmed.

    `rate` and `pitch` are factors of the voice's own. Raises InputError when the text is blank or the engine is not
    installed, EngineError when the engine fails or says nothing.
    """
    text = " ".join(text.split())
    if not text:
        raise InputError("there is no text to speak")
    program = require_voice(voice)
    with tempfile.TemporaryDirectory(prefix="speak-") as folder:
        out = Path(folder) / "out.wav"
        command, stdin = _command(program, voice, text, rate, pitch, out)
        try:
            done = subprocess.run(command, input=stdin, text=True, capture_output=True, timeout=_TIMEOUT)
        except subprocess.TimeoutExpired as error:
            raise EngineError(f"{voice.name}: no answer within {_TIMEOUT:.0f} s for {text!r}") from error
        if done.returncode or not out.is_file() or out.stat().st_size <= 44:  # a WAV header alone has 44 bytes
            reason = (done.stderr.strip().splitlines() or ["no output"])[-1]
            raise EngineError(f"{voice.name}: {reason} (exit status {done.returncode}) for {text!r}")
        samples, sample_rate = soundfile.read(out, dtype="float32", always_2d=True)
    wav = torch.from_numpy(samples.mean(axis=1, keepdims=True).T.copy())  # [1, samples]
    spoken = _trim(resample(wav, sample_rate, SAMPLE_RATE)[0].numpy())
    if not len(spoken):
        raise EngineError(f"{voice.name}: only silence for {text!r}")
    return spoken
