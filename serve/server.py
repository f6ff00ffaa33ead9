"""`speechllm serve`: what it takes. The server itself is in serve.http."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from serve.loading import (
    AdapterOption,
    BatchOption,
    Device,
    DeviceOption,
    ModelOption,
    QuantizeOption,
    load,
    make_answerer,
)
from serve.plain_errors import complain, plain_errors
from speechllm.errors import InputError

if TYPE_CHECKING:
    from serve.answerer import Answerer
    from speechllm.checkpoint import Checkpoint

MEGABYTE = 1 << 20


def serve(
    model: ModelOption = None,
    adapter: AdapterOption = None,
    device: DeviceOption = Device.auto,
    quantize: QuantizeOption = None,
    batch: BatchOption = 16,
    vllm: Annotated[
        str | None,
        typer.Option(metavar="URL", help="A vLLM server that decodes, of what `speechllm export` wrote."),
    ] = None,
    vllm_name: Annotated[str | None, typer.Option(help="What it calls the model; without it, as exported.")] = None,
    vllm_key: Annotated[str | None, typer.Option(envvar="VLLM_API_KEY", help="Its API key.")] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on; 0.0.0.0 is reachable by others, and wants an API key.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    api_key: Annotated[
        list[str] | None,
        typer.Option(envvar="SPEECHLLM_API_KEY", help="Requests must come with it, or one of them. Repeatable."),
    ] = None,
    name: Annotated[
        list[str] | None, typer.Option(help="Name clients call the model by; without it, its own. Repeatable.")
    ] = None,
    max_upload_mb: Annotated[int, typer.Option(min=1, help="Largest request.")] = 128,
    max_seconds: Annotated[float, typer.Option(min=1, help="Longest recording.")] = 3600.0,
    max_queue: Annotated[int, typer.Option(min=1, help="Questions taken on at once; others are told to wait.")] = 128,
    timeout: Annotated[float, typer.Option(min=1, metavar="SECONDS", help="To upload, then to answer.")] = 300.0,
    cache: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Keep answers, for the same question about the same audio.")
    ] = None,
    cache_mb: Annotated[int, typer.Option(min=1, help="Beyond it, the answers used least recently go.")] = 1024,
) -> None:
    """Answer over HTTP, as OpenAI's API does, and on a web page.

    Endpoints: /v1/audio/transcriptions, /v1/audio/translations, /v1/chat/completions, /v1/models, /health, /metrics;
    the page is at /. Ctrl-C stops it.

    Exit code: 2 when it cannot start, 130 after Ctrl-C; SIGTERM ends it as it ends any process, when what was being
    answered is.

    \b
    Examples:
      speechllm serve
      curl http://127.0.0.1:8000/v1/audio/transcriptions -F file=@a.wav -F response_format=srt
    """
    with plain_errors():
        from serve.http import ServerSettings, run

        for option, values in (("--api-key", api_key), ("--name", name)):
            if values and not all(value.strip() for value in values):
                raise InputError(f"{option}: is empty; leave it out, or say something")
        settings = ServerSettings(
            host=host,
            port=port,
            api_keys=tuple(api_key or ()),
            models=tuple(name or ()),
            max_upload_bytes=max_upload_mb * MEGABYTE,
            max_seconds=max_seconds,
            max_queue=max_queue,
            request_timeout=timeout,
            cache=cache,
            cache_bytes=cache_mb * MEGABYTE,
        )
        if vllm and (quantize or device is not Device.auto):
            raise InputError("--vllm: decoding is not done here; leave --quantize and --device out")
        if host not in ("127.0.0.1", "localhost", "::1") and not api_key:
            complain(f"warning: whoever reaches {host} can ask: --api-key keeps others out")
        if vllm:
            answerer = _through_vllm(load(model, Device.cpu, adapter), adapter, batch, vllm, vllm_name, vllm_key)
        else:
            answerer = make_answerer(model, device, adapter, batch, quantize)
        run(answerer, settings)


def _through_vllm(
    checkpoint: Checkpoint, adapter: str | None, batch: int, url: str, name: str | None, key: str | None
) -> Answerer:
    """Audio, prompts and the reading of answers here; decoding there."""
    from serve.answerer import Answerer
    from serve.export import served_name
    from serve.vllm import VllmBackend

    vocabulary, positions = checkpoint.vocabulary, checkpoint.lm.config.max_position_embeddings
    served = name or served_name(checkpoint, adapter)
    backend = VllmBackend(url, served, vocabulary.end, vocabulary.size, positions, batch, key)
    return Answerer(checkpoint, batch, backend=backend)
