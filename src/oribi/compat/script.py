"""Python scripts and notebooks written for Unsloth and TRL, changed so that they run on oribi.

Imports are redirected, calls whose meaning changed with transformers 5 get the keyword that gives them their old meaning back, and
installations that would replace oribi's own requirements are taken out. Everything else stays byte for byte; what oribi ignores or
refuses is said with its place.
"""

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from oribi.compat.blocks import Block, ConvertedScript, joined, read_blocks
from oribi.compat.chat_calls import ChatCalls
from oribi.compat.imports import (
    Bindings,
    rewrite_from,
    rewrite_import,
    rewrite_import_call,
    rewrite_reference,
)
from oribi.compat.installs import without_pins
from oribi.compat.keyword_check import KeywordCheck
from oribi.compat.names import REFUSED_METHODS

_NEVER = " (this line never runs)"
_GUARDED = " (the script has another way for that)"


def convert_script(path: Path) -> ConvertedScript:
    """A script or notebook as one that runs on oribi.

    Args:
        path: a .py or .ipynb file.

    Raises:
        ConfigError: the file cannot be read, or is no Python or no notebook.
    """
    text, encoding, blocks = read_blocks(path)
    found = ConvertedScript(text, encoding)
    for block in blocks:
        found.changed += without_pins(block)
        if block.kind != "python" and re.search(r"\b(from|import)\s+unsloth\b", block.text):
            found.refused.append(
                f"{block.at(1)}: a cell in another language imports unsloth, and stays as it is"
            )
        if block.problem is not None:
            found.refused.append(f"{block.problem}; the cell stays as it is")
    conversion = _Conversion(found, [block for block in blocks if block.tree is not None])
    conversion.run()
    found.text = joined(text, blocks)
    return found


@dataclass
class _Conversion:
    found: ConvertedScript
    blocks: list[Block]
    # what is said only as an aside: id of a node -> why
    asides: dict[int, str] = field(default_factory=dict)

    def run(self) -> None:
        bindings = Bindings.of([block.tree for block in self.blocks])
        chat_calls, check = ChatCalls(self.blocks), KeywordCheck(bindings)
        for block in self.blocks:
            self.asides |= {id(node): why for node, why in _asides(block.tree)}
            for node in _walk(block.tree):
                if isinstance(node, ast.Import):
                    changes = rewrite_import(block, node, bindings)
                elif isinstance(node, ast.ImportFrom):
                    changes = rewrite_from(block, node, bindings)
                elif isinstance(node, ast.Attribute):
                    changes = rewrite_reference(block, node, bindings)
                elif isinstance(node, ast.Call):
                    changes = [
                        *rewrite_import_call(block, node, bindings),
                        *chat_calls.rewrite(block, node),
                        *check.of_call(node),
                        *_refused_method(node),
                    ]
                elif isinstance(node, ast.Constant) and str(node.value).startswith("UNSLOTH_"):
                    changes = [("ignored", node, f"{node.value} is read by nothing here")]
                else:
                    continue
                for kind, where, sentence in changes:
                    self._say(block, kind, where, sentence, node)

    def _say(self, block: Block, kind: str, where: ast.AST, sentence: str, node: ast.AST) -> None:
        aside = self.asides.get(id(node), "") if kind == "refused" else ""
        lines = self.found.ignored if aside else getattr(self.found, kind)
        lines.append(f"{block.at(where.lineno)}: {sentence}{aside}")


def _walk(tree: ast.AST) -> Iterator[ast.AST]:
    """Every node, in the order of the text."""
    yield tree
    for child in ast.iter_child_nodes(tree):
        yield from _walk(child)


def _asides(tree: ast.AST) -> Iterator[tuple[ast.AST, str]]:
    """Nodes under `if False:`, and those whose failure the script catches."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Try) and any(_catches_imports(handler) for handler in node.handlers):
            yield from (
                (inner, _GUARDED) for part in node.body for inner in ast.walk(part) if _is_import(inner)
            )
    for node in ast.walk(tree):
        if (
            isinstance(node, (ast.If, ast.IfExp))
            and isinstance(node.test, ast.Constant)
            and not node.test.value
        ):
            body = node.body if isinstance(node, ast.If) else [node.body]
            yield from ((inner, _NEVER) for part in body for inner in ast.walk(part))


def _is_import(node: ast.AST) -> bool:
    return isinstance(node, (ast.Import, ast.ImportFrom))


def _catches_imports(handler: ast.ExceptHandler) -> bool:
    names = ast.unparse(handler.type) if handler.type else "Exception"
    return re.search(r"\b(ImportError|ModuleNotFoundError|Exception|BaseException)\b", names) is not None


def _refused_method(node: ast.Call) -> Iterator[tuple[str, ast.AST, str]]:
    name = node.func.attr if isinstance(node.func, ast.Attribute) else ""
    if name in REFUSED_METHODS:
        yield "refused", node, f"{name}: {REFUSED_METHODS[name]}"
