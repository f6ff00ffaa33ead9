"""`speechllm codes`: look at a codec and use it: audio to codes, codes to audio, their numbers, and a picture."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from typer.core import TyperGroup

from serve.plain_errors import plain_errors
from speechllm.errors import InputError

# Commands import torch and the rest themselves: --help and usage errors do not wait for them.
if TYPE_CHECKING:
    from torch import Tensor

    from speechllm.codec import Codec

CODES_SUFFIX = ".codes.safetensors"
DECODED_SUFFIX = ".decoded.wav"  # beside the original, which is likely to be called .wav


class _Codes(TyperGroup):
    """What a user can cause ends as in the other commands: one line, and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        with plain_errors():
            return super().invoke(ctx)


app = typer.Typer(
    name="codes",
    cls=_Codes,
    help="Look at the codec and use it: audio to codes and back, their numbers, a picture.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

CodecName = Annotated[
    str | None,
    typer.Option("--codec", metavar="FOLDER_OR_NAME", help="Without it, the codec of the built-in checkpoint."),
]
NumCodebooks = Annotated[int | None, typer.Option("--n-q", min=1, help="Use only the first codebooks, that many.")]
Force = Annotated[bool, typer.Option("--force", help="Overwrite the output if it is there already.")]
AudioFile = Annotated[
    str, typer.Argument(metavar="AUDIO", help="Audio file (wav, flac, ogg, opus, mp3); - reads standard input.")
]


@app.command()
def encode(
    audio: AudioFile,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help=f"Without it, AUDIO's name with {CODES_SUFFIX}.")
    ] = None,
    codec: CodecName = None,
    n_q: NumCodebooks = None,
    force: Force = False,
) -> None:
    """Turn audio into a file of codes.

    All channels are mixed to one, at the codec's sample rate.
    """
    target = _target(audio, output, CODES_SUFFIX, (".safetensors",), force)
    coder = _load(codec)
    from speechllm.audio import read_audio
    from speechllm.codec.files import save_codes

    coder.check_n_q(n_q)
    wav = read_audio(audio, coder.sample_rate)
    codes = coder.encode(wav, n_q)
    save_codes(target, codes, wav.shape[1], coder)
    seconds, books = wav.shape[1] / coder.sample_rate, _count(codes.shape[0], "codebook")
    print(f"{target}: {seconds:.3f} s, {_count(codes.shape[1], 'frame')}, {books}", flush=True)


@app.command()
def decode(
    codes: Annotated[str, typer.Argument(metavar="CODES", help="A file made by speechllm codes encode.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help=f"A .wav or .flac; without it, CODES' name, {DECODED_SUFFIX}.")
    ] = None,
    codec: CodecName = None,
    n_q: NumCodebooks = None,
    force: Force = False,
) -> None:
    """Turn a file of codes back into audio, as many samples as were encoded."""
    target = _target(codes, output, DECODED_SUFFIX, (".wav", ".flac"), force)
    coder = _load(codec)
    from speechllm.audio import write_audio
    from speechllm.codec.files import load_codes

    stored, samples = load_codes(codes, coder)
    if n_q is not None and n_q > len(stored):
        raise InputError(f"--n-q {n_q}: {codes} holds {_count(len(stored), 'codebook')}")
    wav = coder.decode(stored[:n_q])[:, :samples]
    write_audio(target, wav, coder.sample_rate)
    print(f"{target}: {wav.shape[1] / coder.sample_rate:.3f} s at {coder.sample_rate} Hz", flush=True)


@app.command()
def info(
    file: Annotated[str | None, typer.Argument(metavar="FILE", help="A file of codes, or audio.")] = None,
    codec: CodecName = None,
    format: Annotated[
        Literal["text", "json"], typer.Option("--format", "-f", help="text: one line per number. json: one object.")
    ] = "text",
) -> None:
    """Say what the codec is and, given a file, how its codes are used there."""
    coder = _load(codec)
    said: dict[str, Any] = {"codec": codec_numbers(coder)}
    if file is not None:
        from speechllm.audio import read_audio
        from speechllm.codec.files import load_codes

        if file.lower().endswith(".safetensors"):
            codes, samples = load_codes(file, coder)
        else:
            wav = read_audio(file, coder.sample_rate)
            codes, samples = coder.encode(wav), wav.shape[1]
        said["file"] = {"file": file, "seconds": samples / coder.sample_rate} | code_numbers(codes, coder.frame_rate)
    if format == "json":
        print(json.dumps(said, ensure_ascii=False), flush=True)
        return
    rows = _rows(said)
    width = max(map(len, rows))
    for name, value in rows.items():
        print(f"{name:<{width}}  {value}", flush=True)


@app.command()
def plot(
    audio: AudioFile,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Without it, AUDIO's name with .png.")] = None,
    codec: CodecName = None,
    n_q: NumCodebooks = None,
    start: Annotated[float, typer.Option(help="Where the picture begins, in seconds.")] = 0.0,
    seconds: Annotated[float, typer.Option(help="How much it shows at most, in seconds.")] = 30.0,
    force: Force = False,
) -> None:
    """Draw the original, its reconstruction and the codes between them, over the same time."""
    target = _target(audio, output, ".png", (".png",), force)
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise InputError(
            "plot needs matplotlib: pip install matplotlib (it comes with the extra 'train' of this package)"
        ) from error
    coder = _load(codec)
    from serve.codes_plot import draw
    from speechllm.audio import read_audio

    coder.check_n_q(n_q)
    wav = read_audio(audio, coder.sample_rate)
    name = " ".join(Path(audio).name.encode(errors="backslashreplace").decode().splitlines())
    figure = draw(wav, coder, name, n_q=n_q, start=start, seconds=seconds)
    try:
        figure.savefig(target, dpi=110)
    except OSError as error:
        raise InputError(f"{target}: cannot be written ({error.strerror or error})") from error
    length = wav.shape[1] / coder.sample_rate
    print(f"{target}: {start:.2f}-{min(start + seconds, length):.2f} s of {length:.2f} s", flush=True)


def codec_numbers(codec: Codec) -> dict[str, Any]:
    """What a codec is. ``bits_per_second`` is nominal: every code of every codebook equally likely."""
    from torch import nn

    assert isinstance(codec, nn.Module)
    tensors = [*codec.parameters(), *codec.buffers()]
    return {
        "sample_rate": codec.sample_rate,
        "hop_length": codec.hop_length,
        "frame_rate": codec.frame_rate,
        "n_q": codec.n_q,
        "card": codec.card,
        "bits_per_second": codec.n_q * math.log2(codec.card) * codec.frame_rate,
        "parameters": sum(parameter.numel() for parameter in codec.parameters()),
        "bytes": sum(tensor.numel() * tensor.element_size() for tensor in tensors),
        "fingerprint": codec.fingerprint(codec.n_q),
        "fingerprint_codebook_0": codec.fingerprint(1),
    }


def code_numbers(codes: Tensor, frame_rate: float) -> dict[str, Any]:
    """How the codes ``[n_q, frames]`` of one recording are used.

    Entropy is that of each codebook's histogram (frames taken as independent), perplexity its exponential. Rates are
    per second of whole frames; runs are counted in codebook 0.
    """
    from speechllm.codec.base import code_entropy

    frames = codes.shape[1]
    codebooks = []
    for row, bits in zip(codes, code_entropy(codes), strict=True):
        distinct = len(row.unique())
        codebooks.append({"distinct": distinct, "perplexity": 2**bits, "entropy_bits_per_second": bits * frame_rate})
    runs = len(codes[0].unique_consecutive())
    return {
        "frames": frames,
        "codebooks": codebooks,
        "entropy_bits_per_second": sum(book["entropy_bits_per_second"] for book in codebooks),
        "merged_codes_per_second": runs * frame_rate / frames,
    }


def _rows(said: dict[str, Any]) -> dict[str, str]:
    """The numbers of :func:`info` in words."""
    codec = said["codec"]
    rows = {
        "sample rate": f"{codec['sample_rate']} Hz",
        "frame rate": f"{codec['frame_rate']:g} frames a second, of {codec['hop_length']} samples",
        "codebooks": f"{codec['n_q']} of {codec['card']} codes",
        "nominal rate": f"{codec['bits_per_second']:g} bits a second",
        "parameters": f"{codec['parameters']:,}",
        "size": f"{codec['bytes'] / 1e6:.1f} MB in memory, codebooks and other buffers included",
        "fingerprint": f"{codec['fingerprint']} (codebook 0 alone: {codec['fingerprint_codebook_0']})",
    }
    if file := said.get("file"):
        rows |= {"file": file["file"], "seconds": f"{file['seconds']:.3f}", "frames": str(file["frames"])}
        for number, book in enumerate(file["codebooks"]):
            rows[f"codebook {number}"] = (
                f"{_count(book['distinct'], 'distinct code')}, perplexity {book['perplexity']:.1f}, "
                f"{book['entropy_bits_per_second']:.1f} bits a second"
            )
        rows["entropy"] = f"{file['entropy_bits_per_second']:.1f} bits a second, all codebooks"
        rows["merged"] = f"{file['merged_codes_per_second']:.2f} codes a second of codebook 0 once repeats are merged"
    return rows


def _target(source: str, output: Path | None, suffix: str, allowed: tuple[str, ...], force: bool) -> Path:
    """Where to write: ``output``, or beside ``source`` under its name with ``suffix``.

    Raises:
        InputError: no name can be made, it has another suffix, its folder is not there, or it is the input or, without
            ``force``, another file that exists.
    """
    if output is None:
        if source == "-":
            raise InputError("standard input has no name to write beside: name the output with -o")
        path = Path(source)
        if not path.name:
            raise InputError(f"{source!r}: not the name of a file")
        stem = path.name.removesuffix(CODES_SUFFIX)
        output = path.with_name((stem if stem != path.name else path.stem) + suffix)
    if output.suffix.lower() not in allowed:
        raise InputError(f"{output}: must end in {' or '.join(allowed)}")
    try:
        if not output.parent.is_dir():
            raise InputError(f"{output}: there is no folder {output.parent}")
        if output.exists():
            if output.is_dir() or (Path(source).exists() and output.samefile(source)):
                raise InputError(f"{output}: is {'a folder' if output.is_dir() else 'the input'}; name another with -o")
            if not force:
                raise InputError(f"{output}: exists already; name another with -o, or overwrite it with --force")
    except OSError as error:  # a name that is too long, a folder that must not be looked into
        raise InputError(f"{output}: cannot be written ({error.strerror or error})") from error
    return output


def _load(name: str | None) -> Codec:
    """The codec in a folder or of a name; without one that of the built-in checkpoint. Raises InputError."""
    warnings.simplefilter("ignore")
    from speechllm.codec import load_codec

    if name is None:
        from speechllm.checkpoint import CODEC
        from speechllm.checkpoint_settings import DEFAULT

        name = str(DEFAULT / CODEC)
    return load_codec(name)


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
