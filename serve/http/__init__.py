"""The HTTP server: an API like OpenAI's, for its clients to use unchanged, in front of one Answerer."""

from serve.http.app import create_app, run
from serve.http.settings import ServerSettings

__all__ = ["ServerSettings", "create_app", "run"]
