"""The layout of ids and its arithmetic."""

import json
from dataclasses import replace
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from speechllm.errors import InputError
from speechllm.vocabulary import Vocabulary

TWO = Vocabulary(text_size=100, n_q=2, card=8)
ONE = Vocabulary(text_size=100, n_q=1, card=8)
THREE = Vocabulary(text_size=100, n_q=3, card=8)
MERGED = Vocabulary(text_size=100, n_q=1, card=8, merge_repeats=True)


@st.composite
def layouts_and_codes(draw: st.DrawFn) -> tuple[Vocabulary, Tensor]:
    """Any layout without merging, and codes for it, some of them masked."""
    n_q, card, frames = draw(st.integers(1, 4)), draw(st.integers(1, 9)), draw(st.integers(0, 12))
    row = st.lists(st.integers(Vocabulary.MASKED, card - 1), min_size=frames, max_size=frames)
    codes = draw(st.lists(row, min_size=n_q, max_size=n_q))
    times, stride = draw(st.integers(0, 3)), draw(st.integers(1, 5))
    vocabulary = Vocabulary(draw(st.integers(1, 50)), n_q, card, times=times, acoustic_stride=stride)
    if draw(st.booleans()):
        vocabulary = replace(vocabulary, times=40, mark_frames=draw(st.integers(1, 14)), mark_steps=3)
    return vocabulary, torch.tensor(codes, dtype=torch.int64).reshape(n_q, frames)


def test_layout_is_text_then_controls_then_codebooks() -> None:
    assert TWO.size == 100 + 32 + 2 * 8
    assert (TWO.pad, TWO.audio_begin, TWO.audio_end, TWO.answer, TWO.end) == (100, 101, 102, 103, 104)
    ids = torch.arange(-1, TWO.size + 1)
    assert ids[TWO.is_text(ids)].tolist() == list(range(100))
    assert ids[TWO.is_audio(ids)].tolist() == [TWO.mask, *range(132, 148)]


def test_frames_are_interleaved_codebook_by_codebook() -> None:
    codes = torch.tensor([[0, 1, 7], [2, 2, 7]])
    ids = TWO.audio_ids(codes)
    assert ids.dtype == torch.int64
    assert ids.tolist() == [132, 142, 133, 142, 139, 147]
    assert TWO.codes(ids).tolist() == codes.tolist()


def test_acoustic_codes_are_written_on_one_frame_of_so_many() -> None:
    slow = replace(THREE, acoustic_stride=3)
    codes = torch.tensor([[0, 1, 2, 3, 4], [5, 0, 0, 6, 0], [7, 0, 0, 1, 0]])
    first, second, third = 132, 140, 148
    ids = [first + 0, second + 5, third + 7, first + 1, first + 2, first + 3, second + 6, third + 1, first + 4]
    assert slow.audio_ids(codes).tolist() == ids
    assert slow.codes(torch.tensor(ids)).tolist() == [[0, 1, 2, 3, 4], [5, 5, 5, 6, 6], [7, 7, 7, 1, 1]]
    assert slow.size == THREE.size
    for wrong in (ids[:2], ids[:7], ids[:1] + ids[3:]):
        with pytest.raises(ValueError, match=r"audio ids must be|codebook whose turn"):
            slow.codes(torch.tensor(wrong))
    one = replace(ONE, acoustic_stride=3)  # nothing to leave out
    assert one.audio_ids(codes[:1]).tolist() == ONE.audio_ids(codes[:1]).tolist()


def test_marks_of_the_time_stand_between_the_frames() -> None:
    marked = replace(TWO, times=20, acoustic_stride=2, mark_frames=2, mark_steps=4)  # frames of 0.08 s
    first, second, mark = 152, 160, 132
    codes = torch.tensor([[0, 1, 2, 3, 4], [5, 5, 6, 6, 7]])
    ids = [first, second + 5, first + 1, mark + 4, first + 2, second + 6, first + 3, mark + 8, first + 4, second + 7]
    assert marked.audio_ids(codes).tolist() == ids
    assert [marked.seconds_of(index) for index in (ids[3], ids[7])] == [0.16, 0.32]
    assert torch.equal(marked.codes(torch.tensor(ids)), codes)
    assert marked.audio_ids(codes[:, :2]).tolist() == ids[:3]  # none after the last frame
    assert marked.audio_ids(codes[:, :0]).shape == (0,)
    assert marked.size == TWO.size + 20
    for wrong in (ids[:3] + ids[4:], [*ids[:3], mark + 5, *ids[4:]], [*ids[:2], mark + 4, ids[2], *ids[4:]]):
        with pytest.raises(ValueError, match="marks of the time are not where"):
            marked.codes(torch.tensor(wrong))
    with pytest.raises(InputError, match=r"a time of 0\.80 s: marks go from 0 to 0\.76 s"):
        marked.audio_ids(torch.zeros(2, 11, dtype=torch.int64))
    for lacking in ({"mark_steps": 0}, {"mark_frames": 0}, {"times": 0}):
        with pytest.raises(InputError, match="needs mark_steps and times"):
            replace(marked, **lacking)


def test_masked_codes_are_one_id() -> None:
    assert TWO.mask == 113
    codes = torch.tensor([[0, -1, 7], [2, -1, -1]])
    assert TWO.audio_ids(codes).tolist() == [132, 142, 113, 113, 139, 113]
    assert TWO.codes(TWO.audio_ids(codes)).tolist() == codes.tolist()
    assert bool(TWO.is_audio(TWO.audio_ids(codes)).all())
    assert not bool(TWO.is_mark(torch.tensor([TWO.mask])))
    assert MERGED.audio_ids(torch.tensor([[3, -1, -1, 3]])).tolist() == [135, 113, 135]


@settings(deadline=None)
@given(layouts_and_codes())
def test_flattening_is_reversible(case: tuple[Vocabulary, Tensor]) -> None:
    """But for what the stride leaves out, which reads as on the last frame that was written."""
    vocabulary, codes = case
    n_q, frames = codes.shape
    ids = vocabulary.audio_ids(codes)
    written = range(0, frames, vocabulary.acoustic_stride)
    marks = range(vocabulary.mark_frames, frames, vocabulary.mark_frames) if vocabulary.mark_frames else ()
    assert ids.shape == (frames + len(written) * (n_q - 1) + len(marks),)
    assert torch.equal(vocabulary.is_audio(ids), ~vocabulary.is_mark(ids))
    assert int(vocabulary.is_mark(ids).sum()) == len(marks)
    held = codes.clone()
    for frame in range(frames):
        held[1:, frame] = codes[1:, frame - frame % vocabulary.acoustic_stride]
    assert torch.equal(vocabulary.codes(ids), held)


def meaning(vocabulary: Vocabulary, index: int) -> object:
    """What an id stands for, in whatever layout."""
    if index < vocabulary.text_size + vocabulary.num_controls:
        return index
    if (seconds := vocabulary.seconds_of(index)) is not None:
        return "time", seconds
    return divmod(index - (vocabulary.size - vocabulary.n_q * vocabulary.card), vocabulary.card)  # codebook, code


def test_shared_ids_mean_the_same() -> None:
    layouts = [Vocabulary(10, n_q, 4, times=times) for n_q, times in product((1, 2, 3), (0, 3, 5))]
    for here, there in product(layouts, layouts):
        mine, theirs = (ids.tolist() for ids in here.shared_ids(there))
        assert [meaning(here, i) for i in mine] == [meaning(there, i) for i in theirs]
        known, wanted = ({meaning(v, i) for i in range(v.size)} for v in (here, there))
        assert len(mine) == len(set(mine)) == len(known & wanted)  # each once, and all there are


def test_int16_codes_from_disk_give_the_same_ids() -> None:
    big = Vocabulary(text_size=30_000, n_q=2, card=20_000)
    codes = torch.tensor([[19_999], [19_999]])
    assert big.audio_ids(codes.to(torch.int16)).tolist() == big.audio_ids(codes).tolist() == [50_031, 70_031]


def test_merging_writes_a_run_once() -> None:
    codes = torch.tensor([[3, 3, 3, 1, 3, 3]])
    assert MERGED.audio_ids(codes).tolist() == [135, 133, 135]
    assert MERGED.codes(MERGED.audio_ids(codes)).tolist() == [[3, 1, 3]]
    assert ONE.audio_ids(codes).tolist() == [135, 135, 135, 133, 135, 135]
    assert MERGED.audio_ids(torch.zeros(1, 0, dtype=torch.int64)).shape == (0,)


def test_merging_needs_one_codebook() -> None:
    with pytest.raises(InputError, match="merge_repeats"):
        Vocabulary(text_size=100, n_q=2, card=8, merge_repeats=True)


@pytest.mark.parametrize(
    "codes",
    [
        torch.tensor([[0, 8], [0, 0]]),
        torch.tensor([[0, -2], [0, 0]]),
        torch.tensor([[0, 1]]),
        torch.tensor([0, 1]),
        torch.zeros(1, 2, 4, dtype=torch.int64),
        torch.zeros(2, 4),
    ],
)
def test_codes_that_do_not_fit_are_refused(codes: Tensor) -> None:
    with pytest.raises(ValueError, match="code"):
        TWO.audio_ids(codes)


def test_marks() -> None:
    words = Vocabulary(text_size=100, n_q=2, card=8, times=51)
    assert words.size == 100 + 32 + 51 + 16
    assert [words.speaker(n) for n in (1, 8)] == [105, 112]
    assert [words.time(seconds) for seconds in (0, 0.04, 1.21, 2.0)] == [132, 133, 162, 182]
    ids = torch.arange(words.size)
    assert ids[words.is_mark(ids)].tolist() == [*range(105, 113), *range(132, 183)]
    assert ids[words.is_audio(ids)].tolist() == [words.mask, *range(183, 199)]
    assert [words.seconds_of(index) for index in (131, 132, 162, 183)] == [None, 0.0, 1.2, None]
    assert [words.speaker_of(index) for index in (104, 105, 112, 113)] == [None, 1, 8, None]
    for seconds in (-0.1, 2.04):
        with pytest.raises(InputError, match=r"marks go from 0 to 2\.00 s"):
            words.time(seconds)
    with pytest.raises(InputError, match="speaker 9"):
        words.speaker(9)
    with pytest.raises(InputError, match="there can be no times"):
        Vocabulary(text_size=100, n_q=1, card=8, merge_repeats=True, times=2)


@pytest.mark.parametrize("ids", [[132], [132, 132], [140, 132], [99, 140], [132, 148], [104, 140]])
def test_ids_that_are_no_frames_are_refused(ids: list[int]) -> None:
    with pytest.raises(ValueError, match=r"audio ids must be|codebook whose turn"):
        TWO.codes(torch.tensor(ids))


def test_text_pieces_keep_their_numbers() -> None:
    assert TWO.text_ids([0, 5, 99]).tolist() == [0, 5, 99]
    assert TWO.text_ids([]).dtype == torch.int64
    for piece in (-1, 100):
        with pytest.raises(ValueError, match="text piece"):
            TWO.text_ids([piece])


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        *(("text_size", 0), ("n_q", 0), ("card", -1), ("card", 8.0), ("merge_repeats", 1), ("times", -1)),
        *(("acoustic_stride", 0), ("mark_frames", -1), ("mark_steps", 1.5)),
    ],
)
def test_wrong_settings_are_named(setting: str, value: object) -> None:
    settings: dict[str, object] = {
        "text_size": 100,
        "n_q": 1,
        "card": 8,
        "merge_repeats": False,
        "times": 0,
        "acoustic_stride": 1,
        setting: value,
    }
    with pytest.raises(InputError, match=f"vocabulary.{setting}"):
        Vocabulary.from_dict(settings)


def test_json_round_trip() -> None:
    marked = replace(TWO, times=9, mark_frames=3, mark_steps=2)
    for vocabulary in (ONE, TWO, MERGED, replace(TWO, acoustic_stride=4), marked):
        assert Vocabulary.from_dict(json.loads(json.dumps(vocabulary.to_dict()))) == vocabulary
    with pytest.raises(InputError, match=r"vocabulary\.extra: unknown"):
        Vocabulary.from_dict(TWO.to_dict() | {"extra": 1})
    with pytest.raises(InputError, match=r"vocabulary\.card: missing"):
        Vocabulary.from_dict({key: value for key, value in TWO.to_dict().items() if key != "card"})


def test_fingerprint_tells_layouts_and_text_models_apart() -> None:
    timed = replace(TWO, times=9)
    marked = replace(timed, mark_frames=1, mark_steps=1)
    vocabularies = (ONE, TWO, MERGED, replace(TWO, acoustic_stride=2), timed, marked)
    assert len({vocabulary.fingerprint(model) for vocabulary in vocabularies for model in (b"", b"a", b"b")}) == 18
    # Stored in checkpoints: this value must never change.
    assert TWO.fingerprint(b"a") == Vocabulary(100, 2, 8).fingerprint(b"a") == GOLDEN


GOLDEN = "c960d7e683b8c690be3960e9a1bb0c7d85581353ed3a052815a39b6c9d05180c"
