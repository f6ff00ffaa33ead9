"""Examples and shots to ids and loss mask: the one renderer of training sequences and served prompts."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from speechllm.errors import InputError
from speechllm.tasks import Part, Parts, Speaker, Time, normalize_instruction
from speechllm.text import TextTokenizer
from speechllm.vocabulary import Vocabulary

IGNORE_INDEX = -100


@dataclass(frozen=True, eq=False)
class Example:
    """One clip, what is asked about it, and (when known) the answer.

    codes: int64 [n_q, frames], as the codec gave them; no frames for a task on text alone. answer: text, or text and
    marks; None when it is to be generated. "" and () are answers.
    """

    codes: Tensor
    instruction: str
    answer: str | Parts | None = None
    task: str | None = None
    language: str | None = None
    speaker: str | None = None


@dataclass(frozen=True, eq=False)
class Rendered:
    """A sequence for the LM.

    ids: int64 [seq]. loss_mask: bool [seq], true on the answer and its end token, and on those of learnt shots.
    prompt_length: ids before the answer; `ids[:prompt_length]` is what is served. shared: ids of another sequence that
    it goes on from and that are not among its own; 0 but for what :func:`render_further` gives.
    """

    ids: Tensor
    loss_mask: Tensor
    prompt_length: int
    shared: int = 0


@dataclass(frozen=True, eq=False)
class Batch:
    """Right-padded rows [batch, seq], all int64: labels are unshifted, IGNORE_INDEX off the answer.

    position_ids begin anew with every sequence: where a row holds several, none attends to another. Where they fall
    back to p > 0, another end of the same sequence begins: it attends to its first p ids, and to itself.
    """

    input_ids: Tensor
    labels: Tensor
    attention_mask: Tensor
    position_ids: Tensor


def render(
    example: Example,
    vocabulary: Vocabulary,
    text: TextTokenizer,
    shots: Sequence[Example] = (),
    learnt: Sequence[bool] | None = None,
) -> Rendered:
    """Shots, then the example: `<audio_begin> codes <audio_end> instruction <answer> answer <end>` each.

    The audio comes first, so that its cache serves every question about it. Without an answer the sequence stops
    after `<answer>`: exactly the first `prompt_length` ids of the sequence with one. Answers of shots are context and
    carry no loss, but for those that are ``learnt``. Raises InputError for an empty instruction or a shot without an
    answer, ValueError for bad codes.
    """
    parts: list[Tensor] = []
    scored: list[Tensor] = []  # of each part
    for number, (shot, counts) in enumerate(zip(shots, learnt or [False] * len(shots), strict=True), 1):
        if shot.answer is None:
            raise InputError(f"shot {number} has no answer: a shot is a solved example")
        parts += [_prompt(shot, vocabulary, text), _answer(shot.answer, vocabulary, text)]
        scored += [torch.full_like(parts[-2], False), torch.full_like(parts[-1], counts)]
    parts.append(_prompt(example, vocabulary, text))
    scored.append(torch.full_like(parts[-1], False))
    prompt_length = sum(map(len, parts))
    if example.answer is not None:
        parts.append(_answer(example.answer, vocabulary, text))
        scored.append(torch.full_like(parts[-1], True))
    return Rendered(torch.cat(parts), torch.cat(scored).bool(), prompt_length)


def render_further(example: Example, vocabulary: Vocabulary, text: TextTokenizer) -> Rendered:
    """A further question about audio that the sequence before it in a row begins with: all but that audio."""
    whole = render(example, vocabulary, text)
    shared = 2 + len(vocabulary.audio_ids(example.codes))  # `<audio_begin> codes <audio_end>`
    return Rendered(whole.ids[shared:], whole.loss_mask[shared:], whole.prompt_length - shared, shared)


def labels(rendered: Rendered) -> Tensor:
    """Ids [seq] with IGNORE_INDEX where there is no loss; unshifted."""
    return rendered.ids.masked_fill(~rendered.loss_mask, IGNORE_INDEX)


def next_ids(labels: Tensor) -> Tensor:
    """Labels [batch, seq] to what positions [batch, seq - 1] should predict: the one place where the shift happens."""
    return labels[:, 1:]


def collate(rows: Sequence[Sequence[Rendered]], pad_id: int, max_len: int | None = None) -> Batch:
    """Rows of one or more sequences, padded to the longest row on the right.

    Raises ValueError for an empty batch and InputError for a row of more than max_len ids: nothing is cut.
    """
    if not rows:
        raise ValueError("cannot collate an empty batch")
    longest = max(sum(len(sequence.ids) for sequence in row) for row in rows)
    if max_len is not None and longest > max_len:
        raise InputError(f"a sequence of {longest} ids exceeds max_len = {max_len}: shorten its audio or raise max_len")
    shape = (len(rows), longest)
    batch = Batch(
        input_ids=torch.full(shape, pad_id, dtype=torch.int64),
        labels=torch.full(shape, IGNORE_INDEX, dtype=torch.int64),
        attention_mask=torch.zeros(shape, dtype=torch.int64),
        position_ids=torch.zeros(shape, dtype=torch.int64),
    )
    for number, row in enumerate(rows):
        start = 0
        for sequence in row:
            place = slice(start, start + len(sequence.ids))
            batch.input_ids[number, place] = sequence.ids
            batch.labels[number, place] = labels(sequence)
            batch.attention_mask[number, place] = 1
            batch.position_ids[number, place] = torch.arange(len(sequence.ids)) + sequence.shared
            start = place.stop
    return batch


def answer_parts(ids: Sequence[int], vocabulary: Vocabulary, text: TextTokenizer) -> Parts:
    """Text and marks of a generated answer, up to the first `<end>` or the last id.

    Other ids have no place in an answer. They are not hidden: each run of them reads as one U+FFFD.
    """
    parts: list[Part] = []
    pieces: list[int] = []  # of the text since the last mark
    answer = torch.tensor(list(ids), dtype=torch.int64)  # [seq]
    after_fault = False
    known = vocabulary.is_text(answer) & (answer < text.size)  # a language model may have more rows than it has pieces
    for index, is_text in zip(answer.tolist(), known.tolist(), strict=True):
        if index == vocabulary.end:
            break
        if (mark := _mark(index, vocabulary)) is not None:
            parts += [text.decode(pieces), mark] if pieces else [mark]
            pieces, after_fault = [], False
            continue
        if is_text:
            pieces.append(index)
        elif not after_fault:
            pieces.append(text.unknown_id)
        after_fault = not is_text
    return (*parts, text.decode(pieces)) if pieces else tuple(parts)


def _mark(index: int, vocabulary: Vocabulary) -> Time | Speaker | None:
    number, seconds = vocabulary.speaker_of(index), vocabulary.seconds_of(index)
    if number is not None:
        return Speaker(number)
    return None if seconds is None else Time(seconds)


def _prompt(example: Example, vocabulary: Vocabulary, text: TextTokenizer) -> Tensor:
    instruction = normalize_instruction(example.instruction)
    if not instruction:
        raise InputError("the instruction is empty: say what to do with the audio, e.g. 'Transcribe this audio'")
    return torch.cat(
        [
            torch.tensor([vocabulary.audio_begin]),
            vocabulary.audio_ids(example.codes).cpu(),
            torch.tensor([vocabulary.audio_end]),
            vocabulary.text_ids(text.encode(instruction)),
            torch.tensor([vocabulary.answer]),
        ]
    )


def _answer(answer: str | Parts, vocabulary: Vocabulary, text: TextTokenizer) -> Tensor:
    ids: list[int] = []
    for part in (answer,) if isinstance(answer, str) else answer:
        if isinstance(part, Time):
            ids.append(vocabulary.time(part.seconds))
        elif isinstance(part, Speaker):
            ids.append(vocabulary.speaker(part.number))
        else:
            ids += vocabulary.text_ids(text.encode(part)).tolist()
    return torch.tensor([*ids, vocabulary.end])
