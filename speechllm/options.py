"""How an answer is generated: what a caller may ask for, checked when it is asked."""

from __future__ import annotations

from dataclasses import dataclass

from speechllm.errors import InputError


@dataclass(frozen=True)
class Options:
    """Settings of one answer; the same for all pieces of a recording.

    temperature: 0 takes the likeliest id each time; above, ids are drawn from the distribution sharpened by it.
    top_p: only from the likeliest ids that together have this probability (Holtzman et al. 2020).
    seed: of the draws; the same seed draws the same answer.
    beams: hypotheses kept side by side (beam search); 1 keeps one.
    max_tokens: longest answer about one piece of audio, in ids; None for the checkpoint's.
    timeout: seconds from asking to the last id; what is there by then is the answer. None for no limit.
    min_confidence: an answer of less confidence is withheld.
    labels: the answers there are; empty for those of the task, if it has any.
    task: whose grammar answers keep to, by its name, whatever the words of the instruction; None where they decide.

    Raises InputError, naming the setting, for values out of range or at odds with one another.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    beams: int = 1
    max_tokens: int | None = None
    timeout: float | None = None
    min_confidence: float = 0.0
    labels: tuple[str, ...] = ()
    task: str | None = None

    MAX_BEAMS = 16
    MAX_TEMPERATURE = 2.0
    MAX_LABELS = 10_000  # characters

    def __post_init__(self) -> None:
        for name, fits, wanted in (
            ("temperature", 0 <= self.temperature <= self.MAX_TEMPERATURE, f"from 0 to {self.MAX_TEMPERATURE:g}"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("seed", 0 <= self.seed < 2**63, "from 0 to 2^63 - 1"),
            ("beams", 1 <= self.beams <= self.MAX_BEAMS, f"from 1 to {self.MAX_BEAMS}"),
            ("max_tokens", self.max_tokens is None or self.max_tokens >= 1, "1 or more"),
            ("timeout", self.timeout is None or self.timeout > 0, "above 0"),
            ("min_confidence", 0 <= self.min_confidence <= 1, "from 0 to 1"),
            ("labels", self._are_labels(), f"names, each once, of at most {self.MAX_LABELS} characters in all"),
        ):
            if not fits:
                raise InputError(f"{name} must be {wanted}, not {getattr(self, name)!r}")
        if self.beams > 1 and self.temperature > 0:
            raise InputError("beams keeps the likeliest and temperature draws at random: give one of them")
        if self.beams > 1 and self.top_p < 1:
            raise InputError("top_p limits random draws, and beams makes none: give one of them")

        if self.task is not None:
            from speechllm.tasks import TASKS  # with numpy, for which a command's --help does not wait

            if self.task not in TASKS:
                raise InputError(f"task must be one of {', '.join(TASKS)}, not {self.task!r}")
        if self.task and self.labels:
            raise InputError("labels say what the answers are, and so does task: give one of them")

    def _are_labels(self) -> bool:
        names = [" ".join(label.split()) for label in self.labels]
        return all(names) and len(set(names)) == len(names) and sum(map(len, names)) <= self.MAX_LABELS


GREEDY = Options()
