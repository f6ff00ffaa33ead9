"""Text to ids and back, exactly, for any Unicode text: SentencePiece, and the `tokenizer.json` of Hugging Face."""

import json
import re
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar

import sentencepiece
import tokenizers

from speechllm.errors import InputError

# SentencePiece spells a space with this character and decodes it as one, so it alone cannot travel as itself.
_SPACE_MARK = "\u2581"
_UNKNOWN_TEXT = "\ufffd"
_PROBE = "  a \t\n\x00 A\u0301 \u0410 <unk> <0x41>  "
_BYTE_PIECE = re.compile("<0x([0-9A-F]{2})>")


class TextTokenizer(ABC):
    """What turns text into ids, with `decode(encode(text)) == text` for every text that UTF-8 can hold.

    Characters without a piece travel as bytes, so no unknown id is ever emitted, and a text that spells a control or
    special token ("<unk>", "<0x41>", "<|im_end|>", "</s>") is encoded as the characters it is made of.

    FILE: the name of its file in a checkpoint.
    """

    FILE: ClassVar[str]
    _bytes: list[bytes | None]  # what each id stands for; None: encode never emits it
    _byte_ids: dict[int, int]  # byte: the id of its piece
    _prefix: str  # put in front of a text, so that its first word is written as the same word later is
    _spells_spaces: bool  # with the mark, which is then written as bytes

    def __init__(self, model: bytes, name: str) -> None:
        self._model = bytes(model)
        self._name = name

    @staticmethod
    def load(path: str | Path) -> "TextTokenizer":
        """Read a model file, `text.model` or `tokenizer.json`, or the one in a folder.

        Raises InputError when it is missing, damaged, or does not keep every text.
        """
        path = Path(path)
        if path.is_dir():
            found = [path / kind.FILE for kind in KINDS if (path / kind.FILE).is_file()]
            path = found[0] if found else path / SentencePieceTokenizer.FILE
        try:
            model = path.read_bytes()
        except OSError as error:
            raise InputError(f"{path}: cannot read the text model ({error.strerror})") from error
        kind = HuggingFaceTokenizer if path.suffix == ".json" else SentencePieceTokenizer
        return kind(model, str(path))

    def save(self, path: str | Path) -> None:
        """Write the model file, byte for byte what was loaded."""
        Path(path).write_bytes(self._model)

    @property
    def model_bytes(self) -> bytes:
        """The serialised model, as in the file."""
        return self._model

    @property
    def size(self) -> int:
        """Number of ids; they are in [0, size)."""
        return len(self._bytes)

    @property
    def hidden_ids(self) -> list[int]:
        """The ids that `encode` never emits, those of control and special tokens; `decode` shows each as U+FFFD."""
        return [index for index, value in enumerate(self._bytes) if value is None]

    @property
    def unknown_id(self) -> int:
        """One of `hidden_ids`."""
        return self._bytes.index(None)

    @abstractmethod
    def piece(self, index: int) -> str:
        """The piece behind an id as the model file spells it. Raises ValueError outside [0, size)."""

    def encode(self, text: str) -> list[int]:
        """Ids of the text; [] for "". Raises InputError when the text holds lone surrogates."""
        if not text:
            return []
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise InputError(f"text holds a lone surrogate at character {error.start}: decode it as UTF-8") from error
        text = self._prefix + text
        if not self._spells_spaces:
            return self._encode(text)
        mark = [self._byte_ids[byte] for byte in _SPACE_MARK.encode("utf-8")]
        ids: list[int] = []
        for index, part in enumerate(text.split(_SPACE_MARK)):
            ids += mark if index else []
            ids += self._encode(part)
        return ids

    def decode(self, ids: list[int]) -> str:
        """Text of the ids. Bytes that are no UTF-8 and `hidden_ids` become U+FFFD. Raises ValueError on other ids."""
        for index in ids:
            self._check(index)
        values = (self._bytes[index] for index in ids)
        text = b"".join(_UNKNOWN_TEXT.encode("utf-8") if value is None else value for value in values)
        return text.decode("utf-8", errors="replace").removeprefix(self._prefix)

    @abstractmethod
    def _encode(self, text: str) -> list[int]:
        """Ids of a text without the mark of spaces, nothing put in front of it."""

    def _keeps(self, text: str) -> bool:
        return len(self._byte_ids) == 256 and self.decode(self.encode(text)) == text

    def _check(self, index: int) -> None:
        if not 0 <= index < self.size:
            raise ValueError(f"{self._name}: id {index} is outside [0, {self.size})")

    def __reduce__(self) -> tuple[type["TextTokenizer"], tuple[bytes, str]]:
        return type(self), (self._model, self._name)


class SentencePieceTokenizer(TextTokenizer):
    """A SentencePiece model as `train.text_tokenizer` makes it: every word, the first one too, begins with "▁"."""

    FILE = "text.model"
    _prefix = " "
    _spells_spaces = True

    def __init__(self, model: bytes, name: str = "text model") -> None:
        """Args: model: a serialised SentencePiece model; name: what errors call it. Raises InputError."""
        super().__init__(model, name)
        try:
            # SentencePiece takes empty bytes for "no model yet", not for a wrong one.
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=self._model or b"empty")
        except RuntimeError as error:
            raise InputError(f"{name}: not a SentencePiece model") from error
        self._bytes = [self._bytes_of(index) for index in range(int(self._processor.get_piece_size()))]
        self._byte_ids = {value[0]: i for i, value in enumerate(self._bytes) if value and self._processor.is_byte(i)}
        if not self._keeps(_PROBE):
            raise InputError(f"{name}: does not keep every text; train it with python -m train.text_tokenizer")

    def piece(self, index: int) -> str:
        """See :meth:`TextTokenizer.piece`; "▁" stands for a space."""
        self._check(index)
        return str(self._processor.id_to_piece(index))

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self._processor.encode(text)
        return ids

    def _bytes_of(self, index: int) -> bytes | None:
        if self._processor.is_unknown(index) or self._processor.is_control(index):
            return None
        return _spelt(self._processor.id_to_piece(index), self._processor.is_byte(index))


class HuggingFaceTokenizer(TextTokenizer):
    """The `tokenizer.json` of a language model: a byte-level BPE, or one with byte fallback as from SentencePiece.

    Texts that it keeps get the ids that the language model knows them by. What would lose a text is left out of it:
    Unicode composition (NFC), cutting to a length, spaces put in front of texts that have none (`encode` puts one in
    front of all), and tokens that are looked for in the text before it is cut into pieces.
    """

    FILE = "tokenizer.json"

    def __init__(self, model: bytes, name: str = "tokenizer.json") -> None:
        """Args: model: the contents of the file; name: what errors call it. Raises InputError."""
        super().__init__(model, name)
        try:
            settings: dict[str, Any] = json.loads(tokenizers.Tokenizer.from_str(self._model.decode("utf-8")).to_str())
        except Exception as error:  # all that the library raises
            reason = str(error).partition("\n")[0]
            raise InputError(f"{name}: not a tokenizer.json that tokenizers reads ({reason})") from error
        refusal = InputError(f"{name}: does not keep every text; only BPE of bytes, or with byte fallback, can be used")
        bpe, added = settings["model"], settings["added_tokens"]
        if bpe["type"] != "BPE":
            raise refusal
        normalizers, cutters = _leaves(settings["normalizer"]), _leaves(settings["pre_tokenizer"])
        before = [part["type"] for part in normalizers]
        spaced = [part.get("add_prefix_space") or part.get("prepend_scheme", "never") != "never" for part in cutters]
        self._prefix = " " if "Prepend" in before or any(spaced) else ""
        levels = [part for part in normalizers + cutters if part["type"] == "ByteLevel"]
        self._spells_spaces = not levels

        pieces: dict[str, int] = bpe["vocab"]
        if not pieces:
            raise refusal
        self._names = {index: piece for piece, index in pieces.items()} | {one["id"]: one["content"] for one in added}
        special = {one["content"] for one in added if one["special"]} | {bpe["unk_token"]}
        byte_pieces = set() if levels else {piece for piece in pieces if _BYTE_PIECE.fullmatch(piece)}
        kept = {piece: index for piece, index in pieces.items() if piece not in special}
        closed = special | byte_pieces  # no merge may make one of them out of what a text spells
        merges = [pair for pair in bpe["merges"] if not closed & {*pair, "".join(pair)}]
        alphabet = _byte_alphabet()
        self._bytes = [None] * (max(self._names) + 1)
        for piece, index in kept.items():
            if not levels:
                self._bytes[index] = _spelt(piece, piece in byte_pieces)
            elif alphabet.keys() >= set(piece):
                self._bytes[index] = bytes(alphabet[character] for character in piece)
        letters = byte_pieces if self._spells_spaces else alphabet.keys() & kept.keys()
        self._byte_ids = {value[0]: kept[piece] for piece in letters if (value := self._bytes[kept[piece]])}
        left = [part for part in normalizers if part["type"] not in ("NFC", "Prepend")]
        exact = settings | {
            "truncation": None,
            "padding": None,
            "added_tokens": [],
            "post_processor": None,
            "normalizer": {"type": "Sequence", "normalizers": left},
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [_without_prefix(part) for part in cutters]},
            "model": bpe | {"unk_token": None, "dropout": None, "vocab": kept, "merges": merges},
        }
        self._tokenizer = tokenizers.Tokenizer.from_str(json.dumps(exact))
        probes = (_PROBE, "<0x41>", *(one["content"] for one in added))
        if not all(map(_keeps_characters, left)) or not all(map(self._keeps, probes)):
            raise refusal
        if None not in self._bytes:
            raise InputError(f"{name}: has no special token, such as one that ends a text; add one")

    def piece(self, index: int) -> str:
        """See :meth:`TextTokenizer.piece`; "" for an id that the file leaves out."""
        self._check(index)
        return self._names.get(index, "")

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids


KINDS: tuple[type[TextTokenizer], ...] = (HuggingFaceTokenizer, SentencePieceTokenizer)


def _spelt(piece: str, is_byte: bool) -> bytes:
    """The bytes that a piece of SentencePiece's kind stands for; of bytes that have a piece: "<0x41>"."""
    return bytes([int(piece[3:5], 16)]) if is_byte else piece.replace(_SPACE_MARK, " ").encode("utf-8")


def _byte_alphabet() -> dict[str, int]:
    """The characters that byte-level BPE (GPT-2) writes bytes with: others than printable from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + n): byte for n, byte in enumerate(others)}


def _leaves(component: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The steps of a normalizer or pre-tokenizer, those inside of sequences too."""
    if component is None or component["type"] != "Sequence":
        return [component] if component else []
    children = component.get("normalizers") or component.get("pretokenizers") or []
    return [leaf for child in children for leaf in _leaves(child)]


def _without_prefix(step: dict[str, Any]) -> dict[str, Any]:
    changes: dict[str, dict[str, Any]] = {
        "ByteLevel": {"add_prefix_space": False},
        "Metaspace": {"prepend_scheme": "never"},
    }
    return step | changes.get(step["type"], {})


def _keeps_characters(normalizer: dict[str, Any]) -> bool:
    """Whether a normalizer changes nothing but how spaces or bytes are written; a probe cannot tell for all texts."""
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE_MARK}
    return normalizer["type"] == "ByteLevel" or normalizer == spaces
