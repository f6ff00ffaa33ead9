"""What answering is measured beside: the same audio, and as many ids for each clip, by other programs.

Speed does not depend on what weights hold, so those of the Whispers are drawn at random; what they say is noise.
"""

from __future__ import annotations

import copy
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import speechllm._torchaudio  # noqa: F401  # before transformers, whose models import torchaudio

# isort: split
import numpy as np
import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from serve.recording import listen
from speechllm.audio import read_audio
from speechllm.checkpoint import Checkpoint
from speechllm.grammar import Grammar
from speechllm.prompt import Example, render

# transformers' ways to compute a mixture; batched_mm copies weights for each position, 20 times as slow for a prompt
EXPERTS = ("eager", "grouped_mm")

WHISPER_RATE = 16000  # Hz
# of whisper-tiny; it hears 30 s, 20 ms a position, and silence where there is less
SIZES: dict[str, Any] = {
    "vocab_size": 51865, "num_mel_bins": 80, "d_model": 384, "encoder_layers": 4, "decoder_layers": 4,
    "encoder_attention_heads": 6, "decoder_attention_heads": 6, "encoder_ffn_dim": 1536, "decoder_ffn_dim": 1536,
    "max_source_positions": 1500, "max_target_positions": 448,
}  # fmt: skip
# the marks of the multilingual Whispers, at their places; how an answer begins
MARKS = {
    50257: "<|endoftext|>", 50258: "<|startoftranscript|>", 50259: "<|en|>", 50359: "<|transcribe|>",
    50363: "<|notimestamps|>",
}  # fmt: skip
END, *START = MARKS


class Peer(ABC):
    """A program that answers. ``computes`` says what it does, and with what, in one line."""

    computes: str

    @abstractmethod
    def answer(self, files: Sequence[str], tokens: int) -> None:
        """Read the files and answer about each, where that is for us to say with ``tokens`` ids."""


class HuggingFace(Peer):
    """Hugging Face's ``generate`` on the checkpoint's own LM, by the fastest of EXPERTS."""

    computes = "our codec and our LM (same weights), each clip alone, transformers' `generate`"

    def __init__(self, checkpoint: Checkpoint, instruction: str, grammar: Grammar):
        self._checkpoint, self._instruction = checkpoint, instruction
        self._within = LogitsProcessorList([_Within(grammar.allowed(grammar.start))])
        self._lm: Any = copy.deepcopy(checkpoint.lm)
        # transformers' generate of a Mixtral fails where it returns these
        self._options = {"output_router_logits": False} if hasattr(self._lm.config, "output_router_logits") else {}

    def use(self, experts: str) -> None:
        """One of EXPERTS from now on; no difference for an LM that is no mixture."""
        if any(self._lm.get_experts_implementation().values()):
            self._lm.set_experts_implementation(experts)

    def generate(self, prompts: Sequence[Tensor], limit: int) -> list[list[int]]:
        """Greedy continuations of each ``int64 [seq]`` by at most ``limit`` ids, without the end id."""
        vocabulary = self._checkpoint.vocabulary
        longest = max(len(prompt) for prompt in prompts)
        ids = torch.full((len(prompts), longest), vocabulary.pad)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, longest - len(prompt) :] = prompt
            mask[row, longest - len(prompt) :] = 1
        output = self._lm.generate(
            input_ids=ids,
            attention_mask=mask,
            do_sample=False,
            max_new_tokens=limit,
            eos_token_id=vocabulary.end,
            pad_token_id=vocabulary.pad,
            logits_processor=self._within,
            **self._options,
        )
        rows: list[list[int]] = output[:, longest:].tolist()
        return [row[: row.index(vocabulary.end)] if vocabulary.end in row else row for row in rows]

    def answer(self, files: Sequence[str], tokens: int) -> None:
        checkpoint = self._checkpoint
        for file in files:
            for span in listen(checkpoint, file, file).spans:
                example = Example(span.codes, self._instruction)
                prompt = render(example, checkpoint.vocabulary, checkpoint.text).ids
                self.generate([prompt], checkpoint.settings.max_answer_tokens)  # our answers: as many ids as ours


class _Within(LogitsProcessor):
    """What our grammar does to answers of plain text, at the price of an addition."""

    def __init__(self, allowed: Tensor):
        self._bias = torch.zeros(len(allowed)).masked_fill(~allowed, -torch.inf)

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        return scores + self._bias


class Whisper(Peer):
    """A Whisper of the size of whisper-tiny in transformers, in float32; clips in one batch."""

    computes = "encoder and decoder of whisper-tiny's size, random weights, float32, greedy; `transformers`"

    def __init__(self) -> None:
        config = transformers.WhisperConfig(**SIZES)
        self.model: Any = transformers.WhisperForConditionalGeneration(config).eval()
        self._extract = transformers.WhisperFeatureExtractor(feature_size=config.num_mel_bins)

    def answer(self, files: Sequence[str], tokens: int) -> None:
        clips = [_samples(file) for file in files]
        heard = self._extract(clips, sampling_rate=WHISPER_RATE, return_tensors="pt").input_features
        output = self.model.generate(
            heard,
            decoder_input_ids=torch.tensor([START] * len(files)),
            do_sample=False,
            num_beams=1,
            min_new_tokens=tokens,
            max_new_tokens=tokens,
        )
        assert output.shape == (len(files), tokens)


class FasterWhisper(Peer):
    """The same weights in CTranslate2, which faster-whisper runs on, as int8; clips in one batch."""

    computes = "the same random weights as int8, greedy (its default of 5 beams is slower); faster-whisper's engine"

    def __init__(self, whisper: Whisper, threads: int):
        ctranslate2, faster_whisper = import_module("ctranslate2"), import_module("faster_whisper")
        words = WordLevel({MARKS.get(i, f"piece {i}"): i for i in range(whisper.model.config.vocab_size)}, MARKS[END])
        tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), unk_token=MARKS[END])
        with tempfile.TemporaryDirectory() as folder:
            for part in (whisper.model, tokenizer):
                part.save_pretrained(Path(folder, "model"))
            converted = import_module("ctranslate2.converters").TransformersConverter(str(Path(folder, "model")))
            converted.convert(str(Path(folder, "converted")), quantization="int8")
            self._model = ctranslate2.models.Whisper(
                str(Path(folder, "converted")), compute_type="int8", intra_threads=threads
            )
        self._storage = ctranslate2.StorageView
        self._extract = import_module("faster_whisper.feature_extractor").FeatureExtractor()
        self._fill = faster_whisper.audio.pad_or_trim

    def answer(self, files: Sequence[str], tokens: int) -> None:
        heard = np.stack([self._fill(self._extract(_samples(file))) for file in files])
        output = self._model.generate(
            self._storage.from_array(heard),
            [START] * len(files),
            beam_size=1,
            max_length=max(2 * tokens, tokens + len(START) - 1),  # it halves it, and counts what comes before
            suppress_tokens=[END],
            suppress_blank=False,
        )
        assert all(len(one.sequences_ids[0]) == tokens for one in output)


class PocketSphinx(Peer):
    """CMU's recogniser, one clip after the other. It has no ids: it says what it hears."""

    computes = "hidden Markov models and trigrams of its own English model, each clip alone; words as it hears them"

    def __init__(self) -> None:
        import pocketsphinx

        self._decoder = pocketsphinx.Decoder(samprate=WHISPER_RATE, loglevel="FATAL")

    def answer(self, files: Sequence[str], tokens: int) -> None:
        for file in files:
            self._decoder.start_utt()
            self._decoder.process_raw((_samples(file) * 32767).astype(np.int16).tobytes(), full_utt=True)
            self._decoder.end_utt()
            self._decoder.hyp()


def make_peers(threads: int) -> tuple[dict[str, Peer], dict[str, str]]:
    """The peers that are somebody else's model, by name; and those that cannot be measured here, with the reason."""
    torch.manual_seed(0)
    whisper = Whisper()
    peers: dict[str, Peer] = {"whisper-tiny's size, transformers": whisper}
    missing = {}
    for name, package, make in (
        ("whisper-tiny's size, faster-whisper int8", "faster_whisper", lambda: FasterWhisper(whisper, threads)),
        ("PocketSphinx", "pocketsphinx", PocketSphinx),
    ):
        if find_spec(package):
            peers[name] = make()
        else:
            missing[name] = f"{package} is not installed (pip install -e '.[bench]')"
    return peers, missing


def versions() -> dict[str, str]:
    """Of the packages that are measured, those that are installed."""
    packages = ("torch", "transformers", "ctranslate2", "faster-whisper", "pocketsphinx")
    return {name: version(name) for name in packages if find_spec(name.replace("-", "_"))}


def _samples(file: str) -> np.ndarray:
    """float32 ``[samples]``."""
    samples: np.ndarray = read_audio(file, WHISPER_RATE)[0].numpy()
    return samples
