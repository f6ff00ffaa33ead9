"""When anybody speaks, without our model: by energy, and by silero-vad as its package comes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cache
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from speechllm._torchaudio import import_torchaudio
from speechllm.errors import InputError
from speechllm.tasks import ParsedAnswer, Task, Time
from speechllm.tasks.timed import NO_SPEECH, VoiceActivity
from train.baseline_system import needed
from train.questions import Advance, Question

RATE = 16000  # Hz
HOP, WINDOW = 160, 480  # samples: a level every 10 ms, over 30 ms
# of the levels of a clip: what its noise and its speech are taken to be
QUIET, LOUD = 0.1, 0.95
# Fixed beforehand for all sets: the best of a grid on made conversations of a dev split, as they are and in white noise
# at 10 dB. Never chosen on what is scored.
SHARE = 0.15  # of the way in dB from quiet to loud, from which on it is speech
LEAST_RANGE = 6.0  # dB between the two: where they lie closer, nobody speaks
BRIDGED, SHORTEST = 0.3, 0.1  # seconds: pauses up to the one are speech, stretches below the other are not
FLOOR = -70.0  # dBFS: nothing is quieter

Stretch = tuple[float, float]  # from, to; seconds


class EnergyVad:
    """Speech is where the level is high for the clip; short pauses are bridged."""

    name = "energy_vad"

    def answer(self, questions: Sequence[Question], task: Task, advance: Advance) -> list[ParsedAnswer]:
        """Raises InputError for another task than voice activity."""
        return _answered(self.name, energy_stretches, questions, task, advance)


class SileroVad:
    """silero-vad with the settings its package comes with."""

    name = "silero_vad"

    def answer(self, questions: Sequence[Question], task: Task, advance: Advance) -> list[ParsedAnswer]:
        """Raises InputError for another task than voice activity."""
        return _answered(self.name, silero_stretches, questions, task, advance)


def energy_stretches(wav: Tensor) -> list[Stretch]:
    """Where ``wav`` ``[1, samples]`` at RATE is loud, for what it is."""
    padded = F.pad(wav.square(), (WINDOW // 2, WINDOW // 2))
    power = F.avg_pool1d(padded, WINDOW, HOP)[0]
    level = (10 * power.clamp_min(1e-12).log10()).clamp_min(FLOOR)  # [frames], about its middle
    quiet, loud = level.quantile(torch.tensor([QUIET, LOUD])).tolist()
    if loud - quiet < LEAST_RANGE:
        return []
    above = (level > quiet + SHARE * (loud - quiet)).tolist()
    seconds, end = HOP / RATE, wav.shape[-1] / RATE
    stretches: list[Stretch] = []
    place = 0
    for speech, run in groupby(above):
        length = len(list(run))
        start, stop = max(0.0, (place - 0.5) * seconds), min(end, (place + length - 0.5) * seconds)
        place += length
        if speech and stretches and start - stretches[-1][1] <= BRIDGED:
            stretches[-1] = (stretches[-1][0], stop)
        elif speech:
            stretches.append((start, stop))
    return [(start, stop) for start, stop in stretches if stop - start >= SHORTEST]


def silero_stretches(wav: Tensor) -> list[Stretch]:
    """Where silero-vad hears speech in ``wav`` ``[1, samples]`` at RATE."""
    threads = torch.get_num_threads()  # its import sets one
    try:
        package = needed("silero_vad", "silero_vad", "silero-vad")
        found = package.get_speech_timestamps(wav[0], _detector(), sampling_rate=RATE)
    finally:
        torch.set_num_threads(threads)
    return [(one["start"] / RATE, one["end"] / RATE) for one in found]


@cache
def _detector() -> Any:
    return needed("silero_vad", "silero_vad", "silero-vad").load_silero_vad()


def _answered(
    name: str,
    stretches: Callable[[Tensor], Iterable[Stretch]],
    questions: Sequence[Question],
    task: Task,
    advance: Advance,
) -> list[ParsedAnswer]:
    if not isinstance(task, VoiceActivity):
        raise InputError(f"{name}: it tells when anybody speaks (activity), and does not answer {task.name}")
    import_torchaudio()  # silero-vad asks for it
    answers = []
    for question in questions:
        times = tuple(Time(seconds) for stretch in stretches(question.wav(RATE)) for seconds in stretch)
        answers.append(task.read(times or (NO_SPEECH,)))
        advance(1)
    return answers
