"""Mimi, DAC, EnCodec and X-codec from ``transformers``, behind our contract: from a local folder or by hub name.

The codes are those of the model's own ``encode``. A model is run over the whole clip at once: nothing is cut into
pieces, so memory grows with the length of the audio, and in Mimi and X-codec, whose encoders attend, parts of it with
the square of the length.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from safetensors import SafetensorError
from torch import Tensor, nn

import speechllm._torchaudio  # noqa: F401  # before transformers, which is imported where it is needed: it takes seconds
from speechllm.codec.base import Codec, hash_tensors
from speechllm.errors import InputError

CONFIG, KIND = "config.json", "huggingface"
HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")
# of the names of weights: what only makes sound of codes, and the number of a codebook
DECODING = re.compile(r"(\w*decoder\w*|upsample|fc1|fc2)\.")
CODEBOOK = re.compile(r"quantizer\.(?:(acoustic|semantic)_\w+\.)?(?:layers|quantizers)\.(\d+)\.")


@dataclass(frozen=True)
class Family:
    """How one type of model differs from the others.

    pads: the clip is filled up to whole hops with zeros, as this model's feature extractor does. The others do so
        inside, layer by layer.
    hop_length, codebooks: read from a model.
    encode: model, ``[1, 1, samples]``, codebooks wanted to codes ``[that many or more, frames]``.
    decode: model, codes ``[k, frames]`` to a waveform of any shape.
    """

    model: str
    pads: bool
    hop_length: Callable[[Any], int]
    codebooks: Callable[[Any], int]
    encode: Callable[[Any, Tensor, int], Tensor]
    decode: Callable[[Any, Tensor], Tensor]


def _mimi_encode(model: Any, wav: Tensor, n_q: int) -> Tensor:
    at_least = max(n_q, model.config.num_semantic_quantizers)
    return model.encode(wav, num_quantizers=at_least, use_streaming=False).audio_codes[0]


def _encodec_encode(model: Any, wav: Tensor, n_q: int) -> Tensor:
    # the quantiser counts codebooks by kbit/s, rounding down; asked directly it takes any number of them
    bandwidth = (n_q + 0.5) * math.log2(model.config.codebook_size) * model.config.frame_rate / 1000
    return model.quantizer.encode(model.encoder(wav), bandwidth)[:, 0]


FAMILIES = {
    "mimi": Family(
        model="MimiModel",
        pads=False,
        hop_length=lambda model: math.prod(model.config.upsampling_ratios) * int(model.encoder.downsample.stride),
        codebooks=lambda model: model.config.num_quantizers,
        encode=_mimi_encode,
        decode=lambda model, codes: model.decode(codes[None]).audio_values,
    ),
    "dac": Family(
        model="DacModel",
        pads=True,
        hop_length=lambda model: math.prod(model.config.downsampling_ratios),
        codebooks=lambda model: model.config.n_codebooks,
        encode=lambda model, wav, n_q: model.encode(wav, n_quantizers=n_q).audio_codes[0],
        decode=lambda model, codes: model.decode(audio_codes=codes[None]).audio_values,
    ),
    "encodec": Family(
        model="EncodecModel",
        pads=False,
        hop_length=lambda model: model.config.hop_length,
        codebooks=lambda model: model.config.num_quantizers,
        encode=_encodec_encode,
        decode=lambda model, codes: model.decoder(model.quantizer.decode(codes[:, None])),
    ),
    "xcodec": Family(
        model="XcodecModel",
        pads=True,
        hop_length=lambda model: model.config.hop_length,
        codebooks=lambda model: model.quantizer.get_num_quantizers_for_bandwidth(model.config.target_bandwidths[-1]),
        encode=lambda model, wav, n_q: model.encode(wav).audio_codes[0],
        decode=lambda model, codes: model.decode(codes[None]).audio_values,
    ),
}


def is_hub_name(source: str | Path) -> bool:
    """Whether ``source`` is looked up on the hub: it reads ``org/name``, and neither it nor ``org`` is a path here.

    So a path mistyped behind a folder that is there never leaves the machine.
    """
    path = Path(source)
    return bool(HUB_NAME.fullmatch(str(source))) and not path.exists() and not path.parent.exists()


class HuggingFaceConfig(BaseModel):
    """What we add to the model's own config."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    n_q: int | None = Field(None, ge=1, description="codebooks to use; all the model has when None")


class HuggingFaceCodec(nn.Module, Codec):
    """A codec of ``transformers``; see :data:`FAMILIES` for the types of model.

    Fewer codebooks than the model has are its first ones.
    """

    def __init__(self, model: Any, config: HuggingFaceConfig | None = None):
        """
        Raises:
            InputError: ``n_q`` exceeds the model's codebooks, or its codes alone do not give the sound back: stereo,
                or a loudness kept apart for every clip or chunk.
        """
        super().__init__()
        self.config = config or HuggingFaceConfig()
        settings = model.config
        kind = settings.model_type
        self.family = FAMILIES[kind]
        if getattr(settings, "audio_channels", 1) != 1:
            raise InputError(f"this {kind} is for {settings.audio_channels} channels: take a mono one")
        if getattr(settings, "normalize", False) or getattr(settings, "chunk_length_s", None):
            raise InputError(
                f"this {kind} normalises or chunks its input (normalize, chunk_length_s), so codes alone do not give "
                "the sound back: take one that does not, such as facebook/encodec_24khz"
            )
        if kind == "mimi" and (model.encoder is None or model.decoder is None):
            raise InputError("this mimi is saved without its encoder or decoder: take a whole one")
        self.model: Any = model
        self.sample_rate = settings.sample_rate if kind == "xcodec" else settings.sampling_rate
        self.hop_length = self.family.hop_length(model)
        self.card = settings.codebook_size
        self.n_q = self.family.codebooks(model)
        self.n_q = self.check_n_q(self.config.n_q)
        self.eval()

    @classmethod
    def pretrained(cls, source: str | Path, config: HuggingFaceConfig | None = None) -> HuggingFaceCodec:
        """The model in ``source``, a local folder, or a name on the hub (``org/name``) whose files are downloaded once.

        Raises:
            InputError: the files cannot be had, are damaged or no safetensors, or are of no model in :data:`FAMILIES`.
        """
        if not Path(source).is_dir() and not is_hub_name(source):
            raise InputError(f"{source}: no such folder, and no name on the hub (org/name)")
        import transformers
        from huggingface_hub.errors import StrictDataclassError
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()  # of weights that take a moment
        ways_out = (
            "give a local folder with safetensors, download one where there is a network (hf download NAME "
            "--local-dir DIR), or set HF_HOME to a cache that has it"
        )
        try:
            settings, _ = transformers.PreTrainedConfig.get_config_dict(source)
            kind = settings.get("model_type")
            if kind not in FAMILIES:
                raise InputError(f"{source}: no codec of type {kind!r} is known; known are {', '.join(FAMILIES)}")
            model_class = getattr(transformers, FAMILIES[kind].model)
            model, report = model_class.from_pretrained(
                source, dtype=torch.float32, use_safetensors=True, output_loading_info=True
            )
        except OSError as error:
            told = f"{'no such folder, and ' * is_hub_name(source)}the codec's files cannot be had"
            raise InputError(f"{source}: {told} ({_first_line(error)}): {ways_out}") from error
        except (SafetensorError, RuntimeError, ValueError, TypeError, StrictDataclassError) as error:
            if isinstance(error, InputError):
                raise
            first = " ".join(str(error).split()) if isinstance(error, StrictDataclassError) else _first_line(error)
            raise InputError(f"{source}: damaged, or not a codec's folder: {first}") from error
        if report["missing_keys"]:  # transformers fills them with random numbers
            raise InputError(f"{source}: its files hold no weights for {', '.join(sorted(report['missing_keys'])[:3])}")
        try:
            return cls(model, config)
        except InputError as error:
            raise InputError(f"{source}: {error}") from error

    def save(self, folder: Path, dtype: torch.dtype = torch.float32) -> None:
        """Write a folder that ``transformers`` opens too, parameters as ``dtype``; ``n_q`` is added to its config."""
        parameters = {name for name, _ in self.model.named_parameters()}  # codebooks may be buffers: kept exact
        state = {
            name: value.to(dtype) if name in parameters else value for name, value in self.model.state_dict().items()
        }
        self.model.save_pretrained(folder, state_dict=state)
        path = folder / CONFIG
        config = json.loads(path.read_text(encoding="utf-8")) | {"kind": KIND, "n_q": self.n_q}
        path.write_text(json.dumps(config, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

    @torch.inference_mode()
    def encode(self, wav: Tensor, n_q: int | None = None) -> Tensor:
        """See :meth:`Codec.encode`."""
        n_q = self.check_n_q(n_q)
        frames = -(-wav.shape[-1] // self.hop_length)
        if self.family.pads:
            wav = F.pad(wav, (0, frames * self.hop_length - wav.shape[-1]))
        return self.family.encode(self.model, wav[None], n_q)[:n_q, :frames].contiguous()

    @torch.inference_mode()
    def decode(self, codes: Tensor) -> Tensor:
        """See :meth:`Codec.decode`. DAC with an odd stride gives a few samples less; zeros stand for them."""
        samples = codes.shape[1] * self.hop_length
        wav = self.family.decode(self.model, codes).reshape(1, -1)[:, :samples]
        return F.pad(wav, (0, samples - wav.shape[1]))

    def fingerprint(self, n_q: int) -> str:
        """See :meth:`Codec.fingerprint`. Names have no part in it: they change between versions of transformers."""
        semantic = getattr(self.model.config, "num_semantic_quantizers", 0)
        digests = []
        for name, value in self.model.state_dict().items():
            codebook = CODEBOOK.match(name)
            number = int(codebook[2]) + semantic * (codebook[1] == "acoustic") if codebook else 0
            if number < n_q and not DECODING.match(name):
                digests.append(hash_tensors({"": value}))
        return hashlib.sha256("".join(sorted(digests)).encode()).hexdigest()[:16]


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0].rstrip(".")
