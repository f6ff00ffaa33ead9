"""Requests made up at random: each is answered or refused as the server's own OpenAPI schema says, none is a fault."""

import base64
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import schemathesis
import soundfile
from conftest import RATE, tone
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.checks import negative_data_rejection, positive_data_acceptance
from schemathesis.core.result import Ok
from schemathesis.schemas import BaseSchema
from test_http import ASK, Running, serving

from speechllm.checkpoint import load_checkpoint

FEW = settings(
    max_examples=12,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
OPERATIONS = [
    ("POST", "/v1/audio/transcriptions"),
    ("POST", "/v1/audio/translations"),
    ("POST", "/v1/chat/completions"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/{name}"),
    ("GET", "/health"),
    ("GET", "/metrics"),
]
SOUND = io.BytesIO()
soundfile.write(SOUND, tone(0.1), RATE, format="WAV")
CONTENT = SOUND.getvalue()
AUDIO = {"type": "input_audio", "input_audio": {"data": base64.b64encode(CONTENT).decode(), "format": "wav"}}
TURN = {"role": "user", "content": [AUDIO, {"type": "text", "text": ASK}]}
CHANGED = [negative_data_rejection, positive_data_acceptance]  # what they go by is the body before it is changed


@pytest.fixture(scope="module")
def server(tiny_checkpoint: Path) -> Iterator[Running]:
    with serving(load_checkpoint(tiny_checkpoint)) as running:
        yield running


@pytest.fixture(scope="module")
def api(server: Running) -> BaseSchema:
    return schemathesis.openapi.from_url(f"{server.url}/openapi.json")


def test_every_operation_is_tried(api: BaseSchema) -> None:
    found = [operation.ok() for operation in api.get_all_operations() if isinstance(operation, Ok)]
    assert {(operation.method.upper(), operation.path) for operation in found} == set(OPERATIONS)


@pytest.mark.parametrize(("method", "path"), OPERATIONS)
def test_the_schema_is_kept_to(api: BaseSchema, method: str, path: str) -> None:
    operation = api[path][method]
    statuses = set()

    @FEW
    @given(case=operation.as_strategy(generation_mode=GenerationMode("positive")))
    def answers(case: schemathesis.Case) -> None:
        """What fits the schema; with audio that is some, or hardly a request would come to be answered."""
        if isinstance(case.body, dict):
            some: dict[str, Any] = {"file": CONTENT} if "file" in case.body else {"messages": [TURN]}
            case.body |= some
        statuses.add(case.call_and_validate(timeout=30, excluded_checks=CHANGED).status_code)

    @FEW
    @given(case=operation.as_strategy(generation_mode=GenerationMode("negative")))
    def refuses(case: schemathesis.Case) -> None:
        statuses.add(case.call_and_validate(timeout=30).status_code)

    answers()
    if method == "POST":  # the others have nothing to get wrong
        refuses()
        assert 400 in statuses
    assert (200 if path != "/v1/models/{name}" else 404) in statuses


@FEW
@given(data=st.data())
def test_random_bytes_are_no_audio(server: Running, data: st.DataObject) -> None:
    """Pure noise, and a file of audio with some of its bytes changed, left out or put in."""
    content = bytearray(data.draw(st.sampled_from([CONTENT, b"RIFF", b"fLaC", b"OggS", b"ID3", b"\xff\xfb"])))
    for _ in range(data.draw(st.integers(0, 8))):
        start = data.draw(st.integers(0, min(len(content), 200)))
        content[start : start + data.draw(st.integers(0, 8))] = data.draw(st.binary(max_size=8))
    content += data.draw(st.binary(max_size=64))
    response = server.post(files={"file": ("x.wav", bytes(content))})
    assert response.status_code in (200, 400), response.text
    if response.status_code == 400:
        assert response.json()["error"]["message"].startswith("x.wav: ")
    assert server.answerer.alive
