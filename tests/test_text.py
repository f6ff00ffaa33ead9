"""Text tokenizers of either kind keep every text and never emit a control piece."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from typer.testing import CliRunner

from speechllm.data.recorded import Sentence
from speechllm.errors import InputError
from speechllm.text import HuggingFaceTokenizer, TextTokenizer
from train.text_tokenizer import app, lines_of, train_text_tokenizer

MODEL = Path(__file__).parents[1] / "tokenizers" / "text.model"
TOKENIZER = TextTokenizer.load(MODEL)
UNICODE = st.text(st.characters(exclude_categories=["Cs"]))
SPELLINGS = ["<unk>", "<s>", "</s>", "<0x41>", "<|endoftext|>", "<|im_end|>", "<think>"]
SPECIALS = st.lists(st.sampled_from([*SPELLINGS, "\u2581", " ", "\n", "\x00", "\t", "a", "é", "😀"]))
LINES = [f"A man number {i} rides bike {i * 7} over the wide green hill" for i in range(200)]
PLAIN = ["a", "A man rides over the hill.", "Zwei Männer, 17 bikes", "number 7 of the \n wide hills"]
# as Qwen cuts a text before BPE
WORDS = r"(?i:'s|'t|'m|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def byte_level() -> Tokenizer:
    """BPE of bytes as Qwen's: NFC, tokens of chats beside the pieces."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    cut = pre_tokenizers.Split(Regex(WORDS), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([cut, pre_tokenizers.ByteLevel(False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(
        LINES, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    )
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_end|>"])
    tokenizer.add_tokens(["<think>"])
    return tokenizer


def byte_fallback() -> Tokenizer:
    """BPE as converted from SentencePiece: control and byte pieces among the others, and merges that make "</s>"."""
    controls = ["<unk>", "<s>", "</s>"]
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    pieces = [*controls, *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer.train_from_iterator(
        [" " + line for line in LINES] + ["</s>"] * 9,
        trainers.BpeTrainer(vocab_size=480, special_tokens=pieces, show_progress=False),
    )
    return changed(tokenizer, lambda file: file.update(added_tokens=file["added_tokens"][: len(controls)]))


def changed(tokenizer: Tokenizer, change: Callable[[dict[str, Any]], object]) -> Tokenizer:
    """A copy whose tokenizer.json was changed."""
    file = json.loads(tokenizer.to_str())
    change(file)
    return Tokenizer.from_str(json.dumps(file))


def gpt2() -> Tokenizer:
    tokenizer = byte_level()
    tokenizer.normalizer = None
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    return tokenizer


def llama2() -> Tokenizer:
    tokenizer = byte_fallback()
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return tokenizer


def llama() -> Tokenizer:
    tokenizer = byte_fallback()
    tokenizer.normalizer = None
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    return tokenizer


def gemma() -> Tokenizer:
    tokenizer = byte_fallback()
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    return tokenizer


def opened(tokenizer: Tokenizer) -> HuggingFaceTokenizer:
    return HuggingFaceTokenizer(tokenizer.to_str().encode())


FILES = {kind.__name__: kind() for kind in (byte_level, gpt2, llama2, llama, gemma)}
TOKENIZERS: dict[str, TextTokenizer] = {"ours": TOKENIZER} | {name: opened(file) for name, file in FILES.items()}
every_kind = pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)


@every_kind
@settings(deadline=None)
@given(UNICODE)
@example("")
@example(" ")
@example("  two  spaces  ")
@example("\u2581")
@example("\u2581a \u2581\u2581 b\u2581 ")
@example("\n\r\n\t\x00\x1f\u2028\ufeff\ufffd\u0301")
@example("e\u0301 is not é; ﬁ; Ⅷ; 日本語 👩‍👩‍👧")
def test_round_trip_of_any_text(tokenizer: TextTokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(0 <= index < tokenizer.size for index in ids)
    assert not set(ids) & set(tokenizer.hidden_ids)


@every_kind
@settings(deadline=None)
@given(SPECIALS.map("".join))
def test_round_trip_of_spaces_marks_and_controls(tokenizer: TextTokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert not set(ids) & set(tokenizer.hidden_ids)


@every_kind
def test_every_code_point_survives(tokenizer: TextTokenizer) -> None:
    points = [chr(point) for point in range(0x110000) if not 0xD800 <= point < 0xE000]
    for start in range(0, len(points), 4096):
        text = "".join(points[start : start + 4096])
        assert tokenizer.decode(tokenizer.encode(text)) == text


@every_kind
@pytest.mark.parametrize("text", ["\ud800", "fine until here \udfff"])
def test_lone_surrogates_are_refused(tokenizer: TextTokenizer, text: str) -> None:
    with pytest.raises(InputError, match="lone surrogate"):
        tokenizer.encode(text)


@pytest.mark.parametrize("name", FILES)
def test_plain_text_has_the_ids_that_the_language_model_knows(name: str) -> None:
    for text in PLAIN:
        expected = FILES[name].encode(text, add_special_tokens=False).ids
        assert TOKENIZERS[name].encode(text) == expected
    assert len(expected) < len(text.encode()), "nothing was merged: the comparison says little"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("byte_level", "<|im_end|>"),
        ("byte_level", "<think>"),
        *((name, "</s>") for name in ("llama2", "llama", "gemma")),
    ],
)
def test_what_the_file_alone_reads_as_a_special_token_is_plain_pieces(name: str, text: str) -> None:
    special = FILES[name].token_to_id(text)
    assert special in FILES[name].encode(text).ids
    FILES[name].encode_special_tokens = True  # what transformers calls split_special_tokens: here it is not enough
    assert (special in FILES[name].encode(text).ids) == (text != "<|im_end|>")
    FILES[name].encode_special_tokens = False
    tokenizer = TOKENIZERS[name]
    assert special in tokenizer.hidden_ids
    assert "".join(map(tokenizer.piece, tokenizer.encode(text))).removeprefix("▁").replace("<0x7C>", "|") == text
    assert tokenizer.piece(special) == text
    assert tokenizer.decode([special]) == "\ufffd"


def test_a_text_is_never_cut() -> None:
    tokenizer = byte_level()
    tokenizer.enable_truncation(3)
    assert len(tokenizer.encode(LINES[0]).ids) == 3
    assert opened(tokenizer).encode(LINES[0]) == TOKENIZERS["byte_level"].encode(LINES[0])


def wordpiece() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))  # type: ignore[call-arg]  # the stub leaves it out
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.train_from_iterator(LINES, trainers.WordPieceTrainer(special_tokens=["[UNK]"], show_progress=False))
    return tokenizer


def drop_letter(file: dict[str, Any]) -> None:
    del file["model"]["vocab"]["ÿ"]  # no merge has it


LOSSY: dict[str, Callable[[], Tokenizer]] = {
    "uncased WordPiece": wordpiece,
    "no byte fallback": lambda: changed(byte_fallback(), lambda file: file["model"].update(byte_fallback=False)),
    "a byte without a piece": lambda: changed(byte_level(), drop_letter),
    "lower case": lambda: changed(byte_level(), lambda file: file.update(normalizer={"type": "Lowercase"})),
    "compatibility forms": lambda: changed(byte_level(), lambda file: file.update(normalizer={"type": "NFKC"})),
    "other quotes": lambda: changed(
        byte_level(),
        lambda file: file.update(normalizer={"type": "Replace", "pattern": {"String": "``"}, "content": '"'}),
    ),
    "spaces left out": lambda: changed(byte_fallback(), lambda file: file.update(pre_tokenizer={"type": "Whitespace"})),
}


@pytest.mark.parametrize("make", LOSSY.values(), ids=LOSSY)
def test_a_tokenizer_that_loses_text_is_refused_in_one_line(make: Callable[[], Tokenizer], tmp_path: Path) -> None:
    make().save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(InputError, match=r"tokenizer\.json: does not keep every text; only BPE of bytes") as error:
        TextTokenizer.load(tmp_path)
    assert "\n" not in str(error.value)


def test_a_tokenizer_without_special_tokens_is_refused() -> None:
    with pytest.raises(InputError, match="has no special token"):
        opened(changed(byte_level(), lambda file: file.update(added_tokens=[])))


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


@every_kind
def test_empty_text_has_no_pieces(tokenizer: TextTokenizer) -> None:
    assert tokenizer.encode("") == []
    assert tokenizer.decode([]) == ""


def test_digits_are_split() -> None:
    assert [TOKENIZER.piece(index) for index in TOKENIZER.encode("1234")] == ["▁", "1", "2", "3", "4"]


def test_decoding_what_encode_never_emits() -> None:
    lead_byte = next(i for i in range(TOKENIZER.size) if TOKENIZER.piece(i) == "<0xE2>")
    assert TOKENIZER.decode([TOKENIZER.unknown_id, lead_byte]) == "\ufffd\ufffd"


@every_kind
def test_ids_outside_are_refused(tokenizer: TextTokenizer) -> None:
    for index in (-1, tokenizer.size):
        for method in (tokenizer.piece, lambda index: tokenizer.decode([index])):
            with pytest.raises(ValueError, match="outside"):
                method(index)
    assert tokenizer.decode([tokenizer.unknown_id]) == "\ufffd"


@every_kind
def test_saved_and_pickled_tokenizers_are_equal(tokenizer: TextTokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / tokenizer.FILE)
    text = "Two dogs run. Zwei Hunde laufen."
    for copy in (
        TextTokenizer.load(tmp_path / tokenizer.FILE),
        TextTokenizer.load(tmp_path),
        pickle.loads(pickle.dumps(tokenizer)),
    ):
        assert type(copy) is type(tokenizer)
        assert copy.model_bytes == tokenizer.model_bytes == (tmp_path / tokenizer.FILE).read_bytes()
        assert copy.encode(text) == tokenizer.encode(text)
    assert TOKENIZER.model_bytes == MODEL.read_bytes()


def test_a_wrong_model_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"missing\.model"):
        TextTokenizer.load(tmp_path / "missing.model")
    for content in (b"", b"not a model"):
        (tmp_path / "wrong.model").write_bytes(content)
        with pytest.raises(InputError, match=r"wrong\.model: not a SentencePiece model"):
            TextTokenizer.load(tmp_path / "wrong.model")
    with pytest.raises(InputError, match=r"text\.model: cannot read"):
        TextTokenizer.load(tmp_path)  # a folder without either file
    for content in (b"", b"{", b"{}", b"\xff", b'{"model": {"type": "BPE"}}', b"[1]"):
        (tmp_path / "tokenizer.json").write_bytes(content)
        with pytest.raises(InputError, match=r"tokenizer\.json: not a tokenizer\.json that tokenizers reads") as error:
            TextTokenizer.load(tmp_path)
        assert "\n" not in str(error.value)


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


def test_english_is_trained_on_twice_and_intents_as_they_are_answered() -> None:
    caption = Sentence("x", "A dog.", {"de": "Ein Hund."})
    order = Sentence("y", "A latte.", intent="orderDrink", slots={"size": "small", "coffeeDrink": "latte"})
    assert list(lines_of([caption, order])) == [
        *("A dog.", "A dog.", "Ein Hund."),
        *("A latte.", "A latte.", "orderDrink(coffeeDrink=latte, size=small)"),
    ]


def test_command_trains_and_reports_user_errors(tmp_path: Path) -> None:
    captions = tmp_path / "captions.jsonl"
    captions.write_text("".join(json.dumps({"id": line, "en": line}) + "\n" for line in LINES))
    out = tmp_path / "text.model"
    sources = ["--text", str(captions), "--text", "orders"]
    done = CliRunner().invoke(app, [*sources, "--vocab-size", "450", "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert TextTokenizer.load(out).size == 450
    failed = CliRunner().invoke(app, ["--text", str(tmp_path / "none.jsonl"), "--out", str(out)])
    assert failed.exit_code == 2
    assert "none.jsonl" in failed.stderr
    assert "Traceback" not in failed.output
