"""A jinja sandbox in which work and texts stay below a limit.

Three things make a template's work grow: rounds of loops, calls, and what makes a long value of short ones. Loops and calls
are counted; for the last there is an estimate per operator, method and filter, asked before the value is made.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import wraps
from itertools import islice
from typing import Any

from jinja2 import nodes
from jinja2.compiler import CodeGenerator
from jinja2.runtime import Context, markup_join
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

MAX_CHARACTERS = 1 << 26  # of one text; twice the longest row that is read
MAX_ITEMS = 1 << 20  # of one list
MAX_STEPS = 10_000_000  # a round of a loop, 256 characters of a long text, a tenth of a call
MAX_SECONDS = 5.0  # of this thread's processor time
MAX_BITS = 1 << 16  # of an integer
MAX_DATE_FORMAT = 1000
STEPS_OF_A_CALL = 10
STEPS_BETWEEN_LOOKS = 1000  # at the clock
ROUNDS_BETWEEN_LOOKS = 64  # of a long loop
LONG_TEXT = 4096
LONG_LOOP = 1000
JOINED_AT_ONCE = 4096


class TooMuch(Exception):
    """A limit is passed; the message says which."""


class _Work(threading.local):
    """What the rendering of this thread has done."""

    steps = 0
    next_look = STEPS_BETWEEN_LOOKS
    until = float("inf")


_work = _Work()


@contextmanager
def limited() -> Iterator[None]:
    """Count work from zero inside the block."""
    before = _work.steps, _work.next_look, _work.until
    _work.steps, _work.next_look, _work.until = 0, STEPS_BETWEEN_LOOKS, time.thread_time() + MAX_SECONDS
    try:
        yield
    finally:
        _work.steps, _work.next_look, _work.until = before


def spend(steps: int) -> None:
    """Count work, and check the clock from time to time."""
    _work.steps += steps
    if _work.steps < _work.next_look:
        return
    if _work.steps > MAX_STEPS:
        raise TooMuch(f"more than {MAX_STEPS:,} steps")
    if time.thread_time() > _work.until:
        raise TooMuch(f"more than {MAX_SECONDS:.0f} seconds")
    _work.next_look = _work.steps + STEPS_BETWEEN_LOOKS


def require_characters(count: int) -> None:
    """Refuse a text of more than MAX_CHARACTERS."""
    if count > MAX_CHARACTERS:
        raise TooMuch(f"a text of more than {MAX_CHARACTERS:,} characters")


def require_items(count: int) -> None:
    """Refuse a list of more than MAX_ITEMS."""
    if count > MAX_ITEMS:
        raise TooMuch(f"a list of more than {MAX_ITEMS:,} items")


def _checked(value: Any) -> Any:
    """Return a value that was made or is read as a whole; refuse one that is too long."""
    kind = value.__class__
    if kind is str:
        if len(value) > LONG_TEXT:
            require_characters(len(value))
            spend(len(value) >> 8)
    elif kind is list or kind is tuple:
        require_items(len(value))
        spend(len(value) >> 8)
    return value


def _size(value: Any) -> int:
    """Characters of a value as text, roughly; counting stops above the limit, since lists may hold one list many times."""
    total, rest = 0, [value]
    while rest and total <= MAX_CHARACTERS:
        one = rest.pop()
        if isinstance(one, str | bytes):
            total += len(one)
            continue
        total += 64
        if isinstance(one, dict):
            rest += [*one.keys(), *one.values()]
        elif isinstance(one, list | tuple):
            rest += one
        elif isinstance(one, Namespace):
            rest.append(object.__getattribute__(one, "_Namespace__attrs"))
    return total


def _largest(args: Iterable[Any]) -> int:
    """The largest number among arguments, or the length of the longest text."""
    sizes = [
        len(a) if isinstance(a, str | bytes) else abs(a) for a in args if isinstance(a, str | bytes | int)
    ]
    return max(sizes, default=0)


# Upper bounds on the characters that an operation makes of a value and its arguments, for operations whose result is longer.


def _padded(value: Any, args: tuple[Any, ...]) -> int:
    return _size(value) + _largest(a for a in args if isinstance(a, int))


def _multiplied(value: Any, args: tuple[Any, ...]) -> int:
    return _size(value) * max(1, _largest(args))


def _replaced(value: Any, args: tuple[Any, ...]) -> int:
    if not isinstance(value, str | bytes) or len(args) < 2 or not isinstance(args[0], type(value)):
        return _size(value)
    return len(value) + value.count(args[0]) * _size(args[1])


def _joined(value: Any, args: tuple[Any, ...]) -> int:
    return _size(value) + (len(value) if hasattr(value, "__len__") else 0) * _largest(args)


def _mapped(value: Any, args: tuple[Any, ...]) -> int:
    longest = max((_size(v) for a in args if isinstance(a, dict) for v in a.values()), default=1)
    return _size(value) * longest


def _formatted(value: Any, args: Any, sign: str = "{") -> int:
    """Of `value.format(*args)`, or with the sign %, of `value % args`: all widths, and every value at every place."""
    text = value.decode("latin-1") if isinstance(value, bytes) else str(value)
    places = text.count(sign)
    widths = sum(int(run) if len(run) < 9 else MAX_CHARACTERS for run in re.findall(r"\d+", text))
    if "*" in text if sign == "%" else re.search(r":[^{}]*\{", text):  # a width among the values
        widths += places * _largest(args if isinstance(args, tuple | list) else [args])
    return len(text) + widths + places * _size(args)


def _percent(value: Any, args: tuple[Any, ...]) -> int:
    return _formatted(value, args, "%")


def _slow(value: Any, args: tuple[Any, ...]) -> int:
    return 64 * _multiplied(value, args)  # such filters go through a text many times


Estimate = Callable[[Any, tuple[Any, ...]], int]
METHODS: dict[str, Estimate] = {
    **dict.fromkeys(("center", "ljust", "rjust", "zfill", "to_bytes"), _padded),
    "expandtabs": _multiplied,
    "replace": _replaced,
    "join": lambda between, args: _joined(args[0], (between,)) if args else 0,
    "format": _formatted,
    "format_map": _formatted,
    "translate": _mapped,
}
FILTERS: dict[str, Estimate] = {
    **dict.fromkeys(("batch", "center", "round", "slice"), _padded),
    **dict.fromkeys(("indent", "tojson", "truncate", "xmlattr"), _multiplied),
    **dict.fromkeys(("striptags", "title", "urlize", "wordcount", "wordwrap"), _slow),
    **dict.fromkeys(("pprint", "string"), lambda value, args: _size(value)),
    "sum": lambda value, args: sum(64 * len(v) for v in value if isinstance(v, list | tuple)),
    "format": _percent,
    "join": _joined,
    "list": lambda value, args: 64 * len(value),
    "replace": _replaced,
}


def _limit_filter(function: Callable[..., Any], estimate: Estimate | None) -> Callable[..., Any]:
    """A filter whose results are counted, and which estimates what it would make before it makes it."""
    if estimate is None:
        return wraps(function)(lambda *args, **kwargs: _checked(function(*args, **kwargs)))
    at = 1 if hasattr(function, "jinja_pass_arg") else 0  # the context comes first

    @wraps(function)
    def filtered(*args: Any, **kwargs: Any) -> Any:
        before, value, more = args[:at], args[at], args[at + 1 :]
        spend(STEPS_OF_A_CALL)
        if isinstance(value, Iterator):
            value = list(islice(value, MAX_ITEMS + 1))
            require_items(len(value))
        if hasattr(value, "__len__") or estimate is not FILTERS["list"]:
            require_characters(estimate(value, (*more, *kwargs.values())))
        return _checked(function(*before, value, *more, **kwargs))

    return filtered


def _check_method(method: Any, owner: Any, args: tuple[Any, ...]) -> None:
    """Refuse the call of a method of a text or number that would make too much."""
    estimate = METHODS.get(method.__name__)
    if estimate is not None:
        require_characters(estimate(owner, args))
    elif method.__name__ in ("split", "rsplit", "splitlines") and len(owner) > MAX_ITEMS:
        at = args[0] if args and isinstance(args[0], str | bytes) and args[0] else None
        require_items(len(owner) if at is None else owner.count(at))


_GROWING = frozenset((str, bytes, int, bool))  # their methods may make more than they are given
_LITERALS = (nodes.Const, nodes.List, nodes.Tuple, nodes.Dict)
_ASKED = ("counted", "read_whole")  # functions of the environment that the compiled template asks


def _asked(name: str, node: nodes.Expr) -> nodes.Expr:
    return nodes.Call(nodes.EnvironmentAttribute(name), [node], [], None, None, lineno=node.lineno)


def _read_whole(node: nodes.Expr) -> nodes.Expr:
    return node if isinstance(node, _LITERALS) else _asked("read_whole", node)


class _Generator(CodeGenerator):
    """Compiles a template with checks in its loops, sums and joins."""

    def visit_For(self, node: nodes.For, frame: Any) -> None:
        node.iter = _asked("counted", node.iter)
        super().visit_For(node, frame)

    def visit_Call(self, node: nodes.Call, frame: Any, forward_caller: bool = False) -> None:
        if isinstance(node.node, nodes.EnvironmentAttribute) and node.node.name in _ASKED:
            self._write_call(node.node.name, node.args, frame)
        else:
            super().visit_Call(node, frame, forward_caller=forward_caller)

    def visit_Add(self, node: nodes.Add, frame: Any) -> None:
        self._write_call("add", [node.left, node.right], frame)

    def visit_Concat(self, node: nodes.Concat, frame: Any) -> None:
        escapes = frame.eval_ctx.volatile or frame.eval_ctx.autoescape
        self._write_call("join_markup" if escapes else "join_text", node.nodes, frame)

    def visit_Getitem(self, node: nodes.Getitem, frame: Any) -> None:
        if not isinstance(node.arg, nodes.Slice):
            super().visit_Getitem(node, frame)
            return
        self.write("environment.checked(")
        super().visit_Getitem(node, frame)
        self.write(")")

    def visit_Compare(self, node: nodes.Compare, frame: Any) -> None:
        first = node.ops[0]
        searches = first.op in ("in", "notin")
        literal = isinstance(node.expr, _LITERALS) or isinstance(first.expr, _LITERALS)
        if searches or not literal:  # what is equal to a literal is as short
            for operand in node.ops:
                operand.expr = _read_whole(operand.expr)
        if not (searches or literal):
            node.expr = _read_whole(node.expr)
        super().visit_Compare(node, frame)

    def _write_call(self, name: str, args: list[nodes.Expr], frame: Any) -> None:
        self.write(f"environment.{name}(")
        for arg in args:
            self.visit(arg, frame)
            self.write(", ")
        self.write(")")


class LimitedEnvironment(ImmutableSandboxedEnvironment):
    """The sandbox; `like` makes one with the extensions, filters and globals of another."""

    code_generator_class = _Generator
    intercepted_binops = frozenset(("*", "%", "**"))

    @classmethod
    def like(cls, other: Any) -> LimitedEnvironment:
        """An environment that renders as `other` does, but for the limits."""
        environment = cls(
            trim_blocks=other.trim_blocks,
            lstrip_blocks=other.lstrip_blocks,
            extensions=[type(extension) for extension in other.extensions.values()],
            finalize=_finalize,
        )
        environment.globals.update(other.globals)
        environment.globals.pop("lipsum", None)  # makes texts of any length of nothing
        now = environment.globals.get("strftime_now")
        if now is not None:
            environment.globals["strftime_now"] = lambda format: now(format[:MAX_DATE_FORMAT])
        environment.filters.update(other.filters)
        for name, function in environment.filters.items():
            environment.filters[name] = _limit_filter(function, FILTERS.get(name))
        return environment

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: B902
        spend(STEPS_OF_A_CALL)
        method, owner = __obj, getattr(__obj, "__self__", None)
        if owner is None and hasattr(__obj, "__wrapped__"):  # jinja wraps str.format
            method, owner = __obj.__wrapped__, getattr(__obj.__wrapped__, "__self__", None)
        if owner.__class__ in _GROWING:
            _checked(owner)
            _check_method(method, owner, (*args, *kwargs.values()) if kwargs else args)
        return _checked(super().call(__context, __obj, *args, **kwargs))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "%":
            if isinstance(left, str | bytes):
                require_characters(_percent(left, right))
        elif isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * right if operator == "**" else left.bit_length() + right.bit_length()
            if bits > MAX_BITS:
                raise TooMuch(f"an integer of more than {MAX_BITS:,} bits")
        elif operator == "*":
            for value, times in ((left, right), (right, left)):
                if isinstance(times, int) and isinstance(value, str | bytes):
                    require_characters(len(value) * times)
                elif isinstance(times, int) and isinstance(value, list | tuple):
                    require_items(len(value) * times)
        return _checked(super().call_binop(context, operator, left, right))

    @staticmethod
    def checked(value: Any) -> Any:
        """A part of a text or list."""
        return _checked(value)

    @staticmethod
    def read_whole(value: Any) -> Any:
        """What is searched, or compared to its end."""
        if value.__class__ is list or value.__class__ is tuple:
            require_characters(_size(value))
        return _checked(value)

    @staticmethod
    def add(left: Any, right: Any) -> Any:
        """left + right"""
        return _checked(left + right)

    @staticmethod
    def join_text(*parts: Any) -> str:
        """The parts of a ~ b ~ c."""
        return _checked("".join([str(_finalize(part)) for part in parts]))

    @staticmethod
    def join_markup(*parts: Any) -> str:
        """The parts of a ~ b ~ c where texts are escaped."""
        return _checked(markup_join([_finalize(part) for part in parts]))

    @staticmethod
    def concat(pieces: Iterable[str]) -> str:
        """What a template or a block of it writes."""
        pieces, size, texts = iter(pieces), 0, []
        while some := list(islice(pieces, JOINED_AT_ONCE)):
            size += sum(map(len, some))
            require_characters(size)
            texts.append("".join(some))
        return texts[0] if len(texts) == 1 else "".join(texts)

    @staticmethod
    def counted(items: Any) -> Any:
        """What a loop goes through; its rounds are counted."""
        try:
            rounds = len(items)
        except TypeError:
            return _counting(items)
        if rounds > LONG_LOOP:
            return _counting(items)
        spend(rounds + 1)
        return items


def _counting(items: Iterable[Any]) -> Iterator[Any]:
    for round, item in enumerate(items):
        if not round % ROUNDS_BETWEEN_LOOKS:
            _work.next_look = 0
        spend(1)
        yield item


def _finalize(value: Any) -> Any:
    """A value that is about to become text."""
    if value.__class__ is not str and isinstance(value, dict | list | tuple | Namespace):
        require_characters(_size(value))
    return value
