"""Answers decoded together are those decoded alone, whoever comes, goes, fails or shares a beginning."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from random import Random

import pytest
import torch
from conftest import require_engine
from test_decoder import llama
from test_kernel import END, NEVER, PAD, SIZES, VOCABULARY_SIZE, forward, random_ids, small_mixtral, without_compiler
from test_search import Anything, OneOf
from test_search import run as search_alone
from torch import Tensor
from transformers import PreTrainedModel

from serve.decoder import SHORT
from serve.engine import PREFIXES, Engine, Job, Request
from serve.search import make_search
from speechllm.errors import InputError
from speechllm.generate import generate
from speechllm.grammar import Grammar
from speechllm.options import GREEDY, Options

LENGTHS = (SHORT + 9, 5, 1, SHORT, 17, 2, SHORT + 1, 30, 8)
NEW = 14
ANYTHING = Anything(VOCABULARY_SIZE)
# as different as can be decoded side by side
MIXED = (
    GREEDY, Options(beams=3), Options(temperature=1.0, seed=1), Options(max_tokens=3), Options(beams=2),
    Options(temperature=0.7, top_p=0.9, seed=2), Options(max_tokens=1), GREEDY, Options(beams=4, max_tokens=5),
)  # fmt: skip


class Even(Grammar[None]):
    """Even ids alone."""

    start = None

    def allowed(self, state: None) -> Tensor:
        return torch.arange(VOCABULARY_SIZE) % 2 == 0

    def next(self, state: None, index: int) -> None:
        return None


class Broken(Grammar[int]):
    """Fails after so many ids, or at the next one."""

    start = 0

    def __init__(self, after: int, at_next: bool = False) -> None:
        self._after, self._at_next = after, at_next

    def allowed(self, state: int) -> Tensor:
        if state == self._after and not self._at_next:
            raise ArithmeticError("broken")
        return ANYTHING.allowed(None)

    def next(self, state: int, index: int) -> int:
        if state == self._after:
            raise ArithmeticError("broken")
        return state + 1


@pytest.fixture(params=["compiled", "plain"])
def lm(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[PreTrainedModel]:
    """A Mixtral, on a machine with a compiler and on one without."""
    if request.param == "compiled":
        require_engine("c++")
        yield small_mixtral()
        return
    with without_compiler(tmp_path):
        yield small_mixtral()


@pytest.fixture
def engine() -> Engine:
    return Engine(small_mixtral(), NEVER, batch_size=4)


def requests_of(prompts: Sequence[Sequence[int]], options: Sequence[Options] = (GREEDY,)) -> list[Request]:
    return [
        Request(torch.tensor(ids), ANYTHING, NEW, options[number % len(options)]) for number, ids in enumerate(prompts)
    ]


def request_of(prompt: Sequence[int], options: Options = GREEDY) -> Request:
    return Request(torch.tensor(prompt), ANYTHING, NEW, options)


def finish(engine: Engine) -> None:
    steps = 0
    while engine.step():
        steps += 1
        assert engine.running + engine.waiting > 0 and steps < 2000
    assert engine.running == engine.waiting == 0
    assert sorted(engine._free) == list(range(engine._batch_size)), "a place in the batch was lost"


def submitted(engine: Engine, request: Request, on_change: Callable[[], None] | None = None) -> Job:
    job = engine.prepare(request, on_change)
    engine.submit(job)
    return job


def answered(engine: Engine, requests: Sequence[Request]) -> list[Job]:
    jobs = [submitted(engine, request) for request in requests]
    finish(engine)
    assert all(job.finish and job.error is None for job in jobs)
    return jobs


def alone(engine: Engine, requests: Sequence[Request]) -> list[Job]:
    return [answered(engine, [request])[0] for request in requests]


def same(found: Sequence[Job], expected: Sequence[Job], exact: bool) -> None:
    """exact: log-probabilities too, bit for bit."""
    for one, other in zip(found, expected, strict=True):
        assert (one.best.ids, one.finish) == (other.best.ids, other.finish)
        if exact:
            assert one.best.logprobs == other.best.logprobs
        else:
            assert one.best.logprobs == pytest.approx(other.best.logprobs, abs=1e-4)
    assert len({job.best.ids for job in expected}) > len(expected) / 2, "answers alike would tell nothing"


@pytest.mark.parametrize("end", [NEVER, END])
def test_greedy_answers_are_those_of_generate(lm: PreTrainedModel, end: int) -> None:
    prompts = random_ids(*LENGTHS)
    tensors = [torch.tensor(ids) for ids in prompts]
    expected = generate(lm, tensors, end_id=end, pad_id=PAD, max_new_tokens=NEW)
    assert end == NEVER or any(completion.finish_reason == "stop" for completion in expected)
    jobs = answered(Engine(lm, end, batch_size=4), requests_of(prompts))
    for job, completion in zip(jobs, expected, strict=True):
        assert (list(job.best.ids), job.finish) == (completion.ids, completion.finish_reason)
        assert job.best.logprobs == pytest.approx(completion.logprobs, abs=1e-4)


def test_a_grammar_is_kept_and_log_probabilities_are_of_what_it_allows(lm: PreTrainedModel) -> None:
    prompts = [torch.tensor(ids) for ids in random_ids(20, 40)]
    allowed = Even().allowed(None)
    expected = generate(lm, prompts, end_id=NEVER, pad_id=PAD, max_new_tokens=NEW, allowed=allowed)
    free, *jobs = answered(
        Engine(lm, NEVER),
        [Request(prompts[0], ANYTHING, NEW), *(Request(prompt, Even(), NEW) for prompt in prompts)],
    )
    assert any(index % 2 for index in free.best.ids)
    for prompt, job, completion in zip(prompts, jobs, expected, strict=True):
        assert list(job.best.ids) == completion.ids
        logits = forward(lm, [*prompt.tolist(), *job.best.ids])[len(prompt) - 1 : -1]
        wanted = logits[:, allowed].log_softmax(-1)[range(NEW), [index // 2 for index in job.best.ids]]
        assert job.best.logprobs == pytest.approx(wanted.tolist(), abs=1e-4)


def test_together_is_alone(lm: PreTrainedModel) -> None:
    """Also more than fit the batch, one after the other; with the kernel bit for bit."""
    requests = requests_of(random_ids(*LENGTHS), MIXED)
    engine = Engine(lm, NEVER, batch_size=16)
    expected = alone(engine, requests)
    same(answered(engine, requests), expected, exact=engine.compiled)
    same(answered(Engine(lm, NEVER, batch_size=4), requests), expected, exact=engine.compiled)
    same(answered(engine, requests[::-1]), expected[::-1], exact=engine.compiled)


def test_joining_and_leaving_in_the_middle_changes_nobodys_answer(lm: PreTrainedModel) -> None:
    requests = requests_of(random_ids(*LENGTHS), MIXED)
    expected = alone(Engine(lm, NEVER, batch_size=16), requests)
    engine = Engine(lm, NEVER, batch_size=16)
    rng = Random(3)
    jobs = []
    for request in requests:
        jobs.append(submitted(engine, request))
        for _ in range(rng.randrange(4)):
            engine.step()
    extra = submitted(engine, requests[0])
    engine.step()
    extra.cancel()
    finish(engine)
    same(jobs, expected, exact=engine.compiled)


def test_other_architectures_are_served() -> None:
    torch.manual_seed(5)
    lm = llama().eval()
    prompts = random_ids(*LENGTHS)
    expected = generate(lm, [torch.tensor(ids) for ids in prompts], end_id=NEVER, pad_id=PAD, max_new_tokens=NEW)
    engine = Engine(lm, NEVER, batch_size=5)
    assert not engine.compiled
    assert [list(job.best.ids) for job in answered(engine, requests_of(prompts))] == [c.ids for c in expected]


@pytest.mark.parametrize("beams", [2, 4])
def test_beams_are_those_of_whole_forward_passes(lm: PreTrainedModel, beams: int) -> None:
    """Their caches follow them: no hypothesis goes on from another one's past."""
    engine = Engine(lm, END, batch_size=11)
    options = Options(beams=beams)
    prompts = random_ids(9, 40)
    jobs = answered(engine, requests_of(prompts, [options]))
    for prompt, job in zip(prompts, jobs, strict=True):
        search = make_search(ANYTHING, END, NEW, options)
        best = search_alone(search, lambda ids, prompt=prompt: forward(lm, [*prompt, *ids])[-1])  # type: ignore[misc]
        assert (job.best.ids, job.finish) == (best.ids, search.finish)
        assert job.best.logprobs == pytest.approx(best.logprobs, abs=1e-4)
    greedy = alone(engine, requests_of(prompts))
    assert [job.best.ids for job in jobs] != [job.best.ids for job in greedy]


def test_beams_may_be_more_than_there_are_hypotheses(engine: Engine) -> None:
    labels = OneOf((5, 6, 7), (5, 8), (9, 6, 6), (9, 6, 3), (9, 2), size=VOCABULARY_SIZE, end=END)
    engine = Engine(engine._decoder._lm, END, batch_size=4)
    found = set()
    for prompt in random_ids(9, 4, 6, 12, 7, 5):
        job, greedy = answered(
            engine, [Request(torch.tensor(prompt), labels, NEW, options) for options in (Options(beams=4), GREEDY)]
        )
        search = make_search(labels, END, NEW, Options(beams=4))
        best = search_alone(search, lambda ids, prompt=prompt: forward(engine._decoder._lm, [*prompt, *ids])[-1])  # type: ignore[misc]
        assert job.best.ids == best.ids
        assert job.best.logprobs == pytest.approx(best.logprobs, abs=1e-4)
        found.add((job.best.ids, greedy.best.ids))
    assert len(found) > 1 and any(one != other for one, other in found)


def test_no_more_are_answered_than_fit_and_the_others_wait_their_turn(engine: Engine) -> None:
    jobs = [submitted(engine, request) for request in requests_of(random_ids(*LENGTHS))]
    assert (engine.waiting, engine.running) == (9, 0)
    seen = set()
    while engine.step():
        seen.add(engine.running)
        assert engine.running <= 4
        assert engine.running + engine.waiting == sum(job.finish is None for job in jobs)
    assert 4 in seen
    queued = [job.queued for job in jobs]
    assert queued == sorted(queued)
    assert all(0 < job.queued < job.first < job.last for job in jobs)


def test_a_request_for_many_beams_is_not_passed_by_others(engine: Engine) -> None:
    """Or it might wait for ever."""
    short, *prompts = random_ids(3, 3, 3, 3, 3)
    first = submitted(engine, request_of(short, Options(max_tokens=6)))
    wide = submitted(engine, request_of(prompts[0], Options(beams=4)))
    later = [submitted(engine, request) for request in requests_of(prompts[1:])]
    while not wide.finish:
        assert not any(job.queued for job in later)
        assert not wide.queued or first.finish
        engine.step()
    finish(engine)
    assert all(job.queued for job in later)


def test_what_does_not_fit_is_refused_before_it_is_in_line(engine: Engine) -> None:
    most = SIZES.max_positions
    (ids,) = random_ids(most)
    asked = f"a prompt of {most - NEW + 1} ids exceeds the {most - NEW} .* for the answer. Use fewer or shorter shots"
    with pytest.raises(InputError, match=asked):
        engine.prepare(request_of(ids[: most - NEW + 1]))
    with pytest.raises(InputError, match="5 beams do not fit a batch of 4"):
        engine.prepare(request_of(ids[:5], Options(beams=5)))
    assert engine.waiting == 0
    fitting = (
        request_of(ids[: most - NEW]),
        request_of(ids[: most - 1], Options(max_tokens=1)),
        request_of(ids[:9], Options(beams=4)),
    )
    longest, one, widest = answered(engine, fitting)
    assert [len(longest.best.ids), len(one.best.ids), len(widest.best.ids)] == [NEW, 1, NEW]
    whole = forward(engine._decoder._lm, [*ids[: most - NEW], *longest.best.ids])
    assert whole[most - NEW - 1 : -1].argmax(-1).tolist() == list(longest.best.ids)


class Counting:
    """Counts the positions that an engine computes for prompts."""

    def __init__(self, engine: Engine) -> None:
        self.positions = 0
        self._prefill = engine._decoder.prefill
        engine._decoder.prefill = self.prefill  # type: ignore[method-assign]

    def prefill(self, slot: int, ids: Tensor) -> Tensor:
        self.positions += len(ids)
        return self._prefill(slot, ids)

    def since(self) -> int:
        self.positions, found = 0, self.positions
        return found


def test_a_shared_beginning_is_computed_once_and_changes_nothing(lm: PreTrainedModel) -> None:
    shots, audio, *questions = random_ids(SHORT + 8, 12, 4, 3, 5)
    prompts = [shots + audio + question for question in questions]
    shared = (len(shots), len(shots) + len(audio))
    engine = Engine(lm, NEVER)
    uncached = alone(engine, requests_of(prompts))
    counting = Counting(engine)
    requests = [Request(torch.tensor(ids), ANYTHING, NEW, shared=shared) for ids in prompts]
    first = answered(engine, requests[:1])
    assert counting.since() == len(prompts[0])
    cached = first + answered(engine, requests[1:])
    assert counting.since() == 3 + 5
    same(cached, uncached, exact=False)
    same(answered(engine, requests), cached, exact=engine.compiled)
    assert counting.since() == 4 + 3 + 5
    other = shots + random_ids(9, seed=7)[0]
    (job,) = answered(engine, [Request(torch.tensor(other), ANYTHING, NEW, shared=(len(shots), len(shots) + 6))])
    assert counting.since() == 9, "the shots are known, the recording is not"
    same([job, *cached], [*alone(engine, requests_of([other])), *cached], exact=False)


def test_beginnings_of_the_same_length_are_not_confused(engine: Engine) -> None:
    prompts = random_ids(12, 12, 12)
    requests = [Request(torch.tensor(ids), ANYTHING, NEW, shared=(8,)) for ids in prompts]
    expected = alone(engine, requests_of(prompts))
    for _ in range(2):
        same(answered(engine, requests), expected, exact=False)


def test_the_last_used_beginnings_are_kept(engine: Engine) -> None:
    prompts = random_ids(*[10] * (PREFIXES + 1))
    requests = [Request(torch.tensor(ids), ANYTHING, NEW, shared=(7,)) for ids in prompts]
    first, second, *others = requests
    counting = Counting(engine)
    expected = answered(engine, requests[:PREFIXES])
    assert counting.since() == 10 * PREFIXES
    answered(engine, [first])  # the second is now the one not used for longest
    assert counting.since() == 3
    expected += answered(engine, others[-1:])
    assert counting.since() == 10
    again = answered(engine, [first, *others])
    assert counting.since() == 3 * PREFIXES
    same(again, [expected[0], *expected[2:]], exact=True)
    answered(engine, [second])
    assert counting.since() == 10
    assert len(engine._prefixes) == len(set(engine._prefixes.values())) == PREFIXES


def test_cancelling_ends_one_answer_with_what_is_there(engine: Engine) -> None:
    requests = requests_of(random_ids(*LENGTHS[:6]))
    expected = alone(engine, requests)
    jobs = [submitted(engine, request) for request in requests]
    for _ in range(5):
        engine.step()
    told: list[str | None] = []
    jobs[5]._on_change = lambda: told.append(jobs[5].finish)
    jobs[1].cancel()
    jobs[5].cancel()
    assert engine.running == 4
    engine.step()
    assert [job.finish for job in jobs] == [None, "cancelled", None, None, None, "cancelled"]
    assert told == ["cancelled"]
    assert 0 < len(jobs[1].best.ids) < NEW
    assert jobs[1].best.ids == expected[1].best.ids[: len(jobs[1].best.ids)]
    assert jobs[5].best.ids == ()
    assert (jobs[5].queued, jobs[5].first) == (0, 0) and jobs[5].last > 0
    finish(engine)
    rest = [0, 2, 3, 4]
    same([jobs[n] for n in rest], [expected[n] for n in rest], exact=True)
    jobs[0].cancel()
    assert not engine.step()
    assert jobs[0].finish == "length", "what is whole stays so"


def test_time_outs_end_those_that_wait_and_those_that_run() -> None:
    engine = Engine(small_mixtral(), NEVER, batch_size=1)
    prompts = random_ids(5, 6, 7)
    options = [Options(timeout=60), Options(timeout=60), Options(timeout=6000)]
    running, waiting, patient = (submitted(engine, request) for request in requests_of(prompts, options))
    engine.step()
    engine.step()
    assert 0 < len(running.best.ids) < NEW
    for job in (running, waiting, patient):
        job._submitted -= 61  # a minute ago
    engine.step()
    assert (running.finish, waiting.finish, patient.finish) == ("timeout", "timeout", None)
    assert running.last > 60 and 0 < len(running.best.ids) < NEW
    assert waiting.best.ids == ()
    finish(engine)
    assert (patient.finish, len(patient.best.ids)) == ("length", NEW)


@pytest.mark.parametrize("after", [0, 1, 4])
def test_an_error_ends_all_and_is_raised_and_the_next_are_answered(engine: Engine, after: int) -> None:
    requests = requests_of(random_ids(*LENGTHS))
    expected = alone(engine, requests)
    short = request_of([1, 2, 3], Options(max_tokens=2))
    broken = Request(requests[1].prompt, Broken(after), NEW)
    told: set[int] = set()
    jobs = [
        submitted(engine, request, partial(told.add, number))
        for number, request in enumerate((short, requests[0], broken, *requests[2:]))
    ]
    with pytest.raises(ArithmeticError, match="broken"):
        finish(engine)
    whole, *ended = jobs
    assert (whole.finish, whole.error) == ("length", None), "what was whole before stays so"
    assert all(job.finish == "cancelled" and isinstance(job.error, ArithmeticError) for job in ended)
    assert told == set(range(len(jobs)))
    assert engine.waiting == engine.running == 0
    same(answered(engine, requests), expected, exact=True)


def test_what_ends_in_the_step_that_fails_stays_whole(engine: Engine) -> None:
    first, second = random_ids(5, 6)
    whole = submitted(engine, request_of(first, Options(max_tokens=4)))
    broken = submitted(engine, Request(torch.tensor(second), Broken(2, at_next=True), NEW))
    engine.step()
    engine.step()
    assert (len(whole.best.ids), len(broken.best.ids), whole.finish) == (3, 2, None)
    with pytest.raises(ArithmeticError, match="broken"):
        engine.step()
    assert (whole.finish, whole.error, len(whole.best.ids)) == ("length", None, 4)
    assert (broken.finish, len(broken.best.ids)) == ("cancelled", 2)
    finish(engine)


def test_all_can_be_ended_at_once(engine: Engine) -> None:
    requests = requests_of(random_ids(*LENGTHS[:6]))
    jobs = [submitted(engine, request) for request in requests]
    for _ in range(5):
        engine.step()
    engine.cancel_all()
    assert all(job.finish == "cancelled" and job.error is None for job in jobs)
    assert [len(job.best.ids) > 0 for job in jobs] == [True] * 4 + [False] * 2
    assert not engine.step()
    finish(engine)
    same(answered(engine, requests), alone(engine, requests), exact=True)


def test_every_id_is_told_and_the_end(engine: Engine) -> None:
    seen: list[tuple[int, str | None]] = []
    job = engine.prepare(request_of([1, 2, 3]), lambda: seen.append((len(job.best.ids), job.finish)))
    engine.submit(job)
    finish(engine)
    assert seen == [*((count, None) for count in range(1, NEW)), (NEW, "length")]


def test_requests_come_from_many_threads_while_it_works(engine: Engine) -> None:
    requests = requests_of(random_ids(*LENGTHS * 3, seed=9))
    expected = alone(engine, requests)
    jobs = [engine.prepare(request) for request in requests]
    begun = threading.Barrier(6)

    def submit(part: Sequence[Job]) -> None:
        begun.wait()
        for job in part:
            engine.submit(job)
            time.sleep(0.001)

    threads = [threading.Thread(target=submit, args=(jobs[number::5],)) for number in range(5)]
    for thread in threads:
        thread.start()
    begun.wait()
    deadline = time.monotonic() + 30
    while not all(job.finish for job in jobs):
        engine.step()
        assert time.monotonic() < deadline
    for thread in threads:
        thread.join()
    finish(engine)
    same(jobs, expected, exact=True)


def test_waiting_for_work_ends_when_there_is_some(engine: Engine) -> None:
    assert not engine.wait(0.01)
    thread = threading.Timer(0.05, lambda: submitted(engine, request_of([1, 2, 3])))
    thread.start()
    begun = time.monotonic()
    assert engine.wait(20)
    assert time.monotonic() - begun < 10
    thread.join()
    engine.step()
    assert engine.waiting == 0 and engine.wait(20), "what runs is work too"
