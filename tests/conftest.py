"""Helpers shared by the tests."""

import os
import shutil
from pathlib import Path

import pytest
import torch

from speechllm.checkpoint import save_checkpoint
from speechllm.codec import SpeechCodec, SpeechCodecConfig, save_codec
from speechllm.model import ModelConfig, make_model
from speechllm.text import TextTokenizer
from speechllm.vocabulary import Vocabulary

TEXT_MODEL = Path(__file__).resolve().parent.parent / "tokenizers" / "text.model"


def require_engine(program: str) -> None:
    """Skip when a speech engine's program is not installed; in CI its absence is a failure."""
    if shutil.which(program) is None:
        if os.environ.get("CI"):
            pytest.fail(f"{program} is not installed, and CI must have it")
        pytest.skip(f"{program} is not installed")


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
    codec = SpeechCodec(config)
    for name, buffer in codec.named_buffers():  # without values k-means would fill the codebooks, anew in every process
        if name.endswith("embed"):
            buffer.copy_(torch.nn.functional.normalize(torch.randn_like(buffer), dim=-1))
        elif name.endswith("initted"):
            buffer.fill_(True)
    save_codec(codec, folder / "codec")
    save_checkpoint(
        folder / "tiny",
        make_model(sizes, vocabulary.size, vocabulary.pad, vocabulary.end),
        folder / "codec",
        text,
        vocabulary,
        name="tiny random",
        max_audio_seconds=8.0,
        max_answer_tokens=6,
    )
    return folder / "tiny"
