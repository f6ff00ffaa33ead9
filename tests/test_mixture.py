"""From an encoded corpus on disk to batches: who can teach what, exact ids, labels and masks, packing, code noise."""

import json
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from speechllm.codec import SpeechCodec, SpeechCodecConfig
from speechllm.data import pools
from speechllm.data.encoded import read_encoded, row_codes, row_facts, write_facts
from speechllm.data.mixture import CodeNoise, Draw, Mixture, TrainingBatch, pack
from speechllm.errors import InputError
from speechllm.prompt import IGNORE_INDEX
from speechllm.tasks import TASKS, Facts, Segment
from speechllm.text import TextTokenizer
from speechllm.vocabulary import Vocabulary
from train.encode import FEATURES

TEXT = TextTokenizer.load(Path(__file__).parents[1] / "tokenizers" / "text.model")
PLAIN = Vocabulary(TEXT.size, n_q=2, card=16)
SLOW = Vocabulary(TEXT.size, n_q=2, card=16, acoustic_stride=2)
MERGED = Vocabulary(TEXT.size, n_q=1, card=16, merge_repeats=True)
CODEBOOK_0 = TEXT.size + 32


def row(
    name: str,
    codes: list[list[int]],
    text: str | None,
    split: str = "train",
    segments: tuple[Segment, ...] = (),
    **translations: str,
) -> dict:
    facts = Facts(len(codes[0]) / 25, text, "en", translations=translations, segments=segments)
    return {
        "id": name,
        "split": split,
        "source": "made",
        "speaker": "ann",
        "facts": write_facts(facts),
        "n_q": len(codes),
        "codes": [code for codebook in codes for code in codebook],
    }


DOGS = row("dogs", [[1, 1, 2, 2, 2, 1], [3, 4, 5, 6, 7, 8]], "Two dogs run.", de="Zwei Hunde rennen.")
BOY = row("boy", [[5, 5], [9, 10]], "A  boy ", fr="Un garçon")
SILENCE = row("silence", [[0, 0, 0], [0, 0, 0]], "")
UNKNOWN = row("unknown", [[7], [7]], None)
HEARD = row("heard", [[8], [8]], None, de="Ja.")
OTHER = row("other", [[6, 6], [6, 6]], "Held out.", split="dev")
ROWS = [DOGS, BOY, SILENCE, UNKNOWN, HEARD, OTHER]


def write(folder: Path, rows: list[dict], fingerprint: str = "0123", shards: int = 1) -> Path:
    """An encoded corpus, as ``train.encode`` leaves it."""
    folder.mkdir()
    (folder / "info.json").write_text(json.dumps({"codec": fingerprint, "n_q": 2, "shards": shards}))
    for number in range(shards):
        part = Dataset.from_list(rows[number::shards], features=FEATURES)
        part.to_parquet(str(folder / f"{number:05d}.parquet"))
    return folder


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return read_encoded([write(tmp_path_factory.mktemp("encoded") / "codes", ROWS, shards=2)], "train")


def make(rows: Dataset, *tasks: str, vocabulary: Vocabulary = PLAIN, noise: CodeNoise | None = None) -> Mixture:
    return Mixture({"codes": rows}, vocabulary, TEXT, tasks, noise=noise)


def dataset(*rows: dict) -> Dataset:
    return Dataset.from_list(list(rows), features=FEATURES)


def draws_of(mixture: Mixture, task: str, *names: str) -> list[Draw]:
    places = {row["id"]: place for place, row in enumerate(mixture.rows)}
    return [Draw(task, places[name]) for name in names]


def names(mixture: Mixture) -> dict[str, dict[str, list[str]]]:
    """The pools, rows by their ids."""
    ids = [row["id"] for row in mixture.rows]
    return {
        task: {corpus: [ids[n] for n in pool.rows] for corpus, pool in pools.items()}
        for task, pools in mixture.pools.items()
    }


def sequences(batch: TrainingBatch) -> list[tuple[list[int], list[int], list[bool]]]:
    """Ids, labels and audio mask of each sequence, row by row; the rest of the batch is padding."""
    found = []
    for ids, labels, kept, positions, heard, owners in zip(
        batch.lm.input_ids,
        batch.lm.labels,
        batch.lm.attention_mask,
        batch.lm.position_ids,
        batch.audio_mask,
        batch.example_ids,
        strict=True,
    ):
        length = int(kept.sum())
        assert kept.tolist() == [1] * length + [0] * (len(ids) - length)
        assert set(ids[length:].tolist()) <= {PLAIN.pad}
        assert set(labels[length:].tolist()) <= {IGNORE_INDEX}
        assert not heard[length:].any() and not positions[length:].any()
        assert set(owners[length:].tolist()) <= {-1}
        starts = [n for n in range(length) if positions[n] == 0]
        for start, end in zip(starts, [*starts[1:], length], strict=True):
            assert positions[start:end].tolist() == list(range(end - start))
            assert owners[start:end].tolist() == [len(found)] * (end - start)
            found.append((ids[start:end].tolist(), labels[start:end].tolist(), heard[start:end].tolist()))
    return found


def test_splits_and_columns_come_back(rows: Dataset) -> None:
    found = {row["id"]: row for row in rows}
    assert found.keys() == {"dogs", "boy", "silence", "unknown", "heard"}
    assert found["dogs"] == DOGS
    assert row_facts(DOGS) == Facts(6 / 25, "Two dogs run.", "en", translations={"de": "Zwei Hunde rennen."})
    assert row_codes(found["dogs"], 2).tolist() == [[1, 1, 2, 2, 2, 1], [3, 4, 5, 6, 7, 8]]
    assert row_codes(found["dogs"], 1).tolist() == [[1, 1, 2, 2, 2, 1]]
    assert row_codes(found["dogs"], 1).dtype == torch.int64
    with pytest.raises(InputError, match="dogs: encoded with 2 codebooks, 3 are asked for"):
        row_codes(found["dogs"], 3)


def test_a_pool_holds_what_has_an_answer_shortest_first(rows: Dataset) -> None:
    one, two = (
        rows.select([n for n, row in enumerate(rows) if (row["id"] == "dogs") == dogs]) for dogs in (False, True)
    )
    tasks = ("transcribe", "translate_de", "translate_fr", "translate_text_de", "emotion")
    mixture = Mixture({"one": one, "two": two}, PLAIN, TEXT, tasks)
    assert names(mixture) == {
        "transcribe": {"one": ["boy", "silence"], "two": ["dogs"]},
        "translate_de": {"one": ["heard", "silence"], "two": ["dogs"]},
        "translate_fr": {"one": ["silence", "boy"]},
        "translate_text_de": {"two": ["dogs"]},
    }
    # controls, audio, and the characters of question and answer
    pools = mixture.pools
    asked = len((TASKS["transcribe"].pose(row_facts(DOGS), Random(0)) or ("",))[0])
    assert pools["transcribe"]["two"].lengths == pytest.approx([4 + 12 + (asked + 13) / 3.7])
    assert pools["transcribe"]["one"].lengths == pytest.approx([4 + 4 + (asked + 5) / 3.7, 4 + 6 + asked / 3.7])
    (read,) = pools["translate_text_de"]["two"].lengths
    question, answer = TASKS["translate_text_de"].pose(row_facts(DOGS), Random(0)) or ("", ())
    assert read == pytest.approx(4 + (len(question) + len("".join(map(str, answer)))) / 3.7)  # nothing is heard
    short = Mixture({"one": one, "two": two}, PLAIN, TEXT, ("transcribe",), max_seconds=0.1)
    assert names(short) == {"transcribe": {"one": ["boy"]}}
    (asked, answer) = (short.episode(draws_of(short, "transcribe", "boy")[0], Random(0))[-1], ("A boy",))
    assert (asked.answer, asked.task, asked.language, asked.speaker) == (answer, "transcribe", "en", "ann")
    heard = mixture.episode(draws_of(mixture, "translate_de", "heard")[0], Random(0))[-1]
    assert heard.answer == ("Ja.",)


def test_what_there_is_no_mark_for_is_not_asked() -> None:
    """A segment may end a little after its recording, and there may be more speakers than marks."""
    whole = row("whole", [[1] * 50, [1] * 50], None, segments=(Segment("a", 0, 2.0, "yes"),))
    late = row("late", [[1] * 50, [1] * 50], None, segments=(Segment("a", 0, 2.05, "yes"),))
    crowd = row(
        "crowd", [[1] * 50, [1] * 50], None, segments=tuple(Segment(str(n), n / 9, 1.5, "yes") for n in range(9))
    )
    timed = replace(PLAIN, times=51)  # to 2.00 s
    mixture = make(dataset(whole, late, crowd), "diarize", "transcribe_times", vocabulary=timed)
    assert {task: sorted(pools["codes"]) for task, pools in names(mixture).items()} == {
        "diarize": ["whole"],
        "transcribe_times": ["crowd", "whole"],
    }
    batch = mixture.batch(draws_of(mixture, "diarize", "whole"), 1, Random(0))
    assert batch.transcripts.tolist() == [TEXT.encode("yes")]


def test_ctc_reads_whole_transcripts_alone() -> None:
    """Where the words of one turn are not known, those of the others are not all that is said."""
    codes, first = [[1] * 50, [1] * 50], Segment("a", 0, 1.0, "yes")
    told = [row(text, codes, None, segments=(first, Segment("b", 1.0, 1.5, text))) for text in ("no", "")]
    mixture = make(dataset(*told), "turns", vocabulary=replace(PLAIN, times=51))
    batches = [mixture.batch(draws_of(mixture, "turns", name), 1, Random(0)) for name in ("no", "")]
    assert [batch.transcripts[0].tolist() for batch in batches] == [TEXT.encode("yes no"), []]


def test_a_changed_task_is_noticed(rows: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the files of datasets remember of an earlier run must not stand in for it."""
    before = names(make(rows, "transcribe"))
    monkeypatch.setitem(pools.TRAINABLE, "transcribe", TASKS["translate_text_de"])
    assert names(make(rows, "transcribe")) == {"transcribe": {"codes": ["dogs"]}} != before


def test_what_a_row_can_teach_is_found_out_once(rows: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    before = names(make(rows, "transcribe"))
    monkeypatch.delattr(pools, "size")  # which a row that is described anew needs
    assert names(make(rows, "transcribe")) == before
    monkeypatch.setattr(pools, "_source", lambda: "another package")
    with pytest.raises(NameError, match="size"):
        make(rows, "transcribe")


def test_tasks_on_text_hear_nothing(rows: Dataset) -> None:
    mixture = make(rows, "translate_text_de", noise=CodeNoise(0.5, 0.5))
    draws = draws_of(mixture, "translate_text_de", "dogs")
    example = mixture.episode(draws[0], Random(0))[-1]
    assert example.codes.shape == (2, 0)
    assert example.instruction.endswith("Two dogs run.")
    batch = mixture.batch(draws, 100, Random(0))
    assert batch.audio_mask.sum() == 1  # the end of no audio
    assert (batch.audio_lengths.tolist(), batch.transcript_lengths.tolist()) == ([1], [0])

    both = make(rows, "translate_text_de", "transcribe")
    listening = draws_of(both, "transcribe", "dogs", "boy")
    for order in ([*draws, *listening], [*listening, *draws]):
        batch = both.batch(order, 60, Random(3))
        known = zip(batch.tasks, batch.audio_lengths.tolist(), batch.transcript_lengths.tolist(), strict=True)
        pieces = [len(TEXT.encode(text)) for text in ("Two dogs run.", "A  boy ")]
        assert sorted(known) == [
            *(("transcribe", 4 + 1, pieces[1]), ("transcribe", 12 + 1, pieces[0]), ("translate_text_de", 1, 0)),
        ]


def test_further_questions_go_on_from_the_audio(rows: Dataset) -> None:
    """With its codes as they were hidden for the first."""
    mixture = make(rows, "transcribe", "translate_de", noise=CodeNoise(0.3, 0.3))
    draws = [replace(draw, also=("translate_de",)) for draw in draws_of(mixture, "transcribe", "dogs")]
    batch = mixture.batch(draws, 1, Random(0))
    assert (batch.tasks, batch.draws) == (("transcribe", "translate_de"), tuple(draws))
    assert mixture.named(batch.draws) == "dogs (transcribe, translate_de)"
    ids, positions, owners = (t[0].tolist() for t in (batch.lm.input_ids, batch.lm.position_ids, batch.example_ids))
    assert sum(index == PLAIN.audio_begin for index in ids) == 1
    heard, first = 12 + 2, owners.index(1)
    assert positions == [*range(first), *range(heard, heard + len(ids) - first)]
    assert owners == [0] * first + [1] * (len(ids) - first)
    asked = ids[first : ids.index(PLAIN.answer, first)]
    assert TASKS["translate_de"].match(TEXT.decode(asked)) is not None
    answer = [*TEXT.encode("Zwei Hunde rennen."), PLAIN.end]
    assert ids[-len(answer) :] == answer
    assert batch.lm.labels[0, first:].tolist() == [IGNORE_INDEX] * (len(ids) - first - len(answer)) + answer
    assert batch.audio_mask[0].tolist() == [False] + [True] * 13 + [False] * (len(ids) - 14)
    assert batch.audio_lengths.tolist() == [13]


def test_marks_of_the_time_are_heard_with_the_codes(rows: Dataset) -> None:
    marked = replace(PLAIN, times=26, mark_frames=2, mark_steps=2)
    mixture = make(rows, "transcribe", "translate_de", vocabulary=marked)
    dogs, boy = draws_of(mixture, "transcribe", "dogs", "boy")
    batch = mixture.batch([replace(dogs, also=("translate_de",)), boy], 1000, Random(0))
    assert batch.audio_lengths.tolist() == [2 * 6 + 2 + 1, 2 * 2 + 1]
    heard = batch.lm.input_ids[batch.audio_mask].tolist()
    assert [marked.seconds_of(index) for index in heard if marked.is_mark(torch.tensor(index))] == [0.08, 0.16]
    assert [n for n, index in enumerate(heard) if index == marked.audio_end] == [14, 19]
    assert len(heard) == 20 and marked.audio_begin not in heard


@pytest.mark.parametrize("row_length", [1, 50, 1000])
@pytest.mark.parametrize(
    ("vocabulary", "dogs", "boy", "silence"),
    [
        (PLAIN, [1, 16 + 3, 1, 16 + 4, 2, 16 + 5, 2, 16 + 6, 2, 16 + 7, 1, 16 + 8], [5, 25, 5, 26], [0, 16] * 3),
        (SLOW, [1, 16 + 3, 1, 2, 16 + 5, 2, 2, 16 + 7, 1], [5, 25, 5], [0, 16, 0, 0, 16]),
        (MERGED, [1, 2, 1], [5], [0]),
    ],
    ids=["two codebooks", "slow second", "merged"],
)
def test_exact_batch(
    rows: Dataset, vocabulary: Vocabulary, dogs: list[int], boy: list[int], silence: list[int], row_length: int
) -> None:
    mixture = make(rows, "transcribe", vocabulary=vocabulary)
    batch = mixture.batch(draws_of(mixture, "transcribe", "boy", "dogs", "silence"), row_length, Random(7))
    shapes = {getattr(batch.lm, name).shape for name in ("input_ids", "labels", "attention_mask", "position_ids")}
    assert shapes == {batch.audio_mask.shape}
    assert len(batch.lm.input_ids) == {1: 3, 50: 2, 1000: 1}[row_length]

    answers = {tuple(dogs): "Two dogs run.", tuple(boy): "A  boy ", tuple(silence): ""}
    found = sequences(batch)
    for n, (ids, labels, listening) in enumerate(found):
        codes = [index - CODEBOOK_0 for index in ids[1 : 1 + sum(listening) - 1]]
        words = TEXT.encode(answers.pop(tuple(codes)))
        answer = [*TEXT.encode(" ".join(TEXT.decode(words).split())), vocabulary.end]
        question = ids[2 + len(codes) : -1 - len(answer)]
        assert TASKS["transcribe"].match(TEXT.decode(question)) is not None
        audio = [vocabulary.audio_begin, *(CODEBOOK_0 + code for code in codes), vocabulary.audio_end]
        assert ids == [*audio, *question, vocabulary.answer, *answer]
        assert labels == [IGNORE_INDEX] * (len(ids) - len(answer)) + answer
        assert listening == [False] + [True] * (len(codes) + 1) + [False] * (len(ids) - len(codes) - 2)
        assert batch.audio_lengths[n] == len(codes) + 1  # the codes, and the end of them
        assert batch.transcript_lengths[n] == len(words)
        assert batch.transcripts[n].tolist() == words + [0] * (batch.transcripts.shape[1] - len(words))
        assert batch.tasks[n] == "transcribe"
    assert not answers, "every draw once"
    assert len(found) == len(batch.tasks) == 3


def test_a_batch_follows_from_the_random_state(rows: Dataset) -> None:
    mixture = make(rows, "transcribe", noise=CodeNoise(0.3, 0.3))
    draws = draws_of(mixture, "transcribe", "dogs", "boy", "silence", "dogs")
    first, second, other = (mixture.batch(draws, 80, Random(seed)) for seed in ("a", "a", "b"))
    assert sequences(first) == sequences(second) != sequences(other)
    packed = mixture.batch(draws, 10_000, Random("a"))
    assert len(packed.lm.input_ids) == 1 < len(first.lm.input_ids)
    assert sorted(sequences(packed)) == sorted(sequences(first)), "packing changes no sequence"
    wordings = {mixture.episode(draws[0], Random(seed))[-1].instruction for seed in range(400)}
    assert wordings > set(TASKS["transcribe"].wordings)
    assert mixture.episode(draws[0], Random(1), ("Now!",))[-1].instruction == "Now!"


@settings(deadline=None)
@given(st.lists(st.integers(1, 50), max_size=40), st.integers(1, 60))
def test_packing_fills_rows_and_loses_nothing(lengths: list[int], row_length: int) -> None:
    rows = pack(lengths, row_length)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    for row in [*rows, [row[0] for row in rows]]:
        assert [lengths[index] for index in row] == sorted((lengths[index] for index in row), reverse=True)
    fills = [sum(lengths[index] for index in row) for row in rows]
    for row, fill in zip(rows, fills, strict=True):
        assert fill <= row_length or len(row) == 1
    short = [fill for fill in fills if fill <= row_length]
    assert sum(2 * fill <= row_length for fill in short) <= 1, "two rows that are half empty would have been one"


def test_code_noise_changes_its_share_of_frames() -> None:
    frames, card = 400, 16
    clean = torch.stack([torch.arange(frames) % card, torch.arange(frames) % 7])
    kept = clean.clone()
    assert torch.equal(CodeNoise()(clean, card, Random(1)), clean)
    for replaced, masked in ((0.1, 0.0), (0.5, 0.0), (0.0, 0.15), (0.0, 0.5), (0.2, 0.3)):
        noise = CodeNoise(replaced, masked)
        noisy = torch.stack([noise(clean, card, Random(seed)) for seed in range(100)])  # [100, n_q, frames]
        hidden = noisy == Vocabulary.MASKED
        assert torch.equal(hidden[:, 0], hidden[:, 1]), "a frame is hidden in all its codebooks"
        assert hidden.float().mean().item() == pytest.approx(masked, abs=0.02)
        # as much at the ends of the clip as in its middle
        assert hidden[:, :, [*range(10), *range(-10, 0)]].float().mean().item() == pytest.approx(masked, abs=0.07)
        changed = (noisy != clean) & ~hidden
        share = changed.any(1).float().mean().item()
        assert share == pytest.approx(replaced * (1 - masked) * (1 - 1 / card**2), abs=0.01)
        both = changed.all(1).float().mean().item()  # a frame that is hit changes in all its codebooks
        assert both == pytest.approx(replaced * (1 - masked) * (1 - 1 / card) ** 2, abs=0.01)
        assert ((noisy >= 0) & (noisy < card) | hidden).all()
        assert torch.equal(noise(clean, card, Random(5)), noisy[5])
        assert not torch.equal(noisy[4], noisy[5])
    edges = np.diff(np.pad(hidden[:, 0].int().numpy(), ((0, 0), (1, 1))))
    spans = np.argwhere(edges == -1)[:, 1] - np.argwhere(edges == 1)[:, 1]
    assert spans.max() > CodeNoise.MAX_SPAN > spans.mean() > 4, "spans, some of which meet"
    briefly = torch.stack([CodeNoise(0.0, 0.5)(clean[:, :15], card, Random(seed)) for seed in range(800)])
    assert (briefly == Vocabulary.MASKED).float().mean().item() == pytest.approx(0.5, abs=0.03)
    assert torch.equal(clean, kept)
    assert CodeNoise(0.5, 0.5)(clean[:, :0], card, Random(0)).shape == (2, 0)


def test_folders_that_are_no_encoded_corpus(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere: not an encoded corpus; make it with python -m train\.encode"):
        read_encoded([tmp_path / "nowhere"], "train")
    old = write(tmp_path / "old", [DOGS])
    (old / "info.json").write_text('{"codec": "0123", "n_q": 2}')
    with pytest.raises(InputError, match="old: encoded by an older version"):
        read_encoded([old], "train")
    unsigned = write(tmp_path / "unsigned", [DOGS])
    (unsigned / "info.json").write_text("{")
    with pytest.raises(InputError, match=r"unsigned/info\.json: damaged"):
        read_encoded([unsigned], "train")
    (unsigned / "info.json").unlink()
    with pytest.raises(InputError, match="unsigned: not an encoded corpus"):
        read_encoded([unsigned], "train")
    damaged = write(tmp_path / "damaged", [DOGS])
    shard = damaged / "00000.parquet"
    shard.write_bytes(shard.read_bytes()[:-300])
    with pytest.raises(InputError, match=r"damaged: a shard is damaged .*: remove it"):
        read_encoded([damaged], "train")
    good = write(tmp_path / "good", [DOGS])
    with pytest.raises(InputError, match=r"no test row in .*good"):
        read_encoded([good], "test")


def test_codes_of_another_codec_are_refused(tmp_path: Path) -> None:
    config: dict[str, Any] = {"n_mels": 16, "card": 16, "n_acoustic": 1, "dim": 16, "depth": 1, "recognizer_depth": 1}
    config |= {"kernel": 3, "code_dim": 4, "acoustic_dim": 16, "acoustic_depth": 1, "decoder_dim": 16}
    torch.manual_seed(0)
    codec, other = (SpeechCodec(SpeechCodecConfig(**config, decoder_depth=1)).eval() for _ in range(2))
    folder = write(tmp_path / "codes", [DOGS], codec.fingerprint(2))
    assert len(read_encoded([folder], "train", codec)) == 1
    with pytest.raises(InputError, match="codes: encoded with another codec; encode it again"):
        read_encoded([folder], "train", other)
