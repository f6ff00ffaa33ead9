"""Fields that both ways of asking have in common."""

from __future__ import annotations

import secrets
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from speechllm.options import Options

MAX_TEXT = 20_000  # characters of an instruction; what the model has room for is less, and told when it is asked


class AskFields(BaseModel):
    """OpenAI's names for how an answer is generated, and ours for what it has no name for; all optional."""

    model_config = ConfigDict(extra="forbid")

    model: str | None = Field(None, max_length=MAX_TEXT, description="one of /v1/models; without it, the first")
    stream: bool | None = Field(None, description="tell the words as they come, as server-sent events")
    temperature: float | None = Field(None, ge=0, le=Options.MAX_TEMPERATURE, description="0 is the default")
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = Field(None, ge=0, lt=2**63, description="of what temperature draws; without it, a new one")
    beams: int | None = Field(None, ge=1, le=Options.MAX_BEAMS, description="hypotheses of beam search; not OpenAI's")
    min_confidence: float | None = Field(None, ge=0, le=1, description="below it an answer is withheld; not OpenAI's")

    def options(self, **more: Any) -> Options:
        """Raises InputError for settings at odds with one another."""
        given = self.model_dump(include={"temperature", "top_p", "seed", "beams", "min_confidence"}, exclude_none=True)
        if given.get("temperature") and self.seed is None:
            given["seed"] = secrets.randbits(63)
        return Options(**given | more)
