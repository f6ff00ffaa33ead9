"""The pretraining command: whole, stopped and resumed, on two processes, and refused."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, run_program, write_yaml

from speechllm.checkpoint import load_checkpoint
from speechllm.data.manifest import read_manifest
from speechllm.errors import InputError
from speechllm.model import ModelConfig, make_model, parameter_counts
from speechllm.tasks import FEW_SHOT, TASKS, TRAINABLE
from train import engine, pretrain
from train.config import read_config
from train.launch import prepare_environment, share_cores
from train.log import MetricLog, read_metrics
from train.pretrain_config import Pretraining

# Starts the command as the shell would, but has SIGTERM arrive within the step that is the last argument, in all
# processes of its group, as ``timeout`` sends it.
STOPPED = """
import os
import signal
import sys

from train import pretrain

train_step = pretrain.Trainer.train_step
stop_at = int(sys.argv.pop())
os.setpgid(0, 0)


def step_with_signal(trainer, step, batches):
    if step == stop_at:
        os.killpg(0, signal.SIGTERM)
    return train_step(trainer, step, batches)


pretrain.Trainer.train_step = step_with_signal
pretrain.main()
"""
# Starts the command as the launcher would, and notes what each rank ended with.
OBSERVED = """
import json

from speechllm.codec.base import hash_tensors
from train import pretrain
from train.loader import Meter

run, train_step, add = pretrain.Trainer.run, pretrain.Trainer.train_step, Meter.add
batches, losses, tasks = [], [], []


def noted_step(trainer, step, drawn):
    batches.extend(batch.lm.input_ids.tolist() for batch in drawn)
    tasks.extend(task for batch in drawn for task in batch.tasks)
    return train_step(trainer, step, drawn)


def noted_add(meter, step, batch, found):
    losses.append(found)
    return add(meter, step, batch, found)


def run_and_note(trainer):
    finished = run(trainer)
    note = {
        "finished": finished,
        "step": trainer.step,
        "world": trainer.world,
        "weights": hash_tensors(trainer.lm.state_dict()),
        "batches": batches,
        "losses": losses,
        "tasks": tasks,
    }
    (trainer.config.out / f"rank-{trainer.rank}.json").write_text(json.dumps(note))
    return finished


pretrain.Trainer.run, pretrain.Trainer.train_step, Meter.add = run_and_note, noted_step, noted_add
pretrain.main()
"""


def records(out: Path) -> list[dict[str, float]]:
    """What was logged, without what the clock has a part in."""
    clock = ("seconds", "tokens_per_second", "audio_hours_per_hour", "loader_tokens_per_second", "waiting")
    return [{k: v for k, v in r.items() if k not in clock} for r in read_metrics(out / "metrics.jsonl")]


def weights_of(out: Path) -> dict[str, torch.Tensor]:
    return load_checkpoint(out / "checkpoint").lm.state_dict()


def test_a_run_logs_and_saves(pretrained: Path) -> None:
    found = records(pretrained)
    assert [r["step"] for r in found if "loss" in r] == [*range(4, 57, 4)]
    for r in (r for r in found if "loss" in r):
        assert r["loss"] == pytest.approx(r["answer"] + 0.01 * r["aux"] + 0.3 * r["ctc"], abs=2e-6)
        assert 0 <= r["idlest_expert"] < 0.25 < r["busiest_expert"] <= 0.5
        assert 0 <= r["unused_experts"] <= 2 * 2, "of four at least two are used"
        assert 0 <= r["padding"] < 0.5
    assert any(r["padding"] for r in found if "loss" in r)
    rates = [r["learning_rate"] for r in found if "loss" in r]
    assert rates[0] == pytest.approx(2e-3 * (1 + 2 + 3 + 4) / 4 / 4)  # mean of the warm-up's steps
    assert rates[1:] == sorted(rates[1:], reverse=True)
    (scores,) = (r for r in found if "loss_transcribe_dev" in r)
    assert scores["step"] == 56
    assert scores.keys() == {"step"} | {
        f"{name}_dev" for name in ("loss_transcribe", "gap_transcribe", "wer_transcribe")
    } | {f"{name}_dev" for name in ("loss_translate_de", "gap_translate_de", "bleu_translate_de")}
    for r in read_metrics(pretrained / "metrics.jsonl"):
        assert ("loss" in r) == (r.get("audio_hours_per_hour", 0) > 0)
        assert "mfu" not in r or torch.cuda.is_available()
    for picture in ("training.png", "experts.png"):
        assert (pretrained / picture).read_bytes().startswith(b"\x89PNG")
    assert json.loads((pretrained / "experts.json").read_text())["steps"] == [1, 56]
    shares = json.loads((pretrained / "shares.json").read_text())
    assert shares.keys() == {"transcribe", "translate_de"}
    assert 0 < shares["translate_de"]["realised"] < 0.2, "from step 50 on"
    assert sum(share["realised"] for share in shares.values()) == pytest.approx(1)
    checkpoint = load_checkpoint(pretrained / "checkpoint")
    assert checkpoint.vocabulary.merge_repeats
    assert checkpoint.settings.max_answer_tokens == 6
    assert all(value.isfinite().all() for value in checkpoint.lm.state_dict().values())
    assert [path.name for path in (pretrained / "state").glob("step-*")] == ["step-56"]


def test_a_stopped_run_goes_on_as_if_it_had_not_been(
    pretrained: Path, pretrain_settings: dict[str, Any], tmp_path: Path
) -> None:
    """Stopped in the midst of what is planned together, just after a task has come in."""
    out = tmp_path / "run"
    config = write_yaml(tmp_path / "pretrain.yaml", pretrain_settings | {"out": out})
    stopped = run_program("python", "-c", STOPPED, "--config", config, 51)
    assert stopped.returncode != 0
    assert "stopped after step 52; go on with --resume" in stopped.stderr
    assert "Traceback" not in stopped.stderr
    assert [r["step"] for r in records(out)] == [*range(4, 53, 4)]
    assert any(not torch.equal(value, weights_of(pretrained)[name]) for name, value in weights_of(out).items())

    resumed = run_program("python", "train/pretrain.py", "--config", config, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert records(out) == records(pretrained)
    assert all(torch.equal(value, weights_of(pretrained)[name]) for name, value in weights_of(out).items())


def launcher() -> tuple[str, ...]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return ("deepspeed", "--num_accelerators", "2", "--master_port", str(free.getsockname()[1]))


def test_ctrl_c_under_the_launcher_saves(pretrain_settings: dict[str, Any], tmp_path: Path) -> None:
    """It reaches the launcher too, which sends SIGTERM to every process it finds, the loaders among them."""
    out, told = tmp_path / "run", tmp_path / "told"
    settings = pretrain_settings | {"out": out, "steps": 50000, "log_every": 1, "evaluate_every": 50000}
    config = write_yaml(tmp_path / "pretrain.yaml", settings | {"save_every": 50000})
    program, *options = launcher()
    command = [str(Path(sys.executable).parent / program), *options, "train/pretrain.py", "--config", str(config)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with told.open("w") as output:
        started = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=output, stderr=output, start_new_session=True
        )
    try:
        while not (out / "metrics.jsonl").exists() or len(read_metrics(out / "metrics.jsonl")) < 3:
            assert started.poll() is None, told.read_text()[-3000:]
            time.sleep(0.2)
        os.killpg(started.pid, signal.SIGINT)
        started.wait(timeout=60)
        for _ in range(300):  # the launcher may end before what it launched
            if "go on with --resume" in told.read_text():
                break
            time.sleep(0.2)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(started.pid, signal.SIGKILL)
    last = int(read_metrics(out / "metrics.jsonl")[-1]["step"])
    assert (out / "state" / "latest").read_text().strip() == f"step-{last}"


def test_two_processes_end_with_the_same_weights(pretrain_settings: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "run"
    settings = pretrain_settings | {"out": out, "steps": 8, "log_every": 4, "evaluate_every": 8, "zero_stage": 1}
    settings |= {"curriculum": {}, "tasks": {"transcribe": 1, "translate_de": 1}}
    config = write_yaml(tmp_path / "pretrain.yaml", settings)
    (tmp_path / "observed.py").write_text(OBSERVED)
    start = launcher()
    result = run_program(*start, tmp_path / "observed.py", "--config", config)
    assert result.returncode == 0, result.stderr[-3000:]
    port = start[start.index("--master_port") + 1]
    assert not [*Path("/dev/shm").glob(f"deepspeed_*_{port}_*")], "memory is left behind"
    first, second = (json.loads((out / f"rank-{rank}.json").read_text()) for rank in range(2))
    assert first["finished"] and second["finished"]
    assert (first["step"], first["world"]) == (second["step"], second["world"]) == (8, 2)
    assert first["weights"] == second["weights"]
    assert len(first["batches"]) == 8
    assert all(batch not in second["batches"] for batch in first["batches"])
    assert [r["step"] for r in records(out)] == [4, 8, 8]
    for record, steps in zip(records(out), (range(4), range(4, 8)), strict=False):  # of both ranks
        told = [rank["losses"][step] for rank in (first, second) for step in steps]
        for name in ("loss", "answer", "ctc", "answer_transcribe", "answer_translate_de"):
            values = [losses[name] for losses in told if name in losses]
            assert record.get(name, 0) == pytest.approx(sum(values) / max(1, len(values)), abs=2e-6)
        assert len({losses["loss"] for losses in told}) == 8
    drawn = first["tasks"] + second["tasks"]
    for task, share in json.loads((out / "shares.json").read_text()).items():
        assert share["realised"] == pytest.approx(drawn.count(task) / len(drawn))
    assert {*drawn} == {*settings["tasks"]}
    checkpoint = load_checkpoint(out / "checkpoint")
    assert checkpoint.lm.config.num_local_experts == 4
    # each id that is no padding, of both, was given to two experts in each layer
    pad = checkpoint.vocabulary.pad
    seen = [index for rank in (first, second) for batch in rank["batches"] for row in batch for index in row]
    load = json.loads((out / "experts.json").read_text())
    assert load["steps"] == [1, 8]
    for groups, names in (("tasks", set(settings["tasks"])), ("modalities", {"audio", "instruction", "answer"})):
        assert load[groups].keys() == names
        counts = torch.tensor([*load[groups].values()])  # [groups, layers, experts]
        assert counts.sum((0, 2)).tolist() == [2 * sum(index != pad for index in seen)] * 2
        assert (counts.sum((1, 2)) > 0).all()
    audio = torch.tensor(load["modalities"]["audio"])
    codes = checkpoint.vocabulary.is_audio(torch.tensor(seen)).sum()
    assert audio.sum(1).tolist() == [2 * codes] * 2
    assert (out / "experts.png").read_bytes().startswith(b"\x89PNG")


def test_a_dense_model_goes_the_whole_way(pretrain_settings: dict[str, Any], corpus: Path, tmp_path: Path) -> None:
    """One network in a layer, as wide as the two of four that an id is seen by otherwise."""
    out, sizes = tmp_path / "run", pretrain_settings["model"]
    dense = sizes | {"num_experts": 1, "top_k": 1, "expert_size": 2 * sizes["expert_size"]}
    settings = pretrain_settings | {"out": out, "model": dense, "curriculum": {}}
    config = write_yaml(tmp_path / "pretrain.yaml", settings | {"steps": 4, "log_every": 2, "evaluate_every": 4})
    trained = run_program("python", "train/pretrain.py", "--config", config)
    assert trained.returncode == 0, trained.stderr[-3000:]
    first, second, scores = records(out)
    for record in (first, second):
        assert record["loss"] == pytest.approx(record["answer"] + 0.3 * record["ctc"], abs=2e-6)
        assert not record.keys() & {"aux", "busiest_expert", "idlest_expert", "unused_experts"}
    assert "wer_transcribe_dev" in scores
    assert (out / "training.png").exists() and not [*out.glob("experts*")]
    checkpoint = load_checkpoint(out / "checkpoint")
    words, layers, hidden = checkpoint.vocabulary, sizes["num_layers"], sizes["hidden_size"]
    total, active = parameter_counts(checkpoint.lm)
    assert total == active
    mixture = make_model(ModelConfig(**sizes), words.size, words.pad, words.end)
    routers = layers * hidden * (sizes["num_experts"] - 1)
    assert active == parameter_counts(mixture)[1] - routers < parameter_counts(mixture)[0] - routers
    asking = ("ask", "--model", out / "checkpoint", "--device", "cpu", TASKS["transcribe"].wordings[0])
    clip = corpus / read_manifest(corpus / "dev.jsonl")[0].audio
    asked = run_program("python", "-c", "from serve.cli import main; main()", *asking, clip)
    assert asked.returncode == 0, asked.stderr


def run_here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The command in this process, for errors before anything is started; what it wrote to stderr."""
    monkeypatch.setattr(sys, "argv", ["pretrain.py", *map(str, arguments)])
    for name, value in (
        ("RANK", "0"),
        ("LOCAL_RANK", "0"),
        ("WORLD_SIZE", "1"),
        ("MASTER_ADDR", ""),
        ("MASTER_PORT", ""),
    ):
        monkeypatch.setenv(name, value)  # else the command sets them, and they stay
    with pytest.raises(SystemExit) as stop:
        pretrain.main()
    assert stop.value.code == 2
    written = capsys.readouterr().err
    assert "Traceback" not in written
    error = written.splitlines()[-1]  # above it there may be the progress bars of datasets
    assert error.startswith("error: ")
    return error


def test_a_second_run_in_the_same_folder_is_refused(
    pretrained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (pretrained / "metrics.jsonl").read_bytes()
    error = run_here(monkeypatch, capsys, "--config", pretrained.with_name("pretrain.yaml"))
    assert f"{pretrained}: holds a run already: add --resume to go on" in error
    assert (pretrained / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "pretrain.yaml: steps: "),
        ({"colour": "red"}, "pretrain.yaml: colour: "),
        ({"tasks": {"sing": 1}}, "unknown task 'sing': known are transcribe"),
        ({"tasks": {"transcribe": 0}}, "the share of transcribe must be above 0"),
        ({"model": {"top_k": 9}}, "model: top_k = 9 exceeds num_experts = 8"),
        ({"ctc_layer": 3}, "ctc_layer = 3 exceeds model.num_layers = 2"),
        ({"ctc_layer": 3, "ctc_weight": 0, "trait_weight": 0.2}, "ctc_layer = 3 exceeds model.num_layers = 2"),
        ({"dev_corpora": ["a/dev", "b/dev"]}, "a/dev: another dev corpus is called dev too: rename the folder of one"),
        ({"codec": "nowhere"}, "nowhere: not a codec folder"),
        ({"corpora": {"nowhere": 1}}, "nowhere: not an encoded corpus"),
        ({"corpora": {"somewhere": 0}}, "corpora.somewhere: Input should be greater than 0"),
        ({"max_audio_seconds": 0.01}, "max_audio_seconds = 0.01 has an answer for transcribe, translate_de: leave it"),
        ({"tasks": {"transcribe": 1, "emotion": 1}, "curriculum": {}}, "has an answer for emotion: leave it out"),
        ({"curriculum": {"diarize": 5}}, "curriculum: diarize not among the tasks"),
        ({"curriculum": {"transcribe": 5, "translate_de": 9}}, "curriculum: no task to begin with"),
        ({"task_corpora": {"diarize": {"somewhere": 1}}}, "task_corpora: diarize not among the tasks"),
        ({"task_corpora": {"transcribe": {"nowhere": 1}}}, "task_corpora: transcribe: nowhere not among the corpora"),
        ({"task_corpora": {"transcribe": {}}}, "task_corpora.transcribe: Dictionary should have at least 1 item"),
        ({"dev_corpora": {"somewhere": ["diarize"]}}, "dev_corpora: somewhere: diarize not among the tasks"),
        ({"questions": 2, "attn_implementation": "eager"}, "need attn_implementation: sdpa, not eager; or ask 1"),
        ({"seed": -1}, "seed: "),
        ({"balance": {"method": "magic"}}, "balance: Input tag 'magic' found using 'method' does not match"),
        ({"balance": {"method": "fixed", "weights": {"emotion": 2}}}, "balance.weights: emotion not among the tasks"),
        ({"balance": {"method": "pcgrad"}, "zero_stage": 2}, "balance: pcgrad holds whole gradients of each task"),
        ({"expert_parallel": 2}, "expert_parallel: DeepSpeed clips by another norm on each rank with zero_stage = 0"),
        ({"offload": True}, "offload: there is nothing that ZeRO shares with zero_stage = 0: set it to 1, 2 or 3"),
        (
            {"balance": {"method": "pcgrad"}, "expert_parallel": 2, "zero_stage": 1},
            "and expert_parallel = 1, not 2; or choose another",
        ),
        ({"max_answer_tokens": 200}, "make sequences of 700 ids; model.max_positions = 512: raise it"),
        (
            {"tasks": {"few_shot_word": 1}, "curriculum": {}},
            "tasks: examples with shots are sequences of up to 1800 ids",
        ),
        ({"start_from": "nowhere"}, "start_from: nowhere: not a checkpoint folder"),
        ({"time_marks": 0.48}, "set it to false, or leave out time_marks and timed tasks"),
        (
            {"time_marks": 0.5, "tasks": {"activity": 1}, "curriculum": {}, "merge_repeats": False},
            "time_marks = 0.5 is no multiple of both 0.04 s and a frame of the codec (0.04 s): set another, or 0",
        ),
        ({"n_q": 2, "merge_repeats": False, "max_audio_seconds": 8}, "encoded with 1 codebooks, 2 are asked for"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_wrong_settings_are_named(
    change: dict[str, Any],
    message: str,
    pretrain_settings: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    settings = pretrain_settings | {"out": tmp_path / "run"} | change
    error = run_here(monkeypatch, capsys, "--config", write_yaml(tmp_path / "pretrain.yaml", settings))
    assert message in error
    assert not (tmp_path / "run").exists()


def test_a_run_may_start_from_an_earlier_one(
    pretrained: Path,
    pretrain_settings: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Here one of other tasks and without merging; the model is looked at before the first step."""
    models: list[Any] = []

    def caught(model: torch.nn.Module, **_: object) -> None:
        models.append(model)
        raise InputError("seen")

    monkeypatch.setattr(engine.deepspeed, "initialize", caught)
    changes = {"tasks": {"transcribe": 1, "translate_text_de": 1}, "curriculum": {}, "merge_repeats": False}
    settings = pretrain_settings | changes | {"out": tmp_path / "run", "start_from": pretrained / "checkpoint"}
    assert run_here(monkeypatch, capsys, "--config", write_yaml(tmp_path / "p.yaml", settings)) == "error: seen"
    weights = models[0].lm.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in weights_of(pretrained).items())


@pytest.mark.parametrize(
    ("given", "threads"),
    [
        ({}, 4),
        ({"LOCAL_SIZE": "2"}, 2),
        ({"LOCAL_WORLD_SIZE": "8"}, 1),
        ({"LOCAL_SIZE": "2", "OMP_NUM_THREADS": "4"}, 4),
    ],
)
def test_ranks_of_a_machine_share_its_cores(
    given: dict[str, str], threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("LOCAL_SIZE", "LOCAL_WORLD_SIZE", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        share_cores()
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


def test_the_programs_of_this_environment_come_first(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "7")  # of a launcher: stays
    monkeypatch.setenv("PATH", f"/usr/bin{os.pathsep}/bin")
    own = Path(sys.executable).parent
    for _ in range(2):
        prepare_environment()
        assert os.environ["PATH"] == f"{own}{os.pathsep}/usr/bin{os.pathsep}/bin"
    assert os.environ["RANK"] == os.environ["MASTER_PORT"] == "7"


def test_the_shipped_configs_are_valid() -> None:
    folder = ROOT / "train" / "configs"
    words, tasks = (read_config(folder / f"{name}.yaml", Pretraining) for name in ("tiny", "all-tasks"))
    assert words.tasks.keys() < tasks.tasks.keys()
    assert tasks.tasks.keys() == TASKS.keys()
    stages = ("tiny", "times", "talks", "recall", "tiny-tasks")
    chain = [read_config(folder / f"{name}.yaml", Pretraining) for name in stages]
    for before, after in pairwise(chain):
        assert after.start_from == before.out / "checkpoint" and after.model == before.model
    release = chain[-1]
    recipe = (folder / "release.yaml").read_text(encoding="utf-8")
    for told in (r"pretrain\.py --config", "--pretrain"):
        assert re.findall(rf"{told} train/configs/([a-z-]+)\.yaml", recipe) == list(stages)
    assert f"for part in {' '.join(stages)}; do" in (ROOT / "README.md").read_text(encoding="utf-8")
    for stage in chain[1:]:  # what audio looks like stays
        assert (stage.n_q, stage.acoustic_stride, stage.time_marks) == (2, 3, 0.48) and stage.times == release.times
    assert FEW_SHOT.keys() < release.tasks.keys() == TRAINABLE.keys() - {"next_text", "translate_text_cs"}
    own = read_config(folder / "own-data.yaml", Pretraining)
    assert own.start_from == Path("speechllm/checkpoints/tiny") and own.tasks.keys() < tasks.tasks.keys()
    assert own.model == words.model
    assert (own.codec, own.text_model) == (own.start_from / "codec", own.start_from / "text.model")
    assert (own.time_marks, own.times) == (release.time_marks, release.times)


def test_config_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"gone\.yaml: cannot be read"):
        read_config(tmp_path / "gone.yaml", Pretraining)
    path = tmp_path / "bad.yaml"
    for content, message in (("a: [1", "not YAML"), ("- 1", "the file"), ("", "the file")):
        path.write_text(content)
        with pytest.raises(InputError, match=f"bad.yaml: {message}") as error:
            read_config(path, Pretraining)
        assert "\n" not in str(error.value)


def test_of_a_step_logged_twice_the_later_record_counts(tmp_path: Path) -> None:
    for losses in ([5.0, 4.0, 3.0], [3.5, 2.5]):  # stopped after step 3, resumed from a state saved at step 1
        log = MetricLog(tmp_path)
        for step, loss in enumerate(losses, 1 if len(losses) == 3 else 2):
            log.write(step, loss=loss)
        log.write(3, wer=10 * losses[-1])
        log.close()
    found = [(r["step"], r.get("loss"), r.get("wer")) for r in read_metrics(tmp_path / "metrics.jsonl")]
    assert found == [(1, 5.0, None), (2, 3.5, None), (3, 2.5, None), (3, None, 25.0)]
