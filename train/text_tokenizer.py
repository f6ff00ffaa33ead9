"""Train the text tokenizer: python -m train.text_tokenizer --captions FILE.jsonl.gz --vocab-size 3000 --out PATH."""

import gzip
import io
import json
import string
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from random import Random
from typing import Annotated

import sentencepiece
import typer

from speechllm.errors import InputError
from speechllm.tasks import TASKS
from speechllm.tasks.phrases import drawn
from speechllm.text import SentencePieceTokenizer

LANGUAGES = ("en", "de", "fr", "cs")
# English is transcribed and translated from, instructions stand in every sequence: both should cost few pieces.
ENGLISH_REPEATS = 2
INSTRUCTION_REPEATS = 50
CHARACTER_COVERAGE = 0.9995


def read_captions(path: str | Path) -> Iterator[str]:
    """Captions of a JSON Lines file (gzip or plain) whose lines hold texts under language codes. Raises InputError."""
    opener = gzip.open if str(path).endswith(".gz") else open
    try:
        with opener(path, "rt", encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                try:
                    record = json.loads(line)
                except ValueError as error:
                    raise InputError(f"{path}, line {number}: not JSON") from error
                captions = {k: v for k, v in record.items() if k in LANGUAGES} if isinstance(record, dict) else {}
                if not captions or not all(isinstance(caption, str) for caption in captions.values()):
                    raise InputError(f"{path}, line {number}: expected texts under {', '.join(LANGUAGES)}")
                for language, caption in captions.items():
                    yield from [caption] * (ENGLISH_REPEATS if language == "en" else 1)
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise InputError(f"{path}: cannot read the captions ({error})") from error


def train_text_tokenizer(lines: Iterable[str], vocab_size: int, path: str | Path) -> SentencePieceTokenizer:
    """Train a BPE model with byte fallback on the lines and write it to path.

    Nothing is normalised and no pad, bos or eos piece exists: control tokens belong to the vocabulary. Raises
    InputError when vocab_size cannot be reached (too few lines) or cannot hold the single characters (too small).
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(" " + line for line in lines),  # as encoded: every word after a space
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            character_coverage=CHARACTER_COVERAGE,
            required_chars=string.ascii_letters + string.digits + string.punctuation,
            split_digits=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            unk_id=0,
            pad_id=-1,
            bos_id=-1,
            eos_id=-1,
            minloglevel=2,
        )
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise InputError(f"vocab_size = {vocab_size} does not fit the captions ({reason})") from error
    tokenizer = SentencePieceTokenizer(model.getvalue(), str(path))
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    tokenizer.save(path)
    return tokenizer


app = typer.Typer(add_completion=False)


@app.command()
def main(
    captions: Annotated[list[Path], typer.Option(help="JSON Lines of captions (en, de, fr, cs); repeatable.")],
    out: Annotated[Path, typer.Option(help="The model file to write.")],
    vocab_size: Annotated[int, typer.Option(help="Number of text pieces, the 256 bytes among them.")] = 3000,
) -> None:
    """Train the SentencePiece text model on image captions and the instructions of the tasks."""
    rng = Random(0)
    asked = [w for task in TASKS.values() for w in (*task.wordings, *(drawn(phrase, rng) for phrase in task.phrases))]
    try:
        lines = [caption for path in captions for caption in read_captions(path)]
        tokenizer = train_text_tokenizer(lines + asked * INSTRUCTION_REPEATS, vocab_size, out)
    except InputError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from error
    pieces = sum(len(tokenizer.encode(line)) for line in lines)
    typer.echo(f"{out}: {tokenizer.size} pieces; {len(lines)} captions, {pieces / len(lines):.1f} pieces each")


if __name__ == "__main__":
    app()
