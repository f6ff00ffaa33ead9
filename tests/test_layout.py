"""Who imports whom, read from the source of every module."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("speechllm", "train", "serve")
COMMAND_LINE = ("argparse", "click", "typer", "optparse", "fire")
CHECKPOINT = ("checkpoint", "checkpoint_settings")

# module or package -> what neither it nor anything below it may import, at top level or inside a function
FORBIDDEN = {
    "speechllm": ("train", "serve", "deepspeed", *COMMAND_LINE),
    "train": ("serve",),
    "serve": ("train", "deepspeed"),
    "speechllm.codec": tuple(
        f"speechllm.{name}"
        for name in ("vocabulary", "text", "tasks", "prompt", "data", "model", "generate", *CHECKPOINT, "metrics")
    ),
    "speechllm.vocabulary": tuple(
        f"speechllm.{name}"
        for name in ("audio", "codec", "text", "tasks", "prompt", "data", "model", "generate", *CHECKPOINT, "metrics")
    ),
    "speechllm.tasks": tuple(
        f"speechllm.{name}"
        for name in ("audio", "codec", "vocabulary", "text", "prompt", "data", "model", "generate", *CHECKPOINT)
    ),
    "speechllm.prompt": tuple(f"speechllm.{name}" for name in ("data", "model", "generate", *CHECKPOINT, "metrics")),
    "speechllm.data": tuple(f"speechllm.{name}" for name in ("model", "generate", *CHECKPOINT)),
    "speechllm.model": (
        *(
            f"speechllm.{name}"
            for name in ("audio", "codec", "vocabulary", "text", "tasks", "prompt", "data", "generate", *CHECKPOINT)
        ),
        "torch.optim",
        "sentencepiece",
        "tokenizers",
    ),
    "speechllm.generate": ("speechllm.model", "speechllm.checkpoint", "speechllm.codec", "speechllm.data"),
}
# module -> the only modules of ours it may import
ALLOWED = {
    "speechllm.errors": (),
    "speechllm._torchaudio": (),
    "speechllm.checkpoint_settings": ("speechllm.errors",),
    "speechllm._mp3": (),
    "speechllm._containers": ("speechllm.errors", "speechllm._mp3"),
    "speechllm.audio": ("speechllm.errors", "speechllm._torchaudio", "speechllm._containers"),
}


def below(name: str, ancestor: str) -> bool:
    return name == ancestor or name.startswith(ancestor + ".")


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))}


def imports(source: str, module: str, is_package: bool = False) -> set[str]:
    """Every dotted name a module imports; `from a import b` counts as a.b, be b a module or a name."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = module.split(".")
            package = parts[: len(parts) - node.level + is_package] if node.level else []
            origin = ".".join([*package, *([node.module] if node.module else [])])
            found.update(f"{origin}.{alias.name}" for alias in node.names)
    return found


def imports_of(name: str) -> set[str]:
    path = MODULES[name]
    return imports(path.read_text(encoding="utf-8"), name, path.name == "__init__.py")


def test_imports_are_read() -> None:
    source = "import a.b\nfrom c import d\nfrom . import e\nfrom ..f import g\ndef h():\n    import i\n"
    assert imports(source, "top.mid.leaf") == {"a.b", "c.d", "top.mid.e", "top.f.g", "i"}
    assert imports("from .x import y", "top.mid", is_package=True) == {"top.mid.x.y"}
    assert below("speechllm.data.manifest", "speechllm.data")
    assert not below("speechllm.database", "speechllm.data")


def test_modules_are_found() -> None:
    for package in PACKAGES:
        assert package in MODULES
        assert any(name.startswith(package + ".") for name in MODULES), package
    for name in {*FORBIDDEN, *ALLOWED}:
        assert name in MODULES, f"a rule names {name}, which is not there"
    assert "speechllm.errors.InputError" in imports_of("speechllm.audio")


@pytest.mark.parametrize("rule", FORBIDDEN)
def test_nobody_imports_what_it_must_not(rule: str) -> None:
    wrong = [
        f"{name} imports {imported}"
        for name in MODULES
        if below(name, rule)
        for imported in sorted(imports_of(name))
        if any(below(imported, forbidden) for forbidden in FORBIDDEN[rule])
    ]
    assert wrong == []


@pytest.mark.parametrize("name", ALLOWED)
def test_lowest_modules_import_little(name: str) -> None:
    ours = {imported for imported in imports_of(name) if imported.split(".")[0] in PACKAGES}
    strangers = {imported for imported in ours if not any(below(imported, allowed) for allowed in ALLOWED[name])}
    assert strangers == set()


def test_tokenizers_is_hugging_faces_from_the_repository_root() -> None:
    code = "import sys, tokenizers; assert '' in sys.path; print(tokenizers.Tokenizer.__module__, tokenizers.__file__)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    module, file = done.stdout.split()
    assert module == "tokenizers"
    assert not Path(file).resolve().is_relative_to(ROOT / "tokenizers")


def test_tokenizers_folder_is_not_importable() -> None:
    folder = ROOT / "tokenizers"
    assert any(path.is_file() for path in folder.rglob("*")), "no trained files: the test looks at the wrong folder"
    assert [path for pattern in ("*.py", "*.pyi", "*.so") for path in folder.rglob(pattern)] == []
