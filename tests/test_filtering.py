"""Rules that drop utterances, each with a close one that is kept, and the command around them."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from typer import Typer
from typer.testing import CliRunner

from speechllm.data import duplicates
from speechllm.data.corpus import Item
from speechllm.data.duplicates import distances, fingerprint, normalized
from speechllm.data.filtering import RULES, Clip, Measured, Rule, Value, judge, measure, spoken_characters
from speechllm.data.manifest import Utterance, read_manifest, write_manifest
from train import filter as train_filter

RATE = 16000
RULE = {rule.name: rule for rule in RULES}
ENGLISH = "A man is walking down the street."
GERMAN = "Ein Mann geht die Straße entlang."


def sound(seed: int, seconds: float = 2.0, level: float = 0.1) -> np.ndarray:
    """Noise whose level changes every 50 ms, differently for each seed."""
    rng = np.random.default_rng(seed)
    parts = [level * rng.uniform(0.2, 1) * rng.standard_normal(800) for _ in range(round(seconds * 20))]
    return np.concatenate(parts).clip(-0.9, 0.9).astype(np.float32)


def utterance(name: str, **known: Any) -> Utterance:
    given = {"audio": f"{name}.wav", "duration": 2.0, "text": ENGLISH, "language": "en", "speaker": "ann"}
    return Utterance(**{"id": name, "split": "train", "source": "made", **given, **known})


def value(rule: Rule, wav: np.ndarray, **known: Any) -> Value:
    assert rule.measure is not None
    return rule.measure(Clip(utterance("one", **known), wav, RATE))


def test_duration() -> None:
    for seconds, dropped in ((2.4, False), (1.6, False), (2.6, True), (1.4, True)):
        found = value(RULE["duration"], np.zeros(2 * RATE, np.float32), duration=seconds)
        assert found == pytest.approx(abs(seconds - 2))
        assert RULE["duration"].breaks(found) is dropped


def test_silence() -> None:
    wav = np.full(RATE, 0.2, np.float32)  # an offset is no signal
    assert value(RULE["silence"], wav) == 0
    for frames, dropped in ((1, True), (2, False)):  # of 50: 2 and 4 per cent
        wav = np.zeros(RATE, np.float32)
        wav[: frames * 320 : 2], wav[1 : frames * 320 : 2] = 0.1, -0.1
        found = value(RULE["silence"], wav)
        assert found == pytest.approx(frames / 50)
        assert RULE["silence"].breaks(found) is dropped
    assert value(RULE["silence"], np.zeros(RATE, np.float32), text="") == "nobody speaks"


def test_clipping() -> None:
    for clipped, dropped in ((200, True), (100, False)):
        wav = sound(0, 1.0)[:10000].copy()
        wav[:clipped] = 1.0
        wav[clipped : 2 * clipped] = 0.98
        found = value(RULE["clipping"], wav)
        assert found == clipped / 10000
        assert RULE["clipping"].breaks(found) is dropped


def test_rate() -> None:
    wav = np.zeros(2 * RATE, np.float32)
    assert spoken_characters("Bus 42, 好!") == 3 + 2 * 4 + 3
    for text, found, dropped in (("a" * 61, 30.5, True), ("a" * 60, 30, False), ("...", 0, True), ("a", 0.5, False)):
        assert value(RULE["rate"], wav, text=text) == found
        assert RULE["rate"].breaks(found) is dropped
    assert value(RULE["rate"], wav, text=None) == "no text"
    assert value(RULE["rate"], wav, text=" ") == "nobody speaks"


@pytest.mark.parametrize(
    ("text", "language", "dropped"),
    [
        (ENGLISH, "en", False),
        (GERMAN, "en", True),
        (GERMAN, "de", False),
        ("Un homme marche dans la rue.", "de", True),
        ("Muž jde po ulici domů.", "cs", False),
        ("Мужчина идёт по улице домой.", "en", True),
        ("一个男人走在街上回家", "en", True),
        ("Привет", "en", True),  # another script: no five words are needed
        ("你好", "en", True),
        ("Hello there.", "ru", True),
        ("Sain uu.", "mn", None),  # also written so
        ("日本語です", "ja", None),
        ("Dobar dan.", "sr", None),
        ("Добар дан.", "sr", None),
        ("4 + 4", "en", None),  # no letters
        ("Ein Mann geht heim.", "en", None),  # four words
        ("Haus 4, Straße 12, Stadt 3", "en", None),  # three words and three numbers
        (GERMAN, "griko", None),
        ("Кукушка", "griko", None),
        (GERMAN, None, None),
        (None, "en", None),
        (" ", "en", None),
    ],
)
def test_language(text: str | None, language: str | None, dropped: bool | None) -> None:
    found = value(RULE["language"], sound(0), text=text, language=language)
    assert isinstance(found, str) is (dropped is None)
    assert RULE["language"].breaks(found) is bool(dropped)


def test_why_a_language_is_not_judged() -> None:
    for known, reason in (
        ({"text": None}, "no text"),
        ({"text": ""}, "nobody speaks"),
        ({"language": None}, "no language"),
        ({"text": "Four words, no more."}, "fewer than 5 words"),
        ({"language": "griko"}, "a language that py3langid does not know"),
    ):
        assert value(RULE["language"], sound(0), **known) == reason


def write(folder: Path, wavs: dict[str, np.ndarray], **known: dict[str, Any]) -> list[Item]:
    folder.mkdir(parents=True, exist_ok=True)
    items = []
    for name, wav in wavs.items():
        one = utterance(name, duration=len(wav) / RATE, **known.get(name, {}))
        soundfile.write(folder / one.audio, wav, RATE)
        items.append(Item(one, folder))
    return items


def verdicts(items: list[Item]) -> dict[str, tuple[str, str]]:
    return {d.id: (d.rule, d.note) for d in judge(items, [measure(item) for item in items]).dropped}


def test_duplicates(tmp_path: Path) -> None:
    wav = sound(1)
    wavs = {
        "first": wav,
        "same": wav,
        "quieter": 0.3 * wav,
        "lossy": wav,
        "later": np.concatenate([np.zeros(512, np.float32), wav]),
        "again": sound(2),
        "longer": np.concatenate([wav, sound(3, 0.5)]),
        "bob": wav,
        "tested": wav,
    }
    known: dict[str, dict[str, Any]] = {
        "lossy": {"audio": "lossy.ogg", "speaker": None},
        "same": {"text": "a man IS walking down the street"},
        "bob": {"speaker": "bob"},
        "tested": {"split": "test"},
    }
    twice = dict.fromkeys(("first", "same", "quieter", "lossy", "later", "bob"), ("duplicate", "of tested"))
    assert verdicts(write(tmp_path / "a", wavs, **known)) == twice
    unknown = {name: {"text": None} for name in ("first", "same", "quieter")}
    only = {name: wavs[name] for name in unknown}
    assert verdicts(write(tmp_path / "b", only, **unknown)) == {"same": ("duplicate", "of first")}
    assert normalized("  Don't STOP, 2x! ") == "don t stop 2x"


def test_one_recording_with_two_texts(tmp_path: Path) -> None:
    wavs = {"first": sound(1), "second": 0.3 * sound(1), "third": sound(2), "fourth": sound(2), "fifth": sound(2)}
    wavs |= {"alone": sound(3), "quiet": sound(4), "spoken": sound(4), "unknown": sound(5), "known": sound(5)}
    known: dict[str, dict[str, Any]] = {
        "second": {"text": "A man is walking down the road.", "speaker": "bob"},
        "fourth": {"text": "Two dogs run."},
        "alone": {"text": "Two dogs run."},
        "quiet": {"text": ""},
        "unknown": {"text": None},
    }
    items = write(tmp_path, wavs, **known)
    measured = [measure(item) for item in items]
    found = judge(items, measured)
    assert {d.id: (d.rule, d.note) for d in found.dropped} == {
        "first": ("contradiction", "of second"),
        "second": ("contradiction", "of first"),
        "third": ("contradiction", "of fourth"),
        "fourth": ("contradiction", "of third"),
        "fifth": ("contradiction", "of fourth"),
        "quiet": ("contradiction", "of spoken"),
        "spoken": ("contradiction", "of quiet"),
        "known": ("duplicate", "of unknown"),  # which do not contradict each other
    }
    assert [items[i].utterance.id for i in found.kept] == ["alone", "unknown"]
    off = [replace(rule, low=-math.inf) if rule.name == "contradiction" else rule for rule in RULES]
    assert {d.id for d in judge(items, measured, off).dropped} == {"fifth", "known"}


def test_distances_are_the_same_alone_and_together() -> None:
    waves = [sound(seed) for seed in range(3)] + [np.concatenate([np.zeros(1024, np.float32), sound(1)])]
    prints = [fingerprint(wav, RATE) for wav in waves]
    same = np.stack(prints[:3])
    together = distances(same, same)
    for i in range(3):
        assert together[i, i] == pytest.approx(0, abs=1e-6)
        for j in range(3):
            assert together[i, j] == pytest.approx(distances(prints[i][None], prints[j][None]).item(), abs=1e-6)
            assert i == j or together[i, j] > 0.2
    assert distances(prints[3][None], same)[0].argmin() == 1
    assert distances(prints[3][None], same)[0, 1] < 0.01
    assert distances(prints[3][None, :3], same) == pytest.approx(np.ones((1, 3))), "lengths that do not fit"


def test_every_pair_is_compared_however_many_there_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wavs = {f"{half}{seed}": (1 if half == "a" else 0.5) * sound(seed, 0.5) for half in "ab" for seed in range(9)}
    known = {name: {"text": f"Sentence {name[1:]}."} for name in wavs}
    items = write(tmp_path, wavs, **known)
    measured = [measure(item) for item in items]
    expected = {f"b{seed}": ("duplicate", f"of a{seed}") for seed in range(9)}
    for block in (1, 4, 512):
        monkeypatch.setattr(duplicates, "BLOCK", block)
        found = judge(items, measured)
        assert {d.id: (d.rule, d.note) for d in found.dropped} == expected
        assert len(found.values["contradiction"]) == 18, "each is compared with those of other words"


def test_unreadable(tmp_path: Path) -> None:
    items = write(tmp_path, {"good": sound(1), "cut": sound(2), "text": sound(3), "gone": sound(4)})
    (tmp_path / "cut.wav").write_bytes((tmp_path / "cut.wav").read_bytes()[:-2000])
    (tmp_path / "text.wav").write_text("no audio")
    (tmp_path / "gone.wav").unlink()
    found = verdicts(items)
    assert {name: rule for name, (rule, _) in found.items()} == dict.fromkeys(("cut", "text", "gone"), "unreadable")
    assert all(f"{name}.wav" in note for name, (_, note) in found.items())


def test_an_utterance_is_counted_once(tmp_path: Path) -> None:
    items = [Item(utterance(name), tmp_path) for name in ("both", "one", "none")]
    values = [{"silence": 0.0, "rate": 99.0}, {"silence": 1.0, "rate": 99.0}, {"silence": 1.0, "rate": 9.0}]
    found = judge(items, [Measured(v, digest=bytes([n])) for n, v in enumerate(values)])
    assert [(d.id, d.rule, d.value) for d in found.dropped] == [("both", "silence", 0.0), ("one", "rate", 99.0)]
    assert (found.broken["silence"], found.broken["rate"], found.kept) == (1, 2, [2])


def run(*arguments: object) -> tuple[int, str]:
    app = Typer()
    app.command()(train_filter.main)
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return result.exit_code, result.output


def test_command(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    wavs = {"good": sound(1), "twin": sound(1), "silent": 0 * sound(1), "german": sound(2), "tested": sound(3)}
    known: dict[str, dict[str, Any]] = {
        "german": {"text": GERMAN},
        "tested": {"split": "test", "text": "Two dogs run.", "labels": {"digit": 3}},
    }
    items = write(folder, wavs, **known)
    write_manifest(folder / "all.jsonl", [item.utterance for item in items])
    out = tmp_path / "else" / "new.jsonl"
    code, output = run(folder / "all.jsonl", "--out", out, "--jobs", 1)
    assert code == 0, output
    kept = read_manifest(out)
    original = {item.utterance.id: item.utterance for item in items}
    assert {u.id for u in kept} == {"good", "tested"}
    for one in kept:
        assert one.audio == f"../set/{one.id}.wav"
        assert one.model_copy(update={"audio": f"{one.id}.wav"}) == original[one.id]
        assert (out.parent / one.audio).is_file()
    folder_of_report = tmp_path / "else" / "new-report"
    report = json.loads((folder_of_report / "report.json").read_text())
    dropped = {row["rule"]: row["dropped"] for row in report["rules"]}
    assert dropped == {
        "unreadable": 0, "duration": 0, "silence": 1, "clipping": 0, "rate": 0, "language": 1, "contradiction": 0,
        "duplicate": 1,
    }  # fmt: skip
    for row in report["rules"][1:6]:
        assert row["judged"] + sum(row["not_judged"].values()) == report["read"]
    assert {row["rule"]: row["not_judged"] for row in report["rules"]}["language"] == {"fewer than 5 words": 1}
    assert "| 4 | 1 fewer than 5 words |" in (folder_of_report / "report.md").read_text()
    assert "(4.0 s of 10.0 s)" in output
    assert (report["read"], report["kept"], report["dropped"]) == (5, 2, sum(dropped.values()))
    assert {u["id"]: u["rule"] for u in report["utterances"]} == {
        "twin": "duplicate", "silent": "silence", "german": "language"
    }  # fmt: skip
    assert sum(row["share"] for row in report["rules"]) == pytest.approx(3 / 5)
    assert "twin (0 of good)" in (folder_of_report / "report.md").read_text()
    assert (folder_of_report / "distributions.png").stat().st_size > 1000

    code, _ = run(folder / "all.jsonl", "--jobs", 1, "--bound", "language=:", "--bound", "silence=:")
    assert code == 0
    beside = read_manifest(folder / "all-filtered.jsonl")
    assert {u.id: u for u in beside} == {name: original[name] for name in ("good", "silent", "german", "tested")}


def test_texts_alone_are_kept_as_they_are(tmp_path: Path) -> None:
    items = write(tmp_path / "set", {"good": sound(1), "silent": 0 * sound(1)})
    texts = [Utterance(id=f"t{n}", text=ENGLISH, language="en", split="train", source="made") for n in range(2)]
    write_manifest(tmp_path / "set" / "all.jsonl", [*(item.utterance for item in items), *texts])
    code, output = run(tmp_path / "set" / "all.jsonl", "--out", tmp_path / "else" / "new.jsonl", "--jobs", 1)
    assert code == 0 and "Kept 3 of 4 utterances" in output and "2 a text alone" in output
    good, *kept = read_manifest(tmp_path / "else" / "new.jsonl")
    assert good.audio == "../set/good.wav" and kept == texts


def test_nothing_left_is_an_error(tmp_path: Path) -> None:
    items = write(tmp_path, {"good": sound(1), "silent": 0 * sound(1)})
    write_manifest(tmp_path / "manifest.jsonl", [item.utterance for item in items])
    (tmp_path / "filtered.jsonl").write_text("what an earlier call left")
    code, output = run(tmp_path, "--jobs", 1, "--bound", "duration=5:")
    assert code == 2 and "nothing is kept, duration drops 2 of 2: see " in output
    assert json.loads((tmp_path / "filtered-report" / "report.json").read_text())["kept"] == 0
    assert not (tmp_path / "filtered.jsonl").exists()


def test_command_refuses(tmp_path: Path) -> None:
    items = write(tmp_path, {"good": sound(1)})
    manifest = tmp_path / "manifest.jsonl"
    write_manifest(manifest, [item.utterance for item in items])
    for arguments, message in (
        ((tmp_path / "none.jsonl",), "no such manifest"),
        ((manifest, "--out", manifest), "is what is filtered"),
        ((manifest, "--bound", "speed=1:2"), "no rule is called 'speed'"),
        ((manifest, "--bound", "rate=1"), "rate=LOW:HIGH"),
        ((manifest, "--bound", "rate=3:2"), "3.0 is above 2.0"),
    ):
        code, output = run(*arguments)
        assert code == 2, output
        assert message in output
        assert len(output.splitlines()) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["good.wav", "manifest.jsonl"]
