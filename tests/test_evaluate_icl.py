"""In-context learning: shots and controls are what they are called, answers those of serving, verdicts fit numbers."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
import torch
from conftest import RATE, tone
from typer import Typer
from typer.testing import CliRunner

from serve.answer import Answer
from serve.answerer import Answerer
from speechllm.audio import write_audio
from speechllm.checkpoint import load_checkpoint
from speechllm.data.label_names import HELD_OUT_NAMES
from speechllm.data.manifest import Split, Utterance, write_manifest
from speechllm.errors import InputError
from speechllm.generate import generate
from speechllm.metrics import mean_interval
from speechllm.options import Options
from speechllm.prompt import Example, answer_parts
from speechllm.tasks import TRAINABLE
from speechllm.tasks.base import words_of
from speechllm.tasks.few_shot import LABEL, LABEL_HELD_OUT
from train import evaluate_icl
from train.icl_answers import Listener, Shot, batches
from train.icl_clips import GAP, HEARD, PART, SINGLE_WORDS, SNR_DB, Clip, Sets, apart
from train.icl_plot import plot
from train.icl_report import Point, Report, Row, is_learnt, markdown, told, verdict
from train.icl_suite import (
    CONTROLS,
    ROWS,
    SAME_SPEAKER,
    TRAIN_TEXTS,
    WHICH_WORD,
    Episode,
    LabelRow,
    WordRow,
    controlled,
    episodes,
    short_enough,
    transcripts,
)

WORDS = ("one", "two", "three")
CAPTIONS = ("a terrier runs", "the terrier sits", "two people run", "people sit", "a man with puppies", "no dogs")


def save(folder: Path, spoken: list[tuple[str, str, Split]], seconds: float = 0.3) -> None:
    """A set of tones, ``(text, speaker, split)`` each."""
    folder.mkdir(parents=True)
    found = []
    for number, (text, speaker, split) in enumerate(spoken):
        samples = torch.from_numpy(tone(seconds + 0.01 * number, 200 + 20 * number))
        write_audio(folder / f"{number}.wav", samples[None], RATE)
        known: dict[str, object] = {"language": "en", "speaker": speaker}
        known |= {"gender": "female" if speaker == "ann" else "male"}
        known |= {"text": text, "duration": seconds + 0.01 * number, "split": split, "source": folder.name}
        found.append(Utterance.model_validate(known | {"id": f"u{number}", "audio": f"{number}.wav"}))
    write_manifest(folder / "manifest.jsonl", found)


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Sets:
    """Single words, captions by two speakers, some of them long, and what is there to train on."""
    corpus, source = tmp_path_factory.mktemp("corpus"), tmp_path_factory.mktemp("source")
    said: list[tuple[str, str, Split]] = [(word, name, "test") for name in ("ann", "bob") for word in WORDS * 2]
    save(source / "digits_fsdd", [*said, ("six", "cid", "train")])
    save(corpus / "test_words", said)
    captions: list[tuple[str, str, Split]] = [(text, name, "test") for name in ("ann", "bob") for text in CAPTIONS]
    save(corpus / "test_en", captions, 0.5)
    for name in ("emodb_de", "alnum_en"):
        save(corpus / name, captions, 2.5)
    save(corpus / "commands_sc_en", [("Three", "cid", "train")])
    for name in ({*SINGLE_WORDS} | {*TRAIN_TEXTS}) - {"digits_fsdd", "commands_sc_en"}:
        save(corpus / name, [("two people run with others", "cid", "train")] * 30)
    return Sets(corpus, source)


@pytest.fixture(scope="module")
def listener(tiny_checkpoint: Path) -> Listener:
    return Listener(load_checkpoint(tiny_checkpoint))


def label_row(name: str) -> LabelRow:
    row = ROWS[name]
    assert isinstance(row, LabelRow)
    return row


def asked(name: str, sets: Sets, count: int = 12, most: int = 4) -> list[Episode]:
    row = label_row(name)
    return episodes(row, row.classes(sets, 0), count, most, 0)


def test_the_fewer_shots_are_the_first_of_the_more(sets: Sets) -> None:
    many, few = asked("word/digits_fsdd", sets), asked("word/digits_fsdd", sets, most=2)
    for more, less in zip(many, few, strict=True):
        for k in (0, 1, 2):
            short = more.first(2 * k)
            assert replace(short, shots=more.shots) == more
            assert [shot.answer for shot in short.shots] == [shot.answer for shot in less.shots[: 2 * k]]
            assert [s.clip.key for s in short.shots if s.clip] == [s.clip.key for s in less.shots[: 2 * k] if s.clip]
            assert len(short.shots) == 2 * k
        assert (more.clip.key, more.instruction, more.labels) == (less.clip.key, less.instruction, less.labels)
    for word in WORDS:  # each clip once before any comes again
        heard = [episode.clip.key for episode in many if episode.clip.text == word]
        assert len({*heard}) == min(len(heard), 4) > 1


@pytest.mark.parametrize("name", ["word/digits_fsdd", "which-word/test_words", "gender/alnum_en", "noisy/test_en"])
def test_shots_have_the_labels_of_their_classes(name: str, sets: Sets) -> None:
    row = label_row(name)
    classes = row.classes(sets, 0)
    key_of = {clip.key: key for key, clips in classes.items() for clip in clips}
    for episode in asked(name, sets):
        meaning = {key_of[episode.clip.key]: episode.answer}
        for first, second in zip(episode.shots[::2], episode.shots[1::2], strict=True):
            assert {first.answer, second.answer} == {*episode.labels}  # a round has one of each class
            for shot in (first, second):
                assert shot.clip
                assert meaning.setdefault(key_of[shot.clip.key], shot.answer) == shot.answer
        assert len(meaning) == len({*meaning.values()}) == 2
        if not row.labels:
            assert {*meaning} == {*meaning.values()} == {*episode.labels}


@pytest.mark.parametrize("name", ["word/digits_fsdd", "same-speaker/emodb_de", "noisy/test_en"])
def test_a_shot_has_no_recording_of_the_question(name: str, sets: Sets) -> None:
    for episode in asked(name, sets):
        row = label_row(name)
        for some in (episode, *(controlled(row, [episode], control, 0)[0] for control in CONTROLS)):
            assert not any(clip.sources & episode.clip.sources for clip in some.clips[1:])
    clips = [clip for some in label_row(name).classes(sets, 0).values() for clip in some]
    assert 0 < len(apart(clips, clips[0])) < len({clip.key for clip in clips})


def test_the_voice_asked_about_is_heard_in_no_shot_that_can_do_without(sets: Sets) -> None:
    for episode in asked("word/digits_fsdd", sets):
        assert {clip.speaker for clip in episode.clips[1:]} == {"ann", "bob"} - {episode.clip.speaker}
    for episode in asked("gender/alnum_en", sets):  # one speaker of each
        assert {clip.speaker for clip in episode.clips[1:]} == {"ann", "bob"}


def test_names_are_held_out(sets: Sets) -> None:
    found = asked("word/digits_fsdd", sets) + asked("same-speaker/emodb_de/names", sets)
    assert {label for episode in found for label in episode.labels} <= {*HELD_OUT_NAMES}
    assert len({episode.labels for episode in found}) > 20  # drawn anew each time
    assert {episode.instruction for episode in found} == {LABEL_HELD_OUT[0]} - {*LABEL}
    whichever = {episode.instruction for episode in asked("which-word/digits_fsdd", sets)}
    assert "Which word was said, one or two?" in whichever
    assert "Which word was said, two or one?" in whichever
    for task in TRAINABLE.values():  # no wording of a task that is trained on
        assert task.match(WHICH_WORD.replace("{}", "one or two")) is None
        assert task.match(SAME_SPEAKER) is None


def test_controls_change_only_what_they_say(sets: Sets) -> None:
    row, found = label_row("word/digits_fsdd"), asked("word/digits_fsdd", sets)
    key_of = {clip.key: key for key, clips in row.classes(sets, 0).items() for clip in clips}
    changed = {control: controlled(row, found, control, 0) for control in CONTROLS}
    agree = []
    for control, some in changed.items():
        for before, after in zip(found, some, strict=True):
            assert replace(after, shots=before.shots) == before
            old, new = ([shot.clip for shot in e.shots] for e in (before, after))
            said = [[shot.answer for shot in e.shots] for e in (before, after)]
            assert (new == old) == (control == "shuffled labels")
            assert (said[0] == said[1]) == (control != "shuffled labels")
            assert sorted(said[0]) == sorted(said[1])  # the same labels, each as often
            assert not any(new) or control != "no audio"
            if control == "other audio":
                own = dict(zip(said[0], (key_of[clip.key] for clip in old if clip), strict=True))
                agree += [own[answer] == key_of[clip.key] for answer, clip in zip(said[1], new, strict=True) if clip]
    assert len(agree) == 12 * 8
    assert 0.35 < sum(agree) / len(agree) < 0.65  # what is heard does not depend on the label


def test_two_are_joined_and_noise_is_added(sets: Sets) -> None:
    joined = label_row("same-speaker/emodb_de").classes(sets, 0)
    for answer, clips in joined.items():
        for clip in clips:
            first, second = (item.utterance for item in clip.items)
            assert (first.speaker == second.speaker) == (answer == "yes")
            assert first.id != second.id
    clip = joined["yes"][0]
    wav = clip.wav(RATE)
    assert wav.shape == (1, round((2 * PART + GAP) * RATE))
    assert clip.seconds == pytest.approx(2 * PART + GAP)
    begin, end = (item.wav(RATE)[:, : round(PART * RATE)] for item in clip.items)
    assert torch.equal(wav, torch.cat([begin, torch.zeros(1, round(GAP * RATE)), end], 1))

    classes = label_row("noisy/test_en").classes(sets, 0)
    for clean, noisy in zip(classes["clean"], classes["noisy"], strict=True):
        assert clean.sources == noisy.sources
        noise = noisy.wav(RATE) - clean.wav(RATE)
        ratio = clean.wav(RATE).square().mean() / noise.square().mean()
        assert 10 * float(ratio.log10()) == pytest.approx(SNR_DB, abs=0.01)
        assert torch.equal(noisy.wav(RATE), noisy.wav(RATE))


def test_words_of_training_are_no_new_ones(sets: Sets) -> None:
    assert {*label_row("word/digits_fsdd").classes(sets, 0)} == {*WORDS}
    assert {*label_row("word/test_words").classes(sets, 0)} == {"one", "two"}  # "Three" is in commands_sc_en


def test_long_clips_are_left_out_or_refused(sets: Sets, listener: Listener) -> None:
    row = label_row("same-speaker/emodb_de")
    classes = row.classes(sets, 0)
    assert short_enough(row, classes, 1, listener) == (classes, 0)
    with pytest.raises(InputError, match=r"same-speaker/emodb_de: .* 8 shots of each .* 512 positions"):
        short_enough(row, classes, 8, listener)
    item = sets.items("emodb_de")[0]
    long = Clip((replace(item, utterance=item.utterance.model_copy(update={"duration": 30.0})),))
    kept, left_out = short_enough(row, {**classes, "no": [*classes["no"], long]}, 1, listener)
    assert (kept, left_out) == (classes, 1)
    clip = classes["yes"][0]
    ids = listener.prompt("What?", clip, [Shot(clip, "dax")], 4)
    assert len(ids) <= 2 * listener.turn_ids(clip.seconds, "What?", "dax")
    with pytest.raises(InputError, match=r"20 shots and the question take [0-9]+ ids"):
        listener.prompt("What?", clip, [Shot(clip, "dax")] * 20, 4)


def test_a_clip_longer_than_the_checkpoint_hears_fits_nothing(listener: Listener) -> None:
    assert listener.turn_ids(8.0, "What?", "dax") < math.inf == listener.turn_ids(8.1, "What?", "dax")


def test_only_the_beginning_is_heard_where_it_is_enough(sets: Sets, listener: Listener) -> None:
    (clip,) = label_row("gender/alnum_en").classes(sets, 0)["female"][:1]
    assert clip.seconds == HEARD
    whole = listener.codes(replace(clip, whole=True))
    frames = round(HEARD * listener.checkpoint.codec.frame_rate)
    assert whole.shape[1] > frames
    assert torch.equal(listener.codes(clip), whole[:, :frames])
    assert listener.codes(None).shape == (1, 0)


def test_answers_are_those_of_serving(sets: Sets, listener: Listener) -> None:
    answerer = Answerer(listener.checkpoint)
    found = [episode.first(2 * (number % 3)) for number, episode in enumerate(asked("word/digits_fsdd", sets))]
    # labels that begin alike, and one that is the beginning of the other
    found += [
        replace(episode, labels=labels) for labels in (("one two", "one three"), ("dax", "dax b")) for episode in found
    ]
    told: list[int] = []
    said = listener.choose(evaluate_icl.prompts(listener, found), [e.labels for e in found], told.append)
    assert sum(told) == len(found) == len(said)
    served = []
    for episode in found:
        item = episode.clip.items[0]
        shots = [Example(listener.codes(shot.clip), episode.instruction, shot.answer) for shot in episode.shots]
        options = Options(labels=episode.labels)
        (answer,) = answerer.ask([str(item.root / item.utterance.audio)], episode.instruction, shots, options)
        assert isinstance(answer, Answer)
        served.append(answer.label)
    assert said == served
    assert all(len({*some}) > 2 for some in (said, served))


def test_words_are_said_within_their_grammar(sets: Sets, listener: Listener) -> None:
    clips = [Clip((item,)) for item in sets.items("test_en")[:5]]
    prompts = [listener.prompt("Transcribe this audio", clip, [], 6) for clip in clips]
    said = listener.say(prompts, 6, lambda count: None, TRAINABLE["transcribe"])
    files = [str(clip.items[0].root / clip.items[0].utterance.audio) for clip in clips]
    served = [*Answerer(listener.checkpoint).ask(files, "Transcribe this audio")]
    assert said == [answer.text for answer in served if isinstance(answer, Answer)]
    free = listener.say(prompts, 6, lambda count: None)
    end, pad = listener.vocabulary.end, listener.vocabulary.pad
    alone = [generate(listener.lm, [p], end_id=end, pad_id=pad, max_new_tokens=6)[0].ids for p in prompts]
    assert free == [words_of(answer_parts(ids, listener.vocabulary, listener.text)) for ids in alone]
    assert free != said  # random weights say anything


def test_batches_hold_like_lengths() -> None:
    lengths = [Random(n).randrange(1, 40) for n in range(50)]
    found = list(batches(lengths, 100))
    assert [lengths[place] for batch in found for place in batch] == sorted(lengths)
    assert sorted(place for batch in found for place in batch) == list(range(50))
    assert all(len(batch) * max(lengths[place] for place in batch) <= 100 for batch in found)
    assert len(found) < 25
    assert list(batches([200, 3], 100)) == [[1], [0]]


def test_transcripts_of_the_same_speaker_or_another(sets: Sets, listener: Listener) -> None:
    row = WordRow("transcribe/test_en", ("test_en",))
    found, left_out = transcripts(row, sets, listener, 5, 0)
    assert left_out == 0
    assert {*found} == {("no shots", 0), *((c, k) for c in ("same speaker", "another speaker") for k in (1, 2, 4))}
    assert {len(some) for some in found.values()} == {5}
    for (condition, shots), some in found.items():
        for episode, without in zip(some, found["no shots", 0], strict=True):
            assert replace(episode, shots=()) == without
            assert len(episode.shots) == shots
            clips = episode.clips[1:]
            assert {clip.speaker == episode.clip.speaker for clip in clips} <= {condition == "same speaker"}
            assert all(
                clip.text == shot.answer != episode.answer for clip, shot in zip(clips, episode.shots, strict=True)
            )
            assert len({clip.key for clip in clips}) == shots


def test_one_shot_has_the_rare_word(sets: Sets, listener: Listener) -> None:
    row = WordRow("rare-words/test_en", ("test_en",), True, TRAIN_TEXTS)
    found, _ = transcripts(row, sets, listener, 100, 0)
    none, held, without = (found[key] for key in (("no shots", 0), ("with the word", 2), ("without the word", 2)))
    assert len(none) == 4
    assert {episode.word for episode in none} == {"terrier"}  # "people" is often said in training, "puppies" once here
    for first, second, third in zip(none, held, without, strict=True):
        assert first.word == second.word == third.word
        assert first.word in first.answer
        differ = [a != b for a, b in zip(second.shots, third.shots, strict=True)]
        assert sum(differ) == 1
        assert [first.word in shot.answer for shot in second.shots] == differ
        assert not any(first.word in shot.answer for shot in third.shots)


def row_of(first: float, top: float, controls: float = 50.0, part: str = "A") -> Row:
    """Accuracies with intervals of 10 points to either side."""

    def point(condition: str, shots: int, value: float) -> Point:
        return Point(condition, shots, value, value - 10, value + 10)

    points = [point("shots", k, value) for k, value in ((0, first), (4, top), (8, 1.0))]
    points += [point(name, 4, controls) for name in CONTROLS]
    return Row("made/up", part, ("set",), "accuracy %", 9, 8, 2, 3, 7, tuple(points))


def test_an_interval_that_ends_at_the_value_is_drawn(tmp_path: Path) -> None:
    value = 100 / 3
    points = tuple(
        Point(condition, shots, value, 100 * (1 / 3) - 1e-14, value - 1e-14)
        for condition, shots in (("shots", 0), ("shots", 4), *((control, 4) for control in CONTROLS))
    )
    plot(Report("made up", "0", 3, 0, (replace(row_of(50, 50), points=points),)), tmp_path / "a.png")
    assert (tmp_path / "a.png").is_file()


@pytest.mark.parametrize(
    ("first", "top", "controls", "learnt", "expected"),
    [
        (55, 80, 45, True, "learnt from the shots: 55.0 (45.0–65.0) without shots, 80.0 (70.0–90.0) at k = 4"),
        (55, 79, 45, False, "above chance, but not at 80 %"),
        (61, 95, 45, False, "not at chance without shots, so they alone do not tell"),
        (50, 60, 45, False, "at chance with shots too"),
        (50, 39, 45, False, "below chance"),
        (50, 90, 61, True, "shuffled labels is not at chance, 61.0 (51.0–71.0)"),
        (50, 90, 75, False, "shots help, but not by what they tell: 50.0"),
        (50, 90, 60, True, "no audio falls to chance, 60.0 (50.0–70.0)."),
        (50, 50, 40, False, "other audio stays at chance, 40.0 (30.0–50.0)"),
    ],
)
def test_verdicts_follow_from_the_numbers(
    first: float, top: float, controls: float, learnt: bool, expected: str
) -> None:
    row = row_of(first, top, controls)
    assert is_learnt(row) == learnt
    assert expected in verdict(row)


def test_the_report_counts_what_is_learnt() -> None:
    rows = (row_of(50, 90), replace(row_of(50, 60), name="not/learnt", part="B"))
    text = markdown(Report("model", "0" * 16, 9, 0, rows))
    assert "**1 of 2 rows are learnt from the shots**: made/up." in text
    assert "### A. Held-out label names" in text
    assert "made/up 3, not/learnt 3" in text  # clips that are left out
    line = next(line for line in text.splitlines() if line.startswith("| made/up"))
    cells = [cell.strip() for cell in line.split("|")[1:-1]]
    assert cells == ["made/up", "9", "8", "2", "7", "50.0 (40.0–60.0)", "90.0 (80.0–100.0)", "1.0 (-9.0–11.0)"] + 3 * [
        "50.0 (40.0–60.0)"
    ]
    points = [Point("no shots", 0, 30, 28, 32), Point("same speaker", 1, 1, 0, 2), Point("same speaker", 4, 25, 22, 27)]
    points += [Point("another speaker", 4, 35, 33, 37), Point("a third", 4, 31, 29, 33)]
    words = Row("transcribe/x", "D", ("x",), "WER %", 9, 8, 2, 0, 0, tuple(points))
    said = told(words)
    for expected in ("same speaker, 4 shots: 25.0 (22.0–27.0), lower;", "37.0), higher;", "33.0), no different"):
        assert expected in said


def test_the_interval_of_a_mean_is_over_groups() -> None:
    values = [1.0, 1.0, 0.0, 0.0, 1.0, 0.0]
    low, high = mean_interval(values, list("abcdef"))
    assert 0 <= low < 0.5 < high <= 1
    assert mean_interval(values, ["a"] * 6) == (0.5, 0.5)
    many = [float(Random(n).random() < 0.7) for n in range(400)]
    mean = sum(many) / 400
    spread = 1.96 * (mean * (1 - mean) / 400) ** 0.5
    assert mean_interval(many, [str(n) for n in range(400)]) == pytest.approx((mean - spread, mean + spread), abs=0.01)
    for wrong in ([], ["a"] * 5):
        with pytest.raises(ValueError, match="one group is needed"):
            mean_interval(values[: 6 * len(wrong)], wrong)


@pytest.fixture
def run(tiny_checkpoint: Path, sets: Sets, tmp_path: Path) -> Callable[..., tuple[int, str]]:
    """Runs the command; returns its exit code and what it printed."""
    app = Typer()
    app.command()(evaluate_icl.main)

    def run(*options: object) -> tuple[int, str]:
        paths = ("--corpus", sets.corpus, "--source", sets.source, "--out", tmp_path / "out")
        done = CliRunner().invoke(app, [*map(str, ("--model", tiny_checkpoint, *paths, *options))])
        assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
        return done.exit_code, done.output

    return run


FEW = ("--shots", 0, "--shots", 1, "--episodes", 4)


def test_whole_command(run: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    first = [f"--only={name}" for name in ("word/digits_fsdd", "rare-words/test_en")]
    code, printed = run(*FEW, *first)
    assert code == 0, printed
    out = tmp_path / "out"
    assert (out / "results.md").read_text() in printed
    assert (out / "results.png").stat().st_size > 10_000
    report = json.loads((out / "results.json").read_text())
    words, rare = report["rows"]
    assert [(p["condition"], p["shots"]) for p in words["points"]] == [
        *(("shots", 0), ("shots", 1), ("shuffled labels", 1), ("other audio", 1), ("no audio", 1), ("free", 1))
    ]
    assert (words["questions"], words["clips"], words["speakers"], words["fewest"]) == (4, 12, 2, 2)
    assert (rare["questions"], rare["unit"], len(rare["points"])) == (4, "recall %", 3)
    for point in words["points"] + rare["points"]:
        assert 0 <= point["low"] <= point["value"] <= point["high"] <= 100
        assert point["value"] % 25 == 0  # of four questions

    kept = out / "rows.jsonl"
    lines = kept.read_text().splitlines()
    assert len(lines) == 2
    assert '"clips": 12' in lines[0]
    kept.write_text(lines[0].replace('"clips": 12', '"clips": 77') + "\n")  # as if interrupted after the first row
    code, printed = run(*FEW, *first, "--only=transcribe/test_en", "--only=noisy/test_en")
    assert code == 0, printed
    again = json.loads((out / "results.json").read_text())["rows"]
    assert [row["name"] for row in again] == [
        *("word/digits_fsdd", "noisy/test_en", "transcribe/test_en", "rare-words/test_en")
    ]
    assert again[0] == words | {"clips": 77}  # not measured again
    assert again[3] == rare  # measured again, alike
    assert "free" not in {point["condition"] for point in again[1]["points"]}
    assert again[2]["unit"] == "WER %"
    assert len(kept.read_text().splitlines()) == 4


def test_faults_are_one_line(run: Callable[..., tuple[int, str]], sets: Sets, tmp_path: Path) -> None:
    only = "--only=word/digits_fsdd"
    for options, told_ in (
        ((only, "--only=accent"), "--only accent: no such row; there are word/digits_fsdd, "),
        ((only, "--only=language/four"), "test_de: neither in "),
        ((only, "--shots", 1), "--shots 1: give 0 too"),
        ((only, "--shots", 0, "--shots", 8), "--shots 0, 8: give 0 too, which tells what chance is, and one of 1 to 4"),
        *[((only, "--device", "cuda"), "--device cuda: no CUDA device")] * (not torch.cuda.is_available()),
        ((only, "--out", sets.source / "digits_fsdd" / "manifest.jsonl"), "cannot be made"),
        ((only, "--shots", 0, "--shots", 4, "--shots", 60), "ask for fewer --shots"),
    ):
        code, printed = run(*options)
        *_, last = printed.splitlines()
        assert (code, printed.count("error")) == (2, 1), printed
        assert last.startswith("error: ")
        assert told_ in last
    assert not (tmp_path / "out" / "rows.jsonl").exists()
    assert run(*FEW, only)[0] == 0
    code, printed = run(*FEW, "--seed", 1, only)
    assert code == 2
    assert "word/digits_fsdd was asked with other settings" in printed
    (tmp_path / "out" / "rows.jsonl").write_text('{"part": "a"}\n')
    code, printed = run(*FEW, only)
    assert code == 2
    assert "damaged" in printed
