"""`speechllm serve` in a process of its own, and what the stress tests need to know of it."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import soundfile

CLIPS = sorted((Path(__file__).resolve().parents[2] / "prompts" / "clips").glob("*.wav"))
MEBIBYTE = 1 << 20


@dataclass(frozen=True)
class Server:
    """A server that answers at `url`."""

    url: str
    process: subprocess.Popen[str]

    @property
    def memory(self) -> float:
        """MiB of physical memory it holds now."""
        return self._status("VmRSS")

    @property
    def peak(self) -> float:
        """MiB of physical memory it ever held."""
        return self._status("VmHWM")

    def _status(self, field: str) -> float:
        lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith(field)).split()[1]) / 1024


@contextmanager
def server(*options: str) -> Iterator[Server]:
    """Stopped at the end, as by Ctrl-C."""
    command = [sys.executable, "-m", "serve.cli", "serve", "--port", "0", *options]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONUNBUFFERED": "1"}
    ) as process:
        try:
            assert process.stdout
            yield Server(process.stdout.readline().split()[-1], process)
        finally:
            process.terminate()
            process.wait(30)


def pieces(clips: Sequence[Path], parts: int) -> list[bytes]:
    """WAV files: each clip whole, and its beginnings, so that many differ."""
    files = []
    for clip in clips:
        samples, rate = soundfile.read(clip, dtype="int16")
        for part in range(1, parts + 1):
            file = io.BytesIO()
            soundfile.write(file, samples[: len(samples) * part // parts], rate, format="WAV")
            files.append(file.getvalue())
    return files
