"""The compiled decoding step computes what transformers does, in any company; it is built once a machine."""

import ctypes
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from random import Random

import pytest
import torch
import transformers
from conftest import require_engine
from torch import Tensor
from transformers import PreTrainedModel

from serve import kernel
from serve.kernel import Kernel, _Matrix, build, dequantized, fits, quantize
from speechllm.model import ModelConfig, make_model

VOCABULARY_SIZE, PAD, END, NEVER = 60, 58, 59, 60  # NEVER: an end id that no model of this size can choose
SIZES = ModelConfig(hidden_size=64, num_layers=2, num_heads=4, expert_size=48, num_experts=4, max_positions=128)
FLOAT32, BFLOAT16, INT8 = range(3)  # how a matrix is stored
SLOTS = 17
# stands for the kernel where only the building matters
SMALL = 'extern "C" int answer() { return 42; }\n'


def small_mixtral(seed: int = 3) -> PreTrainedModel:
    """One the kernel fits. Weights far from zero: logits vary, and no choice hangs on a rounding error."""
    torch.manual_seed(seed)
    lm = make_model(SIZES, VOCABULARY_SIZE, PAD, END).eval()
    with torch.no_grad():
        for parameter in lm.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.15)
            else:
                parameter.uniform_(0.5, 1.5)  # norms
    return lm


@contextmanager
def without_compiler(folder: Path) -> Iterator[None]:
    """As on a machine that has none, nor a kernel built before; ``folder`` is empty."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel, "COMPILERS", ())
        patch.setenv("XDG_CACHE_HOME", str(folder))
        build.cache_clear()
        yield
    build.cache_clear()


def random_ids(*lengths: int, seed: int = 4) -> list[list[int]]:
    rng = Random(seed)
    return [[rng.randrange(PAD) for _ in range(length)] for length in lengths]


@pytest.fixture(scope="module")
def lm() -> PreTrainedModel:
    require_engine("c++")
    return small_mixtral()


@pytest.fixture(scope="module")
def halves() -> PreTrainedModel:
    """Weights that bfloat16 holds exactly."""
    require_engine("c++")
    return small_mixtral().bfloat16().float()


class AsFloat32(Kernel):
    """Stores every weight as float32."""

    def _matrix(self, weight: Tensor, exact: bool = False) -> _Matrix:
        return _Matrix(self._pointer(weight), None, *weight.shape, FLOAT32)


def make_kernel(
    lm: PreTrainedModel, kind: type[Kernel] = Kernel, quantization: kernel.Quantization | None = None
) -> Kernel:
    shape = (SIZES.num_layers, SLOTS, SIZES.num_kv_heads, SIZES.max_positions, 16)
    return kind(lm, torch.zeros(shape), torch.zeros(shape), quantization)


def step_by_step(compiled: Kernel, sequences: Sequence[Sequence[int]], slots: Sequence[int]) -> list[Tensor]:
    """Logits ``[seq, vocabulary]`` of each sequence, an id of every one that is not at its end at a time."""
    logits: list[list[Tensor]] = [[] for _ in sequences]
    for place in range(max(map(len, sequences))):
        rows = [row for row, sequence in enumerate(sequences) if place < len(sequence)]
        found = compiled.step(
            [sequences[row][place] for row in rows], [slots[row] for row in rows], [place] * len(rows)
        )
        for row, one in zip(rows, found, strict=True):
            logits[row].append(one)
    return [torch.stack(one) for one in logits]


@torch.inference_mode()
def forward(lm: PreTrainedModel, ids: Sequence[int]) -> Tensor:
    """Logits ``[seq, vocabulary]`` of transformers."""
    return lm(torch.tensor(ids)[None], output_router_logits=False).logits[0]


def exact(lm: PreTrainedModel, ids: Sequence[int]) -> Tensor:
    """The same computed in float64: in float32 transformers is as far from that as the kernel."""
    double = deepcopy(lm).double()
    double.set_experts_implementation("eager")  # the others know no float64
    return forward(double, ids).float()


def farthest(found: Iterable[Tensor], expected: Sequence[Tensor]) -> float:
    assert max(float(one.std()) for one in expected) > 0.3, "all logits alike: a comparison would tell nothing"
    return max(float((one - other).abs().max()) for one, other in zip(found, expected, strict=True))


def test_steps_are_the_forward_pass_of_transformers(lm: PreTrainedModel) -> None:
    sequences = random_ids(9, 30, 1, 16)
    compiled = make_kernel(lm)
    assert compiled._model.head.type == FLOAT32
    found = step_by_step(compiled, sequences, slots=[5, 0, 16, 2])
    assert farthest(found, [exact(lm, ids) for ids in sequences]) < 1e-5


def test_slots_may_come_in_any_order_and_again(lm: PreTrainedModel) -> None:
    """A slot that is named again holds one position more: a short prompt in one call, and several of them mixed."""
    sequences = random_ids(7, 12, 5)
    expected = step_by_step(make_kernel(lm), sequences, slots=[0, 1, 2])
    places = [(row, place) for row, ids in enumerate(sequences) for place in range(len(ids))]
    Random(5).shuffle(places)
    order = sorted(places, key=lambda one: one[1])  # each slot's positions in order, the slots mixed
    assert order != sorted(places)
    ids = [sequences[row][place] for row, place in order]
    slots, lengths = [3 * row for row, _ in order], [place for _, place in order]
    found = make_kernel(lm).step(ids, slots, lengths)
    for (row, place), logits in zip(order, found, strict=True):
        assert torch.equal(logits, expected[row][place])
    last = make_kernel(lm).step(ids, slots, lengths, last=True)
    assert torch.equal(last, found[-1:])


def test_a_sequence_gets_the_same_bits_in_any_company(halves: PreTrainedModel) -> None:
    sequences = random_ids(*range(1, SLOTS + 1))
    quantizations: tuple[kernel.Quantization | None, ...] = (None, "int8")
    for quantization in quantizations:
        compiled = make_kernel(halves, quantization=quantization)
        step_by_step(compiled, sequences, range(SLOTS))
        following = random_ids(SLOTS, seed=6)[0]
        alone = torch.cat([compiled.step([following[s]], [s], [len(sequences[s])]) for s in range(SLOTS)])
        assert len(alone.unique(dim=0)) == SLOTS
        rng = Random(7)
        for count in range(1, SLOTS + 1):
            slots = rng.sample(range(SLOTS), count)
            found = compiled.step([following[s] for s in slots], slots, [len(sequences[s]) for s in slots])
            assert torch.equal(found, alone[slots])


def test_weights_that_bfloat16_holds_are_stored_in_it_and_nothing_changes(halves: PreTrainedModel) -> None:
    sequences = random_ids(20, 11)
    compiled, plain = make_kernel(halves), make_kernel(halves, AsFloat32)
    assert (compiled._model.head.type, plain._model.head.type) == (BFLOAT16, FLOAT32)
    found = step_by_step(compiled, sequences, slots=[0, 1])
    for one, other in zip(found, step_by_step(plain, sequences, slots=[0, 1]), strict=True):
        assert torch.equal(one, other)
    assert farthest(found, [exact(halves, ids) for ids in sequences]) < 1e-5


def test_int8_is_the_dequantized_model(lm: PreTrainedModel) -> None:
    sequences = random_ids(20, 11)
    rounded = dequantized(lm)
    compiled = make_kernel(rounded, quantization="int8")
    assert compiled._model.head.type == compiled._model.layers[0].gate_up[0].type == INT8
    assert compiled._model.layers[0].router.type != INT8
    found = step_by_step(compiled, sequences, slots=[0, 1])
    assert farthest(found, [forward(rounded, ids) for ids in sequences]) < 1e-4
    distance = farthest(found, [forward(lm, ids) for ids in sequences])
    assert 1e-3 < distance < 0.5, "rounding is seen, and small"
    for before, after in zip(lm.parameters(), small_mixtral().parameters(), strict=True):
        assert torch.equal(before, after), "the model itself is not rounded"


def test_quantized_rows_are_within_half_a_step() -> None:
    weight = (
        torch.randn(5, 32, generator=torch.Generator().manual_seed(8)) * torch.tensor([1e-6, 0.0, 1, 30, 1e6])[:, None]
    )
    whole, scale = quantize(weight)
    assert (whole.dtype, whole.shape, scale.shape) == (torch.int8, (5, 32), (5,))
    assert whole.abs().amax(1).tolist() == [127, 0, 127, 127, 127]
    assert ((whole * scale[:, None] - weight).abs() <= scale[:, None] * 0.5001).all()
    again, same = quantize(whole * scale[:, None])
    assert torch.equal(again, whole)
    assert torch.allclose(same, scale)


def test_what_the_kernel_does_not_compute_is_left_to_transformers(lm: PreTrainedModel) -> None:
    sizes = {
        "vocab_size": 60,
        "hidden_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }

    def mixtral(**others: object) -> PreTrainedModel:
        config = transformers.MixtralConfig(**sizes | {"intermediate_size": 48, "num_local_experts": 4} | others)  # type: ignore[arg-type]
        return transformers.MixtralForCausalLM(config)

    assert fits(lm)
    assert fits(mixtral())
    assert fits(mixtral(head_dim=32))
    scaled = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
    for others in (
        {"num_attention_heads": 8},
        {"intermediate_size": 40},
        {"hidden_act": "gelu"},
        {"rope_parameters": scaled},
    ):
        assert not fits(mixtral(**others))
    assert not fits(mixtral().bfloat16())
    llama = transformers.LlamaConfig(**sizes, intermediate_size=48)  # type: ignore[arg-type]
    assert not fits(transformers.LlamaForCausalLM(llama))


@pytest.mark.parametrize("head_dim", [32, 48])
def test_heads_of_another_size_than_the_hidden_one_tells(head_dim: int) -> None:
    require_engine("c++")
    torch.manual_seed(9)
    config = transformers.MixtralConfig(
        vocab_size=60, hidden_size=48, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        head_dim=head_dim, num_key_value_heads=1, num_local_experts=3, num_experts_per_tok=3,
        initializer_range=0.2, tie_word_embeddings=False,
    )  # fmt: skip
    lm = transformers.MixtralForCausalLM(config).eval()
    assert fits(lm)
    compiled = Kernel(lm, torch.zeros(2, 2, 1, 40, head_dim), torch.zeros(2, 2, 1, 40, head_dim))
    (ids,) = random_ids(30)
    assert farthest(step_by_step(compiled, [ids], slots=[1]), [exact(lm, ids)]) < 1e-5


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """The folder of an empty user's cache, and a small source to build."""
    require_engine("c++")
    monkeypatch.setattr(kernel, "SOURCE", tmp_path / "kernel.cpp")
    kernel.SOURCE.write_text(SMALL)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    build.cache_clear()
    yield tmp_path / "cache" / "speechllm"
    build.cache_clear()


def answer_of(library: ctypes.CDLL | None) -> int:
    assert library is not None
    return library.answer()


def test_the_kernel_is_compiled_once_a_machine(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert answer_of(build()) == 42
    (file,) = cache.iterdir()
    made = file.stat().st_mtime_ns
    build.cache_clear()  # as in another process
    monkeypatch.setattr(kernel, "COMPILERS", ())
    assert answer_of(build()) == 42
    assert [one.stat().st_mtime_ns for one in cache.iterdir()] == [made]


def test_another_source_or_processor_is_another_kernel(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert answer_of(build()) == 42
    kernel.SOURCE.write_text(SMALL.replace("42", "43"))
    build.cache_clear()
    assert answer_of(build()) == 43
    assert len(list(cache.iterdir())) == 2
    monkeypatch.setattr(kernel, "_processor", lambda: "flags : none")
    build.cache_clear()
    assert answer_of(build()) == 43
    assert len(list(cache.iterdir())) == 3


@pytest.mark.parametrize("compilers", [(), ("false",), ("no such program",)])
def test_without_a_compiler_that_works_there_is_no_kernel(
    cache: Path, monkeypatch: pytest.MonkeyPatch, compilers: tuple[str, ...]
) -> None:
    monkeypatch.setattr(kernel, "COMPILERS", compilers)
    assert build() is None
    assert not cache.exists() or not list(cache.iterdir())
    assert not fits(small_mixtral())


def test_a_cache_that_cannot_be_used_is_done_without(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    cache.parent.touch()  # a file where the folder should be
    assert answer_of(build()) == 42
    cache.parent.unlink()
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "expanduser", _no_home)
    build.cache_clear()
    assert answer_of(build()) == 42
    assert list(temporary.iterdir()) == []


def _no_home(path: Path) -> Path:
    raise RuntimeError("Could not determine home directory.")


def test_a_damaged_kernel_is_not_used(cache: Path) -> None:
    assert answer_of(build()) == 42
    (file,) = cache.iterdir()
    whole = file.read_bytes()
    file.unlink()  # the library that is loaded lives on
    file.write_bytes(whole[: len(whole) // 8])
    build.cache_clear()
    assert answer_of(build()) == 42


def test_building_at_the_same_time_breaks_nothing(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(cache / "missing"))  # there is no other way out
    with ThreadPoolExecutor(6) as pool:
        libraries = list(pool.map(lambda _: build.__wrapped__(), range(6)))
    assert [answer_of(library) for library in libraries] == [42] * 6
    assert len(list(cache.iterdir())) == 1
