"""Who is held out of training, and how much that is."""

from itertools import combinations
from pathlib import Path

import pytest
from conftest import clip, command, table

from speechllm.data.held_out import hold_out
from speechllm.data.manifest import Utterance, read_manifest
from speechllm.errors import InputError
from train import import_data


@pytest.mark.parametrize(("named", "share", "held"), [("speaker", 0.1, 2), ("speaker", 0.9, 18), ("text", 0.01, 1)])
def test_held_out(tmp_path: Path, named: str, share: float, held: int) -> None:
    clip(tmp_path / "a.wav")
    lines = [f"a.wav,{n % 20}" for n in range(60)]
    for name, order in (("one", lines), ("two", lines[::-1])):
        table(tmp_path / f"{name}.csv", f"audio,{named}", *order)
    dev = []
    kind = {"speaker": "speakers", "text": "sentences"}[named]
    for name in ("one", "two"):
        output = command(import_data.main, tmp_path / f"{name}.csv", "--out", tmp_path / name, "--held-out", share)
        assert f"held out: {held} of 20 {kind}, {3 * held} of 60 recordings ({held / 20:.1%})" in output
        utterances = read_manifest(tmp_path / name / "manifest.jsonl")
        groups = {split: {getattr(u, named) for u in utterances if u.split == split} for split in ("train", "dev")}
        assert len(groups["dev"]) == held
        assert not groups["dev"] & groups["train"]
        assert len(groups["train"]) == 20 - held
        dev.append(groups["dev"])
    assert dev[0] == dev[1]  # whatever the order


def test_who_is_heard_with_others_goes_where_they_go_and_sentences_are_alike_whatever_their_points() -> None:
    known = {"audio": "a.wav", "duration": 9.0, "split": "train", "source": "set"}

    def talk(number: int, *speakers: str) -> Utterance:
        segments = [{"speaker": name, "start": n, "end": n + 1, "text": "yes"} for n, name in enumerate(speakers)]
        return Utterance.model_validate(known | {"id": f"talk/{number}", "segments": segments})

    alone = Utterance.model_validate(known | {"id": "carl", "speaker": "carl"})
    talks = [talk(0, "anna", "ben"), talk(1, "ben", "carl"), talk(2, "dora", "emil"), talk(3, "emil", "dora"), alone]
    left, told = hold_out(talks, 0.4)
    assert {u.id for u in left if u.split == "dev"} == {"talk/2", "talk/3"}
    assert "1 of 2 speakers" in told
    with pytest.raises(InputError, match="one speaker only"):
        hold_out(talks[:2], 0.5)
    said = ["Hello, world!", "hello world", "Bye.", "bye", "Hello  World."]
    left, _ = hold_out([Utterance.model_validate(known | {"id": f"{n}", "text": t}) for n, t in enumerate(said)], 0.4)
    assert [u.split for u in left] == ["train", "train", "dev", "dev", "train"]


@pytest.mark.parametrize("share", [0.05, 0.3, 0.5, 0.62, 0.95])
@pytest.mark.parametrize("sizes", [(12, 4, 2, 2), (5, 3, 3), (40, 1), (7, 7, 7, 7), (1, 2, 4, 8, 16, 32)])
def test_held_out_comes_nearest_to_the_share(sizes: tuple[int, ...], share: float) -> None:
    known = {"audio": "a.wav", "duration": 1.0, "split": "train", "source": "set"}
    rows = [(f"s{n}", m) for n, size in enumerate(sizes) for m in range(size)]
    utterances = [Utterance.model_validate(known | {"id": f"{s}/{m}", "speaker": s}) for s, m in rows]
    left, _ = hold_out(utterances, share)
    dev = sum(u.split == "dev" for u in left)
    target = share * len(utterances)
    some = [sum(part) for n in range(1, len(sizes)) for part in combinations(sizes, n)]
    assert dev == min(some, key=lambda size: (abs(size - target), size))
    assert [u.id for u in left] == [u.id for u in utterances]
