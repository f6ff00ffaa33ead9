"""Makes `torchaudio` importable next to a CPU-only torch.

PyPI's torchaudio wheel declares no torch version and links its compiled extension against CUDA, so beside a CPU build
of torch `import torchaudio` ends in an OSError about libc10_cuda.so or libcudart.so. Its Python part is written to run
without that extension, and is all that is needed here: resampling, spectrograms, filter banks. So when, and only when,
the plain import fails that way, a stand-in that says "no extension" takes the place of `torchaudio._extension`.
What is compiled (`forced_align`, `rnnt_loss`, the CUDA CTC decoder) then raises when called.

Where torchaudio imports by itself this module changes nothing. Importing it is enough: any later `import torchaudio`,
by this project or by a package such as `encodec`, gets the working module.
"""

import importlib
import sys
from collections.abc import Callable
from functools import wraps
from types import ModuleType
from typing import Any, NoReturn

_NAME = "torchaudio"
_CUDA_LIBRARIES = ("libc10_cuda", "libtorch_cuda", "libcudart")


def import_torchaudio() -> ModuleType:
    """`torchaudio`: whole where it loads, without its compiled extension where that wants CUDA libraries. Idempotent.

    Raises whatever the plain import raises when the reason is another one.
    """
    try:
        return importlib.import_module(_NAME)
    except OSError as error:
        if not _wants_cuda(error):
            raise
    # The failed import leaves submodules behind, bound to the package object that is gone.
    for name in [name for name in sys.modules if name == _NAME or name.startswith(_NAME + ".")]:
        del sys.modules[name]
    sys.modules[_NAME + "._extension"] = _stand_in()
    return importlib.import_module(_NAME)


def _wants_cuda(error: BaseException) -> bool:
    """Whether a CUDA library that is not there is behind the error (torch wraps the loader's message in its own)."""
    cause: BaseException | None = error
    while cause is not None:
        if any(library in str(cause) for library in _CUDA_LIBRARIES):
            return True
        cause = cause.__cause__ or cause.__context__
    return False


def _stand_in() -> ModuleType:
    """What torchaudio's Python part reads from `torchaudio._extension`, with the answers of a build without one."""

    def check_cuda_version() -> None:
        return None

    def load_lib(lib: str) -> bool:
        return False

    def fail_if_no_align(function: Callable[..., Any]) -> Callable[..., NoReturn]:
        @wraps(function)
        def fail(*args: Any, **kwargs: Any) -> NoReturn:
            raise RuntimeError(f"torchaudio's {function.__name__} needs its compiled extension, built for CUDA")

        return fail

    module = ModuleType(_NAME + "._extension", "Stand-in of speechllm: torchaudio without its compiled extension.")
    module.__dict__.update(
        _IS_TORCHAUDIO_EXT_AVAILABLE=False,
        _IS_ALIGN_AVAILABLE=False,
        _check_cuda_version=check_cuda_version,
        _load_lib=load_lib,
        fail_if_no_align=fail_if_no_align,
    )
    return module


import_torchaudio()
