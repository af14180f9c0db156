"""Calls of `apply_chat_template`, whose result changed: ids in transformers 4, a tokenizer's whole output in version 5.

What a script does with the result says which it was written for: ids, the whole output, or the text that processors of
image-text models give by default.
"""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from oribi.compat.blocks import Block

Use = Literal["whole", "text", "ids", "another"]  # "another": the name gets another value

# parts and methods of a tokenizer's whole output, and methods of texts alone
_WHOLE = ("input_ids", "attention_mask", "items", "keys")
_OF_TEXTS = ("replace", "removeprefix", "removesuffix", "strip", "lstrip", "rstrip", "split", "startswith", "endswith",
             "format", "partition", "rpartition", "lower")  # fmt: skip
_TOKENIZING = ("encode", "tokenize", "batch_encode_plus", "encode_plus")
_TEXT_KEYS = ("text", "texts", "formatted_prompt")


@dataclass(frozen=True, order=True)
class _Event:
    """What happens to a name: where (block, line, column, 1 for an assignment, which comes after what its value reads)."""

    place: tuple[int, int, int, int]
    use: Use


class ChatCalls:
    """The calls of a script, told apart by what becomes of their results.

    Args:
        blocks: with their syntax trees.
    """

    def __init__(self, blocks: list[Block]) -> None:
        self._number = {id(block): number for number, block in enumerate(blocks)}
        self._parents: dict[int, ast.AST] = {}
        self._events: dict[str, list[_Event]] = {}
        self._calls: dict[str, list[ast.Call]] = {}
        self._options: dict[str, dict[str, ast.expr] | None] = {}
        # names of the method itself
        self._methods: set[str] = set()
        self._tokenizers = {
            ast.unparse(node.value) for block in blocks for node in ast.walk(block.tree) if _is_method(node)
        }
        for number, block in enumerate(blocks):
            for node in ast.walk(block.tree):
                self._parents |= {id(child): node for child in ast.iter_child_nodes(node)}
            for node in ast.walk(block.tree):
                self._note(number, node)
        for events in self._events.values():
            events.sort()

    def rewrite(self, block: Block, node: ast.Call) -> Iterator[tuple[str, ast.AST, str]]:
        """Ask for what the script uses, where version 5 gives something else."""
        func = node.func
        for argument in node.args:
            if (
                isinstance(argument, ast.Attribute)
                and argument.attr == "apply_chat_template"
                and not any(keyword.arg in ("tokenize", "return_dict") for keyword in node.keywords)
            ):
                yield (
                    "refused",
                    argument,
                    (
                        "apply_chat_template is passed on uncalled, and gives a dictionary since transformers 5: "
                        "write a lambda that calls it with return_dict=False"
                    ),
                )
        if not _is_method(func) and getattr(func, "id", None) not in self._methods:
            return
        given = self._given(node)
        if given is None:
            yield (
                "ignored",
                node,
                "apply_chat_template stays: what its ** holds is not seen; ids need return_dict=False",
            )
            return
        asked = given.get("tokenize")
        is_text = isinstance(asked, ast.Constant) and not asked.value
        if is_text or "return_dict" in given:
            return
        use = self._use(node, block)
        if use == "whole":
            return
        text = use == "text" and asked is None
        keyword = "tokenize=False" if text else "return_dict=False"
        if not block.holds(node):
            yield "refused", node, f"apply_chat_template within an f-string: call it before, with {keyword}"
            return
        _add_keyword(block, node, keyword)
        yield (
            "changed",
            node,
            f"apply_chat_template: {keyword}, since its result is used as {'text' if text else 'ids'}",
        )

    def _note(self, number: int, node: ast.AST) -> None:
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            self._calls.setdefault(node.func.id, []).append(node)
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            self._options[node.targets[0].id] = _options_of(node.value)
            if _is_method(node.value):
                self._methods.add(node.targets[0].id)
        if not isinstance(node, ast.Name):
            return
        if isinstance(node.ctx, ast.Load):
            event = _Event((number, node.lineno, node.col_offset, 0), self._use_here(node) or "ids")
        else:
            statement = self._statement(node)
            value = getattr(statement, "value", None)
            # x = x.to("cuda") goes on with the same value
            same = (
                value is not None and isinstance(value, (ast.Call, ast.Attribute)) and _root(value) == node.id
            )
            end = (statement.end_lineno, statement.end_col_offset)
            event = None if same else _Event((number, *end, 1), "another")
        if event is not None:
            self._events.setdefault(node.id, []).append(event)

    def _statement(self, node: ast.AST) -> ast.AST:
        """The assignment that gives a name its value; the node itself where a loop or an argument does."""
        parent: ast.AST | None = node
        while parent is not None and not isinstance(parent, ast.stmt):
            parent = self._parents.get(id(parent))
        return parent if isinstance(parent, (ast.Assign, ast.AnnAssign)) else node

    def _given(self, node: ast.Call) -> dict[str, ast.expr] | None:
        """The keywords of a call, those of a ** whose dictionary the script writes out included; None if one is not seen."""
        given: dict[str, ast.expr] = {}
        for keyword in node.keywords:
            if keyword.arg is not None:
                given[keyword.arg] = keyword.value
                continue
            value = keyword.value
            options = self._options.get(value.id) if isinstance(value, ast.Name) else _options_of(value)
            if options is None:
                return None if "tokenize" not in given and "return_dict" not in given else given
            given |= options
        return given

    def _use(self, node: ast.AST, block: Block, depth: int = 0) -> Use | None:
        """What becomes of an expression's value."""
        use = self._use_here(node)
        if use is not None:
            return use
        inner, parent = node, self._parents.get(id(node))
        while isinstance(parent, (ast.Attribute, ast.IfExp, ast.Await, ast.ListComp, ast.GeneratorExp)) or (
            isinstance(parent, ast.Call) and parent.func is inner
        ):
            inner, parent = parent, self._parents.get(id(parent))
        if isinstance(parent, (ast.Assign, ast.AnnAssign, ast.NamedExpr)):
            targets = parent.targets if isinstance(parent, ast.Assign) else [parent.target]
            uses = [self._use_of(t.id, block, parent) for t in targets if isinstance(t, ast.Name)]
            return next(iter(uses), None)
        if isinstance(parent, (ast.Return, ast.Lambda)) and depth < 3:
            function: ast.AST | None = parent
            while function is not None and not isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef)):
                function = self._parents.get(id(function))
            calls = (
                self._calls.get(getattr(function, "name", ""), ()) if isinstance(parent, ast.Return) else ()
            )
            uses = {self._use(call, block, depth + 1) for call in calls}
            return next((use for use in ("whole", "text") if use in uses), None)
        return None

    def _use_of(self, name: str, block: Block, statement: ast.AST) -> Use | None:
        """What the script does with a name after a statement, until the name gets another value."""
        start = (self._number[id(block)], statement.end_lineno, statement.end_col_offset, 1)
        after = [event for event in self._events.get(name, ()) if event.place > start]
        until = next((i for i, event in enumerate(after) if event.use == "another"), len(after))
        uses = {event.use for event in after[:until]}
        # a loop or a function may use above what it assigns below
        uses = uses or {event.use for event in self._events.get(name, ()) if event.use != "another"}
        return next((use for use in ("whole", "text") if use in uses), None)

    def _use_here(self, node: ast.AST) -> Use | None:
        """What the expressions around a value do with it; None where they do not say."""
        inner: ast.AST = node
        while (parent := self._parents.get(id(inner))) is not None:
            if isinstance(parent, ast.keyword):
                if parent.arg is None:
                    return "whole"
                return "text" if parent.arg in _TEXT_KEYS else "ids" if parent.arg == "input_ids" else None
            if isinstance(parent, ast.Subscript) and parent.value is inner:
                return "whole" if getattr(parent.slice, "value", None) in _WHOLE[:2] else None
            if isinstance(parent, ast.Attribute):
                if parent.attr in _WHOLE:
                    return "whole"
                if parent.attr in _OF_TEXTS:
                    return "text"
            elif isinstance(parent, ast.Call):
                if parent.func is not inner:
                    return self._as_argument(parent)
            elif isinstance(parent, ast.BinOp) and isinstance(parent.op, ast.Add):
                return "text" if _is_text(parent.right if parent.left is inner else parent.left) else None
            elif isinstance(parent, ast.Dict):
                keys = [key for key, value in zip(parent.keys, parent.values) if value is inner]
                return "text" if getattr(keys[0] if keys else None, "value", None) in _TEXT_KEYS else None
            elif not isinstance(parent, (ast.List, ast.IfExp, ast.ListComp, ast.Await)):
                return None
            inner = parent
        return None

    def _as_argument(self, call: ast.Call) -> Use | None:
        """What a call does with an argument: a tokenizer takes texts."""
        name = ast.unparse(call.func)
        if name in self._tokenizers or name.rpartition(".")[2] in _TOKENIZING:
            return "text"
        return "ids" if name == "len" else None


def _is_method(node: ast.AST) -> bool:
    return isinstance(node, ast.Attribute) and node.attr == "apply_chat_template"


def _is_text(node: ast.AST) -> bool:
    name = node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")
    return (
        isinstance(node, ast.JoinedStr)
        or isinstance(getattr(node, "value", None), str)
        or (re.search(r"(?i)(eos|bos|pad)(_token)?$", name) is not None)
    )


def _options_of(node: ast.AST) -> dict[str, ast.expr] | None:
    """The entries of a dictionary that is written out, as `{...}` or `dict(...)`."""
    if isinstance(node, ast.Dict) and all(isinstance(getattr(k, "value", None), str) for k in node.keys):
        return {key.value: value for key, value in zip(node.keys, node.values)}
    is_call = isinstance(node, ast.Call) and getattr(node.func, "id", "") == "dict" and not node.args
    if is_call and all(keyword.arg for keyword in node.keywords):
        return {keyword.arg: keyword.value for keyword in node.keywords}
    return None


def _root(node: ast.AST) -> str | None:
    """The name that a chain of attributes and calls begins with."""
    while isinstance(node, (ast.Attribute, ast.Call)):
        node = node.value if isinstance(node, ast.Attribute) else node.func
    return getattr(node, "id", None)


def _add_keyword(block: Block, node: ast.Call, keyword: str) -> None:
    """Put a keyword behind a call's last argument, before its closing bracket."""
    close = block.span(node)[1] - 1
    start = block.span(node.func)[1]
    piece = block.text[start : close + 1]
    lines = [start]
    for line in io.StringIO(piece, newline=""):
        lines.append(lines[-1] + len(line))
    before, end = "(", start
    for token in tokenize.generate_tokens(io.StringIO(piece, newline="").readline):
        if token.type in (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE):
            continue
        if lines[token.start[0] - 1] + token.start[1] == close:
            break
        before, end = token.string, lines[token.end[0] - 1] + token.end[1]
    if before in (",", "("):
        same_line = "\n" not in block.text[end:close] and "\r" not in block.text[end:close]
        block.edit(close, close, (" " if before == "," and same_line else "") + keyword)
    else:
        block.edit(end, end, f", {keyword}")
