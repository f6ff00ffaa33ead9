"""What goes wrong with clients and with the server itself; after each, questions are answered as before.

python tests/stress/http_faults.py
"""

from __future__ import annotations

import asyncio
import io
import json
import random
import socket
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress

import httpx
import numpy as np
import soundfile
from http_server import CLIPS, MEBIBYTE, Server, server

CONTENT = CLIPS[-1].read_bytes()
PATH = "/v1/audio/transcriptions"
FORM = "multipart/form-data; boundary=x"
PART = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\n\r\n'
GIBIBYTES = 2
GROWTH = 100  # MiB, over what the server holds once its batch has been full


def ask(running: Server, content: bytes = CONTENT, **data: str) -> httpx.Response:
    return httpx.post(running.url + PATH, files={"file": content}, data=data, timeout=120)


def raw(running: Server, *parts: bytes) -> socket.socket:
    host, port = running.url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), timeout=60)
    for part in parts:
        connection.sendall(part)
    return connection


def head(length: int, *more: bytes) -> bytes:
    lines = [f"POST {PATH} HTTP/1.1\r\nHost: x\r\nContent-Type: {FORM}\r\nContent-Length: {length}".encode(), *more]
    return b"\r\n".join(lines) + b"\r\n\r\n"


def huge_upload(running: Server) -> str:
    """Two gigabytes, announced and not; refused at once, or when the limit is passed."""
    sent = 0

    def chunks() -> Iterator[bytes]:
        nonlocal sent
        yield PART
        for _ in range(GIBIBYTES * 1024):
            sent += 1
            yield bytes(MEBIBYTE)

    response = httpx.post(running.url + PATH, content=chunks(), headers={"Content-Type": FORM}, timeout=120)
    assert response.status_code == 413, response.text
    with closing(raw(running, head(GIBIBYTES << 30, b"Expect: 100-continue"))) as connection:
        assert connection.recv(1000).startswith(b"HTTP/1.1 413 ")
    return f"413 after {sent} MiB of {GIBIBYTES * 1024}"


def flac_bombs(running: Server) -> str:
    """Hours of silence in a small file."""
    file = io.BytesIO()
    with soundfile.SoundFile(file, "w", 48000, 8, format="FLAC") as sound:
        for _ in range(6 * 60):
            sound.write(np.zeros((60 * 48000, 8), np.int16))
    started = time.monotonic()
    for _ in range(10):
        assert ask(running, file.getvalue()).status_code == 400
    return (
        f"{len(file.getvalue()) / MEBIBYTE:.1f} MiB of six hours, refused in {(time.monotonic() - started) / 10:.2f} s"
    )


def slow_clients(running: Server) -> str:
    """Sixty-four that send a byte a second, and others beside them."""
    slow = [raw(running, head(len(CONTENT)), PART) for _ in range(64)]
    times = []
    for _ in range(5):
        for connection in slow:
            connection.sendall(b"x")
        started = time.monotonic()
        assert ask(running).status_code == 200
        times.append(time.monotonic() - started)
        time.sleep(1)
    for connection in slow:
        connection.close()
    return f"others are answered in {max(times):.2f} s at most"


def clients_that_go(running: Server) -> str:
    """Two hundred, each at a moment of its own."""

    async def go(seconds: float) -> None:
        async with httpx.AsyncClient(timeout=60) as client:
            data = {"also": ["Transcribe this audio"] * 8, "stream": "true"}
            request = client.post(running.url + PATH, files={"file": CONTENT}, data=data)
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(request, seconds)

    async def all_of_them() -> None:
        for _ in range(20):
            await asyncio.gather(*(go(random.uniform(0.01, 1)) for _ in range(10)))

    asyncio.run(all_of_them())
    started = time.monotonic()
    while "speechllm_running 0.0" not in (text := httpx.get(f"{running.url}/metrics").text) or (
        "speechllm_questions 0.0" not in text
    ):
        assert time.monotonic() - started < 5
        time.sleep(0.02)
    return f"nothing of them runs {time.monotonic() - started:.2f} s after the last"


def corrupt_uploads(running: Server) -> str:
    """Five hundred files: noise, and audio with bytes changed."""
    rng = random.Random(0)
    statuses: dict[int, int] = {}
    for number in range(500):
        content = bytearray(rng.randbytes(rng.randrange(2000)) if number % 2 else CONTENT)
        for _ in range(rng.randrange(10)):
            at = rng.randrange(min(len(content), 100) or 1)
            content[at : at + 1] = rng.randbytes(rng.randrange(4))
        status = ask(running, bytes(content)).status_code
        statuses[status] = statuses.get(status, 0) + 1
    assert set(statuses) <= {200, 400}, statuses
    return f"{json.dumps(statuses)}"


def killed(folder: str) -> str:
    """A server killed while it answers: its clients see it, and the next one goes on, with the answers it kept."""
    with server("--cache", folder) as first:
        before = ask(first).json()["text"]
        with closing(raw(first, head(1000), PART)) as connection:
            first.process.kill()
            with suppress(ConnectionResetError):
                assert connection.recv(1000) == b""
    with server("--cache", folder) as second:
        assert ask(second).json()["text"] == before
        assert 'speechllm_cache_lookups_total{result="hit"} 1.0' in httpx.get(f"{second.url}/metrics").text
    return "the next one answers, from the cache"


def main() -> None:
    with server("--max-seconds", "60") as running:  # a changed rate can make a clip an hour, which takes its memory
        expected = ask(running).json()["text"]
        assert ask(running, stream="true").status_code == 200
        with ThreadPoolExecutor(32) as pool:  # the places of the batch take memory when they are first used
            assert {answer.json()["text"] for answer in pool.map(lambda _: ask(running), range(64))} == {expected}
        before = running.peak
        print(f"memory: {before:.0f} MiB")
        for fault in (huge_upload, flac_bombs, slow_clients, clients_that_go, corrupt_uploads):
            print(f"{fault.__name__}: {fault(running)}; memory {running.memory:.0f} MiB, at most {running.peak:.0f}")
            assert ask(running).json()["text"] == expected
            assert running.peak < before + GROWTH
    with tempfile.TemporaryDirectory() as folder:
        print(f"killed: {killed(folder)}")


if __name__ == "__main__":
    main()
