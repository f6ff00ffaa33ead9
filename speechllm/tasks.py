"""What a task is: the words that ask for it, how its answer is written and read back, and its metric."""

import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Literal

Metric = Literal["wer", "bleu"]


def normalize_instruction(text: str) -> str:
    """Strip and collapse white space; case and punctuation stay. What users type and what is trained pass here."""
    return " ".join(text.split())


@dataclass(frozen=True)
class Segment:
    """A stretch of speech: who spoke from `start` to `end` (seconds), and what; "" where the words are not known."""

    speaker: str | None
    start: float
    end: float
    text: str = ""


@dataclass(frozen=True)
class ParsedAnswer:
    """An answer as read back by its task."""

    text: str
    segments: tuple[Segment, ...] = ()
    label: str | None = None


@dataclass(frozen=True)
class Task:
    """A task whose answer is the words of the speech, or their translation.

    target: ISO 639-1 code of the language to translate into; None keeps the language of the speech.
    wordings: instructions used in training. held_out: instructions never trained on, to test unseen wordings.
    """

    name: str
    target: str | None
    wordings: tuple[str, ...]
    held_out: tuple[str, ...]
    metric: Metric

    def write(self, text: str | None, translations: Mapping[str, str]) -> str | None:
        """The answer for speech with this text (its words; "" for no speech; None when unknown).

        Returns "" for no speech and None when the data do not hold the answer. White space is collapsed.
        """
        if text is not None and not text.strip():
            return ""
        answer = text if self.target is None else translations.get(self.target)
        return None if answer is None else " ".join(answer.split())

    def read(self, answer: str) -> ParsedAnswer:
        """Read a generated answer back; any text is a valid answer to these tasks."""
        return ParsedAnswer(text=answer.strip())


_TRANSCRIBE = (
    "Transcribe this audio",
    "Transcribe this audio.",
    "transcribe this audio",
    "Transcribe the audio.",
    "Transcribe this recording.",
    "Transcribe the speech.",
    "Transcribe this clip.",
    "Transcribe what you hear.",
    "Transcribe what is said.",
    "Please transcribe this audio.",
    "Please transcribe the recording.",
    "Can you transcribe this?",
    "Could you transcribe this recording for me?",
    "Write down what is said.",
    "Write down what you hear.",
    "Write out the words of this recording.",
    "Write a transcript of this audio.",
    "Give me a transcript.",
    "Give the exact words spoken here.",
    "Provide a transcript of the speech.",
    "What is said in this audio?",
    "What does the speaker say?",
    "What words are spoken in this clip?",
    "What did they say?",
    "Turn this speech into text.",
    "Convert the speech to text.",
    "speech to text",
    "Type out what the person says.",
    "Put the spoken words in writing.",
    "I need the text of this recording.",
)
_TRANSCRIBE_HELD_OUT = (
    "Please write out what the speaker is saying.",
    "What can be heard in this recording, word for word?",
    "Make a written record of the speech.",
    "Tell me the words that are spoken.",
    "Take this down as text.",
)

_TRANSLATE = (
    "Translate this audio to {language}",
    "Translate this audio to {language}.",
    "translate this audio to {language}",
    "Translate this audio into {language}.",
    "Translate the audio to {language}.",
    "Translate this recording into {language}.",
    "Translate this clip to {language}.",
    "Translate the speech into {language}.",
    "Translate the speech to {language}.",
    "Translate what is said into {language}.",
    "Translate what you hear to {language}.",
    "Translate to {language}.",
    "Translate into {language}.",
    "Please translate this audio to {language}.",
    "Please translate the recording into {language}.",
    "Can you translate this into {language}?",
    "Could you translate this recording to {language} for me?",
    "Write down in {language} what is said.",
    "Write a {language} translation of this audio.",
    "Give me a {language} translation.",
    "Provide a {language} translation of the speech.",
    "Say this in {language}.",
    "What is said here, in {language}?",
    "What does the speaker say, in {language}?",
    "How would you say this in {language}?",
    "Put this into {language}.",
    "Turn this speech into {language} text.",
    "Convert the speech to {language} text.",
    "{language} translation",
    "I need this recording in {language}.",
)
_TRANSLATE_HELD_OUT = (
    "Please give the meaning of this clip in {language}.",
    "What would this be in {language}?",
    "Render the spoken words in {language}.",
    "Tell me in {language} what the person says.",
    "Make a {language} version of this recording.",
)


def _translation(target: str, language: str) -> Task:
    return Task(
        name=f"translate_{target}",
        target=target,
        wordings=tuple(wording.format(language=language) for wording in _TRANSLATE),
        held_out=tuple(wording.format(language=language) for wording in _TRANSLATE_HELD_OUT),
        metric="bleu",
    )


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("transcribe", None, _TRANSCRIBE, _TRANSCRIBE_HELD_OUT, "wer"),
        _translation("de", "German"),
        _translation("fr", "French"),
    )
}


def find_task(instruction: str) -> Task | None:
    """The task that this instruction is a known wording of (trained or held out), or None.

    Case, white space and final punctuation do not matter. An instruction without a task is no error: the model
    answers it in its own way, and the answer is read as plain text.
    """
    return _tasks_by_key().get(_key(instruction))


def _key(instruction: str) -> str:
    key = normalize_instruction(instruction).casefold()
    while key and (unicodedata.category(key[-1])[0] == "P" or key[-1].isspace()):
        key = key[:-1]
    return key


@cache
def _tasks_by_key() -> dict[str, Task]:
    return {_key(wording): task for task in TASKS.values() for wording in task.wordings + task.held_out}
