"""YAML as people write it, within limits: files in any Unicode encoding, numbers as in YAML 1.2, and 2e-4 is a number.

A settings file is small and shallow. A file that is too large or too deep, or whose aliases expand to too much, is refused
before it costs time or memory.
"""

import codecs
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml
from yaml.composer import ComposerError

from oribi.errors import ConfigError

_LARGEST = 1 << 20  # bytes of a file
_MOST = 100_000  # values, with aliases written out
_DEEPEST = 40  # nested brackets or indents
_ENCODINGS = (
    (codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"),
)  # fmt: skip


class YamlReader(yaml.SafeLoader):
    """Reads one document within the limits. Whole numbers are decimal unless they start with 0x or 0o; dates are text."""

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self.depth = 0
        self.sizes: dict[int, int] = {}  # values of each node, with aliases written out

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node:
        """One node; refused if it is nested too deep, or if its aliases make it too large."""
        mark, is_alias = self.peek_event().start_mark, self.check_event(yaml.AliasEvent)
        if self.depth == _DEEPEST:
            raise ComposerError(None, None, f"values lie more than {_DEEPEST} deep in each other", mark)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        if is_alias:
            if id(node) not in self.sizes:
                raise ComposerError(None, None, "an alias stands for what it is a part of", mark)
            return node
        size = self.sizes[id(node)] = 1 + sum(self.sizes[id(child)] for child in _children(node))
        if size > _MOST:
            raise ComposerError(None, None, f"its aliases stand for more than {_MOST:,} values", mark)
        return node


def _children(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.SequenceNode):
        return node.value
    return [part for pair in node.value for part in pair] if isinstance(node, yaml.MappingNode) else []


def _whole_number(loader: YamlReader, node: yaml.ScalarNode) -> int | str:
    text = node.value.replace("_", "")
    try:
        return int(text, 0) if re.match(r"[-+]?0[xo]", text) else int(text)
    except ValueError:  # thousands of digits
        return node.value


_REPLACED = ("int", "float", "timestamp")
YamlReader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in found if tag.rpartition(":")[2] not in _REPLACED]
    for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
YamlReader.add_implicit_resolver(
    "tag:yaml.org,2002:int",
    re.compile(r"^[-+]?(?:[0-9][0-9_]*|0x[0-9a-fA-F]+|0o[0-7]+)$"),
    list("-+0123456789"),
)
YamlReader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^(?:[-+]?(?:[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+|\.[0-9]+(?:[eE][-+]?[0-9]+)?"
        r"|\.(?:inf|Inf|INF))|\.(?:nan|NaN|NAN))$"
    ),
    list("-+.0123456789"),
)
YamlReader.add_constructor("tag:yaml.org,2002:int", _whole_number)


def settings_text(path: Path) -> str:
    """A settings file's text.

    Raises:
        ConfigError: it cannot be read, is too large, or is in no Unicode encoding.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(_LARGEST + 1)
    except (OSError, ValueError) as error:  # ValueError: a name with a NUL in it
        raise ConfigError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if len(raw) > _LARGEST:
        raise ConfigError(
            f"{path}: larger than {_LARGEST >> 20} MiB, so it is not a settings file; `oribi init` writes one"
        )
    encoding = next((name for mark, name in _ENCODINGS if raw.startswith(mark)), "utf-8")
    try:
        return raw.decode(encoding)
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ConfigError(
            f"{path}:{line}: not {encoding.removesuffix('-sig').upper()} (byte 0x{raw[error.start]:02x}); save the file as "
            "UTF-8"
        ) from error


def compose(text: str, origin: str) -> tuple[YamlReader, yaml.Node | None]:
    """The one document of a text, as nodes with their lines, and the reader that makes values of them.

    Raises:
        ConfigError: the text is not valid YAML, or beyond the limits.
    """
    try:
        reader = YamlReader(text)
        return reader, reader.get_single_node()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f":{mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        hint = "; indent with spaces" if "'\\t'" in problem else ""
        raise ConfigError(f"{origin}{where}: no valid YAML: {problem}{hint}") from error


def value_of(reader: YamlReader, node: yaml.Node, origin: str) -> Any:
    """The value of a node.

    Raises:
        ConfigError: its tag is not allowed in a settings file, or does not fit the value.
    """
    try:
        return reader.construct_object(node, deep=True)
    except (yaml.YAMLError, ValueError, TypeError, LookupError, AttributeError) as error:
        problem = getattr(error, "problem", None) or f"{node.tag} does not fit the value ({error})"
        raise ConfigError(f"{origin}:{node.start_mark.line + 1}: {problem}") from error


def words_of(reader: YamlReader, node: yaml.Node, origin: str) -> Any:
    """The value of a node with its words as they are written, not as YAML reads 1.0 or no; an empty node is None.

    Raises:
        ConfigError: as `value_of`.
    """
    value = value_of(reader, node, origin)
    if isinstance(node, yaml.SequenceNode):
        return [words_of(reader, child, origin) for child in node.value]
    if isinstance(node, yaml.MappingNode) and isinstance(value, dict):
        return {str(key.value): words_of(reader, child, origin) for key, child in node.value}
    return node.value if isinstance(node, yaml.ScalarNode) and value is not None else value


def parse(text: str, origin: str, *, as_written: bool = False) -> Any:
    """The value of a whole text; `as_written` leaves its words as they are.

    Raises:
        ConfigError: it is not valid YAML, or beyond the limits.
    """
    reader, node = compose(text, origin)
    return None if node is None else (words_of if as_written else value_of)(reader, node, origin)


def flags_of(words: Iterable[str]) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """A command line taken apart.

    Returns:
        The words before the first flag; and of each `--key value ...` or `--key=value`, its key, with underscores, and its
        values, none where it stands alone.
    """
    before: list[str] = []
    found: list[tuple[str, list[str]]] = []
    for word in words:
        if word.startswith("--"):
            key, equals, value = word[2:].partition("=")
            found.append((key.replace("-", "_"), [value] if equals else []))
        else:
            (found[-1][1] if found else before).append(word)
    return before, found


def parse_word(word: str, *, as_written: bool = False) -> Any:
    """The value of a word of a command line; the word itself if it is not valid YAML, such as a name with braces."""
    try:
        return parse(word, "flags", as_written=as_written)
    except ConfigError:
        return word
