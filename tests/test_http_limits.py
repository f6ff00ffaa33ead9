"""What the server refuses, how it says so, and that nothing of it is left behind."""

import io
import json
import socket
import struct
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import soundfile
from conftest import RATE
from test_http import ASK, CLIP, Running, audio, joined, serving, transcribe, turn

from serve.engine import BackendError
from serve.http import ServerSettings
from serve.http.errors import from_input_error
from speechllm.checkpoint import Checkpoint, load_checkpoint
from speechllm.errors import InputError

MANY = {"also": [ASK] * 20}  # of a recording of several pieces, for a batch of one: some seconds
BOMB_SECONDS = 3600


@pytest.fixture(scope="module")
def shipped() -> Checkpoint:
    return load_checkpoint()


@pytest.fixture(scope="module")
def server(shipped: Checkpoint) -> Iterator[Running]:
    """One piece of audio answered at a time, and little of anything taken."""
    with serving(shipped, batch_size=1, max_upload_bytes=2_000_000, max_seconds=60, max_queue=30) as running:
        yield running


def refused(response: httpx.Response, status: int, *words: str) -> dict[str, Any]:
    """The error, in OpenAI's envelope and one line."""
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert list(error) == ["message", "type", "param", "code"]
    assert "\n" not in error["message"]
    for word in words:
        assert word in error["message"]
    return error


def wait_until(true: Callable[[], bool], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def idle(server: Running) -> bool:
    return not (server.answerer.running or server.answerer.waiting or server.service.places.taken)


def raw(server: Running, *parts: bytes) -> socket.socket:
    """A connection on which these bytes were sent."""
    host, port = server.url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), timeout=10)
    for part in parts:
        connection.sendall(part)
    return connection


def flac(seconds: float, rate: int = RATE) -> bytes:
    file = io.BytesIO()
    with soundfile.SoundFile(file, "w", rate, 1, format="FLAC") as sound:
        for _ in range(round(seconds)):
            sound.write(np.zeros(rate, np.int16))
    return file.getvalue()


def mp3(seconds: int) -> bytes:
    """Silence without a header that tells its length: going by its first frame, it would last an eighth of it."""
    first = bytes.fromhex("fff388c4").ljust(288, b"\0")  # 36 ms of 64 kbit/s
    other = bytes.fromhex("fff318c4").ljust(36, b"\0")  # of 8 kbit/s
    return first + other * round(seconds / 0.036)


def test_a_backend_that_fails_is_no_fault_of_the_request() -> None:
    assert from_input_error(BackendError("vllm: no answer")).status_code == 502
    assert from_input_error(InputError("beams must be 1")).param == "beams"


def test_settings_are_checked() -> None:
    assert ServerSettings().host == "127.0.0.1"
    for wrong in ({"port": 70000}, {"max_queue": 0}, {"api_keys": ("",)}, {"worker": 2}, {"request_timeout": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            ServerSettings(**wrong)
    assert "secret" not in repr(ServerSettings(api_keys=("secret",)))


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": "xml"}, "response_format"),
        ({"response_format": "diarized_json"}, "response_format"),
        ({"temperature": "3"}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": "nan"}, "temperature"),
        ({"beams": "2", "temperature": "1"}, "beams"),
        ({"beams": "2"}, None),  # as many as do not fit the batch
        ({"language": "klingon"}, "language"),
        ({"prompt": "as I said"}, "prompt"),
        ({"chunking_strategy": "auto"}, "chunking_strategy"),
        ({"include[]": "logprobs"}, "include[]"),
        ({"timestamp_granularities[]": "word"}, "timestamp_granularities"),
        ({"timestamp_granularities[]": "hour"}, "timestamp_granularities[].0"),
        ({"also": ASK, "response_format": "srt"}, "also"),
        ({"also": ASK, "labels": ["a", "b"]}, "also"),
        ({"also": ASK, "task": "activity"}, "also"),
        ({"task": "sing"}, "task"),
        ({"stream": "true", "response_format": "vtt"}, "stream"),
        ({"stream": "perhaps"}, "stream"),
        ({"instruction": "?" * 30_000}, "instruction"),
        ({"instruction": "why " * 3000}, None),  # more than the model has room for
        ({"seed": "-1"}, "seed"),
        ({"max_tokens": "0"}, "max_tokens"),
        ({"labels": ["a", "a"]}, "labels"),
    ],
)
def test_fields_that_cannot_be_used(server: Running, fields: dict[str, str], param: str | None) -> None:
    error = refused(server.post(files={"file": CLIP.read_bytes()}, data=fields), 400)
    assert (error["type"], error["param"]) == ("invalid_request_error", param)


@pytest.mark.parametrize(
    ("messages", "param", "words"),
    [
        ([], "messages", "at least 1"),
        ([{"role": "system", "content": "Be kind."}, turn(ASK)], "messages.0.role", "no system message"),
        ([{"role": "tool", "content": "1"}], "messages.0.role", "'user' or 'assistant'"),
        ([turn(ASK, None)], "messages.0", "no audio"),
        ([turn("")], "messages.0", "nothing is asked"),
        ([turn(ASK), {"role": "assistant", "content": "a"}], "messages.1", "last turn must be the user's"),
        ([turn(ASK), {"role": "assistant", "content": [audio()]}, turn(ASK)], "messages.1", "it has no audio"),
        ([turn(ASK), turn(ASK)], "messages.1", "one recording a turn"),
        ([turn(ASK), {"role": "user", "content": "a", "tool_calls": []}], "messages.1.tool_calls", "no such field"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "messages.0.content.parts.0", "image_url"),
        ([{"role": "user", "content": [{"type": "input_audio", "input_audio": {"data": "", "format": "../wav"}}]}],
         "messages.0.content.parts.0.input_audio.input_audio.format", "pattern"),
    ],
)  # fmt: skip
def test_conversations_that_cannot_be_used(server: Running, messages: list[Any], param: str, words: str) -> None:
    error = refused(server.post("/v1/chat/completions", json={"messages": messages}), 400, words)
    assert error["param"].startswith(param)


@pytest.mark.parametrize(
    "wrong",
    [
        {"n": 2},
        {"logprobs": True},
        {"top_logprobs": 2},
        {"tools": [{"type": "function"}]},
        {"response_format": {"type": "json_object"}},
        {"modalities": ["audio"]},
        {"stop": "a"},
        {"beams": 99},
    ],
)
def test_what_this_model_does_not_do(server: Running, wrong: dict[str, Any]) -> None:
    error = refused(server.post("/v1/chat/completions", json={"messages": [turn(ASK)]} | wrong), 400)
    assert error["param"].split(".")[0] in wrong


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "0 bytes"),
        (b"not audio at all", "not audio that can be read"),
        (bytes(range(256)) * 40, "not audio that can be read"),
        (CLIP.read_bytes()[:-20_000], "cut short"),
        (CLIP.read_bytes()[:44], ""),
        (b"/etc/passwd", "not audio that can be read"),
        (str(CLIP).encode(), "not audio that can be read"),
    ],
    ids=["empty", "text", "bytes", "cut short", "header", "path", "path of a clip"],
)
def test_uploads_that_are_no_audio(server: Running, content: bytes, words: str) -> None:
    error = refused(server.post(files={"file": ("my talk.wav", content)}), 400, "my talk.wav", words)
    assert error["type"] == "invalid_request_error"
    assert server.post(files={"file": ("a.wav", CLIP.read_bytes())}).status_code == 200  # and goes on answering


@pytest.mark.parametrize("path", ["/etc/passwd", str(CLIP), f"file://{CLIP}", "-"])
def test_no_path_is_ever_opened(server: Running, path: str) -> None:
    refused(server.post(data={"file": path}), 400, "multipart")
    refused(server.post(files={"file": (None, path.encode())}), 400, "multipart")
    refused(server.post(files={"file": (path, b"")}), 400, "0 bytes")
    for data in (path, f"data:audio/wav;base64,{path}", CLIP.as_uri()):
        part = {"type": "input_audio", "input_audio": {"data": data, "format": "wav"}}
        message = {"role": "user", "content": [part, {"type": "text", "text": ASK}]}
        refused(server.post("/v1/chat/completions", json={"messages": [message]}), 400, "messages.0")
    answer = server.post(files={"file": (path, CLIP.read_bytes())}).json()["answers"][0]  # a label
    assert (answer["file"], answer["finish_reason"]) == (path, "stop")


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"{", "not JSON"),
        (b"[" * 100_000, "parsing"),
        (b"\xff\xfe", ""),
        (b"null", ""),
        (b"", ""),
        (json.dumps({"messages": [turn("\ud800")]}).encode(), ""),
        (json.dumps({"messages": [turn(ASK)], "model": "\udcff"}).encode(), ""),
        (json.dumps({"messages": [turn(ASK)], "temperature": float("nan")}).encode(), "temperature"),
        (json.dumps({"messages": [turn(ASK)], "seed": 10**400}).encode(), "seed"),
    ],
)
def test_bodies_that_are_no_request(server: Running, body: bytes, words: str) -> None:
    headers = {"Content-Type": "application/json"}
    response = server.post("/v1/chat/completions", content=body, headers=headers)
    assert response.status_code in (400, 404)
    refused(response, response.status_code, words)
    refused(server.post(content=body, headers=headers), 400)
    refused(server.post(content=body, headers={"Content-Type": "multipart/form-data; boundary=x"}), 400)
    refused(server.post("/v1/chat/completions", content=body), 400)  # of no type


def test_strange_names_are_labels(server: Running) -> None:
    content = CLIP.read_bytes()
    for name in ("a\x01b.wav", "ä 語.wav", "../../" * 200 + "x.wav"):
        answer = server.post(files={"file": (name, content)}).json()["answers"][0]
        assert answer["finish_reason"] == "stop"
        assert answer["file"].isprintable()
        assert len(answer["file"]) <= 200


def test_paths_and_methods_that_are_none(server: Running) -> None:
    refused(httpx.get(f"{server.url}/v1/none"), 404)
    response = httpx.get(f"{server.url}/v1/audio/transcriptions")
    refused(response, 405)
    assert response.headers["allow"] == "POST"
    refused(server.post("/v1/none", content=b"x"), 404)
    assert httpx.get(f"{server.url}/docs").status_code == 404  # it would load its scripts from elsewhere


def test_other_origins_are_given_no_leave(server: Running) -> None:
    headers = {"Origin": "http://elsewhere.example", "Access-Control-Request-Method": "POST"}
    for response in (
        httpx.options(f"{server.url}/v1/audio/transcriptions", headers=headers),
        server.post(files={"file": CLIP.read_bytes()}, headers=headers),
    ):
        assert not [name for name in response.headers if name.startswith("access-control")]


def test_large_uploads_are_cut_off(server: Running) -> None:
    with pytest.raises(openai.APIStatusError, match="2000000 bytes") as error:
        transcribe(server.client(), ("big.wav", bytes(2_000_001)))
    assert error.value.status_code == 413

    def chunks() -> Iterator[bytes]:
        yield b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\n\r\n'
        for _ in range(200):
            yield bytes(100_000)

    headers = {"Content-Type": "multipart/form-data; boundary=x"}
    refused(server.post(content=chunks(), headers=headers), 413)
    refused(server.post("/v1/chat/completions", content=chunks(), headers={"Content-Type": "application/json"}), 413)
    announced = raw(
        server,
        b"POST /v1/audio/transcriptions HTTP/1.1\r\nHost: x\r\nContent-Length: 2147483648\r\n"
        b"Expect: 100-continue\r\nContent-Type: multipart/form-data; boundary=x\r\n\r\n",
    )
    assert announced.recv(100).startswith(b"HTTP/1.1 413 ")  # before a byte of it was sent
    announced.close()
    wait_until(lambda: idle(server))


def test_many_large_uploads_at_once(shipped: Checkpoint) -> None:
    with serving(shipped, max_upload_bytes=200_000) as server:
        head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        most = [raw(server, head, b"Content-Length: 200000\r\n\r\n", bytes(150_000)) for _ in range(10)]
        wait_until(lambda: server.service.places.bytes == 10 * 150_000)
        refused(server.post(files={"file": bytes(150_000)}), 429, "bytes of uploads")
        for connection in most:
            connection.close()
        wait_until(lambda: server.service.places.bytes == 0)
        assert server.post(files={"file": CLIP.read_bytes()}).status_code == 200
        wait_until(lambda: server.service.places.bytes == 0)


def test_what_decodes_to_hours_is_refused_before_it_is_decoded(server: Running) -> None:
    bomb = flac(BOMB_SECONDS)
    assert len(bomb) < 300_000
    tracemalloc.start()
    refused(server.post(files={"file": ("bomb.flac", bomb)}), 400, "bomb.flac: longer than the 60 seconds")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 10_000_000  # an hour of samples takes 230 million
    piped = bytearray(bomb)
    piped[21:26] = bytes([piped[21] & 0xF0, 0, 0, 0, 0])  # the number of samples, in STREAMINFO
    refused(server.post(files={"file": ("piped.flac", bytes(piped))}), 400, "piped.flac: its header does not say")
    refused(server.post(files={"file": ("bomb.mp3", mp3(120))}), 400, "longer than the 60 seconds")
    odd = bytearray(CLIP.read_bytes())
    odd[24:28] = struct.pack("<I", 1)  # one sample a second: resampled, it would be half a day
    refused(server.post(files={"file": ("slow.wav", bytes(odd))}), 400, "longer than")
    odd[24:28] = struct.pack("<I", 603_995_776)
    refused(server.post(files={"file": ("odd.wav", bytes(odd))}), 400, "603995776 Hz")
    refused(server.post(files={"file": ("fast.flac", flac(59, 192_000))}), 400, "192000 Hz up to 15 seconds")
    assert server.post(files={"file": ("fits.flac", flac(59))}).json()["seconds_in"] == 59


def test_a_body_that_does_not_come(shipped: Checkpoint) -> None:
    with serving(shipped, request_timeout=0.3) as server:
        head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        connection = raw(server, head, b"Content-Length: 1000\r\n\r\n", b'{"messages":')
        response = b""
        while part := connection.recv(10_000):  # until it is closed
            response += part
        assert response.startswith(b"HTTP/1.1 408 ")
        assert b"within 0.3 seconds" in response
        assert idle(server)


def test_too_many_questions(server: Running) -> None:
    files = {"file": CLIP.read_bytes()}
    wait_until(lambda: idle(server))
    refused(server.post(files=files, data={"also": [ASK] * 30}), 400, "31 questions at once")
    with ThreadPoolExecutor(1) as pool:
        busy = pool.submit(server.post, files={"file": joined([CLIP] * 2)}, data=MANY)
        wait_until(lambda: server.service.places.taken == 21)
        response = server.post(files=files, data=MANY)
        refused(response, 429, "ask again later")
        assert response.headers["retry-after"] == "1"
        assert server.post(files=files).status_code == 200  # there is room for one
        assert busy.result().status_code == 200
    wait_until(lambda: idle(server))
    server.service.places.take(30)
    with pytest.raises(openai.RateLimitError):
        transcribe(server.client())
    server.service.places.give_back(30)
    assert idle(server)


def test_answers_that_take_too_long(shipped: Checkpoint) -> None:
    with serving(shipped, batch_size=1, request_timeout=0.7) as server:
        talk = joined([CLIP] * 6)
        error = refused(server.post(files={"file": talk}, data=MANY), 504, "within 0.7 seconds")
        assert (error["type"], error["code"]) == ("server_error", "timeout")
        wait_until(lambda: idle(server))
        with pytest.raises(openai.APIError, match=r"within 0\.7 seconds"):
            list(transcribe(server.client(), ("talk.wav", talk), stream=True, extra_body=MANY))
        wait_until(lambda: idle(server))


@pytest.mark.parametrize("stream", ["true", "false"])
def test_a_client_that_goes_leaves_nothing_running(server: Running, stream: str) -> None:
    request = httpx.Request(
        "POST",
        f"{server.url}/v1/audio/transcriptions",
        files={"file": joined([CLIP] * 12)},
        data=MANY | {"stream": stream},
    )
    head = f"POST /v1/audio/transcriptions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(request.read())}\r\n"
    connection = raw(server, f"{head}Content-Type: {request.headers['content-type']}\r\n\r\n".encode(), request.read())
    if stream == "true":
        assert b"transcript.text.delta" in connection.recv(100_000) + connection.recv(100_000)
    wait_until(lambda: server.answerer.waiting > 20)
    connection.close()
    wait_until(lambda: idle(server), 2)  # all of it would take several times as long
    gone = server.metric('requests_total{route="/v1/audio/transcriptions",status="499"}')
    assert gone == (0 if stream == "true" else 1)  # a stream had its status already
    assert server.post(files={"file": CLIP.read_bytes()}).json()["finish_reason"] == "stop"


def test_keys(shipped: Checkpoint) -> None:
    with serving(shipped, api_keys=("first", "second")) as server:
        assert server.client("first").models.list().data
        with pytest.raises(openai.AuthenticationError, match="a key is needed") as error:
            server.client("third").models.list()
        assert error.value.code == "invalid_api_key"
        paths = httpx.get(f"{server.url}/openapi.json", headers={"Authorization": "Bearer second"}).json()["paths"]
        assert len(paths) == 7
        for path, methods in {**paths, "/openapi.json": {"get": {}}, "/none": {"get": {}}}.items():
            for method in methods:
                assert httpx.request(method, server.url + path).status_code == (200 if path == "/health" else 401), path
        for header in ("first", "Basic first", "Bearer", "Bearer first second", "bearer FIRST"):
            refused(httpx.get(f"{server.url}/v1/models", headers={"Authorization": header}), 401)
        assert httpx.get(f"{server.url}/v1/models", headers={"Authorization": "bearer first"}).status_code == 200
        refused(server.post(content=bytes(1000)), 401)


def test_health_tells_when_the_engine_has_stopped(shipped: Checkpoint) -> None:
    with serving(shipped) as server:
        assert httpx.get(f"{server.url}/health").json()["status"] == "ok"
        server.answerer.stop()
        refused(httpx.get(f"{server.url}/health"), 503, "engine has stopped")
        refused(server.post(files={"file": CLIP.read_bytes()}), 503, "engine has stopped")
        server.answerer.start()
        assert httpx.get(f"{server.url}/health").status_code == httpx.head(f"{server.url}/health").status_code == 200


def test_metrics(server: Running) -> None:
    names = ('requests_total{route="/v1/audio/transcriptions",status="200"}', "audio_seconds_total", "tokens_out_total")
    assert server.post(files={"file": CLIP.read_bytes()}).status_code == 200
    before = [server.metric(name) for name in names]
    transcription = server.post(files={"file": CLIP.read_bytes()}).json()
    after = [server.metric(name) for name in names]
    made = [1, transcription["seconds_in"], transcription["usage"]["output_tokens"]]
    assert [b - a for a, b in zip(before, after, strict=True)] == pytest.approx(made)
    assert (server.metric("queue"), server.metric("running"), server.metric("questions")) == (0, 0, 0)
    assert server.metric('request_seconds_count{route="/v1/audio/transcriptions"}') >= 2
    server.post("/v1/none/" + "x" * 50)
    assert server.metric('requests_total{route="other",status="404"}') >= 1
    assert "xxx" not in httpx.get(f"{server.url}/metrics").text


def test_the_engine_is_stopped_with_the_server(shipped: Checkpoint) -> None:
    threads = threading.active_count()
    with serving(shipped) as server:
        assert server.answerer.alive
        with ThreadPoolExecutor(1) as pool:
            answered = pool.submit(server.post, files={"file": joined([CLIP] * 2)}, data=MANY)
            wait_until(lambda: server.answerer.running > 0)
            server.server.should_exit = True  # what is being answered is finished
            assert answered.result().status_code == 200
    assert not server.answerer.alive
    assert threading.active_count() == threads
