"""The frames of an mp3, counted, because an mp3 need not say how long it is.

Without a length in its first frame (a Xing, Info or VBRI header) libsndfile guesses the length of the whole from the
bitrate of the first frame and reads no further: most of a file of variable bitrate can be lost that way. Walking the
frame headers gives the count, and giving libsndfile the file with that count in front makes it read them all.
"""

_KBPS_MPEG1 = (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 0)
_KBPS_MPEG2 = (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160, 0)
_HERTZ = (44100, 48000, 32000, 0)  # of MPEG-1; half in MPEG-2, a quarter in MPEG-2.5
_XING_KBPS_INDEX = 9  # a frame of at least 96 bytes at every rate: room for the header


def is_mp3(data: bytes) -> bool:
    """Whether an MPEG layer III stream starts here, after an ID3v2 tag if there is one."""
    return _frame_bytes(data, _audio_start(data)) > 0


def with_length(data: bytes) -> bytes:
    """The same mp3, led by a Xing header with its number of frames if it has no header that tells it."""
    start = _audio_start(data)
    if _tells_length(data[start : start + _frame_bytes(data, start)]):
        return data
    frames, _ = _walk(data, start)
    return _xing(data[start : start + 4], frames) + data[start:]


def last_frame_cut(data: bytes) -> bool:
    """Whether the data end inside a frame."""
    _, end = _walk(data, _audio_start(data))
    return end > len(data)


def _audio_start(data: bytes) -> int:
    """Bytes taken by the ID3v2 tag."""
    if data[:3] != b"ID3" or len(data) < 10:
        return 0
    footer = 10 if data[5] & 0x10 else 0
    return 10 + footer + sum((byte & 0x7F) << shift for byte, shift in zip(data[6:10], (21, 14, 7, 0), strict=True))


def _frame_bytes(data: bytes, at: int) -> int:
    """Length of the layer III frame whose header is at `at`, 0 when there is no such header."""
    if at + 4 > len(data) or data[at] != 0xFF or data[at + 1] & 0xE6 != 0xE2:
        return 0
    version = data[at + 1] >> 3 & 3  # 3: MPEG-1, 2: MPEG-2, 0: MPEG-2.5
    hertz = _HERTZ[data[at + 2] >> 2 & 3] >> {3: 0, 2: 1, 0: 2, 1: 16}[version]
    kbps = (_KBPS_MPEG1 if version == 3 else _KBPS_MPEG2)[data[at + 2] >> 4]
    if not hertz or not kbps:
        return 0
    return (144 if version == 3 else 72) * kbps * 1000 // hertz + (data[at + 2] >> 1 & 1)


def _walk(data: bytes, at: int) -> tuple[int, int]:
    """(frames that begin in the data, where the last of them should end)."""
    frames = 0
    while length := _frame_bytes(data, at):
        frames += 1
        at += length
    return frames, at


def _tells_length(frame: bytes) -> bool:
    for tag in (b"Xing", b"Info"):
        at = frame.find(tag)
        if at >= 0:
            return bool(frame[at + 7] & 1) and int.from_bytes(frame[at + 8 : at + 12], "big") > 0
    return b"VBRI" in frame


def _xing(header: bytes, frames: int) -> bytes:
    """A silent frame like the one with this header, carrying the number of frames that follow."""
    mono = header[3] >> 6 == 3
    side_info = (17 if mono else 32) if header[1] >> 3 & 3 == 3 else (9 if mono else 17)
    head = bytes([header[0], header[1] | 1, _XING_KBPS_INDEX << 4 | header[2] & 0x0C, header[3]])
    content = head + bytes(side_info) + b"Xing" + (1).to_bytes(4, "big") + frames.to_bytes(4, "big")
    return content.ljust(_frame_bytes(head, 0), b"\0")
