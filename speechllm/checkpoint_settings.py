"""What a checkpoint folder says of itself, read without torch: a folder that is none is refused at once."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from speechllm.errors import InputError, first_problem

DEFAULT = Path(__file__).parent / "checkpoints" / "tiny"
SETTINGS = "speechllm.json"


class CheckpointSettings(BaseModel):
    """The contents of ``speechllm.json``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    vocabulary: dict[str, int | bool]
    fingerprint: str
    codec_fingerprint: str = Field(description="of the weights that make the codes the LM was trained on")
    max_audio_seconds: float = Field(gt=0, description="longest clip it was trained on; longer ones are cut at pauses")
    max_answer_tokens: int = Field(gt=0)
    tasks: tuple[str, ...] = Field(description="names of the tasks it was trained on")
    confidence_temperature: float = Field(1.0, gt=0, description="confidences are taken to the power of its inverse")


def read_settings(folder: str | Path) -> CheckpointSettings:
    """The settings of a checkpoint. Raises InputError when the folder is none, or the settings are damaged."""
    path = Path(folder) / SETTINGS
    if not path.is_file():
        raise InputError(f"{folder}: not a checkpoint folder (no {SETTINGS} in it)")
    try:
        return CheckpointSettings.model_validate_json(path.read_text(encoding="utf-8"))
    except ValidationError as error:
        raise InputError(f"{path}: not a checkpoint's settings: {first_problem(error)}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not a checkpoint's settings: not UTF-8") from error
