"""Encode a corpus to codes once: ``python -m train.encode MANIFEST --codec tokenizers/codec --out DIR``."""

from __future__ import annotations

import hashlib
import json
from contextlib import ExitStack
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from random import Random
from typing import Annotated

import torch
import typer
from datasets import Dataset, Features, Sequence, Value

from speechllm.checkpoint_settings import DEFAULT
from speechllm.codec import Codec, load_codec
from speechllm.data.corpus import Item, read_corpus
from speechllm.data.encoded import INFO, copy_id, stretched, write_facts
from speechllm.data.manifest import WRONG
from speechllm.data.perturb import vary
from speechllm.errors import InputError
from train.commands import plain_errors
from train.loop import progress_bar
from train.output import output_folder, write_whole
from train.workers import worker_pool

SHARD = 100  # utterances in a file; what an interruption can lose, and what one process does at a time
MOST_CODES = 2**15 - 1  # of a codebook, in FEATURES
FEATURES = Features(
    {
        "id": Value("string"),
        "split": Value("string"),
        "source": Value("string"),
        "speaker": Value("string"),
        "facts": Value("string"),  # JSON: a struct would need every language and label in every row
        "n_q": Value("int16"),
        "codes": Sequence(Value("int16")),
    }
)


def encode_row(codec: Codec, item: Item, n_q: int, copy: int) -> dict:
    """One utterance as a row. Copy 0 is as recorded; the others are varied. A text alone has no frames.

    Raises InputError for a duration that is not the audio's.
    """
    known, codes = item.utterance, torch.empty(0)
    facts = known.facts()
    if known.audio:
        wav = item.wav(codec.sample_rate)
        samples = wav.shape[-1]
        seconds = samples / codec.sample_rate
        if abs(seconds - known.duration) > WRONG:
            raise InputError(
                f"{known.id}: {seconds:.2f} s of audio, but its manifest says {known.duration:g} s: correct that, or "
                "leave it out by python -m train.filter"
            )
        facts = replace(facts, duration=round(seconds, 4))
        if copy:
            wav = vary(wav, codec.sample_rate, Random(f"{known.id} {copy}"))
            facts = replace(stretched(facts, wav.shape[-1] / samples), gender=None)  # higher or lower, it may be any
        codes = codec.encode(wav, n_q=n_q)
    return {
        "id": copy_id(known.id, copy),
        "split": known.split,
        "source": known.source,
        "speaker": known.speaker,
        "facts": write_facts(facts),
        "n_q": n_q,
        "codes": codes.flatten().to(torch.int16).numpy(),
    }


def fingerprint(items: list[Item]) -> str:
    """Of what the manifests say of the utterances: the same ids may stand for a corpus that was made anew."""
    lines = "\n".join(item.utterance.model_dump_json() for item in items)
    return hashlib.sha256(lines.encode()).hexdigest()[:16]


def shard_name(number: int) -> str:
    return f"{number:05d}.parquet"


loaded = cache(load_codec)  # once in each process


def encode_shard(number: int, items: list[Item], codec_folder: Path, n_q: int, copies: int, out: Path) -> int:
    """Write one shard, whole or not at all; returns its number of utterances."""
    codec = loaded(codec_folder)
    rows = [
        encode_row(codec, item, n_q, copy)
        for item in items
        for copy in range(copies if item.utterance.split == "train" and item.utterance.audio else 1)
    ]
    path = out / shard_name(number)
    Dataset.from_list(rows, features=FEATURES).to_parquet(str(path.with_suffix(".new")))
    path.with_suffix(".new").replace(path)
    return len(items)


def encode_corpus(manifest: Path, codec_folder: Path, out: Path, n_q: int, copies: int, jobs: int) -> int:
    """Encode every utterance of ``manifest`` (a manifest, or its folder) that is not in ``out`` yet.

    Returns how many that were.

    Raises:
        InputError: ``out`` holds other utterances than ``manifest``, or was encoded with another codec or settings;
            there is nothing to encode.
    """
    items = [item for split in ("train", "dev", "test") for item in read_corpus([manifest], split, True, texts=True)]
    if not items:
        raise InputError(f"{manifest}: holds no utterance")
    codec = load_codec(codec_folder)
    codec.check_n_q(n_q)
    if codec.card > MOST_CODES:
        raise InputError(f"{codec_folder}: has {codec.card} codes in a codebook, and {MOST_CODES} is the most")
    shards = {n: items[start : start + SHARD] for n, start in enumerate(range(0, len(items), SHARD))}
    info = {
        "codec": codec.fingerprint(n_q),
        "n_q": n_q,
        "copies": copies,
        "utterances": fingerprint(items),
        "shards": len(shards),
    }
    with output_folder(out):
        done = {n for n in shards if (out / shard_name(n)).exists()}
        known = (out / INFO).read_text(encoding="utf-8") if (out / INFO).is_file() else None
        told = json.dumps(info) + "\n"
        if known != told and (known or any(out.glob("*.parquet"))):
            raise InputError(
                f"{out}: holds other codes: of another manifest or codec, or with other settings; remove it"
            )
        if known != told:
            write_whole(out / INFO, told)
        todo = {n: shard for n, shard in shards.items() if n not in done}
        work = partial(encode_shard, codec_folder=codec_folder, n_q=n_q, copies=copies, out=out)
        with progress_bar() as bar, ExitStack() as stack:
            task = bar.add_task(f"encode {manifest}", total=len(items))
            bar.advance(task, sum(len(shards[n]) for n in done))
            if min(jobs, len(todo)) > 1:
                pool = stack.enter_context(worker_pool(min(jobs, len(todo)), torch.set_num_threads, (1,)))
                pending = [pool.apply_async(work, (n, shard)) for n, shard in todo.items()]
                results = (result.get() for result in pending)
            else:  # another process would be some seconds of imports
                results = (work(n, shard) for n, shard in todo.items())
            for number in results:
                bar.advance(task, number)
        return sum(map(len, todo.values()))


def main(
    manifest: Annotated[Path, typer.Argument(help="a manifest.jsonl, or its folder")],
    out: Annotated[Path, typer.Option(help="folder for the shards; what is there already is kept")],
    codec: Annotated[Path, typer.Option(help="codec folder")] = DEFAULT / "codec",
    n_q: Annotated[int, typer.Option(help="codebooks to keep", min=1)] = 1,
    copies: Annotated[
        int,
        typer.Option(
            help="versions of each train utterance; all but the first as from other speakers and places", min=1
        ),
    ] = 1,
    jobs: Annotated[int, typer.Option(help="processes", min=1)] = 2,
) -> None:
    """Turn the audio of a corpus into codes. Interrupted, it goes on where it was when started again."""
    with plain_errors("stopped; run the same command again to go on"):
        encode_corpus(manifest, codec, out, n_q, copies, jobs)


if __name__ == "__main__":
    typer.run(main)
