"""Answers through a vLLM server are the engine's own: here one that speaks vLLM's protocol, and decodes for real."""

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TEXT_MODEL, clip
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from transformers import PreTrainedModel

import serve.vllm
from serve.answer import Answer
from serve.answerer import Answerer, Question
from serve.decoder import Decoder
from serve.engine import BackendError, Engine, Job, Request
from serve.search import REPEATED_IDS
from serve.vllm import VllmBackend
from speechllm.checkpoint import load_checkpoint
from speechllm.errors import InputError
from speechllm.grammar import Grammar, Grammars
from speechllm.model import ModelConfig, make_model
from speechllm.options import GREEDY, Options
from speechllm.tasks import TASKS
from speechllm.tasks.labels import Choice
from speechllm.text import TextTokenizer
from speechllm.vocabulary import Vocabulary

SIZES = ModelConfig(hidden_size=32, num_layers=2, expert_size=32, num_experts=4, max_positions=256)
NAME, KEY = "speech", "secret"
TEXT = TextTokenizer.load(TEXT_MODEL)
VOCABULARY = Vocabulary(text_size=TEXT.size, n_q=1, card=16, times=26)
GRAMMARS = Grammars(VOCABULARY, TEXT)
LABELS = ("angry", "not angry at all", "happy", "happy as a lark")
CHOICE = Choice("choice", "accuracy", (), (), labels=LABELS)
NEW = 12


class Asked(BaseModel):
    """The fields of vLLM's CompletionRequest that may come; it would take others without a word."""

    model_config = ConfigDict(extra="forbid")

    model: str
    prompt: list[int] = Field(min_length=1)
    max_tokens: int = Field(ge=1)
    temperature: float = Field(ge=0, le=2)
    top_p: float = Field(gt=0, le=1)
    seed: int = Field(ge=-(2**63), lt=2**63)
    stream: bool
    logprobs: int
    stop_token_ids: list[int]
    allowed_token_ids: list[int] | None = Field(None, min_length=1)
    logit_bias: dict[str, float] | None = None
    return_token_ids: bool
    return_tokens_as_token_ids: bool


class Server(ThreadingHTTPServer):
    """What of vLLM is used, with ways to fail."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, lm: PreTrainedModel) -> None:
        self.lm, self.decoder, self.free, self.lock = lm, Decoder(lm, 64), list(range(64)), threading.Lock()
        self.positions: int = lm.config.max_position_embeddings
        self.processed = self.obeys = True  # --logprobs-mode, and whether it knows of constraints
        self.key: str | None = None
        self.pause = 0.0  # seconds between two ids
        self.drops: list[int] = []  # connections to break, each after so many ids
        self.busy = 0  # requests to refuse with 503
        self.asked: list[Asked] = []
        self.running = self.most = self.left = 0  # left: clients that went before the end
        self.connections: list[socket.socket] = []
        super().__init__(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def die(self) -> None:
        self.shutdown()
        self.server_close()
        for connection in self.connections:
            with suppress(OSError):  # those that are closed
                connection.shutdown(socket.SHUT_RDWR)

    def ids(self, asked: Asked) -> Iterator[tuple[int, float]]:
        with self.lock:
            slot = self.free.pop()
            self.decoder.lengths[slot] = 0
            logits = self.decoder.prefill(slot, torch.tensor(asked.prompt))
            self.running += 1
            self.most = max(self.most, self.running)
        generator = torch.Generator().manual_seed(asked.seed)
        try:
            for _ in range(asked.max_tokens):
                scores = self.constrained(logits, asked)
                probs = (scores / (asked.temperature or 1.0)).softmax(-1)
                drawn = torch.multinomial(probs, 1, generator=generator) if asked.temperature else scores.argmax()
                index = int(drawn)
                yield index, float((probs if self.processed else logits.softmax(-1))[index].log())
                if index in asked.stop_token_ids:
                    return
                time.sleep(self.pause)
                with self.lock:
                    logits = self.decoder.step([slot], [index])[0]
        finally:
            with self.lock:
                self.running -= 1
                self.free.append(slot)

    def constrained(self, logits: Tensor, asked: Asked) -> Tensor:
        if not self.obeys:
            return logits
        scores = logits.clone()
        if asked.allowed_token_ids is not None:
            scores = torch.full_like(logits, -torch.inf)
            scores[asked.allowed_token_ids] = logits[asked.allowed_token_ids]
        for index, bias in (asked.logit_bias or {}).items():
            scores[int(index)] += bias
        return scores


class Handler(BaseHTTPRequestHandler):
    """What vLLM 0.32.0 was seen to send."""

    server: Server
    protocol_version = "HTTP/1.1"

    def handle(self) -> None:
        with suppress(ConnectionError):  # a client that left
            super().handle()

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        if self.permitted():
            cards = [{"id": NAME, "object": "model", "max_model_len": self.server.positions}]
            self.reply(200, {"object": "list", "data": cards})

    def do_POST(self) -> None:
        asked = Asked.model_validate_json(self.rfile.read(int(self.headers["Content-Length"])))
        if not self.permitted():
            return
        if self.server.busy:
            self.server.busy -= 1
            self.reply(503, {"error": {"message": "later"}})
            return
        self.server.asked.append(asked)
        self.server.connections.append(self.connection)
        drop = self.server.drops.pop(0) if self.server.drops else None
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        try:
            size = self.server.lm.config.vocab_size
            if asked.allowed_token_ids and max(asked.allowed_token_ids) >= size:
                message = "allowed_token_ids contains out-of-vocab token id!"
                self.event({"error": {"message": message, "type": "BadRequestError", "code": 400}})
            else:
                for number, (index, log_prob) in enumerate(self.server.ids(asked)):
                    if number == drop:
                        self.connection.shutdown(socket.SHUT_RDWR)
                        return
                    told = {"tokens": [f"token_id:{index}"], "token_logprobs": [log_prob]}
                    choice = {"index": 0, "text": "", "logprobs": told, "token_ids": [index]}
                    self.event({"object": "text_completion", "model": NAME, "choices": [choice]})
            self.chunk(b"data: [DONE]\n\n")
            self.chunk(b"")
        except OSError:
            self.server.left += 1
            self.close_connection = True

    def permitted(self) -> bool:
        key = self.server.key
        if key is None or self.headers["Authorization"] == f"Bearer {key}":
            return True
        self.reply(401, {"error": "Unauthorized"})
        return False

    def reply(self, status: int, body: Any) -> None:
        content = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def event(self, event: Any) -> None:
        self.chunk(f"data: {json.dumps(event)}\n\n".encode())

    def chunk(self, content: bytes) -> None:
        self.wfile.write(b"%x\r\n%b\r\n" % (len(content), content))


class Narrow(Grammar[None]):
    """Two ids, and no end."""

    start = None

    def allowed(self, state: None) -> Tensor:
        return MASK

    def next(self, state: None, index: int) -> None:
        return None


MASK = torch.zeros(VOCABULARY.size, dtype=torch.bool)
MASK[[40, 41]] = True


@pytest.fixture(scope="module")
def lm() -> PreTrainedModel:
    """Weights far from zero: the answers vary, and no choice hangs on a rounding error."""
    torch.manual_seed(3)
    model = make_model(SIZES, VOCABULARY.size, VOCABULARY.pad, VOCABULARY.end).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture
def server(lm: PreTrainedModel) -> Iterator[Server]:
    server = Server(lm)
    yield server
    server.die()


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve.vllm, "_PAUSE_SECONDS", 0.01)


def connect(server: Server, **others: Any) -> VllmBackend:
    told: dict[str, Any] = {
        "model": NAME,
        "end_id": VOCABULARY.end,
        "vocabulary_size": VOCABULARY.size,
        "positions": 256,
    } | others
    backend = VllmBackend(server.url, **told)
    server.asked.clear()
    return backend


def request(grammar: Grammar, number: int, options: Options = GREEDY, most: int = NEW) -> Request:
    generator = torch.Generator().manual_seed(number)
    return Request(torch.randint(0, VOCABULARY.size, (3 + 5 * number,), generator=generator), grammar, most, options)


def run(backend: Engine | VllmBackend, requests: Sequence[Request], at: Callable[[], None] | None = None) -> list[Job]:
    jobs = [backend.prepare(one) for one in requests]
    for job in jobs:
        backend.submit(job)
    finish(backend)
    return jobs


def finish(backend: Engine | VllmBackend) -> None:
    deadline = time.monotonic() + 20
    while backend.step():
        assert time.monotonic() < deadline


def until(fact: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 5
    while not fact():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def same(found: Sequence[Job], expected: Sequence[Job]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.error is None
        assert (one.best.ids, one.finish) == (other.best.ids, other.finish)
        assert one.best.logprobs == pytest.approx(other.best.logprobs, abs=1e-4)


def test_answers_are_those_of_the_engine_whatever_the_grammar(lm: PreTrainedModel, server: Server) -> None:
    transcribe, timed, voice = (TASKS[name] for name in ("transcribe", "diarize", "activity"))
    grammars = (
        GRAMMARS.of(transcribe),
        GRAMMARS.of(CHOICE),
        GRAMMARS.of(timed, seconds=1.0),
        GRAMMARS.of(voice, seconds=1.0),
        Narrow(),
    )
    requests = [request(grammar, number, most=60) for number in range(4) for grammar in grammars]
    expected = run(Engine(lm, VOCABULARY.end), requests)
    backend = connect(server)
    same(run(backend, requests), expected)
    assert {job.finish for job in expected} == {"stop", "length", "repetition"}
    texts = [job.best.ids for job in expected]
    assert len(set(texts)) > 15
    assert all(VOCABULARY.seconds_of(index) is not None for index in texts[3])
    assert any(len(ids) > REPEATED_IDS for ids in texts)
    assert (backend.waiting, backend.running, server.running) == (0, 0, 0)
    # text is asked for once, by what is not allowed; a label wherever there is a choice
    server.asked.clear()
    run(backend, requests[:1])
    (one,) = server.asked
    assert one.allowed_token_ids is None
    assert one.logit_bias is not None and len(one.logit_bias) < 200
    server.asked.clear()
    (label,) = run(backend, requests[1:2])
    assert 1 <= len(server.asked) < len(label.best.logprobs)
    assert all(asked.max_tokens == 1 and asked.allowed_token_ids for asked in server.asked)
    assert 0.0 in label.best.logprobs


def test_ids_come_one_by_one_and_in_order(lm: PreTrainedModel, server: Server) -> None:
    backend = connect(server)
    seen: list[tuple[int, ...]] = []
    job = backend.prepare(request(GRAMMARS.of(TASKS["transcribe"]), 2), lambda: seen.append(job.best.ids))
    backend.submit(job)
    finish(backend)
    assert len(job.best.ids) == NEW
    assert seen == [job.best.ids[: number + 1] for number in range(NEW)]
    assert 0 < job.queued <= job.first <= job.last


def test_cancel_and_time_out_close_the_connection_and_keep_what_is_there(lm: PreTrainedModel, server: Server) -> None:
    plain = GRAMMARS.of(TASKS["transcribe"])
    (whole,) = run(Engine(lm, VOCABULARY.end), [request(plain, 1, most=100)])
    assert len(whole.best.ids) > 20
    backend = connect(server)
    server.pause = 0.1
    cancelled = backend.prepare(request(plain, 1, most=100))
    timed_out = backend.prepare(request(plain, 1, Options(timeout=1.0), most=100))
    for job in (cancelled, timed_out):
        backend.submit(job)
    until(lambda: len(cancelled.best.ids) >= 3)
    cancelled.cancel()
    finish(backend)
    assert (cancelled.finish, timed_out.finish) == ("cancelled", "timeout")
    for job in (cancelled, timed_out):
        assert job.error is None
        assert 0 < len(job.best.ids) < len(whole.best.ids)
        assert job.best.ids == whole.best.ids[: len(job.best.ids)]
    until(lambda: server.left == 2 and server.running == 0)


def test_no_more_is_asked_at_once_than_was_said_and_all_can_be_ended(server: Server) -> None:
    backend = connect(server, concurrency=2)
    plain = GRAMMARS.of(TASKS["transcribe"])
    server.pause = 0.005
    run(backend, [request(plain, number) for number in range(6)])
    assert server.most == 2
    server.pause = 0.05
    jobs = [backend.prepare(request(plain, number)) for number in range(4)]
    for job in jobs:
        backend.submit(job)
    until(lambda: backend.running == 2 and any(job.best.ids for job in jobs))
    assert backend.waiting == 2
    backend.cancel_all()
    assert [job.finish for job in jobs] == ["cancelled"] * 4
    assert not backend.step()
    assert not backend.wait(0.0)


def test_a_broken_connection_is_taken_up_where_it_broke(lm: PreTrainedModel, server: Server) -> None:
    asked = request(GRAMMARS.of(TASKS["transcribe"]), 3)
    expected = run(Engine(lm, VOCABULARY.end), [asked])
    backend = connect(server)
    server.drops, server.busy = [4, 0, 3, 2], 1
    same(run(backend, [asked]), expected)
    prompts = [one.prompt for one in server.asked]
    start = asked.prompt.tolist()
    done = expected[0].best.ids
    assert prompts == [[*start, *done[:known]] for known in (0, 4, 4, 7, 9)]
    assert [one.max_tokens for one in server.asked] == [NEW - known for known in (0, 4, 4, 7, 9)]


def test_a_server_that_goes_ends_its_answers_with_one_line(server: Server) -> None:
    backend = connect(server)
    server.pause = 0.02
    jobs = [backend.prepare(request(GRAMMARS.of(TASKS["transcribe"]), number, most=100)) for number in range(3)]
    for job in jobs:
        backend.submit(job)
    until(lambda: all(len(job.best.ids) > 1 for job in jobs))
    server.die()
    finish(backend)
    for job in jobs:
        assert job.finish == "cancelled"
        assert len(job.best.ids) < 100
        assert isinstance(job.error, BackendError)
        assert str(job.error).startswith(f"{server.url}: broke off an answer, 3 times in a row (")
        assert "\n" not in str(job.error)


def test_what_is_no_answer_is_refused(server: Server) -> None:
    backend = connect(server)
    server.obeys = False
    (job,) = run(backend, [request(Narrow(), 1)])
    assert isinstance(job.error, BackendError)
    assert "which was not allowed" in str(job.error)
    server.obeys, server.key = True, KEY
    (job,) = run(backend, [request(Narrow(), 1)])
    assert str(job.error) == f'{server.url}: refused with status 401: {{"error": "Unauthorized"}}'


def test_a_server_that_will_not_do_is_refused_at_once(lm: PreTrainedModel, server: Server) -> None:
    for others, message in (
        ({"model": "another"}, "serves speech, not another: is it the right export"),
        ({"vocabulary_size": VOCABULARY.size + 1}, "refused a request: allowed_token_ids contains out-of-vocab"),
    ):
        with pytest.raises(BackendError, match=message):
            connect(server, **others)
    server.processed = False
    with pytest.raises(BackendError, match="must be started with --logprobs-mode processed_logprobs"):
        connect(server)
    server.processed, server.obeys = True, False
    with pytest.raises(BackendError, match="does not keep to the ids that are allowed"):
        connect(server)
    server.obeys, server.key = True, KEY
    with pytest.raises(BackendError, match="status 401"):
        connect(server)
    assert connect(server, api_key=KEY).positions == 256
    server.positions = 100
    assert connect(server, api_key=KEY).positions == 100
    server.die()
    with pytest.raises(BackendError, match=r"cannot be asked .*start vLLM there"):
        connect(server)
    for url in ("127.0.0.1:8000", "ftp://host", "http://", "nowhere"):
        with pytest.raises(InputError, match="must be like http://HOST:PORT"):
            VllmBackend(url, NAME, VOCABULARY.end, VOCABULARY.size, 256)


def test_what_vllm_cannot_do_is_refused_before_it_is_asked(server: Server) -> None:
    backend = connect(server)
    with pytest.raises(InputError, match="beams: vLLM keeps a single hypothesis"):
        backend.prepare(request(Narrow(), 1, Options(beams=2)))
    with pytest.raises(InputError, match="a prompt of 53 ids exceeds the 6 the model has room for"):
        backend.prepare(request(Narrow(), 10, most=250))
    assert server.asked == []


def test_draws_are_vllms_within_the_grammar_and_the_same_for_a_seed(server: Server) -> None:
    backend = connect(server)
    labelled = GRAMMARS.of(CHOICE)
    plain = GRAMMARS.of(TASKS["transcribe"])
    drawn = [Options(temperature=1.5, top_p=0.9, seed=seed) for seed in range(8)]
    requests = [request(grammar, 1, options) for options in drawn for grammar in (labelled, plain)]
    found = [job.best.ids for job in run(backend, requests)]
    assert found == [job.best.ids for job in run(backend, requests)]
    assert len(set(found[1::2])) == 8
    assert {TEXT.decode(list(ids)) for ids in found[::2]} <= set(LABELS)
    assert len(set(found[::2])) > 1
    sent = {(asked.temperature, asked.top_p, asked.seed) for asked in server.asked if len(asked.prompt) == 8}
    assert sent == {(1.5, 0.9, seed) for seed in range(8)}


def test_files_are_answered_as_without_it(tiny_checkpoint: Path, tmp_path: Path) -> None:
    checkpoint = load_checkpoint(tiny_checkpoint)
    server = Server(checkpoint.lm)
    vocabulary = checkpoint.vocabulary
    there = Answerer(checkpoint, backend=VllmBackend(server.url, NAME, vocabulary.end, vocabulary.size, 512))
    files = [str(clip(tmp_path / f"{seconds}.wav", seconds)) for seconds in (0.5, 1.5, 9.0)]  # the last in two pieces
    instructions = ("Transcribe this audio", "Is the speaker angry?")
    for options in (GREEDY, Options(labels=LABELS)):
        expected = list(Answerer(checkpoint).ask(files, instructions, options=options))
        found = list(there.ask(files, instructions, options=options))
        for one, other in zip(found, expected, strict=True):
            assert isinstance(one, Answer) and isinstance(other, Answer)
            assert (one.text, one.finish_reason, one.tokens_out) == (other.text, other.finish_reason, other.tokens_out)
            assert one.confidence == pytest.approx(other.confidence, abs=1e-4)
            assert one.seconds_consumed == one.seconds_in
        assert all(answer.text for answer in expected)  # type: ignore[union-attr]
    there.start()
    texts: list[str] = []
    done = threading.Event()

    def changed(question: Question) -> None:
        texts.append(question.text)
        if question.done:
            done.set()

    question = there.pose(there.listen(files[0]), instructions[0], on_change=changed)
    assert done.wait(10)
    assert texts[-1] == question.answer().text == expected_text(checkpoint, files[0], instructions[0])
    assert len(texts) > 1
    server.die()
    lost = there.pose(there.listen(files[0]), instructions[0])
    until(lambda: lost.done)
    with pytest.raises(BackendError):
        lost.answer()
    assert there.alive
    there.stop()


def expected_text(checkpoint: Any, file: str, instruction: str) -> str:
    (answer,) = Answerer(checkpoint).ask([file], instruction)
    assert isinstance(answer, Answer)
    return answer.text
