"""The frames of an mp3, counted, because an mp3 need not say how long it is.

Without a length in its first frame (a Xing, Info or VBRI header) libsndfile guesses the length of the whole from the
bitrate of the first frame and reads no further: most of a file of variable bitrate can be lost that way. Of files that
were joined it reads as much as the first one announces. Walking the frame headers, over tags and junk between them,
gives the count, and giving libsndfile the frames with that count in front makes it read them all.
"""

_KBPS_MPEG1 = (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 0)
_KBPS_MPEG2 = (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160, 0)
_HERTZ = (44100, 48000, 32000, 0)  # of MPEG-1; half in MPEG-2, a quarter in MPEG-2.5
_XING_KBPS_INDEX = 9  # a frame of at least 96 bytes at every rate: room for the header


def is_mp3(data: bytes) -> bool:
    """Whether an MPEG layer III stream starts here, after an ID3v2 tag if there is one."""
    return _frame_bytes(data, _tag_end(data, 0)) > 0


def with_length(data: bytes) -> bytes:
    """The same mp3, if it tells how many frames it has and no fewer than it does; else these alone, led by a Xing
    header with their number.
    """
    runs = _runs(data)
    start, frames = runs[0][0], sum(run[2] for run in runs)
    header = data[start : start + _frame_bytes(data, start)]
    told = _frames_told(header)
    if len(runs) == 1 and told >= frames - 1:  # some count the header's frame, some do not
        return data
    audio = b"".join(data[begin:end] for begin, end, _ in runs)
    return _xing(header[:4], frames - (told > 0)) + audio[len(header) if told else 0 :]


def last_frame_cut(data: bytes) -> bool:
    """Whether the data end inside a frame."""
    return _runs(data)[-1][1] > len(data)


def _tag_end(data: bytes, at: int) -> int:
    """Where the ID3v2 tag that begins here ends; ``at`` without one."""
    head = data[at : at + 10]
    if head[:3] != b"ID3" or len(head) < 10:
        return at
    footer = 10 if head[5] & 0x10 else 0
    return at + 10 + footer + sum((byte & 0x7F) << n for byte, n in zip(head[6:], (21, 14, 7, 0), strict=True))


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


def _runs(data: bytes) -> list[tuple[int, int, int]]:
    """Stretches of frames without anything between them: (begin, end, frames); the last may end beyond the data."""
    runs = []
    begin = _tag_end(data, 0)
    alike = data[begin + 1] & 0xFE, data[begin + 2] & 0x0C  # version, layer and rate, which do not change
    while begin >= 0:
        frames, at = 0, begin
        while length := _frame_bytes(data, at):
            frames += 1
            at += length
        runs.append((begin, at, frames))
        begin = _next_frame(data, _tag_end(data, at), alike)
    return runs


def _next_frame(data: bytes, at: int, alike: tuple[int, int]) -> int:
    """Where the next frame like the others begins that another one follows; -1 if there is none."""
    while (at := data.find(b"\xff", at)) >= 0:
        length = _frame_bytes(data, at)
        if length and (data[at + 1] & 0xFE, data[at + 2] & 0x0C) == alike and _frame_bytes(data, at + length):
            return at
        at += 1
    return -1


def _frames_told(frame: bytes) -> int:
    """How many frames its header says there are; 0 where it does not."""
    for tag in (b"Xing", b"Info"):
        at = frame.find(tag)
        if at >= 0:
            return int.from_bytes(frame[at + 8 : at + 12], "big") if frame[at + 7] & 1 else 0
    at = frame.find(b"VBRI")
    return int.from_bytes(frame[at + 14 : at + 18], "big") if at >= 0 else 0


def _xing(header: bytes, frames: int) -> bytes:
    """A silent frame like the one with this header, carrying the number of frames that follow."""
    mono = header[3] >> 6 == 3
    side_info = (17 if mono else 32) if header[1] >> 3 & 3 == 3 else (9 if mono else 17)
    head = bytes([header[0], header[1] | 1, _XING_KBPS_INDEX << 4 | header[2] & 0x0C, header[3]])
    content = head + bytes(side_info) + b"Xing" + (1).to_bytes(4, "big") + frames.to_bytes(4, "big")
    return content.ljust(_frame_bytes(head, 0), b"\0")
