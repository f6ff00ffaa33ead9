"""One command builds a corpus: a tiny recipe from end to end, and the recipe that is shipped."""

import gzip
import json
from collections.abc import Callable
from copy import deepcopy
from io import StringIO
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from conftest import ROOT, SPOKEN, command, require_engine, write_yaml
from rich.console import Console
from typer import Typer
from typer.testing import CliRunner

from speechllm.audio import read_audio, write_audio
from speechllm.codec import load_codec
from speechllm.data.corpus import read_corpus
from speechllm.data.encoded import read_encoded, row_facts
from speechllm.data.manifest import read_manifest, write_manifest
from speechllm.data.overlap import persons, sentences
from speechllm.data.synthesis import voices
from speechllm.tasks import TASKS
from train import import_data
from train.amounts import shown_time
from train.config import read_config
from train.corpus import Builder, main
from train.corpus_config import Recipe
from train.corpus_report import Timings, survey

RATE = 16000
SHIPPED = ROOT / "train" / "configs" / "corpus.yaml"
WHOLE = {  # what a recorded utterance tells that has an answer for every task
    "text": "Is it far to the sea?",
    "translation": {language: f"{language}: far?" for language in ("de", "fr", "cs", "en")},
    "language": "en",
    "gender": "female",
    "segments": [{"speaker": "carla", "start": 0.1, "end": 0.9, "text": "Is it far to the sea?"}],
    "intent": "ask",
    "slots": {"where": "sea"},
    "emotion": "anger",
    "accent": "British",
}


def record(folder: Path, *lines: dict[str, Any]) -> None:
    """A recorded set: a second of a tone for each line."""
    folder.mkdir(parents=True)
    with (folder / "manifest.jsonl").open("w") as file:
        for number, line in enumerate(lines):
            tone = torch.sin(2 * torch.pi * (400 + 200 * number) * torch.arange(RATE) / RATE)
            write_audio(folder / f"{number}.wav", 0.3 * tone[None], RATE)
            file.write(json.dumps({"audio": f"{number}.wav", "duration": 1.0, "language": "en"} | line) + "\n")


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path) -> dict[str, Any]:
    """A recipe, and all that it is made from."""
    source = tmp_path_factory.mktemp("source")
    with gzip.open(source / "captions.jsonl.gz", "wt") as file:
        for number, (english, german) in enumerate(SPOKEN):
            file.write(json.dumps({"id": f"c{number}", "en": english, "de": german}) + "\n")
    record(source / "hiss", {"split": "train", "language": None})
    record(
        source / "people",
        *({"speaker": name, "text": f"I am {name}.", "split": "train"} for name in ("anna", "ben")),
        {"speaker": "carla", "split": "test", **WHOLE},
    )
    by_split = (("anna", "train"), ("dora", "dev"), ("emil", "test"))
    record(
        source / "parrots",
        *({"speaker": n, "text": f"Sentence {t}!", "split": split} for n, split in by_split for t in "abcde"),
    )
    return {
        "out": source.with_name("built"),
        "source": source,
        "codec": tiny_checkpoint / "codec",
        "n_q": 2,
        "jobs": 1,
        "noise": "hiss",
        "synthesized": {
            "spoken": {"text": "captions.jsonl.gz", "count": 4, "fragments": 0.5, "engines": ["flite", "espeak"]},
            "quiet": {"text": "nonspeech", "count": 2, "split": "test"},
        },
        "conversations": {"talks": {"of": ["spoken", "people"], "count": 2}},
        "texts": {"written": {"text": "captions.jsonl.gz", "language": "de"}},
        "unseen_sentences": {"parrots": 0.4},
        "encoded": {"spoken": 1, "talks": 1, "people": 3, "parrots": 1, "written": 1},
        "tests": ["people", "parrots", "quiet"],
    }


def build(path: Path, settings: dict[str, Any]) -> Result:
    app = Typer()
    app.command()(main)
    return CliRunner().invoke(app, ["--config", str(write_yaml(path, settings))])


@pytest.fixture(scope="module")
def built(settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a corpus built by the recipe."""
    require_engine("flite")
    require_engine("espeak-ng")
    result = build(tmp_path_factory.mktemp("recipe") / "corpus.yaml", settings)
    assert result.exit_code == 0, result.output
    totals = json.loads((settings["out"] / "corpus.json").read_text())["totals"]
    seconds = 3600 * sum(totals[f"hours_{kind}"] for kind in ("synthesized", "conversations", "recorded"))
    assert 20 < seconds < 200
    said = f"{settings['out']}: {shown_time(seconds)}; {settings['out'] / 'corpus.md'} says what is in it"
    assert said in result.stdout
    return settings["out"]


def test_everything_is_made_and_encoded(built: Path, settings: dict[str, Any]) -> None:
    codec = load_codec(settings["codec"])
    rows = {name: read_encoded([built / "codes" / name], "train", codec) for name in settings["encoded"]}
    counts = {"spoken": 4, "talks": 2, "people": 6, "parrots": 3, "written": len(SPOKEN)}
    assert {name: len(found) for name, found in rows.items()} == counts
    english, german = SPOKEN[0]
    facts = row_facts(rows["written"][0])
    assert (facts.duration, facts.text, facts.language, facts.translations) == (0, german, "de", {"en": english})
    assert {row["n_q"] for found in rows.values() for row in found} == {2}
    assert [row["speaker"] for row in read_encoded([built / "codes" / "people"], "test", codec)] == ["carla"]
    spoken = read_manifest(built / "spoken" / "manifest.jsonl")
    assert {utterance.split for utterance in spoken} == {"train"}
    voices = {utterance.speaker for utterance in spoken} | {"anna", "ben"}
    talks = read_manifest(built / "talks" / "manifest.jsonl")
    assert talks and all(segment.speaker in voices for talk in talks for segment in talk.segments)


def test_sentences_kept_for_the_test_split(built: Path, settings: dict[str, Any]) -> None:
    left = read_manifest(built / "parrots" / "manifest.jsonl")
    by_split = {split: [u for u in left if u.split == split] for split in ("train", "dev", "test")}
    assert {split: len(utterances) for split, utterances in by_split.items()} == {"train": 3, "dev": 3, "test": 2}
    assert sentences(by_split["train"]) == sentences(by_split["dev"])
    assert not sentences(by_split["train"]) & sentences(by_split["test"])
    (item, _) = read_corpus([built / "parrots" / "manifest.jsonl"], "test")
    recorded = settings["source"] / "parrots" / Path(item.utterance.audio).name
    assert torch.equal(item.wav(RATE), read_audio(recorded, RATE))


def test_report(built: Path, settings: dict[str, Any]) -> None:
    report = json.loads((built / "corpus.json").read_text())
    corpora = report["corpora"]
    assert {name: corpus["kind"] for name, corpus in corpora.items()} == {
        "spoken": "synthesized",
        "quiet": "synthesized",
        "talks": "conversations",
        "written": "texts",
        "people": "recorded",
        "parrots": "recorded",
    }
    spoken = read_manifest(built / "spoken" / "manifest.jsonl")
    hours = sum(utterance.duration for utterance in spoken) / 3600
    assert corpora["spoken"]["splits"] == {
        "train": {
            "utterances": 4,
            "hours": round(hours, 6),
            "speakers": len(persons(spoken)),
        }
    }
    assert corpora["people"]["splits"]["test"] == {"utterances": 1, "hours": round(1 / 3600, 6), "speakers": 1}
    for name, corpus in corpora.items():
        audio = list((built / name / "audio").rglob("*.flac"))
        assert corpus["audio_bytes"] == sum(path.stat().st_size for path in audio)
        assert (corpus["audio_bytes"] > 0) == (corpus["kind"] in ("synthesized", "conversations"))
        assert (corpus["codes_bytes"] > 0) == corpus["encoded"] == (name in settings["encoded"])
        made = {"synthesized": {"synthesize"}, "conversations": {"converse"}}.get(corpus["kind"], set())
        assert corpus["seconds"].keys() == made | ({"encode"} if corpus["encoded"] else set())
    totals = report["totals"]
    assert totals["texts"] == corpora["written"]["splits"]["train"]["utterances"] > 0
    assert f"{totals['texts']} sentences as text" in (built / "corpus.md").read_text()
    assert totals["bytes"] == sum(corpus["audio_bytes"] + corpus["codes_bytes"] for corpus in corpora.values())
    assert totals["seconds"] == pytest.approx(sum(sum(c["seconds"].values()) for c in corpora.values()), abs=0.01)
    assert totals["hours_recorded"] == pytest.approx(11 / 3600, abs=1e-3)
    tasks = report["tasks"]
    assert tasks.keys() == TASKS.keys() and report["untested"] == []
    assert tasks["transcribe"]["train_recordings"] == 4 + 2 + 3
    assert tasks["emotion"]["train_recordings"] == 0
    assert (
        tasks["translate_text_en"]["train_recordings"] == len(SPOKEN) and tasks["translate_en"]["train_recordings"] == 0
    )
    unseen = {"recordings": 1, "speakers": "new", "sentences": "new", "unseen": True}
    assert all(task["tests"]["people"] == unseen for task in tasks.values())
    assert tasks["speakers"]["tests"]["quiet"] == {
        "recordings": 2,
        "speakers": "unknown",
        "sentences": "unknown",
        "unseen": False,
    }
    assert report["tests"]["parrots"] == {
        "recordings": 2,
        "persons": 1,
        "shared_persons": 0,
        "sentences": 2,
        "shared_sentences": 0,
    }
    markdown = (built / "corpus.md").read_text()
    assert all(f"| {name} |" in markdown for name in (*corpora, *TASKS)) and "Not tested unseen: no task." in markdown
    assert "| people | recorded | test | 1 | 1.0 s | 1 |" in markdown
    assert " of conversations, 11.0 s recorded, 4 sentences as text; " in markdown
    assert (built / "corpus.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_there_is_kept_and_what_is_gone_is_made_again(
    built: Path, settings: dict[str, Any], tmp_path: Path
) -> None:
    def contents() -> dict[Path, bytes]:
        kept = (path for path in built.rglob("*") if path.suffix in (".flac", ".parquet", ".jsonl", ".json"))
        return {path: path.read_bytes() for path in kept if path.name not in ("timings.jsonl", "corpus.json")}

    before, timings = contents(), (built / "timings.jsonl").read_text()
    made = [path for path in before if path.suffix in (".flac", ".parquet")]
    times = {path: path.stat().st_mtime_ns for path in made}
    manifest, shard = built / "spoken" / "manifest.jsonl", built / "codes" / "people" / "00000.parquet"
    manifest.write_text("".join(manifest.read_text().splitlines(keepends=True)[:-1]))
    shard.unlink()
    result = build(tmp_path / "corpus.yaml", settings)
    assert result.exit_code == 0, result.output
    assert contents() == before
    again = {path.relative_to(built) for path in made if path.stat().st_mtime_ns != times[path]}
    assert again == {Path("spoken/audio/000/0000003.flac"), Path("codes/people/00000.parquet")}
    added = [json.loads(line) for line in (built / "timings.jsonl").read_text().removeprefix(timings).splitlines()]
    assert [(line["kind"], line["name"], line["made"]) for line in added] == [
        ("synthesize", "spoken", 1),
        ("encode", "people", 3),
    ]


def test_a_task_without_a_new_test_set_is_an_error_and_reported(
    built: Path, settings: dict[str, Any], tmp_path: Path
) -> None:
    report = (built / "corpus.json").read_text()
    result = build(tmp_path / "corpus.yaml", settings | {"tests": ["quiet", "parrots"]})
    assert result.exit_code == 2
    message, _, untested = result.stderr.splitlines()[-1].rpartition(" for ")
    assert message == "error: tests: no set with new speakers and new sentences"
    trained = {name for name, task in json.loads(report)["tasks"].items() if task["train_recordings"]}
    assert "turns" in untested.split(", ") and "transcribe" not in untested.split(", ")
    assert trained.issuperset(untested.split(", ")), "what nothing trains needs no test"
    assert (built / "corpus.json").read_text() == report, "it is seen before the codes are made"


def test_manifests_of_their_own_are_encoded_and_test_and_talk(settings: dict[str, Any], tmp_path: Path) -> None:
    """What train.import_data and train.filter leave is trained on as it is: ids, labels and translations too."""
    record(tmp_path / "raw", *({"speaker": name, "text": f"{name} is here.", "split": "train"} for name in "abcd"))
    record(tmp_path / "raw-test", *({"split": "test", "speaker": f"{name}2", **WHOLE} for name in "ef"))
    for folder in ("raw", "raw-test"):
        rows = [json.loads(line) for line in (tmp_path / folder / "manifest.jsonl").read_text().splitlines()]
        (tmp_path / folder / "manifest.jsonl").unlink()
        known = {"translation": {"German": "Hallo."}, "emotion": "anger"}
        lines = [json.dumps(row | known | {"id": f"u{n}", "duration": None}) for n, row in enumerate(rows)]
        (tmp_path / folder / "rows.jsonl").write_text("\n".join(lines))
        command(import_data.main, tmp_path / folder / "rows.jsonl", "--out", tmp_path / folder.replace("raw", "mine"))
    left = read_manifest(tmp_path / "mine" / "manifest.jsonl")[1:]
    write_manifest(tmp_path / "mine" / "filtered.jsonl", left)
    own = {
        "out": tmp_path / "out",
        "source": tmp_path,
        "noise": None,
        "recorded": {"mine": tmp_path / "mine" / "filtered.jsonl", "tested": tmp_path / "mine-test"},
        "synthesized": {},
        "conversations": {"talks": {"of": ["mine"], "count": 1}},
        "texts": {},
        "unseen_sentences": {},
        "encoded": {"mine": 2},
        "tests": ["tested"],
    }
    result = build(tmp_path / "corpus.yaml", settings | own)
    assert result.exit_code == 0, result.output
    assert "filtered.jsonl" not in result.stderr
    rows = list(read_encoded([tmp_path / "out" / "codes" / "mine"], "train", load_codec(settings["codec"])))
    assert [row["id"] for row in rows] == [f"mine/u{n}{copy}" for n in (1, 2, 3) for copy in ("", "#1")]
    for row, utterance in zip(rows[::2], left, strict=True):
        assert row_facts(row) == utterance.facts()
        assert utterance.facts().labels == {"emotion": "anger"} and utterance.translations == {"de": "Hallo."}
    assert json.loads((tmp_path / "out" / "corpus.json").read_text())["tests"]["tested"]["recordings"] == 2
    (talk,) = read_manifest(tmp_path / "out" / "talks" / "manifest.jsonl")
    assert talk.segments and {segment.speaker for segment in talk.segments} <= {"b", "c", "d"}

    unfiltered = own | {"recorded": {"tested": tmp_path / "mine-test"}, "out": tmp_path / "out2", "conversations": {}}
    result = build(tmp_path / "corpus.yaml", settings | unfiltered)
    assert result.exit_code == 0, result.output
    note = "mine: manifest.jsonl is read, not filtered.jsonl beside it; to use that, name it in 'recorded'"
    assert result.stderr.splitlines().count(note) == 1
    assert len(read_encoded([tmp_path / "out2" / "codes" / "mine"], "train", load_codec(settings["codec"]))) == 8


Change = Callable[[dict[str, Any]], object]
WRONG: dict[str, tuple[Change, str]] = {
    "encoded": (lambda r: r["encoded"].update(nobody=1), "encoded: nobody is not made by the recipe, and not recorded"),
    "tests": (lambda r: r["tests"].append("nobody"), "/nobody/manifest.jsonl; put the set there, name its"),
    "of": (lambda r: r["conversations"]["talks"]["of"].append("nobody"), "conversations.talks.of: nobody is not made"),
    "unseen": (lambda r: r["unseen_sentences"].update(nobody=0.5), "unseen_sentences.nobody: nobody is not made"),
    "unseen without text": (
        lambda r: r["unseen_sentences"].update(hiss=0.5),
        "unseen_sentences.hiss: hiss/0.wav: has no text",
    ),
    "noise": (lambda r: r.update(noise="rain"), "noise: rain is not made by the recipe"),
    "given": (
        lambda r: (r.update(recorded={"mine": "no.jsonl"}), r["encoded"].update(mine=1)),
        "recorded.mine: no.jsonl: no such manifest",
    ),
    "given in vain": (lambda r: r.update(recorded={"mine": "no.jsonl"}), "recorded.mine: is not used; name it in"),
    "given and made": (
        lambda r: r.update(recorded={"spoken": "no.jsonl"}),
        "recorded.spoken: the recipe makes a corpus of this name",
    ),
    "twice": (lambda r: r["unseen_sentences"].update(spoken=0.5), "spoken: the recipe makes two corpora of this name"),
    "talks of talks": (
        lambda r: r["conversations"].update(more={"of": ["talks"], "count": 1}),
        "conversations.more.of: talks are conversations",
    ),
    "talks of another split": (
        lambda r: r["conversations"]["talks"]["of"].append("quiet"),
        "conversations.talks.of: quiet has no train recordings",
    ),
    "talks of texts": (
        lambda r: r["conversations"]["talks"]["of"].append("written"),
        "conversations.talks.of: written are texts; name recordings",
    ),
    "tests of another split": (lambda r: r["tests"].append("spoken"), "tests: spoken has no test recordings"),
    "tests of a set": (lambda r: r["tests"].append("hiss"), "tests: hiss has no test recordings"),
    "codec": (lambda r: r.update(codec="nowhere"), "codec: nowhere: not a codec folder"),
    "codebooks": (lambda r: r.update(n_q=3), "codec: n_q = 3: this codec has 1 to 2 codebooks"),
    "sentences": (lambda r: r["synthesized"]["spoken"].update(text="no.gz"), "no.gz: no such file of sentences"),
    "language": (lambda r: r["synthesized"]["spoken"].update(language="fr"), "synthesized.spoken: "),
    "texts": (lambda r: r["texts"]["written"].update(text="no.gz"), "texts.written: "),
    "language of texts": (
        lambda r: r["texts"]["written"].update(language="fr"),
        "captions.jsonl.gz: no sentence in fr that has a translation",
    ),
    "engine": (
        lambda r: r["synthesized"].update(dev={"text": "digits", "count": 1, "split": "dev", "engines": ["flite"]}),
        "synthesized.dev: none of the engines flite has a voice for --split dev --language en",
    ),
    "unknown engine": (lambda r: r["synthesized"]["spoken"].update(engines=["tape"]), "synthesized.spoken.engines.0: "),
    "share": (lambda r: r["unseen_sentences"].update(parrots=1.5), "unseen_sentences.parrots: "),
    "copies": (lambda r: r["encoded"].update(spoken=0), "encoded.spoken: "),
    "typo": (lambda r: r.update(encode={}), "encode: Extra inputs are not permitted"),
}


@pytest.mark.parametrize(("change", "message"), WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_one_line_before_any_work(
    settings: dict[str, Any], tmp_path: Path, change: Change, message: str
) -> None:
    require_engine("flite")
    require_engine("espeak-ng")
    recipe = deepcopy(settings) | {"out": tmp_path / "out"}
    change(recipe)
    result = build(tmp_path / "corpus.yaml", recipe)
    assert result.exit_code == 2
    assert message in result.stderr and result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_corpus_of_which_nothing_can_be_made_stops_the_build(settings: dict[str, Any], tmp_path: Path) -> None:
    require_engine("espeak-ng")
    (tmp_path / "dots.jsonl.gz").write_bytes(gzip.compress(b'{"id": "d", "en": "..."}\n'))
    spoken = {"dots": {"text": str(tmp_path / "dots.jsonl.gz"), "count": 2, "engines": ["espeak"]}}
    wrong = {"synthesized": spoken, "conversations": {}, "encoded": {"dots": 1, "people": 1}, "tests": ["people"]}
    result = build(tmp_path / "corpus.yaml", settings | wrong | {"out": tmp_path / "out"})
    assert result.exit_code == 2
    assert "dots: 2 could not be made" in result.stderr
    assert "error: dots: nothing could be made; the first reasons are above" in result.stderr
    assert not (tmp_path / "out" / "codes").exists()


def test_the_time_of_an_interrupted_step_counts(settings: dict[str, Any], tmp_path: Path) -> None:
    recipe = Recipe.model_validate(settings | {"out": tmp_path})
    builder = Builder(recipe, Console(file=StringIO()))
    with pytest.raises(KeyboardInterrupt), builder.step("encode", "spoken"):
        raise KeyboardInterrupt
    with builder.step("encode", "spoken"):
        pass  # everything was there
    with builder.step("encode", "spoken") as tally:
        tally["made"] = 3
    lines = [json.loads(line) for line in (tmp_path / "timings.jsonl").read_text().splitlines()]
    assert [line["made"] for line in lines] == [0, 3]
    timings = Timings(tmp_path / "more.jsonl")
    assert timings.read() == {}
    for kind, name, seconds in (("encode", "a", 1.26), ("encode", "b", 1.0), ("encode", "a", 2), ("converse", "a", 5)):
        timings.add(kind, name, seconds, 1)
    assert timings.read() == {"a": {"encode": 3.3, "converse": 5.0}, "b": {"encode": 1.0}}


@pytest.fixture
def shipped(monkeypatch: pytest.MonkeyPatch) -> Recipe:
    """The recipe of the repository; its paths are relative to the root."""
    monkeypatch.chdir(ROOT)
    return read_config(SHIPPED, Recipe)


def test_shipped_voices_and_sentences_of_splits_differ(shipped: Recipe) -> None:
    people: dict[str, set[str]] = {"train": set(), "dev": set(), "test": set()}
    files: dict[str, set[str]] = {"train": set(), "dev": set(), "test": set()}
    for spoken in shipped.synthesized.values():
        if spoken.text != "nonspeech":
            able = voices(spoken.split, spoken.language)
            people[spoken.split] |= {v.person for v in able if not spoken.engines or v.engine in spoken.engines}
            if not spoken.words:  # these are of the same sentences, and are other ones in each split
                files[spoken.split].add(spoken.text)
    assert all(people.values()) and all(files.values())
    for one, other in combinations(people, 2):
        assert not people[one] & people[other]
        assert not files[one] & files[other]


def test_shipped_dev_and_test_corpora_are_not_trained_on(shipped: Recipe) -> None:
    made = {**shipped.synthesized, **shipped.conversations}
    splits = {name: made[name].split for name in shipped.encoded if name in made}
    files = {texts.text for texts in shipped.texts.values()}
    assert files and files <= {spoken.text for spoken in shipped.synthesized.values() if spoken.split == "train"}
    assert set(splits.values()) == {"train", "dev"}, "what tests is read as audio, not as codes"
    assert {name for name in made if made[name].split != "test"} == splits.keys()
    assert {name for name in made if made[name].split == "test"} <= set(shipped.tests)
    for talks in shipped.conversations.values():
        assert {made[name].split for name in talks.of if name in made} == {talks.split}
    if not any(path.exists() for path in (shipped.path(name) for name in splits)):
        pytest.skip(f"{shipped.out} is not built: python -m train.corpus")
    for name, split in splits.items():
        if shipped.path(name).exists():
            assert {utterance.split for utterance in read_manifest(shipped.path(name))} == {split}


def test_a_share_is_of_what_trains(shipped: Recipe) -> None:
    whole, part = shipped.model_dump(), shipped.scaled(0.25).model_dump()
    for kind in ("synthesized", "conversations"):
        for name, plan in whole[kind].items():
            count = part[kind][name]["count"]
            assert 4 * count - plan["count"] in range(4) if plan["split"] == "train" else count == plan["count"]
            plan["count"] = count
    assert part == whole


def test_shipped_recordings_are_where_they_were(shipped: Recipe) -> None:
    """What is made of them is known again by these paths."""
    assert shipped.noise_for("train") == Path("../shared/data/noise") and shipped.noise_for("test") is None
    assert str(shipped.path("digits_fsdd")) == "../shared/data/digits_fsdd"
    assert str(shipped.path("nemo_pl")) == "data/corpus/nemo_pl/manifest.jsonl"


def test_shipped_names_stand_for_corpora(shipped: Recipe) -> None:
    if not shipped.source.is_dir():
        pytest.skip(f"the recorded sets are not in {shipped.source}")
    shipped.check()


def test_shipped_tests_are_new_to_what_is_trained_on(shipped: Recipe) -> None:
    corpora = shipped.corpora()
    missing = [corpus.name for corpus in corpora if not corpus.path.exists()]
    if missing:
        pytest.skip(f"not built, or not recorded: {', '.join(missing)}; python -m train.corpus makes them")
    assert survey(corpora, Timings(shipped.out / "timings.jsonl"))["untested"] == []
