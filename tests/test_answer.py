"""Files and an instruction in, answers out: in order, whole, and with nothing hidden."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from conftest import require_engine
from test_text import byte_level

from serve.answer import Answer, Answerer, Failure
from speechllm.audio import read_audio
from speechllm.checkpoint import Checkpoint, load_checkpoint
from speechllm.data.synthesis import SAMPLE_RATE, VOICES, speak
from speechllm.errors import InputError
from speechllm.model import ModelConfig, make_model
from speechllm.prompt import Example, labels, render
from speechllm.text import HuggingFaceTokenizer
from speechllm.vocabulary import Vocabulary

ASK = "Transcribe this audio"
KEYS = [
    "file",
    "instruction",
    "text",
    "segments",
    "label",
    "confidence",
    "seconds_in",
    "seconds_consumed",
    "finish_reason",
    "timings",
]


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint: Path) -> Checkpoint:
    return load_checkpoint(tiny_checkpoint)


@torch.no_grad()
def saying(folder: Path, answer: str) -> Checkpoint:
    """The tiny checkpoint, its weights set so that it answers this to everything: each id leads to the next one."""
    checkpoint = load_checkpoint(folder)
    ids = [checkpoint.vocabulary.answer, *checkpoint.text.encode(answer), checkpoint.vocabulary.end]
    assert len(set(ids)) == len(ids)
    for name, weight in checkpoint.lm.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj")):
            weight.zero_()  # what is left of a layer is its residual: the state is the last id's embedding
    states = checkpoint.lm.model.norm(checkpoint.lm.get_input_embeddings().weight)  # [vocabulary, hidden]
    head = torch.zeros_like(states)
    head[ids[1:]] = 0.3 * states[ids[:-1]]
    checkpoint.lm.lm_head.weight = torch.nn.Parameter(head)
    return checkpoint


@pytest.fixture(scope="module")
def taught(tiny_checkpoint: Path) -> Checkpoint:
    return saying(tiny_checkpoint, "two words")


def noise(seconds: float, seed: int = 0) -> np.ndarray:
    return 0.1 * np.random.default_rng(seed).standard_normal(round(seconds * SAMPLE_RATE)).astype(np.float32)


def write(path: Path, samples: np.ndarray, subtype: str = "PCM_16") -> str:
    soundfile.write(path, samples, SAMPLE_RATE, subtype=subtype)
    return str(path)


def ask(checkpoint: Checkpoint, files: list[str], instruction: str = ASK, batch_size: int = 8) -> list[Answer]:
    answers = list(Answerer(checkpoint, batch_size).ask(files, instruction))
    assert all(isinstance(answer, Answer) for answer in answers), answers
    return [answer for answer in answers if isinstance(answer, Answer)]


def test_answer_to_dict_is_the_contract(checkpoint: Checkpoint, tmp_path: Path) -> None:
    file = write(tmp_path / "a.wav", noise(1.5))
    (answer,) = ask(checkpoint, [file], "  Transcribe   this audio ")
    assert list(answer.to_dict()) == KEYS
    assert answer.to_dict()["file"] == file
    assert answer.to_dict()["instruction"] == ASK
    assert answer.to_dict()["seconds_in"] == answer.to_dict()["seconds_consumed"] == 1.5
    assert list(answer.timings) == ["read", "encode", "generate"]
    assert min(answer.timings.values()) > 0
    assert answer.finish_reason == "length"  # random weights never stop, and that is not hidden
    assert answer.label is None
    assert 0 < answer.confidence < 1
    segment = answer.to_dict()["segments"][0]
    assert segment == {"speaker": None, "start": 0.0, "end": 1.5, "text": answer.text}


def test_a_taught_answer_and_its_confidence(taught: Checkpoint, tmp_path: Path) -> None:
    file = write(tmp_path / "a.wav", noise(1.0))
    (answer,) = ask(taught, [file])
    assert (answer.text, answer.finish_reason) == ("two words", "stop")
    codes = taught.encode(read_audio(file, SAMPLE_RATE))
    rendered = render(Example(codes, ASK, "two words"), taught.vocabulary, taught.text)
    with torch.inference_mode():
        loss = taught.lm(input_ids=rendered.ids[None], labels=labels(rendered)[None]).loss
    assert 0.1 < answer.confidence < 0.95
    assert answer.confidence == pytest.approx(math.exp(-loss), rel=1e-3)  # the end id counts too


def test_an_empty_answer_means_no_speech(tiny_checkpoint: Path, tmp_path: Path) -> None:
    (answer,) = ask(saying(tiny_checkpoint, ""), [write(tmp_path / "a.wav", noise(1.0))])
    assert (answer.text, answer.segments, answer.finish_reason) == ("", (), "no_speech")
    assert answer.timings["generate"] > 0
    assert answer.seconds_consumed == 1.0


@pytest.mark.parametrize("samples", [np.zeros(20 * SAMPLE_RATE), np.zeros(1), 1e-4 * noise(2.0)])
def test_silence_is_not_put_before_the_model(checkpoint: Checkpoint, tmp_path: Path, samples: np.ndarray) -> None:
    (answer,) = ask(checkpoint, [write(tmp_path / "a.wav", samples)])
    assert (answer.text, answer.segments, answer.finish_reason) == ("", (), "no_speech")
    assert answer.confidence == 1.0
    assert answer.timings["generate"] == 0.0
    assert answer.seconds_consumed == answer.seconds_in == len(samples) / SAMPLE_RATE


def test_a_clip_shorter_than_a_frame_is_answered(taught: Checkpoint, tmp_path: Path) -> None:
    (answer,) = ask(taught, [write(tmp_path / "a.wav", noise(0.01))])
    assert (answer.text, answer.finish_reason) == ("two words", "stop")
    assert answer.seconds_consumed == answer.seconds_in == 0.01


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_order_is_kept_and_bad_files_stop_nobody(checkpoint: Checkpoint, tmp_path: Path, batch_size: int) -> None:
    good = [write(tmp_path / f"{i}.wav", noise(0.5 + 0.4 * i, seed=i)) for i in range(4)]
    silent = write(tmp_path / "silent.wav", np.zeros(8000))
    (tmp_path / "empty.wav").touch()
    bad = [str(tmp_path / "empty.wav"), str(tmp_path / "missing.wav")]
    files = [bad[0], good[0], good[1], bad[1], silent, good[2], good[3]]
    answers = list(Answerer(checkpoint, batch_size).ask(files, ASK))
    assert [answer.file for answer in answers] == files
    for answer in answers:
        assert isinstance(answer, Failure) == (answer.file in bad)
        if isinstance(answer, Failure):
            assert answer.file in answer.error
            assert list(answer.to_dict()) == ["file", "error"]
    alone = {file: ask(checkpoint, [file])[0] for file in [*good, silent]}
    for answer in answers:
        if isinstance(answer, Answer):
            assert (answer.text, answer.finish_reason) == (alone[answer.file].text, alone[answer.file].finish_reason)
            assert answer.confidence == pytest.approx(alone[answer.file].confidence, rel=1e-4)
    assert len({alone[file].confidence for file in good}) == len(good)


def test_ten_minutes_are_answered_whole(taught: Checkpoint, tmp_path: Path) -> None:
    require_engine("flite")
    voice = next(voice for voice in VOICES if voice.name == "flite-rms")
    sentence = speak("A man in a red shirt is riding a bicycle down the street.", voice)
    turn = np.concatenate([sentence, np.zeros(25 * SAMPLE_RATE - len(sentence), dtype=np.float32)])
    file = write(tmp_path / "long.wav", np.tile(turn, 24))
    (answer,) = ask(taught, [file])
    assert answer.seconds_in == answer.seconds_consumed == 600.0
    assert answer.finish_reason == "stop"
    assert len(answer.segments) == 24
    assert answer.text == " ".join(["two words"] * 24)
    limit = taught.settings.max_audio_seconds
    for turn_number, segment in enumerate(answer.segments):
        assert 0 < segment.end - segment.start <= limit
        start = 25.0 * turn_number
        assert segment.start <= start + 0.1
        assert start + len(sentence) / SAMPLE_RATE - 0.1 <= segment.end <= start + 25


def test_impossible_requests_are_refused_before_reading(checkpoint: Checkpoint) -> None:
    answerer = Answerer(checkpoint)
    missing = ["missing.wav"]
    with pytest.raises(InputError, match="instruction is empty"):
        answerer.ask(missing, "  ")
    with pytest.raises(InputError, match=r"a prompt of \d+ ids exceeds .* a shorter instruction"):
        answerer.ask(missing, "word " * 600)
    shot = Example(torch.zeros(1, 200, dtype=torch.int64), ASK, "hello")
    with pytest.raises(InputError, match="fewer or shorter shots"):
        answerer.ask(missing, ASK, [shot] * 3)
    with pytest.raises(InputError, match="shot 1 has no answer"):
        answerer.ask(missing, ASK, [Example(shot.codes, ASK)])
    with pytest.raises(InputError, match="batch size"):
        Answerer(checkpoint, 0)


def test_a_clip_that_does_not_fit_beside_the_shots_fails_alone(checkpoint: Checkpoint, tmp_path: Path) -> None:
    shot = Example(torch.zeros(1, 350, dtype=torch.int64), ASK, "hello")
    files = [write(tmp_path / "long.wav", noise(7.0)), write(tmp_path / "short.wav", noise(0.5))]
    first, second = Answerer(checkpoint).ask(files, ASK, [shot])
    assert isinstance(first, Failure) and first.error.startswith(f"{files[0]}: a prompt of ")
    assert isinstance(second, Answer)


def test_rows_that_are_no_text_are_never_chosen(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Special tokens and spare rows of a language model, here the most likely ids everywhere."""
    text = HuggingFaceTokenizer(byte_level().to_str().encode())
    vocabulary = Vocabulary(text.size + 9, n_q=1, card=16)
    sizes = ModelConfig(hidden_size=32, num_layers=1, expert_size=32, num_experts=4, max_positions=512)
    lm = make_model(sizes, vocabulary.size, vocabulary.pad, vocabulary.end).eval()
    unwanted = [*text.hidden_ids, *range(text.size, vocabulary.text_size)]
    assert len(unwanted) == 3 + 9
    with torch.no_grad():
        for name, weight in lm.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj")):
                weight.zero_()
        lm.get_input_embeddings().weight.fill_(1)
        head = torch.zeros(vocabulary.size, 32)
        head[unwanted] = 1
        lm.lm_head.weight = torch.nn.Parameter(head)
        assert int(lm(torch.tensor([[0]])).logits.argmax()) in unwanted
    soundfile.write(tmp_path / "a.wav", noise(1.0), 16000)
    (answer,) = Answerer(replace(checkpoint, lm=lm, text=text, vocabulary=vocabulary)).ask(
        [str(tmp_path / "a.wav")], ASK
    )
    assert isinstance(answer, Answer)
    assert answer.text == text.decode([0]) * checkpoint.settings.max_answer_tokens
