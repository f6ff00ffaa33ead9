"""The measures of a codec: by hand where they can be, on toys a probe must or cannot learn, and the whole command."""

import json
import math
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from conftest import ROOT, command, filled, require_engine, write_yaml
from typer import Typer
from typer.testing import CliRunner

from speechllm.audio import read_audio, write_audio
from speechllm.codec import SpeechCodec, SpeechCodecConfig, save_codec
from speechllm.codec.base import code_entropy
from speechllm.data.corpus import Item
from speechllm.data.manifest import Utterance, write_manifest
from speechllm.data.phonemes import phonemes
from speechllm.errors import InputError
from train import evaluate_codec
from train.codec_measures import CHANGES, Judge, heard, misheard, same_codes, si_sdr, speech_of, speed, use
from train.codec_probes import LETTERS, Clip, Heard, ProbeSettings, WordProbe, letters, read_trait, read_words
from train.codec_report import ENCODEC, LOG_MEL, verdicts
from train.codec_selection import halves, pick, unseen_speakers
from train.resumable import Store, Unit

TINY = ProbeSettings(steps=2, dim=16, depth=1, kernel=3)


def quiet(done: int) -> None:
    """No progress bar."""


@pytest.fixture(scope="module")
def codec() -> SpeechCodec:
    torch.manual_seed(0)
    config = SpeechCodecConfig(
        n_mels=16, card=16, n_acoustic=1, dim=16, depth=1, recognizer_depth=1, kernel=3, code_dim=8,
        acoustic_dim=16, acoustic_depth=1, decoder_dim=16, decoder_depth=1,
    )  # fmt: skip
    return filled(SpeechCodec(config))


@pytest.fixture(scope="module")
def speech(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Manifest of 1.2 s clips: two speakers to learn from, two others to test on, each saying four sentences twice."""
    folder = tmp_path_factory.mktemp("speech")
    generator = torch.Generator().manual_seed(0)
    utterances = []
    for speaker, split in (("ann", "train"), ("bob", "train"), ("cy", "test"), ("di", "test")):
        for number in range(8):
            name = f"{speaker}{number}"
            swell = torch.sin(torch.arange(19200) / 19200 * 12).square()
            write_audio(folder / f"{name}.wav", 0.1 * swell * torch.randn(1, 19200, generator=generator), 16000)
            utterances.append(
                Utterance(
                    id=name,
                    audio=f"{name}.wav",
                    duration=1.2,
                    text=["a dog", "a cat", "two cows", "no"][number % 4],
                    language="en",
                    speaker=speaker,
                    labels={"emotion": ["glad", "sad"][number // 4]},
                    split=split,
                    source="made",
                )
            )
    write_manifest(folder / "manifest.jsonl", utterances)
    return folder / "manifest.jsonl"


@pytest.fixture
def settings(codec: SpeechCodec, speech: Path, tmp_path: Path) -> dict[str, Any]:
    """What the config file holds, with two codecs that are the same."""
    for name in ("ours", "plain"):
        save_codec(codec, tmp_path / name)
    groups, probe = {"noise": [speech]}, TINY.model_dump()
    measured = {"tests": groups, "clips": 2}
    return {
        "out": tmp_path / "out",
        "codecs": {"ours": tmp_path / "ours", "plain": tmp_path / "plain"},
        "phonemes": measured,
        "words": {"train": [speech], "tests": groups, "test_clips": 3, "probe": probe},
        "speaker": {"tests": groups, "least": 2, "repeats": 2, "probe": probe},
        "emotion": {"sets": groups, "repeats": 1, "probe": probe},
        "fidelity": measured,
        "use": measured,
        "stability": measured,
        "speed": {"speech": [speech], "seconds": [0.2, 0.4], "threads": [1], "repeats": 1, "encodec_seconds": 0.2},
    }


def test_entropy_of_codes_by_hand() -> None:
    codes = torch.tensor([[0, 1, 2, 3], [5, 5, 5, 5], [0, 0, 7, 7], [0, 0, 0, 1]])
    expected = [2.0, 0.0, 1.0, -(0.75 * math.log2(0.75) + 0.25 * math.log2(0.25))]
    assert code_entropy(codes) == pytest.approx(expected)


def test_use_of_codes(codec: SpeechCodec, speech: Path) -> None:
    items = pick([speech], "test", 3, 0, bool, "audio")
    found: Any = use(codec, items, quiet)
    assert found["frames"] == 3 * 30
    assert found["nominal_bits_per_second"] == 25 * 2 * 4
    assert found["entropy_bits_per_second"] == pytest.approx(25 * sum(map(math.log2, found["perplexity"])))
    assert all(1 < value <= 16 for value in found["perplexity"])


def test_phonemes_misheard_by_hand(codec: SpeechCodec, speech: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    require_engine("espeak-ng")
    said = phonemes("two cows", "en")
    known = tuple(sorted({*said} - {said[-1]}))  # the last one cannot be heard
    codec = filled(SpeechCodec(codec.config.model_copy(update={"phonemes": known})))
    path = [known.index(phoneme) + 1 for phoneme in said[1:-1]]  # and the first one is not

    def recognize(vectors: torch.Tensor) -> torch.Tensor:
        assert torch.equal(vectors[0], codec.code_vectors()[codes])
        frames = [index for index in path for _ in range(2)]
        frames += [0] * (vectors.shape[1] - len(frames))
        return torch.nn.functional.one_hot(torch.tensor([frames]), 1 + len(known)).float()

    monkeypatch.setattr(codec.semantic, "recognize", recognize)
    items = [item for item in pick([speech], "test", 20, 0, bool, "audio") if item.utterance.text == "two cows"]
    codes = codec.encode(items[0].wav(16000), n_q=1)[0]
    assert len(set(codes.tolist())) > 3
    assert heard(codec, items[0].wav(16000)) == said[1:-1]
    found = misheard(codec, items[:1] * 3, quiet)
    assert (found["clips"], found["phonemes"]) == (3, 3 * len(said))
    assert found["per"] == found["low"] == found["high"] == pytest.approx(200 / len(said))


def test_stability(codec: SpeechCodec) -> None:
    generator = torch.Generator().manual_seed(1)
    wavs = [0.1 * torch.randn(1, samples, generator=generator) for samples in (16000, 9000)]
    changes = {"none": lambda wav, rate, rng: wav, "silence": lambda wav, rate, rng: torch.zeros_like(wav), **CHANGES}
    same = same_codes(codec, wavs, changes, quiet)
    assert same["none"] == [100.0, 100.0]
    assert max(same["silence"]) < 60
    assert all(0 <= share <= 100 and len(shares) == codec.n_q for shares in same.values() for share in shares)
    assert same == same_codes(codec, wavs, changes, quiet)


def test_changes_by_hand() -> None:
    wav = 0.1 * torch.randn(1, 16000, generator=torch.Generator().manual_seed(2))
    changed = {name: change(wav, 16000, Random(0)) for name, change in CHANGES.items()}
    assert all(made.shape == wav.shape for made in changed.values())
    assert torch.allclose(20 * torch.log10(changed["+1 dB"] / wav), torch.tensor(1.0), atol=1e-3)
    assert torch.allclose(changed["+1 dB"] * 10 ** (-2 / 20), changed["-1 dB"])
    assert torch.equal(changed["5 ms later"][:, 80:], wav[:, :-80])
    for decibels in (30, 20):
        added = changed[f"noise {decibels} dB"] - wav
        ratio = wav.square().mean() / added.square().mean()
        assert 10 * math.log10(ratio) == pytest.approx(decibels, abs=0.01)


def test_si_sdr_by_hand() -> None:
    original, noise = torch.tensor([1.0, -1.0, 1.0, -1.0] * 100), torch.tensor([1.0, 1.0, -1.0, -1.0] * 100)
    assert si_sdr(original, original + 0.1 * noise) == pytest.approx(20, abs=1e-3)
    assert si_sdr(original, 3 * (original + 0.1 * noise) + 0.5) == pytest.approx(20, abs=1e-3)


def test_judge() -> None:
    judge = Judge()
    clips = sorted((ROOT / "prompts" / "clips").glob("*.wav"))[:2]
    first, second = (read_audio(path, 16000) for path in clips)
    first = first[:, :24000]
    understood = judge.words(first)
    judge.words(3 * second[:, :16000])
    assert judge.words(first) == understood != ""  # whatever was heard in between
    same = judge.distances(first, first)
    assert same["mel_db"] == 0 and same["si_sdr"] > 60
    assert same["stoi"] == pytest.approx(1, abs=1e-3) and same["pesq"] > 4.5
    silent = judge.distances(first, torch.zeros_like(first))
    assert silent["pesq"] < 2 and silent["stoi"] < 0.5 and silent["mel_db"] > 5


def test_probe_reads_codes_that_are_letters_and_no_others() -> None:
    """Two frames a letter, each with a code of its own; the second input has as many codes, which mean nothing."""
    rng = Random(0)
    probe = TINY.model_copy(update={"steps": 120, "dim": 32, "learning_rate": 1e-2, "warmup": 5, "dropout": 0.0})
    probe = probe.model_copy(update={"batch_seconds": 16, "short_first": 0})
    generator = torch.Generator().manual_seed(0)
    read: list[Clip] = []
    random: list[Clip] = []
    for _ in range(160):
        text = " ".join("".join(rng.choices(LETTERS[:10], k=rng.randint(1, 4))) for _ in range(2))
        codes = torch.tensor([[c] for x in text for c in (LETTERS.index(x), 28 + LETTERS.index(x))], dtype=torch.int32)
        read.append(Clip(codes, text, len(codes) / 25))
        noise = torch.randint(0, 56, codes.shape, generator=generator, dtype=torch.int32)
        random.append(Clip(noise, text, len(codes) / 25))
    good, bad = (read_words(c[:120], {"toy": c[120:]}, 56, 25.0, probe, 0, quiet)["toy"] for c in (read, random))
    assert good["cer"] < 3
    assert bad["cer"] > 60
    assert good["low"] <= good["wer"] <= good["high"] and good["clips"] == 40 and good["words"] == 80


def test_word_probe_on_every_kind_of_input() -> None:
    assert WordProbe(2, 16, 25.0, TINY).outputs == 2 and WordProbe(2, 16, 75.0, TINY).outputs == 1
    assert letters("Don't stop, Äpfel!") is None and letters("3 dogs") is None and letters("—") is None
    assert letters("Don't STOP.") == "don't stop"
    full = WordProbe(320, None, 25.0, ProbeSettings(steps=1))
    assert 1.0e6 < sum(p.numel() for p in full.parameters()) < 1.4e6


def test_padding_does_not_change_a_probes_answer() -> None:
    torch.manual_seed(0)
    probe = WordProbe(2, 16, 25.0, TINY).eval()
    frames, mask = torch.randint(0, 16, (1, 9, 2)), torch.ones(1, 9, 1, dtype=torch.bool)
    longer = torch.cat([frames, torch.randint(0, 16, (1, 5, 2))], 1)
    padded = probe(longer, torch.cat([mask, torch.zeros(1, 5, 1, dtype=torch.bool)], 1))
    assert torch.allclose(padded[:, :18], probe(frames, mask), atol=1e-5)


def test_trait_probe() -> None:
    generator = torch.Generator().manual_seed(0)
    clips = []
    for number in range(80):
        low = 8 * (number % 2)
        codes = torch.randint(low, low + 8, (10 + number % 7, 2), generator=generator, dtype=torch.int32)
        clips.append(Clip(codes, "ab"[number % 2], len(codes) / 25))
    probe = TINY.model_copy(update={"steps": 60, "short_first": 0, "warmup": 5})
    assert read_trait(clips[:60], clips[60:], 16, probe, 0, quiet) == 100
    shuffled = [Clip(c.frames, "ab"[i // 2 % 2], c.seconds) for i, c in enumerate(clips)]
    assert read_trait(clips[:60], shuffled[60:], 16, probe, 0, quiet) == 50


def test_heard_frames(codec: SpeechCodec, speech: Path, tmp_path: Path) -> None:
    item = pick([speech], "test", 1, 0, bool, "audio")[0]
    codes = Heard(codec).clip(item, "x", (1,)).frames
    assert torch.equal(codes.T.long(), codec.encode(item.wav(16000))[1:])
    assert Heard(None).frames(item).shape == (30, 320)
    assert Heard(None).frame_rate == codec.frame_rate
    louder = Item(item.utterance.model_copy(update={"audio": "louder.wav"}), tmp_path)
    write_audio(tmp_path / "louder.wav", 2 * item.wav(16000), 16000)
    for level, expected in ((True, math.log(4) / 4), (False, 0.0)):  # twice as loud, as scale_log() scales it
        difference = Heard(None, level).frames(louder).float() - Heard(None, level).frames(item).float()
        assert difference.mean().item() == pytest.approx(expected, abs=0.02)


def test_halves_share_no_sentence(speech: Path, tmp_path: Path) -> None:
    items = unseen_speakers([speech], 6, 0)
    assert {item.utterance.speaker for item in items} == {"cy", "di"} and len(items) == 12
    first, second = halves(items, 1)
    assert not {i.utterance.text for i in first} & {i.utterance.text for i in second}
    assert len(first) + len(second) == 12
    mute = [Item(i.utterance.model_copy(update={"text": None}), i.root) for i in items]
    assert [len(half) for half in halves(mute, 3)] == [6, 6]
    with pytest.raises(InputError, match="0 speakers have 4 clips in each half"):
        halves(mute, 4)
    with pytest.raises(InputError, match="no dev utterance"):
        pick([speech], "dev", 1, 0, bool, "audio")
    with pytest.raises(InputError, match="no test clip with nonsense"):
        pick([speech], "test", 1, 0, lambda item: False, "nonsense")


def test_speed_and_speech_of_a_length(codec: SpeechCodec, speech: Path) -> None:
    items = pick([speech], "test", 9, 0, bool, "audio")
    wav = speech_of(items[:2], 3.0)
    assert wav.shape == (1, 48000) and torch.equal(wav[:, :9600], wav[:, 38400:])
    assert torch.equal(speech_of(items, 0.5), items[0].wav(16000)[:, :8000])
    threads = torch.get_num_threads()
    taken = speed({"ours": codec}, wav[:, :8000], 2, 1)
    assert torch.get_num_threads() == threads
    assert set(taken["ours"]) == {"encode", "decode"} and min(taken["ours"].values()) > 0


def words_result(wer: float) -> dict[str, Any]:
    return {
        "train_clips": 1,
        "steps": 1,
        "tests": {"speech": {"wer": wer, "low": wer, "high": wer, "cer": wer, "clips": 1, "words": 1}},
    }


@pytest.mark.parametrize(
    ("mine", "plain", "perplexity", "same", "seconds", "reached"),
    [
        (35.9, 72.0, [8.0, 8.0], [90.0, 10.0], 0.5, [True, True, True, True, True, True, True, True, True]),
        (36.1, 72.0, [7.9, 8.1], [89.9, 95.0], 1.5, [False, False, False, False, False, False, False, False, True]),
        (20.0, 39.0, [9.0, 7.9], [95.0, 95.0], 1.0, [True, False, True, False, True, False, True, True, True]),
    ],
)
def test_bounds_are_computed(
    mine: float, plain: float, perplexity: list[float], same: list[float], seconds: float, reached: list[bool]
) -> None:
    results = {
        "words": {LOG_MEL: words_result(30), "ours/0": words_result(mine), "plain/0": words_result(plain)},
        "use": {"ours": {"speech": {"perplexity": perplexity, "card": 16}}},
        "stability": {"ours": {"speech": {"+1 dB": [99.0, 9.0], "-1 dB": same}}},
        "speed": {
            "1 s/1": {"ours": {"encode": seconds, "decode": 0.1}, ENCODEC: {"encode": 1.0, "decode": 0.2}},
            "9 s/1": {"ours": {"encode": 9.0, "decode": 9.0}},
        },
    }
    found = verdicts(results, ["ours", "plain"])
    assert [v.reached for v in found] == reached
    assert found[0].value == f"{100 * (mine / 30 - 1):+.0f} % ({mine:.1f} to 30.0)"
    assert len(verdicts(results, ["ours"])) == 7
    assert verdicts({}, ["ours"]) == []
    unread = {LOG_MEL: words_result(61), "ours/0": words_result(62)}
    assert [v.reached for v in verdicts({"words": unread}, ["ours"])] == [None, True]


def test_kept_results(tmp_path: Path) -> None:
    done: list[str] = []

    def unit(key: str) -> Unit:
        def run(advance: Any) -> dict[str, Any]:
            if key == "c" and len(done) < 3:
                raise KeyboardInterrupt
            done.append(key)
            return {"value": key}

        return Unit(key, 1, run)

    path, of = tmp_path / "parts" / "x.json", {"settings": {"steps": 2}, "codec ours": "f00"}
    with pytest.raises(KeyboardInterrupt):
        Store(path, of).fill("x", map(unit, "abc"))
    Store(path, of | {"codec plain": "beef"}).fill("x", map(unit, "bad"))
    assert done == ["a", "b", "d"]
    assert list(Store(path, of).results) == ["a", "b", "d"]
    with pytest.raises(InputError, match="with other codec ours: delete it"):
        Store(path, of | {"codec ours": "f01"})
    for damaged in ("{", "{}", "[]", '{"of": 1, "results": {}}', "\udcff"):
        path.write_bytes(damaged.encode("utf-8", "surrogateescape"))
        with pytest.raises(InputError, match="damaged"):
            Store(path, of)


def test_whole_command(settings: dict[str, Any], tmp_path: Path) -> None:
    require_engine("espeak-ng")
    config, out = write_yaml(tmp_path / "evaluate.yaml", settings), tmp_path / "out"
    command(evaluate_codec.main, "--config", config, "--only", "words,use")
    kept = out / "parts" / "words.json"
    words = json.loads(kept.read_text())
    assert list(words["results"]) == [LOG_MEL, *(f"{n}/{b}" for b in ("0", "0-1", "1") for n in ("ours", "plain"))]
    assert words["results"]["ours/0-1"]["tests"] == words["results"]["plain/0-1"]["tests"]  # the same codec and seed
    words["results"]["ours/0"]["tests"]["noise"]["wer"] = 12.5  # what was not measured, to see that it is kept
    del words["results"]["plain/0"]
    kept.write_text(json.dumps(words))
    text = command(evaluate_codec.main, "--config", config)
    results = json.loads((out / "results.json").read_text())
    assert results["words"]["ours/0"]["tests"]["noise"]["wer"] == 12.5 and "plain/0" in results["words"]
    parts = ("phonemes", "words", "speaker", "emotion", "fidelity", "use", "stability", "speed")
    assert {*parts} < set(results)
    assert results["phonemes"]["ours"] == results["phonemes"]["plain"]
    assert set(results["emotion"]) == {f"noise/{k}" for k in (LOG_MEL, "ours/0", "ours/0-1", "plain/0", "plain/0-1")}
    assert results["speaker"]["noise/ours/0"]["chance"] == 50 and len(results["speaker"]["noise/ours/0"]["runs"]) == 2
    assert set(results["fidelity"]) == {"original", "ours/2", "plain/2"}
    assert set(results["speed"]["0.2 s/1"]) == {"ours", ENCODEC} and set(results["speed"]["0.4 s/1"]) == {"ours"}
    assert (out / "results.md").read_text() in text
    for verdict in results["bounds"]:
        row = f"| {verdict['what']} | {verdict['on']} | {verdict['value']} | {verdict['bound']} |"
        said = {True: "reached", False: "not reached", None: "not judged: no WER below 60"}
        assert f"{row} {said[verdict['reached']]} |" in text
    for name in parts:
        assert (out / f"{name}.png").stat().st_size > 1000, name
    told = evaluate_codec.read_config(config, evaluate_codec.CodecEvaluation)
    for manifest in evaluate_codec.manifests(told.use.model_dump()):
        manifest.write_text(manifest.read_text() + "\n")
    with pytest.raises(InputError, match=r"use.json: measured with other manifests: delete it"):
        evaluate_codec.evaluate(told, ["use"])


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({}, ["--only", "words,smell"], "no part is called 'smell'"),
        ({"codecs": {}}, [], "codecs: "),
        ({"codecs": {"a/b": "x"}}, [], "codecs.a/b"),
        ({"codecs": {"ours": "nowhere/codec-x/y"}}, [], "nowhere/codec-x/y"),
        ({"taste": 1}, [], "taste"),
    ],
)
def test_user_errors(
    settings: dict[str, Any], tmp_path: Path, change: dict[str, Any], options: list[str], message: str
) -> None:
    app = Typer()
    app.command()(evaluate_codec.main)
    config = write_yaml(tmp_path / "evaluate.yaml", settings | change)
    done = CliRunner().invoke(app, ["--config", str(config), *options])
    assert done.exit_code == 2, done.output
    assert message in done.output


def test_shipped_config_is_valid() -> None:
    config = evaluate_codec.read_config(
        ROOT / "train" / "configs" / "evaluate-codec.yaml", evaluate_codec.CodecEvaluation
    )
    assert list(config.codecs) == ["ours", "plain"]
