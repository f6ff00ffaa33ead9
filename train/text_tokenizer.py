"""Train the text tokenizer: python -m train.text_tokenizer --text FILE.jsonl.gz --text orders --out PATH."""

import io
import string
from collections.abc import Iterable, Iterator
from pathlib import Path
from random import Random
from typing import Annotated

import sentencepiece
import typer

from speechllm.data.recorded import Sentence
from speechllm.errors import InputError
from speechllm.tasks import TASKS
from speechllm.tasks.labels import write_intent
from speechllm.tasks.phrases import drawn
from speechllm.text import SentencePieceTokenizer
from train.commands import plain_errors
from train.orders import ORDERS, read_or_make

# English is transcribed and translated from, instructions stand in every sequence: both should cost few pieces.
ENGLISH_REPEATS = 2
INSTRUCTION_REPEATS = 50
CHARACTER_COVERAGE = 0.9995


def lines_of(sentences: Iterable[Sentence]) -> Iterator[str]:
    """The texts in all their languages, and intents as they are answered: names of slots should be few pieces too."""
    for sentence in sentences:
        for language, text in sentence.texts().items():
            yield from [text] * (ENGLISH_REPEATS if language == "en" else 1)
        if sentence.intent is not None:
            yield write_intent(sentence.intent, sentence.slots)


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
        raise InputError(f"vocab_size = {vocab_size} does not fit the lines ({reason})") from error
    tokenizer = SentencePieceTokenizer(model.getvalue(), str(path))
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    tokenizer.save(path)
    return tokenizer


app = typer.Typer(add_completion=False)


@app.command()
def main(
    text: Annotated[
        list[str],
        typer.Option(help=f"JSON Lines of sentences: en or text; de, fr, cs; intent, slots. Or {ORDERS}. Repeatable"),
    ],
    out: Annotated[Path, typer.Option(help="the model file to write")],
    vocab_size: Annotated[int, typer.Option(help="number of text pieces, the 256 bytes among them")] = 3000,
) -> None:
    """Train the SentencePiece text model on sentences, their intents and the instructions of the tasks."""
    rng = Random(0)
    asked = [w for task in TASKS.values() for w in (*task.wordings, *(drawn(phrase, rng) for phrase in task.phrases))]
    with plain_errors():
        lines = [line for name in text for line in lines_of(read_or_make(name))]
        tokenizer = train_text_tokenizer(lines + asked * INSTRUCTION_REPEATS, vocab_size, out)
    pieces = sum(len(tokenizer.encode(line)) for line in lines)
    typer.echo(f"{out}: {tokenizer.size} pieces; {len(lines)} lines, {pieces / len(lines):.1f} pieces each")


if __name__ == "__main__":
    app()
