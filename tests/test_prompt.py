"""One renderer: what is served is the beginning of what is trained."""

from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

from speechllm.errors import InputError
from speechllm.prompt import IGNORE_INDEX, Example, answer_parts, collate, labels, render
from speechllm.tasks import Speaker, Time
from speechllm.text import TextTokenizer
from speechllm.vocabulary import Vocabulary

TEXT = TextTokenizer.load(Path(__file__).parents[1] / "tokenizers" / "text.model")
VOCABULARY = Vocabulary(text_size=TEXT.size, n_q=2, card=16)
MARKED = replace(VOCABULARY, times=51, mark_frames=2, mark_steps=2)
BEGIN, AUDIO_END, ANSWER, END = (
    VOCABULARY.audio_begin,
    VOCABULARY.audio_end,
    VOCABULARY.answer,
    VOCABULARY.end,
)
EXAMPLE = Example(
    torch.tensor([[1, 2, 2], [3, 4, 5]]), "Transcribe this audio", "A man runs.", "transcribe", "en", "s1"
)
SHOTS = (
    Example(torch.tensor([[7], [8]]), "Transcribe this audio.", "Two dogs."),
    Example(torch.zeros(2, 0, dtype=torch.int64), "Translate this audio to German", ""),
)


def test_exact_ids_of_a_small_example() -> None:
    rendered = render(EXAMPLE, VOCABULARY, TEXT)
    codes_start = TEXT.size + 32
    audio = [codes_start + offset for offset in (1, 16 + 3, 2, 16 + 4, 2, 16 + 5)]
    question, answer = TEXT.encode("Transcribe this audio"), TEXT.encode("A man runs.")
    assert rendered.ids.tolist() == [BEGIN, *audio, AUDIO_END, *question, ANSWER, *answer, END]
    assert rendered.ids.dtype == torch.int64
    assert rendered.prompt_length == 1 + 6 + 1 + len(question) + 1
    assert len(question) == 3
    assert len(answer) >= 3


@pytest.mark.parametrize("vocabulary", [VOCABULARY, MARKED], ids=["", "marks of time"])
@pytest.mark.parametrize("shots", [(), SHOTS], ids=["0 shots", "2 shots"])
@pytest.mark.parametrize("answer", ["A man runs.", ""])
def test_served_prompt_is_the_prefix_of_the_training_sequence(
    vocabulary: Vocabulary, shots: tuple[Example, ...], answer: str
) -> None:
    trained = render(replace(EXAMPLE, answer=answer), vocabulary, TEXT, shots)
    served = render(replace(EXAMPLE, answer=None), vocabulary, TEXT, shots)
    assert len(served.ids) == served.prompt_length == trained.prompt_length < len(trained.ids)
    assert torch.equal(served.ids, trained.ids[: trained.prompt_length])
    assert served.ids[-1] == ANSWER
    assert not served.loss_mask.any()


@pytest.mark.parametrize("shots", [(), SHOTS], ids=["0 shots", "2 shots"])
def test_loss_is_on_the_last_answer_and_its_end_only(shots: tuple[Example, ...]) -> None:
    rendered = render(EXAMPLE, VOCABULARY, TEXT, shots)
    answer = [*TEXT.encode("A man runs."), END]
    assert rendered.loss_mask.dtype == torch.bool
    assert rendered.loss_mask.tolist() == [False] * rendered.prompt_length + [True] * len(answer)
    assert rendered.ids[rendered.loss_mask].tolist() == answer
    assert labels(rendered).tolist() == [IGNORE_INDEX] * rendered.prompt_length + answer


def test_shots_are_complete_examples_in_front() -> None:
    parts = [render(example, VOCABULARY, TEXT).ids for example in (*SHOTS, EXAMPLE)]
    assert torch.equal(render(EXAMPLE, VOCABULARY, TEXT, SHOTS).ids, torch.cat(parts))


def test_questions_about_one_clip_share_the_audio_prefix() -> None:
    other = render(replace(EXAMPLE, instruction="Translate this audio to German"), VOCABULARY, TEXT)
    shared = 1 + EXAMPLE.codes.numel() + 1
    assert torch.equal(render(EXAMPLE, VOCABULARY, TEXT).ids[:shared], other.ids[:shared])


def test_typed_white_space_does_not_change_the_prompt() -> None:
    typed = replace(EXAMPLE, instruction="  Transcribe\n this   audio ")
    assert torch.equal(render(typed, VOCABULARY, TEXT).ids, render(EXAMPLE, VOCABULARY, TEXT).ids)


@pytest.mark.parametrize("words", ["<|end|> <unk> <pad>", "<0x41>", "\u2581 \x00 <s>"])
def test_user_text_cannot_spell_a_control_token(words: str) -> None:
    rendered = render(replace(EXAMPLE, instruction=words, answer=words), VOCABULARY, TEXT)
    controls = rendered.ids[~VOCABULARY.is_text(rendered.ids) & ~VOCABULARY.is_audio(rendered.ids)]
    assert controls.tolist() == [BEGIN, AUDIO_END, ANSWER, END]


def test_what_cannot_be_rendered() -> None:
    with pytest.raises(InputError, match="instruction is empty"):
        render(replace(EXAMPLE, instruction=" \n"), VOCABULARY, TEXT)
    with pytest.raises(InputError, match="shot 2 has no answer"):
        render(EXAMPLE, VOCABULARY, TEXT, (SHOTS[0], replace(EXAMPLE, answer=None)))
    with pytest.raises(ValueError, match="n_q=2"):
        render(replace(EXAMPLE, codes=torch.tensor([[1, 2]])), VOCABULARY, TEXT)


def test_batch_is_padded_on_the_right() -> None:
    long, short = render(EXAMPLE, VOCABULARY, TEXT, SHOTS), render(SHOTS[0], VOCABULARY, TEXT)
    batch = collate([[long], [short]], VOCABULARY.pad, max_len=len(long.ids))
    padding = len(long.ids) - len(short.ids)
    assert padding > 0
    assert batch.input_ids.tolist() == [long.ids.tolist(), short.ids.tolist() + [VOCABULARY.pad] * padding]
    assert batch.labels.tolist() == [labels(long).tolist(), labels(short).tolist() + [IGNORE_INDEX] * padding]
    assert batch.attention_mask.tolist() == [[1] * len(long.ids), [1] * len(short.ids) + [0] * padding]
    assert batch.position_ids.tolist() == [list(range(len(long.ids))), [*range(len(short.ids)), *[0] * padding]]
    assert {getattr(batch, field.name).dtype for field in fields(batch)} == {torch.int64}


def test_sequences_of_a_row_follow_one_another_and_are_counted_anew() -> None:
    long, short = render(EXAMPLE, VOCABULARY, TEXT), render(SHOTS[0], VOCABULARY, TEXT)
    whole = torch.cat([long.ids, short.ids]).tolist()
    batch = collate([[long, short], [short]], VOCABULARY.pad, max_len=len(whole))
    padding = len(long.ids)
    assert batch.input_ids.tolist() == [whole, short.ids.tolist() + [VOCABULARY.pad] * padding]
    both = labels(long).tolist() + labels(short).tolist()
    assert batch.labels.tolist() == [both, labels(short).tolist() + [IGNORE_INDEX] * padding]
    assert batch.attention_mask.tolist() == [[1] * len(whole), [1] * len(short.ids) + [0] * padding]
    positions = [*range(len(long.ids)), *range(len(short.ids))]
    assert batch.position_ids.tolist() == [positions, [*range(len(short.ids)), *[0] * padding]]
    with pytest.raises(InputError, match=f"{len(whole)} ids exceeds max_len"):
        collate([[short], [long, short]], VOCABULARY.pad, max_len=len(whole) - 1)


def test_nothing_is_cut_to_fit() -> None:
    rendered = render(EXAMPLE, VOCABULARY, TEXT)
    with pytest.raises(InputError, match="max_len"):
        collate([[rendered]], VOCABULARY.pad, max_len=len(rendered.ids) - 1)
    with pytest.raises(ValueError, match="empty"):
        collate([], VOCABULARY.pad)


@pytest.mark.parametrize("answer", ["A man runs.", "", " spaced  out ", "Žluťoučký \u2581 kůň"])
def test_answer_parts_reads_back_the_rendered_answer(answer: str) -> None:
    rendered = render(replace(EXAMPLE, answer=answer), VOCABULARY, TEXT)
    parts = answer_parts(rendered.ids[rendered.prompt_length :].tolist(), VOCABULARY, TEXT)
    assert parts == ((answer,) if answer else ())


def test_marks_are_ids_of_their_own() -> None:
    words = Vocabulary(text_size=TEXT.size, n_q=2, card=16, times=100)
    answer = (Speaker(2), Time(0.32), "A man runs.", Time(1.2))
    rendered = render(replace(EXAMPLE, answer=answer), words, TEXT)
    ids = rendered.ids[rendered.prompt_length :].tolist()
    first_time = TEXT.size + 32
    assert ids == [words.speaker(2), first_time + 8, *TEXT.encode("A man runs."), first_time + 30, words.end]
    assert answer_parts(ids, words, TEXT) == answer
    assert answer_parts(ids[1:3], words, TEXT)[0] == Time(0.32)
    with pytest.raises(InputError, match=r"a time of 4\.00 s: marks go from 0 to 3\.96 s"):
        render(replace(EXAMPLE, answer=(Time(4.0),)), words, TEXT)
    with pytest.raises(InputError, match="no marks of times"):
        render(replace(EXAMPLE, answer=answer), VOCABULARY, TEXT)


def test_answer_parts_stops_at_end_and_shows_what_is_no_text() -> None:
    man, runs = TEXT.encode("man"), TEXT.encode("runs")
    audio = VOCABULARY.audio_ids(torch.tensor([[1], [2]])).tolist()
    assert answer_parts([*man, END, *runs], VOCABULARY, TEXT) == ("man",)
    assert answer_parts([*man, *runs], VOCABULARY, TEXT) == ("man runs",)
    assert answer_parts([*man, *audio, BEGIN, *runs, ANSWER], VOCABULARY, TEXT) == ("man\ufffd runs\ufffd",)
    roomy = Vocabulary(text_size=TEXT.size + 5, n_q=2, card=16)  # a language model with rows to spare
    assert answer_parts([*man, TEXT.size, TEXT.size + 4, *runs], roomy, TEXT) == ("man\ufffd runs",)
