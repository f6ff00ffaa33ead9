"""Scores against values counted by hand."""

from functools import partial

import pytest
import sacrebleu
from hypothesis import given, settings
from hypothesis import strategies as st

from speechllm.errors import InputError
from speechllm.metrics import bootstrap_interval, cer, normalize_text, text_counts, wer


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("A Dog, runs!", "a dog runs"),
        ("  two\n lines\t", "two lines"),
        ("It's the dogs' 'bone'.", "it's the dogs bone"),
        ("It\u2019s", "it's"),
        ("a well-known man; 24 men", "a well known man 24 men"),
        ("ﬁne \uff26ull e\u0301", "fine full é"),
        ("Straße «déjà»", "straße déjà"),
        ("broken\ufffd", "broken\ufffd"),
        ("...", ""),
        ("", ""),
    ],
)
def test_normalised_text(text: str, normal: str) -> None:
    assert normalize_text(text) == normal


@settings(deadline=None)
@given(st.text())
def test_normalising_twice_changes_nothing(text: str) -> None:
    assert normalize_text(normalize_text(text)) == normalize_text(text)


def test_wer_counts_over_the_corpus() -> None:
    references = ["a b c d e f g h", "one two"]
    hypotheses = ["A, b c d e f g h.", "one three four"]
    assert wer(references, hypotheses) == pytest.approx(2 / 10)  # a mean over utterances would be 1/2
    assert wer(references, references) == 0.0
    assert wer(references, ["", ""]) == 1.0


def test_cer_counts_characters() -> None:
    assert cer(["ab cd"], ["ab d"]) == pytest.approx(1 / 5)
    assert cer(["ab", ""], ["ab", "xyz"]) == pytest.approx(3 / 2)


def test_words_where_nothing_was_said_are_insertions() -> None:
    assert wer(["one two", "", "..."], ["one two", "three", ""]) == pytest.approx(1 / 2)


@pytest.mark.parametrize("score", [wer, cer, bootstrap_interval])
def test_no_reference_words_at_all_is_an_error(score) -> None:
    with pytest.raises(InputError, match="undefined"):
        score(["", "."], ["a", ""])


@pytest.mark.parametrize(
    "score", [wer, cer, partial(text_counts, "bleu"), partial(text_counts, "chrf"), bootstrap_interval]
)
def test_lists_must_match(score) -> None:
    with pytest.raises(ValueError, match="2 references but 1"):
        score(["a", "b"], ["a"])
    with pytest.raises(ValueError, match="empty"):
        score([], [])


def test_interval_holds_the_score_and_narrows_with_data() -> None:
    references, hypotheses = ["one two three four"] * 20, ["one two three four"] * 10 + ["one two"] * 10
    low, high = bootstrap_interval(references, hypotheses)
    assert 0.0 < low < wer(references, hypotheses) < high < 0.5
    assert bootstrap_interval(references, hypotheses) == (low, high)
    more_low, more_high = bootstrap_interval(references * 20, hypotheses * 20)
    assert more_high - more_low < (high - low) / 2
    assert bootstrap_interval(references, references) == (0.0, 0.0)
    assert bootstrap_interval(["one", ""], ["two", ""], samples=50) == (1.0, 1.0)


def test_bleu_and_chrf_are_of_raw_text_with_signatures() -> None:
    references = ["Ein kleiner Hund läuft über die Wiese.", "Zwei Männer stehen an der Straße."]
    for metric, scorer in (("bleu", sacrebleu.BLEU()), ("chrf", sacrebleu.CHRF())):
        for changed in (
            references,
            [text.replace("Hund", "Kater") for text in references],
            [text.lower() for text in references],
        ):
            counts = text_counts(metric, references, changed)
            expected = scorer.corpus_score(changed, [references]).score
            assert counts.score(counts.counts.sum(0)) == pytest.approx(expected)
            assert (expected == pytest.approx(100)) == (changed is references)
        assert counts.signature == str(scorer.get_signature())
