"""Our own answers come from a real server, which is started and stopped."""

import os
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from conftest import RATE

from serve.answer import Answer
from serve.answerer import Answerer
from speechllm.audio import write_audio
from speechllm.checkpoint import load_checkpoint
from speechllm.data.corpus import Item
from speechllm.data.manifest import Utterance
from speechllm.errors import InputError
from speechllm.options import Options
from speechllm.tasks import TASKS, Segment
from train import asking
from train.asking import Server, parsed, sent
from train.questions import Noise, Question, noise_of, pose, spread


@pytest.fixture
def items(tmp_path: Path) -> list[Item]:
    """Four clips of noise, half a second each."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for number in range(4):
        write_audio(tmp_path / f"{number}.wav", 0.1 * torch.randn(1, RATE // 2, generator=generator), RATE)
        fields: dict[str, Any] = {"id": f"u{number}", "audio": f"{number}.wav", "duration": 0.5, "text": "a dog"}
        found.append(Item(Utterance(**fields, gender="male", split="test", source="made"), tmp_path))
    return found


def test_the_server_answers_as_the_answerer_and_is_gone_afterwards(items: list[Item], tiny_checkpoint: Path) -> None:
    task = TASKS["transcribe"]
    questions = [*pose(items, task), *pose(items, task, task.held_out[0]), *pose(items[:1], TASKS["gender"])]
    steps: list[int] = []
    with Server(tiny_checkpoint) as server:
        assert server._process is None  # not before it is asked
        told = server.ask(questions, steps.append)
        process = server._process
        assert process is not None
        assert process.poll() is None
        (answer,) = server.answer(questions[:1], task, steps.append)
        with pytest.raises(InputError, match=r"none/0.wav: cannot be read \(No such file"):
            server.ask([Question(Item(items[0].utterance, items[0].root / "none"), "Say it", ())], steps.append)
    assert process.poll() is not None
    assert sum(steps) == 10
    files = [str(item.root / item.utterance.audio) for item in items]
    answerer = Answerer(load_checkpoint(tiny_checkpoint))
    expected: list[Answer] = []
    for instruction, asked in ((questions[0].instruction, files), (questions[4].instruction, files)):
        expected += [one for one in answerer.ask(asked, instruction) if isinstance(one, Answer)]
    assert len(expected) == 8
    assert [(one["instruction"], one["text"]) for one in told[:8]] == [(e.instruction, e.text) for e in expected]
    assert told[8]["instruction"] == TASKS["gender"].wordings[0]
    assert answer.text == expected[0].text


def test_the_task_is_named_beside_unknown_words_where_answers_hold_marks(
    items: list[Item], tiny_checkpoint: Path
) -> None:
    segment = Segment("ann", 0.0, 0.4, "a dog")
    clips = [replace(i, utterance=i.utterance.model_copy(update={"segments": [segment]})) for i in items]
    task, words = TASKS["diarize"], TASKS["transcribe"]
    held_out = pose(clips, task, task.held_out[0])
    assert {question.task for question in held_out} == {"diarize"}
    assert {q.task for q in [*pose(clips, task), *pose(clips, words, words.held_out[0])]} == {None}
    with Server(tiny_checkpoint) as server:
        (unnamed,) = server.ask([replace(held_out[0], task=None)], lambda number: None)
        with pytest.raises(InputError, match="the task diarize is answered with marks of time"):  # and there are none
            server.ask(held_out[:1], lambda number: None)
    assert unnamed["task"] is None


def test_answers_are_the_best_of_several_hypotheses(items: list[Item], tiny_checkpoint: Path) -> None:
    files = [str(item.root / item.utterance.audio) for item in items]
    answerer = Answerer(load_checkpoint(tiny_checkpoint))
    single, best = (
        [
            one.confidence
            for one in answerer.ask(files, "Transcribe this audio", options=Options(beams=beams))
            if isinstance(one, Answer)
        ]
        for beams in (1, 3)
    )
    assert single != best
    questions = [Question(item, "Transcribe this audio", ()) for item in items]
    with Server(tiny_checkpoint, beams=3) as server:
        told = [answer["confidence"] for answer in server.ask(questions, lambda count: None)]
    assert told == pytest.approx(best, abs=1e-4)


def test_a_server_that_does_not_start_tells_why(items: list[Item], tmp_path: Path) -> None:
    with (
        Server(tmp_path / "none") as server,
        pytest.raises(InputError, match=r"speechllm serve ended with code 2: .*none"),
    ):
        server.ask(pose(items, TASKS["transcribe"]), lambda count: None)


def test_a_server_that_dies_tells_its_last_words(
    items: list[Item], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [
        "import http.server, os, sys",
        "class Handler(http.server.BaseHTTPRequestHandler):",
        "    def do_GET(self):",
        "        self.send_response(200)",
        "        self.end_headers()",
        "    def do_POST(self):",
        "        print('first\\nerror: out of memory', file=sys.stderr, flush=True)",
        "        os._exit(3)",
        "    def log_message(self, *rest): pass",
        "server = http.server.HTTPServer(('127.0.0.1', 0), Handler)",
        "print(f'listening on http://127.0.0.1:{server.server_port}', flush=True)",
        "server.serve_forever()",
    ]
    (tmp_path / "dying.py").write_text("\n".join(lines))
    server = Server(tmp_path)
    monkeypatch.setattr(server, "_command", [sys.executable, str(tmp_path / "dying.py")])
    with server, pytest.raises(InputError, match=r"^speechllm serve ended with code 3: out of memory$"):
        server.ask(pose(items, TASKS["transcribe"]), lambda count: None)


def test_a_request_to_end_stops_the_server_too(items: list[Item], tiny_checkpoint: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    server = Server(tiny_checkpoint)
    with pytest.raises(KeyboardInterrupt), server:
        server.ask(pose(items[:1], TASKS["transcribe"]), lambda count: os.kill(os.getpid(), signal.SIGTERM))
    assert server._process is not None
    assert server._process.poll() is not None
    assert signal.getsignal(signal.SIGTERM) is before


def test_noise_is_as_loud_as_told_the_same_each_time_and_what_is_sent(items: list[Item], tmp_path: Path) -> None:
    plain, noisy = (pose(items[:1], TASKS["transcribe"], noise=noise)[0] for noise in (None, Noise(10)))
    assert sent(plain) == (tmp_path / "0.wav").read_bytes()
    clean, heard = plain.wav(RATE), noisy.wav(RATE)
    assert torch.equal(heard, noisy.wav(RATE))
    ratio = clean.square().mean() / (heard - clean).square().mean()
    assert 10 * torch.log10(ratio) == pytest.approx(10, abs=0.01)
    (tmp_path / "sent.wav").write_bytes(sent(noisy))
    received, rate = soundfile.read(tmp_path / "sent.wav", dtype="float32")
    assert rate == asking.RATE
    assert np.abs(received - heard[0].numpy()).max() < 1e-4
    other = pose(items[1:2], TASKS["transcribe"], noise=Noise(10))[0]
    assert not torch.equal(other.wav(RATE) - items[1].wav(RATE), heard - clean)
    assert Noise(10).told == "white noise at 10 dB of the whole clip"


def test_recorded_noise_is_taken_where_there_is_some_and_audible(items: list[Item], tmp_path: Path) -> None:
    folder = tmp_path / "noise"
    assert noise_of(folder) == ()
    folder.mkdir()
    tone = 0.5 * torch.sin(torch.arange(1000) * 0.3)[None]
    for name, wav in (("tone", tone), ("silence", torch.zeros(1, 1000))):
        write_audio(folder / f"{name}.wav", wav, RATE)
    rows = [f'{{"audio": "{name}.wav", "duration": 0.06, "split": "test"}}' for name in ("tone", "silence")]
    (folder / "manifest.jsonl").write_text("\n".join(rows) + "\n")
    recordings = noise_of(folder)
    assert [item.utterance.audio for item in recordings] == ["tone.wav"]
    noise = Noise(0, recordings)
    assert "recorded" in noise.told
    added = noise.added(items[0].wav(RATE), RATE, "a") - items[0].wav(RATE)
    spectrum = torch.fft.rfft(added[0]).abs()
    assert abs(int(spectrum.argmax()) - 0.3 / (2 * torch.pi) * added.shape[1]) < 20  # the tone's frequency


def test_answers_with_marks_keep_their_segments_and_tell_their_faults() -> None:
    task = TASKS["diarize"]
    segments = [{"speaker": "spk1", "start": 0.1, "end": 1.0, "text": "a dog"}]
    found = parsed(task, {"text": "<|spk1|> <|0.10|> a dog <|1.00|>", "segments": segments})
    assert (found.segments, found.faults) == ((Segment("spk1", 0.1, 1.0, "a dog"),), ())
    assert parsed(task, {"text": "<|spk1|> <|0.10|> a dog", "segments": []}).faults
    assert parsed(task, {"text": "<|odd", "segments": []}).faults
    assert parsed(TASKS["gender"], {"text": "Male.", "segments": segments}).label == "male"


@pytest.mark.parametrize(("limit", "large", "small"), [(4, [0, 2, 5, 7], [0, 1, 2]), (1, [0], [0])])
def test_what_is_asked_of_a_set_is_from_all_over_it(
    items: list[Item], limit: int, large: list[int], small: list[int]
) -> None:
    (question,) = pose(items[:1], TASKS["transcribe"])

    def of(name: str, count: int) -> list[Question]:
        utterance = question.item.utterance
        named = [utterance.model_copy(update={"id": f"{name}{n}"}) for n in range(count)]
        return [replace(question, item=Item(one, Path(name))) for one in named]

    asked = [*of("large", 10), *of("small", 3)]
    found = [q.item.utterance.id for q in spread(asked, limit)]
    assert found == [f"large{n}" for n in large] + [f"small{n}" for n in small]
    assert spread(asked, None) == asked == spread(asked, 10)
