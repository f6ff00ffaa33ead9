"""The HTTP server, asked by OpenAI's own client: it answers what the Answerer answers."""

import base64
import io
import os
import re
import signal
import socket
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import soundfile
import uvicorn
from conftest import RATE, ROOT

from serve.answer import Answer
from serve.answerer import Answerer
from serve.formats import Format, write
from serve.http import ServerSettings, app, create_app, run
from serve.http.service import Service
from speechllm.checkpoint import Checkpoint, load_checkpoint
from speechllm.options import Options
from speechllm.prompt import Example

CLIPS = [ROOT / "prompts" / "clips" / f"{name}.wav" for name in ("transcribe-1", "transcribe-2", "digits-1")]
CLIP = CLIPS[0]
ASK, ENGLISH, GERMAN = "Transcribe this audio", "Translate this audio to English", "Translate this audio to German"
GENDER = "Is the speaker male or female?"
GREEDY = Options()


@dataclass
class Running:
    """A server that listens on a port of its own."""

    url: str
    service: Service
    server: uvicorn.Server

    @property
    def answerer(self) -> Answerer:
        return self.service.answerer

    def client(self, key: str = "none") -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=60)

    def post(self, path: str = "/v1/audio/transcriptions", **request: Any) -> httpx.Response:
        return httpx.post(self.url + path, timeout=60, **request)

    def metric(self, name: str) -> float:
        text = httpx.get(f"{self.url}/metrics").text
        values = re.findall(rf"^speechllm_{re.escape(name)} (\S+)$", text, re.MULTILINE)
        return sum(map(float, values))  # a status that never was has none


@contextmanager
def serving(checkpoint: Checkpoint, batch_size: int = 16, **settings: Any) -> Iterator[Running]:
    """A real server in a thread, with an Answerer of its own."""
    application = create_app(Answerer(checkpoint, batch_size), ServerSettings(**settings))
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(application, log_level="warning", timeout_graceful_shutdown=60))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        while not server.started:
            thread.join(0.01)
            assert thread.is_alive()
        yield Running(f"http://127.0.0.1:{listener.getsockname()[1]}", application.state.service, server)
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def shipped() -> Checkpoint:
    return load_checkpoint()


@pytest.fixture(scope="module")
def server(shipped: Checkpoint) -> Iterator[Running]:
    with serving(shipped) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Running) -> openai.OpenAI:
    return server.client()


@pytest.fixture(scope="module")
def alone(shipped: Checkpoint) -> Answerer:
    """The same model without a server."""
    return Answerer(shipped)


def joined(clips: Sequence[Path]) -> bytes:
    """One recording, a piece of it for each clip."""
    file = io.BytesIO()
    pause = np.zeros(3 * RATE // 2)
    soundfile.write(
        file, np.concatenate([part for clip in clips for part in (soundfile.read(clip)[0], pause)]), RATE, format="WAV"
    )
    return file.getvalue()


@pytest.fixture(scope="module")
def talk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recording for answers that take a while."""
    path = tmp_path_factory.mktemp("talk") / "talk.wav"
    path.write_bytes(joined(CLIPS * 2))
    return path


def direct(
    alone: Answerer,
    *instructions: str,
    clip: Path = CLIP,
    options: Options = GREEDY,
    shots: Sequence[Example] = (),
) -> list[Answer]:
    answers = list(alone.ask([str(clip)], instructions or [ASK], shots, options))
    assert all(isinstance(answer, Answer) for answer in answers), answers
    return [replace(answer, file=clip.name) for answer in answers if isinstance(answer, Answer)]


def told(answer: Answer | dict[str, Any], *less: str) -> dict[str, Any]:
    """All that is the same each time."""
    given = answer if isinstance(answer, dict) else answer.to_dict()
    return {name: value for name, value in given.items() if name not in ("timings", *less)}


def audio(clip: Path = CLIP) -> dict[str, Any]:
    return {
        "type": "input_audio",
        "input_audio": {"data": base64.b64encode(clip.read_bytes()).decode(), "format": "wav"},
    }


def turn(text: str, clip: Path | None = CLIP) -> dict[str, Any]:
    return {"role": "user", "content": [*([audio(clip)] if clip else []), {"type": "text", "text": text}]}


def chat(client: openai.OpenAI, *messages: Any, **options: Any) -> Any:
    return client.chat.completions.create(model="speechllm-tiny", messages=list(messages), **options)


def transcribe(client: openai.OpenAI, clip: Any = CLIP, **fields: Any) -> Any:
    return client.audio.transcriptions.create(model="speechllm-tiny", file=clip, **fields)


def translate(client: openai.OpenAI, **fields: Any) -> Any:
    with pytest.warns(DeprecationWarning, match="deprecated"):  # by OpenAI, of its own service
        return client.audio.translations.create(model="speechllm-tiny", file=CLIP, **fields)


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["speechllm-tiny"]
    assert client.models.retrieve("speechllm-tiny").object == "model"
    with pytest.raises(openai.NotFoundError, match="there is no model 'whisper-1'") as error:
        client.models.retrieve("whisper-1")
    assert (error.value.code, error.value.param) == ("model_not_found", "model")


def test_a_transcription_is_the_answerers(client: openai.OpenAI, alone: Answerer) -> None:
    (expected,) = direct(alone)
    assert expected.text
    assert expected.finish_reason == "stop"
    transcription = transcribe(client)
    assert transcription.text == expected.text
    assert transcription.usage.type == "tokens"
    assert (transcription.usage.input_tokens, transcription.usage.output_tokens) == (
        expected.tokens_in,
        expected.tokens_out,
    )
    assert (transcription.finish_reason, transcription.seconds_consumed) == ("stop", transcription.seconds_in)
    assert [told(answer) for answer in transcription.answers] == [told(expected)]
    assert list(transcription.answers[0]) == list(expected.to_dict())


@pytest.mark.parametrize("format", ["text", "srt", "vtt"])
def test_documents_are_those_of_the_command(client: openai.OpenAI, alone: Answerer, format: str) -> None:
    (expected,) = direct(alone)
    assert transcribe(client, response_format=format) == write(expected, Format(format))


def test_verbose_json(client: openai.OpenAI, alone: Answerer) -> None:
    (expected,) = direct(alone)
    verbose = transcribe(client, response_format="verbose_json", language="EN", temperature=0)
    assert (verbose.text, verbose.language, verbose.words) == (expected.text, "english", None)
    assert verbose.duration == verbose.usage.seconds == expected.to_dict()["seconds_in"]
    (segment,) = verbose.segments
    assert (segment.id, segment.start, segment.end, segment.text) == (0, 0.0, verbose.duration, expected.text)
    assert -0.1 < segment.avg_logprob < 0 < segment.compression_ratio
    both = transcribe(client, response_format="verbose_json", timestamp_granularities=["word", "segment"])
    assert both.language == "unknown"
    assert both.segments == verbose.segments
    assert [word.word for word in both.words] == expected.text.split()
    assert {(word.start, word.end) for word in both.words} == {(segment.start, segment.end)}
    words = transcribe(client, response_format="verbose_json", timestamp_granularities=["word"])
    assert (words.segments, words.words) == (None, both.words)
    timed = transcribe(
        client,
        response_format="verbose_json",
        timestamp_granularities=["word", "segment"],
        extra_body={"instruction": "Transcribe this audio with timestamps"},
    )
    (answer,) = direct(alone, "Transcribe this audio with timestamps")
    assert [(s.start, s.end) for s in timed.segments] == [(round(s.start, 3), round(s.end, 3)) for s in answer.segments]
    assert [(w.start, w.end) for w in timed.words] == [(round(w.start, 4), round(w.end, 4)) for w in answer.words]


def test_many_questions_about_one_upload(server: Running, client: openai.OpenAI, alone: Answerer) -> None:
    questions = (GERMAN, GENDER, ASK)
    heard = server.metric("audio_seconds_total")
    transcription = transcribe(client, extra_body={"instruction": GERMAN, "also": [GENDER, ASK]})
    expected = direct(alone, *questions)
    assert len({answer.text for answer in expected}) > 1
    assert transcription.text == expected[0].text
    assert [told(answer) for answer in transcription.answers] == [told(answer) for answer in expected]
    assert server.metric("audio_seconds_total") - heard == pytest.approx(expected[0].seconds_in)  # encoded once
    labels = ["left", "right"]
    chosen = transcribe(client, extra_body={"instruction": "Where does the ball go?", "labels": labels})
    assert chosen.text in labels


def test_streamed_is_whole(client: openai.OpenAI, alone: Answerer, talk: Path) -> None:
    questions = (ASK, GERMAN, "Transcribe this audio with timestamps")
    expected = direct(alone, *questions, clip=talk)
    *deltas, done = transcribe(client, talk, stream=True, extra_body={"also": questions[1:]})
    assert {event.type for event in deltas} == {"transcript.text.delta"}
    for number, answer in enumerate(expected):
        pieces = [event.delta for event in deltas if event.index == number]
        assert len(pieces) > 3
        assert "".join(pieces) == answer.text
    assert (done.type, done.text) == ("transcript.text.done", expected[0].text)
    assert done.usage.output_tokens == sum(answer.tokens_out for answer in expected)
    assert [told(answer) for answer in done.answers] == [told(answer) for answer in expected]


def test_what_may_still_change_is_streamed_when_it_is_certain(client: openai.OpenAI, alone: Answerer) -> None:
    (expected,) = direct(alone, options=Options(beams=3))
    delta, done = transcribe(client, stream=True, extra_body={"beams": 3})
    assert delta.delta == done.text == expected.text
    (withheld,) = transcribe(client, stream=True, extra_body={"min_confidence": 1})
    assert (withheld.text, withheld.finish_reason) == ("", "abstained")


def test_translations_are_english(client: openai.OpenAI, alone: Answerer) -> None:
    (expected,) = direct(alone, ENGLISH)
    translation = translate(client)
    assert translation.text == expected.text
    assert translation.answers[0]["instruction"] == ENGLISH
    verbose = translate(client, response_format="verbose_json")
    assert (verbose.text, verbose.language, len(verbose.segments)) == (expected.text, "english", 1)


def test_chat(client: openai.OpenAI, alone: Answerer) -> None:
    (expected,) = direct(alone)
    blank = {"stop": None, "tools": [], "logit_bias": {}, "store": False, "response_format": {"type": "text"}}
    completion = chat(client, turn(ASK), n=1, temperature=0, logprobs=False, max_tokens=None, extra_body=blank)
    (choice,) = completion.choices
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", expected.text, "stop")
    assert completion.model == "speechllm-tiny"
    usage = completion.usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (expected.tokens_in, expected.tokens_out)
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert told(completion.answer, "file") == told(expected, "file")
    assert completion.answer["file"] == "messages.0 (wav)"


def test_chat_streamed_is_whole(client: openai.OpenAI, alone: Answerer, talk: Path) -> None:
    (expected,) = direct(alone, clip=talk)
    first, *chunks = chat(client, turn(ASK, talk), stream=True)
    assert first.choices[0].delta.role == "assistant"
    last = chunks.pop()
    assert (last.choices[0].delta.content, last.choices[0].finish_reason) == (None, "stop")
    assert told(last.answer, "file") == told(expected, "file")
    assert len(chunks) > 3
    assert "".join(chunk.choices[0].delta.content for chunk in chunks) == expected.text
    *_, end, usage = chat(client, turn(ASK), stream=True, stream_options={"include_usage": True})
    assert (end.usage, usage.choices) == (None, [])
    assert usage.usage.completion_tokens == end.answer["tokens_out"]


def test_earlier_turns_are_shots(client: openai.OpenAI, alone: Answerer) -> None:
    example = alone.shot(alone.listen(CLIPS[1]), "What?", "A dog.")
    (without,) = direct(alone, "What?")
    (expected,) = direct(alone, "What?", shots=[example])
    assert expected.tokens_in > without.tokens_in
    shot = [turn("What?", CLIPS[1]), {"role": "assistant", "content": "A dog."}]
    completion = chat(client, *shot, turn("What?"))
    assert told(completion.answer, "file") == told(expected, "file")
    assert completion.answer["file"] == "messages.2 (wav)"
    # a turn without audio is about the latest: here the recording of the example itself
    (again,) = direct(alone, ASK, clip=CLIPS[1], shots=[example])
    assert told(chat(client, *shot, turn(ASK, None)).answer, "file") == told(again, "file")
    # audio and text in messages of their own are one turn, and a completion can be put back as it came
    parted = [{"role": "user", "content": [audio(CLIPS[1])]}, {"role": "user", "content": "What?"}]
    message = completion.choices[0].message.model_copy(update={"content": "A dog."})
    assert told(chat(client, *parted, message, turn("What?")).answer, "file") == told(expected, "file")


def test_options_reach_the_engine(client: openai.OpenAI, alone: Answerer) -> None:
    cut = chat(client, turn(ASK), max_completion_tokens=2)
    assert (cut.choices[0].finish_reason, cut.answer["finish_reason"]) == ("length", "length")
    assert cut.usage.completion_tokens == 2
    (expected,) = direct(alone, options=Options(temperature=2.0, top_p=0.9, seed=7))
    (greedy,) = direct(alone)
    assert expected.text != greedy.text
    assert chat(client, turn(ASK), temperature=2.0, top_p=0.9, seed=7).choices[0].message.content == expected.text
    drawn = {transcribe(client, temperature=2.0).text for _ in range(4)}  # without a seed, anew each time
    assert len(drawn) > 1
    withheld = chat(client, turn(ASK), extra_body={"min_confidence": 1.0})
    assert (withheld.choices[0].message.content, withheld.choices[0].finish_reason) == ("", "content_filter")


def test_silence_is_no_speech(client: openai.OpenAI, tmp_path: Path) -> None:
    soundfile.write(tmp_path / "silence.flac", np.zeros(2 * RATE), RATE)
    transcription = transcribe(client, tmp_path / "silence.flac")
    assert (transcription.text, transcription.finish_reason) == ("", "no_speech")
    assert transcription.seconds_consumed == 2.0
    assert transcribe(client, tmp_path / "silence.flac", response_format="srt") == ""
    (event,) = transcribe(client, tmp_path / "silence.flac", stream=True)
    assert (event.type, event.text) == ("transcript.text.done", "")


def test_no_answer_is_swapped_among_many(client: openai.OpenAI, alone: Answerer) -> None:
    asked = [(clip, question) for clip in CLIPS for question in (ASK, GERMAN)] * 4
    expected = {(clip, question): direct(alone, question, clip=clip)[0].text for clip, question in set(asked)}
    assert len(set(expected.values())) > 4
    with ThreadPoolExecutor(len(asked)) as pool:
        answers = pool.map(lambda one: transcribe(client, one[0], extra_body={"instruction": one[1]}).text, asked)
    assert list(answers) == [expected[one] for one in asked]


def test_names_to_be_served_under(tiny_checkpoint: Path) -> None:
    with serving(load_checkpoint(tiny_checkpoint), models=("whisper-1", "ours/tiny")) as running:
        client = running.client()
        assert [model.id for model in client.models.list()] == ["whisper-1", "ours/tiny"]
        assert client.models.retrieve("ours/tiny").id == "ours/tiny"
        assert client.audio.transcriptions.create(model="whisper-1", file=CLIP).text
        assert running.post(files={"file": CLIP.read_bytes()}).status_code == 200  # without a name, the first


def test_a_page_where_there_is_one(tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "index.html").write_text("<p>Ask</p>")
    (tmp_path / "ask.js").write_text("ask()")
    monkeypatch.setattr(app, "_PAGE_FOLDER", tmp_path)
    with serving(load_checkpoint(tiny_checkpoint), api_keys=("secret",)) as running:
        assert httpx.get(running.url, follow_redirects=True).text == "<p>Ask</p>"
        assert httpx.get(f"{running.url}/page/ask.js").text == "ask()"
        assert httpx.get(f"{running.url}/page/../../cli.py").status_code in (401, 404)
        assert httpx.get(f"{running.url}/page/none").json()["error"]["message"] == "Not Found"


def test_run_until_it_is_stopped(tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    free = socket.create_server(("127.0.0.1", 0))
    port = free.getsockname()[1]
    free.close()
    statuses: list[int] = []

    def ask_and_stop() -> None:
        transport = httpx.HTTPTransport(retries=10)  # until it listens
        with httpx.Client(transport=transport, base_url=f"http://127.0.0.1:{port}") as client:
            statuses.append(client.get("/health").status_code)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=ask_and_stop)
    answerer = Answerer(load_checkpoint(tiny_checkpoint))
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        run(answerer, ServerSettings(port=port))
    thread.join()
    assert statuses == [200]
    assert capsys.readouterr().out == f"listening on http://127.0.0.1:{port}\n"
    assert not answerer.alive
