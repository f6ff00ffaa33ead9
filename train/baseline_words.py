"""Words without our model, or by a detour: PocketSphinx, and translation of what was transcribed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from speechllm.errors import InputError
from speechllm.metrics import normalize_text
from speechllm.tasks import TASKS, ParsedAnswer, Task
from speechllm.tasks.words import Words
from train.baseline_system import System, needed
from train.questions import Advance, Question

RATE = 16000  # Hz
AskText = Callable[[Sequence[str]], list[str]]  # instructions on text alone -> the answers to them


class PocketSphinx:
    """CMU's recogniser: hidden Markov models and trigrams, with the English model that its package carries."""

    name = "pocketsphinx"

    def __init__(self) -> None:
        """Raises InputError when it is not installed."""
        package = needed(self.name, "pocketsphinx", "pocketsphinx")
        self._decoder = package.Decoder(samprate=RATE, loglevel="FATAL")

    def answer(self, questions: Sequence[Question], task: Task, advance: Advance) -> list[ParsedAnswer]:
        """Raises InputError for another task than transcription, and for clips in another language."""
        if task.name != "transcribe":
            raise InputError(f"pocketsphinx: it transcribes, and does not answer {task.name}")
        for question in questions:
            language = question.item.utterance.language
            if language not in (None, "en"):
                raise InputError(f"pocketsphinx: {question.item.utterance.id} is {language!r}; its model is English")
        answers = []
        for question in questions:
            text = self._heard((question.wav(RATE)[0].clamp(-1, 1) * 32767).short().numpy().tobytes())
            answers.append(task.read((text,) if text else ()))
            advance(1)
        return answers

    def _heard(self, samples: bytes) -> str:
        """samples: 16 bit."""
        self._decoder.start_utt()
        self._decoder.process_raw(samples, full_utt=True)
        self._decoder.end_utt()
        best = self._decoder.hyp()
        return best.hypstr if best else ""


class Cascade:
    """Translation in two steps of the same model: it transcribes, and then translates its transcript as text.

    What a model that translates speech at once is to beat.
    """

    name = "cascade"

    def __init__(self, ours: System, ask_text: AskText) -> None:
        self._ours, self._ask_text = ours, ask_text

    def answer(self, questions: Sequence[Question], task: Task, advance: Advance) -> list[ParsedAnswer]:
        """Raises InputError for another task than a translation of speech."""
        if not isinstance(task, Words) or task.target is None:
            raise InputError(f"cascade: it translates speech, and does not answer {task.name}")
        transcribe, translate = TASKS["transcribe"], TASKS[f"translate_text_{task.target}"]
        asked = [replace(one, instruction=transcribe.wordings[0]) for one in questions]
        texts = [answer.text for answer in self._ours.answer(asked, transcribe, advance)]
        instructions = [translate.wordings[0].replace("{}", text) for text in texts if normalize_text(text)]
        said = iter(self._ask_text(instructions) if instructions else [])
        translations = [next(said) if normalize_text(text) else "" for text in texts]  # without a word, nothing to say
        return [task.read((text,) if text else ()) for text in translations]
