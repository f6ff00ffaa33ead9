"""Worker processes: they do their work, and stop without a word when the command does."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from conftest import ROOT

from train.workers import worker_pool

# A command that is stopped while its processes start, or while they work and have a lock of tqdm.
STARTING = """
import os, signal, threading
from train.workers import worker_pool
if __name__ == "__main__":
    stop = threading.Timer({delay}, os.killpg, (0, signal.SIGINT))
    if {early}:
        stop.start()
    try:
        with worker_pool(2) as pool:
            print(pool.map(wait, [0, 0]), flush=True)
            if not {early}:
                stop.start()
            pool.map(wait, [60, 60])
    except KeyboardInterrupt:
        print("stopped", flush=True)
"""
WORK = """
import time
from tqdm import tqdm
def wait(seconds):
    for _ in tqdm(range(1), disable=True):
        time.sleep(seconds)
"""


def test_work_is_done_in_other_processes() -> None:
    with worker_pool(2) as pool:
        assert sorted(set(pool.map(abs, range(-5, 5)))) == [0, 1, 2, 3, 4, 5]
        workers = {pool.apply(os.getpid) for _ in range(4)}
    assert workers and os.getpid() not in workers
    for worker in workers:
        assert not Path(f"/proc/{worker}").exists(), "they have ended"


def test_ctrl_c_is_heard_by_the_command_alone(tmp_path: Path) -> None:
    """Sent to all processes, as a terminal does: too early, and in the middle of the work."""
    heard = {}
    for delay, early in ((0.02, True), (0.1, True), (0.2, True), (0.5, False)):
        (tmp_path / "program.py").write_text(WORK + STARTING.format(delay=delay, early=early))
        process = subprocess.Popen(
            [sys.executable, tmp_path / "program.py"],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        begun = time.monotonic()
        out, err = process.communicate(timeout=120)
        assert (process.returncode, err) == (0, "")
        heard[delay] = out
        assert time.monotonic() - begun < 55
    assert heard[0.02] == "stopped\n", "no work was done yet"
    assert heard[0.5] == "[None, None]\nstopped\n", "it was at work"
    assert all(out.endswith("stopped\n") for out in heard.values())


def test_ctrl_c_is_heard_again_afterwards() -> None:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    with worker_pool(1) as pool:
        assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before
        assert pool.apply(signal.pthread_sigmask, (signal.SIG_BLOCK, ())) == before | {signal.SIGINT}
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before
