"""What a task is: the words that ask for it, how its answer is written and read back, and its metric."""

from speechllm.tasks import phrases as p
from speechllm.tasks import wordings as w
from speechllm.tasks.answer import Facts, ParsedAnswer, Part, Parts, Segment, Speaker, Time, shown
from speechllm.tasks.base import Metric, Task, normalize_instruction
from speechllm.tasks.few_shot import FewShot, FewShotLabel, few_shot_tasks
from speechllm.tasks.labels import (
    Accent,
    Emotion,
    Gender,
    Intent,
    IsEmotion,
    Language,
    NumberOfSpeakers,
    SpokenWord,
    Trait,
)
from speechllm.tasks.timed import Timed, VoiceActivity
from speechllm.tasks.words import NextText, TextTranslation, Words

__all__ = [
    "FEW_SHOT",
    "TASKS",
    "TRAINABLE",
    "TRAITS",
    "Facts",
    "FewShot",
    "FewShotLabel",
    "Metric",
    "ParsedAnswer",
    "Part",
    "Parts",
    "Segment",
    "Speaker",
    "Task",
    "Time",
    "Trait",
    "find_task",
    "normalize_instruction",
    "shown",
]

TARGETS = {"de": "German", "fr": "French", "cs": "Czech", "en": "English"}  # languages to translate into


def _in(language: str, texts: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(text.replace("LANG", language).replace("a English", "an English") for text in texts)


def _translations() -> list[Task]:
    tasks: list[Task] = []
    for code, name in TARGETS.items():
        spoken = (_in(name, w.TRANSLATE), _in(name, w.TRANSLATE_HELD_OUT), _in(name, p.TRANSLATE))
        written = (_in(name, w.TRANSLATE_TEXT), _in(name, w.TRANSLATE_TEXT_HELD_OUT), _in(name, p.TRANSLATE_TEXT))
        tasks += [
            Words(f"translate_{code}", "bleu", *spoken, target=code),
            TextTranslation(f"translate_text_{code}", "bleu", *written, target=code),
        ]
    return tasks


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Words("transcribe", "wer", w.TRANSCRIBE, w.TRANSCRIBE_HELD_OUT, p.TRANSCRIBE),
        Timed("transcribe_times", "wer", w.TRANSCRIBE_TIMES, w.TRANSCRIBE_TIMES_HELD_OUT, p.TRANSCRIBE_TIMES),
        *_translations(),
        Timed("diarize", "turns", w.DIARIZE, w.DIARIZE_HELD_OUT, p.DIARIZE, speakers=True),
        Timed("turns", "turns", w.TURNS, w.TURNS_HELD_OUT, p.TURNS, speakers=True, words=False),
        VoiceActivity("activity", "activity", w.ACTIVITY, w.ACTIVITY_HELD_OUT, p.ACTIVITY),
        Emotion("emotion", "accuracy", w.EMOTION, w.EMOTION_HELD_OUT, p.EMOTION),
        IsEmotion("is_emotion", "accuracy", w.IS_EMOTION, w.IS_EMOTION_HELD_OUT, p.IS_EMOTION),
        Language("language", "accuracy", w.LANGUAGE, w.LANGUAGE_HELD_OUT, p.LANGUAGE),
        Gender("gender", "accuracy", w.GENDER, w.GENDER_HELD_OUT, p.GENDER),
        Accent("accent", "accuracy", w.ACCENT, w.ACCENT_HELD_OUT, p.ACCENT),
        NumberOfSpeakers("speakers", "accuracy", w.SPEAKERS, w.SPEAKERS_HELD_OUT, p.SPEAKERS),
        SpokenWord("spoken_word", "accuracy", w.SPOKEN_WORD, w.SPOKEN_WORD_HELD_OUT, p.SPOKEN_WORD),
        Intent("intent", "slots", w.INTENT, w.INTENT_HELD_OUT, p.INTENT),
        NextText("next_text", "wer", w.NEXT_TEXT, w.NEXT_TEXT_HELD_OUT, p.NEXT_TEXT),
    )
}

FEW_SHOT = few_shot_tasks(w.TRANSCRIBE, w.TRANSCRIBE_HELD_OUT)
TRAINABLE: dict[str, Task] = {**TASKS, **FEW_SHOT}  # what a mixture may hold

TRAITS = tuple(task for task in TASKS.values() if isinstance(task, Trait))


def find_task(instruction: str) -> Task | None:
    """The task that this instruction is a trained wording of or a phrase says it, or None.

    Case, white space and final punctuation do not matter. An instruction without a task is no error: the model
    answers it in its own way, and the answer is read as plain text.
    """
    return next((task for task in TASKS.values() if task.match(instruction) is not None), None)
