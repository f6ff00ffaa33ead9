"""Text to SentencePiece ids and back, exactly, for any Unicode text."""

from pathlib import Path

import sentencepiece

from speechllm.errors import InputError

# SentencePiece spells a space with this character and decodes it as one, so it alone cannot travel as itself.
_SPACE_MARK = "\u2581"
_UNKNOWN_TEXT = "\ufffd"
_PROBE = "  a \t\n\x00 A\u0301 \u0410 <unk> <0x41>  "


class TextTokenizer:
    """SentencePiece with `decode(encode(text)) == text` for every text that UTF-8 can hold.

    Every word begins with a "▁" piece, the first one too: `encode` puts one space in front of the text and `decode`
    takes one away. Characters the model has no piece for travel as byte pieces, so `<unk>` is never emitted, and a
    text that spells a control token ("<unk>", "<0x41>", "<|end|>") is encoded as the characters it is made of.
    """

    def __init__(self, model: bytes, name: str = "text model") -> None:
        """Args: model: a serialised SentencePiece model; name: what errors call it. Raises InputError."""
        self._model = bytes(model)
        self._name = name
        try:
            # SentencePiece takes empty bytes for "no model yet", not for a wrong one.
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=self._model or b"empty")
        except RuntimeError as error:
            raise InputError(f"{name}: not a SentencePiece model") from error
        self._size = int(self._processor.get_piece_size())
        self._bytes = [self._bytes_of(index) for index in range(self._size)]
        self._byte_ids = {self._bytes[i][0]: i for i in range(self._size) if self._processor.is_byte(i)}
        if len(self._byte_ids) != 256 or self.decode(self.encode(_PROBE)) != _PROBE:
            raise InputError(f"{name}: does not keep every text; train it with python -m train.text_tokenizer")

    @classmethod
    def load(cls, path: str | Path) -> "TextTokenizer":
        """Read a model file. Raises InputError when it is missing or not a lossless SentencePiece model."""
        try:
            model = Path(path).read_bytes()
        except OSError as error:
            raise InputError(f"{path}: cannot read the text model ({error.strerror})") from error
        return cls(model, str(path))

    def save(self, path: str | Path) -> None:
        """Write the model file, byte for byte what was loaded."""
        Path(path).write_bytes(self._model)

    @property
    def model_bytes(self) -> bytes:
        """The serialised model, as in the file."""
        return self._model

    @property
    def size(self) -> int:
        """Number of pieces; ids are in [0, size)."""
        return self._size

    @property
    def unknown_id(self) -> int:
        """An id that `encode` never emits; `decode` shows it as U+FFFD."""
        return int(self._processor.unk_id())

    def piece(self, index: int) -> str:
        """The piece behind an id, "▁" standing for a space. Raises ValueError outside [0, size)."""
        self._check(index)
        return str(self._processor.id_to_piece(index))

    def encode(self, text: str) -> list[int]:
        """Piece ids of the text; [] for "". Raises InputError when the text holds lone surrogates."""
        if not text:
            return []
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise InputError(f"text holds a lone surrogate at character {error.start}: decode it as UTF-8") from error
        mark = [self._byte_ids[byte] for byte in _SPACE_MARK.encode("utf-8")]
        ids: list[int] = []
        for index, part in enumerate((" " + text).split(_SPACE_MARK)):
            ids += mark if index else []
            ids += self._processor.encode(part)
        return ids

    def decode(self, ids: list[int]) -> str:
        """Text of the ids. Bytes that are no UTF-8 and `unknown_id` become U+FFFD. Raises ValueError on other ids."""
        for index in ids:
            self._check(index)
        return b"".join(self._bytes[index] for index in ids).decode("utf-8", errors="replace").removeprefix(" ")

    def _bytes_of(self, index: int) -> bytes:
        if self._processor.is_unknown(index) or self._processor.is_control(index):
            return _UNKNOWN_TEXT.encode("utf-8")
        piece: str = self._processor.id_to_piece(index)
        if self._processor.is_byte(index):
            return bytes([int(piece[3:5], 16)])  # "<0x41>"
        return piece.replace(_SPACE_MARK, " ").encode("utf-8")

    def _check(self, index: int) -> None:
        if not 0 <= index < self._size:
            raise ValueError(f"{self._name}: id {index} is outside [0, {self._size})")

    def __reduce__(self) -> tuple[type["TextTokenizer"], tuple[bytes, str]]:
        return type(self), (self._model, self._name)
