"""Baselines: what stands next to our figures, asked the same questions about the same clips in the same run."""

from __future__ import annotations

from pathlib import Path

from speechllm.errors import InputError
from train.baseline_labels import Majority, Svm
from train.baseline_system import System
from train.baseline_vad import EnergyVad, SileroVad
from train.baseline_words import AskText, Cascade, PocketSphinx

BASELINES = {  # name -> what it is, in a line, for tables
    "pocketsphinx": "PocketSphinx with its own English model",
    "cascade": "our transcript, translated as text by the same model",
    "majority": "the commonest label of the set's train split",
    "svm": "SVM (RBF) on statistics of MFCCs, energy and pitch; the set's train split, C and gamma by its dev split",
    "energy_vad": "levels above a share of the clip's range; the share fixed beforehand on other data",
    "silero_vad": "silero-vad with its package's settings",
}


def make_baseline(name: str, data: Path, ours: System, ask_text: AskText) -> System:
    """One of BASELINES for a test set.

    data: manifest of the set, or the folder of one; ``majority`` and ``svm`` learn from its train split, when they are
    asked. ours, ask_text: our model asked about clips, and on text alone; ``cascade`` stands on them.

    Raises:
        InputError: the name is unknown, or the package of the baseline is not installed.
    """
    if name == "pocketsphinx":
        return PocketSphinx()
    if name == "cascade":
        return Cascade(ours, ask_text)
    if name == "majority":
        return Majority(data)
    if name == "svm":
        return Svm(data)
    if name == "energy_vad":
        return EnergyVad()
    if name == "silero_vad":
        return SileroVad()
    raise InputError(f"baseline {name!r}: unknown; known are {', '.join(BASELINES)}")
