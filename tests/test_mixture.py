"""From an encoded corpus on disk to batches: exact ids, labels and masks, and shares that are kept."""

import json
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from datasets import Dataset

from speechllm.codec import SpeechCodec, SpeechCodecConfig
from speechllm.data.encoded import read_encoded, row_codes, row_facts, write_facts
from speechllm.data.mixture import Mixture
from speechllm.errors import InputError
from speechllm.prompt import IGNORE_INDEX
from speechllm.tasks import TASKS, Facts
from speechllm.text import TextTokenizer
from speechllm.vocabulary import Vocabulary
from train.encode import FEATURES

TEXT = TextTokenizer.load(Path(__file__).parents[1] / "tokenizers" / "text.model")
PLAIN = Vocabulary(TEXT.size, n_q=2, card=16)
MERGED = Vocabulary(TEXT.size, n_q=1, card=16, merge_repeats=True)
CODEBOOK_0 = TEXT.size + 32


def row(name: str, codes: list[list[int]], text: str | None, split: str = "train", **translations: str) -> dict:
    return {
        "id": name,
        "split": split,
        "source": "made",
        "speaker": "ann",
        "facts": write_facts(Facts(len(codes[0]) / 25, text, "en", translations=translations)),
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
    (folder / "info.json").write_text(json.dumps({"codec": fingerprint, "n_q": 2, "facts": True}))
    for number in range(shards):
        part = Dataset.from_list(rows[number::shards], features=FEATURES)
        part.to_parquet(str(folder / f"{number:05d}.parquet"))
    return folder


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return read_encoded([write(tmp_path_factory.mktemp("encoded") / "codes", ROWS, shards=2)], "train")


def make(rows: Dataset, weights: dict[str, float], vocabulary: Vocabulary = PLAIN, noise: float = 0.0) -> Mixture:
    return Mixture(rows, vocabulary, TEXT, weights, noise)


def index_of(mixture: Mixture, name: str) -> int:
    return [row["id"] for row in mixture.rows].index(name)


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


def test_rows_without_an_answer_are_left_out(rows: Dataset) -> None:
    def kept(**weights: float) -> set[str]:
        return {row["id"] for row in make(rows, weights).rows}

    assert kept(transcribe=1) == {"dogs", "boy", "silence"}
    assert kept(translate_de=1) == {"dogs", "silence", "heard"}
    assert kept(translate_fr=1, transcribe=1) == {"dogs", "boy", "silence"}
    mixture = make(rows, {"transcribe": 1, "translate_de": 1})
    heard = {mixture.example(index_of(mixture, "heard"), Random(seed)).answer for seed in range(20)}
    assert heard == {("Ja.",)}


def test_tasks_on_text_hear_nothing(rows: Dataset) -> None:
    mixture = make(rows, {"translate_text_de": 1})
    assert [row["id"] for row in mixture.rows] == ["dogs"]
    example = mixture.example(0, Random(0))
    assert example.codes.shape == (2, 0)
    assert example.instruction.endswith("Two dogs run.")
    batch = mixture.batch([0], Random(0))
    assert batch.audio_mask.sum() == 1  # the end of no audio
    assert batch.transcript_lengths.tolist() == [0]


@pytest.mark.parametrize(
    ("vocabulary", "dogs", "boy"),
    [
        (PLAIN, [1, 16 + 3, 1, 16 + 4, 2, 16 + 5, 2, 16 + 6, 2, 16 + 7, 1, 16 + 8], [5, 16 + 9, 5, 16 + 10]),
        (MERGED, [1, 2, 1], [5]),
    ],
    ids=["two codebooks", "merged"],
)
def test_exact_batch(rows: Dataset, vocabulary: Vocabulary, dogs: list[int], boy: list[int]) -> None:
    mixture = make(rows, {"transcribe": 1}, vocabulary)
    indices = [index_of(mixture, name) for name in ("dogs", "boy", "silence")]
    silence = [0, 16] * 3 if vocabulary is PLAIN else [0]
    batch = mixture.batch(indices, Random(7))
    assert batch.lm.input_ids.shape == batch.lm.labels.shape == batch.lm.attention_mask.shape == batch.audio_mask.shape
    expected_answers = [TEXT.encode("Two dogs run."), TEXT.encode("A boy"), []]
    wordings = set()
    for n, (codes, answer) in enumerate(zip([dogs, boy, silence], expected_answers, strict=True)):
        ids, length = batch.lm.input_ids[n].tolist(), int(batch.lm.attention_mask[n].sum())
        audio = [CODEBOOK_0 + code for code in codes]
        asked = length - (1 + len(audio) + 1 + 1 + len(answer) + 1)
        question = ids[2 + len(audio) : 2 + len(audio) + asked]
        wordings.add(TEXT.decode(question))
        sequence = [vocabulary.audio_begin, *audio, vocabulary.audio_end, *question, vocabulary.answer]
        assert ids[:length] == [*sequence, *answer, vocabulary.end]
        padding = len(ids) - length
        assert ids[length:] == [vocabulary.pad] * padding
        assert batch.lm.attention_mask[n].tolist() == [1] * length + [0] * padding
        prompt = [IGNORE_INDEX] * len(sequence)
        assert batch.lm.labels[n].tolist() == [*prompt, *answer, vocabulary.end, *[IGNORE_INDEX] * padding]
        listening = [False] + [True] * (len(audio) + 1)  # the codes, and the end of them
        assert batch.audio_mask[n].tolist() == listening + [False] * (len(ids) - len(listening))
    assert wordings <= set(TASKS["transcribe"].wordings)
    words = [TEXT.encode("Two dogs run."), TEXT.encode("A  boy "), []]
    assert batch.transcript_lengths.tolist() == [len(w) for w in words]
    assert batch.transcripts.tolist() == [w + [0] * (len(words[0]) - len(w)) for w in words]
    assert mixture.lengths[indices[0]] == len(dogs) + len(words[0]) + 12


def test_a_batch_follows_from_the_random_state(rows: Dataset) -> None:
    mixture = make(rows, {"transcribe": 1, "translate_de": 1}, noise=0.5)
    first, second, other = (mixture.batch([0, 1, 2, 0], Random(seed)) for seed in ("a", "a", "b"))
    assert torch.equal(first.lm.input_ids, second.lm.input_ids)
    assert torch.equal(first.lm.labels, second.lm.labels)
    assert first.lm.input_ids.shape != other.lm.input_ids.shape or not torch.equal(
        first.lm.input_ids, other.lm.input_ids
    )


def test_shares_and_wordings(rows: Dataset) -> None:
    mixture, draws = make(rows, {"transcribe": 3, "translate_de": 1}), 3000
    rng, dogs = Random(0), index_of(mixture, "dogs")
    examples = [mixture.example(dogs, rng) for _ in range(draws)]
    tasks = Counter(example.task for example in examples)
    assert tasks["transcribe"] / draws == pytest.approx(0.75, abs=0.03)
    assert tasks.keys() == {"transcribe", "translate_de"}
    for example in examples:
        assert example.task
        assert example.instruction in TASKS[example.task].wordings
    assert {e.instruction for e in examples if e.task == "transcribe"} == set(TASKS["transcribe"].wordings)
    assert {e.answer for e in examples if e.task == "translate_de"} == {("Zwei Hunde rennen.",)}
    assert {(e.language, e.speaker) for e in examples} == {("en", "ann")}
    boy = index_of(mixture, "boy")
    assert {mixture.example(boy, rng).task for _ in range(50)} == {"transcribe"}  # nothing else is known of it


@pytest.mark.parametrize("noise", [0.0, 0.1, 0.5])
def test_code_noise_changes_its_share_of_frames(noise: float) -> None:
    frames = 500
    clip = [[n % 16 for n in range(frames)], [n % 7 for n in range(frames)]]
    mixture = make(Dataset.from_list([row("clip", clip, "A.")], features=FEATURES), {"transcribe": 1}, noise=noise)
    clean, rng = torch.tensor(clip), Random(1)
    changed = torch.stack([mixture.example(0, rng).codes != clean for _ in range(40)])  # [40, n_q, frames]
    share = changed.any(1).float().mean().item()
    assert share == pytest.approx(noise * (1 - 1 / 16**2), abs=0.02)
    if noise:
        both = changed.all(1).float().mean().item()  # a frame that is hit changes in all its codebooks
        assert both == pytest.approx(noise * (15 / 16) ** 2, abs=0.02)
        assert changed.any(1).float().mean(1).std() > 0  # another share in every draw
    else:
        assert share == 0
    assert torch.equal(mixture.codes[0].long(), clean)


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
