"""Sentences that order coffee, as people speak to a machine that makes it, with the slots they fill.

Intent, slots and their values are those of the train split of the recorded orders (Picovoice's, Apache-2.0): 398 of 34
people, without transcripts, from which alone a model learnt the commonest values and not to hear them.
"""

from __future__ import annotations

from itertools import product
from pathlib import Path
from random import Random

from speechllm.data.recorded import Sentence, read_sentences

ORDERS = "orders"  # the name that stands for them where a file of sentences is asked for
INTENT = "orderDrink"
COUNT = 6000  # sentences, of more that there could be
AMOUNTS = ("", "some ", "a bit of ", "a little bit of ", "a lot of ", "lots of ")
_MILKS = ("milk", "cream", "soy milk", "almond milk", "skim milk", "whole milk")
SLOTS = {
    "size": ("eight ounce", "twelve ounce", "sixteen ounce", "twenty ounce", "small", "medium", "large"),
    "numberOfShots": ("single shot", "double shot", "triple shot"),
    "roast": ("light roast", "medium roast", "dark roast"),
    "milkAmount": tuple(map("".join, product(AMOUNTS, _MILKS))),
    "sugarAmount": tuple(map("".join, product(AMOUNTS, ("sugar", "brown sugar", "sweetener")))),
}
DRINKS = (
    *("coffee", "house coffee", "drip coffee", "iced coffee", "mocha", "iced mocha"),
    *("latte", "cappuccino", "americano", "espresso"),
)
_ASKED = (
    *("", "", "can I have ", "could I have ", "can I get ", "could I get ", "may I have ", "I would like "),
    *("I'd like ", "I want ", "I'll have ", "I'll take ", "give me ", "get me ", "make me ", "please make me "),
)
_SHARE = 0.5  # chance of each slot but the drink
_AFTER = 0.15  # and that size, shots and roast are said after it


def orders() -> list[Sentence]:
    """The same at each call."""
    rng = Random(0)
    return [_order(f"order_{number}", rng) for number in range(COUNT)]


def read_or_make(text: str | Path, language: str = "en") -> list[Sentence]:
    """The orders by their name, or the sentences of a file. Raises InputError."""
    return orders() if text == ORDERS else read_sentences(text, language)


def _order(name: str, rng: Random) -> Sentence:
    slots = {slot: rng.choice(values) for slot, values in SLOTS.items() if rng.random() < _SHARE}
    drink = slots["coffeeDrink"] = rng.choice(DRINKS)
    before: list[str] = []
    after = [slots[slot] for slot in ("milkAmount", "sugarAmount") if slot in slots]
    for slot in ("size", "numberOfShots", "roast"):
        if slot in slots:
            said_after = slot != "size" and rng.random() < _AFTER
            (after if said_after else before).append(f"a {slots[slot]}" if said_after else slots[slot])
    rng.shuffle(before)
    rng.shuffle(after)
    words = " ".join([*before, drink])
    article = rng.choice(("", "an " if words[0] in "aei" else "a "))
    text = rng.choice(_ASKED) + article + words
    if after:
        text += " with " + rng.choice((" and ", " and ", " with ")).join(after)
    text += rng.choice(("", "", "", " please"))
    return Sentence(name, text[0].upper() + text[1:] + ".", intent=INTENT, slots=slots)
