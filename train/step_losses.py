"""What a step cost, brought from the device to the host at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, distributed


@dataclass(frozen=True, eq=False)
class StepLosses:
    """Losses of the micro batches of a step.

    scalars: those of :class:`Objective` that are one number, of each micro batch of this rank. tasks: float64
    [micro batches, 3, tasks], of this rank: for :meth:`Balance.logged`. everywhere: float64 [2, tasks], of all micro
    batches of all ranks: for :meth:`Balance.observe`. finite: whether all losses of all ranks are numbers.
    """

    scalars: list[dict[str, float]]
    tasks: Tensor
    everywhere: Tensor
    finite: bool

    @classmethod
    @torch.no_grad()
    def fetch(cls, losses: Sequence[Mapping[str, Tensor]]) -> StepLosses:
        """``losses`` are those of each micro batch of this rank, with ``loss`` and ``tasks``. All ranks must ask.

        They tell one another in one go, and a device is waited for but once.
        """
        names = [name for name, value in losses[0].items() if not value.ndim]
        scalars = torch.stack([torch.stack([one[name].double() for name in names]) for one in losses])
        tasks = torch.stack([one["tasks"].double() for one in losses])  # [micro batches, 3, tasks]
        bad = (~scalars[:, names.index("loss")].isfinite()).sum(0, keepdim=True)
        shared = torch.cat([bad.double(), tasks[:, :2].sum(0).flatten()])
        if distributed.is_initialized():
            distributed.all_reduce(shared)
        told = torch.cat([shared, scalars.flatten(), tasks.flatten()]).cpu()
        shared, own, rest = told.split([shared.numel(), scalars.numel(), tasks.numel()])
        return cls(
            [dict(zip(names, row, strict=True)) for row in own.view(scalars.shape).tolist()],
            rest.view(tasks.shape),
            shared[1:].view(2, -1),
            not shared[0],
        )
