"""The whole path with real commands: synthesise, train a codec, encode, pretrain, and answer about a clip."""

from pathlib import Path
from typing import Any

import pytest
import torch

from speechllm.audio import read_audio
from speechllm.checkpoint import Checkpoint, load_checkpoint
from speechllm.codec import load_codec
from speechllm.data.corpus import read_corpus
from speechllm.data.encoded import read_encoded, row_codes, row_facts
from speechllm.generate import generate
from speechllm.prompt import Example, answer_parts, render
from speechllm.tasks import TASKS


@pytest.fixture(scope="module")
def checkpoint(pretrained: Path) -> Checkpoint:
    return load_checkpoint(pretrained / "checkpoint")


def test_encoded_rows_are_the_codes_of_the_clips(corpus: Path, pretrain_settings: dict[str, Any]) -> None:
    codec = load_codec(pretrain_settings["codec"])
    rows = {row["id"]: row for row in read_encoded([*pretrain_settings["corpora"]], "train", codec)}
    items = read_corpus([corpus / "manifest.jsonl"], "train")
    assert rows.keys() == {item.utterance.id for item in items}
    for item in items:
        row = rows[item.utterance.id]
        assert torch.equal(row_codes(row, 1), codec.encode(item.wav(codec.sample_rate), n_q=1))
        assert (row_facts(row), row["speaker"]) == (item.utterance.facts(), item.utterance.speaker)
    assert len({code for row in rows.values() for code in row["codes"]}) > 4


def test_the_checkpoint_holds_the_codec_the_corpus_was_encoded_with(
    checkpoint: Checkpoint, pretrain_settings: dict[str, Any]
) -> None:
    assert checkpoint.codec.fingerprint(1) == load_codec(pretrain_settings["codec"]).fingerprint(1)
    read_encoded([*pretrain_settings["corpora"]], "train", checkpoint.codec)


def test_answers_about_clips(checkpoint: Checkpoint, corpus: Path) -> None:
    words = checkpoint.vocabulary
    wavs = [item.wav(checkpoint.codec.sample_rate) for item in read_corpus([corpus / "dev.jsonl"], "dev")]
    prompts = [
        render(Example(checkpoint.encode(wav), TASKS[task].wordings[0]), words, checkpoint.text).ids
        for wav in wavs
        for task in ("transcribe", "translate_de")
    ]
    options: dict[str, Any] = {
        "end_id": words.end,
        "pad_id": words.pad,
        "max_new_tokens": checkpoint.settings.max_answer_tokens,
        "allowed": words.is_text(torch.arange(words.size)) | (torch.arange(words.size) == words.end),
    }
    completions = generate(checkpoint.lm, prompts, **options)
    alone = [generate(checkpoint.lm, [prompt], **options)[0] for prompt in prompts]
    assert [(c.ids, c.finish_reason) for c in completions] == [(c.ids, c.finish_reason) for c in alone]
    for completion in completions:
        parts = answer_parts(completion.ids, words, checkpoint.text)
        assert parts == ((checkpoint.text.decode(completion.ids),) if completion.ids else ())
        assert (completion.finish_reason == "length") == (len(completion.ids) == 6)
        assert len(completion.logprobs) == len(completion.ids) + (completion.finish_reason == "stop")
        assert all(score <= 0 for score in completion.logprobs)


def test_what_the_codec_decodes_is_a_clip_again(checkpoint: Checkpoint, corpus: Path) -> None:
    item = read_corpus([corpus / "dev.jsonl"], "dev")[0]
    wav = read_audio(corpus / item.utterance.audio, checkpoint.codec.sample_rate)
    codes = checkpoint.codec.encode(wav)
    again = checkpoint.codec.decode(codes)
    assert again.shape == (1, -(-wav.shape[1] // checkpoint.codec.hop_length) * checkpoint.codec.hop_length)
    assert again.isfinite().all()
