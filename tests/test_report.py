"""The picture of a run shows what its records hold, each scalar in its panel."""

import json
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
from matplotlib.figure import Figure

from train.report import plot_report


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Those that were drawn; they are not closed."""
    drawn: list[Figure] = []
    monkeypatch.setattr(plt, "close", drawn.append)
    return drawn


def panels(figure: Figure) -> dict[str, dict[str, list[list[float]]]]:
    """Of each panel that is seen its lines: label -> points."""
    return {
        axis.get_title(): {str(line.get_label()): line.get_xydata().tolist() for line in axis.lines}
        for axis in figure.axes
        if axis.get_visible()
    }


def test_each_scalar_has_its_place(figures: list[Figure], tmp_path: Path) -> None:
    records = [
        {"step": 2, "loss": 9.0, "answer": 4.0, "traits": 3.0, "gradient_norm": 20.0, "tokens_per_second": 50.0,
         "audio_hours_per_hour": 2.0, "waiting": 0.5, "mfu": 0.25, "busiest_expert": 0.5, "unused_experts": 1,
         "answer_transcribe": 4.5, "answer_gender": 0.5},
        {"step": 4, "loss": 8.0, "answer": 3.0, "gradient_norm": 10.0, "answer_transcribe": 3.5},
        {"step": 4, "loss_transcribe_dev": 1.0, "gap_transcribe_dev": 0.75, "wer_transcribe_dev": 60.0,
         "wer_transcribe_other": 80.0, "invented_transcribe_dev": 5.0,
         "loss_transcribe_times_dev": 1.5, "loss_translate_text_de_dev": 2.5, "bleu_translate_text_de_dev": 12.0},
    ]  # fmt: skip
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    tasks = {
        "transcribe": ["dev", "other"],
        "transcribe_times": ["dev"],
        "diarize": ["dev"],
        "translate_text_de": ["dev"],
        "gender": [],
    }
    plot_report(path, tasks, tmp_path / "training.png")
    assert (tmp_path / "training.png").read_bytes().startswith(b"\x89PNG")
    (figure,) = figures
    assert panels(figure) == {
        "training losses": {"loss": [[2, 9], [4, 8]], "answer": [[2, 4], [4, 3]], "traits": [[2, 3]]},
        "gradient norm": {"gradient_norm": [[2, 20], [4, 10]]},
        "ids per second": {"tokens_per_second": [[2, 50]]},
        "hours of audio per hour": {"audio_hours_per_hour": [[2, 2]]},
        "shares of time, ids and peak": {"waiting": [[2, 0.5]], "mfu": [[2, 0.25]]},
        "share of an expert": {"busiest_expert": [[2, 0.5]]},
        "unused experts": {"unused_experts": [[2, 1]]},
        "transcribe: loss": {"training": [[2, 4.5], [4, 3.5]], "dev": [[4, 1]]},
        "transcribe: listening gap": {"dev": [[4, 0.75]]},
        "transcribe: wer (invented dashed)": {"dev": [[4, 5]], "other": [[4, 80]]},  # of a label the last line
        "transcribe_times: loss": {"dev": [[4, 1.5]]},
        "translate_text_de: loss": {"dev": [[4, 2.5]]},
        "translate_text_de: bleu (invented dashed)": {"dev": [[4, 12]]},
        "gender: loss": {"training": [[2, 0.5]]},
    }
    scores = next(axis for axis in figure.axes if axis.get_title().startswith("transcribe: wer"))
    assert [(line.get_linestyle(), line.get_ydata().tolist()) for line in scores.lines] == [
        ("-", [60.0]), ("-", [80.0]), ("--", [5.0])
    ]  # fmt: skip
    dev, other, invented = (line.get_color() for line in scores.lines)
    assert dev == invented != other
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["training", "dev", "other"]


def test_a_run_without_records_has_no_picture(figures: list[Figure], tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 3, "seconds": 1.0}\n')
    plot_report(path, {"transcribe": ["dev"]}, tmp_path / "training.png")
    assert not figures and not (tmp_path / "training.png").exists()
