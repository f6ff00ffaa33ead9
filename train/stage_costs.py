"""What the stages of a release cost: wall clock, processor time, energy. ``stages.jsonl`` has a line for each start."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from speechllm.errors import InputError
from train.amounts import shown_time

POWERCAP = Path("/sys/class/powercap")
MEASURED = "RAPL counters of the processors, with whatever else ran on them"

Outcome = Literal["done", "interrupted", "failed"]


@dataclass(frozen=True)
class Cost:
    """One start of a stage, to its end or interruption.

    key: of what the stage was to do; starts that took up one another have the same. cpu_seconds: of all its processes.
    energy: where ``joules`` are from.
    """

    stage: str
    key: str
    outcome: Outcome
    seconds: float
    cpu_seconds: float
    joules: float
    energy: str

    def __str__(self) -> str:
        energy = f"{self.joules / 3600:.1f} Wh"
        return f"{shown_time(self.seconds)}, {shown_time(self.cpu_seconds)} of processor time, {energy}"


class Rapl:
    """Energy counters of the processors, where this user may read them (``readable``)."""

    def __init__(self, folder: Path = POWERCAP):
        self._ranges: dict[Path, int] = {}
        self._last: dict[Path, int] = {}
        self.joules = 0.0
        for zone in sorted(folder.glob("intel-rapl:*")):  # AMD's too; those below a package have a second colon
            try:
                if zone.name.count(":") == 1 and (zone / "name").read_text(encoding="ascii").startswith("package"):
                    self._last[zone / "energy_uj"] = _number(zone / "energy_uj")
                    self._ranges[zone / "energy_uj"] = _number(zone / "max_energy_range_uj")
            except OSError:
                continue
        self.readable = bool(self._ranges) and self._ranges.keys() == self._last.keys()

    def sample(self) -> None:
        """Add what was used since the last time; to be called before a counter can go round, every few minutes."""
        for path, highest in self._ranges.items():
            now = _number(path)
            self.joules += (now - self._last[path]) % highest / 1e6
            self._last[path] = now


def _number(path: Path) -> int:
    return int(path.read_text(encoding="ascii"))


def estimated(watts_per_core: float) -> str:
    """How energy is told that follows from processor time."""
    return f"an estimate, processor time × {watts_per_core:g} W a core"


def add_cost(path: Path, cost: Cost) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(cost)) + "\n")


def read_costs(path: Path) -> list[Cost]:
    """All starts. Raises InputError when the file is missing or damaged."""
    try:
        return [Cost(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); python -m train.release writes it") from error
    except (ValueError, TypeError) as error:
        raise InputError(f"{path}: not what python -m train.release writes ({error})") from error


def of_stages(costs: Iterable[Cost]) -> list[Cost]:
    """Each stage as it was done last, with all the starts that this took; in the order of their first start."""
    found: dict[str, Cost] = {}
    for cost in costs:
        earlier = found.get(cost.stage)
        goes_on = earlier is not None and earlier.key == cost.key and earlier.outcome != "done"
        found[cost.stage] = together([earlier, cost]) if goes_on and earlier else cost
    return list(found.values())


def together(costs: Sequence[Cost]) -> Cost:
    """Their sum, called as the last; none may be missing."""
    last = costs[-1]
    return Cost(
        last.stage,
        last.key,
        last.outcome,
        sum(cost.seconds for cost in costs),
        sum(cost.cpu_seconds for cost in costs),
        sum(cost.joules for cost in costs),
        "; ".join(dict.fromkeys(cost.energy for cost in costs)),
    )


def cost_table(costs: Sequence[Cost]) -> str:
    """Markdown: a row for each stage, and their sum."""
    rows = [(cost.stage if cost.outcome == "done" else f"{cost.stage} ({cost.outcome})", cost) for cost in costs]
    if costs:
        rows.append(("in all", together(costs)))
    lines = ["| stage | wall clock | processor time | energy, Wh |", "| --- | --- | --- | --- |"]
    for name, cost in rows:
        times = f"{shown_time(cost.seconds)} | {shown_time(cost.cpu_seconds)}"
        lines.append(f"| {name} | {times} | {cost.joules / 3600:.1f} |")
    return "\n".join(lines) + "\n"
