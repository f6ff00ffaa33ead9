"""Groups of clips, and how far the best and the worst are apart."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from speechllm.data.corpus import Item
from speechllm.data.manifest import Utterance
from train.breakdown import bias_table, gaps, group_of, groups_of, plot_bias
from train.results import Evaluation, Result, Target


def item(number: int = 0, **fields: Any) -> Item:
    known = {"id": f"u{number}", "audio": "a.wav", "duration": 1.0, "split": "test", "source": "made"}
    return Item(Utterance.model_validate(known | fields), Path())


@pytest.mark.parametrize(
    ("kind", "fields", "group"),
    [
        ("speaker", {"speaker": "ann"}, "speaker=ann"),
        ("speaker", {}, None),
        ("gender", {"gender": "female"}, "gender=female"),
        ("language", {"language": "de"}, "language=de"),
        ("accent", {"labels": {"native_language": "Hindi"}}, "accent=Indian"),
        ("accent", {}, None),
        ("noise", {}, "noise=none"),
        ("noise", {"labels": {"snr_db": 9.9}}, "noise=under 10 dB"),
        ("noise", {"labels": {"snr_db": 10}}, "noise=10-20 dB"),
        ("noise", {"labels": {"snr_db": 25.5}}, "noise=20 dB and more"),
        ("duration", {"duration": 1.99}, "duration=under 2 s"),
        ("duration", {"duration": 2}, "duration=2-5 s"),
        ("duration", {"duration": 12}, "duration=10 s and more"),
    ],
)
def test_groups_have_names(kind: Any, fields: dict[str, Any], group: str | None) -> None:
    assert group_of(kind, item(**fields)) == group


def test_only_kinds_with_several_groups_count_bins_in_their_order() -> None:
    items = [item(n, duration=d, speaker="ann", gender="female") for n, d in enumerate([11.0, 6.0, 1.0, 3.0, 7.0])]
    found = groups_of(["speaker", "duration", "noise"], items)
    assert list(found) == [
        "duration=under 2 s",
        "duration=2-5 s",
        "duration=5-10 s",
        "duration=10 s and more",
    ]
    assert found["duration=5-10 s"].tolist() == [False, True, False, False, True]
    noisy = [item(n, labels={} if snr is None else {"snr_db": snr}) for n, snr in enumerate([None, 25.0, 4.0, 12.0])]
    assert list(groups_of(["noise"], noisy)) == [
        "noise=under 10 dB",
        "noise=10-20 dB",
        "noise=20 dB and more",
        "noise=none",
    ]


def test_the_gap_is_between_the_best_and_the_worst(tmp_path: Path) -> None:
    def result(metric: str, group: str, value: float, clips: int = 10, **more: Any) -> Result:
        return Result("a", "transcribe", metric, value, clips, 9.0, value - 2, value + 2, group=group, **more)

    evaluation = Evaluation(
        "tiny",
        "0123",
        "",
        (
            result("wer", "", 50),
            result("wer", "speaker=ann", 40),
            result("wer", "speaker=bob", 70),
            result("wer", "speaker=cat", 60),
            result("wer", "speaker=few", 99, clips=9),
            result("cer", "speaker=cat", 1),
            result("wer", "speaker=ann", 1, system="other"),
            result("wer", "gender=female", 41),
            result("wer", "gender=male", 44),
            *(result("wer", f"accent={n}", 40 + 4.2 * n / 11) for n in range(12)),
            replace(result("wer", "language=en", 0), low=0.0, high=0.0),
            replace(result("wer", "language=de", 10), low=10.0, high=10.0),
        ),
        targets=(Target("a", "transcribe", "captions", "wer"),),
    )
    speakers, genders, accents, languages = gaps(evaluation)
    assert (speakers.kind, speakers.best.group, speakers.worst.group) == ("speaker", "speaker=ann", "speaker=bob")
    assert (len(speakers.groups), speakers.points, speakers.apart) == (3, 30, True)
    assert (genders.worst.group, genders.points, genders.apart) == ("gender=male", 3, True)
    assert (len(accents.groups), accents.points, accents.apart) == (
        12,
        pytest.approx(4.2),
        False,
    )  # intervals are apart
    assert (languages.points, languages.apart) == (10, False)  # of ten clips, that have intervals without width
    table = bias_table([speakers, genders])
    assert "| captions | speaker | 3 | WER % | ann: 40.0 (38.0–42.0), 10 clips | bob: 70.0" in table
    assert "| 30.0 | yes |" in table
    assert "| 3.0 | yes |" in table
    assert "| 4.2 | no |" in bias_table([accents])
    assert bias_table([]) == ""
    plot_bias([speakers, genders], tmp_path / "bias.png")
    assert (tmp_path / "bias.png").stat().st_size > 1000
