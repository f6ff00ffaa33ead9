"""Helpers shared by the tests."""

import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
import yaml
from deepspeed.utils import groups
from torch import distributed
from typer import Typer
from typer.testing import CliRunner

from speechllm.checkpoint import save_checkpoint
from speechllm.codec import SpeechCodec, SpeechCodecConfig, save_codec
from speechllm.data.corpus import read_corpus
from speechllm.data.manifest import Utterance, load_wav, read_manifest, write_manifest
from speechllm.model import ModelConfig, make_model
from speechllm.text import TextTokenizer
from speechllm.vocabulary import Vocabulary
from train import codec as train_codec
from train import encode, import_data, synthesize

# A shell that runs the tests in the background ignores Ctrl-C, and so would the programs that tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).resolve().parent.parent
RATE = 16000  # Hz, of clips that tests make
TEXT_MODEL = ROOT / "tokenizers" / "text.model"
SPOKEN = (
    ("Ten men ran in the sun.", "Zehn Männer rannten in der Sonne."),
    ("Six kids sit in the city.", "Sechs Kinder sitzen in der Stadt."),
    ("Two dogs run.", "Zwei Hunde rennen."),
    ("She sings to Tim.", "Sie singt für Tim."),
)

# tensors here are tiny: threads would only wait for one another
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")


def require_engine(program: str) -> None:
    """Skip when a speech engine's program is not installed; in CI its absence is a failure."""
    if shutil.which(program) is None:
        if os.environ.get("CI"):
            pytest.fail(f"{program} is not installed, and CI must have it")
        pytest.skip(f"{program} is not installed")


def filled(codec: SpeechCodec) -> SpeechCodec:
    """The codec with random values in its codebooks, as if trained: one without them refuses to encode."""
    for name, buffer in codec.named_buffers():
        if name.endswith("embed"):
            buffer.copy_(torch.nn.functional.normalize(torch.randn_like(buffer), dim=-1))
        elif name.endswith("initted"):
            buffer.fill_(True)
    return codec.eval()


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint folder with random weights: 16 kHz codec, clips of up to 8 s, answers of up to 6 pieces."""
    torch.manual_seed(0)
    config = SpeechCodecConfig(
        n_mels=16, card=16, n_acoustic=1, dim=16, depth=1, recognizer_depth=1, kernel=3, code_dim=8,
        acoustic_dim=16, acoustic_depth=1, decoder_dim=16, decoder_depth=1,
    )  # fmt: skip
    text = TextTokenizer.load(TEXT_MODEL)
    vocabulary = Vocabulary(text_size=text.size, n_q=1, card=config.card)
    sizes = ModelConfig(hidden_size=32, num_layers=2, expert_size=32, num_experts=4, max_positions=512)
    folder = tmp_path_factory.mktemp("checkpoint")
    save_codec(filled(SpeechCodec(config)), folder / "codec")
    save_checkpoint(
        folder / "tiny",
        make_model(sizes, vocabulary.size, vocabulary.pad, vocabulary.end),
        folder / "codec",
        text,
        vocabulary,
        name="tiny random",
        max_audio_seconds=8.0,
        max_answer_tokens=6,
        tasks=["transcribe"],
    )
    return folder / "tiny"


@pytest.fixture(scope="module")
def engine() -> Iterator[None]:
    """What training needs to start in this process; ends the process group and signal handlers it leaves behind."""
    with pytest.MonkeyPatch.context() as patch:
        # the environment's ninja, as when it is activated: with another one DeepSpeed would compile its C++ part anew
        patch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
        for name, value in {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1"}.items():
            patch.setenv(name, str(value))
        patch.setenv("MASTER_PORT", "0")  # any free one
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        yield
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if distributed.is_initialized():
            distributed.destroy_process_group()
        groups._WORLD_GROUP = None  # DeepSpeed's clone, which would be taken for one of the next group


def command(main: Callable[..., None], *arguments: object) -> str:
    """Run a typer command to its end and return what it printed."""
    app = Typer()
    app.command()(main)
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def tone(seconds: float = 0.5, hertz: float = 300.0) -> np.ndarray:
    """Samples at RATE."""
    return (0.3 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * RATE)) / RATE)).astype(np.float32)


def clip(path: Path, seconds: float = 0.5) -> Path:
    """A file of audio."""
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, tone(seconds), RATE)
    return path


def table(path: Path, *lines: str, encoding: str = "utf-8", newline: str = "\n") -> Path:
    """A text file of these lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes("".join(line + newline for line in lines).encode(encoding))
    return path


def imported(source: object, out: Path, *options: object) -> list[Utterance]:
    """Import, and read the result as everything else does, each utterance with its audio."""
    command(import_data.main, source, "--out", out, *options)
    items = [i for split in ("train", "dev", "test") for i in read_corpus([out / "manifest.jsonl"], split, True)]  # type: ignore[arg-type]
    utterances = read_manifest(out / "manifest.jsonl")
    assert sorted(item.utterance.id for item in items) == sorted(u.id for u in utterances)
    for utterance in utterances:
        wav = load_wav(utterance, out, RATE)
        assert abs(wav.shape[1] / RATE - utterance.duration) < 0.1
        assert wav.abs().max() > 0.1
    assert not list(out.glob("*.new"))
    return utterances


def run_program(*arguments: object) -> subprocess.CompletedProcess[str]:
    """A program of this environment, e.g. "python", run in the repository's root; one thread, output as text."""
    return subprocess.run(
        [str(Path(sys.executable).parent / str(arguments[0])), *map(str, arguments[1:])],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=900,  # a first run compiles; killed, it would leave a lock that later ones wait for
    )


def write_yaml(path: Path, settings: dict[str, Any]) -> Path:
    """Settings as a config file; paths in it become text."""
    path.write_text(yaml.safe_dump(json.loads(json.dumps(settings, default=str))))
    return path


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty-four utterances of two engines: manifest.jsonl for training, and four of them as dev.jsonl."""
    require_engine("flite")
    require_engine("espeak-ng")
    folder = tmp_path_factory.mktemp("speech")
    with gzip.open(folder / "captions.jsonl.gz", "wt") as file:
        for number, (english, german) in enumerate(SPOKEN):
            file.write(json.dumps({"id": f"c{number}", "en": english, "de": german}) + "\n")
    engines = ("--engine", "flite", "--engine", "espeak", "--jobs", 1)
    command(synthesize.main, "--text", folder / "captions.jsonl.gz", "--out", folder, "--count", 24, *engines)
    utterances = read_manifest(folder / "manifest.jsonl")
    write_manifest(folder / "dev.jsonl", [u.model_copy(update={"split": "dev"}) for u in utterances[:4]])
    return folder


@pytest.fixture(scope="session")
def codec_settings(corpus: Path) -> dict[str, Any]:
    """What a config file of train.codec needs beside "out"; sizes and steps are tiny."""
    return {
        "manifests": [corpus / "manifest.jsonl"],
        "dev_manifests": [corpus / "dev.jsonl"],
        "codec": {
            "n_mels": 16, "card": 16, "n_acoustic": 1, "dim": 32, "depth": 1, "recognizer_depth": 1, "kernel": 5,
            "code_dim": 8, "acoustic_dim": 16, "acoustic_depth": 1, "decoder_dim": 16, "decoder_depth": 1,
        },
        "semantic": {
            "steps": 40, "warmup": 4, "batch_seconds": 8.0, "short_first": 4, "evaluate_every": 40,
        },
        "acoustic": {
            "steps": 20, "warmup": 2, "batch_clips": 2, "crop_seconds": 0.32, "evaluate_every": 20,
        },
    }  # fmt: skip


@pytest.fixture(scope="session")
def codec_run(codec_settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run of both stages; the codec is in its folder codec."""
    out = tmp_path_factory.mktemp("codec") / "run"
    config = write_yaml(out.with_name("codec.yaml"), codec_settings | {"out": out})
    command(train_codec.main, "--config", config)
    command(train_codec.main, "--config", config, "--stage", "acoustic")
    return out


@pytest.fixture(scope="session")
def pretrain_settings(corpus: Path, codec_run: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The corpus encoded, and what a config file of train/pretrain.py needs beside "out"."""
    codes = tmp_path_factory.mktemp("codes")
    for manifest in ("manifest", "dev"):
        path = corpus / f"{manifest}.jsonl"
        command(encode.main, path, "--out", codes / manifest, "--codec", codec_run / "codec", "--jobs", 1)
    return {
        "text_model": TEXT_MODEL,
        "codec": codec_run / "codec",
        "corpora": {str(codes / "manifest"): 1.0},
        "dev_corpora": [codes / "dev"],
        "tasks": {"transcribe": 0.7, "translate_de": 0.3},
        "model": {"hidden_size": 32, "num_layers": 2, "expert_size": 32, "num_experts": 4, "max_positions": 512},
        "curriculum": {"translate_de": 41},
        "ctc_layer": 1, "max_answer_tokens": 6, "batch_tokens": 150, "row_length": 120, "short_first": 4, "warmup": 4,
        "code_noise": 0.1, "steps": 56, "log_every": 4, "evaluate_every": 56, "save_every": 30, "decode_examples": 2,
    }  # fmt: skip


@pytest.fixture(scope="session")
def pretrained(pretrain_settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a pretraining run that was not interrupted."""
    out = tmp_path_factory.mktemp("pretrained") / "run"
    config = write_yaml(out.with_name("pretrain.yaml"), pretrain_settings | {"out": out})
    result = run_program("python", "train/pretrain.py", "--config", config)
    assert result.returncode == 0, result.stderr
    return out
