"""Helpers shared by the tests."""

import os
import shutil

import pytest


def require_engine(program: str) -> None:
    """Skip when a speech engine's program is not installed; in CI its absence is a failure."""
    if shutil.which(program) is None:
        if os.environ.get("CI"):
            pytest.fail(f"{program} is not installed, and CI must have it")
        pytest.skip(f"{program} is not installed")
