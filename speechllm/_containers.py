"""What an audio file says about its own length, so that a file cut short is refused instead of read as a shorter one.

libsndfile reads what is there and keeps the difference to itself: a download that broke off is a shorter recording.
"""

import io
import re
from typing import BinaryIO

import soundfile

from speechllm import _mp3
from speechllm.errors import InputError

# "data : 64000 (should be 31978)" in libsndfile's log, by the names its wav, aiff, au, w64 and rf64 readers use.
_LOG_LINE = re.compile(r"^\s*(?:data|SSND|Data Size|riff|Riff size)\s*: (\d+) \(should be (\d+)\)", re.MULTILINE)
_STREAMED = 0x7FFF0000  # sizes from here up are what programs write that do not know the length yet
_SLACK_BYTES = 16  # pad bytes and chunk headers that some programs count and others do not
_OGG_PAGE_MAX = 27 + 255 + 255 * 255  # bytes
_OGG_SERIAL = slice(14, 18)  # of a page: which stream it is of


def prepare(source: str | BinaryIO, name: str) -> str | BinaryIO:
    """The same audio in a form of which libsndfile reads all: an mp3 gets a length header if it lacks one.

    Raises InputError for an mp3 that ends inside a frame.
    """
    if not _bytes_at(source, 0, 3).startswith((b"ID3", b"\xff")):
        return source
    data = _bytes_at(source, 0, -1)
    if not _mp3.is_mp3(data):
        return source
    if _mp3.last_frame_cut(data):
        raise InputError(f"{name}: cut short, its last frame is incomplete; get the whole file")
    return io.BytesIO(_mp3.with_length(data))


def check_whole(source: str | BinaryIO, file: soundfile.SoundFile, samples: int, name: str) -> None:
    """Raises InputError when fewer samples (a channel) were read from the opened file than it announces, or holds."""
    if file.format == "OGG":
        page = _last_ogg_page(source)
        if page is None:
            raise InputError(f"{name}: cut short, its last page is incomplete; get the whole file")
        if page[_OGG_SERIAL] != _bytes_at(source, 0, 27)[_OGG_SERIAL]:
            raise InputError(
                f"{name}: several recordings one after another, of which the first alone would be read; convert it "
                "first: ffmpeg -i INPUT output.wav"
            )
    expected: float = max(samples, file.frames)
    match = _LOG_LINE.search(file.extra_info)
    if match:
        announced, found = int(match[1]), int(match[2])
        if announced < _STREAMED and announced - found > _SLACK_BYTES and found > 0:
            expected = samples * announced / found
    # An mp3's header may count itself or a frame of padding; its last frame has been seen to be whole.
    slack = 2 * 1152 if file.format in ("MP3", "MPEG") else 0
    if expected > samples + slack:
        seconds, announced_seconds = samples / file.samplerate, expected / file.samplerate
        raise InputError(
            f"{name}: cut short, it holds {seconds:.2f} of the {announced_seconds:.2f} seconds it announces; "
            "get the whole file"
        )


def _last_ogg_page(source: str | BinaryIO) -> bytes | None:
    """None when it is not whole."""
    tail = _bytes_at(source, -_OGG_PAGE_MAX, _OGG_PAGE_MAX)
    page = tail[tail.rfind(b"OggS") :]
    if len(page) < 27 or len(page) < 27 + page[26] + sum(page[27 : 27 + page[26]]):
        return None
    return page


def _bytes_at(source: str | BinaryIO, offset: int, count: int) -> bytes:
    """`count` bytes (-1: all) from `offset` (negative: from the end), fewer where the file ends; rewinds the file."""
    if isinstance(source, str):
        with open(source, "rb") as file:
            return _bytes_at(file, offset, count)
    size = source.seek(0, io.SEEK_END)
    source.seek(max(size + offset, 0) if offset < 0 else offset)
    content = source.read(count)
    source.seek(0)
    return content
