"""Fine-tuning: adapters and whole models, resumed, with replay, from manifests, on two processes, and refused."""

import json
import socket
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import RATE, ROOT, command, run_program, write_yaml
from safetensors.torch import load_file
from soundfile import write as write_wav
from typer.testing import CliRunner

from serve.answer import Answer
from serve.answerer import Answerer
from serve.cli import app
from speechllm.adapter import lm_fingerprint, read_adapter
from speechllm.checkpoint import load_checkpoint
from speechllm.checkpoint_settings import read_settings
from speechllm.data.manifest import Utterance, write_manifest
from speechllm.data.pools import Pool
from speechllm.errors import InputError
from train import evaluate, finetune, own_data
from train.encode import encode_corpus
from train.finetune import FineTrainer
from train.finetune_config import Finetuning
from train.log import read_metrics
from train.own_data import OwnData

STOP = 3
# Runs the trainings of several configs one after another in the same processes. "stop:" ends one after step STOP, which
# has been saved. Each rank notes the tasks that were drawn, and whether what is frozen has changed.
OBSERVED = """
import json
import sys
from pathlib import Path

import torch
from torch import distributed

from train import finetune, launch


class Stopped(Exception):
    pass


def train(path, stop):
    config = finetune.read_config(path, finetune.Finetuning)
    trainer = finetune.FineTrainer(config, True)
    frozen = {name: p.clone() for name, p in trainer.lm.named_parameters() if not p.requires_grad}
    drawn, train_step = [], trainer.train_step

    def noted_step(step, batches):
        if stop and step == STOP_AT:
            raise Stopped
        drawn.extend(draw.row for batch in batches for draw in batch.draws)
        train_step(step, batches)

    trainer.train_step = noted_step
    try:
        trainer.run()
    except Stopped:
        pass
    now = dict(trainer.lm.named_parameters())
    note = {
        "frozen": list(frozen),
        "changed": [name for name, value in frozen.items() if not torch.equal(value, now[name])],
        "trained": [name for name in now if name not in frozen],
        "sources": [trainer.mixture.rows[row]["source"] for row in drawn],
        "rows": drawn,
    }
    (config.out / f"rank-{trainer.rank}.json").write_text(json.dumps(note))


if __name__ == "__main__":  # and not in the processes that encode
    launch.prepare_environment()
    for path in sys.argv[1:]:
        if not path.startswith("--"):
            train(Path(path.removeprefix("stop:")), path.startswith("stop:"))
    distributed.destroy_process_group()
"""


def observe(folder: Path, *starts: str, processes: int = 1) -> None:
    """Train as configs in ``folder`` say, by name, "stop:" before those that are to be ended early."""
    script = folder / "observed.py"
    script.write_text(OBSERVED.replace("STOP_AT", str(STOP)))
    files = [f"{start[: start.rfind(':') + 1]}{folder / start.rpartition(':')[2]}.yaml" for start in starts]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = ("deepspeed", "--num_accelerators", processes, "--master_port", port)
    result = run_program(*(launcher if processes > 1 else ("python",)), script, *files)
    assert result.returncode == 0, result.stderr[-3000:]


def make_manifest(folder: Path, name: str, texts: tuple[str, ...], longest: float = 1.0, **known: Any) -> Path:
    """Noise said to be speech: sixteen utterances to train on and four of dev."""
    rng = np.random.default_rng(len(name))
    (folder / name).mkdir(parents=True)
    utterances = []
    for number in range(20):
        seconds = longest * (1 if not number else rng.uniform(0.5, 0.9))
        write_wav(folder / name / f"{number}.wav", 0.1 * rng.standard_normal(round(seconds * RATE)), RATE)
        utterances.append(
            Utterance(
                id=f"{name}/{number}", audio=f"{number}.wav", duration=round(seconds, 3), language="en", source=name,
                text=texts[number % len(texts)], split="train" if number < 16 else "dev", **known,
            )
        )  # fmt: skip
    write_manifest(folder / name / "manifest.jsonl", utterances)
    return folder / name / "manifest.jsonl"


@pytest.fixture(scope="module")
def data(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Manifests "mine", "old" and "long", which has a clip of 8.5 s; the first two encoded too: "own" and "older"."""
    folder = tmp_path_factory.mktemp("data")
    make_manifest(folder, "long", ("Ten men ran.",), longest=8.5)
    mine = make_manifest(folder, "mine", ("Ten men ran.", "Two dogs run."))
    old = make_manifest(folder, "old", ("She sings.",), translations={"de": "Sie singt."})
    for manifest, name in ((mine, "own"), (old, "older")):
        encode_corpus(manifest, tiny_checkpoint / "codec", folder / name, n_q=1, copies=1, jobs=1)
    lines = mine.read_text().splitlines(keepends=True)
    mine.with_name("train.jsonl").write_text("".join(lines[:16]))
    return folder


@pytest.fixture(scope="module")
def settings(tiny_checkpoint: Path, data: Path) -> dict[str, Any]:
    """What a config needs beside "out"."""
    return {
        "name": "mine",
        "model": tiny_checkpoint,
        "corpora": {str(data / "own"): 1.0},
        "tasks": {"transcribe": 1.0},
        "replay": {
            "share": 0.4,
            "corpora": {str(data / "older"): 1.0},
            "dev_corpora": [data / "older"],
            "tasks": {"transcribe": 1.0, "translate_de": 1.0},
        },
        "steps": 5, "learning_rate": 1e-2, "warmup": 1, "batch_tokens": 300, "row_length": 120, "loader_workers": 0,
        "log_every": 1, "evaluate_every": 5, "save_every": STOP, "decode_examples": 2,
    }  # fmt: skip


@pytest.fixture(scope="module")
def runs(settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of runs: "whole" of all weights, "lora", and "resumed", which is the same but was stopped."""
    folder = tmp_path_factory.mktemp("runs")
    lora = {"lora": {"rank": 2, "alpha": 4, "dropout": 0.2}}
    for name, changes in {"whole": {}, "lora": lora, "resumed": lora}.items():
        write_yaml(folder / f"{name}.yaml", settings | changes | {"out": folder / name})
    observe(folder, "lora", "stop:resumed", "resumed", "whole")
    return folder


def noted(out: Path, rank: int = 0) -> dict[str, list[Any]]:
    note: dict[str, list[Any]] = json.loads((out / f"rank-{rank}.json").read_text())
    return note


def logits(checkpoint: Path, **options: Any) -> torch.Tensor:
    with torch.inference_mode():
        scores: torch.Tensor = load_checkpoint(checkpoint, **options).lm(input_ids=torch.arange(64)[None]).logits
    return scores


def test_lora_trains_the_adapter_alone(runs: Path, tiny_checkpoint: Path) -> None:
    note, out = noted(runs / "lora"), runs / "lora"
    assert note["changed"] == [] and "model.embed_tokens.weight" in note["frozen"]
    assert len(note["trained"]) == 2 * 4 * 2 and all(".lora_" in name for name in note["trained"])
    weights = load_file(out / "adapter" / "adapter_model.safetensors")
    # of q, k, v and o: width 32, of keys and values 16; in 2 layers
    assert sum(w.numel() for w in weights.values()) == 2 * 2 * ((32 + 32) + 2 * (32 + 16) + (32 + 32))
    assert all(w.isfinite().all() and w.any() for w in weights.values())
    assert not (out / "checkpoint").exists()
    told, base = read_adapter(out / "adapter"), read_settings(tiny_checkpoint)
    assert (told.name, told.checkpoint, told.tasks) == ("mine", base.name, ("transcribe",))
    assert not torch.equal(logits(tiny_checkpoint, adapter=out / "adapter"), logits(tiny_checkpoint))


def test_a_stopped_run_goes_on_as_if_it_had_not_been(runs: Path) -> None:
    """Dropout and all."""
    one, two = (load_file(runs / name / "adapter" / "adapter_model.safetensors") for name in ("lora", "resumed"))
    assert one.keys() == two.keys() and all(torch.equal(value, two[name]) for name, value in one.items())
    clock = ("seconds", "tokens_per_second", "audio_hours_per_hour", "loader_tokens_per_second", "waiting")
    one, two = (
        [{k: v for k, v in r.items() if k not in clock} for r in read_metrics(runs / name / "metrics.jsonl")]
        for name in ("lora", "resumed")
    )
    assert one == two
    assert noted(runs / "lora")["sources"][-len(sources := noted(runs / "resumed")["sources"]) :] == sources


def test_scores_begin_with_the_checkpoint_as_it_is(runs: Path) -> None:
    for name in ("lora", "whole"):
        first, last = (r for r in read_metrics(runs / name / "metrics.jsonl") if "wer_transcribe_own" in r)
        assert (first["step"], last["step"]) == (0, 5)
        assert first.keys() == last.keys()
        assert first.keys() >= {"loss_transcribe_own", "loss_transcribe_older", "loss_translate_de_older"}
        assert "loss_translate_de_own" not in first, "nothing is known of it"
        assert last["loss_transcribe_own"] < first["loss_transcribe_own"]
    assert (runs / "lora" / "training.png").read_bytes().startswith(b"\x89PNG")


def test_full_fine_tuning_writes_a_checkpoint(runs: Path, tiny_checkpoint: Path) -> None:
    assert noted(runs / "whole")["frozen"] == []
    tuned, base = load_checkpoint(runs / "whole" / "checkpoint"), load_checkpoint(tiny_checkpoint)
    assert tuned.settings == base.settings.model_copy(update={"name": "mine"})
    before = base.lm.state_dict()
    assert all(not torch.equal(value, before[name]) for name, value in tuned.lm.state_dict().items())
    assert not (runs / "whole" / "adapter").exists()


def test_manifests_are_encoded_once(settings: dict[str, Any], data: Path, tmp_path: Path) -> None:
    changes = {"out": tmp_path, "corpora": {data / "mine": 2.0}, "dev_corpora": [data / "mine" / "manifest.jsonl"]}
    own = OwnData(Finetuning.model_validate(settings | changes), read_settings(settings["model"]), 0)
    config, encoded = own.ready(), tmp_path / "codes" / "mine"
    assert (config.corpora, config.scored()) == ({encoded: 2.0}, [encoded])
    shard = encoded / "00000.parquet"
    assert shard.read_bytes() == (data / "own" / "00000.parquet").read_bytes()
    made = shard.stat().st_mtime_ns
    assert own.ready() == config
    assert shard.stat().st_mtime_ns == made
    manifest = data / "mine" / "manifest.jsonl"
    other = own.config.model_copy(update={"corpora": {manifest.with_name("train.jsonl"): 1.0}})
    assert own.encoded_as(next(iter(other.corpora))) == tmp_path / "codes" / "mine-train"


def test_a_full_disk_is_told_in_one_line(
    settings: dict[str, Any], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fill(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device", "00000.new")

    monkeypatch.setattr(own_data, "encode_corpus", fill)
    config = Finetuning.model_validate(settings | {"out": tmp_path, "corpora": {data / "mine": 1.0}})
    with pytest.raises(InputError) as error:
        OwnData(config, read_settings(config.model), 0).ready()
    assert str(error.value) == (
        f"{tmp_path}/codes/mine: {data}/mine/manifest.jsonl cannot be encoded ([Errno 28] No space left on device: "
        "'00000.new'): make room or set another 'out', start again"
    )


@pytest.mark.parametrize(
    ("own", "replayed", "message"),
    [
        (["mine", "mine/manifest.jsonl"], [], "mine/manifest.jsonl in corpora is the same corpus as mine in corpora: "),
        (
            ["mine", "TMP/mine"],
            [],
            "TMP/mine: TMP/run/codes/mine is for DATA/mine/manifest.jsonl: encode one of the two",
        ),
        (["own"], ["mine/../own"], "mine/../own in replay.corpora is the same corpus as own in corpora: leave one of"),
        (
            ["TMP/linked"],
            ["own"],
            "own in replay.corpora is the same corpus as TMP/linked in corpora: leave one of",
        ),
    ],
)
def test_a_corpus_may_be_named_once(
    own: list[str], replayed: list[str], message: str, settings: dict[str, Any], data: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(data)
    (tmp_path / "linked").symlink_to(data / "own")
    (tmp_path / "mine").mkdir()
    write_manifest(tmp_path / "mine" / "manifest.jsonl", [])  # another corpus in a folder of the same name
    corpora, older = ({name.replace("TMP", str(tmp_path)): 1.0 for name in names} for names in (own, replayed))
    replay = {"share": 0.25 if older else 0, "corpora": older}
    config = Finetuning.model_validate(settings | {"out": tmp_path / "run", "corpora": corpora, "replay": replay})
    with pytest.raises(InputError) as error:
        OwnData(config, read_settings(config.model), 0).ready()
    assert str(error.value).startswith(message.replace("TMP", str(tmp_path)).replace("DATA", str(data)))
    assert not (tmp_path / "run").exists()


def test_a_share_of_0_scores_alone(settings: dict[str, Any], data: Path, tmp_path: Path) -> None:
    base = read_settings(settings["model"])
    for corpora in ({}, {"nowhere": 1.0}, {data / "own": 1.0}):
        replay = {"share": 0, "corpora": corpora, "dev_corpora": [data / "older"], "tasks": {"translate_de": 1.0}}
        config = Finetuning.model_validate(settings | {"out": tmp_path, "replay": replay})
        whole = OwnData(config, base, 0).ready().pretraining(base)
        assert (list(whole.corpora), whole.dev_corpora) == ([data / "own"], [data / "own", data / "older"])
        assert whole.tasks.keys() == {"transcribe", "translate_de"}


def test_runs_see_own_and_older_examples(runs: Path) -> None:
    for name in ("lora", "whole"):
        assert {*noted(runs / name)["sources"]} == {"mine", "old"}


def test_two_processes_share_the_weights(
    settings: dict[str, Any], data: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    """With ZeRO 3, under which each holds a part of the adapter too; the first encodes for both."""
    changes = {"out": tmp_path / "run", "zero_stage": 3, "steps": 2, "lora": {"rank": 2}}
    changes |= {"corpora": {str(data / "mine"): 1.0}}
    write_yaml(tmp_path / "two.yaml", settings | changes)
    observe(tmp_path, "two", processes=2)
    assert all(noted(tmp_path / "run", rank)["changed"] == [] for rank in range(2))
    assert noted(tmp_path / "run", 0)["rows"] != noted(tmp_path / "run", 1)["rows"]
    weights = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert {len(w.shape) for w in weights.values()} == {2} and all(w.any() for w in weights.values())
    adapted = logits(tiny_checkpoint, adapter=tmp_path / "run" / "adapter")
    assert not torch.equal(adapted, logits(tiny_checkpoint))


def test_the_adapter_answers(runs: Path, data: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    model = ("--model", str(tiny_checkpoint), "--device", "cpu")
    clip = str(data / "mine" / "16.wav")
    asked = ("ask", *model, "Transcribe this audio", clip, "--format", "json")
    adapted = CliRunner().invoke(app, [*asked, "--adapter", str(runs / "lora" / "adapter")])
    assert (adapted.exit_code, adapted.stderr) == (0, "")
    checkpoints = (load_checkpoint(tiny_checkpoint, adapter=name) for name in (None, runs / "lora" / "adapter"))
    plain, changed = (next(Answerer(c).ask([clip], "Transcribe this audio")) for c in checkpoints)
    assert isinstance(plain, Answer) and isinstance(changed, Answer) and plain.confidence != changed.confidence
    assert json.loads(adapted.stdout)["confidence"] == pytest.approx(changed.confidence, rel=1e-3)
    mine, out = ["--adapter", str(runs / "lora" / "adapter")], tmp_path / "scores"
    command(
        evaluate.main, data / "mine", "--model", tiny_checkpoint, *mine, "--split", "dev", "--limit", 1, "--out", out
    )
    assert {r["task"] for r in json.loads((out / "results.json").read_text())["results"]} == {"transcribe"}
    unknown = CliRunner().invoke(app, [*asked, "--adapter", "nobody"])
    assert (unknown.exit_code, unknown.stdout) == (2, "")
    told = f"error: adapter nobody: no such folder with adapter.json in it; those in {tiny_checkpoint}/adapters: none"
    assert unknown.stderr.splitlines() == [told]


def test_a_run_knows_what_it_began_with(runs: Path, tiny_checkpoint: Path) -> None:
    """Not what lies in the folder when it is saved."""
    base = {"vocabulary": read_settings(tiny_checkpoint).fingerprint, "lm": lm_fingerprint(tiny_checkpoint / "lm")}
    told = read_adapter(runs / "lora" / "adapter")
    assert (told.fingerprint, told.lm_fingerprint) == (base["vocabulary"], base["lm"])
    state = runs / "lora" / "state" / "step-5" / "mp_rank_00_model_states.pt"
    client = torch.load(state, weights_only=False)
    assert client["base"] == base
    trainer = FineTrainer.__new__(FineTrainer)
    trainer.own = Finetuning.model_construct(model=tiny_checkpoint, out=runs / "lora")
    trainer.base = base | {"lm": "0" * 16}
    with pytest.raises(InputError) as error:
        trainer.restore(client)
    assert str(error.value) == (
        f"model: {tiny_checkpoint} does not hold the weights and vocabulary that {runs / 'lora'} began with: put them "
        "back, or set another 'out'"
    )


def run_here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], config: Path) -> str:
    """The command in this process, for errors before anything is started; its last line on standard error."""
    monkeypatch.setattr(sys, "argv", ["finetune.py", "--config", str(config)])
    variables = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "", "MASTER_PORT": ""}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)  # else the command sets them, and they stay
    with pytest.raises(SystemExit) as stop:
        finetune.main()
    assert stop.value.code == 2
    written = capsys.readouterr().err
    assert "Traceback" not in written
    return written.splitlines()[-1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "nowhere"}, "nowhere: not a checkpoint folder"),
        ({"n_q": 2}, "bad.yaml: n_q: Extra inputs are not permitted"),
        ({"tasks": {"sing": 1}}, "unknown task 'sing'"),
        ({"tasks": {"diarize": 1}}, "tasks: diarize: the vocabulary of MODEL has no marks of times: leave such tasks"),
        ({"tasks": {"emotion": 1}}, "tasks: no utterance of DATA/own has an answer for emotion"),
        ({"corpora": {"nowhere": 1}}, "nowhere: not an encoded corpus; make it with python -m train.encode"),
        ({"corpora": {"nowhere.jsonl": 1}}, "nowhere.jsonl: no such manifest"),
        ({"corpora": {"DATA/long": 1}}, "DATA/long: 1 of 16 train utterances are longer than the 8 s that MODEL was"),
        ({"dev_corpora": ["DATA/mine/train.jsonl"]}, "train.jsonl: holds no dev utterance: split some off"),
        ({"dev_corpora": ["DATA/older"]}, "DATA/older: another dev corpus is called older too"),
        ({"replay": {"corpora": {"DATA/own": 1}}}, "DATA/own in replay.corpora is the same corpus as DATA/own in corp"),
        ({"replay": {"share": 0.1}}, "replay: corpora: there are none to take examples from: name some"),
        ({"replay": {"corpora": {"nowhere": 1}}}, "nowhere: not an encoded corpus"),
        ({"replay": {"share": 1, "corpora": {"DATA/older": 1}}}, "replay.share: Input should be less than 1"),
        (
            {"replay": {"corpora": {"DATA/older": 1}, "tasks": {"translate_fr": 1}}},
            "replay.tasks: no utterance of DATA/older has an answer for translate_fr",
        ),
        ({"lora": None}, "lora: nothing is given: leave it out, or write {} for the defaults"),
        ({"lora": {"rank": 0}}, "lora.rank: Input should be greater than or equal to 1"),
        ({"lora": {"target_modules": ["nothing"]}}, "lora: Target modules"),
        ({"lora": {"target_parameters": ["nothing"], "dropout": 0.1}}, "dropout: PEFT has none for target_parameters"),
        ({"lora": {}, "expert_parallel": 2, "zero_stage": 1}, "lora: DeepSpeed spreads only experts that are trained"),
    ],
)
def test_bad_settings_are_told_in_one_line(
    change: dict[str, Any], message: str, settings: dict[str, Any], data: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    changes = json.loads(json.dumps(change).replace("DATA", str(data)))
    config = write_yaml(tmp_path / "bad.yaml", settings | {"out": tmp_path / "run"} | changes)
    error = run_here(monkeypatch, capsys, config)
    assert error.startswith("error: ")
    assert message.replace("DATA", str(data)).replace("MODEL", str(settings["model"])) in error


def test_clips_that_are_too_long_can_be_left_out(
    settings: dict[str, Any], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = Finetuning.model_validate(settings | {"out": tmp_path, "leave_out_longer": True})
    OwnData(config, read_settings(config.model), 0).check_lengths(data / "long", "train", "")
    told = f"{data}/long: 1 of 16 train utterances are longer than the 8 s that {config.model} was trained on"
    assert capsys.readouterr().out == f"{told}, the longest 8.5 s: left out\n"


def test_tasks_that_the_replay_has_no_answers_for_are_left_out_where_none_is_named(
    settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pool = Pool(np.array([0]), np.array([9.0]), np.array([4.0]))
    trainer: Any = SimpleNamespace(
        mixture=SimpleNamespace(pools={"transcribe": {"older": pool}}), world=1, rank=0,
        own=Finetuning.model_validate(settings | {"out": tmp_path}),
    )  # fmt: skip
    tasks = {"transcribe": 1.0, "emotion": 1.0}
    schedule = FineTrainer.part(trainer, "replay.tasks", tasks, {Path("older"): 1.0}, all_needed=False)
    assert schedule.shares(0) == {"transcribe": 1.0}
    told = "replay.tasks: no utterance of older has an answer for emotion"
    assert capsys.readouterr().out == f"{told}: left out\n"
    for all_needed, asked in ((True, tasks), (False, {"emotion": 1.0})):
        with pytest.raises(InputError, match=f"{told}: name the tasks that have one"):
            FineTrainer.part(trainer, "replay.tasks", asked, {Path("older"): 1.0}, all_needed)


def test_long_clips_of_the_replay_are_counted(
    settings: dict[str, Any], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(own_data, "encode_corpus", lambda *_, **__: 0)
    replay = {"corpora": {data / "long": 1.0}, "tasks": {"transcribe": 1.0}}
    config = Finetuning.model_validate(settings | {"out": tmp_path, "replay": replay})
    OwnData(config, read_settings(config.model), 0).ready()
    assert f"{data}/long: 1 of 16 train utterances are longer than the 8 s" in capsys.readouterr().out


@pytest.mark.parametrize("message", ["holds a run already: add --resume to go on", "lora: Target modules"])
def test_refused_before_anything_is_encoded(
    message: str, settings: dict[str, Any], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    changes: dict[str, Any] = {"out": tmp_path / "run", "corpora": {str(data / "mine"): 1.0}}
    if message.startswith("lora"):
        changes["lora"] = {"target_modules": ["nothing"]}
    else:
        (tmp_path / "run" / "state").mkdir(parents=True)
    config = write_yaml(tmp_path / "bad.yaml", settings | changes)
    assert message in run_here(monkeypatch, capsys, config)
    assert not (tmp_path / "run" / "codes").exists()


def test_the_shipped_config_is_valid() -> None:
    text = (ROOT / "train" / "configs" / "finetune.yaml").read_text()
    config = Finetuning.model_validate(yaml.safe_load(text))
    assert config.lora and config.replay is None
    told = text[text.index("# replay:") : text.index("#   tasks:")].replace("\n# ", "\n").removeprefix("# ")
    assert Finetuning.model_validate(yaml.safe_load(text) | yaml.safe_load(told)).replay
