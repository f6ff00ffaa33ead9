"""Any codec will do: with each kind, a corpus is encoded, a model trained on it, saved, and asked about a clip."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from conftest import TEXT_MODEL, command, filled
from test_codec_huggingface import TINY, fill, noise, tiny
from typer.testing import CliRunner

from serve.cli import app
from speechllm.audio import read_audio
from speechllm.checkpoint import load_checkpoint
from speechllm.codec import (
    EncodecCodec,
    EncodecConfig,
    HuggingFaceCodec,
    SpeechCodec,
    SpeechCodecConfig,
    load_codec,
    save_codec,
)
from speechllm.data.encoded import read_encoded, row_codes
from speechllm.data.manifest import Utterance, write_manifest
from train import encode, import_codec, pretrain
from train.pretrain_config import Pretraining

WORDS = ("ja", "no", "two", "six")
N_Q = 2
OWN = SpeechCodecConfig(
    n_mels=16, card=16, n_acoustic=1, dim=16, depth=1, recognizer_depth=1, kernel=3, code_dim=4,
    acoustic_dim=16, acoustic_depth=1, decoder_dim=16, decoder_depth=1,
)  # fmt: skip
ENCODEC = EncodecConfig(n_q=3, n_filters=4, dimension=8, lstm=1, codebooks=4, card=16)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A manifest of eight clips, half of them dev: a tone in noise for each word."""
    folder = tmp_path_factory.mktemp("clips")
    utterances = []
    for number, word in enumerate(WORDS * 2):
        seconds = 0.8 + 0.01 * number
        time = np.arange(round(16000 * seconds)) / 16000
        tone = 0.2 * np.sin(2 * np.pi * (200 + 150 * number) * time)
        name = f"{number}.wav"
        soundfile.write(folder / name, tone + noise(len(time))[0].numpy(), 16000)
        split = "dev" if number >= len(WORDS) else "train"
        utterances.append(
            Utterance(id=f"u{number}", audio=name, duration=seconds, text=word, language="en", split=split, source="s")
        )
    write_manifest(folder / "manifest.jsonl", utterances)
    return folder


@pytest.fixture(scope="module", params=["own", "encodec package", *TINY])
def codec_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a user names as --codec. Of transformers' models, DAC is one of its folders; the others are imported."""
    folder = tmp_path_factory.mktemp("codec")
    torch.manual_seed(0)
    if request.param == "own":
        save_codec(filled(SpeechCodec(OWN)), folder / "codec")
    elif request.param == "encodec package":
        encodec = EncodecCodec(ENCODEC)
        with torch.no_grad():
            found = encodec.model.encoder(noise(4000)[None])
            fill((value for name, value in encodec.named_buffers() if name.endswith(".embed")), found)
        save_codec(encodec, folder / "codec")
    elif request.param == "dac":
        tiny("dac").save_pretrained(folder / "codec")
    else:
        tiny(request.param).save_pretrained(folder / "model")
        command(import_codec.main, folder / "model", "--out", folder / "codec", "--n-q", 3)
    return folder / "codec"


def test_from_a_codec_to_an_answer(codec_folder: Path, corpus: Path, engine: None, tmp_path: Path) -> None:
    codes = tmp_path / "codes"
    # in this process: another would import torch anew
    command(encode.main, corpus / "manifest.jsonl", "--out", codes, "--codec", codec_folder, "--n-q", N_Q, "--jobs", 1)
    codec = load_codec(codec_folder)
    rows = {row["id"]: row_codes(row, N_Q) for row in read_encoded([codes], "train", codec)}
    for number in range(len(WORDS)):
        wav = read_audio(corpus / f"{number}.wav", codec.sample_rate)
        assert torch.equal(rows[f"u{number}"], codec.encode(wav, n_q=N_Q))
    assert len(torch.cat(list(rows.values()), dim=1).unique()) > 3

    config = Pretraining.model_validate(
        {
            "out": tmp_path / "run", "text_model": TEXT_MODEL, "codec": codec_folder, "corpora": {str(codes): 1.0},
            "dev_corpora": [codes], "tasks": {"transcribe": 1}, "n_q": N_Q, "merge_repeats": False,
            "model": {"hidden_size": 32, "num_layers": 2, "expert_size": 32, "num_experts": 4, "max_positions": 512},
            "ctc_layer": 1, "max_audio_seconds": 2, "max_answer_tokens": 4, "batch_tokens": 400, "short_first": 0,
            "warmup": 1, "steps": 3, "log_every": 1, "evaluate_every": 3, "save_every": 3, "decode_examples": 1,
        }
    )  # fmt: skip
    trainer = pretrain.Trainer(config, resume=False)
    assert trainer.run()
    losses = [json.loads(line) for line in (config.out / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in losses] == [1, 2, 3, 3]
    assert all(np.isfinite(record["loss"]) for record in losses[:3])

    folder = config.out / "checkpoint"
    again = load_checkpoint(folder).codec
    assert type(again) is type(codec)
    assert again.fingerprint(N_Q) == codec.fingerprint(N_Q)
    clip = corpus / "0.wav"
    wav = read_audio(clip, codec.sample_rate)
    assert torch.equal(again.encode(wav), codec.encode(wav))
    if isinstance(again, HuggingFaceCodec):
        shutil.move(codec_folder, codec_folder.with_name("gone"))  # a checkpoint needs nothing outside itself
    arguments = ["ask", "--model", str(folder), "--device", "cpu", "Transcribe this audio", str(clip), "-f", "json"]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    answer = json.loads(result.stdout)
    assert answer["seconds_consumed"] == answer["seconds_in"] == 0.8
    assert answer["finish_reason"] in ("stop", "length", "no_speech")
