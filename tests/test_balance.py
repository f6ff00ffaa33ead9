"""Each way of weighing the tasks' losses: against numbers worked out by hand, and in the trainer, resumed too."""

import json
import math
import multiprocessing
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from conftest import run_program, write_yaml
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, distributed, nn

from speechllm.checkpoint import load_checkpoint
from speechllm.errors import InputError
from train.balance import (
    Balance,
    BalanceSettings,
    Dwa,
    Fixed,
    PcGrad,
    TaskLosses,
    Uncertainty,
    inner_products,
    make_balance,
    projected,
)
from train.log import read_metrics
from train.step_losses import StepLosses

NO_WEIGHTS: list[nn.Parameter] = []


def losses_of(means: list[float], counts: list[float]) -> TaskLosses:
    mean, count = torch.tensor(means), torch.tensor(counts)
    return TaskLosses((mean * count).sum() / count.sum(), mean * count, count)


def told(means: list[float], counts: list[float]) -> Tensor:
    """What a step tells ``observe``."""
    losses = losses_of(means, counts)
    return torch.stack([losses.sums, losses.counts]).double()


def test_losses_by_task() -> None:
    """Ids 0, 2 and 1 of a vocabulary of three, the first two of task 1 of three."""
    log_probs = torch.tensor([[0.5, 0.25, 0.25], [0.5, 0.375, 0.125], [0.125, 0.125, 0.75]]).log()
    losses = TaskLosses.of(log_probs, torch.tensor([0, 2, 1]), torch.tensor([1, 1, 0]), 3)
    assert losses.sums.tolist() == pytest.approx([3 * math.log(2), 4 * math.log(2), 0])
    assert losses.counts.tolist() == [1, 2, 0]
    assert losses.means.tolist() == pytest.approx([3 * math.log(2), 2 * math.log(2), 0])
    assert losses.shares.tolist() == pytest.approx([1 / 3, 2 / 3, 0])
    assert losses.mean.item() == pytest.approx(7 / 3 * math.log(2))
    assert (losses.shares * losses.means).sum().item() == pytest.approx(losses.mean.item())


def test_plain() -> None:
    losses = losses_of([2.0, 1.0, 0.0], [3.0, 1.0, 0.0])
    balance = Balance(["a", "b", "c"])
    loss, weights = balance(losses, NO_WEIGHTS)
    assert loss is losses.mean and loss.item() == 1.75
    assert balance.logged(torch.stack([losses.sums, losses.counts, weights])) == {"answer_a": 2.0, "answer_b": 1.0}
    assert not [*balance.parameters()]


def test_fixed() -> None:
    losses = losses_of([2.0, 1.0, 0.0], [3.0, 1.0, 0.0])
    balance = Fixed(["a", "b", "c"], {"b": 4.0})
    loss, weights = balance(losses, NO_WEIGHTS)
    assert loss.item() == 2.5  # 3/4 · 1 · 2 + 1/4 · 4 · 1
    assert weights.tolist() == [1, 4, 1]
    assert balance.logged(torch.stack([losses.sums, losses.counts, weights])) == {
        "answer_a": 2.0, "answer_b": 1.0, "weight_a": 1.0, "weight_b": 4.0,
    }  # fmt: skip


def test_uncertainty() -> None:
    losses = losses_of([2.0, 1.0, 0.0], [3.0, 1.0, 0.0])
    balance = Uncertainty(["a", "b", "c"])
    assert balance(losses, NO_WEIGHTS)[0].item() == 1.75, "the plain mixture to begin with"
    with torch.no_grad():
        balance.log_variances.copy_(torch.tensor([math.log(2), -1.0, 5.0]))
    loss, weights = balance(losses, NO_WEIGHTS)
    # 3/4 (2 / 2 + ln 2 / 2) + 1/4 (e · 1 - 1 / 2)
    assert loss.item() == pytest.approx(1.5645006, abs=1e-6)
    assert weights.tolist() == pytest.approx([0.5, 2.7182818, 0.0067379], abs=1e-6)
    loss.backward()
    # share · (1/2 - exp(-s) · mean): 3/4 (1/2 - 1), 1/4 (1/2 - e)
    gradient = balance.log_variances.grad
    assert gradient is not None
    assert gradient.tolist() == pytest.approx([-0.375, -0.5545705, 0], abs=1e-6)


# in two intervals of two steps: task a costs (3·4 + 1·8) / 4 = 5 and then 2.5 an id, b 2 and then 2; c comes late
STEPS = (
    ([4.0, 2.0, 0.0], [3.0, 1.0, 0.0]),
    ([8.0, 2.0, 0.0], [1.0, 5.0, 0.0]),
    ([2.0, 2.0, 9.0], [1.0, 1.0, 1.0]),
    ([3.0, 2.0, 0.0], [1.0, 1.0, 0.0]),
)
# 3 exp(r / 2) / (exp(0.25) + 2 exp(0.5)) for r = 1/2, 1, 1: 3 · 1.2840254 / 4.5814679 and 3 · 1.6487213 / 4.5814679
AFTER = [0.8407952, 1.0796024, 1.0796024]


def test_dwa() -> None:
    balance = Dwa(["a", "b", "c"], temperature=2.0, interval=2)
    losses = losses_of([2.0, 1.0, 0.0], [3.0, 1.0, 0.0])
    for step in STEPS:
        assert balance(losses, NO_WEIGHTS)[1].tolist() == [1, 1, 1]
        balance.observe(told(*step))
    loss, weights = balance(losses, NO_WEIGHTS)
    assert weights.tolist() == pytest.approx(AFTER, abs=1e-6)
    assert loss.item() == pytest.approx(1.5310934, abs=1e-6)  # 3/4 · 0.8407952 · 2 + 1/4 · 1.0796024 · 1
    logged = balance.logged(torch.stack([losses.sums, losses.counts, weights]))
    assert logged.keys() == {"answer_a", "answer_b", "weight_a", "weight_b"}
    assert logged["weight_a"] == pytest.approx(AFTER[0], abs=1e-6)

    assert balance(losses, NO_WEIGHTS)[1].tolist() == pytest.approx(AFTER, abs=1e-6), "until the interval is over"

    # a costs twice as much as in the interval before, b half as much; c cost nothing then, and so has no ratio
    balance = Dwa(["a", "b", "c"], temperature=1.0, interval=1)
    balance.observe(told([1.0, 1.0, 0.0], [1.0, 1.0, 1.0]))
    balance.observe(told([2.0, 0.5, 3.0], [1.0, 1.0, 1.0]))
    # 3 exp(r) / (exp(2) + exp(0.5) + exp(1)) for r = 2, 1/2, 1: the sum is 11.7560591
    weights = balance(losses, NO_WEIGHTS)[1]
    assert weights.tolist() == pytest.approx([1.8855953, 0.4207331, 0.6936716], abs=1e-6)


def test_dwa_goes_on_from_its_state() -> None:
    whole = Dwa(["a", "b", "c"], temperature=0.7, interval=3)
    rng = Random(0)
    steps = [([rng.uniform(0, 5) for _ in range(3)], [1.0 + rng.randrange(9) for _ in range(3)]) for _ in range(20)]
    ends = []
    for number, step in enumerate(steps):
        resumed = Dwa(["a", "b", "c"], temperature=0.7, interval=3)
        resumed.restore(json.loads(json.dumps(whole.state())))
        for later in steps[number:]:
            resumed.observe(told(*later))
        whole.observe(told(*step))
        ends.append(resumed.state())
    assert ends == [whole.state()] * 20
    assert ends[0]["weights"] != [1, 1, 1]


def run_dwa_rank(rank: int, folder: str) -> None:
    """Sees every second step's task alone: the first rank a, the second b; both hear of c."""
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    balance = Dwa(["a", "b", "c"], temperature=2.0, interval=2)
    for means, counts in STEPS:
        own = [float(count * (task in (rank, 2)) / (2 if task == 2 else 1)) for task, count in enumerate(counts)]
        losses = losses_of(means, own)
        tasks = torch.stack([losses.sums, losses.counts, torch.ones(3)])
        micro_batches = [{"loss": losses.mean, "tasks": tasks / 2}] * 2  # exact halves
        balance.observe(StepLosses.fetch(micro_batches).everywhere)
    Path(folder, f"{rank}.json").write_text(json.dumps(balance.state()))
    distributed.destroy_process_group()


def test_dwa_weighs_alike_on_all_ranks(tmp_path: Path) -> None:
    processes = [
        multiprocessing.get_context("spawn").Process(target=run_dwa_rank, args=(r, str(tmp_path))) for r in (0, 1)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
        assert process.exitcode == 0
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    assert first["weights"] == pytest.approx(AFTER, abs=1e-6)


def combined(vectors: list[list[float]], orders: list[list[int]]) -> list[float]:
    gradients = [[torch.tensor(vector)] for vector in vectors]
    weights = projected(inner_products(gradients), orders)
    return (weights @ torch.tensor(vectors, dtype=torch.float64)).tolist()


def test_two_gradients_are_projected_against_the_original_ones() -> None:
    """(1, 0) becomes (1/2, 1/2), and (-1, 1) becomes (0, 1): were the first's projection what it is projected against,
    it would stay as it is, and the sum would be (-1/2, 3/2)."""
    assert combined([[1, 0], [-1, 1]], [[1], [0]]) == pytest.approx([0.5, 1.5])
    assert combined([[1, 0], [1, 1]], [[1], [0]]) == [2, 1], "no conflict"
    assert combined([[1, 0], [0, 0]], [[1], [0]]) == [1, 0]
    assert combined([[1, 0], [-2, 0]], [[1], [0]]) == [0, 0], "nothing is left of opposites"


# x = (1, 0), y = (-1, 1), z = (-1, -2). x·y = x·z = y·z = -1; |y|² = 2, |z|² = 5
# x against y, then z:  (1/2, 1/2), whose product with z is -3/2: + 3/10 z = (1/5, -1/10)
# x against z, then y:  (4/5, -2/5), whose product with y is -6/5: + 3/5 y = (1/5, 1/5)
# y against x, then z:  (0, 1), whose product with z is -2: + 2/5 z = (-2/5, 1/5)
# y against z, then x:  (-6/5, 3/5), whose product with x is -6/5: (0, 3/5)
# z against x, then y:  (0, -2), whose product with y is -2: + y = (-1, -1)
# z against y, then x:  (-3/2, -3/2), whose product with x is -3/2: (0, -3/2)
PLANE = [[1.0, 0.0], [-1.0, 1.0], [-1.0, -2.0]]
PROJECTED = [
    {(1, 2): (0.2, -0.1), (2, 1): (0.2, 0.2)},
    {(0, 2): (-0.4, 0.2), (2, 0): (0.0, 0.6)},
    {(0, 1): (-1.0, -1.0), (1, 0): (0.0, -1.5)},
]


def test_three_gradients_are_projected_in_the_given_order() -> None:
    for x, at_x in PROJECTED[0].items():
        for y, at_y in PROJECTED[1].items():
            for z, at_z in PROJECTED[2].items():
                total = [sum(parts) for parts in zip(at_x, at_y, at_z, strict=True)]
                assert combined(PLANE, [[*x], [*y], [*z]]) == pytest.approx(total)


def test_inner_products_go_over_all_parameters() -> None:
    one, other = torch.tensor([1.0, 2.0]), torch.tensor([[3.0], [-1.0]])
    found = inner_products([[one, other, None], [one * 2, None, one], [None, other, None]])
    assert found.tolist() == [[15, 10, 10], [10, 25, 0], [10, 0, 10]]


def plane_losses(weight: nn.Parameter) -> TaskLosses:
    """Of four tasks, one of them absent; the gradients of share · mean are those of ``PLANE``."""
    sums = torch.stack([weight.new_zeros(()), *(6 * (torch.tensor(vector) * weight).sum() for vector in PLANE)])
    return TaskLosses(sums.sum() / 6, sums, torch.tensor([0.0, 3.0, 1.0, 2.0]))


def test_pcgrad_hands_on_the_projected_gradient() -> None:
    """In one of the eight ways in which three tasks may be ordered, and in each of them some time."""
    ways = {
        tuple(round(a + b + c, 4) for a, b, c in zip(x, y, z, strict=True))
        for x in PROJECTED[0].values()
        for y in PROJECTED[1].values()
        for z in PROJECTED[2].values()
    }
    assert len(ways) == 8
    weight, unused = nn.Parameter(torch.tensor([0.3, -0.2])), nn.Parameter(torch.ones(3))

    def gradients(balance: PcGrad, steps: int) -> list[tuple[float, ...]]:
        found = []
        for _ in range(steps):
            weight.grad = None
            loss, weights = balance(plane_losses(weight), [weight, unused])
            assert weight.grad is None, "left to the pass that follows"
            loss.backward()
            assert weight.grad is not None and weights[0] == 1
            found.append(tuple(round(value, 4) + 0.0 for value in weight.grad.tolist()))
        return found

    tasks = ["absent", "x", "y", "z"]
    first = PcGrad(tasks, 1)
    whole = gradients(first, 60)
    assert set(whole) == ways
    begun = PcGrad(tasks, 1)
    assert gradients(begun, 7) == whole[:7]
    resumed = PcGrad(tasks, 1)
    resumed.restore(json.loads(json.dumps(begun.state())))
    assert gradients(resumed, 53) == whole[7:]
    assert gradients(PcGrad(tasks, 2), 60) != whole


def test_pcgrad_of_one_task_is_the_plain_mixture() -> None:
    weight = nn.Parameter(torch.tensor([2.0]))
    losses = TaskLosses(weight.sum(), torch.stack([3 * weight.sum(), weight.new_zeros(())]), torch.tensor([3.0, 0.0]))
    loss, weights = PcGrad(["a", "b"], 0)(losses, [weight])
    assert loss.item() == 2 and weights.tolist() == [1, 1]


def test_the_state_of_another_method_is_refused() -> None:
    tasks = ["a", "b"]
    methods = [Balance(tasks), Dwa(tasks, 2.0, 5), PcGrad(tasks, 0)]
    for method in methods:
        method.restore(method.state())
        for other in methods:
            if other is not method:
                with pytest.raises(InputError, match="balance: the saved state is of another method"):
                    method.restore(other.state())


@pytest.mark.parametrize("method", [lambda tasks: Dwa(tasks, 2.0, 5), Uncertainty])
@pytest.mark.parametrize("changed", [["b", "a"], ["a", "c"], ["a", "b", "c"]])
def test_the_state_of_other_tasks_is_refused(method: Callable[[list[str]], Balance], changed: list[str]) -> None:
    saved = json.loads(json.dumps(method(["a", "b"]).state()))
    method(["a", "b"]).restore(saved)
    with pytest.raises(InputError, match="tasks: the saved balance is of a, b, in this order: keep them, or"):
        method(changed).restore(saved)


def test_settings_choose_the_method() -> None:
    def make(**settings: Any) -> Balance:
        return make_balance(TypeAdapter(BalanceSettings).validate_python(settings), ["a", "b"], 3)

    made = [
        make(method="none"),
        make(method="fixed", weights={"b": 2}),
        make(method="uncertainty"),
        make(method="dwa", temperature=3, interval=7),
        make(method="pcgrad"),
    ]
    assert [type(balance) for balance in made] == [Balance, Fixed, Uncertainty, Dwa, PcGrad]
    assert (made[3].temperature, made[3].interval) == (3, 7)
    for wrong in (
        {"method": "magic"},
        {"weights": {"b": 2}},
        {"method": "none", "weights": {"b": 2}},
        {"method": "fixed", "weights": {}},
        {"method": "fixed", "weights": {"b": 0}},
        {"method": "dwa", "interval": 0},
        {"method": "dwa", "temperature": 0},
    ):
        with pytest.raises(ValidationError):
            make(**wrong)


# Trains once to the end; where asked to, once more in another folder, stopped by a SIGTERM within step 5, and resumed.
RUNS = """
import os
import signal
import sys
from pathlib import Path

from train import pretrain
from train.config import read_config
from train.pretrain_config import Pretraining

train_step = pretrain.Trainer.train_step


def step_with_signal(trainer, step, batch):
    if step == 5:
        os.kill(os.getpid(), signal.SIGTERM)
    return train_step(trainer, step, batch)


pretrain.prepare_environment()
for argument in sys.argv[1:]:
    stopped = read_config(Path(argument), Pretraining)
    whole = stopped.model_copy(update={"out": stopped.out.with_name(stopped.out.name + "-whole")})
    assert pretrain.Trainer(whole, resume=False).run()
    if stopped.balance.method in ("uncertainty", "dwa", "pcgrad"):
        pretrain.Trainer.train_step = step_with_signal
        assert not pretrain.Trainer(stopped, resume=False).run()
        pretrain.Trainer.train_step = train_step
        assert pretrain.Trainer(stopped, resume=True).run()
"""
METHODS: dict[str, dict[str, Any]] = {
    "none": {},
    "fixed": {"weights": {"transcribe": 0.25, "translate_de": 2.0}},
    "uncertainty": {},
    "dwa": {"interval": 2, "temperature": 0.5},
    "pcgrad": {},
}
CLOCK = ("seconds", "tokens_per_second", "audio_hours_per_hour", "loader_tokens_per_second", "waiting")


@pytest.fixture(scope="module")
def runs(pretrain_settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of runs of eight steps: one of each method; of those with a state another, stopped and resumed."""
    folder = tmp_path_factory.mktemp("balanced")
    settings = pretrain_settings | {
        "curriculum": {}, "steps": 8, "log_every": 1, "evaluate_every": 8, "decode_examples": 1, "zero_stage": 1,
        "tasks": {"transcribe": 1, "translate_de": 1}, "batch_tokens": 500, "short_first": 0, "loader_workers": 0,
        "audio_weight": 0.1, "router_z_weight": 0.01,
    }  # fmt: skip
    configs = [
        write_yaml(folder / f"{name}.yaml", settings | {"out": folder / name, "balance": {"method": name} | others})
        for name, others in METHODS.items()
    ]
    result = run_program("python", "-c", RUNS, *configs)
    assert result.returncode == 0, result.stderr[-3000:]
    return folder


def records(out: Path) -> list[dict[str, float]]:
    return [{k: v for k, v in r.items() if k not in CLOCK} for r in read_metrics(out / "metrics.jsonl")]


def module_of(out: Path) -> dict[str, Tensor]:
    (state,) = (out / "state").glob("step-*/mp_rank_00_model_states.pt")
    module: dict[str, Tensor] = torch.load(state, weights_only=False)["module"]
    return module


def served(out: Path) -> dict[str, Tensor]:
    return load_checkpoint(out / "checkpoint").lm.state_dict()


@pytest.mark.parametrize("method", METHODS)
def test_the_trainer_logs_the_losses_of_tasks(runs: Path, method: str) -> None:
    found = [record for record in records(runs / f"{method}-whole") if "loss" in record]
    assert [record["step"] for record in found] == [*range(1, 9)]
    for task in ("transcribe", "translate_de"):
        assert sum(f"answer_{task}" in record for record in found) > 2
    both = 0
    for record in found:
        parts = [value for name, value in record.items() if name.startswith("answer_")]
        assert min(parts) - 1e-5 <= record["answer"] <= max(parts) + 1e-5
        both += len(parts) == 2 and parts[0] != parts[1]
        others = 0.01 * record["aux"] + 0.3 * record["ctc"] + 0.1 * record["audio"] + 0.01 * record["router_z"]
        weights = [value for name, value in record.items() if name.startswith("weight_")]
        assert len(weights) == (0 if method == "none" else len(parts))
        if set(weights) <= {1.0}:
            assert record["loss"] == pytest.approx(record["answer"] + others, rel=1e-6)
        elif len(parts) == 1 and method in ("fixed", "dwa"):
            assert record["loss"] == pytest.approx(weights[0] * parts[0] + others, abs=3e-5)
    assert both > 1, "batches of both tasks"


def test_methods_train_another_model_each(runs: Path) -> None:
    weights = {method: served(runs / f"{method}-whole") for method in METHODS}
    assert all(value.isfinite().all() for found in weights.values() for value in found.values())
    names = weights["none"].keys()
    assert all(found.keys() == names for found in weights.values()), "nothing of the balance is served"
    for method in ("fixed", "uncertainty", "dwa"):  # in so few steps there may be no conflict for pcgrad
        assert any(not torch.equal(weights["none"][name], weights[method][name]) for name in names), method


@pytest.mark.parametrize("method", ["uncertainty", "dwa", "pcgrad"])
def test_a_stopped_run_goes_on_exactly(runs: Path, method: str) -> None:
    whole, resumed = runs / f"{method}-whole", runs / method
    assert records(whole) == records(resumed)
    for states in ((served(whole), served(resumed)), (module_of(whole), module_of(resumed))):
        assert states[0].keys() == states[1].keys()
        assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    weights = [value for record in records(whole) for name, value in record.items() if name.startswith("weight_")]
    assert len({*weights}) > 2 or method == "pcgrad", "weights that change"


def test_log_variances_are_trained_and_saved(runs: Path) -> None:
    for out in ("uncertainty-whole", "uncertainty"):
        log_variances = module_of(runs / out)["balance.log_variances"]
        assert log_variances.shape == (2,) and (log_variances.abs() > 1e-4).all()
    assert "balance.log_variances" not in module_of(runs / "none-whole")
