"""The text tokenizer keeps every text and never emits a control piece."""

import gzip
import json
import pickle
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from speechllm.errors import InputError
from speechllm.text import TextTokenizer
from train.text_tokenizer import app, read_captions, train_text_tokenizer

MODEL = Path(__file__).parents[1] / "tokenizers" / "text.model"
TOKENIZER = TextTokenizer.load(MODEL)
UNICODE = st.text(st.characters(exclude_categories=["Cs"]))
SPECIALS = st.lists(st.sampled_from(["\u2581", " ", "\n", "\x00", "\t", "<unk>", "<s>", "<0x41>", "a", "é", "😀"]))
LINES = [f"A man number {i} rides bike {i * 7} over the wide green hill" for i in range(200)]


@settings(deadline=None)
@given(UNICODE)
@example("")
@example(" ")
@example("  two  spaces  ")
@example("\u2581")
@example("\u2581a \u2581\u2581 b\u2581 ")
@example("\n\r\n\t\x00\x1f\u2028\ufeff\ufffd\u0301")
@example("e\u0301 is not é; ﬁ; Ⅷ; 日本語 👩‍👩‍👧")
def test_round_trip_of_any_text(text: str) -> None:
    ids = TOKENIZER.encode(text)
    assert TOKENIZER.decode(ids) == text
    assert all(0 < index < TOKENIZER.size for index in ids)


@settings(deadline=None)
@given(SPECIALS.map("".join))
def test_round_trip_of_spaces_marks_and_controls(text: str) -> None:
    ids = TOKENIZER.encode(text)
    assert TOKENIZER.decode(ids) == text
    assert TOKENIZER.unknown_id not in ids


def test_every_code_point_survives() -> None:
    points = [chr(point) for point in range(0x110000) if not 0xD800 <= point < 0xE000]
    for start in range(0, len(points), 4096):
        text = "".join(points[start : start + 4096])
        assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


@pytest.mark.parametrize("text", ["\ud800", "fine until here \udfff"])
def test_lone_surrogates_are_refused(text: str) -> None:
    with pytest.raises(InputError, match="lone surrogate"):
        TOKENIZER.encode(text)


@pytest.mark.parametrize("text", ["<unk>", "<s>", "</s>", "<|end|>", "<pad>"])
def test_control_spellings_are_plain_pieces(text: str) -> None:
    pieces = [TOKENIZER.piece(index) for index in TOKENIZER.encode(text)]
    assert len(pieces) > 2
    assert "".join(pieces) == "▁" + text


def test_a_byte_spelling_is_not_that_byte() -> None:
    pieces = [TOKENIZER.piece(index) for index in TOKENIZER.encode("<0x41>")]
    assert "<0x41>" not in pieces
    assert "".join(pieces) == "▁<0x41>"


def test_first_word_has_the_piece_of_the_same_word_later() -> None:
    ids = TOKENIZER.encode("man man")
    assert len(ids) == 2
    assert ids[0] == ids[1]
    assert TOKENIZER.piece(ids[0]) == "▁man"


def test_empty_text_has_no_pieces() -> None:
    assert TOKENIZER.encode("") == []
    assert TOKENIZER.decode([]) == ""


def test_digits_are_split() -> None:
    assert [TOKENIZER.piece(index) for index in TOKENIZER.encode("1234")] == ["▁", "1", "2", "3", "4"]


def test_decoding_what_encode_never_emits() -> None:
    lead_byte = next(i for i in range(TOKENIZER.size) if TOKENIZER.piece(i) == "<0xE2>")
    assert TOKENIZER.decode([TOKENIZER.unknown_id, lead_byte]) == "\ufffd\ufffd"
    for index in (-1, TOKENIZER.size):
        with pytest.raises(ValueError, match="outside"):
            TOKENIZER.decode([index])


def test_saved_and_pickled_tokenizers_are_equal(tmp_path: Path) -> None:
    TOKENIZER.save(tmp_path / "copy.model")
    text = "Two dogs run. Zwei Hunde laufen."
    for copy in (TextTokenizer.load(tmp_path / "copy.model"), pickle.loads(pickle.dumps(TOKENIZER))):
        assert copy.model_bytes == MODEL.read_bytes()
        assert copy.encode(text) == TOKENIZER.encode(text)


def test_a_wrong_model_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"missing\.model"):
        TextTokenizer.load(tmp_path / "missing.model")
    for content in (b"", b"not a model"):
        (tmp_path / "wrong.model").write_bytes(content)
        with pytest.raises(InputError, match=r"wrong\.model: not a SentencePiece model"):
            TextTokenizer.load(tmp_path / "wrong.model")


def test_training_is_repeatable_and_lossless(tmp_path: Path) -> None:
    first = train_text_tokenizer(LINES, 420, tmp_path / "new" / "a.model")
    second = train_text_tokenizer(LINES, 420, tmp_path / "b.model")
    assert first.size == 420
    assert first.model_bytes == second.model_bytes == (tmp_path / "new" / "a.model").read_bytes()
    assert len(first.encode(LINES[0])) < len(TOKENIZER.encode(LINES[0]))
    assert first.decode(first.encode("Žluťoučký kůň")) == "Žluťoučký kůň"


def test_impossible_sizes_are_refused(tmp_path: Path) -> None:
    for size in (100, 100_000):
        with pytest.raises(InputError, match=f"vocab_size = {size}"):
            train_text_tokenizer(LINES, size, tmp_path / "no.model")
    assert not (tmp_path / "no.model").exists()


def test_captions_are_read_with_english_twice(tmp_path: Path) -> None:
    path = tmp_path / "captions.jsonl.gz"
    path.write_bytes(gzip.compress(json.dumps({"id": "x", "en": "A dog.", "de": "Ein Hund."}).encode()))
    assert list(read_captions(path)) == ["A dog.", "A dog.", "Ein Hund."]


@pytest.mark.parametrize("line", ["{", "3", '{"id": "x"}', '{"en": null}', '["en"]'])
def test_wrong_captions_are_named_by_line(tmp_path: Path, line: str) -> None:
    path = tmp_path / "captions.jsonl"
    path.write_text('{"en": "A dog."}\n' + line + "\n")
    with pytest.raises(InputError, match=r"captions\.jsonl, line 2"):
        list(read_captions(path))


def test_command_trains_and_reports_user_errors(tmp_path: Path) -> None:
    captions = tmp_path / "captions.jsonl"
    captions.write_text("".join(json.dumps({"en": line}) + "\n" for line in LINES))
    out = tmp_path / "text.model"
    done = CliRunner().invoke(app, ["--captions", str(captions), "--vocab-size", "450", "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert TextTokenizer.load(out).size == 450
    failed = CliRunner().invoke(app, ["--captions", str(tmp_path / "none.jsonl"), "--out", str(out)])
    assert failed.exit_code == 2
    assert "none.jsonl" in failed.stderr
    assert "Traceback" not in failed.output
