"""What a server may be told when it is started."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, field_validator


class ServerSettings(BaseModel):
    """Where to listen, whom to serve and how much to take on. Each limit is refused with a status of its own."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    host: str = Field("127.0.0.1", description="address to listen on; the default is reachable from this machine only")
    port: int = Field(8000, ge=0, le=65535, description="0 takes a free one")
    api_keys: tuple[str, ...] = Field((), repr=False, description="one of them must come with every request (401)")
    models: tuple[str, ...] = Field((), description="names clients may ask for; without any, the checkpoint's own")
    max_upload_bytes: int = Field(128 << 20, gt=0, description="of a whole request's body (413)")
    max_seconds: float = Field(3600.0, gt=0, description="of one recording (400)")
    max_queue: int = Field(128, gt=0, description="questions taken on and not yet answered (429)")
    request_timeout: float = Field(300.0, gt=0, description="seconds for an upload (408), then as many to answer (504)")
    cache: Path | None = Field(None, description="folder for answers already given; None keeps none")
    cache_bytes: int = Field(1 << 30, gt=0, description="the least recently used answers beyond it are forgotten")

    @field_validator("api_keys", "models")
    @classmethod
    def _none_empty(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not all(item.strip() for item in value):
            raise ValueError("holds an empty name")
        return value
