"""Train the 16 kHz speech codec: ``python -m train.codec --config train/configs/codec-16k.yaml``."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import torch
import typer
from pydantic import Field

from speechllm.codec import SpeechCodec, SpeechCodecConfig, load_codec, save_codec
from speechllm.data.corpus import read_corpus
from speechllm.errors import InputError
from speechllm.folders import replaced
from train.codec_acoustic import AcousticSettings, train_acoustic
from train.codec_data import CtcData, phoneme_inventory, repeated, transcribable
from train.codec_semantic import SemanticSettings, train_semantic
from train.commands import plain_errors
from train.config import Settings, read_config
from train.output import output_folder


class CodecTraining(Settings):
    """The YAML file: where the audio is, the sizes of the codec, and each stage's settings."""

    out: Path
    seed: int = 0
    manifests: list[Path]
    dev_manifests: list[Path]
    repeat: dict[str, Annotated[int, Field(ge=1)]] = Field(
        {}, description="how often the semantic stage lists the clips of a source; once unless given"
    )
    codec: SpeechCodecConfig = SpeechCodecConfig()
    semantic: SemanticSettings
    acoustic: AcousticSettings


def trained_codec(folder: Path) -> SpeechCodec:
    """Raises InputError where there is none, or one of another kind."""
    codec = load_codec(folder)
    if not isinstance(codec, SpeechCodec):
        raise InputError(f"{folder}: a codec of another kind: set another 'out'")
    return codec


def acoustic_stage(config: CodecTraining, resume: bool) -> None:
    codec = trained_codec(config.out / "codec")
    torch.manual_seed(config.seed)
    codec.acoustic = SpeechCodec(codec.config).acoustic  # not that of a run before
    train, dev = read_corpus(config.manifests, "train"), read_corpus(config.dev_manifests, "dev")
    train_acoustic(codec, train, dev, config.acoustic, config.out, config.seed, resume)
    save_codec(codec, config.out / "codec")


class Stage(str, Enum):
    """What one call does."""

    semantic = "semantic"
    acoustic = "acoustic"
    export = "export"


def semantic_stage(config: CodecTraining, resume: bool) -> None:
    clips = transcribable(read_corpus(config.manifests, "train"))
    train_items = repeated(clips, config.repeat, "repeat")
    dev_items = transcribable(read_corpus(config.dev_manifests, "dev"))
    started = config.out / "semantic" / "codec"
    if started.exists() and not resume:
        raise InputError(f"{config.out}: holds a run already: add --resume to go on, or set another 'out'")
    if started.exists():
        codec = trained_codec(started)  # the phonemes of the run that is resumed, whatever the corpus holds by now
        if codec.config != config.codec.model_copy(update={"phonemes": codec.config.phonemes}):
            raise InputError(f"codec: {started} has other sizes: set these again, or another 'out'")
    else:
        torch.manual_seed(config.seed)
        inventory = phoneme_inventory(clips)
        codec = SpeechCodec(config.codec.model_copy(update={"phonemes": inventory}))
        with replaced(started) as new:
            save_codec(codec, new)
    inventory, rate = codec.config.phonemes, codec.sample_rate
    train = CtcData(train_items, inventory, codec.mel, rate, config.semantic.perturbed)
    dev = CtcData(dev_items, inventory, codec.mel, rate)
    train_semantic(codec, train, dev, config.semantic, config.out, config.seed, resume)
    finished = config.out / "codec"
    if finished.exists() and load_codec(finished).fingerprint(1) == codec.fingerprint(1):
        return  # nothing was left to train, and the acoustic stage may have been run since
    save_codec(codec, finished)


def main(
    config: Annotated[Path, typer.Option(help="YAML file; see train/configs/codec-16k.yaml")],
    stage: Annotated[Stage, typer.Option(help="semantic, then acoustic, then export")] = Stage.semantic,
    export_to: Annotated[Path, typer.Option(help="folder that the stage 'export' writes, in half precision")] = Path(
        "tokenizers/codec"
    ),
    resume: Annotated[bool, typer.Option(help="go on from the last saved state")] = False,
) -> None:
    """Train one stage of the codec, into OUT/codec; or export that for others to use."""
    with plain_errors():
        settings = read_config(config, CodecTraining)
        if stage is Stage.export:
            codec = trained_codec(settings.out / "codec")
            codec.check_trained(codec.n_q)
            with output_folder(export_to):
                save_codec(codec, export_to, torch.float16)
        else:
            with output_folder(settings.out):
                (semantic_stage if stage is Stage.semantic else acoustic_stage)(settings, resume)


if __name__ == "__main__":
    typer.run(main)
