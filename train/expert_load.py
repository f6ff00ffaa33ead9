"""Which experts see what: choices of the router counted while training, by layer, task and modality."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import torch
from torch import Tensor, distributed

from speechllm.data.mixture import TrainingBatch
from speechllm.prompt import IGNORE_INDEX
from speechllm.vocabulary import Vocabulary

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

MODALITIES = ("audio", "instruction", "answer")
UNUSED = 0.1  # of its even share: an expert that gets less is not used


def count_choices(
    router_logits: Sequence[Tensor], top_k: int, batch: TrainingBatch, tasks: Sequence[str], vocabulary: Vocabulary
) -> Tensor:
    """How often each expert was chosen, int64 [layers, tasks, modalities, experts]; padding does not count.

    Audio is the codes and the marks of time among them, answer what the loss is on; the rest, control ids too, is
    instruction. Audio that several questions share counts for the first of them. router_logits: of each layer with
    experts, [B · seq, experts].
    """
    # positions are weighed, not picked: how many are picked is something that a GPU would have to be waited for
    device = batch.example_ids.device
    numbers = torch.tensor([tasks.index(task) for task in batch.tasks], device=device)  # [examples]
    modality = torch.where(batch.audio_mask & (batch.lm.input_ids != vocabulary.audio_end), 0, 1)
    modality = modality.masked_fill(batch.lm.labels != IGNORE_INDEX, 2)
    group = numbers[batch.example_ids.clamp_min(0)] * len(MODALITIES) + modality  # [B, seq]
    chosen = torch.stack([logits.topk(top_k).indices for logits in router_logits])  # [layers, B · seq, top_k]
    shape = (len(router_logits), len(tasks), len(MODALITIES), router_logits[0].shape[-1])
    layer = torch.arange(shape[0], device=device)[:, None, None] * shape[1] * shape[2]
    places = (layer + group.flatten()[:, None]) * shape[3] + chosen
    kept = (batch.example_ids >= 0).long().flatten()[:, None].expand_as(places)
    counts = torch.zeros(math.prod(shape), dtype=torch.int64, device=device)
    return counts.scatter_add_(0, places.flatten(), kept.flatten()).view(shape)


class ExpertLoad:
    """Sums what :func:`count_choices` gives on this rank. :meth:`read` and :meth:`write` are over all ranks, which
    must all call them. A dense model adds nothing, and has nothing to read or write.
    """

    def __init__(self, tasks: Sequence[str]):
        self.tasks = tuple(tasks)
        self._counts: Tensor | None = None  # [layers, tasks, modalities, experts], since the start
        self._at_reading: Tensor
        self._at_saves: tuple[tuple[int, Tensor], tuple[int, Tensor]]  # the last two: steps done, counts
        self._written: tuple[Tensor, str] | None = None  # on the first rank: counts, and of which steps they are

    def add(self, step: int, counts: Tensor) -> None:
        """Counts ``[layers, tasks, modalities, experts]`` of a micro batch of the step after ``step`` others."""
        if self._counts is None:
            self._counts = torch.zeros_like(counts)
            self._at_reading = self._counts.clone()
            self._at_saves = ((step, self._at_reading), (step, self._at_reading))
        self._counts += counts

    def read(self) -> dict[str, float]:
        """Since the last reading: ``busiest_expert`` and ``idlest_expert``, the largest and the smallest share that an
        expert got of the choices of its layer; and ``unused_experts``, those of all layers that got less than a tenth
        of an even share of theirs.
        """
        if self._counts is None:
            return {}
        load = summed(self._counts - self._at_reading).sum((1, 2)).double()  # [layers, experts]
        self._at_reading = self._counts.clone()
        shares = load / load.sum(1, keepdim=True)
        return {
            "busiest_expert": shares.max().item(),
            "idlest_expert": shares.min().item(),
            "unused_experts": int((load < UNUSED * load.mean(1, keepdim=True)).sum()),
        }

    def write(self, out: Path, step: int) -> None:
        """``experts.json``, at a save after ``step`` steps: counts since the save before the last.

        So they are of one to two save intervals, though a run may end shortly after a save.
        """
        if self._counts is None:
            return
        (since, earlier), last = self._at_saves
        self._at_saves = (last, (step, self._counts.clone()))
        counts = summed(self._counts - earlier)
        if distributed.is_initialized() and distributed.get_rank():
            return
        self._written = counts, f"steps {since + 1} to {step}"
        found = {
            "steps": [since + 1, step],
            "modalities": {name: counts[:, :, n].sum(1).tolist() for n, name in enumerate(MODALITIES)},
            "tasks": {name: counts[:, n].sum(1).tolist() for n, name in enumerate(self.tasks)},
        }
        (out / "experts.json").write_text(json.dumps(found) + "\n", encoding="utf-8")

    def plot(self, out: Path) -> None:
        """``experts.png``, of what :meth:`write` wrote last: drawing takes longer than saving a small model."""
        if self._written is not None:
            counts, steps = self._written
            plot_load(counts, self.tasks, steps, out / "experts.png")


def summed(counts: Tensor) -> Tensor:
    """Over all ranks, on the CPU. counts: of this rank, changed in place."""
    if distributed.is_initialized():
        distributed.all_reduce(counts)
    return counts.cpu()


def divergence(counts: Tensor) -> Tensor:
    """Bits [groups, layers] by which the experts of a group differ from those of all groups together (KL divergence).

    counts: int64 [layers, groups, experts]; no group is without any.
    """
    own = counts.double() / counts.sum(-1, keepdim=True)
    together = counts.sum(1, keepdim=True).double()
    bits = torch.xlogy(own, own) - torch.xlogy(own, together / together.sum(-1, keepdim=True))
    return bits.sum(-1).T / math.log(2)


def plot_load(counts: Tensor, tasks: Sequence[str], title: str, out: Path) -> None:
    """Heat maps of ``counts [layers, tasks, modalities, experts]``: the load of each layer's experts, by all ids and by
    those of each modality; and how far the experts of each task are from those of all."""
    layers, _, _, experts = counts.shape
    by_modality = counts.sum(1)  # [layers, modalities, experts]
    loads = {"all ids": by_modality.sum(1)} | {name: by_modality[:, n] for n, name in enumerate(MODALITIES)}
    present = [n for n in range(len(tasks)) if counts[:, n].any()]
    tall, flat = 0.22 * len(present) + 1.2, max(2.0, 0.22 * layers + 1.2)  # inches
    wide = max(2.4, min(6.0, 0.22 * experts + 0.8))
    figure = plt.figure(figsize=(4 * wide + 1, flat + tall), layout="constrained")
    grid = figure.add_gridspec(2, len(loads), height_ratios=(flat, tall))
    axes = [figure.add_subplot(grid[0, n]) for n in range(len(loads))]
    for axis, (name, load) in zip(axes, loads.items(), strict=True):
        even = load.sum(1, keepdim=True).clamp_min(1) / experts
        picture = axis.imshow(
            (load / even).numpy(), cmap="RdBu_r", vmin=0, vmax=2, aspect="auto", interpolation="nearest"
        )
        axis.set(title=name, xlabel="expert", ylabel="layer")
        _whole_numbers(axis, layers, experts)
    figure.colorbar(picture, ax=axes, label="times its even share", extend="max")
    axis = figure.add_subplot(grid[1, :])
    by_task = counts.sum(2)[:, present]  # [layers, tasks, experts]
    picture = axis.imshow(divergence(by_task).numpy(), cmap="viridis", vmin=0, aspect="auto", interpolation="nearest")
    axis.set(title="experts of a task against those of all tasks", xlabel="layer")
    _whole_numbers(axis, 0, layers)
    axis.set_yticks(range(len(present)), [tasks[n] for n in present])
    figure.colorbar(picture, ax=axis, label="KL divergence, bits")
    figure.suptitle(title)
    figure.savefig(out, dpi=110)
    plt.close(figure)


def _whole_numbers(axis: Axes, rows: int, columns: int) -> None:
    """At most nine ticks each way."""
    axis.set_xticks(range(0, columns, -(-columns // 9)))
    if rows:
        axis.set_yticks(range(0, rows, -(-rows // 9)))
