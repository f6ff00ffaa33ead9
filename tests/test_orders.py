"""Orders of coffee say what their slots hold, each in words of its own."""

from collections import Counter
from pathlib import Path

import pytest

from speechllm.errors import InputError
from speechllm.tasks import TASKS, Facts
from train.orders import COUNT, DRINKS, SLOTS, orders
from train.synthesize import prepare


def test_an_order_says_its_slots_and_no_others() -> None:
    values = {**SLOTS, "coffeeDrink": DRINKS}
    filled, sizes = Counter[str](), Counter[int]()
    found = orders()
    assert found == orders() and len(found) == COUNT == len({sentence.id for sentence in found})
    assert len({sentence.text for sentence in found}) > 0.95 * COUNT
    for sentence in found:
        said = sentence.text
        for slot, value in sentence.slots.items():
            assert value in values[slot] and value in said[0].lower() + said[1:]
        words = sum(len(value.split()) for value in sentence.slots.values())
        assert words <= len(said.split()) <= words + 3 + 1 + 3 * 2 + 1, "asked, an article, with a … and a …, please"
        filled.update(sentence.slots.keys())
        sizes[len(sentence.slots)] += 1
        facts = Facts(1.0, said, intent=sentence.intent, slots=sentence.slots)
        read = TASKS["intent"].read(TASKS["intent"].write(facts) or ())
        assert (read.label, read.slots, read.faults) == ("orderDrink", sentence.slots, ())
    assert filled["coffeeDrink"] == COUNT
    assert all(filled[slot] / COUNT == pytest.approx(0.5, abs=0.03) for slot in SLOTS)
    assert set(sizes) == set(range(1, 7))


def test_orders_are_a_text_like_digits(tmp_path: Path) -> None:
    assert list(prepare("orders", tmp_path).sentences) == orders()
    with pytest.raises(InputError, match="--language de: orders are spoken in English only"):
        prepare("orders", tmp_path, language="de")
    with pytest.raises(InputError, match="--words: orders are no sentences"):
        prepare("orders", tmp_path, words=10)
