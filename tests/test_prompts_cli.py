"""`speechllm prompts`, and prompt files given to `ask`: those of the repository, codes as clips, tasks, exit codes."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import ROOT, clip, command, require_engine, table
from test_cli import ask, run

from serve.answerer import Answerer
from serve.prompts import examples_of, listen_shot
from speechllm.audio import read_audio
from speechllm.checkpoint import load_checkpoint, save_checkpoint
from speechllm.errors import InputError
from speechllm.model import ModelConfig, make_model
from speechllm.prompt import render
from speechllm.prompt_file import prompt_files, read_prompt_file
from speechllm.tasks import TASKS, Speaker, Time, find_task
from speechllm.text import TextTokenizer
from speechllm.vocabulary import Vocabulary
from train import prompt_clips
from train.config import read_config

PROMPTS = ROOT / "prompts"
FILES = prompt_files(PROMPTS)
UNTRAINED = {"which_word", "same_speaker", "question_or_statement", "animal_or_vehicle"}
OWN_WORDS = "Tell me all of it"


@pytest.fixture(scope="module")
def timed(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint with marks of time up to 8 s, trained on nothing but transcription."""
    text = TextTokenizer.load(tiny_checkpoint)
    vocabulary = Vocabulary(text.size, n_q=1, card=16, times=201)
    sizes = ModelConfig(hidden_size=32, num_layers=2, expert_size=32, num_experts=4, max_positions=512)
    folder = tmp_path_factory.mktemp("timed") / "timed"
    torch.manual_seed(3)  # with which it says something: not all random weights do
    save_checkpoint(
        folder,
        make_model(sizes, vocabulary.size, vocabulary.pad, vocabulary.end),
        tiny_checkpoint / "codec",
        text,
        vocabulary,
        name="timed",
        max_audio_seconds=8.0,
        max_answer_tokens=12,
        tasks=["transcribe"],
    )
    return folder


@pytest.fixture
def clips(tmp_path: Path) -> list[str]:
    return [str(clip(tmp_path / name, seconds)) for name, seconds in (("a.wav", 0.5), ("b.wav", 0.9))]


def test_every_prompt_file_is_good() -> None:
    """With the shipped checkpoint, which has marks of time."""
    result = run("prompts", "check")
    assert (result.exit_code, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    assert [line.partition(": good; ")[0] for line in lines] == [str(file) for file in FILES]
    assert "no marks of time" not in result.stdout


def test_there_is_one_for_each_task_and_some_for_none() -> None:
    prompts = {file.stem: read_prompt_file(file) for file in FILES}
    assert all(2 <= len(prompt.shots) <= 4 and prompt.description for prompt in prompts.values())
    listening = {name for name, task in TASKS.items() if task.listens} - {"translate_cs", "translate_en"}
    assert set(prompts) == listening | UNTRAINED
    for name, prompt in prompts.items():
        task = find_task(prompt.instruction)
        assert (task.name if task else None) == (None if name in UNTRAINED else name)
        answers = {answer for _, answer in prompt.shots}
        assert set(prompt.labels) in (answers, set()), "every label is shown"


def test_clips_are_those_of_the_table_and_small() -> None:
    listed = read_config(PROMPTS / "clips.yaml", prompt_clips.Table).clips
    used = {path.name for file in FILES for path, _ in read_prompt_file(file).shots}
    there = {path.name for path in (PROMPTS / "clips").iterdir()}
    assert used == {f"{name}.flac" for name in listed} == {name for name in there if name.endswith(".flac")}
    assert sum(path.stat().st_size for path in (PROMPTS / "clips").iterdir()) < 2.5e6
    assert all(prompt_clips.find_voice(one.voice) for sentences in listed.values() for one in sentences)


def test_clips_that_are_missing_are_made(tmp_path: Path) -> None:
    require_engine("flite")
    made = [
        '  two: [{voice: flite-rms, text: "Good day."}, {voice: flite-awb, text: "Good night.", gap: 0.5, rate: 1.2}]'
    ]
    path = table(tmp_path / "clips.yaml", "clips:", *made)
    said = command(prompt_clips.main, path)
    found = re.search(r"two\.flac: (.+) s, spoken at 0\.12-(.+), (.+)-(.+)\n.*: 1 made, 0 kept", said)
    assert found
    seconds, end, start, last = map(float, found.groups())
    assert start - end == pytest.approx(0.5, abs=0.02) and seconds - last == pytest.approx(0.12, abs=0.02)
    wav = read_audio(tmp_path / "clips" / "two.flac", 16000)
    assert wav.shape[1] / 16000 == pytest.approx(seconds, abs=0.01)
    assert wav[:, : round(0.1 * 16000)].abs().max() < 1e-3 < wav.abs().max()
    assert "0 made, 1 kept" in command(prompt_clips.main, path)
    for name in ("mbrola-us1", "nobody"):
        with pytest.raises(InputError, match=name):
            prompt_clips.find_voice(name)


def test_list_names_them(tmp_path: Path) -> None:
    result = run("prompts", "list")
    assert (result.exit_code, result.stderr) == (0, "")
    for words in (
        "emotion  ",
        "What is the speaker's emotion?",
        "3 shots; labels: happy, neutral, sad",
        "task: intent",
    ):
        assert words in result.stdout
    assert "\nclips " not in result.stdout
    table(tmp_path / "bad.yaml", "shots: []")
    table(tmp_path / "good.yaml", "instruction: Is it?", "shots: [{audio: a, answer: b}]")
    mixed = run("prompts", "list", str(tmp_path))
    assert mixed.exit_code == 2 and "bad.yaml, line 1: instruction: Field required" in mixed.stderr
    assert mixed.stdout == "good  Is it?\n      1 shot\n"
    nothing = run("prompts", "list", str(tmp_path / "none"))
    assert (nothing.exit_code, len(nothing.stderr.splitlines())) == (2, 1)


def test_show_says_what_the_model_gets(timed: Path) -> None:
    result = run("prompts", "show", "diarize", "--model", str(timed))
    assert (result.exit_code, result.stderr) == (0, "")
    answerer = Answerer(load_checkpoint(timed))
    examples = examples_of(answerer, read_prompt_file(PROMPTS / "diarize.yaml"))
    assert examples[0].answer == (
        *(Speaker(1), Time(0.12), "Would you like tea?", Time(1.28)),
        *(Speaker(2), Time(1.56), "No, thank you.", Time(2.92)),
    )
    sizes = [len(render(one, answerer.checkpoint.vocabulary, answerer.checkpoint.text).ids) for one in examples]
    assert [int(ids) for ids in re.findall(r"    (\d+) ids", result.stdout)] == sizes
    assert f"The shots take {sum(sizes)} of 512 positions ({100 * sum(sizes) / 512:.1f} %)" in result.stdout
    assert "<audio: tea.flac, 3.03 s> Who says what, and when? <answer> <|spk1|> <|0.12|> Would you" in result.stdout
    assert "no marks of time" not in result.stdout


def test_check_tells_what_is_bad(tiny_checkpoint: Path, clips: list[str], tmp_path: Path) -> None:
    clip(tmp_path / "long.wav", 8.5)
    (tmp_path / "text.wav").write_text("no audio " * 20)
    told = {
        "missing": ("shots: [{audio: c.wav, answer: a}]", "line 2: shots.0: ", "c.wav: no such file"),
        "unreadable": ("shots: [{audio: text.wav, answer: a}]", "line 2: shots.0: ", "not audio"),
        "long": ("shots: [{audio: long.wav, answer: a}]", "line 2: shots.0: ", "8 s"),
        "emotion": ("task: emotion\nshots:\n- {audio: a.wav, answer: glad}", "line 4: shots.0: ", "'glad' is none of"),
        "marks": (
            "task: turns\nshots:\n- {audio: a.wav, answer: <|1.x|>}",
            "line 4: shots.0: ",
            "'<|1.x|>' is no mark",
        ),
        "segment": ("task: turns\nshots:\n- {audio: a.wav, answer: <|1.00|>}", "line 4: shots.0: ", "has no end"),
        "many": (f"shots: [{', '.join(['{audio: b.wav, answer: a}'] * 20)}]", "", "positions, and what is left is not"),
    }
    files = {name: table(tmp_path / f"{name}.yaml", "instruction: x", more) for name, (more, _, _) in told.items()}
    good = table(tmp_path / "good.yaml", "instruction: x", "shots: [{audio: a.wav, answer: <|spk1|>}]")
    result = run("prompts", "check", "nobody", *map(str, files.values()), str(good), "--model", str(tiny_checkpoint))
    assert result.exit_code == 2
    assert result.stdout.startswith(f"{good}: good; 1 shot; ") and len(result.stdout.splitlines()) == 1
    first, *lines = result.stderr.splitlines()
    assert first.startswith("error: nobody: no such prompt file")
    for line, (name, (_, where, words)) in zip(lines, told.items(), strict=True):
        assert line.startswith(f"error: {files[name]}{', ' if where else ''}{where}") and words in line, line


def test_marks_are_marks_only_where_the_task_has_them(tiny_checkpoint: Path, clips: list[str]) -> None:
    """Elsewhere a user's text spells no control token."""
    answerer = Answerer(load_checkpoint(tiny_checkpoint))
    recording = answerer.listen(clips[0])
    for instruction in ("Transcribe this audio", "Is it <|spk1|>?"):
        example = answerer.shot(recording, instruction, "<|spk1|><|0.00|> hello")
        assert example.answer == "<|spk1|><|0.00|> hello"
        ids = render(example, answerer.checkpoint.vocabulary, answerer.checkpoint.text).ids
        assert not answerer.checkpoint.vocabulary.is_mark(ids).any()
    assert answerer.shot(recording, "Who speaks when?", "<|spk1|><|0.00|> x").answer == (Speaker(1), Time(0.0), "x")
    assert answerer.shot(recording, "x", "<|spk1|>", TASKS["turns"]).answer == (Speaker(1),)
    with pytest.raises(InputError, match=r"a\.wav: its answer cannot be used: '<\|spk0\|>' is no mark"):
        answerer.shot(recording, "Who speaks when?", "<|spk0|>")


def test_the_task_of_a_prompt_file_holds(timed: Path, clips: list[str], tmp_path: Path) -> None:
    """Without a shot too, streamed or not."""
    shots = "shots: [{audio: a.wav, answer: <|spk1|><|0.00|> Hello. <|0.48|>}]"
    for lines in ((), (shots,)):
        path = str(table(tmp_path / "p.yaml", f"instruction: {OWN_WORDS}", "task: diarize", *lines))
        first = json.loads(ask(timed, OWN_WORDS, clips[1], "--shots", path, "-f", "json", "--beams", "1").stdout)
        assert first["task"] == "diarize"
        assert "<|" in first["text"]
        streamed = ask(timed, OWN_WORDS, clips[1], "--shots", path, "--stream")
        assert streamed.stdout.strip() == first["text"]
        refused = ask(timed, OWN_WORDS, clips[1], "--shots", path, "--also", "Hum")
        assert refused.exit_code == 2 and "are for one question" in refused.stderr
    assert "<|" not in ask(timed, OWN_WORDS, clips[1]).stdout


def test_a_name_is_as_good_as_a_file(timed: Path, clips: list[str], tmp_path: Path) -> None:
    prompt = read_prompt_file(PROMPTS / "same_speaker.yaml")
    by_hand = [word for path, answer in prompt.shots for word in ("--shot", f"{path}={answer}")]
    by_hand += [word for label in prompt.labels for word in ("--label", label)]
    answers = []
    for given in (
        ("--shots", "same_speaker"),
        ("--shots", str(PROMPTS / "same_speaker.yaml")),
        by_hand,
    ):
        result = ask(timed, prompt.instruction, clips[0], *given, "-f", "json")
        assert result.exit_code == 0, result.stderr
        answers.append(json.loads(result.stdout) | {"timings": None})
    assert answers[0] == answers[1] == answers[2]
    assert answers[0]["label"] in ("yes", "no")


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("nonsense", "nonsense: no such prompt file, and none is called so in"),
        ("{}/gone.yaml", "gone.yaml, line 3: shots.0: "),
        ("diarize", "diarize.yaml, line 5: shots.0: a time of 0.12 s: this vocabulary has no marks of times"),
    ],
)
def test_what_cannot_be_asked_with(
    tiny_checkpoint: Path, clips: list[str], tmp_path: Path, given: str, told: str
) -> None:
    table(tmp_path / "gone.yaml", "instruction: x", "shots:", "- {audio: gone.wav, answer: y}")
    result = ask(tiny_checkpoint, "Hum", clips[0], "--shots", given.format(tmp_path))
    assert (result.exit_code, result.stdout) == (2, "")
    assert told in result.stderr and len(result.stderr.splitlines()) == 1


def test_codes_are_as_good_as_their_clip(timed: Path, clips: list[str], tmp_path: Path) -> None:
    encoded = run("codes", "encode", clips[0], "--codec", str(timed / "codec"))
    assert encoded.exit_code == 0
    answerer = Answerer(load_checkpoint(timed))
    heard, read = answerer.listen(clips[0]), listen_shot(answerer, tmp_path / "a.codes.safetensors")
    assert read.spans[0].codes.equal(heard.spans[0].codes) and read.seconds == heard.seconds == 0.5
    answers = []
    for audio in ("a.wav", "a.codes.safetensors"):
        path = table(tmp_path / "p.yaml", "instruction: Hum", f"shots: [{{audio: {audio}, answer: yes}}]")
        answers.append(ask(timed, "Hum", clips[1], "--shots", str(path)).stdout)
        answers.append(ask(timed, "Hum", clips[1], "--shot", f"{tmp_path / audio}=yes").stdout)
        assert run("prompts", "check", str(path), "--model", str(timed)).exit_code == 0
    assert answers == answers[:1] * 4 and answers[0].strip()


def test_codes_that_do_not_belong_are_refused(timed: Path, clips: list[str], tmp_path: Path) -> None:
    assert run("codes", "encode", clips[0], "--codec", str(ROOT / "tokenizers" / "codec")).exit_code == 0
    shutil.copy(tmp_path / "a.codes.safetensors", tmp_path / "other.codes.safetensors")
    long = clip(tmp_path / "long.wav", 8.5)
    assert run("codes", "encode", str(long), "--codec", str(timed / "codec")).exit_code == 0
    for name, told in (("other", "made by another codec"), ("long", "8 s of audio at most"), ("none", "no such file")):
        path = table(tmp_path / "p.yaml", "instruction: x", f"shots: [{{audio: {name}.codes.safetensors, answer: y}}]")
        result = run("prompts", "check", str(path), "--model", str(timed))
        assert result.exit_code == 2
        assert f"{path}, line 2: shots.0: " in result.stderr and told in result.stderr
        assert len(result.stderr.splitlines()) == 1
        if name == "other":
            assert f"make it anew: speechllm codes encode CLIP --codec {timed / 'codec'}" in result.stderr
