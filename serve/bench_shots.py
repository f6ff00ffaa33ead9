"""What shots cost: ids, memory and time against their number, when they are new and when they have been seen."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from serve.answerer import Answerer
from serve.bench_runs import INSTRUCTION, Clips, ask_files, in_turns
from serve.kernel import head_dim
from speechllm.checkpoint import Checkpoint
from speechllm.prompt import Example, render

SECONDS = 2.0  # of each clip
CACHE_BYTES = 4  # of a number in the cache on a CPU


def shots_cost(checkpoint: Checkpoint, clips: Clips, counts: Sequence[int], turns: int) -> list[dict[str, float]]:
    """A question after so many shots, each a clip of ``SECONDS`` and the words in it.

    For each count: ``ids`` of shots and question; ``megabytes`` that their keys and values take, once for all questions
    after the same shots; median seconds to the answer with shots that are ``new``, and ``again`` about another clip.
    Clips are encoded beforehand.
    """
    answerer, config = Answerer(checkpoint, 1), checkpoint.lm.config
    per_id = 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim(checkpoint.lm) * CACHE_BYTES
    found = []
    for count in counts:
        shots = [_shots(answerer, clips, count) for _ in range(turns)]
        asked = [clips.next(SECONDS) for _ in range(2 * turns)]
        question = Example(answerer.listen(asked[0]).spans[0].codes, INSTRUCTION)
        ids = len(render(question, checkpoint.vocabulary, checkpoint.text, shots[0]).ids)
        ways = {
            "new": partial(_answer, answerer, shots, asked[:turns]),
            "again": partial(_answer, answerer, shots, asked[turns:]),
        }
        found.append({"shots": count, "ids": ids, "megabytes": ids * per_id / 1e6, **in_turns(ways, turns)})
    return found


def _shots(answerer: Answerer, clips: Clips, count: int) -> list[Example]:
    """Solved examples that were not there before."""
    files = [clips.next(SECONDS) for _ in range(count)]
    return [
        answerer.shot(answerer.listen(file), INSTRUCTION, answer.text or "Nothing.")
        for file, answer in zip(files, ask_files(answerer, [files], 0), strict=True)
    ]


def _answer(answerer: Answerer, shots: Sequence[list[Example]], files: Sequence[str], turn: int) -> None:
    ask_files(answerer, [[file] for file in files], turn, shots=shots[turn])
