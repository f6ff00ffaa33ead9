"""Files and instructions in, answers out: in order, whole, streamed, by one thread or several, and nothing hidden."""

import io
import math
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from conftest import ROOT, require_engine
from test_engine import Counting
from test_text import byte_level

from serve.answer import Answer, Failure
from serve.answerer import Answerer, Question
from serve.engine import PREFIXES
from speechllm.audio import read_audio
from speechllm.checkpoint import Checkpoint, load_checkpoint
from speechllm.data.synthesis import SAMPLE_RATE, VOICES, speak
from speechllm.errors import InputError
from speechllm.generate import generate
from speechllm.metrics import wer
from speechllm.model import ModelConfig, make_model
from speechllm.options import Options
from speechllm.prompt import Example, render
from speechllm.tasks import TASKS
from speechllm.text import HuggingFaceTokenizer
from speechllm.vocabulary import Vocabulary

ASK = "Transcribe this audio"
EMOTION = TASKS["emotion"].wordings[0]
TIMES = TASKS["transcribe_times"].wordings[0]
OTHER = "Say something nice about it"
INSTRUCTIONS = [ASK, EMOTION, OTHER, TIMES, TASKS["activity"].wordings[0], TASKS["diarize"].wordings[0]]


@pytest.fixture(scope="module")
def tiny(tiny_checkpoint: Path) -> Checkpoint:
    """Random weights, decoded by transformers: the kernel does not fit its sizes."""
    return load_checkpoint(tiny_checkpoint)


def lively(folder: Path) -> Checkpoint:
    """Random weights, decoded by the kernel, clips of up to 3 s; knows many tasks, and answers differ."""
    require_engine("c++")
    tiny = load_checkpoint(folder)
    torch.manual_seed(6)
    vocabulary = Vocabulary(tiny.text.size, n_q=1, card=16, times=76)
    sizes = ModelConfig(hidden_size=64, num_layers=2, expert_size=48, num_experts=4, max_positions=640)
    lm = make_model(sizes, vocabulary.size, vocabulary.pad, vocabulary.end).eval()
    with torch.no_grad():
        for parameter in lm.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.2)
    changes: dict[str, Any] = {"max_audio_seconds": 3.0, "max_answer_tokens": 12, "tasks": tuple(TASKS)}
    return replace(tiny, lm=lm, vocabulary=vocabulary, settings=tiny.settings.model_copy(update=changes))


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint: Path) -> Checkpoint:
    return lively(tiny_checkpoint)


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


def say(path: Path) -> str:
    """A file of three sentences, which is answered in as many pieces or more."""
    require_engine("flite")
    voice = next(voice for voice in VOICES if voice.name == "flite-rms")
    pause = np.zeros(2 * SAMPLE_RATE, dtype=np.float32)
    pieces = [speak(text, voice) for text in ("Ten men ran in the sun.", "Six kids sit in the city.", "Two dogs run.")]
    samples = np.concatenate([part for piece in pieces for part in (piece, pause)])
    return write(path, samples)


@pytest.fixture(scope="module")
def spoken(tmp_path_factory: pytest.TempPathFactory) -> str:
    return say(tmp_path_factory.mktemp("spoken") / "spoken.wav")


def noise(seconds: float, seed: int = 0) -> np.ndarray:
    return 0.1 * np.random.default_rng(seed).standard_normal(round(seconds * SAMPLE_RATE)).astype(np.float32)


def write(path: Path, samples: np.ndarray) -> str:
    soundfile.write(path, samples, SAMPLE_RATE)
    return str(path)


def clips(folder: Path, *seconds: float) -> list[str]:
    """Files of noise, none like another."""
    return [write(folder / f"{number}.wav", noise(long, seed=number)) for number, long in enumerate(seconds)]


def ask(
    checkpoint: Checkpoint,
    files: Sequence[str],
    instructions: str | Sequence[str] = ASK,
    batch_size: int = 8,
    **rest: Any,
) -> list[Answer]:
    return whole(Answerer(checkpoint, batch_size).ask(files, instructions, **rest))


def whole(answers: Any) -> list[Answer]:
    found = list(answers)
    assert all(isinstance(answer, Answer) for answer in found), found
    return found


def told(answer: Answer) -> dict[str, Any]:
    """All of it but how long it took."""
    return {name: value for name, value in answer.to_dict().items() if name != "timings"}


def finished(answerer: Answerer, *questions: Question) -> list[Answer]:
    deadline = time.monotonic() + 30
    while not all(question.done for question in questions):
        answerer.drive()
        assert time.monotonic() < deadline
    return [question.answer() for question in questions]


def test_a_taught_answer_and_its_confidence(taught: Checkpoint, tmp_path: Path) -> None:
    (file,) = clips(tmp_path, 1.0)
    (answer,) = ask(taught, [file], "  Transcribe   this audio ")
    assert (answer.text, answer.finish_reason) == ("two words", "stop")
    assert (answer.file, answer.instruction, answer.task) == (file, ASK, "transcribe")
    assert answer.seconds_in == answer.seconds_consumed == 1.0
    segment = answer.to_dict()["segments"][0]
    assert segment == {"speaker": None, "start": 0.0, "end": 1.0, "text": "two words"}
    assert list(answer.timings) == ["read", "encode", "queue", "first", "generate"]
    assert min(answer.timings.values()) > 0
    assert answer.timings["queue"] < answer.timings["first"] < answer.timings["generate"]
    codes = taught.encode(read_audio(file, SAMPLE_RATE))
    rendered = render(Example(codes, ASK, "two words"), taught.vocabulary, taught.text)
    assert (answer.tokens_in, answer.tokens_out) == (
        rendered.prompt_length,
        len(rendered.ids) - rendered.prompt_length - 1,
    )
    with torch.inference_mode():
        logits = taught.lm(input_ids=rendered.ids[None]).logits[0]
    allowed = taught.vocabulary.is_text(torch.arange(taught.vocabulary.size))  # what the answer's grammar lets through
    allowed[taught.text.hidden_ids] = False
    allowed[taught.vocabulary.end] = True
    chosen = logits.masked_fill(~allowed, -torch.inf).log_softmax(-1)[rendered.prompt_length - 1 : -1]
    scores = chosen.gather(1, rendered.ids[rendered.prompt_length :, None])
    assert 0.01 < answer.confidence < 0.95
    assert answer.confidence == pytest.approx(float(scores.sum().exp()), rel=1e-3)  # the end id counts too


def test_an_answer_is_what_the_model_says_to_the_rendered_prompt(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Shots too; the same ids as generate's, also one file after the other and all at once."""
    files = clips(tmp_path, 1.0, 0.4, 1.3)
    answerer = Answerer(checkpoint)
    assert answerer._engine.compiled  # type: ignore[attr-defined]
    shots = [
        answerer.shot(answerer.listen(files[2]), "  Transcribe  this audio", "hello you"),
        answerer.shot(answerer.listen(files[1]), ASK, ""),
    ]
    assert [(shot.instruction, shot.answer) for shot in shots] == [(ASK, "hello you"), (ASK, "")]
    allowed = answerer._grammars.of(TASKS["transcribe"]).allowed(None)
    found = {}
    for given in ([], shots[:1], shots):
        answers = ask(checkpoint, files, OTHER, shots=given)
        for file, answer in zip(files, answers, strict=True):
            example = Example(checkpoint.encode(read_audio(file, SAMPLE_RATE)), OTHER)
            prompt = render(example, checkpoint.vocabulary, checkpoint.text, given).ids
            (completion,) = generate(
                checkpoint.lm, [prompt], end_id=checkpoint.vocabulary.end, pad_id=checkpoint.vocabulary.pad,
                max_new_tokens=checkpoint.settings.max_answer_tokens, allowed=allowed,
            )  # fmt: skip
            assert answer.text == " ".join(checkpoint.text.decode(completion.ids).split())
            assert (answer.finish_reason, answer.task) == (completion.finish_reason, None)
            assert (answer.tokens_in, answer.tokens_out) == (len(prompt), len(completion.ids))
            found[file, len(given)] = answer.text
    assert len(set(found.values())) > 6


def test_random_weights_never_stop_and_that_is_not_hidden(tiny: Checkpoint, tmp_path: Path) -> None:
    (answer,) = ask(tiny, clips(tmp_path, 1.5))
    assert (answer.finish_reason, answer.tokens_out) == ("length", tiny.settings.max_answer_tokens)
    assert (answer.label, answer.slots) == (None, {})
    assert 0 < answer.confidence < 1


def test_an_empty_answer_means_no_speech(tiny_checkpoint: Path, tmp_path: Path) -> None:
    (answer,) = ask(saying(tiny_checkpoint, ""), clips(tmp_path, 1.0))
    assert (answer.text, answer.segments, answer.finish_reason) == ("", (), "no_speech")
    assert answer.timings["generate"] > 0
    assert answer.confidence < 1
    assert answer.seconds_consumed == 1.0


@pytest.mark.parametrize("samples", [np.zeros(20 * SAMPLE_RATE), np.zeros(1), 1e-4 * noise(2.0)])
def test_silence_is_not_put_before_the_model(checkpoint: Checkpoint, tmp_path: Path, samples: np.ndarray) -> None:
    file = write(tmp_path / "a.wav", samples)
    for answer in ask(checkpoint, [file], INSTRUCTIONS, options=Options(min_confidence=1.0)):
        assert (answer.text, answer.segments, answer.finish_reason) == ("", (), "no_speech")
        assert (answer.confidence, answer.tokens_in, answer.label) == (1.0, 0, None)
        assert answer.timings["generate"] == answer.timings["first"] == 0.0
        assert answer.seconds_consumed == answer.seconds_in == len(samples) / SAMPLE_RATE
    answerer = Answerer(checkpoint)
    calls: list[Question] = []
    question = answerer.pose(answerer.listen(file), ASK, on_change=calls.append)
    assert question.done and question.text == ""
    assert question.answer().finish_reason == "no_speech"
    assert answerer.waiting == 0
    with pytest.raises(InputError, match=r"a\.wav: as an example it must hold speech"):
        answerer.shot(question.recording, ASK, "hello")


def test_a_clip_shorter_than_a_frame_is_answered(taught: Checkpoint, tmp_path: Path) -> None:
    (answer,) = ask(taught, clips(tmp_path, 0.01))
    assert (answer.text, answer.finish_reason) == ("two words", "stop")
    assert answer.seconds_consumed == answer.seconds_in == 0.01


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_order_is_kept_and_bad_files_stop_nobody(checkpoint: Checkpoint, tmp_path: Path, batch_size: int) -> None:
    good = clips(tmp_path, 0.5, 0.9, 1.3, 1.7)
    silent = write(tmp_path / "silent.wav", np.zeros(8000))
    (tmp_path / "empty.wav").touch()
    bad = [str(tmp_path / "empty.wav"), str(tmp_path / "missing.wav")]
    files = [bad[0], good[0], good[1], bad[1], silent, good[2], good[3]]
    answers = list(Answerer(checkpoint, batch_size).ask(files, ASK))
    assert [answer.file for answer in answers] == files
    for answer in answers:
        assert isinstance(answer, Failure) == (answer.file in bad)
        if isinstance(answer, Failure):
            assert answer.error.startswith(answer.file)
    alone = {file: ask(checkpoint, [file])[0] for file in [*good, silent]}
    for answer in answers:
        if isinstance(answer, Answer):
            assert told(answer) == told(alone[answer.file])
    assert len({alone[file].text for file in good}) == len(good)


def test_answers_come_as_soon_as_they_are_there_and_files_are_read_when_needed(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    files = clips(tmp_path, 0.5, 0.5, 0.5, 0.5)
    answers = Answerer(checkpoint, batch_size=1).ask(files, ASK)
    first = next(answers)
    Path(files[3]).unlink()
    second, third, gone = answers
    assert [first.file, second.file, third.file, gone.file] == files
    assert isinstance(third, Answer) and isinstance(gone, Failure)


def test_several_instructions_are_answered_as_one_by_one(checkpoint: Checkpoint, spoken: str, tmp_path: Path) -> None:
    files = [*clips(tmp_path, 1.0, 0.6), spoken]
    together = ask(checkpoint, files, INSTRUCTIONS)
    answerer = Answerer(checkpoint)
    recordings = [answerer.listen(file) for file in files]
    apart = [finished(answerer, answerer.pose(one, text))[0] for one in recordings for text in INSTRUCTIONS]
    assert [(answer.file, answer.instruction) for answer in together] == [(f, i) for f in files for i in INSTRUCTIONS]
    assert list(map(told, together)) == list(map(told, apart))
    assert len({answer.text for answer in together}) > 12
    emotions = [answer for answer in together if answer.instruction == EMOTION]
    assert all(answer.label in TASKS["emotion"].labels for answer in emotions[:2])  # type: ignore[attr-defined]
    assert list(Answerer(checkpoint).ask(files, [])) == []


def test_a_recording_is_computed_once_for_all_that_is_asked_of_it(
    checkpoint: Checkpoint, spoken: str, tmp_path: Path
) -> None:
    (file,) = clips(tmp_path, 2.0)
    answerer = Answerer(checkpoint)
    recording = answerer.listen(file)
    shot = answerer.shot(recording, ASK, "hello")
    counting = Counting(answerer._engine)  # type: ignore[arg-type]
    for shots in ([], [shot, shot]):
        answers = whole(answerer.ask([file], INSTRUCTIONS, shots))
        instructions = [len(checkpoint.text.encode(text)) + 1 for text in INSTRUCTIONS]
        heard = answers[0].tokens_in - instructions[0]
        assert heard > 40
        assert counting.since() == heard + sum(instructions)
    settings = checkpoint.settings.model_copy(update={"max_audio_seconds": 0.4})
    answerer = Answerer(replace(checkpoint, settings=settings))
    spans = len(answerer.listen(spoken).spans)
    assert spans > PREFIXES, "more than are remembered"
    counting = Counting(answerer._engine)  # type: ignore[arg-type]
    first, *_ = whole(answerer.ask([spoken], INSTRUCTIONS))
    assert counting.since() == first.tokens_in + spans * sum(instructions[1:])


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


def test_impossible_requests_are_refused_before_reading(tiny: Checkpoint) -> None:
    answerer = Answerer(tiny)
    missing = ["missing.wav"]
    with pytest.raises(InputError, match="instruction is empty"):
        answerer.ask(missing, [ASK, "  "])
    with pytest.raises(InputError, match=r"a prompt of \d+ ids exceeds .* a shorter instruction"):
        answerer.ask(missing, "word " * 600)
    shot = Example(torch.zeros(1, 200, dtype=torch.int64), ASK, "hello")
    with pytest.raises(InputError, match="fewer or shorter shots"):
        answerer.ask(missing, ASK, [shot] * 3)
    with pytest.raises(InputError, match="shot 1 has no answer"):
        answerer.ask(missing, ASK, [Example(shot.codes, ASK)])
    with pytest.raises(InputError, match="16 beams do not fit a batch of 4"):
        Answerer(tiny, 4).ask(missing, ASK, options=Options(beams=16))
    with pytest.raises(InputError, match="batch size"):
        Answerer(tiny, 0)
    with pytest.raises(InputError, match="int8: only for a Mixtral"):
        Answerer(tiny, quantize="int8")


def test_a_clip_that_does_not_fit_beside_the_shots_fails_alone(tiny: Checkpoint, tmp_path: Path) -> None:
    shot = Example(torch.zeros(1, 350, dtype=torch.int64), ASK, "hello")
    files = clips(tmp_path, 7.0, 0.5)
    first, second = Answerer(tiny).ask(files, ASK, [shot])
    assert isinstance(first, Failure) and first.error.startswith(f"{files[0]}: a prompt of ")
    assert isinstance(second, Answer)


def test_a_file_that_one_instruction_does_not_fit_gives_one_failure(tiny: Checkpoint, tmp_path: Path) -> None:
    files = clips(tmp_path, 7.0, 0.5)
    answerer = Answerer(tiny)
    failure, *answers = answerer.ask(files, [ASK, "words " * 200])
    assert isinstance(failure, Failure) and failure.file == files[0]
    assert [answer.file for answer in answers] == files[1:] * 2
    assert all(isinstance(answer, Answer) for answer in answers)
    assert list(answerer.ask(files[:1], [ASK, "words " * 200])) == [failure]
    assert answerer.waiting + answerer.running == 0, "what did fit is not asked either"


def test_audio_longer_than_one_piece_is_no_shot(checkpoint: Checkpoint, spoken: str) -> None:
    answerer = Answerer(checkpoint)
    with pytest.raises(InputError, match=r"spoken\.wav: .* 3 s of audio at most"):
        answerer.shot(answerer.listen(spoken), ASK, "hello")


def test_recordings_of_the_same_sound_have_the_same_key(checkpoint: Checkpoint, tmp_path: Path) -> None:
    one, other = clips(tmp_path, 1.0, 1.0)
    answerer = Answerer(checkpoint)
    expected = answerer.listen(one)
    for source in (Path(one), Path(one).read_bytes()):
        found = answerer.listen(source, "given")
        assert (found.name, found.key, found.seconds) == ("given", expected.key, 1.0)
        assert torch.equal(found.spans[0].codes, expected.spans[0].codes)
    assert answerer.listen(other).key != expected.key
    stereo = io.BytesIO()
    soundfile.write(stereo, np.stack([noise(1.0)] * 2, axis=1), SAMPLE_RATE, format="WAV")
    assert answerer.listen(stereo.getvalue()).key == expected.key
    with pytest.raises(InputError, match="the audio given: "):
        answerer.listen(b"RIFF")


def test_answers_less_sure_than_asked_for_are_withheld(checkpoint: Checkpoint, tmp_path: Path) -> None:
    (file,) = clips(tmp_path, 1.0)
    for expected in ask(checkpoint, [file], INSTRUCTIONS):
        assert 0 < expected.confidence < 0.999
        (held,) = ask(checkpoint, [file], expected.instruction, options=Options(min_confidence=0.999))
        assert (held.finish_reason, held.text, held.label, held.segments) == ("abstained", "", None, ())
        assert (held.confidence, held.tokens_out) == (expected.confidence, expected.tokens_out)
        (given,) = ask(checkpoint, [file], expected.instruction, options=Options(min_confidence=expected.confidence))
        assert told(given) == told(expected)


def test_labels_that_are_named_are_the_answers_there_are(checkpoint: Checkpoint, tmp_path: Path) -> None:
    files = clips(tmp_path, 1.0, 0.5, 2.0)
    names, instructions = ("a dog", "a cat", "dogs", "an owl"), [ASK, OTHER, EMOTION, TIMES]
    answerer = Answerer(checkpoint)
    answers = whole(answerer.ask(files, instructions, options=Options(labels=names)))
    assert len({answer.label for answer in answers}) > 1
    for answer in answers:
        assert answer.label == answer.text and answer.label in names
        assert (answer.words, answer.finish_reason) == ((), "stop")
    for name in names:
        for answer in whole(answerer.ask(files[:1], instructions, options=Options(labels=(name,)))):
            assert (answer.label, answer.confidence) == (name, 1.0)
    for answer in whole(answerer.ask(files, instructions, options=Options(labels=names, beams=8))):
        assert answer.label in names
        assert answer.confidence > 0.25 - 1e-6, "the likeliest of four"


def test_tasks_that_the_checkpoint_does_not_know_are_answered_with_plain_text(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    settings = checkpoint.settings.model_copy(update={"tasks": ("transcribe",)})
    (file,) = clips(tmp_path, 1.0)
    for instruction in (EMOTION, TIMES):
        (answer,) = ask(replace(checkpoint, settings=settings), [file], instruction)
        assert answer.task in ("emotion", "transcribe_times")
        assert answer.label is None and answer.words
        assert "<|" not in answer.text


def test_options_shape_the_answer(checkpoint: Checkpoint, tmp_path: Path) -> None:
    files = clips(tmp_path, 1.0, 0.7)
    greedy = ask(checkpoint, files)
    short = ask(checkpoint, files, options=Options(max_tokens=2))
    assert [answer.tokens_out for answer in short] == [2, 2]
    drawn = [ask(checkpoint, files, options=Options(temperature=2.0, seed=seed)) for seed in (1, 1, 2)]
    assert list(map(told, drawn[0])) == list(map(told, drawn[1])) != list(map(told, drawn[2]))
    beams = ask(checkpoint, files, options=Options(beams=4))
    for answers in (drawn[0], beams):
        assert [answer.text for answer in answers] != [answer.text for answer in greedy]
    assert math.prod(a.confidence for a in beams) > math.prod(a.confidence for a in greedy)


def test_rows_that_are_no_text_are_never_chosen(tiny: Checkpoint, tmp_path: Path) -> None:
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
    (answer,) = ask(replace(tiny, lm=lm, text=text, vocabulary=vocabulary), clips(tmp_path, 1.0))
    assert answer.text == text.decode([0]) * tiny.settings.max_answer_tokens


def test_int8_transcribes_as_float32_does() -> None:
    """The shipped checkpoint, on all clips there are to try; of 300 test clips it lost nothing."""
    files = sorted(map(str, (ROOT / "prompts" / "clips").glob("*.wav")))
    checkpoint = load_checkpoint()
    texts, rounded = (
        [answer.text for answer in answerer.ask(files, ASK) if isinstance(answer, Answer)]
        for answerer in (Answerer(checkpoint), Answerer(checkpoint, quantize="int8"))
    )
    assert wer(texts, rounded) <= 0.005
    assert len(texts) >= 4 and all(texts)
