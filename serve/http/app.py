"""The application: routes, errors and limits put together around one Answerer."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import Response
from starlette.staticfiles import StaticFiles

import serve
from serve.answerer import Answerer
from serve.http import chat, transcriptions
from serve.http.errors import RESPONSES, ApiError, add_handlers
from serve.http.gate import PAGE, Gate
from serve.http.service import Service
from serve.http.settings import ServerSettings
from speechllm import __version__
from speechllm.errors import InputError
from speechllm.tasks import TASKS

_PAGE_FOLDER = Path(serve.__file__).parent / "page"
_IDLE_SECONDS = 75  # a connection is kept open for the next request; clients drop theirs earlier
_SHUTDOWN_SECONDS = 10  # for what is being answered when the server is told to stop


def create_app(answerer: Answerer, settings: ServerSettings) -> FastAPI:
    """The server as an ASGI application. It starts the answerer's thread when it is started, and stops it at its end.

    Raises InputError for a cache folder that cannot be used.
    """
    service = Service(answerer, settings)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.start()
        yield
        service.stop()

    app = FastAPI(title="speechllm", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.service = service
    app.add_middleware(Gate, settings=settings, places=service.places, metrics=service.metrics)
    add_handlers(app)
    app.include_router(transcriptions.routes(service))
    app.include_router(chat.routes(service))
    _add_reports(app, service)
    if _PAGE_FOLDER.is_dir():
        app.mount(PAGE.rstrip("/"), _Page(directory=_PAGE_FOLDER, html=True), "page")

        @app.get("/", include_in_schema=False)
        async def front() -> Response:
            return Response(status_code=307, headers={"Location": PAGE})

    return app


class _Page(StaticFiles):
    """Asked for anew at every visit, so that its modules are of one version; in nobody else's frame."""

    def file_response(self, *args: Any, **kwargs: Any) -> Response:
        response = super().file_response(*args, **kwargs)
        response.headers["Cache-Control"] = "no-cache"
        response.headers["Content-Security-Policy"] = "frame-ancestors 'none'"
        return response


def run(answerer: Answerer, settings: ServerSettings) -> None:
    """Serve until told to stop (Ctrl-C, SIGTERM); what is being answered then has some seconds to be finished.

    Prints one line, with the address, when it can be asked. Raises InputError for an address that cannot be had.
    """
    app = create_app(answerer, settings)
    with _listening(settings) as listener:
        host, port = listener.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        print(f"listening on http://{shown}:{port}", flush=True)
        config = uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_keep_alive=_IDLE_SECONDS,
            timeout_graceful_shutdown=_SHUTDOWN_SECONDS,
        )
        uvicorn.Server(config).run(sockets=[listener])


def _listening(settings: ServerSettings) -> socket.socket:
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        return socket.create_server((settings.host, settings.port), family=family, backlog=1024)
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        where = f"{settings.host}:{settings.port}"
        raise InputError(f"{where}: cannot listen there ({reason}); try another port") from error


def _add_reports(app: FastAPI, service: Service) -> None:
    """What is asked of the server itself."""

    checkpoint = service.answerer.checkpoint
    known = [TASKS[name] for name in checkpoint.settings.tasks if name in TASKS]
    tasks = {task.name: task.wordings[0] for task in known if task.listens}

    def model(name: str) -> dict[str, Any]:
        """`tasks`, which are not OpenAI's: what it was trained to do with audio, and words that ask for it."""
        return {"id": name, "object": "model", "created": service.started, "owned_by": "speechllm", "tasks": tasks}

    @app.get("/v1/models", responses=RESPONSES)
    async def models() -> dict[str, Any]:
        """All names that may be asked for; they are one model's."""
        return {"object": "list", "data": [model(name) for name in service.models]}

    @app.get("/v1/models/{name:path}", responses=RESPONSES)
    async def one_model(name: str) -> dict[str, Any]:
        return model(service.check_model(name))

    @app.head("/health", include_in_schema=False)
    @app.get("/health", responses=RESPONSES)
    async def health() -> dict[str, Any]:
        """200 as long as the engine's thread runs; needs no key."""
        if not service.answerer.alive:
            raise ApiError(503, "the engine has stopped: restart the server", code="engine_stopped")
        return {"status": "ok", "version": __version__, "model": service.models[0]}

    @app.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def metrics() -> Response:
        """For Prometheus."""
        return Response(service.metrics.text(), media_type=CONTENT_TYPE_LATEST)
