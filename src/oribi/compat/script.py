"""Python scripts and notebooks written for Unsloth and TRL, changed so that they run on oribi.

Imports are redirected, and calls whose meaning changed with transformers 5 get the keyword that gives them their old meaning back.
Everything else stays byte for byte; what oribi ignores or refuses is said with its place.
"""

import ast
import io
import json
import re
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass, field
from json.decoder import scanstring
from json.scanner import py_make_scanner
from pathlib import Path

from oribi.compat.names import IGNORED_KEYWORDS, NAMES, REFUSED_KEYWORDS, REFUSED_METHODS
from oribi.errors import ConfigError

UNSLOTH = ("unsloth", "unsloth_zoo")
# names that scripts take from vLLM, and where they are here
ENGINE = {"SamplingParams": "oribi.compat.reinforcement"}
# parts of a tokenizer's whole output
OUTPUTS = ("input_ids", "attention_mask")


@dataclass
class ConvertedScript:
    """A script for oribi. `changed`, `ignored` and `refused` are sentences that begin with their place."""

    text: str
    changed: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)


@dataclass
class Block:
    """A piece of Python: a whole script, or a cell of a notebook.

    Args:
        place: how its lines are named, "line {}" or "cell 3, line {}".
        lines: its lines with their ends.
        spans: per line, where its string stands in the notebook; None in a script.
    """

    place: str
    lines: list[str]
    spans: list[tuple[int, int]] | None = None
    tree: ast.Module | None = None
    # line -> its edits: first character, end, and what stands there instead
    edits: dict[int, list[tuple[int, int, str]]] = field(default_factory=dict)

    def at(self, node: ast.AST) -> str:
        return self.place.format(node.lineno)

    def edit(self, line: int, start: int, end: int, text: str) -> None:
        """Replace characters of a line; `line` counts from 1."""
        self.edits.setdefault(line, []).append((start, end, text))

    def column(self, line: int, offset: int) -> int:
        """The character at which a syntax tree's offset, which counts bytes, stands."""
        return len(self.lines[line - 1].encode()[:offset].decode())

    def edited(self, index: int) -> str:
        """A line with its edits; `index` counts from 0."""
        text = self.lines[index]
        for start, end, new in sorted(self.edits.get(index + 1, ()), reverse=True):
            text = text[:start] + new + text[end:]
        return text


def convert_script(path: Path) -> ConvertedScript:
    """A script or notebook as one that runs on oribi.

    Args:
        path: a .py or .ipynb file.

    Raises:
        ConfigError: the file cannot be read, or is no Python or no notebook.
    """
    try:
        text = path.read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error
    found = ConvertedScript(text)
    blocks = (
        _cells(path, text) if path.suffix == ".ipynb" else [Block("line {}", text.splitlines(keepends=True))]
    )
    for block in blocks:
        _parse(path, block, found)
    parsed = [block for block in blocks if block.tree is not None]
    used = {node.id for block in parsed for node in ast.walk(block.tree) if isinstance(node, ast.Name)}
    opened = _opened_by_name(parsed)
    for block in parsed:
        _convert(block, used, opened, found)
    found.text = _join(text, blocks)
    return found


class _Spotted(str):
    """A string of a JSON file that knows where it stands there."""

    span: tuple[int, int]


class _SpottingDecoder(json.JSONDecoder):
    def __init__(self) -> None:
        super().__init__()
        self.parse_string = self._spot
        self.scan_once = py_make_scanner(self)

    @staticmethod
    def _spot(text: str, start: int, strict: bool = True) -> tuple[_Spotted, int]:
        value, end = scanstring(text, start, strict)
        spotted = _Spotted(value)
        spotted.span = (start - 1, end)
        return spotted, end


def _cells(path: Path, text: str) -> list[Block]:
    """The code cells of a notebook."""
    try:
        notebook = _SpottingDecoder().decode(text)
        cells = notebook["cells"]
        blocks = []
        for number, cell in enumerate(cells, start=1):
            if cell["cell_type"] == "code":
                source = cell["source"]
                strings = [source] if isinstance(source, str) else source
                place = f"cell {number}, line {{}}"
                blocks.append(Block(place, [str(s) for s in strings], [s.span for s in strings]))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ConfigError(f"{path}: no notebook: {type(error).__name__}: {error}") from error
    return blocks


def _parse(path: Path, block: Block, found: ConvertedScript) -> None:
    """The syntax tree of a block; lines for the shell and for IPython are passed over."""
    if block.spans is not None and len(block.lines) == 1:  # a cell whose source is one string
        block.lines = block.lines[0].splitlines(keepends=True)
    kept, continued, indent = [], False, ""
    for number, line in enumerate(block.lines, start=1):
        bare = line.strip()
        indent = indent if continued else line[: len(line) - len(line.lstrip())].rstrip("\n")
        magic = block.spans is not None and (
            continued or bare.startswith(("!", "%", "?")) or re.match(r"[\w., ]+=\s*[!%]", bare) is not None
        )
        if magic and bare.startswith("%%") and not re.match(r"%%(capture|time|timeit|prun)\b", bare):
            return  # a cell in another language
        continued = magic and bare.endswith("\\")
        if magic and re.search(r"\bpip\b.*\bunsloth", bare):
            found.ignored.append(f"{block.place.format(number)}: installs unsloth, which is not needed")
        kept.append(f"{indent}pass\n" if magic else line)
    try:
        block.tree = ast.parse("".join(kept))
    except (SyntaxError, ValueError) as error:
        where = block.place.format(getattr(error, "lineno", None) or 1)
        if block.spans is None:
            raise ConfigError(f"{path}, {where}: no Python: {error}") from error
        found.refused.append(f"{where}: no Python: {error}; the cell stays as it is")


def _opened_by_name(blocks: list[Block]) -> set[str]:
    """Names of variables that are used as a tokenizer's whole output: unpacked, or asked for input_ids."""
    uses = [
        node.value
        for block in blocks
        for node in ast.walk(block.tree)
        if (isinstance(node, ast.keyword) and node.arg is None) or _asks_for_ids(node)
    ]
    return {value.id for value in uses if isinstance(value, ast.Name)}


def _asks_for_ids(node: ast.AST) -> bool:
    """Whether an expression takes a part of a tokenizer's whole output."""
    if isinstance(node, ast.Attribute):
        return node.attr in (*OUTPUTS, "items", "keys")
    return isinstance(node, ast.Subscript) and getattr(node.slice, "value", None) in OUTPUTS


def _convert(block: Block, used: set[str], opened: set[str], found: ConvertedScript) -> None:
    idle = {id(inner) for node in _never_run(block.tree) for inner in ast.walk(node)}
    for node, parents in _walk(block.tree):
        if isinstance(node, ast.Import):
            _import(block, node, used, found)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            _import_from(block, node, found)
        elif isinstance(node, ast.Call):
            _call(block, node, parents, opened, found, id(node) in idle)
        elif isinstance(node, ast.Constant) and str(node.value).startswith("UNSLOTH_"):
            found.ignored.append(f"{block.at(node)}: {node.value} is read by nothing here")


def _walk(tree: ast.AST, parents: tuple[ast.AST, ...] = ()) -> Iterator[tuple[ast.AST, tuple[ast.AST, ...]]]:
    """Every node with its ancestors, the nearest last."""
    yield tree, parents
    for child in ast.iter_child_nodes(tree):
        yield from _walk(child, (*parents, tree))


def _never_run(tree: ast.AST) -> Iterator[ast.AST]:
    """What stands under `if False:`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Constant) and not node.test.value:
            yield from node.body


def _import(block: Block, node: ast.Import, used: set[str], found: ConvertedScript) -> None:
    for alias in node.names:
        root, _, rest = alias.name.partition(".")
        if root == "unsloth":
            bound = alias.asname or (root if root in used else None)
            new = "oribi" if bound is None else f"oribi as {bound}"
            if rest and bound is not None and alias.asname is None:
                new = f"oribi.{rest}, {new}"
        elif root == "trl":
            new = f"oribi.trl as {alias.asname or 'trl'}"
        elif root == "unsloth_zoo":
            found.refused.append(f"{block.at(node)}: import {alias.name}: oribi has no such module")
            continue
        else:
            continue
        start, end = (
            block.column(alias.lineno, alias.col_offset),
            block.column(alias.end_lineno, alias.end_col_offset),
        )
        block.edit(alias.lineno, start, end, new)
        found.changed.append(f"{block.at(node)}: import {alias.name} -> import {new}")


def _import_from(block: Block, node: ast.ImportFrom, found: ConvertedScript) -> None:
    new = _new_place(node.module, [alias.name for alias in node.names])
    if new is None:
        return
    if new == "oribi":
        _say_names(block, node, found)
    line, start = block.lines[node.lineno - 1], block.column(node.lineno, node.col_offset)
    match = re.compile(r"from\s+([\w.]+)").match(line, start)
    if match is None:
        found.refused.append(f"{block.at(node)}: write `from {node.module} import` on one line")
        return
    block.edit(node.lineno, match.start(1), match.end(1), new)
    found.changed.append(f"{block.at(node)}: from {node.module} -> from {new}")


def _new_place(module: str, names: list[str]) -> str | None:
    """Where names are imported from in oribi; None where they stay."""
    root = module.split(".")[0]
    if root in UNSLOTH:
        return "oribi"
    is_trainer = all(re.search(r"(Trainer|Config)$", name) for name in names)
    if module == "trl" or (root == "trl" and is_trainer):
        return "oribi.trl"
    if module == "transformers" and names == ["TrainingArguments"]:
        return "oribi.trl"
    return ENGINE[names[0]] if root == "vllm" and set(names) <= set(ENGINE) else None


def _say_names(block: Block, node: ast.ImportFrom, found: ConvertedScript) -> None:
    """What differs in the names that are imported from oribi now, and which are not there."""
    for name in (alias.name for alias in node.names if alias.name != "*"):
        known = NAMES.get(name)
        if known is None or not known.home:
            why = "oribi has no such name" if known is None else known.note
            found.refused.append(f"{block.at(node)}: {name}: {why}")
        elif known.note:
            found.ignored.append(f"{block.at(node)}: {name}: {known.note}")


def _call(
    block: Block,
    node: ast.Call,
    parents: tuple[ast.AST, ...],
    opened: set[str],
    found: ConvertedScript,
    never_run: bool,
) -> None:
    name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    given = {keyword.arg: keyword.value for keyword in node.keywords}
    if name == "apply_chat_template" and isinstance(node.func, ast.Attribute):
        _chat_template(block, node, given, parents, opened, found)
    elif name in REFUSED_METHODS:
        kind = found.ignored if never_run else found.refused
        kind.append(
            f"{block.at(node)}: {name}: {REFUSED_METHODS[name]}"
            + (" (this line never runs)" if never_run else "")
        )
    elif name == "from_pretrained" and re.search(r"\bFast\w*Model\.from_pretrained$", ast.unparse(node.func)):
        for keyword, value in given.items():
            on = not (isinstance(value, ast.Constant) and value.value in (None, False))
            if keyword in REFUSED_KEYWORDS and on:
                found.refused.append(f"{block.at(value)}: {keyword}: {REFUSED_KEYWORDS[keyword]}")
            elif keyword in IGNORED_KEYWORDS and on:
                found.ignored.append(f"{block.at(value)}: {keyword}: {IGNORED_KEYWORDS[keyword]}")


def _chat_template(
    block: Block,
    node: ast.Call,
    given: dict[str | None, ast.expr],
    parents: tuple[ast.AST, ...],
    opened: set[str],
    found: ConvertedScript,
) -> None:
    """Ask for ids where transformers 4 gave ids: without return_dict, version 5 gives the tokenizer's whole output."""
    asked = given.get("tokenize")
    is_text = isinstance(asked, ast.Constant) and not asked.value
    if is_text or "return_dict" in given or None in given or _is_opened(node, parents, opened):
        return
    _add_keyword(block, node, "return_dict=False")
    found.changed.append(
        f"{block.at(node)}: apply_chat_template: return_dict=False, since its result is used as ids"
    )


def _is_opened(node: ast.Call, parents: tuple[ast.AST, ...], opened: set[str]) -> bool:
    """Whether a call's result is used as a tokenizer's whole output, where it is made or under its name."""
    inner: ast.AST = node
    for parent in reversed(parents):
        if isinstance(parent, ast.keyword) and parent.arg is None:
            return True
        if (
            isinstance(parent, ast.Subscript)
            and isinstance(parent.slice, ast.Constant)
            and parent.value is inner
        ):
            return _asks_for_ids(parent)
        if isinstance(parent, ast.Attribute):
            if _asks_for_ids(parent):
                return True
            inner = parent  # .to("cuda"), .cuda()
        elif isinstance(parent, ast.Call) and parent.func is inner:
            inner = parent
        elif isinstance(parent, (ast.Assign, ast.AnnAssign, ast.NamedExpr)):
            targets = parent.targets if isinstance(parent, ast.Assign) else [parent.target]
            return any(isinstance(target, ast.Name) and target.id in opened for target in targets)
        else:
            return False
    return False


def _add_keyword(block: Block, node: ast.Call, keyword: str) -> None:
    """Put a keyword behind a call's last argument, before its closing bracket."""
    last_line, last = node.end_lineno, block.column(node.end_lineno, node.end_col_offset) - 1
    first = node.func.end_lineno, block.column(node.func.end_lineno, node.func.end_col_offset)
    piece = "".join(block.lines[first[0] - 1 : last_line])
    before = None
    for token in tokenize.generate_tokens(io.StringIO(piece + "\n").readline):
        line = token.start[0] + first[0] - 1
        if (line, token.start[1]) < first or token.type in (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE):
            continue
        if (line, token.start[1]) == (last_line, last):
            break
        before = token
    if before.string in (",", "("):
        space = "" if before.string == "(" or before.end[0] + first[0] - 1 != last_line else " "
        block.edit(last_line, last, last, space + keyword)
    else:
        line = before.end[0] + first[0] - 1
        block.edit(line, before.end[1], before.end[1], f", {keyword}")


def _join(text: str, blocks: list[Block]) -> str:
    """The file with the edits of its blocks, and every other byte as it was."""
    if blocks and blocks[0].spans is None:
        return "".join(block.edited(i) for block in blocks for i in range(len(block.lines)))
    pieces, end = [], 0
    for block in blocks:
        if not block.edits:
            continue
        lines = [block.edited(i) for i in range(len(block.lines))]
        strings = lines if len(block.spans) == len(lines) else ["".join(lines)]
        for index, (span, new) in enumerate(zip(block.spans, strings)):
            if len(strings) == len(lines) and index + 1 not in block.edits:
                continue
            old = text[slice(*span)]
            pieces += [text[end : span[0]], json.dumps(new, ensure_ascii=old.isascii())]
            end = span[1]
    return "".join([*pieces, text[end:]])
