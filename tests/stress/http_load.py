"""Many clients at once, for minutes: no error but 429, no answer lost or swapped, memory flat.

python tests/stress/http_load.py [--clients 64] [--seconds 120]
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import random
import statistics
import time
from collections import Counter
from dataclasses import dataclass, field

import httpx
from http_server import CLIPS, Server, pieces, server

from serve.answer import Answer
from serve.answerer import Answerer
from speechllm.checkpoint import load_checkpoint

ASK = ("Transcribe this audio", "Translate this audio to German")
SETTLED = 0.25  # of the time: from then on memory must not grow
GROWTH = 1.1


@dataclass
class Tally:
    """What became of the requests."""

    statuses: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)  # of those answered
    memory: list[tuple[float, float]] = field(default_factory=list)  # (seconds since the start, MiB)


def expected(files: list[bytes]) -> dict[tuple[int, str], str]:
    """The answers without a server, one question at a time."""
    answerer = Answerer(load_checkpoint(), batch_size=1)
    answers = {}
    for number, content in enumerate(files):
        recording = answerer.listen(content)
        for instruction in ASK:
            question = answerer.pose(recording, instruction)
            while not question.done:
                answerer.drive()
            answer = question.answer()
            assert isinstance(answer, Answer)
            answers[number, instruction] = answer.text
    return answers


async def ask(client: httpx.AsyncClient, content: bytes, instruction: str, way: str) -> tuple[int, str]:
    """Status and answer, asked in one of three ways."""
    if way == "chat":
        audio = {"type": "input_audio", "input_audio": {"data": base64.b64encode(content).decode(), "format": "wav"}}
        turn = {"role": "user", "content": [audio, {"type": "text", "text": instruction}]}
        response = await client.post("/v1/chat/completions", json={"messages": [turn]})
        return response.status_code, response.json()["choices"][0]["message"]["content"] if response.is_success else ""
    data = {"instruction": instruction, "stream": "true" if way == "stream" else "false"}
    response = await client.post("/v1/audio/transcriptions", files={"file": content}, data=data)
    if not response.is_success:
        return response.status_code, ""
    if way == "json":
        return response.status_code, response.json()["text"]
    *deltas, done = [json.loads(line[6:]) for line in response.text.split("\n\n") if line]
    text = "".join(event["delta"] for event in deltas)
    return response.status_code, text if text == done["text"] else f"streamed {text!r}, whole {done['text']!r}"


async def client(url: str, files: list[bytes], answers: dict[tuple[int, str], str], tally: Tally, until: float) -> None:
    rng = random.Random()
    async with httpx.AsyncClient(base_url=url, timeout=120) as session:
        while time.monotonic() < until:
            number, instruction = rng.choice(list(answers))
            started = time.monotonic()
            try:
                status, text = await ask(session, files[number], instruction, rng.choice(("json", "stream", "chat")))
            except httpx.HTTPError as error:
                tally.statuses[type(error).__name__] += 1
                continue
            tally.statuses[str(status)] += 1
            if status == 200:
                tally.seconds.append(time.monotonic() - started)
                if text != answers[number, instruction]:
                    tally.wrong.append(f"{text!r} for {answers[number, instruction]!r}")
            elif status == 429:
                await asyncio.sleep(1)


async def watch(running: Server, tally: Tally, seconds: float) -> None:
    started = time.monotonic()
    while (passed := time.monotonic() - started) < seconds:
        tally.memory.append((passed, running.memory))
        await asyncio.sleep(1)


async def load(running: Server, clients: int, seconds: float, files: list[bytes]) -> Tally:
    answers = await asyncio.to_thread(expected, files)
    print(
        f"{len(answers)} questions, {len(set(answers.values()))} different answers; {clients} clients for {seconds:g} s"
    )
    tally, until = Tally(), time.monotonic() + seconds
    asking = [client(running.url, files, answers, tally, until) for _ in range(clients)]
    await asyncio.gather(watch(running, tally, seconds), *asking)
    return tally


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=120)
    given = parser.parse_args()
    with server() as running:
        tally = asyncio.run(load(running, given.clients, given.seconds, pieces(CLIPS, 6)))
    times = sorted(tally.seconds)
    early = [memory for passed, memory in tally.memory if passed <= SETTLED * given.seconds]
    late = [memory for passed, memory in tally.memory if passed > SETTLED * given.seconds]
    print(f"statuses: {dict(tally.statuses)}")
    print(f"answered: {len(times)}, {len(times) / given.seconds:.1f} a second; wrong: {len(tally.wrong)}")
    middle, most = statistics.median(times), times[int(0.95 * len(times))]
    print(f"seconds: median {middle:.2f}, 95 % {most:.2f}, longest {times[-1]:.2f}")
    print(f"memory: {max(early):.0f} MiB in the first quarter, {max(late):.0f} after it")
    print(*tally.wrong[:10], sep="\n")
    assert set(tally.statuses) <= {"200", "429"}
    assert not tally.wrong
    assert max(late) <= GROWTH * max(early)


if __name__ == "__main__":
    main()
