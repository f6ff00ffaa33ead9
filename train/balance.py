"""How the losses of a batch's tasks become one: as they are mixed, or weighed against one another.

Parts of the loss that belong to no task (router, audio, CTC) are added to it as they are, whatever the method.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from speechllm.errors import InputError
from train.config import Settings


class PlainSettings(Settings):
    """``none``: the plain mixture."""

    method: Literal["none"] = "none"


class FixedSettings(Settings):
    """See :class:`Fixed`."""

    method: Literal["fixed"]
    weights: dict[str, Annotated[float, Field(gt=0, allow_inf_nan=False)]] = Field(
        min_length=1, description="task name: weight of its loss; 1 for the others"
    )


class UncertaintySettings(Settings):
    """See :class:`Uncertainty`."""

    method: Literal["uncertainty"]


class DwaSettings(Settings):
    """See :class:`Dwa`."""

    method: Literal["dwa"]
    temperature: float = Field(2.0, gt=0, allow_inf_nan=False, description="T: the higher, the more alike the weights")
    interval: int = Field(500, ge=1, description="steps over which losses are averaged")


class PcGradSettings(Settings):
    """See :class:`PcGrad`."""

    method: Literal["pcgrad"]


BalanceSettings = Annotated[
    PlainSettings | FixedSettings | UncertaintySettings | DwaSettings | PcGradSettings, Field(discriminator="method")
]


@dataclass(frozen=True, eq=False)
class TaskLosses:
    """What the answers of a batch cost.

    mean: float []: per answer id, whatever its task. sums: float [tasks]: of each task's answer ids; 0 for a task that
    is not in the batch. counts: float [tasks]: these ids.
    """

    mean: Tensor
    sums: Tensor
    counts: Tensor

    @classmethod
    def of(cls, log_probs: Tensor, target: Tensor, task: Tensor, tasks: int) -> TaskLosses:
        """From ``log_probs [ids, vocabulary]`` of answer ids ``target [ids]`` and the number of each one's task."""
        member = F.one_hot(task, tasks).to(log_probs)  # [ids, tasks]
        sums = F.nll_loss(log_probs, target, reduction="none") @ member
        return cls(F.nll_loss(log_probs, target), sums, member.sum(0))

    @property
    def means(self) -> Tensor:
        """Float [tasks]: loss per answer id of each task."""
        return self.sums / self.counts.clamp_min(1)

    @property
    def shares(self) -> Tensor:
        """Float [tasks], their sum is 1: of the batch's answer ids. The mean of all is ``sum(shares * means)``."""
        return self.counts / self.counts.sum()


class Balance(nn.Module):
    """The plain mixture: the answer ids of a micro batch count alike, so that a task counts as many as it has there.

    Micro batches count alike too, of however many answer ids they are.
    """

    def __init__(self, tasks: Sequence[str]):
        super().__init__()
        self.tasks = tuple(tasks)

    def forward(self, losses: TaskLosses, trained: Sequence[nn.Parameter]) -> tuple[Tensor, Tensor]:
        """The loss to minimise, [], and the weight that each task's share of it got, [tasks].

        trained: the parameters that the answers teach.
        """
        return losses.mean, torch.ones_like(losses.sums)

    def logged(self, told: Tensor) -> dict[str, float]:
        """What is to be logged of a micro batch.

        told: [3, tasks]: sums and counts of :class:`TaskLosses`, and the weights.
        """
        return {f"answer_{task}": total / ids for task, total, ids, _ in self._present(told)}

    def observe(self, everywhere: Tensor) -> None:
        """After each step: sums and counts of :class:`TaskLosses`, of all batches of all ranks, float64 [2, tasks]."""

    def _present(self, told: Tensor) -> list[tuple[str, float, float, float]]:
        """Task, sum, count and weight of each task in the batch."""
        return [(task, *row) for task, row in zip(self.tasks, told.T.tolist(), strict=True) if row[1]]

    def state(self) -> dict[str, Any]:
        """What :meth:`restore` needs beside the parameters, ready for JSON; the same on all ranks."""
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on where the run that gave ``state`` was. Raises InputError for the state of another method or tasks."""
        own = self.state()
        if state.keys() != own.keys():
            raise InputError("balance: the saved state is of another method: keep the method, or set another 'out'")
        if state.get("tasks") != own.get("tasks"):
            older = ", ".join(state["tasks"])
            raise InputError(f"tasks: the saved balance is of {older}, in this order: keep them, or set another 'out'")


class Weighted(Balance, ABC):
    """Σ weight · share · mean over the tasks; what the weights are is left to the methods."""

    def forward(self, losses: TaskLosses, trained: Sequence[nn.Parameter]) -> tuple[Tensor, Tensor]:
        weights = self.weights(losses, trained)
        return (weights * losses.shares * losses.means).sum(), weights.detach()

    @abstractmethod
    def weights(self, losses: TaskLosses, trained: Sequence[nn.Parameter]) -> Tensor:
        """Float [tasks]; those of tasks that are not in the batch do not matter."""

    def logged(self, told: Tensor) -> dict[str, float]:
        return super().logged(told) | {f"weight_{task}": weight for task, *_, weight in self._present(told)}


class Fixed(Weighted):
    """A weight for each task, 1 for those not named."""

    def __init__(self, tasks: Sequence[str], weights: Mapping[str, float]):
        super().__init__(tasks)
        self._weights = [weights.get(task, 1.0) for task in self.tasks]

    def weights(self, losses: TaskLosses, trained: Sequence[nn.Parameter]) -> Tensor:
        return torch.tensor(self._weights, device=losses.sums.device)


class Uncertainty(Weighted):
    """Homoscedastic uncertainty (Kendall et al. 2018, eq. 10, for classification: every answer id is one).

    A task's loss L becomes exp(-s) · L + s / 2 with its log-variance s = log σ², which is trained with the rest and
    weight-decayed like it; s begins at 0, which is the plain mixture, and is at rest where exp(-s) = 1 / (2 L).
    """

    def __init__(self, tasks: Sequence[str]):
        super().__init__(tasks)
        self.log_variances = nn.Parameter(torch.zeros(len(self.tasks)))

    def forward(self, losses: TaskLosses, trained: Sequence[nn.Parameter]) -> tuple[Tensor, Tensor]:
        loss, weights = super().forward(losses, trained)
        return loss + (losses.shares * self.log_variances.float() / 2).sum(), weights

    def weights(self, losses: TaskLosses, trained: Sequence[nn.Parameter]) -> Tensor:
        return torch.exp(-self.log_variances.float())

    def state(self) -> dict[str, Any]:
        return {"tasks": list(self.tasks)}


class Dwa(Weighted):
    """Dynamic weight average (Liu et al. 2019, eq. 7): the slower a task's loss falls, the more it weighs.

    weight_t = K · exp(r_t / T) / Σ exp(r_i / T), K tasks; r_t is the mean loss per answer id of all ranks in the last
    ``interval`` steps by that in the interval before. r_t = 1 where one of the two is not known: for every task
    in the first two intervals, and for one that was not drawn, or cost nothing.
    """

    def __init__(self, tasks: Sequence[str], temperature: float, interval: int):
        super().__init__(tasks)
        self.temperature, self.interval = temperature, interval
        # not buffers: an engine that computes in bfloat16 would round them
        self._weights = torch.ones(len(self.tasks), dtype=torch.float64)
        self._last, self._running = (torch.zeros(2, len(self.tasks), dtype=torch.float64) for _ in range(2))
        self._observed = 0  # steps in the running interval

    def weights(self, losses: TaskLosses, trained: Sequence[nn.Parameter]) -> Tensor:
        return self._weights.to(losses.sums)

    def observe(self, everywhere: Tensor) -> None:
        self._running += everywhere
        self._observed += 1
        if self._observed == self.interval:
            (total, count), (total_before, count_before) = self._running, self._last
            known = (count > 0) & (total_before > 0)
            ratio = torch.where(known, (total / count) / (total_before / count_before), 1.0)
            self._weights = len(self.tasks) * torch.softmax(ratio / self.temperature, 0)
            self._last, self._running, self._observed = self._running, torch.zeros_like(self._running), 0

    def state(self) -> dict[str, Any]:
        tensors = {"weights": self._weights, "last": self._last, "running": self._running}
        lists = {name: tensor.tolist() for name, tensor in tensors.items()}
        return lists | {"tasks": list(self.tasks), "observed": self._observed}

    def restore(self, state: Mapping[str, Any]) -> None:
        super().restore(state)
        self._weights, self._last, self._running = (
            torch.tensor(state[name], dtype=torch.float64) for name in ("weights", "last", "running")
        )
        self._observed = state["observed"]


class PcGrad(Weighted):
    """Projecting conflicting gradients (Yu et al. 2020, algorithm 1).

    The gradient of each task's share · mean is projected onto the normal plane of each other task's original gradient
    that it conflicts with, the others in random order; the update is the sum. That sum is a combination of the original
    gradients, so the method comes down to a weight for each task: the one backward pass that follows gives exactly the
    projected gradient to what reduces, clips and applies it.

    Conflicts are sought within the micro batch of a process, as if it were the whole batch; what several of them come
    to is averaged as ever. Costs a backward pass, and memory for one copy of the gradients, for each task in the batch;
    nothing where there is but one.
    """

    def __init__(self, tasks: Sequence[str], seed: int):
        super().__init__(tasks)
        self._seed, self._batch = seed, 0

    def weights(self, losses: TaskLosses, trained: Sequence[nn.Parameter]) -> Tensor:
        rng = Random(f"{self._seed} order of tasks, batch {self._batch}")
        self._batch += 1
        weights = torch.ones_like(losses.sums)
        present = [n for n, ids in enumerate(losses.counts.tolist()) if ids]
        if len(present) > 1:
            parts = losses.shares * losses.means
            gradients = [torch.autograd.grad(parts[n], trained, retain_graph=True, allow_unused=True) for n in present]
            places = range(len(present))
            orders = [rng.sample([other for other in places if other != own], len(places) - 1) for own in places]
            weights[present] = projected(inner_products(gradients), orders).to(weights)
        return weights

    def state(self) -> dict[str, Any]:
        return {"batch": self._batch}

    def restore(self, state: Mapping[str, Any]) -> None:
        super().restore(state)
        self._batch = state["batch"]


def inner_products(gradients: Sequence[Sequence[Tensor | None]]) -> Tensor:
    """Float64 [n, n] of n gradients, each given parameter by parameter; None is 0."""
    products = torch.zeros(len(gradients), len(gradients), dtype=torch.float64)
    for one, first in enumerate(gradients):
        for other, second in enumerate(gradients[: one + 1]):
            pairs = [(a, b) for a, b in zip(first, second, strict=True) if a is not None and b is not None]
            terms = [(a.float() * b.float()).sum(dtype=torch.float64) for a, b in pairs]
            products[one, other] = products[other, one] = sum(terms)
    return products


def projected(products: Tensor, orders: Sequence[Sequence[int]]) -> Tensor:
    """The sum of the projected gradients as weights of the original ones, float64 [n].

    products: their inner products, float64 [n, n]. orders: for each gradient the others, in the order of projection.
    """
    combinations = torch.eye(len(products), dtype=torch.float64)  # [n, n], in each row a gradient, of the original ones
    for combination, order in zip(combinations, orders, strict=True):
        for other in order:
            product = combination @ products[:, other]
            if product < 0 < products[other, other]:
                combination[other] -= product / products[other, other]
    return combinations.sum(0)


def make_balance(settings: BalanceSettings, tasks: Sequence[str], seed: int) -> Balance:
    """What the settings ask for."""
    match settings:
        case FixedSettings():
            return Fixed(tasks, settings.weights)
        case UncertaintySettings():
            return Uncertainty(tasks)
        case DwaSettings():
            return Dwa(tasks, settings.temperature, settings.interval)
        case PcGradSettings():
            return PcGrad(tasks, seed)
        case PlainSettings():
            return Balance(tasks)
