"""torchaudio next to a CPU torch, in processes of their own: what was imported before must not matter."""

import subprocess
import sys

import pytest

import speechllm._torchaudio as stand_in


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_other_packages_import_torchaudio_afterwards() -> None:
    code = "import speechllm._torchaudio, encodec, torchaudio; print(torchaudio.functional.resample.__module__)"
    assert run(code) == "torchaudio.functional.functional"


def test_works_after_a_failed_import() -> None:
    code = """
try:
    import torchaudio
except OSError:
    pass
import speechllm._torchaudio
import torch, torchaudio
wav = torch.randn(1, 16000)
print(tuple(torchaudio.transforms.MelSpectrogram(16000, n_mels=80)(wav).shape))
print(torchaudio.compliance.kaldi.fbank(wav).shape[1])
"""
    assert run(code) == "(1, 80, 81)\n23"


def test_idempotent_and_nothing_where_torchaudio_loads() -> None:
    module = stand_in.import_torchaudio()
    assert stand_in.import_torchaudio() is module
    assert sys.modules["torchaudio"] is module
    code = """
try:
    import torchaudio
    extension = torchaudio._extension
except OSError:
    extension = None
import speechllm._torchaudio, torchaudio
print(extension is None or torchaudio._extension is extension)
print((extension is None) == ("speechllm" in (torchaudio._extension.__doc__ or "")))
"""
    assert run(code) == "True\nTrue"


def test_what_is_compiled_says_so() -> None:
    module = stand_in.import_torchaudio()
    if module._extension._IS_ALIGN_AVAILABLE:
        pytest.skip("this torchaudio has its extension")
    with pytest.raises(RuntimeError, match="compiled extension"):
        module.functional.forced_align(None, None)


@pytest.mark.parametrize(
    ("message", "wants"),
    [
        ("libcudart.so.12: cannot open shared object file: No such file or directory", True),
        ("libc10_cuda.so: cannot open shared object file: No such file or directory", True),
        ("libstdc++.so.6: version `GLIBCXX_3.4.32' not found", False),
    ],
)
def test_only_missing_cuda_libraries_are_answered(message: str, wants: bool) -> None:
    assert stand_in._wants_cuda(OSError(message)) is wants
    wrapped = OSError("Could not load this library: /lib/_torchaudio.so")
    wrapped.__cause__ = OSError(message)
    assert stand_in._wants_cuda(wrapped) is wants
